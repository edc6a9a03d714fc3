"""What a user gets from ``inv``: one line and an exit code for each fault, and no secret."""

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
    forget_contents,
    new_site,
    outline,
    serial,
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
    """``inv`` in a project's directory, with its engine behind it."""

    site: Site
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    opened: list[str] = field(default_factory=list)
    tasks: Collection = field(default_factory=lambda: ns)

    def __call__(self, *argv: str) -> Result:
        session._engines.clear()
        files_module._digest_of_state.cache_clear()
        forget_contents()
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
        seen = self.capsys.readouterr()
        assert "Traceback" not in seen.err
        return Result(code, seen.out, seen.err)

    def make_engine(self, address: discovery.Address, _environ: object) -> FakeEngine:
        self.opened.append(address.url)
        return self.site.engine


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of this machine: no engine, no settings, no user's files."""
    for name in DECLARATIONS:
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("ENV_FILE", raising=False)
    monkeypatch.setattr(discovery, "DEFAULT_SOCKET", tmp_path / "no.sock")
    monkeypatch.setattr(files_module, "ThreadPoolExecutor", serial)
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
    made = Inv(site, capsys, monkeypatch)
    monkeypatch.setattr(podman, "open_engine", made.make_engine)
    return made


# --- What is done ---------------------------------------------------------------------------


def test_the_whole_way_prints_the_digest_alone_on_standard_output(inv: Inv) -> None:
    done = inv("base", "pull", "install", "commit", "push")
    assert done.code == 0
    digest = done.out.strip()
    assert digest.startswith(f"{IMAGE}@sha256:")
    assert len(done.out.splitlines()) == 1
    found = inv.site.engine.registry.find(IMAGE)
    assert found
    assert found.layers == inv.site.image("install").layers


def test_a_pack_prints_its_file_alone_and_takes_what_guix_takes(inv: Inv) -> None:
    inv("base", "pull", "install")
    item, scripts = f"/gnu/store/{'0' * 32}-hello-docker-pack.tar.gz", []

    def behaviour(container: FakeContainer) -> Output:
        scripts.append(container.text(container.argv[0]))
        yield False, f"is packed:hello\t1.0\n{item}\n".encode()
        container.write(item, "packed")

    inv.site.engine.behaviour = behaviour
    done = inv(
        "pack", "--package=hello", "--relocatable", "--relocatable", "--symlink=/bin=bin",
        "--symlink=/share=share", "--format=docker", "--max-layers=9", "--name=x",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out == f"{inv.site.directory}/out/x-1.0-x86_64-linux.docker.tar.gz\n"
    (script,) = scripts
    assert script.count(" --relocatable") == 2
    assert " --symlink=/bin=bin --symlink=/share=share --max-layers=9 " in script


def test_a_release_needs_no_engine(inv: Inv) -> None:
    inv.opened.clear()
    assert inv("release").errors[0].startswith("error: nothing to release: ")
    part = {"system": "x86_64-linux", "format": "tarball", "file": "x", "sha256": "1"}
    inv.site.write("out/build-x86_64-linux.json", json.dumps({**part, "channels": []}))
    path = inv.site.directory / "out" / "build.json"
    assert inv("--dry", "release", "--url=https://a.test").code == 0
    assert not path.exists()
    done = inv("release", "--url=https://a.test")
    assert (done.code, done.out) == (0, f"{path}\n")
    assert json.loads(path.read_text())["x86_64-linux"]["url"] == "https://a.test/x"
    done = inv("release", "--url=ftp://a.test")
    assert (done.code, len(done.errors)) == (2, 1)
    assert done.errors[0].startswith("error: option --url: ")
    assert inv.opened == []


def test_the_first_line_names_the_engine_once(inv: Inv) -> None:
    done = inv("base", "pull", "install")
    assert done.err.splitlines()[0] == "engine: fake at unix:///fake.sock (fake), Docker 28"
    assert done.err.count("engine: ") == 1
    assert inv.opened == ["unix:///fake.sock"]


def test_three_calls_are_the_same_as_one(inv: Inv, tmp_path: Path) -> None:
    inv("pull", "install", "push")
    together = outline(inv.site.engine)
    other = new_site(tmp_path / "other", inv.site.engine.registry)
    other.write("tasks.py", "")
    inv.monkeypatch.chdir(other.directory)
    apart = Inv(other, inv.capsys, inv.monkeypatch)
    inv.monkeypatch.setattr(podman, "open_engine", apart.make_engine)
    assert [apart(task).code for task in ("pull", "install", "push")] == [0, 0, 0]
    assert outline(other.engine) == together


def test_package_is_for_one_call_and_push_knows(inv: Inv) -> None:
    inv("install", "--package", "tar", "--package", "gzip")
    assert "tar" in inv.site.image().labels["org.guix-tasks.packages"]
    assert inv("push").code == 0
    inv("install")
    assert "tar" not in inv.site.image().labels["org.guix-tasks.packages"]


def test_the_options_of_the_stages_are_handed_on(inv: Inv) -> None:
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
    before = inv.site.image("base").id
    inv("base", "--force")
    assert inv.site.image("base").id != before


def test_run_keeps_arguments_exactly_and_passes_the_status_on(
    inv: Inv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    inv("install")
    done = inv("run", "--", "printf", "a b", "--keep", "--", "$x")
    assert done.code == 0
    assert inv.site.engine.specs[-1].command[1:] == ("printf", "a b", "--keep", "--", "$x")
    assert done.out.startswith("ran printf 'a b' --keep")

    def behaviour(container: FakeContainer) -> Output:
        container.status = 42
        yield True, b"no\n"

    inv.site.engine.behaviour = behaviour
    assert inv("run", "--", "false").code == 42


def test_status_clean_and_rollback(inv: Inv) -> None:
    inv("install")
    done = inv("status")
    assert done.out.count("up to date") == 3
    assert inv("rollback").code == 0
    assert "removed" not in inv("--dry", "clean").err
    said = inv("clean").err.splitlines()
    removed = [line for line in said if line.startswith("clean: removed ")]
    assert f"clean: removed {IMAGE}" in removed
    assert f"clean: removed {IMAGE}-base" in removed
    assert f"clean: {len(removed)} removed" in said
    assert not [tag for tag in inv.site.engine.tags if tag != BASE_IMAGE]
    assert "clean: nothing to remove" in inv("clean").err


def test_dry_changes_nothing_and_shows_everything(inv: Inv) -> None:
    # Without a lock a dry pull cannot tell its channels; see test_engine.
    inv.site.write("channels.lock.scm", LOCK)
    before = inv.site.engine.changing_calls()
    done = inv("--dry", "base", "pull", "install", "push")
    assert done.code == 0
    assert done.out == ""
    assert inv.site.engine.changing_calls() == before
    for command in ("build", "create", "commit", "tag", "push"):
        assert f"+ docker {command} " in done.err
    assert inv.site.lock.read_text() == LOCK


def test_settings_are_those_of_the_project_from_any_folder_of_it(inv: Inv) -> None:
    (inv.site.directory / "deep" / "er").mkdir(parents=True)
    inv.monkeypatch.chdir(inv.site.directory / "deep" / "er")
    assert inv("base").code == 0
    assert f"{IMAGE}-base" in inv.site.engine.tags


def test_a_note_of_the_settings_is_said(inv: Inv) -> None:
    inv.site.env["SOMETHING_ELSE"] = "1"
    assert "note: .env:" in inv("status").err


# --- Several platforms ----------------------------------------------------------------------

BOTH = "linux/amd64 linux/386"


def test_each_platform_is_made_and_pushed_in_turn(inv: Inv) -> None:
    inv.site.env["PLATFORMS"] = BOTH
    done = inv("base", "pull", "install", "verify", "push")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.partition("@")[0] for line in lines if "@" in line] == [
        f"{IMAGE}-linux-amd64", f"{IMAGE}-linux-386",
    ]  # fmt: skip
    files = (inv.site.directory / "out" / "digests").iterdir()
    assert sorted(each.name for each in files) == ["linux-386.json", "linux-amd64.json"]
    assert inv("status").out.count("up to date") == 6
    assert "removed" in inv("clean").err
    assert not [tag for tag in inv.site.engine.tags if tag != BASE_IMAGE]


def test_an_update_is_one_for_all_platforms(inv: Inv) -> None:
    """Even where there is something newer by the time that it is the next one's turn."""
    inv.site.env["PLATFORMS"] = BOTH
    inv("pull")
    engine, guix = inv.site.engine, inv.site.engine.guix
    heads = iter("cde")

    def behaviour(container: FakeContainer) -> Output:
        guix.heads["guix"] = next(heads) * 40
        return guix(container)

    engine.behaviour = behaviour
    assert inv("pull", "--update").code == 0
    labels = [engine.tags[f"{IMAGE}-pull{suffix}"] for suffix in ("", "-linux-386")]
    channels = {engine.all_images[each].labels["org.guix-tasks.channels"] for each in labels}
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
def test_a_task_for_one_platform_refuses_several(inv: Inv, argv: tuple[str, ...]) -> None:
    inv.site.env["PLATFORMS"] = BOTH
    done = inv(*argv)
    assert done.code == 2
    assert done.errors == [
        "error: PLATFORMS has several platforms; choose one, as in PLATFORMS=linux/amd64 inv ..."
    ]
    assert inv.site.engine.changing_calls() == []


def test_a_task_for_one_platform_takes_one(inv: Inv) -> None:
    inv.site.env["PLATFORMS"] = "linux/386"
    inv("install")
    assert inv("install", "--no-commit", "--force", "--package", "tar").code == 0
    assert inv("commit").code == 0
    assert inv("rollback").code == 0
    assert f"{IMAGE}-linux-386" in inv.site.engine.tags


def test_an_emulated_platform_is_one_line(inv: Inv) -> None:
    inv.site.env["PLATFORMS"] = "linux/arm64"
    done = inv("install")
    assert done.code == 2
    assert "GUIX_SANDBOX=nochroot" in done.errors[0]


# --- The BuildKit way -----------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBuildx:
    """A buildx on this machine, without a builder."""
    made = FakeBuildx(tmp_path / "buildx", answers={"resolved": LOCK.strip(), "pull": LOCK.strip()})
    monkeypatch.setattr(buildx, "find_program", lambda *_: made.path)
    return made


def test_setup_build_and_down(inv: Inv, fake: FakeBuildx) -> None:
    done = inv("buildx.setup", "buildx.build", "buildx.status")
    assert done.code == 0
    first, header, row, cache = done.out.splitlines()
    assert first == f"{IMAGE}@{DIGEST}"
    assert header.split()[0] == "node"
    assert row.startswith(f"{NAME}0  unix:///fake.sock  running")
    assert cache == "cache: 1.23GB"
    assert inv.site.lock.read_text() == LOCK
    assert inv("buildx.down", "--keep-cache").code == 0
    assert fake.state["builders"] == {}
    assert fake.changes()[-1] == f"rm --keep-state {NAME}"


def test_buildx_is_set_to_the_engine_of_the_project(inv: Inv, fake: FakeBuildx) -> None:
    inv.monkeypatch.setenv("DOCKER_CONTEXT", "")
    inv.monkeypatch.setenv("BUILDX_BUILDER", "theirs")
    inv("buildx.setup")
    for call in fake.calls():
        assert call.env["DOCKER_HOST"] == "unix:///fake.sock"
        assert "BUILDX_BUILDER" not in call.env
    assert "theirs" in fake.state["builders"]


def test_the_options_of_a_build_are_handed_on(inv: Inv, fake: FakeBuildx) -> None:
    inv("buildx.setup")
    assert inv("buildx.build", "--no-pull", "--force", "--by-digest").code == 0
    call = fake.calls("bake")[-1]
    assert "AS pull" not in call.files["Dockerfile"]
    assert call.files["work/install/again"]
    assert "push-by-digest=true" in call.target["output"][0]
    assert inv("buildx.build", "--update").code == 0
    assert "AS resolving" in fake.calls("bake")[-3].files["Dockerfile"]


def test_the_options_of_a_setup_are_handed_on(inv: Inv, fake: FakeBuildx) -> None:
    inv("buildx.setup")
    assert inv("buildx.setup", "--recreate", "--use").code == 0
    assert fake.calls("rm")
    assert fake.state["selected"] == NAME


def test_a_dry_setup_and_build_show_and_change_nothing(inv: Inv, fake: FakeBuildx) -> None:
    done = inv("--dry", "buildx.setup")
    assert done.code == 0
    assert f"+ docker buildx create --name={NAME}" in done.err
    assert fake.changes() == []
    fake.add()
    done = inv("--dry", "buildx.build", "buildx.down")
    assert (done.code, done.out) == (0, "")
    assert done.err.count("+ docker buildx bake") == 3
    assert f"+ docker buildx rm {NAME}" in done.err
    assert fake.changes() == []
    assert inv.site.engine.changing_calls() == []


def test_echo_shows_the_calls_of_buildx_and_makes_them(inv: Inv, fake: FakeBuildx) -> None:
    done = inv("--echo", "buildx.setup")
    assert f"+ docker buildx inspect --bootstrap {NAME}" in done.err
    assert NAME in fake.state["builders"]


def test_a_builder_that_is_missing_is_one_line(inv: Inv, fake: FakeBuildx) -> None:
    for task in ("buildx.build", "buildx.status"):
        done = inv(task)
        assert done.code == 6
        assert done.errors == [
            f"error: there is no builder '{NAME}'; `inv buildx.setup` creates it"
        ]
    assert fake.changes() == []


def test_a_step_that_fails_has_the_exit_code_of_a_stage(inv: Inv, fake: FakeBuildx) -> None:
    fake.add()
    fake.fail(
        'ERROR: target reports: failed to solve: process "/var/guix/guix-tasks/entry-point.sh '
        '/var/guix/guix-tasks/stage install" did not complete successfully: exit code: 1',
        "bake",
        "reports",
    )
    done = inv("buildx.build")
    assert (done.code, done.out) == (4, "")
    assert done.errors[0].startswith("error: install: the command failed with exit status 1")


@pytest.mark.parametrize("task", ["buildx.build", "buildx.status", "buildx.down", "manifest"])
def test_without_buildx_setup_is_named(inv: Inv, task: str) -> None:
    inv.monkeypatch.setattr(buildx, "find_program", lambda *_: None)
    done = inv(task)
    assert done.code == 6
    assert done.errors == [
        "error: buildx is not installed; `inv buildx.setup` installs it for your user"
    ]


def plugin_at(inv: Inv, fake: FakeBuildx) -> Path:
    """Let there be no buildx but the one that is installed; where that will be."""
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
    target = plugin_at(inv, fake)
    assert inv("buildx.build").code == 6
    assert not target.exists()
    assert inv("--dry", "buildx.setup").code == 6
    assert not target.exists()
    assert inv("buildx.setup").code == 0
    assert os.access(target, os.X_OK)
    assert NAME in fake.state["builders"]
    assert inv("buildx.build").code == 0


def test_the_plugin_alone_needs_no_engine_and_makes_no_builder(inv: Inv, fake: FakeBuildx) -> None:
    target = plugin_at(inv, fake)
    inv.monkeypatch.delenv("DOCKER_HOST")
    assert inv("buildx.setup", "--plugin").code == 0
    assert os.access(target, os.X_OK)
    assert inv.opened == []
    assert fake.calls() == []


@pytest.mark.parametrize(
    ("driver", "nodes"), [("remote", "tcp://b.test:1"), ("docker-container", "ssh://b.test")]
)
def test_buildkit_on_another_machine_needs_no_engine_here(
    inv: Inv, fake: FakeBuildx, driver: str, nodes: str
) -> None:
    inv.monkeypatch.delenv("DOCKER_HOST")
    inv.site.env.update(BUILDX_DRIVER=driver, BUILDX_NODES=nodes)
    done = inv("buildx.setup", "buildx.build", "buildx.status", "buildx.down")
    assert (done.code, done.errors) == (0, [])
    assert done.out.startswith(f"{IMAGE}@{DIGEST}\n")
    assert inv.opened == []


@pytest.mark.parametrize("driver", ["docker-container", "docker"])
def test_buildkit_on_the_engine_needs_it(inv: Inv, fake: FakeBuildx, driver: str) -> None:
    inv.monkeypatch.delenv("DOCKER_HOST")
    inv.site.env["BUILDX_DRIVER"] = driver
    done = inv("buildx.setup")
    assert done.code == 3
    assert "no Docker Engine on this machine" in done.errors[0]
    assert fake.calls() == []


def test_joining_needs_no_engine(inv: Inv, fake: FakeBuildx) -> None:
    inv.monkeypatch.delenv("DOCKER_HOST")
    done = inv("manifest")
    assert done.code == 2
    assert "no push record of registry.test/team/app" in done.errors[0]


def test_bad_settings_of_the_buildkit_way_are_told(inv: Inv, fake: FakeBuildx) -> None:
    inv.site.env.update(BUILDX_DRIVER="remote")
    done = inv("buildx.setup")
    assert done.code == 2
    assert "BUILDX_NODES" in done.errors[0]
    assert fake.calls() == []


# --- What goes wrong ------------------------------------------------------------------------


def test_all_bad_settings_are_told(inv: Inv) -> None:
    inv.site.env.update(IMAGE="Bad Image", STAGE_MEMORY="much")
    done = inv("pull")
    assert done.code == 2
    assert len(done.errors) == 2
    assert ".env:1: IMAGE" in done.errors[0] + done.errors[1]
    assert inv.opened == []


def test_usage(inv: Inv) -> None:
    done = inv("push")
    assert done.code == 2
    (error,) = done.errors
    assert error.startswith(f"error: {IMAGE} does not exist on this engine; run `inv install`, or")


def test_no_engine(inv: Inv) -> None:
    inv.monkeypatch.delenv("DOCKER_HOST")
    done = inv("pull")
    assert done.code == 3
    (line,) = done.errors
    assert "no Docker Engine on this machine" in line
    assert "`inv engine.up`" in line


@pytest.mark.parametrize(
    "call", ["containers", "create", "copy_in", "run", "wait", "commit", "tag"]
)
def test_an_engine_that_dies(inv: Inv, call: str) -> None:
    inv("base")
    before = outline(inv.site.engine)

    def fault(_number: int, name: str, _when: str) -> None:
        if name == call:
            raise EngineError("the Docker Engine does not answer; start it")

    inv.site.engine.fault = fault
    done = inv("pull")
    inv.site.engine.fault = lambda *_: None
    assert done.code == 3
    assert done.errors == ["error: the Docker Engine does not answer; start it"]
    assert inv.site.engine.all_containers == {}
    assert outline(inv.site.engine) == before


def test_a_command_of_guix_that_fails(inv: Inv) -> None:
    inv("install")
    before = outline(inv.site.engine)
    inv.site.env["GUIX_PACKAGES"] = "no-such-package"
    done = inv("install")
    assert done.code == 4
    assert len(done.errors) == 1
    assert "guix package: error: no-such-package: unknown package" in done.err
    assert outline(inv.site.engine) == before
    assert inv.site.engine.all_containers == {}


def test_a_stage_that_fails_ends_the_call(inv: Inv) -> None:
    inv.site.env["GUIX_PACKAGES"] = "no-such-package"
    assert inv("pull", "install", "push").code == 4
    assert "push" not in inv.site.engine.changing_calls()


@pytest.mark.parametrize("refusal", ["connection refused", "denied"])
def test_a_registry_that_refuses(inv: Inv, refusal: str) -> None:
    inv("install")
    inv.site.engine.registry.refusal = refusal
    done = inv("push")
    assert done.code == 5
    assert done.out == ""
    assert len(done.errors) == 1


def test_a_build_that_fails(inv: Inv) -> None:
    inv.site.env["BASE_IMAGE"] = "registry.test/none:1"
    done = inv("base")
    assert done.code == 6
    assert "registry.test/none:1" in done.errors[0]
    assert inv.site.engine.tags == {}


def test_a_check_that_fails(inv: Inv) -> None:
    inv("install")
    inv.site.engine.guix.failing["certificates"] = "none"
    done = inv("verify")
    assert done.code == 1
    assert done.errors == [f"error: verify: {IMAGE} failed: certificates"]


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("stage", ["pull", "install"])
def test_interrupted(inv: Inv, how: str, stage: str) -> None:
    inv("install")
    before = outline(inv.site.engine)
    handler = signal.getsignal(signal.SIGTERM)

    def behaviour(_container: FakeContainer) -> Output:
        yield True, b"half\n"
        if how == "Ctrl-C":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        yield True, b"more\n"

    inv.site.engine.behaviour = behaviour
    done = inv(stage, "--force")
    assert done.code == 130
    assert len(done.errors) == 1
    assert outline(inv.site.engine) == before
    assert inv.site.engine.all_containers == {}
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("package", "modules", "again"),
    [
        ("docker", ["docker"], "guix_tasks.engine.docker"),
        ("requests", ["requests"], "guix_tasks.engine.docker"),
        ("dotenv", ["dotenv", "dotenv.parser", "dotenv.variables"], "guix_tasks.settings"),
    ],
)
def test_an_inv_that_lacks_a_package_says_so(
    inv: Inv, package: str, modules: list[str], again: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in modules:
            patch.setitem(sys.modules, name, None)
        patch.delitem(sys.modules, "guix_tasks.cli.session")
        for name in [each for each in sys.modules if each == again or each.startswith(f"{again}.")]:
            patch.delitem(sys.modules, name)
        done = inv("pull")
    assert done.code == 2
    (line,) = done.errors
    assert f"cannot import the package {package}" in line
    assert sys.executable in line
    assert "use ./inv" in line


def test_another_module_that_is_missing_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError), errors.report_errors():
        raise ModuleNotFoundError("No module named 'mine'", name="mine")


def test_a_full_disk_of_temporary_files_names_tmpdir(
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


def test_an_exit_of_a_task_passes() -> None:
    with pytest.raises(Exit) as caught, errors.report_errors():
        raise Exit(code=9)
    assert caught.value.code == 9


@pytest.mark.parametrize("value", ["no-such-directory", "Dockerfile"])
def test_a_context_that_is_no_folder_is_one_line(inv: Inv, value: str) -> None:
    inv.site.env["BUILD_CONTEXT"] = value
    done = inv("base")
    assert done.code == 2
    assert "BUILD_CONTEXT" in done.errors[0]


@pytest.mark.parametrize(
    ("setting", "name"),
    [("GUIX_MANIFEST", "manifest.scm"), ("GUIX_SUBSTITUTE_KEYS", "a.pub"), ("MOUNTS", "data")],
)
def test_a_file_that_may_not_be_read_is_one_line(inv: Inv, setting: str, name: str) -> None:
    inv.site.write(name, "x")
    inv.site.env[setting] = f"{name}:/mnt" if setting == "MOUNTS" else name
    real = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self)

    inv.monkeypatch.setattr(Path, "read_bytes", read_bytes)
    done = inv("install")
    assert done.code in {2, 3}
    assert name in done.errors[0]
    assert inv.site.engine.all_containers == {}


def test_a_dockerfile_that_is_not_there_is_one_line(inv: Inv) -> None:
    inv.site.env["DOCKERFILE"] = "no/Dockerfile"
    done = inv("base")
    assert done.code == 2
    assert "DOCKERFILE: " in done.errors[0]


def test_the_demo_is_never_dry(inv: Inv) -> None:
    inv.tasks = Collection(dev.tasks.demo)
    done = inv("--dry", "demo")
    assert done.code == 2
    assert "leave --dry out" in done.errors[0]
    assert inv.site.engine.calls == []


def test_demo_makes_the_files_that_its_settings_name(inv: Inv, tmp_path: Path) -> None:
    """A fresh checkout has none of them."""
    example = tmp_path / "checkout" / dev.demo.ENV_FILE
    example.parent.mkdir(parents=True)
    example.write_text((Path(dev.tasks.CHECKOUT) / dev.demo.ENV_FILE).read_text())
    (tmp_path / "checkout" / "Dockerfile").write_text("FROM base\n")

    def prepare(_engine: object, _console: object, directory: Path) -> int:
        made = directory / "examples" / "offline" / "out"
        made.mkdir()
        for name in ("channels.scm", "substitutes.pub"):
            (made / name).write_text(LOCK)
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


def test_rootfs_does_not_replace_an_image_that_projects_use(inv: Inv) -> None:
    image = inv.site.engine.make_image({}, {}, tag=BASE_TAG)
    done = inv("rootfs")
    assert "is on the engine; `inv rootfs --force` makes it again" in done.err
    assert inv.site.engine.tags[BASE_TAG] == image.id


@pytest.mark.parametrize("task", ["demo", "test"])
def test_what_is_for_a_checkout_of_guix_tasks_is_no_task_of_a_project(inv: Inv, task: str) -> None:
    assert inv(task).err == f"No idea what '{task}' is!\n"


# --- Secrets --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [(), ("--echo",), ("--dry",)], ids=str)
def test_no_secret_is_shown_or_kept(inv: Inv, mode: tuple[str, ...]) -> None:
    inv.site.write("channels.lock.scm", LOCK)
    inv.site.env.update(
        DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD, CACHE_IMAGE="registry.test/cache"
    )
    inv.site.write("secret", PASSWORD)
    inv.site.env["BUILD_SECRETS"] = "token=secret"
    engine, shown = inv.site.engine, ""
    for tasks in (("base",), ("pull", "install", "push", "status", "verify"), ("clean",)):
        done = inv(*mode, *tasks)
        assert done.code == 0
        shown += done.out + done.err
    kept = repr((engine.calls, engine.specs, engine.all_images, engine.registry.images))
    assert PASSWORD not in shown + kept
    assert "some-user" not in shown
    if not mode:
        assert {seen.password for seen in engine.registry.seen if seen} == {PASSWORD}


def test_an_engine_and_a_registry_that_repeat_a_secret_are_not_repeated(inv: Inv) -> None:
    inv.site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    inv("install")
    inv.site.engine.registry.refusal = (
        f"unauthorized: {PASSWORD} of https://other:password@registry.test/token?token=abc-def"
    )
    done = inv("push")
    assert done.code == 5
    assert "unauthorized: *** of https://***@registry.test/token?token=***" in done.errors[0]
    assert PASSWORD not in done.err + repr(inv.site.engine.calls)


def test_settings_that_are_wrong_show_no_secret(inv: Inv) -> None:
    inv.monkeypatch.setenv("https_proxy", f"http://me:{PASSWORD}@proxy.test")
    inv.site.env.update(
        TAGS=f"bad/{PASSWORD}",
        BUILDX_CACHE_TO='type=s3,secret_access_key=hunter3,a="',
        NETWORK="https://me:hunter4@x/",
    )
    done = inv("status")
    assert done.code == 2
    assert len(done.errors) == 3
    assert not [each for each in (PASSWORD, "hunter3", "hunter4") if each in done.err]


def test_a_build_argument_that_is_secret_is_pointed_out_and_not_shown(inv: Inv) -> None:
    inv.site.env["BUILD_ARGS"] = "VERSION=1.0 NPM_TOKEN=hunter2 proxy=http://me:hunter3@x"
    done = inv("--dry", "base")
    assert done.code == 0
    assert "note: .env:" in done.err
    assert "the history of the image shows NPM_TOKEN to everyone who has the image" in done.err
    assert "--build-arg=VERSION=1.0" in done.err
    assert "hunter" not in done.err + done.out


def test_a_bug_is_told_without_secrets(inv: Inv) -> None:
    inv.site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
    inv("status")

    def bug() -> None:
        raise LookupError(PASSWORD) from ValueError(f"https://me:pass@x {PASSWORD}")

    try:
        bug()
    except LookupError as error:
        sys.excepthook(type(error), error, error.__traceback__)
        thread = threading.current_thread()
        threading.excepthook(
            threading.ExceptHookArgs((type(error), error, error.__traceback__, thread))
        )
    said = inv.capsys.readouterr().err
    assert said.count("LookupError: ***") == 2
    assert said.count("ValueError: https://***@x ***") == 2
    assert PASSWORD not in said


def test_what_libraries_log_for_debugging_holds_no_secret(inv: Inv) -> None:
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    handler.setFormatter(logging.Formatter("log: %(message)s"))
    logging.root.addHandler(handler)
    try:
        inv.site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD=PASSWORD)
        inv("status")
        inv("status")
        logging.getLogger("urllib3").warning("POST /build?x=%s", quote(PASSWORD))
    finally:
        logging.root.removeHandler(handler)
    assert heard.getvalue().splitlines()[-1] == "log: POST /build?x=***"


# --- Odds -----------------------------------------------------------------------------------


def test_the_project_is_the_nearest_folder_with_tasks(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    assert project_directory(deep) == deep
    (tmp_path / "a" / "tasks.py").touch()
    assert project_directory(deep) == tmp_path / "a"
    (tmp_path / "a" / "b" / "tasks.py").touch()
    assert project_directory(deep) == tmp_path / "a" / "b"


def test_the_docker_command_finds_the_projects_engine(
    inv: Inv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/docker")
    argv, environment = Session(Context()).docker_command(inv.site.project())
    assert argv == ["/usr/bin/docker"]
    assert environment["DOCKER_HOST"] == "unix:///fake.sock"


def test_the_docker_command_takes_a_context_with_all_that_it_has(
    inv: Inv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates, too, which an address alone has not."""
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/docker")
    engine = inv.site.engine
    engine.about = replace(engine.about, url="tcp://far.test:2376", context="far")
    _, environment = Session(Context()).docker_command(inv.site.project())
    assert environment["DOCKER_CONTEXT"] == "far"
    assert not environment["DOCKER_HOST"]


def test_tag_that_is_too_long_for_a_custom_stage_is_an_error_of_the_settings(
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


def test_locale_without_utf8_is_worth_a_note(inv: Inv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert "note: the locale has the encoding ascii, and" in inv("status").err


def test_variables_that_change_a_build_do_not_reach_dockers_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped = {
        "BUILDX_BUILDER": "mine",
        "BUILDX_GIT_LABELS": "full",
        "BUILDX_NO_DEFAULT_LOAD": "1",
        "DOCKER_API_VERSION": "1.24",
        "GIT_DIR": "/other/.git",
        "DOCKER_DEFAULT_PLATFORM": "linux/arm64",
        "SOURCE_DATE_EPOCH": "1",
    }
    kept = {"BUILDX_CONFIG": "/buildx", "DOCKER_HOST": "unix:///x", "SSH_AUTH_SOCK": "/agent"}
    for name, value in {**dropped, **kept}.items():
        monkeypatch.setenv(name, value)
    environment = session.engine_environment({"DOCKER_CONFIG": "/config"})
    assert not dropped.keys() & environment.keys()
    assert kept.items() <= environment.items()


def test_without_the_docker_command_there_is_no_terminal(
    inv: Inv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(UsageError, match="needs the docker command line"):
        Session(Context()).docker_command(inv.site.project())


def test_option_of_a_task_overrides_its_setting(inv: Inv) -> None:
    inv("base")
    project = Session(Context()).project({"GUIX_PACKAGES": ["tar"]})
    assert project.settings.guix_packages == ("tar",)
    assert project.ledger.find("base")
