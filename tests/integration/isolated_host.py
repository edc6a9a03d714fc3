"""A separate network and mounts on this machine, for a private engine that tests can kill."""

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
from harness import Docker, ProjectFactory, call, inv_argv, wait_until

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

# The program `ip` may not be installed; 0x8914 is SIOCSIFFLAGS, and 1 is IFF_UP.
LOOPBACK_UP = """
import fcntl, socket, struct
with socket.socket() as any:
    fcntl.ioctl(any, 0x8914, struct.pack("16sh", b"lo", 1))
"""


@dataclass(frozen=True)
class IsolatedHost:
    """Network and mount namespaces without an engine, in which tests start a private engine."""

    directory: Path
    namespace_pid: int
    """A process in the namespaces."""
    store: str = ""
    """The image store of the engine (default: that of Docker)."""

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
        """Return a client of the engine."""
        return DockerEngine(Address(self.engine.url, "test"), helpers({}))

    @property
    def environment(self) -> dict[str, str]:
        """Variables of `inv`, without the address of an engine."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "XDG_DATA_HOME": str(self.directory),
            "ENGINE_IMAGE_STORE": self.store,
        }

    def inv(self, *arguments: str, **environment: str) -> Result:
        argv = [*self.prefix, *inv_argv(*arguments)]
        return call(argv, {**self.environment, **environment}, 240)

    def ok(self, *arguments: str) -> str:
        result = self.inv(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stderr

    def run(self, *argv: str) -> None:
        """Run a program of this machine in the namespaces."""
        subprocess.run([*self.prefix, *argv], check=True, capture_output=True, timeout=240)

    @property
    def prefix(self) -> list[str]:
        """Arguments that run the command after them in the namespaces."""
        namespaces = (f"--target={self.namespace_pid}", "--net", "--mount")
        return ["nsenter", *namespaces, f"--wd={self.directory}", "--"]

    def kill_engine(self) -> None:
        """Kill the engine, as the kernel does when memory runs out."""
        daemon = self.engine._daemon.pid()
        assert daemon
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: not self.engine.running(), "the engine has stopped")

    def is_clean(self) -> bool:
        """Return whether an engine left no processes, mounts or socket."""
        table = Path(f"/proc/{self.namespace_pid}/mountinfo").read_text()
        mounts = mounts_below(self.engine.directory, table)
        processes = service.processes_below(self.engine.directory)
        return not mounts and not processes and not self.engine.socket.exists()


@contextmanager
def create_isolated_host(programs: Path, store: str = "") -> Iterator[IsolatedHost]:
    """Create a host with the unpacked programs of an engine."""
    if os.geteuid() != 0:
        pytest.skip("the private engine needs root")
    if host_suite() is None:
        pytest.skip("the private engine is unpacked from Debian's packages")
    # The path of a socket must be short, so this directory is not in that of pytest.
    with tempfile.TemporaryDirectory() as directory:
        holder = subprocess.Popen(["unshare", "--net", "--mount", "--", "sleep", "infinity"])
        host = IsolatedHost(Path(directory), holder.pid, store)
        try:
            _prepare(host, programs)
            yield host
        finally:
            # The task registry.down needs an engine, which a failed test may have killed.
            host.registry.down(Console())
            host.inv("engine.down")
            holder.kill()
            holder.wait()


def _prepare(host: IsolatedHost, programs: Path) -> None:
    (host.directory / "Dockerfile").write_text("FROM scratch\n")
    root = host.engine.directory / "root"
    shutil.copytree(programs, root, symlinks=True, copy_function=link_or_copy)
    wait_until(lambda: _has_namespaces(host.namespace_pid), "the namespaces exist")
    host.run(sys.executable, "-c", LOOPBACK_UP)
    if DEFAULT_SOCKET.exists():
        host.run("mount", "--bind", os.devnull, str(DEFAULT_SOCKET))


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy2(source, target)


def _has_namespaces(pid: int) -> bool:
    kinds = ("net", "mnt")
    return all(
        Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
        for kind in kinds
    )


def start_engine_and_registry(
    host: IsolatedHost, registry: Path, factory: ProjectFactory
) -> ProjectFactory:
    """Start the engine and a registry, copy the base image, and return a project factory.

    ``registry`` has the unpacked programs of a registry, ``factory`` is that of this machine.
    """
    host.ok("engine.up")
    return add_registry_and_base(host, registry, factory)


def add_registry_and_base(
    host: IsolatedHost, registry: Path, factory: ProjectFactory
) -> ProjectFactory:
    """Like ``start_engine_and_registry``, for an engine that is running."""
    start_registry(host, registry)
    copy_image(BASE_TAG, factory.docker, host.docker)
    address = f"localhost:{host.registry.port}"
    return ProjectFactory(host.docker, address, factory.offline, host.directory)


def start_registry(host: IsolatedHost, programs: Path) -> None:
    """Start a registry on the loopback interface of the host, from its unpacked programs."""
    host.registry.directory.mkdir()
    (host.registry.directory / "root").symlink_to(programs)
    host.ok("registry.up")


def copy_image(reference: str, source: Docker, target: Docker) -> None:
    """Copy an image from one engine to another, in the format of the first engine."""
    save = subprocess.Popen(source.argv("save", reference), stdout=subprocess.PIPE)
    subprocess.run(target.argv("load"), stdin=save.stdout, check=True, capture_output=True)
    assert save.wait() == 0
