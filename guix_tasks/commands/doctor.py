"""Checks of this machine, each with a finding and a hint."""

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
from dataclasses import dataclass, replace
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
from guix_tasks.stages.channel_access import by_ssh, grant_access, mirrored
from guix_tasks.stages.container import binds, check_native_platform, proxy_error_line
from guix_tasks.stages.pull import channels_text, lock_mismatch, lock_mismatch_line, lock_text
from guix_tasks.stages.sandbox import OTHER_FAULTS, probe
from guix_tasks.ui.format import human_size, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Console

_MIN_FREE_BYTES = 4_000_000_000
"""Approximate size in bytes of a pull and an install of Guix's own packages."""

_MAX_CLOCK_SECONDS = 60
"""Maximum clock difference. Certificates and signatures are only valid for a period of time."""

_TIMEOUT = 10.0
"""Seconds to wait for a server."""


class State(Enum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing, but needs no fix."""
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """Result of a check."""

    check: str
    state: State
    message: str
    hint: str = ""


@dataclass(frozen=True)
class ExaminedProject:
    """Project to examine, with a function that finds its buildx."""

    project: Project
    buildx: Callable[[], Buildx | None]

    @property
    def settings(self) -> Settings:
        return self.project.settings

    @property
    def engine(self) -> Engine:
        return self.project.engine


def examine(patient: ExaminedProject) -> list[Finding]:
    """Run all checks and return their findings.

    No check changes anything. The checks run in parallel, because most of their time is spent
    waiting for servers.
    """
    with ThreadPoolExecutor(max_workers=len(CHECKS)) as pool:
        futures = [pool.submit(_findings, name, check, patient) for name, check in CHECKS.items()]
        return [finding for future in futures for finding in future.result()]


def _findings(
    name: str, check: Callable[[ExaminedProject], Iterator[Finding]], patient: ExaminedProject
) -> list[Finding]:
    findings: list[Finding] = []
    try:
        findings.extend(check(patient))
    except GuixTasksError as error:
        findings.append(failed(name, error))
    except OSError as error:
        # For example an unreadable file, which does not concern the other checks.
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
        hint = "correct this and run `inv doctor` again"
        findings.append(Finding(name, State.FAILED, message, hint))
    return findings


def failed(check: str, error: GuixTasksError) -> Finding:
    """Convert an error to a finding; its text is split into message and hint."""
    message, _, hint = str(error).partition("; ")
    return Finding(check, State.FAILED, message, hint)


def show(console: Console, findings: list[Finding], *, as_json: bool) -> None:
    """Print one line per finding, or all findings as JSON."""
    if as_json:
        rows = [
            {"check": f.check, "state": f.state.value, "said": f.message, "mend": f.hint}
            for f in findings
        ]
        console.result(json.dumps(rows, indent=2))
        return
    for finding in findings:
        hint = f"; {finding.hint}" if finding.hint else ""
        line = printable(f"{finding.check}: {finding.message}{hint}")
        console.result(f"{finding.state.value:6} {line}")


# --- The engine and its machine -------------------------------------------------------------


def _engine(patient: ExaminedProject) -> Iterator[Finding]:
    info = patient.engine.info()
    engine = f"{info.name} at {info.url} ({info.origin})"
    yield Finding("engine", State.OK, f"{engine}, {info.kind}, {info.platform}, {info.store}")
    limits = ", ".join([f"cgroups v{info.cgroups or '?'}", *info.security])
    yield Finding("host", State.OK, limits)
    if info.is_rootless:
        yield Finding(
            "host", State.NOTE, "the engine is rootless: its privileged containers have only the "
            "user's rights", "if the sandbox check fails, use an engine that runs as root",
        )  # fmt: skip
    if info.time is None:
        yield Finding("clock", State.NOTE, "the engine does not report its time")
        return
    drift = (datetime.now(timezone.utc) - info.time).total_seconds()
    if abs(drift) > _MAX_CLOCK_SECONDS:
        direction = "behind" if drift > 0 else "ahead of"
        yield Finding(
            "clock", State.FAILED,
            f"the engine's clock is {abs(drift):.0f} s {direction} this machine's",
            "set both clocks by NTP: certificates are valid for a period of time",
        )  # fmt: skip
    else:
        yield Finding("clock", State.OK, f"{abs(drift):.0f} s between this machine and the engine")


def _disk(patient: ExaminedProject) -> Iterator[Finding]:
    info = patient.engine.info()
    free = None
    with suppress(OSError):  # The directory may be in a virtual machine or closed to this user.
        free = shutil.disk_usage(info.root).free if info.is_local and info.root else None
    if free is None:
        yield Finding("disk", State.NOTE, "the engine's disk is not visible from this machine")
        return
    image = patient.project.ledger.newest() or patient.engine.image(
        str(patient.settings.base_image)
    )
    # During a commit the new and the old image are both on the disk.
    needed = max(_MIN_FREE_BYTES, 2 * image.size if image else 0)
    message = f"{human_size(free)} free at {info.root}; about {human_size(needed)} is needed"
    if free < needed:
        hint = "free some space: `inv clean`, `docker system prune`"
        yield Finding("disk", State.FAILED, message, hint)
    else:
        yield Finding("disk", State.OK, message)


def _base_image(patient: ExaminedProject) -> Iterator[Finding]:
    reference = str(patient.settings.base_image)
    image = patient.engine.image(reference)
    if image:
        yield Finding(
            "base image", State.OK, f"{reference} is on the engine, {human_size(image.size)}"
        )
    elif remote_digest(patient.engine, patient.settings, reference):
        yield Finding("base image", State.OK, f"{reference} is in its registry")
    elif patient.project.ledger.find("base"):
        # BuildKit does not store the image of a FROM line on the engine.
        yield Finding(
            "base image", State.NOTE,
            f"{reference} is unavailable; the existing base stage can still be used",
        )  # fmt: skip
    elif patient.engine.info().product == podman_api.NAME:
        yield Finding(
            "base image", State.NOTE,
            f"{reference} is not on the engine, and Podman cannot query its registry",
            f"`podman pull {reference}` shows whether it can be pulled",
        )  # fmt: skip
    else:
        yield Finding(
            "base image", State.FAILED, f"{reference} is neither on the engine nor in its registry",
            "set BASE_IMAGE to an image that the engine can pull, or run `inv rootfs`",
        )  # fmt: skip


def _mounts(patient: ExaminedProject) -> Iterator[Finding]:
    """Check that the engine sees MOUNTS; their existence is checked with the settings."""
    if binds(patient.engine, patient.settings):
        yield Finding("mounts", State.OK, "the engine is on this machine and sees MOUNTS")


def _sandbox(patient: ExaminedProject) -> Iterator[Finding]:
    """Build a tiny derivation in a work container with the sandbox of the stages."""
    kind = patient.settings.guix_sandbox.value
    if patient.engine.is_dry:
        yield Finding("sandbox", State.NOTE, f"{kind}: not tested in a dry run")
        return
    for project in patient.project.each_platform():
        try:
            check_native_platform(project.engine, project.settings)
        except UsageError as error:
            # BuildKit may have a node for this platform.
            yield replace(failed("sandbox", error), state=State.NOTE)
            continue
        yield _probe_sandbox(project)
        return


def _probe_sandbox(project: Project) -> Finding:
    kind, base_stage = project.settings.guix_sandbox.value, project.ledger.find("base")
    image = base_stage or project.engine.image(str(project.settings.base_image))
    platform = str(project.settings.platform or "")
    if image is None or not (base_stage or image.platform.startswith(platform)):
        message = f"{kind}: not tested, because the engine has no image with Guix"
        return Finding("sandbox", State.NOTE, message)
    try:
        settings = project.with_sandbox(image).settings
        kind = settings.guix_sandbox.value
        problem = probe(project.engine, settings, image)
    except EngineError as error:
        finding = failed("sandbox", error)
        refused = not finding.hint and re.search("privileged|permitted|denied", finding.message)
        return replace(finding, hint=_PRIVILEGES_HINT) if refused else finding
    if problem is None:
        return Finding("sandbox", State.OK, f"{kind}: Guix builds in a work container")
    if not base_stage and "no guix-daemon" in problem:
        # The Dockerfile may install Guix.
        return Finding(
            "sandbox", State.NOTE,
            f"{kind}: not tested, because {project.settings.base_image} does not contain Guix",
            "`inv base` builds an image with Guix if the Dockerfile installs it",
        )  # fmt: skip
    hint = next(
        (hint for words, hint in OTHER_FAULTS.items() if words in problem), _PRIVILEGES_HINT
    )
    message = f"{kind}: Guix cannot build in a work container: {problem}"
    return Finding("sandbox", State.FAILED, message, hint)


_PRIVILEGES_HINT = "use an engine that allows privileged containers, or try GUIX_SANDBOX=nochroot"

# --- Registry, proxy and BuildKit -----------------------------------------------------------


def _registry(patient: ExaminedProject) -> Iterator[Finding]:
    """Query the registry for the image. A missing image is not an error."""
    reference = patient.settings.image
    account = credentials_for(patient.engine, patient.settings, str(reference))
    if not patient.engine.check_registry(str(reference), account):
        yield Finding(
            "registry", State.NOTE,
            f"{reference.registry} was not tested: Podman only tests registries with an account",
            "set DOCKER_USERNAME and DOCKER_PASSWORD",
        )  # fmt: skip
        return
    if reference.registry in patient.engine.local_accounts():
        account_source = "the account that `inv registry.up` created"
    elif patient.settings.docker_username:
        account_source = "DOCKER_USERNAME"
    else:
        account_source = "the account of Docker's configuration, if any"
    yield Finding("registry", State.OK, f"{reference.registry} answers to {account_source}")


def _proxies(patient: ExaminedProject) -> Iterator[Finding]:
    if problem := proxy_error_line(patient.engine, patient.settings):
        yield failed("proxy", UsageError(problem))
    elif patient.settings.proxies:
        names = ", ".join(name for name in patient.settings.proxies if name.islower())
        yield Finding("proxy", State.OK, f"{names}: used by stages, builds and these checks")


def _buildx(patient: ExaminedProject) -> Iterator[Finding]:
    buildx = patient.buildx()
    if buildx is None:
        hint = "`inv buildx.setup` installs it for your user"
        yield Finding("buildx", State.NOTE, "not installed on this machine", hint)
        return
    version = buildx.ask("version").split()
    yield Finding("buildx", State.OK, f"{version[1] if version[1:] else '?'} at {buildx.program}")
    try:
        builder = find_builder(patient.settings, buildx)
        if idle := [node for node in builder.nodes if node.status != "running"]:
            # A further check would start the builder.
            reason = next((f": {node.error}" for node in idle if node.error), "")
            hint = "`inv buildx.setup` starts it"
            if patient.settings.buildx_driver is Driver.REMOTE:
                hint = "start its buildkitd, or correct BUILDX_NODES"
            message = f"{', '.join(node.name for node in idle)} is not running{reason}"
            yield Finding("builder", State.NOTE, message, hint)
            return
        syntax = needed_syntax(patient.settings, buildx, builder.name)
    except GuixTasksError as error:
        # Stages that run in work containers need no builder.
        yield replace(failed("builder", error), state=State.NOTE)
    else:
        frontend = f"the frontend {syntax}" if syntax else "its built-in frontend"
        yield Finding("builder", State.OK, f"{builder.name} runs insecure steps with {frontend}")


# --- Channels and substitutes ---------------------------------------------------------------


def _channels(patient: ExaminedProject) -> Iterator[Finding]:
    settings = patient.settings
    lock, configured = lock_text(settings), channels_text(settings)
    if lock and (problem := lock_mismatch(configured, lock)):
        yield failed("channels", UsageError(lock_mismatch_line(settings, problem)))
        return
    text = lock or configured
    if text is None:
        yield Finding(
            "channels", State.NOTE, "no channels are set; those of the base image are used"
        )
        return
    channels = guix.channels(text).values()
    if not channels:
        yield Finding(
            "channels", State.NOTE, "GUIX_CHANNELS computes the channels; none was tested"
        )
    for channel in channels:
        url = mirrored(settings, channel.url)
        # The URL may contain a token.
        name, shown_url = f"channel {channel.name}", re.sub(r"//[^/@]*@", "//", url)
        if url.startswith(("https://", "http://")) and settings.network != "none":
            # The first request of Git's smart protocol, see gitprotocol-http(5). Guix's libgit2
            # supports no older protocol.
            address = f"{url.rstrip('/')}/info/refs?service=git-upload-pack"
            service = _Service(
                name, shown_url, _with_account(settings, address),
                "a Git repository", re.compile(rb"service=git-upload-pack"),
                "correct GUIX_CHANNELS or the network; for a private channel set "
                "GUIX_CHANNEL_CREDENTIALS",
            )  # fmt: skip
            yield _contact(settings, service)
        elif url.startswith(("file://", "/")):
            yield _check_mounted(settings, name, url.removeprefix("file://"))
        elif by_ssh(settings, f'"{url}"'):
            try:
                with grant_access(patient.engine, settings, f'"{url}"'):
                    yield Finding(name, State.OK, "an SSH agent and known hosts are available")
            except UsageError as error:
                yield failed(name, error)
        else:
            yield Finding(name, State.NOTE, f"{shown_url} was not tested")


def _with_account(settings: Settings, address: str) -> str:
    """Add the account of ``GUIX_CHANNEL_CREDENTIALS`` that `inv pull` uses for an address."""
    credentials = settings.guix_channel_credentials
    for prefix, user, password in channel_credentials(credentials.reveal() if credentials else ""):
        if address.startswith(prefix):
            account = f"{quote(user, safe='')}:{quote(password, safe='')}@"
            return address.replace("://", f"://{account}", 1)
    return address


def _check_mounted(settings: Settings, check: str, path: str, file: str = "") -> Finding:
    """Check that a mount provides a path of the work container, and in it ``file``."""
    # If mounts are nested, the innermost one is visible.
    for mount in sorted(settings.mounts, key=lambda mount: len(mount.target), reverse=True):
        below = path.removeprefix(mount.target)
        if path.startswith(mount.target) and below[:1] in ("", "/"):
            source = mount.source / below.lstrip("/")
            required = source / file if file else source
            if required.exists():
                return Finding(check, State.OK, f"{path} is {source}")
            message = f"{path} is mounted from {source}, but {required} does not exist"
            return Finding(check, State.FAILED, message, "correct MOUNTS")
    message = f"{path} must be in the base image, because MOUNTS does not contain it"
    return Finding(check, State.NOTE, message)


def _substitutes(patient: ExaminedProject) -> Iterator[Finding]:
    settings = patient.settings
    check, file = "substitutes", "nix-cache-info"
    for configured_url in settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS:
        url = configured_url.rstrip("/")
        if url.startswith("file://"):
            yield _check_mounted(settings, check, url.removeprefix("file://"), file)
        elif settings.network == "none":
            yield Finding(check, State.NOTE, f"{url} is unreachable with NETWORK=none")
        else:
            service = _Service(
                check, url, f"{url}/{file}",
                "a substitute server", re.compile(rb"^StoreDir:", re.MULTILINE),
                "correct GUIX_SUBSTITUTE_URLS: without substitutes Guix builds everything from "
                "source",
            )  # fmt: skip
            yield _contact(settings, service)
        if url not in guix.DEFAULT_SUBSTITUTE_URLS and not settings.guix_substitute_keys:
            yield Finding(
                check, State.NOTE, f"no key is set for {url}",
                "set GUIX_SUBSTITUTE_KEYS, or Guix refuses its substitutes unless the base image "
                "trusts the key",
            )  # fmt: skip


@dataclass(frozen=True)
class _Service:
    """HTTP service that a check contacts."""

    check: str
    shown_url: str
    url: str
    """Request URL. It may contain an account, so it is never printed."""
    kind: str
    response: re.Pattern[bytes]
    """Pattern that only a response of this kind of service matches, not a captive portal's."""
    hint: str


def _contact(settings: Settings, service: _Service) -> Finding:
    check, url, hint = service.check, service.shown_url, service.hint
    try:
        tls = None
        if settings.extra_ca_file:
            tls = ssl.create_default_context()
            tls.load_verify_locations(cadata=read_text(settings.extra_ca_file, "ascii", "replace"))
        # Callers pass only http and https URLs.
        with urllib.request.urlopen(  # noqa: S310
            _git_request(service.url), timeout=_TIMEOUT, context=tls
        ) as body:
            if service.response.search(body.read(1000)):
                return Finding(check, State.OK, f"{url} answers")
            return Finding(check, State.FAILED, f"{url} answers, but not as {service.kind}", hint)
    except urllib.error.HTTPError as error:
        reason = " ".join(f"{error.code} {error.reason}".split())
        return Finding(check, State.FAILED, f"{url} answers {reason}", hint)
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = guix.fetch_hint("guix error: certificate verification") or hint
        cause = " ".join(str(cause).split()) or type(cause).__name__
        return Finding(check, State.FAILED, f"{url} does not answer: {cause}", hint)


def _git_request(url: str) -> urllib.request.Request:
    """Return a request with Git's user agent, because many servers refuse Python's."""
    parts = urlsplit(url)
    account, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(  # noqa: S310
        parts._replace(netloc=host).geturl(), headers={"User-Agent": "git/2 guix-tasks"}
    )
    if at:
        token = base64.b64encode(unquote(account).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


CHECKS: dict[str, Callable[[ExaminedProject], Iterator[Finding]]] = {
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
"""Checks by name, in the order of the output."""
