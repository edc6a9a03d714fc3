"""Each registry gets its own account and no other, whatever the task and the way to it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from harness import Result, builder_environment
from recording_registry import RecordingRegistry, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Project

pytestmark = pytest.mark.engine

TINY = "FROM scratch\nCOPY Dockerfile /\n"
ON_BASE = "ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /again\n"

HOME, CACHE, BASE = "deployer:for-home", "cacher:for-cache", "baser:for-base"


@dataclass
class Site:
    """A project whose image, cache and base image are in three registries."""

    project: Project
    home: RecordingRegistry
    cache: RecordingRegistry
    base: RecordingRegistry
    environment: dict[str, str]

    @property
    def registries(self) -> tuple[RecordingRegistry, ...]:
        return self.home, self.cache, self.base

    def inv(self, *arguments: str) -> Result:
        """Run a task; what the registries were sent is what this task sent."""
        for each in self.registries:
            each.forget()
        return self.project.inv(*arguments, env=self.environment)

    def ok(self, *arguments: str) -> str:
        result = self.inv(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    def sent(self) -> dict[str, set[str]]:
        """The accounts that came to each registry that was asked."""
        names = {"home": self.home, "cache": self.cache, "base": self.base}
        return {name: set(each.seen) for name, each in names.items() if each.requests}


@pytest.fixture(params=["buildx", "classic"])
def site(
    new_project: NewProject, request: pytest.FixtureRequest, engine_host: str
) -> Iterator[Site]:
    """The settings have one account, ``DOCKER_AUTH_CONFIG`` and config.json have the others."""
    with ExitStack() as stack:
        home, cache, base = (stack.enter_context(serving(each)) for each in (HOME, CACHE, BASE))
        _publish(new_project, base)
        username, _, password = home.account.partition(":")
        project = new_project(
            repository=f"{home.host}/team/app",
            CACHE_IMAGE=f"{cache.host}/team/cache",
            BASE_IMAGE=f"{base.host}/team/base:t",
            DOCKER_USERNAME=username,
            DOCKER_PASSWORD=password,
        )
        project.dockerfile(ON_BASE)
        _log_in(project, cache)
        auths = {base.host: {"auth": base.auth}}
        environment = {
            **builder_environment(request.param),
            "DOCKER_AUTH_CONFIG": json.dumps({"auths": auths}),
        }
        yield Site(project, home, cache, base, environment)
        project.docker("rmi", f"{base.host}/team/base:t")


def _publish(new_project: NewProject, base: RecordingRegistry) -> None:
    """Put the base image into its registry, and leave none on the engine."""
    username, _, password = base.account.partition(":")
    account = {"DOCKER_USERNAME": username, "DOCKER_PASSWORD": password}
    project = new_project(repository=f"{base.host}/team/base", **account)
    project.dockerfile(TINY)
    project.ok("base", "push")
    for tag in project.tags():
        project.docker.ok("rmi", f"{project.repository}:{tag}")


def _log_in(project: Project, registry: RecordingRegistry) -> None:
    """Leave the account of a registry where `docker login` does."""
    file = project.directory / "home" / ".docker" / "config.json"
    config = json.loads(file.read_text())
    config["auths"][registry.host] = {"auth": registry.auth}
    file.write_text(json.dumps(config))


def test_doctor_asks_each_registry_with_its_own_account(site: Site) -> None:
    site.ok("doctor")
    assert site.sent() == {"home": {HOME}, "base": {BASE}}


def test_each_registry_gets_its_own_account_from_base_and_push(site: Site) -> None:
    project = site.project
    assert "was not pushed to CACHE_IMAGE" not in site.ok("base")
    assert site.sent() == {"cache": {CACHE}, "base": {BASE}}
    site.ok("status")
    site.ok("push")
    sent = site.sent()
    assert sent.pop("home") == {HOME}
    assert sent.get("base", set()) <= {BASE}
    assert sent.get("cache", set()) <= {CACHE}
    for tag in project.tags():
        project.docker.ok("rmi", f"{project.repository}:{tag}")
    project.docker("rmi", project.settings["BASE_IMAGE"])
    assert "base: taken from" in site.ok("base")
    assert site.sent() == {"cache": {CACHE}, "base": {BASE}}


def test_platforms_are_joined_with_the_account_of_the_image(site: Site) -> None:
    site.project.set(PLATFORMS="linux/amd64", CACHE_IMAGE="")
    site.environment |= builder_environment("buildx")  # which joins them
    site.ok("base", "push")
    assert site.ok("manifest")
    assert site.sent() == {"home": {HOME}}


def test_no_account_goes_where_none_is_for(site: Site) -> None:
    """Not the one of the settings either, which is another registry's, though one is asked for."""
    with serving("nobody:knows-it") as stranger:
        site.project.set(CACHE_IMAGE=f"{stranger.host}/team/cache", BASE_IMAGE="scratch")
        site.project.dockerfile(TINY)
        assert "was not pushed to CACHE_IMAGE" in site.ok("base")
        assert stranger.requests
        assert stranger.seen == set()


@pytest.mark.parametrize("auth", ["", "Zm9v", "abc", "bfxsbGVyOng=", 5])
def test_an_odd_entry_of_dockers_configuration_harms_no_task(
    new_project: NewProject, auth: object
) -> None:
    project = new_project()
    file = project.directory / "home" / ".docker" / "config.json"
    config = {"auths": {"ghcr.io": {"auth": auth}, "a.example": "x"}, "proxies": "x"}
    file.write_text(json.dumps(config))
    for task in ("status", "doctor"):
        result = project.inv(task)
        assert "Traceback" not in result.stderr
        assert "does not answer" not in result.stdout + result.stderr
