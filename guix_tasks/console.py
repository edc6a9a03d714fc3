"""What a person sees while a task runs.

Everything guix-tasks says itself goes to standard error, so that standard output holds
only what a task was asked for: the output of a command, a table, a digest.
"""

from __future__ import annotations

import re
import shlex
import sys
from typing import IO, TYPE_CHECKING, ClassVar, TextIO

from guix_tasks import masking

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


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


class Console:
    """Prints headings, commands and tables, without the secrets that ``masking`` knows.

    ``out`` takes results, ``err`` takes everything else; they are looked up when they are
    used, so that a test that replaces ``sys.stdout`` sees the output.
    """

    _line_is_open: ClassVar[bool] = False
    """Whether a program has left a line without its end, which is the same for all consoles."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out
        self._err = err
        self._streams = {
            # What a command was run for stays as it is, but for secrets.
            False: masking.Stream(self._write_out, accounts=False),
            True: masking.Stream(self._write_err),
        }

    @property
    def out(self) -> TextIO:
        return self._out or sys.stdout

    @property
    def err(self) -> TextIO:
        return self._err or sys.stderr

    def result(self, text: str) -> None:
        """What the task was asked for, on standard output."""
        self.end_streams()
        print(masking.clean(text), file=self.out, flush=True)

    def say(self, text: str) -> None:
        """One line on what is being done."""
        self.end_streams()
        text = printable(masking.clean(text), "\n\t")
        if Console._line_is_open:
            text = f"\n{text}"
            Console._line_is_open = False
        print(text, file=self.err, flush=True)

    def draw(self, text: str) -> None:
        """What moves on a terminal."""
        self.err.write(masking.clean(text))
        self.err.flush()

    def warn(self, text: str) -> None:
        self.say(f"warning: {printable(text)}")

    def error(self, text: str) -> None:
        self.say(f"error: {printable(text)}")

    def command(self, argv: Sequence[str]) -> None:
        """A command as a person could paste it."""
        self.say(f"+ {' '.join(map(_pasteable, argv))}")

    def stream(self, data: bytes, *, error: bool = True) -> None:
        """Output of a program, as it comes; what may be a part of a secret waits for the rest."""
        self._streams[error].add(data)

    def end_streams(self) -> None:
        """Show what waits still, since the program has ended."""
        for stream in self._streams.values():
            stream.end()

    def _write_err(self, data: bytes) -> None:
        Console._line_is_open = not data.endswith(b"\n")
        self._write(self.err, data)

    def _write_out(self, data: bytes) -> None:
        self._write(self.out, data)

    @staticmethod
    def _write(target: TextIO, data: bytes) -> None:
        buffer = getattr(target, "buffer", None)
        if buffer is None:
            target.write(data.decode(errors="replace"))
        else:
            buffer.write(data)
        target.flush()

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A plain table on standard output, columns as wide as their widest cell."""
        lines = [tuple(map(printable, line)) for line in (header, *rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            self.result("  ".join(cells).rstrip())


class Log:
    """The log of a stage as it comes: as it is on a terminal, else in plain whole lines.

    Guix draws progress bars, each over the last, and a file or a CI log would keep them all.
    """

    _CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")

    def __init__(self, console: Console, kept: IO[bytes] | None = None) -> None:
        """``kept`` gets all of it, as it comes, until it can hold no more."""
        self._console = console
        self._kept = kept
        self._rest = b""

    def add(self, data: bytes) -> None:
        if self._kept:
            try:
                self._kept.write(data)
            except OSError:  # a full disk is no fault of what is run
                self._kept = None
        if self._console.err.isatty():
            self._console.stream(data)
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._show(line)

    def end(self) -> None:
        """Show what came without the end of a line."""
        if self._rest:
            self._show(self._rest)
        self._rest = b""
        self._console.end_streams()

    def _show(self, line: bytes) -> None:
        last = self._CONTROL.sub(b"", line.rstrip(b"\r")).split(b"\r")[-1]
        self._console.stream(last + b"\n")


class TransferProgress:
    """Tells how a push or a pull gets on: one moving line on a terminal, else a line a layer."""

    _DONE = ("Pushed", "Pull complete", "Layer already exists", "Already exists", "Mounted from")

    def __init__(self, console: Console, what: str) -> None:
        self._console = console
        self._what = what
        self._sizes: dict[str, tuple[int, int]] = {}
        self._done: set[str] = set()

    def __call__(self, layer: str, status: str, current: int, total: int) -> None:
        if total:
            self._sizes[layer] = (min(current, total), total)
        done = status.startswith(self._DONE)
        if self._console.err.isatty():
            moved = sum(current for current, _ in self._sizes.values())
            whole = sum(total for _, total in self._sizes.values())
            self._console.draw(f"\r\x1b[K{self._what}: {human_size(moved)} of {human_size(whole)}")
        elif done and layer not in self._done:
            size = self._sizes.get(layer, (0, 0))[1]
            amount = f" ({human_size(size)})" if size else ""
            self._console.say(f"{self._what}: {layer} {status.lower()}{amount}")
        if done:
            self._done.add(layer)

    def end(self) -> None:
        """Clear the moving line."""
        if self._console.err.isatty():
            self._console.draw("\r\x1b[K")


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
