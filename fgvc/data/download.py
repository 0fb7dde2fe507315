"""Downloading large files: a broken transfer is continued, and a file appears only once it is whole and checked."""

import itertools
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pooch
import requests
from urllib3.exceptions import HTTPError

from fgvc.errors import DatasetError
from fgvc.foreign import read_json_object, stand_in
from fgvc.io import byte_bar, locked, write_json_atomic

logger = logging.getLogger(__name__)
pooch.get_logger().setLevel(logging.WARNING)

_CHUNK = 1 << 20  # bytes
_LENGTH = re.compile(r"[0-9]{1,18}")  # not "\u00b2", and not the thousands of digits that Python refuses to read
_TRANSIENT_STATUS = (408, 416, 429, 500, 502, 503, 504)


class DownloadError(DatasetError):
    """The server does not send the file, or sends another one."""


def download(
    url: str,
    target: Path,
    checksums: Mapping[str, str],
    *,
    size: int | None = None,
    space: float = 1.0,
    attempts: int = 5,
    pause: float = 1.0,
    timeout: float = 30.0,
) -> None:
    """Download `url` to `target`, which appears only when it is whole and its checksum agrees.

    A partial download is kept in `target`.part. A later call continues it where the server offers ranges and still has
    the same version of the file; otherwise it starts again.

    Args:
        url: http(s) address.
        target: file to make; its folder is created.
        checksums: hexadecimal digests by algorithm: "sha256" is checked, or "md5" without it; may be empty.
        size: number of bytes, where known; a longer file is refused.
        space: free disk space required before the transfer, as a multiple of the file's size.
        attempts: tries in a row without a byte of progress before giving up.
        pause: seconds before the second try; doubled with each further one.
        timeout: seconds without a byte before a try has failed.

    Raises:
        DownloadError: the server refuses, sends a web page or too much, or cannot be reached, or the checksum differs
            (what has arrived is deleted).
        DatasetError: there is too little space, or another process downloads the same file.
        OSError: the file cannot be written; where the disk is full, what has arrived stays.
    """
    part = target.with_name(f"{target.name}.part")

    def fetch(_url: str, temporary: str, _pooch: object) -> None:
        failures, furthest = 0, _size(part)
        while (error := _transfer_error(url, part, size, space, timeout)) is not None:
            failures = 1 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures >= attempts:
                raise DownloadError(
                    f"{url}: {error}, {failures} times without progress; {_size(part)} bytes have arrived in {part}. "
                    "Start again to continue."
                )
            logger.warning("%s: %s; trying again", url, error)
            time.sleep(pause * 2 ** (failures - 1))
        part.replace(temporary)
        _discard(part)

    known_hash = next((f"{name}:{checksums[name]}" for name in ("sha256", "md5") if name in checksums), None)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(part.with_name(f"{part.name}.lock")) as free:
        if free is False:
            raise DatasetError(f"{part}: another process is downloading it; wait for it, or end it, and start again")
        try:
            pooch.retrieve(url, known_hash, fname=target.name, path=target.parent, downloader=fetch)
        except ValueError as error:
            fix = "Start again; if it differs again, the file on the server has changed since the card was written"
            raise DownloadError(f"{url}: {error} {fix}") from error


def require_space(folder: Path, needed: float, purpose: str) -> None:
    """Check that the disk of `folder` has at least `needed` bytes free. Raises DatasetError: too little space."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DatasetError(
            f"{folder}: {purpose} needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; free some or "
            "give another --root"
        )


def _transfer_error(url: str, part: Path, size: int | None, space: float, timeout: float) -> str | None:
    """One try to complete `part`: None, or the reason why it failed where another try may succeed."""
    try:
        _transfer(url, part, size, space, timeout)
    except (ValueError, requests.TooManyRedirects) as error:  # requests raises many types for addresses and headers
        raise DownloadError(f"{url}: the server sends on to what cannot be followed ({error})") from error
    except (requests.RequestException, HTTPError) as error:
        return str(error) or type(error).__name__
    return None


def _transfer(url: str, part: Path, size: int | None, space: float, timeout: float) -> None:
    """Complete `part`, from its end where the server still has the same version of the file.

    The origin of a partial file is stored next to it: address, size, and validator (a strong ETag, else Last-Modified).
    """
    origin, have = _read_origin(part), _size(part)
    resumed = have > 0 and origin["url"] == url and origin["validator"] is not None
    if resumed and origin["size"] == have:
        return
    headers = {"User-Agent": "fgvc", "Accept-Encoding": "identity"}
    if resumed:
        headers |= {"Range": f"bytes={have}-", "If-Range": origin["validator"]}
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status, chunks = response.status_code, response.raw.stream(_CHUNK, decode_content=False)
        etag, length = response.headers.get("ETag"), response.headers.get("Content-Length", "")
        strong = etag if etag and not etag.startswith("W/") else None  # a weak one does not promise equal bytes
        validator = strong or response.headers.get("Last-Modified")
        if status in _TRANSIENT_STATUS:
            if status == 416:  # nothing at that offset: the file on the server is shorter
                _discard(part)
            raise requests.HTTPError(f"HTTP status {status} ({response.reason})")
        if status not in (200, 206):
            raise DownloadError(f"{url}: the server refuses, HTTP status {status} ({response.reason})")
        if status == 200:
            first = next(chunks, b"")
            page = response.headers.get("Content-Type", "").startswith("text/html")
            if problem := stand_in(b"<html" if page else first):
                raise DownloadError(f"{url}: the server sent {problem}")
            _discard(part)
            origin = {"url": url, "validator": validator, "size": int(length) if _LENGTH.fullmatch(length) else None}
            have, chunks = 0, itertools.chain([first], chunks)
        else:
            continued = resumed and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not continued or validator not in (None, origin["validator"]):  # some servers respect no If-Range
                _discard(part)
                raise requests.HTTPError("the server sent another part than asked for")
        total = size if origin["size"] is None else origin["size"]
        if total is not None:
            if total > (size or total):
                raise DownloadError(f"{url}: the server announces {total} bytes, expected {size}")
            require_space(part.parent, total * space - have, f"{part.name.removesuffix('.part')}, unpacked,")
        write_json_atomic(_sidecar(part), origin)
        _append(part, chunks, total)
        if total is not None and _size(part) > total:
            _discard(part)
            raise DownloadError(f"{url}: the server sent more than {total} bytes; what arrived is deleted")
        if origin["size"] not in (None, _size(part)):
            raise requests.HTTPError(f"{_size(part)} of {total} bytes arrived")


def _append(part: Path, chunks: Iterable[bytes], total: int | None) -> None:
    """Append chunks until there are no more, or `part` has more than `total` bytes; an error of the disk names it."""
    with byte_bar(part.name.removesuffix(".part"), total, initial=_size(part)) as bar:
        try:
            with part.open("ab") as file:
                for chunk in chunks:
                    file.write(chunk)
                    bar.update(len(chunk))
                    if total is not None and file.tell() > total:  # a bar that is not shown does not count
                        break
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(part)) from error


def _sidecar(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_origin(part: Path) -> dict[str, Any]:
    try:
        found = read_json_object(_sidecar(part))
    except (OSError, ValueError):
        found = {}  # the origin of the partial file is unknown
    kinds = {"url": str, "validator": str, "size": int}
    return {key: found[key] if isinstance(found.get(key), kind) else None for key, kind in kinds.items()}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _sidecar(part).unlink(missing_ok=True)
