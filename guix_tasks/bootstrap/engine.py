"""Private Docker Engine for a machine without an engine.

Debian's packages are unpacked to one directory and run from there.  Nothing is installed.  To
remove the engine, run ``down`` and delete the directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import files
from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.apt import Apt, required_suite
from guix_tasks.bootstrap.service import Service, disk_errors_as, locked
from guix_tasks.errors import EngineError
from guix_tasks.settings.values import ImageStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from guix_tasks.ui.console import Console

# This suite has an engine with buildx, built for the C library of Debian 12.  Its runc needs newer
# libraries, so runc comes from the suite of the host.
SUITE = "forky"
PACKAGES = ("docker.io", "docker-cli", "docker-buildx", "containerd", "tini-static")


_START_SECONDS = 60.0
# The engine waits 15 s for its containers.
_STOP_SECONDS = 30.0


class PrivateEngine:
    """Private engine in a directory; each user has one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "docker.sock"
        self.url = f"unix://{self.socket}"
        self._root = directory / "root"
        self._run = directory / "run"
        self._configuration = directory / "daemon.json"
        self._daemon = Service(
            program=self._root / "usr/sbin/dockerd",
            pid_file=directory / "docker.pid",
            log=directory / "dockerd.log",
        )

    def running(self) -> bool:
        return self._daemon.pid() is not None

    def installed(self) -> bool:
        return self._daemon.program.exists()

    def docker_path(self) -> Path | None:
        path = self._root / "usr/bin/docker"
        return path if path.exists() else None

    def buildx_path(self) -> Path | None:
        path = self._root / "usr/libexec/docker/cli-plugins/docker-buildx"
        return path if path.exists() else None

    def up(self, console: Console, store: ImageStore | None = None) -> None:
        """Unpack the engine if necessary, start it, and wait until it answers.

        ``store`` is the image store; None is Docker's default for this version.  Raise
        ``EngineError`` if the engine already runs with another store.
        """
        self._check_host()
        with disk_errors_as(EngineError), locked(self.directory / "lock"):
            self.directory.chmod(0o700)
            if self.running():
                self._wait(self.running)
                self._check_store(store)
                message = "the private engine is already running"
            else:
                # An engine without a bridge deletes docker0 when it starts, and thereby disconnects
                # the containers of another engine.
                if other := other_engine():
                    raise EngineError(
                        "cannot start the private engine: it would delete the network of another "
                        f"Docker Engine ({other}); use that engine (set DOCKER_HOST if it is not "
                        "found)"
                    )
                if not self.installed():
                    self._unpack(console)
                self._clear()
                self._start(store)
                message = "started the private engine"
        console.print(f"{message}: {self.url}")
        console.print(self.shell_hint())

    def down(self, console: Console) -> None:
        """Stop the engine and its containers; keep images and volumes."""
        if not self.directory.exists():
            console.print("no private engine is running: none is installed")
            return
        with disk_errors_as(EngineError), locked(self.directory / "lock"):
            if self.running():
                verb = "stopped" if self._daemon.stop(_STOP_SECONDS) else "killed"
                message = f"{verb} the private engine"
            elif self._leftovers() or self._mounts():
                message = "removed processes and mounts of a killed private engine"
            else:
                console.print("no private engine is running")
                return
            self._clear()
        console.print(f"{message}; delete {self.directory} to delete its images")

    def shell_hint(self) -> str:
        """Return the shell command with which ``docker`` uses this engine."""
        command = f"docker by hand: export DOCKER_HOST={shlex.quote(self.url)}"
        program = self.docker_path()
        if program and not shutil.which("docker"):
            command += f' PATH="$PATH":{shlex.quote(str(program.parent))}'
        return command

    def _check_host(self) -> None:
        if sys.platform != "linux":
            problem = "it needs Linux; install Docker Desktop or Docker Engine"
        elif os.geteuid() != 0:
            problem = (
                "it needs root; run this task as root, or install Docker Engine and join the group "
                "'docker'"
            )
        elif len(os.fsencode(self.socket)) > files.LONGEST_SOCKET:
            problem = (
                f"the path of its socket {self.socket} is longer than {files.LONGEST_SOCKET} bytes"
                "; set XDG_DATA_HOME to a shorter path"
            )
        else:
            return
        raise EngineError(f"cannot start the private engine: {problem}")

    def _unpack(self, console: Console) -> None:
        hint = "install Docker Engine with the packages of your distribution"
        suite = required_suite("the private engine", hint, EngineError)
        console.print(f"unpacking Docker Engine from Debian's packages into {self._root}")
        apt = Apt(list(dict.fromkeys((suite, SUITE))))
        apt.unpack([*(f"{name}/{SUITE}" for name in PACKAGES), f"runc/{suite}"], self._root)

    def _check_store(self, store: ImageStore | None) -> None:
        if store is None:
            return
        try:
            features = json.loads(self._configuration.read_bytes())["features"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            features = None
        if features != _features(store):
            raise EngineError(
                f"the private engine is already running without the image store {store.value}; run "
                "`inv engine.down` first (each store has separate images)"
            )

    def _start(self, store: ImageStore | None) -> None:
        self._configuration.write_text(
            json.dumps(self._configure(store), indent=2) + "\n", encoding="utf-8"
        )
        programs = [self._root / "usr/bin", self._root / "usr/sbin"]
        process = self._daemon.start(["--config-file", str(self._configuration)], programs)
        try:
            self._wait(lambda: process.poll() is None)
            self.socket.chmod(0o600)
        except BaseException:
            process.terminate()  # its pid file may not exist yet
            self._daemon.stop(_STOP_SECONDS)
            self._clear()
            raise

    def _wait(self, alive: Callable[[], bool]) -> None:
        if problem := self._daemon.wait(alive, lambda: answers(self.socket), _START_SECONDS):
            raise EngineError(f"cannot start the private engine: {problem}")

    def _configure(self, store: ImageStore | None) -> dict[str, object]:
        return {
            **({"features": _features(store)} if store else {}),
            "hosts": [self.url],
            "data-root": str(self.directory / "data"),
            "exec-root": str(self._run),
            "pidfile": str(self._run / "dockerd.pid"),
            "group": str(os.getgid()),
            "init-path": str(self._root / "usr/bin/docker-init"),
            # Leave the network of the host unchanged.
            "bridge": "none",
            "iptables": False,
            "ip6tables": False,
            "ip-forward": False,
            "builder": {"entitlements": {"security-insecure": True, "network-host": True}},
        }

    def _leftovers(self) -> list[int]:
        """Return the processes of a killed engine: containers, shims, containerd."""
        processes = service.processes_below(self._root)
        parents = [pid for pid in processes if _program_name(pid) in _CONTAINER_PARENTS]
        return [*service.children(parents), *processes]

    def _clear(self) -> None:
        """Remove processes, mounts and files of a killed engine."""
        for pid in self._leftovers():
            service.send(pid, signal.SIGKILL)
        service.wait_until(lambda: not self._leftovers(), _STOP_SECONDS)
        for point in self._mounts():
            # A small Debian has no umount program, so call the C library.
            ctypes.CDLL(None).umount2(os.fsencode(point), _MNT_DETACH)
        if not self._mounts():
            shutil.rmtree(self._run, ignore_errors=True)
        self.socket.unlink(missing_ok=True)
        self._daemon.pid_file.unlink(missing_ok=True)

    def _mounts(self) -> list[str]:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        data = self.directory / "data"
        points = [*mounts_below(self._run, table), *mounts_below(data, table)]
        # The engine mounts its data directory on itself and creates this file.  Without the file,
        # the mount is a disk of the user.
        if (self._run / "unmount-on-shutdown").exists():
            points += mounts_below(self.directory, table)
        return list(dict.fromkeys(points))


def _features(store: ImageStore) -> dict[str, bool]:
    # docs.docker.com/engine/storage/containerd
    return {"containerd-snapshotter": store is ImageStore.CONTAINERD}


_MNT_DETACH = 2

# The first process of a container is a child of one of these programs.
_CONTAINER_PARENTS = ("containerd-shim-runc-v2", "runc")


def private_engine() -> PrivateEngine:
    return PrivateEngine(files.data_home() / "engine")


def other_engine() -> str | None:
    """Return the sign of another engine in this network namespace, or None."""
    if any(name == "docker0" for _, name in socket.if_nameindex()):
        return "the network interface docker0"
    for pid in service.processes():
        with contextlib.suppress(OSError):
            if _program_name(pid) == "dockerd" and _network(pid) == _network("self"):
                return f"process {pid}"
    return None


def _program_name(pid: int) -> str | None:
    program = service.program_of(pid)
    return program.name if program else None


def _network(pid: int | str) -> str:
    return str((service.PROC / str(pid) / "ns/net").readlink())


def mounts_below(directory: Path, mountinfo: str) -> list[str]:
    """Return the mount points below a directory, innermost first."""
    escaped = re.findall(r"^(?:\S+ ){4}(\S+) ", mountinfo, re.MULTILINE)
    # The kernel writes white space as octal escapes.
    points = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), p) for p in escaped]
    directory = directory.resolve()
    nested = [point for point in points if point.startswith(f"{directory}/")]
    return sorted(nested, key=len, reverse=True)


def answers(path: Path) -> bool:
    """Return True if an engine answers at a socket."""
    return service.http_status(str(path), "/_ping") == HTTPStatus.OK
