"""Two calls of `inv` for one image at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker

pytestmark = pytest.mark.engine


def test_one_waits_and_says_for_whom(
    new_project: NewProject, docker: Docker, tmp_path: Path
) -> None:
    """The same user, in two directories."""
    shared = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = new_project("base")
    second = new_project(repository=first.repository)
    one = first.start("pull", "install", env=shared)
    one.await_output("pull: in a")
    other = second.start("pull", "install", env=shared)
    other.await_output(f"waiting for `inv pull` (process {one.inv.pid}), which uses {first.image}")
    assert "in a" not in other.said()
    assert [one.inv.wait(timeout=300), other.inv.wait(timeout=300)] == [0, 0]
    assert "pull: up to date" in other.said()
    assert (one.said() + other.said()).count("install: in a") == 1
    assert first.containers() == []
    assert "Hello" in docker.run(first.image, "hello").stdout


def test_run_of_another_user_of_the_engine_is_waited_for(
    new_project: NewProject, docker: Docker
) -> None:
    """Its lock is in a container, because the two users have no directory in common."""
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
    waiting = project.start("pull", "--force")
    waiting.await_output("waiting for another run that uses the caches of this image")
    docker.ok("kill", holder)
    assert waiting.inv.wait(timeout=300) == 0
