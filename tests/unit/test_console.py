"""What a person sees: where it goes, and how sizes and times are said."""

from __future__ import annotations

import errno
import io
import re
import shlex

import pytest
from fake_engine import STEADY, Heard
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.console import (
    Console,
    Log,
    TransferProgress,
    human_size,
    human_time,
    printable,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (12_345, "12.3 kB"),
        (123_456, "123 kB"),
        (637_000_000, "637 MB"),
        (1_000_000_000, "1 GB"),
        (2_500_000_000_000, "2.5 TB"),
    ],
)
def test_a_size(size: int, said: str) -> None:
    assert human_size(size) == said


@pytest.mark.parametrize("size", [999_600, 999_999, 999_500_000, 999_999_999_999])
def test_a_size_that_is_rounded_up_takes_the_next_unit(size: int) -> None:
    assert re.fullmatch(r"1 (MB|GB|TB)", human_size(size))


@STEADY
@given(st.integers(0, 10**15))
def test_any_size_has_three_digits_and_a_unit(size: int) -> None:
    text = human_size(size)
    if "e+" in text:
        return  # see above
    number, unit = text.split(" ")
    value = float(number) * 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert abs(value - size) <= size / 100
    assert len(number.replace(".", "")) <= 4


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (3.24, "3.2 s"),
        (59.9, "59.9 s"),
        (60, "1 min 0 s"),
        (119.7, "2 min 0 s"),
        (250, "4 min 10 s"),
        (3599.8, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_a_time(seconds: float, said: str) -> None:
    assert human_time(seconds) == said


def test_a_time_that_is_rounded_up_takes_the_next_unit() -> None:
    assert human_time(59.96) == "1 min 0 s"


def test_only_what_was_asked_for_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.result("result")
    console.say("said")
    console.warn("careful")
    console.error("wrong")
    console.command(["docker", "run", "a b"])
    console.stream(b"log\n")
    console.stream(b"output\n", error=False)
    seen = capsys.readouterr()
    assert seen.out == "result\noutput\n"
    assert seen.err.splitlines() == [
        "said", "warning: careful", "error: wrong", "+ docker run 'a b'", "log",
    ]  # fmt: skip


@STEADY
@given(st.lists(st.text().filter(str.isprintable), min_size=1))
def test_a_command_can_be_pasted(argv: list[str]) -> None:
    console = Heard()
    console.command(argv)
    assert shlex.split(console.text.removeprefix("+ ")) == argv


def test_a_stream_is_handed_on_byte_by_byte() -> None:
    raw = io.BytesIO()
    console = Console(err=io.TextIOWrapper(raw, encoding="ascii"))
    console.stream(b"\xff\xc3")
    console.stream(b"\xa9\n")
    assert raw.getvalue() == b"\xff\xc3\xa9\n"


def test_a_stream_and_lines_keep_their_order() -> None:
    raw = io.BytesIO()
    console = Console(err=io.TextIOWrapper(raw, encoding="utf-8"))
    console.say("one")
    console.stream(b"two\n")
    console.say("three")
    assert raw.getvalue() == b"one\ntwo\nthree\n"


def test_a_table_has_columns_as_wide_as_they_need() -> None:
    console = Heard()
    console.table(("a", "long header"), [("long cell", "x"), ("", "")])
    assert console.results.getvalue() == "a          long header\nlong cell  x\n\n"


def test_a_push_says_a_line_a_layer() -> None:
    console = Heard()
    progress = TransferProgress(console, "push x")
    for layer, status, current, total in (
        ("aaa", "Preparing", 0, 0),
        ("aaa", "Pushing", 500, 1000),
        ("aaa", "Pushing", 1200, 1000),
        ("aaa", "Pushed", 0, 0),
        ("aaa", "Pushed", 0, 0),
        ("bbb", "Layer already exists", 0, 0),
        ("ccc", "Mounted from team/other", 0, 0),
    ):
        progress(layer, status, current, total)
    progress.end()
    assert console.text.splitlines() == [
        "push x: aaa pushed (1 kB)",
        "push x: bbb layer already exists",
        "push x: ccc mounted from team/other",
    ]


def test_a_push_on_a_terminal_is_one_line_that_moves() -> None:
    terminal = Terminal()
    progress = TransferProgress(Console(err=terminal), "push x")
    progress("aaa", "Pushing", 500, 1000)
    progress("bbb", "Pushing", 5000, 1000)
    progress.end()
    assert "\n" not in terminal.getvalue()
    *_, last, end = terminal.getvalue().split("\r\x1b[K")
    assert last == "push x: 1.5 kB of 2 kB"
    assert end == ""


# --- Logs -----------------------------------------------------------------------------------

PIECES = [b"one\ntw", b"o\r 10%\r\x1b[K 100%\nb\xe9\xff", b"\0", b"\n", b"no end"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_is_kept_byte_by_byte_whatever_is_shown(*, terminal: bool) -> None:
    kept = io.BytesIO()
    log = Log(Console(err=Terminal() if terminal else io.StringIO()), kept)
    for piece in PIECES:
        log.add(piece)
    assert kept.getvalue() == b"".join(PIECES)
    log.end()
    assert kept.getvalue() == b"".join(PIECES)


def shown(kept: io.BytesIO | None) -> str:
    err = io.StringIO()
    log = Log(Console(err=err), kept)
    for piece in PIECES:
        log.add(piece)
    log.end()
    return err.getvalue()


def test_a_log_is_shown_the_same_where_it_is_kept() -> None:
    assert shown(io.BytesIO()) == shown(None)
    assert shown(None).splitlines()[:2] == ["one", " 100%"]


def test_a_log_that_can_be_kept_no_longer_is_still_shown() -> None:
    class Full(io.BytesIO):
        calls = 0

        def write(self, data: object) -> int:
            Full.calls += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    assert shown(Full()) == shown(None)
    assert Full.calls == 1


# --- What others word -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café → 漢字", "café → 漢字"),
        ("\x1b[2J\x9b\a", r"\x1b[2J\x9b\x07"),
        ("one\ntwo\r\u2028", r"one\ntwo\r\u2028"),
        ("\u202e\u200f\udcff", r"\u202e\u200f\udcff"),
    ],
)
def test_what_controls_a_terminal_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown
    console = Heard()
    console.error(text)
    console.warn(text)
    console.table([text], [[text]])
    assert console.text == f"{shown}\n{shown}\nerror: {shown}\nwarning: {shown}\n"


def test_a_message_of_ours_may_have_several_lines() -> None:
    console = Heard()
    console.say("one\n\ttwo\x1b")
    assert console.text == "one\n\ttwo\\x1b\n"
