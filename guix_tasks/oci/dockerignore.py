r"""Ignore files of image builds, with the matching rules of BuildKit.

The rules are those of github.com/moby/patternmatcher, in the same order: an ignore file is split
into lines, a line is cleaned like a path, and a pattern becomes a regular expression of Go's
``regexp`` package. Names are strings; bytes that are not UTF-8 are surrogates, as in
``os.fsdecode``.

Four constructs are rejected that BuildKit accepts: a backslash before a letter or digit, classes
such as ``[:alpha:]``, a repetition of ``^``, and more than six ``**``. According to Docker's
documentation, a backslash makes the next character literal, but BuildKit passes it to Go (``\d``
matches any digit).
"""

from __future__ import annotations

import posixpath
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_LINE = 64 * 1024
"""Bytes that a line must not reach (``bufio.MaxScanTokenSize``)."""

_BOM = b"\xef\xbb\xbf"

_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)
"""White space as defined by Go; ``str.strip`` removes more characters."""

_WILDCARDS = re.compile(r"[*\[\]?^\\]")

_INVALID = "\udc80-\udcff"
"""Bytes that are not UTF-8."""

_IN_CLASS = rf"(?:[^\\\-\]{_INVALID}]|\\[^{_INVALID}])"
_WELL_FORMED = re.compile(
    rf"(?:[^\\\[]|\\.|\[(?:\^|(?!\^))(?:{_IN_CLASS}(?:-{_IN_CLASS})?)+\])*", re.DOTALL
)
"""Patterns that Go's ``filepath.Match`` accepts."""

_TOKEN = re.compile(r"\*\*/?|\\.|.", re.DOTALL)

_STAR, _ANY = "[^/]*", "(?:.*/)?"
"""Expressions of ``*`` and ``**``."""

_COMPLEX = re.compile(r"[\[\]{|]")
"""Characters whose expressions can match text of several lengths, or a slash."""
_MAX_WILDCARDS = 6
"""Maximum of ``**``, and in a pattern with such characters also of ``*`` and repetitions.

Python tries all combinations of their lengths, which would not end if there are many.
"""

_REPEAT = re.compile(r"\{(0|[1-9][0-9]*)(?:,(0|[1-9][0-9]*)?)?\}")
_MAX_REPEAT = 1000
"""Maximum of Go."""

_NAMED_CLASS = re.compile(r"\[(?:[^\[\]\\]|\\.)*\[:")


class PatternError(ValueError):
    """A pattern is invalid; ``line`` is its line number."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"{line}: {reason}")
        self.line = line
        self.reason = reason


@dataclass(frozen=True)
class Pattern:
    """Pattern of an ignore file."""

    text: str
    """Cleaned pattern, without the exclamation mark."""
    is_exception: bool
    line: int

    @property
    def literal_prefix(self) -> str | None:
        """Path that contains all matches, or None if the pattern has wildcards elsewhere."""
        prefix = self.text.removesuffix("/**").removesuffix("/*")
        return None if _WILDCARDS.search(prefix) else prefix

    @cached_property
    def match(self) -> Callable[[str], bool]:
        """Function that matches a path, but not its parents.

        Raise ``PatternError`` for an invalid pattern.
        """
        kind, expression = _expression(_valid(self.text))
        prefix, suffix = self.text[:-2], self.text[2:]
        if kind == "exact":
            return lambda path: path == self.text
        if kind == "prefix":
            return lambda path: path.startswith(prefix)
        if kind == "suffix":
            return lambda path: path.endswith(suffix) or f"/{path}" == suffix
        try:
            _check_expression(self.text)
            with warnings.catch_warnings():
                # Python warns about set operations, which it does not have.
                warnings.simplefilter("ignore", FutureWarning)
                compiled = re.compile(expression)
        except (re.error, OverflowError, ValueError) as error:
            reason = "" if isinstance(error, (re.error, OverflowError)) else f": {error}"
            raise PatternError(self.line, f"malformed pattern {self.text}{reason}") from None
        return lambda path: compiled.search(_valid(path)) is not None


def read_patterns(content: bytes) -> list[Pattern]:
    """Parse an ignore file. Raise ``PatternError`` for an invalid pattern."""
    patterns = []
    for number, raw in enumerate(content.removeprefix(_BOM).split(b"\n"), 1):
        if len(raw) >= MAX_LINE:
            raise PatternError(number, f"the line has {len(raw)} bytes, more than {MAX_LINE - 1}")
        line = raw.decode("utf-8", "surrogateescape")
        text = "" if line.startswith("#") else line.strip(_SPACE)
        if text:
            patterns.append(_pattern(_clean_line(text), number))
    return patterns


def _clean_line(text: str) -> str:
    mark = "!" if text.startswith("!") else ""
    text = text[1:].strip(_SPACE) if mark else text
    if text:
        text = _clean(text)
        text = text[1:] if text.startswith("/") and text != "/" else text
    return mark + text


def _pattern(text: str, line: int) -> Pattern:
    # Cleaned a second time, as upstream does, because the leading slash is gone.
    text = _clean(text.strip(_SPACE))
    if text == "!":
        raise PatternError(line, "an exclamation mark without a pattern")
    pattern = Pattern(text.removeprefix("!"), text.startswith("!"), line)
    if not _WELL_FORMED.fullmatch(pattern.text):
        raise PatternError(line, f"malformed pattern {pattern.text}")
    return pattern


def _clean(path: str) -> str:
    """Return the shortest equivalent path, like Go's ``filepath.Clean``."""
    clean = posixpath.normpath(path)
    return clean[1:] if clean.startswith("//") else clean  # normpath keeps two slashes


def _valid(text: str) -> str:
    """Replace each byte that is not UTF-8 by U+FFFD, like Go's ``regexp``."""
    return re.sub(f"[{_INVALID}]", "\ufffd", text)


def _expression(pattern: str) -> tuple[str, str]:
    """Return how to match a pattern and, if by ``expression``, its regular expression.

    As upstream, the function translates single characters. Therefore wildcards are also translated
    in character classes, and ``{``, ``|`` and ``}`` are not escaped, because upstream's table of
    characters to escape ends before them.

    A star takes the shortest text up to the next star: whatever matches after a longer text also
    matches after the shortest. Otherwise Python would try all combinations of lengths. The
    lookahead with a back reference is an atomic group, which Python 3.10 does not have.
    """
    kind, expression = "exact", "(?:^)"  # a pattern can begin with a repetition
    star = None  # position of the last star, after which there was no other wildcard
    for token in _TOKEN.finditer(pattern):
        text = token[0]
        if text in ("**", "**/"):
            star = None
            if token.end() < len(pattern):
                kind, expression = "expression", f"{expression}{_ANY}"
            elif kind == "exact":
                kind = "prefix"
            else:
                kind, expression = "expression", f"{expression}.*"
            kind = "suffix" if token.start() == 0 else kind
        elif text == "*":
            if star is not None and not _COMPLEX.search(pattern):
                first = f"(?P<s{star}>[^/]*?{expression[star:].removeprefix(_STAR)})"
                expression = f"{expression[:star]}(?={first})(?P=s{star})"
            kind, star, expression = "expression", len(expression), f"{expression}{_STAR}"
        elif text == "?":
            kind, expression = "expression", f"{expression}[^/]"
        elif text in (".", "+", "(", ")", "$"):
            expression += f"\\{text}"
        elif text == "{" and not _REPEAT.match(pattern, token.start()):
            expression += r"\{"  # Python also accepts {,2}
        else:
            kind = "expression" if text[0] in "[]\\" else kind
            expression += text
    return kind, rf"{expression}\Z"


def _check_expression(pattern: str) -> None:
    """Raise ``ValueError`` for what Go rejects or matches in another way than Python."""
    for escape in re.findall(r"\\(.)", pattern, re.DOTALL):
        if escape.isalnum() or not escape.isascii():
            raise ValueError(
                f"\\{escape} is not a literal character in BuildKit; remove the backslash"
            )
    tokens = [token[0][:2] for token in _TOKEN.finditer(pattern)]
    wildcards = tokens.count("**")
    if _COMPLEX.search(pattern):
        wildcards += tokens.count("*") + tokens.count("{")
    if wildcards > _MAX_WILDCARDS:
        raise ValueError(f"it has more than {_MAX_WILDCARDS} wildcards")
    if _NAMED_CLASS.search(pattern):
        raise ValueError("a named class is not supported")
    for repeat in _REPEAT.finditer(pattern):
        if max(int(number or 0) for number in repeat.groups()) > _MAX_REPEAT:
            raise ValueError(f"{repeat[0]} is more than {_MAX_REPEAT}")


Matches = tuple[bool, ...]
"""For each pattern, in order: True if it matches a directory or one of its parents."""


class Matcher:
    """Ordered patterns of an ignore file; the last match decides."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self.patterns = tuple(patterns)
        self.exceptions = [pattern for pattern in patterns if pattern.is_exception]
        prefixes = [pattern.literal_prefix for pattern in self.exceptions]
        self._prefixes = None if None in prefixes else [f"{prefix}/" for prefix in prefixes]

    def ignores(self, path: str) -> bool:
        """Return True if a path or one of its parents is ignored.

        All patterns are matched with the parents (``MatchesOrParentMatches``).
        """
        return self.ignores_below(path, None)[0]

    def ignores_below(self, path: str, parent: Matches | None) -> tuple[bool, Matches]:
        """Return True if a path is ignored, and the matches to pass on for its children.

        ``parent`` is the second value for the parent directory, or None at the root. BuildKit walks
        a directory in this way (``MatchesUsingParentResults``). The result differs from ``ignores``
        for patterns that were skipped because the parent was already ignored.
        """
        ignored, matches = False, []
        for index, pattern in enumerate(self.patterns):
            match = bool(parent and parent[index])
            if not match and pattern.is_exception == ignored:
                match = pattern.match(path)
                if not match and parent is None:
                    match = any(pattern.match(parent_path) for parent_path in _parents(path))
            matches.append(match)
            ignored = not pattern.is_exception if match else ignored
        return ignored, tuple(matches)

    def skips(self, directory: str) -> bool:
        """Return True if no exception can match below an ignored directory."""
        if self._prefixes is None:
            return False
        return not any(prefix.startswith(f"{directory}/") for prefix in self._prefixes)


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: index + 1]) for index in range(len(parts))]
