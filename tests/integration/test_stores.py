"""Both image stores: pushed layers, and reported sizes."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from harness import RecordingProxy, expect_error
from isolated_host import copy_image

from guix_tasks.stages.images import LAYERS_MAX

if TYPE_CHECKING:
    from conftest import NewProject
    from harness import Docker, Project, Result

    from guix_tasks.bootstrap.registry import LocalRegistry
    from guix_tasks.engine.api import EngineInfo
    from guix_tasks.engine.docker import DockerEngine

pytestmark = [pytest.mark.engine, pytest.mark.both_stores]

TEXT = 4_000_000
"""Number of bytes of a file in the base image that compresses well."""


def push(project: Project, registry: LocalRegistry) -> dict[str, Any]:
    """Push the image, and return its manifest in the registry."""
    digest = project.ok("push").stdout.strip().rpartition("sha256:")[2]
    blobs = registry.directory / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256"
    manifest: dict[str, Any] = json.loads((blobs / digest[:2] / digest / "data").read_text())
    return manifest


def compressed_layers(project: Project, registry: LocalRegistry) -> list[int]:
    """Push the image, and return the sizes of its layers, which must be compressed."""
    layers = push(project, registry)["layers"]
    kinds = {layer["mediaType"] for layer in layers}
    assert all(kind.endswith(("tar.gzip", "tar+gzip")) for kind in kinds), kinds
    return [layer["size"] for layer in layers]


def test_uncompressed_base_is_pushed_compressed(
    new_project: NewProject, docker: Docker, machine_docker: Docker, registry: LocalRegistry
) -> None:
    """The classic store writes uncompressed archives in `docker save`."""
    project = new_project()
    reference = f"{project.repository}-loaded:1"
    archive = project.directory / "text.tar"
    (project.directory / "text").write_text("x" * TEXT)
    subprocess.run(["tar", "-C", project.directory, "-cf", archive, "text"], check=True)
    machine_docker.ok("import", str(archive), reference)
    copy_image(reference, machine_docker, docker)
    project.write_dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /\n")
    project.set(BASE_IMAGE=reference)
    try:
        project.ok("base")
        sizes = compressed_layers(project, registry)
        assert len(sizes) == 2
        assert sum(sizes) < TEXT / 10
        assert "base: up to date" in project.ok("base").stderr
    finally:
        docker("rmi", reference)
        machine_docker("rmi", reference)


def test_layers_of_stages_and_of_squash_are_pushed_compressed(
    project: Project, registry: LocalRegistry
) -> None:
    stages = compressed_layers(project, registry)
    project.ok("squash")
    squashed = compressed_layers(project, registry)
    assert len(squashed) == len(stages) - 1
    assert sum(squashed) < sum(stages) * 1.1


def test_status_reports_the_same_size_as_docker(project: Project, docker: Docker) -> None:
    stages = json.loads(project.ok("status", "--json").stdout)["stages"]
    for stage in stages:
        size = docker.ok("image", "ls", "--format={{.Size}}", stage["image"])
        number = float(size.rstrip("kMGB"))
        factor = {"kB": 1e3, "MB": 1e6, "GB": 1e9}[size[-2:]]
        assert stage["size"] == pytest.approx(number * factor, rel=0.01)


def test_push_reports_the_moved_bytes(project: Project) -> None:
    project.ok("push")
    assert ", 0 B moved" in project.ok("push").stderr
    project.set(GUIX_PACKAGES="greet")
    line = project.ok("install", "push").stderr.splitlines()[-1]
    assert line.startswith("push: ")
    assert " moved, " in line
    assert ", 0 B moved" not in line


def test_image_with_as_many_layers_as_the_classic_store_takes_is_refused(
    new_project: NewProject, docker: Docker, engine: DockerEngine, base_image: str
) -> None:
    if engine.info().uses_containerd:
        pytest.skip("the containerd image store has no limit, and takes a minute for 126 layers")
    project = new_project()

    def layers(image: str) -> int:
        return int(docker.ok("image", "inspect", "--format={{len .RootFS.Layers}}", image))

    def make_base(number: int) -> Result:
        files = range(number - layers(base_image))
        copies = "".join(f"COPY file /copies/{name}\n" for name in files)
        project.write_dockerfile(f"ARG BASE_IMAGE\nFROM $BASE_IMAGE\n{copies}")
        (project.directory / "context" / "file").touch()
        return project.inv("base")

    add_a_layer = ("run", "--keep", "--", "touch", "/made")
    assert make_base(LAYERS_MAX - 1).returncode == 0
    project.ok(*add_a_layer)
    project.ok("commit")
    assert layers(project.image) == LAYERS_MAX
    error = "the image has 125 layers, and 1 more would exceed the 125 of this engine's image store"
    proxy = RecordingProxy(engine.address.url)
    with project.assert_unchanged(), proxy.listen() as host:
        result = project.inv(*add_a_layer, env={"DOCKER_HOST": host})
        assert error in expect_error(result, 2)
        assert [line for line in proxy.requests if not line.startswith("GET ")] == []
        assert error in expect_error(make_base(LAYERS_MAX), 2)


def test_doctor_names_the_image_store(project: Project, engine: DockerEngine) -> None:
    info: EngineInfo = engine.info()
    lines = project.inv("doctor").stdout.splitlines()
    assert next(line for line in lines if "engine: " in line).endswith(info.store)
    assert ("containerd image store" in info.store) == info.uses_containerd
