"""Stage install: the packages, on top of what the base's profile has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.errors import UsageError
from guix_tasks.ledger import PACKAGES_LABEL
from guix_tasks.stage import Stage
from guix_tasks.work import FOLDER

if TYPE_CHECKING:
    from guix_tasks.settings import Settings


def install_stage(settings: Settings) -> Stage:
    """``guix package`` of ``GUIX_MANIFEST`` and ``GUIX_PACKAGES``.

    Raises ``UsageError`` where both are empty.
    """
    manifest, packages = settings.guix_manifest, settings.guix_packages
    if not manifest and not packages:
        raise UsageError(
            "nothing to install: set GUIX_PACKAGES or GUIX_MANIFEST, or say `--package NAME`"
        )
    files = {}
    if manifest:
        files["manifest.scm"] = manifest.read_bytes()
        files["profile.scm"] = guix.union_manifest(f"{FOLDER}/manifest.scm").encode()
    return Stage(
        name="install",
        commands=[guix.install_argv(f"{FOLDER}/profile.scm" if manifest else None, packages)],
        report=guix.list_installed_argv(),
        labels=lambda report: {PACKAGES_LABEL: " ".join(guix.installed(report))},
        files=files,
    )
