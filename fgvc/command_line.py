"""The command `fgvc`: each script is a subcommand of its name, and all are listed without importing any of them."""

import argparse
import ast
import difflib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgvc import __version__
from fgvc.cli import exit_on_user_error
from fgvc.errors import ConfigError
from fgvc.resources import resource_folder


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
