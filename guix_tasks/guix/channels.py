"""Parser of channels files, which are Scheme programs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_BRANCH = "master"
"""Branch of a channel without the field ``branch``."""


@dataclass(frozen=True)
class Introduction:
    """Channel introduction: the first trusted commit and the key that signed it."""

    commit: str
    fingerprint: str
    """Fingerprint of the key, in lower case without spaces."""


@dataclass(frozen=True)
class Channel:
    """Channel with the fields that a channels file contains as literals."""

    name: str
    url: str
    branch: str | None = None
    commit: str | None = None
    introduction: Introduction | None = None
    """Introduction; for Guix's channel at its official URL, by default the one built into Guix."""
    computed: frozenset[str] = frozenset()
    """Names of the fields that are computed or inherited, so that only Guix knows their values."""


def channels(text: str) -> dict[str, Channel]:
    """Return the literal channels of a channels file by name.

    Literal channels are forms such as ``(channel (name 'guix) (url "…"))``, which is all that
    ``guix describe`` prints. Channels that the Scheme program computes are not recognised.
    """
    return {channel.name: channel for channel in _literal_channels(text)}


def _literal_channels(text: str) -> Iterator[Channel]:
    for form in _forms(_read(text)):
        fields = {datum[0]: datum[1] for datum in form[1:] if _is_field(datum)}
        name, url = fields.get("name"), fields.get("url")
        if form[0] == "channel" and isinstance(name, str) and _is_string(url):
            yield _channel(name, url, fields)


def _channel(name: str, url: str, fields: Mapping[str, Any]) -> Channel:
    optional = {"branch", "commit", "introduction"}
    literal: dict[str, Any] = {
        field: fields[field] for field in ("branch", "commit") if _is_string(fields.get(field))
    }
    match fields.get("introduction"):
        case ["make-channel-introduction", commit, ["openpgp-fingerprint", key]] if _is_string(
            commit
        ) and _is_string(key):
            literal["introduction"] = Introduction(commit.lower(), "".join(key.split()).lower())
    absent = {field for field, datum in fields.items() if datum == _FALSE}
    inherited = optional if "inherit" in fields else set()
    computed = (fields.keys() & optional | inherited) - literal.keys()
    if name == "guix" and url in _OFFICIAL_URLS and "introduction" not in computed - absent:
        literal.setdefault("introduction", _OFFICIAL_INTRODUCTION)
    return Channel(name, url, **literal, computed=frozenset(computed - absent))


_OFFICIAL_URLS = ("https://git.guix.gnu.org/guix.git", "https://git.savannah.gnu.org/git/guix.git")
"""URLs of Guix's channel (``%default-channel-url``, of Guix 1.5 and of older versions)."""

_OFFICIAL_INTRODUCTION = Introduction(
    "9edb3f66fd807b096b48283debdcddccfea34bad", "bbb02ddf2ceaf6a80d1de643a2a06df2a33a54fa"
)
"""Introduction that is built into Guix (``%guix-channel-introduction``)."""


def unauthenticated(text: str) -> list[str]:
    """Return the names of the literal channels without an introduction.

    Guix does not authenticate such channels and prints no warning, except for its own channel:
    Guix has a built-in introduction for the official URL and rejects other URLs. Inherited
    introductions are not recognised; ``guix describe`` prints them as literals.
    """
    return [
        channel.name
        for channel in _literal_channels(text)
        if channel.introduction is None and "introduction" not in channel.computed
    ]


def is_literal(text: str) -> bool:
    """Return True if a channels file is one list of literal channels and nothing else."""
    forms = _read(text)
    form = forms[0] if len(forms) == 1 and isinstance(forms[0], list) else []
    items = [item for item in form[1:] if isinstance(item, list) and item[:1] == ["channel"]]
    literal = [channel for channel in channels(text).values() if not channel.computed]
    return form[:1] == ["list"] and len(form) == len(items) + 1 == len(literal) + 1


def is_plain_manifest(text: str) -> bool:
    """Return True if a manifest is one ``specifications->manifest`` of literal names."""
    match _read(text):
        case [["specifications->manifest", [*names]]]:
            if names[:1] == ["list"] and isinstance(names[0], _Atom):
                names = names[1:]
            return all(isinstance(name, str) and not isinstance(name, _Atom) for name in names)
    return False


class _Atom(str):
    """Scheme datum that is neither a string nor a list: a symbol, a number, ``#f``."""

    __slots__ = ()


_FALSE = _Atom("#f")

_TOKEN = re.compile(
    r"""\s+|;[^\n]*
    |(\#;|[()[\]]|"(?:[^"\\]|\\.)*"|\#\\(?:[^\s()[\]";]+|.)|[^\s()[\]";]+)""",
    re.DOTALL | re.VERBOSE,
)


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Yield the tokens of a Scheme program with their positions.

    The last token is ``"`` or ``#|`` if a string or comment is not closed.
    """
    position = 0
    while position < len(text):
        if text.startswith("#|", position):
            end = _comment_end(text, position)
            if end is None:
                yield "#|", position
                return
            position = end
        elif match := _TOKEN.match(text, position):
            if match[1]:
                yield match[1], position
            position = match.end()
        else:
            yield '"', position
            return


def _comment_end(text: str, start: int) -> int | None:
    """Return the end of a block comment, which can contain others, or None if it has no end."""
    depth = 0
    for mark in re.compile(r"#\||\|#").finditer(text, start):
        depth += 1 if mark[0] == "#|" else -1
        if depth == 0:
            return mark.end()
    return None


_NOT_CLOSED = {'"': "the string is not closed", "#|": "the comment is not closed"}

_CLOSED_BY = {"(": ")", "[": "]"}


def syntax_error(text: str) -> tuple[int, str] | None:
    """Return the line and the reason why Guile cannot read a program, or None if it can.

    Only the syntax is checked; Guix checks the rest.
    """
    opened: list[tuple[str, int]] = []
    for lexeme, position in _tokens(text):
        if lexeme in _NOT_CLOSED:
            return _line(text, position), _NOT_CLOSED[lexeme]
        if lexeme in _CLOSED_BY:
            opened.append((lexeme, position))
        elif lexeme in _CLOSED_BY.values() and (
            not opened or _CLOSED_BY[opened.pop()[0]] != lexeme
        ):
            return _line(text, position), f"unexpected {lexeme}"
    return (_line(text, opened[-1][1]), f"{opened[-1][0]} is not closed") if opened else None


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _read(text: str) -> list[Any]:
    """Parse Scheme data into lists, strings without their quotes, and atoms.

    Quotes before data, comments and commented data (``#;``) are dropped. Parentheses that do not
    match are no error; see ``syntax_error``.
    """
    stack: list[list[Any]] = [[]]
    commented: list[tuple[int, int]] = []  # depth and index of data after "#;"
    for lexeme, _ in _tokens(text):
        if lexeme in ("(", "["):
            stack.append([])
            continue
        if lexeme in (")", "]"):
            if len(stack) > 1:
                form = stack.pop()
                stack[-1].append(form)
        elif lexeme == "#;":
            commented.append((len(stack), len(stack[-1])))
            continue
        elif lexeme.startswith('"'):
            stack[-1].append(lexeme[1:-1])
        elif lexeme.strip("'`,@"):
            stack[-1].append(_Atom(lexeme.lstrip("'`,@")))
        if commented and commented[-1] == (len(stack), len(stack[-1]) - 1):
            commented.pop()
            stack[-1].pop()
    while len(stack) > 1:
        form = stack.pop()
        stack[-1].append(form)
    return stack[0]


def _forms(data: list[Any]) -> Iterator[list[Any]]:
    """Yield all lists that begin with a string or atom, outer lists first."""
    # Without recursion, because lists can be nested deeper than Python's limit of calls.
    pending = [*reversed(data)]
    while pending:
        datum = pending.pop()
        if isinstance(datum, list) and datum:
            if isinstance(datum[0], str):
                yield datum
            pending.extend(reversed(datum))


def _is_field(datum: object) -> bool:
    return isinstance(datum, list) and len(datum) == 2 and isinstance(datum[0], str)  # noqa: PLR2004


def _is_string(datum: object) -> TypeGuard[str]:
    return isinstance(datum, str) and not isinstance(datum, _Atom)


def commits(text: str) -> dict[str, str]:
    """Return the commit of each channel in the output of ``guix describe --format=channels``."""
    return {name: channel.commit for name, channel in channels(text).items() if channel.commit}
