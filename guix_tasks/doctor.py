"""Doctor: what can be wrong on this machine, one line each, with what mends it."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.builders import find_builder, needed_syntax
from guix_tasks.console import human_size
from guix_tasks.errors import GuixTasksError
from guix_tasks.stages.pull import lock_text, wanted_text
from guix_tasks.transfer import credentials
from guix_tasks.work import FOLDER, Work, work_container

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guix_tasks.buildx import Buildx
    from guix_tasks.console import Console
    from guix_tasks.engine import Engine
    from guix_tasks.settings import Settings
    from guix_tasks.stage import Project

GUIX_SERVERS = ("https://ci.guix.gnu.org", "https://bordeaux.guix.gnu.org")
"""What Guix itself asks for substitutes (``%default-substitute-urls``)."""

_LEAST_DISK = 4_000_000_000
"""Bytes that a pull and an install of Guix' own packages take, about."""

_CLOCK_SECONDS = 60
"""How much clocks may differ: certificates and signatures are told by the time."""

_WAIT = 10.0
"""Seconds that a server may take to answer."""


class State(Enum):
    """How a check came out."""

    OK = "ok"
    NOTE = "note"
    """Not as it could be, and nothing that has to be mended."""
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """What a check found, and what mends it."""

    check: str
    state: State
    said: str
    mend: str = ""


@dataclass(frozen=True)
class Patient:
    """What is examined: a project, and how its buildx is found."""

    project: Project
    buildx: Callable[[], Buildx | None]

    @property
    def settings(self) -> Settings:
        return self.project.settings

    @property
    def engine(self) -> Engine:
        return self.project.engine


def examine(patient: Patient) -> list[Finding]:
    """Make every check; none of them changes anything.

    They mostly wait for others, so they are made side by side.
    """
    with ThreadPoolExecutor(max_workers=len(CHECKS)) as pool:
        found = [pool.submit(_findings, name, check, patient) for name, check in CHECKS.items()]
        return [finding for each in found for finding in each.result()]


def _findings(
    name: str, check: Callable[[Patient], Iterator[Finding]], patient: Patient
) -> list[Finding]:
    findings: list[Finding] = []
    try:
        findings.extend(check(patient))
    except GuixTasksError as error:
        findings.append(failed(name, error))
    return findings


def failed(check: str, error: GuixTasksError) -> Finding:
    """An error as a finding: its message is the cause, and what mends it."""
    said, _, mend = str(error).partition("; ")
    return Finding(check, State.FAILED, said, mend)


def show(console: Console, findings: list[Finding], *, as_json: bool) -> None:
    """A line for each finding, or all as JSON for a machine."""
    if as_json:
        rows = [{**asdict(each), "state": each.state.value} for each in findings]
        console.result(json.dumps(rows, indent=2))
        return
    for each in findings:
        mend = f"; {each.mend}" if each.mend else ""
        console.result(f"{each.state.value:6} {each.check}: {each.said}{mend}")


# --- The engine and its machine -------------------------------------------------------------


def _engine(patient: Patient) -> Iterator[Finding]:
    info = patient.engine.info()
    said = (
        f"{info.name} at {info.url} ({info.origin}), Docker {info.version}, {info.platform}, "
        f"{info.storage_driver}"
    )
    yield Finding("engine", State.OK, said)
    limits = ", ".join([f"cgroups v{info.cgroups or '?'}", *info.security])
    yield Finding("host", State.OK, limits)
    if "rootless" in info.security:
        yield Finding(
            "host", State.NOTE, "a rootless engine, whose privileged containers have the user's "
            "rights only", "if the sandbox check fails, use an engine that runs as root",
        )  # fmt: skip
    drift = (datetime.now(timezone.utc) - info.time).total_seconds() if info.time else 0.0
    if abs(drift) > _CLOCK_SECONDS:
        yield Finding(
            "clock", State.FAILED, f"the engine's clock is {drift:.0f} s behind this machine's",
            "set both by NTP: certificates are told by the time",
        )  # fmt: skip
    else:
        yield Finding("clock", State.OK, f"{abs(drift):.0f} s between this machine and the engine")


def _disk(patient: Patient) -> Iterator[Finding]:
    info = patient.engine.info()
    if not info.is_local or not Path(info.root).is_dir():
        yield Finding("disk", State.NOTE, "the engine's disk cannot be seen from here")
        return
    image = patient.project.ledger.newest() or patient.engine.image(
        str(patient.settings.base_image)
    )
    # A commit needs room for another image beside the one that it replaces.
    wanted = max(_LEAST_DISK, 2 * image.size if image else 0)
    free = shutil.disk_usage(info.root).free
    said = f"{human_size(free)} free at {info.root}; about {human_size(wanted)} is needed"
    if free < wanted:
        yield Finding("disk", State.FAILED, said, "make room: `inv clean`, `docker system prune`")
    else:
        yield Finding("disk", State.OK, said)


def _base_image(patient: Patient) -> Iterator[Finding]:
    reference = str(patient.settings.base_image)
    image = patient.engine.image(reference)
    if image:
        yield Finding("base image", State.OK, f"{reference} is here, {human_size(image.size)}")
    elif patient.engine.remote_digest(reference):
        yield Finding("base image", State.OK, f"{reference} is in its registry")
    else:
        yield Finding(
            "base image", State.FAILED, f"{reference} is neither here nor to be had",
            "set BASE_IMAGE to one that the engine can pull, or `inv rootfs`",
        )  # fmt: skip


def _sandbox(patient: Patient) -> Iterator[Finding]:
    """Build a tiny derivation in a work container, as a stage would."""
    settings, engine = patient.settings, patient.engine
    kind = settings.guix_sandbox.value
    image = patient.project.ledger.find("base") or engine.image(str(settings.base_image))
    if image is None or engine.is_dry:
        yield Finding("sandbox", State.NOTE, f"{kind}: not tried, for want of an image with Guix")
        return
    folder = Path(__file__).parent
    files = {name: (folder / name).read_bytes() for name in ("probe.sh", "probe.scm")}
    work = Work("probe", (f"{FOLDER}/probe.sh",), files, bare=True)
    with work_container(engine, settings, image.id, work) as container:
        log = b"".join(data for _, data in engine.run(container))
        status = engine.wait(container)
    if status:
        lines = [line for line in log.decode(errors="replace").splitlines() if line.strip()]
        why = next((line for line in lines if "error:" in line), lines[-1] if lines else "")
        yield Finding(
            "sandbox", State.FAILED, f"{kind}: Guix cannot build in a work container: {why}",
            "use an engine that lets containers have privileges, or try GUIX_SANDBOX=nochroot",
        )  # fmt: skip
    else:
        yield Finding("sandbox", State.OK, f"{kind}: Guix builds in a work container")


# --- What it speaks with --------------------------------------------------------------------


def _registry(patient: Patient) -> Iterator[Finding]:
    """Ask for the image, without a push; that it is not there yet is no fault."""
    reference, account = patient.settings.image, credentials(patient.project)
    patient.engine.greet_registry(str(reference), account)
    who = f"as {account.username}" if account else "with what Docker's own configuration says"
    yield Finding("registry", State.OK, f"{reference.registry} answers, {who}")


def _buildx(patient: Patient) -> Iterator[Finding]:
    buildx = patient.buildx()
    if buildx is None:
        yield Finding(
            "buildx", State.NOTE, "not on this machine", "`inv buildx.setup` installs it for you"
        )
        return
    version = buildx.ask("version").split()
    yield Finding("buildx", State.OK, f"{version[1] if version[1:] else '?'} at {buildx.program}")
    try:
        builder = find_builder(patient.settings, buildx)
        if idle := [node.name for node in builder.nodes if node.status != "running"]:
            # To ask it would start it.
            yield Finding(
                "builder", State.NOTE, f"{', '.join(idle)} does not run",
                "`inv buildx.setup` starts it",
            )  # fmt: skip
            return
        syntax = needed_syntax(patient.settings, buildx, builder.name)
    except GuixTasksError as error:
        # Run and commit does without.
        said, _, mend = str(error).partition("; ")
        yield Finding("builder", State.NOTE, said, mend)
    else:
        own = f"the frontend {syntax}" if syntax else "its own frontend"
        yield Finding("builder", State.OK, f"{builder.name} runs insecure steps with {own}")


def _channels(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    text = lock_text(settings) or wanted_text(settings)
    if text is None:
        yield Finding("channels", State.NOTE, "those of the base image; none are set")
        return
    for channel in guix.channels(text).values():
        name = f"channel {channel.name}"
        if channel.url.startswith(("https://", "http://")) and settings.network != "none":
            # What `git fetch` asks first (gitprotocol-http(5)).
            address = f"{channel.url.rstrip('/')}/info/refs?service=git-upload-pack"
            yield _answers(name, channel.url, address, "mend GUIX_CHANNELS, or the network")
        elif channel.url.startswith(("file://", "/")):
            yield _mounted(settings, name, channel.url.removeprefix("file://"))
        else:
            yield Finding(name, State.NOTE, f"{channel.url} was not asked")


def _mounted(settings: Settings, name: str, path: str) -> Finding:
    """A place in a work container, which is there if a mount brings it."""
    for mount in settings.mounts:
        below = path.removeprefix(mount.target)
        if path.startswith(mount.target) and below[:1] in ("", "/"):
            source = mount.source / below.lstrip("/")
            if source.exists():
                return Finding(name, State.OK, f"{path} is {source}")
            return Finding(
                name, State.FAILED, f"{path} would be {source}, which is not there", "mend MOUNTS"
            )
    return Finding(name, State.NOTE, f"{path} is to be in the base image; MOUNTS does not have it")


def _substitutes(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    for url in settings.guix_substitute_urls or GUIX_SERVERS:
        name = "substitutes"
        if url.startswith("file://"):
            yield _mounted(settings, name, url.removeprefix("file://"))
        elif settings.network == "none":
            yield Finding(name, State.NOTE, f"{url} is out of reach: NETWORK=none")
        else:
            mend = "without it everything is built from source: mend GUIX_SUBSTITUTE_URLS"
            yield _answers(name, url, f"{url.rstrip('/')}/nix-cache-info", mend)
        if url not in GUIX_SERVERS and not settings.guix_substitute_keys:
            yield Finding(
                name, State.NOTE, f"no key for {url} is set",
                "what it serves is refused unless the base image trusts it: GUIX_SUBSTITUTE_KEYS",
            )  # fmt: skip


def _answers(name: str, shown: str, address: str, mend: str) -> Finding:
    try:
        # Only http and https come here.
        with urllib.request.urlopen(address, timeout=_WAIT):  # noqa: S310
            return Finding(name, State.OK, f"{shown} answers")
    except urllib.error.HTTPError as error:
        return Finding(name, State.FAILED, f"{shown} answers {error.code} {error.reason}", mend)
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        return Finding(name, State.FAILED, f"{shown} does not answer: {cause}", mend)


CHECKS: dict[str, Callable[[Patient], Iterator[Finding]]] = {
    "engine": _engine,
    "disk": _disk,
    "base image": _base_image,
    "sandbox": _sandbox,
    "registry": _registry,
    "buildx": _buildx,
    "channels": _channels,
    "substitutes": _substitutes,
}
"""Each in the order in which its findings are shown."""
