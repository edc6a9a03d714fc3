"""What is shown of the calls of an engine, and a dry run that leaves it at that."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import BASE_CONFIG, BASE_IMAGE, IMAGE, PROFILE, FakeEngine, Heard, Site, outline

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


def traced(engine: Engine, *, perform: bool) -> tuple[TracedEngine, Heard]:
    console = Heard()
    return TracedEngine(engine, console, perform=perform), console


class Dry:
    """One ``inv --dry`` of several tasks, which share an engine."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.engine, self.console = traced(site.engine, perform=False)
        self._before = (outline(site.engine), site.engine.changing_calls(), self._files())

    def _files(self) -> dict[Path, bytes]:
        return {
            each: each.read_bytes() for each in self.site.directory.rglob("*") if each.is_file()
        }

    @property
    def project(self) -> Project:
        return self.site.project(self.engine)

    def make(self, *stages: str, upstream: bool = False) -> None:
        self.site.make(*stages, engine=self.engine, upstream=upstream)

    @property
    def all_shown(self) -> list[str]:
        """The ``docker`` commands that were shown, without their arguments."""
        lines = [shlex.split(line) for line in self.console.text.splitlines()]
        return [verb(line[2:]) for line in lines if line[:2] == ["+", "docker"]]

    @property
    def shown(self) -> list[str]:
        """The same, but for a second commit; see the test of that."""
        shown = self.all_shown
        return [
            word
            for word, before in zip(shown, ["", *shown], strict=False)
            if not word == before == "commit"
        ]

    def check(self) -> None:
        assert (outline(self.site.engine), self.site.engine.changing_calls(), self._files()) == (
            self._before
        )


def verb(words: list[str]) -> str:
    return " ".join(words[:2] if words[0] in ("image", "volume") else words[:1])


VERBS = {
    "copy_in": "cp",
    "run": "start",
    "create_volume": "volume create",
    "remove_volume": "volume rm",
    "untag": "image rm",
    "remove": "rm",
}
"""What a call is shown as, where that is not its own name; `drop` is not shown."""


def verbs(calls: list[str]) -> list[str]:
    return [VERBS.get(call, call) for call in calls if call != "drop"]


# --- The values -----------------------------------------------------------------------------


def test_the_fakes_and_the_traced_one_are_engines() -> None:
    engines: list[Engine] = [FakeEngine(), traced(FakeEngine(), perform=True)[0]]
    assert len(engines) == 2


def test_a_password_does_not_show() -> None:
    assert "hunter2" not in repr(Credentials("me", "hunter2"))
    # Wherever they come from, nobody who speaks shows them.
    assert redact.clean("hunter2 bWU6aHVudGVyMg==") == "*** ***"


@pytest.mark.parametrize(
    ("url", "local"),
    [("unix:///x", True), ("tcp://127.0.0.1:1", False), ("ssh://host", False)],
)
def test_an_engine_is_local_on_a_socket(url: str, *, local: bool) -> None:
    assert EngineInfo(url, "", "", "", "", "", has_bridge=True).is_local == local


@pytest.mark.parametrize("config", [{}, {"Labels": None}, {"Labels": {}}])
def test_an_image_without_labels(config: dict[str, object]) -> None:
    assert Image("", (), config, 0, "", "").labels == {}


def test_a_container_is_shown_as_docker_would_make_it() -> None:
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


def test_a_plain_container_has_no_options() -> None:
    spec = ContainerSpec("n", "i", ("sh",))
    argv = list(create_argv(spec))
    assert argv == ["docker", "create", "--name=n", "--pids-limit=-1", "--entrypoint=sh", "i"]
    assert "--log-driver=none" in create_argv(replace(spec, logged=False))


def test_the_options_of_a_build() -> None:
    spec = BuildSpec(Path("/c"), Path("/d"), {"A": "1 2"}, {"s": Path("/f")}, "linux/arm64", "host")
    assert list(build_options(spec)) == [
        "--file=/d", "--build-arg=A=1 2", "--secret=id=s,src=/f", "--platform=linux/arm64",
        "--network=host",
    ]  # fmt: skip
    assert list(build_options(BuildSpec(Path("/c"), Path("/d")))) == ["--file=/d"]


def test_where_no_engine_is_needed_there_is_one_without_images() -> None:
    engine = NoEngine(NoEngineError("no Docker Engine on this machine"))
    assert engine.image(IMAGE) is None
    assert not engine.is_dry


@pytest.mark.parametrize("call", ["info", "containers", "push", "create"])
def test_any_other_call_of_it_says_that_there_is_none(call: str) -> None:
    engine = NoEngine(NoEngineError("no Docker Engine on this machine"))
    with pytest.raises(NoEngineError, match="no Docker Engine on this machine"):
        getattr(engine, call)()


def test_import_of_tasks_and_stages_imports_neither_docker_nor_rich() -> None:
    """Rich is imported when it draws."""
    modules = "sys, guix_tasks.tasks, guix_tasks.engine.api, guix_tasks.stages.runner"
    code = f"import {modules}; assert not {{'docker', 'rich'}} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# --- Shown and done -------------------------------------------------------------------------


def test_with_echo_every_call_that_changes_something_is_shown(site: Site) -> None:
    engine, console = traced(site.engine, perform=True)
    site.make(*STAGES, engine=engine)
    push(site.project(engine))
    lines = [shlex.split(line) for line in console.text.splitlines() if line.startswith("+")]
    assert [verb(words[2:]) for words in lines] == verbs(site.engine.changing_calls())
    assert site.image("install")


def test_an_image_that_is_dropped_is_shown(made: Site) -> None:
    engine, console = traced(made.engine, perform=True)
    made.make("install", engine=engine, force=True, packages=("tar",))
    before = set(made.engine.all_images)
    made.make("install", engine=engine, force=True, packages=("tar", "gzip"))
    gone = before - set(made.engine.all_images)
    assert gone
    shown = {line.split()[-1] for line in console.text.splitlines() if "image rm" in line}
    assert shown == gone


def test_everything_is_handed_on(made: Site) -> None:
    """What is asked of a traced engine is asked of the engine, and answered by it."""
    engine, _ = traced(made.engine, perform=True)
    plain = made.engine
    image = made.image("base")
    spec = BuildSpec(
        made.directory / "context", made.directory / "Dockerfile", {"BASE_IMAGE": "base:1"}
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
    assert [each.id for each in engine.containers({"a": "b"})] == [container]
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


# --- A dry run ------------------------------------------------------------------------------


def test_a_dry_run_on_an_empty_engine_shows_what_a_run_does(site: Site) -> None:
    site.engine.pull(BASE_IMAGE, None)
    site.engine.calls.clear()
    dry = Dry(site)
    dry.make(*STAGES)
    push(dry.project)
    dry.check()
    site.make(*STAGES)
    site.push()
    assert dry.shown == verbs(site.engine.changing_calls())


def test_a_dry_run_shows_no_call_too_many(site: Site) -> None:
    dry = Dry(site)
    dry.make("base")
    assert dry.all_shown.count("commit") == 1


def test_a_dry_run_of_install_shows_its_parents(site: Site) -> None:
    dry = Dry(site)
    dry.make("install")
    dry.check()
    assert dry.shown.count("commit") == 3


def test_a_dry_run_shows_what_stages_would_run(made: Site) -> None:
    dry = Dry(made)
    made.env["GUIX_PACKAGES"] = "tar"
    said = made.make("install", engine=dry.engine)
    dry.check()
    assert "+ guix package --install=tar" in said
    assert f"install: {IMAGE}" not in said
    assert f"docker push {IMAGE}" not in dry.console.text


def test_a_dry_run_of_what_is_up_to_date_shows_nothing(made: Site) -> None:
    dry = Dry(made)
    dry.make(*STAGES)
    dry.check()
    assert dry.shown == []


def test_a_dry_run_after_a_change_shows_what_a_run_does(made: Site) -> None:
    made.engine.make_image(BASE_CONFIG, {PROFILE: b"certs tar"}, tag=BASE_IMAGE)
    dry, before = Dry(made), len(made.engine.changing_calls())
    dry.make("install", upstream=True)
    dry.check()
    made.make("install", upstream=True)
    assert dry.shown == verbs(made.engine.changing_calls()[before:])


def test_stages_of_a_dry_run_see_one_another(made: Site) -> None:
    """With a lock, too, though a dry pull gets no channels."""
    made.write("Dockerfile", "FROM y\n")
    dry = Dry(made)
    dry.make("base")
    dry.make("pull")
    dry.make("install")
    dry.check()
    assert dry.shown.count("commit") == 3


def test_a_dry_run_of_status_after_a_stage(site: Site) -> None:
    dry = Dry(site)
    dry.make("base")
    assert status_rows(tag_statuses(dry.project))
    dry.check()


def run_something(project: Project) -> object:
    return run.run(project, ["true"], stage=None, keep=False)


DRY: dict[str, Callable[[Project], object]] = {
    "clean": clean,
    "push": push,
    "run": run_something,
    "rollback": rollback.rollback,
}


@pytest.mark.parametrize("task", DRY.values(), ids=DRY)
def test_a_dry_run_of_a_task_shows_what_it_does(
    made: Site, task: Callable[[Project], object]
) -> None:
    dry, before = Dry(made), len(made.engine.changing_calls())
    task(dry.project)
    dry.check()
    task(made.project())
    assert dry.shown == verbs(made.engine.changing_calls()[before:])
    assert dry.shown


def test_a_dry_run_of_verify_checks_nothing_and_is_no_failure(made: Site) -> None:
    dry = Dry(made)
    verify(dry.project)
    dry.check()


def left_container(made: Site) -> None:
    run.run(made.project(), ["make"], stage=None, keep=True)


def test_a_dry_run_of_commit(made: Site) -> None:
    left_container(made)
    dry = Dry(made)
    commit.commit(dry.project)
    dry.check()
    assert dry.shown == ["commit", "tag", "tag", "rm"]


def test_a_dry_run_of_shell_starts_nothing(made: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(subprocess, "call", lambda argv, **_: called.append(argv))
    dry = Dry(made)
    shell.shell(dry.project, ["docker"], {}, stage=None, fresh=False)
    dry.check()
    assert called == []


def test_the_proxys_password_is_not_shown(made: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, console = traced(made.engine, perform=True)
    project = made.project(engine)
    object.__setattr__(project.settings, "proxies", {"https_proxy": "http://me:hunter2@p.test"})
    verify(project)
    assert "docker create" in console.text
    assert "hunter2" not in console.text
