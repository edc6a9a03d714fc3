"""The stages of an image, from the base to the registry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from invoke.exceptions import Exit
from invoke.tasks import task

from guix_tasks.cli.errors import guarded
from guix_tasks.cli.session import (
    docker_command,
    examine,
    left_at_showing,
    opened,
    opened_settings,
    opened_single,
    opened_with_buildx,
)
from guix_tasks.cli.tasks.output import long_task

if TYPE_CHECKING:
    from invoke.context import Context

CHECK_FAILED = 1

FORCE = {"force": "run it although nothing changed"}
NO_COMMIT = {"no_commit": "commit nothing, and leave the work container for `inv commit`"}
KEEP_FAILED = {"keep_failed": "leave the work container of a command that fails"}
UPSTREAM = {"upstream": "bring the stages that it starts from up to date first"}


@long_task(help=FORCE)
def base(c: Context, force: bool = False) -> None:
    """Build DOCKERFILE on BASE_IMAGE.

    This is your usual `docker build`.  The stages after it start from its
    image.
    """
    with opened(c) as project, project.alone("base"):
        from guix_tasks.stages.lifecycle import Wishes, make_each

        make_each(project, "base", Wishes(force=force))


@long_task(
    help={
        **FORCE,
        **UPSTREAM,
        **NO_COMMIT,
        **KEEP_FAILED,
        "update": "take the channels as they are now, and write the lock",
        "disable_authentication": "take channels, too, that nobody vouches for",
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
    """Run `guix pull` on the base stage, and commit.

    The channels are those of GUIX_CHANNELS, at the commits that
    GUIX_CHANNELS_LOCK holds.  Without a lock the newest are taken, and the
    lock is written.
    """
    with (opened_single if no_commit else opened)(c) as project, project.alone("pull"):
        from guix_tasks.stages.lifecycle import Wishes, make_each

        wishes = Wishes(
            force, upstream, update, not no_commit, keep_failed, (), disable_authentication
        )
        make_each(project, "pull", wishes)


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
    """Install packages and manifest on the pull stage.

    What is in the image is the base's own profile, GUIX_MANIFEST and
    GUIX_PACKAGES, and nothing that an earlier call installed.
    """
    one_or_all = opened_single if no_commit else opened
    given = {"GUIX_PACKAGES": package} if package else None
    with one_or_all(c, given) as project, project.alone("install"):
        from guix_tasks.stages.lifecycle import Wishes, make_each

        packages = project.settings.guix_packages if package else ()
        wishes = Wishes(force, upstream, False, not no_commit, keep_failed, packages=packages)
        make_each(project, "install", wishes)


@long_task()
def commit(c: Context) -> None:
    """Commit the work container that was left, as IMAGE.

    It is what `inv shell`, `inv run --keep` or a stage with --no-commit
    left.
    """
    with opened_single(c) as project, project.alone("commit"):
        from guix_tasks.commands.commit import commit

        commit(project)


@long_task()
def squash(c: Context) -> None:
    """Make one layer of all above the base stage."""
    with opened_single(c) as project, project.alone("squash"):
        from guix_tasks.commands.squash import squash as one_layer

        one_layer(project)


@task(auto_shortflags=False)
def rollback(c: Context) -> None:
    """Let IMAGE be what it was before it last moved."""
    with opened_single(c) as project, project.alone("rollback"):
        from guix_tasks.commands.rollback import rollback

        rollback(project)


@long_task(help={"stage": "the image of this stage instead of IMAGE"})
def verify(c: Context, stage: str = "") -> None:
    """Test IMAGE from outside, in a fresh container.

    The daemon has to answer, a derivation to build, the channels to be
    those of the lock, and the packages and certificates to be there.
    """
    with opened(c) as project:
        from guix_tasks.commands.verify import verify as check

        for each in project.each_platform():
            check(each, stage or None)


@long_task(help={"stage": "the tag of this stage instead of IMAGE and TAGS"})
def push(c: Context, stage: str = "") -> None:
    """Push IMAGE and TAGS, and print the digest.

    An image whose stage is stale is refused.
    """
    with opened(c) as project, project.alone("push"):
        from guix_tasks.commands.push import push as publish

        for each in project.each_platform():
            for reference, digest in publish(each, stage or None).items():
                if digest:  # a dry run has none
                    each.console.result(f"{reference}@{digest}")


@task(auto_shortflags=False)
def manifest(c: Context) -> None:
    """Join the platforms that were pushed, under IMAGE.

    They are those of PLATFORMS; without it, all that out/digests/ has.
    Prints the digest.
    """
    with opened_with_buildx(c, needs_engine=False) as (project, program):
        from guix_tasks.commands.manifest import join

        digest = join(project, program)
        if digest:
            project.console.result(f"{project.settings.image}@{digest}")


@task(
    iterable=["package"],
    help={
        "package": "a package instead of GUIX_PACKAGES; repeatable",
        "json": "print what is found as JSON, for machines",
    },
    auto_shortflags=False,
)
def weather(c: Context, package: list[str] | None = None, json: bool = False) -> None:
    """Ask whether the packages have substitutes."""
    given = {"GUIX_PACKAGES": package} if package else None
    with opened(c, given) as project, project.alone("weather"):
        from guix_tasks.commands.weather import weather as ask

        ask(project, as_json=json)


@long_task(
    iterable=["package", "symlink"],
    incrementable=["relocatable"],
    help={
        "package": "a package instead of GUIX_PACKAGES and GUIX_MANIFEST; repeatable",
        "format": "tarball, docker, oci, squashfs, deb, rpm or appimage",
        "relocatable": "to be unpacked anywhere, as guix pack -R; twice, as -RR; without a value",
        "symlink": "a symbolic link in it, as /bin=bin; repeatable",
        "compression": "gzip, lzip, xz, bzip2, zstd or none",
        "max_layers": "the most layers that a docker or OCI archive may have",
        "entry_point": "the program that an image or an appimage runs, as bin/hello",
        "name": "what the file's name begins with",
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
    """Pack packages and manifest into a file in out/.

    They are those of GUIX_PACKAGES and GUIX_MANIFEST, made with the Guix of
    IMAGE; a file with the SHA-256 lies beside.
    """
    with opened(c) as project, project.alone("pack"):
        from guix_tasks.commands.pack import pack_each
        from guix_tasks.guix import Pack

        links = tuple(symlink or ())
        wanted = Pack(format, relocatable, links, compression, max_layers, entry_point)
        pack_each(project, wanted, name, tuple(package or ()))


@task(
    help={"url": "where the files will be downloadable, instead of RELEASE_URL"},
    auto_shortflags=False,
)
def release(c: Context, url: str = "") -> None:
    """Write out/build.json, which tells of the packs.

    It has, for each Guix system, the URL of the file, its SHA-256, and the
    channels.  What it says of packs that are not made anew stays.
    """
    with opened_settings({"RELEASE_URL": url}) as (settings, console):
        from guix_tasks.commands.release import release as write

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
    """Run one command: `inv run -- COMMAND ARGUMENT...`.

    It runs in a work container of IMAGE, beside the Guix daemon, and `inv`
    ends with its status.
    """
    with opened_single(c) as project:
        from guix_tasks.commands.run import run

        status = run(project, _after_dashes(sys.argv), stage=stage or None, keep=keep)
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
    """Open a shell in a work container of IMAGE.

    The container is left, for `inv commit` or the next `inv shell`.
    """
    with opened_single(c) as project:
        from guix_tasks.commands.shell import shell

        docker, environment = docker_command(project)
        shell(project, docker, environment, stage=stage or None, fresh=fresh)


@task(
    help={
        "size": "show what is in the image: stages, layers, the largest store items",
        "plot": "draw what --size shows as an SVG picture into this file",
        "json": "print one JSON document, for machines",
    },
    auto_shortflags=False,
)
def status(c: Context, size: bool = False, plot: str = "", json: bool = False) -> None:
    """Show stages, images, sizes, ages and channels.

    Each stage is up to date, missing, or stale, and why.
    """
    with (opened_single if size or plot else opened)(c) as project:
        from guix_tasks.commands.status import show_status

        show_status(project, size=size, plot=plot, as_json=json)


@task(
    name="doctor", help={"json": "print the findings as JSON, for machines"}, auto_shortflags=False
)
def doctor(c: Context, json: bool = False) -> None:
    """Check this machine; a line each, with the mend.

    Ends with 1 where something is wrong.
    """
    with guarded():
        findings = examine(c)
        from guix_tasks.commands.doctor import State, show
        from guix_tasks.ui.console import Console

        show(Console(), findings, as_json=json)
        if any(each.state is State.FAILED for each in findings):
            raise Exit(code=CHECK_FAILED)


@task(help={"work": "only the work containers"}, auto_shortflags=False)
def clean(c: Context, work: bool = False) -> None:
    """Remove what these tasks made for this project.

    Work containers, the substitute server, stage images and volumes, and
    IMAGE and TAGS where they are a stage: nothing else.
    """
    with opened(c) as project, project.alone("clean"):
        from guix_tasks.commands.clean import clean as remove
        from guix_tasks.commands.clean import say_removed

        say_removed(project, remove(project, work_only=work))


def _after_dashes(argv: list[str]) -> list[str]:
    # Invoke's own `remainder` is one string that has lost its quoting.
    return argv[argv.index("--") + 1 :] if "--" in argv else []
