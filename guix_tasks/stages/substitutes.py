"""Which substitutes there are for what is to be installed, asked in a work container."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.errors import CheckError, StageError, UsageError
from guix_tasks.files import read_file
from guix_tasks.oci.platform import Platform
from guix_tasks.stages.container import FOLDER, IMAGE_FOLDER, Work, work_container
from guix_tasks.stages.runner import run_again

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project


def forecast(
    project: Project, image: Image, systems: Sequence[str], packages: Sequence[str] = ()
) -> list[guix.Forecast]:
    """Ask for ``GUIX_MANIFEST`` and ``GUIX_PACKAGES``, or these packages, with an image's Guix.

    Nothing is fetched, and nothing committed.  Nothing is found on a dry run.  Raises
    ``UsageError`` where nothing is wanted, and ``StageError`` where Guix fails or no server
    answers.
    """
    settings = project.settings
    manifest, packages = settings.guix_manifest, packages or settings.guix_packages
    if not manifest and not packages:
        raise UsageError(
            "nothing to ask for: set GUIX_PACKAGES or GUIX_MANIFEST, or say `--package NAME`"
        )
    project = project.settled(image)
    near = project.nearby("weather")
    theirs = f"{FOLDER}/manifest.scm" if manifest else None
    argv = guix.weather_argv(f"{FOLDER}/weather.scm", systems, theirs, packages)
    files = {
        "stage": f"#!/bin/sh\nexec {shlex.join(argv)}\n".encode(),
        "weather.scm": (IMAGE_FOLDER / "weather.scm").read_bytes(),
        **({"manifest.scm": read_file(manifest)} if manifest else {}),
        # Not the daemon asks, and this container is never committed.
        **({"keys/nearby.pub": near.key} if near else {}),
    }
    work = Work("weather", (f"{FOLDER}/stage",), files, nearby=near)
    with work_container(project.engine, project.settings, image.id, work) as container:
        found = guix.forecasts(run_again(project, container, work))
    if len(found) != len(systems) and not project.engine.is_dry:
        raise StageError("weather: Guix did not say what there is; the output above says why")
    return found


def require_substitutes(project: Project, image: Image, packages: Sequence[str]) -> None:
    """Refuse to go on with ``install`` where something would be built.

    Raises ``CheckError``, and what ``forecast`` raises.
    """
    system = Platform.parse(image.platform).guix_system
    for found in forecast(project, image, [system], packages):
        if found.missing:
            raise CheckError(
                f"install: no substitute for {' '.join(found.missing)}, and "
                "GUIX_REQUIRE_SUBSTITUTES is set: try again when `inv weather` finds them, or set "
                "it to no"
            )
