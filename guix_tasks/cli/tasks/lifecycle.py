"""Tasks that build, inspect and publish an image."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from invoke.exceptions import Exit

from guix_tasks.cli.task import long_task, task
from guix_tasks.errors import CheckError

if TYPE_CHECKING:
    from guix_tasks.cli.session import Session

STAGE_HELP = {
    "force": "run the stage even if nothing changed",
    "upstream": "first run the stages it starts from that are not up to date",
    "no_commit": "do not commit; keep the work container for `inv commit`",
    "keep_failed": "keep the work container if a command fails",
}
"""Options of every stage that runs in a work container."""

UPDATE_HELP = {
    "update": "pull current commits and rewrite the lock; of Guix, the newest built one",
    "newest": "like --update, but also the newest commit of Guix, which takes minutes to compile",
}
"""Options of ``pull`` and ``buildx.build``."""


@long_task(help={"force": STAGE_HELP["force"]})
def base(session: Session, force: bool = False) -> None:
    """Build the base image from DOCKERFILE.

    This is a `docker build` with BASE_IMAGE as a build argument.  The other
    stages start from its image.
    """
    from guix_tasks.stages.lifecycle import StageOptions, make_each

    with session.locked_project("base") as project:
        make_each(project, "base", StageOptions(force=force))


@long_task(
    help={
        **STAGE_HELP,
        **UPDATE_HELP,
        "disable_authentication": "accept channels without an introduction, unverified",
    }
)
def pull(
    session: Session,
    force: bool = False,
    upstream: bool = False,
    update: bool = False,
    newest: bool = False,
    no_commit: bool = False,
    keep_failed: bool = False,
    disable_authentication: bool = False,
) -> None:
    """Run `guix pull` on the base image and commit.

    The channels are those of GUIX_CHANNELS, at the commits of
    GUIX_CHANNELS_LOCK.  Without a lock, pull current commits and write the
    lock: the newest ones, but of Guix the newest that a substitute server has
    built.
    """
    from guix_tasks.stages.lifecycle import StageOptions, make_each

    with session.locked_project("pull", one_platform=no_commit) as project:
        make_each(project, "pull", StageOptions(
            force=force, upstream=upstream, update=update or newest, newest=newest,
            commit=not no_commit, keep_failed=keep_failed,
            disable_authentication=disable_authentication,
        ))  # fmt: skip


@long_task(
    iterable=["package"],
    help={**STAGE_HELP, "package": "a package instead of GUIX_PACKAGES; repeatable"},
)
def install(
    session: Session,
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
    from guix_tasks.stages.lifecycle import StageOptions, make_each

    overrides = {"GUIX_PACKAGES": package or ()}
    with session.locked_project("install", overrides, one_platform=no_commit) as project:
        packages = project.settings.guix_packages if package else ()
        make_each(project, "install", StageOptions(
            force=force, upstream=upstream, commit=not no_commit, keep_failed=keep_failed,
            packages=packages,
        ))  # fmt: skip


@long_task()
def commit(session: Session) -> None:
    """Commit the kept work container as IMAGE.

    `inv shell`, `inv run --keep` and a stage with --no-commit keep a work
    container.
    """
    from guix_tasks.commands.commit import commit

    with session.locked_project("commit", one_platform=True) as project:
        commit(project)


@long_task()
def squash(session: Session) -> None:
    """Merge all layers above the base image into one."""
    from guix_tasks.commands.squash import squash

    with session.locked_project("squash", one_platform=True) as project:
        squash(project)


@task()
def rollback(session: Session) -> None:
    """Restore the previous IMAGE."""
    from guix_tasks.commands.rollback import rollback

    with session.locked_project("rollback", one_platform=True) as project:
        rollback(project)


@long_task(help={"stage": "the image of this stage instead of IMAGE"})
def verify(session: Session, stage: str = "") -> None:
    """Test IMAGE in a fresh container.

    Check that the daemon answers, that a derivation builds, that the channels
    match the lock, and that the packages and certificates exist.
    """
    from guix_tasks.commands.verify import verify

    for project in session.project().each_platform():
        verify(project, stage or None)


@long_task(help={"stage": "the tag of this stage instead of IMAGE and TAGS"})
def push(session: Session, stage: str = "") -> None:
    """Push IMAGE and TAGS, and print the digest.

    Refuse an image whose stage is stale.
    """
    from guix_tasks.commands.push import push

    with session.locked_project("push") as project:
        for platform_project in project.each_platform():
            for reference, digest in push(platform_project, stage or None).items():
                if digest:  # empty in a dry run
                    project.console.result(f"{reference}@{digest}")


@task()
def manifest(session: Session) -> None:
    """Join the pushed platforms into one IMAGE.

    The platforms are those of PLATFORMS, or all in out/digests/ if that is
    not set.  Print the digest.
    """
    from guix_tasks.commands.manifest import join

    project, buildx = session.buildx(needs_engine=False)
    if digest := join(project, buildx):
        project.console.result(f"{project.settings.image}@{digest}")


@task(
    iterable=["package"],
    help={
        "package": "a package instead of GUIX_PACKAGES; repeatable",
        "json": "print the result as JSON",
    },
)
def weather(session: Session, package: list[str] | None = None, json: bool = False) -> None:
    """Check whether the packages have substitutes."""
    from guix_tasks.commands.weather import weather

    with session.locked_project("weather", {"GUIX_PACKAGES": package or ()}) as project:
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
    session: Session,
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
    from guix_tasks.commands.pack import pack
    from guix_tasks.guix import Pack

    links = tuple(symlink or ())
    options = Pack(format, relocatable, links, compression, max_layers, entry_point)
    with session.locked_project("pack") as project:
        for platform_project in project.each_platform():
            if path := pack(platform_project, options, name, tuple(package or ())):
                project.console.result(str(path))


@task(help={"url": "URL under which the files will be published, instead of RELEASE_URL"})
def release(session: Session, url: str = "") -> None:
    """Write out/build.json, the index of packed files.

    For each Guix system it contains the URL of the file, its SHA-256 and the
    channels.  Entries of packs that did not change are kept.
    """
    from guix_tasks.commands.release import release

    settings = session.use(session.load({"RELEASE_URL": url}))
    if not session.skips("release"):
        session.console.result(str(release(settings, session.console)))


@task(
    help={
        "stage": "the image of this stage instead of IMAGE",
        "keep": "keep the work container for `inv commit`",
    }
)
def run(session: Session, stage: str = "", keep: bool = False) -> None:
    """Run a command: `inv run -- COMMAND ARGUMENT...`.

    It runs in a work container of IMAGE, next to the Guix daemon, and reads
    what is piped into `inv`.  `inv` exits with the status of the command.
    """
    from guix_tasks.commands.run import run

    project = session.project(one_platform=True)
    # A command that reads a terminal is for `inv shell`.
    stdin = None if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer
    argv = _after_dashes(sys.argv)
    status = run(project, argv, stage=stage or None, keep=keep, stdin=stdin)
    if status:
        raise Exit(code=status)


@task(
    help={
        "stage": "the image of this stage instead of IMAGE",
        "fresh": "remove a kept work container first",
    }
)
def shell(session: Session, stage: str = "", fresh: bool = False) -> None:
    """Open a shell in a work container of IMAGE.

    The container is kept for `inv commit` or the next `inv shell` if a file has
    changed.
    """
    from guix_tasks.commands.shell import shell

    project = session.project(one_platform=True)
    docker, environment = session.docker_command(project)
    shell(project, docker, environment, stage=stage or None, fresh=fresh)


@task(
    help={
        "size": "show the sizes of stages, layers and the largest store items",
        "plot": "write the sizes as an SVG chart to this file",
        "json": "print one JSON document",
    }
)
def status(session: Session, size: bool = False, plot: str = "", json: bool = False) -> None:
    """Show stages, images, sizes, ages and channels.

    A stage is up to date, missing, or stale for a reason that is shown.
    """
    from guix_tasks.commands.status import show_status

    project = session.project(one_platform=bool(size or plot))
    show_status(project, size=size, plot=plot, as_json=json)


@task(help={"json": "print the findings as JSON"})
def doctor(session: Session, json: bool = False) -> None:
    """Check this machine and suggest fixes.

    Exit with status 1 if a check fails.
    """
    from guix_tasks.commands.doctor import examine, show

    findings = examine(session.load, session.reopen, session.find_buildx)
    if show(session.console, findings, as_json=json):
        raise Exit(code=CheckError.exit_code)


@task(help={"work": "remove only work containers"})
def clean(session: Session, work: bool = False) -> None:
    """Remove this project's containers, images and volumes.

    Remove work containers, the substitute server, stage images, volumes, and
    IMAGE and TAGS if they point to a stage.  Nothing else is removed.
    """
    from guix_tasks.commands.clean import clean, print_removed

    with session.locked_project("clean") as project:
        print_removed(project, clean(project, work_only=work))


def _after_dashes(argv: list[str]) -> list[str]:
    # Invoke's `remainder` is one string without the original quoting.
    return argv[argv.index("--") + 1 :] if "--" in argv else []
