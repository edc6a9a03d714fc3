"""Network faults in the log of a stage, detected while the stage runs."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks import guix
from guix_tasks.errors import StageError, full_disk

if TYPE_CHECKING:
    from guix_tasks.settings import Settings

_QUOTATION = b"entry-point: the last lines of "
_TAIL_LINES = 400


class SubstituteServers:
    """The substitute servers of a stage, and those that the log reports as silent.

    Guix treats a silent server like one without substitutes. It builds everything from source,
    for hours and without a warning.
    """

    def __init__(self, settings: Settings) -> None:
        urls = set(settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS)
        self._hosts = {urlsplit(url).hostname for url in urls}
        needed = settings.network != "none" and not settings.guix_fallback
        # Guix reports only the host, so two servers on one host cannot be distinguished.
        self._watched = needed and len(self._hosts) == len(urls)
        self._silent: set[str] = set()

    @property
    def all_silent(self) -> bool:
        """Whether no server answers."""
        return self._watched and self._hosts <= self._silent

    def look(self, line: str) -> bool:
        """Read the next line of the log; return True if it reports the last silent server."""
        if not self._watched or self.all_silent:
            return False
        self._silent |= guix.silent_servers(line)
        return self.all_silent

    @property
    def error_line(self) -> str:
        """The error if no server answers, with its hint."""
        return (
            f"no substitute server answers ({', '.join(sorted(self._silent))}), and Guix would "
            "build everything from source; correct GUIX_SUBSTITUTE_URLS or the network, or set "
            "GUIX_FALLBACK=yes"
        )


class Lines:
    """Split a log into lines, up to the build log that the entry point quotes at its end.

    A build can print anything, so faults are not looked for in the quotation.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._in_quotation = False

    def add(self, data: bytes) -> list[str]:
        """Return the lines that are complete with the next bytes of the log."""
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        complete = []
        for line in lines:
            self._in_quotation = self._in_quotation or line.startswith(_QUOTATION)
            if not self._in_quotation:
                complete.append(line.decode(errors="replace"))
        return complete


class LogFaults:
    """Faults in the lines of a log."""

    def __init__(self, settings: Settings) -> None:
        self.servers = SubstituteServers(settings)
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._build_failed = False

    def look(self, line: str) -> bool:
        """Read the next line; return True if it reports the last silent substitute server."""
        self._tail.append(line)
        self._build_failed = self._build_failed or guix.build_fault(line)
        return self.servers.look(line)

    @property
    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self._tail)

    @property
    def network_failed(self) -> bool:
        """Whether the network failed, and neither a build nor the disk."""
        other = self._build_failed or full_disk(self.tail)
        return not other and guix.network_fault(self.tail)

    def silence_error(self, prefix: str = "", proxy_fault: str = "") -> StageError:
        """Return the error if no substitute server answers; it can be retried."""
        error = StageError(f"{prefix}{self.servers.error_line}{proxy_fault and f'; {proxy_fault}'}")
        error.is_transient = True
        return error


_CONTROL_SEQUENCE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")

_PREFIX = re.compile(rb"#[0-9]+ (\[[^\]]*\] )?[0-9.]+ |[ \t]*(=> )+# |[0-9]+\.[0-9]+ ")
"""Prefix that buildx adds to a line of a step: plain, on a terminal, or quoted at the end."""


class Steps:
    """Detect faults in the log of a BuildKit build, whose steps are stages."""

    def __init__(self, settings: Settings) -> None:
        self._faults = LogFaults(settings)
        self._lines = Lines()
        self._rest = b""

    def add(self, data: bytes) -> None:
        """Read the next bytes of the log. Raise ``StageError`` if no substitute server answers."""
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        for line in self._lines.add(b"".join(_step_line(line) + b"\n" for line in lines)):
            if self._faults.look(line):
                raise self._faults.silence_error()

    @property
    def network_failed(self) -> bool:
        """Whether the network failed in a step, and neither a build nor the disk."""
        return self._faults.network_failed


def _step_line(line: bytes) -> bytes:
    """Remove the terminal control sequences and the prefix of buildx from a line."""
    line = _CONTROL_SEQUENCE.sub(b"", line)
    prefix = _PREFIX.match(line)
    return line[prefix.end() :] if prefix else line
