"""The stages as steps of one BuildKit build: a Dockerfile and a bake file, as data.

The insecure steps are in a Dockerfile of this package's own, linked to the base by a named
context, so that a user's ``Dockerfile`` never needs ``RUN --security`` and parses everywhere.  A
step finds below ``container.FOLDER`` what a work container finds there, and runs the same script.

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
from guix_tasks.stages.container import CACHES, ENTRY_POINT, EXTRA_CA, FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from guix_tasks.engine.api import BuildSpec
    from guix_tasks.oci.platform import Platform
    from guix_tasks.stages.stage import Stage

WORK = "work"
"""The named context that holds a folder for each stage, seen by its step at ``FOLDER``."""

ENVIRONMENT = "environment"
"""The secret that holds the environment of the steps: in no layer, in no key, in no history."""

REPORTS = "/.guix-tasks-reports"
CREATED = "created"
OWNER = "/tmp/guix-tasks-owner"  # noqa: S108 -- the container's own, where every user may write

RESOLVE = "resolve"
"""The step that asks which commits floating channels are at."""

ASKED_TARGET = "asked"
REPORTS_TARGET = "reports"
IMAGE_TARGET = "image"
DIGEST_KEY = "containerimage.digest"


@dataclass(frozen=True)
class Bind:
    """A file or folder of this machine that steps see."""

    context: str
    """The name of the context that it is in."""
    source: str
    """Where in that; empty: all of it."""
    target: str
    read_only: bool


@dataclass(frozen=True)
class Recipe:
    """What a Dockerfile of the insecure steps is written from."""

    platforms: Sequence[Platform]
    stages: Sequence[Stage] = ()
    resolve: bool = False
    """Whether the channels float, and so are to be asked for."""
    network: str | None = None
    binds: Sequence[Bind] = ()
    cache: str | None = None
    """What the names of the builder's cache mounts begin with; None: caches stay in the image."""
    ssh: bool = False
    """Whether channels are fetched with the user's SSH agent."""
    user: str = ""
    """The user that the image of the base is for, if not root."""
    labels: Sequence[str] = ()
    """The names of the labels that each platform's image gets; their values are arguments."""


def dockerfile(recipe: Recipe) -> str:
    """The Dockerfile of the insecure steps."""
    return "\n".join([*_asked(recipe), *_made(recipe), *_images(recipe)]) + "\n"


def _asked(recipe: Recipe) -> list[str]:
    """What is to be known before the stages: the base's user, and where floating channels are."""
    # Where a user has no name, `id -un` prints the number, and then fails.
    name = f"{{ id -un >{OWNER}/name || id -u >{OWNER}/name; }}"
    who = f"mkdir {OWNER} && id -u >{OWNER}/user && {name}"
    resolved = [
        "FROM base AS resolving",
        "USER root",
        _step(recipe, RESOLVE, "pull"),
        "",
    ]
    return [
        "FROM base AS owner",
        _shell(who),
        "",
        *(resolved if recipe.resolve else []),
        f"FROM scratch AS {ASKED_TARGET}",
        f"COPY --from=owner {OWNER} /",
        *([f"COPY --from=resolving {REPORTS} /"] if recipe.resolve else []),
    ]


def _made(recipe: Recipe) -> list[str]:
    """The stages, each on the one before, and their reports."""
    lines, parent = [], "base"
    for stage in recipe.stages:
        lines += ["", f"FROM {parent} AS {stage.name}"]
        lines += ["USER root"] if recipe.user and parent == "base" else []
        lines += [_step(recipe, stage.name, stage.name)]
        parent = stage.name
    lines += ["", f"FROM {parent} AS described", *map(_shell, _descriptions(recipe))]
    return [*lines, "", f"FROM scratch AS {REPORTS_TARGET}", f"COPY --from=described {REPORTS} /"]


def _images(recipe: Recipe) -> list[str]:
    """The image of each platform, with its labels; that of the platform being built is the one."""
    parent = recipe.stages[-1].name if recipe.stages else "base"
    lines = []
    for platform in recipe.platforms:
        lines += ["", f"FROM {parent} AS {IMAGE_TARGET}-{_word(platform)}"]
        lines += [f"USER {recipe.user}"] if recipe.user else []
        for number, name in enumerate(recipe.labels):
            argument = label_argument(platform, number)
            lines += [f"ARG {argument}", f'LABEL {name}="${{{argument}}}"']
    ours = f"{IMAGE_TARGET}-${{TARGETOS}}${{TARGETARCH}}${{TARGETVARIANT}}"
    return [*lines, "", f"FROM {ours} AS {IMAGE_TARGET}"]


def label_argument(platform: Platform, number: int) -> str:
    """The build argument with the value of a platform's label, by its place among the labels."""
    return f"LABEL_{number}_{_word(platform)}"


def _word(platform: Platform) -> str:
    return str(platform).replace("/", "")


def _step(recipe: Recipe, folder: str, stage: str) -> str:
    """The ``RUN`` of a stage, with what is in its folder; that ends up in no layer."""
    # Mounted whether there or not: a step is the same with them and without.
    names = (EXTRA_CA, *(ACCESS_FILES if stage == "pull" else ()))
    mounts = [
        f"type=bind,from={WORK},source={folder},target={FOLDER},rw",
        f"type=secret,id={ENVIRONMENT},target={FOLDER}/{ENVIRONMENT}",
        *(f"type=secret,id={_secret_id(name)},target={FOLDER}/{name}" for name in names),
        *(["type=ssh"] if recipe.ssh and stage == "pull" else []),
        *map(_bind, recipe.binds),
        *_caches(recipe),
    ]
    words = [
        "RUN --security=insecure",
        *([f"--network={recipe.network}"] if recipe.network else []),
        *(f"--mount={mount}" for mount in mounts),
        # The name is for whoever reads the log, and for the error that names it.
        json.dumps([ENTRY_POINT, f"{FOLDER}/stage", stage]),
    ]
    return " \\\n    ".join(words)


def _bind(bind: Bind) -> str:
    fields = [f"type=bind,from={bind.context}", f"target={bind.target}"]
    fields += [f"source={bind.source}"] if bind.source else []
    return ",".join([*fields, *([] if bind.read_only else ["rw"])])


def _caches(recipe: Recipe) -> list[str]:
    """What a work container has on volumes.  Each build has a ``/tmp`` of its own, on disk."""
    if not recipe.cache:
        return []
    mounts = [f"type=cache,id={recipe.cache}-tmp,target=/tmp,mode=1777,sharing=private"]
    taken = {bind.target for bind in recipe.binds}
    for name, target in CACHES.items():
        if target in taken:
            continue
        # A 32-bit program under QEMU fails on the inode numbers of a 64-bit file system.
        if name == "home" and any(platform.is_32_bit for platform in recipe.platforms):
            mounts.append(f"type=tmpfs,target={target}")
        else:
            mounts.append(f"type=cache,id={recipe.cache}-{name},target={target},sharing=locked")
    return mounts


def _descriptions(recipe: Recipe) -> list[str]:
    """The reports of the stages, asked of what the last of them made."""
    path = f'PATH="{guix.CURRENT_GUIX}/bin:{guix.PROFILE}/bin:$PATH"'
    reports = (f"{path} {shlex.join(s.report)} >{REPORTS}/{s.name}" for s in recipe.stages)
    # In a step, so that it is when the image was made and not when it was found in the cache.
    return [f"mkdir -p {REPORTS}", *reports, f"date -u +%Y-%m-%dT%H:%M:%SZ >{REPORTS}/{CREATED}"]


def resolve_script(*, channels: bool, authenticate: bool = True) -> bytes:
    """What the step ``RESOLVE`` runs; with ``channels`` they are those of a file."""
    argv = ["guix", "repl", "--", f"{FOLDER}/resolve.scm"]
    argv += [] if authenticate else [guix.UNAUTHENTICATED]
    argv += [f"{FOLDER}/channels.scm"] if channels else []
    command = f"mkdir -p {REPORTS}\n{shlex.join(argv)} >{REPORTS}/{RESOLVE}d"
    return f"#!/bin/sh\nset -eu\n{command}\n".encode()


def _shell(command: str) -> str:
    # Not the image's SHELL, which may be anything.
    return "RUN " + json.dumps(["/bin/sh", "-c", command])


@dataclass(frozen=True)
class Definition:
    """What a bake file is written from."""

    base: BuildSpec
    base_contexts: Mapping[str, str]
    """What stands for an image that the builder could not get, by its reference."""
    recipe: Recipe
    folder: Path
    """Where the Dockerfile, the context ``work`` and the file with the environment are."""
    contexts: Mapping[str, Path]
    syntax: str | None = None
    secrets: Mapping[str, Path] = field(default_factory=dict)
    """More files that steps see, by their IDs; those of ``SECRETS`` that there are."""
    ssh_agent: Path | None = None
    label_values: Mapping[str, str] | None = None
    tags: Sequence[str] = ()
    output: str = ""
    attestations: Sequence[str] = ()
    cache_from: Sequence[str] = ()
    cache_to: Sequence[str] = ()


def bake_file(definition: Definition) -> str:
    """The bake file, in JSON."""
    base, recipe = definition.base, definition.recipe
    shared: dict[str, Any] = {
        "platforms": [str(platform) for platform in recipe.platforms],
        "cache-from": list(definition.cache_from),
        "attest": ["type=provenance,disabled=true"],
    }
    steps = {
        **shared,
        "context": str(definition.folder / "empty"),
        "dockerfile": str(definition.folder / "Dockerfile"),
        "contexts": {
            "base": "target:base",
            **{name: str(path) for name, path in definition.contexts.items()},
        },
        "args": {
            **({"BUILDKIT_SYNTAX": definition.syntax} if definition.syntax else {}),
            **(definition.label_values or {}),
        },
        "secret": [
            _secret(ENVIRONMENT, definition.folder / ENVIRONMENT),
            *(_secret(_secret_id(name), path) for name, path in definition.secrets.items()),
        ],
        **({"ssh": [f"default={definition.ssh_agent}"]} if definition.ssh_agent else {}),
        **_network(recipe.network, "security.insecure"),
    }
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
        ASKED_TARGET: {**steps, "target": ASKED_TARGET, "output": [_local(definition.folder)]},
        REPORTS_TARGET: {**steps, "target": REPORTS_TARGET, "output": [_local(definition.folder)]},
        IMAGE_TARGET: {
            **steps,
            "target": IMAGE_TARGET,
            "tags": list(definition.tags),
            "output": [definition.output] if definition.output else [],
            "cache-to": list(definition.cache_to),
            "attest": _attestations(definition.attestations),
        },
    }
    return json.dumps(_escaped({"target": target}), indent=2)


def _network(network: str | None, *entitlements: str) -> dict[str, Any]:
    wanted = [*entitlements, *(["network.host"] if network == "host" else [])]
    return {
        **({"network": network} if network else {}),
        **({"entitlements": wanted} if wanted else {}),
    }


def _secret_id(name: str) -> str:
    return name.replace("/", "-").replace(".", "")


def _secret(name: str, path: Path) -> str:
    return f"id={name},{csv_field(f'src={path}')}"


def _local(folder: Path) -> str:
    return ",".join(["type=local", csv_field(f"dest={folder / 'reports'}")])


def _attestations(wanted: Sequence[str]) -> list[str]:
    provenance = (
        "type=provenance,mode=min" if "provenance" in wanted else ("type=provenance,disabled=true")
    )
    return [provenance, *(["type=sbom"] if "sbom" in wanted else [])]


def _escaped(value: Any) -> Any:
    """Let bake take text as it is: in its strings ``${...}`` and ``%{...}`` are templates."""
    if isinstance(value, str):
        return value.replace("${", "$${").replace("%{", "%%{")
    if isinstance(value, dict):
        return {name: _escaped(each) for name, each in value.items()}
    return [_escaped(each) for each in value] if isinstance(value, list) else value
