"""Availability of substitutes for the packages to install, as ``guix weather`` reports it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.errors import CheckError, StageError, UsageError
from guix_tasks.files import read_file
from guix_tasks.oci.platform import Platform
from guix_tasks.stages.container import RESOURCES, WORK_DIRECTORY, Work, work_container
from guix_tasks.stages.runner import run_with_retries
from guix_tasks.stages.substitute_server import local_server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project


def forecast(
    project: Project, image: Image, systems: Sequence[str], packages: Sequence[str] = ()
) -> list[guix.Forecast]:
    """Query the substitutes of ``GUIX_MANIFEST`` and of ``packages`` or ``GUIX_PACKAGES``.

    An image's Guix does so in a work container that is not committed.  Return one forecast for
    each system, and none on a dry run.

    Raise ``UsageError`` if no packages are specified, and ``StageError`` if Guix fails or no
    substitute server answers.
    """
    settings = project.settings
    manifest, packages = settings.guix_manifest, packages or settings.guix_packages
    if not manifest and not packages:
        raise UsageError(
            "cannot query substitutes: no packages are specified; set GUIX_PACKAGES or "
            "GUIX_MANIFEST, or pass `--package NAME`"
        )
    project = project.with_sandbox(image)
    server = local_server(project, "weather")
    manifest_file = f"{WORK_DIRECTORY}/manifest.scm" if manifest else None
    argv = guix.weather_argv(f"{WORK_DIRECTORY}/weather.scm", systems, manifest_file, packages)
    files = {
        "stage": f"#!/bin/sh\nexec {shlex.join(argv)}\n".encode(),
        "weather.scm": (RESOURCES / "weather.scm").read_bytes(),
        **({"manifest.scm": read_file(manifest)} if manifest else {}),
        # Guix itself must trust the key, not only the daemon.  The key reaches no image, because
        # this container is never committed.
        **({"keys/local-server.pub": server.key} if server else {}),
    }
    work = Work("weather", (f"{WORK_DIRECTORY}/stage",), files, local_server=server)
    with work_container(project.engine, project.settings, image.id, work) as container:
        forecasts = guix.forecasts(run_with_retries(project, container, work))
    if len(forecasts) != len(systems) and not project.engine.is_dry:
        raise StageError("weather: Guix did not report all systems; see the output above")
    return forecasts


def require_substitutes(project: Project, image: Image, packages: Sequence[str]) -> None:
    """Raise ``CheckError`` if ``install`` would build a package, and the errors of ``forecast``."""
    system = Platform.parse(image.platform).guix_system
    for result in forecast(project, image, [system], packages):
        if result.missing:
            raise CheckError(
                f"install: no substitute for {' '.join(result.missing)}, and "
                "GUIX_REQUIRE_SUBSTITUTES is set; retry when `inv weather` finds them, or set "
                "GUIX_REQUIRE_SUBSTITUTES=no"
            )
