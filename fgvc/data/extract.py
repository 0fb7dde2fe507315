"""Unpacking tar and zip archives from the network: only plain files and folders, only below the target."""

import contextlib
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fgvc.data.layout import leads_out
from fgvc.errors import DatasetError
from fgvc.io import MAX_GROWTH, byte_bar, growth_limit

_TAR_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_DAMAGES = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    OSError,
    RecursionError,  # tarfile goes one call deeper for each extra header in a row
)
# headers that belong to the next member: tarfile reads them whole
_EXTRA_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MAX_HEADER = 1 << 20  # bytes; they hold names and dates
_MEMBER_COST = 512  # bytes that a member counts in addition to its content, so that empty ones have a limit
_CHUNK = 1 << 20


@dataclass
class _Budget:
    """Bytes that may still be written."""

    archive: Path
    left: int

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise DatasetError(
                f"{self.archive}: unpacks to more than {MAX_GROWTH} times its size; this is not the expected archive"
            )


def extract(archive: Path, target: Path, *, name: str | None = None, nested: bool = False) -> None:
    """Unpack `archive` below the folder `target`, which should be new.

    Members must be plain files and folders with relative names that stay below `target`: links, devices, sparse files,
    "..", absolute names, drive letters, names that occur twice, and headers or archives that grow too much are
    refused. Permissions and owners of the members are ignored.

    Args:
        archive: a tar (plain, gz, bz2, xz) or a zip; any other file, judged by its name, is copied.
        target: folder; created where missing. After an error it holds the members before the bad one.
        name: the name that tells the kind of archive, where the file has another one.
        nested: whether every member is a tar, to be unpacked into a folder of its name without the ending.

    Raises:
        DatasetError: a member is refused, or the file is damaged or not an archive.
        OSError: a file cannot be written (disk full, no permission).
    """
    target.mkdir(parents=True, exist_ok=True)
    name = name or archive.name
    budget = _Budget(archive, growth_limit(archive))
    if name.lower().endswith(".zip"):
        _extract_zip(archive, target, budget)
        return
    if not name.lower().endswith(_TAR_ENDINGS):
        shutil.copyfile(archive, target / name)
        return
    with archive.open("rb") as file, byte_bar(f"unpacking {archive.name}", archive.stat().st_size) as bar:
        for _ in _extract_tar(file, target, budget, "r|*", nested):
            bar.update(file.tell() - bar.n)


def _extract_tar(file: IO[bytes], target: Path, budget: _Budget, mode: str, nested: bool) -> Iterator[None]:
    """Unpack one tar from a stream, read once from front to back; yields after each member."""
    with _damage(budget.archive):
        opened = tarfile.open(fileobj=file, mode=mode, tarinfo=_member_type(budget))  # type: ignore[call-overload]  # noqa: SIM115
    with opened as tar:
        while True:
            with _damage(budget.archive):
                member = tar.next()
            if member is None:
                return
            tar.members.clear()  # tarfile would keep every member: a million of them take a gigabyte
            place = _place(budget, target, member.name)
            budget.spend(_MEMBER_COST)
            if member.isdir():
                _make_folder(budget, place, member.name)
            elif not member.isfile():
                raise _refusal(budget, member.name, "is a link or a device; only plain files and folders are unpacked")
            else:
                with _damage(budget.archive):
                    content = tar.extractfile(member)
                assert content is not None  # a plain file has content
                if nested:
                    folder = _place(budget, target, _stem(budget, member.name))
                    for _ in _extract_tar(content, folder, budget, "r|", nested=False):
                        yield
                else:
                    _write(budget, content, place, member.name)
            yield


def _member_type(budget: _Budget) -> type[tarfile.TarInfo]:
    """A type of tar members that refuses, while headers are read, anything that could fill the memory."""

    class Member(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
            member = super().frombuf(buf, encoding, errors)
            if member.type in _EXTRA_HEADERS:
                if not 0 <= member.size <= _MAX_HEADER:
                    raise _refusal(budget, member.name, f"is a header of {member.size} bytes; this is no image dataset")
                budget.spend(member.size)
            return member

        def _refuse_sparse(self, *_: object) -> None:
            raise _refusal(budget, self.name, "is a sparse file; only plain files and folders are unpacked")

        # tarfile's readers of the maps of such files, which could fill the memory
        _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse

    return Member


def _extract_zip(archive: Path, target: Path, budget: _Budget) -> None:
    with _damage(archive):
        opened = zipfile.ZipFile(archive)
    with opened as zipped, byte_bar(f"unpacking {archive.name}", archive.stat().st_size) as bar:
        for member in zipped.infolist():
            place = _place(budget, target, member.orig_filename)
            budget.spend(_MEMBER_COST)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: written on a system without file modes
                raise _refusal(
                    budget, member.filename, "is a link or a device; only plain files and folders are unpacked"
                )
            if member.flag_bits & 1:
                raise _refusal(budget, member.filename, "is encrypted")
            if member.is_dir():
                _make_folder(budget, place, member.filename)
            else:
                with _damage(archive):
                    content = zipped.open(member)
                with content:
                    _write(budget, content, place, member.filename)
            bar.update(member.compress_size)


def _place(budget: _Budget, target: Path, name: str) -> Path:
    """The path of a member below `target`.

    Raises:
        DatasetError: its name leads out of `target`, on this system or another.
    """
    if leads_out(name) or "\\" in name:  # a backslash separates folders on some systems only
        raise _refusal(budget, name, "has a name that leads out of the target folder")
    return target.joinpath(*(part for part in name.split("/") if part not in ("", ".")))


def _stem(budget: _Budget, name: str) -> str:
    """The folder for a tar inside a tar: its name without the ending.

    Raises:
        DatasetError: what remains is not a folder name.
    """
    stem = re.sub(r"\.[^./]*$", "", name)
    if stem.rpartition("/")[2] in ("", ".", ".."):
        raise _refusal(budget, name, "names no folder without its ending")
    return stem


def _make_folder(budget: _Budget, place: Path, name: str) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise _refusal(budget, name, "is a folder, but a file of that name exists already") from error


def _write(budget: _Budget, content: IO[bytes], place: Path, name: str) -> None:
    """Write one file, which must be new; counts the bytes that come, not those that are announced."""
    _make_folder(budget, place.parent, name)
    try:
        # "x" also finds names that differ only in case, where the file system ignores case
        file = place.open("xb")
    except (FileExistsError, IsADirectoryError) as error:
        raise _refusal(budget, name, "appears a second time") from error
    with file:
        while True:
            with _damage(budget.archive):  # the content may end too early
                chunk = content.read(_CHUNK)
            if not chunk:
                return
            budget.spend(len(chunk))
            file.write(chunk)


@contextlib.contextmanager
def _damage(archive: Path) -> Iterator[None]:
    """Turn errors in reading an archive into a DatasetError."""
    try:
        yield
    except _DAMAGES as error:
        raise DatasetError(
            f"{archive}: damaged, or not an archive ({str(error) or type(error).__name__}); download it again"
        ) from error


def _refusal(budget: _Budget, name: str, reason: str) -> DatasetError:
    return DatasetError(f"{budget.archive}: member {name!r} {reason}")
