"""Tasks for local infrastructure: engine, registry, base image, substitutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.collection import Collection
from invoke.tasks import task

from guix_tasks.cli.errors import report_errors
from guix_tasks.cli.session import (
    is_dry_run,
    project_session,
    settings_session,
    single_platform_session,
)
from guix_tasks.cli.tasks.output import long_task

if TYPE_CHECKING:
    from invoke.context import Context


@task(
    name="up",
    help={"image_store": "containerd or overlay2, instead of ENGINE_IMAGE_STORE"},
    auto_shortflags=False,
)
def engine_up(c: Context, image_store: str = "") -> None:
    """Start a private Docker Engine, if there is none.

    Unpack it from Debian's packages into a private directory.  Nothing is
    installed.
    """
    with settings_session({"ENGINE_IMAGE_STORE": image_store}) as (settings, console):
        if is_dry_run(c, "engine.up"):
            return
        from guix_tasks.bootstrap.engine import private_engine

        private_engine().up(console, settings.engine_image_store)


@task(name="down", auto_shortflags=False)
def engine_down(c: Context) -> None:
    """Stop the private Docker Engine."""
    with report_errors():
        if is_dry_run(c, "engine.down"):
            return
        from guix_tasks.bootstrap.engine import private_engine
        from guix_tasks.ui.console import Console

        private_engine().down(Console())


@task(name="up", help={"port": "the port on loopback (default 5055)"}, auto_shortflags=False)
def registry_up(c: Context, port: int = 5055) -> None:
    """Start a local registry for `inv push`.

    It listens on loopback and requires a generated password, which these
    tasks know.
    """
    with project_session(c) as project:
        if is_dry_run(c, "registry.up"):
            return
        from guix_tasks.bootstrap.registry import registry_for

        registry_for(project.engine, port).up(project.console)


@task(name="down", help={"port": "the port on loopback (default 5055)"}, auto_shortflags=False)
def registry_down(c: Context, port: int = 5055) -> None:
    """Stop the local registry.

    The pushed images are kept.
    """
    with project_session(c) as project:
        if is_dry_run(c, "registry.down"):
            return
        from guix_tasks.bootstrap.registry import registry_for

        registry_for(project.engine, port).down(project.console)


@long_task(
    help={
        "tag": "name of the image",
        "plain": "make a Debian image without Guix, to test packs in",
    }
)
def rootfs(c: Context, tag: str = "", plain: bool = False) -> None:
    """Make a base image with Guix from Debian's packages.

    Use it if BASE_IMAGE cannot be pulled: set BASE_IMAGE to the name that
    this task prints.
    """
    with project_session(c) as project:
        from guix_tasks.bootstrap.base_image import BASE_TAG, PLAIN_TAG, make_base, make_plain

        make, default = (make_plain, PLAIN_TAG) if plain else (make_base, BASE_TAG)
        make(project.engine, project.console, tag or default)


@task(
    name="up",
    help={"listen": "ADDRESS:PORT instead of SUBSTITUTES_LISTEN; 0.0.0.0:8181 for all machines"},
    auto_shortflags=False,
)
def substitutes_up(c: Context, listen: str = "") -> None:
    """Serve substitutes from the newest stage image."""
    overrides = {"SUBSTITUTES_LISTEN": listen}
    with single_platform_session(c, overrides) as project, project.lock("substitutes.up"):
        from guix_tasks.commands.substitutes import up

        up(project)


@task(name="down", auto_shortflags=False)
def substitutes_down(c: Context) -> None:
    """Stop serving substitutes and keep the signing key."""
    with single_platform_session(c) as project, project.lock("substitutes.down"):
        from guix_tasks.commands.substitutes import down

        down(project)


engine = Collection("engine", engine_up, engine_down)
registry = Collection("registry", registry_up, registry_down)
substitutes = Collection("substitutes", substitutes_up, substitutes_down)

tasks = (rootfs,)
collections = (engine, registry, substitutes)
