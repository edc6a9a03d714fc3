"""The live display of a running step, and the output that remains after the step."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from unittest.mock import Mock

import pyte
import pytest

from guix_tasks.bootstrap.service import wait_until
from guix_tasks.errors import EngineError, StageError
from guix_tasks.stages.transfer import transfer
from guix_tasks.ui.console import TAIL, Console, Display, resolve_display

SGR = re.compile(r"\x1b\[[0-9;]*m")


class Screen(io.StringIO):
    """A terminal whose screen can be read."""

    encoding = "utf-8"

    def __init__(self, columns: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.screen = pyte.Screen(columns, rows)
        self.screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self.screen)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(rows))
        monkeypatch.setenv("TERM", "xterm-256color")

    def write(self, text: str) -> int:
        with self._lock:  # Another thread draws the frames that a test reads.
            self._stream.feed(text)
        return super().write(text)

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        with self._lock:
            return [line.rstrip() for line in self.screen.display if line.strip()]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(80, 24, monkeypatch)


def live_console(screen: io.StringIO) -> Console:
    return Console(err=screen, display=Display.LIVE)


def test_live_part_shows_name_time_activity_and_log(wide: Screen) -> None:
    console = live_console(wide)
    with console.step("install") as step:
        step.show_activity(lambda: "building x (1 of 2)")
        step.log([b"line %d" % number for number in range(1000)])
        assert wait_until(lambda: len(wide.lines) == 7, 20), wide.lines
        assert re.fullmatch(r"⠋? ?. install: [0-9.]+ s, building x \(1 of 2\)", wide.lines[0])
        assert wide.lines[1:] == [f"  │ line {number}" for number in range(994, 1000)]
        console.warn("careful")
        assert wait_until(lambda: len(wide.lines) == 8, 20), wide.lines
        assert wide.lines[0] == "warning: careful"
    console.print("install: done")
    assert wide.lines == ["warning: careful", "install: done"]
    assert not wide.screen.cursor.hidden


def test_short_step_draws_nothing(wide: Screen) -> None:
    with live_console(wide).step("install") as step:
        step.log([b"a line"])
    time.sleep(0.3)
    assert wide.getvalue() == ""


def test_log_cannot_control_the_terminal(wide: Screen) -> None:
    with live_console(wide).step("install") as step:
        step.show_activity(lambda: "\x1b[2Jcleared\n\n")
        step.log([b"\x1b[2J\x1b]0;title\x07", b"[bold]no markup[/bold] :smile:", b"a" * 500])
        assert wait_until(lambda: any("aaa" in line for line in wide.lines), 20)
        assert r"\x1b[2Jcleared\n\n" in wide.lines[0]
        assert wide.lines[1] == r"  │ \x1b[2J\x1b]0;title\x07"
        assert wide.lines[2] == "  │ [bold]no markup[/bold] :smile:"
        assert wide.lines[3] == ("  │ " + "a" * 500)[:75]
        assert wide.screen.title == ""


@pytest.mark.parametrize(("columns", "rows"), [(20, 5), (1, 1), (80, 2)])
def test_small_terminal_shows_part_of_the_log(
    monkeypatch: pytest.MonkeyPatch, columns: int, rows: int
) -> None:
    screen = Screen(columns, rows, monkeypatch)
    with live_console(screen).step("install") as step:
        step.log([b"a line of a log that is long, and another \xe6\xbc\xa2\xe5\xad\x97"] * 20)
        assert wait_until(lambda: len(screen.lines) > 0, 20)
        time.sleep(0.4)
        assert len(screen.lines) <= max(1, rows - 1)
    assert screen.lines == []


def test_long_name_is_cut_and_its_figures_are_kept(wide: Screen) -> None:
    figures = "12.3 MB of 120 MB, 12.3 MB/s"
    with live_console(wide).step(f"pull registry.test:5000/team/{'application' * 9}") as step:
        step.show_activity(lambda: figures)
        assert wait_until(lambda: len(wide.lines) == 1, 20)
        name, _, progress = wide.lines[0].rpartition(": ")
        assert re.fullmatch(rf"[0-9.]+ s, {figures}", progress)
        assert re.match(r".{1,2} pull registry\.test:5000/.*…$", name)


def test_digest_is_abbreviated(wide: Screen) -> None:
    reference = f"localhost:5055/guix-tasks-demo@sha256:{'0123456789abcdef' * 4}"
    with transfer(Mock(console=live_console(wide)), "pull", reference) as progress:
        assert wait_until(lambda: len(wide.lines) == 1, 20)
        short = "pull localhost:5055/guix-tasks-demo@sha256:0123456789ab"
        assert re.match(rf".{{1,2}} {short}: [0-9.]+ s$", wide.lines[0])
        progress("a layer", "Downloading", 12_300_000, 120_000_000)
        assert wait_until(lambda: "12.3 MB of 120 MB, " in wide.lines[0], 20), wide.lines


def test_short_name_is_not_cut(wide: Screen) -> None:
    with live_console(wide).step("buildx.setup") as step:
        step.show_activity(lambda: "building " + "x" * 100)
        assert wait_until(lambda: len(wide.lines) == 1, 20)
        assert re.match(r".{1,2} buildx\.setup: [0-9.]+ s, building xxx", wide.lines[0])


def test_echoed_input_leaves_no_line() -> None:
    """A line of the log fills the width, and the terminal itself echoes ^C there twice."""
    keys = b"\x03\x03"
    script = """
import sys, time
from guix_tasks.ui.console import Console, Display
try:
    with Console(display=Display.LIVE).step("pull") as step:
        step.log([b"a" * 500])
        for _ in range(600):  # a signal may interrupt another thread
            time.sleep(0.1)
except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
"""
    terminal, other = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    screen = pyte.Screen(80, 24)
    stream = pyte.ByteStream(screen)
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
    ):  # fmt: skip
        os.close(other)
        with suppress(OSError):  # Linux reports the closed other end as an error
            while data := os.read(terminal, 1 << 16):
                stream.feed(data)
                if keys and "aaa" in "".join(screen.display):
                    os.write(terminal, keys)
                    keys = b""
    os.close(terminal)
    assert [line.rstrip() for line in screen.display if line.strip()] == ["stopped"]


def test_no_color_removes_colors(wide: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with live_console(wide).step("install") as step:
        step.log([b"a line"])
        assert wait_until(lambda: len(wide.lines) == 2, 20)
    assert "\x1b[2K" in wide.getvalue()
    assert not SGR.search(wide.getvalue())


def test_terminal_without_unicode_gets_ascii(wide: Screen) -> None:
    wide.encoding = "ascii"
    with live_console(wide).step("install") as step:
        step.log(["ein Böses │".encode()])
        assert wait_until(lambda: len(wide.lines) == 2, 20)
    assert wide.getvalue().isascii()


def test_closed_terminal_does_not_end_the_step(wide: Screen) -> None:
    with live_console(wide).step("install") as step:
        assert wait_until(lambda: len(wide.lines) == 1, 20)
        wide.close()
        step.log([b"a line"])
        time.sleep(0.3)


@pytest.mark.parametrize("display", [Display.LIVE, Display.QUIET])
def test_failed_step_leaves_the_end_of_its_log(wide: Screen, display: Display) -> None:
    console = Console(err=wide, display=display)
    with suppress(StageError), console.step("install") as step:
        step.log([b"line %d" % number for number in range(100)])
        time.sleep(0.4)
        raise StageError("no")
    assert wide.getvalue().count("install: end of the log\n") == 1
    tail = [f"line {number}" for number in range(100 - TAIL, 100)]
    assert wide.getvalue().endswith("\n".join(["install: end of the log", *tail, ""]))


def test_engine_error_shows_no_log(wide: Screen) -> None:
    with suppress(EngineError), live_console(wide).step("install") as step:
        step.log([b"a line"])
        raise EngineError("gone")
    assert wide.lines == []


def test_quiet_prints_only_results_warnings_and_errors() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err, Display.QUIET)
    console.print("a message")
    console.detail("a detail")
    with console.step("install") as step:
        step.log([b"a line"])
    console.warn("careful")
    console.error("wrong")
    console.result("a digest")
    assert out.getvalue() == "a digest\n"
    assert err.getvalue() == "warning: careful\nerror: wrong\n"


@pytest.mark.parametrize(
    ("setting", "terminal", "environment", "display"),
    [
        (Display.AUTO, True, {"TERM": "xterm"}, Display.LIVE),
        (Display.AUTO, False, {"TERM": "xterm"}, Display.PLAIN),
        (Display.AUTO, True, {"TERM": "dumb"}, Display.PLAIN),
        (Display.AUTO, True, {}, Display.PLAIN),
        (Display.AUTO, True, {"TERM": "xterm", "CI": "true"}, Display.PLAIN),
        (Display.LIVE, True, {"TERM": "xterm", "CI": "true"}, Display.LIVE),
        (Display.LIVE, False, {"TERM": "xterm"}, Display.PLAIN),
        (Display.PLAIN, True, {"TERM": "xterm"}, Display.PLAIN),
        (Display.QUIET, True, {"TERM": "xterm"}, Display.QUIET),
        (Display.VERBOSE, True, {"TERM": "xterm"}, Display.VERBOSE),
    ],
)
def test_live_display_requires_an_interactive_terminal(
    wide: Screen, setting: Display, terminal: bool, environment: dict[str, str], display: Display
) -> None:
    assert resolve_display(setting, wide if terminal else io.StringIO(), environment) is display


def test_display_without_rich_is_plain(wide: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guix_tasks.ui.console.find_spec", lambda _name: None)
    assert resolve_display(Display.AUTO, wide, {"TERM": "xterm"}) is Display.PLAIN
