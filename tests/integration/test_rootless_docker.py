"""All tasks on rootless Docker, with a registry that the engine can reach."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from harness import (
    BuiltProject,
    Docker,
    ProjectFactory,
    check_cache_is_shared,
    free_port,
    wait_until,
)
from isolated_host import copy_image
from rootless_docker import run_rootless_docker

from guix_tasks.bootstrap.base_image import BASE_TAG
from guix_tasks.stages.images import STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = pytest.mark.engine

REGISTRY = f"""
FROM {BASE_TAG}
COPY docker-registry /bin/registry
COPY config.yml /etc/distribution/
"""
"""Like registry:3 of Docker Hub, but on the base image of the tests."""

CONFIGURATION = """
version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/registry}}
http: {addr: ":5000"}
"""


@pytest.fixture(scope="module")
def rootless(
    base_image: str, docker: Docker, programs: Path, registry: LocalRegistry,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Docker]:  # fmt: skip
    with run_rootless_docker(programs) as url:
        rootless_docker = Docker(url, tmp_path_factory.mktemp("docker"))
        copy_image(base_image, docker, rootless_docker)
        directory = tmp_path_factory.mktemp("registry")
        (directory / "Dockerfile").write_text(REGISTRY)
        (directory / "config.yml").write_text(CONFIGURATION)
        shutil.copy2(registry.directory / "root/usr/bin/docker-registry", directory)
        rootless_docker.ok("build", "--quiet", "--tag=registry:3", str(directory))
        yield rootless_docker


@pytest.fixture(scope="module")
def built_project(
    rootless: Docker, factory: ProjectFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BuiltProject]:
    directory = tmp_path_factory.mktemp("rootless") / "project"
    number = free_port()
    project = replace(factory, docker=rootless, registry=f"localhost:{number}").create(directory)
    port = f"--port={number}"
    project.ok("registry.up", port)
    try:
        calls = {task: project.ok(task) for task in (*STAGES, "verify", "push")}
        yield BuiltProject(project, calls)
    finally:
        project.ok("registry.down", port)
        project.remove()


def test_image_is_made_without_root_and_pushed(built_project: BuiltProject) -> None:
    project = built_project.project
    assert built_project.calls["base"].stderr.splitlines()[0].endswith(", rootless")
    assert "install: in a rootless container" in built_project.calls["install"].stderr
    assert project.docker.run(project.image, "hello").stdout == "Hello, world!\n"
    digest = built_project.calls["push"].stdout.strip().rpartition("@")[2]
    known = project.docker.ok("image", "inspect", "--format={{json .RepoDigests}}", project.image)
    assert f"{project.repository}@{digest}" in json.loads(known)
    with project.assert_unchanged():
        log = project.ok(*STAGES, "push").stderr
    assert [f"{stage}: up to date" in log for stage in STAGES] == [True] * 3
    assert ", 0 B moved" in log


def test_doctor_checks_pass(built_project: BuiltProject) -> None:
    findings = json.loads(built_project.project.inv("doctor", "--json").stdout)
    states = {finding["check"]: finding["state"] for finding in findings}
    assert [states[check] for check in ("engine", "sandbox", "registry")] == ["ok"] * 3


def test_cache_is_shared_with_docker(
    built_project: BuiltProject, factory: ProjectFactory, registry: LocalRegistry, tmp_path: Path
) -> None:
    """RootlessKit publishes the port of the registry also on this machine."""
    host = built_project.project.image.partition("/")[0]
    other = replace(factory, registry=host).create(tmp_path / "docker")
    account = registry.account.credentials()
    assert account
    login = ("login", f"--username={account.username}", f"--password={account.password}", host)
    replace(other.docker, directory=other.directory / "home" / ".docker").ok(*login)
    try:
        check_cache_is_shared(built_project.project, other)
    finally:
        other.remove()


def test_change_squash_rollback_and_push_succeed(built_project: BuiltProject) -> None:
    project = built_project.project
    first = project.id()
    project.set(GUIX_PACKAGES="greet")
    assert "install: removed hello@" in project.ok("install").stderr
    project.ok("squash", "push")
    squashed = project.id()
    assert squashed not in (first, project.id("install"))
    assert project.docker.run(project.image, "greet").stdout == "hello from a channel\n"
    project.set(GUIX_PACKAGES="hello greet")
    project.ok("install", "push")
    project.ok("rollback")
    assert project.id() == squashed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_leaves_nothing_after_the_next_run(
    built_project: BuiltProject, number: int
) -> None:
    project = built_project.project
    tags = project.tags()
    task = project.start("install", "--force")
    wait_until(lambda: bool(project.containers()) or task.has_ended(), "a container exists")
    assert task.signal(number) == (130 if number == signal.SIGINT else -number)
    assert project.tags() == tags
    project.ok("install", "--force")
    assert project.containers() == []


def test_clean_removes_images_and_volumes(built_project: BuiltProject) -> None:
    project = built_project.project
    project.ok("clean")
    assert project.tags() == {}
    assert project.volumes() == []
