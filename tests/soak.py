"""Tests with numbers: short in each run, long with ``inv test --soak``.

A test that is marked ``soak`` takes the fixture of that name: it says how often to try, gives the
chance that is tried with (from a seed that is printed, so that a run can be had again; a short run
has the same each time), and takes down what came of it, which is printed at the end.
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
    """How hard to try, and what has been tried."""

    long: bool
    seed: int
    told: dict[str, str] = field(default_factory=dict)

    def times(self, short: int, long: int) -> int:
        """How often to try: in each run, and with ``--soak``."""
        return long if self.long else short

    def chance(self, what: str) -> random.Random:
        """A source of chance for one test, whatever other tests take."""
        return random.Random(f"{self.seed} {what}")  # noqa: S311 -- to be had again by its seed

    def tell(self, promise: str, tried: str) -> None:
        """Have the end of the run say what was tried of a promise; numbers, please."""
        self.told[promise] = tried


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="try the promises for hours, not seconds")
    parser.addoption("--seed", type=int, help="the seed of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    long, seed = config.getoption("--soak"), config.getoption("--seed")
    if seed is None:
        # A short run is for what changed: it draws the same as the last one did.
        seed = secrets.randbelow(10**6) if long else 1
    config.stash[_KEY] = Soak(long, seed)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed of what is random: --seed={config.stash[_KEY].seed}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over what was tried to the process that reports it."""
    if is_worker(session.config):
        session.config.workeroutput["told"] = session.config.stash[_KEY].told  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    told = node.config.stash[_KEY].told
    for promise, tried in getattr(node, "workeroutput", {}).get("told", {}).items():
        told[promise] = f"{told[promise]}; {tried}" if promise in told else tried


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> Soak:
    return pytestconfig.stash[_KEY]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found = config.stash[_KEY]
    if found.told:
        terminalreporter.section(f"what was promised, and how it was tried (--seed={found.seed})")
        for promise, tried in found.told.items():
            terminalreporter.write_line(f"{promise}: {tried}")
