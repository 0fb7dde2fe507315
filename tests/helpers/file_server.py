"""A small HTTP server for the tests of downloads: with ranges, and with the failures that real servers have."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """Files by path, and how the server behaves; a response uses up one entry of `cut_after` and `status`."""

    files: dict[str, bytes] = field(default_factory=dict)  # content by path, such as "/a.tar"
    ranges: bool = True  # heed Range and If-Range
    validators: bool = True  # send an ETag, which is that of the content
    cut_after: list[int] = field(default_factory=list)  # bytes after which a response breaks off
    announce: int = 0  # added to the true Content-Length
    lengths: bool = True  # send a Content-Length
    length: str | None = None  # sent in place of the true one
    redirect: str | None = None  # address that every request is sent on to
    status: list[int] = field(default_factory=list)  # sent in place of the file
    content_type: str = "application/octet-stream"
    commit: str | None = (
        None  # that of a repository: sent as the Hugging Face hub does, with the code of what is missing
    )
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range header so far
    served: int = 0  # bytes of content so far
    address: str = ""

    def url(self, path: str) -> str:
        return self.address + path

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.requests.append((request.path, asked))
        if self.status:
            request.send_error(self.status.pop(0))
            return
        if self.redirect is not None:
            request.send_response(302)
            request.send_header("Location", self.redirect)
            request.end_headers()
            return
        if request.path not in self.files:
            request.send_response(404)
            if self.commit:
                request.send_header("X-Error-Code", "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content = self.files[request.path]
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if self.ranges and asked and request.headers.get("If-Range") in (None, etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            if start >= len(content):
                request.send_error(416)
                return
        request.send_response(206 if start else 200)
        request.send_header("Content-Type", self.content_type)
        if self.lengths:
            request.send_header("Content-Length", self.length or str(len(content) - start + self.announce))
        if self.validators:
            request.send_header("ETag", etag)
        if self.commit:
            request.send_header("X-Repo-Commit", self.commit)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        if request.command == "HEAD":
            return
        body = content[start:]
        if self.cut_after:
            body = body[: self.cut_after.pop(0)]
        self.served += len(body)  # before the client can see the end
        request.wfile.write(body)


@contextmanager
def serving() -> Iterator[FileServer]:
    """A server on a free port of this machine, for as long as the block runs."""
    server = FileServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.answer(self)

        def do_HEAD(self) -> None:
            server.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.address = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
