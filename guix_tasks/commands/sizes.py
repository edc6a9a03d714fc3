"""Sizes of an image: by stage, by layer, and of the largest store items."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from guix_tasks.commands.push import require_image
from guix_tasks.stages.container import shell_work, work_container
from guix_tasks.stages.lifecycle import Lifecycle
from guix_tasks.stages.runner import run_container
from guix_tasks.stages.store import LIVE_LABEL, VOLUME_MOUNT, bytes_above, store_volumes
from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project

LARGEST = 15
"""Number of store items to show."""


@dataclass(frozen=True)
class Size:
    """Size of a part of an image, in bytes when unpacked."""

    group: str
    name: str
    size: int


def sizes(project: Project) -> list[Size]:
    """Return the sizes of the stages, layers and largest store items of ``IMAGE``."""
    image = require_image(project)
    lifecycle, parts = Lifecycle(project), []
    totals: dict[str | None, int] = {}
    for stage in project.ledger.stages:
        stage_image = project.ledger.find(stage)
        if stage_image:
            parent_size = totals.get(lifecycle.parent_of(stage), 0)
            parts.append(Size("stage", stage, stage_image.size - parent_size))
            totals[stage] = stage_image.size
    for number, layer in enumerate(project.engine.layers(image.id), 1):
        command = " ".join(layer.made_by.split()).removeprefix("/bin/sh -c ") or "commit"
        parts.append(Size("layer", f"{number} {command[:60]}", layer.size))
    return [*parts, *_live_and_waste(project, image), *_store_items(project, image.id)]


def _live_and_waste(project: Project, image: Image) -> list[Size]:
    """Return what an assembled image needs on its base, and what deleted items take."""
    base, live = project.ledger.find("base"), image.labels.get(LIVE_LABEL, "")
    if base is None or not live.isdecimal():
        return []
    waste = max(0, bytes_above(project, image, base) - int(live))
    return [Size("store", "live", int(live)), Size("store", "waste", waste)]


def _store_items(project: Project, image: str) -> list[Size]:
    """Return the sizes of the volumes with warm stores and of the image's largest store items."""
    volumes = dict(enumerate(store_volumes(project)))
    # GNU and BusyBox du both support -k, kibibytes on disk.
    measure = "du -sk /gnu/store/*-* 2>/dev/null | sort -rn | head -n " + str(LARGEST)
    measure += f"; du -sk {VOLUME_MOUNT}/* 2>/dev/null || true"
    binds = tuple(f"{name}:{VOLUME_MOUNT}/{number}:ro" for number, name in volumes.items())
    work = shell_work("sizes", ("-c", measure), {}, binds)
    with work_container(project.engine, project.settings, image, work) as container:
        output = run_container(project, container, "sizes")
    # The image may contain any program with the name of du.
    sizes = re.findall(rf"^([0-9]{{1,15}})\t{VOLUME_MOUNT}/([0-9]{{1,3}})$", output, re.MULTILINE)
    stores = [
        Size("store", f"volume {volumes[int(number)]}", int(size) * 1024)
        for size, number in sizes
        if int(number) in volumes
    ]
    items = re.findall(r"^([0-9]{1,15})\t/gnu/store/.{32}-(.+)$", output, re.MULTILINE)
    return stores + [Size("store item", name, int(size) * 1024) for size, name in items]


ROW, LEFT, WIDTH, RIGHT, TOP = 22, 330, 420, 90, 44
"""Dimensions of the chart in pixels."""

COLOURS = {"stage": "#3b6ea5", "layer": "#7a9e3f", "store": "#8a5a9e", "store item": "#c07f2a"}


def picture(title: str, parts: list[Size]) -> str:
    """Draw an SVG bar chart with one bar per part, coloured by group."""
    widest = max((part.size for part in parts), default=1) or 1
    height = TOP + ROW * len(parts) + 12
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" '
            f'height="{height}" font-family="sans-serif" font-size="12">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="24" font-size="15">{escape(title)}</text>',
    ]
    for number, part in enumerate(parts):
        top = TOP + ROW * number
        bar = max(1, round(WIDTH * part.size / widest))
        name = f"{part.group}: {part.name}"[:48]
        lines += [
            f'<text x="{LEFT - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>',
            (
                f'<rect x="{LEFT}" y="{top + 2}" width="{bar}" height="{ROW - 6}" '
                f'fill="{COLOURS[part.group]}"/>'
            ),
            f'<text x="{LEFT + bar + 6}" y="{top + 14}">{human_size(part.size)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
