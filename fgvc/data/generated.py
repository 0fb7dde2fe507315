"""Folders that a program fills: whole or absent, and never mistaken for another one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fgvc.errors import DatasetError
from fgvc.io import atomic_folder, read_json, write_json_atomic


def write_once(root: Path, record: str, recipe: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Fill `root` by `write(folder)` unless it holds the same content already; returns `root`.

    The folder appears whole or not at all, also with several processes at it.

    Args:
        root: folder to make; it must not exist, or be empty, or be made by the same recipe.
        record: name of the JSON file in it that keeps the recipe.
        recipe: what determines the content, in types that JSON keeps.
        write: fills the folder that it is given.

    Raises:
        DatasetError: `root` holds something else.
    """
    if _holds(root, record, recipe):
        return root
    try:
        with atomic_folder(root) as temporary:
            write(temporary)
            write_json_atomic(temporary / record, recipe)
    except OSError:
        if not _holds(root, record, recipe):  # else another process was faster: its folder has the same content
            raise
    return root


def _holds(root: Path, record: str, recipe: Mapping[str, Any]) -> bool:
    """Whether `root` was made by this recipe; DatasetError where it holds anything else."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise DatasetError(f"{root}: is a file; set root to a folder")
    if not any(root.iterdir()):
        return False
    try:
        found = read_json(root / record)
    except FileNotFoundError as error:
        raise DatasetError(f"{root}: not empty and without {record}; set root to a new folder") from error
    except ValueError as error:
        raise DatasetError(f"{root / record}: not valid JSON; delete {root}, it will be made again") from error
    if found != recipe:
        raise DatasetError(
            f"{root / record}: made with {found}, asked for {dict(recipe)}; delete {root} or set another root"
        )
    return True
