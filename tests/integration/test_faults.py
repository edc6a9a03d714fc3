"""A registry that fails in every way: a push ends in a pushed image or in one clear line."""

from __future__ import annotations

import base64
import collections
import ctypes
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import pytest
from harness import one_error
from parallel import OTHER_STORE

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
    from contextlib import AbstractContextManager

    from conftest import NewProject
    from harness import Docker, Project
    from island import Island
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


def explained(code: int, name: str, message: str) -> Callable[[Proxy], bool]:
    """Answer with an error of the distribution specification."""

    def answer(proxy: Proxy) -> bool:
        proxy.body()
        error = {"errors": [{"code": name, "message": message}]}
        return proxy.answer_status(code, json.dumps(error), Content_Type="application/json")

    return answer


CLONE_NEWNET = 0x40000000
"""Of <sched.h>."""


def join_network(process: int) -> None:
    """Move this thread, and the threads that it will start, to the network of a process."""
    with Path(f"/proc/{process}/ns/net").open() as network:
        assert ctypes.CDLL(None).setns(network.fileno(), CLONE_NEWNET) == 0


@contextmanager
def failing(
    registry: LocalRegistry,
    faults: Faults | Several,
    network: int | None = None,
    headers: dict[str, str] | None = None,
) -> Iterator[str]:
    """A registry that fails; its address.  It adds headers to what it is asked.

    It is in the network of the process ``network``, or of the tests.
    """
    more = {"registry": registry.port, "faults": faults, "more": headers or {}}
    handler = type("Handler", (Proxy,), more)
    join = partial(join_network, network) if network else None
    with (
        ThreadPoolExecutor(1, initializer=join) as pool,
        pool.submit(ThreadingHTTPServer, ("127.0.0.1", 0), handler).result() as server,
    ):
        server.daemon_threads = True
        pool.submit(server.serve_forever)
        try:
            yield f"localhost:{server.server_address[1]}"
        finally:
            server.shutdown()


@dataclass
class Rig:
    """A tiny image, and this process' own calls of the engine: as ``inv`` makes them, but quick."""

    engine: DockerEngine
    registry: LocalRegistry
    directory: Path
    network: int | None
    waits: list[float] = field(default_factory=list)
    pause: float = 0
    """Seconds that a wait takes here."""
    said: io.StringIO = field(default_factory=io.StringIO)
    made: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def resends(self) -> bool:
        """Whether the engine resends requests after some statuses; see ``RESENT``."""
        return self.engine.info().uses_containerd

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        time.sleep(self.pause)

    def failing(self, faults: Faults) -> AbstractContextManager[str]:
        return failing(self.registry, faults, self.network)

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
def network(store: str, request: pytest.FixtureRequest) -> int | None:
    """A process in the engine's network, if that is not the network of the tests."""
    if store != OTHER_STORE:
        return None
    island: Island = request.getfixturevalue("other_store")
    return island.holder


@pytest.fixture
def rig(
    engine: DockerEngine,
    registry: LocalRegistry,
    network: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Rig]:
    made = Rig(engine, registry, tmp_path, network)
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=made.sleep))
    yield made
    for reference in made.made:
        engine.untag(reference)
    assert not [error for error in made.errors if "\n" in error]


PUSH_FAULTS = {
    "429": (status(429), manifest),
    "429, retry after": (status(429, Retry_After="1"), beginning),
    "429, explained": (explained(429, "TOOMANYREQUESTS", "retry-after: 1ms, allowed: 9"), manifest),
    "500": (status(500), manifest),
    "500, explained": (explained(500, "UNKNOWN", "unknown error"), manifest),
    "502": (status(502), upload),
    "503": (status(503), beginning),
    "504": (status(504), upload),
    "reset": (reset, manifest),
    "reset at once": (reset, beginning),
    "cut short": (cut_short, upload),
    "slow": (slow, manifest),
    "wrong digest": (
        explained(400, "DIGEST_INVALID", "provided digest did not match uploaded content"),
        closing,
    ),
}

PULL_FAULTS = {
    "429": (status(429), reading),
    "429, explained": (
        explained(429, "TOOMANYREQUESTS", "You have reached your pull rate limit."),
        reading,
    ),
    "500": (status(500), reading),
    "503": (status(503), reading),
    "503, explained": (explained(503, "UNAVAILABLE", "service unavailable"), reading),
    "reset": (reset, reading),
    "cut short": (cut_off, reading),
    "slow": (slow, reading),
    "a blob cut short": (cut_off, blob),
    "wrong digest": (spoilt, blob),
}


PATIENT = {"429, retry after", "502", "503", "504", "reset at once"}
"""Kinds that the engine itself tries again, after five seconds: enough of these are below."""

RESENT = {"429": 6, "500": 2, "503": 2, "504": 2}
"""How often an engine with the containerd image store sends a request that gets a status.

It does not wait meanwhile: see `retryRequest` in containerd's core/remotes/docker/resolver.go. From
2.3.2 on it sends a request 5 times after 429.
"""


def times(rig: Rig, kind: str) -> int:
    """How often a fault has to occur to be one for this engine."""
    return RESENT.get(kind[:3], 1) if rig.resends else 1


@pytest.mark.both_stores
@pytest.mark.parametrize("kind", sorted(PUSH_FAULTS.keys() - PATIENT))
def test_a_push_survives_what_passes(rig: Rig, kind: str) -> None:
    answer, concerns = PUSH_FAULTS[kind]
    faults = Faults(answer, concerns, times(rig, kind) * (2 if kind == "429" else 1))
    with rig.failing(faults) as address:
        project = rig.project(address)
        rig.image(project)
        assert rig.pushed(project), rig.errors
        assert faults.met == faults.times


@pytest.mark.both_stores
def test_what_is_uploaded_is_not_uploaded_again(rig: Rig) -> None:
    faults = Faults(status(503), manifest, 2 * times(rig, "503"))
    with rig.failing(faults) as address:
        project = rig.project(address)
        rig.image(project)
        assert rig.pushed(project)
    assert len(rig.waits) == 2
    ends = [each for each in faults.asked if closing(*each.split())]
    assert len(ends) == 2, "a layer and a configuration, once each"


@pytest.mark.both_stores
@pytest.mark.parametrize("kind", PULL_FAULTS)
def test_a_pull_survives_what_passes(rig: Rig, kind: str) -> None:
    answer, concerns = PULL_FAULTS[kind]
    faults = Faults(answer, concerns, times=0)
    if kind == "wrong digest" and rig.resends:
        # The containerd store holds the damaged content until it collects garbage, just after the
        # pull. This is the shortest wait before a retry.
        rig.pause = 1
    with rig.failing(faults) as address:
        project = rig.project(address)
        image = rig.image(project)
        assert rig.pushed(project)
        faults.times = times(rig, kind)
        assert rig.pulled(project, image), rig.errors
        assert faults.met == faults.times


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
    new_project: NewProject, registry: LocalRegistry, docker: Docker, engine: DockerEngine
) -> None:
    resent = RESENT["429"] if engine.info().uses_containerd else 1
    faults = Faults(status(429, Retry_After="1"), manifest, resent)
    with failing(registry, faults) as address:
        project = tiny(new_project, registry, address)
        result = project.ok("push")
        assert faults.met == faults.times
        assert result.stderr.count("the push is retried in") == 1
        held = result.stdout.strip().replace(address, f"localhost:{registry.port}")
        docker.ok("manifest", "inspect", "--insecure", held)


@pytest.mark.both_stores
def test_a_base_image_is_tried_again(
    new_project: NewProject,
    registry: LocalRegistry,
    network: int | None,
    builder: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    """Whichever builder pulls it."""
    faults = Faults(status(503), reading, times=0)
    base = new_project()
    base.dockerfile(f"{TINY}LABEL once={time.time_ns()}\n")
    base.ok("base", "push")
    for tag in base.tags():
        base.docker.ok("rmi", f"{base.repository}:{tag}")
    open_to_all = {"Authorization": basic(registry)}
    with failing(registry, faults, network, open_to_all) as address:
        # One when the base stage looks up the base image, the others when it is pulled.
        faults.times = 1 + RESENT["503"]
        reference = base.image.replace(f"localhost:{registry.port}", address)
        project = new_project(BASE_IMAGE=reference)
        project.dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /again\n")
        made = project.inv("base", env=builder)
        project.docker("rmi", reference)
        assert made.returncode == 0, made.stderr
        assert faults.met == faults.times
        # BuildKit itself retries.
        is_classic = "buildx" not in request.node.callspec.id
        assert ("the build is retried in" in made.stderr) == is_classic


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


@pytest.mark.both_stores
def test_a_fault_that_stays_ends_in_one_line(rig: Rig) -> None:
    faults = Faults(status(429), manifest, times=100)
    with rig.failing(faults) as address:
        project = rig.project(address)
        rig.image(project)
        assert not rig.pushed(project)
        assert str(project.settings.image) in rig.errors[0]
        assert rig.said.getvalue().count("is retried in") == len(rig.waits) == 3
        assert faults.met in ({4 * 5, 4 * RESENT["429"]} if rig.resends else {4})


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
