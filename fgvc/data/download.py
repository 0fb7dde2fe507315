"""Downloading large files: a broken transfer is continued, and a file appears only once it is whole and checked."""

import contextlib
import http.client
import json
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from fgvc.errors import DatasetError
from fgvc.io import byte_bar, checksum_problem, locked, write_json_atomic

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # bytes
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_WEB_PAGE = (b"<!doctype html", b"<html")


@dataclass(frozen=True)
class _Remote:
    """The remote file of a partial download; stored next to it, so that no other file's bytes are appended.

    Attributes:
        url: Address.
        validator: The server's mark of the version (a strong ETag, else Last-Modified); without either it is None, and
            a partial file cannot be continued.
        size: Number of bytes of the whole file; None where the server does not say.
    """

    url: str
    validator: str | None
    size: int | None


class DownloadError(DatasetError):
    """The server does not send the file, or sends another one."""


class _TransferError(Exception):
    """The transfer failed, but another try may succeed; the message is the reason."""


def download(
    url: str,
    target: Path,
    checksums: Mapping[str, str],
    *,
    space: float = 1.0,
    attempts: int = 5,
    pause: float = 1.0,
    timeout: float = 30.0,
) -> None:
    """Download `url` to `target`, which appears only when it is whole and its checksums agree.

    A partial download is kept in `target`.part. A later call continues it where the server offers ranges and still has
    the same version of the file; otherwise it starts again.

    Args:
        url: http(s) address.
        target: file to make; its folder is created.
        checksums: expected hexadecimal digests by algorithm ("md5", "sha256"); may be empty.
        space: free disk space required before the transfer, as a multiple of the file's size.
        attempts: tries in a row without a byte of progress before giving up.
        pause: seconds before the second try; doubled with each further one.
        timeout: seconds without a byte before a try has failed.

    Raises:
        DownloadError: the server refuses, sends a web page or cannot be reached, or the checksum differs (what has
            arrived is deleted).
        DatasetError: there is too little space, or another process downloads the same file.
        OSError: the file cannot be written; where the disk is full, what has arrived stays.
    """
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(part.with_name(f"{part.name}.lock")) as free:
        if not free:
            raise DatasetError(f"{part}: another process is downloading it; wait for it, or end it, and start again")
        _complete(url, part, space, attempts, pause, timeout)
        problem = checksum_problem(part, checksums)
        if problem is not None:
            _discard(part)
            raise DownloadError(
                f"{url}: {problem}; what arrived is deleted. Start again; if it differs again, the file on the server "
                "has changed since the card was written"
            )
        part.replace(target)
        _discard(part)


def require_space(folder: Path, needed: float, purpose: str) -> None:
    """Check that the disk of `folder` has at least `needed` bytes free.

    Raises:
        DatasetError: too little space.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DatasetError(
            f"{folder}: {purpose} needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; free some or "
            "give another --root"
        )


def _complete(url: str, part: Path, space: float, attempts: int, pause: float, timeout: float) -> None:
    """Try until `part` is complete; arguments as in `download`.

    Raises:
        DownloadError: the server refuses, or there was no progress.
    """
    failures, furthest = 0, _size(part)
    while (error := _transfer_error(url, part, space, timeout)) is not None:
        failures = 1 if _size(part) > furthest else failures + 1
        furthest = max(furthest, _size(part))
        if failures >= attempts:
            raise DownloadError(
                f"{url}: {error}, {failures} times without progress; {_size(part)} bytes have arrived in {part}. "
                "Start again to continue."
            )
        logger.warning("%s: %s; trying again", url, error)
        time.sleep(pause * 2 ** (failures - 1))


def _transfer_error(url: str, part: Path, space: float, timeout: float) -> str | None:
    """One try: the reason why it failed, where another try may succeed; None where `part` is now complete."""
    try:
        _transfer(url, part, space, timeout)
    except _TransferError as error:
        return str(error)
    return None


def _transfer(url: str, part: Path, space: float, timeout: float) -> None:
    """Complete `part`, from its end if that is possible.

    Raises:
        _TransferError: another try may succeed.
        DatasetError: another try cannot succeed.
    """
    known, have = _read_remote(part), _size(part)
    resumable = have > 0 and known is not None and known.url == url and known.validator is not None
    if resumable and known is not None and known.size == have:
        return
    headers = {"User-Agent": "fgvc"}
    if resumable and known is not None and known.validator is not None:
        headers |= {"Range": f"bytes={have}-", "If-Range": known.validator}
    with _open(url, headers, timeout, part) as response:
        continued = response.status == 206
        if continued and not _continues(response, known, have):
            _discard(part)
            raise _TransferError("the server sent another part than asked for")
        remote = known if continued and known is not None else _describe(url, response)
        if not continued:
            _refuse_web_page(url, response)
            _discard(part)
            have = 0
        if remote.size is not None:
            require_space(part.parent, remote.size * space - have, f"{part.name.removesuffix('.part')}, unpacked,")
        write_json_atomic(_sidecar(part), asdict(remote))
        _append(response, part, have, remote.size)


def _open(url: str, headers: dict[str, str], timeout: float, part: Path) -> http.client.HTTPResponse:
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing at that offset: the file on the server is shorter than the partial file
            _discard(part)
        if error.code == 416 or error.code in _TRANSIENT_STATUS:
            raise _TransferError(f"HTTP status {error.code} ({error.reason})") from error
        raise DownloadError(f"{url}: the server refuses, HTTP status {error.code} ({error.reason})") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise _TransferError(str(getattr(error, "reason", error)) or type(error).__name__) from error
    assert isinstance(response, http.client.HTTPResponse)
    return response


def _continues(response: http.client.HTTPResponse, known: _Remote | None, have: int) -> bool:
    """Whether a partial response begins where the file ends, and belongs to the same file."""
    if known is None:
        return False
    place, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    same_size = known.size is None or size in ("*", str(known.size))
    # some servers respect Range but not If-Range
    same_version = _describe(known.url, response).validator in (None, known.validator)
    return place.startswith(f"{have}-") and same_size and same_version


def _describe(url: str, response: http.client.HTTPResponse) -> _Remote:
    etag, length = response.headers.get("ETag"), response.headers.get("Content-Length")
    strong = etag if etag and not etag.startswith("W/") else None  # a weak one does not promise equal bytes
    size = int(length) if length is not None and length.isdigit() else None
    return _Remote(url, strong or response.headers.get("Last-Modified"), size)


def _refuse_web_page(url: str, response: http.client.HTTPResponse) -> None:
    beginning = response.peek(64)[:64].lstrip().lower()
    if response.headers.get_content_type() == "text/html" or beginning.startswith(_WEB_PAGE):
        raise DownloadError(f"{url}: the server sent a web page in place of the file (an error or login page?)")


def _append(response: http.client.HTTPResponse, part: Path, have: int, size: int | None) -> None:
    """Append the content of the response to the first `have` bytes.

    Raises:
        _TransferError: the connection broke, or the number of bytes is not the announced one.
    """
    with byte_bar(part.name.removesuffix(".part"), size, initial=have) as bar, _writing(part) as file:
        while True:
            try:
                chunk = response.read(_CHUNK)
            except (http.client.IncompleteRead, OSError) as error:
                file.write(getattr(error, "partial", b""))
                raise _TransferError(f"the transfer broke off ({type(error).__name__})") from error
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
    arrived = _size(part)
    if size is not None and arrived != size:
        raise _TransferError(f"{arrived} of {size} bytes arrived")


@contextlib.contextmanager
def _writing(part: Path) -> Iterator[BinaryIO]:
    """`part`, open for appending; an error of the disk names the file."""
    try:
        with part.open("ab") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(part)) from error


def _sidecar(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_remote(part: Path) -> _Remote | None:
    try:
        return _Remote(**json.loads(_sidecar(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # lost or damaged: the origin of the partial file is unknown


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _sidecar(part).unlink(missing_ok=True)
