"""Nothing gets in, with the real command line, a real engine and a real Guix."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

import pytest
from harness import LOCK, OFFLINE, one_error

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
    from harness import Made, Project, Workshop

pytestmark = [pytest.mark.engine, pytest.mark.soak]

CANARY = "canary"
WORDS = f"$(touch {CANARY}) `touch {CANARY}` ; touch {CANARY} '\"\\ \x1b[2J \u202e -- ../.."


def no_canary(directory: Path) -> bool:
    return not list(directory.rglob(CANARY))


@pytest.mark.parametrize(
    "package", ["$(touch canary)", "`touch canary`", "a;touch canary", "--help", "../x", "a\nb"]
)
def test_a_package_that_is_a_command_is_refused(new_project: NewProject, package: str) -> None:
    project = new_project()
    with project.unharmed():
        error = one_error(project.inv("install", f"--package={package}"), 2)
    assert "--package" in error
    assert no_canary(project.directory)


def test_arguments_reach_a_command_as_they_are(project: Project) -> None:
    words = ["$(touch canary)", "`touch canary`", "a b", "'", '"', "\\", "\n", "-n", "*", "$HOME"]
    with project.unharmed():
        done = project.ok("run", "--", "printf", "<%s>", *words)
    assert done.stdout == "".join(f"<{word}>" for word in words)
    assert no_canary(project.directory)


HOSTILE_NAME = 'it\'s $(touch canary) `touch canary` ";touch canary;" \\ \n\x1b[2J'


def test_a_folder_of_any_name_is_a_folder(workshop: Workshop, made: Made, tmp_path: Path) -> None:
    """The manifest, the channels, the lock, a mount, the log and ``out/`` are all in it."""
    project = workshop.project(
        tmp_path / HOSTILE_NAME,
        GUIX_CHANNELS="mine.scm",
        GUIX_MANIFEST="manifest.scm",
        GUIX_PACKAGES="no-such-package",
    )
    for name in ("out/channels.scm", "manifest.scm"):
        own = project.directory / name.replace("out/channels", "mine")
        own.write_bytes((OFFLINE / name).read_bytes())
    try:
        for stage in ("base", "pull"):
            project.take(stage, made.project)
        with project.unharmed():
            done = project.inv("install")
        assert "no-such-package: unknown package" in done.stderr
        error = one_error(done, 4)
        assert repr(HOSTILE_NAME)[-9:-1] in error  # where the logs are, on one line
        (kept,) = (project.directory / "out" / "failed").iterdir()
        assert "GUIX_MANIFEST=manifest.scm" in (kept / "settings").read_text()
        assert "\x1b[2J" not in error
        assert no_canary(tmp_path)
    finally:
        project.remove()


def test_labels_that_others_made_are_words(project: Project) -> None:
    """An image with hostile labels as ``BASE_IMAGE``, and as each stage of the project."""
    labels = dict.fromkeys(
        (STAGE_LABEL, KEY_LABEL, LAYERS_LABEL, CHANNELS_LABEL, PACKAGES_LABEL, ASKED_LABEL), WORDS
    )
    labels[INPUTS_LABEL] = json.dumps({WORDS: WORDS})
    labels["-e " + WORDS] = WORDS
    container = project.docker.ok("create", project.settings["BASE_IMAGE"], "true")
    change = [f"LABEL {json.dumps(name)}={json.dumps(text)}" for name, text in labels.items()]
    hostile = f"{project.repository}:hostile"
    try:
        project.docker.ok(
            "commit", *(f"--change={each.replace('$', chr(92) + '$')}" for each in change),
            container, hostile,
        )  # fmt: skip
    finally:
        project.docker("rm", container)
    assert WORDS.partition(" ")[0] in str(project.docker.labels(hostile))
    for stage in ("base", "pull", "install"):
        project.docker.ok("tag", hostile, project.tag(stage))
    project.docker.ok("tag", hostile, project.tag())
    status = project.ok("status")
    assert "\x1b" not in status.stdout + status.stderr
    assert status.stdout.count("missing") == 3
    one_error(project.inv("push", "--stage=install"), 2)
    project.set(BASE_IMAGE=hostile)
    project.ok("base")
    assert project.docker.labels(project.tag("base"))[STAGE_LABEL] == "base"
    assert no_canary(project.directory)


def test_a_container_of_any_name_is_removed_by_clean(project: Project) -> None:
    """It has our label, and a name that looks like an option, or like one of ours."""
    mine = f"guix-tasks-x-{secrets.token_hex(3)}-..-99999999999999999999-$"[:-1]
    project.docker.ok(
        "create", f"--name={mine}", f"--label={PROJECT_LABEL}={project.image}",
        f"--label=x={WORDS}", project.settings["BASE_IMAGE"], "true",
    )  # fmt: skip
    done = project.ok("clean", "--work")
    assert "1 removed" in done.stderr
    assert project.containers() == []


# --- Channels that nothing authenticates ----------------------------------------------------

COMPUTED = """(map (lambda (c) (if (eq? (channel-name c) 'guix) c
                            (channel (inherit c) (introduction #f))))
     {channels})
"""


def test_a_channel_without_an_introduction(new_project: NewProject) -> None:
    """Guix itself pulls it without a word."""
    project = new_project("base", GUIX_CHANNELS="mine.scm")
    channels = (OFFLINE / "out" / "channels.scm").read_text()
    start = channels.rindex("(introduction")
    bare = f"{channels[:start].rstrip()}))\n"
    mine = project.directory / "mine.scm"
    with project.unharmed():
        mine.write_text(bare)
        early = one_error(project.inv("pull"), 2)
        assert "mine.scm: the channel 'offline' has no introduction" in early
        mine.write_text(COMPUTED.format(channels=channels))
        late = one_error(project.inv("pull"), 4)
        assert "the channel 'offline' has no introduction" in late
        assert not (project.directory / LOCK).exists()
    mine.write_text(bare)
    said = project.ok("pull", "--disable-authentication").stderr
    assert "channel authentication disabled" in said
    assert project.docker.labels(project.tag("pull"))[AUTHENTICATION_LABEL] == "disabled"
    project.ok("install")
    with project.unharmed():
        assert f"{LOCK}: the channel 'offline'" in one_error(project.inv("pull"), 2)


@pytest.mark.parametrize(("option", "status"), [((), 1), ((UNAUTHENTICATED,), 0)])
def test_floating_channels_are_resolved_as_they_are_pulled(
    new_project: NewProject, tmp_path: Path, option: tuple[str, ...], status: int
) -> None:
    """What the BuildKit way asks first, of a channel that Guix itself refuses."""
    project = new_project("base")
    mine = tmp_path / "mine.scm"
    mine.write_text('(list (channel (name \'guix) (url "file:///offline/channels/guix")))')
    seen = {mine: "/mine.scm", RESOURCES / "resolve.scm": "/resolve.scm"}
    done = project.docker.run(
        project.tag("base"), "guix", "repl", "--", "/resolve.scm", *option, "/mine.scm",
        options=(
            "--privileged", f"--volume={OFFLINE / 'out'}:/offline:ro",
            *(f"--volume={source}:{target}:ro" for source, target in seen.items()),
        ),
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert ("introduction and cannot be authenticated" in done.stderr) == bool(status)
    assert ("(name 'guix)" in done.stdout) == (status == 0)
