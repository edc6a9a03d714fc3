"""What the log of a stage tells while it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks import guix

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
