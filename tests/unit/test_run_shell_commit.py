"""The tasks ``run`` and ``shell``, and the commit of their work containers."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from fake_engine import (
    IMAGE,
    FakeContainer,
    Killed,
    Output,
    Site,
    another_process,
    console_text,
    new_site,
    outline,
)

from guix_tasks.commands import commit as commit_module
from guix_tasks.commands import rollback
from guix_tasks.commands import run as run_module
from guix_tasks.commands import shell as shell_module
from guix_tasks.errors import EngineError, UsageError
from guix_tasks.stages.container import (
    ENTRY_POINT,
    ENVIRONMENT,
    PROJECT_LABEL,
    Work,
    kept_containers,
    work_container,
)
from guix_tasks.stages.images import HAND_MADE, STAGES, proven_stage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


pytestmark = pytest.mark.usefixtures("serial_hashing")


def run(site: Site, *argv: str, stage: str | None = None, keep: bool = False) -> tuple[int, str]:
    project = site.project()
    return run_module.run(project, argv, stage=stage, keep=keep), console_text(project)


def commit(site: Site) -> str:
    project = site.project()
    commit_module.commit(project)
    return console_text(project)


def fail(container: FakeContainer) -> Output:
    container.status = 3
    yield True, b"no\n"


# --- Run ------------------------------------------------------------------------------------


def test_arguments_are_kept_exactly(built_site: Site) -> None:
    argv = ("printf", "%s\n", "a b", "$HOME", "--keep", "")
    run(built_site, *argv)
    assert built_site.engine.specs[-1].command == (ENTRY_POINT, *argv)


def test_output_and_status_are_those_of_the_command(built_site: Site) -> None:
    def behaviour(container: FakeContainer) -> Output:
        container.status = 7
        yield False, b"out\n"
        yield True, b"err\n"

    built_site.engine.behaviour = behaviour
    project = built_site.project()
    assert run_module.run(project, ["x"], stage=None, keep=False) == 7
    assert console_text(project) == "out\nerr\n"
    assert built_site.engine.all_containers == {}


def test_command_reads_the_input(built_site: Site) -> None:
    def behaviour(container: FakeContainer) -> Output:
        yield False, container.stdin.upper()

    built_site.engine.behaviour = behaviour
    project = built_site.project()
    run_module.run(project, ["cat"], stage=None, keep=False, stdin=io.BytesIO(b"in\n"))
    assert console_text(project) == "IN\n"
    assert built_site.engine.specs[-1].stdin
    run(built_site, "cat")
    assert not built_site.engine.specs[-1].stdin


def test_missing_command_is_an_error(built_site: Site) -> None:
    with pytest.raises(UsageError, match=r"run: the command is missing; use `inv run -- COMMAND"):
        run(built_site)
    assert built_site.engine.specs == []


def test_image_of_a_stage_can_be_used(built_site: Site) -> None:
    run(built_site, "true", stage="pull")
    assert built_site.engine.specs[-1].image == built_site.image("pull").id
    run(built_site, "true")
    assert built_site.engine.specs[-1].image == built_site.image("install").id


def test_missing_image_is_an_error(site: Site) -> None:
    with pytest.raises(UsageError, match=f"{IMAGE} does not exist on this engine"):
        run(site, "true")
    assert site.engine.specs == []


def test_container_is_kept_with_keep(built_site: Site) -> None:
    _, output = run(built_site, "make", keep=True)
    assert "`inv commit` commits it as IMAGE" in output
    assert len(kept_containers(built_site.engine, built_site.settings())) == 1


def test_container_of_a_failed_command_is_removed(built_site: Site) -> None:
    built_site.engine.behaviour = fail
    status, output = run(built_site, "make", keep=True)
    assert status == 3
    assert "inv commit" not in output
    assert built_site.engine.all_containers == {}


def test_second_container_is_an_error(built_site: Site) -> None:
    run(built_site, "make", keep=True)
    containers = dict(built_site.engine.all_containers)
    with pytest.raises(UsageError, match=r"is not committed yet; .*`inv clean --work` removes it"):
        run(built_site, "make", keep=True)
    assert built_site.engine.all_containers == containers
    assert run(built_site, "true")[0] == 0


# --- Commit ---------------------------------------------------------------------------------


def test_nothing_to_commit_is_a_success(built_site: Site) -> None:
    initial_state = outline(built_site.engine)
    assert commit(built_site) == "commit: nothing to commit\n"
    assert outline(built_site.engine) == initial_state


def test_commit_changes_the_image_and_no_stage(built_site: Site) -> None:
    stages = {stage: built_site.image(stage).id for stage in STAGES}
    run(built_site, "make", keep=True)
    output = commit(built_site)
    image = built_site.image()
    assert output.startswith(f"commit: {IMAGE}, ")
    assert image.layers[:-1] == built_site.image("install").layers
    assert "/made/make" in built_site.engine.files(image)
    assert proven_stage(image) == HAND_MADE
    assert {stage: built_site.image(stage).id for stage in STAGES} == stages
    assert built_site.engine.all_containers == {}


def test_commit_keeps_the_configuration(built_site: Site) -> None:
    run(built_site, "make", keep=True)
    commit(built_site)
    committed, original = built_site.image().config, built_site.image("install").config
    assert {**committed, "Labels": None} == {**original, "Labels": None}
    assert committed["Labels"]["maintainer"] == "me"


def test_commit_without_changes_is_hand_made(built_site: Site) -> None:
    def change_nothing(container: FakeContainer) -> Output:
        container.remove_files("/var/guix/guix-tasks")
        yield True, b""

    built_site.engine.behaviour = change_nothing
    run(built_site, "true", keep=True)
    commit(built_site)
    assert proven_stage(built_site.image()) == HAND_MADE
    assert built_site.image().layers == built_site.image("install").layers


def test_next_stage_replaces_the_hand_made_image_with_a_note(built_site: Site) -> None:
    run(built_site, "make", keep=True)
    commit(built_site)
    hand_made = built_site.image()
    output = built_site.make("install")
    assert "replaced the image of `inv commit`" in output
    assert built_site.image().id == built_site.image("install").id
    project = built_site.project()
    rollback.rollback(project)
    assert built_site.image().id == hand_made.id
    assert "is now sha256:" in console_text(project)


def test_uncommitted_stage_is_committed(built_site: Site) -> None:
    built_site.env["GUIX_PACKAGES"] = "tar"
    built_site.make("install", commit=False)
    commit(built_site)
    assert b"tar" in (built_site.engine.files(built_site.image())["/var/guix/profile"] or b"")
    assert proven_stage(built_site.image()) == HAND_MADE


def test_commit_of_an_unused_container_has_no_password(built_site: Site) -> None:
    built_site.env["https_proxy"] = "http://me:hunter2@proxy.test"
    project = built_site.project()
    work = Work("shell", (), {}, keep=True, tty=True)
    with work_container(
        built_site.engine, project.settings, built_site.image().id, work
    ) as container:
        assert "hunter2" in built_site.engine.all_containers[container].text(ENVIRONMENT)
    commit(built_site)
    assert built_site.engine.files(built_site.image())[ENVIRONMENT] == b""


def test_running_container_is_not_committed(built_site: Site) -> None:
    run(built_site, "make", keep=True)
    (container,) = built_site.engine.all_containers.values()
    container.running = True
    with pytest.raises(UsageError, match="is still running; exit its shell first"):
        commit(built_site)
    assert container.id in built_site.engine.all_containers


def test_missing_image_of_the_container_is_an_error(built_site: Site) -> None:
    run(built_site, "make", keep=True)
    built_site.engine.all_images.clear()
    with pytest.raises(EngineError, match="its configuration, no longer exists"):
        commit(built_site)


def test_container_of_a_killed_run_is_not_committed(built_site: Site) -> None:
    """The command continues in the engine and may fail or be incomplete."""

    def kill_client(container: FakeContainer) -> Output:
        yield True, b"half\n"
        container.status, container.running = 137, False
        built_site.engine.fault = raise_killed
        raise Killed

    def raise_killed(*_: object) -> None:
        raise Killed

    behaviour, built_site.engine.behaviour = built_site.engine.behaviour, kill_client
    with another_process(), suppress(Killed):
        run(built_site, "make", keep=True)
    built_site.engine.behaviour, built_site.engine.fault = behaviour, lambda *_: None
    image = built_site.image()
    with suppress(UsageError):
        commit(built_site)
    assert built_site.image().id == image.id


def test_rollback_without_a_previous_image_is_an_error(tmp_path: Path) -> None:
    site = new_site(tmp_path)
    with pytest.raises(UsageError, match="has no previous image"):
        rollback.rollback(site.project())


# --- Shell ----------------------------------------------------------------------------------


@pytest.fixture
def terminal(built_site: Site, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Commands that were attached to the terminal; each writes a file in the container."""
    attached: list[Sequence[str]] = []

    def call(argv: Sequence[str], env: dict[str, str]) -> int:
        assert env == {"DOCKER_HOST": "x"}
        attached.append(argv)
        container = built_site.engine._container(argv[-1])
        container.write(f"/made/{len(attached)}", "by hand")
        container.remove_files("/var/guix/guix-tasks")
        return 5

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(subprocess, "call", call)
    return attached


def shell(site: Site, *, stage: str | None = None, fresh: bool = False) -> tuple[int, str]:
    project = site.project()
    status = shell_module.shell(project, ["docker"], {"DOCKER_HOST": "x"}, stage=stage, fresh=fresh)
    return status, console_text(project)


def test_shell_requires_a_terminal(built_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UsageError, match=r"not a terminal; use `inv run -- COMMAND`"):
        shell(built_site)
    assert built_site.engine.all_containers == {}


def test_shell_is_attached_and_its_container_kept(
    built_site: Site, terminal: list[Sequence[str]]
) -> None:
    status, output = shell(built_site)
    (container,) = built_site.engine.all_containers
    assert terminal == [["docker", "start", "--attach", "--interactive", container]]
    assert status == 5
    assert "`inv commit` commits it as IMAGE" in output
    spec = built_site.engine.specs[-1]
    assert spec.tty
    assert spec.command == (ENTRY_POINT,)
    assert spec.labels == {PROJECT_LABEL: IMAGE}


@pytest.mark.parametrize(
    ("paths", "is_kept"),
    [
        ((), False),
        (("/var", "/var/guix", "/var/guix/daemon-socket", "/root", "/root/.bash_history"), False),
        (("/var", "/var/guix", "/var/guix/db", "/var/guix/db/db.sqlite", "/run"), False),
        (("/gnu", "/gnu/store", "/gnu/store/x-hello", "/var/guix/db/db.sqlite"), True),
        (("/root", "/root/.bashrc"), True),
        (("/srv",), True),
        ((ENVIRONMENT,), True),
    ],
)
def test_container_of_a_shell_is_kept_if_a_file_changed(
    built_site: Site,
    terminal: list[Sequence[str]],
    monkeypatch: pytest.MonkeyPatch,
    paths: tuple[str, ...],
    *,
    is_kept: bool,
) -> None:
    before = ["/gnu", ENVIRONMENT]
    calls = iter([before, ["/gnu", *paths]])
    monkeypatch.setattr(built_site.engine, "changed_paths", lambda _: next(calls))
    _, output = shell(built_site)
    assert terminal
    assert bool(built_site.engine.all_containers) == is_kept
    assert ("no file has changed; removed the container" in output) != is_kept


def test_container_of_a_detached_shell_is_kept(
    built_site: Site, terminal: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def detach(argv: Sequence[str], env: dict[str, str]) -> int:
        built_site.engine._container(argv[-1]).running = True
        return 0

    monkeypatch.setattr(subprocess, "call", detach)
    shell(built_site)
    assert len(built_site.engine.all_containers) == 1


def test_shell_is_re_entered(built_site: Site, terminal: list[Sequence[str]]) -> None:
    shell(built_site)
    _, output = shell(built_site)
    assert "re-entering the kept work container" in output
    assert terminal[0] == terminal[1]
    commit(built_site)
    assert {"/made/1", "/made/2"} <= built_site.engine.files(built_site.image()).keys()


def test_fresh_shell_removes_the_previous_container(
    built_site: Site, terminal: list[Sequence[str]]
) -> None:
    shell(built_site)
    shell(built_site, fresh=True, stage="base")
    assert len(built_site.engine.all_containers) == 1
    assert terminal[0] != terminal[1]
    assert built_site.engine.specs[-1].image == built_site.image("base").id


def test_shell_does_not_enter_the_container_of_a_command(
    built_site: Site, terminal: list[Sequence[str]]
) -> None:
    run(built_site, "make", keep=True)
    with pytest.raises(UsageError, match="is not committed yet"):
        shell(built_site)
    assert terminal == []


def test_open_shell_is_not_entered_twice(built_site: Site, terminal: list[Sequence[str]]) -> None:
    shell(built_site)
    (container,) = built_site.engine.all_containers.values()
    container.running = True
    with pytest.raises(UsageError, match="is still running"):
        shell(built_site)
    assert len(terminal) == 1


def test_argument_with_a_malformed_character_is_an_error(built_site: Site) -> None:
    calls = built_site.engine.changing_calls()
    with pytest.raises(
        UsageError, match=r"run: 'caf\\udce9' contains a NUL or a malformed character"
    ):
        run_module.run(built_site.project(), ["ls", "caf\udce9"], stage=None, keep=False)
    assert built_site.engine.changing_calls() == calls
