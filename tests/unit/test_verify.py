"""Verify: what a fresh container is told and asked, and what its answers mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_engine import COMMITS, FakeContainer, Output, Site, heard, new_site

from guix_tasks.commands.verify import CHECKS, verify
from guix_tasks.errors import CheckError, StageError, UsageError
from guix_tasks.stages.container import ENTRY_POINT, WORK_DIRECTORY

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.usefixtures("serial_hashing")


def said(site: Site, stage: str | None = None) -> str:
    project = site.project()
    verify(project, stage)
    return heard(project)


def test_every_check_is_said(made: Site) -> None:
    assert said(made).splitlines() == [f"verify: {check}: ok" for check in CHECKS]
    assert made.engine.all_containers == {}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_fails_is_named(made: Site, check: str) -> None:
    made.engine.guix.failing[check] = "a reason: of two parts"
    project = made.project()
    with pytest.raises(CheckError, match=rf"failed: {check}$"):
        verify(project)
    assert f"verify: {check}: failed: a reason: of two parts" in heard(project)
    assert heard(project).count(": ok") == len(CHECKS) - 1
    assert made.engine.all_containers == {}


def test_what_was_not_reached_has_failed(made: Site) -> None:
    def behaviour(_container: FakeContainer) -> Output:
        yield False, b"ok daemon\nok bui"
        yield False, b"ld\n"

    made.engine.behaviour = behaviour
    project = made.project()
    with pytest.raises(CheckError, match="failed: channels, packages, certificates"):
        verify(project)
    assert "verify: packages: not reached" in heard(project)


def test_a_container_that_fails_is_an_error(made: Site) -> None:
    def behaviour(container: FakeContainer) -> Output:
        container.status = 69
        yield True, b"no daemon\n"

    made.engine.behaviour = behaviour
    with pytest.raises(StageError, match="exit status 69"):
        verify(made.project())


def filled(site: Site) -> FakeContainer:
    """The container of a check, as it was when it was run."""
    seen: list[FakeContainer] = []
    guix = site.engine.guix

    def behaviour(container: FakeContainer) -> Output:
        container.changes = dict(container.changes)
        seen.append(container)
        yield from ((False, f"ok {check}\n".encode()) for check in CHECKS)

    site.engine.behaviour = behaviour
    verify(site.project())
    site.engine.behaviour = guix
    return seen[0]


def with_entry_point(site: Site, entry_point: list[str] | None, script: bytes) -> None:
    image = site.image("install")
    config = {**image.config, "Entrypoint": entry_point}
    site.engine.make_image(config, {"/start.sh": script}, parent=image, tag="mine:1")
    site.env["IMAGE"] = "mine:1"


@pytest.mark.parametrize("entry_point", [["/start.sh"], ["tini", "--", "/start.sh"]])
def test_an_entry_point_that_starts_the_daemon_is_tried(made: Site, entry_point: list[str]) -> None:
    with_entry_point(made, entry_point, b'#!/bin/sh\nguix-daemon &\nexec "$@"\n')
    assert filled(made).spec.command == (*entry_point, f"{WORK_DIRECTORY}/verify")


@pytest.mark.parametrize("entry_point", [None, ["echo"], ["/start.sh"], ["/missing", "-x"]])
def test_another_entry_point_does_not_take_the_checks(
    made: Site, entry_point: list[str] | None
) -> None:
    with_entry_point(made, entry_point, b"#!/bin/sh\nexec nginx\n")
    assert filled(made).spec.command == (ENTRY_POINT, f"{WORK_DIRECTORY}/verify")


def test_the_environment_is_that_of_root(made: Site) -> None:
    root = {"HOME": "/root", "USER": "root", "LOGNAME": "root"}
    assert filled(made).spec.environment == {"GUIX_SANDBOX": "privileged", **root}


def test_it_is_told_what_the_labels_say(made: Site) -> None:
    box = filled(made)
    assert box.text(f"{WORK_DIRECTORY}/commits") == f"{COMMITS['guix']}\n"
    assert box.text(f"{WORK_DIRECTORY}/packages") == "certs\t1.0\tout\nhello\t1.0\tout\n"
    assert box.text(f"{WORK_DIRECTORY}/verify").startswith("#!/bin/sh")


def test_an_output_of_a_package_is_told(made: Site) -> None:
    image = made.image("install")
    labels = {**image.labels, "org.guix-tasks.packages": "git@2.4 git@2.4:send-email"}
    made.engine.make_image({**image.config, "Labels": labels}, {}, parent=image, tag="mine:1")
    made.env["IMAGE"] = "mine:1"
    assert (
        filled(made).text(f"{WORK_DIRECTORY}/packages") == "git\t2.4\tout\ngit\t2.4\tsend-email\n"
    )


def test_nothing_is_committed(made: Site) -> None:
    before = made.engine.changing_calls().count("commit")
    said(made)
    assert made.engine.changing_calls().count("commit") == before


def test_the_image_of_a_stage_can_be_checked(made: Site) -> None:
    said(made, "pull")
    assert made.engine.specs[-1].image == made.image("pull").id


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run `inv install`"):
        said(new_site(tmp_path / "empty"))
