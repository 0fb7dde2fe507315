"""The ImageNet adapter: class folders with readable names."""

from pathlib import Path

import pytest
from damage import replace_text
from miniature import write_miniature

from fgvc.data import create_dataset
from fgvc.errors import DatasetError

NAMES = "LOC_synset_mapping.txt"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_miniature("imagenet", tmp_path / "imagenet", train_per_class=2, test_per_class=1)


def test_without_the_list_the_ids_are_the_names(root: Path) -> None:
    (root / NAMES).unlink()
    assert create_dataset("imagenet", root=root).classes == ["n01440764", "n01440765", "n01440766"]


def test_the_unlabelled_test_folder_of_the_archive_is_no_hindrance(root: Path) -> None:
    (root / "test").mkdir()
    assert len(create_dataset("imagenet", root=root, split="test")) == 3


def test_refusals(root: Path) -> None:
    replace_text(NAMES, "n01440765", "n01440777")(root)
    with pytest.raises(DatasetError, match=rf"{NAMES}: no name for n01440765"):
        create_dataset("imagenet", root=root)
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(
        DatasetError,
        match=r"ILSVRC2012_val_00000001.JPEG and other images are not sorted into classes. Move .*imagenet",
    ):
        create_dataset("imagenet", root=root)
    (root / "val").rename(root / "valid")
    with pytest.raises(DatasetError, match=r"val missing.*found in .*: .*train, valid.*datasets/imagenet\.yaml"):
        create_dataset("imagenet", root=root)
