"""Report which packages have substitutes and which must be built."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from guix_tasks.errors import CheckError
from guix_tasks.oci.platform import Platform
from guix_tasks.stages.lifecycle import Lifecycle, StageOptions
from guix_tasks.stages.substitutes import forecast
from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.guix import Forecast
    from guix_tasks.stages.project import Project


def weather(project: Project, *, as_json: bool = False) -> None:
    """Print the available substitutes for each of ``PLATFORMS``.

    Guix of the parent image of ``install`` queries the servers. It runs on the engine's platform
    and can query for every system.

    Raise ``CheckError`` if a substitute is missing.
    """
    platforms = project.settings.platforms
    native = replace(project, settings=replace(project.settings, platforms=()))
    image = Lifecycle(native).parent_image("install", StageOptions())
    systems = [platform.guix_system for platform in platforms or (Platform.parse(image.platform),)]
    forecasts = forecast(native, image, list(dict.fromkeys(systems)))
    if as_json:
        project.console.result(json.dumps([_json_entry(result) for result in forecasts], indent=2))
    else:
        for line in _lines(forecasts):
            project.console.result(line)
    missing = [f"{r.system} ({' '.join(r.missing)})" for r in forecasts if r.missing]
    if missing:
        raise CheckError(f"weather: substitutes are missing for {', '.join(missing)}")


def _json_entry(result: Forecast) -> dict[str, object]:
    return {
        "system": result.system,
        "wanted": result.wanted,
        "missing": result.missing,
        "items": result.items,
        "download_bytes": result.packed,
        "download_unknown_items": result.unknown,
        "store_bytes": result.unpacked,
    }


def _lines(forecasts: list[Forecast]) -> Iterator[str]:
    for result in forecasts:
        available = len(result.wanted) - len(result.missing)
        yield f"{result.system}: {available} of {len(result.wanted)} available, {_sizes(result)}"
        for name in result.missing:
            state = "not for this system" if result.wanted[name] == "unsupported" else "missing"
            yield f"  {state}: {name}"


def _sizes(result: Forecast) -> str:
    if not result.items:
        return "nothing to download"
    download = f"{human_size(result.packed)} to download"
    if result.unknown:
        download = f"at least {download}" if result.packed else "a download of unknown size"
    return f"{download} ({human_size(result.unpacked)} of store items)"
