"""Preparing a dataset: from its card to a verified copy, once; and everything that may be wrong with a copy."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from archives import folder_bytes, tar_bytes, write_tar
from command_line import ROOT, Train, refused, succeeded
from damage import replace_text
from file_server import serving
from miniature import write_imagenet_kit
from PIL import Image
from small_birds import CLASSES, TEST, TRAIN, Place, cub_files, image_bytes

from fgvc.data import ImageDataset, prepare_dataset, verified_content
from fgvc.data.cards import list_cards
from fgvc.data.imagenet import sort_validation
from fgvc.data.registry import create_dataset
from fgvc.data.verify import verified_split
from fgvc.errors import ConfigError, DatasetError

CARDS = ROOT / "datasets"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with serving() as server:
        place = Place(tmp_path, server, b"")
        place.serve(cub_files())
        yield place


@pytest.fixture
def ready(place: Place) -> Place:
    place.prepare()
    return place


def stored_archive(place: Place) -> Path:
    """Where a download of an earlier call lies; its folder is made."""
    path = place.root.parent / "archives" / "cub" / "birds.tgz"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_download_unpack_verify_once(place: Place) -> None:
    prepared = place.prepare()
    assert create_dataset("cub", root=place.root).targets == sorted(list(range(CLASSES)) * TRAIN)
    report = prepared.report
    assert f"train {CLASSES * TRAIN}, test {CLASSES * TEST}, {CLASSES} classes" in report
    assert f"fgvc train experiment=birds dataset.root={place.root}" in report
    downloaded = place.folder / "data" / "archives" / "cub" / "birds.tgz"
    assert downloaded.read_bytes() == place.archive
    assert str(downloaded) in report
    assert sorted(path.name for path in place.root.parent.iterdir()) == ["archives", "cub"]

    before, served = folder_bytes(place.root), len(place.server.requests)
    assert served == 1
    shutil.rmtree(downloaded.parent)
    again = place.prepare()
    assert again.fingerprint is None and "verified before and has not changed" in again.report
    assert len(place.server.requests) == served
    assert folder_bytes(place.root) == before


def test_a_second_call_decodes_nothing(ready: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(ImageDataset, "decode", decode)
    assert ready.prepare().fingerprint is None
    with pytest.raises(AssertionError, match="decoded again"):
        ready.prepare(verify_only=True)


def test_a_verified_copy_is_known_until_a_file_changes(ready: Place) -> None:
    train, test = (create_dataset("cub", root=ready.root, split=split) for split in ("train", "test"))
    content = json.loads((ready.root / "fingerprint.json").read_text())["content"]
    assert verified_split(train) and verified_split(test) and verified_content(ready.root) == content
    assert not verified_split(train.subset([0, 1]))  # whoever cuts it up otherwise has it checked
    os.utime(train.paths[0])
    assert not verified_split(train) and verified_split(test)
    assert verified_content(ready.root) is None  # perhaps another content
    assert ready.prepare().fingerprint is not None and verified_split(train)  # new times alone are accepted
    (ready.root / "fingerprint.json").unlink()
    assert not verified_split(test)
    for name in ("nonsense", "cub"):
        (ready.root / "fingerprint.json").write_text(json.dumps({"splits": {}, "content": "x", "name": name}))
        assert verified_content(ready.root) is None
    assert verified_content(ready.root.parent) is None


def test_the_fingerprint(ready: Place) -> None:
    found = json.loads((ready.root / "fingerprint.json").read_text())
    assert (found["name"], found["classes"], found["images"]) == ("cub", CLASSES, CLASSES * (TRAIN + TEST))
    assert {split: state["images"] for split, state in found["splits"].items()} == {"train": 9, "test": 6}
    assert found["archives"] == {"birds.tgz": {"md5": hashlib.md5(ready.archive).hexdigest()}}
    lines = (ready.root / "fingerprint.sha256").read_text().splitlines()
    assert len(lines) == found["images"]
    for line in lines:
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((ready.root / name).read_bytes()).hexdigest() == digest


def test_the_same_content_elsewhere_has_the_same_fingerprint(ready: Place) -> None:
    content = json.loads((ready.root / "fingerprint.json").read_text())["content"]
    shutil.copytree(ready.root / "CUB_200_2011", ready.folder / "copy" / "CUB_200_2011", copy_function=shutil.copyfile)
    copy = prepare_dataset("cub", cards=ready.folder / "cards", root=ready.folder / "copy")
    assert copy.fingerprint is not None and copy.fingerprint["content"] == content
    assert copy.fingerprint["archives"] == {}  # unpacked by hand: from what, nobody knows
    assert len(ready.server.requests) == 1


def test_verify_only_writes_nothing_and_asks_nobody(ready: Place) -> None:
    before, times = folder_bytes(ready.root), (ready.root / "fingerprint.json").stat().st_mtime_ns
    prepared = ready.prepare(verify_only=True)
    assert prepared.fingerprint is not None
    assert folder_bytes(ready.root) == before
    assert (ready.root / "fingerprint.json").stat().st_mtime_ns == times
    (ready.root / "fingerprint.json").unlink()
    ready.prepare(verify_only=True)
    assert not (ready.root / "fingerprint.json").exists()
    assert len(ready.server.requests) == 1


@pytest.mark.parametrize("verify_only", [True, False])
def test_changed_files_are_named(ready: Place, verify_only: bool) -> None:
    changed = "CUB_200_2011/images/001.Bird_0/0.png"
    (ready.root / changed).write_bytes(image_bytes(99))
    for _ in range(2):
        with pytest.raises(DatasetError, match=f"changed since fingerprint.json.*\n  {changed}: other content\n"):
            ready.prepare(verify_only=verify_only)
    for name in ("fingerprint.json", "fingerprint.sha256"):
        (ready.root / name).unlink()
    assert ready.prepare().fingerprint is not None


@pytest.mark.parametrize("name", ["fingerprint.json", "fingerprint.sha256"])
def test_a_fingerprint_of_someone_else_is_not_replaced(ready: Place, name: str) -> None:
    for own in ("fingerprint.json", "fingerprint.sha256"):
        (ready.root / own).unlink()
    (ready.root / name).write_text("mine")
    with pytest.raises(DatasetError, match=f"{name} is not of this dataset"):
        ready.prepare()
    assert (ready.root / name).read_text() == "mine"


def test_verify_only_sees_a_change_that_keeps_size_and_time(ready: Place) -> None:
    image = ready.root / "CUB_200_2011" / "images" / "002.Bird_1" / "4.png"
    status, content = image.stat(), bytearray(image.read_bytes())
    place = content.index(b"IEND") + 4  # its checksum, which Pillow does not insist on
    content[place] ^= 1
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ready.prepare().fingerprint is None  # the quick look cannot see it
    with pytest.raises(DatasetError, match=r"002\.Bird_1/4\.png: other content"):
        ready.prepare(verify_only=True)


def exchange_labels(folder: Path) -> None:
    replace_text("image_class_labels.txt", "1 1\n", "1 2\n")(folder)
    replace_text("image_class_labels.txt", "\n6 2\n", "\n6 1\n")(folder)


def rename_an_image(folder: Path) -> None:
    (folder / "images" / "001.Bird_0" / "0.png").rename(folder / "images" / "001.Bird_0" / "new.png")
    replace_text("images.txt", "001.Bird_0/0.png", "001.Bird_0/new.png")(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange_labels, "which image belongs to which, in split train"),
        (rename_an_image, r"(?s)Bird_0/0\.png: no longer listed\n.*Bird_0/new\.png: new"),
    ],
)
def test_changed_lists_are_seen(ready: Place, change: Callable[[Path], None], message: str) -> None:
    change(ready.root / "CUB_200_2011")
    with pytest.raises(DatasetError, match=message):
        ready.prepare(verify_only=True)


def test_counts_that_differ_from_the_card(place: Place) -> None:
    place.write_card(classes=4, splits={"train": 10, "test": 6}, images_per_class={"train": [4, 5]})
    with pytest.raises(DatasetError) as caught:
        place.prepare()
    message = str(caught.value)
    assert "not the whole of Small birds" in message
    assert "train: expected 10 images, found 9" in message
    assert "train: expected 4 classes, found 3" in message
    assert "train: expected 4 to 5 images a class, found other counts in 001.Bird_0 (3), 002.Bird_1 (3)" in message
    assert "test: expected 6" not in message
    assert not (place.root / "fingerprint.json").exists()


def test_a_class_without_images_is_named_where_the_card_states_no_range(place: Place) -> None:
    place.serve(cub_files(missing_images=TEST))
    place.write_card(images_per_class={}, splits={"train": 9, "test": 4})
    with pytest.raises(DatasetError, match=r"test: expected 1 to 4 images a class, .* in 003\.Bird_2 \(0\)"):
        place.prepare()


def test_images_that_cannot_be_decoded_are_listed(place: Place) -> None:
    files = cub_files()
    for name in ("001.Bird_0/0.png", "003.Bird_2/4.png"):
        files[f"CUB_200_2011/images/{name}"] = files[f"CUB_200_2011/images/{name}"][:60]
    place.serve(files)
    with pytest.raises(DatasetError, match=r"(?s)2 of 15 images cannot be decoded.*Bird_0/0\.png.*Bird_2/4\.png"):
        place.prepare()
    assert not (place.root / "fingerprint.json").exists()


def test_a_failing_extraction_leaves_no_dataset(place: Place) -> None:
    place.serve(cub_files() | {"../evil": b"x"})
    with pytest.raises(DatasetError, match="leads out"):
        place.prepare()
    assert [path.name for path in place.root.parent.iterdir()] == ["archives"]
    assert not list(place.folder.rglob("evil"))


def test_a_damaged_download_of_an_earlier_call_is_not_trusted(place: Place) -> None:
    stored = stored_archive(place)
    stored.write_bytes(place.archive[:-1] + b"x")
    with pytest.raises(DatasetError, match=r"birds\.tgz: md5 is .*, expected .*Delete it"):
        place.prepare()
    stored.write_bytes(place.archive[:-1])
    with pytest.raises(DatasetError, match=rf"has {len(place.archive) - 1} bytes, expected {len(place.archive)}"):
        place.prepare()
    stored.write_bytes(place.archive)
    place.prepare()
    assert place.server.requests == []


def test_a_refusing_server_leads_to_the_manual_route(place: Place) -> None:
    place.server.status = [403]
    with pytest.raises(DatasetError) as caught:
        place.prepare()
    for part in ("403", place.server.url("/birds.tgz"), "Ask the birds.", "--from-archive birds.tgz", "md5 "):
        assert part in str(caught.value)


def test_what_only_a_person_can_get(place: Place) -> None:
    place.write_card(archive={"url": None})
    with pytest.raises(DatasetError) as caught:
        place.prepare()
    command = f"fgvc prepare_data cub --root {place.root} --from-archive birds.tgz"
    md5 = hashlib.md5(place.archive).hexdigest()
    for part in ("cannot be downloaded by a program", "Ask the birds.", md5, command):
        assert part in str(caught.value)
    stored = stored_archive(place)
    stored.write_bytes(place.archive)
    assert place.prepare().archives == ()  # hard to get: nothing to advise the deletion of
    assert place.server.requests == []


@pytest.mark.parametrize("name", ["birds.tgz", "any other name"])
def test_local_archives_by_name_or_checksum(place: Place, name: str) -> None:
    (place.folder / name).write_bytes(place.archive)
    assert place.prepare(place.folder / name).archives == ()
    assert place.server.requests == []
    assert (place.folder / name).exists()
    assert not (place.root.parent / "archives").exists()


def test_local_archives_that_are_refused(place: Place) -> None:
    file = place.folder / "other.tgz"
    with pytest.raises(DatasetError, match=f"{file}: no such file"):
        place.prepare(file)
    file.write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"other\.tgz: neither name nor checksum .*; expected birds\.tgz"):
        place.prepare(file)
    file.rename(place.folder / "birds.tgz")
    with pytest.raises(DatasetError, match=rf"has 1 bytes, expected {len(place.archive)}"):
        place.prepare(place.folder / "birds.tgz")
    (place.folder / "birds.tgz").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DatasetError, match=r"birds\.tgz: a Git LFS pointer in place of the file"):
        place.prepare(place.folder / "birds.tgz")
    file.write_bytes(place.archive)
    (place.folder / "birds.tgz").write_bytes(place.archive)
    with pytest.raises(DatasetError, match=r"is birds\.tgz, and so is"):
        place.prepare(file, place.folder / "birds.tgz")
    assert not place.root.exists()


def test_an_archive_without_a_checksum_is_taken_with_a_notice(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.write_card(archive={"md5": None, "size": None})
    (place.folder / "birds.tgz").write_bytes(place.archive)
    prepared = place.prepare(place.folder / "birds.tgz")
    assert "states no checksum for birds.tgz" in caplog.text
    assert prepared.fingerprint is not None
    assert prepared.fingerprint["archives"] == {"birds.tgz": {"sha256": hashlib.sha256(place.archive).hexdigest()}}


@pytest.mark.parametrize("verified", [True, False])
def test_what_is_there_is_not_unpacked_again(ready: Place, caplog: pytest.LogCaptureFixture, verified: bool) -> None:
    if not verified:
        (ready.root / "fingerprint.json").unlink()
    (ready.folder / "birds.tgz").write_bytes(b"never read")
    ready.prepare(ready.folder / "birds.tgz")
    assert "holds the dataset already" in caplog.text


def test_other_content_of_the_root_is_never_touched(place: Place) -> None:
    place.root.mkdir(parents=True)
    (place.root / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError, match=f"{place.root} is not empty: delete it, or give another --root"):
        place.prepare()
    assert folder_bytes(place.root) == {"mine.txt": b"mine"}
    assert place.server.requests == []


@pytest.mark.parametrize("kind", ["empty", "link"])
def test_a_root_that_exists_and_is_empty(place: Place, kind: str) -> None:
    if kind == "link":
        place.root.parent.mkdir(parents=True)
        (place.folder / "elsewhere").mkdir()
        place.root.symlink_to(place.folder / "elsewhere")
    else:
        place.root.mkdir(parents=True)
    place.prepare()
    assert place.root.is_symlink() == (kind == "link")
    assert place.prepare().fingerprint is None


def test_what_a_killed_call_left_is_deleted_by_the_next(place: Place) -> None:
    left = place.root.parent / ".cub.fgvc-tmp"
    left.mkdir(parents=True)
    place.prepare()
    assert not left.exists()


def test_too_little_space_to_unpack(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (place.folder / "birds.tgz").write_bytes(place.archive)
    with pytest.raises(DatasetError, match=r"unpacking needs .* are free"):
        place.prepare(place.folder / "birds.tgz")
    assert not list(place.root.parent.iterdir())
    with pytest.raises(DatasetError, match=r"birds\.tgz, unpacked, needs 0 MB, 0 MB are free[^\n]*$"):
        place.prepare()  # downloading it by hand would not help, so that is not said


def test_editions_are_taken_whole(place: Place) -> None:
    """Either the first two files or the third one; and no address for any."""
    images, tables = {}, {}
    for name, content in cub_files().items():
        (images if "/images/" in name else tables)[name] = content
    parts = {"images.tar": tar_bytes(images), "tables.tar": tar_bytes(tables), "all.tar": tar_bytes(cub_files())}
    for name, content in parts.items():
        (place.folder / name).write_bytes(content)
    editions = {"images.tar": "original", "tables.tar": "original", "all.tar": "combined"}
    place.write_card(archives=[{"name": name, "edition": edition} for name, edition in editions.items()])
    with pytest.raises(DatasetError, match=r"(?s)found: images\.tar.*\(original\):.*\(combined\):.*archive all\.tar"):
        place.prepare(place.folder / "images.tar")
    first = place.prepare(place.folder / "all.tar").fingerprint
    shutil.rmtree(place.root)
    second = place.prepare(place.folder / "images.tar", place.folder / "tables.tar").fingerprint
    assert first is not None and second is not None
    assert (first["content"], set(first["archives"])) == (second["content"], {"all.tar"})
    assert set(second["archives"]) == {"images.tar", "tables.tar"}


def test_options_that_exclude_each_other_and_names_without_a_card(place: Place) -> None:
    with pytest.raises(ConfigError, match="--verify-only unpacks nothing; leave out --from-archive"):
        place.prepare(place.folder / "birds.tgz", verify_only=True)
    with pytest.raises(DatasetError, match="no such folder; leave out --verify-only"):
        place.prepare(verify_only=True)
    place.root.mkdir(parents=True)
    with pytest.raises(DatasetError, match="is empty; leave out --verify-only"):
        place.prepare(verify_only=True)
    for name in ("folder", "hf"):
        with pytest.raises(ConfigError, match=f"{name} needs no preparation"):
            prepare_dataset(name, cards=place.folder / "cards", root=place.root)
    with pytest.raises(ConfigError, match="no card of dataset 'cubs'"):
        prepare_dataset("cubs", cards=place.folder / "cards", root=place.root)


SYNSETS = [(1, "n01", 0), (2, "n03", 0), (3, "n02", 0), (4, "n00", 3)]


def test_imagenet_from_its_official_archives(tmp_path: Path) -> None:
    """Nested tars for training; validation images in one folder, sorted by the development kit."""
    official = yaml.safe_load((CARDS / "imagenet.yaml").read_text(encoding="utf-8"))
    for archive in official["archives"]:
        del archive["md5"]
        archive.pop("size", None)
    small = {"classes": 2, "splits": {"train": 4, "test": 3}, "images_per_class": {"train": [2, 2], "test": [1, 2]}}
    (tmp_path / "imagenet.yaml").write_text(yaml.safe_dump(official | small))
    wordnet = ("n01", "n03")
    write_imagenet_kit(tmp_path / "kit", [2, 1, 1], SYNSETS)
    contents = (
        {f"{wnid}.tar": tar_bytes({f"{wnid}_{i}.JPEG": image_bytes(i) for i in range(2)}) for wnid in wordnet},
        {f"ILSVRC2012_val_{i:08}.JPEG": image_bytes(10 + i) for i in (3, 1, 2)},
        folder_bytes(tmp_path / "kit"),
    )
    files = [
        write_tar(tmp_path / archive["name"], content, "w:gz" if archive["name"].endswith("gz") else "w")
        for archive, content in zip(official["archives"], contents, strict=True)
    ]
    root = tmp_path / "root"
    with pytest.raises(DatasetError, match=r"(?s)Register at .*ILSVRC2012_devkit_t12\.tar\.gz"):
        prepare_dataset("imagenet", cards=tmp_path, root=root, archives=files[:2])
    prepared = prepare_dataset("imagenet", cards=tmp_path, root=root, archives=files)
    assert "train 4, test 3, 2 classes" in prepared.report
    assert {name for name in folder_bytes(root) if name.endswith(".JPEG")} == {
        *(f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in wordnet for i in range(2)),
        "val/n03/ILSVRC2012_val_00000001.JPEG",
        "val/n01/ILSVRC2012_val_00000002.JPEG",
        "val/n01/ILSVRC2012_val_00000003.JPEG",
    }
    assert (root / "val" / "n01" / "ILSVRC2012_val_00000002.JPEG").read_bytes() == image_bytes(12)
    assert prepare_dataset("imagenet", cards=tmp_path, root=root).fingerprint is None


@pytest.mark.parametrize(
    ("labels", "damage", "message"),
    [
        ([1, 2], None, "2 labels for 1 images"),
        ([4], None, "'4' is no ILSVRC2012_ID"),  # an inner node of the tree
        ([1], Path.unlink, r"meta\.mat: missing; ILSVRC2012_devkit_t12\.tar\.gz must be among the archives"),
    ],
)
def test_damaged_kits(tmp_path: Path, labels: list[int], damage: Callable[[Path], object] | None, message: str) -> None:
    write_imagenet_kit(tmp_path, labels, SYNSETS)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.JPEG").touch()
    if damage is not None:
        damage(tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat")
    with pytest.raises(DatasetError, match=message):
        sort_validation(tmp_path)
    assert (tmp_path / "val" / "a.JPEG").exists()


@pytest.fixture
def prepare(here: Train, tmp_path: Path) -> Train:
    """The script in this process, in `tmp_path`."""
    return lambda *arguments: here("prepare_data.py", *arguments, cwd=tmp_path)


def test_from_the_command_line_into_its_own_folder(place: Place, prepare: Train) -> None:
    done = prepare("cub", "--cards", place.folder / "cards", "--workers", 2)
    root = Path("datasets") / "cub"
    assert f"{root}: cub is whole (train 9, test 6, 3 classes)" in done.stdout
    assert done.stdout.endswith(f"next: fgvc train experiment=birds dataset.root={root}\n")


def test_a_refusal_exits_with_2(place: Place, prepare: Train) -> None:
    cards = ("--cards", str(place.folder / "cards"), "--root", str(place.root))
    refused(prepare("cub", *cards, "--verify-only"), "no such folder")
    refused(prepare("cub", *cards, "--from-archive", "nothing.tar"), "nothing.tar: no such file")
    with pytest.raises(Exception, match="no card"):
        prepare("owls", *cards, "--debug")


def test_synthetic(prepare: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.data.synthetic.draw_image", lambda *_: Image.new("RGB", (8, 8)))  # for speed
    done = succeeded(prepare("synthetic"))
    assert "datasets/synthetic: synthetic is whole (train 384, test 240, 12 classes)" in done.stdout
    assert "has not changed" in prepare("synthetic").stdout


def test_the_help_names_every_card(prepare: Train) -> None:
    done = prepare("--help")
    assert done.returncode == 0
    for name in list_cards(ROOT / "datasets"):
        assert name in done.stdout
