"""Checksums of files."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

_CHUNK = 1 << 20  # bytes
_SHOW_ABOVE = 1 << 28  # bytes; smaller files take less than a second


def checksum_problem(path: Path, checksums: Mapping[str, str]) -> str | None:
    """How the file's checksums differ from the expected ones ("md5 is ..., expected ..."); None where they agree."""
    found = file_digests(path, checksums)
    pairs = [(name, found[name], expected) for name, expected in checksums.items() if found[name] != expected]
    return "; ".join(f"{name} is {actual}, expected {expected}" for name, actual, expected in pairs) or None


def file_digests(path: Path, algorithms: Collection[str]) -> dict[str, str]:
    """Hexadecimal digests of a file's content by algorithm, read once; nothing is read where none is asked for."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    if not digests:
        return {}
    size = path.stat().st_size
    with path.open("rb") as file, byte_bar(f"checking {path.name}", size, hide=size < _SHOW_ABOVE) as bar:
        while chunk := file.read(_CHUNK):
            for digest in digests.values():
                digest.update(chunk)
            bar.update(len(chunk))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def byte_bar(name: str, total: int | None, initial: int = 0, hide: bool = False) -> "tqdm[Any]":
    """A progress bar that counts bytes, shown on a terminal only."""
    # disable=None: no bar where stderr is not a terminal
    return tqdm(total=total, initial=initial, desc=name, unit="B", unit_scale=True, disable=hide or None)
