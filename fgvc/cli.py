"""The command `fgvc`: every script is a subcommand, and how a script ends."""

import argparse
import ast
import difflib
import errno
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fgvc import __version__
from fgvc.errors import ConfigError, UserError
from fgvc.resources import resource_folder


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


def main() -> None:
    """`fgvc COMMAND ...` does what scripts/COMMAND.py does, and ends as it does."""
    exit_on_user_error(_dispatch)


def find_commands() -> dict[str, Path]:
    """The scripts by the names of their commands."""
    return {path.stem: path for path in sorted(resource_folder("scripts").glob("*.py"))}


def _dispatch() -> None:
    commands, given = find_commands(), sys.argv[1:] or ["--help"]
    if given[0].startswith("-"):
        _parser(commands).parse_args(given)  # ends the process, as all that may stand before a command does
    name = given[0].replace("-", "_")
    if name not in commands:
        close = difflib.get_close_matches(name, commands)
        fix = f"nearest: {', '.join(close)}" if close else f"choose one of {', '.join(commands)}"
        raise ConfigError(f"unknown command {given[0]!r}; {fix}")
    sys.argv[:2] = [f"fgvc {name}"]  # what argparse and Hydra call the program
    _load_main(name, commands[name])()


def _load_main(name: str, script: Path) -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location(f"fgvc.scripts.{name}", script)
    assert spec is not None and spec.loader is not None  # as it is for any file named *.py
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where what it defines is looked for
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


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
