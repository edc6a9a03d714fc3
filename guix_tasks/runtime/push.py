"""Push the runtime image, and compare it with what the registry has."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.engine.retry import retry_call
from guix_tasks.errors import CheckError, RegistryError
from guix_tasks.files import temporary_directory, write_whole
from guix_tasks.runtime.image import (
    build,
    image_name,
    install_image,
    layout_directory,
    make,
    required_image,
)
from guix_tasks.runtime.layout import CONTENT, Layout
from guix_tasks.runtime.skopeo import copy, find_skopeo, inspect

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from guix_tasks.stages.project import Project

REFERENCE_FILE = "runtime-image.txt"
"""File in ``out/`` with the name and the digest of the pushed image, for a job that signs it."""

_NAMED_ITEMS = 5
"""Maximum store items that an error names."""


def push(project: Project) -> str:
    """Bring the runtime image up to date, push it, and return its name with its digest.

    On GitHub it is also the output ``runtime-image`` of the step. Return nothing in a dry run.

    Raise ``UsageError`` without skopeo, and ``RegistryError`` if the registry refuses.
    """
    settings, console = project.settings, project.console
    image = required_image(settings)
    find_skopeo()
    digest = build(project)
    if project.engine.is_dry:
        return ""
    source = f"oci:{layout_directory(settings)}:{image_name(install_image(project))}"
    with console.step("runtime.push") as step:
        retry_call(console, "the push", partial(copy, project, source, image, step.log))
    reference = f"{image.name}@{digest}"
    write_whole(settings.output_directory / REFERENCE_FILE, f"{reference}\n".encode())
    if path := os.environ.get("GITHUB_OUTPUT"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"runtime-image={reference}\n")
    return reference


def check(project: Project) -> str:
    """Make the runtime image again, without earlier layers, and compare it with the registry's.

    Return the digest of both; nothing in a dry run. Raise ``CheckError`` with the store items that
    differ.
    """
    image = required_image(project.settings)
    find_skopeo()
    with temporary_directory() as directory:
        layout = Layout(directory)
        manifest = make(project, install_image(project), layout, {})
        if not manifest:
            return ""
        own = layout.blob(manifest["digest"]).read_bytes()
    pushed = inspect(project, image)
    digest = f"sha256:{hashlib.sha256(pushed).hexdigest()}"
    if digest == manifest["digest"]:
        return digest
    try:
        difference = _difference(json.loads(own), json.loads(pushed))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RegistryError(
            f"runtime.check: {image} is no image of `inv runtime.push`; check RUNTIME_IMAGE"
        ) from None
    raise CheckError(f"runtime.check: {image} is {digest}, not {manifest['digest']}: {difference}")


def _difference(own: Mapping[str, Any], pushed: Mapping[str, Any]) -> str:
    """Return how the manifest in the registry differs from the one that was made now."""
    mine, others = _items(own), _items(pushed)
    parts = {
        "other content": [
            name for name in mine.keys() & others.keys() if mine[name] != others[name]
        ],
        "only here": mine.keys() - others.keys(),
        "only in the registry": others.keys() - mine.keys(),
    }
    texts = []
    for title, names in parts.items():
        if names:
            more = len(names) - _NAMED_ITEMS
            listed = ", ".join(sorted(names)[:_NAMED_ITEMS])
            texts.append(f"{title}: {listed}{f' and {more} more' if more > 0 else ''}")
    if not texts:
        layers = [layer["digest"] for layer in own["layers"]]
        same = layers == [layer["digest"] for layer in pushed["layers"]]
        texts = [
            "the settings of the image differ" if same else "the layers are packed differently"
        ]
    return "; ".join(texts)


def _items(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of the store items of an image, by their names."""
    lines = "".join(layer["annotations"][CONTENT] for layer in manifest["layers"])
    return {name: digest for name, _, digest in (line.partition(" ") for line in lines.split("\n"))}
