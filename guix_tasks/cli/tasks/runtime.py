"""Tasks for the runtime image: only the packages and what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.collection import Collection

from guix_tasks.cli.task import long_task

if TYPE_CHECKING:
    from guix_tasks.cli.session import Session


@long_task(name="build", help={"force": "make all layers again, even if nothing changed"})
def runtime_build(session: Session, force: bool = False) -> None:
    """Build the image of only the packages in out/runtime.

    Print its digest.  It contains the packages of the install stage and what
    they need, without Guix and without the base image.
    """
    from guix_tasks.runtime.image import build

    with session.locked_project("runtime.build", one_platform=True) as project:
        if digest := build(project, force=force):
            project.console.result(digest)


@long_task(name="push")
def runtime_push(session: Session) -> None:
    """Push the runtime image with skopeo, print the digest.

    The name is that of RUNTIME_IMAGE.  Layers that the registry has are not sent.
    """
    from guix_tasks.runtime.push import push

    with session.locked_project("runtime.push", one_platform=True) as project:
        if reference := push(project):
            project.console.result(reference)


@long_task(name="check")
def runtime_check(session: Session) -> None:
    """Make the runtime image again and compare it.

    The other one is that of RUNTIME_IMAGE in the registry.  Print the digest
    if both are the same, or else what differs.
    """
    from guix_tasks.runtime.push import check

    with session.locked_project("runtime.check", one_platform=True) as project:
        if digest := check(project):
            project.console.result(digest)


runtime = Collection("runtime", runtime_build, runtime_push, runtime_check)
