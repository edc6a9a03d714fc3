"""How things are said: text of others, commands, sizes and times."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def printable(text: str, kept: str = "") -> str:
    """Text that does nothing to a terminal: what controls one is shown, and not done.

    Registries, images and builds word a part of what is said here, and a line of theirs must not
    look like several of ours.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in kept else repr(each)[1:-1] for each in text
    )


def pasteable(argv: Sequence[str]) -> str:
    """A command as a person could paste it."""
    return f"+ {' '.join(map(_pasteable, argv))}"


def _pasteable(word: str) -> str:
    """A word for a shell; one that would control a terminal in bash's own way."""
    if printable(word, "\n\t") == word:
        return shlex.quote(word)
    shown = (each if each.isprintable() and each not in "'\\" else _escaped(each) for each in word)
    return f"$'{''.join(shown)}'"


def _escaped(character: str) -> str:
    raw = "\udc80" <= character <= "\udcff"
    data = character.encode(errors="surrogateescape" if raw else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in data)


KILO = 1000
"""Sizes are given in the decimal units that ``docker images`` uses."""

MINUTE = HOUR_IN_MINUTES = 60


def human_size(size: int) -> str:
    """Bytes in three digits: ``997 B``, ``12.3 kB``, ``637 MB``."""
    value, units = float(size), ["TB", "GB", "MB", "kB", "B"]
    # What rounds up to 1000 takes the next unit.
    while float(f"{value:.3g}") >= KILO and len(units) > 1:
        value /= KILO
        units.pop()
    return f"{value:.3g} {units[-1]}"


def human_time(seconds: float) -> str:
    """Seconds as a person says them: ``3.2 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if round(seconds, 1) < MINUTE:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), MINUTE)
    if minutes < HOUR_IN_MINUTES:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, HOUR_IN_MINUTES)
    return f"{hours} h {minutes} min"
