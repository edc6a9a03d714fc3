"""Status: the stages of a project and ``IMAGE``, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guix_tasks import guix
from guix_tasks.commands.sizes import picture, size_rows, sizes
from guix_tasks.errors import UsageError
from guix_tasks.stages.container import uncommitted
from guix_tasks.stages.images import CHANNELS_LABEL, HAND_MADE, SQUASH, proven_stage
from guix_tasks.stages.lifecycle import Lifecycle
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.commands.sizes import Size
    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Table

STATUS_HEADER = ("stage", "image", "id", "size", "age", "state", "channels")

_SPARED = ("id", "age", "channels")
"""What a narrow terminal does without, first to last."""


@dataclass(frozen=True)
class Standing:
    """A tag of the project: what it is, and how it stands with it."""

    stage: str
    """The stage that the tag is of, or ``IMAGE``."""
    reference: str
    image: Image | None
    state: str
    """Of a stage ``up to date``, ``stale`` or ``missing``; of ``IMAGE`` what it stands for."""
    why: str = ""
    """Why a stage is stale."""


def standings(project: Project) -> list[Standing]:
    """Each stage, then ``IMAGE``."""
    ledger, lifecycle = project.ledger, Lifecycle(project)
    found = []
    for stage in ledger.stages:
        state = lifecycle.state(stage)
        word = "missing" if not state.image else "stale" if state.why else "up to date"
        why = state.why if state.image and state.why else ""
        found.append(Standing(stage, ledger.tag(stage), state.image, word, why))
    reference = str(ledger.image)
    image = project.engine.image(reference)
    return [*found, Standing("IMAGE", reference, image, _stands_for(project, image))]


def show_status(project: Project, *, size: bool, plot: str, as_json: bool) -> None:
    """Show the stages of each platform, or what is in ``IMAGE``; or both as JSON, for a machine."""
    if as_json:
        parts = sizes(project) if size or plot else None
        _draw(project, parts or [], plot)
        project.console.result(json.dumps(_document(project, parts), indent=2))
    elif size or plot:
        show_sizes(project, plot)
    else:
        rows = [row for each in project.each_platform() for row in status_rows(each)]
        project.console.table(STATUS_HEADER, rows, narrower=_narrower(rows))
    if left := uncommitted(project.engine, project.settings):
        project.console.note(left)


def _document(project: Project, parts: list[Size] | None) -> dict[str, Any]:
    """What docs/how-to/engines.md describes, for machines: no key of it is to be renamed."""
    info = project.engine.info()
    engine = {
        "product": info.product,
        "version": info.version,
        "platform": info.platform,
        "url": info.url,
        "origin": info.origin,
        "rootless": info.is_rootless,
        "storage_driver": info.storage_driver,
    }
    stages = [_entry(each, found) for each in project.each_platform() for found in standings(each)]
    whole = {"engine": engine, "stages": stages}
    return whole if parts is None else {**whole, "parts": [asdict(each) for each in parts]}


def _entry(project: Project, found: Standing) -> dict[str, Any]:
    image = found.image
    return {
        "stage": found.stage,
        "platform": str(project.settings.platform or project.engine.info().platform),
        "image": found.reference,
        "id": image and image.id,
        "state": found.state,
        "why": found.why or None,
        "size": image and image.size,
        "created": image and (image.created or None),
        "channels": guix.commits(image.labels.get(CHANNELS_LABEL, "")) if image else {},
    }


def status_rows(project: Project) -> list[tuple[str, ...]]:
    """A row for each stage and one for ``IMAGE``."""
    return [
        (each.stage, *_cells(each.reference, each.image, f"{each.state}{why}"))
        for each in standings(project)
        for why in [f": {each.why}" if each.why else ""]
    ]


def _narrower(rows: list[tuple[str, ...]]) -> Iterator[Table]:
    """The table with the tags alone, for one project has one name, then without some columns."""
    short = [(stage, reference.rpartition(":")[2], *rest) for stage, reference, *rest in rows]
    for count in range(len(_SPARED) + 1):
        kept = [name not in _SPARED[:count] for name in STATUS_HEADER]
        yield tuple(compress(STATUS_HEADER, kept)), [tuple(compress(row, kept)) for row in short]


def _cells(reference: str, image: Image | None, state: str) -> tuple[str, ...]:
    if image is None:
        return (reference, "-", "-", "-", state, "-")
    commits = guix.commits(image.labels.get(CHANNELS_LABEL, ""))
    channels = " ".join(f"{name}@{commit[:7]}" for name, commit in commits.items()) or "-"
    identity = image.id.removeprefix("sha256:")[:12]
    return (reference, identity, human_size(image.size), _age(image), state, channels)


def _age(image: Image) -> str:
    """How old an image is; its date is what whoever made it says."""
    try:
        made = datetime.fromisoformat(image.created[:19]).replace(tzinfo=timezone.utc)
    except ValueError:
        return "-"
    return human_time((datetime.now(timezone.utc) - made).total_seconds())


def _stands_for(project: Project, image: Image | None) -> str:
    if image is None:
        return "missing"
    for stage in (*project.ledger.stages, SQUASH):
        found = project.ledger.find(stage)
        if found and found.id == image.id:
            return f"stage {stage}"
    proven = proven_stage(image)
    if proven == HAND_MADE:
        return "made by hand"
    return f"an earlier {proven}" if proven else "not made here"


def show_sizes(project: Project, plot: str) -> None:
    """Show what is in ``IMAGE``, as a table, and as a picture in the file ``plot`` names."""
    parts = sizes(project)
    project.console.table(("part", "name", "size"), size_rows(parts))
    _draw(project, parts, plot)


def _draw(project: Project, parts: list[Size], plot: str) -> None:
    if plot:
        try:
            Path(plot).write_text(picture(str(project.ledger.image), parts), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--plot: {plot}: {error.strerror}; name another file") from None
