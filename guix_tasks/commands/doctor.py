"""Doctor: what can be wrong on this machine, one line each, with what mends it."""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import ssl
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from enum import Enum
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from guix_tasks import guix
from guix_tasks.buildkit.builder import find_builder, needed_syntax
from guix_tasks.engine import podman_api
from guix_tasks.engine.credentials import credentials_for, remote_digest
from guix_tasks.errors import EngineError, GuixTasksError, UsageError
from guix_tasks.files import read_text
from guix_tasks.settings import Driver
from guix_tasks.settings.parsers import channel_credentials
from guix_tasks.stages.channel_access import by_ssh, lent_access, mirrored
from guix_tasks.stages.container import binds, proxy_out_of_reach, refuse_emulated
from guix_tasks.stages.pull import lock_misfits, lock_text, misfit, wanted_text
from guix_tasks.stages.sandbox import OTHER_FAULTS, probe
from guix_tasks.ui.format import human_size, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Console

_LEAST_DISK = 4_000_000_000
"""Bytes that a pull and an install of Guix' own packages take, about."""

_CLOCK_SECONDS = 60
"""How much clocks may differ: certificates and signatures are told by the time."""

_WAIT = 10.0
"""Seconds that a server may take to answer."""

_PROBE_SECONDS = 120
"""Seconds that a tiny build may take, under emulation, too."""


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
    except OSError as error:
        # Such as a file that may not be read; the other checks still have something to say.
        said = f"{error.filename or 'a file'}: {error.strerror or error}"
        findings.append(Finding(name, State.FAILED, said, "mend it and look again"))
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
        console.result(f"{each.state.value:6} {printable(f'{each.check}: {each.said}{mend}')}")


# --- The engine and its machine -------------------------------------------------------------


def _engine(patient: Patient) -> Iterator[Finding]:
    info = patient.engine.info()
    said = f"{info.name} at {info.url} ({info.origin}), {info.kind}, {info.platform}, {info.store}"
    yield Finding("engine", State.OK, said)
    limits = ", ".join([f"cgroups v{info.cgroups or '?'}", *info.security])
    yield Finding("host", State.OK, limits)
    if info.is_rootless:
        yield Finding(
            "host", State.NOTE, "a rootless engine, whose privileged containers have the user's "
            "rights only", "if the sandbox check fails, use an engine that runs as root",
        )  # fmt: skip
    if info.time is None:
        yield Finding("clock", State.NOTE, "the engine does not tell its time")
        return
    drift = (datetime.now(timezone.utc) - info.time).total_seconds()
    if abs(drift) > _CLOCK_SECONDS:
        where = "behind" if drift > 0 else "ahead of"
        yield Finding(
            "clock", State.FAILED,
            f"the engine's clock is {abs(drift):.0f} s {where} this machine's",
            "set both by NTP: certificates are told by the time",
        )  # fmt: skip
    else:
        yield Finding("clock", State.OK, f"{abs(drift):.0f} s between this machine and the engine")


def _disk(patient: Patient) -> Iterator[Finding]:
    info = patient.engine.info()
    free = None
    with suppress(OSError):  # it may be in a machine of its own, or closed to this user
        free = shutil.disk_usage(info.root).free if info.is_local and info.root else None
    if free is None:
        yield Finding("disk", State.NOTE, "the engine's disk cannot be seen from here")
        return
    image = patient.project.ledger.newest() or patient.engine.image(
        str(patient.settings.base_image)
    )
    # A commit needs room for another image beside the one that it replaces.
    wanted = max(_LEAST_DISK, 2 * image.size if image else 0)
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
    elif remote_digest(patient.engine, patient.settings, reference):
        yield Finding("base image", State.OK, f"{reference} is in its registry")
    elif patient.project.ledger.find("base"):
        # A builder keeps what it began from to itself.
        yield Finding(
            "base image", State.NOTE, f"{reference} is not to be had now; what was made of it is"
        )
    elif patient.engine.info().product == podman_api.NAME:
        said = f"{reference} is not here, and Podman cannot be asked whether its registry has it"
        yield Finding("base image", State.NOTE, said, f"`podman pull {reference}` tells")
    else:
        yield Finding(
            "base image", State.FAILED, f"{reference} is neither here nor to be had",
            "set BASE_IMAGE to one that the engine can pull, or `inv rootfs`",
        )  # fmt: skip


def _mounts(patient: Patient) -> Iterator[Finding]:
    """Whether the engine can see them at all; that they are here is for the settings to tell."""
    if binds(patient.engine, patient.settings):
        yield Finding("mounts", State.OK, "the engine is on this machine and sees MOUNTS")


def _sandbox(patient: Patient) -> Iterator[Finding]:
    """Build a tiny derivation in a work container, as a stage would."""
    kind = patient.settings.guix_sandbox.value
    if patient.engine.is_dry:
        yield Finding("sandbox", State.NOTE, f"{kind}: not tried in a dry run")
        return
    for project in patient.project.each_platform():
        try:
            refuse_emulated(project.engine, project.settings)
        except UsageError as error:
            # Another platform's turn; BuildKit may have a machine for this one.
            yield replace(failed("sandbox", error), state=State.NOTE)
            continue
        yield _tried(project)
        return


def _tried(project: Project) -> Finding:
    kind, made = project.settings.guix_sandbox.value, project.ledger.find("base")
    image = made or project.engine.image(str(project.settings.base_image))
    wanted = project.settings.platform
    if image is None or not (made or image.platform.startswith(str(wanted or ""))):
        return Finding("sandbox", State.NOTE, f"{kind}: not tried, for want of an image with Guix")
    try:
        settings = project.settled(image).settings
        kind = settings.guix_sandbox.value
        why = probe(project.engine, settings, image)
    except EngineError as error:
        found = failed("sandbox", error)
        refused = not found.mend and re.search("privileged|permitted|denied", found.said)
        return replace(found, mend=_PRIVILEGES) if refused else found
    if why is None:
        return Finding("sandbox", State.OK, f"{kind}: Guix builds in a work container")
    if not made and "no guix-daemon" in why:
        # The Dockerfile may be what puts it there.
        return Finding(
            "sandbox", State.NOTE,
            f"{kind}: not tried, as there is no Guix in {project.settings.base_image}",
            "`inv base` makes an image with Guix, if the Dockerfile installs it",
        )  # fmt: skip
    mend = next((mend for words, mend in OTHER_FAULTS.items() if words in why), _PRIVILEGES)
    said = f"{kind}: Guix cannot build in a work container: {why}"
    return Finding("sandbox", State.FAILED, said, mend)


_PRIVILEGES = "use an engine that lets containers have privileges, or try GUIX_SANDBOX=nochroot"

# --- What it speaks with --------------------------------------------------------------------


def _registry(patient: Patient) -> Iterator[Finding]:
    """Ask for the image, without a push; that it is not there yet is no fault."""
    reference = patient.settings.image
    account = credentials_for(patient.engine, patient.settings, str(reference))
    if not patient.engine.greet_registry(str(reference), account):
        said = f"{reference.registry} was not asked, which Podman does for an account alone"
        yield Finding("registry", State.NOTE, said, "set DOCKER_USERNAME and DOCKER_PASSWORD")
        return
    who = (
        "to DOCKER_USERNAME"
        if patient.settings.docker_username
        else "with what Docker's own configuration says"
    )
    if reference.registry in patient.engine.local_accounts():
        who = "to the account that `inv registry.up` made"
    yield Finding("registry", State.OK, f"{reference.registry} answers {who}")


def _proxies(patient: Patient) -> Iterator[Finding]:
    if why := proxy_out_of_reach(patient.engine, patient.settings):
        yield failed("proxy", UsageError(why))
    elif patient.settings.proxies:
        names = ", ".join(name for name in patient.settings.proxies if name.islower())
        yield Finding("proxy", State.OK, f"{names}: stages, builds and these checks use it")


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
        if idle := [node for node in builder.nodes if node.status != "running"]:
            # To ask it would start it.
            why = next((f": {node.error}" for node in idle if node.error), "")
            yield Finding(
                "builder", State.NOTE,
                f"{', '.join(node.name for node in idle)} does not run{why}",
                _START.get(patient.settings.buildx_driver, "`inv buildx.setup` starts it"),
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


_START = {Driver.REMOTE: "start its buildkitd, or mend BUILDX_NODES"}


def _channels(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    lock, wanted = lock_text(settings), wanted_text(settings)
    if lock and (problem := misfit(wanted, lock)):
        yield failed("channels", UsageError(lock_misfits(settings, problem)))
        return
    text = lock or wanted
    if text is None:
        yield Finding("channels", State.NOTE, "those of the base image; none are set")
        return
    channels = guix.channels(text).values()
    if not channels:
        yield Finding("channels", State.NOTE, "GUIX_CHANNELS computes them; none was asked")
    for channel in channels:
        # Nobody is to read a token here.
        url = mirrored(settings, channel.url)
        name, shown = f"channel {channel.name}", re.sub(r"//[^/@]*@", "//", url)
        if url.startswith(("https://", "http://")) and settings.network != "none":
            # What Git asks first (gitprotocol-http(5)); Guix' libgit2 speaks no older protocol.
            address = f"{url.rstrip('/')}/info/refs?service=git-upload-pack"
            answer = _Answer(re.compile(rb"service=git-upload-pack"), "a Git repository")
            mend = "mend GUIX_CHANNELS or the network; a private one: GUIX_CHANNEL_CREDENTIALS"
            question = _Question(name, shown, _with_account(settings, address), mend)
            yield _answers(settings, question, answer)
        elif url.startswith(("file://", "/")):
            yield _mounted(settings, name, url.removeprefix("file://"))
        elif by_ssh(settings, f'"{url}"'):
            yield _by_ssh(patient, name, url)
        else:
            yield Finding(name, State.NOTE, f"{shown} was not asked")


def _by_ssh(patient: Patient, name: str, url: str) -> Finding:
    try:
        with lent_access(patient.engine, patient.settings, f'"{url}"'):
            return Finding(name, State.OK, "there are an SSH agent and known hosts for it")
    except UsageError as error:
        return failed(name, error)


def _with_account(settings: Settings, address: str) -> str:
    """An address with the account that opens it at pull."""
    given = settings.guix_channel_credentials
    for start, user, password in channel_credentials(given.reveal() if given else ""):
        if address.startswith(start):
            account = f"{quote(user, safe='')}:{quote(password, safe='')}@"
            return address.replace("://", f"://{account}", 1)
    return address


def _mounted(settings: Settings, name: str, path: str, inside: str = "") -> Finding:
    """A place in a work container, which is there if a mount brings it, with a file in it."""
    # Of two mounts, the one that is below the other is seen.
    for mount in sorted(settings.mounts, key=lambda each: len(each.target), reverse=True):
        below = path.removeprefix(mount.target)
        if path.startswith(mount.target) and below[:1] in ("", "/"):
            source = mount.source / below.lstrip("/")
            wanted = source / inside if inside else source
            if wanted.exists():
                return Finding(name, State.OK, f"{path} is {source}")
            said = f"{path} would be {source}, and {wanted} is not there"
            return Finding(name, State.FAILED, said, "mend MOUNTS")
    return Finding(name, State.NOTE, f"{path} is to be in the base image; MOUNTS does not have it")


def _substitutes(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    name, file = "substitutes", "nix-cache-info"
    for given in settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS:
        url = given.rstrip("/")
        if url.startswith("file://"):
            yield _mounted(settings, name, url.removeprefix("file://"), file)
        elif settings.network == "none":
            yield Finding(name, State.NOTE, f"{url} is out of reach: NETWORK=none")
        else:
            mend = "without it everything is built from source: mend GUIX_SUBSTITUTE_URLS"
            answer = _Answer(re.compile(rb"^StoreDir:", re.MULTILINE), "a substitute server")
            yield _answers(settings, _Question(name, url, f"{url}/{file}", mend), answer)
        if url not in guix.DEFAULT_SUBSTITUTE_URLS and not settings.guix_substitute_keys:
            yield Finding(
                name, State.NOTE, f"no key for {url} is set",
                "what it serves is refused unless the base image trusts it: GUIX_SUBSTITUTE_KEYS",
            )  # fmt: skip


@dataclass(frozen=True)
class _Answer:
    """How an answer begins, and from whom such a one comes: a portal answers anything."""

    begins: re.Pattern[bytes]
    kind: str


@dataclass(frozen=True)
class _Question:
    """Who is asked, for which check."""

    name: str
    shown: str
    address: str
    """May hold an account, and so is not shown."""
    mend: str


def _answers(settings: Settings, question: _Question, answer: _Answer) -> Finding:
    name, shown, mend = question.name, question.shown, question.mend
    try:
        trust = None
        if settings.extra_ca_file:
            trust = ssl.create_default_context()
            trust.load_verify_locations(
                cadata=read_text(settings.extra_ca_file, "ascii", "replace")
            )
        # Only http and https come here.
        with urllib.request.urlopen(  # noqa: S310
            _request(question.address), timeout=_WAIT, context=trust
        ) as body:
            if answer.begins.search(body.read(1000)):
                return Finding(name, State.OK, f"{shown} answers")
            return Finding(name, State.FAILED, f"{shown} answers, but not as {answer.kind}", mend)
    except urllib.error.HTTPError as error:
        reason = " ".join(f"{error.code} {error.reason}".split())
        return Finding(name, State.FAILED, f"{shown} answers {reason}", mend)
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            mend = guix.fetch_mend("guix error: certificate verification") or mend
        cause = " ".join(str(cause).split()) or type(cause).__name__
        return Finding(name, State.FAILED, f"{shown} does not answer: {cause}", mend)


def _request(address: str) -> urllib.request.Request:
    """A request as Git would make it: of Python's own, many a server's guard wants nothing."""
    parts = urlsplit(address)
    account, at, place = parts.netloc.rpartition("@")
    url = parts._replace(netloc=place).geturl()
    request = urllib.request.Request(url, headers={"User-Agent": "git/2 guix-tasks"})  # noqa: S310
    if at:
        pair = base64.b64encode(unquote(account).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {pair}")
    return request


CHECKS: dict[str, Callable[[Patient], Iterator[Finding]]] = {
    "engine": _engine,
    "disk": _disk,
    "base image": _base_image,
    "mounts": _mounts,
    "sandbox": _sandbox,
    "proxy": _proxies,
    "registry": _registry,
    "buildx": _buildx,
    "channels": _channels,
    "substitutes": _substitutes,
}
"""Each in the order in which its findings are shown."""
