"""Repeated random tests: short in each run, long with ``inv test --soak``.

A test that is marked ``soak`` uses the fixture of that name. It sets the number of repetitions,
provides random numbers, and collects the results, which are printed at the end of the run. The seed
is printed, so that a run can be repeated; all short runs have the same seed.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from parallel import is_worker

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

_KEY = pytest.StashKey["Soak"]()


@dataclass
class Soak:
    """Length, seed and results of the soak tests of a run."""

    long: bool
    seed: int
    reports: dict[str, str] = field(default_factory=dict)

    def times(self, short: int, long: int) -> int:
        """Return the number of repetitions: ``long`` with ``--soak``, otherwise ``short``."""
        return long if self.long else short

    def rng(self, name: str) -> random.Random:
        """Create the random number generator of one test, which other tests do not influence."""
        return random.Random(f"{self.seed} {name}")  # noqa: S311 -- repeatable

    def report(self, promise: str, result: str) -> None:
        """Print at the end of the run how a promise was tested, with numbers."""
        self.reports[promise] = result


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the soak tests for hours")
    parser.addoption("--seed", type=int, help="the seed of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    long, seed = config.getoption("--soak"), config.getoption("--seed")
    if seed is None:
        # Short runs test changes of the code, so each has the same random numbers.
        seed = secrets.randbelow(10**6) if long else 1
    config.stash[_KEY] = Soak(long, seed)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that only a long run contains."""
    if config.stash[_KEY].long:
        return
    long = [item for item in items if item.get_closest_marker("only_soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed of random tests: --seed={config.stash[_KEY].seed}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the results to the process that prints them."""
    if is_worker(session.config):
        session.config.workeroutput["reports"] = session.config.stash[_KEY].reports  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    reports = node.config.stash[_KEY].reports
    for promise, result in getattr(node, "workeroutput", {}).get("reports", {}).items():
        reports[promise] = f"{reports[promise]}; {result}" if promise in reports else result


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> Soak:
    return pytestconfig.stash[_KEY]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    soak = config.stash[_KEY]
    if soak.reports:
        terminalreporter.section(f"tested promises (--seed={soak.seed})")
        for promise, result in soak.reports.items():
            terminalreporter.write_line(f"{promise}: {result}")
