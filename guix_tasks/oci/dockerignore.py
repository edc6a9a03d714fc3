r"""Ignore files of image builds, matched as BuildKit matches them.

The rules are those of github.com/moby/patternmatcher, in its own order: an ignore file is read
into lines, a line is cleaned as a path, and a pattern becomes a regular expression of Go's
``regexp`` package.  Names are text; bytes that are not UTF-8 are surrogates, as ``os.fsdecode``
makes them.

One thing is refused that BuildKit accepts: a backslash before a letter or a digit, and classes
such as ``[:alpha:]``.  The documentation of Docker says that the first is a plain character, and
BuildKit takes it for a class of Go (``\d`` for any digit).
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LINE = 64 * 1024
"""Bytes that a line has to stay below (``bufio.MaxScanTokenSize``)."""

_BOM = b"\xef\xbb\xbf"

_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)
"""White space as Go defines it; ``str.strip`` takes more."""

_WILDCARDS = re.compile(r"[*\[\]?^\\]")

_REPEAT = re.compile(r"\{(0|[1-9][0-9]*)(?:,(0|[1-9][0-9]*)?)?\}")
_MAX_REPEAT = 1000


class PatternError(ValueError):
    """A pattern that cannot be used, with its line."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"{line}: {reason}")
        self.line = line
        self.reason = reason


@dataclass(frozen=True)
class Pattern:
    """One pattern of an ignore file."""

    text: str
    """The cleaned pattern, without the exclamation mark."""
    is_exception: bool
    line: int

    def match(self, path: str) -> bool:
        """Match a path, but not its parents.  Raises ``PatternError``."""
        kind, expression = self._compiled
        if kind == "exact":
            return path == self.text
        if kind == "prefix":
            return path.startswith(self.text[:-2])
        if kind == "suffix":
            suffix = self.text[2:]
            return path.endswith(suffix) or (suffix[:1] == "/" and path == suffix[1:])
        return expression.search(_valid(path)) is not None

    @property
    def literal_prefix(self) -> str | None:
        """The path below which all matches are; None if the pattern has wildcards elsewhere."""
        prefix = self.text.removesuffix("/**").removesuffix("/*")
        return None if _WILDCARDS.search(prefix) else prefix

    @cached_property
    def _compiled(self) -> tuple[str, re.Pattern[str]]:
        kind, expression = _go_expression(_valid(self.text))
        if kind != "expression":
            return kind, re.compile("")
        try:
            return kind, re.compile(_python_expression(expression))
        except (ValueError, re.error, OverflowError) as error:
            raise self._error(f": {error}" if isinstance(error, _ExpressionError) else "") from None

    def _error(self, why: str) -> PatternError:
        return PatternError(self.line, f"malformed pattern {self.text}{why}")


def read_patterns(content: bytes) -> list[Pattern]:
    """Read an ignore file.  Raises ``PatternError``."""
    patterns = []
    for number, raw in enumerate(content.removeprefix(_BOM).split(b"\n"), 1):
        if len(raw) >= MAX_LINE:
            raise PatternError(number, f"the line has {len(raw)} bytes, more than {MAX_LINE - 1}")
        line = raw.decode("utf-8", "surrogateescape")
        text = "" if line.startswith("#") else line.strip(_SPACE)
        if text:
            patterns.append(_pattern(_cleaned_line(text), number))
    return patterns


def _cleaned_line(text: str) -> str:
    mark = "!" if text.startswith("!") else ""
    text = text[1:].strip(_SPACE) if mark else text
    if text:
        text = _clean(text)
        text = text[1:] if text.startswith("/") and text != "/" else text
    return mark + text


def _pattern(text: str, line: int) -> Pattern:
    # Cleaned twice, as upstream does: what a leading slash has hidden counts now.
    text = _clean(text.strip(_SPACE))
    is_exception = text.startswith("!")
    if text == "!":
        raise PatternError(line, "an exclamation mark without a pattern")
    pattern = Pattern(text.removeprefix("!") if is_exception else text, is_exception, line)
    if not _is_well_formed(pattern.text):
        raise PatternError(line, f"malformed pattern {pattern.text}")
    return pattern


def _clean(path: str) -> str:
    """The shortest equal path, as Go's ``filepath.Clean`` makes it."""
    clean = posixpath.normpath(path)
    return clean[1:] if clean.startswith("//") else clean  # which POSIX lets be special


def _valid(text: str) -> str:
    """The text as Go's ``regexp`` reads it, with U+FFFD for each byte that is not UTF-8."""
    return re.sub("[\udc80-\udcff]", "\ufffd", text)


def _is_well_formed(pattern: str) -> bool:
    """Check the syntax as Go's ``filepath.Match`` does."""
    characters = iter(_Reader(pattern))
    for character in characters:
        if character == "\\" and next(characters, None) is None:
            return False
        if character == "[" and not _has_well_formed_class(characters):
            return False
    return True


class _Reader:
    """Characters of a text, of which the next one can be looked at."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> str:
        character = self.peek()
        if not character:
            raise StopIteration
        self.at += 1
        return character

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]


def _has_well_formed_class(characters: _Reader) -> bool:
    """Read the rest of a character class; whether ``filepath.Match`` accepts it."""
    if characters.peek() == "^":
        next(characters)
    ranges = 0
    while not (ranges and characters.peek() == "]"):
        if not _has_class_character(characters):
            return False
        if characters.peek() == "-":
            next(characters)
            if not _has_class_character(characters):
                return False
        ranges += 1
    next(characters)
    return True


def _has_class_character(characters: _Reader) -> bool:
    if characters.peek() in ("", "-", "]"):
        return False
    if next(characters) == "\\" and not next(characters, ""):
        return False
    is_valid = not "\udc80" <= characters.text[characters.at - 1] <= "\udcff"
    return is_valid and bool(characters.peek())


def _go_expression(pattern: str) -> tuple[str, str]:
    """How a pattern is matched and, for ``expression``, Go's regular expression for it.

    It is made character by character, as upstream does: wildcards count within a character class,
    and ``{``, ``|`` and ``}`` keep their meaning, since upstream's table of what to escape ends
    before them.
    """
    kind, expression = "exact", "^"
    characters = _Reader(pattern)
    for character in characters:
        is_first = characters.at == 1
        if character == "*" and characters.peek() == "*":
            next(characters)
            if characters.peek() == "/":
                next(characters)
            if characters.peek():
                kind, expression = "expression", f"{expression}(.*/)?"
            elif kind == "exact":
                kind = "prefix"
            else:
                kind, expression = "expression", f"{expression}.*"
            kind = "suffix" if is_first else kind
        elif character in "*?":
            kind, expression = "expression", f"{expression}[^/]{'*' if character == '*' else ''}"
        elif character in ".+()$":
            expression += f"\\{character}"
        elif character == "\\":
            kind, expression = "expression", f"{expression}\\{next(characters, '')}"
        else:
            kind = "expression" if character in "[]" else kind
            expression += character
    return kind, f"{expression}$"


class _ExpressionError(ValueError):
    """Why Go does not compile an expression, or we do not."""


def _python_expression(expression: str) -> str:
    """Python's regular expression for one of Go's, as ``_go_expression`` makes them."""
    parts, characters = [], _Reader(expression)
    for character in characters:
        if character == "\\":
            parts.append(re.escape(_escaped(characters)))
        elif character == "[":
            parts.append(_python_class(characters))
        elif character == "^":
            parts.append("(?:^)")  # which Go lets be repeated
        elif character == "$":
            parts.append(r"\Z")
        elif character == "{" and (repeat := _REPEAT.match(expression, characters.at - 1)):
            if max(int(number or 0) for number in repeat.groups()) > _MAX_REPEAT:
                raise _ExpressionError(f"{repeat[0]} is more than {_MAX_REPEAT}")
            parts.append(repeat[0])
            characters.at = repeat.end()
        else:
            parts.append(character if character in "(.*)?|" else re.escape(character))
    return "".join(parts)


def _escaped(characters: _Reader) -> str:
    character = next(characters, "")
    if not character or character.isalnum() or not character.isascii():
        raise _ExpressionError(
            f"\\{character} is not a plain character to BuildKit; leave the backslash out"
        )
    return character


def _python_class(characters: _Reader) -> str:
    """Read a character class of Go, behind its bracket."""
    negation = next(characters) if characters.peek() == "^" else ""
    ranges: list[str] = []
    while not (ranges and characters.peek() == "]"):
        if characters.text.startswith("[:", characters.at):
            raise _ExpressionError("a named class")
        low = high = _class_character(characters)
        ahead = characters.text[characters.at : characters.at + 2]
        if ahead[:1] == "-" and ahead[1:] not in ("", "]"):
            next(characters)
            high = _class_character(characters)
        if low > high:
            raise _ExpressionError(f"the range {low}-{high} is empty")
        ranges.append(f"\\U{ord(low):08x}-\\U{ord(high):08x}")
    next(characters)
    return f"[{negation}{''.join(ranges)}]"


def _class_character(characters: _Reader) -> str:
    character = next(characters, "")
    if not character:
        raise _ExpressionError("a bracket is not closed")
    return _escaped(characters) if character == "\\" else character


Matches = tuple[bool, ...]
"""Which patterns match a directory or one of its parents, in the order of the patterns."""


class Matcher:
    """The patterns of an ignore file, in order; the last one that matches decides."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self.patterns = tuple(patterns)
        self.exceptions = [pattern for pattern in patterns if pattern.is_exception]
        prefixes = [pattern.literal_prefix for pattern in self.exceptions]
        self._prefixes = None if None in prefixes else [f"{prefix}/" for prefix in prefixes]

    def ignores(self, path: str) -> bool:
        """Whether a path is ignored, by itself or with one of its parents.

        Every pattern is tried on the parents (``MatchesOrParentMatches``).
        """
        return self._tried(path, None)[0]

    def ignores_below(self, path: str, parent: Matches | None) -> tuple[bool, Matches]:
        """Whether a path is ignored, by what its parent directory matches, and what it matches.

        ``parent`` is the second answer for the parent, or None at the top.  This is how BuildKit
        walks a directory (``MatchesUsingParentResults``).  It differs from ``ignores`` for a
        pattern that was not tried on the parent, which was ignored already.
        """
        return self._tried(path, parent)

    def _tried(self, path: str, parent: Matches | None) -> tuple[bool, Matches]:
        ignored, matches = False, []
        for index, pattern in enumerate(self.patterns):
            match = bool(parent and parent[index])
            if not match and pattern.is_exception == ignored:
                match = pattern.match(path)
                if not match and parent is None:
                    match = any(pattern.match(each) for each in _parents(path))
            matches.append(match)
            ignored = not pattern.is_exception if match else ignored
        return ignored, tuple(matches)

    def skips(self, directory: str) -> bool:
        """Whether an ignored directory is not even walked into."""
        if self._prefixes is None:
            return False
        return not any(prefix.startswith(f"{directory}/") for prefix in self._prefixes)


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: index + 1]) for index in range(len(parts))]
