"""What a person sees of a real stage: on a terminal, in a pipe, in a CI job."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING

import pyte
import pytest
from harness import Docker, Project, Workshop, inv_argv, one_error
from planted import PLANTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import NewProject

pytestmark = pytest.mark.engine

TURN = "[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]"
TIME = r"[0-9.]+ s"
SIZE = r"[0-9.]+ [kMG]?B"
SGR = re.compile(rb"\x1b\[[0-9;]*m")


class Watched:
    """A command line on a terminal, with all that a person sees there from moment to moment."""

    def __init__(self, project: Project, *arguments: str, size: tuple[int, int] = (200, 40),
                 env: dict[str, str] | None = None) -> None:  # fmt: skip
        self._ours, theirs = os.openpty()
        self.screen = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self.screen)
        self.resize(*size)
        self.written = b""
        self.seen: list[list[str]] = []
        self.process = subprocess.Popen(
            inv_argv(*arguments),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=project.directory,
            env={**project.environment, "TERM": "xterm-256color", **(env or {})},
            start_new_session=True,
            # Ctrl-C comes from the terminal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(theirs)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def type(self, data: bytes) -> None:
        os.write(self._ours, data)

    @property
    def lines(self) -> list[str]:
        """What is on the screen now."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def until(self, there: Callable[[list[str]], bool], seconds: float = 60) -> None:
        """Watch until the screen shows something."""
        end = time.monotonic() + seconds
        while not there(self.lines):
            assert time.monotonic() < end, "\n".join(self.lines)
            assert self._look(), "\n".join(self.lines)

    def end(self) -> int:
        """Watch until it ends; the exit status."""
        while self._look():
            pass
        os.close(self._ours)
        PLANTED.look_at_output("a terminal", self.written)
        assert not self.screen.cursor.hidden
        assert b"\x1b[?25l" not in self.written
        return self.process.wait(timeout=30)

    def ever(self, pattern: str) -> list[str]:
        """The lines that were there at some moment, each once."""
        found = (line for screen in self.seen for line in screen if re.search(pattern, line))
        return list(dict.fromkeys(found))

    def _look(self) -> bool:
        if not select.select([self._ours], [], [], 60)[0]:
            self.process.kill()
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.written += data
        self._stream.feed(data)
        self.seen.append(self.lines)
        return bool(data)


def is_live(lines: list[str]) -> bool:
    return any(re.match(f"{TURN} install: ", line) for line in lines)


def test_a_terminal_shows_what_goes_on_and_keeps_a_line_a_stage(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    watched = Watched(project, "install", "push")
    assert watched.end() == 0
    # What takes less than the time from one picture to the next may be in none.
    assert watched.ever(rf"^{TURN} install: {TIME}, (building|listing) .* \([1-6] of 6\)")
    assert watched.ever(rf"^{TURN} install: {TIME}, (committing|assembling)$")
    assert watched.ever(r"^  │ \+ guix package --install=hello --install=greet$")
    assert watched.ever(r"^  │ (?!\+ guix package )")
    # The first call of a machine says besides which sandbox it has chosen.
    kept = [line for line in watched.lines if not line.startswith("sandbox: ")]
    assert max(map(len, watched.seen)) <= 1 + 1 + 1 + 6
    engine, install, added, push, digest = kept
    assert engine.startswith("engine: ")
    assert re.fullmatch(rf"install: {project.tag('install')}, {SIZE}, {TIME}", install)
    assert added == "install: added greet@1.0, hello@2.12.2"
    assert re.fullmatch(rf"push: {project.image}, (at least )?{SIZE} moved, {TIME}", push)
    assert re.match(rf"{project.image}@sha256:", digest)
    # All of it can be had.
    log = (project.directory / "out" / "logs" / "install.log").read_text()
    assert "The following packages will be installed:\n" in log
    assert log.count("successfully built /gnu/store/") == 6


def test_a_build_is_shown_too(new_project: NewProject) -> None:
    project = new_project()
    project.dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nRUN echo a line >&2; sleep 1\n")
    watched = Watched(project, "base")
    assert watched.end() == 0, watched.lines
    assert watched.ever(rf"^{TURN} base: {TIME}, step (2 of 2|3 of 3): RUN echo a line")
    assert re.fullmatch(rf"base: {project.tag('base')}, {SIZE}, {TIME}", watched.lines[-1])
    assert "a line\n" in (project.directory / "out" / "logs" / "base.log").read_text()


def test_without_colour_it_still_moves(new_project: NewProject) -> None:
    watched = Watched(new_project("base", "pull"), "install", env={"NO_COLOR": "1"})
    assert watched.end() == 0
    assert watched.ever(rf"^{TURN} install: {TIME}, building ")
    assert not SGR.search(watched.written)


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"CI": "true"}])
def test_nothing_moves_where_nobody_looks(new_project: NewProject, env: dict[str, str]) -> None:
    watched = Watched(new_project("base", "pull"), "install", env=env)
    assert watched.end() == 0
    assert b"\x1b" not in watched.written
    assert b"building CA certificate bundle...\r\n" in watched.written


def test_a_narrow_terminal_that_changes_its_size(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    watched = Watched(project, "install", size=(30, 6))
    watched.until(is_live)
    for columns, rows in ((12, 2), (1, 1), (70, 30)):
        watched.resize(columns, rows)
        os.kill(watched.process.pid, signal.SIGWINCH)
        time.sleep(0.3)
    assert watched.end() == 0
    assert watched.ever(r"^  │ ")
    assert watched.lines[-2].endswith(" s")
    assert not is_live(watched.lines)


LONG_LINE = """
(format (current-error-port) "/gnu/store/~a~%" (make-string 300 #\\a))
(sleep 120)
(specifications->manifest '("hello"))
"""


@pytest.mark.parametrize("columns", [200, 60])
def test_ctrl_c_leaves_the_terminal_as_it_was(new_project: NewProject, columns: int) -> None:
    """Also where the last line of the log, with the ^C behind it, is longer than the terminal."""
    project = new_project("base", "pull")
    (project.directory / "manifest.scm").write_text(LONG_LINE)
    project.set(GUIX_MANIFEST="manifest.scm")
    with project.unharmed():
        watched = Watched(project, "install", size=(columns, 40))
        watched.until(lambda lines: is_live(lines) and "/gnu/store/" in lines[-1])
        watched.type(b"\x03")
        assert watched.end() == 130
    engine, *_, last = watched.lines
    assert engine.startswith("engine: ")
    assert last == "error: interrupted; the unfinished step was undone"
    assert not watched.screen.display[watched.screen.cursor.y].strip()
    assert not is_live(watched.lines)


def test_a_failure_shows_the_end_of_the_log_and_then_the_error(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    watched = Watched(project, "install", "--package=no-such-package", size=(300, 60))
    assert watched.end() == 4
    lines = watched.lines
    assert not is_live(lines)
    where = project.directory / "out" / "logs" / "install.log"
    assert f"install: end of the log; the whole log is in {where}" in lines
    assert "guix package: error: no-such-package: unknown package" in lines
    assert lines[-1].startswith("error: install: no-such-package: unknown package, ")
    assert "the logs are in" in lines[-1]


@pytest.mark.parametrize("failing", [False, True])
def test_a_pipe_gets_whole_lines(new_project: NewProject, failing: bool) -> None:
    project = new_project("base", "pull")
    result = project.inv("install", *(["--package=no-such-package"] if failing else []))
    assert result.returncode == (4 if failing else 0)
    assert not re.search(r"[^\n\t -~À-￿]", result.stdout + result.stderr)
    assert ("building CA certificate bundle...\n" in result.stderr) is not failing
    for noise in ("\n\n", "\n.\n", "still in progress", "GUIX_PROFILE"):
        assert noise not in result.stderr
    assert result.stderr.endswith("\n")


@pytest.mark.parametrize("job", ["GITHUB_ACTIONS", "GITLAB_CI"])
@pytest.mark.parametrize("failing", [False, True])
def test_the_log_of_a_job_is_folded(new_project: NewProject, job: str, failing: bool) -> None:
    whole = job == "GITLAB_CI" and not failing
    project = new_project(*([] if whole else ["base", "pull"]))
    stages = ["base", "pull", "install"] if whole else ["install"]
    options = ["--package=no-such-package"] if failing else []
    result = project.inv(*stages, *options, env={job: "true", "CI": "true"})
    assert result.returncode == (4 if failing else 0)
    said, depth, names, unfolded = result.stderr, 0, [], []
    word = ""
    for line in said.split("\n"):
        start = re.match(r"::group::(.*)|section_start:\d+:(\w+)_\w{8}\[", line)
        if start:
            depth += 1
            names.append(start[1] or start[2])
        elif line.startswith("::stop-commands::"):
            word = line.removeprefix("::stop-commands::")
        elif word and line == f"::{word}::":
            word = ""
        elif not word and re.match(r"::endgroup::|section_end:", line):
            depth -= 1
        elif depth == 0:
            unfolded.append(line)
        assert depth in (0, 1)
    assert (depth, word) == (0, "")
    assert names == stages
    assert ("::group::" in said) is (job == "GITHUB_ACTIONS")
    assert not any("building /gnu" in line for line in unfolded)
    *_, result_line, last = filter(None, unfolded)
    assert (last if failing else result_line).startswith(
        ("::error::install: " if job == "GITHUB_ACTIONS" else "error: install: ")
        if failing
        else f"install: {project.tag('install')}, "
    )


def test_quiet_says_nothing_but_results_and_errors(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    result = project.ok("install", "--quiet")
    assert (result.stdout, result.stderr.partition("\n")[2]) == ("", "")
    project.set(OUTPUT="quiet")
    pushed = project.ok("push")
    assert re.fullmatch(rf"{project.image}@sha256:\w+\n", pushed.stdout)
    assert pushed.stderr == ""
    failed = project.inv("install", "--package=no-such-package")
    assert "no-such-package: unknown package" in failed.stderr
    assert one_error(failed, 4).startswith("error: install: no-such-package: unknown")


def test_verbose_says_all_that_guix_does(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    said = project.ok("install", "--verbose").stderr
    log = (project.directory / "out" / "logs" / "install.log").read_text()
    assert log in said
    assert said.count("successfully built /gnu/store/") == 6
    # Only how much is said differs: it is the same stage.
    assert "install: up to date" in project.ok("install").stderr


# --- What comes over the network --------------------------------------------------------------


@contextmanager
def network(docker: Docker, name: str) -> Iterator[str]:
    """A network of the engine's; the address of this machine in it."""
    made = docker("network", "create", "--driver=bridge", name)
    if made.returncode:
        pytest.skip(f"this engine can make no network: {made.stderr}")
    try:
        yield docker.ok("network", "inspect", "--format={{(index .IPAM.Config 0).Gateway}}", name)
    finally:
        docker("network", "rm", name)


@contextmanager
def serving_slowly(directory: Path, host: str) -> Iterator[str]:
    """A substitute server whose files take some seconds; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = directory / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            pieces = 16 if "/nar/" in self.path else 1
            size = len(data) // pieces + 1
            for start in range(0, len(data), size):
                self.wfile.write(data[start : start + size])
                time.sleep(0.25 if pieces > 1 else 0)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((host, 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{host}:{server.server_address[1]}"
        server.shutdown()


def test_substitutes_come_with_their_bytes_and_a_rate(
    new_project: NewProject, workshop: Workshop, docker: Docker
) -> None:
    name = f"guix-tasks-test-{workshop.token}"
    with (
        network(docker, name) as host,
        serving_slowly(workshop.offline / "substitutes", host) as server,
    ):
        project = new_project("base", "pull", NETWORK=name, GUIX_SUBSTITUTE_URLS=server)
        watched = Watched(project, "install")
        assert watched.end() == 0, watched.lines
    assert watched.ever(rf"substitute 1 of 1: hello-2\.12\.2, {SIZE}(?: of {SIZE})?, {SIZE}/s")
