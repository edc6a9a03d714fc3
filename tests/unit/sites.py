"""Fixtures that the unit tests share; ``conftest.py`` lets pytest find them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from fake_buildx import Program
from fake_engine import Site, forget_contents, forget_secrets, made_site, new_site, serial

from guix_tasks import files
from guix_tasks.oci import labels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_secrets() -> Iterator[None]:
    """Each test is a process of its own, which knows no secret and has read no file as yet."""
    forget_secrets()
    forget_contents()
    yield
    forget_secrets()


@pytest.fixture(autouse=True)
def no_ci_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs the tests: what is said is not folded."""
    for name in ("CI", "GITHUB_ACTIONS", "GITLAB_CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_accounts(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The accounts, and the local registry, of whoever runs the tests are not to be found."""
    home = str(tmp_path_factory.getbasetemp() / "nobody")
    monkeypatch.setenv("DOCKER_CONFIG", home)
    monkeypatch.setenv("XDG_DATA_HOME", home)
    monkeypatch.delenv("DOCKER_AUTH_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The projects of the tests are in no git repository, and in no checkout of a CI job."""
    monkeypatch.setattr(labels, "_repository", lambda _: None)
    for name in ("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def fake_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``FakeBuildx`` is a program to whatever starts programs."""
    monkeypatch.setattr(subprocess, "Popen", Program)


@pytest.fixture
def serial_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are hashed one after the other: threads would only make small tests slow."""
    monkeypatch.setattr(files, "ThreadPoolExecutor", serial)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A project of which nothing is made yet."""
    return new_site(tmp_path)


@pytest.fixture
def made(tmp_path: Path) -> Site:
    """A project that has all its stages."""
    return made_site(tmp_path)
