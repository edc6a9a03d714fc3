"""Mounts and volumes that would keep the results of a stage out of its image are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import one_error

from guix_tasks.bootstrap.base_image import BASE_TAG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Docker

pytestmark = pytest.mark.engine

START = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n"
REASON = " and a commit takes nothing of what is on a"


def test_volume_of_the_dockerfile_is_refused(new_project: NewProject, docker: Docker) -> None:
    project = new_project()
    project.dockerfile(
        f"{START}ARG WHERE=guix\nENV DATA=/data\nLABEL built-for={project.image}\n"
        'VOLUME $DATA /srv\nVOLUME ["/var/$WHERE/db"]\n'
    )
    with project.unharmed():
        error = one_error(project.inv("base", "pull"), 2)
    assert error.startswith("error: context/Dockerfile:7: VOLUME /var/guix/db is in /var/guix,")
    assert REASON in error
    assert (
        docker.ok("image", "ls", "--all", "--quiet", f"--filter=label=built-for={project.image}")
        == ""
    )


@pytest.fixture
def base_with_volume(docker: Docker, new_project: NewProject) -> Iterator[str]:
    """A base image that declares a volume at the store."""
    name = new_project().image.replace(":t", ":base-with-volume")
    container = docker.ok("create", BASE_TAG, "true")
    try:
        docker.ok("commit", "--change=VOLUME /gnu/store/", container, name)
        yield name
        docker("rmi", name)
    finally:
        docker("rm", "--volumes", container)


def test_volume_of_the_base_image_is_refused(
    new_project: NewProject, base_with_volume: str
) -> None:
    project = new_project(BASE_IMAGE=base_with_volume)
    line = [*project.settings].index("BASE_IMAGE") + 1
    with project.unharmed():
        error = one_error(project.inv("install"), 2)
    begin = f"error: project.env:{line}: BASE_IMAGE: {base_with_volume}: its VOLUME /gnu/store"
    assert error.startswith(begin)


def test_image_with_a_volume_cannot_be_changed_by_hand(
    new_project: NewProject, base_with_volume: str
) -> None:
    project = new_project()
    project.docker.ok("tag", base_with_volume, project.image)
    assert one_error(project.inv("run", "--keep", "--", "true"), 2).endswith(
        "base image without it"
    )
    assert project.containers() == []
    assert project.inv("run", "--", "true").returncode == 0


def test_other_volumes_and_mounts_are_allowed(new_project: NewProject) -> None:
    project = new_project(GUIX_SANDBOX="capabilities")
    project.dockerfile(f"{START}VOLUME /data /root/.ssh\n")
    (project.directory / "cache").mkdir()
    project.set(MOUNTS=f"{project.settings['MOUNTS']} cache:/root/.cache")
    project.ok("base", "pull")
    assert (project.directory / "cache" / "guix" / "checkouts").is_dir()
    caches = [name for name in project.volumes() if "-store-" not in name]
    assert [name.rpartition("-")[2] for name in caches] == ["substitutes"]
    current = "/var/guix/profiles/per-user/root/current-guix/bin/guix"
    version = project.docker.run(project.image, current, "--version", options=["--entrypoint="])
    assert version.returncode == 0, version.stderr
