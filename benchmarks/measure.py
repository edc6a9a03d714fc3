"""What one command takes: seconds and where they go, memory, and what a registry got.

The command speaks to the engine through a socket of our own, which passes everything on and
notes when each call begins and ends.  When containers start and end the engine's events tell.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Span = tuple[float, float]

_REQUEST = re.compile(rb"(GET|HEAD|POST|PUT|DELETE) (?:/v[0-9.]+)?(/[^ ?]*)[^ ]* HTTP/1\.1\r\n")
_START = re.compile(r"POST /containers/(\w+)/start")
_COMMIT = re.compile(r"POST /commit")
_PUSH = re.compile(r"POST /images/.*/push")
_BUILD = re.compile(r"POST /(build|grpc|session)")
_OBJECT = re.compile(
    r"(\w+ /(?:images|volumes|containers)/)(?!(?:create|json)$).+?"
    r"(/(?:archive|attach|json|push|start|tag|wait))?"
)
_PIECE = 1 << 16
_PATIENCE = 10.0


@dataclass
class Call:
    """One call of the engine's API."""

    name: str
    start: float
    end: float


class Wire:
    """A socket in front of the engine's own."""

    def __init__(self, engine: Path, front: Path) -> None:
        self.calls: list[Call] = []
        self._engine = engine
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(front))
        self._server.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        engine = socket.socket(socket.AF_UNIX)
        engine.connect(str(self._engine))
        calls: list[Call] = []
        answers = threading.Thread(target=self._answer, args=(engine, client, calls), daemon=True)
        answers.start()
        with client, engine:
            # A client sends its next request when it has the answer to the last one.
            for piece in _pieces(client, engine):
                request = _REQUEST.match(piece)
                if request:
                    now = time.time()
                    calls.append(Call(b" ".join(request.groups()).decode(), now, now))
                    self.calls.append(calls[-1])
            answers.join()

    @staticmethod
    def _answer(engine: socket.socket, client: socket.socket, calls: list[Call]) -> None:
        for _ in _pieces(engine, client):
            if calls:
                calls[-1].end = time.time()


def _pieces(source: socket.socket, target: socket.socket) -> Iterator[bytes]:
    """Pass on what comes, and the end of it."""
    with suppress(OSError):
        while piece := source.recv(_PIECE):
            yield piece
            target.sendall(piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class SubstituteServer:
    """A substitute server on loopback that counts what it sends."""

    def __init__(self, directory: Path) -> None:
        self.sent = 0
        server = self

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def copyfile(self, source: Any, outputfile: Any) -> None:
                server.sent += os.fstat(source.fileno()).st_size
                super().copyfile(source, outputfile)

            def log_message(self, *_: object) -> None: ...

        handler = partial(Handler, directory=str(directory))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Containers:
    """When containers start and end, as the engine tells."""

    def __init__(self, docker: str, environment: Mapping[str, str]) -> None:
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        argv = (
            docker, "events", "--since", str(int(time.time())), "--filter", "type=container",
            "--filter", "event=start", "--filter", "event=die", "--format", "{{json .}}",
        )  # fmt: skip
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, env=dict(environment))
        threading.Thread(target=self._read, daemon=True).start()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def spans(self, names: Sequence[str]) -> list[Span]:
        """From start to end of each of these containers."""
        limit = time.monotonic() + _PATIENCE
        while not all(name in self.ended for name in names) and time.monotonic() < limit:
            time.sleep(0.01)
        return [(self.started[name], self.ended[name]) for name in names]

    def _read(self) -> None:
        for line in self._process.stdout or ():
            event = json.loads(line)
            times = self.started if event["Action"] == "start" else self.ended
            times[event["Actor"]["ID"]] = event["timeNano"] / 1e9


@dataclass(frozen=True)
class Command:
    """A command that is to be measured."""

    argv: Sequence[str]
    directory: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Times:
    """Where the seconds of one command went."""

    seconds: float
    guix: float
    """In containers: Guix itself, its daemon, what else a stage runs there."""
    commit: float
    push: float
    build: float
    own: float
    """What is neither Guix nor the engine's commit or push; a build is in it."""
    program: float
    """What of that the engine has no part in."""
    memory: int
    """The most that the command's first process held, in bytes; not the programs it starts."""
    calls: dict[str, tuple[int, float]]
    """The engine's API: how often each call was made, and the seconds of all of them."""


@dataclass(frozen=True)
class Meter:
    """Measures commands that speak to the engine through ``wire``."""

    wire: Wire
    containers: Containers
    log: Path
    """The output of the last command."""

    def run(self, command: Command) -> Times:
        """Run a command to its end.  Raises ``RuntimeError`` with its output where it fails."""
        self.wire.calls.clear()
        with self.log.open("wb") as log:
            start = time.time()
            with subprocess.Popen(
                command.argv, cwd=command.directory, env=dict(command.environment),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            ) as process, _peak_memory(process.pid) as peak:  # fmt: skip
                process.wait()
            end = time.time()
        if process.returncode:
            output = self.log.read_text(errors="replace")
            raise RuntimeError(f"{' '.join(command.argv)} failed:\n{output}")
        return self._times((start, end), peak[0])

    def _times(self, whole: Span, memory: int) -> Times:
        calls = list(self.wire.calls)
        started = [match[1] for call in calls if (match := _START.fullmatch(call.name))]
        guix = self.containers.spans(started)
        commit, push, build = (
            [(call.start, call.end) for call in calls if kind.fullmatch(call.name)]
            for kind in (_COMMIT, _PUSH, _BUILD)
        )
        seconds = whole[1] - whole[0]
        every = [(call.start, call.end) for call in calls]
        return Times(
            seconds=seconds,
            guix=_length(guix),
            commit=_length(commit),
            push=_length(push),
            build=_length(build),
            own=seconds - _length([*guix, *commit, *push]),
            program=seconds - _length([*guix, *every]),
            memory=memory,
            calls=_summary(calls),
        )


def _length(spans: Sequence[Span]) -> float:
    """Return the seconds in which at least one of the spans is."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _summary(calls: Sequence[Call]) -> dict[str, tuple[int, float]]:
    spans = defaultdict(list)
    for call in calls:
        match = _OBJECT.fullmatch(call.name)
        name = f"{match[1]}*{match[2] or ''}" if match else call.name
        spans[name].append((call.start, call.end))
    return {name: (len(each), _length(each)) for name, each in sorted(spans.items())}


@contextmanager
def _peak_memory(pid: int) -> Iterator[list[int]]:
    """Return the most memory that a process holds.

    What ``wait4`` tells is no use here: it counts the memory of us, who started it, as well.
    """
    peak, ended = [0], threading.Event()

    def watch() -> None:
        status = Path(f"/proc/{pid}/status")
        while not ended.wait(0.01):
            with suppress(OSError):
                found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
                peak[0] = int(found[1]) * 1024 if found else peak[0]

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def blobs(data: Path) -> dict[str, int]:
    """Return the blobs in a registry's directory, with their sizes."""
    found = (data / "docker/registry/v2/blobs").glob("sha256/*/*/data")
    return {f"sha256:{path.parent.name}": path.stat().st_size for path in found}
