"""Retries of calls that fail for a transient reason.

A dropped connection and an overloaded server are transient. A wrong password, a missing image and
a package that does not build are not.
"""

from __future__ import annotations

import random
import re
import time
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

_PASSING = re.compile(
    r"\b(429|50[0234])\b|too ?many ?requests|internal server error|bad gateway|"
    # With the containerd image store, engines report the message in a registry's answer without
    # its status and code (translateRegistryError in moby's daemon/containerd/registry_errors.go).
    r"rate limit|rate exceeded|retry-after: |error from registry: (unknown (error|unknown)|"
    r"unavailable)|"
    r"service unavailable|gateway time-?out|connection reset|broken pipe|unexpected eof|\bEOF\b|"
    r"i/o timeout|timed? ?out|(?<!like a )TLS handshake|temporary failure in name resolution|"
    r"connection was closed|use of closed network connection|"
    # The content was damaged on its way.
    r"verification failed for digest|unexpected commit (digest|size)|"
    r"digest (did not match|invalid)",
    re.IGNORECASE,
)
"""Messages of engines, BuildKit and registries about transient failures.

`connection refused` is not transient: the user has to start a server.
"""


_URL = re.compile(r'https?://[^\s"]+')


def is_transient(text: str) -> bool:
    """Return True if a message reports a transient failure."""
    # A number in a URL, for example in a tag, is not an HTTP status.
    return _PASSING.search(_URL.sub("", text)) is not None


def retry_call(console: Console, what: str, call: Callable[[], T], tries: int = TRIES) -> T:
    """Make a call, and repeat it after transient failures.

    ``what`` names the call in the warning about a failure. The waits double and are partly random,
    so that many machines do not retry at the same time.

    Raise the last error after ``tries`` attempts.
    """
    for left in range(tries - 1, -1, -1):
        try:
            return call()
        except GuixTasksError as error:
            if not error.is_transient or not left:
                raise
            seconds = min(LONGEST, 2.0 ** (tries - left)) * random.uniform(0.5, 1)  # noqa: S311
            console.warn(f"{error}; {what} is retried in {human_time(seconds)}")
        time.sleep(seconds)
    raise AssertionError
