"""Console: messages, logs, results and tables of a task.

Messages and logs go to standard error. Standard output contains only the result of a task: the
output of a command, a table, a digest.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections import deque
from contextlib import contextmanager, nullcontext
from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, TextIO

from guix_tasks.errors import BuilderError, StageError
from guix_tasks.ui import ci, redact
from guix_tasks.ui.format import pasteable, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from guix_tasks.ui.live import LivePart

    Table = tuple[Sequence[str], Iterable[Sequence[str]]]


class Display(Enum):
    """Display mode of long-running steps."""

    AUTO = "auto"
    """Live on a terminal, otherwise plain."""
    PLAIN = "plain"
    """Log of each step."""
    QUIET = "quiet"
    """Results, warnings and errors only."""
    VERBOSE = "verbose"
    """Log of each step, including the logs of Guix builds."""
    LIVE = "live"
    """Status of the current step and its last log lines, redrawn in place."""

    @property
    def logs_builds(self) -> bool:
        """True if Guix has to log the output of builds."""
        return self in (Display.LIVE, Display.VERBOSE)


def resolve_display(display: Display, err: TextIO, environment: Mapping[str, str]) -> Display:
    """Resolve ``auto`` and return the display to use.

    It is plain in a CI job, because nobody watches its terminal, and plain without Rich, which a
    custom Python may lack.
    """
    if display not in (Display.AUTO, Display.LIVE):
        return display
    can_draw = err.isatty() and environment.get("TERM", "dumb") != "dumb" and find_spec("rich")
    is_watched = display is Display.LIVE or not environment.get("CI")
    return Display.LIVE if can_draw and is_watched else Display.PLAIN


class Console:
    """Prints messages, logs, commands and tables, without the secrets that ``redact`` knows.

    ``out`` receives results, ``err`` everything else. The default streams are looked up at each
    use, so that a test can replace ``sys.stdout``.
    """

    _line_is_open: ClassVar[bool] = False
    """True if the last output of a program did not end in a newline; shared by all consoles."""

    def __init__(
        self,
        out: TextIO | None = None,
        err: TextIO | None = None,
        display: Display = Display.PLAIN,
    ) -> None:
        self._out = out
        self._err = err
        self.display = display
        self._step: Step | None = None
        self._streams = {
            # The result of a command is unchanged except for secrets.
            False: redact.Stream(lambda data: self._write(self.out, data), accounts=False),
            True: redact.Stream(self._write_err),
        }

    @property
    def out(self) -> TextIO:
        return self._out or sys.stdout

    @property
    def err(self) -> TextIO:
        return self._err or sys.stderr

    def result(self, text: str) -> None:
        """Print the result of the task on standard output."""
        self.end_streams()
        encoding = self.out.encoding or "utf-8"  # perhaps ASCII, as with LC_ALL=C
        text = redact.clean(text).encode(encoding, "backslashreplace").decode(encoding)
        print(text, file=self.out, flush=True)

    def print(self, text: str) -> None:
        """Print a line about the progress of the task, unless the display is quiet."""
        if self.display is not Display.QUIET:
            self.note(text)

    def detail(self, text: str) -> None:
        """Print a line that matters only during the current step."""
        if self._step and self.display is Display.LIVE:
            self._step.log([redact.to_bytes(redact.clean(text))])
        else:
            self.print(text)

    def note(self, text: str) -> None:
        """Print a line in every display mode."""
        self.end_streams()
        text = printable(redact.clean(text), "\n\t")
        with self._step.drawing if self._step else nullcontext():
            if self._step and self._step.print_above(text):
                return
            if Console._line_is_open:
                text = f"\n{text}"
                Console._line_is_open = False
            print(text, file=self.err, flush=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {printable(text)}")

    def error(self, text: str) -> None:
        """Print an error, and annotate a GitHub job with it."""
        self.note(f"error: {printable(text)}")
        annotation = ci.annotation(printable(redact.clean(text)), os.environ)
        if annotation:
            self.note(annotation)

    def command(self, argv: Sequence[str]) -> None:
        """Print a command that can be pasted into a shell."""
        self.note(pasteable(argv))

    @contextmanager
    def step(self, name: str, *, has_log: bool = True) -> Iterator[Step]:
        """Show a long-running step, in the way of ``display``.

        If the step fails and its log was not shown, print the end of the log. A step inside another
        step is shown as a part of it.
        """
        if self._step:
            yield self._step
            return
        step = self._step = Step(self, name, has_log=has_log)
        try:
            yield step
        except (StageError, BuilderError):
            step.failed = True
            raise
        finally:
            self._step = None
            step.end()

    def stream(self, data: bytes, *, error: bool = True) -> None:
        """Print output of a program; possible parts of secrets are held back until complete."""
        self._streams[error].add(data)

    def put(self, lines: bytes) -> None:
        """Print lines unchanged: lines of a log, or lines for a program."""
        if not lines:
            return
        self.end_streams()
        if Console._line_is_open:
            self._write_err(b"\n")
        self._write_err(lines)

    def end_streams(self) -> None:
        """Print the output that ``stream`` held back, at the end of a program."""
        for stream in self._streams.values():
            stream.end()

    def _write_err(self, data: bytes) -> None:
        Console._line_is_open = not data.endswith(b"\n")
        self._write(self.err, data)

    @staticmethod
    def _write(target: TextIO, data: bytes) -> None:
        buffer = getattr(target, "buffer", None)
        if buffer is None:
            target.write(data.decode(errors="replace"))
        else:
            buffer.write(data)
        target.flush()

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[str]], narrower: Iterable[Table] = ()
    ) -> None:
        """Print a plain table on standard output, with columns as wide as their widest cell.

        If the terminal is too narrow for the table, print the first of the ``narrower`` tables that
        fits, or the last one.
        """
        lines = _align(header, rows)
        if self.out.isatty():
            columns = shutil.get_terminal_size().columns
            for table in narrower:
                if max(map(len, lines)) <= columns:
                    break
                lines = _align(*table)
        for line in lines:
            self.result(line)


def _align(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [tuple(map(printable, line)) for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


TAIL = 60
"""Lines of the log of a failed step that are printed if the log was not shown."""

_DRAW_DELAY = 0.25
"""Seconds before drawing starts, so that short steps neither flicker nor import Rich."""


class Step:
    """Running step of a task; see ``Console.step``."""

    def __init__(self, console: Console, name: str, *, has_log: bool) -> None:
        self.name = name
        self.failed = False
        self.log_file: Path | None = None
        """File that contains the whole log after the step."""
        self.drawing = threading.Lock()
        """Lock of the terminal, for writers other than the live part."""
        self._console = console
        self._activity: Callable[[], str] = str
        self._tail: deque[bytes] = deque(maxlen=TAIL)
        self._part: LivePart | None = None
        self._timer: threading.Timer | None = None
        self._end_section: Callable[[], str] = str
        if self.is_live:
            self._timer = threading.Timer(_DRAW_DELAY, self._draw)
            self._timer.daemon = True
            self._timer.start()
        elif has_log and self.shows_log:
            start, self._end_section = ci.section(printable(redact.clean(name)), os.environ)
            console.put(start.encode())

    @property
    def is_live(self) -> bool:
        return self._console.display is Display.LIVE

    @property
    def shows_log(self) -> bool:
        return self._console.display in (Display.PLAIN, Display.VERBOSE)

    def log(self, lines: list[bytes]) -> None:
        """Add lines of a ``LogReader``, without newlines, to the log."""
        if self.shows_log:
            self._console.put(_join(lines))
        else:
            self._tail.extend(lines[-TAIL:])

    def show_activity(self, activity: Callable[[], str]) -> None:
        """Show the current result of a function as the activity of the step."""
        self._activity = activity

    def print_above(self, text: str) -> bool:
        """Print a line above the live part and return True, or return False if none is drawn."""
        if self._part:
            self._part.print_above(text)
        return self._part is not None

    def end(self) -> None:
        if self._timer:
            self._timer.cancel()
        with self.drawing:
            self._timer = None
            if self._part:
                self._part.stop()
                self._part = None
        self._console.end_streams()
        if self.failed and self._tail and not self.shows_log:
            hint = f"; the whole log is in {self.log_file}" if self.log_file else ""
            self._console.note(f"{self.name}: end of the log{hint}")
            self._console.stream(_join(self._tail))
            self._console.end_streams()
        self._console.put(self._end_section().encode())

    def _draw(self) -> None:
        # Importing Rich is slow, and most calls draw nothing.
        from guix_tasks.ui.live import LivePart  # noqa: PLC0415

        def activity() -> str:
            return self._activity()  # changes during the step

        with self.drawing:
            if self._timer:  # the step has not ended in the meantime
                self._part = LivePart(self._console.err, self.name, activity, lambda: [*self._tail])
                self._part.start()


def _join(lines: Iterable[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)
