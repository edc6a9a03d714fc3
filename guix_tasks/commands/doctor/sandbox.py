"""Check whether Guix builds in a work container."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from guix_tasks.commands.doctor.finding import Finding, failed, from_error, note, ok
from guix_tasks.errors import EngineError, UsageError, full_disk
from guix_tasks.stages.container import check_native_platform
from guix_tasks.stages.sandbox import OTHER_FAULTS, probe

if TYPE_CHECKING:
    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project

PRIVILEGES_FIX = "use an engine that allows privileged containers, or try GUIX_SANDBOX=nochroot"


def check_sandbox(project: Project) -> Finding:
    """Build a tiny derivation in a work container with the sandbox of the stages."""
    engine, settings = project.engine, project.settings
    kind = settings.guix_sandbox.value
    if engine.is_dry:
        return note(f"{kind}: not tested in a dry run")
    try:
        check_native_platform(engine, settings)
    except UsageError as error:
        # BuildKit may have a node for this platform.
        return replace(from_error(error), state="note")
    if base_stage := project.ledger.find("base"):
        return _build(project, base_stage)
    image = engine.image(str(settings.base_image))
    if image is None or not image.platform.startswith(str(settings.platform or "")):
        return note(f"{kind}: not tested, because the engine has no image with Guix")
    found = _build(project, image)
    if "no guix-daemon" not in found.message:
        return found
    # The Dockerfile may install Guix.
    return note(
        f"{kind}: not tested, because {settings.base_image} does not contain Guix",
        "`inv base` builds an image with Guix if the Dockerfile installs it",
    )


def _build(project: Project, image: Image) -> Finding:
    try:
        settings = project.with_sandbox(image).settings
        problem = probe(project.engine, settings, image)
    except EngineError as error:
        found = from_error(error)
        refused = not found.fix and re.search("privileged|permitted|denied", found.message)
        return replace(found, fix=PRIVILEGES_FIX) if refused else found
    kind = settings.guix_sandbox.value
    if problem is None:
        return ok(f"{kind}: Guix builds in a work container")
    fixes = (fix for words, fix in OTHER_FAULTS.items() if words in problem)
    fix = full_disk(problem).removeprefix("; ") or next(fixes, PRIVILEGES_FIX)
    return failed(f"{kind}: Guix cannot build in a work container: {problem}", fix)
