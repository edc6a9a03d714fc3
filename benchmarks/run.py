"""Measure guix-tasks against the shell lines it replaces, side by side on one engine.

    python benchmarks/run.py [--rounds N] [--only SCENARIO] [--output docs/benchmarks]

The image has a package of 500 MB in 20,000 files.  In every round each contestant goes through all
scenarios, in turns: everything cold, nothing changed, one package of 1 MB added, that package
removed, new commits of the channels, a changed file of the base image.  For a package that is added
or removed the shell lines are those that a person would run by hand for that change alone, on top
of what is there; for all others they start from the beginning, because nothing else gives the same
image.  After the rounds comes one package of 1 MB added on an engine that has nothing yet, from the
image and the CACHE_IMAGE in the registry; then 50 random changes of the packages on a small image:
they show how an image grows, and what is pushed in all.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contestants import (
    NEW_CHANNELS,
    OLD_CHANNELS,
    ROOT,
    Buildx,
    Contestant,
    Goal,
    Inv,
    Registry,
    ShellLines,
    Testbed,
    testbed,
)
from measure import blobs
from report import Sample, verdicts, write

from guix_tasks.errors import GuixTasksError
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from types import FrameType

REPEATED = ("cold", "nothing", "added", "removed", "channel", "base")
SCENARIOS = (*REPEATED, "fresh", "growth")
CHANGES = 50
SEED = 20261128
_SMALL = ("hello", "greet")
_PACKAGES = (*_SMALL, "large")
_PART = "part-1"


@dataclass
class Session:
    """The measurements of one call."""

    bed: Testbed
    console: Console
    contestants: list[Contestant]
    samples: list[Sample] = field(default_factory=list)

    def rounds(self, count: int, scenarios: tuple[str, ...]) -> None:
        """Go through the scenarios, the contestants in turns."""
        for number in range(count):
            turn = number % len(self.contestants)
            order = self.contestants[turn:] + self.contestants[:turn]
            channels = OLD_CHANNELS
            for scenario in REPEATED:
                if scenario not in ("cold", *scenarios):
                    continue
                if scenario == "channel":
                    channels = NEW_CHANNELS
                goal = Goal(
                    packages=(*_PACKAGES, *([_PART] if scenario == "added" else [])),
                    channels=channels,
                    added=(_PART,) if scenario == "added" else (),
                    removed=(_PART,) if scenario == "removed" else (),
                    base=scenario if scenario == "base" else "",
                )
                for contestant in order:
                    if scenario == "cold":
                        self._clear(contestant)
                    if scenario == "cold" or contestant.measures(scenario):
                        self._run(contestant, scenario, number, goal, keep=scenario in scenarios)

    def fresh(self) -> None:
        """Add a package on an engine that has nothing yet."""
        goal = Goal(_PACKAGES, OLD_CHANNELS)
        more = Goal((*_PACKAGES, _PART), OLD_CHANNELS, added=(_PART,))
        for contestant in self.contestants:
            if contestant.measures("fresh"):
                self._clear(contestant)
                self._run(contestant, "shared", 0, goal, keep=False)
                contestant.move()
                self._run(contestant, "fresh", 0, more)

    def growth(self) -> None:
        """Change the packages at random again and again, and make the last image at once."""
        chance = random.Random(SEED)  # noqa: S311 -- the same changes in each run
        self.console.print(f"growth: seed {SEED}")
        parts = [f"part-{number}" for number in range(1, 21)]
        goal, installed = Goal(_SMALL, OLD_CHANNELS), set[str]()
        changing = [each for each in self.contestants if each.measures("change")]
        for contestant in changing:
            self._clear(contestant)
            self._run(contestant, "cold", 0, goal, keep=False)
        for number in range(1, CHANGES + 1):
            missing = [part for part in parts if part not in installed]
            least, most = 0 if missing else 1, min(2, len(installed))
            removed = set(chance.sample(sorted(installed), chance.randint(least, most)))
            least, most = 0 if removed else 1, min(2, len(missing))
            added = set(chance.sample(missing, chance.randint(least, most)))
            installed = (installed - removed) | added
            goal = Goal(
                packages=(*_SMALL, *sorted(installed)),
                channels=OLD_CHANNELS,
                added=tuple(sorted(added)),
                removed=tuple(sorted(removed)),
            )
            for contestant in changing:
                self._run(contestant, "change", number, goal)
        for contestant in changing:
            self._clear(contestant)
            sample = self._run(contestant, "cold", 0, goal, keep=False)
            self.samples.append(sample.renamed("scratch"))

    def _clear(self, contestant: Contestant) -> None:
        before = self.bed.images()
        contestant.clear()
        contestant.registry.empty()
        self.bed.drop(before)

    def _run(
        self, contestant: Contestant, scenario: str, number: int, goal: Goal, *, keep: bool = True
    ) -> Sample:
        registry = contestant.registry
        images, before = self.bed.images(), blobs(registry.data)
        sent = self.bed.substitutes.sent
        times = self.bed.meter.run(contestant.command(scenario, goal))
        image = self.bed.engine.image(registry.image)
        if image is None:
            raise RuntimeError(f"{contestant.name}: there is no {registry.image}")
        pushed = {name: size for name, size in blobs(registry.data).items() if name not in before}
        measured = keep and contestant.measures(scenario)
        sample = Sample(
            scenario=scenario,
            contestant=contestant.name,
            round=number,
            times=times,
            pushed=sum(pushed.values()),
            fetched=self.bed.substitutes.sent - sent,
            size=image.size,
            layers=len(image.layers),
            added=len(goal.added),
        )
        if measured:
            self.samples.append(sample)
        self.console.print(f"{scenario} {number}: {sample}{'' if measured else ' (not counted)'}")
        self.bed.drop(images)
        return sample


def _tidy(contestant: Contestant) -> None:
    # What went wrong before is the error to tell.
    with suppress(RuntimeError):
        contestant.clear()


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise RuntimeError("stopped by SIGTERM")


def main() -> int:
    """Measure, write what came out, say whether the goals are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--only", choices=SCENARIOS, action="append", metavar="SCENARIO",
                        help=" ".join(SCENARIOS))  # fmt: skip
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks", metavar="FOLDER")
    arguments = parser.parse_args()
    scenarios = tuple(arguments.only or SCENARIOS)
    console, notes = Console(), []
    signal.signal(signal.SIGTERM, _stop)
    try:
        with ExitStack() as stack:
            bed = stack.enter_context(testbed(console))
            buildx = Buildx(bed, Registry(bed, "buildx"))
            contestants: list[Contestant] = [
                ShellLines(bed, Registry(bed, "shell")), Inv(bed, Registry(bed, "inv")), buildx,
            ]  # fmt: skip
            if buildx.note:
                notes.append(buildx.note)
                console.print(buildx.note)
            for contestant in contestants:
                stack.enter_context(contestant.registry.running(console))
                stack.callback(_tidy, contestant)
            session = Session(bed, console, contestants)
            if set(scenarios) & {*REPEATED}:
                session.rounds(arguments.rounds, scenarios)
            if "fresh" in scenarios:
                session.fresh()
            if "growth" in scenarios:
                session.growth()
    except (GuixTasksError, RuntimeError) as error:
        console.error(str(error))
        return 1
    write(arguments.output, session.samples, notes)
    for verdict in verdicts(session.samples):
        console.result(str(verdict))
    return 0


if __name__ == "__main__":
    sys.exit(main())
