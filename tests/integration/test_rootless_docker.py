"""Rootless Docker: every task, with a registry that the engine reaches."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from harness import Docker, Made, Workshop, eventually
from island import load_image
from rootless_docker import rootless_docker

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
"""What Docker Hub's registry:3 has, on the base image that is here."""

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
    with rootless_docker(programs) as url:
        there = Docker(url, tmp_path_factory.mktemp("docker"))
        load_image(base_image, docker, there)
        directory = tmp_path_factory.mktemp("registry")
        (directory / "Dockerfile").write_text(REGISTRY)
        (directory / "config.yml").write_text(CONFIGURATION)
        shutil.copy2(registry.directory / "root/usr/bin/docker-registry", directory)
        there.ok("build", "--quiet", "--tag=registry:3", str(directory))
        yield there


@pytest.fixture(scope="module")
def made(
    rootless: Docker, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    shop = replace(workshop, docker=rootless)
    project = shop.project(tmp_path_factory.mktemp("rootless") / "project")
    port = f"--port={workshop.registry.rpartition(':')[2]}"
    # The registry of the tests has this port too, on the localhost of this machine.
    project.ok("registry.up", port)
    try:
        yield Made(project, {task: project.ok(task) for task in (*STAGES, "verify", "push")})
    finally:
        project.ok("registry.down", port)
        project.remove()


def test_image_is_made_without_root_and_pushed(made: Made) -> None:
    project = made.project
    assert made.calls["base"].stderr.splitlines()[0].endswith(", rootless")
    assert "install: in a rootless container" in made.calls["install"].stderr
    assert project.docker.run(project.image, "hello").stdout == "Hello, world!\n"
    digest = made.calls["push"].stdout.strip().rpartition("@")[2]
    known = project.docker.ok("image", "inspect", "--format={{json .RepoDigests}}", project.image)
    assert f"{project.repository}@{digest}" in json.loads(known)
    with project.unharmed():
        said = project.ok(*STAGES, "push").stderr
    assert [f"{stage}: up to date" in said for stage in STAGES] == [True] * 3
    assert ", 0 B moved" in said


def test_doctor_finds_the_registry(made: Made) -> None:
    findings = json.loads(made.project.inv("doctor", "--json").stdout)
    states = {finding["check"]: finding["state"] for finding in findings}
    assert [states[check] for check in ("engine", "sandbox", "registry")] == ["ok"] * 3


def test_change_squash_rollback_and_push(made: Made) -> None:
    project = made.project
    before = project.id()
    project.set(GUIX_PACKAGES="greet")
    assert "install: removed hello@" in project.ok("install").stderr
    project.ok("squash", "push")
    assert project.docker.run(project.image, "greet").stdout == "hello from a channel\n"
    project.set(GUIX_PACKAGES="hello greet")
    project.ok("install", "push")
    project.ok("rollback")
    assert project.id() not in (before, project.id("install"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_run_leaves_nothing_and_the_next_one_finishes(made: Made, number: int) -> None:
    project = made.project
    before = project.tags()
    running = project.start("install", "--force")
    eventually(lambda: bool(project.containers()) or running.has_ended(), "a container")
    assert running.signal(number) == (130 if number == signal.SIGINT else -number)
    assert project.tags() == before
    project.ok("install", "--force")
    assert project.containers() == []


def test_clean_removes_the_images(made: Made) -> None:
    project = made.project
    project.ok("clean")
    assert project.tags() == {}
    assert project.volumes() == []
