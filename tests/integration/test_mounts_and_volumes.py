"""Stages reject mounts and volumes that would keep their results out of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import expect_error

from guix_tasks.bootstrap.base_image import BASE_TAG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Docker

pytestmark = pytest.mark.engine

START = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n"


def test_volume_of_the_dockerfile_is_rejected(new_project: NewProject, docker: Docker) -> None:
    project = new_project()
    project.write_dockerfile(
        f"{START}ARG WHERE=guix\nENV DATA=/data\nLABEL built-for={project.image}\n"
        'VOLUME $DATA /srv\nVOLUME ["/var/$WHERE/db"]\n'
    )
    with project.assert_unchanged():
        error = expect_error(project.inv("base", "pull"), 2)
    assert error.startswith("error: context/Dockerfile:7: VOLUME /var/guix/db is in /var/guix,")
    assert " and a commit takes nothing of what is on a" in error
    label = f"--filter=label=built-for={project.image}"
    assert docker.ok("image", "ls", "--all", "--quiet", label) == ""


@pytest.fixture
def base_with_volume(docker: Docker, new_project: NewProject) -> Iterator[str]:
    """Create a base image that declares a volume at the store."""
    name = new_project().image.replace(":t", ":base-with-volume")
    container = docker.ok("create", BASE_TAG, "true")
    try:
        docker.ok("commit", "--change=VOLUME /gnu/store/", container, name)
        yield name
        docker("rmi", name)
    finally:
        docker("rm", "--volumes", container)


def test_volume_of_the_base_image_is_rejected(
    new_project: NewProject, base_with_volume: str
) -> None:
    project = new_project(BASE_IMAGE=base_with_volume)
    line = [*project.settings].index("BASE_IMAGE") + 1
    with project.assert_unchanged():
        error = expect_error(project.inv("install"), 2)
    start = f"error: project.env:{line}: BASE_IMAGE: {base_with_volume}: its VOLUME /gnu/store"
    assert error.startswith(start)


def test_run_keeps_no_container_of_an_image_with_such_a_volume(
    new_project: NewProject, base_with_volume: str
) -> None:
    project = new_project()
    project.docker.ok("tag", base_with_volume, project.image)
    error = expect_error(project.inv("run", "--keep", "--", "true"), 2)
    assert error.endswith("base image without it")
    assert project.containers() == []
    assert project.inv("run", "--", "true").returncode == 0


def test_other_volumes_and_mounts_are_accepted(new_project: NewProject) -> None:
    project = new_project(GUIX_SANDBOX="capabilities")
    project.write_dockerfile(f"{START}VOLUME /data /root/.ssh\n")
    (project.directory / "cache").mkdir()
    project.set(MOUNTS=f"{project.settings['MOUNTS']} cache:/root/.cache")
    project.ok("base", "pull")
    assert (project.directory / "cache" / "guix" / "checkouts").is_dir()
    caches = [name for name in project.volumes() if "-store-" not in name]
    assert [name.rpartition("-")[2] for name in caches] == ["substitutes"]
    current = "/var/guix/profiles/per-user/root/current-guix/bin/guix"
    version = project.docker.run(project.image, current, "--version", options=["--entrypoint="])
    assert version.returncode == 0, version.stderr
