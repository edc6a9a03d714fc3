"""Distribution of tests over processes.

The tests of a module run in one process, and so do all tests on the other image store. Otherwise
each process would create the fixtures of a module, and start the other engine.
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


class FixtureScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Run all tests that share expensive fixtures in one process."""

    def _split_scope(self, nodeid: str) -> str:
        path, _, name = nodeid.partition("::")
        return OTHER_STORE if OTHER_STORE in name else path


def pytest_configure() -> None:
    """Make Ctrl-C interrupt the tests, even in a background job of a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # absent with -p no:xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FixtureScheduling:
    return FixtureScheduling(config, log)


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process runs tests for another process that reports them."""
    return hasattr(config, "workerinput")
