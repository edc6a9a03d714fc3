"""Number of successful calls of each task on each engine, printed at the end of a test run."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING

from guix_tasks.cli.session import helpers
from guix_tasks.engine.discovery import Address
from guix_tasks.engine.podman import open_engine
from guix_tasks.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COUNTS: defaultdict[str, Counter[str]] = defaultdict(Counter)
"""Number of calls by task, by the description of the engine."""


def record_call(host: str, arguments: Sequence[str]) -> None:
    """Count the tasks of a successful call of ``inv`` on the engine at a URL."""
    words = takewhile(lambda word: word != "--", arguments)
    COUNTS[describe_engine(host)].update(word for word in words if not word.startswith("-"))


@cache
def describe_engine(host: str) -> str:
    """Return the product, version, image store and user namespaces of an engine."""
    try:
        info = open_engine(Address(host, "test"), helpers({})).info()
    except EngineError:  # it needs an account or a certificate
        return f"an engine at {host.partition(':')[0]}"
    remap = ", userns-remap" if info.first_id and not info.is_rootless else ""
    return f"{info.kind}{remap}, {info.store}, cgroups v{info.cgroups}"


def summary() -> Iterator[tuple[str, str]]:
    """Yield each engine, and its tasks with the number of calls."""
    for engine, tasks in sorted(COUNTS.items()):
        counts = (f"{task} {count}" for task, count in sorted(tasks.items()))
        yield f"engine {engine}", ", ".join(counts)
