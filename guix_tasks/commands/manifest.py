"""Manifest: what was pushed for each platform, joined under ``IMAGE``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from guix_tasks.buildkit.buildx import refuse_without_accounts, with_accounts
from guix_tasks.engine.credentials import accounts_for
from guix_tasks.errors import BuilderError, RegistryError, UsageError
from guix_tasks.stages.push_records import folder_of, load

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.oci.platform import Platform
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.stages.push_records import Pushed


def join(project: Project, buildx: Buildx) -> str:
    """Make ``IMAGE`` and ``TAGS`` an index of what the platforms' jobs pushed; its digest.

    With ``PLATFORMS`` exactly those are joined, and it is an error if one is missing.  Raises
    ``UsageError`` and ``RegistryError``.
    """
    settings, console = project.settings, project.console
    if not buildx.perform and not load(settings):
        # The pushes before it were left at being shown, too.
        console.say(f"manifest: nothing is in {folder_of(settings)} yet")
        return ""
    parts = _parts(settings)
    image = settings.image
    for platform, part in parts.items():
        console.say(f"manifest: {platform} is {part.reference}")
    sources = list(dict.fromkeys(part.reference for part in parts.values()))
    accounts = accounts_for(project.engine, settings)
    refuse_without_accounts(buildx, accounts, image.registry)
    program = with_accounts(buildx, accounts)
    try:
        program.change(
            "imagetools", "create", f"--builder={buildx.own}", "--progress=none",
            *(f"--tag={each}" for each in settings.references), *sources,
        )  # fmt: skip
        if not buildx.perform:
            return ""
        said = program.ask(
            "imagetools", "inspect", f"--builder={buildx.own}", "--format={{json .Manifest}}",
            str(image),
        )  # fmt: skip
    except (BuilderError, RegistryError) as error:
        raise RegistryError(
            f"cannot join {image}: {error}; where an image is gone, push its platform again"
        ) from None
    try:
        return str(json.loads(said)["digest"])
    except (ValueError, LookupError, TypeError):
        raise RegistryError(
            f"{image} is joined, but the registry does not say its digest; "
            f"`docker buildx imagetools inspect {image}` shows what is there"
        ) from None


def _parts(settings: Settings) -> dict[Platform, Pushed]:
    """What is to be joined, by platform."""
    found: dict[Platform, tuple[Path, Pushed]] = {}
    folder = folder_of(settings)
    for path, pushed in load(settings).items():
        if pushed.repository != settings.image.name:
            continue
        for platform in pushed.platforms:
            if platform in found:
                raise UsageError(
                    f"{platform} is in {found[platform][0]} and in {path}; delete the older one"
                )
            found[platform] = (path, pushed)
    if not found:
        raise UsageError(
            f"nothing of {settings.image.name} is in {folder}: `PLATFORMS=... inv push`, or "
            "`inv buildx.build --by-digest`, writes it there"
        )
    missing = [str(each) for each in settings.platforms if each not in found]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} is not in {folder}: it was not pushed, or its job's file was "
            "not brought here"
        )
    wanted = settings.platforms or tuple(found)
    for path, pushed in map(found.__getitem__, wanted):
        if surplus := [str(each) for each in pushed.platforms if each not in wanted]:
            raise UsageError(
                f"{path} has {', '.join(surplus)} too, which PLATFORMS does not name; add that to "
                "PLATFORMS, or push the others by themselves"
            )
    parts = {platform: found[platform][1] for platform in wanted}
    _refuse_mixture(parts)
    return parts


def _refuse_mixture(parts: Mapping[Platform, Pushed]) -> None:
    """Refuse platforms that were made of different commits, as jobs without a lock may be."""
    known = [(platform, part.commits) for platform, part in parts.items() if part.commits]
    for platform, commits in known:
        first, expected = known[0]
        for name in expected.keys() & commits.keys():
            if commits[name] != expected[name]:
                raise UsageError(
                    f"{first} was made of {name} at {expected[name]:.7}, {platform} at "
                    f"{commits[name]:.7}: commit GUIX_CHANNELS_LOCK, which `inv pull` writes, and "
                    "push all platforms again"
                )
