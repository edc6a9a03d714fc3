"""Nodes of a builder: the syntax of ``BUILDX_NODES``.

Like an option of Docker, a node is a list of comma-separated values: the endpoint, ``platform=``
for each platform to build there, and options of the driver. buildx checks endpoints and options.
"""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING

from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import quoted
from guix_tasks.settings.values import Driver, Node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FILES = ("cacert", "cert", "key")
"""Options whose value is a file; buildx accepts only absolute paths."""


def node(text: str, base: Path) -> Node:
    """Parse ``[ENDPOINT][,platform=PLATFORM]...[,OPTION=VALUE]...``.

    Double quotes enclose an option whose value contains commas. Relative files start from ``base``.
    """
    if not text.isprintable():
        raise ValueError(f"{quoted(text)} contains a control character; remove it")
    try:
        words = next(csv.reader([text], strict=True), []) or [""]
    except csv.Error:
        raise ValueError(
            f"{quoted(text)}: a quote does not enclose a whole option; quote all of NAME=VALUE"
        ) from None
    endpoint = ""
    if not re.match(r"[\w.-]+=", words[0], re.ASCII):
        endpoint = words.pop(0)
        if not re.fullmatch(r"[A-Za-z0-9][\w@%+.:/?=&\[\]-]*", endpoint, re.ASCII):
            raise ValueError(
                f"{quoted(endpoint)} is not an endpoint; write the endpoint first, then options"
            )
    platforms: list[Platform] = []
    options: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            hint = "; separate nodes by spaces, not commas" if "://" in word else ""
            raise ValueError(f"{quoted(word)} is not an option; write NAME=VALUE{hint}")
        if name == "platform":
            platforms.append(Platform.parse(value))
        elif name in options:
            raise ValueError(f"{quoted(name)} is set twice; keep one")
        else:
            options[name] = str(base / value) if name in _FILES else value
    return Node(endpoint, tuple(platforms), tuple(options.items()))


def problems(driver: Driver, nodes: tuple[Node, ...]) -> Iterator[str]:
    """Yield the problems of nodes with a driver, each as "cause; hint"."""
    if driver is Driver.DOCKER and nodes:
        yield "the driver docker uses the engine and has no nodes; unset BUILDX_NODES"
    if driver is Driver.REMOTE and not (nodes and all(node.endpoint for node in nodes)):
        yield "the driver remote requires a node; write the endpoint of BuildKit"
