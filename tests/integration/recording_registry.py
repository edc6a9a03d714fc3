"""Registries on the loopback interface that record the account of each request.

A registry keeps its content in memory, implements the parts of OCI's distribution specification
that pushes and pulls need, and accepts either one account or all requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs/uploads|blobs)/(?P<last>[^/]*)")


@dataclass
class RecordingRegistry:
    """A registry, its content, and the accounts that it received."""

    account: str = ""
    """The accepted account ``USER:PASSWORD`` (default: no authentication)."""
    port: int = 0
    accounts: set[str] = field(default_factory=set)
    """The received accounts, as ``USER:PASSWORD``, or the header if it is not Basic."""
    requests: int = 0
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Media type and content, by ``NAME:TAG`` and ``NAME@DIGEST``."""
    immutable: bool = False
    """Whether it rejects pushes of existing tags."""
    rejected_tags: set[str] = field(default_factory=set)

    @property
    def host(self) -> str:
        return f"localhost:{self.port}"

    @property
    def auth(self) -> str:
        """The account as Docker's configuration has it."""
        return base64.b64encode(self.account.encode()).decode()

    def reset(self) -> None:
        self.accounts.clear()
        self.requests = 0

    def record(self, header: str | None) -> bool:
        """Record the header ``Authorization`` of a request, and return whether to accept it."""
        self.requests += 1
        account = ""
        if header is not None:
            kind, _, value = header.partition(" ")
            account = base64.b64decode(value).decode() if kind == "Basic" else header
            self.accounts.add(account)
        return account == self.account if self.account else True


@contextmanager
def run_registry(account: str = "") -> Iterator[RecordingRegistry]:
    registry = RecordingRegistry(account)
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"registry": registry})
    ) as server:
        server.daemon_threads = True
        registry.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield registry
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    registry: RecordingRegistry
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"
    """Otherwise a client that tries TLS first does not recognize HTTP."""

    def _any(self) -> None:
        body = self._body()
        parts = urlsplit(self.path)
        if not self.registry.record(self.headers.get("Authorization")):
            challenge = {"WWW-Authenticate": 'Basic realm="tests"'}
            self._answer(401, _error("UNAUTHORIZED"), challenge)
        elif parts.path == "/v2/":
            self._answer(200, b"{}")
        elif match := _PATH.fullmatch(parts.path):
            name, kind, last = match["name"], match["kind"], match["last"]
            if kind == "manifests":
                self._manifest(name, last, body)
            elif kind == "blobs":
                self._blob(last)
            else:
                self._upload(name, last, body, parse_qs(parts.query))
        else:
            self._answer(404, _error("NAME_UNKNOWN"))

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = _any  # noqa: N815 -- the base class's names

    def _manifest(self, name: str, reference: str, body: bytes) -> None:
        if self.command == "PUT" and reference in self.registry.rejected_tags:
            self._answer(403, _error("DENIED"))
            return
        has_tag = f"{name}:{reference}" in self.registry.manifests
        if self.command == "PUT" and has_tag and self.registry.immutable:
            text = f"tag {reference} cannot be overwritten because the repository is immutable"
            self._answer(400, _error("TAG_INVALID", text))
            return
        if self.command == "PUT":
            kind, digest = self.headers["Content-Type"], _digest(body)
            self.registry.manifests[f"{name}@{digest}"] = (kind, body)
            if not reference.startswith("sha256:"):
                self.registry.manifests[f"{name}:{reference}"] = (kind, body)
            self._answer(201, b"", {"Docker-Content-Digest": digest})
            return
        separator = "@" if reference.startswith("sha256:") else ":"
        manifest = self.registry.manifests.get(f"{name}{separator}{reference}")
        if manifest:
            kind, content = manifest
            headers = {"Content-Type": kind, "Docker-Content-Digest": _digest(content)}
            self._answer(200, content, headers)
        else:
            self._answer(404, _error("MANIFEST_UNKNOWN"))

    def _blob(self, digest: str) -> None:
        blob = self.registry.blobs.get(digest)
        if blob is None:
            self._answer(404, _error("BLOB_UNKNOWN"))
        else:
            self._answer(200, blob, {"Docker-Content-Digest": digest})

    def _upload(self, name: str, last: str, body: bytes, query: dict[str, list[str]]) -> None:
        upload = last or secrets.token_hex(8)
        self.registry.uploads[upload] = self.registry.uploads.get(upload, b"") + body
        headers = {"Location": f"/v2/{name}/blobs/uploads/{upload}"}
        if self.command == "PUT":
            (digest,) = query["digest"]
            self.registry.blobs[digest] = self.registry.uploads.pop(upload)
            self._answer(201, b"", {**headers, "Docker-Content-Digest": digest})
        else:
            headers["Range"] = f"0-{max(0, len(self.registry.uploads[upload]) - 1)}"
            self._answer(202, b"", headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        text = b""
        while size := int(self.rfile.readline(), 16):
            text += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return text

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in {**defaults, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Docker-Distribution-API-Version", "registry/2.0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _error(code: str, message: str = "") -> bytes:
    return json.dumps({"errors": [{"code": code, "message": message or code.lower()}]}).encode()
