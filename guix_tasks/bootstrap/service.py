"""Daemons that outlive ``inv``, and how they are known again by the next one.

A pid file alone proves nothing, since the kernel hands pids out again.  Here it counts only
while that process runs the very program which was unpacked into a folder of our own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from guix_tasks.errors import GuixTasksError

PROC = Path("/proc")

# What a daemon gets of our environment: nothing secret, but proxies and certificates.
_KEPT = re.compile(r"HOME|LANG|LC_.*|TZ|TMPDIR|SSL_CERT_(FILE|DIR)|(?i:(http|https|no|all)_proxy)")


@dataclass(frozen=True)
class Service:
    """One daemon: its program, the file with its pid, its log."""

    program: Path
    pid_file: Path
    log: Path

    def pid(self) -> int | None:
        """The pid of the daemon if it is alive and is ours."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None
        return pid if program_of(pid) == real(self.program) else None

    def start(self, arguments: Sequence[str], path: Sequence[Path] = ()) -> subprocess.Popen[bytes]:
        """Start it in a session of its own, so that neither Ctrl-C nor our end reaches it."""
        environment = {name: v for name, v in os.environ.items() if _KEPT.fullmatch(name)}
        environment["PATH"] = os.pathsep.join([*map(str, path), os.environ.get("PATH", os.defpath)])
        # The process itself notes its pid before it becomes the daemon: were we killed
        # right after the start, the daemon would not be lost.
        note = ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.pid_file)]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*note, str(self.program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,
            )

    def stop(self, patience: float) -> bool:
        """Ask it to end, then make it end; whether it ended when asked."""
        ended = True
        if (pid := self.pid()) is not None:
            send(pid, signal.SIGTERM)
            if not wait_until(lambda: self.pid() is None, patience):
                ended = False
                send(pid, signal.SIGKILL)
                wait_until(lambda: self.pid() is None, patience)
        self.pid_file.unlink(missing_ok=True)
        return ended

    def complaint(self) -> str:
        """The line of the log that says best why the daemon died."""
        try:
            lines = self.log.read_text(errors="replace").split("\n")
        except OSError:
            lines = []
        telling = [line for line in lines if line.strip() and not _CHATTER.search(line)]
        line = telling[-1].strip() if telling else "its log is empty"
        message = _MESSAGE.search(line)
        return message[1].replace('\\"', '"') if message else line


_CHATTER = re.compile(r"level=(debug|info|warning)")
_MESSAGE = re.compile(r'msg="((?:[^"\\]|\\.)*)"')


def real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def program_of(pid: int) -> Path | None:
    """The program that a process runs; None if it ended or belongs to somebody else."""
    try:
        program = (PROC / str(pid) / "exe").readlink()
    except OSError:
        return None
    return Path(str(program).removesuffix(" (deleted)"))


def children(parents: Collection[int]) -> list[int]:
    return [pid for pid in processes() if _parent(pid) in parents]


def _parent(pid: int) -> int | None:
    try:
        status = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # PID (NAME) STATE PARENT …, and the name may hold anything.
    return int(status.rpartition(")")[2].split()[1])


def processes() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def processes_below(folder: Path) -> list[int]:
    """The processes whose program lies in a folder."""
    folder = real(folder)
    programs = ((pid, program_of(pid)) for pid in processes())
    return [pid for pid, program in programs if program and folder in program.parents]


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether something came true in time."""
    limit = time.monotonic() + seconds
    while not done():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def disk_trouble_is(failure: type[GuixTasksError]) -> Iterator[None]:
    """Turn a full disk, a folder that cannot be written to, … into an error of one line."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise failure(
            f"{where}{error.strerror or error}: mend that, or set XDG_DATA_HOME and "
            "XDG_CACHE_HOME to other folders"
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two runs do not make or start the same thing at once."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
