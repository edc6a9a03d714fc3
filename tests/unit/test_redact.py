"""That no secret comes through the filter, in whatever pieces, and all else does unchanged."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shlex
from contextlib import suppress
from urllib.parse import quote

import pytest
from fake_engine import STEADY, Heard, forget_secrets
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.bootstrap.service import wait_until
from guix_tasks.errors import StageError
from guix_tasks.ui import redact
from guix_tasks.ui.console import Console, Display
from guix_tasks.ui.log import LogReader

SECRET = "hunter2-$x"  # noqa: S105

# What replaces a secret must not be able to make a part of one.
LETTERS = "ab:/@$ \"'\\%é"
SECRETS = st.lists(st.text(LETTERS, min_size=3, max_size=8), min_size=1, max_size=4)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def passed(pieces: list[bytes], *, accounts: bool = True) -> bytes:
    found: list[bytes] = []
    stream = redact.Stream(found.append, accounts=accounts)
    for piece in pieces:
        stream.add(piece)
    stream.end()
    return b"".join(found)


# --- Any text, any pieces -------------------------------------------------------------------


@STEADY
@given(SECRETS, st.data(), st.lists(st.integers(0, 200), max_size=6))
def test_no_secret_comes_through_in_any_pieces(
    secrets: list[str], data: st.DataObject, places: list[int]
) -> None:
    forget_secrets()
    redact.add(*secrets)
    texts = st.lists(st.one_of(st.sampled_from(secrets), st.text(LETTERS, max_size=6)))
    text = "".join(data.draw(texts)).encode()
    for accounts in (False, True):
        said = passed(cut(text, places), accounts=accounts)
        assert said == passed([text], accounts=accounts)
        for secret in secrets:
            assert len(secret.strip()) < redact.LEAST or secret.strip().encode() not in said


@STEADY
@given(st.lists(st.binary(max_size=30)))
def test_bytes_without_a_secret_come_out_unchanged(pieces: list[bytes]) -> None:
    forget_secrets()
    redact.add("a-secret-that-is-in-none-of-it")
    assert passed(pieces, accounts=False) == b"".join(pieces)


@STEADY
@given(st.text(st.characters(codec="utf-8", exclude_characters="@=")))
def test_text_without_secrets_is_unchanged(text: str) -> None:
    forget_secrets()
    redact.add("a-secret-that-is-in-none-of-it")
    assert redact.clean(text) == text
    assert passed([text.encode()]) == text.encode()


def test_of_a_stream_nothing_is_held_back_that_can_be_no_secret() -> None:
    """What moves on a terminal has to move."""
    redact.add(SECRET)
    found: list[bytes] = []
    stream = redact.Stream(found.append)
    for piece in (b"10%", b"\r20% h", b"o", b"\nhunter2-$", b"x."):
        stream.add(piece)
    assert found == [b"10%", b"\r20% ", b"ho", b"\n", b"***."]


def test_a_secret_that_is_in_the_beginning_of_another_is_not_cut() -> None:
    redact.add("hello-ab", "abxyz")
    assert passed([b"hello-ab", b"q"]) == b"***q"
    assert passed([b"hello-ab", b"xyz"]) == b"***xyz"


# --- How a secret may be written ------------------------------------------------------------


@pytest.mark.parametrize("secret", [SECRET, 'a"b\\c', "it's so", "p/w?d #1", "käse-ü", "p%2Fw"])
def test_a_secret_is_hidden_however_it_is_written(secret: str) -> None:
    redact.add(secret)
    for way in (
        secret,
        quote(secret, safe=""),
        quote(secret),
        json.dumps(secret),
        json.dumps(secret, ensure_ascii=False),
        repr(secret),
        shlex.join(["x", f"--build-arg=A={secret}"]),
        base64.b64encode(secret.encode()).decode(),
    ):
        said = redact.clean(f"<{way}>")
        assert "***" in said
        assert secret not in said
        assert way.strip("'\"") not in said


@pytest.mark.parametrize("trivial", ["", " ", "a", "ab", "\n", "  x  "])
def test_short_text_is_not_redacted(trivial: str) -> None:
    redact.add(trivial)
    assert redact.clean("ab  x a cab\n") == "ab  x a cab\n"


def test_each_long_line_of_a_key_is_redacted() -> None:
    redact.add("-----BEGIN KEY-----\nMIIEabcdefgh\n{\n==\n")
    assert redact.clean("x MIIEabcdefgh { ==") == "x *** { =="


def test_an_account_in_a_url_is_hidden_whoever_wrote_it() -> None:
    for text, said in (
        ("https://me:tok@git.test/x", "https://***@git.test/x"),
        ("https://ghp_0@git.test/x", "https://***@git.test/x"),
        ("ssh://me:tok@host", "ssh://***@host"),
        ("https://git.test/a@b, me@mail.test", "https://git.test/a@b, me@mail.test"),
    ):
        assert redact.clean(text) == said
        assert passed([bytes([each]) for each in text.encode()]) == said.encode()
    # The user of an SSH address is no secret, and a command is there to be pasted.
    assert redact.clean("docker buildx create ssh://me@host") == (
        "docker buildx create ssh://me@host"
    )


def test_the_value_of_a_secret_option_is_hidden_and_the_path_of_a_file_is_not() -> None:
    said = redact.clean(
        "type=s3,secret_access_key=abc,x=1 TOKEN=abc 'Password=abc' --secret=id=npm,src=/f "
        "DOCKER_PASSWORD_FILE=/f"
    )
    assert said == (
        "type=s3,secret_access_key=***,x=1 TOKEN=*** 'Password=***' --secret=id=npm,src=/f "
        "DOCKER_PASSWORD_FILE=/f"
    )


# --- Everything that is said ----------------------------------------------------------------


@pytest.mark.parametrize("display", [Display.PLAIN, Display.VERBOSE, Display.QUIET, Display.LIVE])
def test_a_console_shows_no_secret(display: Display) -> None:
    redact.add(SECRET)
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err, display)
    for say in (console.print, console.warn, console.error, console.result):
        say(f"a {SECRET} b")
    console.command(["docker", "build", f"--build-arg=A={SECRET}"])
    console.table(["name", SECRET], [[SECRET, "x"]])
    half, rest = SECRET[:4].encode(), SECRET[4:].encode()
    for error in (False, True):
        console.stream(b"x" + half, error=error)
        console.stream(rest + b"y\n", error=error)
    with suppress(StageError), console.step(f"a {SECRET}") as step:
        step.show_activity(lambda: f"doing {SECRET}")
        log = LogReader(step.log)
        log.add(b"from " + half)
        log.add(rest + b"\nand " + half)
        log.add(rest)
        log.end()
        console.detail(f"a {SECRET}")
        if display is Display.LIVE:
            assert wait_until(lambda: "doing" in err.getvalue(), 20)
        raise StageError(SECRET)
    said = out.getvalue() + err.getvalue()
    assert SECRET not in said
    assert "from ***\nand ***\n" in said


def test_a_secret_that_is_a_common_word_hides_no_fault() -> None:
    redact.add("guix")
    shown: list[bytes] = []
    log = LogReader(shown.extend)
    assert log.read(b"guix 1%\rguix: error: x\n") == ["guix 1%", "guix: error: x"]
    assert shown == [b"***: error: x"]


def test_held_output_precedes_the_next_message() -> None:
    redact.add(SECRET)
    console = Heard()
    console.stream(b"hunter")
    console.print("done")
    assert console.text == "hunter\ndone\n"


def test_the_output_of_a_command_keeps_what_only_looks_like_an_account() -> None:
    """It may be an archive."""
    redact.add(SECRET)
    out = io.StringIO()
    console = Console(out)
    data = "\0 git+ssh://a:b@c TOKEN=x \n"
    console.stream(data.encode(), error=False)
    console.end_streams()
    assert out.getvalue() == data
