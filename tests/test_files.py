"""Folders that appear whole or not at all."""

from pathlib import Path

import pytest

from fgvc.files import atomic_folder


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
