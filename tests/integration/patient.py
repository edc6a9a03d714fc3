"""A project to which all sorts of things happen in the middle of a stage."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ROOT
from island import settle

from guix_tasks.stages.images import (
    HAND_MADE,
    PREVIOUS,
    SQUASH,
    is_child,
    proven_stage,
    shared_layers,
)

if TYPE_CHECKING:
    import random

    from harness import Project, Workshop
    from island import Island

    from guix_tasks.engine.api import Image
    from guix_tasks.engine.docker import DockerEngine

PARENTS = {"base": "", "pull": "base", "install": "pull"}
MADE = (*PARENTS, SQUASH)


@dataclass
class ExaminedProject:
    """A project on an engine of its own."""

    island: Island
    project: Project
    chance: random.Random
    changes: int = 0

    @property
    def engine(self) -> DockerEngine:
        return self.island.client()

    def image(self, name: str = "") -> Image:
        """What a stage's tag, or ``IMAGE``, stands for."""
        found = self.engine.image(self.project.tag(name))
        assert found, name
        return found

    def prepare(self, stage: str) -> None:
        """Let a stage be the next that has something to do."""
        self.changes += 1
        project = self.project
        if stage == "base":
            text = (ROOT / "Dockerfile").read_text()
            (project.directory / "Dockerfile").write_text(f"{text}RUN echo {self.changes} >/once\n")
        elif stage == "pull":
            (project.directory / "mounted").write_text(str(self.changes))
        elif stage == "install":
            other = "hello" if "greet" in project.settings["GUIX_PACKAGES"] else "hello greet"
            project.set(GUIX_PACKAGES=other)
        elif stage == "commit":
            project.ok("run", "--keep", "--", "sh", "-c", f"echo {self.changes} >/by-hand")
        else:
            self.prepare(self.chance.choice(["pull", "install", "install", "install"]))
            project.ok("pull", "install")

    def finish(self, stage: str) -> None:
        """Run the stage again, and all that comes after it: nothing is left of what happened."""
        project = self.project
        rest = ("base", "pull", "install", "push") if stage in PARENTS else ("push",)
        digest = project.ok(stage, *rest).stdout.strip().rpartition("@")[2]
        assert project.containers() == []
        if stage != "commit":
            # One that is squashed may answer to the install stage.
            assert project.id() in (project.id("install"), project.id(SQUASH))
        account = self.island.registry.account.credentials()
        assert self.engine.remote_digest(project.image, account) == digest
        # What lost its name only then goes with the run after.
        project.ok("base")
        nameless = self.nameless()
        assert nameless == [], nameless

    def works(self, name: str = "") -> None:
        said = self.project.docker.run(self.project.tag(name), "hello")
        assert "Hello, world!" in said.stdout, said.stderr

    def check(self, stage: str, before: dict[str, str], *, runs: bool = True) -> None:
        """See that each tag is what it was before a stage, or what it was to become.

        ``runs`` says whether containers can be run, which is then tried now and then.
        """
        now = self.project.tags()
        assert before.keys() <= now.keys()
        moved = {name for name, image in now.items() if before.get(name) != image}
        own = self.project.image.rpartition(":")[2]
        assert moved <= {own, f"{own}-{stage}", f"{own}-{PREVIOUS}"}
        if f"{own}-{stage}" in moved:
            self._check_stage(stage)
        if own in moved:
            image = self.image()
            made_by_hand = stage == "commit" and proven_stage(image) == HAND_MADE
            assert made_by_hand or image.id in {now.get(f"{own}-{each}") for each in MADE}
        if f"{own}-{PREVIOUS}" in moved:
            assert now[f"{own}-{PREVIOUS}"] == before[own]
        if runs and self.project.id("install") and self.chance.random() < 0.3:
            self.works()
            self.works("install")

    def _check_stage(self, stage: str) -> None:
        image = self.image(stage)
        assert proven_stage(image) == stage
        if stage == SQUASH:
            base = self.image("base")
            assert shared_layers(image, base) == len(base.layers)
            assert len(image.layers) == len(base.layers) + 1
        elif PARENTS[stage]:
            assert is_child(image, self.image(PARENTS[stage]))

    def nameless(self) -> list[Image | None]:
        """Images that nothing refers to any more."""
        only = ("--no-trunc", "--quiet", "--filter=dangling=true")
        listing = self.project.docker.ok("image", "ls", *only)
        return [self.engine.image(each) for each in listing.split()]


def admit(
    island: Island, registry: Path, workshop: Workshop, directory: Path, chance: random.Random
) -> ExaminedProject:
    """A project that has nothing yet, on an island where all is there that it needs."""
    project = settle(island, registry, workshop).project(directory)
    resources = Path("guix_tasks", "stages", "resources")
    shutil.copytree(ROOT / resources, directory / "context" / resources)
    project.set(
        BUILD_CONTEXT="context",
        DOCKERFILE=str(directory / "Dockerfile"),
        MOUNTS=f"{project.settings['MOUNTS']} {directory / 'mounted'}:/mounted:ro",
    )
    patient = ExaminedProject(island, project, chance)
    for stage in ("base", "pull"):
        patient.prepare(stage)
    return patient
