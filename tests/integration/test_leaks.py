"""No secret is in output, in files and images, or on a command line."""

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
    expect_error,
    repeat_action,
)
from planted_secrets import PLANTED_SECRETS

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

LEAKY_MANIFEST = """
(display (getenv "http_proxy") (current-error-port))
(newline (current-error-port))
(error "no way through" (getenv "http_proxy"))
"""


@contextmanager
def watch_command_lines() -> Iterator[None]:
    """Search the command lines of all processes, including those in containers, for secrets."""
    command_lines: set[bytes] = set()

    def read_command_lines() -> None:
        for pid in service.processes():
            with suppress(OSError):  # the process has ended
                command_lines.add((service.PROC / str(pid) / "cmdline").read_bytes())

    with repeat_action(read_command_lines, 0.005):
        yield
    assert any(b"guix_tasks" in line for line in command_lines), "no command line was read"
    for line in command_lines:
        PLANTED_SECRETS.check("a command line", line)
    PLANTED_SECRETS.command_lines += len(command_lines)


def search_layers(docker: Docker, image: str) -> None:
    """Search the uncompressed layers of `docker save` for secrets."""
    longest = max(map(len, PLANTED_SECRETS.secrets))
    with subprocess.Popen(
        ["docker", f"--host={docker.host}", "save", image], stdout=subprocess.PIPE
    ) as saving:
        assert saving.stdout
        end, size = b"", 0
        while chunk := saving.stdout.read(1 << 24):
            PLANTED_SECRETS.check(f"a layer of {image}", end + chunk)
            end, size = chunk[-longest:], size + len(chunk)
    assert saving.returncode == 0
    assert size > 10_000
    PLANTED_SECRETS.layers += 1


def add_secrets(project: Project) -> Project:
    """Set all kinds of secrets that a project can have."""
    token = PLANTED_SECRETS.plant()
    (project.directory / "npm").write_text(f"{token}\n")
    account = f"me:{PLANTED_SECRETS.plant()}@"
    project.set(
        DOCKER_USERNAME="me",
        DOCKER_PASSWORD=PLANTED_SECRETS.plant(),
        BUILD_SECRETS="npm=npm",
        BUILD_ARGS=f"UNUSED_TOKEN={PLANTED_SECRETS.plant()} http_proxy=http://{account}p.test",
    )
    return project


def proxy_environment() -> dict[str, str]:
    """Return a proxy with an account, which is not used because the tests need no network."""
    return {"http_proxy": f"http://me:{PLANTED_SECRETS.plant()}@127.0.0.1:9", "no_proxy": "*"}


class LeakyRegistry(HttpHandler):
    """A registry whose error messages contain the account of the client in several forms."""

    def do_GET(self) -> None:  # noqa: N802 -- as the base class calls it
        header = self.headers.get("Authorization", "")
        pair = base64.b64decode(header.removeprefix("Basic ")).decode()
        status = 403 if header and self.path != "/v2/" else 200 if header else 401
        message = f"{pair} may not: see https://{pair}@help.test/?token={pair.partition(':')[2]}"
        errors = {"errors": [{"code": "DENIED", "message": f"{message} {header}"}]}
        body = b"{}" if status == 200 else json.dumps(errors).encode()
        self.send_response(status)
        self.send_header("WWW-Authenticate", 'Basic realm="tests"')
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 -- as the base class calls them


@pytest.fixture
def leaky_registry() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), LeakyRegistry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("builder", ["buildx", "classic"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "".join(mode) or "plain")
def test_build_that_prints_secrets_is_redacted(
    new_project: NewProject, mode: tuple[str, ...], builder: str
) -> None:
    project, harmless = add_secrets(new_project()), token_hex(4)  # random, so nothing is cached
    project.set(BUILD_ARGS=f"HARMLESS={harmless} {project.settings['BUILD_ARGS']}")
    has_buildx = builder == "buildx"
    project.write_dockerfile(ECHO + (ECHO_FILE if has_buildx else ""))
    if not has_buildx:
        project.set(BUILD_SECRETS="")
    with watch_command_lines():
        environment = {**proxy_environment(), **builder_environment(builder)}
        result = project.inv(*mode, "base", env=environment)
    assert result.returncode == 0, result.stderr
    assert "the image shows UNUSED_TOKEN to everyone who has the image" in result.stderr
    if mode != ("--dry",):
        assert f"{harmless} proxy http://***@p.test" in result.stderr
        assert ("token ***" in result.stderr) == has_buildx
        search_layers(project.docker, project.tag("base"))
    if mode in (("--echo",), ("--dry",)):
        assert "--build-arg=UNUSED_TOKEN=***" in result.stderr
        assert f"--build-arg=HARMLESS={harmless}" in result.stderr


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "".join(mode) or "plain")
def test_tasks_show_no_secret(
    new_project: NewProject, mode: tuple[str, ...], private_registry: str, soak: Soak
) -> None:
    project = add_secrets(
        new_project("base", "pull", "install", repository=f"{private_registry}/x/leaks")
    )
    project.set(BUILD_ARGS="", BUILD_SECRETS="")
    proxy = proxy_environment()
    script = "echo out $http_proxy; echo err $http_proxy >&2; env"
    with watch_command_lines():
        for arguments in (
            ("install", "--force"),
            ("status", "--size"),
            ("verify",),
            ("doctor", "--json"),
            ("run", "--", "sh", "-c", script),
            ("push",),
            ("buildx.status",),
        ):
            result = project.inv(*mode, *arguments, env=proxy, timeout=480)
            assert "Traceback" not in result.stderr
            if arguments[0] == "run" and mode != ("--dry",):
                assert "out http://me:***@127.0.0.1:9" in result.stdout
                assert "err http://***@127.0.0.1:9" in result.stderr
    for image in project.tags() if soak.long else ():
        search_layers(project.docker, f"{project.repository}:{image}")
    if not soak.long and mode == ():
        search_layers(project.docker, project.image)


def test_running_container_shows_no_secret(new_project: NewProject) -> None:
    project = new_project("base", "pull", "install")
    with watch_command_lines():
        running = project.start(
            "run", "--", "sh", "-c", "echo begin; sleep 60", env=proxy_environment()
        )
        running.wait_for_output("begin")
        (name,) = project.containers()
        PLANTED_SECRETS.check("a running container", project.docker.ok("inspect", name))
        PLANTED_SECRETS.check("its processes", project.docker.ok("top", name))
        PLANTED_SECRETS.containers.add(name)
        assert running.signal(2) == 130


@pytest.mark.parametrize("mode", [(), ("--echo",), ("-d",)], ids=str)
def test_failed_stage_that_prints_secrets_is_redacted(
    new_project: NewProject, mode: tuple[str, ...]
) -> None:
    project = add_secrets(new_project("base", "pull", GUIX_PACKAGES=""))
    project.set(BUILD_ARGS="", BUILD_SECRETS="", GUIX_MANIFEST="leaky.scm")
    (project.directory / "leaky.scm").write_text(LEAKY_MANIFEST)
    result = project.inv(*mode, "install", env=proxy_environment())
    assert result.returncode == 4, result.stderr
    assert "http://***@127.0.0.1:9" in result.stderr
    (directory,) = (project.directory / "out" / "failed").iterdir()
    assert "http://***@127.0.0.1:9" in (directory / "log").read_text()


@pytest.mark.parametrize("mode", [(), ("--echo",), ("-d",)], ids=str)
def test_messages_of_a_registry_are_redacted(
    new_project: NewProject, engine: DockerEngine, leaky_registry: str, mode: tuple[str, ...]
) -> None:
    project = new_project(repository=f"{leaky_registry}/x/leaks")
    project.write_dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    project.ok("base")
    password = PLANTED_SECRETS.plant()
    PLANTED_SECRETS.secrets.add(base64.b64encode(f"me:{password}".encode()))
    account = {"DOCKER_USERNAME": "me", "DOCKER_PASSWORD": password}
    with watch_command_lines():
        push = project.inv(*mode, "push", env=account)
    error = expect_error(push, 5)
    # The containerd image store sends HEAD, whose answer has no message.
    asks_with_head = engine.info().uses_containerd and "403 Forbidden" in error
    assert "*** may not: see https://***@help.test/" in error or asks_with_head
    doctor = project.inv(*mode, "doctor", env=account)
    assert "*** may not" in doctor.stdout


def test_commit_of_a_killed_shell_contains_no_secret(
    new_project: NewProject, docker: Docker
) -> None:
    """While a work container starts, its environment is in one of its files."""
    project = new_project("base", "pull", "install")
    shell = Terminal(project, "shell")
    shell.type("echo 'ready'-now")
    shell.expect("ready-now")
    (name,) = project.containers()
    docker.ok("kill", name)
    shell.end()
    project.ok("commit")
    assert "environment" not in docker.run(project.image, "ls", WORK_DIRECTORY).stdout
    search_layers(docker, project.image)


def test_traceback_of_a_bug_is_redacted(new_project: NewProject) -> None:
    project = new_project("base")
    (project.directory / "tasks.py").write_text(
        "import os\n"
        "from guix_tasks.cli.task import task\n"
        "@task()\n"
        "def bug(session):\n"
        "    session.project()\n"
        "    raise LookupError(os.environ['http_proxy'])\n"
    )
    environment = {**project.environment, **proxy_environment(), "PYTHONPATH": str(ROOT)}
    for mode in ([], ["-d"]):
        argv = [sys.executable, "-m", "invoke", *mode, "bug"]
        result = call(argv, environment, 60, project.directory)
        PLANTED_SECRETS.check_output("a bug", result.stdout, result.stderr)
        assert result.returncode == 1
        assert "LookupError: http://***@127.0.0.1:9" in result.stderr
