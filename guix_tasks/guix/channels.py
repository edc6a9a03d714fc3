"""Channels files, read as Scheme data.  Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Channel:
    """A channel as a channels file spells it out."""

    name: str
    url: str
    branch: str | None = None
    commit: str | None = None


def channels(text: str) -> dict[str, Channel]:
    """The channels that a channels file spells out, by name.

    The file is a Scheme program; what it computes is not seen here, only forms such as
    ``(channel (name 'guix) (url "…"))``.  ``guix describe`` prints nothing else.
    """
    return {channel.name: channel for channel, _ in _spelled_out(text)}


def _spelled_out(text: str) -> Iterator[tuple[Channel, dict[str, Any]]]:
    """Each channel that a channels file spells out, and all that its form has, by name."""
    for form in _forms(_read(text)):
        fields = {each[0]: each[1] for each in form[1:] if _is_field(each)}
        known = {
            name: fields[name] for name in ("name", "url", "branch", "commit") if name in fields
        }
        if form[0] == "channel" and {"name", "url"} <= known.keys():
            everything = {each[0]: each[1:] for each in form[1:] if _is_named(each)}
            yield Channel(**known), everything


_OFFICIAL_URLS = ("https://git.guix.gnu.org/guix.git", "https://git.savannah.gnu.org/git/guix.git")
"""Where Guix is from (``%default-channel-url``, and what that was before 1.5)."""


def unauthenticated(text: str) -> list[str]:
    """The channels that a channels file spells out without an introduction, by name.

    Guix authenticates none of these, and says nothing, but for its own channel: that has an
    introduction built in for its own address, and is refused from any other.  What a channel
    inherits is not seen here; ``guix describe`` spells it out.
    """
    return [
        channel.name
        for channel, fields in _spelled_out(text)
        if fields.get("introduction", ["#f"]) == ["#f"]
        and "inherit" not in fields
        and (channel.name != "guix" or channel.url not in _OFFICIAL_URLS)
    ]


def is_literal(text: str) -> bool:
    """Whether a channels file spells out all its channels: one list of them and nothing else."""
    forms = _read(text)
    one = forms[0] if len(forms) == 1 and isinstance(forms[0], list) else []
    spelled = [each for each in one[1:] if isinstance(each, list) and each[:1] == ["channel"]]
    return one[:1] == ["list"] and len(one) == len(spelled) + 1 == len(channels(text)) + 1


_TOKEN = re.compile(
    r"""\s+|;[^\n]*|\#\|.*?\|\#|(\#;|[()[\]]|"(?:[^"\\]|\\.)*"|[^\s()[\]";]+)""", re.DOTALL
)


def _read(text: str) -> list[Any]:
    """Scheme's data as lists and words; strings without their quotes, quoted words without theirs.

    Comments are left out, those of one datum (``#;``) included.  Parentheses that do not match
    are taken as they come: Guix itself will say so better.
    """
    stack: list[list[Any]] = [[]]
    skipped: list[tuple[int, int]] = []  # where, and at which depth, the datum to be left out is
    for word in _TOKEN.findall(text):
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
        elif word.strip("'`,@"):
            stack[-1].append(word[1:-1] if word.startswith('"') else word.lstrip("'`,@"))
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
    return isinstance(datum, list) and len(datum) == 2 and all(isinstance(e, str) for e in datum)  # noqa: PLR2004


def _is_named(datum: object) -> bool:
    return isinstance(datum, list) and bool(datum) and isinstance(datum[0], str)


def commits(text: str) -> dict[str, str]:
    """The commit of each channel in what ``guix describe --format=channels`` printed."""
    return {name: channel.commit for name, channel in channels(text).items() if channel.commit}
