"""Base image with Guix from Debian's packages, for machines without access to a registry."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from guix_tasks.bootstrap.apt import on_debian
from guix_tasks.bootstrap.registry import pull_missing
from guix_tasks.bootstrap.rootfs import PACKAGES, SUITE, container_argv, debian_rootfs, description
from guix_tasks.engine.api import ContainerSpec, run_to_end
from guix_tasks.errors import BuilderError, GuixTasksError
from guix_tasks.ui.format import human_size, human_time
from guix_tasks.ui.log import LogReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guix_tasks.engine.api import Engine
    from guix_tasks.ui.console import Console

BASE_TAG = f"guix-tasks/debian-guix:{SUITE}"
PLAIN_TAG = f"guix-tasks/debian:{SUITE}"
"""Debian without Guix, to test packs in."""
DEBIAN_IMAGE = f"debian:{SUITE}-slim"


def make_base(engine: Engine, console: Console, tag: str, *, plain: bool = False) -> None:
    """Make the image ``tag``, on Debian or in a Debian container; without Guix if ``plain``.

    Raise ``BuilderError`` if neither is possible.
    """
    packages = () if plain else PACKAGES
    started = time.monotonic()
    with console.step("rootfs"):
        if on_debian():
            archive = debian_rootfs(console, packages)
        else:
            archive = _in_container(engine, console, packages)
        # The engine imports the archive while mmdebstrap writes it.
        engine.import_rootfs(archive, tag)
    image = engine.image(tag)
    size = human_size(image.size) if image else ""
    took = human_time(time.monotonic() - started)
    console.print(f"rootfs: {tag}: {description(packages)}; {size}, {took}")
    if packages:
        console.print(f"rootfs: use it as BASE_IMAGE={tag}")


def _in_container(engine: Engine, console: Console, packages: Sequence[str]) -> Iterator[bytes]:
    console.print(f"rootfs: this host is not Debian; using a container of {DEBIAN_IMAGE}")
    try:
        pull_missing(engine, console, DEBIAN_IMAGE)
    except GuixTasksError as error:
        raise BuilderError(
            "cannot make the base image: this host is not Debian, and the image "
            f"{DEBIAN_IMAGE} is unavailable: {error}"
        ) from None
    spec = ContainerSpec(
        name=f"guix-tasks-rootfs-{secrets.token_hex(3)}",
        image=DEBIAN_IMAGE,
        command=tuple(container_argv(packages)),
        privileged=True,
        network=None if engine.info().has_bridge else "host",
    )

    def failed(status: int) -> BuilderError:
        return BuilderError(f"rootfs: mmdebstrap failed with status {status}; its output is above")

    with console.step("rootfs") as step:
        yield from LogReader(step.log).results(run_to_end(engine, spec, failed))
