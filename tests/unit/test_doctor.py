"""Doctor: what each check says of what can be wrong, and that it leaves everything as it is."""

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
    FakeContainer,
    Heard,
    Output,
    Site,
    channel,
    made_site,
    new_site,
    outline,
    serial,
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
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of this machine: no engine, no settings, no proxy, no disk that is full."""
    for name in (*DECLARATIONS, *PROXIES, "ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(discovery, "DEFAULT_SOCKET", tmp_path / "no.sock")
    monkeypatch.setattr(files, "ThreadPoolExecutor", serial)
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
def made(tmp_path: Path) -> Site:
    site = made_site(tmp_path / "project")
    site.env["NETWORK"] = "none"
    return site


def find(site: Site, name: str, program: Buildx | None = None) -> list[Finding]:
    """Return the findings of the checks whose names match."""
    checks = doctor._checks(site.project(), program)
    found = [doctor._run(check) for each, check in checks if re.fullmatch(name, each)]
    return [each for each in found if each]


def one(site: Site, name: str) -> Finding:
    (found,) = find(site, name)
    return found


def about(site: Site, **fields: object) -> None:
    """Let the engine describe itself otherwise."""
    site.engine.about = replace(site.engine.about, **fields)  # type: ignore[arg-type]


# --- The engine and its machine -------------------------------------------------------------


def test_the_engine_is_told_with_the_rule_that_found_it(site: Site) -> None:
    about(site, cgroups="2", security=("seccomp", "apparmor"))
    engine, host = one(site, "engine"), one(site, "host")
    assert engine.message == "fake at unix:///fake.sock (fake), Docker 28, linux/amd64, memory"
    assert (host.state, host.message) == (OK, "cgroups v2, seccomp, apparmor")


def test_a_rootless_engine_is_a_note_with_what_to_do(site: Site) -> None:
    about(site, security=("seccomp", "rootless"))
    note = one(site, "host")
    assert note.state == NOTE
    assert "rootless" in note.message
    assert "an engine that runs as root" in note.fix


@pytest.mark.parametrize(
    ("seconds", "state", "said"),
    [
        (-3600, FAILED, "3600 s behind this machine's"),
        (3600, FAILED, "s ahead of this machine's"),
        (-30, OK, "30 s between"),
        (30, OK, "s between"),
    ],
)
def test_a_clock_that_is_off_is_told_with_its_direction(
    site: Site, seconds: int, state: str, said: str
) -> None:
    about(site, time=datetime.now(timezone.utc) + timedelta(seconds=seconds))
    clock = one(site, "clock")
    assert clock.state == state
    assert said in clock.message
    assert "-" not in clock.message


def test_an_engine_that_tells_no_time_is_not_said_to_be_right(site: Site) -> None:
    assert one(site, "clock") == Finding(NOTE, "the engine does not report its time")


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
def test_the_time_of_an_engine_is_read(text: str, expected: str | None) -> None:
    found = docker._time(text)
    assert (found and found.isoformat()) == expected


@pytest.mark.parametrize(("free", "state"), [(10**12, OK), (10**6, FAILED)])
def test_room_on_the_engines_disk(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    about(site, root=str(tmp_path))
    disk = one(site, "disk")
    assert disk.state == state
    assert f"free at {tmp_path}; about 4 GB is needed" in disk.message
    assert ("`inv clean`" in disk.fix) == (state == FAILED)


def test_a_commit_needs_room_for_another_image(
    made: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    about(made, root=str(tmp_path))
    assert one(made, "disk").state == OK
    image = made.image("install")
    made.engine.all_images[image.id] = replace(image, size=3 * 10**9)
    assert one(made, "disk").state == FAILED


@pytest.mark.parametrize(
    "fields",
    [{"root": ""}, {"root": "/no/such/directory"}, {"root": "/", "url": "tcp://far.test:2375"}],
    ids=["unnamed", "not-here", "elsewhere"],
)
def test_a_disk_that_cannot_be_seen_is_not_judged(site: Site, fields: dict[str, str]) -> None:
    about(site, **fields)
    assert one(site, "disk") == Finding(NOTE, "the engine's disk is not visible from this machine")


def test_a_folder_that_is_closed_to_this_user_is_not_judged(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "disk_usage", closed)
    monkeypatch.setattr(Path, "is_dir", closed)
    about(site, root="/var/lib/docker/100000.100000")
    assert one(site, "disk").state == NOTE


# --- The base image -------------------------------------------------------------------------


def test_a_base_image_that_is_here(site: Site) -> None:
    assert one(site, "base image").message.startswith(f"{BASE_IMAGE} is on the engine, ")


def test_a_base_image_that_is_in_its_registry(site: Site) -> None:
    site.engine.untag(BASE_IMAGE)
    assert one(site, "base image") == Finding(OK, f"{BASE_IMAGE} is in its registry")


def test_a_base_image_that_is_nowhere(site: Site) -> None:
    site.env["BASE_IMAGE"] = "registry.test/none:1"
    found = one(site, "base image")
    assert found.state == FAILED
    assert "registry.test/none:1" in found.message
    assert "`inv rootfs`" in found.fix


def test_podman_is_not_asked_what_it_cannot_tell(site: Site) -> None:
    about(site, product="Podman", version="4.3.1", security=("rootless",))
    assert ", Podman 4.3.1, rootless, linux/amd64" in one(site, "engine").message
    site.env["BASE_IMAGE"] = "registry.test/none:1"
    image, registry = one(site, "base image"), one(site, "registry")
    assert (image.state, image.fix) == (
        NOTE,
        "`podman pull registry.test/none:1` shows whether it can be pulled",
    )
    assert registry.state == NOTE
    assert "was not tested" in registry.message
    site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    assert one(site, "registry").state == OK


def test_a_base_image_that_is_gone_after_the_base_stage_is_no_fault(made: Site) -> None:
    """BuildKit leaves none on the engine, and nothing asks for it again."""
    made.engine.registry.images.clear()
    assert one(made, "base image").state == NOTE
    assert made.states()["base"].why is None


# --- The sandbox ----------------------------------------------------------------------------


def fails(*lines: str, status: int = 1) -> Callable[[FakeContainer], Output]:
    """A probe that says this and ends so."""

    def behaviour(container: FakeContainer) -> Output:
        container.status = status
        for line in lines:
            yield True, f"{line}\n".encode()

    return behaviour


CLONE = "guix repl: error: clone: Operation not permitted"
NO_GUIX = "entry-point: error: this image has no guix-daemon: it was built on a base without Guix"


def test_a_probe_is_run_as_a_stage_is_and_reaches_nothing(site: Site) -> None:
    seen: list[FakeContainer] = []

    def behaviour(container: FakeContainer) -> Output:
        seen.append(container)
        assert container.text("/var/guix/guix-tasks/probe.sh").startswith("#!")
        assert "guix-tasks-probe" in container.text("/var/guix/guix-tasks/probe.scm")
        yield False, b""

    site.engine.behaviour = behaviour
    site.env["MOUNTS"] = "context:/context"
    assert one(site, "sandbox") == Finding(OK, "privileged: Guix builds in a work container")
    spec = seen[0].spec
    assert spec.command == ("/var/guix/guix-tasks/entry-point.sh", "/var/guix/guix-tasks/probe.sh")
    assert (spec.privileged, spec.network, spec.binds, spec.scratch) == (True, "none", (), None)
    assert site.engine.all_containers == {}
    assert site.engine.all_volumes == {}


def test_a_probe_without_isolation_has_no_privilege(site: Site) -> None:
    site.env["GUIX_SANDBOX"] = "nochroot"
    assert one(site, "sandbox").message.startswith("nochroot: Guix builds")
    assert not site.engine.specs[0].privileged
    assert site.engine.specs[0].security == ("seccomp=unconfined",)


def test_the_base_stage_is_probed_where_it_is_made(made: Site) -> None:
    one(made, "sandbox")
    assert made.engine.specs[-1].image == made.image("base").id


def test_without_an_image_nothing_is_probed_and_nothing_pulled(site: Site) -> None:
    site.engine.untag(BASE_IMAGE)
    site.engine.calls.clear()
    assert one(site, "sandbox").state == NOTE
    assert site.engine.changing_calls() == []


def test_a_container_that_may_not_fork_is_told_by_guix_own_line(site: Site) -> None:
    site.engine.behaviour = fails("substitute: looking", CLONE, "entry-point: the last lines")
    found = one(site, "sandbox")
    assert found.state == FAILED
    assert found.message.endswith(f"Guix cannot build in a work container: {CLONE}")
    assert "GUIX_SANDBOX=nochroot" in found.fix


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
        (["guix repl: error: write: No space left on device"], "`inv clean` removes"),
        (["Segmentation fault"], "privileged"),
        ([], "privileged"),
    ],
    ids=["key", "emulator", "disk", "other", "nothing"],
)
def test_fix_of_a_sandbox_fits_its_cause(site: Site, lines: list[str], fix: str) -> None:
    site.engine.behaviour = fails(*lines, status=69)
    found = one(site, "sandbox")
    assert found.state == FAILED
    assert (lines[-1] if lines else "the probe ended with status 69") in found.message
    assert fix in found.fix


def test_a_lack_of_memory_is_not_a_lack_of_privileges(made: Site) -> None:
    def behaviour(container: FakeContainer) -> Output:
        container.lacked_memory, container.status = True, 137
        return iter(())

    made.engine.behaviour = behaviour
    found = one(made, "sandbox")
    assert (found.state, "memory ran out" in found.message) == (FAILED, True)
    assert "STAGE_MEMORY" in found.fix


def test_a_base_image_that_gets_guix_by_the_dockerfile_is_no_fault(site: Site) -> None:
    site.engine.behaviour = fails(NO_GUIX, status=69)
    found = one(site, "sandbox")
    assert found.state == NOTE
    assert "`inv base`" in found.fix


def test_a_base_stage_without_guix_is_one(made: Site) -> None:
    made.engine.behaviour = fails(NO_GUIX, status=69)
    found = one(made, "sandbox")
    assert found.state == FAILED
    assert "BASE_IMAGE" in found.fix


def fault_at(call: str, message: str) -> Callable[[int, str, str], None]:
    def fault(_number: int, name: str, when: str) -> None:
        if (name, when) == (call, "before"):
            raise EngineError(message)

    return fault


@pytest.mark.parametrize(
    ("refusal", "fix"),
    [
        ("privileged mode is incompatible with user namespaces", PRIVILEGES_FIX),
        ("authorization denied by plugin", PRIVILEGES_FIX),
        ("no space left on device", ""),
    ],
)
def test_engine_that_refuses_privileges_has_the_fix_for_that(
    site: Site, refusal: str, fix: str
) -> None:
    site.engine.fault = fault_at("create", f"the engine could not create a container: {refusal}")
    found = one(site, "sandbox")
    assert (found.state, found.fix) == (FAILED, fix)
    assert found.message.endswith(refusal)


@pytest.mark.parametrize("call", ["create", "copy_in", "run", "wait", "remove"])
def test_engine_that_is_lost_is_a_finding_with_its_own_fix(site: Site, call: str) -> None:
    site.engine.fault = fault_at(call, "the Docker Engine does not answer: x; start it")
    assert one(site, "sandbox") == Finding(
        FAILED, "the Docker Engine does not answer: x", "start it"
    )


def test_a_build_that_never_ends_is_stopped(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(container: FakeContainer) -> Output:
        end = time.monotonic() + 20
        while container.running and time.monotonic() < end:
            time.sleep(0.01)
            yield False, b""

    monkeypatch.setattr(sandbox, "PROBE_SECONDS", 0.1)
    site.engine.behaviour = hangs
    assert "the probe did not end within 0.1 s" in one(site, "sandbox").message
    assert site.engine.all_containers == {}


def test_a_platform_that_is_emulated_is_noted_and_the_other_one_probed(site: Site) -> None:
    site.env["PLATFORMS"] = "linux/arm64 linux/amd64"
    note, found = find(site, "sandbox")
    assert note.state == NOTE
    assert "linux/arm64 is emulated" in note.message
    assert "GUIX_SANDBOX=nochroot" in note.fix
    assert found.state == OK
    assert [spec.platform for spec in site.engine.specs] == ["linux/amd64"]


def test_a_base_image_of_another_platform_is_not_probed(site: Site) -> None:
    site.env.update(PLATFORMS="linux/arm64", GUIX_SANDBOX="nochroot")
    assert one(site, "sandbox").state == NOTE
    assert site.engine.specs == []


# --- Mounts ---------------------------------------------------------------------------------


def test_mounts_that_the_engine_cannot_see(site: Site) -> None:
    site.env["MOUNTS"] = "context:/context"
    assert one(site, "mounts").state == OK
    about(site, url="tcp://far.test:2375")
    found = one(site, "mounts")
    assert found.state == FAILED
    assert "tcp://far.test:2375" in found.message


def test_without_mounts_there_is_nothing_to_say_of_them(site: Site) -> None:
    about(site, url="tcp://far.test:2375")
    assert find(site, "mounts") == []


# --- The registry ---------------------------------------------------------------------------


def test_a_registry_is_greeted_with_the_account_which_is_not_shown(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    site.engine.registry.seen.clear()
    found = one(site, "registry")
    assert (found.state, found.message) == (OK, "registry.test answers to DOCKER_USERNAME")
    assert site.engine.registry.seen == [Credentials("some-user", PASSWORD)]


def test_without_an_account_dockers_own_configuration_is_used(site: Site) -> None:
    site.engine.registry.seen.clear()
    assert "Docker's configuration" in one(site, "registry").message
    assert site.engine.registry.seen == [None]


def test_the_account_of_a_local_registry_is_named(site: Site) -> None:
    site.engine.registry.local_accounts = {"registry.test": Credentials("local", PASSWORD)}
    assert one(site, "registry").message.endswith("to the account that `inv registry.up` created")


def test_registry_that_refuses_is_reported_with_its_fix(site: Site) -> None:
    site.engine.registry.refusal = "unauthorized; set DOCKER_USERNAME"
    assert one(site, "registry") == Finding(
        FAILED, f"cannot look up {IMAGE}: unauthorized", "set DOCKER_USERNAME"
    )


# --- buildx ---------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path) -> FakeBuildx:
    return FakeBuildx(tmp_path / "buildx")


def builder(site: Site, fake: FakeBuildx) -> Finding:
    version, found = find(site, "buildx|builder", fake.program())
    assert version.message.startswith("v0.26.1 at ")
    return found


def test_a_machine_without_buildx_is_told_who_installs_it(site: Site) -> None:
    found = one(site, "buildx")
    assert found.state == NOTE
    assert "`inv buildx.setup`" in found.fix


def test_a_buildx_that_is_of_another_machine_is_one_finding(site: Site, fake: FakeBuildx) -> None:
    (fake.directory / "alien").write_bytes(b"\x7fELF nonsense")
    (fake.directory / "alien").chmod(0o755)
    broken = replace(fake.program(), program=str(fake.directory / "alien"))
    (found,) = find(site, "buildx", broken)
    assert found.state == FAILED
    assert "Exec format error" in found.message


def test_a_buildx_that_fails_is_one_finding(site: Site, fake: FakeBuildx) -> None:
    fake.fail("ERROR: cannot read its configuration", "version")
    (found,) = find(site, "buildx", fake.program())
    assert (found.state, found.message) == (FAILED, "cannot read its configuration")


def test_a_builder_that_is_not_there_is_no_fault(site: Site, fake: FakeBuildx) -> None:
    found = builder(site, fake)
    assert found == Finding(NOTE, f"there is no builder '{NAME}'", "`inv buildx.setup` creates it")


def test_a_builder_that_does_it_all(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    found = builder(site, fake)
    assert found.state == OK
    assert found.message == f"{NAME} runs insecure steps with its built-in frontend"


def test_a_builder_with_an_old_frontend_names_the_one_that_it_fetches(
    site: Site, fake: FakeBuildx
) -> None:
    fake.add()
    fake.fail(UNKNOWN_FLAG, "build", without=("BUILDKIT_SYNTAX",))
    assert builder(site, fake).message.endswith("with the frontend docker/dockerfile:1")
    fake.fail(NO_IMAGE, "build", "BUILDKIT_SYNTAX")
    found = builder(site, fake)
    assert found.state == NOTE
    assert "cannot pull" in found.message


def test_a_builder_that_allows_no_insecure_steps(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    fake.fail(REFUSED, "build")
    found = builder(site, fake)
    assert found.state == NOTE
    assert "--recreate" in found.fix


@pytest.mark.parametrize("others", [0, 1])
def test_a_builder_that_is_stopped_is_not_started(
    site: Site, fake: FakeBuildx, others: int
) -> None:
    for _ in range(others):
        fake.add()
    fake.add(status="stopped")
    found = builder(site, fake)
    assert found == Finding(NOTE, f"{NAME}{others} is not running", "`inv buildx.setup` starts it")
    assert fake.changes() == []
    assert fake.verbs() == ["version", "inspect"]


def test_a_node_that_cannot_be_reached_is_told_with_why(site: Site, fake: FakeBuildx) -> None:
    site.env.update(BUILDX_DRIVER="remote", BUILDX_NODES="tcp://b.test:1")
    fake.print(
        "Name: r\nDriver: remote\n\nNodes:\nName: r0\nEndpoint: tcp://b.test:1\nError: no route\n",
        "inspect",
    )
    found = builder(site, fake)
    assert found.message == "r0 is not running: no route"
    assert "BUILDX_NODES" in found.fix


# --- Servers --------------------------------------------------------------------------------


@dataclass
class Server:
    """A server on loopback that answers whatever it is asked with the same bytes."""

    answer: bytes | None
    """None: nothing, for as long as somebody waits."""
    url: str = ""
    asked: list[str] = field(default_factory=list)


StartServer = Callable[[bytes | None], Server]


@pytest.fixture
def start() -> Iterator[StartServer]:
    running: list[socketserver.TCPServer] = []

    def start(answer: bytes | None) -> Server:
        server = Server(answer)

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                head = list(iter(self.rfile.readline, b"\r\n"))
                server.asked.append(b"".join(head).decode())
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
def bad(request: pytest.FixtureRequest, start: StartServer) -> tuple[str, str]:
    """The address of a server that answers badly, and what is said of it."""
    answer, said = request.param
    return start(answer).url, said


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_TIMEOUT", 0.3)


def pull_from(site: Site, *urls: str) -> None:
    """Set channels, with the network that they need."""
    site.env["NETWORK"] = ""
    forms = (channel(f"c{number}", url) for number, url in enumerate(urls))
    site.write("channels.scm", f"(list {' '.join(forms)})\n")


def test_a_channel_that_answers_is_asked_what_git_asks(site: Site, start: StartServer) -> None:
    server = start(GIT)
    pull_from(site, f"{server.url}/guix.git/")
    assert one(site, "channel.*") == Finding(OK, f"{server.url}/guix.git/ answers")
    (asked,) = server.asked
    assert asked.startswith("GET /guix.git/info/refs?service=git-upload-pack HTTP/1.1\r\n")
    assert "User-Agent: git/" in asked


def test_a_channel_that_answers_badly(site: Site, bad: tuple[str, str]) -> None:
    url, said = bad
    pull_from(site, url)
    found = one(site, "channel.*")
    assert found.state == FAILED
    assert found.message.startswith(f"{url} {said}")
    assert "\n" not in found.message
    assert "GUIX_CHANNELS" in found.fix


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1/x", "Connection refused"),
        ("http://127.0.0.1:port/x", "nonnumeric port"),
        ("http://[::1/x", "Invalid IPv6 URL"),
        ("http://127.0.0.1:1/ä", "ascii"),
    ],
)
def test_a_channel_at_no_place_is_one_finding(site: Site, url: str, said: str) -> None:
    pull_from(site, url)
    found = one(site, "channel.*")
    assert found.state == FAILED
    assert said in found.message


def test_each_channel_has_a_finding(site: Site, start: StartServer) -> None:
    pull_from(site, start(GIT).url, start(http("404 Not Found")).url, "git@host.test:guix")
    assert [one(site, f"channel c{number}").state for number in range(3)] == [OK, FAILED, FAILED]


def test_a_token_in_a_channels_url_is_used_and_not_shown(site: Site, start: StartServer) -> None:
    server = start(GIT)
    pull_from(site, server.url.replace("//", f"//me:{PASSWORD}%40x@"), f"ssh://me:{PASSWORD}@h/x")
    found = find(site, "channel.*")
    assert [each.state for each in found] == [OK, FAILED]
    assert PASSWORD not in repr(found)
    assert "Authorization: Basic bWU6aHVudGVyMkB4\r\n" in server.asked[0]


def test_a_token_is_not_taken_along_to_another_server(site: Site, start: StartServer) -> None:
    other = start(GIT)
    server = start(http("302 Found", "", f"Location: {other.url}/"))
    pull_from(site, server.url.replace("//", f"//me:{PASSWORD}@"))
    assert one(site, "channel.*").state == OK
    assert "Authorization" in server.asked[0]
    assert "Authorization" not in other.asked[0]


def test_the_lock_says_what_is_pulled(site: Site, start: StartServer) -> None:
    server = start(GIT)
    pull_from(site, server.url)
    site.lock.write_text(f"(list {channel('c0', server.url, 'a' * 40)})\n")
    assert one(site, "channel.*").state == OK
    site.lock.write_text(f"(list {channel('c0', 'https://else.test', 'a' * 40)})\n")
    found = one(site, "channel.*")
    assert found.state == FAILED
    assert "does not fit GUIX_CHANNELS: c0 is from https://else.test" in found.message
    assert "--update" in found.fix


def test_without_channels_those_of_the_image_are_named(site: Site) -> None:
    site.env["GUIX_CHANNELS"] = ""
    assert one(site, "channel.*").state == NOTE


def test_channels_that_are_computed_are_not_passed_over_in_silence(site: Site) -> None:
    site.write("channels.scm", "%default-channels\n")
    found = one(site, "channel.*")
    assert found.state == NOTE
    assert "computes" in found.message


def test_a_lock_that_cannot_be_read(site: Site) -> None:
    site.lock.write_bytes(b"\xff")
    found = one(site, "channel.*")
    assert (found.state, found.fix) == (FAILED, "write a channels file")


def test_without_a_network_nobody_is_asked(site: Site, start: StartServer) -> None:
    server = start(GIT)
    pull_from(site, server.url)
    site.env.update(NETWORK="none", GUIX_SUBSTITUTE_URLS=server.url)
    found = [*find(site, "channel.*"), *find(site, "substitutes")]
    assert {each.state for each in found} == {NOTE}
    assert "NETWORK=none" in found[1].message
    assert server.asked == []


# --- Places in a container ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file:///srv/guix", "/srv/guix", "/srv"])
def test_a_channel_on_a_mount(site: Site, form: str) -> None:
    site.write("channels/guix/HEAD", "")
    site.env["MOUNTS"] = "channels:/srv/:ro"
    pull_from(site, form)
    found = one(site, "channel.*")
    assert found.state == OK
    assert str(site.directory / "channels") in found.message


def test_a_channel_that_its_mount_does_not_have(site: Site) -> None:
    site.env["MOUNTS"] = "context:/srv"
    pull_from(site, "file:///srv/guix")
    found = one(site, "channel.*")
    assert (found.state, found.fix) == (FAILED, "correct MOUNTS")
    assert str(site.directory / "context" / "guix") in found.message


@pytest.mark.parametrize("mounts", ["", "context:/srv/gui", "context:/other"])
def test_a_channel_that_no_mount_brings(site: Site, mounts: str) -> None:
    site.env["MOUNTS"] = mounts
    pull_from(site, "file:///srv/guix")
    assert one(site, "channel.*").state == NOTE


@pytest.mark.parametrize("mounts", ["outer:/srv inner:/srv/in", "inner:/srv/in outer:/srv"])
def test_the_mount_below_another_is_the_one_that_is_seen(site: Site, mounts: str) -> None:
    site.write("inner/guix/HEAD", "")
    site.write("outer/file", "")
    site.env["MOUNTS"] = mounts
    pull_from(site, "file:///srv/in/guix")
    assert one(site, "channel.*").state == OK


# --- Substitutes ----------------------------------------------------------------------------


def serve(site: Site, *urls: str, keys: bool = True) -> None:
    site.env.update(NETWORK="", GUIX_SUBSTITUTE_URLS=" ".join(urls))
    site.write("a.pub", "(public-key)")
    site.env["GUIX_SUBSTITUTE_KEYS"] = "a.pub" if keys else ""


def test_a_substitute_server_that_answers(site: Site, start: StartServer) -> None:
    server = start(CACHE)
    serve(site, f"{server.url}/")
    assert one(site, "substitutes") == Finding(OK, f"{server.url} answers")
    assert server.asked[0].startswith("GET /nix-cache-info HTTP/1.1\r\n")


def test_a_substitute_server_that_answers_badly(site: Site, bad: tuple[str, str]) -> None:
    url, said = bad
    serve(site, url)
    found = one(site, "substitutes")
    assert found.state == FAILED
    assert found.message.startswith(f"{url} {said}")
    assert "GUIX_SUBSTITUTE_URLS" in found.fix


def test_a_substitute_server_that_is_down(site: Site) -> None:
    serve(site, "http://127.0.0.1:1")
    assert "Connection refused" in one(site, "substitutes").message


def test_a_substitute_server_without_a_key_is_noted(site: Site, start: StartServer) -> None:
    serve(site, start(CACHE).url, keys=False)
    note = one(site, "substitutes")
    assert note.state == NOTE
    assert note.message.endswith(" answers, but no key is set for it")
    assert "GUIX_SUBSTITUTE_KEYS" in note.fix


KEY = "(public-key (ecc (curve Ed25519) (q #D0#)))"


def add_to_base(site: Site, path: str, content: bytes) -> None:
    """Add a file to the base stage, in a layer that other sites do not share."""
    layer = site.image("base").layers[0]
    site.engine._files[layer] = {**site.engine._files[layer], path: content}


@pytest.mark.parametrize("trusts", ["nobody", "image", "setting"])
def test_a_substitute_server_that_shows_its_key(
    made: Site, start: StartServer, trusts: str
) -> None:
    server = start(CACHE + KEY.encode())
    serve(made, server.url, keys=False)
    if trusts == "setting":
        made.write("a.pub", KEY)
        made.env["GUIX_SUBSTITUTE_KEYS"] = "a.pub"
    if trusts == "image":
        add_to_base(made, guix.ACL, f"(acl {KEY})".encode())
    found = one(made, "substitutes")
    assert any(line.startswith("GET /signing-key.pub ") for line in server.asked)
    if trusts == "nobody":
        assert found.message == f"{server.url} answers, but the image does not trust its key"
        assert (found.state, "GUIX_SUBSTITUTE_KEYS" in found.fix) == (FAILED, True)
    else:
        assert found == Finding(OK, f"{server.url} answers")
    assert made.engine.all_containers == {}


@pytest.mark.parametrize(("services", "state"), [(b"", FAILED), (b"https 443/tcp\n", NOTE)])
def test_image_without_ports_of_services_is_found(
    made: Site, monkeypatch: pytest.MonkeyPatch, services: bytes, state: str
) -> None:
    monkeypatch.setattr(servers, "_get", lambda *_: "StoreDir: /gnu/store")
    if services:
        add_to_base(made, "/etc/services", services)
    serve(made, "https://a.test", keys=False)
    found = one(made, "substitutes")
    assert found.state == state
    assert ("install the package netbase" in found.fix) == (state == FAILED)


@pytest.mark.parametrize("slash", ["", "/"])
def test_guix_own_servers_need_no_key(site: Site, slash: str) -> None:
    site.env["GUIX_SUBSTITUTE_URLS"] = f"{DEFAULT_SUBSTITUTE_URLS[0]}{slash}"
    assert "unreachable" in one(site, "substitutes").message


def test_guix_own_servers_are_asked_where_none_are_set(site: Site) -> None:
    asked = [each.message.split()[0] for each in find(site, "substitutes")]
    assert asked == [*DEFAULT_SUBSTITUTE_URLS]


def test_substitutes_on_a_mount_need_what_guix_reads_first(site: Site) -> None:
    site.write("substitutes/x.narinfo", "")
    site.env["MOUNTS"] = "substitutes:/srv"
    serve(site, "file:///srv")
    found = one(site, "substitutes")
    assert found.state == FAILED
    assert "nix-cache-info does not exist" in found.message
    site.write("substitutes/nix-cache-info", "StoreDir: /gnu/store\n")
    assert one(site, "substitutes").state == OK


# --- All of it ------------------------------------------------------------------------------


def test_the_findings_come_in_the_order_of_the_checks(site: Site) -> None:
    found = [name for name, _ in examine_project(site.project(), None)]
    assert found == [
        "engine", "host", "clock", "disk", "base image", "sandbox", "registry", "buildx",
        "channel guix", "substitutes", "substitutes",
    ]  # fmt: skip


def test_an_engine_that_is_gone_in_the_middle_leaves_the_other_findings(site: Site) -> None:
    def gone(_number: int, name: str, _when: str) -> None:
        if name != "image":
            raise EngineError("the Docker Engine does not answer: gone; start it")

    site.engine.fault = gone
    found = dict(examine_project(site.project(), None))
    assert (found["sandbox"].message, found["registry"].message) == (
        ("the Docker Engine does not answer: gone",) * 2
    )
    assert found["sandbox"].fix == "start it"
    assert found["base image"].state == OK
    assert found["buildx"].state == NOTE


def test_a_file_that_may_not_be_read_is_a_finding_of_its_check(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(site, "file:///srv")
    real = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self.name == "a.pub":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    found = one(site, "sandbox")
    assert found.state == FAILED
    assert found.message == f"{site.directory / 'a.pub'}: Permission denied"
    assert site.engine.all_containers == {}


def test_nothing_is_changed_on_the_engine(made: Site) -> None:
    before = (outline(made.engine), dict(made.engine.all_images), made.engine.registry.images)
    examine_project(made.project(), None)
    engine = made.engine
    assert (outline(engine), dict(engine.all_images), engine.registry.images) == before
    assert (engine.all_containers, set(engine.changing_calls())) == (
        {}, {"create", "copy_in", "run", "remove"},
    )  # fmt: skip


def test_a_dry_look_makes_no_container(site: Site) -> None:
    console = Heard()
    project = site.project(TracedEngine(site.engine, console, perform=False))
    found = dict(examine_project(project, None))
    assert "dry run" in found["sandbox"].message
    assert found["registry"].state == OK
    assert site.engine.changing_calls() == []
    assert console.text == ""


FINDINGS = [
    ("engine", Finding(OK, "here")),
    ("clock", Finding(NOTE, "odd", "look")),
    ("disk", Finding(FAILED, "full: ä", "make room")),
]


def test_finding_is_one_line_with_its_fix() -> None:
    console = Heard()
    show(console, FINDINGS, as_json=False)
    assert console.results.getvalue().splitlines() == [
        "ok     engine: here", "note   clock: odd; look", "failed disk: full: ä; make room",
    ]  # fmt: skip


def test_findings_as_json_are_all_of_them() -> None:
    console = Heard()
    show(console, FINDINGS, as_json=True)
    rows = json.loads(console.results.getvalue())
    assert rows[2] == {
        "check": "disk", "state": "failed", "message": "full: ä", "fix": "make room",
    }  # fmt: skip
    assert [row["state"] for row in rows] == ["ok", "note", "failed"]


# --- The task -------------------------------------------------------------------------------


@dataclass
class Done:
    code: object
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows = json.loads(self.out)
        assert isinstance(rows, list)
        return rows


Inv = Callable[..., Done]


@pytest.fixture
def inv(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inv:
    site.write("tasks.py", "")
    monkeypatch.chdir(site.directory)
    monkeypatch.setenv("DOCKER_HOST", "unix:///fake.sock")
    monkeypatch.setattr(podman, "open_engine", lambda _address, _environ: site.engine)
    monkeypatch.setattr(buildx, "find_program", lambda *_: None)

    def call(*argv: str) -> Done:
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
        seen = capsys.readouterr()
        assert "Traceback" not in seen.err
        return Done(code, seen.out, seen.err)

    return call


def test_all_well_is_exit_code_0(inv: Inv) -> None:
    done = inv("doctor")
    assert done.code == 0
    assert done.out.startswith("ok     settings: read\nok     engine: fake at ")
    assert "failed" not in done.out


def test_one_failure_is_exit_code_1(inv: Inv, site: Site) -> None:
    site.engine.registry.refusal = "connection refused; start it"
    done = inv("doctor")
    assert done.code == 1
    failed = [line for line in done.out.splitlines() if line.startswith("failed ")]
    assert failed == [f"failed registry: cannot look up {IMAGE}: connection refused; start it"]


def test_a_note_is_no_failure(inv: Inv, site: Site) -> None:
    site.env["SOMETHING_ELSE"] = "1"
    done = inv("doctor")
    assert done.code == 0
    assert "note   settings: .env:" in done.out
    assert "SOMETHING_ELSE" not in done.err


def test_json_is_all_that_there_is_on_standard_output(inv: Inv, site: Site) -> None:
    site.engine.registry.refusal = "denied"
    done = inv("doctor", "--json")
    assert done.code == 1
    assert [row["check"] for row in done.rows if row["state"] == "failed"] == ["registry"]
    assert done.err == "engine: fake at unix:///fake.sock (fake), Docker 28\n"


def test_settings_that_are_wrong_are_findings(inv: Inv, site: Site) -> None:
    site.env.update(IMAGE="Bad Image", STAGE_MEMORY="much")
    done = inv("doctor", "--json")
    assert done.code == 1
    assert [(row["check"], row["state"]) for row in done.rows] == [("settings", "failed")] * 2
    assert {".env:1: IMAGE", "STAGE_MEMORY"} <= {
        word
        for row in done.rows
        for word in (".env:1: IMAGE", "STAGE_MEMORY")
        if word in row["message"]
    }
    assert site.engine.calls == []


def test_no_engine_is_a_finding(inv: Inv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST")
    done = inv("doctor", "--json")
    assert done.code == 1
    (row,) = done.rows
    assert (row["check"], row["state"]) == ("engine", "failed")
    assert "no Docker Engine on this machine" in row["message"]
    assert "`inv engine.up`" in row["fix"]


def test_an_engine_that_does_not_answer_is_a_finding(
    inv: Inv, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> NoReturn:
        raise EngineError("the Docker Engine at x does not answer: timed out; start it")

    monkeypatch.setattr(site.engine, "info", silent)
    done = inv("doctor")
    assert done.code == 1
    assert done.out.splitlines()[-1] == (
        "failed engine: the Docker Engine at x does not answer: timed out; start it"
    )


def test_the_engine_is_asked_anew_after_other_tasks(
    inv: Inv, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it said of its time when `base` began says nothing of its clock now."""
    opened: list[object] = []

    def open_engine(address: object, _environ: object) -> object:
        opened.append(address)
        return site.engine

    monkeypatch.setattr(podman, "open_engine", open_engine)
    assert inv("base", "doctor").code == 0
    assert len(opened) == 2


def test_no_secret_is_shown(inv: Inv, site: Site) -> None:
    site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    for argv in (["doctor"], ["doctor", "--json"], ["--echo", "doctor"]):
        done = inv(*argv)
        assert done.code == 0
        assert PASSWORD not in done.out + done.err
        assert "some-user" not in done.out + done.err


def test_warm_store_is_checked(made: Site) -> None:
    (volume,) = made.engine.stores
    assert [(found.state, found.message) for found in stores(made)] == [
        ("ok", f"{volume}: the database is intact")
    ]
    made.engine.stores[volume]["damaged"] = {}
    (found,) = stores(made)
    assert found.state == "failed"
    assert "malformed" in found.message
    assert f"docker volume rm {volume}" in found.fix


def test_warm_store_that_is_turned_off_is_a_note(made: Site) -> None:
    made.env["CACHE_VOLUME"] = ""
    (found,) = stores(made)
    assert (found.state, found.fix) == ("note", "set CACHE_VOLUME")


def stores(site: Site) -> list[Finding]:
    return [found for name, found in examine_project(site.project(), None) if name == "store"]
