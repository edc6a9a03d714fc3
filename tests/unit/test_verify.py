"""The task ``verify``: its container, its checks and their results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_engine import COMMITS, FakeContainer, Output, Site, console_text, new_site

from guix_tasks.commands.verify import CHECKS, verify
from guix_tasks.errors import CheckError, StageError, UsageError
from guix_tasks.stages.container import ENTRY_POINT, WORK_DIRECTORY

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.usefixtures("serial_hashing")


def run_verify(site: Site, stage: str | None = None) -> str:
    project = site.project()
    verify(project, stage)
    return console_text(project)


def test_every_check_is_reported(built_site: Site) -> None:
    assert run_verify(built_site).splitlines() == [f"verify: {check}: ok" for check in CHECKS]
    assert built_site.engine.all_containers == {}


@pytest.mark.parametrize("check", CHECKS)
def test_failed_check_is_reported(built_site: Site, check: str) -> None:
    built_site.engine.guix.failing[check] = "a reason: of two parts"
    project = built_site.project()
    with pytest.raises(CheckError, match=rf"failed: {check}$"):
        verify(project)
    assert f"verify: {check}: failed: a reason: of two parts" in console_text(project)
    assert console_text(project).count(": ok") == len(CHECKS) - 1
    assert built_site.engine.all_containers == {}


def test_unreached_check_is_a_failure(built_site: Site) -> None:
    def behaviour(_container: FakeContainer) -> Output:
        yield False, b"ok daemon\nok bui"
        yield False, b"ld\n"

    built_site.engine.behaviour = behaviour
    project = built_site.project()
    with pytest.raises(CheckError, match="failed: channels, packages, certificates"):
        verify(project)
    assert "verify: packages: not reached" in console_text(project)


def test_failed_container_is_an_error(built_site: Site) -> None:
    def behaviour(container: FakeContainer) -> Output:
        container.status = 69
        yield True, b"no daemon\n"

    built_site.engine.behaviour = behaviour
    with pytest.raises(StageError, match="exit status 69"):
        verify(built_site.project())


def read_container(site: Site) -> FakeContainer:
    """Run verify and return a copy of its container at the start."""
    containers: list[FakeContainer] = []
    guix = site.engine.guix

    def behaviour(container: FakeContainer) -> Output:
        container.changes = dict(container.changes)
        containers.append(container)
        yield from ((False, f"ok {check}\n".encode()) for check in CHECKS)

    site.engine.behaviour = behaviour
    verify(site.project())
    site.engine.behaviour = guix
    return containers[0]


def set_entry_point(site: Site, entry_point: list[str] | None, script: bytes) -> None:
    image = site.image("install")
    config = {**image.config, "Entrypoint": entry_point}
    site.engine.make_image(config, {"/start.sh": script}, parent=image, tag="mine:1")
    site.env["IMAGE"] = "mine:1"


@pytest.mark.parametrize("entry_point", [["/start.sh"], ["tini", "--", "/start.sh"]])
def test_entry_point_that_starts_the_daemon_is_used(
    built_site: Site, entry_point: list[str]
) -> None:
    set_entry_point(built_site, entry_point, b'#!/bin/sh\nguix-daemon &\nexec "$@"\n')
    assert read_container(built_site).spec.command == (*entry_point, f"{WORK_DIRECTORY}/verify")


@pytest.mark.parametrize("entry_point", [None, ["echo"], ["/start.sh"], ["/missing", "-x"]])
def test_other_entry_point_is_replaced(built_site: Site, entry_point: list[str] | None) -> None:
    set_entry_point(built_site, entry_point, b"#!/bin/sh\nexec nginx\n")
    assert read_container(built_site).spec.command == (ENTRY_POINT, f"{WORK_DIRECTORY}/verify")


def test_environment_is_that_of_root(built_site: Site) -> None:
    root = {"HOME": "/root", "USER": "root", "LOGNAME": "root"}
    assert read_container(built_site).spec.environment == {"GUIX_SANDBOX": "privileged", **root}


def test_commits_and_packages_are_those_of_the_labels(built_site: Site) -> None:
    container = read_container(built_site)
    assert container.text(f"{WORK_DIRECTORY}/commits") == f"{COMMITS['guix']}\n"
    assert container.text(f"{WORK_DIRECTORY}/packages") == "certs\t1.0\tout\nhello\t1.0\tout\n"
    assert container.text(f"{WORK_DIRECTORY}/verify").startswith("#!/bin/sh")


def test_output_of_a_package_is_checked(built_site: Site) -> None:
    image = built_site.image("install")
    labels = {**image.labels, "org.guix-tasks.packages": "git@2.4 git@2.4:send-email"}
    built_site.engine.make_image({**image.config, "Labels": labels}, {}, parent=image, tag="mine:1")
    built_site.env["IMAGE"] = "mine:1"
    assert (
        read_container(built_site).text(f"{WORK_DIRECTORY}/packages")
        == "git\t2.4\tout\ngit\t2.4\tsend-email\n"
    )


def test_verify_commits_nothing(built_site: Site) -> None:
    commits = built_site.engine.changing_calls().count("commit")
    run_verify(built_site)
    assert built_site.engine.changing_calls().count("commit") == commits


def test_image_of_a_stage_can_be_verified(built_site: Site) -> None:
    run_verify(built_site, "pull")
    assert built_site.engine.specs[-1].image == built_site.image("pull").id


def test_missing_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run `inv install`"):
        run_verify(new_site(tmp_path / "empty"))
