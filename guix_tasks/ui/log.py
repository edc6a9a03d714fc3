"""The log of a program, in lines that can be shown."""

from __future__ import annotations

import re
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Log:
    """The log of a program as it comes, in whole lines without what would control a terminal.

    A program may draw a progress bar, each over the last: of that the last is left.
    """

    _CONTROL = re.compile(
        rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|.)"
        rb"|[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]",
        re.DOTALL,
    )
    """Escape sequences (ECMA-48: CSI, OSC, strings, the rest), control characters, those of C1."""

    _SUSPECT = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")

    def __init__(self, show: Callable[[list[bytes]], None], kept: IO[bytes] | None = None) -> None:
        """``show`` gets the lines; ``kept`` all of it, as it comes, until it can hold no more."""
        self._show = show
        self._kept = kept
        self._rest = b""

    def add(self, data: bytes) -> None:
        if self._kept:
            try:
                self._kept.write(data)
            except OSError:  # a full disk is no fault of what is run
                self._kept = None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self._show([self._plain(line) for line in lines])

    def end(self) -> None:
        """Show what came without the end of a line."""
        if self._rest:
            self._show([self._plain(self._rest)])
        self._rest = b""

    def _plain(self, line: bytes) -> bytes:
        if not self._SUSPECT.search(line):
            return line
        return self._CONTROL.sub(b"", line.rstrip(b"\r").split(b"\r")[-1])


def results(
    output: Iterable[tuple[bool, bytes]], show: Callable[[list[bytes]], None]
) -> Iterator[bytes]:
    """What a command was run for, as it comes, while its log is shown."""
    log = Log(show)
    for is_log, data in output:
        if is_log:
            log.add(data)
        else:
            yield data
    log.end()
