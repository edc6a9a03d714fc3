"""The tasks ``status`` and ``clean``."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fake_engine import BASE_IMAGE, COMMITS, IMAGE, BufferConsole, Site, console_text

from guix_tasks.commands import commit, run
from guix_tasks.commands.clean import clean
from guix_tasks.commands.rollback import rollback
from guix_tasks.commands.status import STATUS_HEADER, show_status, status_rows, tag_statuses
from guix_tasks.engine.api import UNFINISHED_LABEL, ContainerSpec
from guix_tasks.engine.dry_run import TracedEngine
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


def test_status_of_current_stages_is_up_to_date(built_site: Site) -> None:
    up_to_date = dict.fromkeys(STAGES, "up to date")
    assert read_states(built_site) == {**up_to_date, "IMAGE": "stage install"}


def test_status_has_the_reason(built_site: Site) -> None:
    built_site.write("Dockerfile", "FROM y\n")
    stages = read_states(built_site)
    assert stages["base"] == "stale: Dockerfile changed"
    assert stages["pull"].startswith("stale: base")
    assert stages["install"].startswith("stale: ")
    built_site.make("base")
    assert read_states(built_site)["pull"] == "stale: base is newer"


def test_status_begins_with_the_next_run(built_site: Site) -> None:
    def first_line() -> str:
        console = BufferConsole()
        show_status(replace(built_site.project(), console=console))
        return console.messages.getvalue().splitlines()[0]

    assert first_line() == "all stages are up to date: `inv push` would run none of them"
    built_site.write("Dockerfile", "FROM y\n")
    assert first_line() == (
        "`inv base pull install push` would run base (Dockerfile changed), pull, install"
    )
    built_site.make("base")
    built_site.env["GUIX_PACKAGES"] = "tar"
    assert first_line() == "`inv pull install push` would run pull (base is newer), install"


def test_status_names_files_relative_to_the_project(built_site: Site) -> None:
    built_site.write("scm/manifest.scm", '(specifications->manifest \'("tar"))')
    built_site.env["GUIX_MANIFEST"] = "scm/manifest.scm"
    assert read_states(built_site)["install"] == "stale: scm/manifest.scm changed"
    built_site.make("install")
    built_site.write("scm/manifest.scm", '(specifications->manifest \'("sed"))')
    assert read_states(built_site)["install"] == "stale: scm/manifest.scm changed"
    del built_site.env["GUIX_MANIFEST"]
    assert read_states(built_site)["install"] == "stale: GUIX_MANIFEST changed"
    built_site.write("sub/Other", "FROM y\n")
    built_site.env["DOCKERFILE"] = "sub/Other"
    assert read_states(built_site)["base"] == "stale: sub/Other changed"


def test_status_names_the_lock_relative_to_the_project(built_site: Site) -> None:
    lock = built_site.settings().guix_channels_lock
    assert lock
    lock.write_text(lock.read_text() + "\n;; by hand\n")
    assert (
        read_states(built_site)["pull"]
        == f"stale: {lock.relative_to(built_site.directory)} changed"
    )


def test_status_reports_a_lock_that_does_not_fit(built_site: Site) -> None:
    built_site.write("channels.scm", '(list (channel (name \'mine) (url "https://m.test")))')
    stages = read_states(built_site)
    assert stages["base"] == "up to date"
    assert stages["pull"] == "stale: GUIX_CHANNELS changed (it lacks the channel mine)"
    assert stages["install"].startswith("stale: pull")


def test_status_has_sizes_ages_and_channels(built_site: Site) -> None:
    rows = read_status(built_site.project())
    pull = rows[STAGES.index("pull")]
    assert pull["image"] == f"{IMAGE}-pull"
    assert pull["id"] == built_site.image("pull").id.removeprefix("sha256:")[:12]
    assert pull["size"] == "3 kB"
    assert pull["age"].endswith("min")
    assert pull["channels"] == f"guix@{COMMITS['guix'][:7]}"
    assert rows[0]["channels"] == "-"


def test_status_describes_the_image(built_site: Site) -> None:
    def image_state() -> str:
        return read_states(built_site)["IMAGE"]

    install_image = built_site.image("install")
    built_site.engine.tag(install_image.id, "other:1")
    run.run(built_site.project(), ["make"], stage=None, keep=True)
    commit.commit(built_site.project())
    assert image_state() == "made by hand"
    built_site.make("install", packages=("tar",))
    built_site.engine.tag(install_image.id, IMAGE)
    assert image_state() == "an earlier install"
    built_site.engine.make_image(
        install_image.config, {"/mine": b""}, parent=install_image, tag=IMAGE
    )
    assert image_state() == "not made here"
    built_site.engine.untag(IMAGE)
    assert image_state() == "missing"


def test_status_and_the_next_stage_report_a_rollback(built_site: Site) -> None:
    built_site.make("install", packages=("tar",))
    project = built_site.project()
    show_status(project)
    assert "install was run with --package: tar, not with" in console_text(project)
    rollback(project)
    show_status(project)
    assert f"{IMAGE} is the image before the newest" in console_text(project)
    assert f"{IMAGE}: is the newest image again" in built_site.make("install", packages=("tar",))
    project = built_site.project()
    show_status(project)
    assert "before the newest" not in console_text(project)


def test_sizes_are_shown_and_drawn(built_site: Site) -> None:
    project = built_site.project()
    show_status(project, plot=str(built_site.directory / "sizes.svg"))
    assert "stage" in console_text(project)
    assert (built_site.directory / "sizes.svg").read_text().startswith("<svg")
    with pytest.raises(UsageError, match=r"--plot: .*: No such file or directory"):
        show_status(built_site.project(), plot=str(built_site.directory / "no" / "sizes.svg"))


def test_malformed_size_report_of_an_image_is_ignored(built_site: Site) -> None:
    item = b"0" * 32 + b"-x"
    size_report = b"\n1\nx\t/gnu/store/a\n7\t/gnu/store/" + item + b"\n1\t2\t3\n-1\t/gnu/store/b\n"
    built_site.engine.behaviour = lambda _container: iter([(False, size_report)])
    project = built_site.project()
    show_status(project, size=True)
    assert re.findall("store item +(.*)", console_text(project)) == ["x        7.17 kB"]


def test_image_with_a_zero_date_has_a_state(built_site: Site) -> None:
    image = built_site.engine.make_image({}, {"/x": b""}, tag=IMAGE)
    built_site.engine.all_images[image.id] = replace(image, created="0001-01-01T00:00:00Z")
    assert read_states(built_site)["IMAGE"] == "not made here"


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
def test_image_with_an_invalid_date_has_no_age(built_site: Site, created: str) -> None:
    image = built_site.image("install")
    built_site.engine.all_images[image.id] = replace(image, created=created)
    assert status_rows(tag_statuses(built_site.project()))[-1][4] == "-"


class Terminal(BufferConsole):
    """A terminal whose width is ``COLUMNS``."""

    def __init__(self) -> None:
        super().__init__()
        self.results.isatty = lambda: True  # type: ignore[method-assign]


def status_lines(site: Site, console: BufferConsole) -> list[str]:
    project = replace(site.project(), console=console)
    show_status(project)
    return console.results.getvalue().splitlines()


@pytest.mark.parametrize("columns", [45, 60, 80])
def test_status_fits_a_narrow_terminal(
    built_site: Site, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    wide = status_lines(built_site, BufferConsole())
    assert max(map(len, wide)) > 100
    assert f"  {IMAGE}-pull  " in wide[2]
    narrow = status_lines(built_site, Terminal())
    assert max(map(len, narrow)) <= columns
    tag = IMAGE.rpartition(":")[2]
    assert re.match(rf"pull +{tag}-pull +", narrow[2])
    assert "up to date" in narrow[2]
    assert (f"guix@{COMMITS['guix'][:7]}" in narrow[2]) is (columns > 45)


def test_status_is_complete_on_a_wide_terminal(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert status_lines(built_site, Terminal()) == status_lines(built_site, BufferConsole())


@pytest.mark.parametrize("as_json", [False, True])
def test_status_reports_an_uncommitted_container(built_site: Site, as_json: bool) -> None:
    def messages() -> str:
        console = BufferConsole()
        project = replace(built_site.project(), console=console)
        show_status(project, as_json=as_json)
        return console.messages.getvalue()

    assert "is not committed" not in messages()
    run.run(built_site.project(), ["make"], stage=None, keep=True)
    assert re.search(
        r"work container \S+-kept-run-\S+ is not committed yet; `inv commit`", messages()
    )
    commit.commit(built_site.project())
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


def test_clean_removes_only_objects_of_the_project(built_site: Site) -> None:
    built_site.env["TAGS"] = "stable"
    built_site.push()
    foreign_tags = create_foreign_objects(built_site)
    run.run(built_site.project(), ["make"], stage=None, keep=True)
    removed = clean(built_site.project())
    assert built_site.engine.tags.keys() == foreign_tags
    names = {container.spec.name for container in built_site.engine.all_containers.values()}
    assert names == {"mine", "of-a-stage", "another"}
    assert built_site.engine.all_volumes.keys() == {"mine", "another"}
    tags = {IMAGE, "registry.test/team/app:stable", f"{IMAGE}-{PREVIOUS}"}
    assert {*tags, *(f"{IMAGE}-{stage}" for stage in STAGES)} <= set(removed)
    volumes, containers = 3, 1
    assert len(removed) == len(tags) + len(STAGES) + volumes + containers


def test_clean_keeps_an_image_of_another_tool(built_site: Site) -> None:
    install = built_site.image("install")
    derived = built_site.engine.make_image(
        install.config, {"/mine": b""}, parent=install, tag=IMAGE
    )
    clean(built_site.project())
    assert built_site.engine.tags == {IMAGE: derived.id}


def test_clean_keeps_another_image_with_the_tag_of_a_stage(built_site: Site) -> None:
    install = built_site.image("install")
    built_site.engine.make_image(
        install.config, {"/mine": b""}, parent=install, tag=f"{IMAGE}-install"
    )
    clean(built_site.project())
    assert f"{IMAGE}-install" in built_site.engine.tags


def test_clean_can_remove_only_work_containers(built_site: Site) -> None:
    run.run(built_site.project(), ["make"], stage=None, keep=True)
    tags, volumes = dict(built_site.engine.tags), dict(built_site.engine.all_volumes)
    (removed,) = clean(built_site.project(), work_only=True)
    assert "-kept-run-" in removed
    assert (built_site.engine.tags, built_site.engine.all_volumes) == (tags, volumes)
    assert built_site.engine.all_containers == {}


def test_clean_without_images_removes_nothing(site: Site) -> None:
    assert clean(site.project()) == []
    assert site.engine.changing_calls() == []


def test_clean_keeps_another_project_of_the_engine(built_site: Site, tmp_path: Path) -> None:
    other = Site(tmp_path / "other", built_site.engine, IMAGE="registry.test/team/app:2")
    other.make(*STAGES)
    volumes = set(built_site.engine.all_volumes)
    clean(built_site.project())
    assert [other.why(stage) for stage in STAGES] == [None] * 3
    assert other.engine.tags["registry.test/team/app:2"] == other.image("install").id
    assert len(volumes - built_site.engine.all_volumes.keys()) == len(volumes) / 2


def test_stages_are_recreated_after_clean(built_site: Site) -> None:
    clean(built_site.project())
    assert not [tag for tag in built_site.engine.tags if tag != BASE_IMAGE]
    assert built_site.trace_stages(lambda: built_site.make("install")) == [
        "label",
        "pull",
        "install",
    ]
    assert [built_site.why(stage) for stage in STAGES] == [None] * 3


def test_clean_removes_all_images(built_site: Site) -> None:
    """This includes images without a tag."""
    built_site.make("install", packages=("tar",))
    built_site.make("base", force=True)
    built_site.make("install", upstream=True)
    clean(built_site.project())
    remaining = [
        image
        for image in built_site.engine.all_images.values()
        if any(name.startswith("org.guix-tasks") for name in image.labels)
    ]
    assert remaining == []


def test_clean_removes_only_tags_of_its_platform(built_site: Site, tmp_path: Path) -> None:
    other = Site(
        tmp_path / "other", built_site.engine, PLATFORMS="linux/arm64", GUIX_SANDBOX="nochroot"
    )
    other.lock.write_text(built_site.lock.read_text())
    other.make("base")
    clean(other.project())
    assert f"{IMAGE}-base" in built_site.engine.tags
    assert f"{IMAGE}-base-linux-arm64" not in built_site.engine.tags


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
    console = BufferConsole()
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


def test_status_is_printed_as_json(built_site: Site) -> None:
    built_site.write("channels.scm", '(list (channel (name \'mine) (url "https://m.test")))')
    project = built_site.project()
    show_status(project, as_json=True)
    status = json.loads(console_text(project))
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
    pull, image = stages["pull"], built_site.image("pull")
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


def test_json_status_of_a_missing_stage_has_no_values(built_site: Site) -> None:
    built_site.engine.untag(f"{IMAGE}-install")
    project = built_site.project()
    show_status(project, as_json=True)
    missing = json.loads(console_text(project))["stages"][STAGES.index("install")]
    assert missing["state"] == "missing"
    assert [missing[name] for name in ("id", "why", "size", "created")] == [None] * 4
    assert missing["channels"] == {}


def test_sizes_are_printed_as_json(built_site: Site) -> None:
    project = built_site.project()
    show_status(project, size=True, plot=str(built_site.directory / "sizes.svg"), as_json=True)
    parts = json.loads(console_text(project)[console_text(project).index("{\n") :])["parts"]
    assert {"group", "name", "size"} == set(parts[0])
    assert {part["group"] for part in parts} >= {"stage", "layer"}
    assert (built_site.directory / "sizes.svg").read_text().startswith("<svg")


def test_unfinished_commit_of_podman_is_removed(built_site: Site) -> None:
    unfinished = {PROJECT_LABEL: IMAGE, UNFINISHED_LABEL: "yes"}
    other_project = {**unfinished, PROJECT_LABEL: "other/x:t"}
    finished = {PROJECT_LABEL: IMAGE}
    removed, *kept_images = (
        built_site.engine.make_image({"Labels": labels}, {"/x": b""})
        for labels in (unfinished, other_project, finished)
    )
    built_site.project().ledger.drop_unnamed()
    assert built_site.engine.image(removed.id) is None
    assert all(built_site.engine.image(image.id) for image in kept_images)
    assert CONTAINER_LABEL == PROJECT_LABEL
