"""The real engine's side of the SDK, before an engine that is played."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from guix_tasks.engine import docker
from guix_tasks.engine.discovery import Address
from guix_tasks.engine.docker import DockerEngine
from guix_tasks.errors import FULL_DISK, EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = b'{"status": "Pushed"}\r\n'


class Played(BaseHTTPRequestHandler):
    """Dies in the middle of a push, and has no room for a tag."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(200, {"ApiVersion": "1.47"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/push?tag=t"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK) + b"ff\r\n{")
            self.close_connection = True
        else:
            self.answer(500, {"message": "write /data/x: no space left on device"})

    def answer(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def played() -> Iterator[DockerEngine]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Played) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield DockerEngine(Address(f"tcp://127.0.0.1:{server.server_address[1]}", "test"))
        server.shutdown()


def test_an_engine_that_dies_while_it_answers_is_an_error_of_one_line() -> None:
    with played() as engine, pytest.raises(EngineError, match="does not answer: ") as raised:
        engine.push("localhost:1/x:t", None)
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_told_with_what_mends_it() -> None:
    with played() as engine, pytest.raises(EngineError) as raised:
        engine.tag("sha256:0", "localhost:1/x:t")
    assert str(raised.value).endswith(f"no space left on device; {FULL_DISK}")


@pytest.mark.parametrize("fault", ["connect: connection refused", "lookup r.test: no such host"])
def test_a_registry_out_of_reach_may_be_that_of_any_setting(fault: str) -> None:
    """``CACHE_IMAGE``, a base image, what ``push`` was told: the engine knows the reference."""
    said = str(docker._registry_error("push r.test/c:1", f"dial tcp: {fault}"))
    assert said.startswith(f"cannot push r.test/c:1: dial tcp: {fault}; ")
    assert "mend the reference" in said
    assert "IMAGE" not in said
