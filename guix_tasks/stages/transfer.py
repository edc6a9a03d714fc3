"""Push images to a registry and pull them."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from guix_tasks.engine.accounts import credentials_for
from guix_tasks.engine.retry import retry_call
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Console, Step


_DIGEST_REST = re.compile(r"(?<=@sha256:[0-9a-f]{12})[0-9a-f]+")
"""The digits of a digest that the live display leaves out."""


class TransferProgress:
    """Show the progress of a push or a pull: live on a terminal, otherwise each moved layer."""

    _MOVED = ("Pushed", "Pull complete")
    _DONE = (*_MOVED, "Layer already exists", "Already exists", "Mounted from")

    def __init__(self, console: Console, action: str, step: Step) -> None:
        self._console = console
        self._action = action
        self._step = step
        self._sizes: dict[str, tuple[int, int]] = {}
        self._done: set[str] = set()
        self._unmeasured = False
        self._started = time.monotonic()
        step.show_activity(lambda: self.text)

    def __call__(self, layer: str, status: str, current: int, total: int) -> None:
        # After its download a layer is extracted, with other numbers.
        if total and status != "Extracting":
            self._sizes[layer] = (min(current, total), total)
        done, moved = status.startswith(self._DONE), status.startswith(self._MOVED)
        if moved and layer not in self._done and not self._step.is_live:
            size = self._sizes.get(layer, (0, 0))[1]
            amount = f" ({human_size(size)})" if size else ""
            self._console.print(f"{self._action}: {layer} {status.lower()}{amount}")
        if moved and layer not in self._sizes:
            self._unmeasured = True
        if done:
            self._done.add(layer)
            size = self._sizes.get(layer, (0, 0))[1]
            self._sizes[layer] = (size, size)

    @property
    def moved(self) -> int:
        """Bytes moved over the network so far, as reported by the engine."""
        return sum(current for current, _ in [*self._sizes.values()])

    def summary(self, *, exact: bool) -> str:
        """Describe the moved bytes; ``exact`` if the engine reports the bytes of every layer."""
        if exact or not self._unmeasured:
            return f"{human_size(self.moved)} moved"
        return f"at least {human_size(self.moved)} moved" if self.moved else "small layers moved"

    @property
    def text(self) -> str:
        """The moved bytes, the total and the rate; empty while the total is unknown."""
        total = sum(size for _, size in [*self._sizes.values()])
        rate = self.moved / max(0.1, time.monotonic() - self._started)
        rate_text = f", {human_size(int(rate))}/s" if rate else ""
        return f"{human_size(self.moved)} of {human_size(total)}{rate_text}" if total else ""


@contextmanager
def transfer(project: Project, action: str, reference: str) -> Iterator[TransferProgress]:
    """Show the progress of one push or pull; at the end, print the moved bytes and the time."""
    console, started = project.console, time.monotonic()
    with console.step(f"{action} {_DIGEST_REST.sub('', reference)}", has_log=False) as step:
        progress = TransferProgress(console, action, step)
        yield progress
    if not project.engine.is_dry:
        duration = human_time(time.monotonic() - started)
        # The containerd store reports no bytes for a layer that is moved in one piece.
        moved = progress.summary(exact=not project.engine.info().uses_containerd)
        console.print(f"{action}: {reference}, {moved}, {duration}")


def push(project: Project, reference: str) -> str:
    """Push a tag, retrying transient failures, and return the digest in the registry."""
    return retry_call(project.console, "the push", partial(push_once, project, reference))


def push_once(project: Project, reference: str) -> str:
    """Push a tag without retries and return the digest in the registry."""
    account = credentials_for(project.engine, project.settings, reference)
    with transfer(project, "push", reference) as progress:
        return project.engine.push(reference, account, progress)


def pull(project: Project, reference: str) -> None:
    """Pull a reference, retrying transient failures. A missing image is not retried."""

    def attempt() -> None:
        account = credentials_for(project.engine, project.settings, reference)
        with transfer(project, "pull", reference) as progress:
            project.engine.pull(reference, account, progress=progress)

    retry_call(project.console, "the pull", attempt)
