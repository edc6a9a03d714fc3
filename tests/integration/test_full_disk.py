"""A full disk of the engine is reported in one line, and with free space the next run succeeds."""

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
from checked_project import PARENTS, create_checked_project
from harness import expect_error
from isolated_host import create_isolated_host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checked_project import CheckedProject
    from harness import ProjectFactory
    from isolated_host import IsolatedHost
    from soak import Soak

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = [pytest.mark.engine, pytest.mark.soak]

LOG = logging.getLogger(__name__)

SIZE = 3 << 30
"""Bytes of the disk, which is a sparse file."""

STATUS = {"base": (3, 6), "pull": (3, 4), "install": (3, 4), "push": (3, 5)}
"""Exit statuses of tasks: the disk may be full for the engine or for a container."""


@dataclass(frozen=True)
class Disk:
    """A small disk with the data of one engine."""

    directory: Path

    @property
    def ballast(self) -> Path:
        return self.directory / "ballast"

    def free(self) -> int:
        """Return the number of free bytes."""
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize

    def fill(self, room: int) -> None:
        """Leave this many bytes free."""
        # The metadata of the file needs some bytes of the disk itself.
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free() - max(room, 1 << 16))


def mount_disk(host: IsolatedHost) -> Disk:
    """Mount a new disk for the data of an engine that is not running."""
    data, file = host.engine.directory / "data", host.directory / "disk"
    maker = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if maker is None:
        pytest.skip("mkfs.ext4, which makes the disk, is not on this machine")
    data.mkdir()
    with file.open("wb") as disk:
        disk.truncate(SIZE)
    # No blocks are reserved for root, because the engine runs as root.
    host.run(maker, "-q", "-m", "0", str(file))
    try:
        host.run("mount", "-o", "loop", str(file), str(data))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot mount a file as a disk: {error.stderr.decode()}")
    return Disk(Path(f"/proc/{host.namespace_pid}/root{data}"))


@dataclass(frozen=True)
class DiskProject:
    """A project on an engine whose disk can be filled."""

    examined: CheckedProject
    disk: Disk

    def measure(self, stage: str) -> int:
        """Return the maximum number of bytes that a stage needs while it runs."""
        self.examined.prepare(stage)
        least = before = self.disk.free()
        started = self.examined.project.start(stage)
        while not started.has_ended():
            least = min(least, self.disk.free())
            time.sleep(0.01)
        assert started.process.returncode == 0, started.output()
        return before - least

    def run(self, stage: str, room: int) -> bool:
        """Run a stage with this many free bytes, then with enough, and return whether it failed."""
        self.examined.prepare(stage)
        project, before = self.examined.project, self.examined.project.tags()
        self.disk.fill(room)
        try:
            result = project.inv(stage)
            LOG.info("%s with %s bytes left: %s", stage, room, result.stderr[-500:])
            if result.returncode:
                assert result.returncode in STATUS[stage]
                error = expect_error(result, result.returncode)
                assert "the disk is full: `inv status --size`" in error
            self.examined.check(stage, before, run_containers=False)
        finally:
            self.disk.ballast.unlink()
        self.examined.finish(stage)
        return result.returncode != 0


@pytest.fixture(scope="module")
def disk_project(
    programs: Path,
    registry: LocalRegistry,
    factory: ProjectFactory,
    tmp_path_factory: pytest.TempPathFactory,
    soak: Soak,
) -> Iterator[DiskProject]:
    with create_isolated_host(programs) as host:
        disk = mount_disk(host)
        directory = tmp_path_factory.mktemp("disk") / "project"
        rng = soak.rng("full disk")
        examined = create_checked_project(
            host, registry.directory / "root", factory, directory, rng
        )
        examined.project.ok("base", "pull", "install", "push")
        yield DiskProject(examined, disk)


def test_full_disk_is_reported_and_the_next_run_succeeds(
    disk_project: DiskProject, soak: Soak
) -> None:
    rng = disk_project.examined.rng
    stages = [*PARENTS, "push"] if soak.long else ["pull", "install"]
    needed = {stage: disk_project.measure(stage) for stage in stages}
    disk_project.examined.project.ok("base", "pull", "install", "push")
    LOG.info("needed: %s", needed)
    failures: Counter[str] = Counter()
    for turn in range(soak.times(2, 16)):
        stage = stages[turn % len(stages)]
        failures[stage] += disk_project.run(stage, int(needed[stage] * rng.random() ** 2))
    assert failures.total()
    counts = ", ".join(f"{count} in {stage}" for stage, count in failures.items())
    soak.report(
        "a full disk is reported in one line, breaks no tag, and the next run succeeds",
        f"{failures.total()} full disks ({counts})",
    )
