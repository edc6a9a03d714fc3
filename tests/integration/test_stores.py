"""Both image stores: what reaches a registry, and what is reported of an image."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from island import load_image

if TYPE_CHECKING:
    from conftest import NewProject
    from harness import Docker, Project

    from guix_tasks.bootstrap.registry import LocalRegistry
    from guix_tasks.engine.api import EngineInfo
    from guix_tasks.engine.docker import DockerEngine

pytestmark = [pytest.mark.engine, pytest.mark.both_stores]

TEXT = 4_000_000
"""Bytes that compress well, in the base image."""


def pushed(project: Project, registry: LocalRegistry) -> dict[str, Any]:
    """The manifest that a push leaves in the registry."""
    digest = project.ok("push").stdout.strip().rpartition("sha256:")[2]
    blobs = registry.directory / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256"
    manifest: dict[str, Any] = json.loads((blobs / digest[:2] / digest / "data").read_text())
    return manifest


def compressed_layers(project: Project, registry: LocalRegistry) -> list[int]:
    """The sizes of all layers in the registry, each of which has to be compressed."""
    layers = pushed(project, registry)["layers"]
    kinds = {layer["mediaType"] for layer in layers}
    assert all(kind.endswith(("tar.gzip", "tar+gzip")) for kind in kinds), kinds
    return [layer["size"] for layer in layers]


def test_a_base_that_was_loaded_uncompressed_is_pushed_compressed(
    new_project: NewProject, docker: Docker, machine_docker: Docker, registry: LocalRegistry
) -> None:
    """As `docker save` of the classic store writes it."""
    project = new_project()
    reference = f"{project.repository}-loaded:1"
    archive = project.directory / "text.tar"
    (project.directory / "text").write_text("x" * TEXT)
    subprocess.run(["tar", "-C", project.directory, "-cf", archive, "text"], check=True)
    machine_docker.ok("import", str(archive), reference)
    load_image(reference, machine_docker, docker)
    project.dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /\n")
    project.set(BASE_IMAGE=reference)
    try:
        project.ok("base")
        sizes = compressed_layers(project, registry)
        assert len(sizes) == 2
        assert sum(sizes) < TEXT / 10
        assert "base: up to date" in project.ok("base").stderr
    finally:
        for each in (docker, machine_docker):
            each("rmi", reference)


def test_layers_of_stages_and_of_squash_are_pushed_compressed(
    project: Project, registry: LocalRegistry
) -> None:
    stages = compressed_layers(project, registry)
    project.ok("squash")
    squashed = compressed_layers(project, registry)
    assert len(squashed) == len(stages) - 1
    assert sum(squashed) < sum(stages) * 1.1


def test_status_shows_the_size_that_docker_images_shows(project: Project, docker: Docker) -> None:
    stages = json.loads(project.ok("status", "--json").stdout)["stages"]
    for stage in stages:
        shown = docker.ok("image", "ls", "--format={{.Size}}", stage["image"])
        number = float(shown.rstrip("kMGB"))
        factor = {"kB": 1e3, "MB": 1e6, "GB": 1e9}[shown[-2:]]
        assert stage["size"] == pytest.approx(number * factor, rel=0.01)


def test_bytes_moved_are_reported_or_said_to_be_unknown(project: Project) -> None:
    project.ok("push")
    assert ", 0 B moved" in project.ok("push").stderr
    project.set(GUIX_PACKAGES="greet")
    line = project.ok("install", "push").stderr.splitlines()[-1]
    assert line.startswith("push: ")
    assert " moved, " in line
    assert ", 0 B moved" not in line


def test_doctor_names_the_store(project: Project, engine: DockerEngine) -> None:
    info: EngineInfo = engine.info()
    lines = project.inv("doctor").stdout.splitlines()
    assert next(line for line in lines if "engine: " in line).endswith(info.store)
    assert ("containerd image store" in info.store) == info.uses_containerd
