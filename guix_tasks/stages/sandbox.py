"""Privileges of work containers: the fewest with which Guix builds on an engine.

``GUIX_SANDBOX`` has these values:

* ``rootless``: nothing runs as root. The daemon isolates its builds in a user namespace, in which
  it has rights only over its own processes and mounts. The filter is that of ``capabilities``.
* ``capabilities``: the capabilities that a root daemon needs to isolate its builds, no device, and
  a filter of system calls that no build needs (modules, kexec, BPF, keys, other namespaces, ...).
  Each capability is necessary, as leaving it out showed. A malicious root can escape: with
  SYS_ADMIN it can mount a fresh ``/proc`` and write to it.
* ``privileged``: all capabilities, all devices of the host, no filter.
* ``nochroot``: builds are not isolated. ``auto`` never selects it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.errors import NO_SHELL, REFUSED, EngineError
from guix_tasks.files import cache_home, text_digest, write_whole
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.container import (
    ENTRY_POINT,
    WORK_DIRECTORY,
    Work,
    run_silently,
    time_limit,
    work_container,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

ORDER = (Sandbox.ROOTLESS, Sandbox.CAPABILITIES, Sandbox.PRIVILEGED)
"""Values that ``auto`` tries, the safest first."""

PROBE_SECONDS = 120.0
"""Time limit of the probe."""


def resolve_sandbox(project: Project, image: Image, *, as_root: bool) -> Settings:
    """Resolve ``GUIX_SANDBOX=auto`` for containers of an image and return the settings.

    The result is cached for this engine and for the layers of the base stage, which define the
    build users, or for those of the image if it has another base.

    Raise ``EngineError`` if no value works.
    """
    engine, settings, base = project.engine, project.settings, project.ledger.find("base")
    if settings.guix_sandbox is not Sandbox.AUTO:
        return settings
    order = ORDER[1:] if as_root else ORDER
    info = engine.info()
    base_layers = base.layers if base else ()
    is_based = base_layers and image.layers[: len(base_layers)] == base_layers
    layers = base_layers if is_based else image.layers
    key = text_digest(
        info.url, info.version, *info.security, text_digest(*layers), *map(str, order)
    )
    cached = cache_home() / "sandbox" / key
    with suppress(OSError, ValueError):
        return replace(settings, guix_sandbox=Sandbox(cached.read_text(encoding="utf-8")))
    sandbox = None if engine.is_dry else _first_working(project, image, order)
    if sandbox is None:
        return replace(settings, guix_sandbox=order[0])
    # Without the cache the next run probes again.
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cached, sandbox.value.encode())
    return replace(settings, guix_sandbox=sandbox)


_NO_MEMORY = "a process was killed because memory ran out"

OTHER_FAULTS = {
    _NO_MEMORY: "raise STAGE_MEMORY, or give the engine more",
    "no guix-daemon": "set BASE_IMAGE to an image with Guix, or install Guix in the Dockerfile",
    f"exec {ENTRY_POINT}: no such file or directory": NO_SHELL,
    "substitute key": "correct GUIX_SUBSTITUTE_KEYS",
    "xec format error": "`docker run --privileged --rm tonistiigi/binfmt --install ARCH`",
}
"""Hints for faults that no privilege repairs, by words of the error."""


def _first_working(project: Project, image: Image, order: Sequence[Sandbox]) -> Sandbox | None:
    """Return the first value with which Guix builds, or None after a fault of another kind."""
    failures: list[str] = []
    for sandbox in order:
        try:
            settings = replace(project.settings, guix_sandbox=sandbox)
            error_line = probe(project.engine, settings, image)
        except EngineError as error:
            # An engine that refuses these privileges may grant the next; a lost engine does not.
            if not str(error).startswith(REFUSED):
                raise
            error_line = str(error)
        if error_line is None:
            reason = f", because {'; '.join(failures)}" if failures else ": Guix can build"
            project.console.print(f"sandbox: {sandbox.value}{reason}")
            return sandbox
        failures.append(f"{sandbox.value} fails ({error_line})")
    # A daemon that may not write to Guix's directories also fails to authorise a key.
    if any(words in failures[-1] for words in OTHER_FAULTS):
        return None  # the stage reports it in full
    raise EngineError(
        f"Guix cannot build in a container of this engine: {', '.join(failures)}; run `inv doctor` "
        "for details, or set GUIX_SANDBOX=nochroot to build without isolation"
    )


def probe(engine: Engine, settings: Settings, image: Image) -> str | None:
    """Build a tiny derivation in a container of an image; return the error line if it fails."""
    directory = Path(__file__).parent
    files = {name: (directory / name).read_bytes() for name in ("probe.sh", "probe.scm")}
    work = Work("probe", (f"{WORK_DIRECTORY}/probe.sh",), files, isolated=True)
    with (
        work_container(engine, settings, image.id, work) as container,
        time_limit(engine, container, PROBE_SECONDS, grace=5) as timed_out,
    ):
        status, log = run_silently(engine, container)
        lacked_memory = status != 0 and engine.lacked_memory(container)
    if timed_out.is_set():
        return f"the probe did not end within {PROBE_SECONDS} s"
    if status == 0:
        return None
    if lacked_memory:
        return _NO_MEMORY
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    marks = ("substitute key", "no guix-daemon", "error:")
    error_lines = (line for mark in marks for line in lines if mark in line)
    return next(error_lines, lines[-1] if lines else f"the probe ended with status {status}")
