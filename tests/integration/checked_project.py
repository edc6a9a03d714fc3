"""A project on a private engine whose tags and images are checked after each interrupted stage."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ROOT
from isolated_host import start_engine_and_registry

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

    from harness import Project, ProjectFactory
    from isolated_host import IsolatedHost

    from guix_tasks.engine.api import Image
    from guix_tasks.engine.docker import DockerEngine

PARENTS = {"base": "", "pull": "base", "install": "pull"}
RESULTS = (*PARENTS, SQUASH)


@dataclass
class CheckedProject:
    """A project on the engine of an isolated host."""

    host: IsolatedHost
    project: Project
    rng: random.Random
    changes: int = 0

    @property
    def engine(self) -> DockerEngine:
        return self.host.client()

    def image(self, name: str = "") -> Image:
        """Return the image of a stage, or ``IMAGE``."""
        image = self.engine.image(self.project.tag(name))
        assert image, name
        return image

    def prepare(self, stage: str) -> None:
        """Change an input of a stage, so that the stage has work to do."""
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
            self.prepare(self.rng.choice(["pull", "install", "install", "install"]))
            project.ok("pull", "install")

    def finish(self, stage: str) -> None:
        """Run the stage and all later stages, and check that the interrupted run left nothing."""
        project = self.project
        rest = ("base", "pull", "install", "push") if stage in PARENTS else ("push",)
        digest = project.ok(stage, *rest).stdout.strip().rpartition("@")[2]
        assert project.containers() == []
        if stage != "commit":
            # A squashed image can be the result of the install stage.
            assert project.id() in (project.id("install"), project.id(SQUASH))
        account = self.host.registry.account.credentials()
        assert self.engine.remote_digest(project.image, account) == digest
        # An image that lost its tag in this run is removed by the next run.
        project.ok("base")
        untagged = self.untagged_images()
        assert untagged == [], untagged

    def check_hello(self, name: str = "") -> None:
        result = self.project.docker.run(self.project.tag(name), "hello")
        assert "Hello, world!" in result.stdout, result.stderr

    def check(self, stage: str, previous: dict[str, str], *, run_containers: bool = True) -> None:
        """Check that each tag points to either its previous image or the new image of a stage.

        With ``run_containers``, the images are run in a random part of the checks.
        """
        tags = self.project.tags()
        assert previous.keys() <= tags.keys()
        moved = {name for name, image in tags.items() if previous.get(name) != image}
        tag = self.project.image.rpartition(":")[2]
        assert moved <= {tag, f"{tag}-{stage}", f"{tag}-{PREVIOUS}"}
        if f"{tag}-{stage}" in moved:
            self._check_stage(stage)
        if tag in moved:
            image = self.image()
            made_by_hand = stage == "commit" and proven_stage(image) == HAND_MADE
            assert made_by_hand or image.id in {tags.get(f"{tag}-{name}") for name in RESULTS}
        if f"{tag}-{PREVIOUS}" in moved:
            assert tags[f"{tag}-{PREVIOUS}"] == previous[tag]
        if run_containers and self.project.id("install") and self.rng.random() < 0.3:
            self.check_hello()
            self.check_hello("install")

    def _check_stage(self, stage: str) -> None:
        image = self.image(stage)
        assert proven_stage(image) == stage
        if stage == SQUASH:
            base = self.image("base")
            assert shared_layers(image, base) == len(base.layers)
            assert len(image.layers) == len(base.layers) + 1
        elif PARENTS[stage]:
            assert is_child(image, self.image(PARENTS[stage]))

    def untagged_images(self) -> list[Image | None]:
        options = ("--no-trunc", "--quiet", "--filter=dangling=true")
        listing = self.project.docker.ok("image", "ls", *options)
        return [self.engine.image(image) for image in listing.split()]


def create_checked_project(
    host: IsolatedHost, registry: Path, factory: ProjectFactory, directory: Path, rng: random.Random
) -> CheckedProject:
    """Create a project without images, after starting the engine and the registry of its host."""
    project = start_engine_and_registry(host, registry, factory).create(directory)
    resources = Path("guix_tasks", "stages", "resources")
    shutil.copytree(ROOT / resources, directory / "context" / resources)
    project.set(
        BUILD_CONTEXT="context",
        DOCKERFILE=str(directory / "Dockerfile"),
        MOUNTS=f"{project.settings['MOUNTS']} {directory / 'mounted'}:/mounted:ro",
    )
    checked_project = CheckedProject(host, project, rng)
    for stage in ("base", "pull"):
        checked_project.prepare(stage)
    return checked_project
