"""Tasks for local infrastructure: engine, registry, base image, substitutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.collection import Collection

from guix_tasks.cli.task import long_task, task

if TYPE_CHECKING:
    from guix_tasks.cli.session import Session


@task(name="up", help={"image_store": "containerd or overlay2, instead of ENGINE_IMAGE_STORE"})
def engine_up(session: Session, image_store: str = "") -> None:
    """Start a private Docker Engine, if there is none.

    Unpack it from Debian's packages into a private directory.  Nothing is
    installed.
    """
    from guix_tasks.bootstrap.engine import private_engine

    settings = session.use(session.load({"ENGINE_IMAGE_STORE": image_store}))
    if not session.skips("engine.up"):
        private_engine().up(session.console, settings.engine_image_store)


@task(name="down")
def engine_down(session: Session) -> None:
    """Stop the private Docker Engine."""
    from guix_tasks.bootstrap.engine import private_engine

    if not session.skips("engine.down"):
        private_engine().down(session.console)


@task(name="up", help={"port": "the port on loopback (default 5055)"})
def registry_up(session: Session, port: int = 5055) -> None:
    """Start a local registry for `inv push`.

    It listens on loopback and requires a generated password, which these
    tasks know.
    """
    from guix_tasks.bootstrap.registry import registry_for

    project = session.project()
    if not session.skips("registry.up", f"--port={port}"):
        registry_for(project.engine, port).up(project.console)


@task(name="down", help={"port": "the port on loopback (default 5055)"})
def registry_down(session: Session, port: int = 5055) -> None:
    """Stop the local registry.

    The pushed images are kept.
    """
    from guix_tasks.bootstrap.registry import registry_for

    project = session.project()
    if not session.skips("registry.down", f"--port={port}"):
        registry_for(project.engine, port).down(project.console)


@long_task(
    help={
        "tag": "name of the image",
        "plain": "make a Debian image without Guix, to test packs in",
        "force": "make an image again that is on the engine",
    }
)
def rootfs(session: Session, tag: str = "", plain: bool = False, force: bool = False) -> None:
    """Make a base image with Guix from Debian's packages.

    Use it if BASE_IMAGE cannot be pulled: set BASE_IMAGE to the name that
    this task prints.
    """
    from guix_tasks.bootstrap.base_image import BASE_TAG, PLAIN_TAG, make_base

    project = session.project()
    tag = tag or (PLAIN_TAG if plain else BASE_TAG)
    make_base(project.engine, project.console, tag, plain=plain, force=force)


@task(
    name="up",
    help={"listen": "ADDRESS:PORT instead of SUBSTITUTES_LISTEN; 0.0.0.0:8181 for all machines"},
)
def substitutes_up(session: Session, listen: str = "") -> None:
    """Serve substitutes from the newest stage image."""
    from guix_tasks.commands.substitutes import up

    overrides = {"SUBSTITUTES_LISTEN": listen}
    with session.locked_project("substitutes.up", overrides, one_platform=True) as project:
        up(project)


@task(name="down")
def substitutes_down(session: Session) -> None:
    """Stop serving substitutes and keep the signing key."""
    from guix_tasks.commands.substitutes import down

    with session.locked_project("substitutes.down", one_platform=True) as project:
        down(project)


engine = Collection("engine", engine_up, engine_down)
registry = Collection("registry", registry_up, registry_down)
substitutes = Collection("substitutes", substitutes_up, substitutes_down)
