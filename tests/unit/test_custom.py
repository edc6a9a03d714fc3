"""Stages of a project's own: what can be one, and that they are stages as the built-in ones are."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import IMAGE, FakeEngine, Site, heard, made_site, new_site, outline
from invoke.exceptions import Exit

from guix_tasks.cli import custom
from guix_tasks.commands.clean import clean
from guix_tasks.commands.push import push, require_image
from guix_tasks.commands.sizes import sizes
from guix_tasks.commands.squash import squash
from guix_tasks.commands.status import STATUS_HEADER, status_rows, tag_statuses
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.errors import StageError, UsageError
from guix_tasks.stages.container import WORK_DIRECTORY
from guix_tasks.stages.custom import custom_stage, input_files
from guix_tasks.stages.declarations import CustomStage, declared
from guix_tasks.stages.images import (
    PACKAGES_LABEL,
    PREVIOUS,
    STAGES,
    key_of,
    proven_stage,
    squash_key,
)
from guix_tasks.stages.stage import stage_files
from guix_tasks.tasks import ns
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from invoke.collection import Collection

    from guix_tasks.engine.api import Engine
    from guix_tasks.stages.project import Project

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("serial_hashing")

DEPS = CustomStage("deps", ("guix", "package", "--install=tar"), "install", ("deps.scm", "patches"))
CHECKED = CustomStage("checked", ("guix", "package", "--install=check"), "deps")


class OwnSite(Site):
    """A project whose ``tasks.py`` adds two stages."""

    stages: tuple[CustomStage, ...] = (DEPS, CHECKED)

    def __init__(self, directory: Path, engine: FakeEngine, **env: str) -> None:
        super().__init__(directory, engine, **env)
        self.write("deps.scm", "deps\n")
        self.write("patches/one/fix.patch", "fix\n")

    def project(self, engine: Engine | None = None) -> Project:
        return replace(super().project(engine), custom_stages=self.stages)


@pytest.fixture
def site(tmp_path: Path) -> OwnSite:
    plain = new_site(tmp_path)
    return OwnSite(tmp_path, plain.engine)


@pytest.fixture
def made(tmp_path: Path) -> OwnSite:
    site = OwnSite(tmp_path, made_site(tmp_path).engine)
    site.make("deps", "checked")
    return site


def packages(site: Site, stage: str) -> set[str]:
    return set(site.image(stage).labels[PACKAGES_LABEL].split())


def states(site: Site) -> dict[str, str]:
    rows = status_rows(tag_statuses(site.project()))
    table = [dict(zip(STATUS_HEADER, row, strict=True)) for row in rows]
    return {row["stage"]: row["state"] for row in table}


# --- What can be one ------------------------------------------------------------------------


def declare(**what: Any) -> CustomStage:
    given = {"name": "deps", "command": "make", "parent": "install", "inputs": (), **what}
    return declared(**given, parents=STAGES, taken=("push", "install"))


def test_command_string_is_run_by_the_shell_and_a_list_is_not() -> None:
    assert declare(command="a | b\nc").command == ("sh", "-euc", "a | b\nc")
    assert declare(command=["a", "b c"]).command == ("a", "b c")


def test_one_input_need_not_be_a_list() -> None:
    assert declare(inputs="./deps.scm").inputs == ("deps.scm",)
    assert declare(inputs=["a/b/", "c"]).inputs == ("a/b", "c")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"name": "My-Deps"}, "'My-Deps' cannot name a stage"),
        ({"name": ""}, "cannot name a stage"),
        ({"name": "a" * 33}, "cannot name a stage"),
        ({"name": PREVIOUS}, "cannot name a stage"),
        ({"name": "push"}, "push is already a task"),
        ({"name": "install"}, "install is already a task"),
        ({"parent": "later"}, "no earlier stage is named 'later'; choose one of base, pull"),
        ({"command": ""}, "the command must be a string for the shell or a list of strings"),
        ({"command": "\n "}, "the command must be"),
        ({"command": []}, "the command must be"),
        ({"command": [["make"]]}, "the command must be"),
        ({"inputs": "/etc/passwd"}, "is not below the directory of tasks.py"),
        ({"inputs": "../x"}, "is not below"),
        ({"inputs": "a/../../x"}, "is not below"),
        ({"inputs": "."}, "is not below"),
    ],
)
def test_invalid_stage_is_refused(what: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        declare(**what)


# --- What is run ----------------------------------------------------------------------------


def test_command_starts_in_the_directory_of_its_inputs(site: OwnSite) -> None:
    stage = custom_stage(site.settings(), DEPS)
    files = stage_files(stage)
    assert files["project/deps.scm"] == b"deps\n"
    assert files["project/patches/one/fix.patch"] == b"fix\n"
    lines = files["stage"].decode().splitlines()
    start = lines.index(f"cd {WORK_DIRECTORY}/project")
    assert lines[start + 1] == "guix package --install=tar"


def test_command_without_inputs_starts_in_the_directory_of_the_image(site: OwnSite) -> None:
    assert b"\ncd " not in stage_files(custom_stage(site.settings(), CHECKED))["stage"]


@pytest.mark.parametrize("missing", ["deps.scm", "patches"])
def test_missing_input_is_reported(site: OwnSite, missing: str) -> None:
    (site.directory / missing).rename(site.directory / "elsewhere")
    with pytest.raises(
        UsageError, match=rf"stage deps: cannot read the input .*{missing}: No such file"
    ):
        site.make("deps")


def test_empty_input_directory_is_reported(site: OwnSite) -> None:
    (site.directory / "patches/one/fix.patch").unlink()
    with pytest.raises(UsageError, match=r"patches is an empty directory"):
        site.make("deps")


def test_input_directory_that_cannot_be_read_is_reported(
    site: OwnSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.write("guix/deep/file", "x")
    list_directory = os.scandir

    def scan(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return list_directory(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(UsageError, match=r"cannot read the input .*deep: Permission denied"):
        input_files(site.settings(), "stage deps", ["guix"])


def test_link_to_a_directory_is_reported(site: OwnSite) -> None:
    (site.directory / "patches/more").symlink_to(site.directory)
    with pytest.raises(UsageError, match=r"patches/more: Is a directory"):
        site.make("deps")


def test_a_link_to_a_file_is_the_file(site: OwnSite) -> None:
    (site.directory / "patches/same").symlink_to("one/fix.patch")
    assert stage_files(custom_stage(site.settings(), DEPS))["project/patches/same"] == b"fix\n"


# --- A stage as the others ------------------------------------------------------------------


def test_missing_parents_are_made(site: OwnSite) -> None:
    said = site.make("checked")
    for child, parent in (("checked", "deps"), ("deps", "install"), ("install", "pull")):
        assert f"{child}: {IMAGE}-{parent} is missing, so {parent} comes first" in said
    assert [proven_stage(site.image(name)) for name in (*STAGES, "deps", "checked")] == [
        *STAGES,
        "deps",
        "checked",
    ]
    assert packages(site, "checked") >= {"hello@1.0", "tar@1.0", "check@1.0"}


def test_image_follows_the_one_that_was_added_last(site: OwnSite) -> None:
    for name in (*STAGES, "deps", "checked"):
        site.make(name)
        assert site.image().id == site.image(name).id
    site.make("install", force=True)
    assert site.image().id == site.image("checked").id


def test_first_run_reports_only_packages_that_the_parent_lacks(site: OwnSite) -> None:
    site.make(*STAGES)
    lines = site.make("deps").splitlines()
    assert [line for line in lines if "added" in line] == ["deps: added tar@1.0"]


def test_custom_stage_that_is_up_to_date_is_not_run(made: OwnSite) -> None:
    assert made.ran(lambda: made.make("deps", "checked")) == []
    assert made.make("checked") == "checked: up to date\n"
    assert made.ran(lambda: made.make("deps", force=True)) == ["deps"]
    assert made.why("checked") == "deps is newer"


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("deps.scm", "deps.scm changed"),
        ("patches/one/fix.patch", "patches/one/fix.patch changed"),
        ("patches/two.patch", "patches/two.patch changed"),
    ],
)
def test_changed_input_makes_a_custom_stage_stale(made: OwnSite, file: str, why: str) -> None:
    made.write(file, "other\n")
    assert states(made) == {
        **dict.fromkeys(STAGES, "up to date"),
        "deps": f"stale: {why}",
        "checked": f"stale: deps: {why}",
        "IMAGE": "stage checked",
    }
    assert made.ran(lambda: made.make("checked", upstream=True)) == ["deps", "checked"]
    assert made.why("checked") is None


def test_other_command_makes_a_custom_stage_stale(made: OwnSite) -> None:
    made.stages = (replace(DEPS, command=("guix", "package", "--install=sed")), CHECKED)
    assert made.why("deps") == "command changed"


def test_stale_parent_is_refused(made: OwnSite) -> None:
    made.env["GUIX_PACKAGES"] = "sed"
    with pytest.raises(UsageError, match=r"run `inv install`, or `inv deps --upstream`"):
        made.make("deps")
    assert made.ran(lambda: made.make("deps", upstream=True)) == ["install", "deps"]
    assert "sed@1.0" in packages(made, "deps")
    assert "hello@1.0" not in packages(made, "deps")


def test_what_install_was_given_is_not_forgotten(made: OwnSite) -> None:
    made.make("install", packages=("sed",))
    assert made.why("deps") == "install is newer"
    assert made.ran(lambda: made.make("deps")) == ["deps"]
    assert "sed@1.0" in packages(made, "deps")


def test_a_command_that_fails_commits_nothing(made: OwnSite) -> None:
    before = outline(made.engine)
    made.stages = (replace(DEPS, command=("guix", "package", "--install=no-such-package")), CHECKED)
    with pytest.raises(StageError, match=r"deps: no-such-package: unknown .*out/failed/deps-"):
        made.make("deps")
    assert outline(made.engine) == before
    assert made.engine.all_containers == {}


def test_push_refuses_a_stale_one(made: OwnSite) -> None:
    assert [*push(made.project())] == [IMAGE]
    assert [*push(made.project(), "deps")] == [f"{IMAGE}-deps"]
    made.write("deps.scm", "other\n")
    with pytest.raises(UsageError, match=r"checked is stale .* run `inv checked --upstream`"):
        push(made.project())


def test_image_of_a_removed_stage_is_pushed_with_a_warning(made: OwnSite) -> None:
    made.stages = (DEPS,)
    project = made.project()
    assert [*push(project)] == [IMAGE]
    assert "not built by a stage of this project" in heard(project)
    # What is made next takes its place.
    made.make("deps")
    assert made.image().id == made.image("deps").id


def test_unknown_stage_is_reported_with_the_known_ones(made: OwnSite) -> None:
    with pytest.raises(
        UsageError, match=r"its stages are base, pull, install, deps, checked and squ"
    ):
        require_image(made.project(), "nothing")


def test_squash_includes_custom_stages(made: OwnSite) -> None:
    squash(made.project())
    assert key_of(made.image()) == squash_key(made.image("checked"))
    assert len(made.image().layers) == len(made.image("base").layers) + 1
    made.write("deps.scm", "other\n")
    with pytest.raises(UsageError, match="checked is stale"):
        push(made.project())


def test_clean_removes_custom_stages(made: OwnSite) -> None:
    removed = clean(made.project())
    assert {f"{IMAGE}-deps", f"{IMAGE}-checked", IMAGE} <= set(removed)
    assert not [tag for tag in made.engine.tags if tag.startswith(IMAGE)]


def test_sizes_are_those_above_the_parent(made: OwnSite) -> None:
    made.stages = (DEPS, CHECKED, replace(CHECKED, name="beside", parent="install"))
    made.make("beside")
    found = {part.name: part.size for part in sizes(made.project()) if part.group == "stage"}
    assert [*found] == [*STAGES, "deps", "checked", "beside"]
    install, beside = (made.engine._image(f"{IMAGE}-{each}") for each in ("install", "beside"))
    assert install
    assert beside
    assert found["beside"] == beside.size - install.size


def test_fresh_machine_takes_custom_stages_from_the_cache(tmp_path: Path) -> None:
    first = new_site(tmp_path / "one")
    one = OwnSite(tmp_path / "one", first.engine, CACHE_IMAGE="registry.test/cache")
    one.make("checked")
    two = OwnSite(tmp_path / "two", FakeEngine(one.engine.registry), **one.env)
    two.write("channels.lock.scm", one.lock.read_text())
    said: list[str] = []
    assert two.ran(lambda: said.append(two.make("checked"))) == []
    assert "checked: taken from registry.test/cache:checked-" in said[0]


def test_a_dry_run_changes_nothing(made: OwnSite) -> None:
    made.write("deps.scm", "other\n")
    before = outline(made.engine)
    dry = TracedEngine(made.engine, Console(), perform=False)
    made.make("deps", engine=dry)
    assert outline(made.engine) == before


# --- tasks.py -------------------------------------------------------------------------------

TASKS = """
from guix_tasks.tasks import add_stage, ns

add_stage("deps", "make", inputs="deps.scm", summary="Build what we need.")
add_stage("checked", ["make", "check"], parent="deps")
"""


def inv(directory: Path, tasks: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "tasks.py").write_text(tasks)
    argv = [sys.executable, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(argv, cwd=directory, env=env, capture_output=True, text=True, check=False)


def test_task_of_a_custom_stage_is_listed_without_imports(tmp_path: Path) -> None:
    found = inv(tmp_path, TASKS, "-X", "importtime", "-m", "invoke", "--list")
    assert found.returncode == 0, found.stderr
    lines = " ".join(found.stdout.split())
    assert "deps Build what we need." in lines
    assert "checked Run the custom stage checked on deps." in lines
    imported = set(re.findall(r"\|\s*(\w+)[\w.]*$", found.stderr, re.MULTILINE))
    assert "guix_tasks" in imported
    assert imported.isdisjoint({"docker", "requests", "urllib3", "dotenv"})


@pytest.mark.parametrize("way", ["package", "subdirectory", "root", "collection"])
def test_the_settings_are_those_next_to_what_invoke_has_loaded(tmp_path: Path, way: str) -> None:
    project, sub = tmp_path / "project", tmp_path / "project" / "sub"
    (project / "tasks").mkdir(parents=True)
    sub.mkdir()
    names = {"collection": "ci.py"}
    (project / names.get(way, "tasks/__init__.py")).write_text("from guix_tasks.tasks import ns\n")
    (project / ".env").write_text("GUIX_CORES=many\n")
    options = {"root": ["-r", str(project)], "collection": ["-c", "ci"]}
    found = subprocess.run(
        [sys.executable, "-m", "invoke", *options.get(way, []), "status"],
        cwd={"package": project, "root": tmp_path}.get(way, sub),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert "GUIX_CORES" in found.stderr


@pytest.fixture
def collection(monkeypatch: pytest.MonkeyPatch) -> Collection:
    """The tasks of a project, to which its ``tasks.py`` adds."""
    project: Collection = copy.deepcopy(ns)
    monkeypatch.setattr(custom, "ns", project)
    monkeypatch.setattr(custom, "custom_stages", [])
    return project


def test_task_of_a_custom_stage_has_the_options_of_install(collection: Collection) -> None:
    exec(TASKS, {})  # noqa: S102 -- as Invoke does
    options = {argument.name for argument in collection["deps"].get_arguments()}
    assert options == {argument.name for argument in ns["install"].get_arguments()} - {"package"}


@pytest.mark.usefixtures("collection")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('add_stage("deps", "x")', "deps is already a task"),
        ('add_stage("push", "x")', "push is already a task"),
        ('add_stage("engine", "x")', "engine is already a task"),
        ('add_stage("late", "x", parent="later")', "one of base, pull, install, deps, checked"),
    ],
)
def test_mistake_in_tasks_py_is_one_line(line: str, said: str) -> None:
    with pytest.raises(Exit) as caught:
        exec(f"{TASKS}{line}", {})  # noqa: S102
    assert caught.value.code == 2
    message = str(caught.value.message)
    assert message.startswith("error: tasks.py: ")
    assert said in message
    assert len(message.splitlines()) == 1
