"""Folders that appear whole or not at all, locks, damaged archives."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from fgvc.errors import RunError
from fgvc.foreign import read_npz
from fgvc.io import atomic_path, locked, replaced_folder, write_output
from fgvc.models.files import write_weights


@pytest.mark.parametrize("exists", [True, False])
def test_the_folder_appears_whole(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "deep" / "set"
    if exists:
        path.mkdir(parents=True)
    with replaced_folder(path) as folder:
        (folder / "a").touch()
        assert path.exists() == exists
    assert [item.relative_to(tmp_path).as_posix() for item in (tmp_path / "deep").rglob("*")] == [
        "deep/set",
        "deep/set/a",
    ]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), replaced_folder(tmp_path / "set") as folder:
        (folder / "a").touch()
        raise failure
    assert not list(tmp_path.iterdir())


def save_opened(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)


def as_safetensors_says_it(_tensors: dict[str, torch.Tensor], _path: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("save", [save_opened, as_safetensors_says_it])
def test_a_full_disk_is_said_whatever_a_library_makes_of_it(tmp_path: Path, save: Callable[..., None]) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_path(tmp_path / "weights") as temporary:
        temporary.symlink_to("/dev/full")
        save({"a": torch.zeros(100_000)}, temporary)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "weights"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=[0o002, 0o027, 0o077], ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode of a new file, by this umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_weights_have_the_mode_of_any_new_file(tmp_path: Path, mode: int) -> None:
    """safetensors makes a file that its owner alone may read."""
    path = tmp_path / "new" / "w.safetensors"
    for _ in range(2):  # the second replaces a file whose mode is another
        write_weights(path, {"a": torch.zeros(1)}, epoch=1)
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o666) == (mode, mode)
        path.chmod(0o600)
    assert [file.name for file in path.parent.iterdir()] == ["w.safetensors"]


def test_what_came_in_the_meantime_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with pytest.raises(FileExistsError) as caught, replaced_folder(path):
        path.mkdir()
        (path / "theirs").touch()
    assert caught.value.filename == str(path)
    assert [item.name for item in tmp_path.rglob("*")] == ["set", "theirs"]


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    mine = tmp_path / ".out.tmp" / "mine"  # a folder of someone else's
    mine.parent.mkdir()
    mine.touch()
    path = tmp_path / "out"
    for content in ("first", "second"):
        with replaced_folder(path, lambda _: None) as folder:
            (folder / content).touch()
    with pytest.raises(KeyError), replaced_folder(path, lambda _: None) as folder:
        (folder / "third").touch()
        raise KeyError
    assert {entry.name for entry in tmp_path.rglob("*")} == {"out", "second", ".out.tmp", "mine"}


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


def test_who_waits_for_a_lock_file_holds_the_one_that_is_in_place(tmp_path: Path) -> None:
    path, waiting, has_it, leave = tmp_path / "x.lock", *(threading.Event() for _ in range(3))

    def wait() -> None:
        with locked(path, on_wait=waiting.set) as free:
            assert free
            has_it.set()
            leave.wait(10)

    thread = threading.Thread(target=wait, daemon=True)
    with locked(path) as first:
        thread.start()
        assert first and waiting.wait(10) and not has_it.is_set()
    assert has_it.wait(10)  # the first deleted its file, so the lock on that one would keep nobody out
    with locked(path) as third:
        assert not third
    leave.set()
    thread.join(10)
    with locked(path) as fourth:
        assert fourth
    assert not list(tmp_path.iterdir())


def test_a_file_that_holds_something_is_no_lock_file(tmp_path: Path) -> None:
    for lock, act in {
        "x.lock": lambda: locked(tmp_path / "x.lock").__enter__(),
        ".fgvc-made.lock": lambda: write_output(tmp_path / "a.csv", "1"),
        ".set.lock": lambda: replaced_folder(tmp_path / "set", print).__enter__(),
    }.items():
        (tmp_path / lock).write_text("mine")
        with pytest.raises(FileExistsError, match="is no lock file") as caught:
            act()
        assert caught.value.filename == str(tmp_path / lock) and (tmp_path / lock).read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_lock_is_not_held_by_a_child_that_outlives_the_process(tmp_path: Path) -> None:
    """As a loader's worker does that of a killed run."""
    path, pipe = tmp_path / "lock", os.pipe()
    parent = os.fork()
    if parent == 0:
        lock = locked(path)
        assert lock.__enter__()
        if os.fork() == 0:  # the child: lives until the test has read the pipe's other end
            os.close(pipe[1])
            os.read(pipe[0], 1)
            os._exit(0)
        os._exit(0)  # killed: nothing is released by hand
    os.waitpid(parent, 0)
    assert path.exists()
    with locked(path) as free:
        assert free
    os.close(pipe[1])


def test_a_result_replaces_only_what_was_made_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.csv"
    for text in ("1", "2", "2", "3"):
        write_output(file, text)
    litter, mine = file.with_name(".a.0123abcd.tmp.csv"), file.with_name(".a.mine.tmp.csv")
    of_record = file.with_name("..fgvc-made.0123abcd.tmp.json")
    for left in (litter, of_record, mine):
        left.touch()
    write_output(file, "4")
    assert file.read_text() == "4" and not litter.exists() and not of_record.exists() and mine.exists()
    write_output(file.with_name("ü" * 125 + ".csv"), "the longest name of many systems")
    with pytest.raises(FileExistsError, match=r"a\.csv"):
        write_output(file, "5", "another kind")
    with pytest.raises(RunError, match="the name is not Unicode"):
        write_output(file.with_name(os.fsdecode(b"\xe4.csv")), "6")
    file.write_text("edited")
    (tmp_path / "link.csv").symlink_to(file)
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.csv").mkdir()
    for other in (file, tmp_path / "link.csv", tmp_path / "dangling.csv", tmp_path / "folder.csv"):
        with pytest.raises(FileExistsError, match="did not make it, or it changed"):
            write_output(other, "6")
    assert file.read_text() == "edited" and not (tmp_path / "nowhere").exists()


def test_a_result_is_known_again_by_the_call_after_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.csv"
    write_output(file, "1")
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target == file:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        write_output(file, "2")
    write_output(file, "3")
    assert file.read_text() == "3"
