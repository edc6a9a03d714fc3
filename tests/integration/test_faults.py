"""A registry that fails in every way: a push ends in a pushed image or in one clear line."""

from __future__ import annotations

import base64
import collections
import hashlib
import http.client
import io
import json
import secrets
import socket
import struct
import tarfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import pytest
from harness import one_error

from guix_tasks.commands.push import push
from guix_tasks.engine import retry
from guix_tasks.engine.credentials import remote_digest
from guix_tasks.errors import RegistryError
from guix_tasks.settings import load_isolated
from guix_tasks.stages.project import Project as EngineProject
from guix_tasks.stages.transfer import pull
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project
    from soak import Soak

    from guix_tasks.bootstrap.registry import LocalRegistry
    from guix_tasks.engine.api import Image
    from guix_tasks.engine.docker import DockerEngine

pytestmark = pytest.mark.engine

TINY = "FROM scratch\nCOPY Dockerfile /\n"

Answer: TypeAlias = "Callable[[Proxy], bool]"
"""Answers a request in the place of the registry; false where that is to answer after all."""


@dataclass
class Faults:
    """What goes wrong: the requests that it concerns, how often, and what is answered instead."""

    answer: Answer
    concerns: Callable[[str, str], bool]
    times: int = 1
    met: int = 0
    asked: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self, method: str, path: str) -> Answer | None:
        with self.lock:
            self.asked.append(f"{method} {path}")
            if not self.concerns(method, path) or self.met >= self.times:
                return None
            self.met += 1
            return self.answer


@dataclass
class Several:
    """Faults one after the other: each waits until the one before it was met."""

    faults: list[Faults]

    def due(self, method: str, path: str) -> Answer | None:
        for each in self.faults:
            if each.met < each.times:
                return each.due(method, path)
        return None


class Proxy(BaseHTTPRequestHandler):
    """Hands every request on to a registry, but for those that a fault meets."""

    protocol_version = "HTTP/1.1"
    # So that who begins with TLS hears that this is HTTP.
    default_request_version = "HTTP/1.0"
    registry: ClassVar[int]
    faults: ClassVar[Faults | Several]
    more: ClassVar[dict[str, str]]

    def handle_any(self) -> None:
        fault = self.faults.due(self.command, self.path)
        if fault and fault(self):
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

    def forward(self, body: bytes, *, spoil: bool = False, cut: bool = False) -> None:
        """Ask the registry, and hand on its answer, or what is left of it."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.registry, timeout=30)
        left_out = ("transfer-encoding", "content-length", "connection")
        # A header that is given twice, as Accept is, is one with both.
        given = {name: ", ".join(self.headers.get_all(name, [])) for name in self.headers}
        ours = {n: v for n, v in given.items() if n.lower() not in left_out}
        upstream.request(
            self.command, self.path, body, {**ours, **self.more, "Content-Length": str(len(body))}
        )
        answer = upstream.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        if spoil and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.wfile.flush()
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


def closing(method: str, path: str) -> bool:
    """The request that ends an upload, and names its digest."""
    return method == "PUT" and "/blobs/uploads/" in path


def reading(method: str, path: str) -> bool:
    return method == "GET" and "/manifests/" in path


def blob(method: str, path: str) -> bool:
    return method == "GET" and "/blobs/sha256:" in path


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


def spoilt(proxy: Proxy) -> bool:
    """Answer with a blob that has one byte of another's."""
    proxy.forward(proxy.body(), spoil=True)
    return True


def cut_off(proxy: Proxy) -> bool:
    """Answer with half of what was asked for, as long as it may seem."""
    proxy.forward(proxy.body(), cut=True)
    return proxy.reset()


def refused_digest(proxy: Proxy) -> bool:
    """Say that what was uploaded is not what its digest says."""
    proxy.body()
    said = {"errors": [{"code": "DIGEST_INVALID", "message": "provided digest did not match"}]}
    return proxy.answer_status(400, json.dumps(said), Content_Type="application/json")


@contextmanager
def failing(registry: LocalRegistry, faults: Faults | Several, **headers: str) -> Iterator[str]:
    """A registry that fails; its address.  It adds headers to what it is asked."""
    more = {"registry": registry.port, "faults": faults, "more": headers}
    handler = type("Handler", (Proxy,), more)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_address[1]}"
        server.shutdown()


@dataclass
class Rig:
    """A tiny image, and this process' own calls of the engine: as ``inv`` makes them, but quick."""

    engine: DockerEngine
    registry: LocalRegistry
    directory: Path
    waits: list[float]
    said: io.StringIO = field(default_factory=io.StringIO)
    made: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def project(self, address: str) -> EngineProject:
        account = self.registry.account.credentials()
        assert account
        image = f"{address}/guix-tasks-test/faults-{secrets.token_hex(6)}:t"
        # A process reads an env file once.
        env_file = self.directory / f"{len(self.made)}.env"
        env_file.write_text(
            f"IMAGE={image}\nDOCKER_USERNAME={account.username}\n"
            f"DOCKER_PASSWORD={account.password}\n"
        )
        return EngineProject(load_isolated(env_file), self.engine, Console(err=self.said))

    def image(self, project: EngineProject) -> Image:
        """An image of a layer that no registry has, under the project's name."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            member = tarfile.TarInfo("content")
            member.size = 20_000
            tar.addfile(member, io.BytesIO(secrets.token_bytes(20_000)))
        reference = str(project.settings.image)
        self.engine.import_rootfs(iter([data.getvalue()]), reference)
        self.made.append(reference)
        image = self.engine.image(reference)
        assert image
        return image

    def pushed(self, project: EngineProject) -> bool:
        """Push it: whether it is there, and what its registry holds is what was to be pushed."""
        try:
            (digest,) = push(project).values()
        except RegistryError as error:
            self.errors.append(str(error))
            return False
        reference = str(project.settings.image)
        assert remote_digest(self.engine, project.settings, reference) == digest
        return True

    def pulled(self, project: EngineProject, image: Image) -> bool:
        """Pull what was pushed, to where it is not any more: it is the same, or it is not there."""
        reference = str(project.settings.image)
        self.engine.untag(reference)
        assert self.engine.image(image.id) is None
        try:
            pull(project, reference)
        except RegistryError as error:
            self.errors.append(str(error))
            assert self.engine.image(reference) is None
            return False
        found = self.engine.image(reference)
        assert found
        assert (found.id, found.layers) == (image.id, image.layers)
        return True


@pytest.fixture
def rig(
    engine: DockerEngine, registry: LocalRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    waits: list[float] = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=waits.append))
    made = Rig(engine, registry, tmp_path, waits)
    yield made
    for reference in made.made:
        engine.untag(reference)
    assert not [error for error in made.errors if "\n" in error]


PUSH_FAULTS = {
    "429": (status(429), manifest),
    "429, retry after": (status(429, Retry_After="1"), beginning),
    "500": (status(500), manifest),
    "502": (status(502), upload),
    "503": (status(503), beginning),
    "504": (status(504), upload),
    "reset": (reset, manifest),
    "reset at once": (reset, beginning),
    "cut short": (cut_short, upload),
    "slow": (slow, manifest),
    "wrong digest": (refused_digest, closing),
}

PULL_FAULTS = {
    "429": (status(429), reading),
    "500": (status(500), reading),
    "503": (status(503), reading),
    "reset": (reset, reading),
    "cut short": (cut_off, reading),
    "slow": (slow, reading),
    "a blob cut short": (cut_off, blob),
    "wrong digest": (spoilt, blob),
}


PATIENT = {"429, retry after", "502", "503", "504", "reset at once"}
"""Kinds that the engine itself tries again, after five seconds: enough of these are below."""


@pytest.mark.parametrize("kind", sorted(PUSH_FAULTS.keys() - PATIENT))
def test_a_push_survives_what_passes(rig: Rig, kind: str) -> None:
    answer, concerns = PUSH_FAULTS[kind]
    faults = Faults(answer, concerns, 2 if kind == "429" else 1)
    with failing(rig.registry, faults) as address:
        project = rig.project(address)
        rig.image(project)
        assert rig.pushed(project), rig.errors
        assert faults.met == faults.times


def test_what_is_uploaded_is_not_uploaded_again(rig: Rig) -> None:
    faults = Faults(status(503), manifest, 2)
    with failing(rig.registry, faults) as address:
        project = rig.project(address)
        rig.image(project)
        assert rig.pushed(project)
    assert len(rig.waits) == 2
    ends = [each for each in faults.asked if closing(*each.split())]
    assert len(ends) == 2, "a layer and a configuration, once each"


@pytest.mark.parametrize("kind", PULL_FAULTS)
def test_a_pull_survives_what_passes(rig: Rig, kind: str) -> None:
    answer, concerns = PULL_FAULTS[kind]
    faults = Faults(answer, concerns, times=0)
    with failing(rig.registry, faults) as address:
        project = rig.project(address)
        image = rig.image(project)
        assert rig.pushed(project)
        faults.times = 1
        assert rig.pulled(project, image), rig.errors
        assert faults.met == 1


@pytest.mark.parametrize("concerns", ["reading", "blob"])
def test_what_is_never_what_its_digest_says_is_never_an_image(rig: Rig, concerns: str) -> None:
    faults = Faults(spoilt, {"reading": reading, "blob": blob}[concerns], times=0)
    with failing(rig.registry, faults) as address:
        project = rig.project(address)
        image = rig.image(project)
        assert rig.pushed(project)
        faults.times = 100
        assert not rig.pulled(project, image)


@pytest.mark.parametrize("code", [401, 403])
def test_a_pull_that_is_refused_is_not_tried_again(rig: Rig, code: int) -> None:
    faults = Faults(status(code), reading, times=0)
    with failing(rig.registry, faults) as address:
        project = rig.project(address)
        image = rig.image(project)
        assert rig.pushed(project)
        faults.times = 100
        assert not rig.pulled(project, image)
    assert rig.waits == []


def test_what_is_not_there_is_not_tried_again(rig: Rig) -> None:
    """A cache that misses costs no time."""
    with (
        failing(rig.registry, Faults(status(500), anything, 0)) as address,
        pytest.raises(RegistryError, match="fix the reference"),
    ):
        pull(rig.project(address), f"{address}/guix-tasks-test/500/429:t-503")
    assert rig.waits == []


@pytest.mark.soak
def test_faults_in_any_order(rig: Rig, soak: Soak) -> None:
    """Each ends in an image that is there, or in one line."""
    chance = soak.chance("faults in any order")
    kinds: collections.Counter[str] = collections.Counter()
    came: collections.Counter[bool] = collections.Counter()
    chosen = sorted(PUSH_FAULTS if soak.long else PUSH_FAULTS.keys() - PATIENT)
    for _ in range(soak.times(2, 60)):
        sequence = [chance.choice(chosen) for _ in range(chance.randint(1, 4))]
        several = Several([Faults(*PUSH_FAULTS[kind]) for kind in sequence])
        with failing(rig.registry, several) as address:
            project = rig.project(address)
            rig.image(project)
            came[rig.pushed(project)] += 1
            rig.engine.untag(str(project.settings.image))
        met = zip(sequence, several.faults, strict=True)
        kinds.update(f"push: {kind}" for kind, each in met if each.met)
    for _ in range(soak.times(2, 20)):
        kind = chance.choice(sorted(PULL_FAULTS))
        faults = Faults(*PULL_FAULTS[kind], times=0)
        with failing(rig.registry, faults) as address:
            project = rig.project(address)
            image = rig.image(project)
            assert rig.pushed(project)
            faults.times = chance.randint(1, 3)
            came[rig.pulled(project, image)] += 1
            rig.engine.untag(str(project.settings.image))
        kinds[f"pull: {kind}"] += faults.met
    soak.tell(
        "a registry that fails",
        f"{sum(kinds.values())} faults of {len(kinds)} kinds: {came[True]} transfers ended in the "
        f"image, {came[False]} in one line",
    )


def basic(registry: LocalRegistry) -> str:
    account = registry.account.credentials()
    assert account
    pair = f"{account.username}:{account.password}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


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


def test_a_fault_that_passes_is_told_and_survived(
    new_project: NewProject, registry: LocalRegistry, docker: Docker
) -> None:
    faults = Faults(status(429, Retry_After="1"), manifest)
    with failing(registry, faults) as address:
        project = tiny(new_project, registry, address)
        result = project.ok("push")
        assert faults.met == faults.times
        assert result.stderr.count("the push is retried in") == 1
        held = result.stdout.strip().replace(address, f"localhost:{registry.port}")
        docker.ok("manifest", "inspect", "--insecure", held)


def test_a_base_image_is_tried_again(
    new_project: NewProject, registry: LocalRegistry, builder: dict[str, str]
) -> None:
    """Whichever builder pulls it."""
    faults = Faults(status(503), reading, times=0)
    base = new_project()
    base.dockerfile(f"{TINY}LABEL once={time.time_ns()}\n")
    base.ok("base", "push")
    for tag in base.tags():
        base.docker.ok("rmi", f"{base.repository}:{tag}")
    open_to_all = {"Authorization": basic(registry)}
    with failing(registry, faults, **open_to_all) as address:
        faults.times = 1
        reference = base.image.replace(f"localhost:{registry.port}", address)
        project = new_project(BASE_IMAGE=reference)
        project.dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /again\n")
        made = project.inv("base", env=builder)
        project.docker("rmi", reference)
        assert made.returncode == 0, made.stderr
        assert faults.met == 1


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
        assert "is retried" not in result.stderr
        assert len([each for each in faults.asked if concerns(*each.split())]) == faults.met


def test_a_fault_that_stays_ends_in_one_line(rig: Rig) -> None:
    faults = Faults(status(429), manifest, times=100)
    with failing(rig.registry, faults) as address:
        project = rig.project(address)
        rig.image(project)
        assert not rig.pushed(project)
        assert str(project.settings.image) in rig.errors[0]
        assert rig.said.getvalue().count("is retried in") == len(rig.waits) == 3
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
        assert f"but the registry has {before}" in error
