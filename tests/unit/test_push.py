"""The task ``push``: pushed images, push records and errors."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fake_engine import BASE_IMAGE, COMMITS, IMAGE, FakeEngine, Heard, Site, heard, outline

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


def test_image_and_tags_are_pushed(made: Site) -> None:
    made.env["TAGS"] = "1.0 stable"
    digests = made.push()
    references = [IMAGE, "registry.test/team/app:1.0", "registry.test/team/app:stable"]
    assert list(digests) == references
    assert pushed_references(made) == set(references)
    assert len(set(digests.values())) == 1
    assert digests[IMAGE].startswith("sha256:")


def test_pushed_image_is_that_of_the_stage(made: Site) -> None:
    digest = made.push()[IMAGE]
    other_engine = FakeEngine(made.engine.registry)
    other_engine.pull(f"registry.test/team/app@{digest}", None)
    image = other_engine.image(f"registry.test/team/app@{digest}")
    assert image
    assert image.layers == made.image().layers
    assert image.config == made.image("install").config


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
    assert "`inv manifest` joins the platforms as" in heard(project)


def test_unwritable_record_is_reported_before_the_push(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.env["PLATFORMS"] = "linux/amd64"
    monkeypatch.setattr(os, "access", lambda path, _: path != made.directory)
    with pytest.raises(PermissionError):
        made.push()
    assert pushed_references(made) == set()


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


def test_push_without_a_platform_has_no_record(made: Site) -> None:
    made.push()
    assert push_records(made) == []
    made.env["PLATFORMS"] = "linux/amd64"
    made.push("base")
    assert push_records(made) == []


def test_dry_push_of_a_platform_writes_no_record(made: Site) -> None:
    made.env["PLATFORMS"] = "linux/amd64"
    console = Heard()
    project = made.project()
    engine = TracedEngine(made.engine, console, perform=False)
    push(replace(project, engine=engine, console=console))
    assert f"+ docker push {IMAGE}-linux-amd64" in console.text
    assert push_records(made) == []
    assert pushed_references(made) == set()


def test_stage_is_pushed_only_with_its_tag(made: Site) -> None:
    made.env["TAGS"] = "stable"
    assert list(made.push("base")) == [f"{IMAGE}-base"]
    assert pushed_references(made) == {f"{IMAGE}-base"}


def test_progress_is_shown(made: Site) -> None:
    project = made.project()
    push(project)
    assert heard(project).count(f"push {IMAGE}: ") == len(made.image().layers)


def test_summary_has_size_and_time(made: Site) -> None:
    project = made.project()
    push(project)
    size = human_size(1000 * len(made.image().layers))
    summary = heard(project).splitlines()[-1]
    assert re.fullmatch(rf"push: {IMAGE}, {re.escape(size)} moved, [0-9.]+ s", summary)


@pytest.mark.parametrize("stage", ["", "base"])
def test_missing_image_is_reported_with_the_command(site: Site, stage: str) -> None:
    with pytest.raises(
        UsageError, match=rf"does not exist on this engine; run `inv {stage or 'install'}`"
    ):
        site.push(stage or None)
    assert pushed_references(site) == set()


def test_invalid_stage_name_is_an_error(made: Site) -> None:
    with pytest.raises(UsageError, match="--stage: 'Bad Stage!' is not a valid stage name"):
        made.push("Bad Stage!")


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


def test_pull_after_install_makes_the_image_stale(made: Site) -> None:
    made.engine.guix.heads["guix"] = "c" * 40
    made.make("pull", update=True)
    with pytest.raises(UsageError, match=r"install is stale \(.*run `inv install"):
        made.push()


def test_image_with_unknown_channels_is_stale(made: Site) -> None:
    made.engine.untag(f"{IMAGE}-pull")
    (made.directory / "channels.lock.scm").unlink()
    with pytest.raises(UsageError, match=r"install is stale \(pull is missing, and no lock .*"):
        made.push()


def test_missing_image_is_repaired_before_the_push(made: Site) -> None:
    made.engine.untag(IMAGE)
    assert made.push()
    assert made.engine.tags[IMAGE] == made.image("install").id


def test_uncommitted_container_is_reported(made: Site) -> None:
    project = made.project()
    push(project)
    assert "is not committed yet" not in heard(project)
    run.run(made.project(), ["make"], stage=None, keep=True)
    project = made.project()
    push(project)
    assert re.search(r"warning: the work container \S+ is not committed yet; ", heard(project))


def test_image_of_a_commit_is_pushed_unchanged(made: Site) -> None:
    run.run(made.project(), ["make"], stage=None, keep=True)
    commit.commit(made.project())
    made.write("Dockerfile", "FROM y\n")
    made.push()
    pushed = made.engine.registry.find(IMAGE)
    assert pushed
    assert pushed.layers == made.image().layers
    assert pushed.layers != made.image("install").layers


def test_image_of_another_tool_is_pushed_with_a_warning(made: Site) -> None:
    """For example an image of BuildKit, whose inputs are unknown."""
    image = made.engine.make_image({}, {"/x": b""}, tag=IMAGE)
    project = made.project()
    push(project)
    assert "not built by a stage of this project" in heard(project)
    pushed = made.engine.registry.find(IMAGE)
    assert pushed
    assert pushed.layers == image.layers
    made.engine.untag(IMAGE)
    project = made.project()
    push(project)
    assert "not built by a stage" not in heard(project)


def test_other_digest_in_the_registry_is_an_error(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "remote_digest", lambda *_: "sha256:other")
    with pytest.raises(RegistryError, match="the registry has sha256:other"):
        made.push()


def test_rolled_back_image_is_pushed_unchanged(made: Site) -> None:
    previous = made.image()
    made.make("install", packages=("tar",))
    rollback.rollback(made.project())
    made.push()
    pushed = made.engine.registry.find(IMAGE)
    assert pushed
    assert pushed.layers == previous.layers
    assert made.image(PREVIOUS).id == made.image("install").id


def test_refused_push_changes_no_tag(made: Site) -> None:
    made.engine.registry.refusal = "denied"
    initial_state = outline(made.engine)
    with pytest.raises(RegistryError, match="denied"):
        made.push()
    assert outline(made.engine) == initial_state


def test_existing_image_is_not_pushed_again(made: Site) -> None:
    digests = made.push()
    made.engine.registry.immutable = True
    assert made.push() == digests
    made.make("install", packages=("tar",))
    with pytest.raises(RegistryError, match="the tag is immutable"):
        made.push()


def test_credentials_are_those_of_the_settings(made: Site) -> None:
    made.push()
    assert set(made.engine.registry.seen[-2:]) == {None}
    made.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    made.push()
    # The push and the check of the digest use the credentials.
    assert made.engine.registry.seen[-2:] == 2 * [Credentials("me", "hunter2")]


def test_required_image_is_that_of_the_settings_or_a_stage(made: Site) -> None:
    project = made.project()
    assert require_image(project).id == made.image("install").id
    assert require_image(project, "base").id == made.image("base").id


def test_stage_of_the_api_can_be_pushed(made: Site) -> None:
    describe = ("guix", "describe")
    run_stage(
        made.project(), Stage("tests", [describe], describe, lambda _: {}), made.image("install")
    )
    assert list(made.push("tests")) == [f"{IMAGE}-tests"]


def test_image_derived_from_a_stage_is_used(made: Site) -> None:
    install = made.image("install")
    derived = made.engine.make_image(install.config, {"/mine": b""}, parent=install, tag=IMAGE)
    assert require_image(made.project()).id == derived.id
    made.push()
    assert made.engine.tags[IMAGE] == derived.id
