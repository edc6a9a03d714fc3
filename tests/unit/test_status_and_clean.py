"""The tasks ``status`` and ``clean``."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fake_engine import BASE_IMAGE, COMMITS, IMAGE, Heard, Site, heard

from guix_tasks.commands import commit, run
from guix_tasks.commands.clean import clean
from guix_tasks.commands.status import STATUS_HEADER, show_status, status_rows, tag_statuses
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.engine.podman_api import UNFINISHED_LABEL
from guix_tasks.errors import UsageError
from guix_tasks.stages.container import PROJECT_LABEL
from guix_tasks.stages.images import CONTAINER_LABEL, PREVIOUS, STAGES

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.stages.project import Project


pytestmark = pytest.mark.usefixtures("serial_hashing")


def read_status(project: Project) -> list[dict[str, str]]:
    rows = status_rows(tag_statuses(project))
    return [dict(zip(STATUS_HEADER, row, strict=True)) for row in rows]


def read_states(site: Site) -> dict[str, str]:
    rows = read_status(site.project())
    return {row["stage"]: row["state"] for row in rows}


# --- Status ---------------------------------------------------------------------------------


def test_status_without_images_is_missing(site: Site) -> None:
    assert read_states(site) == dict.fromkeys((*STAGES, "IMAGE"), "missing")
    assert site.engine.changing_calls() == []


def test_status_of_current_stages_is_up_to_date(made: Site) -> None:
    up_to_date = dict.fromkeys(STAGES, "up to date")
    assert read_states(made) == {**up_to_date, "IMAGE": "stage install"}


def test_status_has_the_reason(made: Site) -> None:
    made.write("Dockerfile", "FROM y\n")
    stages = read_states(made)
    assert stages["base"] == "stale: Dockerfile changed"
    assert stages["pull"].startswith("stale: base")
    assert stages["install"].startswith("stale: ")
    made.make("base")
    assert read_states(made)["pull"] == "stale: base is newer"


def test_status_begins_with_the_next_run(made: Site) -> None:
    def first_line() -> str:
        console = Heard()
        show_status(replace(made.project(), console=console))
        return console.said.getvalue().splitlines()[0]

    assert first_line() == "all stages are up to date: `inv push` would run none of them"
    made.write("Dockerfile", "FROM y\n")
    assert first_line() == (
        "`inv base pull install push` would run base (Dockerfile changed), pull, install"
    )
    made.make("base")
    made.env["GUIX_PACKAGES"] = "tar"
    assert first_line() == "`inv pull install push` would run pull (base is newer), install"


def test_status_names_files_relative_to_the_project(made: Site) -> None:
    made.write("scm/manifest.scm", '(specifications->manifest \'("tar"))')
    made.env["GUIX_MANIFEST"] = "scm/manifest.scm"
    assert read_states(made)["install"] == "stale: packages, scm/manifest.scm changed"
    made.make("install")
    made.write("scm/manifest.scm", '(specifications->manifest \'("sed"))')
    assert read_states(made)["install"] == "stale: scm/manifest.scm changed"
    del made.env["GUIX_MANIFEST"]
    assert read_states(made)["install"] == "stale: GUIX_MANIFEST, packages changed"
    made.write("sub/Other", "FROM y\n")
    made.env["DOCKERFILE"] = "sub/Other"
    assert read_states(made)["base"] == "stale: sub/Other changed"


def test_status_names_the_lock_relative_to_the_project(made: Site) -> None:
    lock = made.settings().guix_channels_lock
    assert lock
    lock.write_text(lock.read_text() + "\n;; by hand\n")
    assert read_states(made)["pull"] == f"stale: {lock.relative_to(made.directory)} changed"


def test_status_reports_a_lock_that_does_not_fit(made: Site) -> None:
    made.write("channels.scm", '(list (channel (name \'mine) (url "https://m.test")))')
    stages = read_states(made)
    assert stages["base"] == "up to date"
    assert stages["pull"] == "stale: GUIX_CHANNELS changed (it lacks the channel mine)"
    assert stages["install"].startswith("stale: pull")


def test_status_has_sizes_ages_and_channels(made: Site) -> None:
    rows = read_status(made.project())
    pull = rows[STAGES.index("pull")]
    assert pull["image"] == f"{IMAGE}-pull"
    assert pull["id"] == made.image("pull").id.removeprefix("sha256:")[:12]
    assert pull["size"] == "3 kB"
    assert pull["age"].endswith("min")
    assert pull["channels"] == f"guix@{COMMITS['guix'][:7]}"
    assert rows[0]["channels"] == "-"


def test_status_describes_the_image(made: Site) -> None:
    def image_state() -> str:
        return read_states(made)["IMAGE"]

    install_image = made.image("install")
    made.engine.tag(install_image.id, "other:1")
    run.run(made.project(), ["make"], stage=None, keep=True)
    commit.commit(made.project())
    assert image_state() == "made by hand"
    made.make("install", packages=("tar",))
    made.engine.tag(install_image.id, IMAGE)
    assert image_state() == "an earlier install"
    made.engine.make_image(install_image.config, {"/mine": b""}, parent=install_image, tag=IMAGE)
    assert image_state() == "not made here"
    made.engine.untag(IMAGE)
    assert image_state() == "missing"


def test_sizes_are_shown_and_drawn(made: Site) -> None:
    project = made.project()
    show_status(project, plot=str(made.directory / "sizes.svg"))
    assert "stage" in heard(project)
    assert (made.directory / "sizes.svg").read_text().startswith("<svg")
    with pytest.raises(UsageError, match=r"--plot: .*: No such file or directory"):
        show_status(made.project(), plot=str(made.directory / "no" / "sizes.svg"))


def test_malformed_size_report_of_an_image_is_ignored(made: Site) -> None:
    item = b"0" * 32 + b"-x"
    size_report = b"\n1\nx\t/gnu/store/a\n7\t/gnu/store/" + item + b"\n1\t2\t3\n-1\t/gnu/store/b\n"
    made.engine.behaviour = lambda _container: iter([(False, size_report)])
    project = made.project()
    show_status(project, size=True)
    assert re.findall("store item +(.*)", heard(project)) == ["x        7.17 kB"]


def test_image_with_a_zero_date_has_a_state(made: Site) -> None:
    image = made.engine.make_image({}, {"/x": b""}, tag=IMAGE)
    made.engine.all_images[image.id] = replace(image, created="0001-01-01T00:00:00Z")
    assert read_states(made)["IMAGE"] == "not made here"


@pytest.mark.parametrize(
    "created",
    [
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00Z",
        "1970-01-01T00:00:01Z",
        "never",
        "",
    ],
)
def test_image_with_an_invalid_date_has_no_age(made: Site, created: str) -> None:
    image = made.image("install")
    made.engine.all_images[image.id] = replace(image, created=created)
    assert status_rows(tag_statuses(made.project()))[-1][4] == "-"


class Terminal(Heard):
    """A terminal whose width is ``COLUMNS``."""

    def __init__(self) -> None:
        super().__init__()
        self.results.isatty = lambda: True  # type: ignore[method-assign]


def status_lines(site: Site, console: Heard) -> list[str]:
    project = replace(site.project(), console=console)
    show_status(project)
    return console.results.getvalue().splitlines()


@pytest.mark.parametrize("columns", [45, 60, 80])
def test_status_fits_a_narrow_terminal(
    made: Site, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    wide = status_lines(made, Heard())
    assert max(map(len, wide)) > 100
    assert f"  {IMAGE}-pull  " in wide[2]
    narrow = status_lines(made, Terminal())
    assert max(map(len, narrow)) <= columns
    tag = IMAGE.rpartition(":")[2]
    assert re.match(rf"pull +{tag}-pull +", narrow[2])
    assert "up to date" in narrow[2]
    assert (f"guix@{COMMITS['guix'][:7]}" in narrow[2]) is (columns > 45)


def test_status_is_complete_on_a_wide_terminal(made: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert status_lines(made, Terminal()) == status_lines(made, Heard())


@pytest.mark.parametrize("as_json", [False, True])
def test_status_reports_an_uncommitted_container(made: Site, as_json: bool) -> None:
    def messages() -> str:
        console = Heard()
        project = replace(made.project(), console=console)
        show_status(project, as_json=as_json)
        return console.said.getvalue()

    assert "is not committed" not in messages()
    run.run(made.project(), ["make"], stage=None, keep=True)
    assert re.search(
        r"work container \S+-kept-run-\S+ is not committed yet; `inv commit`", messages()
    )
    commit.commit(made.project())
    assert "is not committed" not in messages()


# --- Clean ----------------------------------------------------------------------------------


def create_foreign_objects(site: Site) -> set[str]:
    """Create objects of other projects on the engine and return their tags."""
    engine = site.engine
    install = site.image("install")
    engine.make_image({}, {"/x": b""}, tag="debian:12")
    engine.make_image(install.config, {"/mine": b""}, parent=install, tag="mine:1")
    engine.make_image(install.config, {}, parent=install, tag="mine:2")
    engine.make_image(install.config, {"/mine": b""}, parent=install, tag=f"{IMAGE}-mine")
    engine.tag(install.id, "other:1")
    engine.create(ContainerSpec("mine", "debian:12", ("x",)))
    engine.create(ContainerSpec("of-a-stage", "mine:1", ("x",)))
    engine.create(ContainerSpec("another", "debian:12", ("x",), {PROJECT_LABEL: "another:1"}))
    engine.create_volume("mine", {})
    engine.create_volume("another", {PROJECT_LABEL: "another:1"})
    return {"debian:12", "mine:1", "mine:2", f"{IMAGE}-mine", "other:1"}


def test_clean_removes_only_objects_of_the_project(made: Site) -> None:
    made.env["TAGS"] = "stable"
    made.push()
    foreign_tags = create_foreign_objects(made)
    run.run(made.project(), ["make"], stage=None, keep=True)
    removed = clean(made.project())
    assert made.engine.tags.keys() == foreign_tags
    names = {container.spec.name for container in made.engine.all_containers.values()}
    assert names == {"mine", "of-a-stage", "another"}
    assert made.engine.all_volumes.keys() == {"mine", "another"}
    tags = {IMAGE, "registry.test/team/app:stable", f"{IMAGE}-{PREVIOUS}"}
    assert {*tags, *(f"{IMAGE}-{stage}" for stage in STAGES)} <= set(removed)
    volumes, containers = 3, 1
    assert len(removed) == len(tags) + len(STAGES) + volumes + containers


def test_clean_keeps_an_image_of_another_tool(made: Site) -> None:
    install = made.image("install")
    derived = made.engine.make_image(install.config, {"/mine": b""}, parent=install, tag=IMAGE)
    clean(made.project())
    assert made.engine.tags == {IMAGE: derived.id}


def test_clean_keeps_another_image_with_the_tag_of_a_stage(made: Site) -> None:
    install = made.image("install")
    made.engine.make_image(install.config, {"/mine": b""}, parent=install, tag=f"{IMAGE}-install")
    clean(made.project())
    assert f"{IMAGE}-install" in made.engine.tags


def test_clean_can_remove_only_work_containers(made: Site) -> None:
    run.run(made.project(), ["make"], stage=None, keep=True)
    tags, volumes = dict(made.engine.tags), dict(made.engine.all_volumes)
    (removed,) = clean(made.project(), work_only=True)
    assert "-kept-run-" in removed
    assert (made.engine.tags, made.engine.all_volumes) == (tags, volumes)
    assert made.engine.all_containers == {}


def test_clean_without_images_removes_nothing(site: Site) -> None:
    assert clean(site.project()) == []
    assert site.engine.changing_calls() == []


def test_clean_keeps_another_project_of_the_engine(made: Site, tmp_path: Path) -> None:
    other = Site(tmp_path / "other", made.engine, IMAGE="registry.test/team/app:2")
    other.make(*STAGES)
    volumes = set(made.engine.all_volumes)
    clean(made.project())
    assert [other.why(stage) for stage in STAGES] == [None] * 3
    assert other.engine.tags["registry.test/team/app:2"] == other.image("install").id
    assert len(volumes - made.engine.all_volumes.keys()) == len(volumes) / 2


def test_stages_are_recreated_after_clean(made: Site) -> None:
    clean(made.project())
    assert not [tag for tag in made.engine.tags if tag != BASE_IMAGE]
    assert made.ran(lambda: made.make("install")) == ["label", "pull", "install"]
    assert [made.why(stage) for stage in STAGES] == [None] * 3


def test_clean_removes_all_images(made: Site) -> None:
    """This includes images without a tag."""
    made.make("install", packages=("tar",))
    made.make("base", force=True)
    made.make("install", upstream=True)
    clean(made.project())
    remaining = [
        image
        for image in made.engine.all_images.values()
        if any(name.startswith("org.guix-tasks") for name in image.labels)
    ]
    assert remaining == []


def test_clean_removes_only_tags_of_its_platform(made: Site, tmp_path: Path) -> None:
    other = Site(tmp_path / "other", made.engine, PLATFORMS="linux/arm64", GUIX_SANDBOX="nochroot")
    other.lock.write_text(made.lock.read_text())
    other.make("base")
    clean(other.project())
    assert f"{IMAGE}-base" in made.engine.tags
    assert f"{IMAGE}-base-linux-arm64" not in made.engine.tags


def make_two_platforms(site: Site) -> None:
    """Make the stages for the platform of the engine and for another platform."""
    site.env.update(GUIX_SANDBOX="nochroot", TAGS="stable", PLATFORMS="linux/amd64")
    for platform in ("linux/amd64", "linux/arm64"):
        site.env["PLATFORMS"] = platform
        site.make(*STAGES)
        site.push()
    site.env["PLATFORMS"] = "linux/amd64 linux/arm64"


def test_clean_removes_objects_of_each_platform(site: Site) -> None:
    make_two_platforms(site)
    run.run(site.project().each_platform()[0], ["make"], stage=None, keep=True)
    assert f"{IMAGE}-linux-arm64" in site.engine.tags
    assert f"{IMAGE}-linux-amd64" in site.engine.tags
    foreign_tags = create_foreign_objects(site)
    removed = clean(site.project())
    assert site.engine.tags.keys() == foreign_tags
    assert len(removed) == len(set(removed))
    for tag in (IMAGE, f"{IMAGE}-base", f"{IMAGE}-linux-arm64", f"{IMAGE}-install-linux-arm64"):
        assert tag in removed
    assert site.engine.all_volumes.keys() == {"mine", "another"}


def test_clean_removes_tags_of_earlier_platforms(
    site: Site,
) -> None:
    site.env["PLATFORMS"] = "linux/amd64"
    site.make(*STAGES)
    site.push()
    del site.env["PLATFORMS"]
    assert f"{IMAGE}-linux-amd64" in clean(site.project())
    assert f"{IMAGE}-linux-amd64" not in site.engine.tags


def test_dry_clean_shows_each_removal_once(site: Site) -> None:
    make_two_platforms(site)
    console = Heard()
    project = site.project()
    traced = TracedEngine(site.engine, console, perform=False)
    removed = clean(replace(project, engine=traced))
    commands = [line for line in console.text.splitlines() if line.startswith("+ ")]
    assert len(commands) == len(set(commands)) == len(removed)


def test_clean_of_one_platform_keeps_the_others(site: Site) -> None:
    make_two_platforms(site)
    site.env["PLATFORMS"] = "linux/arm64"
    clean(site.project())
    tags = set(site.engine.tags)
    assert {f"{IMAGE}-{stage}" for stage in STAGES} | {IMAGE} <= tags
    assert not [tag for tag in tags if tag.endswith("arm64")]


def test_status_has_rows_for_each_platform(site: Site) -> None:
    make_two_platforms(site)
    platforms = site.project().each_platform()
    rows = [row for platform in platforms for row in read_status(platform)]
    assert [row["state"] for row in rows] == [*["up to date"] * 3, "stage install"] * 2
    assert [row["image"] for row in rows if row["stage"] == "IMAGE"] == [
        IMAGE, f"{IMAGE}-linux-arm64",
    ]  # fmt: skip


def test_status_is_printed_as_json(made: Site) -> None:
    made.write("channels.scm", '(list (channel (name \'mine) (url "https://m.test")))')
    project = made.project()
    show_status(project, as_json=True)
    status = json.loads(heard(project))
    assert status["engine"] == {
        "product": "Docker",
        "version": "28",
        "platform": "linux/amd64",
        "url": "unix:///fake.sock",
        "origin": "fake",
        "rootless": False,
        "storage_driver": "memory",
    }
    stages = {item["stage"]: item for item in status["stages"]}
    assert list(stages) == [*STAGES, "IMAGE"]
    pull, image = stages["pull"], made.image("pull")
    assert pull == {
        "stage": "pull",
        "platform": "linux/amd64",
        "image": f"{IMAGE}-pull",
        "id": image.id,
        "state": "stale",
        "why": "GUIX_CHANNELS changed (it lacks the channel mine)",
        "size": image.size,
        "created": image.created,
        "channels": {"guix": COMMITS["guix"]},
    }
    assert (stages["base"]["state"], stages["base"]["why"]) == ("up to date", None)
    assert stages["IMAGE"]["state"] == "stage install"


def test_json_status_of_a_missing_stage_has_no_values(made: Site) -> None:
    made.engine.untag(f"{IMAGE}-install")
    project = made.project()
    show_status(project, as_json=True)
    missing = json.loads(heard(project))["stages"][STAGES.index("install")]
    assert missing["state"] == "missing"
    assert [missing[name] for name in ("id", "why", "size", "created")] == [None] * 4
    assert missing["channels"] == {}


def test_sizes_are_printed_as_json(made: Site) -> None:
    project = made.project()
    show_status(project, size=True, plot=str(made.directory / "sizes.svg"), as_json=True)
    parts = json.loads(heard(project)[heard(project).index("{\n") :])["parts"]
    assert {"group", "name", "size"} == set(parts[0])
    assert {part["group"] for part in parts} >= {"stage", "layer"}
    assert (made.directory / "sizes.svg").read_text().startswith("<svg")


def test_unfinished_commit_of_podman_is_removed(made: Site) -> None:
    unfinished = {PROJECT_LABEL: IMAGE, UNFINISHED_LABEL: "yes"}
    other_project = {**unfinished, PROJECT_LABEL: "other/x:t"}
    finished = {PROJECT_LABEL: IMAGE}
    removed, *kept_images = (
        made.engine.make_image({"Labels": labels}, {"/x": b""})
        for labels in (unfinished, other_project, finished)
    )
    made.project().ledger.drop_unnamed()
    assert made.engine.image(removed.id) is None
    assert all(made.engine.image(image.id) for image in kept_images)
    assert CONTAINER_LABEL == PROJECT_LABEL
