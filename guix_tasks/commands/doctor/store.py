"""Check the volumes with warm stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.commands.doctor.finding import Finding, failed, note, ok
from guix_tasks.stages.store import check_store, store_volumes

if TYPE_CHECKING:
    from guix_tasks.stages.project import Project


def check_stores(project: Project) -> Finding | None:
    """Check the databases of the project's warm stores; None if it has none yet."""
    if not project.settings.cache_volume:
        return note("CACHE_VOLUME is empty, so each stage starts cold", "set CACHE_VOLUME")
    volumes, image = store_volumes(project), project.ledger.find("base")
    if not volumes:
        return None
    if image is None or project.engine.is_dry:
        return note(f"{', '.join(volumes)}: not checked, because there is no base stage")
    for volume in volumes:
        if error_line := check_store(project, volume, image):
            return failed(
                f"the database of the volume {volume} is damaged: {error_line}",
                f"remove it with `docker volume rm {volume}`, and the next run creates it again",
            )
    return ok(f"{', '.join(volumes)}: the database is intact")
