"""Dataset cards: what a dataset is, where it comes from, and what a whole copy holds. One YAML file for each."""

import re
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from fgvc.data.layout import leads_out
from fgvc.errors import ConfigError
from fgvc.foreign import read_plain_yaml

SPLITS = ("train", "test")
_DIGITS = {"md5": 32, "sha256": 64}


@dataclass
class Archive:
    """One file that the dataset is distributed in.

    Attributes:
        name: File name. An archive is known by its ending (see `fgvc.data.extract`); other files are copied.
        url: Address, http or https; None where only a person can get the file.
        md5, sha256: Checksums in hexadecimal; None where no source states one.
        size: Number of bytes; None where unknown.
        into: Folder below the dataset's root to extract into.
        nested: Whether the members are archives themselves, each to be unpacked into a folder of its name.
        edition: Name of the set of archives that this one belongs to; each edition alone is the whole dataset.
    """

    name: str = MISSING
    url: str | None = None
    md5: str | None = None
    sha256: str | None = None
    size: int | None = None
    into: str = "."
    nested: bool = False
    edition: str = "original"

    @property
    def checksums(self) -> dict[str, str]:
        """The known checksums by algorithm."""
        return {name: value for name in _DIGITS if (value := getattr(self, name)) is not None}


@dataclass
class Card:
    """A dataset as its card describes it.

    Attributes:
        title, citation, licence, homepage, description: Texts for people.
        archives: Files that it is distributed in; none for a generated dataset.
        manual: Instructions for a person to get the archives without an address.
        sort_validation: Whether the images of val/ come unsorted, see `fgvc.data.imagenet.sort_validation`.
        classes: Number of classes.
        splits: Number of images of "train" and "test".
        images_per_class: Number of images in the smallest and the largest class of a split, where a source states them.
        train: Overrides of `fgvc train` for a first run.
        layout: Description of the files after the extraction.
    """

    title: str = MISSING
    citation: str = MISSING
    licence: str = MISSING
    homepage: str | None = MISSING
    archives: list[Archive] = MISSING
    classes: int = MISSING
    splits: dict[str, int] = MISSING
    train: str = MISSING
    layout: str = MISSING
    description: str | None = None
    manual: str | None = None
    sort_validation: bool = False
    images_per_class: dict[str, list[int]] = field(default_factory=dict)


def list_cards(folder: Path) -> list[str]:
    """Names of the datasets that have a card in `folder`."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_card(folder: Path, name: str) -> Card:
    """Read `folder`/`name`.yaml.

    Raises ConfigError: there is no such card, it is not valid YAML, a key is unknown or missing, or a value is wrong.
    """
    path = folder / f"{name}.yaml"
    if name not in list_cards(folder):
        known = ", ".join(list_cards(folder))
        none = "there are no cards at all: is it the folder datasets/ of a checkout?"
        fix = f"choose one of {known}" if known else none
        raise ConfigError(f"no card of dataset {name!r} in {folder}; {fix}")
    try:
        card = OmegaConf.merge(OmegaConf.structured(Card), OmegaConf.create(read_plain_yaml(path)))
        missing = sorted(str(key) for key in OmegaConf.missing_keys(card))
        if missing:
            raise ConfigError(f"{path}: {', '.join(missing)} missing; add the key")
        result = OmegaConf.to_object(card)
    except ConfigError:
        raise
    except Exception as error:  # omegaconf and yaml raise many types
        key = getattr(error, "full_key", None)
        # OmegaConf's first line is enough; YAML names the place in its last lines
        reason = str(error).splitlines()[0] if key else " ".join(str(error).split())
        raise ConfigError(f"{path}: {f'{key}: ' if key else ''}{reason}; correct the card") from error
    assert isinstance(result, Card)
    for problem in _problems(result):
        raise ConfigError(f"{path}: {problem}; correct the card")
    return result


def _problems(card: Card) -> list[str]:
    """The wrong values of a card, each with its key."""
    found = [problem for index, archive in enumerate(card.archives) for problem in _archive_problems(index, archive)]
    if set(card.splits) != set(SPLITS):
        found.append(f"splits: must be {' and '.join(SPLITS)}, found {', '.join(card.splits) or 'none'}")
    # OmegaConf accepts a list or a mapping in place of a number, if that number is in a mapping
    counts = {"classes": card.classes} | {f"splits.{split}": count for split, count in card.splits.items()}
    wrong = {key: count for key, count in counts.items() if type(count) is not int or count < 1}
    found += [f"{key}: must be above 0, found {count}" for key, count in wrong.items()]
    for split, limits in card.images_per_class.items():
        ends = limits if isinstance(limits, list) and all(type(end) is int for end in limits) else []
        if split not in SPLITS or len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            found.append(f"images_per_class.{split}: must be [smallest, largest] of a split, found {limits}")
    if any(archive.url is None for archive in card.archives) and not card.manual:
        found.append("manual: must say how to get the archives that have no url")
    return found


def _archive_problems(index: int, archive: Archive) -> list[str]:
    found = []
    for name, digits in _DIGITS.items():
        value = getattr(archive, name)
        if value is not None and not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            found.append(f"{name}: must be {digits} digits 0-9a-f, found {value!r}")
    if archive.name in ("", ".", "..") or re.search(r"[/\\:\x00-\x1f]", archive.name):
        found.append(f"name: must be a plain file name, found {archive.name!r}")
    if archive.url is not None and not _is_address(archive.url):
        found.append(f"url: must begin with http:// or https://, found {archive.url!r}")
    if archive.size is not None and archive.size < 1:
        found.append(f"size: must be above 0, found {archive.size}")
    if leads_out(archive.into):
        found.append(f"into: must be a folder below the root, found {archive.into!r}")
    return [f"archives[{index}].{problem}" for problem in found]


def _is_address(url: str) -> bool:
    try:
        return re.match("https?://", url) is not None and bool(urllib.parse.urlsplit(url).hostname)
    except ValueError:  # an open bracket, as in an IPv6 address
        return False
