"""Channels files, read as Scheme data.  Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_BRANCH = "master"
"""The branch of a channel that names none."""


@dataclass(frozen=True)
class Introduction:
    """Which commit of a channel is trusted first, and the key that signed it."""

    commit: str
    fingerprint: str
    """Of the key, in small letters without spaces."""


@dataclass(frozen=True)
class Channel:
    """A channel as a channels file spells it out."""

    name: str
    url: str
    branch: str | None = None
    commit: str | None = None
    introduction: Introduction | None = None
    """If there is none for Guix's own channel at its own address, Guix's built-in one."""
    computed: frozenset[str] = frozenset()
    """The fields that are computed or inherited, so that nobody knows them before Guix does."""


def channels(text: str) -> dict[str, Channel]:
    """The channels that a channels file spells out, by name.

    The file is a Scheme program; what it computes is not seen here, only forms such as
    ``(channel (name 'guix) (url "…"))``.  ``guix describe`` prints nothing else.
    """
    return {channel.name: channel for channel in _spelled_out(text)}


def _spelled_out(text: str) -> Iterator[Channel]:
    """Each channel that a channels file spells out."""
    for form in _forms(_read(text)):
        fields = {each[0]: each[1] for each in form[1:] if _is_field(each)}
        name, url = fields.get("name"), fields.get("url")
        if form[0] == "channel" and isinstance(name, str) and _is_string(url):
            yield _channel(name, url, fields)


def _channel(name: str, url: str, fields: Mapping[str, Any]) -> Channel:
    known = {each: fields[each] for each in ("branch", "commit") if _is_string(fields.get(each))}
    introduction = _introduction(fields.get("introduction"))
    if introduction:
        known["introduction"] = introduction
    absent = {each for each, datum in fields.items() if datum == _FALSE}
    inherited = {"branch", "commit", "introduction"} if "inherit" in fields else set()
    computed = (fields.keys() & {"branch", "commit", "introduction"} | inherited) - known.keys()
    if name == "guix" and url in _OFFICIAL_URLS and "introduction" not in computed - absent:
        known.setdefault("introduction", _OFFICIAL_INTRODUCTION)
    return Channel(name, url, **known, computed=frozenset(computed - absent))


def _introduction(datum: object) -> Introduction | None:
    """What ``(make-channel-introduction "…" (openpgp-fingerprint "…"))`` spells out."""
    match datum:
        case ["make-channel-introduction", commit, ["openpgp-fingerprint", key]] if _is_string(
            commit
        ) and _is_string(key):
            return Introduction(commit.lower(), "".join(key.split()).lower())
    return None


_OFFICIAL_URLS = ("https://git.guix.gnu.org/guix.git", "https://git.savannah.gnu.org/git/guix.git")
"""Where Guix is from (``%default-channel-url``, and what that was before 1.5)."""

_OFFICIAL_INTRODUCTION = Introduction(
    "9edb3f66fd807b096b48283debdcddccfea34bad", "bbb02ddf2ceaf6a80d1de643a2a06df2a33a54fa"
)
"""The one that Guix has built in (``%guix-channel-introduction``)."""


def unauthenticated(text: str) -> list[str]:
    """The channels that a channels file spells out without an introduction, by name.

    Guix authenticates none of these, and says nothing, but for its own channel: that has an
    introduction built in for its own address, and is refused from any other.  What a channel
    inherits is not seen here; ``guix describe`` spells it out.
    """
    return [
        channel.name
        for channel in _spelled_out(text)
        if channel.introduction is None and "introduction" not in channel.computed
    ]


def is_literal(text: str) -> bool:
    """Whether a channels file spells out all its channels: one list of them and nothing else."""
    forms = _read(text)
    one = forms[0] if len(forms) == 1 and isinstance(forms[0], list) else []
    spelled = [each for each in one[1:] if isinstance(each, list) and each[:1] == ["channel"]]
    known = [channel for channel in channels(text).values() if not channel.computed]
    return one[:1] == ["list"] and len(one) == len(spelled) + 1 == len(known) + 1


class _Word(str):
    """A word of Scheme that is not a string: a symbol, a number, ``#f``."""

    __slots__ = ()


_FALSE = _Word("#f")

_TOKEN = re.compile(
    r"""\s+|;[^\n]*
    |(\#;|[()[\]]|"(?:[^"\\]|\\.)*"|\#\\(?:[^\s()[\]";]+|.)|[^\s()[\]";]+)""",
    re.DOTALL | re.VERBOSE,
)


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """The words of a Scheme program, and where each is.

    A string or comment that is not closed is a last word of its first characters.
    """
    at = 0
    while at < len(text):
        if text.startswith("#|", at):
            end = _comment_end(text, at)
            if end is None:
                yield "#|", at
                return
            at = end
        elif found := _TOKEN.match(text, at):
            if found[1]:
                yield found[1], at
            at = found.end()
        else:
            yield '"', at
            return


def _comment_end(text: str, start: int) -> int | None:
    """Where a block comment ends; they nest."""
    depth = 0
    for mark in re.compile(r"#\||\|#").finditer(text, start):
        depth += 1 if mark[0] == "#|" else -1
        if depth == 0:
            return mark.end()
    return None


_NOT_CLOSED = {'"': "the string is not closed", "#|": "the comment is not closed"}

_CLOSED_BY = {"(": ")", "[": "]"}


def syntax_error(text: str) -> tuple[int, str] | None:
    """The line and the reason why Guile cannot read a program; None if it can.

    Raises nothing: what a program means is for Guix to judge.
    """
    opened: list[tuple[str, int]] = []
    for word, at in _tokens(text):
        if word in _NOT_CLOSED:
            return _line(text, at), _NOT_CLOSED[word]
        if word in _CLOSED_BY:
            opened.append((word, at))
        elif word in _CLOSED_BY.values() and (not opened or _CLOSED_BY[opened.pop()[0]] != word):
            return _line(text, at), f"unexpected {word}"
    return (_line(text, opened[-1][1]), f"{opened[-1][0]} is not closed") if opened else None


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _read(text: str) -> list[Any]:
    """Scheme's data as lists and words; strings without their quotes, quoted words without theirs.

    Comments are left out, those of one datum (``#;``) included.  Parentheses that do not match
    are taken as they come; see ``syntax_error``.
    """
    stack: list[list[Any]] = [[]]
    skipped: list[tuple[int, int]] = []  # where, and at which depth, the datum to be left out is
    for word, _ in _tokens(text):
        if word in ("(", "["):
            stack.append([])
            continue
        if word in (")", "]"):
            if len(stack) > 1:
                done = stack.pop()
                stack[-1].append(done)
        elif word == "#;":
            skipped.append((len(stack), len(stack[-1])))
            continue
        elif word.startswith('"'):
            stack[-1].append(word[1:-1])
        elif word.strip("'`,@"):
            stack[-1].append(_Word(word.lstrip("'`,@")))
        if skipped and skipped[-1] == (len(stack), len(stack[-1]) - 1):
            skipped.pop()
            stack[-1].pop()
    while len(stack) > 1:
        done = stack.pop()
        stack[-1].append(done)
    return stack[0]


def _forms(data: list[Any]) -> Iterator[list[Any]]:
    """Every list in the data, the outer ones first, that begins with a word."""
    # Not by recursion: a text may be deeper than Python lets calls be.
    waiting = [*reversed(data)]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list) and each:
            if isinstance(each[0], str):
                yield each
            waiting.extend(reversed(each))


def _is_field(datum: object) -> bool:
    return isinstance(datum, list) and len(datum) == 2 and isinstance(datum[0], str)  # noqa: PLR2004


def _is_string(datum: object) -> TypeGuard[str]:
    return isinstance(datum, str) and not isinstance(datum, _Word)


def commits(text: str) -> dict[str, str]:
    """The commit of each channel in what ``guix describe --format=channels`` printed."""
    return {name: channel.commit for name, channel in channels(text).items() if channel.commit}
