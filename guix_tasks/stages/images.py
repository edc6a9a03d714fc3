"""Tags, labels and keys of stage images.

All state is in the engine, as tags and labels.  For ``IMAGE=REPO:T`` the image of stage S has the
local tag ``REPO:T-S``.  Setting that tag is the commit point of the stage; ``IMAGE`` is moved
afterwards.

An image that is built ``FROM`` a stage image inherits its labels, so a stage label alone proves
nothing.  The label ``org.guix-tasks.layers`` (see ``seal``) therefore records the number of layers
and digests of the parent's layers and of those below the stage's own.  The digest of the stage's
own layer is not part of it, because the layer exists only after the commit that sets the label.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guix_tasks.engine.api import UNFINISHED_LABEL
from guix_tasks.errors import FEWER_LAYERS, UsageError
from guix_tasks.files import text_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.oci.reference import ImageReference
    from guix_tasks.settings import Settings
    from guix_tasks.ui.console import Console

STAGES = ("base", "pull", "install")
"""The built-in stages in order; each is the parent of the next."""

SQUASH = "squash"
"""Stage name of an image that ``inv squash`` made, in its tag and its label."""

HAND_MADE = "commit"
"""Stage name of an image that ``inv commit`` made, in its label."""

PREVIOUS = "previous"
"""Tag of the image that ``IMAGE`` referred to before it last moved."""

LAYERS_MAX = 125
"""Layers of an image in Docker's classic image store (``maxLayerDepth`` of moby's layer store)."""

_PREFIX = "org.guix-tasks."
STAGE_LABEL = f"{_PREFIX}stage"
KEY_LABEL = f"{_PREFIX}key"
INPUTS_LABEL = f"{_PREFIX}inputs"
LAYERS_LABEL = f"{_PREFIX}layers"
GUIX_KEY_LABEL = f"{_PREFIX}guix-key"
"""Key of what Guix made, which does not change with other files of the base image; empty if any
file can matter."""
ASSEMBLED_LABEL = f"{_PREFIX}assembled"
"""``trust_digest`` of the warm store from which an image was assembled, or empty."""
FILES_LABEL = f"{_PREFIX}files"
"""``layers_digest`` of the image that all files outside of Guix's directories equal; empty if
that is the image itself."""
IMAGE_LABEL = f"{_PREFIX}image"
"""``IMAGE`` of the project that made the image."""
CONTAINER_LABEL = f"{_PREFIX}project"
"""``IMAGE`` of a work container's project; also on Podman's unfinished commits."""
CHANNELS_LABEL = f"{_PREFIX}channels"
PACKAGES_LABEL = f"{_PREFIX}packages"
SEARCH_PATHS_LABEL = f"{_PREFIX}search-paths"
"""Definitions of the variables that an install image has in addition to those of its parent."""
REPORTED_LABELS = (CHANNELS_LABEL, PACKAGES_LABEL, SEARCH_PATHS_LABEL)
"""Labels that describe what Guix made."""


def stage_key(stage: str, parent: str, inputs: Mapping[str, str]) -> str:
    """Return the key of a stage: a digest of its name, its parent's key and its inputs.

    Inputs contain nothing that differs between two builds of the same content, such as image IDs
    and dates.
    """
    return text_digest(stage, parent, json.dumps(dict(inputs), sort_keys=True))


def stage_labels(stage: str, parent: str, inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the labels that identify a stage image and record its key and its inputs."""
    return {
        STAGE_LABEL: stage,
        KEY_LABEL: stage_key(stage, parent, inputs),
        INPUTS_LABEL: json.dumps(dict(inputs), sort_keys=True),
    }


def key_of(image: Image) -> str:
    return image.labels.get(KEY_LABEL, "")


def inputs_of(image: Image) -> dict[str, str]:
    """Return the recorded inputs of an image, digests by name; empty if the label is invalid."""
    try:
        inputs = json.loads(image.labels.get(INPUTS_LABEL, "{}"))
    except (ValueError, RecursionError):
        return {}
    is_valid = isinstance(inputs, dict) and all(isinstance(text, str) for text in inputs.values())
    return inputs if is_valid else {}


def squash_key(stage: Image) -> str:
    """Return the key of the squashed image of a stage image."""
    return stage_key(SQUASH, key_of(stage), {})


_CONFIGURATION = (
    "Cmd", "Entrypoint", "Env", "ExposedPorts", "Healthcheck", "Labels", "OnBuild", "Shell",
    "StopSignal", "User", "Volumes", "WorkingDir",
)  # fmt: skip
"""Fields that a Dockerfile can change without adding a layer."""


def seal(
    layers: Sequence[str], own_layers: int, config: Mapping[str, Any], parent: str = ""
) -> str:
    """Return the ``.layers`` label of an image with 0 or 1 layers on top of ``layers``.

    ``parent`` is the ``layers_digest`` of the stage's parent, by default of ``layers``: an image
    can be assembled on the stage's previous image.

    The label covers the configuration as well, because an image that is built ``FROM`` a stage
    image may add no layer.
    """
    sealed = {name: config[name] for name in _CONFIGURATION if config.get(name)}
    sealed["Labels"] = {**(config.get("Labels") or {}), LAYERS_LABEL: ""}
    parent = parent or layers_digest(layers)
    content = text_digest(*layers, parent, json.dumps(sealed, sort_keys=True))
    return f"{len(layers) + own_layers} {parent} {content}"


def layers_digest(layers: Sequence[str]) -> str:
    return f"sha256:{hashlib.sha256(chr(10).join(layers).encode()).hexdigest()}"


def proven_stage(image: Image) -> str | None:
    """Return the stage of an image, or None if its layers do not match its ``.layers`` label."""
    label, parent = image.labels.get(LAYERS_LABEL), _parent_digest(image)
    seals = (
        seal(image.layers, 0, image.config, parent),
        seal(image.layers[:-1], 1, image.config, parent),
    )
    return image.labels.get(STAGE_LABEL) if label in seals else None


def is_child(image: Image, parent: Image) -> bool:
    """Whether a stage image was made from exactly this image of the stage's parent."""
    return _parent_digest(image) == layers_digest(parent.layers)


def _parent_digest(image: Image) -> str:
    fields = image.labels.get(LAYERS_LABEL, "").split()
    return fields[1] if len(fields) > 1 else ""


def files_digest(image: Image) -> str:
    """Return a digest that two images share if their files outside of Guix's directories equal."""
    return image.labels.get(FILES_LABEL) or layers_digest(image.layers)


def shared_layers(image: Image, other: Image) -> int:
    """Return how many of the lowest layers two images share."""
    pairs = enumerate(zip(image.layers, other.layers, strict=False))
    shortest = min(len(image.layers), len(other.layers))
    return next((number for number, (a, b) in pairs if a != b), shortest)


def check_layers(engine: Engine, image: Image, more: int = 1) -> None:
    """Raise ``UsageError`` if the engine cannot commit ``more`` layers on an image."""
    info, layers = engine.info(), len(image.layers)
    is_limited = not info.is_podman and not info.uses_containerd
    if is_limited and layers + more > LAYERS_MAX:
        raise UsageError(
            f"the image has {layers} layers, and {more} more would exceed the {LAYERS_MAX} of this "
            f"engine's image store; {FEWER_LAYERS}"
        )


@dataclass(frozen=True)
class Ledger:
    """The stage images of one project on one engine."""

    engine: Engine
    settings: Settings
    stages: tuple[str, ...] = STAGES
    """Built-in and custom stages, each after its parent."""

    @property
    def image(self) -> ImageReference:
        """``IMAGE``, with the platform in its tag if that is not the engine's platform."""
        return self._with_suffix("")

    def tag(self, stage: str) -> str:
        """Return the image reference of a stage; setting it is the commit point of the stage."""
        return str(self._with_suffix(f"-{stage}"))

    def find(self, stage: str) -> Image | None:
        """Return the image of a stage, or None if its tag is missing or on another image."""
        image = self.engine.image(self.tag(stage))
        return image if image and proven_stage(image) == stage else None

    def last_stage(self) -> Image | None:
        """Return the image of the last stage that has one."""
        images = (self.find(stage) for stage in reversed(self.stages))
        return next((image for image in images if image), None)

    def newest(self) -> Image | None:
        """Return the image that ``IMAGE`` should refer to: the last stage, squashed if possible."""
        last, squashed = self.last_stage(), self.find(SQUASH)
        if last and squashed and key_of(squashed) == squash_key(last):
            return squashed
        return last

    def previous(self) -> Image | None:
        """Return the image that ``IMAGE`` referred to before it last moved."""
        return self.engine.image(self.tag(PREVIOUS))

    def repair(self) -> None:
        """Move ``IMAGE`` to the newest stage if an interrupted run did not.

        Images of other tools and of ``inv commit`` stay, as does the result of ``inv rollback``.
        """
        current = self.engine.image(str(self.image))
        is_own = current is None or proven_stage(current) in (*self.stages, SQUASH)
        if is_own and not (current and self.is_rolled_back(current)):
            self._move(current, self.newest())

    def point_image(self, console: Console) -> None:
        """Move ``IMAGE`` to the newest stage; print how to restore an image of ``inv commit``."""
        current = self.engine.image(str(self.image))
        if current and proven_stage(current) == HAND_MADE:
            console.print(
                f"{self.image}: replaced the image of `inv commit`; `inv rollback` restores it"
            )
        elif current and self.is_rolled_back(current):
            console.print(f"{self.image}: is the newest image again; `inv rollback` undoes this")
        self._move(current, self.newest())

    def is_rolled_back(self, current: Image) -> bool:
        """Whether ``current``, the image of ``IMAGE``, is the result of ``inv rollback``."""
        newest, previous = self.newest(), self.previous()
        return bool(newest and previous and newest.id == previous.id != current.id)

    def roll_back(self) -> Image | None:
        """Swap ``IMAGE`` and the previous image; return the latter, or None if there is none."""
        current, previous = self.engine.image(str(self.image)), self.previous()
        if previous:
            self._move(current, previous)
        return previous

    def keep(self, current: Image | None) -> None:
        """Tag the current image as the previous one, and drop the one that had the tag."""
        if current:
            dropped = self.previous()
            self.engine.tag(current.id, self.tag(PREVIOUS))
            if dropped and dropped.id != current.id:
                self.engine.drop(dropped.id)

    def drop_unnamed(self) -> None:
        """Remove the untagged images of earlier runs, and those that they were assembled on."""
        name = str(self.settings.image)
        left: set[str] = set()
        # An engine keeps an image, and may not list it, while another is made from it.
        while (found := set(self.engine.unnamed({IMAGE_LABEL: name}))) != left:
            for image_id in found:
                image = self.engine.image(image_id)
                if image and proven_stage(image):
                    self.engine.drop(image.id)
            left = found
        unfinished = {CONTAINER_LABEL: name, UNFINISHED_LABEL: "yes"}
        for image_id in self.engine.unnamed(unfinished):
            self.engine.drop(image_id)

    def _move(self, current: Image | None, target: Image | None) -> None:
        if target and (current is None or current.id != target.id):
            # IMAGE first: after a kill between the two calls only the previous image is lost.
            self.engine.tag(target.id, str(self.image))
            self.keep(current)

    def _with_suffix(self, suffix: str) -> ImageReference:
        image, platform = self.settings.image, self.settings.platform
        if platform and str(platform) != self.engine.info().platform:
            suffix += f"-{platform.tag_suffix}"
        return image.with_tag(f"{image.tag}{suffix}") if suffix else image
