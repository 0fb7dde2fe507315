"""Unpacking tar and zip archives from the network: only plain files and folders, only below the target."""

import errno
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fgvc.data.layout import leads_out
from fgvc.errors import DatasetError
from fgvc.foreign import MAX_GROWTH, growth_limit, open_foreign
from fgvc.io import byte_bar

_TAR_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_DAMAGES = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
# headers that belong to the next member: tarfile reads them whole
_EXTRA_HEADERS = (*(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE), *tarfile.GNU_TYPES[:2])
_MAX_HEADER = 1 << 16  # bytes; they hold names and dates
_MEMBER_COST = 512  # bytes that a member of a zip counts in addition to its content; a tar's has a header of this size


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
        DatasetError: a member is refused, the file is damaged or not an archive, or this Python is too old.
        OSError: a file cannot be written (disk full, no permission).
    """
    if not hasattr(tarfile, "data_filter"):
        raise DatasetError(f"{archive}: this Python unpacks no archive safely; update it (3.10.12, 3.11.4, or later)")
    target.mkdir(parents=True, exist_ok=True)
    name = name or archive.name
    is_zip = name.lower().endswith(".zip")
    try:
        if not is_zip and not name.lower().endswith(_TAR_ENDINGS):
            with open_foreign(archive) as file, (target / name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
            return
        with open_foreign(archive) as file, byte_bar(f"unpacking {archive.name}", archive.stat().st_size) as bar:
            zipped = _unpack_zip(archive, file, target)
            for _ in zipped if is_zip else _unpack_tar(archive, file, target, "r|*", nested):
                bar.update(file.tell() - bar.n)
    except (*_DAMAGES, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, *_IN_THE_WAY):
            raise
        reason = str(error) or type(error).__name__
        raise DatasetError(f"{archive}: damaged, or not an archive ({reason}); download it again") from error


class _Member(tarfile.TarInfo):
    """A member of a tar; headers that could fill the memory are refused unread."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in _EXTRA_HEADERS and not 0 <= member.size <= _MAX_HEADER:
            raise ValueError(f"{member.name!r} is a header of {member.size} bytes")
        return member

    def _refuse_sparse(self, *_: object) -> None:
        raise ValueError(f"{self.name!r} is a sparse file")

    # tarfile's readers of the maps of such files, which are read whole
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def _unpack_tar(archive: Path, file: IO[bytes], target: Path, mode: str, nested: bool) -> Iterator[None]:
    """Unpack one tar from a stream, read once from front to back; yields after each member."""
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_Member) as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep every member: a million of them take a gigabyte
            _limit_growth(archive, tar.offset)
            _admit(archive, target, member.name, member.isfile() or member.isdir())
            content = tar.extractfile(member) if nested else None
            if content is None:
                tar.extract(member, target, set_attrs=False, filter="data")
            else:
                stem = re.sub(r"\.[^./]*$", "", member.name)
                if stem.rpartition("/")[2] in ("", ".", ".."):
                    raise DatasetError(f"{archive}: member {member.name!r} names no folder without its ending")
                yield from _unpack_tar(archive, content, target / stem, "r|", nested=False)
            yield


def _unpack_zip(archive: Path, file: IO[bytes], target: Path) -> Iterator[None]:
    with zipfile.ZipFile(file) as zipped:
        _limit_growth(archive, sum(member.file_size + _MEMBER_COST for member in zipped.infolist()))
        for member in zipped.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0: written on a system without file modes
            _admit(archive, target, member.orig_filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            zipped.extract(member, target)
            yield


def _limit_growth(archive: Path, size: int) -> None:
    if size > growth_limit(archive.stat().st_size):
        raise DatasetError(f"{archive}: unpacks to more than {MAX_GROWTH} times its size; is it the right archive?")


def _admit(archive: Path, target: Path, name: str, plain: bool) -> None:
    """Refuse a member that is no plain file or folder, whose name leads out, or that is there already."""
    if leads_out(name) or "\\" in name:  # a backslash separates folders on some systems only
        reason = "has a name that leads out of the target folder"
    elif not plain:
        reason = "is a link or a device; only plain files and folders are unpacked"
    elif (target / name).is_file():
        reason = "appears a second time"
    else:
        return
    raise DatasetError(f"{archive}: member {name!r} {reason}")
