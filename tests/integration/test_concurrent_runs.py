"""Two concurrent calls of `inv` for one image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker

pytestmark = pytest.mark.engine


def test_second_run_waits_and_names_the_first(
    new_project: NewProject, docker: Docker, tmp_path: Path
) -> None:
    """One user runs both in different directories."""
    shared = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    project = new_project("base")
    other_directory = new_project(repository=project.repository)
    first = project.start("pull", "install", env=shared)
    first.wait_for_output("pull: in a")
    second = other_directory.start("pull", "install", env=shared)
    second.wait_for_output(
        f"waiting for `inv pull` (process {first.process.pid}), which uses {project.image}"
    )
    assert "in a" not in second.output()
    assert [first.process.wait(timeout=300), second.process.wait(timeout=300)] == [0, 0]
    assert "pull: up to date" in second.output()
    assert (first.output() + second.output()).count("install: in a") == 1
    assert project.containers() == []
    assert "Hello" in docker.run(project.image, "hello").stdout


def test_run_waits_for_a_run_of_another_user_of_the_engine(
    new_project: NewProject, docker: Docker
) -> None:
    """The lock is in a container, because the two users share no directory."""
    project = new_project("base", "pull")
    project.ok("pull", "--force")
    caches = [name for name in project.volumes() if "-store-" not in name]
    assert caches
    mounts = [f"--volume={name}:/dev/{number}" for number, name in enumerate(caches)]
    locks = " ".join(f"flock /dev/{number}" for number, _ in enumerate(caches))
    holder = project.container_name()
    docker.ok(
        "run", "--detach", "--name", holder, *mounts, "--entrypoint=sh",
        project.image, "-c", f"{locks} sleep 120",
    )  # fmt: skip
    task = project.start("pull", "--force")
    task.wait_for_output("waiting for another run that uses the caches of this image")
    docker.ok("kill", holder)
    assert task.process.wait(timeout=300) == 0
