"""A place of its own on this machine, for an engine that a test may kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import Docker, Workshop, call, eventually, inv_argv

from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.apt import host_suite
from guix_tasks.bootstrap.base_image import BASE_TAG
from guix_tasks.bootstrap.engine import PrivateEngine, mounts_below
from guix_tasks.bootstrap.registry import LocalRegistry
from guix_tasks.cli.session import helpers
from guix_tasks.engine.discovery import DEFAULT_SOCKET, Address
from guix_tasks.engine.docker import DockerEngine
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Result

# Of <net/if.h> and <linux/sockios.h>; the program `ip` may not be here.
LOOPBACK_UP = """
import fcntl, socket, struct
with socket.socket() as any:
    fcntl.ioctl(any, 0x8914, struct.pack("16sh", b"lo", 1))
"""


@dataclass(frozen=True)
class Island:
    """A network and mounts of its own, where no engine is but the one that is started there."""

    directory: Path
    holder: int
    store: str = ""
    """The image store of its engine; empty is Docker's default."""

    @property
    def engine(self) -> PrivateEngine:
        return PrivateEngine(self.directory / "guix-tasks" / "engine")

    @property
    def docker(self) -> Docker:
        return Docker(self.engine.url, self.directory / "docker")

    @property
    def registry(self) -> LocalRegistry:
        return LocalRegistry(self.directory / "guix-tasks" / "registry")

    def client(self) -> DockerEngine:
        """The engine, as the product speaks to it."""
        return DockerEngine(Address(self.engine.url, "test"), helpers({}))

    @property
    def environment(self) -> dict[str, str]:
        """Nothing that says where an engine is."""
        own = {
            "HOME": str(self.directory),
            "XDG_DATA_HOME": str(self.directory),
            "ENGINE_IMAGE_STORE": self.store,
        }
        return {"PATH": os.environ["PATH"], **own}

    def inv(self, *arguments: str, **environment: str) -> Result:
        """The command line there."""
        return call([*self.enter, *inv_argv(*arguments)], {**self.environment, **environment}, 240)

    def ok(self, *arguments: str) -> str:
        result = self.inv(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stderr

    def do(self, *argv: str) -> None:
        """Run a program of this machine there."""
        subprocess.run([*self.enter, *argv], check=True, capture_output=True, timeout=240)

    @property
    def enter(self) -> list[str]:
        place = f"--wd={self.directory}"
        return ["nsenter", f"--target={self.holder}", "--net", "--mount", place, "--"]

    def kill_engine(self) -> None:
        """Kill the engine as a lack of memory would."""
        daemon = self.engine._daemon.pid()
        assert daemon
        os.kill(daemon, signal.SIGKILL)
        eventually(lambda: not self.engine.running(), "the end of the engine")

    def is_deserted(self) -> bool:
        """Whether nothing of an engine is left but its files."""
        table = Path(f"/proc/{self.holder}/mountinfo").read_text()
        mounts = mounts_below(self.engine.directory, table)
        processes = service.processes_below(self.engine.directory)
        return not mounts and not processes and not self.engine.socket.exists()


@contextmanager
def raised(programs: Path, store: str = "") -> Iterator[Island]:
    """An island with the unpacked programs of an engine."""
    if os.geteuid() != 0:
        pytest.skip("the private engine needs root")
    if host_suite() is None:
        pytest.skip("it is unpacked from Debian's packages")
    # Not in pytest's directory: the path of a socket has to be short.
    with tempfile.TemporaryDirectory() as directory:
        holder = subprocess.Popen(["unshare", "--net", "--mount", "--", "sleep", "infinity"])
        island = Island(Path(directory), holder.pid, store)
        try:
            _furnish(island, programs)
            yield island
        finally:
            # Not by a task, which wants an engine: a failed test may have killed that.
            island.registry.down(Console())
            island.inv("engine.down")
            holder.kill()
            holder.wait()


def _furnish(island: Island, programs: Path) -> None:
    (island.directory / "Dockerfile").write_text("FROM scratch\n")
    island.engine.directory.mkdir(parents=True)
    shutil.copytree(programs, island.engine.directory / "root", symlinks=True, copy_function=link)
    eventually(lambda: _is_apart(island.holder), "a network of its own")
    island.do(sys.executable, "-c", LOOPBACK_UP)
    if DEFAULT_SOCKET.exists():
        island.do("mount", "--bind", os.devnull, str(DEFAULT_SOCKET))


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy2(source, target)


def _is_apart(pid: int) -> bool:
    kinds = ("net", "mnt")
    return all(
        Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
        for kind in kinds
    )


def settle(island: Island, registry: Path, workshop: Workshop) -> Workshop:
    """Start engine and registry there, copy the base image; what to make projects with.

    ``registry`` are the unpacked programs of one, ``workshop`` is that of the engine that is here.
    """
    island.ok("engine.up")
    return supply(island, registry, workshop)


def supply(island: Island, registry: Path, workshop: Workshop) -> Workshop:
    """The same, where an engine runs there already."""
    start_registry(island, registry)
    load_image(BASE_TAG, workshop.docker, island.docker)
    where = f"localhost:{island.registry.port}"
    return Workshop(island.docker, where, workshop.offline, island.directory)


def start_registry(island: Island, programs: Path) -> None:
    """Start a registry that the engine there reaches, from its unpacked programs."""
    island.registry.directory.mkdir()
    (island.registry.directory / "root").symlink_to(programs)
    island.ok("registry.up")


def load_image(reference: str, source: Docker, target: Docker) -> None:
    """Copy an image from one engine to another, packed as the first engine has it."""
    save = subprocess.Popen(source.argv("save", reference), stdout=subprocess.PIPE)
    subprocess.run(target.argv("load"), stdin=save.stdout, check=True, capture_output=True)
    assert save.wait() == 0
