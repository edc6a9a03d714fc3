"""Weather: whether there are substitutes, before hours are spent on building."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from guix_tasks.errors import CheckError
from guix_tasks.oci.platform import Platform
from guix_tasks.stages.lifecycle import Lifecycle, Wishes
from guix_tasks.stages.substitutes import forecast
from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.guix import Forecast
    from guix_tasks.stages.project import Project


def weather(project: Project, *, as_json: bool = False) -> None:
    """Print what has a substitute, for each of ``PLATFORMS``.

    The Guix of the stage that ``install`` starts from is asked, for the engine's own platform: it
    knows of all systems.  Raises ``CheckError`` where something has none.
    """
    platforms = project.settings.platforms
    own = replace(project, settings=replace(project.settings, platforms=()))
    image = Lifecycle(own).parent_image("install", Wishes())
    systems = [each.guix_system for each in platforms or (Platform.parse(image.platform),)]
    found = forecast(own, image, list(dict.fromkeys(systems)))
    for line in (
        [json.dumps([_entry(each) for each in found], indent=2)] if as_json else _lines(found)
    ):
        project.console.result(line)
    lacking = [f"{each.system} ({' '.join(each.missing)})" for each in found if each.missing]
    if lacking:
        raise CheckError(f"weather: not all has a substitute for {', '.join(lacking)}")


def _entry(found: Forecast) -> dict[str, object]:
    return {
        "system": found.system,
        "wanted": found.wanted,
        "missing": found.missing,
        "items": found.items,
        "download_bytes": found.packed,
        "download_unknown_items": found.unknown,
        "store_bytes": found.unpacked,
    }


def _lines(forecasts: list[Forecast]) -> Iterator[str]:
    for found in forecasts:
        there = len(found.wanted) - len(found.missing)
        yield f"{found.system}: {there} of {len(found.wanted)} available, {_sizes(found)}"
        for name in found.missing:
            state = "not for this system" if found.wanted[name] == "unsupported" else "missing"
            yield f"  {state}: {name}"


def _sizes(found: Forecast) -> str:
    if not found.items:
        return "nothing to download"
    download = f"{human_size(found.packed)} to download"
    if found.unknown:
        download = f"at least {download}" if found.packed else "a download of unknown size"
    return f"{download} ({human_size(found.unpacked)} of store items)"
