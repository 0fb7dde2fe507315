"""MATLAB files: what comes back from the process that reads them, and what becomes of one that hangs or crashes."""

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
    "no structs": np.empty((1, 0), dtype=[("number", "O")]),
}


def plain(value: Any) -> Any:
    """Nested lists in MATLAB's order."""
    if value.dtype.names:
        return {name: [plain(item) for item in value[name].ravel(order="F")] for name in value.dtype.names}
    items = value.ravel(order="F")
    return [plain(item) for item in items] if value.dtype == object else items.tolist()


def test_values(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    variables = {f"v{number}": value for number, value in enumerate(VALUES.values())}
    savemat(path, {"before": 1, **variables, "after": "b"}, do_compression=True)
    expected = loadmat(path)
    assert read_mat(path, *variables) == {name: plain(expected[name]) for name in variables}


@pytest.mark.parametrize(("value", "words"), [(1j, "complex"), (csc_matrix(np.eye(2)), "csc_")])
def test_what_is_not_read_hinders_no_other_variable(tmp_path: Path, value: Any, words: str) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"a": value, "b": 1})
    assert read_mat(path, "b")["b"] == [1]
    with pytest.raises(DatasetError, match=rf"a\.mat: not a readable MATLAB file .*{words}"):
        read_mat(path, "a")


def test_a_variable_that_is_missing(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"b": 1, "c": "x"})
    with pytest.raises(DatasetError, match=r"a\.mat: no variable 'a' in it, found b, c"):
        read_mat(tmp_path / "a.mat", "b", "a")


@pytest.mark.parametrize(
    ("program", "words"),
    [("import time; time.sleep(60)", "timed out after 1 second"), ("import os; os.abort()", "status -6")],
)
def test_a_reader_that_hangs_or_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str) -> None:
    savemat(tmp_path / "a.mat", {"a": 1})
    (tmp_path / "child.py").write_text(program)
    monkeypatch.setattr("fgvc.data.mat._CHILD", tmp_path / "child.py")
    monkeypatch.setattr("fgvc.data.mat._SECONDS", 1)
    with pytest.raises(DatasetError, match=rf"a\.mat: not a readable MATLAB file .*{words}"):
        read_mat(tmp_path / "a.mat", "a")
