"""Material of the offline example: a substitute server as a directory, and two signed channels.

``examples/offline/make.sh`` makes them in a temporary container, with Guix's own programs.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from typing import TYPE_CHECKING

from guix_tasks import files
from guix_tasks.bootstrap.apt import Apt
from guix_tasks.bootstrap.base_image import SUITE
from guix_tasks.engine.api import ContainerSpec, run_to_end
from guix_tasks.errors import BuilderError
from guix_tasks.ui.log import LogReader

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.engine.api import Engine
    from guix_tasks.ui.console import Console

PACKAGES = (
    "busybox-static", "git", "gpg", "gpg-agent", "hello", "install-info", "patchelf",
)  # fmt: skip


def make_material(engine: Engine, console: Console, image: str, directory: Path) -> None:
    """Make ``directory/out`` in a container of a Debian image with Guix, unless it is up to date.

    Raise ``BuilderError`` after a failure, which leaves ``directory/out`` unchanged.
    """
    mark = directory / "out" / "made-from"
    key = _key(engine, image, directory)
    if mark.exists() and mark.read_text(encoding="utf-8") == key:
        return
    console.print("offline example: making its channels and substitutes")
    if not engine.info().is_local:
        raise BuilderError(
            "cannot make the offline example: it needs an engine on this machine, and "
            f"{engine.info().url} is on another one"
        )
    cache = files.cache_home() / "offline"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    # Packages of the image need not be downloaded.
    status = cache / "status"
    status.write_bytes(_run(engine, console, image, ("cat", "/var/lib/dpkg/status")))
    apt = Apt([SUITE], status=status, failure=BuilderError)
    apt.update()
    apt.install_set(PACKAGES, cache / "debs")
    out = directory / "out"
    out.mkdir(exist_ok=True)
    for stale in (mark, directory / "channels.lock.scm"):
        stale.unlink(missing_ok=True)
    binds = (f"{cache / 'debs'}:/debs:ro", f"{directory}:/example:ro", f"{out}:/out")
    _run(engine, console, image, ("bash", "/example/make.sh"), binds)
    mark.write_text(key, encoding="utf-8")


def _key(engine: Engine, name: str, directory: Path) -> str:
    """Return the digest of the image's layers and of the scripts that make the material."""
    image = engine.image(name)
    digest = hashlib.sha256("\n".join(image.layers if image else ()).encode())
    paths = [directory / "make.sh"]
    for part in ("seed", "channels"):
        paths += sorted((directory / part).rglob("*"))
    for path in paths:
        if path.is_file():
            digest.update(f"\n{path.relative_to(directory)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _run(
    engine: Engine,
    console: Console,
    image: str,
    command: tuple[str, ...],
    binds: tuple[str, ...] = (),
) -> bytes:
    """Run a command without privileges and network, and return its standard output."""
    spec = ContainerSpec(
        name=f"guix-tasks-offline-{secrets.token_hex(3)}",
        image=image,
        command=command,
        environment={"OWNER": f"{os.getuid()}:{os.getgid()}"},
        network="none",
        binds=binds,
    )

    def failed(status: int) -> BuilderError:
        return BuilderError(
            f"{' '.join(command)} failed with status {status} in a container of {image}; "
            "its output is above"
        )

    with console.step("offline example") as step:
        return b"".join(LogReader(step.log).results(run_to_end(engine, spec, failed)))
