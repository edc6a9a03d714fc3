"""Custom stages: their declarations, and their use like built-in stages."""

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
from fake_engine import IMAGE, FakeEngine, Site, console_text, new_built_site, new_site, outline
from invoke.exceptions import Exit

from guix_tasks.cli import custom
from guix_tasks.commands.clean import clean
from guix_tasks.commands.push import push, require_image
from guix_tasks.commands.sizes import sizes
from guix_tasks.commands.squash import squash
from guix_tasks.commands.status import STATUS_HEADER, status_rows, tag_statuses
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

if TYPE_CHECKING:
    from invoke.collection import Collection

    from guix_tasks.engine.api import Engine
    from guix_tasks.stages.project import Project

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("serial_hashing")

DEPS = CustomStage("deps", ("guix", "package", "--install=tar"), "install", ("deps.scm", "patches"))
CHECKED = CustomStage("checked", ("guix", "package", "--install=check"), "deps")


class CustomSite(Site):
    """A project with two custom stages."""

    stages: tuple[CustomStage, ...] = (DEPS, CHECKED)

    def __init__(self, directory: Path, engine: FakeEngine, **env: str) -> None:
        super().__init__(directory, engine, **env)
        self.write("deps.scm", "deps\n")
        self.write("patches/one/fix.patch", "fix\n")

    def project(self, engine: Engine | None = None) -> Project:
        return replace(super().project(engine), custom_stages=self.stages)


@pytest.fixture
def site(tmp_path: Path) -> CustomSite:
    plain = new_site(tmp_path)
    return CustomSite(tmp_path, plain.engine)


@pytest.fixture
def built_site(tmp_path: Path) -> CustomSite:
    site = CustomSite(tmp_path, new_built_site(tmp_path).engine)
    site.make("deps", "checked")
    return site


def packages(site: Site, stage: str) -> set[str]:
    return set(site.image(stage).labels[PACKAGES_LABEL].split())


def states(site: Site) -> dict[str, str]:
    rows = status_rows(tag_statuses(site.project()))
    table = [dict(zip(STATUS_HEADER, row, strict=True)) for row in rows]
    return {row["stage"]: row["state"] for row in table}


# --- Declarations ---------------------------------------------------------------------------


def declare(**fields: Any) -> CustomStage:
    declaration = {"name": "deps", "command": "make", "parent": "install", "inputs": (), **fields}
    return declared(**declaration, parents=STAGES, taken=("push", "install"))


def test_command_string_is_run_by_the_shell() -> None:
    assert declare(command="a | b\nc").command == ("sh", "-euc", "a | b\nc")
    assert declare(command=["a", "b c"]).command == ("a", "b c")


def test_single_input_can_be_a_string() -> None:
    assert declare(inputs="./deps.scm").inputs == ("deps.scm",)
    assert declare(inputs=["a/b/", "c"]).inputs == ("a/b", "c")


@pytest.mark.parametrize(
    ("fields", "error"),
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
def test_invalid_declaration_of_a_stage_is_reported(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        declare(**fields)


# --- Commands and inputs --------------------------------------------------------------------


def test_command_starts_in_the_directory_of_its_inputs(site: CustomSite) -> None:
    stage = custom_stage(site.settings(), DEPS)
    files = stage_files(stage)
    assert files["project/deps.scm"] == b"deps\n"
    assert files["project/patches/one/fix.patch"] == b"fix\n"
    lines = files["stage"].decode().splitlines()
    start = lines.index(f"cd {WORK_DIRECTORY}/project")
    assert lines[start + 1] == "guix package --install=tar"


def test_command_without_inputs_starts_in_the_directory_of_the_image(site: CustomSite) -> None:
    assert b"\ncd " not in stage_files(custom_stage(site.settings(), CHECKED))["stage"]


@pytest.mark.parametrize("missing", ["deps.scm", "patches"])
def test_missing_input_is_reported(site: CustomSite, missing: str) -> None:
    (site.directory / missing).rename(site.directory / "elsewhere")
    with pytest.raises(
        UsageError, match=rf"stage deps: cannot read the input .*{missing}: No such file"
    ):
        site.make("deps")


def test_empty_input_directory_is_reported(site: CustomSite) -> None:
    (site.directory / "patches/one/fix.patch").unlink()
    with pytest.raises(UsageError, match=r"patches is an empty directory"):
        site.make("deps")


def test_unreadable_input_directory_is_reported(
    site: CustomSite, monkeypatch: pytest.MonkeyPatch
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


def test_link_to_a_directory_is_reported(site: CustomSite) -> None:
    (site.directory / "patches/more").symlink_to(site.directory)
    with pytest.raises(UsageError, match=r"patches/more: Is a directory"):
        site.make("deps")


def test_link_to_a_file_is_replaced_by_the_file(site: CustomSite) -> None:
    (site.directory / "patches/same").symlink_to("one/fix.patch")
    assert stage_files(custom_stage(site.settings(), DEPS))["project/patches/same"] == b"fix\n"


# --- Use of custom stages -------------------------------------------------------------------


def test_missing_parents_are_built(site: CustomSite) -> None:
    messages = site.make("checked")
    for child, parent in (("checked", "deps"), ("deps", "install"), ("install", "pull")):
        assert f"{child}: {IMAGE}-{parent} is missing, so {parent} comes first" in messages
    assert [proven_stage(site.image(name)) for name in (*STAGES, "deps", "checked")] == [
        *STAGES,
        "deps",
        "checked",
    ]
    assert packages(site, "checked") >= {"hello@1.0", "tar@1.0", "check@1.0"}


def test_image_is_the_last_stage(site: CustomSite) -> None:
    for name in (*STAGES, "deps", "checked"):
        site.make(name)
        assert site.image().id == site.image(name).id
    site.make("install", force=True)
    assert site.image().id == site.image("checked").id


def test_first_run_reports_only_packages_added_to_the_parent(site: CustomSite) -> None:
    site.make(*STAGES)
    lines = site.make("deps").splitlines()
    assert [line for line in lines if "added" in line] == ["deps: added tar@1.0"]


def test_custom_stage_is_not_run_if_up_to_date(built_site: CustomSite) -> None:
    assert built_site.trace_stages(lambda: built_site.make("deps", "checked")) == []
    assert built_site.make("checked") == "checked: up to date\n"
    assert built_site.trace_stages(lambda: built_site.make("deps", force=True)) == ["deps"]
    assert built_site.why("checked") == "deps is newer"


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("deps.scm", "deps.scm changed"),
        ("patches/one/fix.patch", "patches/one/fix.patch changed"),
        ("patches/two.patch", "patches/two.patch changed"),
    ],
)
def test_changed_input_makes_a_custom_stage_stale(
    built_site: CustomSite, file: str, why: str
) -> None:
    built_site.write(file, "other\n")
    assert states(built_site) == {
        **dict.fromkeys(STAGES, "up to date"),
        "deps": f"stale: {why}",
        "checked": f"stale: deps: {why}",
        "IMAGE": "stage checked",
    }
    assert built_site.trace_stages(lambda: built_site.make("checked", upstream=True)) == [
        "deps",
        "checked",
    ]
    assert built_site.why("checked") is None


def test_changed_command_makes_a_custom_stage_stale(built_site: CustomSite) -> None:
    built_site.stages = (replace(DEPS, command=("guix", "package", "--install=sed")), CHECKED)
    assert built_site.why("deps") == "command changed"


def test_stale_parent_is_rejected(built_site: CustomSite) -> None:
    built_site.env["GUIX_PACKAGES"] = "sed"
    with pytest.raises(UsageError, match=r"run `inv install`, or `inv deps --upstream`"):
        built_site.make("deps")
    assert built_site.trace_stages(lambda: built_site.make("deps", upstream=True)) == [
        "install",
        "deps",
    ]
    assert "sed@1.0" in packages(built_site, "deps")
    assert "hello@1.0" not in packages(built_site, "deps")


def test_packages_of_the_command_line_reach_custom_stages(built_site: CustomSite) -> None:
    built_site.make("install", packages=("sed",))
    assert built_site.why("deps") == "install is newer"
    assert built_site.trace_stages(lambda: built_site.make("deps")) == ["deps"]
    assert "sed@1.0" in packages(built_site, "deps")


def test_failed_command_is_not_committed(built_site: CustomSite) -> None:
    snapshot = outline(built_site.engine)
    built_site.stages = (
        replace(DEPS, command=("guix", "package", "--install=no-such-package")),
        CHECKED,
    )
    with pytest.raises(StageError, match=r"deps: no-such-package: unknown .*out/failed/deps-"):
        built_site.make("deps")
    assert outline(built_site.engine) == snapshot
    assert built_site.engine.all_containers == {}


def test_push_rejects_a_stale_custom_stage(built_site: CustomSite) -> None:
    assert [*push(built_site.project())] == [IMAGE]
    assert [*push(built_site.project(), "deps")] == [f"{IMAGE}-deps"]
    built_site.write("deps.scm", "other\n")
    with pytest.raises(UsageError, match=r"checked is stale .* run `inv checked --upstream`"):
        push(built_site.project())


def test_push_without_a_custom_stage_prints_a_warning(site: CustomSite) -> None:
    site.make("deps")
    project = site.project()
    push(project)
    warning = f"{IMAGE} is pushed without checked, which has no image; run `inv checked push`"
    assert warning in console_text(project)
    site.make("checked")
    project = site.project()
    push(project)
    assert "is pushed without" not in console_text(project)


def test_image_of_a_removed_stage_is_pushed_with_a_warning(built_site: CustomSite) -> None:
    built_site.stages = (DEPS,)
    project = built_site.project()
    assert [*push(project)] == [IMAGE]
    assert "not built by a stage of this project" in console_text(project)
    # The next build of a stage replaces the image.
    built_site.make("deps")
    assert built_site.image().id == built_site.image("deps").id


def test_unknown_stage_is_reported_with_the_known_ones(built_site: CustomSite) -> None:
    with pytest.raises(
        UsageError, match=r"its stages are base, pull, install, deps, checked and squ"
    ):
        require_image(built_site.project(), "nothing")


def test_squash_includes_custom_stages(built_site: CustomSite) -> None:
    squash(built_site.project())
    assert key_of(built_site.image()) == squash_key(built_site.image("checked"))
    assert len(built_site.image().layers) == len(built_site.image("base").layers) + 1
    built_site.write("deps.scm", "other\n")
    with pytest.raises(UsageError, match="checked is stale"):
        push(built_site.project())


def test_clean_removes_custom_stages(built_site: CustomSite) -> None:
    removed = clean(built_site.project())
    assert {f"{IMAGE}-deps", f"{IMAGE}-checked", IMAGE} <= set(removed)
    assert not [tag for tag in built_site.engine.tags if tag.startswith(IMAGE)]


def test_sizes_exclude_the_parent(built_site: CustomSite) -> None:
    built_site.stages = (DEPS, CHECKED, replace(CHECKED, name="sibling", parent="install"))
    built_site.make("sibling")
    stage_sizes = {
        part.name: part.size for part in sizes(built_site.project()) if part.group == "stage"
    }
    assert [*stage_sizes] == [*STAGES, "deps", "checked", "sibling"]
    install, sibling = (built_site.engine._image(f"{IMAGE}-{s}") for s in ("install", "sibling"))
    assert install
    assert sibling
    assert stage_sizes["sibling"] == sibling.size - install.size


def test_fresh_machine_takes_custom_stages_from_the_cache(tmp_path: Path) -> None:
    plain = new_site(tmp_path / "one")
    original = CustomSite(tmp_path / "one", plain.engine, CACHE_IMAGE="registry.test/cache")
    original.make("checked")
    other = CustomSite(tmp_path / "two", FakeEngine(original.engine.registry), **original.env)
    other.write("channels.lock.scm", original.lock.read_text())
    messages: list[str] = []
    assert other.trace_stages(lambda: messages.append(other.make("checked"))) == []
    assert "checked: taken from registry.test/cache:checked-" in messages[0]


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
    result = inv(tmp_path, TASKS, "-X", "importtime", "-m", "invoke", "--list")
    assert result.returncode == 0, result.stderr
    lines = " ".join(result.stdout.split())
    assert "deps Build what we need." in lines
    assert "checked Run the custom stage checked on deps." in lines
    imported = set(re.findall(r"\|\s*(\w+)[\w.]*$", result.stderr, re.MULTILINE))
    assert "guix_tasks" in imported
    assert imported.isdisjoint({"docker", "requests", "urllib3", "dotenv"})


@pytest.mark.parametrize("location", ["package", "subdirectory", "root", "collection"])
def test_settings_are_next_to_the_collection_of_invoke(tmp_path: Path, location: str) -> None:
    project, sub = tmp_path / "project", tmp_path / "project" / "sub"
    (project / "tasks").mkdir(parents=True)
    sub.mkdir()
    names = {"collection": "ci.py"}
    collection = project / names.get(location, "tasks/__init__.py")
    collection.write_text("from guix_tasks.tasks import ns\n")
    (project / ".env").write_text("GUIX_CORES=many\n")
    options = {"root": ["-r", str(project)], "collection": ["-c", "ci"]}
    result = subprocess.run(
        [sys.executable, "-m", "invoke", *options.get(location, []), "status"],
        cwd={"package": project, "root": tmp_path}.get(location, sub),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "GUIX_CORES" in result.stderr


@pytest.fixture
def collection(monkeypatch: pytest.MonkeyPatch) -> Collection:
    """The tasks of a project, which its ``tasks.py`` extends."""
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
    ("line", "error"),
    [
        ('add_stage("deps", "x")', "deps is already a task"),
        ('add_stage("push", "x")', "push is already a task"),
        ('add_stage("engine", "x")', "engine is already a task"),
        ('add_stage("late", "x", parent="later")', "one of base, pull, install, deps, checked"),
    ],
)
def test_error_in_tasks_py_is_one_line(line: str, error: str) -> None:
    with pytest.raises(Exit) as raised:
        exec(f"{TASKS}{line}", {})  # noqa: S102
    assert raised.value.code == 2
    message = str(raised.value.message)
    assert message.startswith("error: tasks.py: ")
    assert error in message
    assert len(message.splitlines()) == 1
