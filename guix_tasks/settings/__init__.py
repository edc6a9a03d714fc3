"""Settings: their definitions, how they are loaded, and how they are checked.

Each setting is defined once, on its field of ``Settings``: its parser, its description, and its
default as written in an env file. These fields are the source of ``load_settings``, of the tables
in the documentation, and of ``.env.example``, which ``python -m guix_tasks.settings`` prints.

Sources in increasing precedence: defaults, ``.env``, ``.env.local``, the files listed in
``ENV_FILE``, the process environment, task options. The environment is a parameter of
``load_settings``; it is never written.
"""

# ruff: noqa: RUF009 -- _setting() returns a dataclass field, like field()

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from guix_tasks.errors import SettingsError
from guix_tasks.files import read_text
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import ImageReference, quoted
from guix_tasks.settings import nodes, parsers
from guix_tasks.settings.sources import Setting, Sources
from guix_tasks.settings.values import (
    Driver,
    ImageStore,
    Listen,
    Mount,
    Node,
    Output,
    Sandbox,
    Secret,
)
from guix_tasks.ui import redact
from guix_tasks.ui.console import Display

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "Driver",
    "ImageStore",
    "Listen",
    "Mount",
    "Node",
    "Output",
    "Sandbox",
    "Secret",
    "Settings",
    "example_text",
    "load_isolated",
    "load_settings",
    "settings_headings",
    "settings_reference",
]

# --- Definitions ----------------------------------------------------------------------------


def _setting(parse: parsers.Parser, doc: str, **more: Any) -> Any:
    return field(metadata={"setting": Setting(parse, doc, **more)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Parsed settings; each field is named after its setting, in lower case.

    An empty setting is ``None``, an empty tuple or an empty mapping. All paths are absolute.
    """

    image: ImageReference = _setting(
        parsers.image,
        "Image to build and push, as REGISTRY/REPOSITORY[:TAG] (default tag: latest).",
        default="localhost:5055/guix-example",
        group="Image",
    )
    tags: tuple[str, ...] = _setting(
        parsers.list_of(parsers.tag),
        "Additional tags to push to the same repository, for example 1.0 stable.",
    )
    platforms: tuple[Platform, ...] = _setting(
        parsers.list_of(parsers.plain(Platform.parse)),
        "Platforms to build for, for example linux/amd64 linux/arm64 (default: the engine's).",
    )

    base_image: ImageReference = _setting(
        parsers.reference,
        "Image that the Dockerfile starts from.",
        default="metacall/guix:latest",
        group="Base stage",
    )
    dockerfile: Path = _setting(
        parsers.dockerfile, "Dockerfile of the base stage.", default="Dockerfile"
    )
    build_context: Path = _setting(
        parsers.path,
        "Build context: the directory from which the Dockerfile copies files.",
        default=".",
    )
    build_args: Mapping[str, str] = _setting(
        parsers.mapping_of(parsers.build_arg), "Build arguments, as NAME=VALUE ..."
    )
    build_secrets: Mapping[str, Path] = _setting(
        parsers.mapping_of(parsers.build_secret),
        "Files for RUN --mount=type=secret, as ID=FILE ...",
    )
    guix_binary_url: str | None = _setting(
        parsers.optional(parsers.url("https", "http")),
        "URL of Guix's binary tarball, for base images without Guix; requires GUIX_BINARY_SHA256.",
    )
    guix_binary_sha256: str | None = _setting(
        parsers.optional(parsers.sha256),
        "SHA-256 checksum of the file at GUIX_BINARY_URL, 64 hex digits.",
    )

    guix_channels: Path | None = _setting(
        parsers.optional(parsers.file),
        "Channels file for pull, for example channels.scm (default: the image's channels).",
        group="Guix",
    )
    guix_channels_lock: Path | None = _setting(
        parsers.optional(parsers.path),
        "Lock file: pull writes channel commits to it and reuses them; empty: no pinned commits.",
        default="channels.lock.scm",
    )
    guix_manifest: Path | None = _setting(
        parsers.optional(parsers.file), "Manifest to install, for example manifest.scm."
    )
    guix_packages: tuple[str, ...] = _setting(
        parsers.list_of(parsers.package),
        "Packages to install, as NAME[@VERSION][:OUTPUT] ...",
        option="package",
    )
    guix_substitute_urls: tuple[str, ...] = _setting(
        parsers.list_of(parsers.url("https", "http", "file")),
        "Substitute servers in order of preference (default: Guix's servers).",
    )
    guix_substitute_keys: tuple[Path, ...] = _setting(
        parsers.list_of(parsers.public_key),
        "Public keys of substitute servers to trust, as .pub files.",
    )
    guix_fallback: bool = _setting(
        parsers.switch,
        "Whether to build from source, which can take hours, if substitute servers do not answer.",
        default="no",
    )
    guix_require_substitutes: bool = _setting(
        parsers.switch,
        "Whether install fails before any build if a package has no substitute.",
        default="no",
    )
    substitutes_listen: Listen = _setting(
        parsers.listen,
        "ADDRESS:PORT of the substitute server; 0.0.0.0:8181 also serves other machines.",
        default="127.0.0.1:8181",
        option="listen",
    )
    guix_sandbox: Sandbox = _setting(
        parsers.one_of(Sandbox, "a sandbox"),
        "rootless, capabilities, privileged, nochroot (not isolated), auto (the first that works).",
        default="auto",
    )
    guix_cores: int | None = _setting(
        parsers.optional(parsers.number(0)),
        "Maximum CPU cores of each Guix build; 0: all cores (default: guix-daemon's default).",
    )
    guix_max_jobs: int | None = _setting(
        parsers.optional(parsers.number(1)),
        "Maximum parallel Guix builds (default: number of CPUs, at most 4).",
    )

    extra_ca_file: Path | None = _setting(
        parsers.optional(parsers.certificates),
        "PEM file of certificate authorities to trust in addition to those of the image.",
        group="Networks",
    )
    guix_channel_mirrors: Mapping[str, str] = _setting(
        parsers.mapping_of(parsers.mirror),
        "Mirrors of channels, by the prefix of the channel URL, as URL=MIRROR ...",
    )
    guix_channel_credentials: Secret | None = _setting(
        parsers.optional(parsers.plain(Secret)),
        "Credentials for private channels, as https://USER:TOKEN@HOST ...; ${...} is not expanded.",
        secret=True,
    )
    ssh_known_hosts: Path | None = _setting(
        parsers.optional(parsers.file),
        "known_hosts file for channels fetched over SSH (default: ~/.ssh/known_hosts).",
    )

    mounts: tuple[Mount, ...] = _setting(
        parsers.mounts,
        "Local files and directories to mount in stages, as SOURCE:TARGET[:ro] ...",
        group="Work containers",
    )
    network: str | None = _setting(
        parsers.optional(parsers.network),
        "Network: none, host or the name of a network (default: the engine's default).",
    )
    stage_memory: int | None = _setting(
        parsers.optional(parsers.memory),
        "Memory limit of a stage, for example 512m or 4g (default: no limit).",
    )
    stage_timeout: int | None = _setting(
        parsers.optional(parsers.seconds),
        "Time limit of a stage, for example 45s, 90m or 2h (default: no limit).",
    )

    cache_volume: str | None = _setting(
        parsers.optional(parsers.volume),
        "Prefix of the names of cache volumes; empty: caches stay in the image.",
        default="guix-tasks-cache",
        group="Caches",
    )
    cache_image: ImageReference | None = _setting(
        parsers.optional(parsers.cache_image),
        "Repository to which finished stages are pushed for reuse, as REGISTRY/REPOSITORY.",
    )

    buildx_builder: str = _setting(
        parsers.builder,
        "Builder that buildx.setup creates and buildx.build uses.",
        default="insecure-builder",
        group="BuildKit",
    )
    buildx_driver: Driver = _setting(
        parsers.one_of(Driver, "a driver"),
        "Driver of the builder: docker-container, docker (the engine), remote or kubernetes.",
        default="docker-container",
    )
    buildx_nodes: tuple[Node, ...] = _setting(
        parsers.list_of(nodes.node, commas=True),
        "Nodes of the builder, as [ENDPOINT][,platform=PLATFORM][,OPTION=VALUE] ... "
        "(default: the engine).",
    )
    buildx_output: Output = _setting(
        parsers.one_of(Output, "an output"),
        "Output: registry (push), oci or docker (an archive in out/), load (into the engine).",
        default="registry",
    )
    buildx_attestations: tuple[str, ...] = _setting(
        parsers.list_of(parsers.attestation),
        "Attestations to push with the image: provenance, sbom or both (default: none).",
    )
    buildx_cache_from: tuple[str, ...] = _setting(
        parsers.list_of(parsers.cache_backend, commas=True),
        "Build caches to read, as type=registry,ref=REGISTRY/REPOSITORY type=gha ...",
    )
    buildx_cache_to: tuple[str, ...] = _setting(
        parsers.list_of(parsers.cache_backend, commas=True),
        "Build caches to write, as type=local,dest=DIRECTORY,mode=max ...",
    )
    buildkit_syntax: ImageReference = _setting(
        parsers.reference,
        "Dockerfile frontend, used if that of the builder does not support RUN --security.",
        default="docker/dockerfile:1",
    )
    buildx_url: str | None = _setting(
        parsers.optional(parsers.url("https", "http", "file")),
        "URL of the buildx plugin for buildx.setup (default: from Debian); requires BUILDX_SHA256.",
    )
    buildx_sha256: str | None = _setting(
        parsers.optional(parsers.sha256),
        "SHA-256 checksum of the file at BUILDX_URL, 64 hex digits.",
    )

    engine_image_store: ImageStore | None = _setting(
        parsers.optional(parsers.one_of(ImageStore, "an image store")),
        "Image store of engine.up's engine: containerd or overlay2 (default: Docker's default).",
        group="Private engine",
        option="image-store",
    )

    output: Display = _setting(
        parsers.one_of(Display, "a display mode"),
        "Display: auto (live on a terminal, else plain), live, plain, quiet, "
        "verbose (with build logs).",
        default="auto",
        group="Output",
    )

    release_url: str | None = _setting(
        parsers.optional(parsers.url("https", "http")),
        "Download URL of the directory out/; build.json puts it before the file names.",
        group="Releases",
        option="url",
    )

    docker_username: Secret | None = _setting(
        parsers.optional(parsers.plain(Secret)),
        "User name at the registry of IMAGE; ${...} is not expanded.",
        group="Registry credentials",
        secret=True,
    )
    docker_password: Secret | None = _setting(
        parsers.optional(parsers.plain(Secret)),
        "Password or token of that user; ${...} is not expanded.",
        secret=True,
    )

    docker_environment: Mapping[str, str]
    """Docker's variables that are set (``DOCKER_HOST``, …), used to find the engine."""

    proxies: Mapping[str, str] = field(repr=False)
    """Proxy variables of the environment, or else of Docker's ``config.json``. May hold passwords.

    Each is set in both cases, because Guix reads the lower case and other programs the upper case.
    """

    ssh_agent: Path | None
    """Socket of the user's SSH agent (``SSH_AUTH_SOCK``)."""

    directory: Path
    """Directory of the project."""

    written: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Unparsed text of each setting, without secrets and build arguments."""

    notes: tuple[str, ...] = field(default=(), compare=False)
    """Warnings, one line each."""

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Source of each setting; see ``origin``."""

    @property
    def platform(self) -> Platform | None:
        """Platform to build for, or None for the engine's; see ``each_platform``."""
        return self.platforms[0] if self.platforms else None

    @property
    def output_directory(self) -> Path:
        """``out/`` in the project: archives, packs, diagnostics and push records."""
        return self.directory / "out"

    @property
    def logs(self) -> frozenset[Path]:
        """Directories that tasks write to while they run; they are no input of any stage."""
        out = self.output_directory.resolve()
        return frozenset(out / name for name in ("logs", "failed", "digests"))

    @property
    def references(self) -> list[str]:
        """``IMAGE``, and the same repository with each of ``TAGS``."""
        return [str(self.image), *(str(self.image.with_tag(tag)) for tag in self.tags)]

    @property
    def builds_on_engine_host(self) -> bool:
        """True if BuildKit runs on the machine of the engine; nodes are other machines."""
        is_local = self.buildx_driver in (Driver.DOCKER, Driver.CONTAINER)
        return is_local and not any(node.endpoint for node in self.buildx_nodes)

    def each_platform(self) -> list[Settings]:
        """Return one copy of the settings per platform, since an engine builds one at a time."""
        return [replace(self, platforms=(platform,)) for platform in self.platforms] or [self]

    def origin(self, name: str) -> str:
        """Return the start of an error about a setting: ``.env:3: IMAGE``, ``option --image``."""
        return self.origins.get(name, f"default: {name}")


_SETTINGS: Mapping[str, Setting] = {
    entry.name.upper(): entry.metadata["setting"]
    for entry in fields(Settings)
    if "setting" in entry.metadata
}

# docs.docker.com/reference/cli/docker, "Environment variables"
_DOCKER_VARIABLES = {
    "DOCKER_HOST": Setting(
        parsers.plain(str),
        "Docker Engine, as unix:///SOCKET, tcp://HOST:PORT or ssh://HOST.",
        group="Docker's variables",
    ),
    "DOCKER_CONTEXT": Setting(parsers.plain(str), "Context of the docker command line."),
    "DOCKER_CONFIG": Setting(
        parsers.optional(parsers.path), "Configuration directory of the docker command line."
    ),
    "DOCKER_TLS_VERIFY": Setting(
        parsers.plain(str), "Whether to verify the engine's TLS certificate; empty: no."
    ),
    "DOCKER_CERT_PATH": Setting(
        parsers.optional(parsers.path), "Directory of the TLS certificates for the engine."
    ),
}


def _known() -> Iterator[tuple[str, Setting]]:
    for name, setting in _SETTINGS.items():
        yield name, setting
        if setting.secret:
            doc = f"File that contains {name}; replaces that setting."
            yield f"{name}_FILE", Setting(parsers.optional(parsers.secret_file), doc)
    yield from _DOCKER_VARIABLES.items()


_KNOWN = dict(_known())

_CONFIDENTIAL = {
    "BUILD_ARGS",  # may hold tokens, against all advice
    *(name for name, setting in _SETTINGS.items() if setting.secret),
}

_LOWER_CASE_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")


def _proxies(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    docker = _docker_proxies(environ)
    for lower in _LOWER_CASE_PROXIES:
        upper = lower.upper()
        # The docker command line sets http_proxy from the key httpProxy.
        configured = docker.get(lower.replace("_proxy", "Proxy"))
        for name, other_case in ((lower, upper), (upper, lower)):
            value = environ.get(name) or environ.get(other_case) or configured
            if value and isinstance(value, str):
                yield name, value


def _docker_proxies(environ: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the proxies that the docker command line sets in containers, from ``config.json``.

    Return nothing if the file is unreadable: ``engine`` reports that.
    """
    home = environ.get("DOCKER_CONFIG") or f"{environ.get('HOME', '')}/.docker"
    try:
        proxies = json.loads(Path(home, "config.json").read_bytes())["proxies"]["default"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return proxies if isinstance(proxies, dict) else {}


def settings_reference() -> list[tuple[str, str, str]]:
    """Return the name, default as text, and description of each key that an env file can set."""
    return [(name, setting.default, setting.doc) for name, setting in _KNOWN.items()]


def settings_headings() -> dict[str, str]:
    """Return the headings of ``settings_reference`` by the first setting below each heading."""
    return {name: setting.group for name, setting in _KNOWN.items() if setting.group}


def example_text() -> str:
    """Return the content of ``.env.example``."""
    lines = [
        "# Settings of guix-tasks with their defaults. Copy this file to .env.",
        "#",
        "# Precedence, lowest first: .env, .env.local, the files listed in the variable ENV_FILE",
        "# (separated by commas), the environment, the options of a task.",
        "#",
        "# Relative paths start from the directory of the file in which they are written. List",
        "# items are separated by spaces; quote an item that contains spaces. ${NAME} expands to",
        "# a variable or to a setting further up.",
    ]
    for name, setting in _KNOWN.items():
        if setting.group:
            lines += ["", f"# --- {setting.group} ---"]
        key = f"{name}={setting.default}" if setting.default else f"#{name}="
        lines += ["", f"# {setting.doc}", key]
    return "\n".join(lines) + "\n"


# --- Loading --------------------------------------------------------------------------------


def load_settings(
    project: Path,
    cwd: Path,
    environ: Mapping[str, str],
    overrides: Mapping[str, str | Sequence[str]] = MappingProxyType({}),
) -> Settings:
    """Read all sources and return the settings.

    ``overrides`` maps names of settings to the values of task options. An empty value counts as
    not set, and the items of a sequence are not split. Relative paths start from ``project`` in the
    defaults, from the file's directory in env files, and from ``cwd`` in the environment and in
    ``overrides``.

    Raise ``SettingsError`` with the problems of all sources.
    """
    project, cwd = project.absolute(), cwd.absolute()
    sources = Sources(_KNOWN, environ, project)
    for path in (project / ".env", project / ".env.local"):
        sources.add_file(path, _shown(path, cwd), optional=True)
    for name in filter(None, map(str.strip, environ.get("ENV_FILE", "").split(","))):
        path = cwd / name
        # Standard input and process substitutions (/dev/fd/63) have no directory.
        base = cwd if path.is_relative_to("/dev") or path.is_relative_to("/proc") else path.parent
        label, referrer = _shown(path, cwd), "environment: ENV_FILE: "
        sources.add_file(path, label, base=base, referrer=referrer)
    sources.add_environ(cwd)
    sources.add_overrides(overrides, cwd)
    return _settings(sources, environ, project)


def load_isolated(env_file: Path) -> Settings:
    """Read the defaults and one env file, but no environment and no other file.

    The demo uses this so that it never pushes to the image of the user's settings. Relative paths
    start from the file's directory. Raise ``SettingsError`` with all problems.
    """
    sources = Sources(_KNOWN, {}, env_file.absolute().parent)
    sources.add_file(env_file.absolute(), _shown(env_file, Path()))
    return _settings(sources, {}, env_file.absolute().parent)


def _shown(path: Path, cwd: Path) -> str:
    """Return a path for messages, relative to ``cwd`` if possible and without line breaks."""
    text = str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)
    return text if text.isprintable() else repr(text)


def _settings(sources: Sources, environ: Mapping[str, str], project: Path) -> Settings:
    values, proxies = sources.values(), dict(_proxies(environ))
    # Before any problem is reported, because a wrong value can contain a secret.
    redact.add(*_secrets(sources, values, proxies))
    _check_together(sources, values)
    if sources.problems:
        raise SettingsError(list(dict.fromkeys(sources.problems)))
    docker = {name: str(values[name]) for name in _DOCKER_VARIABLES if values[name]}
    return Settings(
        **{name.lower(): values[name] for name in _SETTINGS},
        docker_environment=MappingProxyType(docker),
        proxies=MappingProxyType(proxies),
        ssh_agent=Path(environ["SSH_AUTH_SOCK"]) if environ.get("SSH_AUTH_SOCK") else None,
        directory=project,
        written=MappingProxyType(
            {name: text for name, text in sources.written().items() if name not in _CONFIDENTIAL}
        ),
        notes=tuple(dict.fromkeys([*sources.notes, *_exposed_secrets(sources, values)])),
        origins=MappingProxyType(sources.origins()),
    )


_SECRET_FILE_MAX = 1 << 16
"""Maximum bytes of a file of ``BUILD_SECRETS`` whose lines are redacted."""


def _secrets(
    sources: Sources, values: Mapping[str, Any], proxies: Mapping[str, str]
) -> Iterator[str]:
    """Yield all secrets in the settings, valid or not."""
    user, password = values["DOCKER_USERNAME"], values["DOCKER_PASSWORD"]
    if password:
        yield password.reveal()
        yield f"{user.reveal() if user else ''}:{password.reveal()}"
    if credentials := values["GUIX_CHANNEL_CREDENTIALS"]:
        yield from parsers.secret_parts(credentials.reveal())
    for url in proxies.values():
        # No URL parser, because an unescaped password can break the syntax of URLs.
        account = url.partition("://")[2] or url
        yield account.rpartition("@")[0].partition(":")[2]
    for name, text in sources.written().items():
        if name != "BUILD_SECRETS" and not name.endswith("_FILE"):
            yield from redact.secrets_in(text)
    yield from (text for _, text in _secret_arguments(values))
    yield from redact.secrets_in(_channels_text(values))
    for path in (values["BUILD_SECRETS"] or {}).values():
        with suppress(OSError), path.open("rb") as file:
            yield file.read(_SECRET_FILE_MAX).decode(errors="surrogateescape")


def _secret_arguments(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    arguments = values["BUILD_ARGS"] or {}
    return [(name, text) for name, text in arguments.items() if redact.is_secret_name(name)]


def _exposed_secrets(sources: Sources, values: Mapping[str, Any]) -> list[str]:
    """Return warnings about valid settings that expose a secret in the image."""
    origins = sources.origins()
    notes = [
        f"{origins['BUILD_ARGS']}: the history of the image shows {name} to everyone who has the "
        "image; pass a secret in BUILD_SECRETS"
        for name, text in _secret_arguments(values)
        if text
    ]
    if redact.has_account(_channels_text(values)):
        notes.append(
            f"{origins['GUIX_CHANNELS']}: a URL contains a user or a password, which Guix stores "
            "in the image, and which the labels of the image and the lock file repeat; use "
            "GUIX_CHANNEL_CREDENTIALS, which is stored in none of the three"
        )
    return notes


def _channels_text(values: Mapping[str, Any]) -> str:
    """Return the channels file, or nothing if it is unreadable, which ``pull`` reports."""
    with suppress(OSError, UnicodeDecodeError):
        if path := values["GUIX_CHANNELS"]:
            return read_text(path)
    return ""


def _check_together(sources: Sources, values: Mapping[str, Any]) -> None:
    """Report valid settings that contradict one another."""
    for pair in (
        ("GUIX_BINARY_URL", "GUIX_BINARY_SHA256"),
        ("BUILDX_URL", "BUILDX_SHA256"),
        ("DOCKER_USERNAME", "DOCKER_PASSWORD"),
    ):
        for name, missing in (pair, pair[::-1]):
            if sources.is_set(name) and not sources.is_set(missing):
                sources.refuse(name, f"requires {missing}; set both or neither")
    if credentials := values["GUIX_CHANNEL_CREDENTIALS"]:
        try:
            parsers.channel_credentials(credentials.reveal())
        except ValueError as error:
            sources.refuse("GUIX_CHANNEL_CREDENTIALS", *error.args)
    image, tags = values["IMAGE"], values["TAGS"]
    if image and tags:
        reserved = [tag for tag in tags if parsers.is_stage_tag(tag, image.tag)]
        sources.refuse(
            "TAGS", *(f"{quoted(tag)} is reserved for a stage; use another tag" for tag in reserved)
        )
    if values["BUILDX_DRIVER"] and values["BUILDX_NODES"] is not None:
        problems = nodes.problems(values["BUILDX_DRIVER"], values["BUILDX_NODES"])
        sources.refuse("BUILDX_NODES", *problems)
    channels, lock = values["GUIX_CHANNELS"], values["GUIX_CHANNELS_LOCK"]
    if channels and lock and os.path.realpath(channels) == os.path.realpath(lock):
        sources.refuse("GUIX_CHANNELS_LOCK", "pull would overwrite GUIX_CHANNELS; set another file")
