"""The local registry: it needs its password, and all tasks use it."""

from __future__ import annotations

import http.client
import re
import stat
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from harness import HttpHandler, builder_environment, call, expect_error, free_port

from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.registry import USER, LocalRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project

pytestmark = pytest.mark.engine

TINY = "FROM scratch\nCOPY Dockerfile /\n"


def create_tiny(new_project: NewProject, **settings: str) -> Project:
    """Create a project with a tiny base stage."""
    project = new_project(**settings)
    project.write_dockerfile(TINY)
    project.ok("base")
    return project


def test_requests_without_the_password_are_rejected(
    new_project: NewProject, registry: LocalRegistry, docker: Docker, tmp_path: Path
) -> None:
    project = create_tiny(new_project)
    project.ok("push")
    for path in ("/v2/", "/v2/_catalog", f"/v2/{project.repository.partition('/')[2]}/tags/list"):
        connection = http.client.HTTPConnection("127.0.0.1", registry.port, timeout=5)
        connection.request("GET", path)
        assert connection.getresponse().status == 401
        connection.close()
    without_account = type(docker)(docker.host, tmp_path)
    for verb in ("push", "pull"):
        result = without_account(verb, project.image)
        assert result.returncode
        assert "no basic auth credentials" in result.stderr


def test_only_the_user_can_read_the_password(
    new_project: NewProject, registry: LocalRegistry
) -> None:
    account = registry.account
    secret = account.password_file.read_text()
    assert len(secret) >= 43
    for file in (account.password_file, account.accounts_file):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(registry.directory.stat().st_mode) == 0o700
    assert secret not in account.accounts_file.read_text()
    project = create_tiny(new_project)
    for task in (("--echo", "push"), ("--echo", "base", "--force"), ("doctor",), ("status",)):
        result = project.inv(*task)
        assert secret not in result.stdout + result.stderr
    pid = registry._service.pid()
    assert pid
    for name in ("cmdline", "environ"):
        assert secret.encode() not in (service.PROC / str(pid) / name).read_bytes()


def test_doctor_uses_the_account(new_project: NewProject) -> None:
    match = re.search(r"^ok +registry: (.*)$", new_project().inv("doctor").stdout, re.MULTILINE)
    assert match
    assert match[1].endswith("answers to the account that `inv registry.up` created")


@pytest.mark.both_stores
def test_cache_image_can_be_in_the_local_registry(
    new_project: NewProject, registry: LocalRegistry
) -> None:
    """The account of the settings is that of another registry."""
    cache = f"localhost:{registry.port}/guix-tasks-test/cache-{free_port()}"
    other = {"DOCKER_USERNAME": "somebody", "DOCKER_PASSWORD": "of-another-registry"}
    project = new_project(repository="registry.invalid/x", CACHE_IMAGE=cache, **other)
    project.write_dockerfile(TINY)
    assert "was not pushed to CACHE_IMAGE" not in project.ok("base").stderr
    project.docker.ok("rmi", project.tag("base"), project.tag())
    assert "base: taken from" in project.ok("base").stderr


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_base_image_can_be_in_the_local_registry(
    new_project: NewProject, registry: LocalRegistry, builder: dict[str, str], host: str
) -> None:
    base = create_tiny(new_project)
    base.ok("push")
    for tag in base.tags():
        base.docker.ok("rmi", f"{base.repository}:{tag}")
    reference = base.image.replace("localhost", host)
    project = new_project(BASE_IMAGE=reference)
    project.write_dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /again\n")
    result = project.inv("base", env=builder)
    project.docker("rmi", reference)
    assert result.returncode == 0, result.stderr


def test_manifest_joins_platforms_in_the_local_registry(
    new_project: NewProject, docker: Docker
) -> None:
    project = create_tiny(new_project, PLATFORMS="linux/amd64")
    project.ok("push")
    result = project.inv("manifest", env=builder_environment("buildx"))
    assert result.returncode == 0, result.stderr
    index = result.stdout.strip()
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", index)
    docker.ok("manifest", "inspect", "--insecure", index)


@dataclass
class StoppedRegistry:
    """A registry that is not running, and a project that uses it."""

    project: Project
    port: int


@pytest.fixture
def stopped(
    new_project: NewProject, registry: LocalRegistry, tmp_path: Path
) -> Iterator[StoppedRegistry]:
    port = free_port()
    project = new_project(repository=f"localhost:{port}/guix-tasks-test/tiny")
    project.data = tmp_path / "data"
    directory = project.data / "guix-tasks/registry"
    directory.mkdir(parents=True)
    (directory / "root").symlink_to(registry.directory / "root")
    yield StoppedRegistry(project, port)
    project.ok("registry.down", f"--port={port}")


def test_registry_up_prints_a_working_login_command(
    stopped: StoppedRegistry, docker: Docker, tmp_path: Path
) -> None:
    output = stopped.project.ok("registry.up", f"--port={stopped.port}").stderr
    stopped.project.write_dockerfile(TINY)
    stopped.project.ok("base", "push")
    commands = re.findall(r"^by hand: (docker login -u (\S+) .*)$", output, re.MULTILINE)
    ((command, user),) = commands
    assert user == USER
    other_docker = type(docker)(docker.host, tmp_path / "other")
    login = call(["sh", "-c", command], other_docker.environment, 30)
    assert login.returncode == 0, login.stderr
    other_docker.ok("pull", stopped.project.image)
    output = stopped.project.ok("registry.up", f"--port={stopped.port}").stderr
    assert "already running" in output
    assert command in output


def test_password_is_not_sent_to_another_server(stopped: StoppedRegistry) -> None:
    stopped.project.ok("registry.up", f"--port={stopped.port}")
    stopped.project.ok("registry.down", f"--port={stopped.port}")
    stopped.project.write_dockerfile(TINY)
    stopped.project.ok("base")
    headers: list[str] = []

    class OtherServer(HttpHandler):
        def do_any(self) -> None:
            headers.append(self.headers.get("Authorization", ""))
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = do_any  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", stopped.port), OtherServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        expect_error(stopped.project.inv("push"), 5)
        server.shutdown()
    assert headers
    assert not any(headers)
