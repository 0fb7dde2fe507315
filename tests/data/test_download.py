"""Downloads: continued, bound to one version of the remote file, checked, and clean when they fail."""

import errno
import hashlib
import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import files_limited_to
from file_server import FileServer, serving

from fgvc.data.download import download
from fgvc.errors import DatasetError

CONTENT = np.random.default_rng(0).bytes(300_000)
SUMS = {name: hashlib.new(name, CONTENT).hexdigest() for name in ("md5", "sha256")}


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as running:
        running.files["/a.tar"] = CONTENT
        yield running


def fetch(server: FileServer, folder: Path, **options: Any) -> Path:
    target = folder / "a.tar"
    download(server.url("/a.tar"), target, options.pop("checksums", SUMS), pause=0, timeout=5, **options)
    return target


def leave_a_part(server: FileServer, folder: Path, size: int = 100_000) -> None:
    server.cut_after = [size]
    with pytest.raises(DatasetError):
        fetch(server, folder, attempts=1)


def test_a_cut_connection_is_continued_as_long_as_there_is_progress(server: FileServer, tmp_path: Path) -> None:
    server.cut_after = [20_000] * 12
    assert fetch(server, tmp_path, attempts=2).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, *(f"bytes={20_000 * i}-" for i in range(1, 13))]
    assert server.served == len(CONTENT)


def test_a_later_call_continues_what_an_earlier_one_left(server: FileServer, tmp_path: Path) -> None:
    server.cut_after = [100_000]
    with pytest.raises(DatasetError, match=r"200000 more expected.*100000 bytes have arrived in .*a\.tar\.part"):
        fetch(server, tmp_path, attempts=1)
    assert not (tmp_path / "a.tar").exists()
    assert (tmp_path / "a.tar.part").read_bytes() == CONTENT[:100_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[1:] == [("/a.tar", "bytes=100000-")]
    assert server.served == len(CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_what_was_whole_before_the_rename_is_not_asked_for_again(server: FileServer, tmp_path: Path) -> None:
    leave_a_part(server, tmp_path)
    (tmp_path / "a.tar.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_cannot_continue_starts_over(server: FileServer, tmp_path: Path, ranges: bool) -> None:
    server.ranges, server.validators = ranges, not ranges
    server.cut_after = [100_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.served == 100_000 + len(CONTENT)


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_a_file_that_changed_on_the_server_is_not_glued_to_the_old_one(
    server: FileServer, tmp_path: Path, heeds_if_range: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a.tar"] = b"old" * 100_000
    leave_a_part(server, tmp_path)
    server.files["/a.tar"] = CONTENT
    if not heeds_if_range:
        answer = server.answer

        def careless(request: Any) -> None:
            del request.headers["If-Range"]
            answer(request)

        monkeypatch.setattr(server, "answer", careless)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_partial_file_of_another_address_is_not_continued(server: FileServer, tmp_path: Path) -> None:
    server.files["/other"] = CONTENT[:200_000] + bytes(100_000)
    server.cut_after = [200_000]
    with pytest.raises(DatasetError):
        download(server.url("/other"), tmp_path / "a.tar", SUMS, pause=0, attempts=1)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == ("/a.tar", None)


@pytest.mark.parametrize("damage", ["missing", "not JSON", "other keys"])
def test_a_partial_file_of_unknown_origin_is_not_continued(server: FileServer, tmp_path: Path, damage: str) -> None:
    (tmp_path / "a.tar.part").write_bytes(bytes(1000))
    if damage != "missing":
        (tmp_path / "a.tar.part.json").write_text("{" if damage == "not JSON" else json.dumps({"a": 1}))
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/a.tar", None)]


def test_a_shorter_file_on_the_server_starts_over(server: FileServer, tmp_path: Path) -> None:
    """Status 416: nothing at that offset."""
    leave_a_part(server, tmp_path, 200_000)
    server.status = [416]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=200000-", None]


def test_a_second_call_at_once_is_refused(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, refusals = server.answer, []

    def meanwhile(request: Any) -> None:
        if not refusals:
            with pytest.raises(DatasetError, match=r"a\.tar\.part: another process is downloading it") as caught:
                fetch(server, tmp_path)
            refusals.append(caught)
        answer(request)

    monkeypatch.setattr(server, "answer", meanwhile)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert (len(refusals), len(server.requests)) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_wrong_checksum_refuses_and_leaves_nothing(server: FileServer, tmp_path: Path, algorithm: str) -> None:
    expected = "0" * len(SUMS[algorithm])
    with pytest.raises(DatasetError, match=f"expected {algorithm}:{expected} but got {SUMS[algorithm]}"):
        fetch(server, tmp_path, checksums={algorithm: expected})
    assert not list(tmp_path.iterdir())


def test_passing_failures_of_the_server_are_waited_out(server: FileServer, tmp_path: Path) -> None:
    server.status = [503, 429, 500]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 4


def test_failures_that_stay_end_after_the_given_attempts(server: FileServer, tmp_path: Path) -> None:
    server.status = [503] * 10
    with pytest.raises(DatasetError, match=r"HTTP status 503 .*3 times without progress"):
        fetch(server, tmp_path, attempts=3)
    assert len(server.requests) == 3


def test_a_server_that_announces_more_than_it_has(server: FileServer, tmp_path: Path) -> None:
    server.announce = 5
    with pytest.raises(DatasetError, match="without progress"):
        fetch(server, tmp_path, attempts=2)
    assert not (tmp_path / "a.tar").exists()


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_of_the_server_is_final(server: FileServer, tmp_path: Path, status: int) -> None:
    server.status = [status]
    with pytest.raises(DatasetError, match=f"{server.url('/a.tar')}: .*{status}"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with serving() as server:
        url = server.url("/a.tar")
    with pytest.raises(DatasetError, match=f"{url}: .*refused.*2 times without progress"):
        download(url, tmp_path / "a.tar", SUMS, pause=0, attempts=2)


def test_a_file_longer_than_expected_is_refused(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="announces 300000 bytes, expected 200000"):
        fetch(server, tmp_path, size=200_000)
    server.lengths = False
    with pytest.raises(DatasetError, match="more than 200000 bytes; what arrived is deleted"):
        fetch(server, tmp_path, size=200_000)
    assert not list(tmp_path.iterdir())
    assert fetch(server, tmp_path, size=300_000).read_bytes() == CONTENT


def test_no_more_is_taken_than_the_card_says(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.tar"], server.lengths = bytes(40 << 20), False
    limit = 200_000 + (1 << 20)  # a chunk more
    with files_limited_to(limit), pytest.raises(DatasetError, match="more than 200000 bytes; what arrived is deleted"):
        fetch(server, tmp_path, size=200_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", ["\u00b2", "-5", "9" * 5000, "many"])
def test_a_content_length_that_is_no_number_is_not_relied_on(server: FileServer, tmp_path: Path, length: str) -> None:
    server.length = length
    assert fetch(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "ftp://127.0.0.1/a.tar", "data:x", "http://[::1", "http://127.0.0.1:x/", "/\u00b2"]
)
def test_only_http_is_followed(server: FileServer, tmp_path: Path, place: str) -> None:
    server.redirect = place
    with pytest.raises(DatasetError, match=r"a.tar: the server sends on to what cannot be followed \(.*"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", [b"\n<!DOCTYPE html><html>Sign in</html>", b"<html></html>"])
@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_no_archive(server: FileServer, tmp_path: Path, page: bytes, content_type: str) -> None:
    server.files["/a.tar"], server.content_type = page, content_type
    with pytest.raises(DatasetError, match="web page in place of the file"):
        fetch(server, tmp_path, checksums={})
    assert not list(tmp_path.iterdir())


def test_a_web_page_in_between_does_not_cost_what_has_arrived(server: FileServer, tmp_path: Path) -> None:
    leave_a_part(server, tmp_path)
    server.files["/a.tar"] = b"<html>Sign in</html>"
    with pytest.raises(DatasetError, match="web page"):
        fetch(server, tmp_path)
    server.files["/a.tar"] = CONTENT
    fetch(server, tmp_path)
    assert server.requests[-1][1] == "bytes=100000-"


def test_too_small_a_disk_is_found_first(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 400_001, 599_999))
    with pytest.raises(DatasetError, match="needs 1 MB, 1 MB are free"):
        fetch(server, tmp_path, space=2.0)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 400_000, 600_000))
    fetch(server, tmp_path, space=2.0)


def test_a_disk_that_fills_up_leaves_a_part_to_continue(server: FileServer, tmp_path: Path) -> None:
    with files_limited_to(250_000), pytest.raises(OSError) as caught:
        fetch(server, tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "a.tar.part"))
    assert (tmp_path / "a.tar.part").read_bytes() == CONTENT[:250_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == ("/a.tar", "bytes=250000-")
