"""No secret in what is said, in what is left, on a command line: whatever says it, and how."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from secrets import token_hex
from typing import TYPE_CHECKING

import pytest
from harness import (
    ROOT,
    Docker,
    HttpHandler,
    Terminal,
    builder_environment,
    call,
    one_error,
    repeated,
)
from planted import PLANTED

from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.base_image import BASE_TAG
from guix_tasks.stages.container import WORK_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Project
    from soak import Soak

    from guix_tasks.engine.docker import DockerEngine

pytestmark = [pytest.mark.engine, pytest.mark.soak]

MODES = [(), ("--echo",), ("--dry",), ("-d",)]

ECHO = f"FROM {BASE_TAG}\nARG HARMLESS\nRUN echo $HARMLESS proxy $http_proxy\n"
ECHO_FILE = "RUN --mount=type=secret,id=npm echo token $(cat /run/secrets/npm) >&2\n"

TELLTALE = """
(display (getenv "http_proxy") (current-error-port))
(newline (current-error-port))
(error "no way through" (getenv "http_proxy"))
"""


@contextmanager
def watched() -> Iterator[None]:
    """Look at the command line of each process of this machine, those in containers too."""
    seen: set[bytes] = set()

    def look() -> None:
        for pid in service.processes():
            with suppress(OSError):  # it has ended
                seen.add((service.PROC / str(pid) / "cmdline").read_bytes())

    with repeated(look, 0.005):
        yield
    assert any(b"guix_tasks" in each for each in seen), "it saw nothing"
    for each in seen:
        PLANTED.look("a command line", each)
    PLANTED.command_lines += len(seen)


def look_at_layers(docker: Docker, image: str) -> None:
    """Look through an image as `docker save` writes it, where layers are not compressed."""
    longest = max(map(len, PLANTED.secrets))
    with subprocess.Popen(
        ["docker", f"--host={docker.host}", "save", image], stdout=subprocess.PIPE
    ) as saving:
        assert saving.stdout
        end, size = b"", 0
        while piece := saving.stdout.read(1 << 24):
            PLANTED.look(f"a layer of {image}", end + piece)
            end, size = piece[-longest:], size + len(piece)
    assert saving.returncode == 0
    assert size > 10_000
    PLANTED.layers += 1


def secretive(project: Project) -> Project:
    """A project with all the secrets that there can be."""
    token = PLANTED.plant()
    (project.directory / "npm").write_text(f"{token}\n")
    account = f"me:{PLANTED.plant()}@"
    project.set(
        DOCKER_USERNAME="me",
        DOCKER_PASSWORD=PLANTED.plant(),
        BUILD_SECRETS="npm=npm",
        BUILD_ARGS=f"UNUSED_TOKEN={PLANTED.plant()} http_proxy=http://{account}p.test",
    )
    return project


def with_proxy() -> dict[str, str]:
    """A proxy with an account for what runs in containers: the network is none of these tests'."""
    return {"http_proxy": f"http://me:{PLANTED.plant()}@127.0.0.1:9", "no_proxy": "*"}


class Talkative(HttpHandler):
    """A registry that repeats who came, with the password, in each way that it knows."""

    def do_GET(self) -> None:  # noqa: N802 -- as the base class calls it
        given = self.headers.get("Authorization", "")
        pair = base64.b64decode(given.removeprefix("Basic ")).decode()
        answered = 403 if given and self.path != "/v2/" else 200 if given else 401
        said = f"{pair} may not: see https://{pair}@help.test/?token={pair.partition(':')[2]}"
        errors = {"errors": [{"code": "DENIED", "message": f"{said} {given}"}]}
        body = b"{}" if answered == 200 else json.dumps(errors).encode()
        self.send_response(answered)
        self.send_header("WWW-Authenticate", 'Basic realm="tests"')
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 -- as the base class calls them


@pytest.fixture
def talkative() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Talkative) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("builder", ["buildx", "classic"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "".join(mode) or "plain")
def test_a_build_that_shows_its_secrets(
    new_project: NewProject, mode: tuple[str, ...], builder: str
) -> None:
    project, nothing = secretive(new_project()), token_hex(4)  # for no cache has that
    project.set(BUILD_ARGS=f"HARMLESS={nothing} {project.settings['BUILD_ARGS']}")
    has_buildx = builder == "buildx"
    project.dockerfile(ECHO + (ECHO_FILE if has_buildx else ""))
    if not has_buildx:
        project.set(BUILD_SECRETS="")
    with watched():
        made = project.inv(*mode, "base", env={**with_proxy(), **builder_environment(builder)})
    assert made.returncode == 0, made.stderr
    assert "the image shows UNUSED_TOKEN to everyone who has the image" in made.stderr
    if mode != ("--dry",):
        assert f"{nothing} proxy http://***@p.test" in made.stderr
        assert ("token ***" in made.stderr) == has_buildx
        look_at_layers(project.docker, project.tag("base"))
    if mode in (("--echo",), ("--dry",)):
        assert "--build-arg=UNUSED_TOKEN=***" in made.stderr
        assert f"--build-arg=HARMLESS={nothing}" in made.stderr


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "".join(mode) or "plain")
def test_the_tasks(new_project: NewProject, mode: tuple[str, ...], locked: str, soak: Soak) -> None:
    project = secretive(new_project("base", "pull", "install", repository=f"{locked}/x/leaks"))
    project.set(BUILD_ARGS="", BUILD_SECRETS="")
    proxy = with_proxy()
    script = "echo out $http_proxy; echo err $http_proxy >&2; env"
    with watched():
        for call_ in (
            ("install", "--force"),
            ("status", "--size"),
            ("verify",),
            ("doctor", "--json"),
            ("run", "--", "sh", "-c", script),
            ("push",),
            ("buildx.status",),
        ):
            said = project.inv(*mode, *call_, env=proxy, timeout=480)
            assert "Traceback" not in said.stderr
            if call_[0] == "run" and mode != ("--dry",):
                assert "out http://me:***@127.0.0.1:9" in said.stdout
                assert "err http://***@127.0.0.1:9" in said.stderr
    for image in project.tags() if soak.long else ():
        look_at_layers(project.docker, f"{project.repository}:{image}")
    if not soak.long and mode == ():
        look_at_layers(project.docker, project.image)


def test_a_container_while_it_runs(new_project: NewProject) -> None:
    project = new_project("base", "pull", "install")
    with watched():
        running = project.start("run", "--", "sh", "-c", "echo begin; sleep 60", env=with_proxy())
        running.await_output("begin")
        (name,) = project.containers()
        PLANTED.look("a container that runs", project.docker.ok("inspect", name))
        PLANTED.look("its processes", project.docker.ok("top", name))
        PLANTED.containers.add(name)
        assert running.signal(2) == 130


@pytest.mark.parametrize("mode", [(), ("--echo",), ("-d",)], ids=str)
def test_a_stage_that_shows_its_environment_and_fails(
    new_project: NewProject, mode: tuple[str, ...]
) -> None:
    project = secretive(new_project("base", "pull", GUIX_PACKAGES=""))
    project.set(BUILD_ARGS="", BUILD_SECRETS="", GUIX_MANIFEST="telltale.scm")
    (project.directory / "telltale.scm").write_text(TELLTALE)
    failed = project.inv(*mode, "install", env=with_proxy())
    assert failed.returncode == 4, failed.stderr
    assert "http://***@127.0.0.1:9" in failed.stderr
    (directory,) = (project.directory / "out" / "failed").iterdir()
    assert "http://***@127.0.0.1:9" in (directory / "log").read_text()


@pytest.mark.parametrize("mode", [(), ("--echo",), ("-d",)], ids=str)
def test_a_registry_that_repeats_who_came(
    new_project: NewProject, engine: DockerEngine, talkative: str, mode: tuple[str, ...]
) -> None:
    project = new_project(repository=f"{talkative}/x/leaks")
    project.dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    project.ok("base")
    password = PLANTED.plant()
    PLANTED.secrets.add(base64.b64encode(f"me:{password}".encode()))
    account = {"DOCKER_USERNAME": "me", "DOCKER_PASSWORD": password}
    with watched():
        refused = project.inv(*mode, "push", env=account)
    error = one_error(refused, 5)
    # The containerd image store asks with HEAD, so that it gets no message.
    asks_with_head = engine.info().uses_containerd and "403 Forbidden" in error
    assert "*** may not: see https://***@help.test/" in error or asks_with_head
    checked = project.inv(*mode, "doctor", env=account)
    assert "*** may not" in checked.stdout


def test_a_shell_that_is_killed_and_committed(new_project: NewProject, docker: Docker) -> None:
    """The environment of a work container is in a file of it, while it starts."""
    project = new_project("base", "pull", "install")
    shell = Terminal(project, "shell")
    shell.type("echo 'ready'-now")
    shell.expect("ready-now")
    (name,) = project.containers()
    docker.ok("kill", name)
    shell.end()
    project.ok("commit")
    assert "environment" not in docker.run(project.image, "ls", WORK_DIRECTORY).stdout
    look_at_layers(docker, project.image)


def test_a_bug(new_project: NewProject) -> None:
    """Its traceback is no reason to show what it is about."""
    project = new_project("base")
    (project.directory / "tasks.py").write_text(
        "import os\n"
        "from guix_tasks.cli.task import task\n"
        "@task()\n"
        "def bug(session):\n"
        "    session.project()\n"
        "    raise LookupError(os.environ['http_proxy'])\n"
    )
    environment = {**project.environment, **with_proxy(), "PYTHONPATH": str(ROOT)}
    for mode in ([], ["-d"]):
        argv = [sys.executable, "-m", "invoke", *mode, "bug"]
        said = call(argv, environment, 60, project.directory)
        PLANTED.look_at_output("a bug", said.stdout, said.stderr)
        assert said.returncode == 1
        assert "LookupError: http://***@127.0.0.1:9" in said.stderr
