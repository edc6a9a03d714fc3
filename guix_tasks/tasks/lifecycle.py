"""The stages of an image, from the base to the registry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from invoke.exceptions import Exit
from invoke.tasks import task

from guix_tasks.boundary import (
    docker_command,
    examine,
    guarded,
    left_at_showing,
    opened,
    opened_settings,
    opened_single,
    opened_with_buildx,
)

if TYPE_CHECKING:
    from invoke.context import Context

CHECK_FAILED = 1

FORCE = {"force": "although nothing changed"}
NO_COMMIT = {"no_commit": "leave the work container for `inv commit` instead of committing it"}
KEEP_FAILED = {"keep_failed": "leave the work container of a command that failed"}
UPSTREAM = {"upstream": "bring the stages that it starts from up to date first"}


@task(help=FORCE, auto_shortflags=False)
def base(c: Context, force: bool = False) -> None:
    """Build DOCKERFILE on BASE_IMAGE."""
    with opened(c) as project, project.alone("base"):
        from guix_tasks.lifecycle import Wishes, make_each

        make_each(project, "base", Wishes(force=force))


@task(
    help={
        **FORCE,
        **UPSTREAM,
        **NO_COMMIT,
        **KEEP_FAILED,
        "update": "take the channels as they are now, and lock",
        "disable_authentication": "take channels, too, that nobody vouches for",
    },
    auto_shortflags=False,
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
    """Run `guix pull` on the base stage."""
    with (opened_single if no_commit else opened)(c) as project, project.alone("pull"):
        from guix_tasks.lifecycle import Wishes, make_each

        wishes = Wishes(
            force, upstream, update, not no_commit, keep_failed, (), disable_authentication
        )
        make_each(project, "pull", wishes)


@task(
    iterable=["package"],
    help={
        "package": "a package instead of GUIX_PACKAGES; repeatable",
        **FORCE,
        **UPSTREAM,
        **NO_COMMIT,
        **KEEP_FAILED,
    },
    auto_shortflags=False,
)
def install(
    c: Context,
    package: list[str] | None = None,
    force: bool = False,
    upstream: bool = False,
    no_commit: bool = False,
    keep_failed: bool = False,
) -> None:
    """Install GUIX_PACKAGES and GUIX_MANIFEST on the pull stage."""
    one_or_all = opened_single if no_commit else opened
    given = {"GUIX_PACKAGES": package} if package else None
    with one_or_all(c, given) as project, project.alone("install"):
        from guix_tasks.lifecycle import Wishes, make_each

        packages = project.settings.guix_packages if package else ()
        wishes = Wishes(force, upstream, False, not no_commit, keep_failed, packages=packages)
        make_each(project, "install", wishes)


@task(auto_shortflags=False)
def commit(c: Context) -> None:
    """Commit the work container that was left by hand as IMAGE."""
    with opened_single(c) as project, project.alone("commit"):
        from guix_tasks import hands

        hands.commit(project)


@task(auto_shortflags=False)
def squash(c: Context) -> None:
    """Make one layer of all that lies above the base stage."""
    with opened_single(c) as project, project.alone("squash"):
        from guix_tasks.squash import squash as one_layer

        one_layer(project)


@task(auto_shortflags=False)
def rollback(c: Context) -> None:
    """Let IMAGE be what it was before it last moved."""
    with opened_single(c) as project, project.alone("rollback"):
        from guix_tasks import hands

        hands.rollback(project)


@task(help={"stage": "the image of this stage instead of IMAGE"}, auto_shortflags=False)
def verify(c: Context, stage: str = "") -> None:
    """Test IMAGE from outside, in a fresh container."""
    with opened(c) as project:
        from guix_tasks.verify import verify as check

        for each in project.each_platform():
            check(each, stage or None)


@task(help={"stage": "the tag of this stage instead of IMAGE and TAGS"}, auto_shortflags=False)
def push(c: Context, stage: str = "") -> None:
    """Push IMAGE and TAGS, and print the digest."""
    with opened(c) as project, project.alone("push"):
        from guix_tasks.publish import push as publish

        for each in project.each_platform():
            for reference, digest in publish(each, stage or None).items():
                if digest:  # a dry run has none
                    each.console.result(f"{reference}@{digest}")


@task(auto_shortflags=False)
def manifest(c: Context) -> None:
    """Join what was pushed for each platform under IMAGE, and print the digest."""
    with opened_with_buildx(c, needs_engine=False) as (project, program):
        from guix_tasks.manifest import join

        digest = join(project, program)
        if digest:
            project.console.result(f"{project.settings.image}@{digest}")


@task(
    iterable=["package", "symlink"],
    incrementable=["relocatable"],
    help={
        "package": "a package instead of GUIX_PACKAGES and GUIX_MANIFEST; repeatable",
        "format": "tarball (the default), docker, oci, squashfs, deb, rpm or appimage",
        "relocatable": "to be unpacked anywhere, as guix pack -R; said twice, as -RR",
        "symlink": "a link in it, as /bin=bin; repeatable",
        "compression": "gzip, lzip, xz, bzip2, zstd or none",
        "max_layers": "the most layers that a docker or OCI archive may have",
        "entry_point": "the program that an image or an appimage runs, as bin/hello",
        "name": "what the file's name begins with",
    },
    auto_shortflags=False,
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
    """Pack GUIX_PACKAGES and GUIX_MANIFEST into a file in out/, with its SHA-256."""
    with opened(c) as project, project.alone("pack"):
        from guix_tasks.guix import Pack
        from guix_tasks.pack import pack_each

        links = tuple(symlink or ())
        wanted = Pack(format, relocatable, links, compression, max_layers, entry_point)
        pack_each(project, wanted, name, tuple(package or ()))


@task(
    help={"url": "where the files will be downloadable, instead of RELEASE_URL"},
    auto_shortflags=False,
)
def release(c: Context, url: str = "") -> None:
    """Write out/build.json: where each system's packs are, with SHA-256 and channels."""
    with opened_settings({"RELEASE_URL": url}) as (settings, console):
        from guix_tasks.release import release as write

        if not left_at_showing(c, "release"):
            console.result(str(write(settings, console)))


@task(
    help={
        "stage": "the image of this stage instead of IMAGE",
        "keep": "leave the work container for `inv commit`",
    },
    auto_shortflags=False,
)
def run(c: Context, stage: str = "", keep: bool = False) -> None:
    """Run one command in a work container, as `inv run -- COMMAND ARGUMENT...`."""
    with opened_single(c) as project:
        from guix_tasks import hands

        status = hands.run(project, _after_dashes(sys.argv), stage=stage or None, keep=keep)
        if status:
            raise Exit(code=status)


@task(
    help={
        "stage": "the image of this stage instead of IMAGE",
        "fresh": "drop the work container that is there, if any",
    },
    auto_shortflags=False,
)
def shell(c: Context, stage: str = "", fresh: bool = False) -> None:
    """Open a shell in a work container, which is left for `inv commit`."""
    with opened_single(c) as project:
        from guix_tasks import hands

        docker, environment = docker_command(project)
        hands.shell(project, docker, environment, stage=stage or None, fresh=fresh)


@task(
    help={
        "size": "show what is in the image: stages, layers, the largest store items",
        "plot": "draw that as an SVG picture into this file",
    },
    auto_shortflags=False,
)
def status(c: Context, size: bool = False, plot: str = "") -> None:
    """Show the stages, their images, sizes, ages and channels."""
    with (opened_single if size or plot else opened)(c) as project:
        from guix_tasks import upkeep

        if size or plot:
            upkeep.show_sizes(project, plot)
        else:
            rows = [row for each in project.each_platform() for row in upkeep.status_rows(each)]
            project.console.table(upkeep.STATUS_HEADER, rows)


@task(
    name="doctor", help={"json": "print the findings as JSON, for machines"}, auto_shortflags=False
)
def doctor(c: Context, json: bool = False) -> None:
    """Check what can be wrong on this machine; one line each, with the mend."""
    with guarded():
        findings = examine(c)
        from guix_tasks.console import Console
        from guix_tasks.doctor import State, show

        show(Console(), findings, as_json=json)
        if any(each.state is State.FAILED for each in findings):
            raise Exit(code=CHECK_FAILED)


@task(help={"work": "only the work containers"}, auto_shortflags=False)
def clean(c: Context, work: bool = False) -> None:
    """Remove this project's work containers, stage images and cache volumes, nothing else."""
    with opened(c) as project, project.alone("clean"):
        from guix_tasks.upkeep import clean as remove

        removed = remove(project, work_only=work)
        project.console.say(f"clean: {len(removed)} removed" if removed else "clean: nothing there")


def _after_dashes(argv: list[str]) -> list[str]:
    # Invoke's own `remainder` is one string that has lost its quoting.
    return argv[argv.index("--") + 1 :] if "--" in argv else []
