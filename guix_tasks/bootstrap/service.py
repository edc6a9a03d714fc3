"""Daemons that outlive ``inv``.

The kernel reuses pids, so a pid file is valid only while its process runs the unpacked program of
the daemon.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from guix_tasks.errors import GuixTasksError

PROC = Path("/proc")

_KEPT = re.compile(
    r"PATH|HOME|LANG|LC_.*|TZ|TMPDIR|APT_CONFIG|SSL_CERT_(FILE|DIR)|(?i:(http|https|no|all)_proxy)"
)

_LOW_LEVEL = re.compile(r"level=(debug|info|warning)")
_MESSAGE = re.compile(r'msg="((?:[^"\\]|\\.)*)"')


def kept_environment() -> dict[str, str]:
    """Return the variables that daemons and Debian's programs inherit.

    These are proxies and certificates, but no other secrets, and no options of these programs.
    """
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
    return {"PATH": os.defpath, **kept}


@dataclass(frozen=True)
class Service:
    """Daemon with its program, pid file and log."""

    program: Path
    pid_file: Path
    log: Path

    def pid(self) -> int | None:
        """Return the pid of the daemon, or None if it is not running."""
        try:
            pid = int(self.pid_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return pid if program_of(pid) == self.program.resolve() else None

    def start(self, arguments: Sequence[str], path: Sequence[Path] = ()) -> subprocess.Popen[bytes]:
        """Start the daemon in a new session, which neither Ctrl-C nor the end of ``inv`` stops."""
        environment = kept_environment()
        environment["PATH"] = os.pathsep.join([*map(str, path), environment["PATH"]])
        # The process writes its pid before it becomes the daemon, so the daemon is known even if
        # ``inv`` is killed right after the start.
        launcher = ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.pid_file)]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*launcher, str(self.program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,
            )

    def wait(self, alive: Callable[[], bool], answers: Callable[[], bool], seconds: float) -> str:
        """Wait until the daemon answers. Return an error if it ends or does not answer, else ""."""
        answered = wait_until(lambda: not alive() or answers(), seconds)
        if not alive():
            return f"{self.error_line()}; see {self.log}"
        return "" if answered else f"no answer within {seconds:.0f} s; see {self.log}"

    def stop(self, timeout: float) -> bool:
        """Terminate the daemon, and kill it after ``timeout`` seconds.

        Return False if it had to be killed.
        """
        terminated = True
        if (pid := self.pid()) is not None:
            send(pid, signal.SIGTERM)
            if not wait_until(lambda: self.pid() is None, timeout):
                terminated = False
                send(pid, signal.SIGKILL)
                wait_until(lambda: self.pid() is None, timeout)
        self.pid_file.unlink(missing_ok=True)
        return terminated

    def error_line(self) -> str:
        """Return the last line of the log above the level of warnings."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            lines = []
        errors = [line for line in lines if line.strip() and not _LOW_LEVEL.search(line)]
        line = errors[-1].strip() if errors else "its log is empty"
        message = _MESSAGE.search(line)
        return message[1].replace('\\"', '"') if message else line


def http_status(address: str | tuple[str, int], path: str) -> int | None:
    """Return the status of a request to a Unix socket or a TCP port, or None without an answer.

    No proxy of the environment is used.
    """
    client = http.client.HTTPConnection("localhost")
    with socket.socket(
        socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    ) as connection:
        connection.settimeout(5)
        client.sock = connection
        try:
            connection.connect(address)
            client.request("GET", path)
            return client.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            client.close()


def program_of(pid: int) -> Path | None:
    """Return the program of a process, or None if it ended or belongs to another user."""
    try:
        program = (PROC / str(pid) / "exe").readlink()
    except OSError:
        return None
    return Path(str(program).removesuffix(" (deleted)"))


def children(parents: Collection[int]) -> list[int]:
    def parent(pid: int) -> int | None:
        try:
            status = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        # PID (NAME) STATE PARENT ...; the name may contain any characters.
        return int(status.rpartition(")")[2].split()[1])

    return [pid for pid in processes() if parent(pid) in parents]


def processes() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def processes_below(directory: Path) -> list[int]:
    """Return the processes whose program is in a directory."""
    directory = directory.resolve()
    programs = ((pid, program_of(pid)) for pid in processes())
    return [pid for pid, program in programs if program and directory in program.parents]


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Return True as soon as ``done`` does, or False after ``seconds``."""
    limit = time.monotonic() + seconds
    while not done():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def disk_errors_as(failure: type[GuixTasksError]) -> Iterator[None]:
    """Raise ``failure`` with one line after an error of the file system, such as a full disk."""
    try:
        yield
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        raise failure(
            f"{path}{error.strerror or error}; fix the cause, or set XDG_DATA_HOME and "
            "XDG_CACHE_HOME to other directories"
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that concurrent runs do not make or start the same thing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
