"""The BuildKit way: a builder that allows insecure steps, and the image built by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.collection import Collection
from invoke.tasks import task

from guix_tasks.cli.session import opened_with_buildx
from guix_tasks.cli.tasks.output import long_task

if TYPE_CHECKING:
    from invoke.context import Context


@long_task(
    help={
        "no_pull": "leave `guix pull` out, and install with the base's Guix",
        "update": "take the channels as they are now, and write the lock",
        "force": "run every step, whatever is in the builder's cache",
        "by_digest": "push no tag: `inv manifest` joins what several jobs pushed",
        "disable_authentication": "take channels, too, that nobody vouches for",
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
    """Do base, pull, install and push with BuildKit.

    Guix runs in steps with `RUN --security=insecure`, so BUILDX_BUILDER has
    to allow it.
    """
    with opened_with_buildx(c) as (project, program):
        from guix_tasks.buildkit.build import BuildWishes
        from guix_tasks.buildkit.build import build as bake

        trust = not disable_authentication
        wishes = BuildWishes(not no_pull, update, force, by_digest, authenticate=trust)
        answer = bake(project, program, wishes)
        if answer:
            project.console.result(answer)


@long_task(
    help={
        "recreate": "make it anew, and keep its cache",
        "use": "select it for your own `docker buildx` too",
        "binfmt": "let the engine's machine emulate the PLATFORMS that the builder lacks",
        "plugin": "the plugin alone, which is all that `inv manifest` needs, and no builder",
    },
)
def setup(
    c: Context,
    recreate: bool = False,
    use: bool = False,
    binfmt: bool = False,
    plugin: bool = False,
) -> None:
    """Make BUILDX_BUILDER, which allows insecure steps.

    The buildx plugin is installed for you if it is missing, and one such
    step is tried.
    """
    with opened_with_buildx(c, needs_engine=not plugin, install=True) as (project, program):
        from guix_tasks.commands.buildx_setup import SetupWishes, set_up

        if not plugin:
            set_up(project, program, SetupWishes(recreate=recreate, use=use, binfmt=binfmt))


@task(auto_shortflags=False)
def status(c: Context) -> None:
    """Show the builder's nodes, their rights, its cache."""
    with opened_with_buildx(c) as (project, program):
        from guix_tasks.commands import buildx_setup

        rows = buildx_setup.status_rows(project, program)
        project.console.table(buildx_setup.STATUS_HEADER, rows)
        project.console.result(f"cache: {buildx_setup.cache_size(project, program)}")


@task(help={"keep_cache": "keep its cache for the next of its name"}, auto_shortflags=False)
def down(c: Context, keep_cache: bool = False) -> None:
    """Remove the builder."""
    with opened_with_buildx(c) as (project, program):
        from guix_tasks.commands.buildx_setup import take_down

        take_down(project, program, keep_cache=keep_cache)


buildx = Collection("buildx", setup, build, status, down)
