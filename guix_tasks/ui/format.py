"""Formats of text from other programs, commands, sizes and times."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def printable(text: str, allowed: str = "") -> str:
    """Escape control characters, except those in ``allowed``.

    Messages of registries, images and builds could otherwise control the terminal, or make one
    line look like several.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in allowed else repr(character)[1:-1]
        for character in text
    )


def pasteable(argv: Sequence[str]) -> str:
    """Format a command so that it can be pasted into a shell."""
    return f"+ {' '.join(map(_quote, argv))}"


def _quote(word: str) -> str:
    """Quote a word for a shell; a word with control characters, in bash's ``$'…'`` form."""
    if printable(word, "\n\t") == word:
        return shlex.quote(word)
    characters = (
        character if character.isprintable() and character not in "'\\" else _escape(character)
        for character in word
    )
    return f"$'{''.join(characters)}'"


def _escape(character: str) -> str:
    is_raw_byte = "\udc80" <= character <= "\udcff"
    data = character.encode(errors="surrogateescape" if is_raw_byte else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in data)


KILO = 1000
"""Factor of the decimal units of sizes, as in ``docker images``."""

MINUTE = HOUR_IN_MINUTES = 60


def human_size(size: int) -> str:
    """Format a number of bytes with three digits: ``997 B``, ``12.3 kB``, ``637 MB``."""
    value, units = float(size), ["TB", "GB", "MB", "kB", "B"]
    # A value that rounds up to 1000 takes the next unit.
    while float(f"{value:.3g}") >= KILO and len(units) > 1:
        value /= KILO
        units.pop()
    return f"{value:.3g} {units[-1]}"


def human_time(seconds: float) -> str:
    """Format a time in seconds: ``3.2 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if round(seconds, 1) < MINUTE:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), MINUTE)
    if minutes < HOUR_IN_MINUTES:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, HOUR_IN_MINUTES)
    return f"{hours} h {minutes} min"
