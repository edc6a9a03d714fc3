"""Output of real stages on a terminal, in a pipe and in a CI job."""

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
from harness import Docker, Project, ProjectFactory, expect_error, inv_argv
from planted_secrets import PLANTED_SECRETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import NewProject

pytestmark = pytest.mark.engine

SPINNER = "[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]"
TIME = r"[0-9.]+ s"
SIZE = r"[0-9.]+ [kMG]?B"
SGR = re.compile(rb"\x1b\[[0-9;]*m")


class ScreenTask:
    """A command line on an emulated terminal, with all screens that it shows."""

    def __init__(self, project: Project, *arguments: str, size: tuple[int, int] = (200, 40),
                 env: dict[str, str] | None = None) -> None:  # fmt: skip
        self._master, terminal = os.openpty()
        self.screen = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self.screen)
        self.resize(*size)
        self.written = b""
        self.screens: list[list[str]] = []
        self.process = subprocess.Popen(
            inv_argv(*arguments),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            cwd=project.directory,
            env={**project.environment, "TERM": "xterm-256color", **(env or {})},
            start_new_session=True,
            # The terminal sends the signal of Ctrl-C.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(terminal)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def type(self, data: bytes) -> None:
        os.write(self._master, data)

    @property
    def lines(self) -> list[str]:
        """The lines of the current screen."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait_for(self, condition: Callable[[list[str]], bool], seconds: float = 60) -> None:
        """Wait until a condition of the screen is true."""
        end = time.monotonic() + seconds
        while not condition(self.lines):
            assert time.monotonic() < end, "\n".join(self.lines)
            assert self._read(), "\n".join(self.lines)

    def end(self) -> int:
        """Wait for the end, and return the exit status."""
        while self._read():
            pass
        os.close(self._master)
        PLANTED_SECRETS.check_output("a terminal", self.written)
        assert not self.screen.cursor.hidden
        assert b"\x1b[?25l" not in self.written
        return self.process.wait(timeout=30)

    def shown_lines(self, pattern: str) -> list[str]:
        """Return the different lines of all screens that match a pattern."""
        lines = (line for screen in self.screens for line in screen if re.search(pattern, line))
        return list(dict.fromkeys(lines))

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 60)[0]:
            self.process.kill()
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.written += data
        self._stream.feed(data)
        self.screens.append(self.lines)
        return bool(data)


def is_live(lines: list[str]) -> bool:
    return any(re.match(f"{SPINNER} install: ", line) for line in lines)


def test_terminal_shows_the_progress_and_keeps_one_line_per_stage(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    task = ScreenTask(project, "install", "push")
    assert task.end() == 0
    # Steps that are shorter than the refresh interval can be missing.
    assert task.shown_lines(rf"^{SPINNER} install: {TIME}, (building|listing) .* \([1-6] of 6\)")
    assert task.shown_lines(rf"^{SPINNER} install: {TIME}, (committing|assembling)$")
    assert task.shown_lines(r"^  │ \+ guix package --install=hello --install=greet$")
    assert task.shown_lines(r"^  │ (?!\+ guix package )")
    # The first call on a machine also prints the chosen sandbox.
    lines = [line for line in task.lines if not line.startswith("sandbox: ")]
    assert max(map(len, task.screens)) <= 1 + 1 + 1 + 6
    engine, install, added, push, digest = lines
    assert engine.startswith("engine: ")
    assert re.fullmatch(rf"install: {project.tag('install')}, {SIZE}, {TIME}", install)
    assert added == "install: added greet@1.0, hello@2.12.2"
    assert re.fullmatch(rf"push: {project.image}, (at least )?{SIZE} moved, {TIME}", push)
    assert re.match(rf"{project.image}@sha256:", digest)
    log = (project.directory / "out" / "logs" / "install.log").read_text()
    assert "The following packages will be installed:\n" in log
    assert log.count("successfully built /gnu/store/") == 6


def test_terminal_shows_the_steps_of_a_build(new_project: NewProject) -> None:
    project = new_project()
    project.write_dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nRUN echo a line >&2; sleep 1\n")
    task = ScreenTask(project, "base")
    assert task.end() == 0, task.lines
    assert task.shown_lines(rf"^{SPINNER} base: {TIME}, step (2 of 2|3 of 3): RUN echo a line")
    assert re.fullmatch(rf"base: {project.tag('base')}, {SIZE}, {TIME}", task.lines[-1])
    assert "a line\n" in (project.directory / "out" / "logs" / "base.log").read_text()


def test_progress_is_shown_without_colours(new_project: NewProject) -> None:
    task = ScreenTask(new_project("base", "pull"), "install", env={"NO_COLOR": "1"})
    assert task.end() == 0
    assert task.shown_lines(rf"^{SPINNER} install: {TIME}, building ")
    assert not SGR.search(task.written)


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"CI": "true"}])
def test_dumb_terminal_and_ci_get_plain_lines(new_project: NewProject, env: dict[str, str]) -> None:
    task = ScreenTask(new_project("base", "pull"), "install", env=env)
    assert task.end() == 0
    assert b"\x1b" not in task.written
    assert b"building CA certificate bundle...\r\n" in task.written


def test_progress_adapts_to_the_size_of_the_terminal(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    task = ScreenTask(project, "install", size=(30, 6))
    task.wait_for(is_live)
    for columns, rows in ((12, 2), (1, 1), (70, 30)):
        task.resize(columns, rows)
        os.kill(task.process.pid, signal.SIGWINCH)
        time.sleep(0.3)
    assert task.end() == 0
    assert task.shown_lines(r"^  │ ")
    assert task.lines[-2].endswith(" s")
    assert not is_live(task.lines)


LONG_LINE = """
(format (current-error-port) "/gnu/store/~a~%" (make-string 300 #\\a))
(sleep 120)
(specifications->manifest '("hello"))
"""


@pytest.mark.parametrize("columns", [200, 60])
def test_ctrl_c_removes_the_progress_from_the_terminal(
    new_project: NewProject, columns: int
) -> None:
    """The last line of the log, with ^C after it, can be longer than a line of the terminal."""
    project = new_project("base", "pull")
    (project.directory / "manifest.scm").write_text(LONG_LINE)
    project.set(GUIX_MANIFEST="manifest.scm")
    with project.assert_unchanged():
        task = ScreenTask(project, "install", size=(columns, 40))
        task.wait_for(lambda lines: is_live(lines) and "/gnu/store/" in lines[-1])
        task.type(b"\x03")
        assert task.end() == 130
    engine, *_, last = task.lines
    assert engine.startswith("engine: ")
    assert last == "error: interrupted; the unfinished step was undone"
    assert not task.screen.display[task.screen.cursor.y].strip()
    assert not is_live(task.lines)


def test_failure_shows_the_end_of_the_log_and_then_the_error(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    task = ScreenTask(project, "install", "--package=no-such-package", size=(300, 60))
    assert task.end() == 4
    lines = task.lines
    assert not is_live(lines)
    log = project.directory / "out" / "logs" / "install.log"
    assert f"install: end of the log; the whole log is in {log}" in lines
    assert "guix package: error: no-such-package: unknown package" in lines
    assert lines[-1].startswith("error: install: no-such-package: unknown package, ")
    assert "the logs are in" in lines[-1]


@pytest.mark.parametrize("failing", [False, True])
def test_pipe_gets_whole_lines(new_project: NewProject, failing: bool) -> None:
    project = new_project("base", "pull")
    result = project.inv("install", *(["--package=no-such-package"] if failing else []))
    assert result.returncode == (4 if failing else 0)
    assert not re.search(r"[^\n\t -~À-￿]", result.stdout + result.stderr)
    assert ("building CA certificate bundle...\n" in result.stderr) is not failing
    for text in ("\n\n", "\n.\n", "still in progress", "GUIX_PROFILE"):
        assert text not in result.stderr
    assert result.stderr.endswith("\n")


@pytest.mark.parametrize("job", ["GITHUB_ACTIONS", "GITLAB_CI"])
@pytest.mark.parametrize("failing", [False, True])
def test_ci_log_has_one_group_for_each_stage(
    new_project: NewProject, job: str, failing: bool
) -> None:
    runs_all_stages = job == "GITLAB_CI" and not failing
    project = new_project(*([] if runs_all_stages else ["base", "pull"]))
    stages = ["base", "pull", "install"] if runs_all_stages else ["install"]
    options = ["--package=no-such-package"] if failing else []
    result = project.inv(*stages, *options, env={job: "true", "CI": "true"})
    assert result.returncode == (4 if failing else 0)
    log, depth, names, ungrouped = result.stderr, 0, [], []
    word = ""
    for line in log.split("\n"):
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
            ungrouped.append(line)
        assert depth in (0, 1)
    assert (depth, word) == (0, "")
    assert names == stages
    assert ("::group::" in log) is (job == "GITHUB_ACTIONS")
    assert not any("building /gnu" in line for line in ungrouped)
    *_, result_line, last = filter(None, ungrouped)
    assert (last if failing else result_line).startswith(
        ("::error::install: " if job == "GITHUB_ACTIONS" else "error: install: ")
        if failing
        else f"install: {project.tag('install')}, "
    )


def test_quiet_prints_only_results_and_errors(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    result = project.ok("install", "--quiet")
    assert (result.stdout, result.stderr.partition("\n")[2]) == ("", "")
    project.set(OUTPUT="quiet")
    pushed = project.ok("push")
    assert re.fullmatch(rf"{project.image}@sha256:\w+\n", pushed.stdout)
    assert pushed.stderr == ""
    failed = project.inv("install", "--package=no-such-package")
    assert "no-such-package: unknown package" in failed.stderr
    assert expect_error(failed, 4).startswith("error: install: no-such-package: unknown")


def test_verbose_prints_the_log_of_guix(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    output = project.ok("install", "--verbose").stderr
    log = (project.directory / "out" / "logs" / "install.log").read_text()
    assert log in output
    assert output.count("successfully built /gnu/store/") == 6
    # The option is no input of the stage.
    assert "install: up to date" in project.ok("install").stderr


# --- Downloads -------------------------------------------------------------------------------


@contextmanager
def create_network(docker: Docker, name: str) -> Iterator[str]:
    """Create a network of the engine, and yield the address of this machine in it."""
    result = docker("network", "create", "--driver=bridge", name)
    if result.returncode:
        pytest.skip(f"this engine cannot create a network: {result.stderr}")
    try:
        yield docker.ok("network", "inspect", "--format={{(index .IPAM.Config 0).Gateway}}", name)
    finally:
        docker("network", "rm", name)


@contextmanager
def serve_slowly(directory: Path, host: str) -> Iterator[str]:
    """Run a substitute server whose downloads take some seconds, and yield its address."""

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
            chunks = 16 if "/nar/" in self.path else 1
            size = len(data) // chunks + 1
            for start in range(0, len(data), size):
                self.wfile.write(data[start : start + size])
                time.sleep(0.25 if chunks > 1 else 0)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer((host, 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{host}:{server.server_address[1]}"
        server.shutdown()


def test_downloads_are_shown_with_size_and_rate(
    new_project: NewProject, factory: ProjectFactory, docker: Docker
) -> None:
    name = f"guix-tasks-test-{factory.token}"
    with (
        create_network(docker, name) as host,
        serve_slowly(factory.offline / "substitutes", host) as server,
    ):
        project = new_project("base", "pull", NETWORK=name, GUIX_SUBSTITUTE_URLS=server)
        task = ScreenTask(project, "install")
        assert task.end() == 0, task.lines
    assert task.shown_lines(rf"substitute 1 of 1: hello-2\.12\.2, {SIZE}(?: of {SIZE})?, {SIZE}/s")
