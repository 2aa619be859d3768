"""A stand-in for the Hugging Face Hub on the loopback, with the few answers that opening a model needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by id, and how often a download breaks off.

    Attributes:
      repos: id -> {file name: content}, or a (status, error code) that every request for it gets.
      breaks: file name -> how many more times its download stops in the middle.
      log: (method, path, Range header) of every request.
    """

    def __init__(self, repos: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.breaks, self.log = repos, {}, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.log.append((self.command, path, self.headers.get("Range")))
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = info or file
        repo = self.server.repos.get(found[1]) if found else None
        if found is None or repo is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if isinstance(repo, tuple):
            return self.send(repo[0], b"{}", {"X-Error-Code": repo[1]}, body)
        if found[2] not in (None, "main", SHA):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if info and "/tree/" in path:
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in repo.items()
            ]
            return self.send(200, json.dumps(tree).encode(), {}, body)
        if info:
            siblings = [{"rfilename": name} for name in repo]
            data = {"id": found[1], "modelId": found[1], "sha": SHA, "siblings": siblings, "tags": [], "private": False}
            return self.send(200, json.dumps(data).encode(), {}, body)
        if file[3] not in repo:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA}, body)
        return self.send_file(file[3], repo[file[3]], body)

    def send_file(self, name: str, data: bytes, body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers["Range"])[1]) if self.headers.get("Range") else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if not body or not self.server.breaks.get(name):
            return self.send(206 if start else 200, data[start:], headers, body)
        self.server.breaks[name] -= 1
        self.send(206 if start else 200, data[start:], headers, body, stop=max(1, (len(data) - start) // 2))
        return None

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool, stop: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:stop])
        if stop is not None:
            self.close_connection = True


@contextmanager
def hub(repos: dict[str, Any]) -> Iterator[Hub]:
    """A running server."""
    with Hub(repos) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
