"""Pushes to registries that are down, unknown, private or immutable."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from harness import PASSWORD, USER, expect_error, free_port
from recording_registry import run_registry

if TYPE_CHECKING:
    from conftest import NewProject
    from harness import Project

pytestmark = pytest.mark.engine

TINY = "FROM scratch\nCOPY Dockerfile /\n"


def create_tiny(new_project: NewProject, registry: str) -> Project:
    """Create a project with a tiny base stage, and ``IMAGE`` in a registry."""
    project = new_project(repository=f"{registry}/guix-tasks-test/tiny")
    project.write_dockerfile(TINY)
    project.ok("base")
    return project


@pytest.mark.both_stores
def test_push_to_a_registry_that_is_down_suggests_registry_up(new_project: NewProject) -> None:
    project = create_tiny(new_project, f"localhost:{free_port()}")
    with project.assert_unchanged():
        error = expect_error(project.inv("push"), 5)
    assert project.image in error
    assert "connection refused" in error
    assert "inv registry.up" in error


@pytest.mark.both_stores
def test_push_to_an_unknown_registry_names_it(new_project: NewProject) -> None:
    project = create_tiny(new_project, "registry.invalid")
    with project.assert_unchanged():
        error = expect_error(project.inv("push"), 5)
    assert "registry.invalid" in error
    # Without a network the host cannot be looked up.
    assert "there is no such registry: fix the reference" in error or "unreachable" in error


@pytest.mark.parametrize(
    "account",
    [{}, {"DOCKER_USERNAME": USER, "DOCKER_PASSWORD": "wrong-one"}],
    ids=["no-password", "wrong-password"],
)
def test_rejected_account_names_the_settings(
    new_project: NewProject, private_registry: str, account: dict[str, str]
) -> None:
    project = create_tiny(new_project, private_registry)
    with project.assert_unchanged():
        result = project.inv("push", env=account)
    error = expect_error(result, 5)
    assert "DOCKER_USERNAME and DOCKER_PASSWORD" in error
    assert "wrong-one" not in result.stdout + result.stderr


@pytest.mark.parametrize("source", ["environment", "env file", "file"])
def test_password_is_used_and_not_printed(
    new_project: NewProject, private_registry: str, source: str
) -> None:
    project = create_tiny(new_project, private_registry)
    account = {"DOCKER_USERNAME": USER, "DOCKER_PASSWORD": PASSWORD}
    if source == "env file":
        project.set(**account)
    elif source == "file":
        (project.directory / "secret").write_text(f"{PASSWORD}\n")
        account = {"DOCKER_USERNAME": USER, "DOCKER_PASSWORD_FILE": "secret"}
    result = project.inv("--echo", "push", env={} if source == "env file" else account)
    assert result.returncode == 0, result.stderr
    assert re.search(r"@sha256:[0-9a-f]{64}\n$", result.stdout)
    assert PASSWORD not in result.stdout + result.stderr


def test_push_of_immutable_tags_can_be_repeated(new_project: NewProject) -> None:
    """The first push fails between two tags."""
    with run_registry() as registry:
        registry.immutable, registry.rejected_tags = True, {"2.0"}
        project = create_tiny(new_project, registry.host)
        project.set(TAGS="2.0 3.0")
        assert ":2.0" in expect_error(project.inv("push"), 5)
        registry.rejected_tags.clear()
        project.ok("push")
        tags = {name.rpartition(":")[2] for name in registry.manifests if "@" not in name}
        assert tags == {"t", "2.0", "3.0"}
        project.write_dockerfile(f"{TINY}COPY Dockerfile /other\n")
        project.ok("base")
        error = expect_error(project.inv("push"), 5)
        assert "the registry does not allow that a tag is overwritten: choose another tag" in error
