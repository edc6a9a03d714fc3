"""Tasks that build, inspect and publish an image."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from invoke.exceptions import Exit
from invoke.tasks import task

from guix_tasks.cli.errors import report_errors
from guix_tasks.cli.session import (
    buildx_session,
    docker_command,
    examine,
    is_dry_run,
    project_session,
    settings_session,
    single_platform_session,
)
from guix_tasks.cli.tasks.output import long_task

if TYPE_CHECKING:
    from invoke.context import Context

CHECK_FAILED = 1

FORCE = {"force": "run the stage even if nothing changed"}
NO_COMMIT = {"no_commit": "do not commit; keep the work container for `inv commit`"}
KEEP_FAILED = {"keep_failed": "keep the work container if a command fails"}
UPSTREAM = {"upstream": "first run the stages it starts from that are not up to date"}


@long_task(help=FORCE)
def base(c: Context, force: bool = False) -> None:
    """Build the base image from DOCKERFILE.

    This is a `docker build` with BASE_IMAGE as a build argument.  The other
    stages start from its image.
    """
    with project_session(c) as project, project.lock("base"):
        from guix_tasks.stages.lifecycle import StageOptions, make_each

        make_each(project, "base", StageOptions(force=force))


@long_task(
    help={
        **FORCE,
        **UPSTREAM,
        **NO_COMMIT,
        **KEEP_FAILED,
        "update": "pull the newest commits of the channels and rewrite the lock",
        "disable_authentication": "accept channels without an introduction, unverified",
    }
)
def pull(
    c: Context,
    force: bool = False,
    upstream: bool = False,
    update: bool = False,
    no_commit: bool = False,
    keep_failed: bool = False,
    disable_authentication: bool = False,
) -> None:
    """Run `guix pull` on the base image and commit.

    The channels are those of GUIX_CHANNELS, at the commits of
    GUIX_CHANNELS_LOCK.  Without a lock, pull the newest commits and write
    the lock.
    """
    session = single_platform_session if no_commit else project_session
    with session(c) as project, project.lock("pull"):
        from guix_tasks.stages.lifecycle import StageOptions, make_each

        make_each(project, "pull", StageOptions(
            force=force, upstream=upstream, update=update, commit=not no_commit,
            keep_failed=keep_failed, disable_authentication=disable_authentication,
        ))  # fmt: skip


@long_task(
    iterable=["package"],
    help={
        "package": "a package instead of GUIX_PACKAGES; repeatable",
        **FORCE,
        **UPSTREAM,
        **NO_COMMIT,
        **KEEP_FAILED,
    },
)
def install(
    c: Context,
    package: list[str] | None = None,
    force: bool = False,
    upstream: bool = False,
    no_commit: bool = False,
    keep_failed: bool = False,
) -> None:
    """Install the packages and commit.

    The image contains the profile of the base image, GUIX_MANIFEST and
    GUIX_PACKAGES.  Packages that an earlier call installed are gone.
    """
    session = single_platform_session if no_commit else project_session
    overrides = {"GUIX_PACKAGES": package} if package else None
    with session(c, overrides) as project, project.lock("install"):
        from guix_tasks.stages.lifecycle import StageOptions, make_each

        packages = project.settings.guix_packages if package else ()
        make_each(project, "install", StageOptions(
            force=force, upstream=upstream, commit=not no_commit, keep_failed=keep_failed,
            packages=packages,
        ))  # fmt: skip


@long_task()
def commit(c: Context) -> None:
    """Commit the kept work container as IMAGE.

    `inv shell`, `inv run --keep` and a stage with --no-commit keep a work
    container.
    """
    with single_platform_session(c) as project, project.lock("commit"):
        from guix_tasks.commands.commit import commit

        commit(project)


@long_task()
def squash(c: Context) -> None:
    """Merge all layers above the base image into one."""
    with single_platform_session(c) as project, project.lock("squash"):
        from guix_tasks.commands.squash import squash

        squash(project)


@task(auto_shortflags=False)
def rollback(c: Context) -> None:
    """Restore the previous IMAGE."""
    with single_platform_session(c) as project, project.lock("rollback"):
        from guix_tasks.commands.rollback import rollback

        rollback(project)


@long_task(help={"stage": "the image of this stage instead of IMAGE"})
def verify(c: Context, stage: str = "") -> None:
    """Test IMAGE in a fresh container.

    Check that the daemon answers, that a derivation builds, that the channels
    match the lock, and that the packages and certificates exist.
    """
    with project_session(c) as project:
        from guix_tasks.commands.verify import verify as check

        for platform_project in project.each_platform():
            check(platform_project, stage or None)


@long_task(help={"stage": "the tag of this stage instead of IMAGE and TAGS"})
def push(c: Context, stage: str = "") -> None:
    """Push IMAGE and TAGS, and print the digest.

    Refuse an image whose stage is stale.
    """
    with project_session(c) as project, project.lock("push"):
        from guix_tasks.commands.push import push as publish

        for platform_project in project.each_platform():
            for reference, digest in publish(platform_project, stage or None).items():
                if digest:  # empty in a dry run
                    project.console.result(f"{reference}@{digest}")


@task(auto_shortflags=False)
def manifest(c: Context) -> None:
    """Join the pushed platforms into one IMAGE.

    The platforms are those of PLATFORMS, or all in out/digests/ if that is
    not set.  Print the digest.
    """
    with buildx_session(c, needs_engine=False) as (project, program):
        from guix_tasks.commands.manifest import join

        if digest := join(project, program):
            project.console.result(f"{project.settings.image}@{digest}")


@task(
    iterable=["package"],
    help={
        "package": "a package instead of GUIX_PACKAGES; repeatable",
        "json": "print the result as JSON",
    },
    auto_shortflags=False,
)
def weather(c: Context, package: list[str] | None = None, json: bool = False) -> None:
    """Check whether the packages have substitutes."""
    overrides = {"GUIX_PACKAGES": package} if package else None
    with project_session(c, overrides) as project, project.lock("weather"):
        from guix_tasks.commands.weather import weather

        weather(project, as_json=json)


@long_task(
    iterable=["package", "symlink"],
    incrementable=["relocatable"],
    help={
        "package": "a package instead of GUIX_PACKAGES and GUIX_MANIFEST; repeatable",
        "format": "tarball, docker, squashfs, deb, rpm or appimage",
        "relocatable": "make programs run from any directory, like guix pack -R; twice: -RR",
        "symlink": "a symbolic link to add, for example /bin=bin; repeatable",
        "compression": "gzip, lzip, xz, bzip2, zstd or none",
        "max_layers": "maximum number of layers of a docker archive",
        "entry_point": "program that the packed image or AppImage runs, for example bin/hello",
        "name": "first part of the file name",
    },
)
def pack(
    c: Context,
    package: list[str] | None = None,
    format: str = "tarball",  # noqa: A002 -- the option's name
    relocatable: int = 0,
    symlink: list[str] | None = None,
    compression: str = "",
    max_layers: int = 0,
    entry_point: str = "",
    name: str = "",
) -> None:
    """Pack the packages into a file in out/.

    Pack GUIX_PACKAGES and GUIX_MANIFEST with the Guix of IMAGE, and write the
    SHA-256 to a file next to the pack.
    """
    with project_session(c) as project, project.lock("pack"):
        from guix_tasks.commands.pack import pack_each
        from guix_tasks.guix import Pack

        links = tuple(symlink or ())
        options = Pack(format, relocatable, links, compression, max_layers, entry_point)
        pack_each(project, options, name, tuple(package or ()))


@task(
    help={"url": "URL under which the files will be published, instead of RELEASE_URL"},
    auto_shortflags=False,
)
def release(c: Context, url: str = "") -> None:
    """Write out/build.json, the index of packed files.

    For each Guix system it contains the URL of the file, its SHA-256 and the
    channels.  Entries of packs that did not change are kept.
    """
    with settings_session({"RELEASE_URL": url}) as (settings, console):
        from guix_tasks.commands.release import release as write

        if not is_dry_run(c, "release"):
            console.result(str(write(settings, console)))


@task(
    help={
        "stage": "the image of this stage instead of IMAGE",
        "keep": "keep the work container for `inv commit`",
    },
    auto_shortflags=False,
)
def run(c: Context, stage: str = "", keep: bool = False) -> None:
    """Run a command: `inv run -- COMMAND ARGUMENT...`.

    It runs in a work container of IMAGE, next to the Guix daemon.  `inv`
    exits with the status of the command.
    """
    with single_platform_session(c) as project:
        from guix_tasks.commands.run import run

        status = run(project, _after_dashes(sys.argv), stage=stage or None, keep=keep)
        if status:
            raise Exit(code=status)


@task(
    help={
        "stage": "the image of this stage instead of IMAGE",
        "fresh": "remove a kept work container first",
    },
    auto_shortflags=False,
)
def shell(c: Context, stage: str = "", fresh: bool = False) -> None:
    """Open a shell in a work container of IMAGE.

    The container is kept for `inv commit` or the next `inv shell`.
    """
    with single_platform_session(c) as project:
        from guix_tasks.commands.shell import shell

        docker, environment = docker_command(project)
        shell(project, docker, environment, stage=stage or None, fresh=fresh)


@task(
    help={
        "size": "show the sizes of stages, layers and the largest store items",
        "plot": "write the sizes as an SVG chart to this file",
        "json": "print one JSON document",
    },
    auto_shortflags=False,
)
def status(c: Context, size: bool = False, plot: str = "", json: bool = False) -> None:
    """Show stages, images, sizes, ages and channels.

    A stage is up to date, missing, or stale for a reason that is shown.
    """
    with (single_platform_session if size or plot else project_session)(c) as project:
        from guix_tasks.commands.status import show_status

        show_status(project, size=size, plot=plot, as_json=json)


@task(name="doctor", help={"json": "print the findings as JSON"}, auto_shortflags=False)
def doctor(c: Context, json: bool = False) -> None:
    """Check this machine and suggest fixes.

    Exit with status 1 if a check fails.
    """
    with report_errors():
        findings = examine(c)
        from guix_tasks.commands.doctor import show
        from guix_tasks.commands.doctor.finding import State
        from guix_tasks.ui.console import Console

        show(Console(), findings, as_json=json)
        if any(finding.state is State.FAILED for _, finding in findings):
            raise Exit(code=CHECK_FAILED)


@task(help={"work": "remove only work containers"}, auto_shortflags=False)
def clean(c: Context, work: bool = False) -> None:
    """Remove this project's containers, images and volumes.

    Remove work containers, the substitute server, stage images, volumes, and
    IMAGE and TAGS if they point to a stage.  Nothing else is removed.
    """
    with project_session(c) as project, project.lock("clean"):
        from guix_tasks.commands.clean import clean as remove
        from guix_tasks.commands.clean import print_removed

        print_removed(project, remove(project, work_only=work))


def _after_dashes(argv: list[str]) -> list[str]:
    # Invoke's `remainder` is one string without the original quoting.
    return argv[argv.index("--") + 1 :] if "--" in argv else []
