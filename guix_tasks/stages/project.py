"""A project on an engine."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from guix_tasks.files import alone
from guix_tasks.stages.images import STAGES, Ledger
from guix_tasks.stages.sandbox import settled
from guix_tasks.stages.substitute_server import nearby

if TYPE_CHECKING:
    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.container import Nearby
    from guix_tasks.stages.declarations import OwnStage
    from guix_tasks.ui.console import Console


@dataclass(frozen=True)
class Project:
    """One project on one engine: all that a stage needs."""

    settings: Settings
    engine: Engine
    console: Console
    own: tuple[OwnStage, ...] = ()
    """The stages that its ``tasks.py`` adds, in their order."""

    @cached_property
    def ledger(self) -> Ledger:
        names = (*STAGES, *(own.name for own in self.own))
        return Ledger(self.engine, self.settings, names)

    def settled(self, image: Image, *, as_root: bool = False) -> Project:
        """This project with the rights that containers of an image get here.

        ``as_root`` is for what a person would do as root.
        """
        base = self.ledger.find("base")
        found = settled(self.engine, self.settings, self.console, image, base, as_root=as_root)
        return replace(self, settings=found)

    def nearby(self, task: str) -> Nearby | None:
        """The substitute server that ``substitutes.up`` has started, for a work of this task."""
        found, newest = nearby(self.engine, self.settings, self.console), self.ledger.last_stage()
        if found:
            is_newest = newest is not None and newest.id == found.image
            age = "" if is_newest else ", of an older image; `inv substitutes.up` serves the newest"
            self.console.say(f"{task}: substitutes come from {found.url} first{age}")
        return found

    def alone(self, task: str) -> AbstractContextManager[None]:
        """Keep another ``inv`` of this user from changing the image at the same time."""
        if self.engine.is_dry:
            return nullcontext()
        return alone(self.console.say, self.engine.info().url, str(self.settings.image), task)

    def each_platform(self) -> list[Project]:
        """This project for one platform after the other: an engine makes one at a time."""
        return [replace(self, settings=each) for each in self.settings.each_platform()]
