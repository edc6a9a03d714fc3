"""Any moment can be the last: whatever is killed, each tag is whole, and the next run finishes."""

from __future__ import annotations

import base64
import logging
import signal
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest
from harness import builder_environment, check_store, errors, eventually, one_error, repeated
from island import raised
from patient import admit

from guix_tasks.stages.container import PROJECT_LABEL
from guix_tasks.stages.images import SQUASH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from conftest import NewProject
    from harness import Running, Workshop
    from patient import ExaminedProject
    from soak import Soak

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = [pytest.mark.engine, pytest.mark.soak]

LOG = logging.getLogger(__name__)

STAGES = {"base": 2, "pull": 2, "install": 8, "push": 6, "commit": 5, SQUASH: 1}
"""How often each is drawn: what takes long less often."""

USUAL = {"commit": 0.5, SQUASH: 8.0}
"""The seconds of those that are drawn in a long run alone."""

IN_CONTAINERS = ("pull", "install", SQUASH)

KILLED = INV, CONTAINER, ENGINE = ("inv", "container", "engine")
SIGNALS = ("SIGINT", "SIGTERM")
STATUS = {CONTAINER: (4,), ENGINE: (3, 5, 6), **dict.fromkeys(SIGNALS, (130,))}
"""What inv may end with when one of them is killed, or when it gets a signal."""

STARTING = 0.8
"""Seconds of a stage in which there is no container yet, or no more."""

PROMPT = 10.0
"""Seconds in which Ctrl-C ends everything."""


@dataclass
class Ward:
    """A project with all its stages, and how long each of them takes if nobody disturbs it."""

    patient: ExaminedProject
    usual: dict[str, float]
    """The seconds of the last time that nobody disturbed it."""
    longest: float = 0
    """The most seconds that ``inv`` took to end after a signal."""

    def draw(self, among: Iterable[str]) -> str:
        known = [each for each in among if each in self.usual]
        return self.patient.chance.choices(known, [STAGES[each] for each in known])[0]

    def moment(self, stage: str, within: float) -> float:
        """Seconds into a stage, or what is within it; the end, with its commit, is drawn more."""
        first = self.patient.chance.choice([0.0, 0.7])
        return max(0, self.usual[stage] - within) * self.patient.chance.uniform(first, 1.05)

    def strike(self, who: str, stage: str) -> bool:
        """Kill somebody in the middle of a stage, and run it again; whether it was in time."""
        patient, project = self.patient, self.patient.project
        patient.prepare(stage)
        before = project.tags()
        began = time.monotonic()
        place = project.directory / "tmp"
        place.mkdir(exist_ok=True)
        started = project.start(stage, env={"TMPDIR": str(place)})
        moment = self.moment(stage, within=STARTING if who == CONTAINER else 0)
        if who == CONTAINER:
            eventually(lambda: self.working() != [] or started.has_ended(), "a container")
        elif who in SIGNALS:
            # Before that Python itself is about to start, and nothing is under way.
            started.await_output("engine: ")
        in_time = started.goes_on(moment) and self.kill(who, started)
        stopping = time.monotonic()
        status = started.inv.wait(timeout=60)
        assert_no_password(place, self.patient.island.registry)
        took = time.monotonic() - stopping
        if who in SIGNALS and status in (1, -signal.Signals[who]) and not errors(started.said()):
            in_time = False  # it had done its work, and Python was about to end
        what = f"{who} {moment:.2f} s into {stage}: {status} after {took:.2f} s"
        if in_time:
            LOG.info("%s %s", what, errors(started.said()))
            assert "Traceback" not in started.said(), f"{what}: {started.said()}"
            self.look(who, status, took, started)
        elif status == 0:
            # The machine has other things to do at one time than at another.
            self.usual[stage] = stopping - began
        if not patient.island.engine.running():
            patient.island.ok("engine.up")
        patient.check(stage, before)
        patient.finish(stage)
        return in_time

    def look(self, who: str, status: int, took: float, started: Running) -> None:
        """See how ``inv`` ended that was disturbed."""
        if who in SIGNALS:
            self.longest = max(self.longest, took)
            # What `commit` was to commit is kept until it does.
            left = self.patient.project.containers()
            assert [each for each in left if "-kept-" not in each] == []
            assert took < PROMPT
        if who == INV:
            assert status == -signal.SIGKILL
        elif status:
            assert status in STATUS[who], started.said()
            assert len(errors(started.said())) == 1, started.said()

    def working(self) -> list[str]:
        """The work containers that run."""
        found = self.patient.engine.containers({PROJECT_LABEL: self.patient.project.image})
        return [each.id for each in found if each.running]

    def kill(self, who: str, started: Running) -> bool:
        """Kill, unless that is over which was to be disturbed."""
        docker = self.patient.project.docker
        in_time = not started.has_ended()
        if who == CONTAINER:
            killed = [docker("kill", each).returncode == 0 for each in self.working()]
            return any(killed)
        if who == ENGINE:
            self.patient.island.kill_engine()
        else:
            started.inv.send_signal(signal.SIGKILL if who == INV else signal.Signals[who])
        return in_time


def assert_no_password(place: Path, registry: LocalRegistry) -> None:
    """See that no file of a temporary directory holds the password of a registry."""
    account = registry.account.credentials()
    assert account
    pair = f"{account.username}:{account.password}".encode()
    secrets = {account.password.encode(), base64.b64encode(pair)}
    # What removes directories after a kill needs a moment.
    eventually(lambda: not any(holds(file, secrets) for file in place.rglob("*")), "no password", 5)


def holds(path: Path, secrets: set[bytes]) -> bool:
    try:
        return path.is_file() and any(each in path.read_bytes() for each in secrets)
    except OSError:  # it has just gone
        return False


@pytest.fixture(scope="module")
def ward(
    programs: Path,
    registry: LocalRegistry,
    workshop: Workshop,
    tmp_path_factory: pytest.TempPathFactory,
    soak: Soak,
) -> Iterator[Ward]:
    with raised(programs) as island:
        directory = tmp_path_factory.mktemp("kills") / "project"
        chance = soak.chance("kills")
        patient = admit(island, registry.directory / "root", workshop, directory, chance)
        usual = dict(USUAL) if soak.long else {}
        for stage in ("base", "pull", "install", "push"):
            started = time.monotonic()
            patient.project.ok(stage)
            usual[stage] = time.monotonic() - started
        yield Ward(patient, usual)


SLOW = "ARG BASE_IMAGE\nFROM $BASE_IMAGE\nRUN echo under-way && sleep 30\n"


def test_a_killed_base_leaves_no_password(
    new_project: NewProject, registry: LocalRegistry, tmp_path: Path
) -> None:
    """Not even while the builder still works: buildx has the account from its environment."""
    place = tmp_path / "tmp"
    place.mkdir()
    project = new_project()
    project.dockerfile(SLOW)
    environment = {**builder_environment("buildx"), "TMPDIR": str(place)}
    started = project.start("base", env=environment)
    started.await_output("under-way")
    account = registry.account.credentials()
    assert account
    pair = base64.b64encode(f"{account.username}:{account.password}".encode())
    assert [file for file in place.rglob("*") if holds(file, {pair})] == []
    assert started.signal(signal.SIGKILL) == -signal.SIGKILL
    assert_no_password(place, registry)
    eventually(lambda: list(place.iterdir()) == [], "the end of the temporary directory", 10)


@pytest.mark.both_stores
def test_any_moment_can_be_the_last(ward: Ward, soak: Soak) -> None:
    chance = ward.patient.chance
    killed: Counter[str] = Counter()
    stopped: Counter[str] = Counter()
    while killed.total() < soak.times(3, 100):
        who = chance.choice([*KILLED * 2, *SIGNALS])
        stage = ward.draw(IN_CONTAINERS if who == CONTAINER else STAGES)
        if ward.strike(who, stage):
            (stopped if who in SIGNALS else killed)[f"{who} in {stage}"] += 1
    ward.patient.finish("base")
    ward.patient.works()
    check_store(ward.patient.project.docker, ward.patient.project.image)
    soak.tell(
        "any moment can be the last: no broken tag, nothing left, and the next run finishes",
        f"{killed.total()} kills ({told(killed)})",
    )
    soak.tell(
        "Ctrl-C ends the container within seconds and exits 130",
        f"{stopped.total()} signals ({told(stopped)}), the slowest {ward.longest:.1f} s",
    )


def test_pruning_in_a_loop_moves_no_wrong_tag(ward: Ward, soak: Soak) -> None:
    """A cron job removes containers that do not run and images without a name, at any moment."""
    patient, project = ward.patient, ward.patient.project
    statuses: Counter[int] = Counter()
    with repeated(partial(project.docker, "system", "prune", "--force"), 0.1):
        for _ in range(soak.times(3, 60)):
            stage = ward.draw(("base", "pull", "install", "push"))
            patient.prepare(stage if stage != "push" else "install")
            before = project.tags()
            result = project.inv(*(("install",) if stage == "push" else ()), stage)
            statuses[result.returncode] += 1
            if result.returncode:
                LOG.info("%s: %s", stage, one_error(result, result.returncode))
            patient.check("install" if stage == "push" else stage, before)
    patient.finish("base")
    patient.works()
    check_store(project.docker, project.image)
    soak.tell("pruning in a loop moves no wrong tag", f"{dict(statuses)} runs by exit status")


def told(struck: Counter[str]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in sorted(struck.items()))
