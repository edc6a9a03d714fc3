"""Traced engines, which show each changing call, and dry runs, which only show it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import BASE_CONFIG, BASE_IMAGE, IMAGE, PROFILE, BufferConsole, Site, outline

from guix_tasks.commands import commit, rollback, run, shell
from guix_tasks.commands.clean import clean
from guix_tasks.commands.push import push
from guix_tasks.commands.status import status_rows, tag_statuses
from guix_tasks.commands.verify import verify
from guix_tasks.engine.accounts import Credentials
from guix_tasks.engine.api import (
    BuildSpec,
    ContainerSpec,
    Engine,
    EngineInfo,
    Image,
    NoEngine,
    build_options,
)
from guix_tasks.engine.dry_run import TracedEngine, create_argv
from guix_tasks.errors import NoEngineError
from guix_tasks.stages.images import STAGES
from guix_tasks.ui import redact

if TYPE_CHECKING:
    from collections.abc import Callable

    from guix_tasks.stages.project import Project


pytestmark = pytest.mark.usefixtures("serial_hashing")


def traced(engine: Engine, *, perform: bool) -> tuple[TracedEngine, BufferConsole]:
    console = BufferConsole()
    return TracedEngine(engine, console, perform=perform), console


class DryRun:
    """One ``inv --dry`` of several tasks on one engine."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.engine, self.console = traced(site.engine, perform=False)
        self._initial_state = (outline(site.engine), site.engine.changing_calls(), self._files())

    def _files(self) -> dict[Path, bytes]:
        return {
            path: path.read_bytes() for path in self.site.directory.rglob("*") if path.is_file()
        }

    @property
    def project(self) -> Project:
        return self.site.project(self.engine)

    def make(self, *stages: str, upstream: bool = False) -> None:
        self.site.make(*stages, engine=self.engine, upstream=upstream)

    @property
    def all_commands(self) -> list[str]:
        """The ``docker`` commands that the dry run showed, without arguments."""
        lines = [shlex.split(line) for line in self.console.text.splitlines()]
        return [short_command(line[2:]) for line in lines if line[:2] == ["+", "docker"]]

    @property
    def commands(self) -> list[str]:
        """All commands, with repeated commits merged into one."""
        commands = self.all_commands
        return [
            command
            for command, previous in zip(commands, ["", *commands], strict=False)
            if not command == previous == "commit"
        ]

    def check(self) -> None:
        assert (outline(self.site.engine), self.site.engine.changing_calls(), self._files()) == (
            self._initial_state
        )


def short_command(words: list[str]) -> str:
    return " ".join(words[:2] if words[0] in ("image", "volume") else words[:1])


SHORT_COMMANDS = {
    "copy_in": "cp",
    "run": "start",
    "create_volume": "volume create",
    "remove_volume": "volume rm",
    "untag": "image rm",
    "remove": "rm",
}
"""Commands of the calls that have another name; `drop` has none."""


def short_commands(calls: list[str]) -> list[str]:
    return [SHORT_COMMANDS.get(call, call) for call in calls if call != "drop"]


# --- Values ---------------------------------------------------------------------------------


def test_password_is_redacted() -> None:
    assert "hunter2" not in repr(Credentials("me", "hunter2"))
    # The credentials are registered as secrets.
    assert redact.clean("hunter2 bWU6aHVudGVyMg==") == "*** ***"


@pytest.mark.parametrize(
    ("url", "local"),
    [("unix:///x", True), ("tcp://127.0.0.1:1", False), ("ssh://host", False)],
)
def test_engine_on_a_socket_is_local(url: str, *, local: bool) -> None:
    assert EngineInfo(url, "", "", "", "", "", has_bridge=True).is_local == local


@pytest.mark.parametrize("config", [{}, {"Labels": None}, {"Labels": {}}])
def test_image_without_labels_has_an_empty_mapping(config: dict[str, object]) -> None:
    assert Image("", (), config, 0, "", "").labels == {}


def test_container_is_shown_as_a_docker_command() -> None:
    spec = ContainerSpec(
        name="n",
        image="i",
        command=("/entry", "a b", "$x"),
        labels={"l": "1 2"},
        environment={"E": "v w"},
        privileged=True,
        network="host",
        publish={5055: 5000},
        publish_on="10.0.0.1",
        binds=("/a:/b:ro",),
        scratch="/tmp",  # noqa: S108
        memory=1024,
        user="root",
        tty=True,
        platform="linux/arm64",
    )
    assert list(create_argv(spec)) == [
        "docker", "create", "--name=n", "--privileged", "--interactive", "--tty",
        "--network=host", "--memory=1024", "--pids-limit=-1", "--user=root",
        "--platform=linux/arm64", "--publish=10.0.0.1:5055:5000", "--volume=/a:/b:ro",
        "--volume=/tmp", "--env=E=v w", "--label=l=1 2", "--entrypoint=/entry", "i", "a b", "$x",
    ]  # fmt: skip


def test_plain_container_has_no_options() -> None:
    spec = ContainerSpec("n", "i", ("sh",))
    argv = list(create_argv(spec))
    assert argv == ["docker", "create", "--name=n", "--pids-limit=-1", "--entrypoint=sh", "i"]
    assert "--log-driver=none" in create_argv(replace(spec, logged=False))


def test_build_options_are_those_of_docker() -> None:
    spec = BuildSpec(Path("/c"), Path("/d"), {"A": "1 2"}, {"s": Path("/f")}, "linux/arm64", "host")
    assert list(build_options(spec)) == [
        "--file=/d", "--build-arg=A=1 2", "--secret=id=s,src=/f", "--platform=linux/arm64",
        "--network=host",
    ]  # fmt: skip
    assert list(build_options(BuildSpec(Path("/c"), Path("/d")))) == ["--file=/d"]


def test_missing_engine_has_no_images() -> None:
    engine = NoEngine(NoEngineError("no Docker Engine on this machine"))
    assert engine.image(IMAGE) is None
    assert not engine.is_dry


@pytest.mark.parametrize("call", ["info", "containers", "push", "create"])
def test_other_calls_of_a_missing_engine_fail(call: str) -> None:
    engine = NoEngine(NoEngineError("no Docker Engine on this machine"))
    with pytest.raises(NoEngineError, match="no Docker Engine on this machine"):
        getattr(engine, call)()


def test_import_of_tasks_and_stages_imports_neither_docker_nor_rich() -> None:
    """Rich is imported when it draws."""
    modules = "sys, guix_tasks.tasks, guix_tasks.engine.api, guix_tasks.stages.runner"
    code = f"import {modules}; assert not {{'docker', 'rich'}} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# --- Traced calls ---------------------------------------------------------------------------


def test_echo_shows_every_changing_call(site: Site) -> None:
    engine, console = traced(site.engine, perform=True)
    site.make(*STAGES, engine=engine)
    push(site.project(engine))
    lines = [shlex.split(line) for line in console.text.splitlines() if line.startswith("+")]
    assert [short_command(words[2:]) for words in lines] == short_commands(
        site.engine.changing_calls()
    )
    assert site.image("install")


def test_dropped_image_is_shown(built_site: Site) -> None:
    engine, console = traced(built_site.engine, perform=True)
    built_site.make("install", engine=engine, force=True, packages=("tar",))
    initial = set(built_site.engine.all_images)
    built_site.make("install", engine=engine, force=True, packages=("tar", "gzip"))
    dropped = initial - set(built_site.engine.all_images)
    assert dropped
    image_ids = {line.split()[-1] for line in console.text.splitlines() if "image rm" in line}
    assert image_ids == dropped


def test_traced_engine_forwards_every_call(built_site: Site) -> None:
    engine, _ = traced(built_site.engine, perform=True)
    plain = built_site.engine
    image = built_site.image("base")
    spec = BuildSpec(
        built_site.directory / "context",
        built_site.directory / "Dockerfile",
        {"BASE_IMAGE": "base:1"},
    )
    plain.make_image({}, {"/x": b""}, tag="base:1")
    assert engine.info() == plain.info()
    assert engine.image(IMAGE) == plain.image(IMAGE)
    assert engine.remote_digest(BASE_IMAGE) == plain.remote_digest(BASE_IMAGE)
    engine.create_volume("v", {"a": "b"})
    assert engine.volumes({"a": "b"}) == ["v"]
    engine.remove_volume("v")
    assert engine.volumes({"a": "b"}) == []
    container = engine.create(ContainerSpec("n", image.id, ("e", "x"), {"a": "b"}))
    assert [item.id for item in engine.containers({"a": "b"})] == [container]
    assert list(engine.run(container)) == [(False, b"ran x\n")]
    assert engine.wait(container) == 0
    engine.start(container)
    assert engine.containers({"a": "b"})[0].running
    engine.stop(container, 1)
    assert engine.wait(container) == 143
    committed = engine.commit(container, {})
    assert len(engine.layers(committed)) == len(image.layers) + 1
    assert b"".join(engine.save(committed))
    engine.remove(container)
    assert engine.containers({"a": "b"}) == []
    engine.drop(committed)
    assert engine.image(committed) is None
    assert engine.image(engine.import_rootfs(iter([b"x"]), "rootfs:1")) == engine.image("rootfs:1")
    engine.untag("rootfs:1")
    assert engine.image("rootfs:1") is None
    output: list[bytes] = []
    assert engine.image(engine.build(spec, output.append))
    assert output
    assert engine.push(IMAGE, None).startswith("sha256:")
    engine.untag(IMAGE)
    engine.pull(IMAGE, None)
    assert engine.image(IMAGE)


# --- Dry runs -------------------------------------------------------------------------------


def test_dry_run_on_an_empty_engine_shows_the_commands_of_a_run(site: Site) -> None:
    site.engine.pull(BASE_IMAGE, None)
    site.engine.calls.clear()
    dry_run = DryRun(site)
    dry_run.make(*STAGES)
    push(dry_run.project)
    dry_run.check()
    site.make(*STAGES)
    site.push()
    assert dry_run.commands == short_commands(site.engine.changing_calls())


def test_dry_run_shows_one_commit_of_a_stage(site: Site) -> None:
    dry_run = DryRun(site)
    dry_run.make("base")
    assert dry_run.all_commands.count("commit") == 1


def test_dry_run_of_install_shows_its_parents(site: Site) -> None:
    dry_run = DryRun(site)
    dry_run.make("install")
    dry_run.check()
    assert dry_run.commands.count("commit") == 3


def test_dry_run_shows_the_commands_of_stages(built_site: Site) -> None:
    dry_run = DryRun(built_site)
    built_site.env["GUIX_PACKAGES"] = "tar"
    output = built_site.make("install", engine=dry_run.engine)
    dry_run.check()
    assert "+ guix package --install=tar" in output
    assert f"install: {IMAGE}" not in output
    assert f"docker push {IMAGE}" not in dry_run.console.text


def test_dry_run_of_current_stages_shows_nothing(built_site: Site) -> None:
    dry_run = DryRun(built_site)
    dry_run.make(*STAGES)
    dry_run.check()
    assert dry_run.commands == []


def test_dry_run_after_a_change_shows_the_commands_of_a_run(built_site: Site) -> None:
    built_site.engine.make_image(BASE_CONFIG, {PROFILE: b"certs tar"}, tag=BASE_IMAGE)
    dry_run, start = DryRun(built_site), len(built_site.engine.changing_calls())
    dry_run.make("install", upstream=True)
    dry_run.check()
    built_site.make("install", upstream=True)
    assert dry_run.commands == short_commands(built_site.engine.changing_calls()[start:])


def test_dry_run_stages_see_each_other(built_site: Site) -> None:
    """A dry pull returns no channels, so the existing lock is used."""
    built_site.write("Dockerfile", "FROM y\n")
    dry_run = DryRun(built_site)
    dry_run.make("base")
    dry_run.make("pull")
    dry_run.make("install")
    dry_run.check()
    assert dry_run.commands.count("commit") == 3


def test_dry_run_of_status_works_after_a_stage(site: Site) -> None:
    dry_run = DryRun(site)
    dry_run.make("base")
    assert status_rows(tag_statuses(dry_run.project))
    dry_run.check()


def run_true(project: Project) -> object:
    return run.run(project, ["true"], stage=None, keep=False)


DRY: dict[str, Callable[[Project], object]] = {
    "clean": clean,
    "push": push,
    "run": run_true,
    "rollback": rollback.rollback,
}


@pytest.mark.parametrize("task", DRY.values(), ids=DRY)
def test_dry_run_of_a_task_shows_the_commands_of_a_run(
    built_site: Site, task: Callable[[Project], object]
) -> None:
    dry_run, start = DryRun(built_site), len(built_site.engine.changing_calls())
    task(dry_run.project)
    dry_run.check()
    task(built_site.project())
    assert dry_run.commands == short_commands(built_site.engine.changing_calls()[start:])
    assert dry_run.commands


def test_dry_run_of_verify_checks_nothing_and_succeeds(built_site: Site) -> None:
    dry_run = DryRun(built_site)
    verify(dry_run.project)
    dry_run.check()


def keep_container(built_site: Site) -> None:
    run.run(built_site.project(), ["make"], stage=None, keep=True)


def test_dry_run_of_commit_shows_its_commands(built_site: Site) -> None:
    keep_container(built_site)
    dry_run = DryRun(built_site)
    commit.commit(dry_run.project)
    dry_run.check()
    assert dry_run.commands == ["commit", "tag", "tag", "rm"]


def test_dry_run_of_shell_starts_nothing(built_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(subprocess, "call", lambda argv, **_: calls.append(argv))
    dry_run = DryRun(built_site)
    shell.shell(dry_run.project, ["docker"], {}, stage=None, fresh=False)
    dry_run.check()
    assert calls == []


def test_proxy_password_is_not_shown(built_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, console = traced(built_site.engine, perform=True)
    project = built_site.project(engine)
    object.__setattr__(project.settings, "proxies", {"https_proxy": "http://me:hunter2@p.test"})
    verify(project)
    assert "docker create" in console.text
    assert "hunter2" not in console.text
