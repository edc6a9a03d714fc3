"""The part of a terminal that shows what goes on: the only import of Rich.

It is below all else and is drawn anew a few times a second, whatever the program logs; at the end
it is gone.  The cursor is never hidden, so that it is there however this process ends.
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

_PER_SECOND = 8

_LINES = 6
"""Lines of the log that are shown."""

_LONGEST = 2000
"""Bytes of a line that are looked at: a terminal shows less."""

_FREE = 5
"""Columns that are left free: a terminal writes ``^C`` there, of one who is in a hurry twice.

If it wrapped, there would be a line more than is erased.
"""

_NAME = 20
"""Columns that a name gets in any case; a longer one makes room for what is done."""

_TURNS = {True: "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", False: "|/-\\"}
_MARGINS = {True: "  │ ", False: "  | "}


class _Terminal(rich.console.Console):
    """Rich's console, with the cursor left as it is."""

    def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002
        return False


class _Screen:
    """A terminal that may go away: whoever works for it goes on."""

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
    """What is shown of one step."""

    def __init__(
        self,
        file: TextIO,
        name: str,
        doing: Callable[[], str],
        tail: Callable[[], Sequence[bytes]],
    ) -> None:
        self._name = name
        self._doing = doing
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
            get_renderable=self._drawn, console=self._console, transient=True,
            refresh_per_second=_PER_SECOND, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def start(self) -> None:
        self._live.start(refresh=True)

    def stop(self) -> None:
        self._live.stop()

    def say_above(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def _drawn(self) -> Text:
        width, height = self._console.size
        turns = _TURNS[self._unicode]
        elapsed = time.monotonic() - self._started
        turn = turns[int(elapsed * _PER_SECOND) % len(turns)]
        said = ", ".join(filter(None, (human_time(elapsed), self._clean(self._doing()))))
        name, room = Text(self._clean(self._name), "bold"), max(1, width - _FREE)
        name.truncate(
            max(_NAME, room - cell_len(f"{turn} : {said}")),
            overflow="ellipsis" if self._unicode else "crop",
        )
        lines = [Text.assemble((turn, "cyan"), " ", name, f": {said}")]
        shown = [line for line in self._tail() if line.strip()][-max(0, min(_LINES, height - 2)) :]
        for line in shown if height > 2 else ():  # noqa: PLR2004
            text = self._clean(line[:_LONGEST].decode(errors="replace").replace("\t", " "))
            lines.append(Text(_MARGINS[self._unicode] + text, "dim"))
        for each in lines:
            each.truncate(room)
        drawn = Text("\n", no_wrap=True, overflow="crop").join(lines)
        drawn.no_wrap, drawn.overflow = True, "crop"
        return drawn

    def _clean(self, text: str) -> str:
        text = printable(redact.clean(text))
        return text if self._unicode else text.encode("ascii", "replace").decode()
