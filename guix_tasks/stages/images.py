"""Which image answers to a stage, and to which key.

State lives in the engine, in tags and labels, and nowhere else.  For ``IMAGE=REPO:T`` stage S is
the local tag ``REPO:T-S``; setting it is the commit point of the stage, and ``IMAGE`` follows.

Labels are inherited by every image made ``FROM`` another, so a label alone proves nothing.
``org.guix-tasks.layers`` therefore says how many layers the stage image has, and which ones it
has from its parent (its own is not known before the commit that sets the label).  Any image made
from it has more.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guix_tasks.engine import podman_api
from guix_tasks.files import text_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.oci.platform import Platform
    from guix_tasks.oci.reference import ImageReference
    from guix_tasks.settings import Settings
    from guix_tasks.ui.console import Console

STAGES = ("base", "pull", "install")
"""The built-in stages, each made from the one before it."""

SQUASH = "squash"
"""What ``inv squash`` makes of the last stage: its tag, and what the label says."""

HAND_MADE = "commit"
"""What the label says of an image that ``inv commit`` made of a work container."""

PREVIOUS = "previous"
"""The tag of what ``IMAGE`` was before it last moved."""

_PREFIX = "org.guix-tasks."
STAGE_LABEL = f"{_PREFIX}stage"
KEY_LABEL = f"{_PREFIX}key"
INPUTS_LABEL = f"{_PREFIX}inputs"
LAYERS_LABEL = f"{_PREFIX}layers"
IMAGE_LABEL = f"{_PREFIX}image"
"""Whose image it is: the project's name, which is the image that it makes."""
CONTAINER_LABEL = f"{_PREFIX}project"
"""Of work containers, and of what Podman commits until it is given its configuration."""
CHANNELS_LABEL = f"{_PREFIX}channels"
PACKAGES_LABEL = f"{_PREFIX}packages"


def stage_key(stage: str, parent: str, inputs: Mapping[str, str]) -> str:
    """The key of a stage: its parent's key and its own inputs, and nothing that varies by itself.

    An image's ID is no input, since two builds of the same content differ in it, nor is a date.
    """
    return text_digest(stage, parent, json.dumps(dict(inputs), sort_keys=True))


def stage_labels(stage: str, parent: str, inputs: Mapping[str, str]) -> dict[str, str]:
    """The labels by which a stage image is found again, and that say what it was made from."""
    return {
        STAGE_LABEL: stage,
        KEY_LABEL: stage_key(stage, parent, inputs),
        INPUTS_LABEL: json.dumps(dict(inputs), sort_keys=True),
    }


def key_of(image: Image) -> str:
    return image.labels.get(KEY_LABEL, "")


def inputs_of(image: Image) -> dict[str, str]:
    """What a stage image was made from, by name; nothing where its label is not one of ours."""
    try:
        found = json.loads(image.labels.get(INPUTS_LABEL, "{}"))
    except (ValueError, RecursionError):
        return {}
    known = isinstance(found, dict) and all(isinstance(each, str) for each in found.values())
    return found if known else {}


def squash_key(stage: Image) -> str:
    """The key of a stage's image squashed."""
    return stage_key(SQUASH, key_of(stage), {})


_CONFIGURATION = (
    "Cmd", "Entrypoint", "Env", "ExposedPorts", "Healthcheck", "Labels", "OnBuild", "Shell",
    "StopSignal", "User", "Volumes", "WorkingDir",
)  # fmt: skip
"""What a Dockerfile can change of an image without giving it a layer."""


def seal(parent: Sequence[str], own: int, config: Mapping[str, Any]) -> str:
    """The ``.layers`` label of an image with so many layers of its own (0 or 1) on these.

    Its configuration is sealed with them: an image made ``FROM`` a stage may add no layer.
    """
    said = {name: config[name] for name in _CONFIGURATION if config.get(name)}
    said["Labels"] = {**(config.get("Labels") or {}), LAYERS_LABEL: ""}
    text = text_digest(*parent, json.dumps(said, sort_keys=True))
    return f"{len(parent) + own} {parent_digest(parent)} {text}"


def parent_digest(layers: Sequence[str]) -> str:
    return f"sha256:{hashlib.sha256(chr(10).join(layers).encode()).hexdigest()}"


def proven_stage(image: Image) -> str | None:
    """The stage that an image says it is, if its own layers bear it out."""
    below = image.layers[:-1]
    truths = (seal(image.layers, 0, image.config), seal(below, 1, image.config))
    return image.labels.get(STAGE_LABEL) if image.labels.get(LAYERS_LABEL) in truths else None


def is_child(image: Image, parent: Image) -> bool:
    """Whether a stage image was made from this very parent, by one commit."""
    own = image.labels.get(LAYERS_LABEL, "").split()
    return len(own) > 1 and own[1] == parent_digest(parent.layers)


def is_above(image: Image, base: Image) -> bool:
    """Whether an image has all the layers of another, and more."""
    return len(image.layers) > len(base.layers) and image.layers[: len(base.layers)] == base.layers


@dataclass(frozen=True)
class Ledger:
    """The stage images of one project on one engine."""

    engine: Engine
    settings: Settings
    stages: tuple[str, ...] = STAGES
    """The built-in ones and those of the project's own, each after its parent."""

    @property
    def image(self) -> ImageReference:
        """``IMAGE``; for a platform that is not the engine's own, its own tag beside that."""
        image, foreign = self.settings.image, foreign_platform(self.engine, self.settings)
        return image.with_tag(f"{image.tag}-{foreign.tag_suffix}") if foreign else image

    def tag(self, stage: str) -> str:
        """The tag that is the commit point of a stage."""
        image, foreign = self.settings.image, foreign_platform(self.engine, self.settings)
        suffix = f"-{foreign.tag_suffix}" if foreign else ""
        return str(image.with_tag(f"{image.tag}-{stage}{suffix}"))

    def find(self, stage: str) -> Image | None:
        """The image that answers to a stage."""
        image = self.engine.image(self.tag(stage))
        return image if image and proven_stage(image) == stage else None

    def last_stage(self) -> Image | None:
        """The image of the last stage that there is."""
        found = (self.find(stage) for stage in reversed(self.stages))
        return next((image for image in found if image), None)

    def newest(self) -> Image | None:
        """What ``IMAGE`` is to stand for: the last stage, squashed if that has been done."""
        last, squashed = self.last_stage(), self.find(SQUASH)
        if last and squashed and key_of(squashed) == squash_key(last):
            return squashed
        return last

    def previous(self) -> Image | None:
        """What ``IMAGE`` stood for before it last moved."""
        return self.engine.image(self.tag(PREVIOUS))

    def repair(self) -> None:
        """Let ``IMAGE`` stand for the newest stage, where an earlier run did not get to it.

        What others made of ``IMAGE``, or ``inv commit`` or ``inv rollback`` did, is left alone.
        """
        current, newest, previous = (
            self.engine.image(str(self.image)),
            self.newest(),
            self.previous(),
        )
        rolled_back = newest and previous and newest.id == previous.id
        if current is None or (proven_stage(current) in (*self.stages, SQUASH) and not rolled_back):
            self._move(current, newest)

    def point_image(self, console: Console) -> None:
        """Let ``IMAGE`` stand for the newest stage, and tell where a hand-made one stays."""
        current = self.engine.image(str(self.image))
        if current and proven_stage(current) == HAND_MADE:
            console.say(f"{self.image}: what `inv commit` made is left behind: `inv rollback`")
        self._move(current, self.newest())

    def roll_back(self) -> Image | None:
        """Let ``IMAGE`` be what it was before, and that what it is; None where it was nothing."""
        current, previous = self.engine.image(str(self.image)), self.previous()
        if previous:
            self._move(current, previous)
        return previous

    def keep(self, current: Image | None) -> None:
        """Remember what ``IMAGE`` stands for as what it was before."""
        if current:
            forgotten = self.previous()
            self.engine.tag(current.id, self.tag(PREVIOUS))
            if forgotten and forgotten.id != current.id:
                self.engine.drop(forgotten.id)

    def drop_unnamed(self) -> None:
        """Remove the images that a run which was killed had not tagged yet, or not removed."""
        name = str(self.settings.image)
        for each in self.engine.unnamed({IMAGE_LABEL: name}):
            image = self.engine.image(each)
            if image and proven_stage(image):
                self.engine.drop(image.id)
        for each in self.engine.unnamed(
            {CONTAINER_LABEL: name, podman_api.UNFINISHED_LABEL: "yes"}
        ):
            self.engine.drop(each)

    def _move(self, current: Image | None, target: Image | None) -> None:
        if target and (current is None or current.id != target.id):
            # IMAGE first: a kill in between leaves it right, and only what it was is lost.
            self.engine.tag(target.id, str(self.image))
            self.keep(current)


def foreign_platform(engine: Engine, settings: Settings) -> Platform | None:
    """The platform asked for, where it is not the engine's own."""
    platform = settings.platform
    return platform if platform and str(platform) != engine.info().platform else None
