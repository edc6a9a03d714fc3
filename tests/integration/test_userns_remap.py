"""An engine with ``userns-remap``: root in its containers is another user on its machine."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, eventually, one_error
from island import raised, supply

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness import Project, Workshop
    from island import Island

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = pytest.mark.engine

USER, FIRST_ID = "daemon", 200000
"""A user that each Debian has, and the ID on the machine of root in containers."""

UP = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from guix_tasks.bootstrap.engine import PrivateEngine
from guix_tasks.ui.console import Console

class Remapped(PrivateEngine):
    def _configure(self, store):
        return {{**super()._configure(store), "userns-remap": "{USER}"}}

    def _start(self, store):
        # Containers have to reach their files.
        self.directory.chmod(0o711)
        super()._start(store)

Remapped(Path(sys.argv[1])).up(Console())
"""


@pytest.fixture(scope="module")
def remapped(programs: Path) -> Iterator[Island]:
    """An engine with ``userns-remap`` on an island, whose ``/etc`` is a copy of this machine's."""
    with raised(programs) as island:
        etc = island.directory / "etc"
        island.do("cp", "--archive", "/etc", str(etc))
        for name in ("subuid", "subgid"):
            (etc / name).write_text(f"{USER}:{FIRST_ID}:65536\n")
        island.do("mount", "--bind", str(etc), "/etc")
        island.directory.chmod(0o711)
        island.do(sys.executable, "-c", UP, str(island.engine.directory))
        yield island


@pytest.fixture(scope="module")
def remapped_workshop(
    remapped: Island, machine_registry: LocalRegistry, workshop: Workshop
) -> Workshop:
    # Other users need not be able to read the checkout.
    offline = remapped.directory / "offline"
    shutil.copytree(workshop.offline, offline, symlinks=True)
    own = supply(remapped, machine_registry.directory / "root", workshop)
    return replace(own, offline=offline)


@pytest.fixture(scope="module")
def made(
    remapped_workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """A project with all its stages; ``auto`` chooses its sandbox."""
    project = remapped_workshop.project(tmp_path_factory.mktemp("remapped") / "project")
    log = project.ok("base", "pull", "install").stderr
    assert "sandbox: rootless: Guix can build" in log
    try:
        yield project
    finally:
        project.remove()


def in_image(project: Project, *command: str) -> str:
    """Run a command in a container of the image."""
    argv = ("run", "--rm", "--network=none", "--entrypoint=", project.image, *command)
    return project.docker.ok(*argv)


def test_image_works_and_all_of_it_belongs_to_root(made: Project) -> None:
    assert "Hello" in in_image(made, "hello")
    others = "find /gnu /var/guix /root /etc/guix -not -user 0 -not -path '*/db/reserved'"
    assert in_image(made, "sh", "-c", others) == ""


@pytest.mark.parametrize("sandbox", ["rootless", "capabilities"])
def test_stages_without_warm_store(made: Project, sandbox: str) -> None:
    env = {"GUIX_SANDBOX": sandbox, "CACHE_VOLUME": ""}
    result = made.inv("install", "--force", env=env)
    assert result.returncode == 0, result.stderr
    test_image_works_and_all_of_it_belongs_to_root(made)


def test_privileged_is_refused_with_a_hint(made: Project) -> None:
    error = one_error(made.inv("install", "--force", env={"GUIX_SANDBOX": "privileged"}), 3)
    assert "incompatible with user namespaces" in error
    assert error.endswith("; set GUIX_SANDBOX=capabilities")


def test_a_killed_stage_is_resumed(made: Project) -> None:
    started = made.start("install", "--force")
    eventually(lambda: made.containers() != [], "a container")
    os.killpg(started.inv.pid, signal.SIGKILL)
    started.inv.wait()
    made.ok("install", "--force")
    assert made.containers() == []
    test_image_works_and_all_of_it_belongs_to_root(made)


def test_push_squash_rollback_verify_and_doctor(made: Project) -> None:
    stage = made.id()
    assert "sha256:" in made.ok("push").stdout
    made.ok("squash")
    assert made.id() != stage
    assert "Hello" in in_image(made, "hello")
    made.ok("rollback")
    assert made.id() == stage
    made.ok("verify")
    lines = made.inv("doctor").stdout.splitlines()
    (sandbox,) = [line for line in lines if "sandbox: " in line]
    assert sandbox == "ok     sandbox: rootless: Guix builds in a work container"


def test_clean_leaves_nothing(made: Project) -> None:
    made.ok("clean")
    assert (made.tags(), made.containers(), made.volumes()) == ({}, [], [])
