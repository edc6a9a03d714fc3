"""Hostile input is not executed by the command line, a real engine and a real Guix."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

import pytest
from harness import LOCK, OFFLINE, expect_error

from guix_tasks.guix import UNAUTHENTICATED
from guix_tasks.stages.container import PROJECT_LABEL, RESOURCES
from guix_tasks.stages.images import (
    CHANNELS_LABEL,
    INPUTS_LABEL,
    KEY_LABEL,
    LAYERS_LABEL,
    PACKAGES_LABEL,
    STAGE_LABEL,
)
from guix_tasks.stages.install import ASKED_LABEL
from guix_tasks.stages.pull import AUTHENTICATION_LABEL

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import BuiltProject, Project, ProjectFactory

pytestmark = [pytest.mark.engine, pytest.mark.soak]

CANARY = "canary"
HOSTILE_TEXT = f"$(touch {CANARY}) `touch {CANARY}` ; touch {CANARY} '\"\\ \x1b[2J \u202e -- ../.."


def has_no_canary(directory: Path) -> bool:
    return not list(directory.rglob(CANARY))


@pytest.mark.parametrize(
    "package", ["$(touch canary)", "`touch canary`", "a;touch canary", "--help", "../x", "a\nb"]
)
def test_package_that_is_a_command_is_refused(new_project: NewProject, package: str) -> None:
    project = new_project()
    with project.assert_unchanged():
        error = expect_error(project.inv("install", f"--package={package}"), 2)
    assert "--package" in error
    assert has_no_canary(project.directory)


HOSTILE_NAME = 'it\'s $(touch canary) `touch canary` ";touch canary;" \\ \n\x1b[2J'


def test_project_directory_can_have_any_name(
    factory: ProjectFactory, built_project: BuiltProject, tmp_path: Path
) -> None:
    """It contains the manifest, the channels, the lock, a mount, the log and ``out/``."""
    project = factory.create(
        tmp_path / HOSTILE_NAME,
        GUIX_CHANNELS="mine.scm",
        GUIX_MANIFEST="manifest.scm",
        GUIX_PACKAGES="no-such-package",
    )
    for name in ("out/channels.scm", "manifest.scm"):
        copy = project.directory / name.replace("out/channels", "mine")
        copy.write_bytes((OFFLINE / name).read_bytes())
    try:
        for stage in ("base", "pull"):
            project.copy_stage(stage, built_project.project)
        with project.assert_unchanged():
            result = project.inv("install")
        assert "no-such-package: unknown package" in result.stderr
        error = expect_error(result, 4)
        assert repr(HOSTILE_NAME)[-9:-1] in error  # the directory of the logs, on one line
        (diagnostics,) = (project.directory / "out" / "failed").iterdir()
        assert "GUIX_MANIFEST=manifest.scm" in (diagnostics / "settings").read_text()
        assert "\x1b[2J" not in error
        assert has_no_canary(tmp_path)
    finally:
        project.remove()


def test_hostile_labels_are_not_executed(project: Project) -> None:
    """The labels are on the image of ``BASE_IMAGE`` and on the image of each stage."""
    labels = dict.fromkeys(
        (STAGE_LABEL, KEY_LABEL, LAYERS_LABEL, CHANNELS_LABEL, PACKAGES_LABEL, ASKED_LABEL),
        HOSTILE_TEXT,
    )
    labels[INPUTS_LABEL] = json.dumps({HOSTILE_TEXT: HOSTILE_TEXT})
    labels["-e " + HOSTILE_TEXT] = HOSTILE_TEXT
    container = project.docker.ok("create", project.settings["BASE_IMAGE"], "true")
    changes = [f"LABEL {json.dumps(name)}={json.dumps(text)}" for name, text in labels.items()]
    hostile = f"{project.repository}:hostile"
    try:
        project.docker.ok(
            "commit", *(f"--change={change.replace('$', chr(92) + '$')}" for change in changes),
            container, hostile,
        )  # fmt: skip
    finally:
        project.docker("rm", container)
    assert HOSTILE_TEXT.partition(" ")[0] in str(project.docker.labels(hostile))
    for stage in ("base", "pull", "install"):
        project.docker.ok("tag", hostile, project.tag(stage))
    project.docker.ok("tag", hostile, project.tag())
    status = project.ok("status")
    assert "\x1b" not in status.stdout + status.stderr
    assert status.stdout.count("missing") == 3
    expect_error(project.inv("push", "--stage=install"), 2)
    project.set(BASE_IMAGE=hostile)
    project.ok("base")
    assert project.docker.labels(project.tag("base"))[STAGE_LABEL] == "base"
    assert has_no_canary(project.directory)


def test_container_with_any_name_is_removed_by_clean(project: Project) -> None:
    """It has the label of the project, and a name similar to those of guix-tasks."""
    name = f"guix-tasks-x-{secrets.token_hex(3)}-..-99999999999999999999-$"[:-1]
    project.docker.ok(
        "create", f"--name={name}", f"--label={PROJECT_LABEL}={project.image}",
        f"--label=x={HOSTILE_TEXT}", project.settings["BASE_IMAGE"], "true",
    )  # fmt: skip
    result = project.ok("clean", "--work")
    assert "1 removed" in result.stderr
    assert project.containers() == []


# --- Channels without authentication --------------------------------------------------------

COMPUTED = """(map (lambda (c) (if (eq? (channel-name c) 'guix) c
                            (channel (inherit c) (introduction #f))))
     {channels})
"""


def test_channel_without_an_introduction_is_refused(new_project: NewProject) -> None:
    """Guix itself pulls it without a warning."""
    project = new_project("base", GUIX_CHANNELS="mine.scm")
    channels = (OFFLINE / "out" / "channels.scm").read_text()
    start = channels.rindex("(introduction")
    bare = f"{channels[:start].rstrip()}))\n"
    mine = project.directory / "mine.scm"
    with project.assert_unchanged():
        mine.write_text(bare)
        error = expect_error(project.inv("pull"), 2)
        assert "mine.scm: the channel 'offline' has no introduction" in error
        mine.write_text(COMPUTED.format(channels=channels))
        error = expect_error(project.inv("pull"), 4)
        assert "the channel 'offline' has no introduction" in error
        assert not (project.directory / LOCK).exists()
    mine.write_text(bare)
    output = project.ok("pull", "--disable-authentication").stderr
    assert "channel authentication disabled" in output
    assert project.docker.labels(project.tag("pull"))[AUTHENTICATION_LABEL] == "disabled"
    project.ok("install")
    with project.assert_unchanged():
        assert f"{LOCK}: the channel 'offline'" in expect_error(project.inv("pull"), 2)


@pytest.mark.parametrize(("option", "status"), [((), 1), ((UNAUTHENTICATED,), 0)])
def test_unauthenticated_channel_is_resolved_only_with_the_option(
    new_project: NewProject, tmp_path: Path, option: tuple[str, ...], status: int
) -> None:
    """Builds with BuildKit resolve floating channels first; Guix itself refuses this one."""
    project = new_project("base")
    mine = tmp_path / "mine.scm"
    mine.write_text('(list (channel (name \'guix) (url "file:///offline/channels/guix")))')
    files = {mine: "/mine.scm", RESOURCES / "resolve.scm": "/resolve.scm"}
    result = project.docker.run(
        project.tag("base"), "guix", "repl", "--", "/resolve.scm", *option, "/mine.scm",
        options=(
            "--privileged", f"--volume={OFFLINE / 'out'}:/offline:ro",
            *(f"--volume={source}:{target}:ro" for source, target in files.items()),
        ),
    )  # fmt: skip
    assert result.returncode == status, result.stderr
    assert ("introduction and cannot be authenticated" in result.stderr) == bool(status)
    assert ("(name 'guix)" in result.stdout) == (status == 0)
