"""Settings: their definitions, how they are loaded, and how they are checked.

Each setting is declared once, on its field of ``Settings``; ``sources.Setting`` lists the parts of
a declaration. The declarations are the source of ``load_settings``, of the tables in the
documentation, and of ``.env.example``, which ``python -m docs.tables`` writes.

Sources in increasing precedence: defaults, ``.env``, ``.env.local``, the files listed in
``ENV_FILE``, the process environment, task options. The environment is a parameter of
``load_settings``; it is never written.
"""

# ruff: noqa: RUF009 -- _setting() returns a dataclass field, like field()

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from guix_tasks.errors import SettingsError
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import ImageReference, quoted
from guix_tasks.settings import nodes, parsers, secrets
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

    from guix_tasks.settings.sources import RawValue

# --- Declarations ---------------------------------------------------------------------------

_WORK = "pull, install"
_BUILDX = "`buildx.*`"
_RUNTIME = "`runtime.*`"
_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


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
        section="Image",
        example="ghcr.io/me/app:1.0",
    )
    tags: tuple[str, ...] = _setting(
        parsers.list_of(parsers.tag),
        "Additional tags to push to the same repository, for example 1.0 stable.",
        example="1.0 stable",
        used_by="`push`, `buildx.build`",
    )
    platforms: tuple[Platform, ...] = _setting(
        parsers.list_of(parsers.plain(Platform.parse)),
        "Platforms to build for, for example linux/amd64 linux/arm64 (default: the engine's).",
        example="linux/amd64 linux/arm64",
        used_by="**base**, **pull**, **install**, `push`",
    )

    base_image: ImageReference = _setting(
        parsers.reference,
        "Image that the Dockerfile starts from.",
        default="metacall/guix:latest",
        section="Base stage",
        example="debian:sid",
        used_by="**base**",
    )
    dockerfile: Path = _setting(
        parsers.dockerfile,
        "Dockerfile of the base stage.",
        default="Dockerfile",
        example="docker/Dockerfile",
        used_by="**base**",
    )
    build_context: Path = _setting(
        parsers.path,
        "Build context: the directory from which the Dockerfile copies files.",
        default=".",
        example=".",
        used_by="**base**",
    )
    build_args: Mapping[str, str] = _setting(
        parsers.mapping_of(parsers.build_arg),
        "Build arguments, as NAME=VALUE ...",
        example="JOBS=4 'NAME=two words'",
        used_by="**base**",
        secrets=secrets.of_build_arguments,
        confidential=True,  # may hold tokens, against all advice
    )
    build_secrets: Mapping[str, Path] = _setting(
        parsers.mapping_of(parsers.build_secret),
        "Files for RUN --mount=type=secret, as ID=FILE ...",
        example="token=token.txt",
        used_by="base",
        secrets=secrets.of_files,
    )
    guix_binary_url: str | None = _setting(
        parsers.optional(parsers.url("https", "http")),
        "URL of Guix's binary tarball, for base images without Guix; requires GUIX_BINARY_SHA256.",
        example="https://mirror.example/guix-binary.tar.xz",
        used_by="**base**",
    )
    guix_binary_sha256: str | None = _setting(
        parsers.optional(parsers.sha256),
        "SHA-256 checksum of the file at GUIX_BINARY_URL, 64 hex digits.",
        example=_SHA256,
        used_by="**base**",
    )

    guix_channels: Path | None = _setting(
        parsers.optional(parsers.file),
        "Channels file for pull, for example channels.scm (default: the image's channels).",
        section="Guix",
        example="channels.scm",
        used_by="**pull**",
        secrets=secrets.of_channels_file,
    )
    guix_channels_lock: Path | None = _setting(
        parsers.optional(parsers.path),
        "Lock file: pull writes channel commits to it and reuses them; empty: no pinned commits.",
        default="channels.lock.scm",
        example="channels.lock.scm",
        used_by="**pull**",
    )
    guix_manifest: Path | None = _setting(
        parsers.optional(parsers.file),
        "Manifest to install, for example manifest.scm.",
        example="manifest.scm",
        used_by="**install**, `pack`",
    )
    guix_packages: tuple[str, ...] = _setting(
        parsers.list_of(parsers.package),
        "Packages to install, as NAME[@VERSION][:OUTPUT] ...",
        option="package",
        example="guile@3.0 git:send-email",
        used_by="**install**, `pack`",
    )
    guix_substitute_urls: tuple[str, ...] = _setting(
        parsers.list_of(parsers.url("https", "http", "file")),
        "Substitute servers in order of preference (default: Guix's servers).",
        example="https://mirror.example https://bordeaux.guix.gnu.org",
        used_by=_WORK,
    )
    guix_substitute_keys: tuple[Path, ...] = _setting(
        parsers.list_of(parsers.public_key),
        "Public keys of substitute servers to trust, as .pub files.",
        example="keys/mirror.pub",
        used_by="**pull**, **install**",
    )
    guix_fallback: bool = _setting(
        parsers.switch,
        "Whether to build from source, which can take hours, if substitute servers do not answer.",
        default="no",
        example="yes",
        used_by=_WORK,
    )
    guix_require_substitutes: bool = _setting(
        parsers.switch,
        "Whether install fails before any build if a package has no substitute.",
        default="no",
        example="yes",
        used_by="install",
    )
    substitutes_listen: Listen = _setting(
        parsers.listen,
        "ADDRESS:PORT of the substitute server; 0.0.0.0:8181 also serves other machines.",
        default="127.0.0.1:8181",
        option="listen",
        example="0.0.0.0:8181",
        used_by="`substitutes.up`",
    )
    guix_sandbox: Sandbox = _setting(
        parsers.one_of(Sandbox, "a sandbox"),
        "rootless, capabilities, privileged, nochroot (not isolated), auto (the first that works).",
        default="auto",
        example="rootless",
        used_by=f"{_WORK}, `run`, `shell`, `verify`, `pack`",
    )
    guix_cores: int | None = _setting(
        parsers.optional(parsers.number(0)),
        "Maximum CPU cores of each Guix build; 0: all cores (default: guix-daemon's default).",
        example="2",
        used_by=_WORK,
    )
    guix_max_jobs: int | None = _setting(
        parsers.optional(parsers.number(1)),
        "Maximum parallel Guix builds and downloads (default: number of CPUs, at most 4).",
        example="1",
        used_by=_WORK,
    )

    extra_ca_file: Path | None = _setting(
        parsers.optional(parsers.certificates),
        "PEM file of certificate authorities to trust in addition to those of the image.",
        section="Networks",
        example="company-ca.pem",
        used_by=f"{_WORK}, `run`, `shell`, `buildx.build`, `doctor`",
    )
    guix_channel_mirrors: Mapping[str, str] = _setting(
        parsers.mapping_of(parsers.mirror),
        "Mirrors of channels, by the prefix of the channel URL, as URL=MIRROR ...",
        example="https://git.guix.gnu.org/=https://mirror.example/",
        used_by="pull",
    )
    guix_channel_credentials: Secret | None = _setting(
        parsers.optional(parsers.plain(Secret)),
        "Credentials for private channels, as https://USER:TOKEN@HOST ...; ${...} is not expanded.",
        secret=True,
        example="https://me:TOKEN@git.example",
        used_by="pull",
        secrets=secrets.of_channel_credentials,
    )
    ssh_known_hosts: Path | None = _setting(
        parsers.optional(parsers.file),
        "known_hosts file for channels fetched over SSH (default: ~/.ssh/known_hosts).",
        example="known_hosts",
        used_by="pull",
    )

    mounts: tuple[Mount, ...] = _setting(
        parsers.mounts,
        "Local files and directories to mount in stages, as SOURCE:TARGET[:ro] ...",
        section="Work containers",
        example="substitutes:/srv/substitutes:ro",
        used_by="**pull**, **install**, `run`, `shell`",
    )
    network: str | None = _setting(
        parsers.optional(parsers.network),
        "Network: none, host or the name of a network (default: the engine's default).",
        example="none",
        used_by=f"base, {_WORK}, `run`, `shell`",
    )
    stage_memory: int | None = _setting(
        parsers.optional(parsers.memory),
        "Memory limit of a stage, for example 512m or 4g (default: no limit).",
        example="4g",
        used_by=_WORK,
        kind="bytes, or with `k`, `m`, `g`",
    )
    stage_timeout: int | None = _setting(
        parsers.optional(parsers.seconds),
        "Time limit of a stage, for example 45s, 90m or 2h (default: no limit).",
        example="90m",
        used_by=_WORK,
        kind="seconds, or with `s`, `m`, `h`",
    )

    cache_volume: str | None = _setting(
        parsers.optional(parsers.volume),
        "Prefix of the volumes with Guix's store and caches; empty: each stage starts cold.",
        default="guix-tasks-cache",
        section="Caches",
        example="guix-tasks-cache",
        used_by="**pull**, **install** (stale only if it becomes empty or non-empty)",
    )
    cache_image: ImageReference | None = _setting(
        parsers.optional(parsers.cache_image),
        "Repository to which finished stages are pushed for reuse, as REGISTRY/REPOSITORY.",
        example="ghcr.io/me/app-cache",
        used_by=f"base, {_WORK}",
    )

    buildx_builder: str = _setting(
        parsers.builder,
        "Builder that buildx.setup creates and buildx.build uses.",
        default="insecure-builder",
        section="BuildKit",
        example="insecure-builder",
        used_by=_BUILDX,
    )
    buildx_driver: Driver = _setting(
        parsers.one_of(Driver, "a driver"),
        "Driver of the builder: docker-container, docker (the engine), remote or kubernetes.",
        default="docker-container",
        example="remote",
        used_by=_BUILDX,
    )
    buildx_nodes: tuple[Node, ...] = _setting(
        parsers.list_of(nodes.node, commas=True),
        "Nodes of the builder, as [ENDPOINT][,platform=PLATFORM][,OPTION=VALUE] ... "
        "(default: the engine).",
        example="tcp://10.0.0.5:1234,cacert=ca.pem",
        used_by=_BUILDX,
    )
    buildx_output: Output = _setting(
        parsers.one_of(Output, "an output"),
        "Output: registry (push), oci or docker (an archive in out/), load (into the engine).",
        default="registry",
        example="oci",
        used_by="`buildx.build`",
    )
    buildx_attestations: tuple[str, ...] = _setting(
        parsers.list_of(parsers.attestation),
        "Attestations to push with the image: provenance, sbom or both (default: none).",
        example="provenance sbom",
        used_by="`buildx.build`",
    )
    buildx_cache_from: tuple[str, ...] = _setting(
        parsers.list_of(parsers.cache_backend, commas=True),
        "Build caches to read, as type=registry,ref=REGISTRY/REPOSITORY type=gha ...",
        example="type=gha",
        used_by="`buildx.build`",
    )
    buildx_cache_to: tuple[str, ...] = _setting(
        parsers.list_of(parsers.cache_backend, commas=True),
        "Build caches to write, as type=local,dest=DIRECTORY,mode=max ...",
        example="type=local,dest=cache,mode=max",
        used_by="`buildx.build`",
    )
    buildkit_syntax: ImageReference = _setting(
        parsers.reference,
        "Dockerfile frontend, used if that of the builder does not support RUN --security.",
        default="docker/dockerfile:1",
        example="docker/dockerfile:1.20",
        used_by="`buildx.build`",
    )
    buildx_url: str | None = _setting(
        parsers.optional(parsers.url("https", "http", "file")),
        "URL of the buildx plugin for buildx.setup (default: from Debian); requires BUILDX_SHA256.",
        example="https://mirror.example/buildx",
        used_by="`buildx.setup`",
    )
    buildx_sha256: str | None = _setting(
        parsers.optional(parsers.sha256),
        "SHA-256 checksum of the file at BUILDX_URL, 64 hex digits.",
        example=_SHA256,
        used_by="`buildx.setup`",
    )

    engine_image_store: ImageStore | None = _setting(
        parsers.optional(parsers.one_of(ImageStore, "an image store")),
        "Image store of engine.up's engine: containerd or overlay2 (default: Docker's default).",
        section="Private engine",
        option="image-store",
        example="containerd",
        used_by="`engine.up`",
    )

    output: Display = _setting(
        parsers.one_of(Display, "a display mode"),
        "Display: auto (live on a terminal, else plain), live, plain, quiet, "
        "verbose (with build logs).",
        default="auto",
        section="Output",
        example="quiet",
        used_by="long-running tasks",
    )

    release_url: str | None = _setting(
        parsers.optional(parsers.url("https", "http")),
        "Download URL of the directory out/; build.json puts it before the file names.",
        section="Releases",
        option="url",
        example="https://example.org/downloads/1.0",
        used_by="`release`",
    )

    runtime_image: ImageReference | None = _setting(
        parsers.optional(parsers.image),
        "Image with only the packages and what they need, as REGISTRY/REPOSITORY[:TAG].",
        section="Runtime image",
        example="ghcr.io/me/app-runtime:1.0",
        used_by=_RUNTIME,
    )
    runtime_entrypoint: tuple[str, ...] = _setting(
        parsers.words,
        "Program of the packages that the image runs, and its first arguments.",
        example="hello --traditional",
        used_by=_RUNTIME,
    )
    runtime_command: tuple[str, ...] = _setting(
        parsers.words,
        "Command, or the arguments of RUNTIME_ENTRYPOINT that `docker run` can replace.",
        example="--greeting=hi",
        used_by=_RUNTIME,
    )
    runtime_user: tuple[str, int] = _setting(
        parsers.user,
        "User of the image, as NAME:UID.",
        default="nobody:65534",
        example="app:1000",
        used_by=_RUNTIME,
        kind="text",
    )
    runtime_directory: str = _setting(
        parsers.directory_of_image,
        "Working directory; the user of the image owns it.",
        default="/",
        example="/srv",
        used_by=_RUNTIME,
    )
    runtime_ports: tuple[str, ...] = _setting(
        parsers.list_of(parsers.port),
        "Ports that the image exposes.",
        example="8080 53/udp",
        used_by=_RUNTIME,
    )
    runtime_links: Mapping[str, str] = _setting(
        parsers.mapping_of(parsers.runtime_link),
        "Links to files of the packages, as PATH=FILE ...",
        example="/bin/sh=bin/sh",
        used_by=_RUNTIME,
    )
    runtime_layers: int = _setting(
        parsers.number(2, 100),
        "Maximum layers; more of them make a change smaller.",
        default="60",
        example="30",
        used_by=_RUNTIME,
    )

    docker_username: Secret | None = _setting(
        parsers.optional(parsers.plain(Secret)),
        "User name at the registry of IMAGE; ${...} is not expanded.",
        section="Registry credentials",
        secret=True,
        example="me",
        used_by="`push`, pulls from the same registry",
    )
    docker_password: Secret | None = _setting(
        parsers.optional(parsers.plain(Secret)),
        "Password or token of that user; ${...} is not expanded.",
        secret=True,
        example="a token",
        used_by="`push`, pulls from the same registry",
        secrets=secrets.whole,
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
    def no_inputs(self) -> frozenset[Path]:
        """Real paths of the directories and of the lock that tasks write while they run.

        They are no input of any stage, even if they are in a mount or in the build context.
        """
        out, lock = self.output_directory.resolve(), self.guix_channels_lock
        links = {lock.parent.resolve() / lock.name, lock.resolve()} if lock else set()
        names = ("logs", "failed", "digests", "runtime", "runtime-image.txt")
        return frozenset({*links, *(out / name for name in names)})

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

    def shown(self, path: Path) -> str:
        """Return a path for messages, relative to the project's directory if it is inside."""
        return _shown(path, self.directory)

    def origin(self, name: str) -> str:
        """Return the start of an error about a setting: ``.env:3: IMAGE``, ``option --image``."""
        return self.origins.get(name, f"default: {name}")


# docs.docker.com/reference/cli/docker, "Environment variables"
_DOCKER_VARIABLES = {
    "DOCKER_HOST": Setting(
        parsers.plain(str),
        "Docker Engine, as unix:///SOCKET, tcp://HOST:PORT or ssh://HOST.",
        section="Docker's variables",
        example="ssh://me@build-box",
    ),
    "DOCKER_CONTEXT": Setting(
        parsers.plain(str), "Context of the docker command line.", example="build-box"
    ),
    "DOCKER_CONFIG": Setting(
        parsers.optional(parsers.path),
        "Configuration directory of the docker command line.",
        example="/srv/docker-config",
        kind="path",
    ),
    "DOCKER_TLS_VERIFY": Setting(
        parsers.plain(str),
        "Whether to verify the engine's TLS certificate; empty: no.",
        example="1",
    ),
    "DOCKER_CERT_PATH": Setting(
        parsers.optional(parsers.path),
        "Directory of the TLS certificates for the engine.",
        example="certificates",
        kind="path",
    ),
}


def _declarations() -> Iterator[tuple[str, Setting]]:
    for entry in fields(Settings):
        setting = entry.metadata.get("setting")
        if setting is None:
            continue
        name = entry.name.upper()
        yield name, setting
        if setting.secret:
            yield (
                f"{name}_FILE",
                Setting(
                    parsers.optional(parsers.secret_file),
                    f"File that contains {name}; replaces that setting.",
                    example=f"secrets/{entry.name}",
                    used_by=setting.used_by,
                    kind="path",
                ),
            )
    yield from _DOCKER_VARIABLES.items()


DECLARATIONS: Mapping[str, Setting] = dict(_declarations())
"""Declaration of each name that an env file can set, in the order of the documentation."""

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
    sources = Sources(DECLARATIONS, environ, project)
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


def _shown(path: Path, cwd: Path) -> str:
    """Return a path for messages, relative to ``cwd`` if possible and without line breaks."""
    text = str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)
    return text if text.isprintable() else repr(text)


def _settings(sources: Sources, environ: Mapping[str, str], project: Path) -> Settings:
    values = sources.values()
    docker = {name: str(values[name]) for name in _DOCKER_VARIABLES if values[name]}
    proxies = dict(_proxies({**environ, **docker}))
    # Before any problem is reported, because a wrong value can contain a secret.
    redact.add(*_secrets(sources.raw, values, proxies))
    _check_together(sources, values)
    if sources.problems:
        raise SettingsError(list(dict.fromkeys(sources.problems)))
    field_names = {entry.name for entry in fields(Settings)}
    return Settings(
        **{name.lower(): value for name, value in values.items() if name.lower() in field_names},
        docker_environment=MappingProxyType(docker),
        proxies=MappingProxyType(proxies),
        ssh_agent=Path(environ["SSH_AUTH_SOCK"]) if environ.get("SSH_AUTH_SOCK") else None,
        directory=project,
        written=MappingProxyType(
            {
                name: sources.raw[name].text
                for name, setting in DECLARATIONS.items()
                if not (setting.secret or setting.confidential)
            }
        ),
        notes=tuple(dict.fromkeys(_notes(sources, environ, values))),
        origins=MappingProxyType({name: raw.origin for name, raw in sources.raw.items()}),
    )


def _secrets(
    raw: Mapping[str, RawValue], values: Mapping[str, Any], proxies: Mapping[str, str]
) -> Iterator[str]:
    """Yield all secrets in the settings, valid or not."""
    for name, setting in DECLARATIONS.items():
        yield from setting.secrets(raw[name].text, values[name])
    if values["DOCKER_USERNAME"] and values["DOCKER_PASSWORD"]:
        # HTTP encodes the two together.
        yield f"{values['DOCKER_USERNAME'].reveal()}:{values['DOCKER_PASSWORD'].reveal()}"
    for url in proxies.values():
        # No URL parser, because an unescaped password can break the syntax of URLs.
        account = url.partition("://")[2] or url
        yield account.rpartition("@")[0].partition(":")[2]


def _notes(
    sources: Sources, environ: Mapping[str, str], values: Mapping[str, Any]
) -> Iterator[str]:
    """Yield warnings about valid settings, above all those that expose a secret in the image."""
    yield from sources.notes
    for name, text in secrets.secret_arguments(values["BUILD_ARGS"]):
        if text:
            yield (
                f"{sources.raw['BUILD_ARGS'].origin}: the history of the image shows {name} to "
                "everyone who has the image; pass a secret in BUILD_SECRETS"
            )
    if redact.has_account(secrets.channels_text(values["GUIX_CHANNELS"])):
        yield (
            f"{sources.raw['GUIX_CHANNELS'].origin}: a URL contains a user or a password, which "
            "Guix stores in the image, and which the labels of the image and the lock file repeat; "
            "use GUIX_CHANNEL_CREDENTIALS, which is stored in none of the three"
        )
    name = "DOCKER_DEFAULT_PLATFORM"
    if environ.get(name) and not values["PLATFORMS"]:
        yield f"environment: {name} is ignored, and PLATFORMS is not set: using that of the engine"


def _check_together(sources: Sources, values: Mapping[str, Any]) -> None:
    """Report valid settings that contradict one another."""
    for pair in (
        ("GUIX_BINARY_URL", "GUIX_BINARY_SHA256"),
        ("BUILDX_URL", "BUILDX_SHA256"),
        ("DOCKER_USERNAME", "DOCKER_PASSWORD"),
    ):
        for name, missing in (pair, pair[::-1]):
            if sources.raw[name].text and not sources.raw[missing].text:
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
