"""Nodes of a builder: the syntax of ``BUILDX_NODES`` and the rules of each driver.

Like an option of Docker, a node is a list of comma-separated values: the endpoint, ``platform=``
for each platform to build there, and options of the driver. The rules are those of buildx,
``driver/*/factory.go``.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import quoted
from guix_tasks.settings.values import Driver, Node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FILES = ("cacert", "cert", "key")

_OPTIONS = {
    Driver.CONTAINER: (
        "allow-untrusted-image", "cgroup-parent", "cpu-period", "cpu-quota", "cpu-shares",
        "cpuset-cpus", "cpuset-mems", "default-load", "image", "memory", "memory-swap", "network",
        "provenance-add-gha", "restart-policy",
    ),
    Driver.REMOTE: (*_FILES, "default-load", "servername"),
    Driver.KUBERNETES: (
        "annotations", "buildkit-root-volume-memory", "default-load", "image", "labels",
        "limits.cpu", "limits.ephemeral-storage", "limits.memory", "loadbalance", "namespace",
        "nodeselector", "persistent-volume-claim.requests.storage", "qemu.image", "qemu.install",
        "replicas", "requests.cpu", "requests.ephemeral-storage", "requests.memory", "rootless",
        "schedulername", "serviceaccount", "timeout", "tolerations",
    ),
}  # fmt: skip

_HAS_ENVIRONMENT = (Driver.CONTAINER, Driver.KUBERNETES)

_SCHEMES = {
    Driver.CONTAINER: ("unix", "tcp", "ssh"),
    Driver.REMOTE: ("unix", "tcp", "ssh", "docker-container", "kube-pod"),
    Driver.KUBERNETES: ("kubernetes",),
}

_ENDPOINTS = {
    Driver.CONTAINER: "ssh://HOST, tcp://HOST:PORT, unix:///SOCKET or a Docker context",
    Driver.REMOTE: "tcp://HOST:PORT, unix:///SOCKET, ssh://HOST, docker-container://NAME or "
    "kube-pod://NAME",
    Driver.KUBERNETES: "kubernetes://NAME with the name of the deployment to create",
}


def node(text: str, base: Path) -> Node:
    """Parse ``ENDPOINT[,platform=PLATFORM]...[,OPTION=VALUE]...``.

    Double quotes enclose an option whose value contains commas. Relative files start from ``base``.
    """
    if not text.isprintable():
        raise ValueError(f"{quoted(text)} contains a control character; remove it")
    try:
        endpoint, *words = next(csv.reader([text], strict=True), []) or [""]
    except csv.Error:
        raise ValueError(
            f"{quoted(text)}: a quote does not enclose a whole option; quote all of NAME=VALUE"
        ) from None
    is_option = "=" in endpoint and "://" not in endpoint
    if is_option or not re.fullmatch(r"[A-Za-z0-9][\w@%+.:/?=&\[\]-]*", endpoint, re.ASCII):
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
    if driver is Driver.DOCKER:
        if nodes:
            yield "the driver docker uses the engine and has no nodes; unset BUILDX_NODES"
        return
    if driver is Driver.REMOTE and not nodes:
        yield "the driver remote requires a node; write the endpoint of BuildKit"
    endpoints = [node.endpoint for node in nodes]
    for node in nodes:
        if endpoints.count(node.endpoint) > 1:
            yield f"{quoted(node.endpoint)} is set twice; keep one"
        yield from _endpoint_problems(driver, node.endpoint)
        for name, value in node.options:
            yield from _option_problems(driver, name, value)
        yield from _certificate_problems(node)


def _endpoint_problems(driver: Driver, endpoint: str) -> Iterator[str]:
    hint = f"write {_ENDPOINTS[driver]}"
    scheme, slashes, address = endpoint.partition("://")
    if not slashes:
        if driver is not Driver.CONTAINER:
            yield f"{quoted(endpoint)} is not an endpoint of the driver {driver.value}; {hint}"
        return
    if scheme not in _SCHEMES[driver]:
        yield f"{quoted(endpoint)} is not an endpoint of the driver {driver.value}; {hint}"
    elif not address:
        yield f"{quoted(endpoint)} has no address; {hint}"
    elif scheme in ("tcp", "ssh") and not _has_host(endpoint, with_port=scheme == "tcp"):
        yield f"{quoted(endpoint)} has no host or no port; {hint}"


def _has_host(endpoint: str, *, with_port: bool) -> bool:
    try:
        parts = urlsplit(endpoint)
        return bool(parts.hostname) and (parts.port is not None or not with_port)
    except ValueError:
        return False


def _option_problems(driver: Driver, name: str, value: str) -> Iterator[str]:
    known = _OPTIONS[driver]
    if name.startswith("env.") and name != "env." and driver in _HAS_ENVIRONMENT:
        return
    if name not in known:
        matches = difflib.get_close_matches(name, [*known, "platform"], n=1)
        hint = f"did you mean {matches[0]}?" if matches else f"its options are {', '.join(known)}"
        yield f"{quoted(name)} is not an option of the driver {driver.value}; {hint}"
    elif name == "replicas" and not re.fullmatch("[1-9][0-9]{0,3}", value):
        yield f"replicas={quoted(value)} is not a whole number of at least 1; write for example 2"


def _certificate_problems(node: Node) -> Iterator[str]:
    options = dict(node.options)
    files = {name: options[name] for name in _FILES if name in options}
    tls_options = [*files, *(["servername"] if "servername" in options else [])]
    if tls_options and "cacert" not in files:
        yield f"{node.endpoint}: {tls_options[0]} requires cacert; set the authority's file"
    if ("cert" in files) != ("key" in files):
        yield f"{node.endpoint}: cert and key require each other; set both files"
    for name, value in files.items():
        if not os.path.isfile(value):  # noqa: PTH113 -- no error for a name that is too long
            yield f"{node.endpoint}: {name}: {quoted(value)} is not a file; set an existing file"
