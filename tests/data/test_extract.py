"""Unpacking: what comes out of good archives, and that no hostile or damaged one gets through."""

import gzip
import io
import os
import re
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from archives import add, folder_bytes, tar_bytes, write_tar, write_zip
from damage import files_limited_to

from fgvc.data.extract import extract
from fgvc.errors import DatasetError

FILES = {"a/one.txt": b"1", "a/b/two.bin": bytes(3000), "./three": b"", "ünï.txt": b"4"}
PLAIN = {name.removeprefix("./"): content for name, content in FILES.items()}


def refused(archive: Path, target: Path, match: str) -> None:
    """Refused with a message, and nothing outside the target is there that was not there before."""
    before = folder_bytes(target.parent)
    with pytest.raises(DatasetError, match=match) as caught:
        extract(archive, target)
    assert str(archive) in str(caught.value)
    after = {name for name in folder_bytes(target.parent) if not name.startswith(f"{target.name}/")}
    assert after == set(before)
    assert not any(path.is_symlink() for path in target.rglob("*"))


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.tar.gz", "x.tar.bz2", "x.tar.xz", "x.zip", "X.TAR"])
def test_content_of_every_kind_of_archive(tmp_path: Path, name: str) -> None:
    if name.endswith("zip"):
        archive = write_zip(tmp_path / name, FILES)
    else:
        ending = name.rpartition(".")[2].lower()
        archive = write_tar(tmp_path / name, FILES, {"tgz": "w:gz", "tar": "w"}.get(ending, f"w:{ending}"))
    extract(archive, tmp_path / "deep" / "out")
    assert folder_bytes(tmp_path / "deep" / "out") == PLAIN


def test_other_files_are_copied_and_the_given_name_decides(tmp_path: Path) -> None:
    (tmp_path / "labels.mat").write_bytes(b"MATLAB")
    extract(tmp_path / "labels.mat", tmp_path / "out")
    archive = write_tar(tmp_path / "renamed", FILES, "w:gz")
    extract(archive, tmp_path / "out", name="x.tgz")
    assert folder_bytes(tmp_path / "out") == PLAIN | {"labels.mat": b"MATLAB"}


def test_a_hostile_member_of_a_nested_tar_is_refused(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "train.tar", {"n0.tar": tar_bytes({"../../evil": b"x"})})
    with pytest.raises(DatasetError, match=r"'\.\./\.\./evil' has a name that leads out"):
        extract(archive, tmp_path / "out", nested=True)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("name", [".tar", "..tar", "...tar", "n0/...tar", "n0/.tar", "../n0.tar"])
def test_a_nested_tar_whose_name_without_the_ending_leads_out(tmp_path: Path, name: str) -> None:
    archive = write_tar(tmp_path / "train.tar", {name: tar_bytes({"evil": b"x"})})
    with pytest.raises(DatasetError, match=rf"'{re.escape(name)}' (names no folder|has a name that leads out)"):
        extract(archive, tmp_path / "deep" / "out", nested=True)
    assert not list(tmp_path.rglob("evil"))


def test_modes_and_owners_are_not_taken_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("tool")
        member.mode, member.uid, member.size = 0o6777, 12345, 1
        tar.addfile(member, io.BytesIO(b"x"))
    extract(tmp_path / "x.tar", tmp_path / "out")
    status = (tmp_path / "out" / "tool").stat()
    assert not status.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IXUSR)
    assert status.st_uid == os.getuid()


UP = ["../evil", "a/../../evil", "..\\evil", ".."]
NAMES = [*UP, "/tmp/evil-fgvc", "C:/evil", "c:evil", "foo/C:/evil", "foo/c:evil", "\\\\host\\evil", "a\\b"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_lead_out(tmp_path: Path, name: str, kind: str) -> None:
    write = write_tar if kind == "tar" else write_zip
    refused(write(tmp_path / f"x.{kind}", {"good": b"1", name: b"evil"}), tmp_path / "out", "leads out")
    assert not Path("/tmp/evil-fgvc").exists()


KINDS = [*((tarfile.SYMTYPE, link) for link in ("../../evil", "good", "/etc/passwd")), (tarfile.LNKTYPE, "good")]
KINDS += [(device, "") for device in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)]


@pytest.mark.parametrize(("kind", "link"), KINDS)
def test_only_plain_files_and_folders(tmp_path: Path, kind: bytes, link: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "good", b"1")
        add(tar, "bad", kind=kind, link=link)
        add(tar, "bad/evil", b"evil")
    refused(tmp_path / "x.tar", tmp_path / "out", "'bad' is a link or a device")


def test_a_link_in_a_zip(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "x.zip", {"bad": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)
    refused(archive, tmp_path / "out", "'bad' is a link or a device")


@pytest.mark.parametrize("second", ["a", "./a", "b//../a", "a/"])
def test_a_name_that_occurs_twice(tmp_path: Path, second: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a", b"1")
        add(tar, second, b"2")
    refused(tmp_path / "x.tar", tmp_path / "out", "a second time|leads out|file lies already")


def test_a_file_below_a_file(tmp_path: Path) -> None:
    refused(write_tar(tmp_path / "x.tar", {"a": b"1", "a/b": b"2"}), tmp_path / "out", "Not a directory|File exists")


@pytest.mark.parametrize("kind", ["tgz", "zip", "empty members", "headers"])
def test_archives_that_grow_without_measure(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.foreign.ALLOWANCE", 1000)
    archive = tmp_path / ("x.zip" if kind == "zip" else "x.tgz")
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("zeros", bytes(3_000_000))
    elif kind == "headers":
        with tarfile.open(archive, "w:gz") as tar:
            for i in range(5):
                add(tar, "header", f"060000 {i:05}=".encode().ljust(59_999, b"x") + b"\n", kind=tarfile.XGLTYPE)
                add(tar, f"{i}")
    else:
        empty = dict.fromkeys((f"{i:04}" for i in range(3000)), b"")
        write_tar(archive, empty if kind == "empty members" else {"zeros": bytes(3_000_000)}, "w:gz")
    refused(archive, tmp_path / "out", "more than 20 times its size")
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written <= 20 * archive.stat().st_size + 1000


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])  # pax, global, Solaris, long name, long link
@pytest.mark.parametrize("first", [True, False])
def test_a_header_without_measure_is_refused_unread(tmp_path: Path, kind: bytes, first: bool) -> None:
    archive = tmp_path / "x.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        if not first:
            add(tar, "good", b"1")
        add(tar, "header", bytes(64 << 20), kind=kind)
        add(tar, "evil", b"1")
    tracemalloc.start()
    try:
        refused(archive, tmp_path / "out", "'header' is a header of 67108864 bytes")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_long_names_are_read(tmp_path: Path) -> None:
    name = "/".join(["folder" * 10] * 5) + "/ünï.txt"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / f"{kind}.tar", "w", format=kind) as tar:
            add(tar, name, b"1")
        extract(tmp_path / f"{kind}.tar", tmp_path / f"{kind}")
        assert folder_bytes(tmp_path / f"{kind}") == {name: b"1"}


SPARSE = {
    "GNU": None,
    "pax 0.0": {"GNU.sparse.size": "1", "GNU.sparse.numblocks": "0"},
    "pax 0.1": {"GNU.sparse.map": "0,1"},
    "pax 1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_files(tmp_path: Path, kind: str) -> None:
    """Their maps are read whole, and may be longer than the memory."""
    headers = SPARSE[kind]
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "good", b"1")
        member = tarfile.TarInfo("bad")
        member.size, member.pax_headers = 2000, headers or {}
        member.type = tarfile.GNUTYPE_SPARSE if headers is None else tarfile.REGTYPE
        tar.addfile(member, io.BytesIO(b"1000\n" + b"0\n" * 1000))
    refused(tmp_path / "x.tar", tmp_path / "out", "is a sparse file")


def test_endless_headers_in_a_row(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for _ in range(3000):
            add(tar, "header", b"12 a=12345\n", kind=tarfile.XHDTYPE)
    refused(tmp_path / "x.tar", tmp_path / "out", "damaged")


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.tar.xz", "x.zip"])
def test_damaged_archives(tmp_path: Path, name: str) -> None:
    archive = tmp_path / name
    files = {"a": os.urandom(50_000), "b": os.urandom(50_000)}
    modes = {"x.tar": "w", "x.tgz": "w:gz", "x.tar.xz": "w:xz"}
    write_zip(archive, files) if name == "x.zip" else write_tar(archive, files, modes[name])
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 3], b"<html>Not found</html>", gzip.compress(b"not a tar at all" * 100), b""):
        archive.write_bytes(damaged)
        refused(archive, tmp_path / "out", "damaged")
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def test_an_encrypted_zip(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "x.zip", {"secret": b"1"})
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(signature) + offset] |= 1
    archive.write_bytes(content)
    refused(archive, tmp_path / "out", "secret.* is encrypted")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_disk_without_room_is_not_taken_for_a_damaged_archive(tmp_path: Path, kind: str) -> None:
    archive = (write_tar if kind == "tar" else write_zip)(tmp_path / f"x.{kind}", {"a": bytes(5000)})
    with files_limited_to(1000), pytest.raises(OSError, match="File too large"):
        extract(archive, tmp_path / "out")


def test_a_python_without_the_safe_filter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tarfile, "data_filter")
    refused(write_tar(tmp_path / "x.tar", {"a": b"1"}), tmp_path / "out", r"update it \(3\.10\.12")
