"""Folders that appear whole or not at all."""

from pathlib import Path

import numpy as np
import pytest

from fgvc.files import atomic_folder
from fgvc.reading import read_npz


@pytest.mark.parametrize("exists", [True, False])
def test_the_folder_appears_whole(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "deep" / "set"
    if exists:
        path.mkdir(parents=True)
    with atomic_folder(path) as folder:
        (folder / "a").touch()
        assert path.exists() == exists
    assert [item.relative_to(tmp_path).as_posix() for item in (tmp_path / "deep").rglob("*")] == [
        "deep/set",
        "deep/set/a",
    ]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), atomic_folder(tmp_path / "set") as folder:
        (folder / "a").touch()
        raise failure
    assert not list(tmp_path.iterdir())


def test_what_came_in_the_meantime_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with pytest.raises(FileExistsError) as caught, atomic_folder(path):
        path.mkdir()
        (path / "theirs").touch()
    assert caught.value.filename == str(path)
    assert [item.name for item in tmp_path.rglob("*")] == ["set", "theirs"]


def test_a_folder_is_replaced_only_where_that_is_asked_for_and_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for content in ("first", "second"):
        with atomic_folder(path, replace=True) as folder:
            (folder / content).touch()
    with pytest.raises(KeyError), atomic_folder(path, replace=True) as folder:
        (folder / "third").touch()
        raise KeyError
    assert [entry.name for entry in tmp_path.rglob("*")] == ["out", "second"]


def test_damaged_archives_are_refused_without_advice_to_unpickle_them(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(1000))
    np.testing.assert_array_equal(read_npz(path)["x"], np.arange(1000))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[500] ^= 1
    np.save(tmp_path / "alone.npy", np.arange(3))
    for content in (b"", b"PK", whole[:-30], bytes(flipped), (tmp_path / "alone.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r".") as caught:
            read_npz(path)
        assert "unsafely" not in str(caught.value)
    np.savez(path, x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        read_npz(path)
