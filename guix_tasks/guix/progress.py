"""What Guix is doing, by the lines that it logs.  Pure: nothing is asked or shown here.

Guix 1.5 has no trace for machines that a client would hand on (the daemon's goes to the client
alone), so these are the lines for people: ``status.scm``, ``ui.scm``, ``channels.scm``.  With
``--verbosity=3`` each substitute and each build is among them.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING

from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from collections.abc import Iterable

VERBOSITY = 3
"""The ``--verbosity`` at which Guix logs what it builds, and the log of that."""

_MEGA = 1_000_000
"""Bytes in what Guix calls MB."""

_RATE_OVER = 5.0
"""Seconds over which a rate is taken."""

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
    r"|(?P<size>[\d,.]+) MB will be downloaded(?P<listed>:?)$"
    r"|(?P<count>[\d,.]+) items? will be downloaded"
    rf"|substituting {_STORE}(?P<substitute>\S+?)\.\.\.$"
    rf"|substitution of {_STORE}(?P<came>\S+) complete$"
    rf"|building {_STORE}(?P<build>\S+?)(?:\.drv)?\.\.\.$"
    r"|(?P<other>(?:building|listing|generating|creating|applying|running profile) .*?) ?\.\.\.$"
    rf"|(?:successfully built|build of) {_STORE}(?P<built>\S+?)(?:\.drv)?(?: failed)?$"
)

_LISTED = re.compile(r" {2,3}/gnu/store/")


_IN_PROGRESS = re.compile(rb"The following builds? (?:is|are) still in progress:$")
_OF_LIST = re.compile(rb" +/gnu/store/")
_HINT = re.compile(rb"hint: (?:Consider setting the necessary environment|After setting .PATH')")
_OF_HINT = re.compile(rb"\s|$|Alternately, see |.*'\.$")


class Noise:
    """What Guix's log repeats, or says of a login shell, which an image has not."""

    def __init__(self) -> None:
        self._goes_on: re.Pattern[bytes] | None = None

    def without(self, lines: list[bytes]) -> list[bytes]:
        """The next lines of the log, without it and without what separates it."""
        return [line for line in lines if not self._is_noise(line)]

    def _is_noise(self, line: bytes) -> bool:
        if self._goes_on and self._goes_on.match(line):
            return True
        self._goes_on = None
        if _IN_PROGRESS.match(line):
            self._goes_on = _OF_LIST
        elif _HINT.match(line):
            self._goes_on = _OF_HINT
        # A dot stands for a part of what is downloaded.
        return self._goes_on is not None or not line.strip(b". \t")


class Activity:
    """What is being done, as one line."""

    def __init__(self) -> None:
        self._phase = ""
        self._list = ""
        self._building = ""
        self._started = self._built = self._to_build = 0
        self._item = ""
        self._fetched = self._to_fetch = 0
        self._size = 0.0
        self._received: deque[tuple[float, int]] = deque()
        self._before = 0

    def look(self, line: str) -> None:
        """Take in the next line of the log."""
        if self._list and _LISTED.match(line):
            setattr(self, self._list, getattr(self, self._list) + 1)
            return
        line = line.lstrip(".")  # a dot for a part of what is downloaded
        found = _LINE.match(line)
        if found is None:
            return
        self._list = ""
        name, text = next((n, t) for n, t in found.groupdict().items() if t is not None)
        if name == "size":
            self._size += _number(text) * _MEGA
            self._list = "_to_fetch" if found["listed"] else ""
        elif name == "count":
            self._to_fetch += int(_number(text))
        elif name in _PHASES:
            self._phase = _PHASES[name].format(text)
        else:
            getattr(self, f"_{name}_is_told")(text)

    def receive(self, total: int, now: float) -> None:
        """Take in how many bytes came over the network so far, and the time of that in seconds."""
        if not self._fetched:
            self._before = total
        self._received.append((now, total))
        while now - self._received[0][0] > _RATE_OVER:
            self._received.popleft()

    @property
    def is_building(self) -> bool:
        """Whether a build is under way, where Guix says also when each has ended."""
        return self._started > self._built

    @property
    def text(self) -> str:
        parts = [self._build_text, self._fetch_text]
        return "; ".join(filter(None, parts)) or ", ".join(filter(None, (self._phase, self._rate)))

    @property
    def _build_text(self) -> str:
        if not self._building:
            return ""
        return f"{self._building} ({self._started} of {max(self._started, self._to_build)})"

    @property
    def _fetch_text(self) -> str:
        if not self._item:
            return ""
        # Of what a build asks for, none is in the plan.
        count = f"{self._fetched} of {max(self._fetched, self._to_fetch)}"
        return ", ".join(filter(None, (f"substitute {count}: {self._item}", self._bytes_text)))

    @property
    def _bytes_text(self) -> str:
        whole = human_size(int(self._size)) if self._size else ""
        if not self._received:
            return whole
        came = self._received[-1][1] - self._before
        moved = human_size(min(came, int(self._size)) if self._size else came)
        return ", ".join(filter(None, (f"{moved} of {whole}" if whole else moved, self._rate)))

    @property
    def _rate(self) -> str:
        """Bytes in a second, lately; nothing where none came."""
        if len(self._received) < 2:  # noqa: PLR2004
            return ""
        (start, first), (end, last) = self._received[0], self._received[-1]
        if last <= first:
            return ""
        return f"{human_size(int((last - first) / (end - start)))}/s"

    def _to_build_is_told(self, _text: str) -> None:
        self._list = "_to_build"

    _to_graft_is_told = _to_build_is_told

    def _to_fetch_is_told(self, _text: str) -> None:
        self._list = "_to_fetch"

    def _substitute_is_told(self, item: str) -> None:
        self._fetched += 1
        self._item = item

    def _build_is_told(self, name: str) -> None:
        self._other_is_told(f"building {name}")

    def _other_is_told(self, text: str) -> None:
        self._started += 1
        self._building = text

    def _built_is_told(self, _name: str) -> None:
        self._built += 1

    def _came_is_told(self, name: str) -> None:
        # Till the next one begins, this one is the one to tell.
        if self._item == name and self._fetched >= self._to_fetch:
            self._item = ""


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
"""How BuildKit begins a step, and the engine's own builder before it."""


class BuildSteps:
    """What a build of a Dockerfile is doing."""

    def __init__(self) -> None:
        self.text = ""

    def look(self, lines: Iterable[bytes]) -> None:
        """Take in the next lines of the log, plain."""
        for line in lines:
            if found := _STEP.match(line):
                number, whole, text = (
                    each.decode(errors="replace") for each in found.groups() if each
                )
                self.text = f"step {number} of {whole}: {text}"
