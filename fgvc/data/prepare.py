"""From a dataset's name to a whole, verified copy on the disk: download, check, unpack, verify."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.data.cards import Archive, Card, load_card
from fgvc.data.download import DownloadError, download, require_space
from fgvc.data.extract import extract
from fgvc.data.imagenet import sort_validation
from fgvc.data.registry import read_splits
from fgvc.data.verify import FINGERPRINT, Checksums, is_current, verify
from fgvc.errors import ConfigError, DatasetError
from fgvc.foreign import open_foreign
from fgvc.io import checksum_problem, expanded, file_digests, replaced_folder

logger = logging.getLogger(__name__)

# photographs hardly shrink in an archive, and small files take whole blocks on the disk
_UNPACKED = 1.2  # disk space of the unpacked files, as a multiple of the archive's size

_WITHOUT_CARD = {
    "folder": "put your images into ROOT/train/CLASS/ and ROOT/test/CLASS/, then: "
    "fgvc train dataset=folder dataset.root=ROOT dataset.name=NAME",
    "hf": "datasets of the Hugging Face hub are loaded by the library `datasets`: see docs/datasets.md",
}


@dataclass(frozen=True)
class Prepared:
    """A verified copy of a dataset.

    Attributes:
        name: Name of the dataset.
        root: Folder of the dataset.
        fingerprint: Content of fingerprint.json; None where the copy was current and was not read again.
        train: Overrides of `fgvc train` for a first run.
        archives: Downloaded files, which are no longer needed.
    """

    name: str
    root: Path
    fingerprint: dict[str, Any] | None
    train: str
    archives: tuple[Path, ...] = ()

    @property
    def report(self) -> str:
        """The result and the next step, for the terminal."""
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
    name: str, *, cards: Path, root: Path, archives: Sequence[Path] = (), verify_only: bool = False, workers: int = 4
) -> Prepared:
    """Download and unpack a dataset to `root` if it is not there yet, verify it, and write its fingerprint.

    A copy that is there already (unpacked by hand, for example) is only verified; if it was verified and has not
    changed, it is not read again. Downloads go to the folder `archives` next to `root`.

    Args:
        name: name of a card and of an adapter.
        cards: folder with the cards.
        root: the dataset's folder; it must be absent or empty if the dataset has to be unpacked.
        archives: local files in place of downloads; their names or checksums tell which archives they are.
        verify_only: verify everything again, without a download and without writing a file.
        workers: decoding threads.

    Raises:
        ConfigError: there is no such card, or the card is wrong.
        DatasetError: an archive cannot be downloaded (the message says how to get it by hand), differs from its
            checksum or is malicious; `root` holds something else; counts differ, images cannot be decoded, files have
            changed.
        OSError: the disk is full, or a folder cannot be written.
    """
    if name in _WITHOUT_CARD:
        raise ConfigError(f"{name} needs no preparation: {_WITHOUT_CARD[name]}")
    card = load_card(cards, name)
    root = expanded(root)
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
    """Unpack the dataset into `root` unless it is there; return the archives' checksums and the downloaded files."""
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
    own = _match_archives(card, given)
    files = _obtain(name, card, own, root)
    _unpack(root, card, files)
    known = {archive.name: archive for archive in card.archives}
    checksums = {key: known[key].checksums or file_digests(file, ["sha256"]) for key, file in files.items()}
    downloaded = [file for key, file in files.items() if known[key].url is not None and key not in own]
    return checksums, tuple(downloaded)


def _warn_unused(root: Path, given: Sequence[Path]) -> None:
    if given:
        logger.warning("%s holds the dataset already; the archives are not unpacked", root)


def _match_archives(card: Card, files: Sequence[Path]) -> dict[str, Path]:
    """The given files by the names of their archives in the card, after a check of their checksums.

    Raises DatasetError: a file is missing, is not an archive of the card, or differs from its checksum.
    """
    found: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise DatasetError(f"{file}: no such file; give the archives' paths after --from-archive")
        archive = _identify(card, file)
        if archive.name in found:
            raise DatasetError(f"{file}: is {archive.name}, and so is {found[archive.name]}; give one of them")
        found[archive.name] = file
    return found


def _identify(card: Card, file: Path) -> Archive:
    for archive in card.archives:
        if archive.name == file.name:
            _check(archive, file)
            return archive
    for archive in card.archives:
        comparable = archive.checksums and archive.size in (None, file.stat().st_size)
        if comparable and checksum_problem(file, archive.checksums) is None:
            return archive
    expected = ", ".join(archive.name for archive in card.archives) or "none"
    raise DatasetError(f"{file}: neither name nor checksum is that of an archive of {card.title}; expected {expected}")


def _check(archive: Archive, file: Path) -> None:
    """Raise DatasetError if something took the place of `file`, or its size or checksum is not that of the archive."""
    size = file.stat().st_size
    try:
        open_foreign(file).close()
        problem = checksum_problem(file, archive.checksums) if archive.size in (None, size) else None
        if archive.size not in (None, size):
            problem = f"has {size} bytes, expected {archive.size}"
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise DatasetError(f"{file}: {problem}; not the file that the card describes. Delete it and get it again")
    if not archive.checksums:
        logger.warning("%s: the card states no checksum for %s; taken as it is", file, archive.name)


def _storage_folder(name: str, root: Path) -> Path:
    """The folder for downloads of a dataset: next to `root`, which must stay empty for the dataset."""
    return root.resolve().parent / "archives" / name


def _obtain(name: str, card: Card, given: Mapping[str, Path], root: Path) -> dict[str, Path]:
    """Every archive of one edition as a verified local file: given, stored by an earlier call, or downloaded.

    Raises DatasetError: an archive cannot be downloaded (the message says how to get it by hand), a stored one differs
    from the card, or there is too little space.
    """
    files, storage = dict(given), _storage_folder(name, root)
    for archive in card.archives:
        if archive.name not in files and (storage / archive.name).is_file():
            _check(archive, storage / archive.name)
            files[archive.name] = storage / archive.name
    for edition in _editions(card).values():
        if all(archive.name in files or archive.url is not None for archive in edition):
            break
    else:
        have = f" (found: {', '.join(files)})" if files else ""
        raise DatasetError(f"{card.title} cannot be downloaded by a program{have}.\n{_by_hand(name, card, root)}")
    for archive in edition:
        if archive.name not in files:
            assert archive.url is not None
            target = storage / archive.name
            try:
                download(archive.url, target, archive.checksums, size=archive.size, space=1 + _UNPACKED)
            except DownloadError as error:
                raise DownloadError(f"{error}\n{_by_hand(name, card, root)}") from error
            files[archive.name] = target
    return {archive.name: files[archive.name] for archive in edition}


def _by_hand(name: str, card: Card, root: Path) -> str:
    """Instructions for a person: where the archives are, and the command to run then."""
    option = "" if root == Path("datasets") / name else f" --root {root}"
    lines = [card.manual.strip() if card.manual else "By hand: download the files with another program."]
    editions = _editions(card)
    for edition, members in editions.items():
        lines.append("Files:" if len(editions) == 1 else f"Files ({edition}):")
        for archive in members:
            checksums = ", ".join(f"{key} {value}" for key, value in archive.checksums.items()) or "checksum not stated"
            lines.append(f"  {archive.name}  {checksums}" + (f"  {archive.url}" if archive.url else ""))
        names = " ".join(archive.name for archive in members)
        lines.append(f"then: fgvc prepare_data {name}{option} --from-archive {names}")
    return "\n".join(
        [*lines, f"(or put the files into {_storage_folder(name, root)} and start again without --from-archive)"]
    )


def _editions(card: Card) -> dict[str, list[Archive]]:
    names = dict.fromkeys(archive.edition for archive in card.archives)
    return {name: [archive for archive in card.archives if archive.edition == name] for name in names}


def _unpack(root: Path, card: Card, files: Mapping[str, Path]) -> None:
    """Unpack archives, given by their names in the card, into `root`, which appears whole or not at all."""
    target = root.resolve()  # replaces the folder that a link points to, not the link
    if os.path.ismount(target):
        raise DatasetError(f"{root}: is a mount point, which cannot be replaced; give a folder in it as --root")
    with replaced_folder(target) as stage:
        require_space(stage.parent, _UNPACKED * sum(file.stat().st_size for file in files.values()), "unpacking")
        for archive in card.archives:
            if archive.name in files:
                extract(files[archive.name], stage / archive.into, name=archive.name, nested=archive.nested)
        if card.sort_validation:
            sort_validation(stage)
