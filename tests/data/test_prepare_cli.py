"""`scripts/prepare_data.py` as a user starts it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import ROOT, Train, refused, run
from file_server import FileServer, serving
from PIL import Image
from small_birds import Place, cub_files

from fgvc.data.cards import list_cards


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
def prepare(here: Train, tmp_path: Path) -> Train:
    """The script in this process, in `tmp_path`."""
    return lambda *arguments: here("prepare_data.py", *arguments, cwd=tmp_path)


def test_from_a_shell_and_once_more(place: Place, prepare: Train) -> None:
    arguments = ["cub", "--cards", str(place.folder / "cards"), "--workers", "2"]
    done = run("prepare_data.py", *arguments, cwd=place.folder)
    assert done.returncode == 0, done.stderr
    outputs = (done.stdout, prepare(*arguments).stdout)
    root = Path("datasets") / "cub"
    assert f"{root}: cub is whole (train 9, test 6, 3 classes)" in outputs[0]
    assert f"{root}: cub was verified before and has not changed" in outputs[1]
    for output in outputs:
        assert output.endswith(f"next: fgvc train experiment=birds dataset.root={root}\n")
    assert len(place.server.requests) == 1
    assert (place.folder / root / "fingerprint.json").is_file()
    assert (place.folder / "datasets" / "archives" / "cub" / "birds.tgz").is_file()


def test_refusals(place: Place, prepare: Train) -> None:
    cards = ("--cards", str(place.folder / "cards"), "--root", str(place.root))
    refusals = {
        "no such folder": ("cub", *cards, "--verify-only"),
        "no card of dataset 'owls'": ("owls", *cards),
        "nothing.tar: no such file": ("cub", *cards, "--from-archive", "nothing.tar"),
        "folder needs no preparation": ("folder",),
    }
    for message, arguments in refusals.items():
        refused(prepare(*arguments), message)
    with pytest.raises(Exception, match="no card"):
        prepare("owls", *cards, "--debug")


def test_changed_files_and_a_wrong_count_exit_with_2(place: Place, prepare: Train) -> None:
    cards = ("--cards", str(place.folder / "cards"), "--root", str(place.root))
    assert prepare("cub", *cards).returncode == 0
    image = next(place.root.rglob("0.png"))
    Image.new("RGB", (4, 4)).save(image)
    refused(prepare("cub", *cards, "--verify-only"), f"{image.relative_to(place.root)}: other content")
    place.write_card(splits={"train": 5994, "test": 6})
    refused(prepare("cub", *cards), "train: expected 5994 images, found 9")


def test_a_full_disk_is_one_message(place: Place, prepare: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = []

    def full(file: int) -> None:
        flushes.append(file)
        if len(flushes) == 3:  # the first two are of the small file beside the part, and of the folder
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = prepare("cub", "--cards", place.folder / "cards")
    part = place.folder / "datasets" / "archives" / "cub" / "birds.tgz.part"
    assert (done.returncode, done.stderr) == (
        1,
        f"error: no space left on the disk ({part}); free some space and start again\n",
    )


def test_synthetic(prepare: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.data.synthetic.draw_image", lambda *_: Image.new("RGB", (8, 8)))  # for speed
    done = prepare("synthetic")
    assert done.returncode == 0, done.stderr
    assert "datasets/synthetic: synthetic is whole (train 384, test 240, 12 classes)" in done.stdout
    assert "has not changed" in prepare("synthetic").stdout


def test_the_help_names_every_card(prepare: Train) -> None:
    done = prepare("--help")
    assert done.returncode == 0
    for name in list_cards(ROOT / "datasets"):
        assert name in done.stdout
