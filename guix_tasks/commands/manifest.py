"""Join the images of all platforms to a multi-platform ``IMAGE``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from guix_tasks.buildkit.buildx import with_accounts
from guix_tasks.engine.accounts import accounts_for
from guix_tasks.engine.retry import retry_call
from guix_tasks.errors import BuilderError, RegistryError, UsageError
from guix_tasks.oci.reference import ImageReference
from guix_tasks.stages.push_records import load, records_directory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.oci.platform import Platform
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.stages.push_records import Pushed


def join(project: Project, buildx: Buildx) -> str:
    """Push an index of the platforms' images as ``IMAGE`` and ``TAGS`` and return its digest.

    With ``PLATFORMS``, join exactly those platforms, else all that have a push record.

    Raise ``UsageError`` if the push records are incomplete or inconsistent, and ``RegistryError``
    if the registry refuses.
    """
    settings, console = project.settings, project.console
    if not buildx.perform and not load(settings):
        # In a dry run the pushes wrote no records either.
        console.print(f"manifest: {records_directory(settings)} contains no push record yet")
        return ""
    parts = _parts(settings)
    image = settings.image
    for platform, part in parts.items():
        console.print(f"manifest: {platform} is {part.reference}")
    sources = list(dict.fromkeys(part.reference for part in parts.values()))
    buildx = with_accounts(buildx, accounts_for(project.engine, settings), image.registry)

    def attempt() -> str:
        try:
            buildx.change(
                "imagetools", "create", f"--builder={buildx.own}", "--progress=none",
                *(f"--tag={reference}" for reference in settings.references), *sources,
            )  # fmt: skip
            return buildx.ask(
                "imagetools", "inspect", f"--builder={buildx.own}", "--format={{json .Manifest}}",
                str(image),
            ) if buildx.perform else ""  # fmt: skip
        except (BuilderError, RegistryError) as error:
            failed = RegistryError(
                f"cannot join {image}: {error}; if an image is missing, push its platform again"
            )
            failed.is_transient = error.is_transient
            raise failed from None

    output = retry_call(console, "the join", attempt)
    if not buildx.perform:
        return ""
    try:
        digest = json.loads(output)["digest"]
        return str(ImageReference.parse(f"{image.name}@{digest}").digest)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise RegistryError(
            f"{image} is joined, but the registry reports no digest; "
            f"`docker buildx imagetools inspect {image}` shows the manifest"
        ) from None


def _parts(settings: Settings) -> dict[Platform, Pushed]:
    """Return the push record of each platform to join."""
    records: dict[Platform, tuple[Path, Pushed]] = {}
    directory = records_directory(settings)
    for path, pushed in load(settings).items():
        if pushed.repository != settings.image.name:
            continue
        for platform in pushed.platforms:
            if platform in records:
                raise UsageError(
                    f"{platform} is in {records[platform][0]} and in {path}; delete the older file"
                )
            records[platform] = (path, pushed)
    if not records:
        raise UsageError(
            f"{directory} contains no push record of {settings.image.name}; "
            "`PLATFORMS=... inv push` or `inv buildx.build --by-digest` writes one"
        )
    missing = [str(platform) for platform in settings.platforms if platform not in records]
    if missing:
        raise UsageError(
            f"{directory} contains no push record of {', '.join(missing)}: it was not pushed, or "
            "the file of its job was not copied to this machine"
        )
    platforms = settings.platforms or tuple(records)
    for path, pushed in map(records.__getitem__, platforms):
        if surplus := [str(platform) for platform in pushed.platforms if platform not in platforms]:
            raise UsageError(
                f"{path} also contains {', '.join(surplus)}, which is not in PLATFORMS; add it to "
                "PLATFORMS, or push the other platforms separately"
            )
    parts = {platform: records[platform][1] for platform in platforms}
    _check_commits(parts)
    return parts


def _check_commits(parts: Mapping[Platform, Pushed]) -> None:
    """Raise ``UsageError`` if jobs without a lock built platforms from different commits."""
    built_from = [(platform, part.commits) for platform, part in parts.items() if part.commits]
    for platform, commits in built_from:
        first, expected = built_from[0]
        for name in expected.keys() & commits.keys():
            if commits[name] != expected[name]:
                raise UsageError(
                    f"{first} was built from {name} at {expected[name]:.7}, {platform} at "
                    f"{commits[name]:.7}; commit GUIX_CHANNELS_LOCK, which `inv pull` writes, and "
                    "push all platforms again"
                )
