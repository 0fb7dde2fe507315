"""`scripts/prepare_data.py` as a user starts it."""

import errno
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_server import FileServer, serving
from PIL import Image
from small_birds import Place, cub_files

from fgvc.data.cards import list_cards

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "prepare_data.py"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as running:
        yield running


@pytest.fixture
def place(tmp_path: Path, server: FileServer) -> Place:
    place = Place(tmp_path, server, b"")
    place.serve(cub_files())
    return place


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple]:
    """The script in this process, in `tmp_path`: (exit status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as error:
            status = int(error.code or 0)
        return (status, *capfd.readouterr())

    return call


def test_from_a_shell_and_once_more(place: Place, here: Callable[..., tuple[int, str, str]]) -> None:
    arguments = ["cub", "--cards", str(place.folder / "cards"), "--workers", "2"]
    command = [sys.executable, str(SCRIPT), *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=120, env=settings)
    assert done.returncode == 0, done.stderr
    outputs = (done.stdout, here(*arguments)[1])
    root = Path("datasets") / "cub"
    assert f"{root}: cub is whole (train 9, test 6, 3 classes)" in outputs[0]
    assert f"{root}: cub was verified before and has not changed" in outputs[1]
    for output in outputs:
        assert output.endswith(f"next: python scripts/train.py experiment=birds dataset.root={root}\n")
    assert len(place.server.requests) == 1
    assert (place.folder / root / "fingerprint.json").is_file()
    assert (place.folder / "datasets" / "archives" / "cub" / "birds.tgz").is_file()


def test_refusals(place: Place, here: Callable[..., tuple[int, str, str]]) -> None:
    cards = ("--cards", str(place.folder / "cards"), "--root", str(place.root))
    refusals = {
        "no such folder": ("cub", *cards, "--verify-only"),
        "no card of dataset 'owls'": ("owls", *cards),
        "nothing.tar: no such file": ("cub", *cards, "--from-archive", "nothing.tar"),
        "folder needs no preparation": ("folder",),
    }
    for message, arguments in refusals.items():
        status, _, stderr = here(*arguments)
        assert (status, "Traceback" in stderr) == (2, False), stderr
        assert "error: " in stderr and message in stderr
    with pytest.raises(Exception, match="no card"):
        here("owls", *cards, "--debug")


def test_changed_files_and_a_wrong_count_exit_with_2(place: Place, here: Callable[..., tuple[int, str, str]]) -> None:
    cards = ("--cards", str(place.folder / "cards"), "--root", str(place.root))
    assert here("cub", *cards)[0] == 0
    image = next(place.root.rglob("0.png"))
    Image.new("RGB", (4, 4)).save(image)
    status, _, stderr = here("cub", *cards, "--verify-only")
    assert status == 2 and f"{image.relative_to(place.root)}: other content" in stderr
    place.write_card(splits={"train": 5994, "test": 6})
    status, _, stderr = here("cub", *cards)
    assert status == 2 and "train: expected 5994 images, found 9" in stderr


def test_a_full_disk_is_one_message(
    place: Place, here: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = []

    def full(file: int) -> None:
        flushes.append(file)
        if len(flushes) == 2:  # the first one is that of the small file beside the part
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, stderr = here("cub", "--cards", str(place.folder / "cards"))
    part = place.folder / "datasets" / "archives" / "cub" / "birds.tgz.part"
    assert (status, stderr) == (1, f"error: no space left on the disk ({part}); free some and start again\n")


def test_synthetic(here: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.data.synthetic.draw_image", lambda *_: Image.new("RGB", (8, 8)))  # for speed
    status, stdout, stderr = here("synthetic")
    assert status == 0, stderr
    assert "datasets/synthetic: synthetic is whole (train 384, test 240, 12 classes)" in stdout
    assert "has not changed" in here("synthetic")[1]


def test_the_help_names_every_card(here: Callable[..., tuple[int, str, str]]) -> None:
    status, stdout, _ = here("--help")
    assert status == 0
    for name in list_cards(ROOT / "datasets"):
        assert name in stdout
