"""Log of a program as lines that are safe to print on a terminal."""

from __future__ import annotations

import re
from typing import IO, TYPE_CHECKING

from guix_tasks.ui import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_LINE_END = re.compile(rb"(?<=[\r\n])")

_CONTROL = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?"
    rb"|[ -/]*[0-~])"
    rb"|[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]"
)
"""Escape sequences (ECMA-48: CSI, OSC, strings, others), C0 and C1 control characters."""


class LogReader:
    """Splits the log of a program into lines without control sequences.

    ``show`` receives the lines without secrets. ``read`` and ``end`` return them to be searched for
    faults, with secrets, because a secret can be a common word. ``file`` receives the raw log; if
    it cannot be written, the rest of the raw log is dropped.

    A program can redraw a line, as progress bars do. ``show`` receives the last version of each
    line, ``read`` and ``end`` return all versions.
    """

    def __init__(
        self, show: Callable[[list[bytes]], object] | None = None, file: IO[bytes] | None = None
    ) -> None:
        self._show = show
        self._file = file
        self._rest = b""
        self._line = b""
        """Last version of the line that has not ended."""

    def add(self, data: bytes) -> None:
        """Read the next bytes of the log without returning lines, as a callback."""
        self.read(data)

    def read(self, data: bytes) -> list[str]:
        """Read the next bytes of the log."""
        if self._file:
            try:
                self._file.write(data)
            except OSError:  # a full disk must not stop the program
                self._file = None
        *versions, self._rest = _LINE_END.split(self._rest + data)
        return self._pass_on(versions)

    def end(self) -> list[str]:
        """Read the last line, which need not end in a newline."""
        last = self._rest
        self._rest = b""
        return self._pass_on([last + b"\n"]) if last or self._line else []

    def results(self, output: Iterable[tuple[bool, bytes]]) -> Iterator[bytes]:
        """Read the log in a container's output, and yield its standard output as it arrives."""
        for is_log, data in output:
            if is_log:
                self.read(data)
            else:
                yield data
        self.end()

    def _pass_on(self, versions: list[bytes]) -> list[str]:
        lines, texts = [], []
        for version in versions:
            content = version.rstrip(b"\r\n")
            text = _CONTROL.sub(b"", content)
            texts.append(text.decode(errors="replace"))
            if content:
                self._line = text
            if version.endswith(b"\n"):
                lines.append(redact.hidden(self._line))
                self._line = b""
        if lines and self._show:
            self._show(lines)
        return texts
