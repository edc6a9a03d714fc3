"""Stage base: the project's Dockerfile on the base image."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from guix_tasks.engine import BuildSpec
from guix_tasks.errors import EngineError
from guix_tasks.ledger import STAGE_LABEL
from guix_tasks.stage import commit_image, say_done
from guix_tasks.work import network, unstarted_container

if TYPE_CHECKING:
    from guix_tasks.engine import Engine
    from guix_tasks.settings import Settings
    from guix_tasks.stage import Project


def build_base(project: Project) -> None:
    """Build ``DOCKERFILE`` and give the result its stage tag.

    Raises ``BuilderError`` when it does not build; then no tag has moved.
    """
    started = time.monotonic()
    engine, settings = project.engine, project.settings
    project.console.say(f"base: {settings.dockerfile} on {settings.base_image}")
    built = engine.build(base_spec(engine, settings), project.console.stream)
    parent = engine.image(built)
    if parent is None:
        raise EngineError(f"the engine built {built} and does not have it; run it again")
    # The label that proves a stage names the layers, which are known only now.
    with unstarted_container(engine, settings, built) as container:
        project.ledger.say_what_is_left(project.console)
        commit_image(project, container, parent, project.ledger.tag("base"), {STAGE_LABEL: "base"})
    project.ledger.point_image()
    say_done(project, "base", started)


def base_spec(engine: Engine, settings: Settings) -> BuildSpec:
    args = {"BASE_IMAGE": str(settings.base_image), **settings.build_args}
    if settings.guix_binary_url:
        args["GUIX_BINARY_URL"] = settings.guix_binary_url
        args["GUIX_BINARY_SHA256"] = settings.guix_binary_sha256 or ""
    reachable = network(engine, settings)
    return BuildSpec(
        context=settings.build_context,
        dockerfile=settings.dockerfile,
        args=args,
        secrets=settings.build_secrets,
        platform=str(settings.platform) if settings.platform else None,
        network=reachable if reachable in ("host", "none") else None,
    )
