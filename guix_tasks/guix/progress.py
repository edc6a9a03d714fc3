"""Progress of Guix and of image builds, parsed from their logs.

The clients of Guix 1.5 do not pass the daemon's machine-readable trace on. This module parses the
messages for users (``status.scm``, ``ui.scm``, ``channels.scm``), which with ``--verbosity=3``
report each substitute and each build.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING

from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from collections.abc import Iterable

VERBOSITY = 3
"""``--verbosity`` at which Guix logs builds and their output."""

_MEGA = 1_000_000
"""Bytes in a MB of Guix."""

_RATE_SECONDS = 5.0
"""Period over which the download rate is measured."""

_STORE = "/gnu/store/[0-9a-z]{32}-"

_LINE = re.compile(
    r"Updating channel '(?P<channel>[^']+)' from"
    r"|Authenticating channel '(?P<authenticated>[^']+)'"
    r"|(?:substitute: )?updating substitutes from '(?P<server>[^']+)'"
    r"|Computing Guix derivation for '(?P<system>[^']+)'"
    r"|Building from th(?:is|ese) channels?(?P<channels>):"
    r"|The following (?:derivations?|profile hooks?) will be built(?P<to_build>):"
    r"|The following grafts? will be made(?P<to_graft>):"
    r"|The following files? will be downloaded(?P<to_fetch>):"
    r"|(?P<size>[\d,]{1,20}(?:\.\d+)?) MB will be downloaded(?P<listed>:?)$"
    r"|(?P<count>[\d,]{1,20}) items? will be downloaded"
    rf"|substituting {_STORE}(?P<substitute>\S+?)\.\.\.$"
    rf"|substitution of {_STORE}(?P<substituted>\S+) complete$"
    rf"|building {_STORE}(?P<build>\S+?)(?:\.drv)?\.\.\.$"
    r"|(?P<other>(?:building|listing|generating|creating|applying|running profile) .*?) ?\.\.\.$"
    rf"|(?:successfully built|build of) {_STORE}(?P<built>\S+?)(?:\.drv)?(?: failed)?$"
)

_LISTED = re.compile(r" {2,3}/gnu/store/")


_NOISE = {
    rb"The following builds? (?:is|are) still in progress:$": rb" +/gnu/store/",
    rb"hint: (?:Consider setting the necessary environment|After setting .PATH')": (
        rb"\s|$|Alternately, see |.*'\.$"
    ),
}
"""First lines of messages that are noise, with their other lines."""


class Noise:
    """Filter of repeated log lines, and of hints about login shells, which images do not have."""

    def __init__(self) -> None:
        self._other_lines = b""

    def without(self, lines: list[bytes]) -> list[bytes]:
        """Return the next lines of the log without noise and blank lines."""
        return [line for line in lines if not self._is_noise(line)]

    def _is_noise(self, line: bytes) -> bool:
        if self._other_lines and re.match(self._other_lines, line):
            return True
        others = (others for first, others in _NOISE.items() if re.match(first, line))
        self._other_lines = next(others, b"")
        # Guix prints dots while it downloads.
        return bool(self._other_lines) or not line.strip(b". \t")


class Activity:
    """Current activity of Guix, as one line of text."""

    def __init__(self) -> None:
        self._phase = ""
        self._list = ""
        """List that the log is printing, ``to_build`` or ``to_fetch``."""
        self._is_listed = False
        self._build = ""
        self._started = self._built = self._to_build = 0
        self._item = ""
        self._fetched = self._to_fetch = 0
        self._size = 0.0
        self._received: deque[tuple[float, int]] = deque()
        """Times in seconds with the total of received bytes."""
        self._received_before = 0

    def look(self, line: str) -> None:
        """Process the next line of the log."""
        if self._list and _LISTED.match(line):
            self._is_listed = self._is_listed or self._list == "to_build"
            self._to_build += self._list == "to_build"
            self._to_fetch += self._list == "to_fetch"
            return
        match = _LINE.match(line.lstrip("."))  # Guix prints dots while it downloads
        if match is None:
            return
        self._list = ""
        name, text = next((n, t) for n, t in match.groupdict().items() if t is not None)
        self._process(name, text, is_list=bool(match["listed"]))

    def receive(self, total: int, now: float) -> None:
        """Process the total of bytes received over the network at a time in seconds."""
        if not self._fetched:
            self._received_before = total
        self._received.append((now, total))
        while now - self._received[0][0] > _RATE_SECONDS:
            self._received.popleft()

    def take_build_without_substitutes(self) -> bool:
        """Return True, once for each list, if Guix builds what it listed and downloads nothing."""
        if self._list or self._to_fetch or self._fetched or self._size:
            return False
        is_listed, self._is_listed = self._is_listed, False
        return is_listed

    @property
    def is_building(self) -> bool:
        """True while a build runs, if Guix also logs the ends of builds."""
        return self._started > self._built

    @property
    def text(self) -> str:
        count = f"{self._started} of {max(self._started, self._to_build)}"
        parts = [f"{self._build} ({count})" if self._build else "", self._fetch_text]
        return "; ".join(filter(None, parts)) or ", ".join(filter(None, (self._phase, self._rate)))

    @property
    def _fetch_text(self) -> str:
        if not self._item:
            return ""
        # Substitutes for the inputs of builds are not in the list of downloads.
        count = f"{self._fetched} of {max(self._fetched, self._to_fetch)}"
        total = int(self._size)
        size = human_size(total) if total else ""
        if self._received:
            received = self._received[-1][1] - self._received_before
            progress = human_size(min(received, total) if total else received)
            size = f"{progress} of {size}" if size else progress
        return ", ".join(filter(None, (f"substitute {count}: {self._item}", size, self._rate)))

    @property
    def _rate(self) -> str:
        """Recent download rate in bytes per second, or nothing if no bytes arrived."""
        if len(self._received) < 2:  # noqa: PLR2004
            return ""
        (start, first), (end, last) = self._received[0], self._received[-1]
        if last <= first:
            return ""
        return f"{human_size(int((last - first) / (end - start)))}/s"

    def _process(self, name: str, text: str, *, is_list: bool) -> None:
        """Process the group of ``_LINE`` that matched, and its text."""
        match name:
            case "size":
                self._size += _number(text) * _MEGA
                self._list = "to_fetch" if is_list else ""
            case "count":
                self._to_fetch += int(_number(text))
            case "to_fetch":
                self._list = "to_fetch"
            case "to_build" | "to_graft":
                self._list = "to_build"
            case "substitute":
                self._fetched += 1
                self._item = text
            case "substituted":
                # Between two downloads, the finished one remains visible.
                if self._item == text and self._fetched >= self._to_fetch:
                    self._item = ""
            case "build" | "other":
                self._started += 1
                self._build = f"building {text}" if name == "build" else text
            case "built":
                self._built += 1
            case _:
                self._phase = _PHASES[name].format(text)


_PHASES = {
    "channel": "updating the channel {}",
    "authenticated": "authenticating the channel {}",
    "server": "asking {} for substitutes",
    "system": "computing Guix for {}",
    "channels": "computing what is to be built",
}


def _number(text: str) -> float:
    return float(text.replace(",", "") or 0)


_STEP = re.compile(
    rb"#\d+ \[(?:[^\]]+ )?(?P<number>\d+)/(?P<all>\d+)\] (?P<text>.+)"
    rb"|Step (?P<old_number>\d+)/(?P<old_all>\d+) : (?P<old_text>.+)"
)
"""First line of a step in the log of BuildKit or of the engine's classic builder."""


class BuildSteps:
    """Current step of a Dockerfile build, as one line of text."""

    def __init__(self) -> None:
        self.text = ""

    def look(self, lines: Iterable[bytes]) -> None:
        """Process the next lines of the log in plain format."""
        for line in lines:
            if match := _STEP.match(line):
                number, total, text = (
                    group.decode(errors="replace") for group in match.groups() if group
                )
                self.text = f"step {number} of {total}: {text}"
