"""Each registry gets only its own account, from all tasks and builders."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from harness import Result, builder_environment
from recording_registry import RecordingRegistry, run_registry

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
        """Run a task, and record only the accounts that this task sends."""
        for registry in self.registries:
            registry.reset()
        return self.project.inv(*arguments, env=self.environment)

    def ok(self, *arguments: str) -> str:
        result = self.inv(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    def sent_accounts(self) -> dict[str, set[str]]:
        """Return the accounts that each registry with requests received."""
        names = {"home": self.home, "cache": self.cache, "base": self.base}
        return {name: {*server.accounts} for name, server in names.items() if server.requests}


@pytest.fixture(params=["buildx", "classic"])
def site(
    new_project: NewProject, request: pytest.FixtureRequest, engine_host: str
) -> Iterator[Site]:
    """Put the accounts into the settings, ``DOCKER_AUTH_CONFIG`` and config.json."""
    with ExitStack() as stack:
        home, cache, base = (
            stack.enter_context(run_registry(account)) for account in (HOME, CACHE, BASE)
        )
        _publish(new_project, base)
        username, _, password = home.account.partition(":")
        project = new_project(
            repository=f"{home.host}/team/app",
            CACHE_IMAGE=f"{cache.host}/team/cache",
            BASE_IMAGE=f"{base.host}/team/base:t",
            DOCKER_USERNAME=username,
            DOCKER_PASSWORD=password,
        )
        project.write_dockerfile(ON_BASE)
        _log_in(project, cache)
        auths = {base.host: {"auth": base.auth}}
        environment = {
            **builder_environment(request.param),
            "DOCKER_AUTH_CONFIG": json.dumps({"auths": auths}),
        }
        yield Site(project, home, cache, base, environment)
        project.docker("rmi", f"{base.host}/team/base:t")


def _publish(new_project: NewProject, base: RecordingRegistry) -> None:
    """Push the base image to its registry, and remove it from the engine."""
    username, _, password = base.account.partition(":")
    account = {"DOCKER_USERNAME": username, "DOCKER_PASSWORD": password}
    project = new_project(repository=f"{base.host}/team/base", **account)
    project.write_dockerfile(TINY)
    project.ok("base", "push")
    for tag in project.tags():
        project.docker.ok("rmi", f"{project.repository}:{tag}")


def _log_in(project: Project, registry: RecordingRegistry) -> None:
    """Write the account of a registry to the file of `docker login`."""
    file = project.directory / "home" / ".docker" / "config.json"
    config = json.loads(file.read_text())
    config["auths"][registry.host] = {"auth": registry.auth}
    file.write_text(json.dumps(config))


def test_doctor_uses_the_account_of_each_registry(site: Site) -> None:
    site.ok("doctor")
    assert site.sent_accounts() == {"home": {HOME}, "base": {BASE}}


def test_base_and_push_use_the_account_of_each_registry(site: Site) -> None:
    project = site.project
    assert "was not pushed to CACHE_IMAGE" not in site.ok("base")
    assert site.sent_accounts() == {"cache": {CACHE}, "base": {BASE}}
    site.ok("status")
    site.ok("push")
    sent = site.sent_accounts()
    assert sent.pop("home") == {HOME}
    assert sent.get("base", set()) <= {BASE}
    assert sent.get("cache", set()) <= {CACHE}
    for tag in project.tags():
        project.docker.ok("rmi", f"{project.repository}:{tag}")
    project.docker("rmi", project.settings["BASE_IMAGE"])
    assert "base: taken from" in site.ok("base")
    assert site.sent_accounts() == {"cache": {CACHE}, "base": {BASE}}


def test_manifest_uses_the_account_of_the_image(site: Site) -> None:
    site.project.set(PLATFORMS="linux/amd64", CACHE_IMAGE="")
    site.environment |= builder_environment("buildx")
    site.ok("base", "push")
    assert site.ok("manifest")
    assert site.sent_accounts() == {"home": {HOME}}


def test_registry_without_an_account_gets_none(site: Site) -> None:
    """The registry needs an account, but the settings have only that of another registry."""
    with run_registry("unknown:account") as registry:
        site.project.set(CACHE_IMAGE=f"{registry.host}/team/cache", BASE_IMAGE="scratch")
        site.project.write_dockerfile(TINY)
        assert "was not pushed to CACHE_IMAGE" in site.ok("base")
        assert registry.requests
        assert registry.accounts == set()


@pytest.mark.parametrize("auth", ["", "Zm9v", "abc", "bfxsbGVyOng=", 5])
def test_invalid_account_in_the_docker_configuration_is_ignored(
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
