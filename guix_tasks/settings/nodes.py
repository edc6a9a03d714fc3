"""The machines of a builder: ``BUILDX_NODES``, and what each driver takes.

A node is written in the way of Docker's own options, as comma-separated values: the endpoint,
then ``platform=`` for each platform that it is to be used for, then options of the driver.  The
rules are those of buildx, ``driver/*/factory.go``.
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
    Driver.KUBERNETES: "kubernetes://NAME, the name of the deployment that it is to be",
}


def node(text: str, base: Path) -> Node:
    """Take ``ENDPOINT[,platform=PLATFORM]...[,OPTION=VALUE]...``; files are relative to ``base``.

    Quotes keep a value with commas together, within those of the list.
    """
    if not text.isprintable():
        raise ValueError(f"{quoted(text)} has a control character in it; leave that out")
    try:
        endpoint, *words = next(csv.reader([text], strict=True), []) or [""]
    except csv.Error:
        raise ValueError(
            f"{quoted(text)}: a quote is not around all of an option; mend it"
        ) from None
    bare_option = "=" in endpoint and "://" not in endpoint
    if bare_option or not re.fullmatch(r"[A-Za-z0-9][\w@%+.:/?=&\[\]-]*", endpoint, re.ASCII):
        raise ValueError(f"{quoted(endpoint)} is not an endpoint; write one first, options behind")
    platforms: list[Platform] = []
    options: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            hint = "; nodes are separated by spaces, not commas" if "://" in word else ""
            raise ValueError(f"{quoted(word)} is not an option; write NAME=VALUE{hint}")
        if name == "platform":
            platforms.append(Platform.parse(value))
        elif name in options:
            raise ValueError(f"{quoted(name)} is given twice; keep one")
        else:
            options[name] = str(base / value) if name in _FILES else value
    return Node(endpoint, tuple(platforms), tuple(options.items()))


def problems(driver: Driver, nodes: tuple[Node, ...]) -> Iterator[str]:
    """What is wrong with nodes for this driver; what would be right."""
    if driver is Driver.DOCKER:
        if nodes:
            yield "the driver docker is the engine itself, without nodes; unset it"
        return
    if driver is Driver.REMOTE and not nodes:
        yield "the driver remote needs to know where BuildKit is; write its endpoint"
    endpoints = [each.endpoint for each in nodes]
    for each in nodes:
        if endpoints.count(each.endpoint) > 1:
            yield f"{quoted(each.endpoint)} is given twice; keep one"
        yield from _endpoint_problems(driver, each.endpoint)
        for name, value in each.options:
            yield from _option_problems(driver, name, value)
        yield from _certificate_problems(each)


def _endpoint_problems(driver: Driver, endpoint: str) -> Iterator[str]:
    right = f"write {_ENDPOINTS[driver]}"
    scheme, slashes, place = endpoint.partition("://")
    if not slashes:
        if driver is not Driver.CONTAINER:
            yield f"{quoted(endpoint)} is not an endpoint of the driver {driver.value}; {right}"
        return
    if scheme not in _SCHEMES[driver]:
        yield f"{quoted(endpoint)} is not an endpoint of the driver {driver.value}; {right}"
    elif not place:
        yield f"{quoted(endpoint)} names no place; {right}"
    elif scheme in ("tcp", "ssh") and not _has_host(endpoint, with_port=scheme == "tcp"):
        yield f"{quoted(endpoint)} has no host or no port; {right}"


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
        near = difflib.get_close_matches(name, [*known, "platform"], n=1)
        hint = f"write {near[0]}" if near else f"it has {', '.join(known)}"
        yield f"{quoted(name)} is no option of the driver {driver.value}; {hint}"
    elif name == "replicas" and not re.fullmatch("[1-9][0-9]{0,3}", value):
        yield f"replicas={quoted(value)} is not a number from 1 on; write one"


def _certificate_problems(each: Node) -> Iterator[str]:
    options = dict(each.options)
    given = {name: options[name] for name in _FILES if name in options}
    secured = [*given, *(["servername"] if "servername" in options else [])]
    if secured and "cacert" not in given:
        yield f"{each.endpoint}: {secured[0]} needs cacert too; name the authority's file"
    if ("cert" in given) != ("key" in given):
        yield f"{each.endpoint}: cert and key go together; name both files"
    for name, value in given.items():
        if not os.path.isfile(value):  # noqa: PTH113 -- no error for a name that is too long
            yield f"{each.endpoint}: {name}: there is no file {quoted(value)}; name one"
