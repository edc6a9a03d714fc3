"""Distribution of tests over processes: a module, and the other image store, stay in one process.

Otherwise pytest-xdist would make the fixtures of a module, and start the other engine, in each.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from xdist.remote import Producer

OTHER_STORE = "other-store"
"""Part of the ID of a test that runs on an engine with the other image store."""


class ByFixtures(LoadScopeScheduling):  # type: ignore[misc]
    """Give a process all tests that share expensive fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        path, _, name = nodeid.partition("::")
        return OTHER_STORE if OTHER_STORE in name else path


def pytest_configure() -> None:
    """Let Ctrl-C reach the tests, also if this is a shell's background job."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # absent with -p no:xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFixtures:
    return ByFixtures(config, log)


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process runs tests for another that reports them."""
    return hasattr(config, "workerinput")
