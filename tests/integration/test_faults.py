"""Faults of a registry: a push succeeds or ends with an error of one line."""

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
from harness import expect_error
from parallel import OTHER_STORE

from guix_tasks.commands.push import push
from guix_tasks.engine import retry
from guix_tasks.engine.accounts import remote_digest
from guix_tasks.errors import RegistryError
from guix_tasks.settings import load_settings
from guix_tasks.stages.project import Project as EngineProject
from guix_tasks.stages.transfer import pull
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from conftest import NewProject
    from harness import Docker, Project
    from isolated_host import IsolatedHost
    from soak import Soak

    from guix_tasks.bootstrap.registry import LocalRegistry
    from guix_tasks.engine.api import Image
    from guix_tasks.engine.docker import DockerEngine

pytestmark = pytest.mark.engine

TINY = "FROM scratch\nCOPY Dockerfile /\n"

Answer: TypeAlias = "Callable[[Proxy], bool]"
"""Answers a request instead of the registry, or returns false to forward the request."""


@dataclass
class Faults:
    """An answer to the first ``times`` requests that match."""

    answer: Answer
    matches: Callable[[str, str], bool]
    times: int = 1
    count: int = 0
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def find_answer(self, method: str, path: str) -> Answer | None:
        with self.lock:
            self.requests.append(f"{method} {path}")
            if not self.matches(method, path) or self.count >= self.times:
                return None
            self.count += 1
            return self.answer


@dataclass
class FaultSequence:
    """Faults in sequence: each begins after the last occurrence of the previous one."""

    faults: list[Faults]

    def find_answer(self, method: str, path: str) -> Answer | None:
        for faults in self.faults:
            if faults.count < faults.times:
                return faults.find_answer(method, path)
        return None


class Proxy(BaseHTTPRequestHandler):
    """Forwards requests to a registry, except those with a fault."""

    protocol_version = "HTTP/1.1"
    # Clients that begin with TLS get an answer in HTTP.
    default_request_version = "HTTP/1.0"
    registry: ClassVar[int]
    faults: ClassVar[Faults | FaultSequence]
    extra_headers: ClassVar[dict[str, str]]

    def handle_any(self) -> None:
        answer = self.faults.find_answer(self.command, self.path)
        if answer and answer(self):
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

    def forward(self, body: bytes, *, corrupt: bool = False, truncate: bool = False) -> None:
        """Forward the request, and return the answer, which can be corrupted or truncated."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.registry, timeout=30)
        removed = ("transfer-encoding", "content-length", "connection")
        # Headers that occur twice, such as Accept, are joined.
        headers = {
            name: ", ".join(self.headers.get_all(name, []))
            for name in self.headers
            if name.lower() not in removed
        }
        headers |= {**self.extra_headers, "Content-Length": str(len(body))}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        if corrupt and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.wfile.write(data[: len(data) // 2] if truncate else data)
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
        """End the connection with RST, like a crash."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        return True


def puts_manifest(method: str, path: str) -> bool:
    return method == "PUT" and "/manifests/" in path


def uploads_data(method: str, path: str) -> bool:
    return method in ("PATCH", "PUT") and "/blobs/uploads/" in path


def starts_upload(method: str, path: str) -> bool:
    return method == "POST" and "/blobs/uploads/" in path


def ends_upload(method: str, path: str) -> bool:
    """Whether a request ends an upload and contains its digest."""
    return method == "PUT" and "/blobs/uploads/" in path


def gets_manifest(method: str, path: str) -> bool:
    return method == "GET" and "/manifests/" in path


def gets_blob(method: str, path: str) -> bool:
    return method == "GET" and "/blobs/sha256:" in path


def is_any(_method: str, _path: str) -> bool:
    return True


def answer_with(code: int, **headers: str) -> Callable[[Proxy], bool]:
    def answer(proxy: Proxy) -> bool:
        proxy.body()
        return proxy.answer_status(code, "not now", **headers)

    return answer


def reset(proxy: Proxy) -> bool:
    return proxy.reset()


def reset_upload(proxy: Proxy) -> bool:
    """Reset the connection after a part of the upload."""
    proxy.rfile.read(16)
    return proxy.reset()


def delay(_proxy: Proxy) -> bool:
    time.sleep(2)
    return False


def discard(proxy: Proxy) -> bool:
    """Confirm a push without storing it."""
    digest = f"sha256:{hashlib.sha256(proxy.body()).hexdigest()}"
    return proxy.answer_status(201, Docker_Content_Digest=digest, Location=proxy.path)


def corrupt(proxy: Proxy) -> bool:
    """Answer with one changed byte."""
    proxy.forward(proxy.body(), corrupt=True)
    return True


def truncate(proxy: Proxy) -> bool:
    """Answer with half of the data, but with its full length in the header."""
    proxy.forward(proxy.body(), truncate=True)
    return proxy.reset()


def answer_with_error(code: int, name: str, message: str) -> Callable[[Proxy], bool]:
    """Answer with an error of the distribution specification."""

    def answer(proxy: Proxy) -> bool:
        proxy.body()
        error = {"errors": [{"code": name, "message": message}]}
        return proxy.answer_status(code, json.dumps(error), Content_Type="application/json")

    return answer


CLONE_NEWNET = 0x40000000
"""From <sched.h>."""


def join_network(process: int) -> None:
    """Move this thread and its future threads to the network of a process."""
    with Path(f"/proc/{process}/ns/net").open() as network:
        assert ctypes.CDLL(None).setns(network.fileno(), CLONE_NEWNET) == 0


@contextmanager
def serve_faults(
    registry: LocalRegistry,
    faults: Faults | FaultSequence,
    network: int | None = None,
    headers: dict[str, str] | None = None,
) -> Iterator[str]:
    """Serve a registry with faults at the returned address, and add headers to its requests.

    It is in the network of the process ``network``, or of the tests.
    """
    attributes = {"registry": registry.port, "faults": faults, "extra_headers": headers or {}}
    handler = type("Handler", (Proxy,), attributes)
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
    """A small image, and calls of the engine in this process, which are faster than ``inv``."""

    engine: DockerEngine
    registry: LocalRegistry
    directory: Path
    network: int | None
    waits: list[float] = field(default_factory=list)
    pause: float = 0
    """Actual seconds of each wait."""
    messages: io.StringIO = field(default_factory=io.StringIO)
    references: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def resends(self) -> bool:
        """Whether the engine resends requests after some statuses; see ``RESENT``."""
        return self.engine.info().uses_containerd

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        time.sleep(self.pause)

    def serve(self, faults: Faults) -> AbstractContextManager[str]:
        return serve_faults(self.registry, faults, self.network)

    def project(self, address: str) -> EngineProject:
        account = self.registry.account.credentials()
        assert account
        image = f"{address}/guix-tasks-test/faults-{secrets.token_hex(6)}:t"
        # A process reads each env file only once.
        env_file = self.directory / f"{len(self.references)}.env"
        env_file.write_text(
            f"IMAGE={image}\nDOCKER_USERNAME={account.username}\n"
            f"DOCKER_PASSWORD={account.password}\n"
        )
        settings = load_settings(self.directory, self.directory, {"ENV_FILE": env_file.name})
        return EngineProject(settings, self.engine, Console(err=self.messages))

    def create_image(self, project: EngineProject) -> Image:
        """Create an image for the project, with a layer that is in no registry."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            member = tarfile.TarInfo("content")
            member.size = 20_000
            tar.addfile(member, io.BytesIO(secrets.token_bytes(20_000)))
        reference = str(project.settings.image)
        self.engine.import_rootfs(iter([data.getvalue()]), reference)
        self.references.append(reference)
        image = self.engine.image(reference)
        assert image
        return image

    def push(self, project: EngineProject) -> bool:
        """Push the image, check its digest in the registry, and return whether this succeeded."""
        try:
            (digest,) = push(project).values()
        except RegistryError as error:
            self.errors.append(str(error))
            return False
        reference = str(project.settings.image)
        assert remote_digest(self.engine, project.settings, reference) == digest
        return True

    def pull(self, project: EngineProject, image: Image) -> bool:
        """Remove the image and pull it again, and return whether this succeeded."""
        reference = str(project.settings.image)
        self.engine.untag(reference)
        assert self.engine.image(image.id) is None
        try:
            pull(project, reference)
        except RegistryError as error:
            self.errors.append(str(error))
            assert self.engine.image(reference) is None
            return False
        pulled = self.engine.image(reference)
        assert pulled
        assert (pulled.id, pulled.layers) == (image.id, image.layers)
        return True


@pytest.fixture
def network(store: str, request: pytest.FixtureRequest) -> int | None:
    """A process in the engine's network, or None if that is the network of the tests."""
    if store != OTHER_STORE:
        return None
    host: IsolatedHost = request.getfixturevalue("other_store")
    return host.namespace_pid


@pytest.fixture
def rig(
    engine: DockerEngine,
    registry: LocalRegistry,
    network: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Rig]:
    rig = Rig(engine, registry, tmp_path, network)
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=rig.sleep))
    yield rig
    for reference in rig.references:
        engine.untag(reference)
    assert not [error for error in rig.errors if "\n" in error]


PUSH_FAULTS = {
    "429": (answer_with(429), puts_manifest),
    "429, retry after": (answer_with(429, Retry_After="1"), starts_upload),
    "429, with an error": (
        answer_with_error(429, "TOOMANYREQUESTS", "retry-after: 1ms, allowed: 9"),
        puts_manifest,
    ),
    "500": (answer_with(500), puts_manifest),
    "500, with an error": (answer_with_error(500, "UNKNOWN", "unknown error"), puts_manifest),
    "502": (answer_with(502), uploads_data),
    "503": (answer_with(503), starts_upload),
    "504": (answer_with(504), uploads_data),
    "reset": (reset, puts_manifest),
    "reset at once": (reset, starts_upload),
    "truncated": (reset_upload, uploads_data),
    "delay": (delay, puts_manifest),
    "wrong digest": (
        answer_with_error(400, "DIGEST_INVALID", "provided digest did not match uploaded content"),
        ends_upload,
    ),
}

PULL_FAULTS = {
    "429": (answer_with(429), gets_manifest),
    "429, with an error": (
        answer_with_error(429, "TOOMANYREQUESTS", "You have reached your pull rate limit."),
        gets_manifest,
    ),
    "500": (answer_with(500), gets_manifest),
    "503": (answer_with(503), gets_manifest),
    "503, with an error": (
        answer_with_error(503, "UNAVAILABLE", "service unavailable"),
        gets_manifest,
    ),
    "reset": (reset, gets_manifest),
    "truncated": (truncate, gets_manifest),
    "delay": (delay, gets_manifest),
    "truncated blob": (truncate, gets_blob),
    "wrong digest": (corrupt, gets_blob),
}


SLOW = {"429, retry after", "502", "503", "504", "reset at once"}
"""Kinds that the engine itself retries after five seconds; other tests cover them."""

RESENT = {"429": 6, "500": 2, "503": 2, "504": 2}
"""Requests of an engine with the containerd image store for each status, without a wait.

See `retryRequest` in containerd's core/remotes/docker/resolver.go. Since 2.3.2 it sends 5 requests
after 429.
"""


def times(rig: Rig, kind: str) -> int:
    """Return how often a fault must occur until this engine reports it."""
    return RESENT.get(kind[:3], 1) if rig.resends else 1


@pytest.mark.both_stores
@pytest.mark.parametrize("kind", sorted(PUSH_FAULTS.keys() - SLOW))
def test_push_retries_transient_faults(rig: Rig, kind: str) -> None:
    answer, matches = PUSH_FAULTS[kind]
    faults = Faults(answer, matches, times(rig, kind) * (2 if kind == "429" else 1))
    with rig.serve(faults) as address:
        project = rig.project(address)
        rig.create_image(project)
        assert rig.push(project), rig.errors
        assert faults.count == faults.times


@pytest.mark.both_stores
def test_uploaded_layers_are_not_uploaded_again(rig: Rig) -> None:
    faults = Faults(answer_with(503), puts_manifest, 2 * times(rig, "503"))
    with rig.serve(faults) as address:
        project = rig.project(address)
        rig.create_image(project)
        assert rig.push(project)
    assert len(rig.waits) == 2
    ends = [request for request in faults.requests if ends_upload(*request.split())]
    assert len(ends) == 2, "a layer and a configuration, once each"


@pytest.mark.both_stores
@pytest.mark.parametrize("kind", PULL_FAULTS)
def test_pull_retries_transient_faults(rig: Rig, kind: str) -> None:
    answer, matches = PULL_FAULTS[kind]
    faults = Faults(answer, matches, times=0)
    if kind == "wrong digest" and rig.resends:
        # The containerd store holds the damaged content until it collects garbage, just after the
        # pull. This is the shortest wait before a retry.
        rig.pause = 1
    with rig.serve(faults) as address:
        project = rig.project(address)
        image = rig.create_image(project)
        assert rig.push(project)
        faults.times = times(rig, kind)
        assert rig.pull(project, image), rig.errors
        assert faults.count == faults.times


@pytest.mark.parametrize("matches", [gets_manifest, gets_blob])
def test_content_with_a_wrong_digest_makes_no_image(
    rig: Rig, matches: Callable[[str, str], bool]
) -> None:
    faults = Faults(corrupt, matches, times=0)
    with serve_faults(rig.registry, faults) as address:
        project = rig.project(address)
        image = rig.create_image(project)
        assert rig.push(project)
        faults.times = 100
        assert not rig.pull(project, image)


@pytest.mark.parametrize("code", [401, 403])
def test_refused_pull_is_not_retried(rig: Rig, code: int) -> None:
    faults = Faults(answer_with(code), gets_manifest, times=0)
    with serve_faults(rig.registry, faults) as address:
        project = rig.project(address)
        image = rig.create_image(project)
        assert rig.push(project)
        faults.times = 100
        assert not rig.pull(project, image)
    assert rig.waits == []


def test_pull_of_a_missing_image_is_not_retried(rig: Rig) -> None:
    """A cache miss must not cost time."""
    with (
        serve_faults(rig.registry, Faults(answer_with(500), is_any, 0)) as address,
        pytest.raises(RegistryError, match="fix the reference"),
    ):
        pull(rig.project(address), f"{address}/guix-tasks-test/500/429:t-503")
    assert rig.waits == []


@pytest.mark.soak
def test_random_faults_end_in_an_image_or_one_error_line(rig: Rig, soak: Soak) -> None:
    rng = soak.rng("random faults")
    kinds: collections.Counter[str] = collections.Counter()
    results: collections.Counter[bool] = collections.Counter()
    push_kinds = sorted(PUSH_FAULTS if soak.long else PUSH_FAULTS.keys() - SLOW)
    for _ in range(soak.times(2, 60)):
        chosen = [rng.choice(push_kinds) for _ in range(rng.randint(1, 4))]
        sequence = FaultSequence([Faults(*PUSH_FAULTS[kind]) for kind in chosen])
        with serve_faults(rig.registry, sequence) as address:
            project = rig.project(address)
            rig.create_image(project)
            results[rig.push(project)] += 1
            rig.engine.untag(str(project.settings.image))
        pairs = zip(chosen, sequence.faults, strict=True)
        kinds.update(f"push: {kind}" for kind, faults in pairs if faults.count)
    for _ in range(soak.times(2, 20)):
        kind = rng.choice(sorted(PULL_FAULTS))
        faults = Faults(*PULL_FAULTS[kind], times=0)
        with serve_faults(rig.registry, faults) as address:
            project = rig.project(address)
            image = rig.create_image(project)
            assert rig.push(project)
            faults.times = rng.randint(1, 3)
            results[rig.pull(project, image)] += 1
            rig.engine.untag(str(project.settings.image))
        kinds[f"pull: {kind}"] += faults.count
    soak.report(
        "faults of a registry",
        f"{sum(kinds.values())} faults of {len(kinds)} kinds: {results[True]} transfers succeeded, "
        f"{results[False]} ended with one error line",
    )


def basic_authorization(registry: LocalRegistry) -> str:
    account = registry.account.credentials()
    assert account
    pair = f"{account.username}:{account.password}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def make_base(new_project: NewProject, registry: LocalRegistry, address: str) -> Project:
    """Make the base stage of a project whose registry is the proxy at an address."""
    account = registry.account.credentials()
    assert account
    project = new_project(
        repository=f"{address}/guix-tasks-test/faults-{time.time_ns()}",
        DOCKER_USERNAME=account.username,
        DOCKER_PASSWORD=account.password,
    )
    # The label makes the layers unique, so that a push uploads them.
    project.write_dockerfile(f"{TINY}LABEL once={time.time_ns()}\n")
    project.ok("base")
    return project


def test_retry_of_a_push_is_reported(
    new_project: NewProject, registry: LocalRegistry, docker: Docker, engine: DockerEngine
) -> None:
    resent = RESENT["429"] if engine.info().uses_containerd else 1
    faults = Faults(answer_with(429, Retry_After="1"), puts_manifest, resent)
    with serve_faults(registry, faults) as address:
        project = make_base(new_project, registry, address)
        result = project.ok("push")
        assert faults.count == faults.times
        assert result.stderr.count("the push is retried in") == 1
        reference = result.stdout.strip().replace(address, f"localhost:{registry.port}")
        docker.ok("manifest", "inspect", "--insecure", reference)


@pytest.mark.both_stores
def test_pull_of_the_base_image_is_retried(
    new_project: NewProject,
    registry: LocalRegistry,
    network: int | None,
    builder: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    """Each builder pulls it in its own way."""
    faults = Faults(answer_with(503), gets_manifest, times=0)
    base = new_project()
    base.write_dockerfile(f"{TINY}LABEL once={time.time_ns()}\n")
    base.ok("base", "push")
    for tag in base.tags():
        base.docker.ok("rmi", f"{base.repository}:{tag}")
    headers = {"Authorization": basic_authorization(registry)}
    with serve_faults(registry, faults, network, headers) as address:
        # The base stage looks up the base image once; the other requests pull it.
        faults.times = 1 + RESENT["503"]
        reference = base.image.replace(f"localhost:{registry.port}", address)
        project = new_project(BASE_IMAGE=reference)
        project.write_dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /again\n")
        result = project.inv("base", env=builder)
        project.docker("rmi", reference)
        assert result.returncode == 0, result.stderr
        assert faults.count == faults.times
        # BuildKit itself retries.
        is_classic = "buildx" not in request.node.callspec.id
        assert ("the build is retried in" in result.stderr) == is_classic


@pytest.mark.parametrize(
    ("answer", "matches"),
    [
        pytest.param(answer_with(401), puts_manifest, id="401"),
        pytest.param(answer_with(403), puts_manifest, id="403"),
        pytest.param(answer_with(403), starts_upload, id="403 at once"),
    ],
)
def test_refused_push_is_reported_without_a_retry(
    new_project: NewProject,
    registry: LocalRegistry,
    answer: Callable[[Proxy], bool],
    matches: Callable[[str, str], bool],
) -> None:
    faults = Faults(answer, matches, times=100)
    with serve_faults(registry, faults) as address:
        project = make_base(new_project, registry, address)
        result = project.inv("push")
        assert project.image in expect_error(result, 5)
        assert "is retried" not in result.stderr
        matching = [request for request in faults.requests if matches(*request.split())]
        assert len(matching) == faults.count


@pytest.mark.both_stores
def test_permanent_fault_ends_with_one_error_line(rig: Rig) -> None:
    faults = Faults(answer_with(429), puts_manifest, times=100)
    with rig.serve(faults) as address:
        project = rig.project(address)
        rig.create_image(project)
        assert not rig.push(project)
        assert str(project.settings.image) in rig.errors[0]
        assert rig.messages.getvalue().count("is retried in") == len(rig.waits) == 3
        assert faults.count in ({4 * 5, 4 * RESENT["429"]} if rig.resends else {4})


def test_push_fails_if_the_registry_has_another_image(
    new_project: NewProject, registry: LocalRegistry
) -> None:
    faults = Faults(discard, puts_manifest, times=0)
    with serve_faults(registry, faults) as address:
        project = make_base(new_project, registry, address)
        previous_digest = project.ok("push").stdout.strip().partition("@")[2]
        project.write_dockerfile(f"{TINY}LABEL again=yes\n")
        project.ok("base")
        faults.times = 1
        error = expect_error(project.inv("push"), 5)
        assert f"but the registry has {previous_digest}" in error
