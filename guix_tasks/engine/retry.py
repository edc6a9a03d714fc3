"""Retries of calls that fail for a transient reason.

A dropped connection and an overloaded server are transient. A wrong password, a missing image and
a package that does not build are not.
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
"""Number of attempts of a call."""

LONGEST = 60.0
"""Longest wait in seconds between two attempts."""

LONGEST_ASKED = 300.0
"""Longest wait in seconds if the registry sends ``Retry-After``."""

_REQUEST_TIMEOUT = 5.0
"""Timeout in seconds of the request for ``Retry-After``."""

_PASSING = re.compile(
    r"\b(429|50[0234])\b|too ?many ?requests|internal server error|bad gateway|"
    r"service unavailable|gateway time-?out|connection reset|broken pipe|unexpected eof|\bEOF\b|"
    r"i/o timeout|timed? ?out|(?<!like a )TLS handshake|temporary failure in name resolution|"
    r"connection was closed|use of closed network connection|"
    # The content was damaged on its way.
    r"verification failed for digest|unexpected commit digest",
    re.IGNORECASE,
)
"""Messages of engines, BuildKit and registries about transient failures.

`connection refused` is not transient: the user has to start a server.
"""


_OVERLOADED = re.compile(r"\b429\b|too ?many ?requests", re.IGNORECASE)


def is_transient(text: str) -> bool:
    """Return True if a message reports a transient failure."""
    return _PASSING.search(text) is not None


def retry_call(
    console: Console, what: str, call: Callable[[], T], tries: int = TRIES, host: str | None = None
) -> T:
    """Make a call, and repeat it after transient failures.

    ``what`` names the call in the warning about a failure. The waits double and are partly random,
    so that many machines do not retry at the same time. If the registry ``host`` limits the rate
    and sends ``Retry-After``, the wait is that long.

    Raise the last error after ``tries`` attempts.
    """
    for left in range(tries - 1, -1, -1):
        try:
            return call()
        except GuixTasksError as error:
            if not error.is_transient or not left:
                raise
            seconds = min(LONGEST, 2.0 ** (tries - left)) * random.uniform(0.5, 1)  # noqa: S311
            reason = ""
            requested = retry_after(host) if host and _OVERLOADED.search(str(error)) else None
            if requested is not None:
                seconds = min(LONGEST_ASKED, requested + random.random())  # noqa: S311
                reason = f", as {host} asks for {human_time(requested)}"
            console.warn(f"{error}; {what} is retried in {human_time(seconds)}{reason}")
        time.sleep(seconds)
    raise AssertionError


def retry_after(host: str) -> float | None:
    """Return the seconds of a registry's ``Retry-After`` header, or None if it sends none.

    This makes an anonymous request, because engines do not report the header.
    """
    name = {"docker.io": "registry-1.docker.io"}.get(host, host)
    is_loopback = re.fullmatch(r"(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?", host)
    for scheme in ("http",) if is_loopback else ("https", "http"):
        address = f"{scheme}://{name}/v2/"
        try:
            with urllib.request.urlopen(address, timeout=_REQUEST_TIMEOUT) as answer:  # noqa: S310
                return _seconds(answer.headers.get("Retry-After"))
        except urllib.error.HTTPError as error:
            with error:
                return _seconds(error.headers.get("Retry-After"))
        except (OSError, ValueError, http.client.HTTPException):
            continue
    return None


def _seconds(value: str | None) -> float | None:
    """Return the seconds until ``Retry-After`` (RFC 9110, 10.2.3), a number or a date."""
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
