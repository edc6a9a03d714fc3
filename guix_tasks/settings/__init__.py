"""The settings: what they are, what their values are, and what is wrong with them.

Each setting is described once, on its field of ``Settings``: how it is read, what it does, its
default as one would write it in an env file.  ``load_settings``, ``.env.example``
(``python -m guix_tasks.settings`` prints it) and the tables of the documentation come from that.

Later wins: defaults, ``.env``, ``.env.local``, the files that ``ENV_FILE`` names, the
process's environment, the task's own options.  The environment is read from the mapping
that is passed in, and never written.
"""

# ruff: noqa: RUF009 -- _setting() makes a dataclass field, as field() does

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

# --- What they are --------------------------------------------------------------------------


def _setting(parse: parsers.Parser, doc: str, **more: Any) -> Any:
    return field(metadata={"setting": Setting(parse, doc, **more)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a user can set, as values; a field is its setting's name in lower case.

    An empty setting is ``None``, or an empty tuple or mapping.  Every path is absolute.
    """

    image: ImageReference = _setting(
        parsers.image,
        "The image to make and push: REGISTRY/REPOSITORY[:TAG]; no tag means latest.",
        default="localhost:5055/guix-example",
        group="The image",
    )
    tags: tuple[str, ...] = _setting(
        parsers.list_of(parsers.tag),
        "More tags of the same repository that push pushes, as: 1.0 stable.",
    )
    platforms: tuple[Platform, ...] = _setting(
        parsers.list_of(parsers.plain(Platform.parse)),
        "The platforms to make it for, as: linux/amd64 linux/arm64; empty: the engine's own.",
    )

    base_image: ImageReference = _setting(
        parsers.reference,
        "The image that the Dockerfile begins from.",
        default="metacall/guix:latest",
        group="The base stage",
    )
    dockerfile: Path = _setting(
        parsers.dockerfile, "The Dockerfile of the base stage.", default="Dockerfile"
    )
    build_context: Path = _setting(
        parsers.path, "The folder that the Dockerfile copies from.", default="."
    )
    build_args: Mapping[str, str] = _setting(
        parsers.mapping_of(parsers.build_arg), "Build arguments: NAME=VALUE ..."
    )
    build_secrets: Mapping[str, Path] = _setting(
        parsers.mapping_of(parsers.build_secret),
        "Files that RUN --mount=type=secret sees: ID=FILE ...",
    )
    guix_binary_url: str | None = _setting(
        parsers.optional(parsers.url("https", "http")),
        "The address of GNU's binary tarball, for a base without Guix; needs the checksum too.",
    )
    guix_binary_sha256: str | None = _setting(
        parsers.optional(parsers.sha256), "The SHA-256 checksum of that tarball, 64 hex digits."
    )

    guix_channels: Path | None = _setting(
        parsers.optional(parsers.file), "The channels.scm that pull pulls.", group="Guix"
    )
    guix_channels_lock: Path | None = _setting(
        parsers.optional(parsers.path),
        "Where pull writes the commits that it got, and pulls again; empty: channels float.",
        default="channels.lock.scm",
    )
    guix_manifest: Path | None = _setting(
        parsers.optional(parsers.file), "The manifest.scm that install installs."
    )
    guix_packages: tuple[str, ...] = _setting(
        parsers.list_of(parsers.package),
        "Packages that install installs: NAME[@VERSION][:OUTPUT] ...",
        option="package",
    )
    guix_substitute_urls: tuple[str, ...] = _setting(
        parsers.list_of(parsers.url("https", "http", "file")),
        "Substitute servers instead of Guix's own, the preferred one first.",
    )
    guix_substitute_keys: tuple[Path, ...] = _setting(
        parsers.list_of(parsers.public_key),
        "Public keys of substitute servers to trust: .pub files.",
    )
    guix_fallback: bool = _setting(
        parsers.switch,
        "yes: build from source, for hours perhaps, where the substitute servers do not answer.",
        default="no",
    )
    guix_require_substitutes: bool = _setting(
        parsers.switch,
        "yes: install stops before it builds, where a package has no substitute.",
        default="no",
    )
    substitutes_listen: Listen = _setting(
        parsers.listen,
        "Where substitutes.up serves: ADDRESS:PORT; 0.0.0.0:8181 lets other machines reach it.",
        default="127.0.0.1:8181",
        option="listen",
    )
    guix_sandbox: Sandbox = _setting(
        parsers.one_of(Sandbox, "a sandbox"),
        "rootless, capabilities, privileged, auto (the first that works), nochroot (not isolated).",
        default="auto",
    )
    guix_cores: int | None = _setting(
        parsers.optional(parsers.number(0)), "Cores that each Guix build may use; 0: all of them."
    )
    guix_max_jobs: int | None = _setting(
        parsers.optional(parsers.number(1)),
        "Guix builds that may run side by side; empty: one for each processor, 4 at most.",
    )

    extra_ca_file: Path | None = _setting(
        parsers.optional(parsers.certificates),
        "Certificates, in PEM, of authorities that stages trust beside the image's own.",
        group="Networks",
    )
    guix_channel_mirrors: Mapping[str, str] = _setting(
        parsers.mapping_of(parsers.mirror),
        "Where channels are fetched from instead, by how their URLs begin: URL=MIRROR ...",
    )
    guix_channel_credentials: Secret | None = _setting(
        parsers.optional(parsers.plain(Secret)),
        "What opens private channels at pull: https://USER:TOKEN@HOST ...; taken literally.",
        secret=True,
    )
    ssh_known_hosts: Path | None = _setting(
        parsers.optional(parsers.file),
        "The known_hosts for channels fetched by SSH; empty: ~/.ssh/known_hosts.",
    )

    mounts: tuple[Mount, ...] = _setting(
        parsers.mounts,
        "Local files and folders that stages see: SOURCE:TARGET[:ro] ...",
        group="Work containers",
    )
    network: str | None = _setting(
        parsers.optional(parsers.network),
        "none, host, or a network's name; empty: the engine's default.",
    )
    stage_memory: int | None = _setting(
        parsers.optional(parsers.memory),
        "The memory that a stage may use, as 512m or 4g; empty: no limit.",
    )
    stage_timeout: int | None = _setting(
        parsers.optional(parsers.seconds),
        "The time that a stage may take, as 45s, 90m or 2h; empty: no limit.",
    )

    cache_volume: str | None = _setting(
        parsers.optional(parsers.volume),
        "What the names of the volumes for caches begin with; empty: caches stay in the image.",
        default="guix-tasks-cache",
        group="Caches",
    )
    cache_image: ImageReference | None = _setting(
        parsers.optional(parsers.cache_image),
        "A repository, REGISTRY/REPOSITORY, that finished stages are pushed to and taken from.",
    )

    buildx_builder: str = _setting(
        parsers.builder,
        "The builder that buildx.setup makes and buildx.build builds with.",
        default="insecure-builder",
        group="The BuildKit way",
    )
    buildx_driver: Driver = _setting(
        parsers.one_of(Driver, "a driver"),
        "Where BuildKit runs: docker-container, docker (the engine itself), remote, kubernetes.",
        default="docker-container",
    )
    buildx_nodes: tuple[Node, ...] = _setting(
        parsers.list_of(nodes.node, commas=True),
        "The builder's machines: ENDPOINT[,platform=PLATFORM][,OPTION=VALUE] ...; "
        "empty: the engine's.",
    )
    buildx_output: Output = _setting(
        parsers.one_of(Output, "an output"),
        "registry (push it), oci or docker (an archive in out/), or load (into the engine).",
        default="registry",
    )
    buildx_attestations: tuple[str, ...] = _setting(
        parsers.list_of(parsers.attestation), "What is pushed with the image: provenance sbom."
    )
    buildx_cache_from: tuple[str, ...] = _setting(
        parsers.list_of(parsers.cache_backend, commas=True),
        "Build caches to take steps from: type=registry,ref=REGISTRY/REPOSITORY type=gha ...",
    )
    buildx_cache_to: tuple[str, ...] = _setting(
        parsers.list_of(parsers.cache_backend, commas=True),
        "Build caches to put steps into: type=local,dest=FOLDER,mode=max ...",
    )
    buildkit_syntax: ImageReference = _setting(
        parsers.reference,
        "The Dockerfile frontend for a builder whose own does not know RUN --security.",
        default="docker/dockerfile:1",
    )
    buildx_url: str | None = _setting(
        parsers.optional(parsers.url("https", "http", "file")),
        "Where buildx.setup gets the plugin, if not from Debian; needs the checksum too.",
    )
    buildx_sha256: str | None = _setting(
        parsers.optional(parsers.sha256), "The SHA-256 checksum of that file, 64 hex digits."
    )

    engine_image_store: ImageStore | None = _setting(
        parsers.optional(parsers.one_of(ImageStore, "an image store")),
        "The image store of engine.up's engine: containerd, overlay2; empty: Docker's default.",
        group="The private engine",
        option="image-store",
    )

    output: Display = _setting(
        parsers.one_of(Display, "a way to show it"),
        "auto (live on a terminal, else plain), live, plain, quiet, verbose (with logs of builds).",
        default="auto",
        group="What is shown",
    )

    release_url: str | None = _setting(
        parsers.optional(parsers.url("https", "http")),
        "Where the files in out/ can be downloaded: what stands before their names in build.json.",
        group="Releases",
        option="url",
    )

    docker_username: Secret | None = _setting(
        parsers.optional(parsers.plain(Secret)),
        "The user at the registry of IMAGE; taken literally, with any ${...} in it.",
        group="The registry's account",
        secret=True,
    )
    docker_password: Secret | None = _setting(
        parsers.optional(parsers.plain(Secret)),
        "That user's password or token; taken literally, with any ${...} in it.",
        secret=True,
    )

    docker_environment: Mapping[str, str]
    """Docker's own variables that are set (``DOCKER_HOST``, …), for whoever finds the engine."""

    proxies: Mapping[str, str] = field(repr=False)
    """The proxy variables of the process's environment, and what Docker's own configuration has
    where that is silent.  In both cases: Guix reads the lower one, others the upper.  There may be
    a password in one."""

    ssh_agent: Path | None
    """The socket of the user's SSH agent (``SSH_AUTH_SOCK``)."""

    folder: Path
    """The project's."""

    written: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Each setting as it was written; secrets and build arguments are left out."""

    notes: tuple[str, ...] = field(default=(), compare=False)
    """What deserves a warning, a line each."""

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each setting comes from; see ``origin``."""

    @property
    def platform(self) -> Platform | None:
        """The platform to build for, where one is asked for; see ``each_platform``."""
        return self.platforms[0] if self.platforms else None

    @property
    def output_folder(self) -> Path:
        """``out/`` in the project: archives, packs, what failed, and what platforms were pushed."""
        return self.folder / "out"

    @property
    def logs(self) -> frozenset[Path]:
        """Folders that tasks write to while they work: no stage is made from what is there."""
        out = self.output_folder.resolve()
        return frozenset(out / each for each in ("logs", "failed", "digests"))

    @property
    def references(self) -> list[str]:
        """``IMAGE``, and the same repository with each of ``TAGS``."""
        return [str(self.image), *(str(self.image.with_tag(tag)) for tag in self.tags)]

    @property
    def builds_beside_engine(self) -> bool:
        """Whether BuildKit runs where the engine does: nodes are other machines."""
        beside = self.buildx_driver in (Driver.DOCKER, Driver.CONTAINER)
        return beside and not self.buildx_nodes

    def each_platform(self) -> list[Settings]:
        """These settings for one platform after the other: an engine makes one at a time."""
        return [replace(self, platforms=(each,)) for each in self.platforms] or [self]

    def origin(self, name: str) -> str:
        """How an error about a setting begins: ``.env:3: IMAGE``, ``option --image``."""
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
        "The engine: unix:///SOCKET, tcp://HOST:PORT or ssh://HOST.",
        group="Docker's own variables",
    ),
    "DOCKER_CONTEXT": Setting(parsers.plain(str), "The context of the docker command line."),
    "DOCKER_CONFIG": Setting(
        parsers.optional(parsers.path), "The docker command line's own folder."
    ),
    "DOCKER_TLS_VERIFY": Setting(parsers.plain(str), "Not empty: verify the engine's certificate."),
    "DOCKER_CERT_PATH": Setting(
        parsers.optional(parsers.path), "The folder with the TLS certificates."
    ),
}


def _known() -> Iterator[tuple[str, Setting]]:
    for name, setting in _SETTINGS.items():
        yield name, setting
        if setting.secret:
            doc = f"Instead of {name}: a file that holds it."
            yield f"{name}_FILE", Setting(parsers.optional(parsers.secret_file), doc)
    yield from _DOCKER_VARIABLES.items()


_KNOWN = dict(_known())

_CONFIDENTIAL = {
    "BUILD_ARGS",  # where people put tokens, though they should not
    *(name for name, setting in _SETTINGS.items() if setting.secret),
}

_LOWER_CASE_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")


def _proxies(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    docker = _docker_proxies(environ)
    for name in _LOWER_CASE_PROXIES:
        # As the docker command line has it: ``httpProxy`` is ``http_proxy``.
        configured = docker.get(name.replace("_proxy", "Proxy"))
        for own, other in ((name, name.upper()), (name.upper(), name)):
            value = environ.get(own) or environ.get(other) or configured
            if value and isinstance(value, str):
                yield own, value


def _docker_proxies(environ: Mapping[str, str]) -> Mapping[str, Any]:
    """The proxies that the docker command line gives to containers, from its ``config.json``.

    Where that cannot be read, it is for whoever speaks to the engine to tell.
    """
    home = environ.get("DOCKER_CONFIG") or f"{environ.get('HOME', '')}/.docker"
    try:
        found = json.loads(Path(home, "config.json").read_bytes())["proxies"]["default"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def settings_reference() -> list[tuple[str, str, str]]:
    """Every key that an env file can have: its name, its default as text, what it does."""
    return [(name, setting.default, setting.doc) for name, setting in _KNOWN.items()]


def settings_headings() -> dict[str, str]:
    """The headings of ``settings_reference``, by the name of the first setting under each."""
    return {name: setting.group for name, setting in _KNOWN.items() if setting.group}


def example_text() -> str:
    """The content of ``.env.example``."""
    lines = [
        "# The settings of guix-tasks, each with its default.  Copy this file to .env.",
        "#",
        "# Later wins: .env, .env.local, the files that the variable ENV_FILE names (separated by",
        "# commas), the environment, the options of a task.  Relative paths start from the folder",
        "# of the file they are in.  Items of a list are separated by spaces; quotes hold an item",
        "# with spaces together.  ${NAME} is the value of a variable or of a setting further up.",
    ]
    for name, setting in _KNOWN.items():
        if setting.group:
            lines += ["", f"# --- {setting.group} ---"]
        key = f"{name}={setting.default}" if setting.default else f"#{name}="
        lines += ["", f"# {setting.doc}", key]
    return "\n".join(lines) + "\n"


# --- What their values are ------------------------------------------------------------------


def load_settings(
    project: Path,
    cwd: Path,
    environ: Mapping[str, str],
    overrides: Mapping[str, str | Sequence[str]] = MappingProxyType({}),
) -> Settings:
    """Read every source; raises ``SettingsError`` with all that is wrong in them.

    Relative paths start from ``project`` in the defaults, and from ``cwd`` in the
    environment and in ``overrides``.  Those are the task's options by the setting's name;
    an empty one counts as not given, and the items of a sequence are taken as they are.
    """
    project, cwd = project.absolute(), cwd.absolute()
    sources = Sources(_KNOWN, environ, project)
    for path in (project / ".env", project / ".env.local"):
        sources.add_file(path, _shown(path, cwd), optional=True)
    for name in filter(None, map(str.strip, environ.get("ENV_FILE", "").split(","))):
        path = cwd / name
        # Nobody has files next to standard input, or to what a shell passes as /dev/fd/63.
        base = cwd if path.is_relative_to("/dev") or path.is_relative_to("/proc") else path.parent
        label, asked_by = _shown(path, cwd), "environment: ENV_FILE: "
        sources.add_file(path, label, base=base, asked_by=asked_by)
    sources.add_environ(cwd)
    sources.add_overrides(overrides, cwd)
    return _settings(sources, environ, project)


def load_isolated(env_file: Path) -> Settings:
    """Read the defaults and one file, and nothing of the environment or of a project.

    For the demo, which must never push to where the user's own settings point.  Relative
    paths start from the file's folder.  Raises ``SettingsError`` with all that is wrong.
    """
    sources = Sources(_KNOWN, {}, env_file.absolute().parent)
    sources.add_file(env_file.absolute(), _shown(env_file, Path()))
    return _settings(sources, {}, env_file.absolute().parent)


def _shown(path: Path, cwd: Path) -> str:
    """A file's name for messages: as short as it can be, and always on one line."""
    text = str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)
    return text if text.isprintable() else repr(text)


def _settings(sources: Sources, environ: Mapping[str, str], project: Path) -> Settings:
    values, proxies = sources.values(), dict(_proxies(environ))
    # Before anything is said of them: what is wrong may hold a secret, too.
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
        folder=project,
        written=MappingProxyType(
            {name: text for name, text in sources.written().items() if name not in _CONFIDENTIAL}
        ),
        notes=tuple(dict.fromkeys([*sources.notes, *_careless(sources, values)])),
        origins=MappingProxyType(sources.origins()),
    )


_SECRET_FILE_MAX = 1 << 16
"""Bytes of a file of ``BUILD_SECRETS`` up to which its lines are hidden."""


def _secrets(
    sources: Sources, values: Mapping[str, Any], proxies: Mapping[str, str]
) -> Iterator[str]:
    """All that nobody is to see, whether the settings are right or not."""
    user, password = values["DOCKER_USERNAME"], values["DOCKER_PASSWORD"]
    if password:
        yield password.reveal()
        yield f"{user.reveal() if user else ''}:{password.reveal()}"
    if given := values["GUIX_CHANNEL_CREDENTIALS"]:
        yield from parsers.secret_parts(given.reveal())
    for url in proxies.values():
        # Not by the rules of URLs: a password may be there that breaks them.
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


def _careless(sources: Sources, values: Mapping[str, Any]) -> list[str]:
    """What is right, and shows a secret to whoever has the image."""
    origins = sources.origins()
    notes = [
        f"{origins['BUILD_ARGS']}: {name} is seen by whoever has the image, in its history; a "
        "secret belongs into BUILD_SECRETS"
        for name, text in _secret_arguments(values)
        if text
    ]
    if redact.has_account(_channels_text(values)):
        notes.append(
            f"{origins['GUIX_CHANNELS']}: a URL has a user or a password in it, which Guix keeps "
            "in the image, and which is in its labels and in the lock; GUIX_CHANNEL_CREDENTIALS "
            "keeps it out of all three"
        )
    return notes


def _channels_text(values: Mapping[str, Any]) -> str:
    """The channels file; empty where it cannot be read, which is told by whoever needs it."""
    with suppress(OSError, UnicodeDecodeError):
        if path := values["GUIX_CHANNELS"]:
            return read_text(path)
    return ""


def _check_together(sources: Sources, values: Mapping[str, Any]) -> None:
    """Refuse what is right by itself, and wrong beside another setting."""
    for pair in (
        ("GUIX_BINARY_URL", "GUIX_BINARY_SHA256"),
        ("BUILDX_URL", "BUILDX_SHA256"),
        ("DOCKER_USERNAME", "DOCKER_PASSWORD"),
    ):
        for name, missing in (pair, pair[::-1]):
            if sources.is_set(name) and not sources.is_set(missing):
                sources.refuse(name, f"needs {missing} too; set both or neither")
    if given := values["GUIX_CHANNEL_CREDENTIALS"]:
        try:
            parsers.channel_credentials(given.reveal())
        except ValueError as error:
            sources.refuse("GUIX_CHANNEL_CREDENTIALS", *error.args)
    image, tags = values["IMAGE"], values["TAGS"]
    if image and tags:
        stages = [tag for tag in tags if parsers.is_stage_tag(tag, image.tag)]
        sources.refuse("TAGS", *(f"{quoted(tag)} is a stage's; write another" for tag in stages))
    if values["BUILDX_DRIVER"] and values["BUILDX_NODES"] is not None:
        wrong = nodes.problems(values["BUILDX_DRIVER"], values["BUILDX_NODES"])
        sources.refuse("BUILDX_NODES", *wrong)
    channels, lock = values["GUIX_CHANNELS"], values["GUIX_CHANNELS_LOCK"]
    if channels and lock and os.path.realpath(channels) == os.path.realpath(lock):
        sources.refuse("GUIX_CHANNELS_LOCK", "pull would overwrite GUIX_CHANNELS; name another")
