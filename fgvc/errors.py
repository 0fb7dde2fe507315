"""Errors that a user can fix: each message names the file or key, the value found and the fix; and text to show."""

import re
import signal


class UserError(Exception):
    """Base of every error caused by input (a path, a setting, a damaged file) and not by a defect of fgvc.

    The command line prints its message without a traceback and exits with `exit_status`.
    """

    exit_status: int = 2

    def __init__(self, message: str = "") -> None:
        # torch raises a loader worker's error again; the message is then "Caught ..." with a traceback
        own = f"\n{type(self).__module__}.{type(self).__qualname__}: "
        if message.startswith("Caught "):
            message = message.rpartition(own)[2].strip()
        super().__init__(message)


class ConfigError(UserError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DatasetError(UserError):
    """A dataset's folder or one of its files is missing, damaged or inconsistent."""


class ImageError(UserError):
    """An image to classify or explain is missing or cannot be decoded."""


class WeightsError(UserError):
    """A weights file is missing, unreadable or belongs to another architecture."""


class RunError(UserError):
    """A run folder is missing, incomplete or belongs to another configuration."""


class NothingToShowError(RunError):
    """What was asked for needs files that these runs do not have; nothing is wrong with those they have."""


class DivergenceError(UserError):
    """Training produced NaN or infinity, or its loss diverged; the message names the place and the best weights."""

    exit_status = 1


class OutOfMemoryError(UserError):
    """The memory of the machine or its GPU is too small; the message names a setting that needs less."""

    exit_status = 1


class ProcessLostError(UserError):
    """Another process of the run has ended; its message names the reason."""

    exit_status = 1


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop. It is not a `UserError`, so the remaining runs of a sweep stop as well.

    Attributes:
        signal_name: Name of the signal: "SIGTERM" or "SIGINT".
        exit_status: Exit status 128 + the signal's number, as in shells: 143 or 130.
    """

    def __init__(self, signal_name: str, message: str) -> None:
        super().__init__(message)
        self.signal_name = signal_name
        self.exit_status = 128 + signal.Signals[signal_name]


def is_unicode(text: str) -> bool:
    """Return whether text can be written as UTF-8: a name of a file in another encoding cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# control characters but line end and tab, and marks of direction
_UNSEEN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")


def visible(text: str) -> str:
    """Return text with what would act on a terminal (control characters, marks of direction) as escapes: \\x1b."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: object) -> str:
    """Return a name or path from outside as `visible` text without line ends."""
    return visible(str(text)).replace("\n", "\\n").replace("\t", "\\t")
