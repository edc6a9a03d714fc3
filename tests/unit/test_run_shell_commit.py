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
    heard,
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
    return run_module.run(project, argv, stage=stage, keep=keep), heard(project)


def commit(site: Site) -> str:
    project = site.project()
    commit_module.commit(project)
    return heard(project)


def fail(container: FakeContainer) -> Output:
    container.status = 3
    yield True, b"no\n"


# --- Run ------------------------------------------------------------------------------------


def test_arguments_are_kept_exactly(made: Site) -> None:
    argv = ("printf", "%s\n", "a b", "$HOME", "--keep", "")
    run(made, *argv)
    assert made.engine.specs[-1].command == (ENTRY_POINT, *argv)


def test_output_and_status_are_those_of_the_command(made: Site) -> None:
    def behaviour(container: FakeContainer) -> Output:
        container.status = 7
        yield False, b"out\n"
        yield True, b"err\n"

    made.engine.behaviour = behaviour
    project = made.project()
    assert run_module.run(project, ["x"], stage=None, keep=False) == 7
    assert heard(project) == "out\nerr\n"
    assert made.engine.all_containers == {}


def test_command_reads_the_input(made: Site) -> None:
    def behaviour(container: FakeContainer) -> Output:
        yield False, container.stdin.upper()

    made.engine.behaviour = behaviour
    project = made.project()
    run_module.run(project, ["cat"], stage=None, keep=False, stdin=io.BytesIO(b"in\n"))
    assert heard(project) == "IN\n"
    assert made.engine.specs[-1].stdin
    run(made, "cat")
    assert not made.engine.specs[-1].stdin


def test_missing_command_is_an_error(made: Site) -> None:
    with pytest.raises(UsageError, match=r"run: the command is missing; use `inv run -- COMMAND"):
        run(made)
    assert made.engine.specs == []


def test_image_of_a_stage_can_be_used(made: Site) -> None:
    run(made, "true", stage="pull")
    assert made.engine.specs[-1].image == made.image("pull").id
    run(made, "true")
    assert made.engine.specs[-1].image == made.image("install").id


def test_missing_image_is_an_error(site: Site) -> None:
    with pytest.raises(UsageError, match=f"{IMAGE} does not exist on this engine"):
        run(site, "true")
    assert site.engine.specs == []


def test_container_is_kept_with_keep(made: Site) -> None:
    _, output = run(made, "make", keep=True)
    assert "`inv commit` commits it as IMAGE" in output
    assert len(kept_containers(made.engine, made.settings())) == 1


def test_container_of_a_failed_command_is_removed(made: Site) -> None:
    made.engine.behaviour = fail
    status, output = run(made, "make", keep=True)
    assert status == 3
    assert "inv commit" not in output
    assert made.engine.all_containers == {}


def test_second_container_is_an_error(made: Site) -> None:
    run(made, "make", keep=True)
    containers = dict(made.engine.all_containers)
    with pytest.raises(UsageError, match=r"is not committed yet; .*`inv clean --work` removes it"):
        run(made, "make", keep=True)
    assert made.engine.all_containers == containers
    assert run(made, "true")[0] == 0


# --- Commit ---------------------------------------------------------------------------------


def test_nothing_to_commit_is_a_success(made: Site) -> None:
    initial_state = outline(made.engine)
    assert commit(made) == "commit: nothing to commit\n"
    assert outline(made.engine) == initial_state


def test_commit_changes_the_image_and_no_stage(made: Site) -> None:
    stages = {stage: made.image(stage).id for stage in STAGES}
    run(made, "make", keep=True)
    output = commit(made)
    image = made.image()
    assert output.startswith(f"commit: {IMAGE}, ")
    assert image.layers[:-1] == made.image("install").layers
    assert "/made/make" in made.engine.files(image)
    assert proven_stage(image) == HAND_MADE
    assert {stage: made.image(stage).id for stage in STAGES} == stages
    assert made.engine.all_containers == {}


def test_commit_keeps_the_configuration(made: Site) -> None:
    run(made, "make", keep=True)
    commit(made)
    committed, original = made.image().config, made.image("install").config
    assert {**committed, "Labels": None} == {**original, "Labels": None}
    assert committed["Labels"]["maintainer"] == "me"


def test_commit_without_changes_is_hand_made(made: Site) -> None:
    def change_nothing(container: FakeContainer) -> Output:
        container.forget("/var/guix/guix-tasks")
        yield True, b""

    made.engine.behaviour = change_nothing
    run(made, "true", keep=True)
    commit(made)
    assert proven_stage(made.image()) == HAND_MADE
    assert made.image().layers == made.image("install").layers


def test_next_stage_replaces_the_hand_made_image_with_a_note(made: Site) -> None:
    run(made, "make", keep=True)
    commit(made)
    hand_made = made.image()
    output = made.make("install")
    assert "replaced the image of `inv commit`" in output
    assert made.image().id == made.image("install").id
    project = made.project()
    rollback.rollback(project)
    assert made.image().id == hand_made.id
    assert "is now sha256:" in heard(project)


def test_uncommitted_stage_is_committed(made: Site) -> None:
    made.env["GUIX_PACKAGES"] = "tar"
    made.make("install", commit=False)
    commit(made)
    assert b"tar" in (made.engine.files(made.image())["/var/guix/profile"] or b"")
    assert proven_stage(made.image()) == HAND_MADE


def test_commit_of_an_unused_container_has_no_password(made: Site) -> None:
    made.env["https_proxy"] = "http://me:hunter2@proxy.test"
    project = made.project()
    work = Work("shell", (), {}, keep=True, tty=True)
    with work_container(made.engine, project.settings, made.image().id, work) as container:
        assert "hunter2" in made.engine.all_containers[container].text(ENVIRONMENT)
    commit(made)
    assert made.engine.files(made.image())[ENVIRONMENT] == b""


def test_running_container_is_not_committed(made: Site) -> None:
    run(made, "make", keep=True)
    (container,) = made.engine.all_containers.values()
    container.running = True
    with pytest.raises(UsageError, match="is still running; exit its shell first"):
        commit(made)
    assert container.id in made.engine.all_containers


def test_missing_image_of_the_container_is_an_error(made: Site) -> None:
    run(made, "make", keep=True)
    made.engine.all_images.clear()
    with pytest.raises(EngineError, match="its configuration, no longer exists"):
        commit(made)


def test_container_of_a_killed_run_is_not_committed(made: Site) -> None:
    """The command continues in the engine and may fail or be incomplete."""

    def kill_client(container: FakeContainer) -> Output:
        yield True, b"half\n"
        container.status, container.running = 137, False
        made.engine.fault = raise_killed
        raise Killed

    def raise_killed(*_: object) -> None:
        raise Killed

    behaviour, made.engine.behaviour = made.engine.behaviour, kill_client
    with another_process(), suppress(Killed):
        run(made, "make", keep=True)
    made.engine.behaviour, made.engine.fault = behaviour, lambda *_: None
    image = made.image()
    with suppress(UsageError):
        commit(made)
    assert made.image().id == image.id


def test_rollback_without_a_previous_image_is_an_error(tmp_path: Path) -> None:
    site = new_site(tmp_path)
    with pytest.raises(UsageError, match="has no previous image"):
        rollback.rollback(site.project())


# --- Shell ----------------------------------------------------------------------------------


@pytest.fixture
def terminal(made: Site, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Commands that were attached to the terminal; each writes a file in the container."""
    attached: list[Sequence[str]] = []

    def call(argv: Sequence[str], env: dict[str, str]) -> int:
        assert env == {"DOCKER_HOST": "x"}
        attached.append(argv)
        container = made.engine._container(argv[-1])
        container.write(f"/made/{len(attached)}", "by hand")
        container.forget("/var/guix/guix-tasks")
        return 5

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(subprocess, "call", call)
    return attached


def shell(site: Site, *, stage: str | None = None, fresh: bool = False) -> tuple[int, str]:
    project = site.project()
    status = shell_module.shell(project, ["docker"], {"DOCKER_HOST": "x"}, stage=stage, fresh=fresh)
    return status, heard(project)


def test_shell_requires_a_terminal(made: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UsageError, match=r"not a terminal; use `inv run -- COMMAND`"):
        shell(made)
    assert made.engine.all_containers == {}


def test_shell_is_attached_and_its_container_kept(
    made: Site, terminal: list[Sequence[str]]
) -> None:
    status, output = shell(made)
    (container,) = made.engine.all_containers
    assert terminal == [["docker", "start", "--attach", "--interactive", container]]
    assert status == 5
    assert "`inv commit` commits it as IMAGE" in output
    spec = made.engine.specs[-1]
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
    made: Site,
    terminal: list[Sequence[str]],
    monkeypatch: pytest.MonkeyPatch,
    paths: tuple[str, ...],
    *,
    is_kept: bool,
) -> None:
    before = ["/gnu", ENVIRONMENT]
    calls = iter([before, ["/gnu", *paths]])
    monkeypatch.setattr(made.engine, "changed_paths", lambda _: next(calls))
    _, output = shell(made)
    assert terminal
    assert bool(made.engine.all_containers) == is_kept
    assert ("no file has changed; removed the container" in output) != is_kept


def test_container_of_a_detached_shell_is_kept(
    made: Site, terminal: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def detach(argv: Sequence[str], env: dict[str, str]) -> int:
        made.engine._container(argv[-1]).running = True
        return 0

    monkeypatch.setattr(subprocess, "call", detach)
    shell(made)
    assert len(made.engine.all_containers) == 1


def test_shell_is_re_entered(made: Site, terminal: list[Sequence[str]]) -> None:
    shell(made)
    _, output = shell(made)
    assert "re-entering the kept work container" in output
    assert terminal[0] == terminal[1]
    commit(made)
    assert {"/made/1", "/made/2"} <= made.engine.files(made.image()).keys()


def test_fresh_shell_removes_the_previous_container(
    made: Site, terminal: list[Sequence[str]]
) -> None:
    shell(made)
    shell(made, fresh=True, stage="base")
    assert len(made.engine.all_containers) == 1
    assert terminal[0] != terminal[1]
    assert made.engine.specs[-1].image == made.image("base").id


def test_shell_does_not_enter_the_container_of_a_command(
    made: Site, terminal: list[Sequence[str]]
) -> None:
    run(made, "make", keep=True)
    with pytest.raises(UsageError, match="is not committed yet"):
        shell(made)
    assert terminal == []


def test_open_shell_is_not_entered_twice(made: Site, terminal: list[Sequence[str]]) -> None:
    shell(made)
    (container,) = made.engine.all_containers.values()
    container.running = True
    with pytest.raises(UsageError, match="is still running"):
        shell(made)
    assert len(terminal) == 1


def test_argument_with_a_malformed_character_is_an_error(made: Site) -> None:
    calls = made.engine.changing_calls()
    with pytest.raises(
        UsageError, match=r"run: 'caf\\udce9' contains a NUL or a malformed character"
    ):
        run_module.run(made.project(), ["ls", "caf\udce9"], stage=None, keep=False)
    assert made.engine.changing_calls() == calls
