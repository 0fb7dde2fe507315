"""MATLAB files: our reader finds what scipy's does."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import csc_matrix

from fgvc.data.mat import read_mat
from fgvc.errors import DatasetError

STRUCTS = np.array([(1, "a b"), (2.5, "ünï")], dtype=[("number", "O"), ("name", "O")]).reshape(1, 2)
VALUES: dict[str, Any] = {
    **{kind: np.array([[1, 2], [3, 100]], dtype=kind) for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")},
    **{kind: np.array([[1, 0.5, -3e9]], dtype=kind) for kind in ("f4", "f8")},
    "flag": np.array([[True, False]]),
    "text": "Dark-eyed Junco (Oregon)",
    "text beyond Latin": "Žluťoučký 鳥",
    "several lines": np.array(["abc", "def"]),
    "no text": "",
    "cells": np.array([["a", 3, np.array([[1, 2]])]], dtype=object),
    "a column of cells": np.array([["a"], ["bc"]], dtype=object),
    "cells in cells": np.array([[np.array([["a", "b"]], dtype=object), 3]], dtype=object),
    "structs": STRUCTS,
    "nothing": np.empty((0, 0)),
}


def plain(value: Any) -> Any:
    """Nested lists in MATLAB's order; scipy keeps the shape, ours is a row."""
    if value.dtype.names:
        return {name: plain(value[name]) for name in value.dtype.names}
    items = value.ravel(order="F")
    return [plain(item) for item in items] if value.dtype == object else items.tolist()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("name", VALUES)
def test_values(tmp_path: Path, name: str, compressed: bool) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"before": 1, "a": VALUES[name], "after": "b"}, do_compression=compressed)
    assert plain(read_mat(path, "a")["a"]) == plain(loadmat(path)["a"])


def test_the_other_byte_order(tmp_path: Path) -> None:
    def element(kind: int, data: bytes) -> bytes:
        return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

    matrix = element(6, struct.pack(">II", 6, 0)) + element(5, struct.pack(">ii", 1, 2)) + element(1, b"a")
    matrix += struct.pack(">HHhh", 4, 3, 7, -8)  # a small element: its size comes first here
    content = b"MATLAB 5.0".ljust(124) + struct.pack(">HH", 0x0100, 0x4D49) + element(14, matrix)
    (tmp_path / "a.mat").write_bytes(content)
    assert plain(read_mat(tmp_path / "a.mat", "a")["a"]) == [7, -8] == plain(loadmat(tmp_path / "a.mat")["a"])


@pytest.mark.parametrize(("value", "words"), [(1j, "complex"), (csc_matrix(np.eye(2)), "class 5")])
def test_what_is_not_read_hinders_no_other_variable(tmp_path: Path, value: Any, words: str) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"a": value, "b": 1})
    assert plain(read_mat(path, "b")["b"]) == [1]
    with pytest.raises(DatasetError, match=rf"a\.mat: not a readable MATLAB file .*{words}"):
        read_mat(path, "a")


def test_an_old_version_is_refused(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"a": np.arange(50)}, format="4")
    with pytest.raises(DatasetError, match=r"no MATLAB file of version 5 to 7\.2"):
        read_mat(tmp_path / "a.mat", "a")
