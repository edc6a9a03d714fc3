"""Log of a program as lines that are safe to print on a terminal."""

from __future__ import annotations

import re
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Log:
    """Splits the log of a program into lines without control sequences.

    If a program redraws a line, as progress bars do, the last version remains.
    """

    _CONTROL = re.compile(
        rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|.)"
        rb"|[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]",
        re.DOTALL,
    )
    """Escape sequences (ECMA-48: CSI, OSC, strings, others), C0 and C1 control characters."""

    _SUSPECT = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")

    def __init__(self, show: Callable[[list[bytes]], None], file: IO[bytes] | None = None) -> None:
        """Create a log that passes lines to ``show`` and the raw log to ``file``.

        If the file cannot be written, the rest of the raw log is dropped.
        """
        self._show = show
        self._file = file
        self._rest = b""

    def add(self, data: bytes) -> None:
        if self._file:
            try:
                self._file.write(data)
            except OSError:  # a full disk must not stop the program
                self._file = None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self._show([self._plain(line) for line in lines])

    def end(self) -> None:
        """Show the last line if it does not end in a newline."""
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
    """Yield the result of a command as it arrives, and show its log."""
    log = Log(show)
    for is_log, data in output:
        if is_log:
            log.add(data)
        else:
            yield data
    log.end()
