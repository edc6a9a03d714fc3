"""Show the stages of a project and ``IMAGE`` as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guix_tasks import guix
from guix_tasks.commands.sizes import picture, sizes
from guix_tasks.errors import UsageError
from guix_tasks.stages.container import image_platform, uncommitted
from guix_tasks.stages.images import CHANNELS_LABEL, HAND_MADE, SQUASH, proven_stage
from guix_tasks.stages.install import given_packages
from guix_tasks.stages.lifecycle import Lifecycle
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from guix_tasks.commands.sizes import Size
    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Table

STATUS_HEADER = ("stage", "image", "id", "size", "age", "state", "channels")

_OPTIONAL_COLUMNS = ("id", "age", "channels")
"""Columns that a narrow terminal omits, in this order."""

_FIRST_YEAR = 2013
"""Year of the first Docker images."""


@dataclass(frozen=True)
class TagStatus:
    """Status of one tag of the project."""

    stage: str
    """Stage of the tag, or ``IMAGE``."""
    reference: str
    image: Image | None
    state: str
    """``up to date``, ``stale`` or ``missing``; for ``IMAGE`` a description of its origin."""
    reason: str = ""
    """Reason why a stage is stale."""
    follows: bool = False
    """Whether the reason is about an earlier stage."""


def tag_statuses(project: Project) -> list[TagStatus]:
    """Return the status of each stage and of ``IMAGE``."""
    ledger, lifecycle = project.ledger, Lifecycle(project)
    statuses = []
    for stage in ledger.stages:
        state = lifecycle.state(stage)
        follows = state.stale_stage != stage
        statuses.append(
            TagStatus(stage, ledger.tag(stage), state.image, state.word, state.why or "", follows)
        )
    reference = str(ledger.image)
    image = project.engine.image(reference)
    return [*statuses, TagStatus("IMAGE", reference, image, _origin(project, image))]


def show_status(
    project: Project, *, size: bool = False, plot: str = "", as_json: bool = False
) -> None:
    """Show the stages of each platform or the sizes of ``IMAGE``, or both as JSON.

    Also draw the sizes in the SVG file ``plot``, if it is set.
    """
    parts = sizes(project) if size or plot else None
    if as_json:
        project.console.result(json.dumps(_document(project, parts), indent=2))
    elif parts is not None:
        table = [(part.group, part.name, human_size(part.size)) for part in parts]
        project.console.table(("part", "name", "size"), table)
    else:
        statuses = [
            status for platform in project.each_platform() for status in tag_statuses(platform)
        ]
        project.console.print(next_run(statuses))
        for note in _notes(project):
            project.console.note(note)
        rows = status_rows(statuses)
        project.console.table(STATUS_HEADER, rows, narrower=_narrower_tables(rows))
    if plot:
        _write_plot(project, parts or [], plot)
    if note := uncommitted(project.engine, project.settings):
        project.console.note(note)


def _notes(project: Project) -> Iterator[str]:
    """Yield what the states of the stages do not show."""
    ledger = project.ledger
    image = project.engine.image(str(ledger.image))
    if image and ledger.is_rolled_back(image):
        yield (
            f"{ledger.image} is the image before the newest, after `inv rollback`; the next run of "
            "a stage moves it to the newest again"
        )
    if packages := given_packages(ledger.find("install")):
        yield f"install was run with --package: {' '.join(packages)}, not with GUIX_PACKAGES"


def _document(project: Project, parts: list[Size] | None) -> dict[str, Any]:
    """Return the JSON document of docs/how-to/engines.md. Its keys must not change."""
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
    stages = [
        _json_entry(platform, status)
        for platform in project.each_platform()
        for status in tag_statuses(platform)
    ]
    document = {"engine": engine, "stages": stages}
    return document if parts is None else {**document, "parts": [asdict(part) for part in parts]}


def _json_entry(project: Project, status: TagStatus) -> dict[str, Any]:
    image = status.image
    return {
        "stage": status.stage,
        "platform": image_platform(project.engine, project.settings),
        "image": status.reference,
        "id": image and image.id,
        "state": status.state,
        "why": status.reason or None,
        "size": image and image.size,
        "created": image and (image.created or None),
        "channels": guix.commits(image.labels.get(CHANNELS_LABEL, "")) if image else {},
    }


def next_run(statuses: Sequence[TagStatus]) -> str:
    """Describe what a call of all stages would do, for all platforms."""
    # A dictionary, because each platform has a status of each stage.
    runs: dict[str, str] = {}
    for status in statuses:
        if status.stage != "IMAGE" and status.state != "up to date":
            reason = "" if status.follows else status.reason
            runs[status.stage] = runs.get(status.stage) or reason
    if not runs:
        return "all stages are up to date: `inv push` would run none of them"
    stages = [f"{stage} ({reason})" if reason else stage for stage, reason in runs.items()]
    return f"`inv {' '.join(runs)} push` would run {', '.join(stages)}"


def status_rows(statuses: Iterable[TagStatus]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for status in statuses:
        image = status.image
        state = f"{status.state}: {status.reason}" if status.reason else status.state
        cells = ("-", "-", "-", state, "-")
        if image:
            commits = guix.commits(image.labels.get(CHANNELS_LABEL, ""))
            channels = " ".join(f"{name}@{commit[:7]}" for name, commit in commits.items()) or "-"
            identity = image.id.removeprefix("sha256:")[:12]
            cells = (identity, human_size(image.size), _age(image), state, channels)
        rows.append((status.stage, status.reference, *cells))
    return rows


def _narrower_tables(rows: list[tuple[str, ...]]) -> Iterator[Table]:
    """Yield the table with tags instead of references, then with ever fewer columns."""
    rows = [(stage, reference.rpartition(":")[2], *rest) for stage, reference, *rest in rows]
    for count in range(len(_OPTIONAL_COLUMNS) + 1):
        kept = [name not in _OPTIONAL_COLUMNS[:count] for name in STATUS_HEADER]
        yield tuple(compress(STATUS_HEADER, kept)), [tuple(compress(row, kept)) for row in rows]


def _age(image: Image) -> str:
    """Return the age of an image, or "-" if its builder wrote no date.

    Reproducible builders write a fixed one, for example of 1970.
    """
    try:
        created = datetime.fromisoformat(image.created[:19]).replace(tzinfo=timezone.utc)
    except ValueError:
        return "-"
    if created.year < _FIRST_YEAR:
        return "-"
    return human_time((datetime.now(timezone.utc) - created).total_seconds())


def _origin(project: Project, image: Image | None) -> str:
    if image is None:
        return "missing"
    for stage in (*project.ledger.stages, SQUASH):
        stage_image = project.ledger.find(stage)
        if stage_image and stage_image.id == image.id:
            return f"stage {stage}"
    former_stage = proven_stage(image)
    if former_stage == HAND_MADE:
        return "made by hand"
    return f"an earlier {former_stage}" if former_stage else "not made here"


def _write_plot(project: Project, parts: list[Size], plot: str) -> None:
    try:
        Path(plot).write_text(picture(str(project.ledger.image), parts), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"--plot: cannot write {plot}: {error.strerror}; use another file"
        ) from None
