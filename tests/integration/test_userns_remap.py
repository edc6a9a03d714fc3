"""An engine with ``userns-remap``, on which root in containers is another user of the machine."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, builder_environment, expect_error, wait_until
from isolated_host import add_registry_and_base, create_isolated_host

from guix_tasks.settings.values import ImageStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness import Project, ProjectFactory
    from isolated_host import IsolatedHost

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = pytest.mark.engine

USER, FIRST_ID = "daemon", 200000
"""A user of each Debian system, and the ID of root in containers on the machine."""

UP = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from guix_tasks.bootstrap.engine import PrivateEngine
from guix_tasks.settings.values import ImageStore
from guix_tasks.ui.console import Console

class Remapped(PrivateEngine):
    def _configure(self, store):
        return {{**super()._configure(store), "userns-remap": "{USER}"}}

    def _start(self, store):
        # Containers must be able to read their files.
        self.directory.chmod(0o711)
        super()._start(store)

Remapped(Path(sys.argv[1])).up(Console(), ImageStore(sys.argv[2]))
"""


@contextmanager
def run_remapped_engine(programs: Path, store: ImageStore) -> Iterator[IsolatedHost]:
    """Start an engine with ``userns-remap`` on a host with a copy of this machine's ``/etc``."""
    with create_isolated_host(programs) as host:
        etc = host.directory / "etc"
        host.run("cp", "--archive", "/etc", str(etc))
        for name in ("subuid", "subgid"):
            (etc / name).write_text(f"{USER}:{FIRST_ID}:65536\n")
        host.run("mount", "--bind", str(etc), "/etc")
        host.directory.chmod(0o711)
        host.run(sys.executable, "-c", UP, str(host.engine.directory), store.value)
        yield host


@pytest.fixture(scope="module")
def remapped(programs: Path) -> Iterator[IsolatedHost]:
    with run_remapped_engine(programs, ImageStore.OVERLAY2) as host:
        yield host


@pytest.fixture(scope="module")
def remapped_factory(
    remapped: IsolatedHost, machine_registry: LocalRegistry, factory: ProjectFactory
) -> ProjectFactory:
    # The user of the containers may not be able to read the checkout.
    offline = remapped.directory / "offline"
    shutil.copytree(factory.offline, offline, symlinks=True)
    programs = machine_registry.directory / "root"
    return replace(add_registry_and_base(remapped, programs, factory), offline=offline)


@pytest.fixture(scope="module")
def project(
    remapped_factory: ProjectFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """Create a project with all stages finished; ``auto`` chooses its sandbox."""
    project = remapped_factory.create(tmp_path_factory.mktemp("remapped") / "project")
    log = project.ok("base", "pull", "install").stderr
    assert "sandbox: rootless: Guix can build" in log
    try:
        yield project
    finally:
        project.remove()


def run_in_image(project: Project, *command: str) -> str:
    argv = ("run", "--rm", "--network=none", "--entrypoint=", project.image, *command)
    return project.docker.ok(*argv)


def check_image(project: Project) -> None:
    assert "Hello" in run_in_image(project, "hello")
    others = "find /gnu /var/guix /root /etc/guix -not -user 0 -not -path '*/db/reserved'"
    assert run_in_image(project, "sh", "-c", others) == ""


def test_files_of_the_image_belong_to_root(project: Project) -> None:
    check_image(project)


@pytest.mark.parametrize("sandbox", ["rootless", "capabilities"])
def test_install_without_warm_store_succeeds(project: Project, sandbox: str) -> None:
    env = {"GUIX_SANDBOX": sandbox, "CACHE_VOLUME": ""}
    result = project.inv("install", "--force", env=env)
    assert result.returncode == 0, result.stderr
    check_image(project)


def test_privileged_sandbox_is_rejected_with_a_hint(project: Project) -> None:
    error = expect_error(project.inv("install", "--force", env={"GUIX_SANDBOX": "privileged"}), 3)
    assert "incompatible with user namespaces" in error
    assert error.endswith("; set GUIX_SANDBOX=capabilities")


def test_run_after_a_kill_finishes(project: Project) -> None:
    task = project.start("install", "--force")
    wait_until(lambda: project.containers() != [], "a container exists")
    os.killpg(task.process.pid, signal.SIGKILL)
    task.process.wait()
    project.ok("install", "--force")
    assert project.containers() == []
    check_image(project)


def test_push_squash_rollback_verify_and_doctor_succeed(project: Project) -> None:
    stage = project.id()
    assert "sha256:" in project.ok("push").stdout
    project.ok("squash")
    assert project.id() != stage
    assert "Hello" in run_in_image(project, "hello")
    project.ok("rollback")
    assert project.id() == stage
    project.ok("verify")
    lines = project.inv("doctor").stdout.splitlines()
    (sandbox,) = [line for line in lines if "sandbox: " in line]
    assert sandbox == "ok     sandbox: rootless: Guix builds in a work container"


def test_clean_leaves_nothing(project: Project) -> None:
    project.ok("clean")
    assert (project.tags(), project.containers(), project.volumes()) == (
        {},
        [],
        [],
    )


def test_containerd_image_store_is_refused_with_a_hint(
    programs: Path, factory: ProjectFactory, tmp_path: Path
) -> None:
    with run_remapped_engine(programs, ImageStore.CONTAINERD) as host:
        project = replace(factory, docker=host.docker).create(tmp_path / "project")
        # The runtime fails before it looks for the program.
        project.write_dockerfile('FROM scratch\nCOPY Dockerfile /\nRUN ["/none"]\n')
        result = project.inv("base", env=builder_environment("buildx"))
        error = expect_error(result, 6)
        assert "gives files to other users: use the store overlay2" in error
        assert "permission denied" in result.stderr
        project.remove()
