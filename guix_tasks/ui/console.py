"""What a person sees while a task runs.

Everything guix-tasks says itself goes to standard error, so that standard output holds
only what a task was asked for: the output of a command, a table, a digest.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
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
    """How much is shown of what takes its time."""

    AUTO = "auto"
    """What goes on now, on a terminal; else plain."""
    PLAIN = "plain"
    """The log, in whole lines."""
    QUIET = "quiet"
    """Results, warnings and errors alone."""
    VERBOSE = "verbose"
    """The log, with that of each build."""
    LIVE = "live"
    """A part of the terminal that is drawn anew as things go on, and is gone at the end."""

    @property
    def logs_builds(self) -> bool:
        """Whether Guix is to log what its builds say."""
        return self in (Display.LIVE, Display.VERBOSE)


def settled_display(wanted: Display, err: TextIO, environment: Mapping[str, str]) -> Display:
    """What ``auto`` comes to: a CI job may have a terminal, but nobody before it.

    Nothing is drawn either where there is no Rich, which a Python of one's own may lack.
    """
    if wanted not in (Display.AUTO, Display.LIVE):
        return wanted
    can = err.isatty() and environment.get("TERM", "dumb") != "dumb" and find_spec("rich")
    asked = wanted is Display.LIVE or not environment.get("CI")
    return Display.LIVE if can and asked else Display.PLAIN


class Console:
    """Prints headings, commands and tables, without the secrets that ``redact`` knows.

    ``out`` takes results, ``err`` takes everything else; they are looked up when they are
    used, so that a test that replaces ``sys.stdout`` sees the output.
    """

    _line_is_open: ClassVar[bool] = False
    """Whether a program has left a line without its end, which is the same for all consoles."""

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
            # What a command was run for stays as it is, but for secrets.
            False: redact.Stream(self._write_out, accounts=False),
            True: redact.Stream(self._write_err),
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
        print(redact.clean(text), file=self.out, flush=True)

    def say(self, text: str) -> None:
        """One line on what is being done."""
        if self.display is not Display.QUIET:
            self.note(text)

    def detail(self, text: str) -> None:
        """One line that is of interest for as long as what it is about goes on."""
        if self._step and self.display is Display.LIVE:
            self._step.log([text.encode(errors="replace")])
        else:
            self.say(text)

    def note(self, text: str) -> None:
        """One line that is not to be missed."""
        self.end_streams()
        text = printable(redact.clean(text), "\n\t")
        with self._step.drawing if self._step else nullcontext():
            if self._step and self._step.say_above(text):
                return
            if Console._line_is_open:
                text = f"\n{text}"
                Console._line_is_open = False
            print(text, file=self.err, flush=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {printable(text)}")

    def error(self, text: str) -> None:
        """What went wrong; in a job of GitHub's also as an annotation."""
        self.note(f"error: {printable(text)}")
        annotation = ci.annotation(printable(redact.clean(text)), os.environ)
        if annotation:
            self.note(annotation)

    def command(self, argv: Sequence[str]) -> None:
        """A command as a person could paste it."""
        self.note(pasteable(argv))

    @contextmanager
    def step(self, name: str, *, has_log: bool = True) -> Iterator[Step]:
        """What takes its time: its log, and what goes on in it, are shown as ``display`` says.

        Where it fails, and its log was not shown, the end of that is.
        """
        if self._step:  # a part of the one that is under way
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
        """Output of a program, as it comes; what may be a part of a secret waits for the rest."""
        self._streams[error].add(data)

    def put(self, text: str) -> None:
        """Lines for a machine, which have to be as they are."""
        self.end_streams()
        if Console._line_is_open:
            self._write_err(b"\n")
        self._write_err(text.encode())

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

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[str]], narrower: Iterable[Table] = ()
    ) -> None:
        """A plain table on standard output, columns as wide as their widest cell.

        On a terminal that is too narrow for it, the first of the ``narrower`` ones that is not,
        or else the last.
        """
        lines = _aligned(header, rows)
        if self.out.isatty():
            columns = shutil.get_terminal_size().columns
            for each in narrower:
                if max(map(len, lines)) <= columns:
                    break
                lines = _aligned(*each)
        for line in lines:
            self.result(line)


def _aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [tuple(map(printable, line)) for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


TAIL = 60
"""Lines of a log that are shown of a step that failed, where it was not shown as it came."""

_SOON = 0.25
"""Seconds after which something is drawn: what takes less does not flicker, or wait for Rich."""


class Step:
    """Something that takes its time, while it is under way; see ``Console.step``."""

    def __init__(self, console: Console, name: str, *, has_log: bool) -> None:
        self.name = name
        self.failed = False
        self.log_file: Path | None = None
        """Where all of the log will be."""
        self.drawing = threading.Lock()
        """Held while something is written beside what is drawn."""
        self._console = console
        self._doing: Callable[[], str] = str
        self._tail: deque[bytes] = deque(maxlen=TAIL)
        self._part: LivePart | None = None
        self._timer: threading.Timer | None = None
        self._fold: ci.Fold | None = None
        if self.is_live:
            self._timer = threading.Timer(_SOON, self._draw)
            self._timer.daemon = True
            self._timer.start()
        elif has_log and self.shows_log:
            self._fold = ci.found(os.environ)
            if self._fold:
                console.put(self._fold.start(printable(redact.clean(name)), time.time()))

    @property
    def is_live(self) -> bool:
        return self._console.display is Display.LIVE

    @property
    def shows_log(self) -> bool:
        return self._console.display in (Display.PLAIN, Display.VERBOSE)

    def log(self, lines: list[bytes]) -> None:
        """Lines of the log, without their ends."""
        if self.shows_log:
            self._console.stream(_joined(lines))
        else:
            self._tail.extend(lines[-TAIL:])

    def tell(self, doing: Callable[[], str]) -> None:
        """Show from now on what this says that is being done."""
        self._doing = doing

    def say_above(self, text: str) -> bool:
        """Say a line above what is drawn, if anything is; whether it was."""
        if self._part:
            self._part.say_above(text)
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
            where = f"; all of it is in {self.log_file}" if self.log_file else ""
            self._console.note(f"{self.name}: the end of the log{where}")
            self._console.stream(_joined(self._tail))
            self._console.end_streams()
        if self._fold:
            self._console.put(self._fold.end(time.time()))

    def _said(self) -> str:
        return self._doing()

    def _draw(self) -> None:
        # Rich takes its time to import, and most calls draw nothing.
        from guix_tasks.ui.live import LivePart  # noqa: PLC0415

        with self.drawing:
            if self._timer:  # it has not ended meanwhile
                self._part = LivePart(
                    self._console.err, self.name, self._said, lambda: [*self._tail]
                )
                self._part.start()


def _joined(lines: Iterable[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)
