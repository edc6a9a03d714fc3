"""Network faults in the log of a stage, detected while the stage runs."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks import guix
from guix_tasks.errors import StageError, full_disk

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guix_tasks.settings import Settings

NO_SERVICES = (
    "the image has no /etc/services, in which Guix looks up the ports of servers: install the "
    "package netbase in the Dockerfile"
)

_QUOTATION = "entry-point: the last lines of "
_TAIL_LINES = 400


class LogFaults:
    """Faults in the lines of a log, up to the build log that the entry point quotes at its end.

    A build can print anything, so faults are not looked for in the quotation.

    Guix treats a substitute server that is silent like one without substitutes. It builds
    everything from source, for hours and without a warning.
    """

    def __init__(self, settings: Settings) -> None:
        urls = set(settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS)
        self._hosts = {urlsplit(url).hostname for url in urls}
        needed = settings.network != "none" and not settings.guix_fallback
        # Guix reports only the host, so two servers on one host cannot be distinguished.
        self._watched = needed and len(self._hosts) == len(urls)
        self._silent: set[str] = set()
        self._lacks_services = False
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._build_failed = False
        self._in_quotation = False

    def look(self, line: str) -> bool:
        """Read the next line; return True if it reports the last silent substitute server."""
        self._in_quotation = self._in_quotation or line.startswith(_QUOTATION)
        if self._in_quotation:
            return False
        self._tail.append(line)
        self._build_failed = self._build_failed or guix.build_fault(line)
        if not self._watched or self.all_silent:
            return False
        self._silent |= guix.silent_servers(line)
        self._lacks_services = self._lacks_services or "Servname not supported" in line
        return self.all_silent

    @property
    def all_silent(self) -> bool:
        """Whether no substitute server answers."""
        return self._watched and self._hosts <= self._silent

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
        hint = "correct GUIX_SUBSTITUTE_URLS or the network, or set GUIX_FALLBACK=yes"
        error = StageError(
            f"{prefix}no substitute server answers ({', '.join(sorted(self._silent))}), and Guix "
            f"would build everything from source; {NO_SERVICES if self._lacks_services else hint}"
            f"{proxy_fault and f'; {proxy_fault}'}"
        )
        error.is_transient = True
        return error


_NO_KEY = "guix substitute: warning: ACL for archive imports seems to be uninitialized"

_PREFIX = re.compile(r"\A(#[0-9]+ (\[[^\]]*\] )?[0-9.]+ |[ \t]*(=> )+# |[0-9]+\.[0-9]+ )")
"""Prefix that buildx adds to a line of a step: plain, on a terminal, or quoted at the end."""


class StepFaults(LogFaults):
    """Faults in the log of a BuildKit build, whose steps are stages."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._needs_key = not settings.guix_fallback

    def check(self, lines: Iterable[str]) -> None:
        """Read the next lines.

        Raise ``StageError`` if no substitute server answers, or if Guix trusts none at all.
        """
        for line in lines:
            if self.look(_PREFIX.sub("", line)):
                raise self.silence_error()
            if self._needs_key and _NO_KEY in line:
                raise StageError(
                    "the image trusts no key of a substitute server, so Guix would build "
                    "everything from source; set GUIX_SUBSTITUTE_KEYS, or set GUIX_FALLBACK=yes"
                )
