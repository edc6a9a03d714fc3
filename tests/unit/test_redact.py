"""The filter of secrets: secrets are redacted in any chunks, and other text is unchanged."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shlex
from contextlib import suppress
from urllib.parse import quote

import pytest
from fake_engine import DETERMINISTIC, BufferConsole, clear_secrets
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.bootstrap.service import wait_until
from guix_tasks.errors import StageError
from guix_tasks.ui import redact
from guix_tasks.ui.console import Console, Display
from guix_tasks.ui.log import LogReader

SECRET = "hunter2-$x"  # noqa: S105

# The replacement of a secret must not contain a part of a secret.
LETTERS = "ab:/@$ \"'\\%é"
SECRETS = st.lists(st.text(LETTERS, min_size=3, max_size=8), min_size=1, max_size=4)


def split(data: bytes, positions: list[int]) -> list[bytes]:
    ends = [0, *sorted(position % (len(data) + 1) for position in positions), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def filter_chunks(chunks: list[bytes], *, accounts: bool = True) -> bytes:
    output: list[bytes] = []
    stream = redact.Stream(output.append, accounts=accounts)
    for chunk in chunks:
        stream.add(chunk)
    stream.end()
    return b"".join(output)


# --- Any text in any chunks -----------------------------------------------------------------


@DETERMINISTIC
@given(SECRETS, st.data(), st.lists(st.integers(0, 200), max_size=6))
def test_secret_is_redacted_in_any_chunks(
    secrets: list[str], data: st.DataObject, positions: list[int]
) -> None:
    clear_secrets()
    redact.add(*secrets)
    texts = st.lists(st.one_of(st.sampled_from(secrets), st.text(LETTERS, max_size=6)))
    text = "".join(data.draw(texts)).encode()
    for accounts in (False, True):
        output = filter_chunks(split(text, positions), accounts=accounts)
        assert output == filter_chunks([text], accounts=accounts)
        for secret in secrets:
            assert len(secret.strip()) < redact.LEAST or secret.strip().encode() not in output


@DETERMINISTIC
@given(st.lists(st.binary(max_size=30)))
def test_bytes_without_secrets_are_unchanged(chunks: list[bytes]) -> None:
    clear_secrets()
    redact.add("a-secret-that-is-not-in-the-text")
    assert filter_chunks(chunks, accounts=False) == b"".join(chunks)


@DETERMINISTIC
@given(st.text(st.characters(codec="utf-8", exclude_characters="@=")))
def test_text_without_secrets_is_unchanged(text: str) -> None:
    clear_secrets()
    redact.add("a-secret-that-is-not-in-the-text")
    assert redact.clean(text) == text
    assert filter_chunks([text.encode()]) == text.encode()


def test_stream_holds_back_only_possible_secrets() -> None:
    """Progress on a terminal must not be delayed."""
    redact.add(SECRET)
    output: list[bytes] = []
    stream = redact.Stream(output.append)
    for chunk in (b"10%", b"\r20% h", b"o", b"\nhunter2-$", b"x."):
        stream.add(chunk)
    assert output == [b"10%", b"\r20% ", b"ho", b"\n", b"***."]


def test_overlapping_secrets_are_redacted() -> None:
    redact.add("hello-ab", "abxyz")
    assert filter_chunks([b"hello-ab", b"q"]) == b"***q"
    assert filter_chunks([b"hello-ab", b"xyz"]) == b"***xyz"


# --- Spellings of secrets -------------------------------------------------------------------


@pytest.mark.parametrize("secret", [SECRET, 'a"b\\c', "it's so", "p/w?d #1", "käse-ü", "p%2Fw"])
def test_secret_is_redacted_in_every_spelling(secret: str) -> None:
    redact.add(secret)
    for spelling in (
        secret,
        quote(secret, safe=""),
        quote(secret),
        json.dumps(secret),
        json.dumps(secret, ensure_ascii=False),
        repr(secret),
        shlex.join(["x", f"--build-arg=A={secret}"]),
        base64.b64encode(secret.encode()).decode(),
    ):
        output = redact.clean(f"<{spelling}>")
        assert "***" in output
        assert secret not in output
        assert spelling.strip("'\"") not in output


@pytest.mark.parametrize("text", ["", " ", "a", "ab", "\n", "  x  "])
def test_short_text_is_not_redacted(text: str) -> None:
    redact.add(text)
    assert redact.clean("ab  x a cab\n") == "ab  x a cab\n"


def test_long_lines_of_a_key_are_redacted() -> None:
    redact.add("-----BEGIN KEY-----\nMIIEabcdefgh\n{\n==\n")
    assert redact.clean("x MIIEabcdefgh { ==") == "x *** { =="


def test_account_in_a_url_is_redacted() -> None:
    for text, expected in (
        ("https://me:tok@git.test/x", "https://***@git.test/x"),
        ("https://ghp_0@git.test/x", "https://***@git.test/x"),
        ("ssh://me:tok@host", "ssh://***@host"),
        ("https://git.test/a@b, me@mail.test", "https://git.test/a@b, me@mail.test"),
    ):
        assert redact.clean(text) == expected
        assert filter_chunks([bytes([byte]) for byte in text.encode()]) == expected.encode()
    # The user of an SSH address is not a secret, and a shown command can be pasted.
    assert redact.clean("docker buildx create ssh://me@host") == (
        "docker buildx create ssh://me@host"
    )


def test_value_of_a_secret_option_is_redacted() -> None:
    output = redact.clean(
        "type=s3,secret_access_key=abc,x=1 TOKEN=abc 'Password=abc' --secret=id=npm,src=/f "
        "DOCKER_PASSWORD_FILE=/f"
    )
    assert output == (
        "type=s3,secret_access_key=***,x=1 TOKEN=*** 'Password=***' --secret=id=npm,src=/f "
        "DOCKER_PASSWORD_FILE=/f"
    )


# --- Console and logs -----------------------------------------------------------------------


@pytest.mark.parametrize("display", [Display.PLAIN, Display.VERBOSE, Display.QUIET, Display.LIVE])
def test_console_shows_no_secret(display: Display) -> None:
    redact.add(SECRET)
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err, display)
    for print_message in (console.print, console.warn, console.error, console.result):
        print_message(f"a {SECRET} b")
    console.command(["docker", "build", f"--build-arg=A={SECRET}"])
    console.table(["name", SECRET], [[SECRET, "x"]])
    start, end = SECRET[:4].encode(), SECRET[4:].encode()
    for error in (False, True):
        console.stream(b"x" + start, error=error)
        console.stream(end + b"y\n", error=error)
    with suppress(StageError), console.step(f"a {SECRET}") as step:
        step.show_activity(lambda: f"doing {SECRET}")
        log = LogReader(step.log)
        log.add(b"from " + start)
        log.add(end + b"\nand " + start)
        log.add(end)
        log.end()
        console.detail(f"a {SECRET}")
        if display is Display.LIVE:
            assert wait_until(lambda: "doing" in err.getvalue(), 20)
        raise StageError(SECRET)
    output = out.getvalue() + err.getvalue()
    assert SECRET not in output
    assert "from ***\nand ***\n" in output


def test_secret_that_is_a_common_word_does_not_hide_an_error() -> None:
    redact.add("guix")
    output: list[bytes] = []
    log = LogReader(output.extend)
    assert log.read(b"guix 1%\rguix: error: x\n") == ["guix 1%", "guix: error: x"]
    assert output == [b"***: error: x"]


def test_held_output_precedes_the_next_message() -> None:
    redact.add(SECRET)
    console = BufferConsole()
    console.stream(b"hunter")
    console.print("done")
    assert console.text == "hunter\ndone\n"


def test_output_of_a_command_keeps_text_like_an_account() -> None:
    """The output can be an archive."""
    redact.add(SECRET)
    out = io.StringIO()
    console = Console(out)
    data = "\0 git+ssh://a:b@c TOKEN=x \n"
    console.stream(data.encode(), error=False)
    console.end_streams()
    assert out.getvalue() == data
