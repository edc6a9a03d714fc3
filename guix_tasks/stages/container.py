"""Work containers, in which Guix runs and which stages commit.

Every work container runs the entry point of guix-tasks, because that of a user's image may
neither wait for the daemon's socket nor stop the daemon cleanly. The entry point and the files of
a command are copied to ``WORK_DIRECTORY``: a bind mount does not reach a remote engine. The entry
point removes that directory at its end, so no commit contains it.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
import secrets
import shlex
import signal
import socket
import stat
import tarfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks import guix
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.errors import REFUSED, EngineError, StageError, UsageError
from guix_tasks.files import file_digest, read_file, text_digest, tree_digest
from guix_tasks.guix.progress import VERBOSITY
from guix_tasks.guix.result_paths import SUBSTITUTE_CACHE
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.tar import as_file, new_archive
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.ownership import USER, grant_ownership

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from guix_tasks.engine.api import Container, Engine
    from guix_tasks.settings import Settings
    from guix_tasks.settings.values import Mount

WORK_DIRECTORY = "/var/guix/guix-tasks"
"""Private directory of a work container. The daemon's user owns its parent and can delete it."""
ENTRY_POINT = f"{WORK_DIRECTORY}/entry-point.sh"
ENVIRONMENT = f"{WORK_DIRECTORY}/environment"
INPUTS = "project"
"""Subdirectory of ``WORK_DIRECTORY`` for files of a project, which every user may read."""
LOCAL_SERVER_KEY = "local-server.pub"
"""File in ``WORK_DIRECTORY``: a substitute key that only the daemon of this container trusts."""
EXTRA_CA = "extra-ca.pem"
MOUNT_POINTS = "mount-points"
"""File in ``WORK_DIRECTORY``: files and directories to unmount and remove after the command."""
PROJECT_LABEL = "org.guix-tasks.project"

_NAME = "guix-tasks"
_KEPT_NAME = "guix-tasks-kept"
_ROOTLESS = f"-{Sandbox.ROOTLESS.value}"
_SERVER_NAME = "guix-tasks-substitutes"

STORE_MOUNT = "/gnu"
"""Directory of the warm store in work containers."""
STORE_DATABASE = f"{STORE_MOUNT}/guix-tasks/db"
"""Directory of Guix's database in the warm store. That of the image stays visible."""
STORE_DIRECTORIES = (
    f"{STORE_MOUNT}/guix-tasks",
    STORE_DATABASE,
    f"{STORE_MOUNT}/guix-tasks/results",
)
"""Directories of the warm store that Guix's daemon has to own."""

RESOURCES = Path(__file__).parent / "resources"
"""Files of images and work containers, for example the entry point."""

CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "NET_ADMIN", "SETGID", "SETUID", "SYS_ADMIN",
    "SYS_CHROOT",
)  # fmt: skip
"""Capabilities that the daemon needs to build, or (KILL) to stop its builds."""

_MAX_FILE = 1 << 20
"""Maximum bytes that are read of a file of a container, which can be endless."""

_TUN, _ALL_USERS = "/dev/net/tun", stat.S_IROTH | stat.S_IWOTH

_SECCOMP = f"seccomp={Path(__file__).with_name('seccomp.json')}"


@dataclass(frozen=True)
class _Privileges:
    """Privileges of a container, with the names and defaults of ``ContainerSpec``."""

    privileged: bool = False
    capabilities: tuple[str, ...] | None = None
    security: tuple[str, ...] = ()
    unmasked: bool = False
    user: str | None = None


_PRIVILEGES: Mapping[Sandbox, _Privileges] = {
    Sandbox.ROOTLESS: _Privileges(
        user=USER,
        capabilities=(),
        security=("no-new-privileges", _SECCOMP),
        unmasked=True,  # a build mounts its own /proc
    ),
    Sandbox.CAPABILITIES: _Privileges(capabilities=CAPABILITIES, security=(_SECCOMP,)),
    Sandbox.PRIVILEGED: _Privileges(privileged=True),
    # Without a chroot the daemon needs no privilege, but it sets the personality of builds,
    # which Docker's default filter refuses.
    Sandbox.NOCHROOT: _Privileges(security=("seccomp=unconfined",)),
    # ``sandbox.resolve_sandbox`` replaces ``auto`` before a container runs.
    Sandbox.AUTO: _Privileges(),
}

_UNCONFINED = {"apparmor": "apparmor=unconfined", "selinux": "label=disable"}
"""Options that turn off a security module of the engine which would refuse a build's mounts.

Docker turns it off for privileged containers.
"""

CACHES = {"home": "/root/.cache", "substitutes": SUBSTITUTE_CACHE}
"""Caches of a work container, by name, with their directories; no image contains them."""

ROOTLESS_CACHES = {"rootless": "/tmp/guix-tasks-cache"}  # noqa: S108 -- inside the container
"""The same for a container without root, where Guix has only one cache."""


@dataclass(frozen=True)
class SubstituteServer:
    """The local substitute server; no image refers to it."""

    url: str
    """Its address for work containers."""
    key: bytes
    """Its public key."""


@dataclass(frozen=True)
class Work:
    """One command for a work container, with its files in ``WORK_DIRECTORY``."""

    name: str
    argv: tuple[str, ...]
    files: Mapping[str, bytes]
    keep: bool = False
    keep_failed: bool = False
    """Keep the container for inspection if the command fails."""
    tty: bool = False
    stdin: bool = False
    """Whether ``Engine.run`` passes an input on."""
    logged: bool = True
    """Whether the engine keeps the output, which can be large."""
    isolated: bool = False
    """No network, ``MOUNTS`` or cache volumes. ``binds`` are mounted in any case."""
    unprivileged: bool = False
    """No privileges, because the command does not run Guix."""
    entry_point: tuple[str, ...] = (ENTRY_POINT,)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment of the container, and so of an image that is committed from it."""
    local_server: SubstituteServer | None = None
    """The substitute server that Guix asks first."""
    binds: tuple[str, ...] = ()
    """Additional mounts, which leave nothing in an image."""
    store: str = ""
    """Volume with the warm store, or empty for the store of the image."""


def shell_work(
    name: str,
    arguments: tuple[str, ...],
    files: Mapping[str, bytes],
    binds: tuple[str, ...] = (),
    *,
    logged: bool = True,
) -> Work:
    """Return a work of the image's ``sh``, without privileges and network."""
    return Work(
        name, arguments, files, logged=logged, isolated=True, unprivileged=True,
        entry_point=("sh",), binds=binds,
    )  # fmt: skip


@contextmanager
def work_container(engine: Engine, settings: Settings, image: str, work: Work) -> Iterator[str]:
    """Create a container of ``image``, ready to run, and remove it at the end; yield its ID.

    A container with ``work.keep`` stays if the block ends without an error, one with
    ``work.keep_failed`` if the block raises ``StageError``. Containers of killed runs are removed
    first.
    """
    sweep(engine, settings)
    for volume in () if work.isolated else cache_volumes(settings):
        engine.create_volume(volume, project_labels(settings))
    spec = _spec(engine, settings, image, work)
    container = spec.name  # to remove it if the answer to the creation is lost
    try:
        with _uninterrupted():
            container = engine.create(spec)
        if work.files or not work.unprivileged:
            fill(engine, settings, container, work)
        yield container
        if not work.keep:
            with _uninterrupted():
                engine.remove(container)
    except BaseException as error:
        if work.keep_failed and isinstance(error, StageError):
            raise
        # A lost engine must not replace the error of the block. The next run removes the container.
        with _uninterrupted(), suppress(EngineError):
            engine.remove(container)
        raise


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block.

    The engine completes a call even if its client is gone, and its result would be lost.
    """
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


@contextmanager
def time_limit(
    engine: Engine, container: str, seconds: float | None, *, grace: int
) -> Iterator[threading.Event]:
    """Stop a container after ``seconds`` (None: no limit); the event is set if that happened.

    ``grace`` is the time in seconds between SIGTERM and SIGKILL.
    """
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        # A lost engine is reported by the call that waits for the container.
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
def unstarted_container(
    engine: Engine,
    settings: Settings,
    image: str,
    binds: tuple[str, ...] = (),
    *,
    name: str = "label",
) -> Iterator[str]:
    """Create a container that never runs.

    It serves to commit another configuration, to fill a volume, or to read files of an image.
    """
    work = Work(name, ("true",), {}, isolated=True, unprivileged=True, binds=binds)
    spec = _spec(engine, settings, image, work)
    container = spec.name
    try:
        with _uninterrupted():
            container = engine.create(spec)
        yield container
    finally:
        with _uninterrupted(), suppress(EngineError):
            engine.remove(container)


def mount_points(engine: Engine, settings: Settings, image: str, work: Work) -> list[str]:
    """Return the files and directories that the engine creates in an image for a work's mounts.

    They are the targets that the image lacks, and the directories above, innermost first.
    """
    if engine.is_dry:
        return []
    created: set[str] = set()
    spec = _spec(engine, settings, image, work)
    targets = [PurePosixPath(bind.split(":")[1]) for bind in spec.binds]
    with unstarted_container(engine, settings, image, name="files") as container:
        for target in targets:
            # /dev is in memory.
            for path in () if target.is_relative_to("/dev") else (target, *target.parents[:-1]):
                if next(engine.copy_out(container, str(path)), b""):
                    break
                created.add(str(path))
    return sorted(created, key=len, reverse=True)


def fill(engine: Engine, settings: Settings, container: str, work: Work) -> None:
    """Copy the files of the entry point and of the command in, for one start."""
    owner = 0
    if settings.guix_sandbox is Sandbox.ROOTLESS and not (work.unprivileged or engine.is_dry):
        directories = (*ROOTLESS_CACHES.values(), *(STORE_DIRECTORIES if work.store else ()))
        owner = grant_ownership(engine, container, directories)
    files = {**common_files(settings, work.local_server, warm=bool(work.store)), **work.files}
    engine.copy_in(container, archive(files, owner))


def resource_files(names: Iterable[str]) -> dict[str, bytes]:
    """Return files of ``RESOURCES`` for ``WORK_DIRECTORY``."""
    return {name: (RESOURCES / name).read_bytes() for name in names}


def read_container_file(
    engine: Engine, container: str, path: str, *, follow: bool = False
) -> bytes:
    """Return the content of a small file of a container; nothing if there is no such file.

    With ``follow`` it can be a link.
    """
    member, content = next(read_container_files(engine, container, path), (None, b""))
    if member and member.issym() and follow:
        target = posixpath.join(posixpath.dirname(path), member.linkname)
        return read_container_file(engine, container, target)
    return content


def read_container_files(
    engine: Engine, container: str, path: str
) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield all that a path of a container contains, with the first bytes of files."""
    with (
        suppress(tarfile.ReadError),  # a missing path is an empty archive
        tarfile.open(fileobj=as_file(engine.copy_out(container, path)), mode="r|") as tar,
    ):
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            yield member, file.read(_MAX_FILE) if file else b""


def run_silently(engine: Engine, container: str) -> tuple[int, str]:
    """Run a container to its end without showing its log; return its exit status and its log."""
    log = b"".join(data for _, data in engine.run(container))
    return engine.wait(container), log.decode(errors="replace")


def drop_environment(engine: Engine, container: str) -> None:
    """Empty the environment file of a container whose entry point may not have removed it.

    It can contain a password.
    """
    if b"".join(engine.copy_out(container, ENVIRONMENT)):
        engine.copy_in(container, archive({"environment": b""}))


def kept_containers(engine: Engine, settings: Settings) -> list[Container]:
    """Return the work containers that are kept for ``commit``, newest first."""
    return [container for container in work_containers(engine, settings) if is_kept(container)]


def work_containers(engine: Engine, settings: Settings) -> list[Container]:
    """Return the work containers of this project, newest first."""
    containers = engine.containers(project_labels(settings))
    return [container for container in containers if container.name != server_name(settings)]


def server_name(settings: Settings) -> str:
    """Return the name of the container that ``substitutes.up`` starts."""
    return f"{_SERVER_NAME}-{project_digest(settings)}"


def find_server(engine: Engine, settings: Settings) -> Container | None:
    """Return the container that ``substitutes.up`` started, running or not."""
    containers = engine.containers(project_labels(settings))
    name = server_name(settings)
    return next((container for container in containers if container.name == name), None)


def uncommitted(engine: Engine, settings: Settings) -> str:
    """Return the warning about a work container that is not committed; empty if there is none."""
    kept = kept_containers(engine, settings)
    if not kept:
        return ""
    return (
        f"the work container {kept[0].name} is not committed yet; "
        "`inv commit` commits it, `inv clean --work` removes it"
    )


def check_no_kept_container(engine: Engine, settings: Settings) -> None:
    """Raise ``UsageError`` if a container is kept already: ``commit`` can take only one."""
    if warning := uncommitted(engine, settings):
        raise UsageError(warning)


def sweep(engine: Engine, settings: Settings) -> None:
    """Remove the containers of killed runs."""
    for container in work_containers(engine, settings):
        if not is_kept(container) and _owner_is_gone(container.name):
            engine.remove(container.id)


def project_labels(settings: Settings) -> dict[str, str]:
    """Return the label of containers and volumes that names their project by its image."""
    return {PROJECT_LABEL: str(settings.image)}


def project_digest(settings: Settings) -> str:
    """Return a short digest of the project's image, for the names of containers and volumes."""
    return _short(str(settings.image))


def archive(
    files: Mapping[str, bytes],
    owner: int = 0,
    *,
    directory: str = WORK_DIRECTORY,
    mode: int = 0o600,
) -> bytes:
    """Return a tar archive of ``files`` in a directory, owned by the user ID ``owner``.

    Scripts (``#!``) are executable, and files of the project can be read by every user. ``mode``
    is that of all other files: by default private, because the environment can contain a token.
    """
    parents = {parent for name in files for parent in Path(name).parents}
    directories = {directory, *(f"{directory}/{parent}" for parent in parents if parent.name)}
    buffer = io.BytesIO()
    with new_archive(buffer) as tar:
        for path in sorted(directories if files else ()):
            member = tarfile.TarInfo(path.lstrip("/"))
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            member.uid = member.gid = owner
            tar.addfile(member)
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{directory}/{name}".lstrip("/"))
            member.size = len(content)
            if content.startswith(b"#!"):
                member.mode = 0o755
            else:
                member.mode = 0o644 if name.startswith(f"{INPUTS}/") else mode
            member.uid = member.gid = owner
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def common_files(
    settings: Settings, local_server: SubstituteServer | None = None, *, warm: bool = False
) -> dict[str, bytes]:
    """Return the files that every entry point needs in ``WORK_DIRECTORY``.

    With ``warm`` Guix uses the database of the warm store.
    """
    variables = environment(settings)
    if warm:
        variables["GUIX_DATABASE_DIRECTORY"] = STORE_DATABASE
    if local_server:
        urls = settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS
        variables["GUIX_SUBSTITUTE_URLS"] = " ".join((local_server.url, *urls))
    files = {
        "entry-point.sh": (RESOURCES / "entry-point.sh").read_bytes(),
        "environment": "".join(
            f"{name}={shlex.quote(value)}\n" for name, value in variables.items()
        ).encode(errors="surrogateescape"),  # it need not be UTF-8
    }
    if local_server:
        files[LOCAL_SERVER_KEY] = local_server.key
    for number, key in enumerate(settings.guix_substitute_keys):
        files[f"keys/{number}-{key.name}"] = read_file(key)
    if settings.extra_ca_file:
        files[EXTRA_CA] = read_file(settings.extra_ca_file)
    return files


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment of the entry point and of the command.

    It is copied in as a file and sourced, because a commit stores the environment of the
    container in the image.
    """
    variables = guix_environment(settings)
    # The lock decides the age of Guix, and the advice about it is for other machines.
    variables["GUIX_DISTRO_AGE_WARNING"] = "12000m"  # months
    if settings.output.logs_builds:
        options = f"{variables.get('GUIX_BUILD_OPTIONS', '')} --verbosity={VERBOSITY}"
        variables["GUIX_BUILD_OPTIONS"] = options.strip()
    return {**variables, **settings.proxies}


_DOWNLOADS = 4
"""Jobs of the daemon if nothing large is built. More are not faster (docs/performance.md)."""


def guix_environment(settings: Settings) -> dict[str, str]:
    """Return the variables for Guix and its daemon, which contain no secret."""
    # A download is a job of the daemon too.  It takes time on the network, but little of a CPU.
    jobs = _DOWNLOADS if settings.guix_require_substitutes else None
    variables = {
        "GUIX_SUBSTITUTE_URLS": " ".join(settings.guix_substitute_urls),
        "GUIX_CORES": settings.guix_cores,
        "GUIX_MAX_JOBS": settings.guix_max_jobs or jobs,
        "GUIX_SANDBOX": settings.guix_sandbox.value,
        # Not on the command line: that is in the key, and the option changes no result.
        "GUIX_BUILD_OPTIONS": "--fallback" if settings.guix_fallback else "",
    }
    # Guix takes its profile and its channels from these, and an image can set others.
    variables |= {"HOME": "/root", "USER": "root", "LOGNAME": "root"}
    if settings.guix_sandbox is Sandbox.ROOTLESS:
        variables["XDG_CACHE_HOME"] = ROOTLESS_CACHES["rootless"]
    return {name: str(value) for name, value in variables.items() if value not in (None, "")}


def common_inputs(engine: Engine, settings: Settings) -> dict[str, str]:
    """Return the inputs that all stages share, by name, with the digest of each content.

    Substitute servers are no input, because Guix accepts only substitutes signed by a trusted
    key. The keys are inputs, because the image contains them.
    """
    return {
        "entry point": file_digest(RESOURCES / "entry-point.sh"),
        "substitute keys": text_digest(*sorted(map(file_digest, settings.guix_substitute_keys))),
        "caches": "on volumes" if settings.cache_volume else "in the image",
        **mount_inputs(settings, settings.mounts),
        "platform": image_platform(engine, settings),
    }


def mount_inputs(settings: Settings, mounts: Iterable[Mount]) -> dict[str, str]:
    """Return the digests of the content of mounts, by name."""
    return {
        f"mount {mount.target}": tree_digest(mount.source, without=settings.no_inputs)
        for mount in mounts
    }


def image_platform(engine: Engine, settings: Settings) -> str:
    """Return the platform of the image, by default that of the engine."""
    return str(settings.platform or engine.info().platform)


def check_native_platform(engine: Engine, settings: Settings) -> None:
    """Raise ``UsageError`` for an emulated platform, on which Guix cannot isolate its builds."""
    platform = settings.platform
    if platform is None or settings.guix_sandbox is Sandbox.NOCHROOT:
        return
    native = engine.info().platform
    # Guix may have no system for the platform of the engine.
    with suppress(ValueError):
        if Platform.parse(native).runs(platform):
            return
    raise UsageError(
        f"{platform} is emulated by this engine ({native}), and Guix cannot isolate its builds "
        f"under emulation; set GUIX_SANDBOX=nochroot, or use an engine of {platform}"
    )


def cache_volumes(settings: Settings) -> dict[str, str]:
    """Return the cache volumes of this project, by name, with the directories of their mounts.

    A mount of ``MOUNTS`` at the same directory replaces the volume.
    """
    prefix = cache_prefix(settings)
    if prefix is None:
        return {}
    taken = {*tmpfs_directories(settings), *(mount.target for mount in settings.mounts)}
    caches = _caches(settings).items()
    return {f"{prefix}-{name}": target for name, target in caches if target not in taken}


def tmpfs_directories(settings: Settings) -> tuple[str, ...]:
    """Return the directories of the caches that are in memory.

    A 32-bit program under QEMU fails on the large inode numbers of a file system on disk.
    """
    is_32_bit = settings.platform is not None and settings.platform.is_32_bit
    home, *_ = _caches(settings).values()
    mounted = home in (mount.target for mount in settings.mounts)
    return (home,) if is_32_bit and settings.cache_volume and not mounted else ()


def _caches(settings: Settings) -> Mapping[str, str]:
    return ROOTLESS_CACHES if settings.guix_sandbox is Sandbox.ROOTLESS else CACHES


def cache_prefix(settings: Settings) -> str | None:
    """Return the prefix of the names of this project's caches; None without ``CACHE_VOLUME``."""
    prefix = settings.cache_volume
    return f"{prefix}-{project_digest(settings)}" if prefix else None


def _spec(engine: Engine, settings: Settings, image: str, work: Work) -> ContainerSpec:
    parent = engine.image(image)
    config = parent.config if parent else {}
    privileges = _Privileges() if work.unprivileged else _PRIVILEGES[settings.guix_sandbox]
    if privileges.user and engine.info().is_podman:
        # Files of other users would become root's in the image.
        raise EngineError(
            f"{REFUSED} give Guix's directories to a user other than root: Podman does not report "
            "the owners of files; set GUIX_SANDBOX to auto or capabilities"
        )
    security = privileges.security
    if security:
        modules = engine.info().security
        security += tuple(off for module, off in _UNCONFINED.items() if module in modules)
    volumes = {} if work.isolated else cache_volumes(settings)
    mounts = () if work.isolated else binds(engine, settings)
    return ContainerSpec(
        name=container_name(
            work.name,
            keep=work.keep or work.keep_failed,
            rootless=privileges.user is not None,
        ),
        image=image,
        command=(*work.entry_point, *work.argv),
        labels=project_labels(settings),
        environment=work.environment,
        privileged=privileges.privileged,
        unmasked=privileges.unmasked,
        security=security,
        capabilities=privileges.capabilities,
        network="none" if work.isolated else network(engine, settings),
        binds=(
            *mounts,
            *(f"{name}:{target}" for name, target in volumes.items()),
            *work.binds,
            # An engine would otherwise copy the image's store to an empty volume.
            *([f"{work.store}:{STORE_MOUNT}:nocopy"] if work.store else []),
        ),
        # Builds leave gigabytes there, which belong on disk and not in the image.
        scratch="/tmp" if volumes else None,  # noqa: S108 -- inside the container
        tmpfs_directories=() if work.isolated else tmpfs_directories(settings),
        devices=() if work.unprivileged else _devices(engine, settings),
        memory=settings.stage_memory,
        # A daemon with privileges runs as root, but an image can name another user.
        user=privileges.user or ("root" if config.get("User") else None),
        tty=work.tty,
        stdin=work.stdin,
        logged=work.logged,
        no_healthcheck=bool(config.get("Healthcheck")),
        platform=str(settings.platform) if settings.platform else None,
    )


def _devices(engine: Engine, settings: Settings) -> tuple[str, ...]:
    """Return the device with which a daemon without root lets builds download.

    With ``capabilities`` the daemon would also need all of ``/proc``. The device is no privilege:
    to use it, a program needs privileges over a network, such as that of its own user namespace.
    """
    if settings.guix_sandbox is not Sandbox.ROOTLESS or not engine.info().is_local:
        return ()
    with suppress(OSError):
        if Path(_TUN).stat().st_mode & _ALL_USERS == _ALL_USERS:
            return (_TUN,)
    return ()


def network(engine: Engine, settings: Settings) -> str | None:
    """Return ``NETWORK``, by default that of the engine, or the host's if there is no bridge."""
    return settings.network or (None if engine.info().has_bridge else "host")


def proxy_error_line(engine: Engine, settings: Settings) -> str:
    """Return why containers cannot reach a proxy, with a hint; empty if they can."""
    if network(engine, settings) in ("host", "none"):
        return ""
    for name, url in settings.proxies.items():
        with suppress(ValueError):
            host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
            if name.lower() != "no_proxy" and re.fullmatch(r"localhost|127\.[\d.]+|::1", host):
                return (
                    f"the proxy {name} is at {host}, which in a container is the container itself; "
                    "set NETWORK=host, or run the proxy on an address that containers can reach"
                )
    return ""


def binds(engine: Engine, settings: Settings) -> tuple[str, ...]:
    """Return ``MOUNTS`` as volumes. Raise ``UsageError`` if the engine cannot see the files."""
    if settings.mounts and not engine.info().is_local:
        raise UsageError(
            f"MOUNTS: the engine at {engine.info().url} is on another machine and cannot see "
            "files of this one; unset MOUNTS, or use a local engine"
        )
    return tuple(
        f"{mount.source}:{mount.target}{':ro' if mount.read_only else ''}"
        for mount in settings.mounts
    )


def mounted_path(settings: Settings, path: str) -> Path | None:
    """Return the source of a path of the work container, or None if it is below no mount."""
    # If mounts are nested, the innermost one is visible.
    for mount in sorted(settings.mounts, key=lambda mount: len(mount.target), reverse=True):
        below = path.removeprefix(mount.target)
        if path.startswith(mount.target) and below[:1] in ("", "/"):
            return mount.source / below.lstrip("/")
    return None


def container_name(task: str, *, keep: bool = False, rootless: bool = False) -> str:
    """Return a name that identifies a container's process, its task, and whether to keep it.

    Labels cannot record that, because a commit copies them into the image.
    """
    pid = os.getpid()
    prefix = f"{_KEPT_NAME if keep else _NAME}-{task}{_ROOTLESS if rootless else ''}"
    return f"{prefix}-{secrets.token_hex(3)}-{_host()}-{pid}-{_started(pid)}"


def is_kept(container: Container) -> bool:
    """Return whether a work container is kept for ``commit`` or inspection."""
    return container.name.startswith(_KEPT_NAME)


def kept_task(container: Container) -> tuple[str, bool]:
    """Return the task of a kept work container, and whether it runs without root."""
    task = container.name.removeprefix(f"{_KEPT_NAME}-").rsplit("-", 4)[0]
    name = task.removesuffix(_ROOTLESS)
    return name, name != task


def _owner_is_gone(name: str) -> bool:
    """Return whether a container's process ran on this machine and has ended."""
    host, pid, started = ("", "", "", *name.split("-"))[-3:]
    return host == _host() and pid.isdigit() and _started(int(pid)) != started


def _host() -> str:
    # Two containers can have one host name but separate process IDs.
    with suppress(OSError):
        return _short(f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}")
    return _short(socket.gethostname())


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _started(pid: int) -> str:
    """Return when a process started, in ticks since boot; empty if it does not exist.

    Process IDs are reused, so an ID alone does not identify a process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # proc(5): the name, in parentheses, can contain spaces; starttime is field 22.
    return stat.rpartition(")")[2].split()[19]
