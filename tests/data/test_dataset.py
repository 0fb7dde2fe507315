"""create_dataset, the folder adapter, ImageDataset, validation splits, unreadable images."""

import hashlib
import importlib.util
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import fgvc.data.dataset
from fgvc.data import (
    ImageDataset,
    Samples,
    UnreadableImageError,
    create_dataset,
    decode_rgb,
    fingerprint,
    list_datasets,
    read_splits,
    require_readable,
    split_validation,
)
from fgvc.data.verify import examine_images
from fgvc.errors import ConfigError, DatasetError


def write_image(path: Path, size: tuple[int, int] = (32, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert("RGB").save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; six and three training images, one test image each."""
    for name, count in (("wren", 3), ("auk", 6)):
        for number in range(count):
            write_image(tmp_path / "train" / name / f"{number}.jpg")
        write_image(tmp_path / "val" / name / "0.jpg")
    return tmp_path


def test_unknown_names_list_the_valid_ones(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"'bird'.*cub, .*folder, table, synthetic"):
        create_dataset("bird", root=root)
    with pytest.raises(ConfigError, match=r"'valid'.*train, val, test"):
        create_dataset("folder", root=root, split="valid")
    with pytest.raises(ConfigError, match=r"'folder' has no option 'colour'.*levels, test_fraction, split_seed"):
        create_dataset("folder", root=root, colour=1)
    with pytest.raises(ConfigError, match=r"'synthetic' has no option 'klasses'.*classes"):
        create_dataset("synthetic", root=root, klasses=1)
    assert {"cub", "folder", "synthetic"} <= set(list_datasets())


def test_folder_reads_sorted_classes_and_paths(root: Path) -> None:
    (root / "train" / "auk" / "notes.txt").write_text("not an image")
    (root / "train" / ".cache").mkdir()
    train, test = (create_dataset("folder", root=root, split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ["auk", "wren"]
    assert train.targets == [0] * 6 + [1] * 3
    assert test.relative_paths()[:2] == ["val/auk/0.jpg", "val/wren/0.jpg"]


def test_folder_reads_any_depth_but_nothing_hidden_and_no_circle(root: Path) -> None:
    auk = root / "train" / "auk"
    for name in ("b/1.jpg", "b/c/0.JPG", "b-c/0.jpg", "._0.jpg", ".trash/0.jpg"):
        write_image(auk / name)
    (auk / "b" / "loop").symlink_to(auk)
    (auk / "gone.jpg").symlink_to(auk / "nowhere.jpg")
    (auk / "self.jpg").symlink_to(auk / "self.jpg")
    (auk / "zz.jpg").symlink_to(auk / "0.jpg")
    found = [path.relative_to(auk).as_posix() for path in create_dataset("folder", root=root).paths[:10]]
    assert found == [*(f"{number}.jpg" for number in range(6)), "b/1.jpg", "b/c/0.JPG", "b-c/0.jpg", "zz.jpg"]


LITTER = ("@eaDir", "__MACOSX", ".ipynb_checkpoints", ".thumbnails", "#recycle")


def test_litter_of_systems_and_drives_is_neither_class_nor_image(root: Path) -> None:
    before = create_dataset("folder", root=root)
    for place in (root / "train", root / "train" / "auk", root / "val", root / "val" / "wren"):
        for name in LITTER:
            (place / name).mkdir()
            write_image(place / name / "0.jpg")
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.jpg"):
            (place / name).touch()
    after = create_dataset("folder", root=root)
    assert (after.classes, after.paths) == (before.classes, before.paths)


def test_what_is_no_image_by_its_ending_is_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    auk, wren = root / "train" / "auk", root / "train" / "wren"
    before = create_dataset("folder", root=root).paths
    write_image(root / "0.png")
    for path in (auk / "a.jpg?w=300", auk / "b.xyz", wren / "c.xyz", wren / "d.XYZ", wren / "photograph"):
        path.write_bytes((root / "0.png").read_bytes())
    (wren / "gone.jpg").symlink_to("nowhere")
    for _ in range(2):
        assert create_dataset("folder", root=root).paths == before
    (note,) = [record.getMessage() for record in caplog.records]
    assert note.startswith(f"{root / 'train'}: left out 6 files that are no images by their ending: 3 .xyz, ")
    assert all(part in note for part in ("1 .jpg?w=300", "1 without an ending", "1 links or special files"))
    for image in auk.glob("*.jpg"):
        image.rename(image.with_suffix(".webq"))
    with pytest.raises(DatasetError, match=r"auk: no image files \(.*\), but 6 \.webq, 1 .*; add some or remove it"):
        create_dataset("folder", root=root)


def test_photographs_of_phones_are_read_with_the_extra_and_named_without(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = root / "train" / "auk" / "z.HEIC"
    if importlib.util.find_spec("pillow_heif") is None:
        path.write_bytes(b"\0\0\0\x18ftypheic")
        create_dataset("folder", root=root)
        assert "1 .heic (to read .heic, .heif, .hif: pip install 'fgvc[heif]')" in caplog.text
        with pytest.raises(UnreadableImageError, match=r"needs another library: pip install 'fgvc\[heif\]'"):
            decode_rgb(path)
        return
    create_dataset("folder", root=root)  # lets Pillow write them too
    Image.new("RGB", (64, 48), (200, 30, 30)).save(path, "HEIF", quality=95)
    dataset = create_dataset("folder", root=root)
    image, target = dataset[dataset.paths.index(path)]
    assert target == 0 and image.size == (64, 48)
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 30)).max() < 8


def test_folder_refuses_a_class_to_test_on_alone(root: Path) -> None:
    write_image(root / "val" / "kiwi" / "0.jpg")
    with pytest.raises(DatasetError, match="no training image of 1 classes of the test split: kiwi; add some"):
        read_splits("folder", root)


def test_folder_says_what_is_missing(root: Path) -> None:
    (root / "train" / "kiwi").mkdir()
    (root / "val" / "kiwi").mkdir()
    with pytest.raises(DatasetError, match="kiwi: no image files"):
        create_dataset("folder", root=root)
    with pytest.raises(DatasetError, match=r"nowhere: no such folder.*train/<class>/<image>"):
        create_dataset("folder", root=root / "nowhere")
    (root / "validation").mkdir()
    with pytest.raises(DatasetError, match="both val/ and validation/; keep one val split"):
        create_dataset("folder", root=root)
    (root / "validation").rename(root / "test")
    with pytest.raises(DatasetError, match=r"test: no class folders; .* or move it away"):
        create_dataset("folder", root=root)
    shutil.rmtree(root / "train")
    with pytest.raises(DatasetError, match=r"train: no such folder, but test, val\."):
        create_dataset("folder", root=root)


def test_validation_is_stratified_disjoint_and_seeded(root: Path) -> None:
    dataset = create_dataset("folder", root=root)
    train, validation = split_validation(dataset, 1 / 3, seed=0)
    assert [validation.targets.count(target) for target in (0, 1)] == [2, 1]
    assert sorted(train.paths + validation.paths) == dataset.paths
    assert split_validation(dataset, 1 / 3, seed=0)[1].paths == validation.paths
    assert any(split_validation(dataset, 1 / 3, seed=seed)[1].paths != validation.paths for seed in range(1, 6))


def test_validation_leaves_every_class_in_training(root: Path) -> None:
    dataset = create_dataset("folder", root=root).subset([0, 1, 6])
    train, validation = split_validation(dataset, 0.99, seed=0)
    assert (train.targets, validation.targets) == ([0, 1], [0])
    with pytest.raises(DatasetError, match="no class has two images"):
        split_validation(dataset.subset([0, 2]), 0.5, seed=0)


def test_fingerprint_follows_files_targets_and_classes(root: Path) -> None:
    dataset = create_dataset("folder", root=root)
    before = fingerprint(dataset)
    assert fingerprint(create_dataset("folder", root=root)) == before
    relabelled = Samples(dataset.classes, dataset.paths, [1, *dataset.targets[1:]])
    renamed = Samples(["a", "b"], dataset.paths, dataset.targets)
    others = [fingerprint(ImageDataset(samples, root)) for samples in (relabelled, renamed)]
    os.utime(dataset.paths[0], ns=(0, 1))
    touched = fingerprint(dataset)
    dataset.paths[0].write_bytes(b"shorter")
    os.utime(dataset.paths[0], ns=(0, 1))
    assert len({before, *others, touched, fingerprint(dataset), fingerprint(dataset.subset([1, 2]))}) == 6


@pytest.fixture
def marked(tmp_path: Path) -> tuple[Samples, Path]:
    """Two images of 20 x 10: a red box on black, with three white rows at the bottom."""
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path in paths:
        image = Image.new("RGB", (20, 10))
        image.paste((255, 255, 255), (0, 7, 20, 10))
        image.paste((255, 0, 0), (4, 2, 12, 7))
        image.save(path)
    return Samples(["a", "b"], paths, [0, 1], boxes=[(4, 2, 12, 9), (4, 2, 8, 6)], banner=3), tmp_path


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.getcolors()}  # type: ignore[union-attr]


def test_banner_and_box_are_cut_before_the_transform(marked: tuple[Samples, Path]) -> None:
    samples, root = marked
    whole, cropped = ImageDataset(samples, root)[0][0], ImageDataset(samples, root, crop="bbox")[0][0]
    assert (whole.size, colours(whole)) == ((20, 7), {(0, 0, 0), (255, 0, 0)})
    assert (cropped.size, colours(cropped)) == ((8, 5), {(255, 0, 0)})
    assert ImageDataset(samples, root, lambda image: image.size, crop="bbox")[1][0] == (4, 4)


def test_fingerprint_follows_the_region(marked: tuple[Samples, Path]) -> None:
    samples, root = marked
    bare = replace(samples, banner=0)
    datasets = [ImageDataset(s, root, crop=crop) for s in (samples, bare) for crop in (None, "bbox")]
    moved = ImageDataset(replace(bare, boxes=[(4, 2, 12, 8), (4, 2, 8, 6)]), root, crop="bbox")
    assert len({fingerprint(dataset) for dataset in (*datasets, moved)}) == 5
    assert fingerprint(datasets[2]) == fingerprint(ImageDataset(replace(bare, boxes=None), root))


def test_fingerprint_of_whole_files_stays_the_one_of_earlier_caches(marked: tuple[Samples, Path]) -> None:
    samples, root = marked
    digest = hashlib.sha256(b'["a", "b"]')
    for path, target in zip(samples.paths, samples.targets, strict=True):
        status = path.stat()
        digest.update(f'["{path.name}", {target}, {status.st_size}, {status.st_mtime_ns}]\n'.encode())
    assert fingerprint(ImageDataset(replace(samples, banner=0), root)) == digest.hexdigest()


def test_an_empty_region_counts_as_a_bad_image(marked: tuple[Samples, Path]) -> None:
    samples, root = marked
    dataset = ImageDataset(replace(samples, boxes=[(4, 8, 12, 10), (4, 2, 8, 6)]), root, crop="bbox")
    bad = examine_images(dataset)[0]
    assert [image.path.name for image in bad] == ["0.png"]
    assert "20 x 10 pixels without the 3 rows of its banner" in bad[0].reason
    assert require_readable(dataset, on_bad_image="skip").boxes == [(4, 2, 8, 6)]
    with pytest.raises(DatasetError, match=r"0\.png: the picture is empty"):
        ImageDataset(replace(samples, banner=10), root)[0]


def test_crop_needs_boxes(root: Path, marked: tuple[Samples, Path]) -> None:
    with pytest.raises(ConfigError, match=r"'folder' has no bounding boxes .*cub"):
        create_dataset("folder", root=root, crop="bbox")
    with pytest.raises(ConfigError, match="these samples have none"):
        ImageDataset(replace(marked[0], boxes=None), root, crop="bbox")
    with pytest.raises(ConfigError, match=r"'cub': boxes must be true or false, found 'no'"):
        create_dataset("cub", root=root, boxes="no")


@pytest.fixture
def damaged(root: Path) -> Path:
    """Three of the nine training images are damaged: empty, truncated near the end, not an image."""
    auk = root / "train" / "auk"
    (auk / "1.jpg").write_bytes(b"")
    write_image(auk / "2.jpg", size=(256, 256))
    whole = (auk / "2.jpg").read_bytes()
    (auk / "2.jpg").write_bytes(whole[: len(whole) * 9 // 10])
    (auk / "4.jpg").write_text("<html>404</html>")
    return root


def test_a_bomb_is_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(root / "train" / "auk" / "3.jpg", size=(40, 40))
    monkeypatch.setattr(fgvc.data.dataset.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(Image.DecompressionBombWarning):
        bad = examine_images(create_dataset("folder", root=root))[0]
    assert [(image.path.name, "40 x 40" in image.reason) for image in bad] == [("3.jpg", True)]


def test_bad_images_are_refused_or_skipped(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    dataset = create_dataset("folder", root=damaged)
    for image, reason in zip(
        examine_images(dataset, workers=2)[0], ("1.jpg 0 bytes", "2.jpg truncated", "4.jpg a web page"), strict=True
    ):
        assert all(part in f"{image.path}: {image.reason}" for part in reason.split(" ", 1))
    with pytest.raises(DatasetError, match=r"2\.jpg: .*truncated.*on_bad_image=skip"):
        dataset[2]
    with pytest.raises(DatasetError, match=r"(?s)3 of 9 images.*1\.jpg.*on_bad_image=skip"):
        require_readable(dataset)
    with caplog.at_level(logging.WARNING):
        kept = require_readable(dataset, on_bad_image="skip")
    assert [path.name for path in kept.paths] == ["0.jpg", "3.jpg", "5.jpg", "0.jpg", "1.jpg", "2.jpg"]
    assert kept.targets == [0, 0, 0, 1, 1, 1]
    assert "4.jpg" in caplog.text
    with pytest.raises(DatasetError, match="None is left"):
        require_readable(dataset.subset([1, 2]), on_bad_image="skip")


def test_only_ten_bad_images_are_named(root: Path) -> None:
    for number in range(12):
        (root / "train" / "auk" / f"bad{number:02d}.jpg").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"(?s)12 of 21 .*bad09\.jpg.*and 2 more") as caught:
        require_readable(create_dataset("folder", root=root))
    assert "bad10" not in str(caught.value)


def test_a_check_is_remembered_until_files_change(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = create_dataset("folder", root=root)
    stamps = tmp_path / "stamps"
    require_readable(dataset, stamp_dir=stamps)

    decoded: list[Path] = []
    real = ImageDataset.decode
    monkeypatch.setattr(
        ImageDataset, "decode", lambda self, index: decoded.append(self.paths[index]) or real(self, index)
    )
    require_readable(dataset, stamp_dir=stamps)
    assert not decoded

    dataset.paths[4].write_bytes(b"")
    for _ in range(2):  # a failed check leaves no stamp
        with pytest.raises(DatasetError, match="1 of 9"):
            require_readable(dataset, stamp_dir=stamps)
    assert len(decoded) == 18
