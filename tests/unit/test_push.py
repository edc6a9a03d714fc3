"""The task ``push``: pushed images, push records and errors."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fake_engine import (
    BASE_IMAGE,
    COMMITS,
    IMAGE,
    BufferConsole,
    FakeEngine,
    Site,
    console_text,
    outline,
)

from guix_tasks.commands import commit, rollback, run
from guix_tasks.commands.push import push, require_image
from guix_tasks.engine.accounts import Credentials
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.errors import RegistryError, UsageError
from guix_tasks.stages.images import PREVIOUS, STAGES
from guix_tasks.stages.make import run_stage
from guix_tasks.stages.stage import Stage
from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.usefixtures("serial_hashing")


def pushed_references(site: Site) -> set[str]:
    return site.engine.registry.images.keys() - {BASE_IMAGE}


def push_records(site: Site) -> list[Path]:
    return sorted((site.directory / "out").glob("digests/*"))


def test_image_and_tags_are_pushed(built_site: Site) -> None:
    built_site.env["TAGS"] = "1.0 stable"
    digests = built_site.push()
    references = [IMAGE, "registry.test/team/app:1.0", "registry.test/team/app:stable"]
    assert list(digests) == references
    assert pushed_references(built_site) == set(references)
    assert len(set(digests.values())) == 1
    assert digests[IMAGE].startswith("sha256:")


def test_pushed_image_is_that_of_the_stage(built_site: Site) -> None:
    digest = built_site.push()[IMAGE]
    other_engine = FakeEngine(built_site.engine.registry)
    other_engine.pull(f"registry.test/team/app@{digest}", None)
    image = other_engine.image(f"registry.test/team/app@{digest}")
    assert image
    assert image.layers == built_site.image().layers
    assert image.config == built_site.image("install").config


@pytest.mark.parametrize("platform", ["linux/amd64", "linux/arm64"])
def test_platform_is_pushed_with_a_separate_tag_and_a_record(site: Site, platform: str) -> None:
    """The task `manifest` joins the platforms and sets the tags."""
    site.env.update(PLATFORMS=platform, GUIX_SANDBOX="nochroot", TAGS="stable")
    site.make(*STAGES)
    project = site.project()
    digests = push(project)
    reference = f"{IMAGE}-{platform.replace('/', '-')}"
    assert list(digests) == [reference]
    assert pushed_references(site) == {reference}
    (file,) = push_records(site)
    assert file.name == f"{platform.replace('/', '-')}.json"
    assert json.loads(file.read_text()) == {
        "repository": "registry.test/team/app",
        "platforms": [platform],
        "digest": digests[reference],
        "commits": {"guix": COMMITS["guix"]},
    }
    assert "`inv manifest` joins the platforms as" in console_text(project)


def test_unwritable_record_is_reported_before_the_push(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_site.env["PLATFORMS"] = "linux/amd64"
    monkeypatch.setattr(os, "access", lambda path, _: path != built_site.directory)
    with pytest.raises(PermissionError):
        built_site.push()
    assert pushed_references(built_site) == set()


def test_next_push_of_a_platform_replaces_its_record(site: Site) -> None:
    site.env["PLATFORMS"] = "linux/amd64"
    site.make(*STAGES)
    previous_digests = site.push()
    site.env["GUIX_PACKAGES"] = "tar"
    site.make("install")
    digests = site.push()
    assert previous_digests != digests
    (file,) = push_records(site)
    assert json.loads(file.read_text())["digest"] in digests.values()


def test_refused_push_has_no_record(site: Site) -> None:
    site.env["PLATFORMS"] = "linux/amd64"
    site.make(*STAGES)
    site.engine.registry.refusal = "denied"
    with pytest.raises(RegistryError):
        site.push()
    assert push_records(site) == []


def test_push_without_a_platform_has_no_record(built_site: Site) -> None:
    built_site.push()
    assert push_records(built_site) == []
    built_site.env["PLATFORMS"] = "linux/amd64"
    built_site.push("base")
    assert push_records(built_site) == []


def test_dry_push_of_a_platform_writes_no_record(built_site: Site) -> None:
    built_site.env["PLATFORMS"] = "linux/amd64"
    console = BufferConsole()
    project = built_site.project()
    engine = TracedEngine(built_site.engine, console, perform=False)
    push(replace(project, engine=engine, console=console))
    assert f"+ docker push {IMAGE}-linux-amd64" in console.text
    assert push_records(built_site) == []
    assert pushed_references(built_site) == set()


def test_stage_is_pushed_only_with_its_tag(built_site: Site) -> None:
    built_site.env["TAGS"] = "stable"
    assert list(built_site.push("base")) == [f"{IMAGE}-base"]
    assert pushed_references(built_site) == {f"{IMAGE}-base"}


def test_progress_is_shown(built_site: Site) -> None:
    project = built_site.project()
    push(project)
    assert console_text(project).count(" pushed") == len(built_site.image().layers)


def test_summary_has_size_and_time(built_site: Site) -> None:
    project = built_site.project()
    push(project)
    size = human_size(1000 * len(built_site.image().layers))
    summary = console_text(project).splitlines()[-1]
    assert re.fullmatch(rf"push: {IMAGE}, {re.escape(size)} moved, [0-9.]+ s", summary)


@pytest.mark.parametrize("stage", ["", "base"])
def test_missing_image_is_reported_with_the_command(site: Site, stage: str) -> None:
    with pytest.raises(
        UsageError, match=rf"does not exist on this engine; run `inv {stage or 'install'}`"
    ):
        site.push(stage or None)
    assert pushed_references(site) == set()


def test_invalid_stage_name_is_an_error(built_site: Site) -> None:
    with pytest.raises(UsageError, match="--stage: 'Bad Stage!' is not a valid stage name"):
        built_site.push("Bad Stage!")


@pytest.mark.parametrize(
    ("stage", "change", "command"),
    [
        ("base", "Dockerfile", "inv base"),
        ("pull", "Dockerfile", "inv pull --upstream"),
        ("install", "Dockerfile", "inv install --upstream"),
        ("install", "packages", "inv install"),
    ],
)
def test_stale_stage_is_reported_with_the_command(
    site: Site, stage: str, change: str, command: str
) -> None:
    site.make(*STAGES[: STAGES.index(stage) + 1])
    if change == "packages":
        site.env["GUIX_PACKAGES"] = "tar"
    else:
        site.write("Dockerfile", "FROM y\n")
    with pytest.raises(UsageError, match=rf"{stage} is stale \(.*; run `{command}"):
        site.push()
    assert pushed_references(site) == set()


def test_pull_after_install_makes_the_image_stale(built_site: Site) -> None:
    built_site.engine.guix.heads["guix"] = "c" * 40
    built_site.make("pull", update=True)
    with pytest.raises(UsageError, match=r"install is stale \(.*run `inv install"):
        built_site.push()


def test_image_with_unknown_channels_is_stale(built_site: Site) -> None:
    built_site.engine.untag(f"{IMAGE}-pull")
    (built_site.directory / "channels.lock.scm").unlink()
    with pytest.raises(UsageError, match=r"install is stale \(pull is missing, and no lock .*"):
        built_site.push()


def test_missing_image_is_repaired_before_the_push(built_site: Site) -> None:
    built_site.engine.untag(IMAGE)
    assert built_site.push()
    assert built_site.engine.tags[IMAGE] == built_site.image("install").id


def test_uncommitted_container_is_reported(built_site: Site) -> None:
    project = built_site.project()
    push(project)
    assert "is not committed yet" not in console_text(project)
    run.run(built_site.project(), ["make"], stage=None, keep=True)
    project = built_site.project()
    push(project)
    assert re.search(
        r"warning: the work container \S+ is not committed yet; ", console_text(project)
    )


def test_image_of_a_commit_is_pushed_unchanged(built_site: Site) -> None:
    run.run(built_site.project(), ["make"], stage=None, keep=True)
    commit.commit(built_site.project())
    built_site.write("Dockerfile", "FROM y\n")
    built_site.push()
    pushed = built_site.engine.registry.find(IMAGE)
    assert pushed
    assert pushed.layers == built_site.image().layers
    assert pushed.layers != built_site.image("install").layers


def test_image_of_another_tool_is_pushed_with_a_warning(built_site: Site) -> None:
    """For example an image of BuildKit, whose inputs are unknown."""
    image = built_site.engine.make_image({}, {"/x": b""}, tag=IMAGE)
    project = built_site.project()
    push(project)
    assert "not built by a stage of this project" in console_text(project)
    pushed = built_site.engine.registry.find(IMAGE)
    assert pushed
    assert pushed.layers == image.layers
    built_site.engine.untag(IMAGE)
    project = built_site.project()
    push(project)
    assert "not built by a stage" not in console_text(project)


def test_other_digest_in_the_registry_is_an_error(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "remote_digest", lambda *_: "sha256:other")
    with pytest.raises(RegistryError, match="the registry has sha256:other"):
        built_site.push()


def test_rolled_back_image_is_pushed_unchanged(built_site: Site) -> None:
    previous = built_site.image()
    built_site.make("install", packages=("tar",))
    rollback.rollback(built_site.project())
    built_site.push()
    pushed = built_site.engine.registry.find(IMAGE)
    assert pushed
    assert pushed.layers == previous.layers
    assert built_site.image(PREVIOUS).id == built_site.image("install").id


def test_refused_push_changes_no_tag(built_site: Site) -> None:
    built_site.engine.registry.refusal = "denied"
    initial_state = outline(built_site.engine)
    with pytest.raises(RegistryError, match="denied"):
        built_site.push()
    assert outline(built_site.engine) == initial_state


def test_existing_image_is_not_pushed_again(built_site: Site) -> None:
    digests = built_site.push()
    built_site.engine.registry.immutable = True
    assert built_site.push() == digests
    built_site.make("install", packages=("tar",))
    with pytest.raises(RegistryError, match="the tag is immutable"):
        built_site.push()


def test_credentials_are_those_of_the_settings(built_site: Site) -> None:
    built_site.push()
    assert set(built_site.engine.registry.used_credentials[-2:]) == {None}
    built_site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    built_site.push()
    # The push and the check of the digest use the credentials.
    assert built_site.engine.registry.used_credentials[-2:] == 2 * [Credentials("me", "hunter2")]


def test_required_image_is_that_of_the_settings_or_a_stage(built_site: Site) -> None:
    project = built_site.project()
    assert require_image(project).id == built_site.image("install").id
    assert require_image(project, "base").id == built_site.image("base").id


def test_stage_of_the_api_can_be_pushed(built_site: Site) -> None:
    describe = ("guix", "describe")
    run_stage(
        built_site.project(),
        Stage("tests", [describe], describe, lambda _: {}),
        built_site.image("install"),
    )
    assert list(built_site.push("tests")) == [f"{IMAGE}-tests"]


def test_image_derived_from_a_stage_is_used(built_site: Site) -> None:
    install = built_site.image("install")
    derived = built_site.engine.make_image(
        install.config, {"/mine": b""}, parent=install, tag=IMAGE
    )
    assert require_image(built_site.project()).id == derived.id
    built_site.push()
    assert built_site.engine.tags[IMAGE] == derived.id
