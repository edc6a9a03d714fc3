"""The Dockerfile and the bake file of a BuildKit build, generated from the stages.

The insecure steps are in a generated Dockerfile, which gets the base as a named context. A user's
``Dockerfile`` therefore needs no ``RUN --security``, which old frontends cannot parse. A step sees
the same files as a work container and runs the same script.

Pure: nothing is run here.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from guix_tasks import guix
from guix_tasks.buildkit.buildx import csv_field
from guix_tasks.stages.channel_access import ACCESS_FILES
from guix_tasks.stages.container import (
    CACHES,
    ENTRY_POINT,
    EXTRA_CA,
    STORE_DATABASE,
    STORE_MOUNT,
    WORK_DIRECTORY,
)
from guix_tasks.stages.stage import STATE
from guix_tasks.stages.store import RESULTS, VOLUME_MOUNT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from guix_tasks.engine.api import BuildSpec
    from guix_tasks.oci.platform import Platform
    from guix_tasks.stages.stage import Stage

WORK = "work"
"""Named context with a directory of files for each stage."""

ENVIRONMENT = "environment"
"""Secret with the environment of the steps, which is in no layer, cache key or history."""

REPORTS = "/.guix-tasks-reports"
RESULT = "result"
"""Report with the name of a step's result in the warm store."""
CREATED = "created"
OWNER = "/tmp/guix-tasks-owner"  # noqa: S108 -- in the container, where every user may write
BASE_ENVIRONMENT = "environment"
"""Report with the environment of the base image."""

KEYS = "keys"
"""Report with the digest of the substitute keys that the base image trusts."""

RESOLVE = "resolve"
"""Step that resolves floating channels to commits."""
RESOLVED = "resolved"
"""Report of ``RESOLVE``."""

ASKED_TARGET = "asked"
REPORTS_TARGET = "reports"
IMAGE_TARGET = "image"


@dataclass(frozen=True, kw_only=True)
class Definition:
    """Contents of the Dockerfile of the insecure steps and of the bake file."""

    base: BuildSpec
    platforms: Sequence[Platform]
    directory: Path
    """Directory of the Dockerfile, the context ``work`` and the file of ``ENVIRONMENT``."""
    base_contexts: Mapping[str, str] = field(default_factory=dict)
    """Contexts that replace images that the builder cannot pull, by reference."""
    contexts: Mapping[str, Path] = field(default_factory=dict)
    stages: Sequence[Stage] = ()
    resolve: bool = False
    """True if a step resolves floating channels."""
    network: str | None = None
    binds: Mapping[str, str] = field(default_factory=dict)
    """Mounts of files and directories of this machine, by target, as values of ``--mount``."""
    cache: str | None = None
    """Prefix of the IDs of cache mounts, or None to leave caches in the image."""
    store: str | None = None
    """ID of the cache mount with the warm store, without the platform, or None for the store of
    the image."""
    secrets: Mapping[str, Path] = field(default_factory=dict)
    """Other secret files of the steps, by name."""
    ssh_agent: Path | None = None
    """The agent with which channels are fetched."""
    user: str = ""
    """User of the base image, or empty for root."""
    labels: Mapping[Platform, Mapping[str, str]] = field(default_factory=dict)
    """Labels of the image of each platform."""
    environment: Mapping[Platform, Mapping[str, str]] = field(default_factory=dict)
    """Variables of the image of each platform in addition to those of the base image."""
    syntax: str | None = None
    tags: Sequence[str] = ()
    output: str = ""
    attestations: Sequence[str] = ()
    cache_from: Sequence[str] = ()
    cache_to: Sequence[str] = ()


def dockerfile(definition: Definition) -> str:
    """Return the Dockerfile of the insecure steps."""
    return "\n".join([*_queries(definition), *_stages(definition), *_images(definition)]) + "\n"


def _queries(definition: Definition) -> list[str]:
    """Return the steps before the stages.

    They report the base's user, environment and keys, and the resolved channels.
    """
    # For a user without a name, `id -un` prints the number and fails.
    name = f"{{ id -un >{OWNER}/name || id -u >{OWNER}/name; }}"
    command = f"mkdir {OWNER} && id -u >{OWNER}/user && {name} && env >{OWNER}/{BASE_ENVIRONMENT}"
    resolved = [
        "FROM base AS resolving",
        "USER root",
        _step(definition, RESOLVE, "pull"),
        "",
    ]
    return [
        "FROM base AS owner",
        _shell(command),
        "",
        f"FROM base AS {KEYS}",
        "USER root",
        _shell(f"cat /etc/guix/acl 2>/dev/null | sha256sum >/{KEYS}"),
        "",
        *(resolved if definition.resolve else []),
        f"FROM scratch AS {ASKED_TARGET}",
        f"COPY --from=owner {OWNER} /",
        f"COPY --from={KEYS} /{KEYS} /",
        *([f"COPY --from=resolving {REPORTS} /"] if definition.resolve else []),
    ]


def _stages(definition: Definition) -> list[str]:
    """Return the steps of the stages and of their reports."""
    lines, parent = [], "base"
    for stage in definition.stages:
        name, root = stage.name, ["USER root"] if definition.user and parent == "base" else []
        if definition.store:
            lines += ["", *_warm_steps(definition, name, parent, root)]
        else:
            lines += ["", f"FROM {parent} AS {name}", *root, _step(definition, name, name)]
        parent = name
    lines += ["", f"FROM {parent} AS described", *map(_shell, _descriptions(definition))]
    return [*lines, "", f"FROM scratch AS {REPORTS_TARGET}", f"COPY --from=described {REPORTS} /"]


def _warm_steps(definition: Definition, name: str, parent: str, root: Sequence[str]) -> list[str]:
    """Return the steps of a stage with the warm store: fill the store, run Guix, assemble.

    Only the last step's layer is in the image. The second step leaves the name of its result.
    """
    platform = ["ARG TARGETARCH", "ARG TARGETVARIANT"]
    cache = (
        f"type=cache,id={definition.store}-${{TARGETARCH}}${{TARGETVARIANT}},sharing=locked,target="
    )
    script = f'result=$(cat {VOLUME_MOUNT}-report/{RESULT}) && exec sh "$1/$result/assemble.sh"'
    arguments = (VOLUME_MOUNT, '"$result"', '""', "0", '""', *STATE)
    return [
        f"FROM {parent} AS {name}-seed",
        *root,
        *platform,
        _run(
            [
                f"type=bind,from={WORK},source={name},target={WORK_DIRECTORY},rw",
                f"{cache}{VOLUME_MOUNT}",
            ],
            ["/bin/sh", f"{WORK_DIRECTORY}/seed.sh", VOLUME_MOUNT],
        ),
        "",
        f"FROM {name}-seed AS {name}-work",
        *platform,
        f"ENV GUIX_DATABASE_DIRECTORY={STORE_DATABASE}",
        _step(definition, name, name, f"{cache}{STORE_MOUNT}"),
        "",
        f"FROM {parent} AS {name}",
        *root,
        *platform,
        _run(
            [
                f"type=bind,from={name}-work,source={REPORTS},target={VOLUME_MOUNT}-report",
                f"{cache}{VOLUME_MOUNT}",
            ],
            ["/bin/sh", "-c", f"{script} {' '.join(arguments)}", "assemble", RESULTS],
        ),
    ]


def _images(definition: Definition) -> list[str]:
    """Return the configured image of each platform and the target that selects one of them."""
    parent = definition.stages[-1].name if definition.stages else "base"
    lines = []
    for platform in definition.platforms:
        lines += ["", f"FROM {parent} AS {IMAGE_TARGET}-{_word(platform)}"]
        lines += [f"USER {definition.user}"] if definition.user else []
        for argument, instruction, _ in _arguments(definition, platform):
            lines += [f"ARG {argument}", f'{instruction}="${{{argument}}}"']
    selected = f"{IMAGE_TARGET}-${{TARGETOS}}${{TARGETARCH}}${{TARGETVARIANT}}"
    return [*lines, "", f"FROM {selected} AS {IMAGE_TARGET}"]


def _arguments(definition: Definition, platform: Platform) -> Iterator[tuple[str, str, str]]:
    """Yield the argument, instruction and value of each label and variable of a platform's image.

    Bake's own labels are the same for all platforms, but packages differ between platforms.
    """
    values = {"LABEL": definition.labels, "ENV": definition.environment}
    for kind, of_platforms in values.items():
        for number, (name, value) in enumerate(sorted(of_platforms.get(platform, {}).items())):
            yield f"{kind}_{number}_{_word(platform)}", f"{kind} {name}", value


def _word(platform: Platform) -> str:
    return str(platform).replace("/", "")


def _step(definition: Definition, source: str, stage: str, *more: str) -> str:
    """Return the ``RUN`` of a stage, which mounts its files from ``source`` in ``WORK``.

    ``more`` are additional mounts.
    """
    # Optional files are mounted even if they are missing, so that the cache key is the same.
    names = (EXTRA_CA, *(ACCESS_FILES if stage == "pull" else ()))
    mounts = [
        f"type=bind,from={WORK},source={source},target={WORK_DIRECTORY},rw",
        f"type=secret,id={ENVIRONMENT},target={WORK_DIRECTORY}/{ENVIRONMENT}",
        *(f"type=secret,id={_secret_id(name)},target={WORK_DIRECTORY}/{name}" for name in names),
        *(["type=ssh"] if definition.ssh_agent and stage == "pull" else []),
        *definition.binds.values(),
        *_caches(definition),
        *more,
    ]
    options = [
        "--security=insecure", *([f"--network={definition.network}"] if definition.network else []),
    ]  # fmt: skip
    # The entry point ignores the stage's name. The log shows it, and errors are parsed for it.
    return _run(mounts, [ENTRY_POINT, f"{WORK_DIRECTORY}/stage", stage], *options)


def _run(mounts: Sequence[str], argv: Sequence[str], *options: str) -> str:
    words = [" ".join(("RUN", *options)), *(f"--mount={m}" for m in mounts), json.dumps(argv)]
    return " \\\n    ".join(words)


def _caches(definition: Definition) -> list[str]:
    """Return the mounts that replace the volumes of a work container.

    Each build has a private ``/tmp`` on disk.
    """
    if not definition.cache:
        return []
    mounts = [f"type=cache,id={definition.cache}-tmp,target=/tmp,mode=1777,sharing=private"]
    for name, target in CACHES.items():
        if target in definition.binds:
            continue
        # A 32-bit program under QEMU fails with the inode numbers of a 64-bit file system.
        if name == "home" and any(platform.is_32_bit for platform in definition.platforms):
            mounts.append(f"type=tmpfs,target={target}")
        else:
            mounts.append(f"type=cache,id={definition.cache}-{name},target={target},sharing=locked")
    return mounts


def _descriptions(definition: Definition) -> list[str]:
    """Return the commands that write the reports of all stages in the last stage's image."""
    path = f'PATH="{guix.CURRENT_GUIX}/bin:{guix.PROFILE}/bin:$PATH"'
    reports = (f"{path} {shlex.join(s.report)} >{REPORTS}/{s.name}" for s in definition.stages)
    # The time comes from a step, so that a cached image keeps the time of its build.
    return [f"mkdir -p {REPORTS}", *reports, f"date -u +%Y-%m-%dT%H:%M:%SZ >{REPORTS}/{CREATED}"]


def resolve_script(channels: str | None, *, authenticate: bool = True) -> bytes:
    """Return the script of the step ``RESOLVE``.

    ``channels`` is the name of the step's channels file, or None for Guix's default channels.
    """
    argv = ["guix", "repl", "--", f"{WORK_DIRECTORY}/resolve.scm"]
    argv += [] if authenticate else [guix.UNAUTHENTICATED]
    argv += [f"{WORK_DIRECTORY}/{channels}"] if channels else []
    command = f"mkdir -p {REPORTS}\n{shlex.join(argv)} >{REPORTS}/{RESOLVED}"
    return f"#!/bin/sh\nset -eu\n{command}\n".encode()


def _shell(command: str) -> str:
    # The exec form is independent of the image's SHELL.
    return "RUN " + json.dumps(["/bin/sh", "-c", command])


def bake_file(definition: Definition) -> str:
    """Return the bake file in JSON."""
    base = definition.base
    shared: dict[str, Any] = {
        "platforms": [str(platform) for platform in definition.platforms],
        "cache-from": list(definition.cache_from),
        "attest": ["type=provenance,disabled=true"],
    }
    steps = {
        **shared,
        "context": str(definition.directory / "empty"),
        "dockerfile": str(definition.directory / "Dockerfile"),
        "contexts": {
            "base": "target:base",
            **{name: str(path) for name, path in definition.contexts.items()},
        },
        "args": {
            **({"BUILDKIT_SYNTAX": definition.syntax} if definition.syntax else {}),
            **{
                argument: value
                for platform in definition.platforms
                for argument, _, value in _arguments(definition, platform)
            },
        },
        "secret": [
            _secret(ENVIRONMENT, definition.directory / ENVIRONMENT),
            *(_secret(_secret_id(name), path) for name, path in definition.secrets.items()),
        ],
        **({"ssh": [f"default={definition.ssh_agent}"]} if definition.ssh_agent else {}),
        **_network(definition.network, "security.insecure"),
    }
    reports = f"type=local,{csv_field(f'dest={definition.directory}/reports')}"
    provenance = "mode=min" if "provenance" in definition.attestations else "disabled=true"
    sbom = ["type=sbom"] if "sbom" in definition.attestations else []
    target = {
        "base": {
            **shared,
            "context": str(base.context),
            "dockerfile": str(base.dockerfile),
            "args": {**base.proxies, **base.args},
            "contexts": dict(definition.base_contexts),
            "secret": [_secret(name, path) for name, path in base.secrets.items()],
            **_network(base.network),
        },
        **{
            name: {**steps, "target": name, "output": [reports]}
            for name in (ASKED_TARGET, REPORTS_TARGET)
        },
        IMAGE_TARGET: {
            **steps,
            "target": IMAGE_TARGET,
            "tags": list(definition.tags),
            "output": [definition.output] if definition.output else [],
            "cache-to": list(definition.cache_to),
            "attest": [f"type=provenance,{provenance}", *sbom],
        },
    }
    return json.dumps(_escaped({"target": target}), indent=2)


def _network(network: str | None, *entitlements: str) -> dict[str, Any]:
    required = [*entitlements, *(["network.host"] if network == "host" else [])]
    return {
        **({"network": network} if network else {}),
        **({"entitlements": required} if required else {}),
    }


def _secret_id(name: str) -> str:
    return name.replace("/", "-").replace(".", "")


def _secret(name: str, path: Path) -> str:
    return f"id={name},{csv_field(f'src={path}')}"


def _escaped(value: Any) -> Any:
    """Escape ``${...}`` and ``%{...}``, which are templates in bake's strings."""
    if isinstance(value, str):
        return value.replace("${", "$${").replace("%{", "%%{")
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value
