"""The local registry: who gets in, and that the tasks do, whatever way they go."""

from __future__ import annotations

import http.client
import re
import stat
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from harness import HttpHandler, builder_environment, call, free_port, one_error

from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.registry import USER, LocalRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project

pytestmark = pytest.mark.engine

TINY = "FROM scratch\nCOPY Dockerfile /\n"


def tiny(new_project: NewProject, dockerfile: str = TINY, **settings: str) -> Project:
    project = new_project(**settings)
    project.dockerfile(dockerfile)
    project.ok("base")
    return project


def password(registry: LocalRegistry) -> str:
    return registry.account.password_file.read_text()


def test_nobody_gets_in_without_the_password(
    new_project: NewProject, registry: LocalRegistry, docker: Docker, tmp_path: Path
) -> None:
    project = tiny(new_project)
    project.ok("push")
    for path in ("/v2/", "/v2/_catalog", f"/v2/{project.repository.partition('/')[2]}/tags/list"):
        connection = http.client.HTTPConnection("127.0.0.1", registry.port, timeout=5)
        connection.request("GET", path)
        assert connection.getresponse().status == 401
        connection.close()
    stranger = type(docker)(docker.host, tmp_path)
    for verb in ("push", "pull"):
        refused = stranger(verb, project.image)
        assert refused.returncode
        assert "no basic auth credentials" in refused.stderr


def test_the_password_is_this_users_and_in_no_output(
    new_project: NewProject, registry: LocalRegistry
) -> None:
    secret = password(registry)
    assert len(secret) >= 43
    account = registry.account
    for file in (account.password_file, account.accounts_file):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(registry.directory.stat().st_mode) == 0o700
    assert secret not in account.accounts_file.read_text()
    project = tiny(new_project)
    for task in (("--echo", "push"), ("--echo", "base", "--force"), ("doctor",), ("status",)):
        said = project.inv(*task)
        assert secret not in said.stdout + said.stderr
    pid = registry._service.pid()
    assert pid
    for shown in ("cmdline", "environ"):
        assert secret.encode() not in (service.PROC / str(pid) / shown).read_bytes()


def test_doctor_knows_the_account(new_project: NewProject) -> None:
    said = new_project().inv("doctor").stdout
    found = re.search(r"^ok +registry: (.*)$", said, re.MULTILINE)
    assert found
    assert found[1].endswith("answers to the account that `inv registry.up` created")


@pytest.mark.both_stores
def test_a_cache_there_is_filled_and_taken_from(
    new_project: NewProject, registry: LocalRegistry
) -> None:
    """Though the account of the settings is of another registry."""
    cache = f"localhost:{registry.port}/guix-tasks-test/cache-{free_port()}"
    other = {"DOCKER_USERNAME": "somebody", "DOCKER_PASSWORD": "of-another-registry"}
    project = new_project(repository="registry.invalid/x", CACHE_IMAGE=cache, **other)
    project.dockerfile(TINY)
    assert "was not pushed to CACHE_IMAGE" not in project.ok("base").stderr
    project.docker.ok("rmi", project.tag("base"), project.tag())
    assert "base: taken from" in project.ok("base").stderr


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_base_image_there_is_had(
    new_project: NewProject, registry: LocalRegistry, builder: dict[str, str], host: str
) -> None:
    """By either builder, neither of which has it here."""
    base = tiny(new_project)
    base.ok("push")
    for tag in base.tags():
        base.docker.ok("rmi", f"{base.repository}:{tag}")
    reference = base.image.replace("localhost", host)
    project = new_project(BASE_IMAGE=reference)
    project.dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /again\n")
    made = project.inv("base", env=builder)
    project.docker("rmi", reference)
    assert made.returncode == 0, made.stderr


def test_platforms_are_joined_there(new_project: NewProject, docker: Docker) -> None:
    project = tiny(new_project, PLATFORMS="linux/amd64")
    project.ok("push")
    joining = project.inv("manifest", env=builder_environment("buildx"))
    assert joining.returncode == 0, joining.stderr
    joined = joining.stdout.strip()
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", joined)
    docker.ok("manifest", "inspect", "--insecure", joined)


@dataclass
class Other:
    """A registry that ``inv`` starts, and a project that goes there."""

    project: Project
    port: int

    @property
    def local(self) -> LocalRegistry:
        return LocalRegistry(self.project.data / "guix-tasks/registry", self.port)


@pytest.fixture
def other(new_project: NewProject, registry: LocalRegistry, tmp_path: Path) -> Iterator[Other]:
    """A registry of its own, with a directory of its own, that ``inv`` starts."""
    port = free_port()
    project = new_project(repository=f"localhost:{port}/guix-tasks-test/tiny")
    project.data = tmp_path / "data"
    directory = project.data / "guix-tasks/registry"
    directory.mkdir(parents=True)
    (directory / "root").symlink_to(registry.directory / "root")
    yield Other(project, port)
    project.ok("registry.down", f"--port={port}")


def test_by_hand_as_registry_up_says(other: Other, docker: Docker, tmp_path: Path) -> None:
    said = other.project.ok("registry.up", f"--port={other.port}").stderr
    other.project.dockerfile(TINY)
    other.project.ok("base", "push")
    by_hand = re.findall(r"^by hand: (docker login -u (\S+) .*)$", said, re.MULTILINE)
    ((line, user),) = by_hand
    assert user == USER
    hand = type(docker)(docker.host, tmp_path / "by-hand")
    login = call(["sh", "-c", line], hand.environment, 30)
    assert login.returncode == 0, login.stderr
    hand.ok("pull", other.project.image)
    again = other.project.ok("registry.up", f"--port={other.port}").stderr
    assert "already running" in again
    assert line in again


def test_who_listens_there_instead_is_not_told_the_password(other: Other) -> None:
    other.project.ok("registry.up", f"--port={other.port}")
    other.project.ok("registry.down", f"--port={other.port}")
    other.project.dockerfile(TINY)
    other.project.ok("base")
    asked: list[str] = []

    class Stranger(HttpHandler):
        def do_any(self) -> None:
            asked.append(self.headers.get("Authorization", ""))
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = do_any  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", other.port), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        one_error(other.project.inv("push"), 5)
        server.shutdown()
    assert asked
    assert not any(asked)
