"""Making archives for the tests, harmless and hostile ones."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def tar_bytes(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    """A tar of plain files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            add(tar, name, content)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    path.write_bytes(tar_bytes(files, mode))
    return path


def write_zip(path: Path, files: Mapping[str, bytes], mode: int = 0) -> Path:
    """A zip whose members have the Unix mode `mode`."""
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            zipped.writestr(member, content)
    return path


def folder_bytes(root: Path) -> dict[str, bytes]:
    """Every file below `root` by its relative path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
