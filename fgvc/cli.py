"""How a script ends: a status for the shell and one readable message in place of a traceback."""

import errno
import os
import sys
from collections.abc import Callable, Sequence

from fgvc.errors import UserError


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Call `main` and turn the expected ways to fail into an exit status.

    2 (or what else the error says): a user's mistake (`UserError`, or a path that cannot be used), its message on
    stderr; with `--debug` among the arguments, FGVC_DEBUG=1 or HYDRA_FULL_ERROR=1 the traceback comes through instead.
    1: the disk is full. 130, 143: interrupted by SIGINT (from the keyboard), SIGTERM. 141: the reader of stdout went
    away (`| head`). Every other exception passes through: it is a defect and needs its traceback.
    """
    debug = _debug()  # before `main`, which may set these variables for its own ends, as the Hydra launcher does
    try:
        main()
        sys.stdout.flush()  # here, not at interpreter exit, where a closed pipe could no longer be caught
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 130))
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise  # another pipe broke, for example that of a data loader
        sys.exit(141)  # 128 + SIGPIPE, as the shell's own tools
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        if debug:
            raise
        print(f"error: {error.filename}: {error.strerror}; give another path", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or debug:
            raise
        print(
            f"error: no space left on the disk ({error.filename or error}); free some and start again", file=sys.stderr
        )
        sys.exit(1)


def end_with_notes(notes: Sequence[str], *, strict: bool) -> None:
    """Say on stderr what a script left out or doubts; with `strict` any of it makes the exit status 1."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if notes and strict:
        sys.exit(1)


def _debug() -> bool:
    return "--debug" in sys.argv or "1" in (os.environ.get("FGVC_DEBUG"), os.environ.get("HYDRA_FULL_ERROR"))


def _stdout_is_closed() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:
        # what is still buffered goes nowhere, so that the interpreter's last flush does not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
