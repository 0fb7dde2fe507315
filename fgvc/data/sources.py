"""The archives of a dataset as verified local files: given, downloaded before, or downloaded now."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from fgvc.data.cards import Archive, Card
from fgvc.data.checksums import checksum_problem
from fgvc.data.download import DownloadError, download
from fgvc.errors import DatasetError

logger = logging.getLogger(__name__)

# photographs hardly shrink in an archive, but small files take whole blocks on the disk
UNPACKED = 1.2  # disk space of the content, as a multiple of the archive's size


def match_archives(card: Card, files: Sequence[Path]) -> dict[str, Path]:
    """Local files by the name of the card's archive that each of them is, with their checksums verified.

    Raises:
        DatasetError: a file is missing, is none of the card's archives, or differs from its checksum.
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
    """Raises DatasetError where `file` is not the archive, by its size (which is quick) or its checksums."""
    size = file.stat().st_size
    if archive.size not in (None, size):
        problem: str | None = f"has {size} bytes, expected {archive.size}"
    else:
        problem = checksum_problem(file, archive.checksums)
    if problem is not None:
        raise DatasetError(f"{file}: {problem}; not the file that the card describes. Delete it and get it again")
    if not archive.checksums:
        logger.warning("%s: the card states no checksum for %s; taken as it is", file, archive.name)


def storage_folder(name: str, root: Path) -> Path:
    """Where the downloads of a dataset lie: beside its folder `root`, which they must not fill."""
    return root.resolve().parent / "archives" / name


def obtain(name: str, card: Card, given: Mapping[str, Path], root: Path) -> dict[str, Path]:
    """Every archive of one edition as a verified local file: given, stored by an earlier call, or downloaded.

    Raises:
        DatasetError: an archive cannot be downloaded (the message says how to get it by hand), a stored one differs
            from the card, or there is too little space.
    """
    files, storage = dict(given), storage_folder(name, root)
    for archive in card.archives:
        if archive.name not in files and (storage / archive.name).is_file():
            _check(archive, storage / archive.name)
            files[archive.name] = storage / archive.name
    edition = _choose_edition(name, card, files, root)
    for archive in edition:
        if archive.name not in files:
            assert archive.url is not None
            target = storage / archive.name
            try:
                download(archive.url, target, archive.checksums, space=1 + UNPACKED)
            except DownloadError as error:
                raise DownloadError(f"{error}\n{_by_hand(name, card, root)}") from error
            files[archive.name] = target
    return {archive.name: files[archive.name] for archive in edition}


def _choose_edition(name: str, card: Card, files: Mapping[str, Path], root: Path) -> list[Archive]:
    """The archives of the first edition that can be had completely."""
    for members in _editions(card).values():
        if all(archive.name in files or archive.url is not None for archive in members):
            return members
    have = f" (found: {', '.join(files)})" if files else ""
    raise DatasetError(f"{card.title} cannot be downloaded by a program{have}.\n{_by_hand(name, card, root)}")


def _by_hand(name: str, card: Card, root: Path) -> str:
    """How a person gets the archives, and what to run then."""
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
        [*lines, f"(or put the files into {storage_folder(name, root)} and start again without --from-archive)"]
    )


def _editions(card: Card) -> dict[str, list[Archive]]:
    names = dict.fromkeys(archive.edition for archive in card.archives)
    return {name: [archive for archive in card.archives if archive.edition == name] for name in names}
