"""Live display of a running step, with Rich, which no other module imports.

The live part is at the bottom of the terminal. It is redrawn several times a second and erased at
the end. The cursor is never hidden, so that it is visible even after this process is killed.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, cast

import rich.console
from rich.cells import cell_len
from rich.live import Live
from rich.text import Text

from guix_tasks.ui import redact
from guix_tasks.ui.format import human_time, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TextIO

_FRAMES_PER_SECOND = 8

_LOG_LINES = 6

_LINE_BYTES_MAX = 2000
"""Maximum bytes of a line to process; no terminal shows more."""

_FREE_COLUMNS = 5
"""Columns to leave free for ``^C`` twice, which the terminal echoes.

A line that wraps would take one line more than Rich erases.
"""

_NAME_COLUMNS = 20
"""Minimum columns for the name; a longer name is truncated to show the activity."""

_SPINNERS = {True: "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", False: "|/-\\"}
_MARGINS = {True: "  │ ", False: "  | "}


class _Terminal(rich.console.Console):
    """Rich console that never hides the cursor."""

    def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002
        return False


class _Screen:
    """Text stream that ignores errors, so that work continues after the terminal has closed."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class LivePart:
    """Live display of one step: its name, duration, activity and last log lines."""

    def __init__(
        self,
        file: TextIO,
        name: str,
        activity: Callable[[], str],
        tail: Callable[[], Sequence[bytes]],
    ) -> None:
        self._name = name
        self._activity = activity
        self._tail = tail
        self._started = time.monotonic()
        self._unicode = "utf" in (getattr(file, "encoding", None) or "").lower()
        plain = bool(os.environ.get("NO_COLOR"))
        self._console = _Terminal(
            file=cast("IO[str]", _Screen(file)), force_terminal=True, force_jupyter=False,
            color_system=None if plain else "auto", no_color=plain,
            markup=False, emoji=False, highlight=False, legacy_windows=False,
        )  # fmt: skip
        self._live = Live(
            get_renderable=self._render, console=self._console, transient=True,
            refresh_per_second=_FRAMES_PER_SECOND, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def start(self) -> None:
        self._live.start(refresh=True)

    def stop(self) -> None:
        self._live.stop()

    def print_above(self, text: str) -> None:
        """Print a line that remains above the live part."""
        self._console.print(Text(text), soft_wrap=True)

    def _render(self) -> Text:
        width, height = self._console.size
        columns = max(1, width - _FREE_COLUMNS)
        elapsed = time.monotonic() - self._started
        spinner = _SPINNERS[self._unicode]
        symbol = spinner[int(elapsed * _FRAMES_PER_SECOND) % len(spinner)]
        status = ", ".join(filter(None, (human_time(elapsed), self._clean(self._activity()))))
        name = Text(self._clean(self._name), "bold")
        name.truncate(
            max(_NAME_COLUMNS, columns - cell_len(f"{symbol} : {status}")),
            overflow="ellipsis" if self._unicode else "crop",
        )
        lines = [Text.assemble((symbol, "cyan"), " ", name, f": {status}")]
        log = [line for line in self._tail() if line.strip()]
        for line in log[-min(_LOG_LINES, height - 2) :] if height > 2 else ():  # noqa: PLR2004
            text = self._clean(line[:_LINE_BYTES_MAX].decode(errors="replace").replace("\t", " "))
            lines.append(Text(_MARGINS[self._unicode] + text, "dim"))
        for line_text in lines:
            line_text.truncate(columns)
        return Text("\n", no_wrap=True, overflow="crop").join(lines)

    def _clean(self, text: str) -> str:
        text = printable(redact.clean(text))
        return text if self._unicode else text.encode("ascii", "replace").decode()
