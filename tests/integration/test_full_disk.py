"""The disk of the engine is full: one line says so, and with room again the next run finishes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import one_error
from island import raised
from patient import PARENTS, admit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Workshop
    from island import Island
    from patient import ExaminedProject
    from soak import Soak

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = [pytest.mark.engine, pytest.mark.soak]

LOG = logging.getLogger(__name__)

SIZE = 3 << 30
"""Bytes of the disk; what is not used of it takes no room on the disk below it."""

STATUS = {"base": (3, 6), "pull": (3, 4), "install": (3, 4), "push": (3, 5)}
"""What inv may end with: the disk may be full for the engine or for what runs on it."""


@dataclass(frozen=True)
class Disk:
    """A small disk that an engine has to itself."""

    directory: Path

    @property
    def ballast(self) -> Path:
        return self.directory / "ballast"

    def free(self) -> int:
        """The bytes that are left."""
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def fill(self, room: int) -> None:
        """Leave so many bytes."""
        # What fills a disk takes some of it to be written down.
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free() - max(room, 1 << 16))


def put_disk(island: Island) -> Disk:
    """Give an engine that was not started yet a disk of its own for its data."""
    data, file = island.engine.directory / "data", island.directory / "disk"
    maker = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if maker is None:
        pytest.skip("a disk is made with mkfs.ext4, which is not on this machine")
    data.mkdir()
    with file.open("wb") as disk:
        disk.truncate(SIZE)
    # Without the blocks that are kept for root, whose the engine is.
    island.do(maker, "-q", "-m", "0", str(file))
    try:
        island.do("mount", "-o", "loop", str(file), str(data))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no disk can be made of a file here: {error.stderr.decode()}")
    return Disk(Path(f"/proc/{island.holder}/root{data}"))


@dataclass(frozen=True)
class Trial:
    """A project whose engine's disk can be filled."""

    patient: ExaminedProject
    disk: Disk

    def needed(self, stage: str) -> int:
        """The most bytes that a stage takes while it runs."""
        self.patient.prepare(stage)
        least = before = self.disk.free()
        started = self.patient.project.start(stage)
        while not started.has_ended():
            least = min(least, self.disk.free())
            time.sleep(0.01)
        assert started.inv.returncode == 0, started.said()
        return before - least

    def run_out(self, stage: str, room: int) -> bool:
        """Run a stage with so many bytes left, and then with enough; whether they were too few."""
        self.patient.prepare(stage)
        project, before = self.patient.project, self.patient.project.tags()
        self.disk.fill(room)
        try:
            result = project.inv(stage)
            LOG.info("%s with %s bytes left: %s", stage, room, result.stderr[-500:])
            if result.returncode:
                assert result.returncode in STATUS[stage]
                error = one_error(result, result.returncode)
                assert "the disk is full: `inv status --size`" in error
            self.patient.check(stage, before, runs=False)
        finally:
            self.disk.ballast.unlink()
        self.patient.finish(stage)
        return result.returncode != 0


@pytest.fixture(scope="module")
def trial(
    programs: Path,
    registry: LocalRegistry,
    workshop: Workshop,
    tmp_path_factory: pytest.TempPathFactory,
    soak: Soak,
) -> Iterator[Trial]:
    with raised(programs) as island:
        disk = put_disk(island)
        directory = tmp_path_factory.mktemp("disk") / "project"
        chance = soak.chance("full disk")
        patient = admit(island, registry.directory / "root", workshop, directory, chance)
        patient.project.ok("base", "pull", "install", "push")
        yield Trial(patient, disk)


def test_full_disk(trial: Trial, soak: Soak) -> None:
    chance = trial.patient.chance
    stages = [*PARENTS, "push"] if soak.long else ["pull", "install"]
    needed = {stage: trial.needed(stage) for stage in stages}
    trial.patient.project.ok("base", "pull", "install", "push")
    LOG.info("needed: %s", needed)
    full: Counter[str] = Counter()
    for turn in range(soak.times(2, 16)):
        stage = stages[turn % len(stages)]
        full[stage] += trial.run_out(stage, int(needed[stage] * chance.random() ** 2))
    assert full.total()
    found = ", ".join(f"{count} in {stage}" for stage, count in full.items())
    soak.tell(
        "a full disk is told in one line, breaks no tag, and the next run finishes",
        f"{full.total()} full disks ({found})",
    )
