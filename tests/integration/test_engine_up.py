"""The private engine, for real, where it sees no other: a network and mounts of its own."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import call, eventually, inv_argv, one_error, running

from guix_tasks import paths
from guix_tasks.console import Console
from guix_tasks.docker_engine import DEFAULT_SOCKET, Address, DockerEngine
from guix_tasks.engine import ContainerSpec
from guix_tasks.local import process
from guix_tasks.local.debian import host_suite
from guix_tasks.local.engine import PrivateEngine, answers, mounts_below, private_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Result

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.geteuid() != 0, reason="the private engine needs root"),
    pytest.mark.skipif(host_suite() is None, reason="it is unpacked from Debian's packages"),
]

SLEEP = "98765"


@dataclass(frozen=True)
class Island:
    """A place on this machine where no engine is."""

    folder: Path
    holder: int

    @property
    def engine(self) -> PrivateEngine:
        return PrivateEngine(self.folder / "guix-tasks" / "engine")

    def inv(self, *arguments: str, **environment: str) -> Result:
        """The command line, with nothing that says where an engine is."""
        own = {"HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder)}
        env = {"PATH": os.environ["PATH"], **own, **environment}
        return call([*self.enter, *inv_argv(*arguments)], env, 60)

    def ok(self, *arguments: str) -> str:
        result = self.inv(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stderr

    @property
    def enter(self) -> list[str]:
        place = f"--wd={self.folder}"
        return ["nsenter", f"--target={self.holder}", "--net", "--mount", place, "--"]

    def is_deserted(self) -> bool:
        """Whether nothing of an engine is left but its files."""
        table = Path(f"/proc/{self.holder}/mountinfo").read_text()
        mounts = mounts_below(self.engine.folder, table)
        processes = process.processes_below(self.engine.folder)
        return not mounts and not processes and not sleepers() and not self.engine.socket.exists()


@pytest.fixture(scope="module")
def programs() -> Path:
    """The unpacked packages; those of the engine that is here, or a copy for the tests alone."""
    if private_engine().installed():
        return private_engine().folder / "root"
    kept = PrivateEngine(paths.cache_home() / "tests" / "engine")
    if not kept.installed():
        kept.folder.mkdir(parents=True, exist_ok=True)
        kept._unpack(Console())
    return kept.folder / "root"


@pytest.fixture
def island(programs: Path) -> Iterator[Island]:
    # Not in pytest's folder: the path of a socket has to be short.
    with tempfile.TemporaryDirectory() as folder:
        holder = subprocess.Popen(["unshare", "--net", "--mount", "--", "sleep", "infinity"])
        place = Island(Path(folder), holder.pid)
        (place.folder / "Dockerfile").write_text("FROM scratch\n")
        place.engine.folder.mkdir(parents=True)
        shutil.copytree(programs, place.engine.folder / "root", symlinks=True, copy_function=link)
        eventually(lambda: is_apart(holder.pid), "a network of its own")
        if DEFAULT_SOCKET.exists():
            hide = ["mount", "--bind", os.devnull, str(DEFAULT_SOCKET)]
            subprocess.run([*place.enter, *hide], check=True)
        yield place
        place.inv("engine.down")
        holder.kill()
        holder.wait()


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy2(source, target)


def is_apart(pid: int) -> bool:
    kinds = ("net", "mnt")
    return all(
        Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
        for kind in kinds
    )


def sleepers() -> list[int]:
    """What runs in the container of these tests."""
    return running("sleep", SLEEP)


def start_container(engine: PrivateEngine) -> None:
    """A container that runs the programs of this machine."""
    client = DockerEngine(Address(engine.url, "test"), {})
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("empty"))
    image = client.import_rootfs(iter([archive.getvalue()]), "island:latest")
    folders = [each for each in ("/usr", "/bin", "/lib", "/lib64") if Path(each).exists()]
    container = client.create(
        ContainerSpec(
            name="island",
            image=image,
            command=("sleep", SLEEP),
            network="none",
            binds=tuple(f"{each}:{each}:ro" for each in folders),
        )
    )
    client.start(container)
    eventually(lambda: sleepers() != [], "the container runs")


def test_up_and_down(island: Island) -> None:
    assert "`inv engine.up`" in one_error(island.inv("status"), 3)
    assert f"started the private engine: {island.engine.url}" in island.ok("engine.up")
    assert f"at {island.engine.url} (private engine)" in island.ok("status")
    assert "runs already" in island.ok("engine.up")
    start_container(island.engine)
    assert "stopped the private engine" in island.ok("engine.down")
    assert island.is_deserted()
    assert "no private engine runs" in island.ok("engine.down")
    assert "`inv engine.up`" in one_error(island.inv("status"), 3)


def test_a_crash_is_mended_by_the_next_up(island: Island) -> None:
    island.ok("engine.up")
    start_container(island.engine)
    daemon = island.engine._daemon.pid()
    assert daemon
    os.kill(daemon, signal.SIGKILL)
    eventually(lambda: not island.engine.running(), "the end of the engine")
    assert "`inv engine.up`" in one_error(island.inv("status"), 3)
    assert "started the private engine" in island.ok("engine.up")
    assert answers(island.engine.socket)
    assert sleepers() == []
    client = DockerEngine(Address(island.engine.url, "test"), {})
    assert client.image("island:latest")
    assert not any(each.running for each in client.containers({}))
    island.ok("engine.down")
    assert island.is_deserted()


def test_a_crash_is_cleared_by_down(island: Island) -> None:
    island.ok("engine.up")
    start_container(island.engine)
    daemon = island.engine._daemon.pid()
    assert daemon
    os.kill(daemon, signal.SIGKILL)
    eventually(lambda: not island.engine.running(), "the end of the engine")
    assert "removed what a private engine left" in island.ok("engine.down")
    assert island.is_deserted()


def test_it_keeps_out_of_the_way_of_another_engine(island: Island) -> None:
    island.ok("engine.up")
    elsewhere = island.folder / "elsewhere"
    elsewhere.mkdir()
    error = one_error(island.inv("engine.up", XDG_DATA_HOME=str(elsewhere)), 3)
    assert f"another Docker Engine is here (process {island.engine._daemon.pid()})" in error
    assert "DOCKER_HOST" in error
    assert answers(island.engine.socket)


def test_a_dry_run_starts_nothing(island: Island) -> None:
    island.ok("--dry", "engine.up")
    assert not island.engine.running()
