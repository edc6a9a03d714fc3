"""What the log of a stage tells while it comes."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks import guix
from guix_tasks.errors import StageError, full_disk

if TYPE_CHECKING:
    from guix_tasks.settings import Settings

_QUOTES = b"entry-point: the last lines of "


class Servers:
    """The substitute servers of a stage, and whether any of them answers.

    Guix itself takes one that does not for one that has nothing, and builds from source what would
    have been there: for hours, and without a word.
    """

    def __init__(self, settings: Settings) -> None:
        urls = set(settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS)
        self._hosts = {urlsplit(url).hostname for url in urls}
        # Where there is to be no network, none is expected to answer.
        expected = settings.network != "none" and not settings.guix_fallback
        # Guix names the host alone: of two servers on one it cannot be told which is meant.
        self._watched = expected and len(self._hosts) == len(urls)
        self._silent: set[str] = set()

    @property
    def were_silent(self) -> bool:
        return self._watched and self._hosts <= self._silent

    def all_silent(self, line: str) -> bool:
        """Whether the next line of a log says so of the last of them."""
        if not self._watched or self.were_silent:
            return False
        self._silent |= guix.silent_servers(line)
        return self.were_silent

    @property
    def complaint(self) -> str:
        return (
            f"no substitute server answers ({', '.join(sorted(self._silent))}), and all would be "
            "built from source; mend GUIX_SUBSTITUTE_URLS or the network, or set GUIX_FALLBACK=yes"
        )


class Lines:
    """The lines of a log that comes in pieces, but for what the entry point quotes at its end.

    That is of builds, which may have said anything.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._quoted = False

    def add(self, data: bytes) -> list[str]:
        """The lines that the next piece ends."""
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        found = []
        for line in lines:
            self._quoted = self._quoted or line.startswith(_QUOTES)
            if not self._quoted:
                found.append(line.decode(errors="replace"))
        return found


_TAIL = 400
"""Lines of a log that an error is looked for in."""


class Faults:
    """What the lines of a log tell of faults, and of whose they are."""

    def __init__(self, settings: Settings) -> None:
        self.servers = Servers(settings)
        self._tail: deque[str] = deque(maxlen=_TAIL)
        self._is_build_fault = False

    def look(self, line: str) -> bool:
        """Take in the next line; whether it says so of the last of the substitute servers."""
        self._tail.append(line)
        self._is_build_fault = self._is_build_fault or guix.build_fault(line)
        return self.servers.all_silent(line)

    @property
    def last(self) -> str:
        """The last lines."""
        return "\n".join(self._tail)

    @property
    def network_failed(self) -> bool:
        """Whether it failed for want of a network, and not because something does not build."""
        is_other = self._is_build_fault or full_disk(self.last)
        return not is_other and guix.network_fault(self.last)

    def silence(self, prefix: str = "", why: str = "") -> StageError:
        """The error where no substitute server answers."""
        error = StageError(f"{prefix}{self.servers.complaint}{why and f'; {why}'}")
        error.passes = True
        return error


_DRAWN = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")

_BEFORE = re.compile(rb"#[0-9]+ (\[[^\]]*\] )?[0-9.]+ |[ \t]*(=> )+# |[0-9]+\.[0-9]+ ")
"""What buildx puts before a line of a step: plain, drawn on a terminal, quoted at the end."""


class Steps:
    """The log of a build whose steps are stages."""

    def __init__(self, settings: Settings) -> None:
        self._faults = Faults(settings)
        self._lines = Lines()
        self._rest = b""

    def add(self, data: bytes) -> None:
        """The next piece.  Raises ``StageError`` where no substitute server answers."""
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        for line in self._lines.add(b"".join(_own(line) + b"\n" for line in lines)):
            if self._faults.look(line):
                raise self._faults.silence()

    @property
    def network_failed(self) -> bool:
        """Whether a step failed for want of a network, and not because something does not build."""
        return self._faults.network_failed


def _own(line: bytes) -> bytes:
    """A line as its step wrote it."""
    line = _DRAWN.sub(b"", line)
    before = _BEFORE.match(line)
    return line[before.end() :] if before else line
