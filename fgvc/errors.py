"""Errors that a user can fix: each message names the file or key, the value found and the fix."""

import signal


class UserError(Exception):
    """Base of every error caused by input (a path, a setting, a damaged file) rather than by a defect of fgvc.

    The command line prints its message without a traceback and exits with `exit_status`.
    """

    exit_status: int = 2

    def __init__(self, message: str = "") -> None:
        # torch raises the error of a loader's worker process again with "Caught ..." and a traceback as its message
        own = f"\n{type(self).__module__}.{type(self).__qualname__}: "
        if message.startswith("Caught "):
            message = message.rpartition(own)[2].strip()
        super().__init__(message)


class ConfigError(UserError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DatasetError(UserError):
    """A dataset's folder or one of its files is missing, damaged or inconsistent."""


class ImageError(UserError):
    """An image to be named or explained is missing or cannot be decoded."""


class WeightsError(UserError):
    """A weights file is missing, unreadable or belongs to another architecture."""


class RunError(UserError):
    """A run folder is missing, incomplete or belongs to another configuration."""


class DivergenceError(UserError):
    """Training produced NaN or infinity; the message says where and which checkpoint is good."""

    exit_status = 1


class OutOfMemoryError(UserError):
    """The memory of the machine or of its GPU does not suffice; the message says which setting needs less of it."""

    exit_status = 1


class ProcessLostError(UserError):
    """Another process of a run over several has ended; what happened is in the message of that one."""

    exit_status = 1


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop. Not a `UserError`: the remaining runs of a sweep stop as well.

    Attributes:
        signal_name: "SIGTERM" or "SIGINT".
        exit_status: 128 + the signal's number, as shells have it: 143 or 130.
    """

    def __init__(self, signal_name: str, message: str) -> None:
        super().__init__(message)
        self.signal_name = signal_name
        self.exit_status = 128 + signal.Signals[signal_name]
