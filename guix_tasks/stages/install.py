"""Stage install: add packages to the profile of the base image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.errors import UsageError
from guix_tasks.files import read_file, read_text
from guix_tasks.stages.container import WORK_DIRECTORY
from guix_tasks.stages.images import PACKAGES_LABEL, SEARCH_PATHS_LABEL
from guix_tasks.stages.stage import Stage

if TYPE_CHECKING:
    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings


ASKED_LABEL = "org.guix-tasks.asked"
"""Packages of ``install --package``, which replace ``GUIX_PACKAGES``."""


def install_stage(settings: Settings, packages: tuple[str, ...] = ()) -> Stage:
    """Return the stage that installs ``GUIX_MANIFEST`` and ``packages`` or ``GUIX_PACKAGES``.

    Raise ``UsageError`` if there is nothing to install.
    """
    label = {ASKED_LABEL: " ".join(packages)}
    manifest, packages = settings.guix_manifest, packages or settings.guix_packages
    if not manifest and not packages:
        raise UsageError(
            "cannot install: no packages are specified; set GUIX_PACKAGES or GUIX_MANIFEST, or "
            "pass `--package NAME`"
        )
    files = {}
    if manifest:
        files["manifest.scm"] = read_file(manifest)
        files["profile.scm"] = guix.union_manifest(f"{WORK_DIRECTORY}/manifest.scm").encode()
    return Stage(
        name="install",
        commands=[
            guix.install_argv(f"{WORK_DIRECTORY}/profile.scm" if manifest else None, packages)
        ],
        report=guix.REPORT_PROFILE,
        labels=lambda report: {
            PACKAGES_LABEL: " ".join(guix.installed(report)),
            SEARCH_PATHS_LABEL: guix.search_paths(report),
            **label,
        },
        files=files,
        is_pure=manifest is None or guix.is_plain_manifest(read_text(manifest)),
    )


def given_packages(image: Image | None) -> tuple[str, ...]:
    """Return the packages of ``--package`` that an install image was made with."""
    return tuple(image.labels.get(ASKED_LABEL, "").split()) if image else ()
