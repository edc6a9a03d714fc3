"""A private Docker Engine for a machine that has none.

Debian's packages are unpacked into one folder and run from there: nothing is installed, and
deleting the folder (after ``down``) removes all of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import files
from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.apt import Apt, host_suite
from guix_tasks.bootstrap.service import Service, disk_trouble_is, locked
from guix_tasks.errors import EngineError
from guix_tasks.settings.values import ImageStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from guix_tasks.ui.console import Console

# The suite with an engine that has buildx, and that runs on the C library of Debian 12.
# Only runc wants newer libraries there, so it comes from the suite of the host.
SUITE = "forky"
PACKAGES = ("docker.io", "docker-cli", "docker-buildx", "containerd", "tini-static")

# A Unix socket's path is an array of 108 bytes in the kernel, one of them the final zero.
_LONGEST_SOCKET = 107

_START_SECONDS = 60.0
# The engine itself gives its containers 15 s.
_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class PrivateEngine:
    """The engine in ``folder``; there is one for each user."""

    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "docker.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def running(self) -> bool:
        return self._daemon.pid() is not None

    def installed(self) -> bool:
        return self._daemon.program.exists()

    def docker_path(self) -> Path | None:
        return self._program("usr/bin/docker")

    def buildx_path(self) -> Path | None:
        return self._program("usr/libexec/docker/cli-plugins/docker-buildx")

    def up(self, console: Console, store: ImageStore | None = None) -> None:
        """Unpack it if necessary, start it, and wait until it answers.

        ``store`` is where it keeps images; None is Docker's own default for that version.  Raise
        ``EngineError`` if the engine already runs with another store.
        """
        self._check_host()
        with disk_trouble_is(EngineError), locked(self.folder / "lock"):
            self.folder.chmod(0o700)
            if self.running():
                self._await(self.running)
                self._check_store(store)
                said = "the private engine runs already"
            else:
                self._check_alone()
                if not self.installed():
                    self._unpack(console)
                self._clear()
                self._start(store)
                said = "started the private engine"
        console.say(f"{said}: {self.url}")
        console.say(self.how_by_hand())

    def down(self, console: Console) -> None:
        """Stop it with all its containers; images and volumes stay."""
        if not self.folder.exists():
            console.say("no private engine runs: there is none")
            return
        with disk_trouble_is(EngineError), locked(self.folder / "lock"):
            if self.running():
                how = "stopped" if self._daemon.stop(_STOP_SECONDS) else "killed"
                said = f"{how} the private engine"
            elif self._leftovers() or self._mounts():
                said = "removed what a private engine left that was killed"
            else:
                console.say("no private engine runs")
                return
            self._clear()
        console.say(f"{said}; its images stay until {self.folder} is deleted")

    def how_by_hand(self) -> str:
        """What a shell needs for ``docker`` to be there and to speak to this engine."""
        words = f"docker by hand: export DOCKER_HOST={shlex.quote(self.url)}"
        program = self.docker_path()
        if program and not shutil.which("docker"):
            words += f' PATH="$PATH":{shlex.quote(str(program.parent))}'
        return words

    @property
    def _root(self) -> Path:
        return self.folder / "root"

    @property
    def _run(self) -> Path:
        return self.folder / "run"

    @property
    def _daemon(self) -> Service:
        return Service(
            program=self._root / "usr/sbin/dockerd",
            pid_file=self.folder / "docker.pid",
            log=self.folder / "dockerd.log",
        )

    def _program(self, name: str) -> Path | None:
        path = self._root / name
        return path if path.exists() else None

    def _check_host(self) -> None:
        if sys.platform != "linux":
            raise EngineError(
                "the private engine is for Linux: install Docker Desktop or Docker Engine"
            )
        if os.geteuid() != 0:
            raise EngineError(
                "the private engine needs root: run this as root, or install Docker Engine "
                "and join the group 'docker'"
            )
        if len(os.fsencode(self.socket)) > _LONGEST_SOCKET:
            raise EngineError(
                f"{self.socket} is too long for a socket (at most {_LONGEST_SOCKET} bytes): "
                "set XDG_DATA_HOME to a folder with a shorter path"
            )

    def _check_alone(self) -> None:
        # An engine that starts without a bridge deletes docker0, and so cuts the containers
        # of another engine off from their network.
        if other := other_engine():
            raise EngineError(
                f"another Docker Engine is here ({other}), and the private one would take its "
                "network away: use that one (set DOCKER_HOST if it is not found by itself)"
            )

    def _unpack(self, console: Console) -> None:
        own = host_suite()
        if own is None:
            raise EngineError(
                "the private engine is unpacked from Debian's packages, and this host is not "
                "Debian: install Docker Engine in the way of your distribution"
            )
        console.say(f"unpacking Docker Engine from Debian's packages into {self._root}")
        apt = Apt(files.cache_home() / "apt", list(dict.fromkeys((own, SUITE))))
        apt.unpacked([*(f"{name}/{SUITE}" for name in PACKAGES), f"runc/{own}"], self._root)

    @property
    def _configuration(self) -> Path:
        return self.folder / "daemon.json"

    def _check_store(self, store: ImageStore | None) -> None:
        if store is None:
            return
        running = json.loads(self._configuration.read_text())
        if running.get("features") != _features(store):
            raise EngineError(
                f"the private engine already runs, and was not started with the image store "
                f"{store.value}; run `inv engine.down` first (each store has its own images)"
            )

    def _start(self, store: ImageStore | None) -> None:
        configuration = self._configuration
        configuration.write_text(json.dumps(self._configure(store), indent=2) + "\n")
        programs = [self._root / "usr/bin", self._root / "usr/sbin"]
        started = self._daemon.start(["--config-file", str(configuration)], programs)
        try:
            self._await(lambda: started.poll() is None)
            self.socket.chmod(0o600)
        except BaseException:
            started.terminate()  # it may not be known as ours yet
            self._daemon.stop(_STOP_SECONDS)
            self._clear()
            raise

    def _await(self, alive: Callable[[], bool]) -> None:
        answered = service.wait_until(lambda: not alive() or answers(self.socket), _START_SECONDS)
        if not alive():
            cause = self._daemon.complaint()
        elif not answered:
            cause = f"it gives no answer for {_START_SECONDS:.0f} s"
        else:
            return
        raise EngineError(f"the private engine did not start: {cause}; see {self._daemon.log}")

    def _configure(self, store: ImageStore | None) -> dict[str, object]:
        return {
            **({"features": _features(store)} if store else {}),
            "hosts": [self.url],
            "data-root": str(self.folder / "data"),
            "exec-root": str(self._run),
            "pidfile": str(self._run / "dockerd.pid"),
            "group": str(os.getgid()),
            "init-path": str(self._root / "usr/bin/docker-init"),
            # Nothing of the host's network is touched.
            "bridge": "none",
            "iptables": False,
            "ip6tables": False,
            "ip-forward": False,
            "builder": {"entitlements": {"security-insecure": True, "network-host": True}},
        }

    def _leftovers(self) -> list[int]:
        """Find what an engine leaves that was killed: containers, shims, containerd."""
        ours = service.processes_below(self._root)
        parents = [pid for pid in ours if _program_name(pid) in _CONTAINER_PARENTS]
        return [*service.children(parents), *ours]

    def _clear(self) -> None:
        """Remove what an engine leaves that did not end as it should."""
        for pid in self._leftovers():
            service.send(pid, signal.SIGKILL)
        service.wait_until(lambda: not self._leftovers(), _STOP_SECONDS)
        for point in self._mounts():
            unmount(point)
        if not self._mounts():
            shutil.rmtree(self._run, ignore_errors=True)
        self.socket.unlink(missing_ok=True)
        self._daemon.pid_file.unlink(missing_ok=True)

    def _mounts(self) -> list[str]:
        table = Path("/proc/self/mountinfo").read_text()
        data = self.folder / "data"
        points = [*mounts_below(self._run, table), *mounts_below(data, table)]
        # The engine mounts its data folder on itself and notes that it did; without that
        # note it is a disk that the user has put there.
        if (self._run / "unmount-on-shutdown").exists():
            points += mounts_below(self.folder, table)
        return list(dict.fromkeys(points))


def _features(store: ImageStore) -> dict[str, bool]:
    # docs.docker.com/engine/storage/containerd
    return {"containerd-snapshotter": store is ImageStore.CONTAINERD}


_MNT_DETACH = 2

# The programs whose children are a container's first process.
_CONTAINER_PARENTS = ("containerd-shim-runc-v2", "runc")


def private_engine() -> PrivateEngine:
    return PrivateEngine(files.data_home() / "engine")


def other_engine() -> str | None:
    """Name what tells that another engine uses this network namespace."""
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


def mounts_below(folder: Path, mountinfo: str) -> list[str]:
    """List the mount points below a folder, the innermost first."""
    points = [line.split(" ")[4] for line in mountinfo.splitlines()]
    # The kernel writes blanks and the like in octal.
    plain = [point.encode().decode("unicode_escape") for point in points]
    folder = service.real(folder)
    inside = [point for point in plain if folder in Path(point).parents]
    return sorted(inside, key=len, reverse=True)


def unmount(point: str) -> None:
    # By the C library, since umount is of a package that a small Debian lacks.
    ctypes.CDLL(None).umount2(os.fsencode(point), _MNT_DETACH)


def answers(path: Path) -> bool:
    """Whether an engine answers at a socket."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/_ping")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
