"""Faults that pass by themselves, and trying again.

A network that drops a connection and a server that is overloaded are worth another try; a wrong
password, a missing image and a package that does not build are not.
"""

from __future__ import annotations

import random
import re
import time
from typing import TYPE_CHECKING, TypeVar

from guix_tasks.console import human_time
from guix_tasks.errors import GuixTasksError

if TYPE_CHECKING:
    from collections.abc import Callable

    from guix_tasks.console import Console

T = TypeVar("T")

TRIES = 4

LONGEST = 60.0
"""Seconds that are waited at most."""

_PASSING = re.compile(
    r"\b(429|50[0234])\b|too ?many ?requests|internal server error|bad gateway|"
    r"service unavailable|gateway time-?out|connection reset|broken pipe|unexpected eof|\bEOF\b|"
    r"i/o timeout|timed? ?out|TLS handshake|temporary failure in name resolution|"
    r"connection was closed|use of closed network connection",
    re.IGNORECASE,
)
"""What engines, BuildKit and registries say of a fault that may be gone in a moment.

Not `connection refused`: where nobody listens, somebody has to start something.
"""


def passes(text: str) -> bool:
    """Whether a message tells of a fault that may be gone in a moment."""
    return _PASSING.search(text) is not None


def retried(console: Console, what: str, call: Callable[[], T], tries: int = TRIES) -> T:
    """Make a call, and again where its error says that it may go well a little later.

    The waits double, and differ by chance, so that many machines do not come back at once.
    """
    for left in range(tries - 1, -1, -1):
        try:
            return call()
        except GuixTasksError as error:
            if not error.passes or not left:
                raise
            seconds = min(LONGEST, 2.0 ** (tries - left)) * random.uniform(0.5, 1)  # noqa: S311
            console.warn(f"{error}; {what} is tried again in {human_time(seconds)}")
        time.sleep(seconds)
    raise AssertionError
