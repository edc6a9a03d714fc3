"""The project that stages and tasks work on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from guix_tasks.files import image_lock
from guix_tasks.stages.images import STAGES, Ledger
from guix_tasks.stages.sandbox import resolve_sandbox

if TYPE_CHECKING:
    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.declarations import CustomStage
    from guix_tasks.ui.console import Console


@dataclass(frozen=True)
class Project:
    """One project on one engine, with the console that reports its progress."""

    settings: Settings
    engine: Engine
    console: Console
    custom_stages: tuple[CustomStage, ...] = ()
    """Custom stages of the project's ``tasks.py``, in order."""

    @cached_property
    def ledger(self) -> Ledger:
        names = (*STAGES, *(stage.name for stage in self.custom_stages))
        return Ledger(self.engine, self.settings, names)

    def with_sandbox(self, image: Image, *, as_root: bool = False) -> Project:
        """Return this project with ``GUIX_SANDBOX=auto`` resolved for containers of an image.

        ``as_root`` is for commands that need root, such as those of custom stages.
        """
        return replace(self, settings=resolve_sandbox(self, image, as_root=as_root))

    def lock(self, task: str) -> AbstractContextManager[None]:
        """Lock the image against other ``inv`` processes of this user for the length of a block."""
        if self.engine.is_dry:
            return nullcontext()
        return image_lock(
            self.console.print, self.engine.info().url, str(self.settings.image), task
        )

    def each_platform(self) -> list[Project]:
        """Return this project for each platform, because an engine builds for one at a time."""
        return [replace(self, settings=settings) for settings in self.settings.each_platform()]
