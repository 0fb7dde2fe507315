"""The cards in datasets/ are valid, and a mistake in one is told with file and key."""

from pathlib import Path

import pytest
from command_line import ROOT

from fgvc.data import list_datasets
from fgvc.data.cards import list_cards, load_card
from fgvc.errors import ConfigError

CARDS = ROOT / "datasets"
# as the datasets' authors state them: classes, training images, test images
PUBLISHED = {
    "aircraft": (100, 6667, 3333),
    "cars": (196, 8144, 8041),
    "cub": (200, 5994, 5794),
    "dogs": (120, 12000, 8580),
    "imagenet": (1000, 1281167, 50000),
    "inaturalist": (8142, 437513, 24426),
    "nabirds": (555, 23929, 24633),
    "synthetic": (12, 384, 240),
}


def test_there_is_a_card_for_each_dataset() -> None:
    assert list_cards(CARDS) == sorted(PUBLISHED)
    assert {*PUBLISHED} == {*list_datasets()} - {"folder", "hf", "table"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones_and_agree_with_each_other(name: str) -> None:
    card = load_card(CARDS, name)
    assert (card.classes, card.splits["train"], card.splits["test"]) == PUBLISHED[name]
    for split, (low, high) in card.images_per_class.items():
        assert low * card.classes <= card.splits[split] <= high * card.classes


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "synthetic"])
def test_every_archive_can_be_checked_or_says_that_it_cannot(name: str) -> None:
    unchecked = {archive.name for archive in load_card(CARDS, name).archives if not archive.checksums}
    assert unchecked == ({"car_ims.tgz", "cars_annos.mat"} if name == "cars" else set())


MISTAKES = {
    "unknown key": ("licence:", "license:", "license: Key 'license' not in 'Card'"),
    "unknown key of an archive": ("size:", "sizes:", "Key 'sizes' not in 'Archive'"),
    "missing key": ("title:", "description:", "title missing"),
    "missing key of an archive": ("- name: CUB_200_2011.tgz\n    url", "- url", r"archives\[0\]\.name missing"),
    "short md5": ("97eceeb", "7eceeb", r"archives\[0\]\.md5: must be 32 digits 0-9a-f, found '7eceeb196"),
    "md5 in capitals": ("97eceeb", "97ECEEB", r"archives\[0\]\.md5: must be 32 digits"),
    "md5 as sha256": ("md5:", "sha256:", r"archives\[0\]\.sha256: must be 64 digits"),
    "words for a number": ("classes: 200", "classes: many", "classes: Value 'many'"),
    "no classes": ("classes: 200", "classes: 0", "classes: must be above 0, found 0"),
    "no images": ("train: 5994", "train: 0", r"splits\.train: must be above 0, found 0"),
    "unknown split": ("train: 5994", "trian: 5994", "splits: must be train and test, found trian, test"),
    "reversed range": ("[29, 30]", "[30, 29]", r"images_per_class\.train: must be \[smallest, largest\]"),
    "no address and no manual": ("    url: https", "    # url: https", "manual: must say how to get"),
    "twice": ("classes: 200", "classes: 200\nclasses: 201", "duplicate key classes"),
    "not a mapping": ("title:", "- title:", "correct the card"),
    "not YAML": ("classes: 200", "classes: [200", "correct the card"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_card(tmp_path: Path, mistake: str) -> None:
    old, new, message = MISTAKES[mistake]
    text = (CARDS / "cub.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "cub.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{path}: .*{message}"):
        load_card(tmp_path, "cub")


def test_names_without_a_card(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    with pytest.raises(ConfigError, match=f"no card of dataset '../a' in {tmp_path}; choose one of a"):
        load_card(tmp_path, "../a")
