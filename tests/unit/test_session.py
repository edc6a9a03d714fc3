"""Calls of ``inv``: results, errors in one line, exit codes and redacted secrets."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from fake_buildx import DIGEST, NAME, FakeBuildx
from fake_engine import (
    BASE_IMAGE,
    COMMITS,
    IMAGE,
    FakeContainer,
    FakeEngine,
    Output,
    Site,
    channel,
    clear_file_cache,
    new_site,
    outline,
    serial_executor,
)
from invoke.collection import Collection
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.program import Program

import dev.demo
import dev.tasks
from guix_tasks import files as files_module
from guix_tasks.bootstrap.base_image import BASE_TAG
from guix_tasks.buildkit import buildx
from guix_tasks.cli import errors, session
from guix_tasks.cli.session import Session
from guix_tasks.commands import buildx_setup
from guix_tasks.commands.init import project_directory
from guix_tasks.engine import discovery, podman
from guix_tasks.errors import EngineError, UsageError
from guix_tasks.settings import DECLARATIONS
from guix_tasks.stages.declarations import CustomStage
from guix_tasks.tasks import ns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.stages.project import Project

LOCK = f"(list {channel('guix', 'https://guix.test', COMMITS['guix'])})\n"
PASSWORD = "hunter2-$x"  # noqa: S105


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Inv:
    """The command ``inv`` in the directory of a project with a fake engine."""

    site: Site
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    opened: list[str] = field(default_factory=list)
    tasks: Collection = field(default_factory=lambda: ns)

    def __call__(self, *argv: str) -> Result:
        session._engines.clear()
        files_module._digest_of_state.cache_clear()
        clear_file_cache()
        lines = (f"{name}='{value}'\n" for name, value in self.site.env.items())
        self.site.write(".env", "".join(lines))
        self.monkeypatch.setattr(sys, "argv", ["inv", *argv])
        self.capsys.readouterr()
        code: object = 0
        try:
            Program(namespace=self.tasks).run(["inv", *argv])
        except SystemExit as error:
            code = error.code
        assert isinstance(code, int)
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    def make_engine(self, address: discovery.Address, _environ: object) -> FakeEngine:
        self.opened.append(address.url)
        return self.site.engine


@pytest.fixture(autouse=True)
def _isolate_from_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use no engine, no settings and no files of this machine."""
    for name in DECLARATIONS:
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("ENV_FILE", raising=False)
    monkeypatch.setattr(discovery, "DEFAULT_SOCKET", tmp_path / "no.sock")
    monkeypatch.setattr(files_module, "ThreadPoolExecutor", serial_executor)
    monkeypatch.setattr(buildx_setup, "check_endpoint", lambda _endpoint: None)
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    yield
    session._engines.clear()


@pytest.fixture
def inv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inv:
    site = new_site(tmp_path / "project")
    site.write("tasks.py", "")
    monkeypatch.chdir(site.directory)
    monkeypatch.setenv("DOCKER_HOST", "unix:///fake.sock")
    command = Inv(site, capsys, monkeypatch)
    monkeypatch.setattr(podman, "open_engine", command.make_engine)
    return command


# --- Tasks ----------------------------------------------------------------------------------


def test_all_tasks_print_only_the_digest_to_standard_output(inv: Inv) -> None:
    result = inv("base", "pull", "install", "commit", "push")
    assert result.code == 0
    digest = result.out.strip()
    assert digest.startswith(f"{IMAGE}@sha256:")
    assert len(result.out.splitlines()) == 1
    image = inv.site.engine.registry.find(IMAGE)
    assert image
    assert image.layers == inv.site.image("install").layers


def test_pack_prints_only_its_file_and_passes_the_options(inv: Inv) -> None:
    inv("base", "pull", "install")
    store_item, scripts = f"/gnu/store/{'0' * 32}-hello-docker-pack.tar.gz", []

    def behaviour(container: FakeContainer) -> Output:
        scripts.append(container.text(container.argv[0]))
        yield False, f"is packed:hello\t1.0\n{store_item}\n".encode()
        container.write(store_item, "packed")

    inv.site.engine.behaviour = behaviour
    result = inv(
        "pack", "--package=hello", "--relocatable", "--relocatable", "--symlink=/bin=bin",
        "--symlink=/share=share", "--format=docker", "--max-layers=9", "--name=x",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.out == f"{inv.site.directory}/out/x-1.0-x86_64-linux.docker.tar.gz\n"
    (script,) = scripts
    assert script.count(" --relocatable") == 2
    assert " --symlink=/bin=bin --symlink=/share=share --max-layers=9 " in script


def test_release_needs_no_engine(inv: Inv) -> None:
    inv.opened.clear()
    assert inv("release").errors[0].startswith("error: nothing to release: ")
    record = {"system": "x86_64-linux", "format": "tarball", "file": "x", "sha256": "1"}
    inv.site.write("out/build-x86_64-linux.json", json.dumps({**record, "channels": []}))
    path = inv.site.directory / "out" / "build.json"
    assert inv("--dry", "release", "--url=https://a.test").code == 0
    assert not path.exists()
    result = inv("release", "--url=https://a.test")
    assert (result.code, result.out) == (0, f"{path}\n")
    assert json.loads(path.read_text())["x86_64-linux"]["url"] == "https://a.test/x"
    result = inv("release", "--url=ftp://a.test")
    assert (result.code, len(result.errors)) == (2, 1)
    assert result.errors[0].startswith("error: option --url: ")
    assert inv.opened == []


def test_first_line_names_the_engine(inv: Inv) -> None:
    result = inv("base", "pull", "install")
    assert result.err.splitlines()[0] == "engine: fake at unix:///fake.sock (fake), Docker 28"
    assert result.err.count("engine: ") == 1
    assert inv.opened == ["unix:///fake.sock"]


def test_separate_calls_have_the_result_of_one_call(inv: Inv, tmp_path: Path) -> None:
    inv("pull", "install", "push")
    state = outline(inv.site.engine)
    other = new_site(tmp_path / "other", inv.site.engine.registry)
    other.write("tasks.py", "")
    inv.monkeypatch.chdir(other.directory)
    other_inv = Inv(other, inv.capsys, inv.monkeypatch)
    inv.monkeypatch.setattr(podman, "open_engine", other_inv.make_engine)
    assert [other_inv(task).code for task in ("pull", "install", "push")] == [0, 0, 0]
    assert outline(other.engine) == state


def test_package_option_applies_to_one_call(inv: Inv) -> None:
    inv("install", "--package", "tar", "--package", "gzip")
    assert "tar" in inv.site.image().labels["org.guix-tasks.packages"]
    assert inv("push").code == 0
    inv("install")
    assert "tar" not in inv.site.image().labels["org.guix-tasks.packages"]


def test_options_of_stages_are_passed_on(inv: Inv) -> None:
    inv("install")
    assert "up to date" in inv("install").err
    assert "install: in a" in inv("install", "--force").err
    inv.site.write("Dockerfile", "FROM y\n")
    assert inv("install").code == 2
    assert inv("install", "--upstream").code == 0
    assert "`inv commit` commits" in inv("install", "--no-commit").err
    assert inv("commit").code == 0
    inv.site.engine.guix.heads["guix"] = "c" * 40
    inv("pull", "--update")
    assert "c" * 40 in inv.site.lock.read_text()
    image_id = inv.site.image("base").id
    inv("base", "--force")
    assert inv.site.image("base").id != image_id


def test_run_keeps_arguments_and_exit_status(inv: Inv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    inv("install")
    result = inv("run", "--", "printf", "a b", "--keep", "--", "$x")
    assert result.code == 0
    assert inv.site.engine.specs[-1].command[1:] == ("printf", "a b", "--keep", "--", "$x")
    assert result.out.startswith("ran printf 'a b' --keep")

    def behaviour(container: FakeContainer) -> Output:
        container.status = 42
        yield True, b"no\n"

    inv.site.engine.behaviour = behaviour
    assert inv("run", "--", "false").code == 42


def test_status_rollback_and_clean_succeed(inv: Inv) -> None:
    inv("install")
    result = inv("status")
    assert result.out.count("up to date") == 3
    assert inv("rollback").code == 0
    assert "removed" not in inv("--dry", "clean").err
    lines = inv("clean").err.splitlines()
    removed = [line for line in lines if line.startswith("clean: removed ")]
    assert f"clean: removed {IMAGE}" in removed
    assert f"clean: removed {IMAGE}-base" in removed
    assert f"clean: {len(removed)} removed" in lines
    assert not [tag for tag in inv.site.engine.tags if tag != BASE_IMAGE]
    assert "clean: nothing to remove" in inv("clean").err


def test_dry_run_shows_all_commands_and_changes_nothing(inv: Inv) -> None:
    # Without a lock, the channels of a dry pull are unknown.
    inv.site.write("channels.lock.scm", LOCK)
    calls = inv.site.engine.changing_calls()
    result = inv("--dry", "base", "pull", "install", "push")
    assert result.code == 0
    assert result.out == ""
    assert inv.site.engine.changing_calls() == calls
    for command in ("build", "create", "commit", "tag", "push"):
        assert f"+ docker {command} " in result.err
    assert inv.site.lock.read_text() == LOCK


def test_subdirectory_has_the_settings_of_the_project(inv: Inv) -> None:
    (inv.site.directory / "deep" / "er").mkdir(parents=True)
    inv.monkeypatch.chdir(inv.site.directory / "deep" / "er")
    assert inv("base").code == 0
    assert f"{IMAGE}-base" in inv.site.engine.tags


def test_note_of_the_settings_is_printed(inv: Inv) -> None:
    inv.site.env["SOMETHING_ELSE"] = "1"
    assert "note: .env:" in inv("status").err


# --- Several platforms ----------------------------------------------------------------------

TWO_PLATFORMS = "linux/amd64 linux/386"


def test_each_platform_is_built_and_pushed(inv: Inv) -> None:
    inv.site.env["PLATFORMS"] = TWO_PLATFORMS
    result = inv("base", "pull", "install", "verify", "push")
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.partition("@")[0] for line in lines if "@" in line] == [
        f"{IMAGE}-linux-amd64", f"{IMAGE}-linux-386",
    ]  # fmt: skip
    files = (inv.site.directory / "out" / "digests").iterdir()
    assert sorted(path.name for path in files) == ["linux-386.json", "linux-amd64.json"]
    assert inv("status").out.count("up to date") == 6
    assert "removed" in inv("clean").err
    assert not [tag for tag in inv.site.engine.tags if tag != BASE_IMAGE]


def test_update_is_the_same_for_all_platforms(inv: Inv) -> None:
    """All platforms get the same commits, even if a channel changes in between."""
    inv.site.env["PLATFORMS"] = TWO_PLATFORMS
    inv("pull")
    engine, guix = inv.site.engine, inv.site.engine.guix
    heads = iter("cde")

    def behaviour(container: FakeContainer) -> Output:
        guix.heads["guix"] = next(heads) * 40
        return guix(container)

    engine.behaviour = behaviour
    assert inv("pull", "--update").code == 0
    images = [engine.tags[f"{IMAGE}-pull{suffix}"] for suffix in ("", "-linux-386")]
    channels = {engine.all_images[image].labels["org.guix-tasks.channels"] for image in images}
    assert len(channels) == 1
    assert "c" * 40 in inv.site.lock.read_text()
    assert inv("status").out.count("up to date") == 4


@pytest.mark.parametrize(
    "argv",
    [
        ("commit",), ("squash",), ("rollback",), ("run", "--", "true"), ("shell",),
        ("pull", "--no-commit"), ("install", "--no-commit", "--package", "tar"),
        ("status", "--size"), ("status", "--plot", "x.svg"),
    ],
    ids=str,
)  # fmt: skip
def test_task_for_one_platform_rejects_several(inv: Inv, argv: tuple[str, ...]) -> None:
    inv.site.env["PLATFORMS"] = TWO_PLATFORMS
    result = inv(*argv)
    assert result.code == 2
    assert result.errors == [
        "error: PLATFORMS has several platforms; choose one, as in PLATFORMS=linux/amd64 inv ..."
    ]
    assert inv.site.engine.changing_calls() == []


def test_task_for_one_platform_accepts_one(inv: Inv) -> None:
    inv.site.env["PLATFORMS"] = "linux/386"
    inv("install")
    assert inv("install", "--no-commit", "--force", "--package", "tar").code == 0
    assert inv("commit").code == 0
    assert inv("rollback").code == 0
    assert f"{IMAGE}-linux-386" in inv.site.engine.tags


def test_emulated_platform_is_reported_in_one_line(inv: Inv) -> None:
    inv.site.env["PLATFORMS"] = "linux/arm64"
    result = inv("install")
    assert result.code == 2
    assert "GUIX_SANDBOX=nochroot" in result.errors[0]


# --- BuildKit -------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBuildx:
    """A buildx on this machine, without a builder."""
    fake = FakeBuildx(tmp_path / "buildx", answers={"resolved": LOCK.strip(), "pull": LOCK.strip()})
    monkeypatch.setattr(buildx, "find_program", lambda *_: fake.path)
    return fake


def test_buildx_setup_build_and_down_succeed(inv: Inv, fake: FakeBuildx) -> None:
    result = inv("buildx.setup", "buildx.build", "buildx.status")
    assert result.code == 0
    first, header, row, cache = result.out.splitlines()
    assert first == f"{IMAGE}@{DIGEST}"
    assert header.split()[0] == "node"
    assert row.startswith(f"{NAME}0  unix:///fake.sock  running")
    assert cache == "cache: 1.23GB"
    assert inv.site.lock.read_text() == LOCK
    assert inv("buildx.down", "--keep-cache").code == 0
    assert fake.state["builders"] == {}
    assert fake.changes()[-1] == f"rm --keep-state {NAME}"


def test_buildx_uses_the_engine_of_the_project(inv: Inv, fake: FakeBuildx) -> None:
    inv.monkeypatch.setenv("DOCKER_CONTEXT", "")
    inv.monkeypatch.setenv("BUILDX_BUILDER", "other")
    inv("buildx.setup")
    for call in fake.calls():
        assert call.env["DOCKER_HOST"] == "unix:///fake.sock"
        assert "BUILDX_BUILDER" not in call.env
    assert "other" in fake.state["builders"]


def test_options_of_a_build_are_passed_on(inv: Inv, fake: FakeBuildx) -> None:
    inv("buildx.setup")
    assert inv("buildx.build", "--no-pull", "--force", "--by-digest").code == 0
    call = fake.calls("bake")[-1]
    assert "AS pull" not in call.files["Dockerfile"]
    assert call.files["work/install/again"]
    assert "push-by-digest=true" in call.target["output"][0]
    assert inv("buildx.build", "--update").code == 0
    assert "AS resolving" in fake.calls("bake")[-3].files["Dockerfile"]


def test_options_of_a_setup_are_passed_on(inv: Inv, fake: FakeBuildx) -> None:
    inv("buildx.setup")
    assert inv("buildx.setup", "--recreate", "--use").code == 0
    assert fake.calls("rm")
    assert fake.state["selected"] == NAME


def test_dry_setup_and_build_change_nothing(inv: Inv, fake: FakeBuildx) -> None:
    result = inv("--dry", "buildx.setup")
    assert result.code == 0
    assert f"+ docker buildx create --name={NAME}" in result.err
    assert fake.changes() == []
    fake.add()
    result = inv("--dry", "buildx.build", "buildx.down")
    assert (result.code, result.out) == (0, "")
    assert result.err.count("+ docker buildx bake") == 3
    assert f"+ docker buildx rm {NAME}" in result.err
    assert fake.changes() == []
    assert inv.site.engine.changing_calls() == []


def test_echo_shows_and_runs_the_calls_of_buildx(inv: Inv, fake: FakeBuildx) -> None:
    result = inv("--echo", "buildx.setup")
    assert f"+ docker buildx inspect --bootstrap {NAME}" in result.err
    assert NAME in fake.state["builders"]


def test_missing_builder_is_reported_in_one_line(inv: Inv, fake: FakeBuildx) -> None:
    for task in ("buildx.build", "buildx.status"):
        result = inv(task)
        assert result.code == 6
        assert result.errors == [
            f"error: there is no builder '{NAME}'; `inv buildx.setup` creates it"
        ]
    assert fake.changes() == []


def test_failed_step_has_the_exit_code_of_a_stage(inv: Inv, fake: FakeBuildx) -> None:
    fake.add()
    fake.fail(
        'ERROR: target reports: failed to solve: process "/var/guix/guix-tasks/entry-point.sh '
        '/var/guix/guix-tasks/stage install" did not complete successfully: exit code: 1',
        "bake",
        "reports",
    )
    result = inv("buildx.build")
    assert (result.code, result.out) == (4, "")
    assert result.errors[0].startswith("error: install: the command failed with exit status 1")


@pytest.mark.parametrize("task", ["buildx.build", "buildx.status", "buildx.down", "manifest"])
def test_missing_buildx_is_reported_with_its_setup(inv: Inv, task: str) -> None:
    inv.monkeypatch.setattr(buildx, "find_program", lambda *_: None)
    result = inv(task)
    assert result.code == 6
    assert result.errors == [
        "error: buildx is not installed; `inv buildx.setup` installs it for your user"
    ]


def prepare_plugin(inv: Inv, fake: FakeBuildx) -> Path:
    """Configure an installation of buildx and return the path of the plugin."""
    content = b"a plugin"
    inv.site.write("plugin", content)
    inv.site.env.update(
        BUILDX_URL=f"file://{inv.site.directory}/plugin",
        BUILDX_SHA256=hashlib.sha256(content).hexdigest(),
    )
    directory = inv.site.directory / "docker"
    inv.monkeypatch.setenv("DOCKER_CONFIG", str(directory))
    target = directory / "cli-plugins" / "docker-buildx"
    inv.monkeypatch.setattr(
        buildx, "find_program", lambda *_: fake.path if target.exists() else None
    )
    return target


def test_setup_installs_the_plugin_for_the_user(inv: Inv, fake: FakeBuildx) -> None:
    target = prepare_plugin(inv, fake)
    assert inv("buildx.build").code == 6
    assert not target.exists()
    assert inv("--dry", "buildx.setup").code == 6
    assert not target.exists()
    assert inv("buildx.setup").code == 0
    assert os.access(target, os.X_OK)
    assert NAME in fake.state["builders"]
    assert inv("buildx.build").code == 0


def test_setup_of_the_plugin_needs_no_engine(inv: Inv, fake: FakeBuildx) -> None:
    target = prepare_plugin(inv, fake)
    inv.monkeypatch.delenv("DOCKER_HOST")
    assert inv("buildx.setup", "--plugin").code == 0
    assert os.access(target, os.X_OK)
    assert inv.opened == []
    assert fake.calls() == []


@pytest.mark.parametrize(
    ("driver", "nodes"), [("remote", "tcp://b.test:1"), ("docker-container", "ssh://b.test")]
)
def test_buildkit_on_another_machine_needs_no_engine(
    inv: Inv, fake: FakeBuildx, driver: str, nodes: str
) -> None:
    inv.monkeypatch.delenv("DOCKER_HOST")
    inv.site.env.update(BUILDX_DRIVER=driver, BUILDX_NODES=nodes)
    result = inv("buildx.setup", "buildx.build", "buildx.status", "buildx.down")
    assert (result.code, result.errors) == (0, [])
    assert result.out.startswith(f"{IMAGE}@{DIGEST}\n")
    assert inv.opened == []


@pytest.mark.parametrize("driver", ["docker-container", "docker"])
def test_buildkit_on_the_engine_needs_an_engine(inv: Inv, fake: FakeBuildx, driver: str) -> None:
    inv.monkeypatch.delenv("DOCKER_HOST")
    inv.site.env["BUILDX_DRIVER"] = driver
    result = inv("buildx.setup")
    assert result.code == 3
    assert "no Docker Engine on this machine" in result.errors[0]
    assert fake.calls() == []


def test_manifest_needs_no_engine(inv: Inv, fake: FakeBuildx) -> None:
    inv.monkeypatch.delenv("DOCKER_HOST")
    result = inv("manifest")
    assert result.code == 2
    assert "no push record of registry.test/team/app" in result.errors[0]


# --- Errors ---------------------------------------------------------------------------------


def test_all_invalid_settings_are_reported(inv: Inv) -> None:
    inv.site.env.update(IMAGE="Bad Image", STAGE_MEMORY="much")
    result = inv("pull")
    assert result.code == 2
    assert len(result.errors) == 2
    assert ".env:1: IMAGE" in result.errors[0] + result.errors[1]
    assert inv.opened == []


def test_push_without_an_image_is_an_error(inv: Inv) -> None:
    result = inv("push")
    assert result.code == 2
    (error,) = result.errors
    assert error.startswith(f"error: {IMAGE} does not exist on this engine; run `inv install`, or")


def test_missing_engine_is_an_error(inv: Inv) -> None:
    inv.monkeypatch.delenv("DOCKER_HOST")
    result = inv("pull")
    assert result.code == 3
    (line,) = result.errors
    assert "no Docker Engine on this machine" in line
    assert "`inv engine.up`" in line


@pytest.mark.parametrize(
    "call", ["containers", "create", "copy_in", "run", "wait", "commit", "tag"]
)
def test_stopped_engine_is_an_error(inv: Inv, call: str) -> None:
    inv("base")
    initial_state = outline(inv.site.engine)

    def fault(_number: int, name: str, _when: str) -> None:
        if name == call:
            raise EngineError("the Docker Engine does not answer; start it")

    inv.site.engine.fault = fault
    result = inv("pull")
    inv.site.engine.fault = lambda *_: None
    assert result.code == 3
    assert result.errors == ["error: the Docker Engine does not answer; start it"]
    assert inv.site.engine.all_containers == {}
    assert outline(inv.site.engine) == initial_state


def test_failed_guix_command_is_an_error(inv: Inv) -> None:
    inv("install")
    initial_state = outline(inv.site.engine)
    inv.site.env["GUIX_PACKAGES"] = "no-such-package"
    result = inv("install")
    assert result.code == 4
    assert len(result.errors) == 1
    assert "guix package: error: no-such-package: unknown package" in result.err
    assert outline(inv.site.engine) == initial_state
    assert inv.site.engine.all_containers == {}


def test_failed_stage_ends_the_call(inv: Inv) -> None:
    inv.site.env["GUIX_PACKAGES"] = "no-such-package"
    assert inv("pull", "install", "push").code == 4
    assert "push" not in inv.site.engine.changing_calls()


@pytest.mark.parametrize("refusal", ["connection refused", "denied"])
def test_refused_push_is_an_error(inv: Inv, refusal: str) -> None:
    inv("install")
    inv.site.engine.registry.refusal = refusal
    result = inv("push")
    assert result.code == 5
    assert result.out == ""
    assert len(result.errors) == 1


def test_failed_build_is_an_error(inv: Inv) -> None:
    inv.site.env["BASE_IMAGE"] = "registry.test/none:1"
    result = inv("base")
    assert result.code == 6
    assert "registry.test/none:1" in result.errors[0]
    assert inv.site.engine.tags == {}


def test_failed_check_is_an_error(inv: Inv) -> None:
    inv("install")
    inv.site.engine.guix.failing["certificates"] = "none"
    result = inv("verify")
    assert result.code == 1
    assert result.errors == [f"error: verify: {IMAGE} failed: certificates"]


@pytest.mark.parametrize("signal_name", ["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("stage", ["pull", "install"])
def test_interrupt_changes_nothing(inv: Inv, signal_name: str, stage: str) -> None:
    inv("install")
    initial_state = outline(inv.site.engine)
    handler = signal.getsignal(signal.SIGTERM)

    def behaviour(_container: FakeContainer) -> Output:
        yield True, b"half\n"
        if signal_name == "Ctrl-C":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        yield True, b"more\n"

    inv.site.engine.behaviour = behaviour
    result = inv(stage, "--force")
    assert result.code == 130
    assert len(result.errors) == 1
    assert outline(inv.site.engine) == initial_state
    assert inv.site.engine.all_containers == {}
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("package", "modules", "importer"),
    [
        ("docker", ["docker"], "guix_tasks.engine.docker"),
        ("requests", ["requests"], "guix_tasks.engine.docker"),
        ("dotenv", ["dotenv", "dotenv.parser", "dotenv.variables"], "guix_tasks.settings"),
    ],
)
def test_missing_package_is_an_error(
    inv: Inv, package: str, modules: list[str], importer: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in modules:
            patch.setitem(sys.modules, name, None)
        patch.delitem(sys.modules, "guix_tasks.cli.session")
        for name in [
            module
            for module in sys.modules
            if module == importer or module.startswith(f"{importer}.")
        ]:
            patch.delitem(sys.modules, name)
        result = inv("pull")
    assert result.code == 2
    (line,) = result.errors
    assert f"cannot import the package {package}" in line
    assert sys.executable in line
    assert "use ./inv" in line


def test_other_missing_module_is_a_traceback() -> None:
    with pytest.raises(ModuleNotFoundError), errors.report_errors():
        raise ModuleNotFoundError("No module named 'mine'", name="mine")


def test_full_disk_of_temporary_files_is_reported_with_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Exit) as caught, errors.report_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.code == 3
    error = capsys.readouterr().err
    assert (
        f"cannot access a file, perhaps in {tmp_path}: No space left on device; free space there"
        in error
    )
    assert "TMPDIR" in error


def test_exit_of_a_task_is_kept() -> None:
    with pytest.raises(Exit) as caught, errors.report_errors():
        raise Exit(code=9)
    assert caught.value.code == 9


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("BUILD_CONTEXT", "no-such-directory"),
        ("BUILD_CONTEXT", "Dockerfile"),
        ("DOCKERFILE", "no/Dockerfile"),
    ],
)
def test_invalid_path_is_reported_in_one_line(inv: Inv, setting: str, path: str) -> None:
    inv.site.env[setting] = path
    result = inv("base")
    assert result.code == 2
    assert f"{setting}: " in result.errors[0]


@pytest.mark.parametrize(
    ("setting", "name"),
    [("GUIX_MANIFEST", "manifest.scm"), ("GUIX_SUBSTITUTE_KEYS", "a.pub"), ("MOUNTS", "data")],
)
def test_unreadable_file_is_reported_in_one_line(inv: Inv, setting: str, name: str) -> None:
    inv.site.write(name, "x")
    inv.site.env[setting] = f"{name}:/mnt" if setting == "MOUNTS" else name
    original = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self)

    inv.monkeypatch.setattr(Path, "read_bytes", read_bytes)
    result = inv("install")
    assert result.code in {2, 3}
    assert name in result.errors[0]
    assert inv.site.engine.all_containers == {}


def test_demo_rejects_a_dry_run(inv: Inv) -> None:
    inv.tasks = Collection(dev.tasks.demo)
    result = inv("--dry", "demo")
    assert result.code == 2
    assert "leave --dry out" in result.errors[0]
    assert inv.site.engine.calls == []


def test_demo_creates_the_files_of_its_settings(inv: Inv, tmp_path: Path) -> None:
    """These files do not exist in a new checkout."""
    example = tmp_path / "checkout" / dev.demo.ENV_FILE
    example.parent.mkdir(parents=True)
    example.write_text((dev.CHECKOUT / dev.demo.ENV_FILE).read_text())
    (tmp_path / "checkout" / "Dockerfile").write_text("FROM base\n")

    def prepare(_engine: object, _console: object, directory: Path) -> int:
        output = directory / "examples" / "offline" / "out"
        output.mkdir()
        for name in ("channels.scm", "substitutes.pub"):
            (output / name).write_text(LOCK)
        return 5055

    projects: list[Project] = []
    inv.monkeypatch.setattr(dev.demo, "prepare", prepare)
    inv.monkeypatch.setattr(dev.demo, "run_demo", projects.append)
    inv.monkeypatch.setattr(dev.demo, "print_next_steps", projects.append)
    inv.monkeypatch.setattr(dev.tasks, "CHECKOUT", tmp_path / "checkout")
    inv.tasks = Collection(dev.tasks.demo)
    assert inv("demo").code == 0
    assert [str(project.settings.image.name) for project in projects] == [
        "localhost:5055/guix-tasks-demo"
    ] * 2


def test_rootfs_does_not_replace_a_used_image(inv: Inv) -> None:
    image = inv.site.engine.make_image({}, {}, tag=BASE_TAG)
    result = inv("rootfs")
    assert "is on the engine; `inv rootfs --force` makes it again" in result.err
    assert inv.site.engine.tags[BASE_TAG] == image.id


@pytest.mark.parametrize("task", ["demo", "test"])
def test_developer_tasks_are_not_tasks_of_a_project(inv: Inv, task: str) -> None:
    assert inv(task).err == f"No idea what '{task}' is!\n"


# --- Secrets --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [(), ("--echo",), ("--dry",)], ids=str)
def test_secrets_are_not_shown_or_stored(inv: Inv, mode: tuple[str, ...]) -> None:
    inv.site.write("channels.lock.scm", LOCK)
    inv.site.env.update(
        DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD, CACHE_IMAGE="registry.test/cache"
    )
    inv.site.write("secret", PASSWORD)
    inv.site.env["BUILD_SECRETS"] = "token=secret"
    engine, output = inv.site.engine, ""
    for tasks in (("base",), ("pull", "install", "push", "status", "verify"), ("clean",)):
        result = inv(*mode, *tasks)
        assert result.code == 0
        output += result.out + result.err
    state = repr((engine.calls, engine.specs, engine.all_images, engine.registry.images))
    assert PASSWORD not in output + state
    assert "some-user" not in output
    if not mode:
        assert {account.password for account in engine.registry.used_credentials if account} == {
            PASSWORD
        }


def test_secret_in_an_error_of_a_registry_is_redacted(inv: Inv) -> None:
    inv.site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    inv("install")
    inv.site.engine.registry.refusal = (
        f"unauthorized: {PASSWORD} of https://other:password@registry.test/token?token=abc-def"
    )
    result = inv("push")
    assert result.code == 5
    assert "unauthorized: *** of https://***@registry.test/token?token=***" in result.errors[0]
    assert PASSWORD not in result.err + repr(inv.site.engine.calls)


def test_errors_of_settings_show_no_secret(inv: Inv) -> None:
    inv.monkeypatch.setenv("https_proxy", f"http://me:{PASSWORD}@proxy.test")
    inv.site.env.update(
        TAGS=f"bad/{PASSWORD}",
        BUILDX_CACHE_TO='type=s3,secret_access_key=hunter3,a="',
        NETWORK="https://me:hunter4@x/",
    )
    result = inv("status")
    assert result.code == 2
    assert len(result.errors) == 3
    assert not [secret for secret in (PASSWORD, "hunter3", "hunter4") if secret in result.err]


def test_secret_build_argument_is_reported_and_redacted(inv: Inv) -> None:
    inv.site.env["BUILD_ARGS"] = "VERSION=1.0 NPM_TOKEN=hunter2 proxy=http://me:hunter3@x"
    result = inv("--dry", "base")
    assert result.code == 0
    assert "note: .env:" in result.err
    assert "the history of the image shows NPM_TOKEN to everyone who has the image" in result.err
    assert "--build-arg=VERSION=1.0" in result.err
    assert "hunter" not in result.err + result.out


def test_traceback_of_a_bug_has_no_secret(inv: Inv) -> None:
    inv.site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    inv("status")

    def fail() -> None:
        raise LookupError(PASSWORD) from ValueError(f"https://me:pass@x {PASSWORD}")

    try:
        fail()
    except LookupError as error:
        sys.excepthook(type(error), error, error.__traceback__)
        thread = threading.current_thread()
        threading.excepthook(
            threading.ExceptHookArgs((type(error), error, error.__traceback__, thread))
        )
    output = inv.capsys.readouterr().err
    assert output.count("LookupError: ***") == 2
    assert output.count("ValueError: https://***@x ***") == 2
    assert PASSWORD not in output


def test_log_of_libraries_has_no_secret(inv: Inv) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("log: %(message)s"))
    logging.root.addHandler(handler)
    try:
        inv.site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
        inv("status")
        inv("status")
        logging.getLogger("urllib3").warning("POST /build?x=%s", quote(PASSWORD))
    finally:
        logging.root.removeHandler(handler)
    assert log.getvalue().splitlines()[-1] == "log: POST /build?x=***"


# --- Sessions -------------------------------------------------------------------------------


def test_project_is_the_nearest_directory_with_tasks(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    assert project_directory(deep) == deep
    (tmp_path / "a" / "tasks.py").touch()
    assert project_directory(deep) == tmp_path / "a"
    (tmp_path / "a" / "b" / "tasks.py").touch()
    assert project_directory(deep) == tmp_path / "a" / "b"


def test_docker_command_uses_the_engine_of_the_project(
    inv: Inv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/docker")
    argv, environment = Session(Context()).docker_command(inv.site.project())
    assert argv == ["/usr/bin/docker"]
    assert environment["DOCKER_HOST"] == "unix:///fake.sock"


def test_docker_command_uses_the_context(inv: Inv, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context has certificates, which an address lacks."""
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/docker")
    engine = inv.site.engine
    engine.details = replace(engine.details, url="tcp://far.test:2376", context="far")
    _, environment = Session(Context()).docker_command(inv.site.project())
    assert environment["DOCKER_CONTEXT"] == "far"
    assert not environment["DOCKER_HOST"]


def test_too_long_tag_of_a_custom_stage_is_an_error_of_the_settings(
    inv: Inv, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = CustomStage("d" * 32, ("true",), "install")
    monkeypatch.setattr(session, "custom_stages", [stage])
    inv.site.env["IMAGE"] = f"registry.test/app:{'t' * 95}"
    assert inv("status").code == 0
    inv.site.env["PLATFORMS"] = "linux/amd64"
    result = inv("status")
    assert result.code == 2
    (error,) = result.errors
    assert error.startswith(f"error: .env:1: IMAGE: the tag with the suffix -{'d' * 32}-linux-")
    assert not inv.site.engine.tags


def test_locale_without_utf8_is_reported(inv: Inv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert "note: the locale has the encoding ascii, and" in inv("status").err


def test_variables_that_change_a_build_are_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    removed_variables = {
        "BUILDX_BUILDER": "mine",
        "BUILDX_GIT_LABELS": "full",
        "BUILDX_NO_DEFAULT_LOAD": "1",
        "DOCKER_API_VERSION": "1.24",
        "GIT_DIR": "/other/.git",
        "DOCKER_DEFAULT_PLATFORM": "linux/arm64",
        "SOURCE_DATE_EPOCH": "1",
    }
    kept_variables = {
        "BUILDX_CONFIG": "/buildx",
        "DOCKER_HOST": "unix:///x",
        "SSH_AUTH_SOCK": "/agent",
    }
    for name, value in {**removed_variables, **kept_variables}.items():
        monkeypatch.setenv(name, value)
    environment = session.engine_environment({"DOCKER_CONFIG": "/config"})
    assert not removed_variables.keys() & environment.keys()
    assert kept_variables.items() <= environment.items()


def test_missing_docker_command_is_an_error(inv: Inv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(UsageError, match="needs the docker command line"):
        Session(Context()).docker_command(inv.site.project())


def test_option_of_a_task_overrides_its_setting(inv: Inv) -> None:
    inv("base")
    project = Session(Context()).project({"GUIX_PACKAGES": ["tar"]})
    assert project.settings.guix_packages == ("tar",)
    assert project.ledger.find("base")
