"""The command `fgvc`: every script is a subcommand, and how a script ends."""

import argparse
import ast
import contextlib
import difflib
import errno
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fgvc import __version__
from fgvc.errors import ConfigError, UserError
from fgvc.resources import resource_folder

_GONE = {
    "replay": "a failed step is loaded in ten lines: docs/running.md, 'A number that is not finite'",
}


def main() -> None:
    """`fgvc COMMAND ...` does what scripts/COMMAND.py does, and ends as it does."""
    with _exit_status():
        commands, given = find_commands(), sys.argv[1:] or ["--help"]
        if given[0].startswith("-"):
            _parser(commands).parse_args(given)  # ends the process, as all that may stand before a command does
        name = given[0].replace("-", "_")
        if name in _GONE:
            raise ConfigError(f"the command {name} is gone: {_GONE[name]}")
        if name not in commands:
            close = difflib.get_close_matches(name, commands)
            fix = f"nearest: {', '.join(close)}" if close else f"choose one of {', '.join(commands)}"
            raise ConfigError(f"unknown command {given[0]!r}; {fix}")
        sys.argv[:2] = [f"fgvc {name}"]  # what argparse and Hydra call the program
        spec = importlib.util.spec_from_file_location(f"fgvc.scripts.{name}", commands[name])
        assert spec is not None and spec.loader is not None  # as it is for any file named *.py
        script: Any = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = script  # so that what it defines is found
        spec.loader.exec_module(script)
        script.main()


def exit_on_user_error(script_main: Callable[[], None]) -> None:
    """Call the main function of a script and turn the expected ways to fail into an exit status.

    2 (or the status of the error): a user's mistake (`UserError`, or a path that cannot be used), its message on
    stderr; with `--debug` among the arguments, FGVC_DEBUG=1 or HYDRA_FULL_ERROR=1 the traceback comes through instead.
    1: the disk is full. 130, 143: interrupted by SIGINT (from the keyboard), SIGTERM. 141: the reader of stdout went
    away (`| head`). Every other exception passes through: it is a defect and needs its traceback.
    """
    with _exit_status():
        script_main()


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    """As `exit_on_user_error`, for a block."""
    # read before the block, which may set these variables for its own ends, as the Hydra launcher does
    debug = "--debug" in sys.argv or "1" in (os.environ.get("FGVC_DEBUG"), os.environ.get("HYDRA_FULL_ERROR"))
    try:
        yield
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


def _stdout_is_closed() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:
        # what is still buffered goes nowhere, so that the interpreter's last flush does not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def find_commands() -> dict[str, Path]:
    """The scripts by the names of their commands."""
    return {path.stem: path for path in sorted(resource_folder("scripts").glob("*.py"))}


def _parser(commands: dict[str, Path]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fgvc",
        usage="fgvc [-h] [--version] COMMAND [ARGUMENT ...]",
        description="Fine-grained visual recognition with second-order statistics.",
        epilog="fgvc COMMAND --help shows the arguments of one.",
    )
    parser.add_argument("--version", action="version", version=f"fgvc {__version__}")
    listed = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, path in commands.items():
        listed.add_parser(name, help=_first_line(path).replace("%", "%%"))
    return parser


def _first_line(script: Path) -> str:
    """What a script says it does, read from its text: an import would take seconds."""
    return (ast.get_docstring(ast.parse(script.read_bytes())) or "").partition("\n")[0]
