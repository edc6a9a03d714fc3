"""After a kill at a random moment, each tag is valid and the next run succeeds."""

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
from checked_project import create_checked_project
from harness import (
    builder_environment,
    check_store,
    error_lines,
    expect_error,
    repeat_action,
    wait_until,
)
from isolated_host import create_isolated_host

from guix_tasks.stages.container import PROJECT_LABEL
from guix_tasks.stages.images import SQUASH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from checked_project import CheckedProject
    from conftest import NewProject
    from harness import ProjectFactory, RunningTask
    from soak import Soak

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = [pytest.mark.engine, pytest.mark.soak]

LOG = logging.getLogger(__name__)

STAGES = {"base": 2, "pull": 2, "install": 8, "push": 6, "commit": 5, SQUASH: 1}
"""Weights of the random choice: long stages are chosen less often."""

DURATIONS = {"commit": 0.5, SQUASH: 8.0}
"""Durations in seconds of the tasks that are only chosen in a long run."""

IN_CONTAINERS = ("pull", "install", SQUASH)

TARGETS = INV, CONTAINER, ENGINE = ("inv", "container", "engine")
SIGNALS = ("SIGINT", "SIGTERM")
STATUS = {CONTAINER: (4,), ENGINE: (3, 5, 6), **dict.fromkeys(SIGNALS, (130,))}
"""Exit statuses of ``inv`` after a kill or a signal."""

OVERHEAD = 0.8
"""Seconds of a stage before its container is created and after it is removed."""

STOP_SECONDS = 10.0
"""Maximum seconds from Ctrl-C to the end of ``inv``."""


@dataclass
class KillableProject:
    """A project with all its stages, and their durations."""

    examined: CheckedProject
    durations: dict[str, float]
    """Seconds of the last run without a kill."""
    slowest: float = 0
    """Maximum seconds from a signal to the end of ``inv``."""

    def choose(self, stages: Iterable[str]) -> str:
        known = [stage for stage in stages if stage in self.durations]
        return self.examined.rng.choices(known, [STAGES[stage] for stage in known])[0]

    def choose_moment(self, stage: str, overhead: float) -> float:
        """Choose a time in seconds; the end of a stage, with its commit, is chosen more often."""
        first = self.examined.rng.choice([0.0, 0.7])
        return max(0, self.durations[stage] - overhead) * self.examined.rng.uniform(first, 1.05)

    def disturb(self, target: str, stage: str) -> bool:
        """Kill a target during a stage, run it again, and return whether the kill was in time."""
        examined, project = self.examined, self.examined.project
        examined.prepare(stage)
        before = project.tags()
        start = time.monotonic()
        temporary = project.directory / "tmp"
        temporary.mkdir(exist_ok=True)
        started = project.start(stage, env={"TMPDIR": str(temporary)})
        moment = self.choose_moment(stage, overhead=OVERHEAD if target == CONTAINER else 0)
        if target == CONTAINER:
            wait_until(lambda: self.running_containers() != [] or started.has_ended(), "container")
        elif target in SIGNALS:
            # Python itself is still starting before this line.
            started.wait_for_output("engine: ")
        in_time = started.is_running_after(moment) and self.kill(target, started)
        stop = time.monotonic()
        status = started.process.wait(timeout=60)
        assert_no_password(temporary, self.examined.host.registry)
        seconds = time.monotonic() - stop
        late_statuses = (1, -signal.Signals[target]) if target in SIGNALS else ()
        if status in late_statuses and not error_lines(started.output()):
            in_time = False  # the work was done, and Python was about to end
        case = f"{target} {moment:.2f} s into {stage}: {status} after {seconds:.2f} s"
        if in_time:
            LOG.info("%s %s", case, error_lines(started.output()))
            assert "Traceback" not in started.output(), f"{case}: {started.output()}"
            self.check_end(target, status, seconds, started)
        elif status == 0:
            # Durations change with the load of the machine.
            self.durations[stage] = stop - start
        if not examined.host.engine.running():
            examined.host.ok("engine.up")
        examined.check(stage, before)
        examined.finish(stage)
        return in_time

    def check_end(self, target: str, status: int, seconds: float, started: RunningTask) -> None:
        """Check the exit status and the duration of ``inv`` after a kill."""
        if target in SIGNALS:
            self.slowest = max(self.slowest, seconds)
            # The container that waits for `commit` is kept.
            names = self.examined.project.containers()
            assert [name for name in names if "-kept-" not in name] == []
            assert seconds < STOP_SECONDS
        if target == INV:
            assert status == -signal.SIGKILL
        elif status:
            assert status in STATUS[target], started.output()
            assert len(error_lines(started.output())) == 1, started.output()

    def running_containers(self) -> list[str]:
        """Return the work containers that run."""
        label = {PROJECT_LABEL: self.examined.project.image}
        containers = self.examined.engine.containers(label)
        return [container.id for container in containers if container.running]

    def kill(self, target: str, started: RunningTask) -> bool:
        """Kill the target, and return whether it was still running."""
        docker = self.examined.project.docker
        in_time = not started.has_ended()
        if target == CONTAINER:
            results = [docker("kill", container) for container in self.running_containers()]
            return any(result.returncode == 0 for result in results)
        if target == ENGINE:
            self.examined.host.kill_engine()
        else:
            started.process.send_signal(signal.SIGKILL if target == INV else signal.Signals[target])
        return in_time


def assert_no_password(directory: Path, registry: LocalRegistry) -> None:
    """Check that no file of a temporary directory contains the password of a registry."""
    account = registry.account.credentials()
    assert account
    pair = f"{account.username}:{account.password}".encode()
    secrets = {account.password.encode(), base64.b64encode(pair)}
    # The process that removes directories after a kill needs a moment.
    wait_until(
        lambda: not any(contains(file, secrets) for file in directory.rglob("*")), "no password", 5
    )


def contains(path: Path, secrets: set[bytes]) -> bool:
    try:
        return path.is_file() and any(secret in path.read_bytes() for secret in secrets)
    except OSError:  # the file was removed meanwhile
        return False


@pytest.fixture(scope="module")
def killable_project(
    programs: Path,
    registry: LocalRegistry,
    factory: ProjectFactory,
    tmp_path_factory: pytest.TempPathFactory,
    soak: Soak,
) -> Iterator[KillableProject]:
    with create_isolated_host(programs) as host:
        directory = tmp_path_factory.mktemp("kills") / "project"
        rng = soak.rng("kills")
        examined = create_checked_project(
            host, registry.directory / "root", factory, directory, rng
        )
        durations = dict(DURATIONS) if soak.long else {}
        for stage in ("base", "pull", "install", "push"):
            start = time.monotonic()
            examined.project.ok(stage)
            durations[stage] = time.monotonic() - start
        yield KillableProject(examined, durations)


SLOW = "ARG BASE_IMAGE\nFROM $BASE_IMAGE\nRUN echo under-way && sleep 30\n"


def test_killed_base_leaves_no_password(
    new_project: NewProject, registry: LocalRegistry, tmp_path: Path
) -> None:
    """There is none during the build either: buildx has the account in its environment."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    project = new_project()
    project.write_dockerfile(SLOW)
    environment = {**builder_environment("buildx"), "TMPDIR": str(temporary)}
    started = project.start("base", env=environment)
    started.wait_for_output("under-way")
    account = registry.account.credentials()
    assert account
    pair = base64.b64encode(f"{account.username}:{account.password}".encode())
    assert [file for file in temporary.rglob("*") if contains(file, {pair})] == []
    assert started.signal(signal.SIGKILL) == -signal.SIGKILL
    assert_no_password(temporary, registry)
    wait_until(lambda: list(temporary.iterdir()) == [], "the end of the temporary directory", 10)


@pytest.mark.both_stores
def test_random_kills_leave_valid_tags(killable_project: KillableProject, soak: Soak) -> None:
    examined = killable_project.examined
    killed: Counter[str] = Counter()
    stopped: Counter[str] = Counter()
    while killed.total() < soak.times(3, 100):
        target = examined.rng.choice([*TARGETS * 2, *SIGNALS])
        stage = killable_project.choose(IN_CONTAINERS if target == CONTAINER else STAGES)
        if killable_project.disturb(target, stage):
            (stopped if target in SIGNALS else killed)[f"{target} in {stage}"] += 1
    examined.finish("base")
    examined.check_hello()
    check_store(examined.project.docker, examined.project.image)
    soak.report(
        "kills at random moments break no tag and leave nothing, and the next run succeeds",
        f"{killed.total()} kills ({format_counts(killed)})",
    )
    soak.report(
        "Ctrl-C ends the container within seconds and exits 130",
        f"{stopped.total()} signals ({format_counts(stopped)}), "
        f"the slowest {killable_project.slowest:.1f} s",
    )


def test_prune_in_a_loop_moves_no_wrong_tag(killable_project: KillableProject, soak: Soak) -> None:
    """A cron job can remove stopped containers and images without a name at any moment."""
    examined, project = killable_project.examined, killable_project.examined.project
    statuses: Counter[int] = Counter()
    prune = partial(project.docker, "system", "prune", "--force")
    for _ in range(soak.times(3, 60)):
        stage = killable_project.choose(("base", "pull", "install", "push"))
        examined.prepare(stage if stage != "push" else "install")
        before = project.tags()
        with repeat_action(prune, 0.1):
            result = project.inv(*(("install",) if stage == "push" else ()), stage)
        statuses[result.returncode] += 1
        if result.returncode:
            LOG.info("%s: %s", stage, expect_error(result, result.returncode))
        examined.check("install" if stage == "push" else stage, before)
    examined.finish("base")
    examined.check_hello()
    check_store(project.docker, project.image)
    soak.report("prune in a loop moves no wrong tag", f"{dict(statuses)} runs by exit status")


def format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{case}: {count}" for case, count in sorted(counts.items()))
