"""Stage install: the packages, on top of what the base's profile has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.errors import UsageError
from guix_tasks.files import read_file
from guix_tasks.stages.container import FOLDER
from guix_tasks.stages.images import PACKAGES_LABEL
from guix_tasks.stages.stage import Stage

if TYPE_CHECKING:
    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings


ASKED_LABEL = "org.guix-tasks.asked"
"""The packages that ``install --package`` was given, in the place of ``GUIX_PACKAGES``."""


def install_stage(settings: Settings, given: tuple[str, ...] = ()) -> Stage:
    """``guix package`` of ``GUIX_MANIFEST``, and of ``GUIX_PACKAGES`` or the ``given`` ones.

    Raises ``UsageError`` where both are empty.
    """
    manifest, packages = settings.guix_manifest, given or settings.guix_packages
    if not manifest and not packages:
        raise UsageError(
            "nothing to install: set GUIX_PACKAGES or GUIX_MANIFEST, or say `--package NAME`"
        )
    files = {}
    if manifest:
        files["manifest.scm"] = read_file(manifest)
        files["profile.scm"] = guix.union_manifest(f"{FOLDER}/manifest.scm").encode()
    asked = {ASKED_LABEL: " ".join(packages if given else ())}
    return Stage(
        name="install",
        commands=[guix.install_argv(f"{FOLDER}/profile.scm" if manifest else None, packages)],
        report=guix.list_installed_argv(),
        labels=lambda report: {PACKAGES_LABEL: " ".join(guix.installed(report)), **asked},
        files=files,
    )


def given_packages(image: Image | None) -> tuple[str, ...]:
    """The packages that an install image was made with by ``--package``."""
    return tuple(image.labels.get(ASKED_LABEL, "").split()) if image else ()
