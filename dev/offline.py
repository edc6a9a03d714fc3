"""What the offline example needs: a substitute server as a folder, and two signed channels.

They are made in a throwaway container by ``examples/offline/make.sh``, with Guix's own programs.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import files
from guix_tasks.bootstrap.apt import Apt
from guix_tasks.bootstrap.rootfs import SUITE
from guix_tasks.engine.api import ContainerSpec, run_to_end
from guix_tasks.errors import BuilderError
from guix_tasks.ui.log import results

if TYPE_CHECKING:
    from guix_tasks.engine.api import Engine
    from guix_tasks.ui.console import Console

PACKAGES = (
    "busybox-static", "git", "gpg", "gpg-agent", "hello", "install-info", "patchelf",
)  # fmt: skip


def make_material(engine: Engine, console: Console, image: str, folder: Path) -> None:
    """Fill ``folder/out`` with the help of a Debian image that has Guix, unless it is filled.

    Raises ``BuilderError`` where that fails; then ``folder/out`` is as it was.
    """
    mark = folder / "out" / "made-from"
    key = _key(engine, image, folder)
    if mark.exists() and mark.read_text() == key:
        return
    console.say("offline example: making its channels and substitutes")
    if not engine.info().is_local:
        raise BuilderError(
            f"the offline example needs an engine on this machine; {engine.info().url} is not"
        )
    cache = files.cache_home() / "offline"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        # What the image has need not be fetched.
        status = Path(scratch) / "status"
        status.write_bytes(_run(engine, console, image, ("cat", "/var/lib/dpkg/status")))
        apt = Apt(files.cache_home() / "apt", [SUITE], status=status, failure=BuilderError)
        apt.update()
        apt.install_set(PACKAGES, cache / "debs")
    out = folder / "out"
    out.mkdir(exist_ok=True)
    for stale in (mark, folder / "channels.lock.scm"):
        stale.unlink(missing_ok=True)
    binds = (f"{cache / 'debs'}:/debs:ro", f"{folder}:/example:ro", f"{out}:/out")
    _run(engine, console, image, ("bash", "/example/make.sh"), binds)
    mark.write_text(key)


def _key(engine: Engine, image: str, folder: Path) -> str:
    """What the material is made of: the recipe, and the very Guix of the image."""
    found = engine.image(image)
    digest = hashlib.sha256("\n".join(found.layers if found else ()).encode())
    for name in ("make.sh", "seed", "channels"):
        for path in sorted((folder / name).rglob("*") if name != "make.sh" else [folder / name]):
            if path.is_file():
                digest.update(f"\n{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _run(
    engine: Engine,
    console: Console,
    image: str,
    command: tuple[str, ...],
    binds: tuple[str, ...] = (),
) -> bytes:
    """Run a command without any privilege or network; its standard output."""
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
        return b"".join(results(run_to_end(engine, spec, failed), step.log))
