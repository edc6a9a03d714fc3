"""Fixtures of all unit tests; ``conftest.py`` imports them for pytest."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from fake_buildx import Program
from fake_engine import (
    Site,
    clear_file_cache,
    clear_secrets,
    new_built_site,
    new_site,
    serial_executor,
)

from guix_tasks import files
from guix_tasks.oci import labels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_secrets() -> Iterator[None]:
    """Start each test like a new process, without secrets and cached files."""
    clear_secrets()
    clear_file_cache()
    yield
    clear_secrets()


@pytest.fixture(autouse=True)
def no_ci_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the CI job that runs the tests, because output in CI has folded groups."""
    for name in ("CI", "GITHUB_ACTIONS", "GITLAB_CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_accounts(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hide the registry accounts and the local registry of the user who runs the tests."""
    home = str(tmp_path_factory.getbasetemp() / "nobody")
    monkeypatch.setenv("DOCKER_CONFIG", home)
    monkeypatch.setenv("XDG_DATA_HOME", home)
    monkeypatch.delenv("DOCKER_AUTH_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detach the projects of the tests from Git repositories and checkouts of CI jobs."""
    monkeypatch.setattr(labels, "_repository", lambda _: None)
    for name in ("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def fake_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start ``FakeBuildx`` in place of the program ``docker-buildx``."""
    monkeypatch.setattr(subprocess, "Popen", Program)


@pytest.fixture
def serial_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash files one after the other, because threads slow small tests down."""
    monkeypatch.setattr(files, "ThreadPoolExecutor", serial_executor)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A project without built stages."""
    return new_site(tmp_path)


@pytest.fixture
def built_site(tmp_path: Path) -> Site:
    """A project with all stages built."""
    return new_built_site(tmp_path)
