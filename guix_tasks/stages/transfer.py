"""Images on their way to a registry and back."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from guix_tasks.engine.credentials import credentials_for
from guix_tasks.engine.retry import retried
from guix_tasks.oci.reference import ImageReference
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Console, Step


_LONG_DIGEST = re.compile(r"(?<=@sha256:[0-9a-f]{12})[0-9a-f]+")
"""What nobody reads of a digest."""


class TransferProgress:
    """Tells how a push or a pull gets on: what is drawn while it does, else a line a layer."""

    _MOVED = ("Pushed", "Pull complete")
    _DONE = (*_MOVED, "Layer already exists", "Already exists", "Mounted from")

    def __init__(self, console: Console, what: str, step: Step) -> None:
        self._console = console
        self._what = what
        self._step = step
        self._sizes: dict[str, tuple[int, int]] = {}
        self._done: set[str] = set()
        self._unmeasured = False
        self._started = time.monotonic()
        step.tell(lambda: self.text)

    def __call__(self, layer: str, status: str, current: int, total: int) -> None:
        # What was downloaded is then unpacked, with numbers of its own.
        if total and status != "Extracting":
            self._sizes[layer] = (min(current, total), total)
        done = status.startswith(self._DONE)
        if done and layer not in self._done and not self._step.is_live:
            size = self._sizes.get(layer, (0, 0))[1]
            amount = f" ({human_size(size)})" if size else ""
            self._console.say(f"{self._what}: {layer} {status.lower()}{amount}")
        if status.startswith(self._MOVED) and layer not in self._sizes:
            self._unmeasured = True
        if done:
            self._done.add(layer)
            size = self._sizes.get(layer, (0, 0))[1]
            self._sizes[layer] = (size, size)

    @property
    def moved(self) -> int:
        """Bytes that went over the network so far, as far as the engine reports them."""
        return sum(current for current, _ in [*self._sizes.values()])

    def summary(self, *, exact: bool) -> str:
        """What was moved; ``exact`` if the engine reports the bytes of every layer that has any."""
        if exact or not self._unmeasured:
            return f"{human_size(self.moved)} moved"
        return f"at least {human_size(self.moved)} moved" if self.moved else "small layers moved"

    @property
    def text(self) -> str:
        whole = sum(total for _, total in [*self._sizes.values()])
        rate = self.moved / max(0.1, time.monotonic() - self._started)
        said = f", {human_size(int(rate))}/s" if rate else ""
        return f"{human_size(self.moved)} of {human_size(whole)}{said}" if whole else ""


@contextmanager
def transfer(project: Project, what: str, reference: str) -> Iterator[TransferProgress]:
    """The progress of one push or pull, and the line that ends it: what was moved, and how long."""
    console, started = project.console, time.monotonic()
    with console.step(f"{what} {_LONG_DIGEST.sub('', reference)}", has_log=False) as step:
        progress = TransferProgress(console, f"{what} {reference}", step)
        yield progress
    if not project.engine.is_dry:
        took = human_time(time.monotonic() - started)
        # The containerd store reports no bytes of a layer that is moved at once.
        moved = progress.summary(exact=not project.engine.info().uses_containerd)
        console.say(f"{what}: {reference}, {moved}, {took}")


def push(project: Project, reference: str) -> str:
    """Push a tag, and again after a fault that passes; the digest that the registry answered."""
    host = ImageReference.parse(reference).registry
    return retried(project.console, "the push", partial(push_once, project, reference), host=host)


def push_once(project: Project, reference: str) -> str:
    account = credentials_for(project.engine, project.settings, reference)
    with transfer(project, "push", reference) as progress:
        return project.engine.push(reference, account, progress)


def pull(project: Project, reference: str) -> None:
    """Pull a reference, and again after a fault that passes; that it is not there is none."""

    def once() -> None:
        account = credentials_for(project.engine, project.settings, reference)
        with transfer(project, "pull", reference) as progress:
            project.engine.pull(reference, account, progress=progress)

    host = ImageReference.parse(reference).registry
    retried(project.console, "the pull", once, host=host)
