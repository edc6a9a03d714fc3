"""Work containers: where a command of Guix runs, and what a stage commits.

They run guix-tasks' own entry point, whatever the image has: a user's image may come with one
that neither waits for the daemon's socket nor stops the daemon cleanly.  It and the other files
a command needs are copied in below ``FOLDER``, since a bind mount does not reach a remote
engine; the entry point removes the folder at its end, so a commit holds none of it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import shlex
import signal
import socket
import tarfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from guix_tasks import guix
from guix_tasks.engine import podman_api
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.errors import REFUSED, EngineError, StageError, UsageError
from guix_tasks.files import file_digest, read_file, text_digest, tree_digest
from guix_tasks.guix.progress import VERBOSITY
from guix_tasks.guix.result_paths import SUBSTITUTE_CACHE
from guix_tasks.oci.platform import Platform
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.ownership import USER, lend

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from guix_tasks.engine.api import Container, Engine
    from guix_tasks.settings import Settings

FOLDER = "/var/guix/guix-tasks"
"""In a folder that belongs to whom the daemon is, who has to remove it."""
ENTRY_POINT = f"{FOLDER}/entry-point.sh"
ENVIRONMENT = f"{FOLDER}/environment"
INPUTS = "project"
"""Below ``FOLDER``: files of a project, which everybody may read; no other is there."""
NEARBY_KEY = "nearby.pub"
"""Below ``FOLDER``: what only the daemon of this container trusts."""
EXTRA_CA = "extra-ca.pem"
PROJECT_LABEL = "org.guix-tasks.project"

_NAME = "guix-tasks"
_KEPT_NAME = "guix-tasks-kept"
_SERVER_NAME = "guix-tasks-substitutes"

IMAGE_FOLDER = Path(__file__).parent / "resources"
"""What goes into an image and into work containers, the entry point above all."""

CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "NET_ADMIN", "SETGID", "SETUID", "SYS_ADMIN",
    "SYS_CHROOT",
)  # fmt: skip
"""Without any one of these the daemon does not build, or (KILL) does not end what it started."""

_FILTER = f"seccomp={Path(__file__).with_name('seccomp.json')}"

_RIGHTS: Mapping[Sandbox, Mapping[str, Any]] = {
    Sandbox.ROOTLESS: {
        "user": USER,
        "capabilities": (),
        "security": ("no-new-privileges", _FILTER),
        # A build has a /proc of its own.
        "unmasked": True,
    },
    Sandbox.CAPABILITIES: {"capabilities": CAPABILITIES, "security": (_FILTER,)},
    Sandbox.PRIVILEGED: {"privileged": True},
    # Without a chroot the daemon needs no privilege, but it sets the personality of builds,
    # which Docker's own filter refuses.
    Sandbox.NOCHROOT: {"security": ("seccomp=unconfined",)},
    # Comes to one of the others before anything is run; see ``sandbox.settled``.
    Sandbox.AUTO: {},
}

_UNCONFINED = {"apparmor": "apparmor=unconfined", "selinux": "label=disable"}
"""What of an engine's security, by its name, keeps a build from its mounts, and how to have it
not.  ``privileged`` goes without it, too."""

CACHES = {"home": "/root/.cache", "substitutes": SUBSTITUTE_CACHE}
"""The caches of a work container that are no part of an image, and where they are found."""

ROOTLESS_CACHES = {"rootless": "/tmp/guix-tasks-cache"}  # noqa: S108 -- the container's own
"""The same where nothing is root's: there Guix has but one."""


@dataclass(frozen=True)
class Nearby:
    """A substitute server beside the work containers, which no image is to know of."""

    url: str
    """As work containers reach it."""
    key: bytes
    """The public one."""
    image: str
    """The ID of the image whose store it serves."""


@dataclass(frozen=True)
class Work:
    """One command for a work container, with the files that it finds below ``FOLDER``."""

    name: str
    argv: tuple[str, ...]
    files: Mapping[str, bytes]
    keep: bool = False
    keep_failed: bool = False
    """Left where its command fails, for whoever wants to look into it."""
    tty: bool = False
    bare: bool = False
    """Without mounts, volumes and network: nothing comes between the command and the image."""
    plain: bool = False
    """With no rights for Guix, which is not run in it."""
    entry_point: tuple[str, ...] = (ENTRY_POINT,)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the container itself, and so of an image that is committed from it."""
    nearby: Nearby | None = None
    """Asked for substitutes before all others."""
    binds: tuple[str, ...] = ()
    """Mounts of its own, where nothing of them stays in an image."""


@contextmanager
def work_container(engine: Engine, settings: Settings, image: str, work: Work) -> Iterator[str]:
    """A container of ``image``, ready to run, that is removed at the end.

    One that is to be kept is left only when the block ends without an error.  Containers that
    an earlier call could not remove, because it was killed, are removed first.
    """
    sweep(engine, settings)
    for volume in () if work.bare else cache_volumes(settings):
        engine.make_volume(volume, {PROJECT_LABEL: project(settings)})
    spec = _spec(engine, settings, image, work)
    container = spec.name
    try:
        with _uninterrupted():
            container = engine.create(spec)
        fill(engine, settings, container, work)
        yield container
        if not work.keep:
            with _uninterrupted():
                engine.remove(container)
    except BaseException as error:
        if work.keep_failed and isinstance(error, StageError):
            raise
        # Where the engine itself is gone, the error that says so is the one to tell; the next
        # run removes the container.
        with _uninterrupted(), suppress(EngineError):
            engine.remove(container)
        raise


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block has ended.

    The engine goes on with a call whose client has gone, and nobody would know of its result.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def time_limit(
    engine: Engine, container: str, seconds: float | None, *, grace: int
) -> Iterator[threading.Event]:
    """Stop a container when its time is up; the event says that it was.  None: no limit."""
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        # Where the engine is gone, whoever waits for the container hears of it.
        with suppress(EngineError):
            engine.stop(container, seconds=grace)

    timer = threading.Timer(seconds, stop) if seconds is not None else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield timed_out
    finally:
        if timer:
            timer.cancel()


@contextmanager
def unstarted_container(engine: Engine, settings: Settings, image: str) -> Iterator[str]:
    """A container that is never run: a way to give an image another configuration."""
    work = Work("label", ("true",), {}, bare=True, plain=True)
    spec = _spec(engine, settings, image, work)
    container = spec.name
    try:
        with _uninterrupted():
            container = engine.create(spec)
        yield container
    finally:
        with _uninterrupted(), suppress(EngineError):
            engine.remove(container)


def fill(engine: Engine, settings: Settings, container: str, work: Work) -> None:
    """Copy in what the entry point and the command need for one start."""
    owner = 0
    if settings.guix_sandbox is Sandbox.ROOTLESS and not (work.plain or engine.is_dry):
        owner = lend(engine, container, ROOTLESS_CACHES.values())
    files = {**common_files(settings, work.nearby), **work.files}
    engine.copy_in(container, archive(files, owner))


def drop_environment(engine: Engine, container: str) -> None:
    """Empty the environment of a container that was never run: it may hold a password."""
    if b"".join(engine.copy_out(container, ENVIRONMENT)):
        engine.copy_in(container, archive({"environment": b""}))


def kept_containers(engine: Engine, settings: Settings) -> list[Container]:
    """The work containers that were left for ``commit``, newest first."""
    return [each for each in work_containers(engine, settings) if is_kept(each)]


def work_containers(engine: Engine, settings: Settings) -> list[Container]:
    """The work containers of this project, newest first."""
    found = engine.containers({PROJECT_LABEL: project(settings)})
    return [each for each in found if each.name != server_name(settings)]


def server_name(settings: Settings) -> str:
    """What the container is called that ``substitutes.up`` starts."""
    return f"{_SERVER_NAME}-{project_digest(settings)}"


def find_server(engine: Engine, settings: Settings) -> Container | None:
    """The container that ``substitutes.up`` has started, running or not."""
    found = engine.containers({PROJECT_LABEL: project(settings)})
    return next((each for each in found if each.name == server_name(settings)), None)


def is_kept(container: Container) -> bool:
    return container.name.startswith(_KEPT_NAME)


def uncommitted(engine: Engine, settings: Settings) -> str:
    """What is to be said of a container that was left for ``commit``; empty where none was."""
    kept = kept_containers(engine, settings)
    if not kept:
        return ""
    return (
        f"the work container {kept[0].name} is not committed yet; "
        "`inv commit` keeps what it holds, `inv clean --work` drops it"
    )


def refuse_second(engine: Engine, settings: Settings) -> None:
    """Refuse to leave a second container, since ``commit`` could take but one of them."""
    if left := uncommitted(engine, settings):
        raise UsageError(left)


def sweep(engine: Engine, settings: Settings) -> None:
    """Remove the containers whose ``inv`` died before it could."""
    for container in work_containers(engine, settings):
        if not is_kept(container) and _owner_is_gone(container.name):
            engine.remove(container.id)


def project(settings: Settings) -> str:
    """What tells one project's containers from another's: the image that they make."""
    return str(settings.image)


def project_digest(settings: Settings) -> str:
    """The project's name as a word that any other name can hold."""
    return _short(project(settings))


def archive(
    files: Mapping[str, bytes], owner: int = 0, *, folder: str = FOLDER, mode: int = 0o600
) -> bytes:
    """A tar archive of ``files`` below a folder; scripts are executable, nothing else is.

    But for those of the project, only the owner, by its ID, may read them, if not said otherwise:
    an environment can hold a token.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folders = {parent for name in files for parent in (folder, *_parents(folder, name))}
        for each in sorted(folders):
            member = tarfile.TarInfo(each.lstrip("/"))
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            member.uid = member.gid = owner
            tar.addfile(member)
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{folder}/{name}".lstrip("/"))
            member.size = len(content)
            own = 0o644 if name.startswith(f"{INPUTS}/") else mode
            member.mode = 0o755 if content.startswith(b"#!") else own
            member.uid = member.gid = owner
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _parents(folder: str, name: str) -> list[str]:
    return [f"{folder}/{parent}" for parent in Path(name).parents if parent.name]


def common_files(settings: Settings, nearby: Nearby | None = None) -> dict[str, bytes]:
    """What every entry point finds beside it below ``FOLDER``."""
    variables = environment(settings)
    if nearby:
        urls = settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS
        variables["GUIX_SUBSTITUTE_URLS"] = " ".join((nearby.url, *urls))
    files = {
        "entry-point.sh": (IMAGE_FOLDER / "entry-point.sh").read_bytes(),
        "environment": "".join(
            f"{name}={shlex.quote(value)}\n" for name, value in variables.items()
        ).encode(errors="surrogateescape"),  # the bytes of the process's environment
    }
    if nearby:
        files[NEARBY_KEY] = nearby.key
    for number, key in enumerate(settings.guix_substitute_keys):
        files[f"keys/{number}-{key.name}"] = read_file(key)
    if settings.extra_ca_file:
        files[EXTRA_CA] = read_file(settings.extra_ca_file)
    return files


def environment(settings: Settings) -> dict[str, str]:
    """What the entry point and the command find in their environment.

    It is copied in as a file and sourced, not given to the container: the environment of a
    container ends up in the image that is committed from it.
    """
    guix = guix_environment(settings)
    if settings.output.logs_builds:
        options = f"{guix.get('GUIX_BUILD_OPTIONS', '')} --verbosity={VERBOSITY}"
        guix["GUIX_BUILD_OPTIONS"] = options.strip()
    return {**guix, **settings.proxies}


def guix_environment(settings: Settings) -> dict[str, str]:
    """The daemon's part of it, which holds no secret, as a proxy's address may."""
    wanted = {
        "GUIX_SUBSTITUTE_URLS": " ".join(settings.guix_substitute_urls),
        "GUIX_CORES": settings.guix_cores,
        "GUIX_MAX_JOBS": settings.guix_max_jobs,
        "GUIX_SANDBOX": settings.guix_sandbox.value,
        # Not on the command line, which is in the key: what is built is the same.
        "GUIX_BUILD_OPTIONS": "--fallback" if settings.guix_fallback else "",
    }
    if settings.guix_sandbox is Sandbox.ROOTLESS:
        # Whoever the container's user is, the profiles are root's.
        wanted |= {"HOME": "/root", "USER": "root", "LOGNAME": "root"}
        wanted["XDG_CACHE_HOME"] = ROOTLESS_CACHES["rootless"]
    return {name: str(value) for name, value in wanted.items() if value not in (None, "")}


def common_inputs(engine: Engine, settings: Settings) -> dict[str, str]:
    """What every stage that runs in a work container is made from, besides its own.

    Substitute servers are not among it: what they serve is what would be built here, or it is
    refused; the keys that they are trusted by end up in the image.
    """
    return {
        "entry point": file_digest(IMAGE_FOLDER / "entry-point.sh"),
        "substitute keys": text_digest(*sorted(map(file_digest, settings.guix_substitute_keys))),
        "caches": "on volumes" if settings.cache_volume else "in the image",
        **{
            f"mount {mount.target}": tree_digest(mount.source, without=settings.logs)
            for mount in settings.mounts
        },
        **platform_input(engine, settings),
    }


def platform_input(engine: Engine, settings: Settings) -> dict[str, str]:
    return {"platform": str(settings.platform or engine.info().platform)}


def refuse_emulated(engine: Engine, settings: Settings) -> None:
    """Refuse a platform on which Guix could not isolate its builds, before anything is done."""
    platform = settings.platform
    if platform is None or settings.guix_sandbox is Sandbox.NOCHROOT:
        return
    own = engine.info().platform
    native = False
    with suppress(ValueError):  # there are engines of platforms that Guix has no system for
        native = Platform.parse(own).runs(platform)
    if not native:
        raise UsageError(
            f"{platform} is emulated by this engine ({own}), and Guix cannot isolate its builds "
            "there: set GUIX_SANDBOX=nochroot, or use an engine of that kind"
        )


def cache_volumes(settings: Settings) -> dict[str, str]:
    """The named volumes of this project's caches, with the folders that they are seen at.

    One of ``MOUNTS`` at the same place is the cache instead: an engine takes no two.
    """
    prefix = cache_prefix(settings)
    taken = {*memory_folders(settings), *(mount.target for mount in settings.mounts)}
    folders = {name: target for name, target in _caches(settings).items() if target not in taken}
    return {f"{prefix}-{name}": target for name, target in folders.items()} if prefix else {}


def memory_folders(settings: Settings) -> tuple[str, ...]:
    """The caches that are in memory.

    A 32-bit program under QEMU fails on the large inode numbers of a file system on disk.
    """
    small = settings.platform is not None and settings.platform.is_32_bit
    home, *_ = _caches(settings).values()
    mounted = home in (mount.target for mount in settings.mounts)
    return (home,) if small and settings.cache_volume and not mounted else ()


def _caches(settings: Settings) -> Mapping[str, str]:
    return ROOTLESS_CACHES if settings.guix_sandbox is Sandbox.ROOTLESS else CACHES


def cache_prefix(settings: Settings) -> str | None:
    """What the names of this project's caches begin with; None where there are to be none."""
    prefix = settings.cache_volume
    return f"{prefix}-{project_digest(settings)}" if prefix else None


def _spec(engine: Engine, settings: Settings, image: str, work: Work) -> ContainerSpec:
    parent = engine.image(image)
    config = parent.config if parent else {}
    rights = {} if work.plain else dict(_RIGHTS[settings.guix_sandbox])
    if "security" in rights:
        known = engine.info().security
        rights["security"] += tuple(off for name, off in _UNCONFINED.items() if name in known)
    if "user" in rights and engine.info().product == podman_api.NAME:
        # Somebody else's would become root's afterwards.
        raise EngineError(
            f"{REFUSED} lend Guix's folders to a user who is not root: Podman does not tell whose "
            "they are; set GUIX_SANDBOX to auto or capabilities"
        )
    # The daemon of the others is root's; an image may be made for another user.
    rights.setdefault("user", "root" if config.get("User") else None)
    volumes = {} if work.bare else cache_volumes(settings)
    mounts = () if work.bare else binds(engine, settings)
    return ContainerSpec(
        name=container_name(work.name, keep=work.keep or work.keep_failed),
        image=image,
        command=(*work.entry_point, *work.argv),
        labels={PROJECT_LABEL: project(settings)},
        environment=work.environment,
        network="none" if work.bare else network(engine, settings),
        binds=(*mounts, *(":".join(each) for each in volumes.items()), *work.binds),
        memory_folders=() if work.bare else memory_folders(settings),
        # What builds leave there is gigabytes: on disk, and not in the image.
        scratch="/tmp" if volumes else None,  # noqa: S108 -- the container's own
        memory=settings.stage_memory,
        tty=work.tty,
        no_healthcheck=bool(config.get("Healthcheck")),
        platform=str(settings.platform) if settings.platform else None,
        **rights,
    )


def network(engine: Engine, settings: Settings) -> str | None:
    """``NETWORK``; an engine without a bridge gives containers none, so there it is the host's."""
    if settings.network:
        return settings.network
    return None if engine.info().has_bridge else "host"


def proxy_out_of_reach(engine: Engine, settings: Settings) -> str:
    """Why containers do not reach a proxy of the environment, and what mends it; else empty."""
    if network(engine, settings) in ("host", "none"):
        return ""
    for name, url in settings.proxies.items():
        with suppress(ValueError):
            host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
            if name.lower() != "no_proxy" and re.fullmatch(r"localhost|127\.[\d.]+|::1", host):
                return (
                    f"the proxy {name} is at {host}, which in a container is the container itself; "
                    "set NETWORK=host, or let it listen at an address that containers reach"
                )
    return ""


def binds(engine: Engine, settings: Settings) -> tuple[str, ...]:
    """``MOUNTS`` for the engine.  Raises ``UsageError`` where the engine cannot see the files."""
    if settings.mounts and not engine.info().is_local:
        raise UsageError(
            f"MOUNTS: the engine at {engine.info().url} is on another machine and cannot see "
            "files of this one; unset MOUNTS, or use a local engine"
        )
    return tuple(
        f"{mount.source}:{mount.target}{':ro' if mount.read_only else ''}"
        for mount in settings.mounts
    )


def container_name(what: str, *, keep: bool = False) -> str:
    """A name that tells who made the container, and whether it is to be kept.

    A label could say it as well, but labels of a container end up in the image that is committed
    from it.
    """
    pid = os.getpid()
    prefix = _KEPT_NAME if keep else _NAME
    return f"{prefix}-{what}-{secrets.token_hex(3)}-{_host()}-{pid}-{_started(pid)}"


def _owner_is_gone(name: str) -> bool:
    """Whether the ``inv`` that made a container is a process of this machine that has ended."""
    host, pid, started = ("", "", "", *name.split("-"))[-3:]
    return host == _host() and pid.isdigit() and _started(int(pid)) != started


def _host() -> str:
    # Two containers may have one host name; their process IDs are then not of one kind.
    with suppress(OSError):
        return _short(f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}")
    return _short(socket.gethostname())


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; empty for one that is not there.

    A process ID alone proves nothing, since they are used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # proc(5): the name, in parentheses, may itself hold spaces; starttime is field 22.
    return stat.rpartition(")")[2].split()[19]
