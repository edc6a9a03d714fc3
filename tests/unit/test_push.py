"""Push: what goes to the registry, and what does not."""

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


def pushed(site: Site) -> set[str]:
    return site.engine.registry.images.keys() - {BASE_IMAGE}


def digest_files(site: Site) -> list[Path]:
    return sorted((site.directory / "out").glob("digests/*"))


def test_image_and_tags_are_pushed(made: Site) -> None:
    made.env["TAGS"] = "1.0 stable"
    digests = made.push()
    references = [IMAGE, "registry.test/team/app:1.0", "registry.test/team/app:stable"]
    assert list(digests) == references
    assert pushed(made) == set(references)
    assert len(set(digests.values())) == 1
    assert digests[IMAGE].startswith("sha256:")


def test_what_was_pushed_is_what_image_is(made: Site) -> None:
    digest = made.push()[IMAGE]
    other = FakeEngine(made.engine.registry)
    other.pull(f"registry.test/team/app@{digest}", None)
    image = other.image(f"registry.test/team/app@{digest}")
    assert image
    assert image.layers == made.image().layers
    assert image.config == made.image("install").config


@pytest.mark.parametrize("platform", ["linux/amd64", "linux/arm64"])
def test_a_platform_is_pushed_by_its_own_tag_and_written_down(site: Site, platform: str) -> None:
    """For `inv manifest`, which gives the tags to what it joins."""
    site.env.update(PLATFORMS=platform, GUIX_SANDBOX="nochroot", TAGS="stable")
    site.make(*STAGES)
    project = site.project()
    digests = push(project)
    reference = f"{IMAGE}-{platform.replace('/', '-')}"
    assert list(digests) == [reference]
    assert pushed(site) == {reference}
    (file,) = digest_files(site)
    assert file.name == f"{platform.replace('/', '-')}.json"
    assert json.loads(file.read_text()) == {
        "repository": "registry.test/team/app",
        "platforms": [platform],
        "digest": digests[reference],
        "commits": {"guix": COMMITS["guix"]},
    }
    assert "`inv manifest` joins the platforms as" in heard(project)


def test_record_that_cannot_be_written_is_reported_before_the_push(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.env["PLATFORMS"] = "linux/amd64"
    monkeypatch.setattr(os, "access", lambda path, _: path != made.directory)
    with pytest.raises(PermissionError):
        made.push()
    assert pushed(made) == set()


def test_another_push_of_a_platform_takes_the_place_of_the_one_before(site: Site) -> None:
    site.env["PLATFORMS"] = "linux/amd64"
    site.make(*STAGES)
    before = site.push()
    site.env["GUIX_PACKAGES"] = "tar"
    site.make("install")
    after = site.push()
    assert before != after
    (file,) = digest_files(site)
    assert json.loads(file.read_text())["digest"] in after.values()


def test_a_push_that_is_refused_is_not_written_down(site: Site) -> None:
    site.env["PLATFORMS"] = "linux/amd64"
    site.make(*STAGES)
    site.engine.registry.refusal = "denied"
    with pytest.raises(RegistryError):
        site.push()
    assert digest_files(site) == []


def test_what_is_no_image_for_a_platform_is_not_written_down(made: Site) -> None:
    made.push()
    assert digest_files(made) == []
    made.env["PLATFORMS"] = "linux/amd64"
    made.push("base")
    assert digest_files(made) == []


def test_a_dry_push_of_a_platform_writes_nothing_down(made: Site) -> None:
    made.env["PLATFORMS"] = "linux/amd64"
    console = Heard()
    project = made.project()
    engine = TracedEngine(made.engine, console, perform=False)
    push(replace(project, engine=engine, console=console))
    assert f"+ docker push {IMAGE}-linux-amd64" in console.text
    assert digest_files(made) == []
    assert pushed(made) == set()


def test_a_stage_is_pushed_by_its_own_tag_alone(made: Site) -> None:
    made.env["TAGS"] = "stable"
    assert list(made.push("base")) == [f"{IMAGE}-base"]
    assert pushed(made) == {f"{IMAGE}-base"}


def test_progress_is_shown(made: Site) -> None:
    project = made.project()
    push(project)
    assert heard(project).count(f"push {IMAGE}: ") == len(made.image().layers)


def test_a_push_ends_with_what_it_moved_and_how_long_it_took(made: Site) -> None:
    project = made.project()
    push(project)
    size = human_size(1000 * len(made.image().layers))
    last = heard(project).splitlines()[-1]
    assert re.fullmatch(rf"push: {IMAGE}, {re.escape(size)} moved, [0-9.]+ s", last)


@pytest.mark.parametrize("stage", ["", "base"])
def test_nothing_to_push_names_the_command(site: Site, stage: str) -> None:
    with pytest.raises(
        UsageError, match=rf"does not exist on this engine; run `inv {stage or 'install'}`"
    ):
        site.push(stage or None)
    assert pushed(site) == set()


def test_a_stage_that_can_be_none_is_one_line(made: Site) -> None:
    with pytest.raises(UsageError):
        made.push("Bad Stage!")


@pytest.mark.parametrize(
    ("last", "change", "command"),
    [
        ("base", "Dockerfile", "inv base"),
        ("pull", "Dockerfile", "inv pull --upstream"),
        ("install", "Dockerfile", "inv install --upstream"),
        ("install", "packages", "inv install"),
    ],
)
def test_what_is_stale_is_refused_with_the_command(
    site: Site, last: str, change: str, command: str
) -> None:
    site.make(*STAGES[: STAGES.index(last) + 1])
    if change == "packages":
        site.env["GUIX_PACKAGES"] = "tar"
    else:
        site.write("Dockerfile", "FROM y\n")
    with pytest.raises(UsageError, match=rf"{last} is stale \(.*; run `{command}"):
        site.push()
    assert pushed(site) == set()


def test_a_pull_after_install_makes_the_push_stale(made: Site) -> None:
    made.engine.guix.heads["guix"] = "c" * 40
    made.make("pull", update=True)
    with pytest.raises(UsageError, match=r"install is stale \(.*run `inv install"):
        made.push()


def test_image_whose_channels_nobody_knows_is_not_pushed_as_up_to_date(made: Site) -> None:
    made.engine.untag(f"{IMAGE}-pull")
    (made.directory / "channels.lock.scm").unlink()
    with pytest.raises(UsageError, match=r"install is stale \(pull is missing, and no lock .*"):
        made.push()


def test_an_image_that_was_not_reached_is_repaired_first(made: Site) -> None:
    made.engine.untag(IMAGE)
    assert made.push()
    assert made.engine.tags[IMAGE] == made.image("install").id


def test_a_push_tells_of_the_container_that_is_not_committed(made: Site) -> None:
    project = made.project()
    push(project)
    assert "is not committed yet" not in heard(project)
    run.run(made.project(), ["make"], stage=None, keep=True)
    project = made.project()
    push(project)
    assert re.search(r"warning: the work container \S+ is not committed yet; ", heard(project))


def test_a_hand_made_image_is_pushed_as_it_is(made: Site) -> None:
    run.run(made.project(), ["make"], stage=None, keep=True)
    commit.commit(made.project())
    made.write("Dockerfile", "FROM y\n")
    made.push()
    found = made.engine.registry.find(IMAGE)
    assert found
    assert found.layers == made.image().layers
    assert found.layers != made.image("install").layers


def test_an_image_that_no_stage_made_is_pushed_with_a_warning(made: Site) -> None:
    """As one that BuildKit built: nobody knows what it was made from."""
    other = made.engine.make_image({}, {"/x": b""}, tag=IMAGE)
    project = made.project()
    push(project)
    assert "not built by a stage of this project" in heard(project)
    found = made.engine.registry.find(IMAGE)
    assert found
    assert found.layers == other.layers
    made.engine.untag(IMAGE)
    project = made.project()
    push(project)
    assert "made by none" not in heard(project)


def test_a_registry_that_holds_another_image_is_not_believed(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "remote_digest", lambda *_: "sha256:other")
    with pytest.raises(RegistryError, match="the registry has sha256:other"):
        made.push()


def test_an_image_that_was_rolled_back_to_is_pushed_as_it_is(made: Site) -> None:
    before = made.image()
    made.make("install", packages=("tar",))
    rollback.rollback(made.project())
    made.push()
    found = made.engine.registry.find(IMAGE)
    assert found
    assert found.layers == before.layers
    assert made.image(PREVIOUS).id == made.image("install").id


def test_refusal_of_a_registry_is_an_error_and_changes_no_tag(made: Site) -> None:
    made.engine.registry.refusal = "denied"
    before = outline(made.engine)
    with pytest.raises(RegistryError, match="denied"):
        made.push()
    assert outline(made.engine) == before


def test_what_a_registry_has_already_need_not_be_pushed_again(made: Site) -> None:
    digests = made.push()
    made.engine.registry.immutable = True
    assert made.push() == digests
    made.make("install", packages=("tar",))
    with pytest.raises(RegistryError, match="the tag is immutable"):
        made.push()


def test_the_credentials_are_those_of_the_settings(made: Site) -> None:
    made.push()
    assert set(made.engine.registry.seen[-2:]) == {None}
    made.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    made.push()
    # Of the push, and of the question what the registry holds.
    assert made.engine.registry.seen[-2:] == 2 * [Credentials("me", "hunter2")]


def test_image_to_use_is_image_or_a_stage(made: Site) -> None:
    project = made.project()
    assert require_image(project).id == made.image("install").id
    assert require_image(project, "base").id == made.image("base").id


def test_stage_built_from_the_api_can_be_pushed(made: Site) -> None:
    describe = ("guix", "describe")
    run_stage(
        made.project(), Stage("tests", [describe], describe, lambda _: {}), made.image("install")
    )
    assert list(made.push("tests")) == [f"{IMAGE}-tests"]


def test_what_others_made_from_a_stage_is_used_as_image(made: Site) -> None:
    install = made.image("install")
    mine = made.engine.make_image(install.config, {"/mine": b""}, parent=install, tag=IMAGE)
    assert require_image(made.project()).id == mine.id
    made.push()
    assert made.engine.tags[IMAGE] == mine.id
