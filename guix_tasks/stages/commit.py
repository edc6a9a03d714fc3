"""Commit a container as an image of the project."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from guix_tasks import guix
from guix_tasks.errors import EngineError
from guix_tasks.oci.labels import oci_annotations
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.container import PROJECT_LABEL
from guix_tasks.stages.images import (
    IMAGE_LABEL,
    LAYERS_LABEL,
    SEARCH_PATHS_LABEL,
    STAGE_LABEL,
    layers_digest,
    proven_stage,
    seal,
)
from guix_tasks.stages.ownership import restore_ownership

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project


def commit_image(
    project: Project,
    container: str,
    parent: Image,
    tag: str,
    labels: Mapping[str, str],
    *,
    like: Image | None = None,
    start: Image | None = None,
    own_layers: int = 1,
) -> Image:
    """Commit a container as the image of a stage on ``parent``, and tag the image.

    The container was created from ``start``, by default from ``parent``. The image gets the
    configuration of ``like``, by default of ``parent``, with additional labels, the annotations of
    OCI and the label that proves its layers (``images.seal``). ``own_layers`` is the expected
    number of layers on ``start``. Only a proven image is tagged.

    Raise ``EngineError`` if the label cannot be proven.
    """
    engine = project.engine
    labels = {
        **oci_annotations(project.settings.directory, os.environ, project.console.print),
        IMAGE_LABEL: str(project.settings.image),
        **labels,
    }
    config = committed_config(like or parent, labels)
    # Reading a file of a container leaves its mount points in the layer.
    is_rootless = project.settings.guix_sandbox is Sandbox.ROOTLESS and not engine.is_dry
    if is_rootless and start is None and restore_ownership(engine, container):
        # If the image has no user, root, a commit takes that of the container.
        config["User"] = config.get("User") or "root"

    start = start or parent
    below = layers_digest(parent.layers)
    # Else `docker history` shows an empty row for the layer.
    comment = f"guix-tasks: {labels.get(STAGE_LABEL, 'commit')}"
    image_id = engine.commit(container, _sealed(config, start, own_layers, below), comment)
    image = engine.image(image_id)
    if image is None and engine.is_dry:
        engine.tag(image_id, tag)
        return parent
    if image and not proven_stage(image):
        # Docker adds no layer if the container changed nothing, and may complete the
        # configuration. The seal has to match the image as the engine made it.
        engine.drop(image.id)
        own_layers = len(image.layers) - len(start.layers)
        config |= committed_config(image, {})
        sealed = _sealed(config, start, own_layers, below)
        image = engine.image(engine.commit(container, sealed, comment))
    if image and proven_stage(image):
        engine.tag(image.id, tag)
        return image
    if image:
        engine.drop(image.id)
    raise EngineError(
        f"cannot commit {tag}: the engine changes the layers or the configuration of its commits"
    )


def commit_unnamed(project: Project, container: str, parent: Image) -> Image:
    """Commit a container of ``parent`` as an image without a tag, for another container.

    Raise ``EngineError`` if the engine loses the image.
    """
    config = committed_config(parent, {IMAGE_LABEL: str(project.settings.image)})
    sealed = _sealed(config, parent, 1, layers_digest(parent.layers))
    image_id = project.engine.commit(container, sealed)
    image = project.engine.image(image_id)
    if image is None:
        raise EngineError(f"cannot find {image_id}, which the engine has committed; run again")
    return image


def _sealed(
    config: Mapping[str, Any], start: Image, own_layers: int, parent: str
) -> dict[str, Any]:
    """Return a configuration with the label that proves the configuration and the layers."""
    label = seal(start.layers, own_layers, config, parent)
    return {**config, "Labels": {**config["Labels"], LAYERS_LABEL: label}}


def committed_config(image: Image, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration for a commit: that of an image with additional labels.

    If these define search paths, the environment has the variables.

    It leaves nothing open, because a commit takes the rest from the container, and the stage's
    command must not become the image's. The project label of work containers cannot be removed,
    so it is emptied: otherwise every container of the image would be taken for a work container.
    """
    return {
        **image.config,
        "Entrypoint": image.config.get("Entrypoint") or [],
        "Cmd": image.config.get("Cmd") or [],
        "Env": guix.with_search_paths(
            image.config.get("Env") or [], labels.get(SEARCH_PATHS_LABEL, "")
        ),
        "Labels": {**image.labels, **labels, PROJECT_LABEL: ""},
    }
