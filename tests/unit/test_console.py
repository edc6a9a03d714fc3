"""Output of the console, and the format of sizes and times."""

from __future__ import annotations

import errno
import io
import re
import shlex

import pytest
from fake_engine import DETERMINISTIC, BufferConsole
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.stages.transfer import TransferProgress
from guix_tasks.ui.console import Console
from guix_tasks.ui.format import human_size, human_time, printable
from guix_tasks.ui.log import LogReader


@pytest.mark.parametrize(
    ("size", "text"),
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
def test_size_has_a_unit(size: int, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize("size", [999_600, 999_999, 999_500_000, 999_999_999_999])
def test_size_is_rounded_up_to_the_next_unit(size: int) -> None:
    assert re.fullmatch(r"1 (MB|GB|TB)", human_size(size))


@DETERMINISTIC
@given(st.integers(0, 10**15))
def test_size_has_three_digits_and_a_unit(size: int) -> None:
    text = human_size(size)
    if "e+" in text:
        return  # test_size_is_rounded_up_to_the_next_unit
    number, unit = text.split(" ")
    value = float(number) * 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert abs(value - size) <= size / 100
    assert len(number.replace(".", "")) <= 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (3.24, "3.2 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 0 s"),
        (60, "1 min 0 s"),
        (119.7, "2 min 0 s"),
        (250, "4 min 10 s"),
        (3599.8, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_time_has_a_unit(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


def test_standard_output_contains_only_results(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.result("result")
    console.print("message")
    console.warn("careful")
    console.error("wrong")
    console.command(["docker", "run", "a b"])
    console.stream(b"log\n")
    console.stream(b"output\n", error=False)
    output = capsys.readouterr()
    assert output.out == "result\noutput\n"
    assert output.err.splitlines() == [
        "message", "warning: careful", "error: wrong", "+ docker run 'a b'", "log",
    ]  # fmt: skip


@DETERMINISTIC
@given(st.lists(st.text().filter(str.isprintable), min_size=1))
def test_command_is_quoted_for_a_shell(argv: list[str]) -> None:
    console = BufferConsole()
    console.command(argv)
    assert shlex.split(console.text.removeprefix("+ ")) == argv


def test_stream_is_printed_unchanged() -> None:
    raw = io.BytesIO()
    console = Console(err=io.TextIOWrapper(raw, encoding="ascii"))
    console.stream(b"\xff\xc3")
    console.stream(b"\xa9\n")
    assert raw.getvalue() == b"\xff\xc3\xa9\n"


def test_result_outside_the_locale_is_escaped() -> None:
    raw = io.BytesIO()
    Console(out=io.TextIOWrapper(raw, encoding="ascii")).result("one café")
    assert raw.getvalue() == rb"one caf\xe9" + b"\n"


def test_stream_and_lines_keep_their_order() -> None:
    raw = io.BytesIO()
    console = Console(err=io.TextIOWrapper(raw, encoding="utf-8"))
    console.print("one")
    console.stream(b"two\n")
    console.print("three")
    assert raw.getvalue() == b"one\ntwo\nthree\n"


def test_columns_of_a_table_are_aligned() -> None:
    console = BufferConsole()
    console.table(("a", "long header"), [("long cell", "x"), ("", "")])
    assert console.results.getvalue() == "a          long header\nlong cell  x\n\n"


class Terminal(io.StringIO):
    """A terminal with the width of ``COLUMNS``."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("columns", "terminal", "table"),
    [
        (9, True, "a  b\n1  222222\n"),
        (8, True, "b\n222222\n"),
        (5, True, "b\n222222\n"),
        (5, False, "a  b\n1  222222\n"),
    ],
)
def test_first_table_that_fits_is_printed(
    monkeypatch: pytest.MonkeyPatch, columns: int, terminal: bool, table: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal() if terminal else io.StringIO()
    Console(out=out).table(("a", "b"), [("1", "222222")], narrower=[(("b",), [("222222",)])])
    assert out.getvalue() == table


def test_push_prints_a_line_for_each_moved_layer() -> None:
    console = BufferConsole()
    with console.step("push x", has_log=False) as step:
        progress = TransferProgress(console, "push", step)
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
    assert console.text.splitlines() == ["push: aaa pushed (1 kB)"]


def test_extracted_bytes_do_not_count_as_transferred() -> None:
    console = BufferConsole()
    with console.step("pull x", has_log=False) as step:
        progress = TransferProgress(console, "pull", step)
        progress("aaa", "Downloading", 500, 1000)
        assert progress.moved == 500
        assert progress.text.startswith("500 B of 1 kB, ")
        progress("aaa", "Downloading", 1000, 1000)
        progress("aaa", "Extracting", 10, 1000)
        progress("aaa", "Pull complete", 0, 0)
        assert progress.moved == 1000


@pytest.mark.parametrize(
    ("events", "exact", "summary"),
    [
        ([("Pushing", 5, 1000), ("Pushed", 0, 0)], True, "1 kB moved"),
        ([("Layer already exists", 0, 0)], False, "0 B moved"),
        ([("Pushed", 0, 0)], True, "0 B moved"),
        ([("Pushed", 0, 0)], False, "small layers moved"),
    ],
)
def test_summary_allows_for_unreported_bytes(
    events: list[tuple[str, int, int]], exact: bool, summary: str
) -> None:
    console = BufferConsole()
    with console.step("push x", has_log=False) as step:
        progress = TransferProgress(console, "push", step)
        for status, current, total in events:
            progress("aaa", status, current, total)
    assert progress.summary(exact=exact) == summary
    progress("bbb", "Pushing", 10, 20)
    progress("ccc", "Pushed", 0, 0)
    assert progress.summary(exact=False).startswith("at least ")


# --- Logs -----------------------------------------------------------------------------------

CHUNKS = [b"one\ntw", b"o\r 10%\r\x1b[K 100%\nb\xe9\xff", b"\0", b"\n", b"no end"]


def read_log(file: io.BytesIO | None, *chunks: bytes) -> list[bytes]:
    lines: list[bytes] = []
    log = LogReader(lines.extend, file)
    for chunk in chunks or CHUNKS:
        log.add(chunk)
    log.end()
    return lines


def test_file_of_a_log_is_unchanged() -> None:
    file = io.BytesIO()
    read_log(file)
    assert file.getvalue() == b"".join(CHUNKS)


def test_log_with_a_file_is_shown_the_same() -> None:
    assert read_log(io.BytesIO()) == read_log(None) == [b"one", b" 100%", b"b\xe9\xff", b"no end"]


def test_log_is_shown_if_its_file_cannot_be_written() -> None:
    class Full(io.BytesIO):
        calls = 0

        def write(self, data: object) -> int:
            Full.calls += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    assert read_log(Full()) == read_log(None)
    assert Full.calls == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"plain, caf\xc3\xa9\tand a tab", b"plain, caf\xc3\xa9\tand a tab"),
        (b"\x1b[1;31mred\x1b[0m", b"red"),
        (b"\x1b]0;title\x07after", b"after"),
        (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", b"link"),
        (b"\x1b]0;no end", b""),
        (b"\x1bPq#0\x1b\\sixel", b"sixel"),
        (b"\x1bcreset\x1b", b"reset"),
        (b"a\x08\x07\x7fb", b"ab"),
        (b"c1\xc2\x9b2Jx\xc2\x90", b"c12Jx"),
        (b"section_end:1:x\r\x1b[0Kheader", b"header"),
        (b"\x1b[?25l\x1b[2J\x1b[>c\x1b(B.", b"."),
    ],
)
def test_terminal_sequences_are_removed_from_a_log(line: bytes, expected: bytes) -> None:
    assert read_log(None, line + b"\n") == [expected]


@DETERMINISTIC
@given(st.lists(st.binary()))
def test_log_never_has_control_characters(chunks: list[bytes]) -> None:
    for line in read_log(None, *chunks, b"\n"):
        assert not re.search(rb"[\x00-\x08\x0a-\x1f\x7f]|\xc2[\x80-\x9f]", line)


# --- Messages -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("café → 漢字", "café → 漢字"),
        ("\x1b[2J\x9b\a", r"\x1b[2J\x9b\x07"),
        ("one\ntwo\r\u2028", r"one\ntwo\r\u2028"),
        ("\u202e\u200f\udcff", r"\u202e\u200f\udcff"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    console = BufferConsole()
    console.error(text)
    console.warn(text)
    console.table([text], [[text]])
    assert console.text == f"{expected}\n{expected}\nerror: {expected}\nwarning: {expected}\n"


def test_message_can_have_several_lines() -> None:
    console = BufferConsole()
    console.print("one\n\ttwo\x1b")
    assert console.text == "one\n\ttwo\\x1b\n"


def test_empty_part_of_a_log_prints_nothing() -> None:
    err = io.StringIO()
    console = Console(out=io.StringIO(), err=err)
    console.put(b"one\n")
    console.put(b"")
    console.put(b"two\n")
    assert err.getvalue() == "one\ntwo\n"
