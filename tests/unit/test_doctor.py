"""Checks of ``inv doctor``: their findings, and that they change nothing."""

from __future__ import annotations

import json
import re
import shutil
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest
from fake_buildx import NAME, NO_IMAGE, REFUSED, UNKNOWN_FLAG, FakeBuildx
from fake_engine import (
    BASE_IMAGE,
    IMAGE,
    BufferConsole,
    FakeContainer,
    Output,
    Site,
    channel,
    new_built_site,
    new_site,
    outline,
    serial_executor,
)
from invoke.program import Program

from guix_tasks import files, guix
from guix_tasks.buildkit import buildx
from guix_tasks.cli import session
from guix_tasks.commands import doctor
from guix_tasks.commands.doctor import examine_project, servers, show
from guix_tasks.commands.doctor.finding import Finding
from guix_tasks.commands.doctor.sandbox import PRIVILEGES_FIX
from guix_tasks.engine import discovery, docker, podman
from guix_tasks.engine.accounts import Credentials
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.errors import EngineError
from guix_tasks.guix import DEFAULT_SUBSTITUTE_URLS
from guix_tasks.settings import DECLARATIONS
from guix_tasks.stages import sandbox
from guix_tasks.tasks import ns

if TYPE_CHECKING:
    from guix_tasks.buildkit.buildx import Buildx

OK: Final = "ok"
NOTE: Final = "note"
FAILED: Final = "failed"
PASSWORD = "hunter2"  # noqa: S105
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide the engine, the settings and the proxies of this machine."""
    for name in (*DECLARATIONS, *PROXIES, "ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(discovery, "DEFAULT_SOCKET", tmp_path / "no.sock")
    monkeypatch.setattr(files, "ThreadPoolExecutor", serial_executor)
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    yield
    session._engines.clear()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A project whose base image is on the engine."""
    site = new_site(tmp_path / "project", NETWORK="none")
    site.engine.pull(BASE_IMAGE, None)
    site.engine.calls.clear()
    return site


@pytest.fixture
def built_site(tmp_path: Path) -> Site:
    site = new_built_site(tmp_path / "project")
    site.env["NETWORK"] = "none"
    return site


def find(site: Site, name: str, program: Buildx | None = None) -> list[Finding]:
    """Return the findings of the checks whose names match."""
    checks = doctor._checks(site.project(), program)
    results = [doctor._run(function) for other, function in checks if re.fullmatch(name, other)]
    return [result for result in results if result]


def check(site: Site, name: str) -> Finding:
    (finding,) = find(site, name)
    return finding


def describe_engine(site: Site, **fields: object) -> None:
    """Change the description of the engine."""
    site.engine.details = replace(site.engine.details, **fields)  # type: ignore[arg-type]


# --- The engine and its machine -------------------------------------------------------------


def test_engine_is_reported_with_the_reason_for_its_choice(site: Site) -> None:
    describe_engine(site, cgroups="2", security=("seccomp", "apparmor"))
    engine, host = check(site, "engine"), check(site, "host")
    assert engine.message == "fake at unix:///fake.sock (fake), Docker 28, linux/amd64, memory"
    assert (host.state, host.message) == (OK, "cgroups v2, seccomp, apparmor")


def test_rootless_engine_is_a_note_with_a_fix(site: Site) -> None:
    describe_engine(site, security=("seccomp", "rootless"))
    note = check(site, "host")
    assert note.state == NOTE
    assert "rootless" in note.message
    assert "an engine that runs as root" in note.fix


@pytest.mark.parametrize(
    ("seconds", "state", "message"),
    [
        (-3600, FAILED, "3600 s behind this machine's"),
        (3600, FAILED, "s ahead of this machine's"),
        (-30, OK, "30 s between"),
        (30, OK, "s between"),
    ],
)
def test_difference_of_the_clocks_is_reported_with_its_direction(
    site: Site, seconds: int, state: str, message: str
) -> None:
    describe_engine(site, time=datetime.now(timezone.utc) + timedelta(seconds=seconds))
    clock = check(site, "clock")
    assert clock.state == state
    assert message in clock.message
    assert "-" not in clock.message


def test_clock_is_a_note_if_the_engine_reports_no_time(site: Site) -> None:
    assert check(site, "clock") == Finding(NOTE, "the engine does not report its time")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-02T03:04:05.123456789Z", "2026-01-02T03:04:05+00:00"),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05+00:00"),
        ("2026-01-02T03:04:05.1+02:00", "2026-01-02T03:04:05+02:00"),
        ("2026-01-02T03:04:05-11:30", "2026-01-02T03:04:05-11:30"),
        ("2026-01-02T03:04:05", "2026-01-02T03:04:05+00:00"),
        ("yesterday", None),
        ("", None),
    ],
)
def test_time_of_the_engine_is_parsed(text: str, expected: str | None) -> None:
    parsed = docker._time(text)
    assert (parsed and parsed.isoformat()) == expected


@pytest.mark.parametrize(("free", "state"), [(10**12, OK), (10**6, FAILED)])
def test_low_space_on_the_disk_of_the_engine_is_a_failure(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    describe_engine(site, root=str(tmp_path))
    disk = check(site, "disk")
    assert disk.state == state
    assert f"free at {tmp_path}; about 4 GB is needed" in disk.message
    assert ("`inv clean`" in disk.fix) == (state == FAILED)


def test_commit_needs_space_for_another_image(
    built_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    describe_engine(built_site, root=str(tmp_path))
    assert check(built_site, "disk").state == OK
    image = built_site.image("install")
    built_site.engine.all_images[image.id] = replace(image, size=3 * 10**9)
    assert check(built_site, "disk").state == FAILED


@pytest.mark.parametrize(
    "fields",
    [{"root": ""}, {"root": "/no/such/directory"}, {"root": "/", "url": "tcp://far.test:2375"}],
    ids=["unset", "missing", "remote"],
)
def test_invisible_disk_is_a_note(site: Site, fields: dict[str, str]) -> None:
    describe_engine(site, **fields)
    assert check(site, "disk") == Finding(
        NOTE, "the engine's disk is not visible from this machine"
    )


def test_unreadable_disk_is_a_note(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "disk_usage", deny)
    monkeypatch.setattr(Path, "is_dir", deny)
    describe_engine(site, root="/var/lib/docker/100000.100000")
    assert check(site, "disk").state == NOTE


# --- The base image -------------------------------------------------------------------------


def test_base_image_on_the_engine_is_reported(site: Site) -> None:
    assert check(site, "base image").message.startswith(f"{BASE_IMAGE} is on the engine, ")


def test_base_image_in_its_registry_is_reported(site: Site) -> None:
    site.engine.untag(BASE_IMAGE)
    assert check(site, "base image") == Finding(OK, f"{BASE_IMAGE} is in its registry")


def test_missing_base_image_is_a_failure(site: Site) -> None:
    site.env["BASE_IMAGE"] = "registry.test/none:1"
    finding = check(site, "base image")
    assert finding.state == FAILED
    assert "registry.test/none:1" in finding.message
    assert "`inv rootfs`" in finding.fix


def test_checks_without_support_in_podman_are_notes(site: Site) -> None:
    describe_engine(site, product="Podman", version="4.3.1", security=("rootless",))
    assert ", Podman 4.3.1, rootless, linux/amd64" in check(site, "engine").message
    site.env["BASE_IMAGE"] = "registry.test/none:1"
    image, registry = check(site, "base image"), check(site, "registry")
    assert (image.state, image.fix) == (
        NOTE,
        "`podman pull registry.test/none:1` shows whether it can be pulled",
    )
    assert registry.state == NOTE
    assert "was not tested" in registry.message
    site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    assert check(site, "registry").state == OK


def test_base_image_removed_after_the_base_stage_is_a_note(built_site: Site) -> None:
    """BuildKit leaves no base image on the engine, and later stages do not need it."""
    built_site.engine.registry.images.clear()
    assert check(built_site, "base image").state == NOTE
    assert built_site.states()["base"].why is None


# --- The sandbox ----------------------------------------------------------------------------


def failing_probe(*lines: str, status: int = 1) -> Callable[[FakeContainer], Output]:
    """Return a probe that prints lines and ends with a status."""

    def behaviour(container: FakeContainer) -> Output:
        container.status = status
        for line in lines:
            yield True, f"{line}\n".encode()

    return behaviour


CLONE = "guix repl: error: clone: Operation not permitted"
NO_GUIX = "entry-point: error: this image has no guix-daemon: it was built on a base without Guix"


def test_probe_runs_like_a_stage_without_network_and_mounts(site: Site) -> None:
    containers: list[FakeContainer] = []

    def behaviour(container: FakeContainer) -> Output:
        containers.append(container)
        assert container.text("/var/guix/guix-tasks/probe.sh").startswith("#!")
        assert "guix-tasks-probe" in container.text("/var/guix/guix-tasks/probe.scm")
        yield False, b""

    site.engine.behaviour = behaviour
    site.env["MOUNTS"] = "context:/context"
    assert check(site, "sandbox") == Finding(OK, "privileged: Guix builds in a work container")
    spec = containers[0].spec
    assert spec.command == ("/var/guix/guix-tasks/entry-point.sh", "/var/guix/guix-tasks/probe.sh")
    assert (spec.privileged, spec.network, spec.binds, spec.scratch) == (True, "none", (), None)
    assert site.engine.all_containers == {}
    assert site.engine.all_volumes == {}


def test_probe_without_isolation_is_unprivileged(site: Site) -> None:
    site.env["GUIX_SANDBOX"] = "nochroot"
    assert check(site, "sandbox").message.startswith("nochroot: Guix builds")
    assert not site.engine.specs[0].privileged
    assert site.engine.specs[0].security == ("seccomp=unconfined",)


def test_existing_base_stage_is_probed(built_site: Site) -> None:
    check(built_site, "sandbox")
    assert built_site.engine.specs[-1].image == built_site.image("base").id


def test_missing_image_is_neither_probed_nor_pulled(site: Site) -> None:
    site.engine.untag(BASE_IMAGE)
    site.engine.calls.clear()
    assert check(site, "sandbox").state == NOTE
    assert site.engine.changing_calls() == []


def test_forbidden_clone_is_reported_with_the_line_of_guix(
    site: Site,
) -> None:
    site.engine.behaviour = failing_probe(
        "substitute: looking", CLONE, "entry-point: the last lines"
    )
    finding = check(site, "sandbox")
    assert finding.state == FAILED
    assert finding.message.endswith(f"Guix cannot build in a work container: {CLONE}")
    assert "GUIX_SANDBOX=nochroot" in finding.fix


@pytest.mark.parametrize(
    ("lines", "fix"),
    [
        (
            ["guix archive: error: not a key", "error: cannot authorise the substitute key a.pub"],
            "GUIX_SUBSTITUTE_KEYS",
        ),
        (
            ["exec /var/guix/guix-tasks/entry-point.sh: exec format error"],
            "tonistiigi/binfmt --install ARCH`",
        ),
        (
            ["exec /var/guix/guix-tasks/entry-point.sh: no such file or directory"],
            "the image has no /bin/sh: set BASE_IMAGE",
        ),
        (["guix repl: error: write: No space left on device"], "`inv clean` removes"),
        (["Segmentation fault"], "privileged"),
        ([], "privileged"),
    ],
    ids=["key", "emulator", "shell", "disk", "other", "nothing"],
)
def test_fix_of_a_sandbox_depends_on_the_reason(site: Site, lines: list[str], fix: str) -> None:
    site.engine.behaviour = failing_probe(*lines, status=69)
    finding = check(site, "sandbox")
    assert finding.state == FAILED
    assert (lines[-1] if lines else "the probe ended with status 69") in finding.message
    assert fix in finding.fix


def test_lack_of_memory_is_not_reported_as_a_lack_of_privileges(built_site: Site) -> None:
    def behaviour(container: FakeContainer) -> Output:
        container.lacked_memory, container.status = True, 137
        return iter(())

    built_site.engine.behaviour = behaviour
    finding = check(built_site, "sandbox")
    assert (finding.state, "memory ran out" in finding.message) == (FAILED, True)
    assert "STAGE_MEMORY" in finding.fix


def test_base_image_without_guix_is_a_note(site: Site) -> None:
    site.engine.behaviour = failing_probe(NO_GUIX, status=69)
    finding = check(site, "sandbox")
    assert finding.state == NOTE
    assert "`inv base`" in finding.fix


def test_base_stage_without_guix_is_a_failure(built_site: Site) -> None:
    built_site.engine.behaviour = failing_probe(NO_GUIX, status=69)
    finding = check(built_site, "sandbox")
    assert finding.state == FAILED
    assert "BASE_IMAGE" in finding.fix


def fail_at(call: str, message: str) -> Callable[[int, str, str], None]:
    def fault(_number: int, name: str, when: str) -> None:
        if (name, when) == (call, "before"):
            raise EngineError(message)

    return fault


@pytest.mark.parametrize(
    ("reason", "fix"),
    [
        ("privileged mode is incompatible with user namespaces", PRIVILEGES_FIX),
        ("authorization denied by plugin", PRIVILEGES_FIX),
        ("no space left on device", ""),
    ],
)
def test_denied_privileges_are_reported_with_their_fix(site: Site, reason: str, fix: str) -> None:
    site.engine.fault = fail_at("create", f"the engine could not create a container: {reason}")
    finding = check(site, "sandbox")
    assert (finding.state, finding.fix) == (FAILED, fix)
    assert finding.message.endswith(reason)


@pytest.mark.parametrize("call", ["create", "copy_in", "run", "wait", "remove"])
def test_lost_engine_is_a_finding_with_its_fix(site: Site, call: str) -> None:
    site.engine.fault = fail_at(call, "the Docker Engine does not answer: x; start it")
    assert check(site, "sandbox") == Finding(
        FAILED, "the Docker Engine does not answer: x", "start it"
    )


def test_probe_is_stopped_at_the_timeout(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(container: FakeContainer) -> Output:
        end = time.monotonic() + 20
        while container.running and time.monotonic() < end:
            time.sleep(0.01)
            yield False, b""

    monkeypatch.setattr(sandbox, "PROBE_SECONDS", 0.1)
    site.engine.behaviour = hang
    assert "the probe did not end within 0.1 s" in check(site, "sandbox").message
    assert site.engine.all_containers == {}


def test_emulated_platform_is_a_note_and_the_native_one_is_probed(site: Site) -> None:
    site.env["PLATFORMS"] = "linux/arm64 linux/amd64"
    note, finding = find(site, "sandbox")
    assert note.state == NOTE
    assert "linux/arm64 is emulated" in note.message
    assert "GUIX_SANDBOX=nochroot" in note.fix
    assert finding.state == OK
    assert [spec.platform for spec in site.engine.specs] == ["linux/amd64"]


def test_base_image_of_another_platform_is_not_probed(site: Site) -> None:
    site.env.update(PLATFORMS="linux/arm64", GUIX_SANDBOX="nochroot")
    assert check(site, "sandbox").state == NOTE
    assert site.engine.specs == []


# --- Mounts ---------------------------------------------------------------------------------


def test_mounts_on_a_remote_engine_are_a_failure(site: Site) -> None:
    site.env["MOUNTS"] = "context:/context"
    assert check(site, "mounts").state == OK
    describe_engine(site, url="tcp://far.test:2375")
    finding = check(site, "mounts")
    assert finding.state == FAILED
    assert "tcp://far.test:2375" in finding.message


def test_empty_mounts_have_no_finding(site: Site) -> None:
    describe_engine(site, url="tcp://far.test:2375")
    assert find(site, "mounts") == []


# --- The registry ---------------------------------------------------------------------------


def test_registry_is_checked_with_the_account_of_the_settings(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    site.engine.registry.used_credentials.clear()
    finding = check(site, "registry")
    assert (finding.state, finding.message) == (OK, "registry.test answers to DOCKER_USERNAME")
    assert site.engine.registry.used_credentials == [Credentials("some-user", PASSWORD)]


def test_registry_is_checked_with_the_configuration_of_docker(site: Site) -> None:
    site.engine.registry.used_credentials.clear()
    assert "Docker's configuration" in check(site, "registry").message
    assert site.engine.registry.used_credentials == [None]


def test_account_of_a_local_registry_is_named(site: Site) -> None:
    site.engine.registry.local_accounts = {"registry.test": Credentials("local", PASSWORD)}
    assert check(site, "registry").message.endswith("to the account that `inv registry.up` created")


def test_error_of_the_registry_is_reported_with_its_fix(site: Site) -> None:
    site.engine.registry.refusal = "unauthorized; set DOCKER_USERNAME"
    assert check(site, "registry") == Finding(
        FAILED, f"cannot look up {IMAGE}: unauthorized", "set DOCKER_USERNAME"
    )


# --- buildx ---------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path) -> FakeBuildx:
    return FakeBuildx(tmp_path / "buildx")


def check_builder(site: Site, fake: FakeBuildx) -> Finding:
    version, finding = find(site, "buildx|builder", fake.program())
    assert version.message.startswith("v0.26.1 at ")
    return finding


def test_missing_buildx_is_a_note_with_a_fix(site: Site) -> None:
    finding = check(site, "buildx")
    assert finding.state == NOTE
    assert "`inv buildx.setup`" in finding.fix


def test_buildx_for_another_machine_is_one_finding(site: Site, fake: FakeBuildx) -> None:
    (fake.directory / "alien").write_bytes(b"\x7fELF nonsense")
    (fake.directory / "alien").chmod(0o755)
    broken = replace(fake.program(), program=str(fake.directory / "alien"))
    (finding,) = find(site, "buildx", broken)
    assert finding.state == FAILED
    assert "Exec format error" in finding.message


def test_failing_buildx_is_one_finding(site: Site, fake: FakeBuildx) -> None:
    fake.fail("ERROR: cannot read its configuration", "version")
    (finding,) = find(site, "buildx", fake.program())
    assert (finding.state, finding.message) == (FAILED, "cannot read its configuration")


def test_missing_builder_is_a_note(site: Site, fake: FakeBuildx) -> None:
    finding = check_builder(site, fake)
    assert finding == Finding(
        NOTE, f"there is no builder '{NAME}'", "`inv buildx.setup` creates it"
    )


def test_builder_with_insecure_steps_is_ok(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    finding = check_builder(site, fake)
    assert finding.state == OK
    assert finding.message == f"{NAME} runs insecure steps with its built-in frontend"


def test_needed_frontend_of_a_builder_is_reported(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    fake.fail(UNKNOWN_FLAG, "build", without=("BUILDKIT_SYNTAX",))
    assert check_builder(site, fake).message.endswith("with the frontend docker/dockerfile:1")
    fake.fail(NO_IMAGE, "build", "BUILDKIT_SYNTAX")
    finding = check_builder(site, fake)
    assert finding.state == NOTE
    assert "cannot pull" in finding.message


def test_builder_without_insecure_steps_is_a_note(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    fake.fail(REFUSED, "build")
    finding = check_builder(site, fake)
    assert finding.state == NOTE
    assert "--recreate" in finding.fix


@pytest.mark.parametrize("running", [0, 1])
def test_stopped_builder_is_not_started(site: Site, fake: FakeBuildx, running: int) -> None:
    for _ in range(running):
        fake.add()
    fake.add(status="stopped")
    finding = check_builder(site, fake)
    assert finding == Finding(
        NOTE, f"{NAME}{running} is not running", "`inv buildx.setup` starts it"
    )
    assert fake.changes() == []
    assert fake.verbs() == ["version", "inspect"]


def test_unavailable_node_is_reported_with_the_reason(site: Site, fake: FakeBuildx) -> None:
    site.env.update(BUILDX_DRIVER="remote", BUILDX_NODES="tcp://b.test:1")
    fake.print(
        "Name: r\nDriver: remote\n\nNodes:\nName: r0\nEndpoint: tcp://b.test:1\nError: no route\n",
        "inspect",
    )
    finding = check_builder(site, fake)
    assert finding.message == "r0 is not running: no route"
    assert "BUILDX_NODES" in finding.fix


# --- Servers --------------------------------------------------------------------------------


@dataclass
class Server:
    """A server on loopback that answers every request with the same bytes."""

    answer: bytes | None
    """Answer, or None for a server that never answers."""
    url: str = ""
    requests: list[str] = field(default_factory=list)


StartServer = Callable[[bytes | None], Server]


@pytest.fixture
def start() -> Iterator[StartServer]:
    running: list[socketserver.TCPServer] = []

    def start(answer: bytes | None) -> Server:
        server = Server(answer)

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                head = list(iter(self.rfile.readline, b"\r\n"))
                server.requests.append(b"".join(head).decode())
                if server.answer is None:
                    self.rfile.read(1)
                else:
                    self.wfile.write(server.answer)

        listener = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        running.append(listener)
        server.url = f"http://127.0.0.1:{listener.server_address[1]}"
        return server

    yield start
    for listener in running:
        listener.shutdown()
        listener.server_close()


def http(status: str, body: str = "", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close", "", body]).encode()


GIT = http("200 OK", "001e# service=git-upload-pack\n0000")
CACHE = http("200 OK", "StoreDir: /gnu/store\nWantMassQuery: 0\n")
BAD_ANSWERS = {
    "404": (http("404 Not Found"), "answers 404 Not Found"),
    "503": (http("503 Service Unavailable"), "answers 503 Service Unavailable"),
    "401": (http("401 Unauthorized"), "answers 401 Unauthorized"),
    "portal": (http("200 OK", "<html>Log in"), "answers, but not as a "),
    "empty": (http("200 OK"), "answers, but not as a "),
    "no-http": (b"SSH-2.0-OpenSSH\r\n", "does not answer: SSH-2.0-OpenSSH"),
    "cut-short": (http("200 OK", "x", "Content-Length: 99"), "answers, but not as a "),
    "closed": (b"", "does not answer: Remote end closed connection"),
    "loop": (http("302 Found", "", "Location: /"), "answers 302 "),
    "silence": (None, "does not answer: timed out"),
}


@pytest.fixture(params=BAD_ANSWERS.values(), ids=list(BAD_ANSWERS))
def bad_server(request: pytest.FixtureRequest, start: StartServer) -> tuple[str, str]:
    """The address of a server with an invalid answer, and the reported error."""
    answer, message = request.param
    return start(answer).url, message


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_TIMEOUT", 0.3)


def set_channels(site: Site, *urls: str) -> None:
    """Set channels and their network."""
    site.env["NETWORK"] = ""
    forms = (channel(f"c{number}", url) for number, url in enumerate(urls))
    site.write("channels.scm", f"(list {' '.join(forms)})\n")


def test_channel_is_checked_with_the_request_of_git(site: Site, start: StartServer) -> None:
    server = start(GIT)
    set_channels(site, f"{server.url}/guix.git/")
    assert check(site, "channel.*") == Finding(OK, f"{server.url}/guix.git/ answers")
    (request,) = server.requests
    assert request.startswith("GET /guix.git/info/refs?service=git-upload-pack HTTP/1.1\r\n")
    assert "User-Agent: git/" in request


def test_channel_with_invalid_answer_is_a_failure(site: Site, bad_server: tuple[str, str]) -> None:
    url, message = bad_server
    set_channels(site, url)
    finding = check(site, "channel.*")
    assert finding.state == FAILED
    assert finding.message.startswith(f"{url} {message}")
    assert "\n" not in finding.message
    assert "GUIX_CHANNELS" in finding.fix


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("http://127.0.0.1:1/x", "Connection refused"),
        ("http://127.0.0.1:port/x", "nonnumeric port"),
        ("http://[::1/x", "Invalid IPv6 URL"),
        ("http://127.0.0.1:1/ä", "ascii"),
    ],
)
def test_unavailable_channel_is_one_finding(site: Site, url: str, error: str) -> None:
    set_channels(site, url)
    finding = check(site, "channel.*")
    assert finding.state == FAILED
    assert error in finding.message


def test_each_channel_has_a_finding(site: Site, start: StartServer) -> None:
    set_channels(site, start(GIT).url, start(http("404 Not Found")).url, "git@host.test:guix")
    assert [check(site, f"channel c{number}").state for number in range(3)] == [OK, FAILED, FAILED]


def test_token_in_the_url_of_a_channel_is_used_and_redacted(site: Site, start: StartServer) -> None:
    server = start(GIT)
    set_channels(
        site, server.url.replace("//", f"//me:{PASSWORD}%40x@"), f"ssh://me:{PASSWORD}@h/x"
    )
    findings = find(site, "channel.*")
    assert [finding.state for finding in findings] == [OK, FAILED]
    assert PASSWORD not in repr(findings)
    assert "Authorization: Basic bWU6aHVudGVyMkB4\r\n" in server.requests[0]


def test_token_is_not_sent_to_another_server(site: Site, start: StartServer) -> None:
    target = start(GIT)
    server = start(http("302 Found", "", f"Location: {target.url}/"))
    set_channels(site, server.url.replace("//", f"//me:{PASSWORD}@"))
    assert check(site, "channel.*").state == OK
    assert "Authorization" in server.requests[0]
    assert "Authorization" not in target.requests[0]


def test_channels_of_the_lock_are_checked(site: Site, start: StartServer) -> None:
    server = start(GIT)
    set_channels(site, server.url)
    site.lock.write_text(f"(list {channel('c0', server.url, 'a' * 40)})\n")
    assert check(site, "channel.*").state == OK
    site.lock.write_text(f"(list {channel('c0', 'https://else.test', 'a' * 40)})\n")
    finding = check(site, "channel.*")
    assert finding.state == FAILED
    assert "does not fit GUIX_CHANNELS: c0 is from https://else.test" in finding.message
    assert "--update" in finding.fix


def test_channels_of_the_image_are_a_note(site: Site) -> None:
    site.env["GUIX_CHANNELS"] = ""
    assert check(site, "channel.*").state == NOTE


def test_computed_channels_are_a_note(site: Site) -> None:
    site.write("channels.scm", "%default-channels\n")
    finding = check(site, "channel.*")
    assert finding.state == NOTE
    assert "computes" in finding.message


def test_unreadable_lock_is_a_failure(site: Site) -> None:
    site.lock.write_bytes(b"\xff")
    finding = check(site, "channel.*")
    assert (finding.state, finding.fix) == (FAILED, "write a channels file")


def test_servers_are_not_checked_without_a_network(site: Site, start: StartServer) -> None:
    server = start(GIT)
    set_channels(site, server.url)
    site.env.update(NETWORK="none", GUIX_SUBSTITUTE_URLS=server.url)
    findings = [*find(site, "channel.*"), *find(site, "substitutes")]
    assert {finding.state for finding in findings} == {NOTE}
    assert "NETWORK=none" in findings[1].message
    assert server.requests == []


# --- Channels on mounts ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file:///srv/guix", "/srv/guix", "/srv"])
def test_channel_on_a_mount_is_checked_on_this_machine(site: Site, form: str) -> None:
    site.write("channels/guix/HEAD", "")
    site.env["MOUNTS"] = "channels:/srv/:ro"
    set_channels(site, form)
    finding = check(site, "channel.*")
    assert finding.state == OK
    assert str(site.directory / "channels") in finding.message


def test_missing_channel_on_a_mount_is_a_failure(site: Site) -> None:
    site.env["MOUNTS"] = "context:/srv"
    set_channels(site, "file:///srv/guix")
    finding = check(site, "channel.*")
    assert (finding.state, finding.fix) == (FAILED, "correct MOUNTS")
    assert str(site.directory / "context" / "guix") in finding.message


@pytest.mark.parametrize("mounts", ["", "context:/srv/gui", "context:/other"])
def test_local_channel_without_a_mount_is_a_note(site: Site, mounts: str) -> None:
    site.env["MOUNTS"] = mounts
    set_channels(site, "file:///srv/guix")
    assert check(site, "channel.*").state == NOTE


@pytest.mark.parametrize("mounts", ["outer:/srv inner:/srv/in", "inner:/srv/in outer:/srv"])
def test_nested_mount_takes_precedence(site: Site, mounts: str) -> None:
    site.write("inner/guix/HEAD", "")
    site.write("outer/file", "")
    site.env["MOUNTS"] = mounts
    set_channels(site, "file:///srv/in/guix")
    assert check(site, "channel.*").state == OK


# --- Substitutes ----------------------------------------------------------------------------


def set_substitute_urls(site: Site, *urls: str, keys: bool = True) -> None:
    site.env.update(NETWORK="", GUIX_SUBSTITUTE_URLS=" ".join(urls))
    site.write("a.pub", "(public-key)")
    site.env["GUIX_SUBSTITUTE_KEYS"] = "a.pub" if keys else ""


def test_available_substitute_server_is_ok(site: Site, start: StartServer) -> None:
    server = start(CACHE)
    set_substitute_urls(site, f"{server.url}/")
    assert check(site, "substitutes") == Finding(OK, f"{server.url} answers")
    assert server.requests[0].startswith("GET /nix-cache-info HTTP/1.1\r\n")


def test_substitute_server_with_invalid_answer_is_a_failure(
    site: Site, bad_server: tuple[str, str]
) -> None:
    url, message = bad_server
    set_substitute_urls(site, url)
    finding = check(site, "substitutes")
    assert finding.state == FAILED
    assert finding.message.startswith(f"{url} {message}")
    assert "GUIX_SUBSTITUTE_URLS" in finding.fix


def test_substitute_server_without_a_key_is_a_note(site: Site, start: StartServer) -> None:
    set_substitute_urls(site, start(CACHE).url, keys=False)
    note = check(site, "substitutes")
    assert note.state == NOTE
    assert note.message.endswith(" answers, but no key is set for it")
    assert "GUIX_SUBSTITUTE_KEYS" in note.fix


KEY = "(public-key (ecc (curve Ed25519) (q #D0#)))"


def add_to_base(site: Site, path: str, content: bytes) -> None:
    """Add a file to the base stage, in a layer that other sites do not share."""
    layer = site.image("base").layers[0]
    site.engine._files[layer] = {**site.engine._files[layer], path: content}


@pytest.mark.parametrize("trusted_by", ["none", "image", "setting"])
def test_published_key_of_a_substitute_server_must_be_trusted(
    built_site: Site, start: StartServer, trusted_by: str
) -> None:
    server = start(CACHE + KEY.encode())
    set_substitute_urls(built_site, server.url, keys=False)
    if trusted_by == "setting":
        built_site.write("a.pub", KEY)
        built_site.env["GUIX_SUBSTITUTE_KEYS"] = "a.pub"
    if trusted_by == "image":
        add_to_base(built_site, guix.ACL, f"(acl {KEY})".encode())
    finding = check(built_site, "substitutes")
    assert any(line.startswith("GET /signing-key.pub ") for line in server.requests)
    if trusted_by == "none":
        assert finding.message == f"{server.url} answers, but the image does not trust its key"
        assert (finding.state, "GUIX_SUBSTITUTE_KEYS" in finding.fix) == (FAILED, True)
    else:
        assert finding == Finding(OK, f"{server.url} answers")
    assert built_site.engine.all_containers == {}


@pytest.mark.parametrize(("services", "state"), [(b"", FAILED), (b"https 443/tcp\n", NOTE)])
def test_image_without_ports_of_services_is_a_failure(
    built_site: Site, monkeypatch: pytest.MonkeyPatch, services: bytes, state: str
) -> None:
    monkeypatch.setattr(servers, "_get", lambda *_: "StoreDir: /gnu/store")
    if services:
        add_to_base(built_site, "/etc/services", services)
    set_substitute_urls(built_site, "https://a.test", keys=False)
    finding = check(built_site, "substitutes")
    assert finding.state == state
    assert ("install the package netbase" in finding.fix) == (state == FAILED)


@pytest.mark.parametrize("slash", ["", "/"])
def test_default_servers_of_guix_need_no_key(site: Site, slash: str) -> None:
    site.env["GUIX_SUBSTITUTE_URLS"] = f"{DEFAULT_SUBSTITUTE_URLS[0]}{slash}"
    assert "unreachable" in check(site, "substitutes").message


def test_default_servers_of_guix_are_checked_if_none_are_set(site: Site) -> None:
    urls = [finding.message.split()[0] for finding in find(site, "substitutes")]
    assert urls == [*DEFAULT_SUBSTITUTE_URLS]


def test_substitutes_on_a_mount_need_the_cache_info(site: Site) -> None:
    site.write("substitutes/x.narinfo", "")
    site.env["MOUNTS"] = "substitutes:/srv"
    set_substitute_urls(site, "file:///srv")
    finding = check(site, "substitutes")
    assert finding.state == FAILED
    assert "nix-cache-info does not exist" in finding.message
    site.write("substitutes/nix-cache-info", "StoreDir: /gnu/store\n")
    assert check(site, "substitutes").state == OK


# --- All checks -----------------------------------------------------------------------------


def test_findings_are_in_the_order_of_the_checks(site: Site) -> None:
    names = [name for name, _ in examine_project(site.project(), None)]
    assert names == [
        "engine", "host", "clock", "disk", "base image", "sandbox", "registry", "buildx",
        "channel guix", "substitutes", "substitutes",
    ]  # fmt: skip


def test_engine_lost_during_the_checks_keeps_the_other_findings(site: Site) -> None:
    def fail(_number: int, name: str, _when: str) -> None:
        if name != "image":
            raise EngineError("the Docker Engine does not answer: gone; start it")

    site.engine.fault = fail
    findings = dict(examine_project(site.project(), None))
    assert (findings["sandbox"].message, findings["registry"].message) == (
        ("the Docker Engine does not answer: gone",) * 2
    )
    assert findings["sandbox"].fix == "start it"
    assert findings["base image"].state == OK
    assert findings["buildx"].state == NOTE


def test_unreadable_file_is_a_finding_of_its_check(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_substitute_urls(site, "file:///srv")
    real = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self.name == "a.pub":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    finding = check(site, "sandbox")
    assert finding.state == FAILED
    assert finding.message == f"{site.directory / 'a.pub'}: Permission denied"
    assert site.engine.all_containers == {}


def test_engine_is_unchanged_by_the_checks(built_site: Site) -> None:
    snapshot = (
        outline(built_site.engine),
        dict(built_site.engine.all_images),
        built_site.engine.registry.images,
    )
    examine_project(built_site.project(), None)
    engine = built_site.engine
    assert (outline(engine), dict(engine.all_images), engine.registry.images) == snapshot
    assert (engine.all_containers, set(engine.changing_calls())) == (
        {}, {"create", "copy_in", "run", "remove"},
    )  # fmt: skip


def test_dry_run_creates_no_container(site: Site) -> None:
    console = BufferConsole()
    project = site.project(TracedEngine(site.engine, console, perform=False))
    findings = dict(examine_project(project, None))
    assert "dry run" in findings["sandbox"].message
    assert findings["registry"].state == OK
    assert site.engine.changing_calls() == []
    assert console.text == ""


FINDINGS = [
    ("engine", Finding(OK, "here")),
    ("clock", Finding(NOTE, "odd", "look")),
    ("disk", Finding(FAILED, "full: ä", "make room")),
]


def test_finding_is_one_line_with_its_fix() -> None:
    console = BufferConsole()
    show(console, FINDINGS, as_json=False)
    assert console.results.getvalue().splitlines() == [
        "ok     engine: here", "note   clock: odd; look", "failed disk: full: ä; make room",
    ]  # fmt: skip


def test_json_contains_all_findings() -> None:
    console = BufferConsole()
    show(console, FINDINGS, as_json=True)
    rows = json.loads(console.results.getvalue())
    assert rows[2] == {
        "check": "disk", "state": "failed", "message": "full: ä", "fix": "make room",
    }  # fmt: skip
    assert [row["state"] for row in rows] == ["ok", "note", "failed"]


# --- The task -------------------------------------------------------------------------------


@dataclass
class Result:
    code: object
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows = json.loads(self.out)
        assert isinstance(rows, list)
        return rows


Inv = Callable[..., Result]


@pytest.fixture
def inv(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inv:
    site.write("tasks.py", "")
    monkeypatch.chdir(site.directory)
    monkeypatch.setenv("DOCKER_HOST", "unix:///fake.sock")
    monkeypatch.setattr(podman, "open_engine", lambda _address, _environ: site.engine)
    monkeypatch.setattr(buildx, "find_program", lambda *_: None)

    def call(*argv: str) -> Result:
        session._engines.clear()
        session._printed_notes.clear()
        lines = (f"{name}='{value}'\n" for name, value in site.env.items())
        site.write(".env", "".join(lines))
        monkeypatch.setattr(sys, "argv", ["inv", *argv])
        capsys.readouterr()
        code: object = 0
        try:
            Program(namespace=ns).run(["inv", *argv])
        except SystemExit as error:
            code = error.code
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return Result(code, output.out, output.err)

    return call


def test_success_is_exit_code_0(inv: Inv) -> None:
    result = inv("doctor")
    assert result.code == 0
    assert result.out.startswith("ok     settings: read\nok     engine: fake at ")
    assert "failed" not in result.out


def test_failure_is_exit_code_1(inv: Inv, site: Site) -> None:
    site.engine.registry.refusal = "connection refused; start it"
    result = inv("doctor")
    assert result.code == 1
    failed = [line for line in result.out.splitlines() if line.startswith("failed ")]
    assert failed == [f"failed registry: cannot look up {IMAGE}: connection refused; start it"]


def test_note_is_exit_code_0(inv: Inv, site: Site) -> None:
    site.env["SOMETHING_ELSE"] = "1"
    result = inv("doctor")
    assert result.code == 0
    assert "note   settings: .env:" in result.out
    assert "SOMETHING_ELSE" not in result.err


def test_standard_output_is_only_json(inv: Inv, site: Site) -> None:
    site.engine.registry.refusal = "denied"
    result = inv("doctor", "--json")
    assert result.code == 1
    assert [row["check"] for row in result.rows if row["state"] == "failed"] == ["registry"]
    assert result.err == "engine: fake at unix:///fake.sock (fake), Docker 28\n"


def test_invalid_settings_are_findings(inv: Inv, site: Site) -> None:
    site.env.update(IMAGE="Bad Image", STAGE_MEMORY="much")
    result = inv("doctor", "--json")
    assert result.code == 1
    assert [(row["check"], row["state"]) for row in result.rows] == [("settings", "failed")] * 2
    assert {".env:1: IMAGE", "STAGE_MEMORY"} <= {
        word
        for row in result.rows
        for word in (".env:1: IMAGE", "STAGE_MEMORY")
        if word in row["message"]
    }
    assert site.engine.calls == []


def test_missing_engine_is_a_finding(inv: Inv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST")
    result = inv("doctor", "--json")
    assert result.code == 1
    (row,) = result.rows
    assert (row["check"], row["state"]) == ("engine", "failed")
    assert "no Docker Engine on this machine" in row["message"]
    assert "`inv engine.up`" in row["fix"]


def test_unavailable_engine_is_a_finding(
    inv: Inv, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> NoReturn:
        raise EngineError("the Docker Engine at x does not answer: timed out; start it")

    monkeypatch.setattr(site.engine, "info", fail)
    result = inv("doctor")
    assert result.code == 1
    assert result.out.splitlines()[-1] == (
        "failed engine: the Docker Engine at x does not answer: timed out; start it"
    )


def test_engine_is_opened_again_after_other_tasks(
    inv: Inv, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that the engine reported to `base` is not the current time."""
    opened: list[object] = []

    def open_engine(address: object, _environ: object) -> object:
        opened.append(address)
        return site.engine

    monkeypatch.setattr(podman, "open_engine", open_engine)
    assert inv("base", "doctor").code == 0
    assert len(opened) == 2


def test_secrets_are_redacted(inv: Inv, site: Site) -> None:
    site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    for argv in (["doctor"], ["doctor", "--json"], ["--echo", "doctor"]):
        result = inv(*argv)
        assert result.code == 0
        assert PASSWORD not in result.out + result.err
        assert "some-user" not in result.out + result.err


def test_warm_store_is_checked(built_site: Site) -> None:
    (volume,) = built_site.engine.stores
    assert [(finding.state, finding.message) for finding in store_findings(built_site)] == [
        ("ok", f"{volume}: the database is intact")
    ]
    built_site.engine.stores[volume]["damaged"] = {}
    (finding,) = store_findings(built_site)
    assert finding.state == "failed"
    assert "malformed" in finding.message
    assert f"docker volume rm {volume}" in finding.fix


def test_disabled_warm_store_is_a_note(built_site: Site) -> None:
    built_site.env["CACHE_VOLUME"] = ""
    (finding,) = store_findings(built_site)
    assert (finding.state, finding.fix) == ("note", "set CACHE_VOLUME")


def store_findings(site: Site) -> list[Finding]:
    return [finding for name, finding in examine_project(site.project(), None) if name == "store"]
