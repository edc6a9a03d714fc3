"""Which rights a work container gets: the fewest with which Guix builds on this engine.

``privileged`` is what everyone gives: all capabilities, all devices of the host, no filter of
system calls.  ``capabilities`` has those that a daemon of root needs to isolate its builds, each of
them (found by leaving it out), no device, and a filter that refuses system calls that nothing in a
build needs (modules, kexec, BPF, keys, other namespaces, …).  It is no wall against a root that
means harm: with SYS_ADMIN it can mount a fresh ``/proc`` and write what the host obeys.  In a
``rootless`` one, with the same filter, nothing is root: the daemon isolates its builds by a user
namespace, in which it has rights over what is its own alone.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.errors import REFUSED, EngineError
from guix_tasks.files import cache_home, text_digest, write_whole
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.container import FOLDER, Work, time_limit, work_container

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.settings import Settings
    from guix_tasks.ui.console import Console

ORDER = (Sandbox.ROOTLESS, Sandbox.CAPABILITIES, Sandbox.PRIVILEGED)
"""What ``auto`` tries, the safer one first; what is not isolated has to be asked for by name."""

PROBE_SECONDS = 120.0
"""How long the probe may take."""


def settled(
    engine: Engine,
    settings: Settings,
    console: Console,
    image: Image,
    base: Image | None,
    *,
    as_root: bool,
) -> Settings:
    """The settings with what ``auto`` comes to for containers of an image.

    It is tried once and remembered, for this engine and the ``base`` stage, if the image is made
    from that: whether there are users to build as is said there.  Raises ``EngineError`` where
    nothing works.
    """
    if settings.guix_sandbox is not Sandbox.AUTO:
        return settings
    order = ORDER[1:] if as_root else ORDER
    info = engine.info()
    below = base.layers if base else ()
    layers = below if image.layers[: len(below)] == below and below else image.layers
    key = text_digest(
        info.url, info.version, *info.security, text_digest(*layers), *map(str, order)
    )
    kept = cache_home() / "sandbox" / key
    with suppress(OSError, ValueError):
        return replace(settings, guix_sandbox=Sandbox(kept.read_text()))
    found = None if engine.is_dry else _try(engine, settings, console, image, order)
    if found is None:
        return replace(settings, guix_sandbox=order[0])
    # Only a cache: where it cannot be written, it is tried again.
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, found.value.encode())
    return replace(settings, guix_sandbox=found)


OTHER_FAULTS = {
    "no guix-daemon": "let BASE_IMAGE, or the Dockerfile, be one with Guix",
    "substitute key": "mend GUIX_SUBSTITUTE_KEYS",
    "xec format error": "`inv buildx.setup --binfmt` installs the emulator",
}
"""What mends a fault that no rights would, by words of it."""


def _try(
    engine: Engine, settings: Settings, console: Console, image: Image, order: Sequence[Sandbox]
) -> Sandbox | None:
    """The first kind that does; None where it cannot be told, since no rights would help."""
    reasons: list[str] = []
    for kind in order:
        try:
            why = probe(engine, replace(settings, guix_sandbox=kind), image)
        except EngineError as error:
            # One that is gone is another matter than one that refuses these rights.
            if not str(error).startswith(REFUSED):
                raise
            why = str(error)
        if why is None:
            because = f", since {'; '.join(reasons)}" if reasons else ": Guix builds with it"
            console.say(f"sandbox: {kind.value}{because}")
            return kind
        if any(words in why for words in OTHER_FAULTS):
            return None  # whoever uses the image says it better
        reasons.append(f"{kind.value} fails ({why})")
    raise EngineError(
        f"Guix cannot build in a container of this engine: {', '.join(reasons)}; `inv doctor` says "
        "more, GUIX_SANDBOX=nochroot does without isolation"
    )


def probe(engine: Engine, settings: Settings, image: Image) -> str | None:
    """Build a tiny derivation in a container of an image; why that failed, if it did."""
    folder = Path(__file__).parent
    files = {name: (folder / name).read_bytes() for name in ("probe.sh", "probe.scm")}
    work = Work("probe", (f"{FOLDER}/probe.sh",), files, bare=True)
    with (
        work_container(engine, settings, image.id, work) as container,
        time_limit(engine, container, PROBE_SECONDS, grace=5) as late,
    ):
        log = b"".join(data for _, data in engine.run(container))
        status = engine.wait(container)
    if late.is_set():
        return f"it did not end within {PROBE_SECONDS} s"
    if status == 0:
        return None
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    known = ("substitute key", "no guix-daemon", "error:")
    told = (line for words in known for line in lines if words in line)
    return next(told, lines[-1] if lines else f"it ended with status {status}")
