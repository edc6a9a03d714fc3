"""Faults that pass by themselves, and trying again.

A network that drops a connection and a server that is overloaded are worth another try; a wrong
password, a missing image and a package that does not build are not.
"""

from __future__ import annotations

import http.client
import random
import re
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

from guix_tasks.errors import GuixTasksError
from guix_tasks.ui.format import human_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from guix_tasks.ui.console import Console

T = TypeVar("T")

TRIES = 4

LONGEST = 60.0
"""Seconds that are waited at most, where nobody says for how long."""

LONGEST_ASKED = 300.0
"""Seconds that are waited at most where a registry asks to be left alone."""

_ASKING = 5.0
"""Seconds in which a registry may say so."""

_PASSING = re.compile(
    r"\b(429|50[0234])\b|too ?many ?requests|internal server error|bad gateway|"
    r"service unavailable|gateway time-?out|connection reset|broken pipe|unexpected eof|\bEOF\b|"
    r"i/o timeout|timed? ?out|(?<!like a )TLS handshake|temporary failure in name resolution|"
    r"connection was closed|use of closed network connection|"
    # What came is not what was asked for: it broke on its way.
    r"verification failed for digest|unexpected commit digest",
    re.IGNORECASE,
)
"""What engines, BuildKit and registries say of a fault that may be gone in a moment.

Not `connection refused`: where nobody listens, somebody has to start something.
"""


_OVERLOADED = re.compile(r"\b429\b|too ?many ?requests", re.IGNORECASE)


def passes(text: str) -> bool:
    """Whether a message tells of a fault that may be gone in a moment."""
    return _PASSING.search(text) is not None


def retried(
    console: Console, what: str, call: Callable[[], T], tries: int = TRIES, host: str | None = None
) -> T:
    """Make a call, and again where its error says that it may go well a little later.

    The waits double, and differ by chance, so that many machines do not come back at once.  Where
    the registry ``host`` was asked too often, and says for how long it wants to be left alone, it
    is that long.
    """
    for left in range(tries - 1, -1, -1):
        try:
            return call()
        except GuixTasksError as error:
            if not error.passes or not left:
                raise
            seconds = min(LONGEST, 2.0 ** (tries - left)) * random.uniform(0.5, 1)  # noqa: S311
            why = ""
            asked = retry_after(host) if host and _OVERLOADED.search(str(error)) else None
            if asked is not None:
                seconds = min(LONGEST_ASKED, asked + random.random())  # noqa: S311
                why = f", as {host} asks for {human_time(asked)}"
            console.warn(f"{error}; {what} is tried again in {human_time(seconds)}{why}")
        time.sleep(seconds)
    raise AssertionError


def retry_after(host: str) -> float | None:
    """The seconds for which a registry wants to be left alone; None where it does not say.

    It is asked once, as anybody may: an engine keeps what it was told to itself.
    """
    name = {"docker.io": "registry-1.docker.io"}.get(host, host)
    is_loopback = re.fullmatch(r"(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?", host)
    for scheme in ("http",) if is_loopback else ("https", "http"):
        address = f"{scheme}://{name}/v2/"
        try:
            with urllib.request.urlopen(address, timeout=_ASKING) as answer:  # noqa: S310
                return _seconds(answer.headers.get("Retry-After"))
        except urllib.error.HTTPError as error:
            with error:
                return _seconds(error.headers.get("Retry-After"))
        except (OSError, ValueError, http.client.HTTPException):
            continue
    return None


def _seconds(value: str | None) -> float | None:
    """What ``Retry-After`` says (RFC 9110, 10.2.3): seconds, or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    now = datetime.now(timezone.utc)
    return max(0.0, (date.replace(tzinfo=date.tzinfo or timezone.utc) - now).total_seconds())
