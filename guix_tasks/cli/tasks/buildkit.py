"""Tasks that build with BuildKit and manage its builder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.collection import Collection

from guix_tasks.cli.task import long_task, task
from guix_tasks.cli.tasks.lifecycle import UPDATE_HELP

if TYPE_CHECKING:
    from guix_tasks.cli.session import Session


@long_task(
    help={
        "no_pull": "skip `guix pull` and install with the Guix of the base image",
        **UPDATE_HELP,
        "force": "run every step, even if the builder has it in its cache",
        "by_digest": "push without a tag, for `inv manifest` to join",
        "disable_authentication": "accept channels without an introduction, unverified",
    }
)
def build(
    session: Session,
    no_pull: bool = False,
    update: bool = False,
    newest: bool = False,
    force: bool = False,
    by_digest: bool = False,
    disable_authentication: bool = False,
) -> None:
    """Build and push IMAGE with BuildKit.

    This does base, pull, install and push in one build.  Guix runs in steps
    with `RUN --security=insecure`, which BUILDX_BUILDER has to allow.
    """
    from guix_tasks.buildkit.build import BuildOptions, build

    options = BuildOptions(
        pull=not no_pull, update=update or newest, newest=newest, force=force, by_digest=by_digest,
        authenticate=not disable_authentication,
    )  # fmt: skip
    project, buildx = session.buildx()
    if result := build(project, buildx, options):
        project.console.result(result)


@long_task(
    help={
        "recreate": "recreate an existing builder and keep its cache",
        "use": "also select it for your `docker buildx` commands",
        "plugin": "install only the buildx plugin, which `inv manifest` needs",
    },
)
def setup(
    session: Session,
    recreate: bool = False,
    use: bool = False,
    plugin: bool = False,
) -> None:
    """Create the BuildKit builder BUILDX_BUILDER.

    The builder allows insecure steps; one such step is run as a test.  The
    buildx plugin is installed for your user if it is missing.
    """
    from guix_tasks.commands.buildx_setup import set_up

    project, buildx = session.buildx(needs_engine=not plugin, install=True)
    if not plugin:
        set_up(project, buildx, recreate=recreate, use=use)


@task()
def status(session: Session) -> None:
    """Show the builder's nodes, entitlements and cache."""
    from guix_tasks.commands.buildx_setup import STATUS_HEADER, cache_size, status_rows

    project, buildx = session.buildx()
    project.console.table(STATUS_HEADER, status_rows(project, buildx))
    project.console.result(f"cache: {cache_size(project, buildx)}")


@task(help={"keep_cache": "keep its cache for a new builder with the same name"})
def down(session: Session, keep_cache: bool = False) -> None:
    """Remove the builder."""
    from guix_tasks.commands.buildx_setup import remove_builder

    project, buildx = session.buildx()
    remove_builder(project, buildx, keep_cache=keep_cache)


buildx = Collection("buildx", setup, build, status, down)
