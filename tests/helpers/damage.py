"""Damaging a dataset on purpose, and expecting the refusal to name what is wrong."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from scipy.io import loadmat, savemat

from fgvc.data import create_dataset
from fgvc.errors import DatasetError

Damage = Callable[[Path], object]
DamageTable = dict[str, tuple[Damage, list[str]]]


def replace_text(name: str, old: str, new: str) -> Damage:
    """Replace text that must be there."""

    def damage(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return damage


def remove(name: str) -> Damage:
    return lambda root: (root / name).unlink()


def write(name: str, content: bytes) -> Damage:
    return lambda root: (root / name).write_bytes(content)


def change_mat(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the variables of a MATLAB file."""

    def damage(root: Path) -> None:
        content = {key: value for key, value in loadmat(root / name).items() if not key.startswith("__")}
        change(content)
        savemat(root / name, content)

    return damage


def assert_refused(name: str, root: Path, table: Mapping[str, tuple[Damage, list[str]]], damage: str) -> None:
    """Inflict the damage of that name; reading, boxes included, must say all that the table expects, and where."""
    inflict, expected = table[damage]
    create_dataset(name, root=root, boxes=True)
    inflict(root)
    with pytest.raises(DatasetError) as caught:
        create_dataset(name, root=root, boxes=True)
    for part in [str(root), *expected]:
        assert part in str(caught.value)


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The system writes no more bytes to any file, as if the disk were full."""
    resource = pytest.importorskip("resource", reason="no limit to the size of files here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
