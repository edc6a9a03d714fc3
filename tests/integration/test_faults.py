"""A registry that fails in every way: a push ends in a pushed image or in one clear line."""

from __future__ import annotations

import hashlib
import http.client
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, ClassVar

import pytest
from harness import one_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import NewProject
    from harness import Docker, Project

    from guix_tasks.local.registry import LocalRegistry

pytestmark = pytest.mark.engine

TINY = "FROM scratch\nCOPY Dockerfile /\n"

Fault = "Callable[[Proxy], bool]"
"""Answers a request in the place of the registry; false where that is to answer after all."""


@dataclass
class Faults:
    """What goes wrong: the requests that it concerns, how often, and what is answered instead."""

    answer: Callable[[Proxy], bool]
    concerns: Callable[[str, str], bool]
    times: int = 1
    met: int = 0
    asked: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self, method: str, path: str) -> bool:
        with self.lock:
            self.asked.append(f"{method} {path}")
            if not self.concerns(method, path) or self.met >= self.times:
                return False
            self.met += 1
            return True


class Proxy(BaseHTTPRequestHandler):
    """Hands every request on to a registry, but for those that a fault meets."""

    protocol_version = "HTTP/1.1"
    registry: ClassVar[int]
    faults: ClassVar[Faults]

    def handle_any(self) -> None:
        if self.faults.due(self.command, self.path) and self.faults.answer(self):
            return
        self.forward(self.body())

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = handle_any  # noqa: N815

    def log_message(self, *_: object) -> None: ...

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def forward(self, body: bytes, **headers: str) -> None:
        """Ask the registry; some of the headers of its answer may be others."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.registry, timeout=30)
        left_out = ("transfer-encoding", "content-length", "connection")
        # A header that is given twice, as Accept is, is one with both.
        given = {name: ", ".join(self.headers.get_all(name, [])) for name in self.headers}
        ours = {n: v for n, v in given.items() if n.lower() not in left_out}
        upstream.request(self.command, self.path, body, {**ours, "Content-Length": str(len(body))})
        answer = upstream.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in {**dict(answer.getheaders()), **headers}.items():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        upstream.close()

    def answer_status(self, status: int, text: str = "", **headers: str) -> bool:
        data = text.encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        return True

    def reset(self) -> bool:
        """End the connection as a crash would: with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        return True


def manifest(method: str, path: str) -> bool:
    return method == "PUT" and "/manifests/" in path


def upload(method: str, path: str) -> bool:
    return method in ("PATCH", "PUT") and "/blobs/uploads/" in path


def beginning(method: str, path: str) -> bool:
    return method == "POST" and "/blobs/uploads/" in path


def anything(_method: str, _path: str) -> bool:
    return True


def status(code: int, **headers: str) -> Callable[[Proxy], bool]:
    def answer(proxy: Proxy) -> bool:
        proxy.body()
        return proxy.answer_status(code, "not now", **headers)

    return answer


def reset(proxy: Proxy) -> bool:
    return proxy.reset()


def cut_short(proxy: Proxy) -> bool:
    """Take half of what is uploaded."""
    proxy.rfile.read(16)
    return proxy.reset()


def slow(_proxy: Proxy) -> bool:
    time.sleep(2)
    return False


def drop(proxy: Proxy) -> bool:
    """Say that what was pushed is there, and forget it."""
    digest = f"sha256:{hashlib.sha256(proxy.body()).hexdigest()}"
    return proxy.answer_status(201, Docker_Content_Digest=digest, Location=proxy.path)


@contextmanager
def failing(registry: LocalRegistry, faults: Faults) -> Iterator[str]:
    handler = type("Handler", (Proxy,), {"registry": registry.port, "faults": faults})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_address[1]}"
        server.shutdown()


def tiny(new_project: NewProject, registry: LocalRegistry, address: str) -> Project:
    """A project that goes to a registry by way of a proxy, which is none of ours to ``inv``."""
    account = registry.account.credentials()
    assert account
    project = new_project(
        repository=f"{address}/guix-tasks-test/faults-{time.time_ns()}",
        DOCKER_USERNAME=account.username,
        DOCKER_PASSWORD=account.password,
    )
    # Each with a layer of its own, so that there is something to upload.
    project.dockerfile(f"{TINY}LABEL once={time.time_ns()}\n")
    project.ok("base")
    return project


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(Faults(status(429), manifest, 2), id="429"),
        pytest.param(Faults(status(429, Retry_After="1"), beginning), id="429, retry after"),
        pytest.param(Faults(status(500), manifest), id="500"),
        pytest.param(Faults(status(503), beginning), id="503"),
        pytest.param(Faults(status(502), upload), id="502"),
        pytest.param(Faults(reset, manifest), id="reset"),
        pytest.param(Faults(cut_short, upload), id="cut short"),
        pytest.param(Faults(slow, anything, 2), id="slow"),
    ],
)
def test_a_fault_that_passes_is_survived(
    new_project: NewProject, registry: LocalRegistry, docker: Docker, faults: Faults
) -> None:
    faults = replace(faults, asked=[], lock=threading.Lock())
    with failing(registry, faults) as address:
        project = tiny(new_project, registry, address)
        said = project.ok("push").stdout.strip()
        assert faults.met == faults.times
        held = said.replace(address, f"localhost:{registry.port}")
        docker.ok("manifest", "inspect", "--insecure", held)


@pytest.mark.parametrize(
    ("answer", "concerns"),
    [
        pytest.param(status(401), manifest, id="401"),
        pytest.param(status(403), manifest, id="403"),
        pytest.param(status(403), beginning, id="403 at once"),
    ],
)
def test_a_refusal_is_told_and_not_tried_again(
    new_project: NewProject,
    registry: LocalRegistry,
    answer: Callable[[Proxy], bool],
    concerns: Callable[[str, str], bool],
) -> None:
    faults = Faults(answer, concerns, times=100)
    with failing(registry, faults) as address:
        project = tiny(new_project, registry, address)
        result = project.inv("push")
        assert project.image in one_error(result, 5)
        assert "tried again" not in result.stderr
        assert len([each for each in faults.asked if concerns(*each.split())]) == faults.met


def test_a_fault_that_stays_ends_in_one_line(
    new_project: NewProject, registry: LocalRegistry
) -> None:
    faults = Faults(status(429), manifest, times=100)
    with failing(registry, faults) as address:
        project = tiny(new_project, registry, address)
        result = project.inv("push")
        error = one_error(result, 5)
        assert project.image in error
        assert result.stderr.count("is tried again in") == 3
        assert faults.met == 4


def test_a_registry_that_holds_another_image_is_not_believed(
    new_project: NewProject, registry: LocalRegistry
) -> None:
    faults = Faults(drop, manifest, times=0)
    with failing(registry, faults) as address:
        project = tiny(new_project, registry, address)
        before = project.ok("push").stdout.strip().partition("@")[2]
        project.dockerfile(f"{TINY}LABEL again=yes\n")
        project.ok("base")
        faults.times = 1
        error = one_error(project.inv("push"), 5)
        assert f"the registry holds {before}" in error
