"""From a dataset's name to a whole, verified copy on the disk: download, check, unpack, verify."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.data.cards import Card, load_card
from fgvc.data.checksums import file_digests
from fgvc.data.download import require_space
from fgvc.data.extract import extract
from fgvc.data.imagenet_devkit import sort_validation
from fgvc.data.sources import UNPACKED, match_archives, obtain
from fgvc.data.verify import FINGERPRINT, Checksums, is_current, read_splits, verify
from fgvc.errors import ConfigError, DatasetError
from fgvc.io import atomic_folder

logger = logging.getLogger(__name__)

_WITHOUT_CARD = {
    "folder": "put your images into ROOT/train/CLASS/ and ROOT/test/CLASS/, then: "
    "fgvc train dataset=folder dataset.root=ROOT dataset.name=NAME",
    "hf": "datasets of the Hugging Face hub are loaded by the library `datasets`: see docs/datasets.md",
}


@dataclass(frozen=True)
class Prepared:
    """A verified copy of a dataset.

    Attributes:
        name: of the dataset.
        root: its folder.
        fingerprint: content of fingerprint.json; None where the copy was current and was not read again.
        train: overrides of `scripts/train.py` for a first run.
        archives: what was downloaded, and is no longer needed.
    """

    name: str
    root: Path
    fingerprint: dict[str, Any] | None
    train: str
    archives: tuple[Path, ...] = ()

    @property
    def report(self) -> str:
        """What was found and what to do next, for the terminal."""
        if self.fingerprint is None:
            first = f"{self.root}: {self.name} was verified before and has not changed ({FINGERPRINT})"
        else:
            counts = ", ".join(f"{split} {state['images']}" for split, state in self.fingerprint["splits"].items())
            counts += f", {self.fingerprint['classes']} classes"
            first = f"{self.root}: {self.name} is whole ({counts}) and every image can be decoded"
        lines = [first]
        if self.archives:
            lines.append(f"no longer needed, may be deleted: {', '.join(map(str, self.archives))}")
        return "\n".join([*lines, f"next: fgvc train {self.train} dataset.root={self.root}"])


def prepare_dataset(
    name: str,
    *,
    cards: Path,
    root: Path,
    archives: Sequence[Path] = (),
    verify_only: bool = False,
    workers: int = 4,
) -> Prepared:
    """Bring a dataset to `root` where it is not there yet, verify it, and keep its fingerprint.

    A copy that is there already (unpacked by hand, for example) is only verified; one that was verified and has not
    changed is not even read. Downloads land in the folder `archives` beside `root`.

    Args:
        name: of a card and of an adapter.
        cards: folder with the cards.
        root: the dataset's folder, absent or empty where the dataset is to be unpacked.
        archives: local files to take in place of downloads, known by name or by checksum.
        verify_only: neither download nor write anything, but verify all of it again.
        workers: decoding threads.

    Raises:
        ConfigError: there is no such card, or the card is wrong.
        DatasetError: an archive cannot be had (the message says how to get it by hand), differs from its checksum or is
            malicious; `root` holds something else; counts differ, images cannot be decoded, files have changed.
        OSError: the disk is full, or a folder cannot be written.
    """
    if name in _WITHOUT_CARD:
        raise ConfigError(f"{name} needs no preparation: {_WITHOUT_CARD[name]}")
    card = load_card(cards, name)
    root = root.expanduser()
    if verify_only:
        if archives:
            raise ConfigError("--verify-only unpacks nothing; leave out --from-archive")
        if not root.is_dir() or not any(root.iterdir()):  # an adapter may fill an empty one
            state = "is empty" if root.is_dir() else "no such folder"
            raise DatasetError(f"{root}: {state}; leave out --verify-only to get the dataset")
        return Prepared(name, root, verify(name, root, card, workers=workers, write=False), card.train)
    if is_current(name, root, card):
        _warn_unused(root, archives)
        return Prepared(name, root, None, card.train)
    checksums, used = _fill(name, root, card, archives)
    found = verify(name, root, card, workers=workers, write=True, archives=checksums)
    return Prepared(name, root, found, card.train, used)


def _fill(name: str, root: Path, card: Card, given: Sequence[Path]) -> tuple[Checksums | None, tuple[Path, ...]]:
    """Unpack the dataset into `root` unless it is there; return the archives' checksums, and the downloaded files."""
    try:
        read_splits(name, root)
    except DatasetError as error:
        if not card.archives:
            raise
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DatasetError(f"{error}\n{root} is not empty: delete it, or give another --root") from error
    else:
        _warn_unused(root, given)
        return None, ()
    own = match_archives(card, given)
    files = obtain(name, card, own, root)
    _unpack(root, card, files)
    known = {archive.name: archive for archive in card.archives}
    checksums = {key: known[key].checksums or file_digests(file, ["sha256"]) for key, file in files.items()}
    downloaded = [file for key, file in files.items() if known[key].url is not None and key not in own]
    return checksums, tuple(downloaded)


def _warn_unused(root: Path, given: Sequence[Path]) -> None:
    if given:
        logger.warning("%s holds the dataset already; the archives are not unpacked", root)


def _unpack(root: Path, card: Card, files: Mapping[str, Path]) -> None:
    """Unpack archives, by their names in the card, into `root`, which appears whole or not at all."""
    target = root.resolve()  # what a link points to is to be replaced, not the link
    if os.path.ismount(target):
        raise DatasetError(f"{root}: is a mount point, which cannot be replaced; give a folder in it as --root")
    for left in target.parent.glob(f".{target.name}.*.tmp"):
        logger.warning("%s: left by a call that was killed, or another call is at work; delete it if not", left)
    with atomic_folder(target) as stage:
        require_space(stage.parent, UNPACKED * sum(file.stat().st_size for file in files.values()), "unpacking")
        for archive in card.archives:
            if archive.name in files:
                extract(files[archive.name], stage / archive.into, name=archive.name, nested=archive.nested)
        if card.sort_validation:
            sort_validation(stage)
