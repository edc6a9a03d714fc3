"""Fixtures that the unit tests share; ``conftest.py`` lets pytest find them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_engine import Site, made_site, new_site, serial

from guix_tasks import files
from guix_tasks.ui import redact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_secrets() -> Iterator[None]:
    """Each test is a process of its own, to which no secret is known as yet."""
    redact.forget()
    yield
    redact.forget()


@pytest.fixture(autouse=True)
def no_ci_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs the tests: what is said is not folded."""
    for name in ("CI", "GITHUB_ACTIONS", "GITLAB_CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


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
