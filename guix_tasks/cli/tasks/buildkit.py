"""Tasks that build with BuildKit and manage its builder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.collection import Collection
from invoke.tasks import task

from guix_tasks.cli.session import buildx_session
from guix_tasks.cli.tasks.output import long_task

if TYPE_CHECKING:
    from invoke.context import Context


@long_task(
    help={
        "no_pull": "skip `guix pull` and install with the Guix of the base image",
        "update": "pull the newest commits of the channels and rewrite the lock",
        "force": "run every step, even if the builder has it in its cache",
        "by_digest": "push without a tag, for `inv manifest` to join",
        "disable_authentication": "accept channels without an introduction, unverified",
    }
)
def build(
    c: Context,
    no_pull: bool = False,
    update: bool = False,
    force: bool = False,
    by_digest: bool = False,
    disable_authentication: bool = False,
) -> None:
    """Build and push IMAGE with BuildKit.

    This does base, pull, install and push in one build.  Guix runs in steps
    with `RUN --security=insecure`, which BUILDX_BUILDER has to allow.
    """
    with buildx_session(c) as (project, program):
        from guix_tasks.buildkit.build import BuildOptions
        from guix_tasks.buildkit.build import build as bake

        trust = not disable_authentication
        options = BuildOptions(
            pull=not no_pull, update=update, force=force, by_digest=by_digest, authenticate=trust
        )
        if result := bake(project, program, options):
            project.console.result(result)


@long_task(
    help={
        "recreate": "recreate an existing builder and keep its cache",
        "use": "also select it for your `docker buildx` commands",
        "plugin": "install only the buildx plugin, which `inv manifest` needs",
    },
)
def setup(
    c: Context,
    recreate: bool = False,
    use: bool = False,
    plugin: bool = False,
) -> None:
    """Create the BuildKit builder BUILDX_BUILDER.

    The builder allows insecure steps; one such step is run as a test.  The
    buildx plugin is installed for your user if it is missing.
    """
    with buildx_session(c, needs_engine=not plugin, install=True) as (project, program):
        from guix_tasks.commands.buildx_setup import SetupOptions, set_up

        if not plugin:
            set_up(project, program, SetupOptions(recreate=recreate, use=use))


@task(auto_shortflags=False)
def status(c: Context) -> None:
    """Show the builder's nodes, entitlements and cache."""
    with buildx_session(c) as (project, program):
        from guix_tasks.commands import buildx_setup

        rows = buildx_setup.status_rows(project, program)
        project.console.table(buildx_setup.STATUS_HEADER, rows)
        project.console.result(f"cache: {buildx_setup.cache_size(project, program)}")


@task(
    help={"keep_cache": "keep its cache for a new builder with the same name"},
    auto_shortflags=False,
)
def down(c: Context, keep_cache: bool = False) -> None:
    """Remove the builder."""
    with buildx_session(c) as (project, program):
        from guix_tasks.commands.buildx_setup import remove_builder

        remove_builder(project, program, keep_cache=keep_cache)


buildx = Collection("buildx", setup, build, status, down)
