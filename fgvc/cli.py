"""The command `fgvc`, where every script is a subcommand, and the exit status of scripts."""

import argparse
import ast
import contextlib
import difflib
import errno
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from fgvc import __version__
from fgvc.errors import ConfigError, UserError, visible
from fgvc.resources import resource_folder

# figures are files: the user's window (Jupyter sets one) is not asked for; an unknown one ends matplotlib's import
os.environ["MPLBACKEND"] = "agg"
# numbers that matplotlib and tqdm read from the environment, where other text ends their import
_NUMBERS = {
    "SOURCE_DATE_EPOCH": r"\d{1,11}",
    **dict.fromkeys(("TQDM_INITIAL", "TQDM_UNIT_DIVISOR"), r"\d{1,9}"),
    **dict.fromkeys(("TQDM_MININTERVAL", "TQDM_MAXINTERVAL", "TQDM_SMOOTHING", "TQDM_DELAY"), r"\d{1,9}(\.\d+)?"),
}
for _name, _form in _NUMBERS.items():
    if not re.fullmatch(_form, os.environ.get(_name, "0")):
        del os.environ[_name]

_ANOTHER_PATH = "give another path"
_SYSTEM_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and start again"),
    errno.EFBIG: "raise the limit of a file's size (ulimit -f) or write to another disk",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n) or lower trainer.workers"),
    errno.ENOMEM: "close other programs, or raise the limit of memory (ulimit -v)",
    errno.EAGAIN: "close other programs, or raise the limit of processes (ulimit -u)",
    **dict.fromkeys((errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR), _ANOTHER_PATH),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EROFS, errno.ELOOP), _ANOTHER_PATH),
}
"""What to do about an error of the operating system, by its number."""


def main() -> None:
    """Run `fgvc COMMAND ...`: the same as scripts/COMMAND.py, with the same exit status."""
    with _visible_output(), _exit_status():
        commands, given = find_commands(), sys.argv[1:] or ["--help"]
        if given[0].startswith("-"):
            _parser(commands).parse_args(given)  # ends the process: every option before a command does
        name = given[0].replace("-", "_")
        if name not in commands:
            close = difflib.get_close_matches(name, commands)
            fix = f"nearest: {', '.join(close)}" if close else f"choose one of {', '.join(commands)}"
            raise ConfigError(f"unknown command {given[0]!r}; {fix}")
        sys.argv[:2] = [f"fgvc {name}"]  # the program's name for argparse and Hydra
        spec = importlib.util.spec_from_file_location(f"fgvc.scripts.{name}", commands[name])
        assert spec is not None and spec.loader is not None  # true for any file named *.py
        script: Any = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = script  # so that its definitions can be found by module name
        spec.loader.exec_module(script)
        script.main()


def exit_on_user_error(script_main: Callable[[], None]) -> None:
    """Call the main function of a script and turn expected failures into an exit status.

    2 (or the status of the error): a user's mistake (`UserError`, a path that cannot be used, features that are not
    finite) or a limit of the system, with its message on stderr. With the argument `--debug`, FGVC_DEBUG=1 or
    HYDRA_FULL_ERROR=1 the traceback is shown instead. 1: the disk is full. 130, 143: interrupted by SIGINT (keyboard),
    SIGTERM. 141: the reader of stdout is gone (`| head`). Every other exception passes through, since it is a defect
    and needs its traceback.
    """
    with _visible_output(), _exit_status():
        script_main()


class _Visible:
    """A stream on which text from data (names of classes and files, labels) can do nothing but be read."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> Any:
        start = "\r" if text.startswith("\r") else ""  # a progress bar goes back to the start of its line
        return self._stream.write(start + visible(text[len(start) :]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _visible_output() -> Iterator[None]:
    _open_streams()  # before they are wrapped, which hides what they are
    # the casts: redirect_stdout is typed for whole files
    stdout, stderr = cast(TextIO, _Visible(sys.stdout)), cast(TextIO, _Visible(sys.stderr))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    """Do as `exit_on_user_error`, for a block."""
    sys.argv[1:] = [
        # a shell leaves the "~" behind "=" as it is
        argument.replace("=~", f"={Path.home()}", 1) if re.match("--[a-z-]+=~/", argument) else argument
        for argument in sys.argv[1:]
    ]
    # read first, since the Hydra launcher sets these variables for itself
    debug = "--debug" in sys.argv or "1" in (os.environ.get("FGVC_DEBUG"), os.environ.get("HYDRA_FULL_ERROR"))
    try:
        if any(re.fullmatch("(--[a-z-]+=)?", argument) for argument in sys.argv[1:]):
            raise ConfigError("an argument is empty (a shell variable without a value?); give it or leave it out")
        yield
        sys.stdout.flush()  # here, since a closed pipe cannot be caught at interpreter exit
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
            raise  # another pipe broke, e.g. that of a data loader
        sys.exit(141)  # 128 + SIGPIPE, as for shell tools
    except OSError as error:
        if error.errno not in _SYSTEM_ERRORS or debug:
            raise
        name = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {name}{error.strerror}; {_SYSTEM_ERRORS[error.errno]}", file=sys.stderr)
        sys.exit(1 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2)
    except ArithmeticError as error:
        # looked up, not imported: --help needs no torch
        if debug or not isinstance(error, getattr(sys.modules.get("fgvc.spectral"), "EigendecompositionError", ())):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _open_streams() -> None:
    """Escape what a terminal has no letters for, and open a closed stream: the next file would take its number."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_with_notes(notes: Sequence[str], *, strict: bool) -> None:
    """Print a script's notes on stderr; with `strict`, exit with 1 if there are any."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if notes and strict:
        sys.exit(1)


def _stdout_is_closed() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:
        # discard what is still buffered, otherwise the interpreter's last flush raises
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def find_commands() -> dict[str, Path]:
    """Return the scripts by command name."""
    return {path.stem: path for path in sorted(resource_folder("scripts").glob("*.py"))}


def _parser(commands: dict[str, Path]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fgvc",
        usage="fgvc [-h] [--version] COMMAND [ARGUMENT ...]",
        description="Fine-grained visual recognition with second-order statistics.",
        epilog="fgvc COMMAND --help shows the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"fgvc {__version__}")
    listed = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, path in commands.items():
        listed.add_parser(name, help=_first_line(path).replace("%", "%%"))
    return parser


def _first_line(script: Path) -> str:
    """Return the first docstring line of a script, read as text, since an import would take seconds."""
    return (ast.get_docstring(ast.parse(script.read_bytes())) or "").partition("\n")[0]
