"""Registries that are down, that are not there, and that want to know who it is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from harness import PASSWORD, USER, free_port, one_error
from recording_registry import serving

if TYPE_CHECKING:
    from conftest import NewProject
    from harness import Project

pytestmark = pytest.mark.engine

TINY = "FROM scratch\nCOPY Dockerfile /\n"


def tiny(new_project: NewProject, registry: str) -> Project:
    """A project with a base stage of next to nothing, that goes to a registry."""
    project = new_project(repository=f"{registry}/guix-tasks-test/tiny")
    project.dockerfile(TINY)
    project.ok("base")
    return project


@pytest.mark.both_stores
def test_a_registry_that_is_down(new_project: NewProject) -> None:
    project = tiny(new_project, f"localhost:{free_port()}")
    with project.unharmed():
        error = one_error(project.inv("push"), 5)
    assert project.image in error
    assert "connection refused" in error
    assert "inv registry.up" in error


@pytest.mark.both_stores
def test_a_registry_that_is_unknown(new_project: NewProject) -> None:
    project = tiny(new_project, "registry.invalid")
    with project.unharmed():
        error = one_error(project.inv("push"), 5)
    assert "registry.invalid" in error
    # Without a network nobody knows that there is no such host.
    assert "there is no such registry: fix the reference" in error or "unreachable" in error


@pytest.mark.parametrize(
    "account",
    [{}, {"DOCKER_USERNAME": USER, "DOCKER_PASSWORD": "wrong-one"}],
    ids=["no-password", "wrong-password"],
)
def test_a_registry_that_refuses(
    new_project: NewProject, locked: str, account: dict[str, str]
) -> None:
    project = tiny(new_project, locked)
    with project.unharmed():
        result = project.inv("push", env=account)
    error = one_error(result, 5)
    assert "DOCKER_USERNAME and DOCKER_PASSWORD" in error
    assert "wrong-one" not in result.stdout + result.stderr


@pytest.mark.parametrize("way", ["environment", "env file", "file"])
def test_the_right_password(new_project: NewProject, locked: str, way: str) -> None:
    project = tiny(new_project, locked)
    account = {"DOCKER_USERNAME": USER, "DOCKER_PASSWORD": PASSWORD}
    if way == "env file":
        project.set(**account)
    elif way == "file":
        (project.directory / "secret").write_text(f"{PASSWORD}\n")
        account = {"DOCKER_USERNAME": USER, "DOCKER_PASSWORD_FILE": "secret"}
    result = project.inv("--echo", "push", env={} if way == "env file" else account)
    assert result.returncode == 0, result.stderr
    assert re.search(r"@sha256:[0-9a-f]{64}\n$", result.stdout)
    assert PASSWORD not in result.stdout + result.stderr


def test_a_user_without_a_password_is_not_silently_nobody(
    new_project: NewProject, locked: str
) -> None:
    project = tiny(new_project, locked)
    with project.unharmed():
        error = one_error(project.inv("push", env={"DOCKER_USERNAME": USER}), 2)
    assert "DOCKER_PASSWORD" in error


def test_where_tags_are_immutable_a_push_can_be_repeated(new_project: NewProject) -> None:
    """Also after a push that failed between two tags."""
    with serving() as registry:
        registry.immutable, registry.refused = True, {"2.0"}
        project = tiny(new_project, registry.host)
        project.set(TAGS="2.0 3.0")
        assert ":2.0" in one_error(project.inv("push"), 5)
        registry.refused.clear()
        project.ok("push")
        tags = {name.rpartition(":")[2] for name in registry.manifests if "@" not in name}
        assert tags == {"t", "2.0", "3.0"}
        project.dockerfile(f"{TINY}COPY Dockerfile /another\n")
        project.ok("base")
        error = one_error(project.inv("push"), 5)
        assert "the registry does not allow that a tag is overwritten: choose another tag" in error
