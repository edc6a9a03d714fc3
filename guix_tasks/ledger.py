"""Which image answers to a stage.

State lives in the engine, in tags and labels, and nowhere else.  For ``IMAGE=REPO:T`` stage S is
the local tag ``REPO:T-S``; setting it is the commit point of the stage, and ``IMAGE`` follows.

Labels are inherited by every image made ``FROM`` another, so a label alone proves nothing.
``org.guix-tasks.layers`` therefore says how many layers the stage image has, and which ones it
has from its parent (its own is not known before the commit that sets the label).  Any image made
from it has more.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.console import Console
    from guix_tasks.engine import Engine, Image
    from guix_tasks.reference import ImageReference, Platform
    from guix_tasks.settings import Settings

STAGES = ("base", "pull", "install")
"""The built-in stages, each made from the one before it."""

HAND_MADE = "commit"
"""What the label says of an image that ``inv commit`` made of a work container."""

_PREFIX = "org.guix-tasks."
STAGE_LABEL = f"{_PREFIX}stage"
LAYERS_LABEL = f"{_PREFIX}layers"
CHANNELS_LABEL = f"{_PREFIX}channels"
PACKAGES_LABEL = f"{_PREFIX}packages"


def seal(parent: Sequence[str], own: int) -> str:
    """Give the ``.layers`` label of an image with so many layers of its own (0 or 1) on these."""
    digest = hashlib.sha256("\n".join(parent).encode()).hexdigest()
    return f"{len(parent) + own} sha256:{digest}"


def proven_stage(image: Image) -> str | None:
    """The stage that an image says it is, if its own layers bear it out."""
    truths = (seal(image.layers, 0), seal(image.layers[:-1], 1))
    return image.labels.get(STAGE_LABEL) if image.labels.get(LAYERS_LABEL) in truths else None


def is_child(image: Image, parent: Image) -> bool:
    """Whether a stage image was made from this very parent, by one commit."""
    return image.labels.get(LAYERS_LABEL) in (seal(parent.layers, 0), seal(parent.layers, 1))


@dataclass(frozen=True)
class Ledger:
    """The stage images of one project on one engine."""

    engine: Engine
    settings: Settings

    @property
    def image(self) -> ImageReference:
        return self.settings.image

    def tag(self, stage: str) -> str:
        """The tag that is the commit point of a stage."""
        return str(self.image.with_tag(f"{self.image.tag}-{stage}{self._suffix}"))

    def find(self, stage: str) -> Image | None:
        """The image that answers to a stage."""
        image = self.engine.image(self.tag(stage))
        return image if image and proven_stage(image) == stage else None

    def newest(self) -> tuple[str, Image] | None:
        """The stage that ``IMAGE`` is to stand for: the last one that there is."""
        for stage in reversed(STAGES):
            image = self.find(stage)
            if image:
                return stage, image
        return None

    def hand_made(self) -> Image | None:
        """What ``IMAGE`` stands for, if ``inv commit`` made it."""
        image = self.engine.image(str(self.image))
        return image if image and proven_stage(image) == HAND_MADE else None

    def parent_of(self, stage: str) -> str | None:
        """The stage that a stage is made from.

        ``install`` starts from base only where no channels are asked for and none were pulled.
        """
        if stage == "base":
            return None
        if stage == "install" and not self.settings.guix_channels and not self.find("pull"):
            return "base"
        return STAGES[STAGES.index(stage) - 1]

    def stale(self, stage: str) -> str | None:
        """Why a stage image no longer answers to its inputs, or None."""
        image = self.find(stage)
        parent = self.parent_of(stage)
        if not image or not parent:
            return None
        reason = self.stale(parent)
        if reason:
            return reason
        below = self.find(parent)
        if below and not is_child(image, below):
            return f"{parent} is newer"
        return None

    def say_what_is_left(self, console: Console) -> None:
        """Tell where a hand-made image stays, which the next stage takes ``IMAGE`` from."""
        image = self.hand_made()
        if image:
            console.say(f"{self.image}: the image of `inv commit` is left behind as {image.id}")

    def repair(self) -> None:
        """Let ``IMAGE`` stand for the newest stage, where an earlier run did not get to it.

        What others made of ``IMAGE``, or ``inv commit`` did, is left alone.
        """
        current = self.engine.image(str(self.image))
        if current is None or proven_stage(current) in STAGES:
            self.point_image()

    def point_image(self) -> None:
        """Let ``IMAGE`` stand for the newest stage, where it does not."""
        newest = self.newest()
        current = self.engine.image(str(self.image))
        if newest and (current is None or current.id != newest[1].id):
            self.engine.tag(newest[1].id, str(self.image))

    @property
    def _suffix(self) -> str:
        platform = foreign_platform(self.engine, self.settings)
        return f"-{platform.tag_suffix}" if platform else ""


def foreign_platform(engine: Engine, settings: Settings) -> Platform | None:
    """The platform asked for, where it is not the engine's own."""
    platform = settings.platform
    return platform if platform and str(platform) != engine.info().platform else None
