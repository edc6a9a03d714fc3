"""Stages: their commits, order, locks, channels and cache, and faults at any call."""

from __future__ import annotations

import copy
import itertools
import os
import re
import signal
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import (
    BASE_CONFIG,
    BASE_IMAGE,
    CHANNELS,
    COMMITS,
    DETERMINISTIC,
    IMAGE,
    PROFILE,
    READING,
    STORE_SCRIPTS,
    FakeContainer,
    FakeEngine,
    Killed,
    Output,
    Site,
    another_process,
    channel,
    console_text,
    new_site,
    outline,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from guix_tasks.commands.squash import squash
from guix_tasks.errors import (
    BuilderError,
    EngineError,
    StageError,
    StoppedError,
    UsageError,
)
from guix_tasks.stages.base import base_spec
from guix_tasks.stages.commit import commit_image
from guix_tasks.stages.container import PROJECT_LABEL
from guix_tasks.stages.images import (
    CHANNELS_LABEL,
    GUIX_KEY_LABEL,
    IMAGE_LABEL,
    KEY_LABEL,
    LAYERS_LABEL,
    PACKAGES_LABEL,
    PREVIOUS,
    REPORTED_LABELS,
    STAGE_LABEL,
    STAGES,
    files_digest,
    is_child,
    proven_stage,
)
from guix_tasks.stages.make import run_stage
from guix_tasks.stages.project import Project
from guix_tasks.stages.pull import AUTHENTICATION_LABEL, lock_mismatch, stage_to_run, write_lock
from guix_tasks.stages.stage import Stage
from guix_tasks.stages.store import LIVE_LABEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from soak import Soak

    from guix_tasks.engine.api import Image

NEW = "c" * 40
LOCKED = f"(list {channel('guix', 'https://guix.test', COMMITS['guix'])})\n"


pytestmark = pytest.mark.usefixtures("serial_hashing")


@pytest.fixture
def cached(tmp_path: Path) -> Site:
    """A project whose stages are in a cache."""
    site = new_site(tmp_path / "one", CACHE_IMAGE="registry.test/cache")
    site.make(*STAGES)
    return site


def new_machine(site: Site, directory: Path) -> Site:
    """Create another checkout of the same commit, on an empty engine."""
    other = Site(directory, FakeEngine(site.engine.registry), **site.env)
    other.write("channels.lock.scm", site.lock.read_text())
    return other


def packages(image: Image) -> str:
    return image.labels[PACKAGES_LABEL]


# --- Commits of stages ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_commit_keeps_every_field_of_the_configuration(built_site: Site, stage: str) -> None:
    expected = {**BASE_CONFIG, "Entrypoint": ["/entry-point.sh"], "Cmd": ["bash"]}
    config = built_site.image(stage).config
    assert {name: config[name] for name in expected} == {**expected, "Labels": config["Labels"]}
    assert not {name: value for name, value in config.items() if value and name not in expected}


@pytest.mark.parametrize("stage", STAGES)
def test_commit_keeps_the_labels(built_site: Site, stage: str) -> None:
    labels = built_site.image(stage).labels
    assert labels["maintainer"] == "me"
    assert labels[STAGE_LABEL] == stage
    assert not labels[PROJECT_LABEL]


def test_commit_of_a_sparse_configuration_adds_nothing(site: Site) -> None:
    """Missing fields, such as the command and the user, are not those of the container."""
    parent = site.engine.make_image({"Labels": None}, {PROFILE: b"certs"})
    project = site.project()
    stage = Stage("custom", [("guix", "describe")], ("guix", "describe"), lambda _: {})
    image = run_stage(project, stage, parent)
    assert image
    for name in ("Entrypoint", "Cmd", "Env", "User", "Healthcheck", "ExposedPorts"):
        assert not image.config.get(name), name


def test_files_of_a_work_container_are_not_committed(built_site: Site) -> None:
    for stage in STAGES:
        image = built_site.image(stage)
        assert not [path for path in built_site.engine.files(image) if "guix-tasks" in path]
        assert set(built_site.engine.files(image)) <= {PROFILE, CHANNELS, "/entry-point.sh"}


def test_each_stage_is_one_layer_on_its_parent(built_site: Site) -> None:
    base, pull, install = (built_site.image(stage) for stage in STAGES)
    assert pull.layers[:-1] == base.layers
    assert install.layers[:-1] == pull.layers
    assert is_child(install, pull)
    built_site.make("install", force=True)
    assert built_site.image("install").layers[:-1] == pull.layers


def test_stage_without_changes_has_no_layer_and_is_proven(site: Site) -> None:
    site.env["GUIX_PACKAGES"] = "certs"  # the profile of the base has this package
    site.make(*STAGES)
    assert site.image("install").layers == site.image("pull").layers
    assert proven_stage(site.image("install")) == "install"
    assert site.make("install") == "install: up to date\n"


def test_unexpected_commit_is_an_error(site: Site) -> None:
    """For example the commit of an engine that adds another layer."""
    parent = site.engine.make_image({}, {"/a": b""})
    project = site.project()

    class OddEngine(FakeEngine):
        def commit(self, container: str, config: object, comment: str = "") -> str:
            return self.make_image({}, {"/a": b""}, parent=self.make_image({}, {"/b": b""})).id

        def copy_out(self, container: str, path: str) -> Iterator[bytes]:
            return iter(())

    engine = OddEngine()
    with pytest.raises(EngineError, match="the engine changes the layers or the configuration"):
        commit_image(Project(project.settings, engine, project.console), "x", parent, IMAGE, {})


def test_stage_is_defined_by_data(built_site: Site) -> None:
    project = built_site.project()
    stage = Stage(
        name="tests",
        commands=[("guix", "package", "--install=check me")],
        report=("guix", "package", "--list-installed"),
        labels=lambda report: {"tested": str("me" in report.split())},
        files={"data": b"1"},
    )
    image = run_stage(project, stage, built_site.image("install"))
    assert image
    assert proven_stage(image) == "tests"
    assert image.labels["tested"] == "True"
    assert built_site.engine.tags[f"{IMAGE}-tests"] == image.id
    assert "+ guix package '--install=check me'" in console_text(project)
    other = replace(stage, files={"data": b"2"}).inputs({})
    assert other != stage.inputs({})
    assert other.keys() == {"command", "data"}


def test_failed_command_is_not_committed(built_site: Site) -> None:
    initial_state = outline(built_site.engine)
    built_site.env["GUIX_PACKAGES"] = "no-such-package"
    with pytest.raises(StageError, match="install: no-such-package: unknown package"):
        built_site.make("install")
    assert outline(built_site.engine) == initial_state
    assert built_site.engine.all_containers == {}


def test_log_is_shown_without_the_report(site: Site) -> None:
    output = site.make("pull")
    assert "Updating channel..." in output
    assert "https://guix.test" not in output


def test_output_is_shown_immediately(site: Site) -> None:
    project, outputs = site.project(), []

    def behaviour(container: FakeContainer) -> Output:
        yield True, b"one\n"
        outputs.append(console_text(project))
        yield True, b"t\xffwo\n"

    site.make("base")
    site.engine.behaviour = behaviour
    run_stage(project, Stage("custom", [("true",)], ("true",), lambda _: {}), site.image("base"))
    assert outputs[0].endswith("one\n")
    assert "t\N{REPLACEMENT CHARACTER}wo" in console_text(project)


def test_stage_is_stopped_after_its_timeout(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_site.env["STAGE_TIMEOUT"] = "1"
    stopped = threading.Event()
    monkeypatch.setattr(
        threading,
        "Timer",
        lambda _seconds, function: threading.Thread(target=function),
    )
    monkeypatch.setattr(threading.Thread, "cancel", lambda _self: None, raising=False)
    original_stop = built_site.engine.stop

    def stop(container: str, seconds: int) -> None:
        original_stop(container, seconds)
        stopped.set()

    def behaviour(container: FakeContainer) -> Output:
        assert stopped.wait(10)
        yield True, b"stopped\n"

    monkeypatch.setattr(built_site.engine, "stop", stop)
    built_site.engine.behaviour = behaviour
    initial_state = outline(built_site.engine)
    with pytest.raises(StageError, match=r"install: stopped after STAGE_TIMEOUT \(1\.0 s\)"):
        built_site.make("install", force=True)
    assert outline(built_site.engine) == initial_state
    assert built_site.engine.all_containers == {}


def test_failed_stop_prints_no_traceback(built_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    built_site.env["STAGE_TIMEOUT"] = "1"
    raised: list[object] = []
    threads: list[threading.Thread] = []

    def timer(_seconds: float, function: Callable[[], None]) -> threading.Thread:
        threads.append(threading.Thread(target=function))
        return threads[-1]

    def fault(_number: int, name: str, _when: str) -> None:
        if name == "stop":
            raise EngineError("does not answer")
        if name == "wait":
            threads[-1].join()

    monkeypatch.setattr(threading, "Timer", timer)
    monkeypatch.setattr(threading.Thread, "cancel", lambda _self: None, raising=False)
    monkeypatch.setattr(threading, "excepthook", raised.append)
    built_site.engine.fault = fault
    with suppress(StageError, EngineError):
        built_site.make("install", force=True)
    assert raised == []


# --- Order of stages ------------------------------------------------------------------------


def test_missing_parent_is_built_first_with_a_message(site: Site) -> None:
    output = site.make("install")
    assert f"install: {IMAGE}-pull is missing, so pull comes first" in output
    assert f"pull: {IMAGE}-base is missing, so base comes first" in output
    assert [proven_stage(site.image(stage)) for stage in STAGES] == list(STAGES)


def test_current_stage_is_not_run(built_site: Site) -> None:
    calls = built_site.engine.changing_calls()
    assert built_site.make(*STAGES) == "base: up to date\npull: up to date\ninstall: up to date\n"
    assert built_site.engine.changing_calls() == calls


@pytest.mark.parametrize("stage", STAGES)
def test_force_runs_a_current_stage(built_site: Site, stage: str) -> None:
    previous = built_site.image(stage)
    built_site.make(stage, force=True)
    assert built_site.image(stage).id != previous.id
    assert built_site.why(stage) is None


def test_force_of_base_makes_its_children_stale(built_site: Site) -> None:
    built_site.make("base", force=True)
    assert built_site.why("pull") == "base is newer"
    why = built_site.why("install")
    assert why
    assert "base" in why


def test_force_of_pull_makes_its_children_stale(built_site: Site) -> None:
    built_site.make("pull", force=True)
    assert built_site.why("install") == "pull is newer"


def test_stale_parent_is_an_error_with_the_command(built_site: Site) -> None:
    built_site.write("Dockerfile", "FROM y\n")
    initial_state = outline(built_site.engine)
    for stage, parent in (("pull", "base"), ("install", "pull")):
        with pytest.raises(UsageError) as caught:
            built_site.make(stage)
        text = str(caught.value)
        assert text.startswith(f"{parent} is stale (")
        assert "Dockerfile changed" in text
        assert f"run `inv {parent}`, or `inv {stage} --upstream`" in text
    assert outline(built_site.engine) == initial_state


def test_upstream_updates_stale_parents(built_site: Site) -> None:
    built_site.write("Dockerfile", "FROM y\n")
    assert built_site.trace_stages(lambda: built_site.make("install", upstream=True)) == ["label"]
    assert [built_site.why(stage) for stage in STAGES] == [None] * 3
    assert built_site.engine.tags[IMAGE] == built_site.image("install").id


def test_upstream_keeps_current_parents(built_site: Site) -> None:
    built_site.env["GUIX_PACKAGES"] = "tar"
    assert built_site.trace_stages(lambda: built_site.make("install", upstream=True)) == ["install"]


def test_guix_does_not_run_if_only_other_files_of_the_base_changed(built_site: Site) -> None:
    previous = {stage: built_site.image(stage) for stage in STAGES}
    built_site.write("Dockerfile", "FROM y\n")
    assert built_site.trace_stages(lambda: built_site.make(*STAGES)) == ["label"]
    for parent, stage in itertools.pairwise(STAGES):
        assert is_child(built_site.image(stage), built_site.image(parent))
        assert built_site.image(stage).id != previous[stage].id
        for label in REPORTED_LABELS:
            assert built_site.image(stage).labels.get(label) == previous[stage].labels.get(label)
    assert [built_site.why(stage) for stage in STAGES] == [None] * 3


def test_guix_runs_again_if_the_guix_of_the_base_changed(built_site: Site) -> None:
    built_site.engine.make_image(BASE_CONFIG, {PROFILE: b"certs tar"}, tag=BASE_IMAGE)
    assert built_site.trace_stages(lambda: built_site.make(*STAGES)) == ["label", "pull", "install"]
    assert "tar@1.0" in built_site.image("install").labels[PACKAGES_LABEL]


def test_guix_runs_again_if_the_volume_of_its_store_is_gone(built_site: Site) -> None:
    built_site.write("Dockerfile", "FROM y\n")
    built_site.engine.stores.clear()
    assert built_site.trace_stages(lambda: built_site.make(*STAGES)) == ["label", "pull", "install"]


@pytest.mark.parametrize("variable", ["GUIX_PACKAGE_PATH=/srv", "GUILE_LOAD_PATH=/srv"])
def test_guix_runs_again_if_other_files_of_the_base_can_matter(
    built_site: Site, variable: str
) -> None:
    engine = built_site.engine
    config = {**BASE_CONFIG, "Env": [*BASE_CONFIG["Env"], variable]}
    engine.make_image(config, {PROFILE: b"certs"}, tag=BASE_IMAGE)
    built_site.make(*STAGES)
    built_site.write("Dockerfile", "FROM y\n")
    assert built_site.trace_stages(lambda: built_site.make(*STAGES)) == ["label", "pull", "install"]


def test_base_without_a_shell_can_be_built(site: Site) -> None:
    def fault(_number: int, name: str, _when: str) -> None:
        if name == "run":
            raise EngineError("the engine could not run a container: executable file not found")

    site.engine.fault = fault
    site.make("base")
    assert site.image("base").labels[GUIX_KEY_LABEL] == ""
    assert site.engine.all_containers == {}


def test_guix_runs_again_without_a_cache_volume(built_site: Site) -> None:
    built_site.env["CACHE_VOLUME"] = ""
    built_site.make(*STAGES)
    built_site.write("Dockerfile", "FROM y\n")
    assert built_site.trace_stages(lambda: built_site.make(*STAGES)) == ["label", "pull", "install"]
    assert built_site.engine.specs[-1].name.split("-")[2] == "install"


def test_image_is_assembled_on_the_previous_image_of_its_stage(built_site: Site) -> None:
    previous = built_site.image("install")
    built_site.env["GUIX_PACKAGES"] = "hello tar"
    built_site.make("install")
    image = built_site.image("install")
    assert image.layers[:-1] == previous.layers
    assert is_child(image, built_site.image("pull"))
    assert proven_stage(image) == "install"


def test_warning_of_a_program_in_the_image_is_not_a_size(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(container: FakeContainer) -> Output:
        yield True, b"tar: file: time stamp is 3 s in the future\n"
        yield from assemble(container)

    assemble = STORE_SCRIPTS["assemble.sh"]
    monkeypatch.setitem(STORE_SCRIPTS, "assemble.sh", warn)
    built_site.env["GUIX_PACKAGES"] = "hello tar"
    assert built_site.trace_stages(lambda: built_site.make("install")) == ["install"]
    assert built_site.image("install").labels[LIVE_LABEL] == "1000"


def test_image_is_assembled_in_one_layer_if_there_are_many(built_site: Site) -> None:
    base = len(built_site.image("base").layers)
    counts = []
    for number in range(12):
        built_site.env["GUIX_PACKAGES"] = f"hello tar{number}"
        built_site.make("install")
        counts.append(len(built_site.image("install").layers) - base)
    assert max(counts) == 10
    assert counts.index(10) < len(counts) - 1
    assert counts[counts.index(10) + 1] == len(built_site.image("pull").layers) - base + 1


def test_stage_on_another_base_is_not_squashed(built_site: Site) -> None:
    built_site.write("Dockerfile", "FROM y\n")
    built_site.make("base")
    with pytest.raises(UsageError, match="cannot squash: install is on another"):
        squash(built_site.project())


def test_changed_base_is_a_layer_on_the_previous_image_of_a_stage(built_site: Site) -> None:
    previous = {stage: built_site.image(stage) for stage in STAGES}
    built_site.write("Dockerfile", "FROM y\n")
    text = built_site.make(*STAGES)
    assert text.count("Guix has nothing to do") == 2
    for parent, stage in (("base", "pull"), ("pull", "install")):
        assert built_site.image(stage).layers[:-1] == previous[stage].layers
        assert is_child(built_site.image(stage), built_site.image(parent))
        assert files_digest(built_site.image(stage)) == files_digest(built_site.image("base"))
        assert files_digest(built_site.image(stage)) != files_digest(previous[stage])
    squash(built_site.project())
    squashed, base = built_site.image(), built_site.image("base")
    assert squashed.layers[:-1] == base.layers
    install_files = built_site.engine.files(built_site.image("install"))
    assert install_files.items() <= built_site.engine.files(squashed).items()


def test_stage_of_a_changed_base_is_assembled_on_its_parent_without_gnu_tools(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(container: FakeContainer) -> Iterator[tuple[bool, bytes]]:
        container.status = 1
        yield False, b"comm: unrecognized option: z\n"

    monkeypatch.setitem(STORE_SCRIPTS, "other-files.sh", fail)
    built_site.write("Dockerfile", "FROM y\n")
    built_site.make(*STAGES)
    for parent, stage in (("base", "pull"), ("pull", "install")):
        assert built_site.image(stage).layers[:-1] == built_site.image(parent).layers


def test_stage_of_another_base_image_is_assembled_on_its_parent(built_site: Site) -> None:
    built_site.engine.registry.put(
        "other.test/debian:1", built_site.engine.make_image({}, {"/b": b""})
    )
    built_site.env["BASE_IMAGE"] = "other.test/debian:1"
    built_site.make(*STAGES)
    for parent, stage in (("base", "pull"), ("pull", "install")):
        assert built_site.image(stage).layers[:-1] == built_site.image(parent).layers


def test_stage_starts_from_the_newest_image_of_the_cache(site: Site, tmp_path: Path) -> None:
    site.env["CACHE_IMAGE"] = "registry.test/cache"
    site.make(*STAGES)
    other = Site(tmp_path / "other", FakeEngine(site.engine.registry), **site.env)
    other.lock.write_bytes(site.lock.read_bytes())
    other.env["GUIX_PACKAGES"] = "hello tar"
    text = other.make(*STAGES)
    assert "install: starts from registry.test/cache:install-linux-amd64" in text
    assert other.image("install").layers[:-1] == site.image("install").layers
    assert packages(other.image("install")) == "certs@1.0 hello@1.0 tar@1.0"
    assert not [tag for tag in other.engine.tags if tag.startswith("registry.test/cache")]


def test_items_signed_by_removed_keys_are_not_in_an_image(built_site: Site, tmp_path: Path) -> None:
    """Neither the layers nor the volume of the previous image are used."""
    built_site.make("pull", "install", force=True)
    volumes = set(built_site.engine.stores)
    key = tmp_path / "other.pub"
    key.write_text("(public-key (ecc (curve Ed25519) (q #ABCD#)))")
    built_site.env["GUIX_SUBSTITUTE_KEYS"] = str(key)
    seeds = []
    built_site.engine.fault = lambda _number, name, when: (
        seeds.append(built_site.engine.calls[-1][1][0].image)
        if (name, when) == ("create", "before")
        and "-seed-" in built_site.engine.calls[-1][1][0].name
        else None
    )
    previous = {built_site.image(stage).id for stage in ("pull", "install")}
    built_site.make("pull", "install")
    assert len(built_site.engine.stores.keys() - volumes) == 1
    assert seeds
    assert not previous & set(seeds)
    for parent, stage in (("base", "pull"), ("pull", "install")):
        assert built_site.image(stage).layers[:-1] == built_site.image(parent).layers


def test_recreated_parent_makes_its_children_stale(built_site: Site) -> None:
    """The key is the same, but two builds of the same inputs can differ."""
    built_site.engine.untag(f"{IMAGE}-pull")
    built_site.make("pull")
    assert built_site.why("install") == "pull is newer"
    assert "install: the same packages in the same versions" in built_site.make("install")


def test_image_follows_the_last_stage(site: Site) -> None:
    for stage in STAGES:
        site.make(stage)
        assert site.engine.tags[IMAGE] == site.image(stage).id


def test_pull_does_not_move_image_while_install_exists(built_site: Site) -> None:
    install = built_site.image("install")
    built_site.lock.write_text(LOCKED.replace(COMMITS["guix"], NEW))
    built_site.make("pull")
    assert built_site.engine.tags[IMAGE] == install.id
    assert built_site.why("install") == "pull is newer"


def test_install_starts_from_pull_and_reports_changed_packages(built_site: Site) -> None:
    built_site.env["GUIX_PACKAGES"] = "tar"
    output = built_site.make("install")
    assert packages(built_site.image("install")) == "certs@1.0 tar@1.0"
    assert output.startswith("install: stale: packages changed\n")
    assert "install: removed hello@1.0" in output
    assert "install: added tar@1.0" in output


def test_manifest_keeps_the_packages_of_the_base(site: Site) -> None:
    site.write("manifest.scm", '(specifications->manifest \'("tar"))')
    site.env["GUIX_MANIFEST"] = "manifest.scm"
    site.make("install")
    assert packages(site.image("install")) == "certs@1.0 hello@1.0 tar@1.0"


def test_install_without_packages_is_an_error(site: Site) -> None:
    site.env["GUIX_PACKAGES"] = ""
    site.make("pull")
    with pytest.raises(
        UsageError, match="cannot install: no packages are specified; set GUIX_PACKAGES"
    ):
        site.make("install")


def test_install_without_channels_starts_from_base(site: Site) -> None:
    del site.env["GUIX_CHANNELS"]
    site.make("install")
    assert is_child(site.image("install"), site.image("base"))
    assert site.make("install") == "install: up to date\n"
    site.make("pull")
    assert site.why("install") == "pull is newer"
    site.make("install")
    assert is_child(site.image("install"), site.image("pull"))


def test_install_starts_from_an_existing_pull_without_channels(site: Site) -> None:
    del site.env["GUIX_CHANNELS"]
    site.env["GUIX_CHANNELS_LOCK"] = ""
    site.make("pull", "install")
    assert is_child(site.image("install"), site.image("pull"))


def test_lock_without_channels_requires_a_pull(site: Site) -> None:
    del site.env["GUIX_CHANNELS"]
    site.lock.write_text(LOCKED)
    site.make("install")
    assert is_child(site.image("install"), site.image("pull"))


def test_container_is_kept_without_a_commit(built_site: Site) -> None:
    initial_state = outline(built_site.engine)
    output = built_site.make("install", commit=False)
    assert "`inv commit` commits the container" in output
    assert outline(built_site.engine) == initial_state
    (container,) = built_site.engine.all_containers.values()
    assert "-kept-" in container.spec.name


def test_failed_build_changes_nothing(site: Site) -> None:
    site.env["BASE_IMAGE"] = "registry.test/none:1"
    with pytest.raises(BuilderError):
        site.make("base")
    assert site.engine.tags == {}


def test_local_base_image_needs_no_registry(site: Site) -> None:
    site.engine.pull(BASE_IMAGE, None)
    site.engine.registry.refusal = "connection refused"
    site.make(*STAGES)
    assert site.make("base") == "base: up to date\n"


# --- Locks ----------------------------------------------------------------------------------


def test_lock_is_written_after_the_commit(site: Site) -> None:
    site.make("base")

    def fault(_number: int, name: str, when: str) -> None:
        if name == "commit" and when == "before":
            assert not site.lock.exists()

    site.engine.fault = fault
    output = site.make("pull")
    assert f"pull: the channels are locked in {site.lock}" in output
    assert COMMITS["guix"] in site.lock.read_text()
    assert site.image("pull").labels[CHANNELS_LABEL] == site.lock.read_text().strip()


def test_failed_pull_writes_no_lock(site: Site) -> None:
    site.engine.guix.heads.clear()
    with pytest.raises(KeyError):
        site.make("pull")
    assert not site.lock.exists()


def test_locked_commits_are_pulled_again(built_site: Site) -> None:
    built_site.engine.guix.heads["guix"] = NEW
    assert built_site.make("pull") == "pull: up to date\n"
    built_site.engine.untag(f"{IMAGE}-pull")
    built_site.make("pull")
    assert COMMITS["guix"] in built_site.image("pull").labels[CHANNELS_LABEL]


def test_update_moves_the_lock(built_site: Site) -> None:
    built_site.engine.guix.heads["guix"] = NEW
    built_site.make("pull", update=True)
    assert NEW in built_site.lock.read_text()
    assert NEW in built_site.image("pull").labels[CHANNELS_LABEL]
    assert built_site.why("pull") is None
    assert built_site.why("install") == "pull is newer"


def test_update_without_new_commits_commits_nothing(built_site: Site) -> None:
    initial_state, lock_text = outline(built_site.engine), built_site.lock.read_text()
    assert "pull: unchanged" in built_site.make("pull", update=True)
    assert outline(built_site.engine) == initial_state
    assert built_site.lock.read_text() == lock_text
    assert built_site.why("install") is None


def test_lock_that_does_not_fit_is_an_error_with_the_command(built_site: Site) -> None:
    built_site.write("channels.scm", f"(list {channel('mine', 'https://m.test')})\n")
    message = r"lock\.scm does not fit GUIX_CHANNELS.*lacks the channel mine; `inv pull --update`"
    with pytest.raises(UsageError, match=message):
        built_site.make("pull")
    assert (built_site.why("pull") or "").startswith("GUIX_CHANNELS changed (")
    assert (built_site.why("install") or "").startswith("pull: GUIX_CHANNELS changed (")


@pytest.mark.parametrize("text", ["(list\n (channel", "(list))"])
def test_syntax_error_in_the_channels_has_its_line(built_site: Site, text: str) -> None:
    built_site.write("channels.scm", f"; mine\n{text}\n")
    line = built_site.directory / f"channels.scm:{text.count(chr(10)) + 2}: "
    for stage in ("pull", "install"):
        with pytest.raises(UsageError, match=re.escape(str(line))):
            built_site.why(stage)
    for update in (False, True):
        with pytest.raises(UsageError, match=re.escape(str(line))):
            built_site.make("pull", update=update)


def test_syntax_error_in_the_lock_has_its_line(built_site: Site) -> None:
    built_site.lock.write_text(f"{built_site.lock.read_text()})")
    with pytest.raises(UsageError, match=r"in line 2, unexpected \); `inv pull --update`"):
        built_site.make("pull")
    built_site.make("pull", update=True)
    assert built_site.why("pull") is None


def test_update_replaces_a_lock_that_does_not_fit(built_site: Site) -> None:
    requested = (channel("guix", "https://guix.test"), channel("mine", "https://m.test"))
    built_site.write("channels.scm", f"(list {' '.join(requested)})\n")
    built_site.make("pull", update=True)
    assert COMMITS["mine"] in built_site.lock.read_text()


def introduce(commit: str = "1", key: str = "AB") -> str:
    return f'(make-channel-introduction "{commit}" (openpgp-fingerprint "{key}"))'


def scheme(**fields: str) -> str:
    all_fields = {"name": "'guix", "url": '"https://guix.test"', **fields}
    return f"(list (channel {' '.join(f'({name} {text})' for name, text in all_fields.items())}))"


@pytest.mark.parametrize(
    ("requested", "lock", "problem"),
    [
        (scheme(), scheme(commit='"a"'), None),
        (None, scheme(commit='"a"'), None),
        (scheme(branch='"b"'), scheme(branch='"b"', commit='"a"'), None),
        (scheme(branch='"b"'), scheme(commit='"a"'), "guix is on branch master, not on b"),
        (scheme(), scheme(branch='"b"'), "guix is on branch b, not on master"),
        (scheme(branch='"master"'), scheme(), None),
        (scheme(), scheme(branch='"master"'), None),
        (scheme(branch="%branch"), scheme(branch='"b"'), None),
        (scheme(commit="%commit"), scheme(commit='"a"'), None),
        (scheme(introduction=introduce()), scheme(introduction=introduce()), None),
        (
            scheme(introduction=introduce("AB", "CDEF")),
            scheme(introduction=introduce("ab", "cd ef")),
            None,
        ),
        (
            scheme(introduction=introduce("1a")),
            scheme(introduction=introduce("2b")),
            (
                "guix is introduced by commit 2b of key AB, and in GUIX_CHANNELS is introduced by "
                "commit 1a of key AB"
            ),
        ),
        (
            scheme(introduction=introduce(key="AB")),
            scheme(introduction=introduce(key="CD")),
            (
                "guix is introduced by commit 1 of key CD, and in GUIX_CHANNELS is introduced by "
                "commit 1 of key AB"
            ),
        ),
        (
            scheme(introduction=introduce()),
            scheme(),
            "guix has no introduction, and in GUIX_CHANNELS is introduced by commit 1 of key AB",
        ),
        (
            scheme(),
            scheme(introduction=introduce()),
            "guix is introduced by commit 1 of key AB, and in GUIX_CHANNELS has no introduction",
        ),
        (scheme(introduction="%mine"), scheme(introduction=introduce()), None),
        (scheme(), f"{scheme()})", "in line 1, unexpected )"),
        ("%default-channels", scheme(commit='"a"'), None),
        (scheme(branch='"b"'), scheme(branch='"c"'), "guix is on branch c, not on b"),
        (scheme(commit='"b"'), scheme(commit='"a"'), "guix is at a, not at b"),
        (scheme(), "", "it names no channel"),
        (None, "%default-channels", "it names no channel"),
        (scheme(name="'mine"), scheme(), "it lacks the channel mine"),
        (
            scheme(url='"https://fork.test"'),
            scheme(),
            "guix is from https://guix.test, not from https://fork.test",
        ),
        ("(list)", scheme(), "it has the channel guix"),
    ],
)
def test_mismatch_of_the_lock_is_described(
    requested: str | None, lock: str, problem: str | None
) -> None:
    assert lock_mismatch(requested, lock) == problem


COMPUTED_CHANNELS = {
    "inherited": '(list (channel (inherit %default-guix-channel) (url "https://guix.test")))',
    "computed": f'(cons {channel("mine", "https://m.test")} (load "others.scm"))',
}


@pytest.mark.parametrize("text", COMPUTED_CHANNELS.values(), ids=COMPUTED_CHANNELS)
def test_lock_of_computed_channels_is_reported_as_unchecked(site: Site, text: str) -> None:
    site.write("channels.scm", text)
    site.lock.write_text(LOCKED + channel("mine", "https://m.test", NEW))
    site.engine.guix.evaluate = lambda _text: site.lock.read_text()
    output = site.make("pull")
    assert "without comparing it with GUIX_CHANNELS" in output
    assert "`inv pull --update` updates the lock" in output


@pytest.mark.parametrize("text", COMPUTED_CHANNELS.values(), ids=COMPUTED_CHANNELS)
def test_computed_channels_fit_their_lock(site: Site, text: str) -> None:
    site.write("channels.scm", text)
    channels = (channel("guix", "https://guix.test"), channel("mine", "https://m.test"))
    site.engine.guix.evaluate = lambda _text: f"(list {' '.join(channels)})"
    site.make("pull")
    assert "pull: up to date" in site.make("pull")


def test_missing_lock_is_restored_from_the_label(built_site: Site) -> None:
    text = built_site.lock.read_text()
    built_site.lock.unlink()
    output = built_site.make("pull")
    assert "pull: up to date" in output
    assert built_site.lock.read_text() == text


def test_missing_directory_of_the_lock_is_an_error(built_site: Site) -> None:
    built_site.env["GUIX_CHANNELS_LOCK"] = "no/such/directory/lock.scm"
    with pytest.raises(UsageError, match=r"GUIX_CHANNELS_LOCK: .*lock\.scm: No such file"):
        built_site.make("pull")


def test_unwritable_lock_is_reported_before_the_pull(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.make("base")
    writable = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != site.directory and writable(p, mode))

    def pull() -> None:
        with pytest.raises(UsageError, match=r"cannot write .*lock\.scm: Permission denied"):
            site.make("pull")

    assert site.trace_stages(pull) == []


def test_pull_of_a_lock_needs_no_writable_file(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkout of a CI job can be read-only."""
    writable = os.access
    monkeypatch.setattr(
        os, "access", lambda p, mode: p != built_site.directory and writable(p, mode)
    )
    built_site.make("pull", force=True)
    assert built_site.why("pull") is None


@pytest.mark.parametrize("name", ["channels.lock.scm", "channels.scm"])
def test_binary_channels_file_is_an_error(built_site: Site, name: str) -> None:
    built_site.write(name, b"\xff\xfe")
    with pytest.raises(UsageError, match=f"{name} is not UTF-8; write a channels file"):
        built_site.make("pull")


def test_binary_lock_is_replaced(built_site: Site) -> None:
    built_site.lock.write_bytes(b"\xff")
    assert write_lock(built_site.settings(), LOCKED.strip())
    assert built_site.lock.read_text() == LOCKED
    assert not write_lock(built_site.settings(), LOCKED.strip())


def test_failed_write_keeps_the_lock(built_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    initial_files = sorted(built_site.directory.iterdir())
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match=r"GUIX_CHANNELS_LOCK: .*No space left on device"):
        write_lock(built_site.settings(), "(list)")
    assert sorted(built_site.directory.iterdir()) == initial_files
    assert built_site.lock.read_text() == LOCKED


def test_directory_as_lock_is_an_error(site: Site) -> None:
    site.env["GUIX_CHANNELS_LOCK"] = "context"
    with pytest.raises(UsageError, match=r"GUIX_CHANNELS_LOCK: cannot read .*: Is a directory"):
        site.make("pull")


# --- Floating channels ----------------------------------------------------------------------


@pytest.fixture
def floating(tmp_path: Path) -> Site:
    site = new_site(tmp_path, GUIX_CHANNELS_LOCK="")
    site.make(*STAGES)
    return site


def test_floating_channels_without_new_commits_change_nothing(floating: Site) -> None:
    initial_state = outline(floating.engine)
    output = floating.make("pull")
    assert "set GUIX_CHANNELS_LOCK to lock them" in output
    assert "pull: unchanged" in output
    assert outline(floating.engine) == initial_state
    assert floating.make("install") == "install: up to date\n"


def test_new_commits_of_floating_channels_are_committed(floating: Site) -> None:
    floating.engine.guix.heads["guix"] = NEW
    floating.make("pull")
    assert NEW in floating.image("pull").labels[CHANNELS_LABEL]
    assert floating.why("pull") is None
    assert floating.why("install") == "pull is newer"
    assert not floating.lock.exists()


def test_floating_channels_are_not_pulled_by_install(floating: Site) -> None:
    floating.engine.guix.heads["guix"] = NEW
    floating.env["GUIX_PACKAGES"] = "tar"
    assert floating.trace_stages(lambda: floating.make("install")) == ["install"]


def test_changed_floating_channels_make_pull_stale(floating: Site) -> None:
    floating.write("channels.scm", f"(list {channel('mine', 'https://m.test')})\n")
    assert floating.why("pull")
    with pytest.raises(UsageError, match="stale"):
        floating.push()


def test_install_without_requested_packages_is_stale(built_site: Site) -> None:
    built_site.env["GUIX_PACKAGES"] = ""
    assert built_site.why("install") == "no packages are specified"


# --- --package ------------------------------------------------------------------------------


def test_package_replaces_the_packages_and_can_be_pushed(built_site: Site) -> None:
    built_site.make("install", packages=("tar",))
    assert packages(built_site.image("install")) == "certs@1.0 tar@1.0"
    assert built_site.why("install") is None
    assert built_site.push().keys() == {IMAGE}
    pushed = built_site.engine.registry.find(IMAGE)
    assert pushed
    assert packages(pushed) == "certs@1.0 tar@1.0"


def test_package_applies_to_one_call(built_site: Site) -> None:
    built_site.make("install", packages=("tar",))
    built_site.make("install")
    assert packages(built_site.image("install")) == "certs@1.0 hello@1.0"


def test_same_package_is_up_to_date(built_site: Site) -> None:
    built_site.make("install", packages=("tar",))
    assert built_site.make("install", packages=("tar",)) == "install: up to date\n"


def test_previous_package_can_be_pushed(built_site: Site) -> None:
    built_site.env["GUIX_PACKAGES"] = "tar"
    built_site.make("install", packages=("hello",))
    assert built_site.push()


# --- CACHE_IMAGE ----------------------------------------------------------------------------


def test_finished_stages_are_pushed_to_the_cache(cached: Site) -> None:
    expected = {f"registry.test/cache:{stage}-{key}" for stage, key in cached.keys().items()}
    assert expected <= cached.engine.registry.images.keys()
    assert not [tag for tag in cached.engine.tags if tag.startswith("registry.test/cache")]


def test_new_machine_uses_the_cache(cached: Site, tmp_path: Path) -> None:
    other = new_machine(cached, tmp_path / "two")
    assert other.trace_stages(lambda: other.make(*STAGES)) == []
    for stage in STAGES:
        assert other.image(stage).id == cached.image(stage).id
        assert other.why(stage) is None
    assert other.engine.tags[IMAGE] == other.image("install").id
    assert not [tag for tag in other.engine.tags if tag.startswith("registry.test/cache")]


def test_install_is_taken_from_the_cache_without_its_parents(cached: Site, tmp_path: Path) -> None:
    other = new_machine(cached, tmp_path / "two")
    assert other.trace_stages(lambda: other.make("install")) == []
    assert other.make("install") == "install: up to date\n"
    assert other.push()


def test_new_machine_continues_from_the_last_cached_stage(cached: Site, tmp_path: Path) -> None:
    other = new_machine(cached, tmp_path / "two")
    other.env["GUIX_PACKAGES"] = "tar"
    assert other.trace_stages(lambda: other.make(*STAGES)) == ["install"]
    assert is_child(other.image("install"), cached.image("pull"))


def test_cached_stage_replaces_a_different_parent(cached: Site, tmp_path: Path) -> None:
    """A parent that was built here has other layers; the cache also provides the right parent."""
    other = new_machine(cached, tmp_path / "two")
    cache_image, other.env["CACHE_IMAGE"] = other.env["CACHE_IMAGE"], ""
    other.make("base", "pull")
    other.env["CACHE_IMAGE"] = cache_image
    other.make(*STAGES)
    assert [other.why(stage) for stage in STAGES] == [None] * 3
    assert other.image("install").id == cached.image("install").id


def test_cache_can_be_in_the_repository_of_the_image(built_site: Site) -> None:
    built_site.env["CACHE_IMAGE"] = "registry.test/team/app"
    built_site.engine.tag(built_site.image().id, "registry.test/team/app:mine")
    initial_state = outline(built_site.engine)
    assert built_site.trace_stages(lambda: built_site.make(*STAGES)) == []
    assert outline(built_site.engine) == initial_state


@pytest.mark.parametrize("refusal", ["connection refused", "denied"])
def test_unavailable_cache_is_not_an_error(cached: Site, tmp_path: Path, refusal: str) -> None:
    other = new_machine(cached, tmp_path / "two")
    other.engine.pull(BASE_IMAGE, None)
    other.engine.registry.refusal = refusal
    assert other.trace_stages(lambda: other.make(*STAGES)) == ["label", "pull", "install"]
    assert not [tag for tag in other.engine.tags if tag.startswith("registry.test/cache")]


def test_failed_push_to_the_cache_is_reported(cached: Site) -> None:
    cached.engine.registry.refusal = "denied"
    cached.env["GUIX_PACKAGES"] = "tar"
    output = cached.make("install")
    assert "warning: install was not pushed to CACHE_IMAGE: cannot push" in output
    assert cached.why("install") is None


def test_wrong_image_in_the_cache_is_ignored(cached: Site, tmp_path: Path) -> None:
    """For example an image that is derived from a stage, or another stage."""
    other = new_machine(cached, tmp_path / "two")
    registry, keys = cached.engine.registry, cached.keys()
    builder = FakeEngine(registry)
    builder.pull(f"registry.test/cache:install-{keys['install']}", None)
    (image,) = builder.all_images.values()
    derived = builder.make_image(
        image.config, {"/mine": b""}, parent=image, tag="registry.test/x:1"
    )
    builder.push("registry.test/x:1", None)
    registry.put(f"registry.test/cache:install-{keys['install']}", derived)
    registry.put(
        f"registry.test/cache:pull-{keys['pull']}",
        registry.images[f"registry.test/cache:base-{keys['base']}"],
    )
    assert other.trace_stages(lambda: other.make(*STAGES)) == ["pull", "install"]


@pytest.mark.parametrize("call", ["pull", "push"])
def test_sigterm_is_not_an_unavailable_cache(cached: Site, call: str) -> None:
    def fault(_number: int, name: str, _when: str) -> None:
        if name == call:
            raise StoppedError

    cached.env["GUIX_PACKAGES"] = "tar"
    cached.engine.fault = fault
    with pytest.raises(StoppedError):
        cached.make("install")


# --- Faults ---------------------------------------------------------------------------------


def create_site(directory: Path) -> Site:
    return new_site(directory, CACHE_IMAGE="registry.test/cache", TAGS="stable")


def run_first(site: Site) -> None:
    site.make(*STAGES)
    site.push()


def run_again(site: Site) -> None:
    """Run all stages after a change of the base, the channels and the packages."""
    site.engine.guix.heads["guix"] = NEW
    site.env.update(GUIX_PACKAGES="tar", BUILD_ARGS="A=1")
    site.make("base")
    site.make("pull", update=True)
    site.make("install", upstream=True)
    site.push()


def prepare_nothing(site: Site) -> None:
    pass


SCENARIO_STEPS: dict[str, tuple[Callable[[Site], None], Callable[[Site], None]]] = {
    "the first run": (prepare_nothing, run_first),
    "another run": (run_first, run_again),
}


def record_states(site: Site, steps: Callable[[Site], None]) -> dict[str, list[object]]:
    """Run the steps without faults and return the states of each tag in this run.

    Only tags of finished stages are recorded, each of which is set by one call.
    """
    recorded: dict[str, list[object]] = {}

    def record(_number: int, _name: str, _when: str) -> None:
        current = outline(site.engine)
        for tag in {*recorded, *current}:
            states = recorded.setdefault(tag, [None])
            if current.get(tag) not in states:
                states.append(current.get(tag))

    site.engine.fault = record
    record(0, "", "")
    steps(site)
    record(0, "", "")
    return recorded


class Run:
    """A run with a fault at one call, and the next run without faults."""

    def __init__(self, scenario: Scenario) -> None:
        self.engine = scenario.engine.clone()
        self.site = copy.copy(scenario.site)
        self.site.engine, self.site.env = self.engine, dict(scenario.env)
        self.lock = scenario.lock

    def step(self, steps: Callable[[Site], None], fault: Callable[[int, str, str], None]) -> None:
        self._write_lock()
        self.engine.calls.clear()
        self.engine.fault = fault
        with suppress(Killed, EngineError, KeyboardInterrupt):
            steps(self.site)
        self.engine.fault = lambda *_: None
        self.lock = self.site.lock.read_text() if self.site.lock.exists() else None

    def _write_lock(self) -> None:
        if self.lock is None:
            self.site.lock.unlink(missing_ok=True)
        else:
            self.site.lock.write_text(self.lock)


def killed_at(number: int, when: str) -> Callable[[int, str, str], None]:
    """Return a fault that ends every call from this one on, or from its end on."""

    def fault(call: int, _name: str, moment: str) -> None:
        if call > number or (call == number and when in (moment, "before")):
            raise Killed

    return fault


def once_at(number: int, error: BaseException) -> Callable[[int, str, str], None]:
    def fault(call: int, _name: str, moment: str) -> None:
        if call == number and moment == "before":
            raise error

    return fault


class Scenario:
    """A scenario with the allowed states of its tags and the calls of the engine."""

    def __init__(self, directory: Path, title: str) -> None:
        prepare, self.steps = SCENARIO_STEPS[title]
        self.site = create_site(directory)
        prepare(self.site)
        self.engine, self.env = self.site.engine, dict(self.site.env)
        self.lock = self.site.lock.read_text() if self.site.lock.exists() else None
        run = self.run()
        run.engine.calls.clear()
        self.allowed_states = record_states(run.site, self.steps)
        self.end = outline(run.engine)
        self.end_lock = run.site.lock.read_text()
        self.calls = [name for name, _ in run.engine.calls]

    def run(self) -> Run:
        return Run(self)

    def fault_points(self, soak: Soak) -> list[tuple[int, str, str]]:
        """Return every call that follows a change of the engine, and the end of the last call.

        A short run has only the first call after each kind of change.
        """
        calls = list(enumerate(self.calls))
        points = [
            (number, name, "before")
            for number, name in calls
            if number == 0 or self.calls[number - 1] not in READING
        ]
        if not soak.long:
            first_points = {self.calls[point[0] - 1]: point for point in points[:0:-1]}
            points = sorted(first_points.values())
        end = [(number, name, "after") for number, name in calls[-1:]]
        return points + end

    def check_tags(self, engine: FakeEngine, point: object) -> None:
        for tag, state in outline(engine).items():
            assert state in self.allowed_states.get(tag, []), (point, tag)
            if tag.rpartition("-")[2] in STAGES:
                assert proven_stage(engine.all_images[engine.tags[tag]]), (point, tag)

    def check_end(self, run: Run, point: object) -> None:
        """Check that the next run completes and leaves no containers and images."""
        run.step(self.steps, lambda *_: None)
        expected = {tag: state for tag, state in self.end.items() if not tag.endswith(PREVIOUS)}
        current = outline(run.engine)
        assert {tag: current.get(tag) for tag in expected} == expected, point
        assert run.lock == self.end_lock, point
        assert run.engine.all_containers == {}, point
        assert run.engine.unnamed({IMAGE_LABEL: str(run.site.settings().image)}) == [], point


@pytest.mark.soak
@pytest.mark.parametrize("title", SCENARIO_STEPS)
def test_next_run_completes_after_a_kill_at_any_call(
    tmp_path: Path, title: str, soak: Soak
) -> None:
    scenario = Scenario(tmp_path, title)
    runs = []
    with another_process():
        for number, name, when in scenario.fault_points(soak):
            run = scenario.run()
            run.step(scenario.steps, killed_at(number, when))
            scenario.check_tags(run.engine, (number, name, when))
            runs.append(((number, name, when), run))
    assert len(runs) > soak.times(10, 30)
    for point, run in runs:
        scenario.check_end(run, point)


@pytest.mark.soak
@pytest.mark.parametrize(
    "error", [EngineError("the engine is gone"), KeyboardInterrupt()], ids=repr
)
def test_error_at_any_call_leaves_no_container(
    tmp_path: Path, error: BaseException, soak: Soak
) -> None:
    scenario = Scenario(tmp_path, "the first run")
    for number, name, _ in scenario.fault_points(soak):
        run = scenario.run()
        run.step(scenario.steps, once_at(number, error))
        scenario.check_tags(run.engine, (number, name))
        if name != "remove":
            assert run.engine.all_containers == {}, (number, name)


@pytest.mark.parametrize("call", ["create", "remove"])
@pytest.mark.parametrize("stage", STAGES)
def test_interrupt_of_create_or_remove_leaves_no_container(
    built_site: Site, stage: str, call: str
) -> None:
    def fault(_number: int, name: str, when: str) -> None:
        if name == call and when == ("after" if call == "create" else "before"):
            built_site.engine.fault = lambda *_: None
            signal.raise_signal(signal.SIGINT)

    built_site.engine.fault = fault
    with pytest.raises(KeyboardInterrupt):
        built_site.make(stage, force=True)
    assert built_site.engine.all_containers == {}


def test_leftover_container_is_removed_by_the_next_run(site: Site) -> None:
    site.make("base", "pull")

    def fault(_number: int, name: str, when: str) -> None:
        if name == "tag" and when == "after":
            site.engine.fault = raise_killed

    def raise_killed(*_: object) -> None:
        raise Killed

    with another_process(), suppress(Killed):
        site.engine.fault = fault
        site.make("install")
    site.engine.fault = lambda *_: None
    assert len(site.engine.all_containers) == 1
    assert "install: up to date" in site.make("install")
    assert site.engine.all_containers == {}


def test_unnamed_stages_of_the_project_are_removed(built_site: Site) -> None:
    engine, image = built_site.engine, built_site.image("install")
    derived = engine.make_image(image.config, {"/derived": b""}, parent=image)
    built_site.env["GUIX_PACKAGES"] = "tar"

    def fault(_number: int, name: str, when: str) -> None:
        if name == "tag" and when == "before":
            raise Killed

    engine.fault = fault
    initial_images = set(engine.all_images)
    with another_process(), suppress(Killed):
        built_site.make("install")
    engine.fault = lambda *_: None
    (unnamed,) = set(engine.all_images) - initial_images
    image_name, built_site.env["IMAGE"] = built_site.env["IMAGE"], "registry.test/another:1"
    built_site.project().ledger.drop_unnamed()
    assert unnamed in engine.all_images
    built_site.env["IMAGE"] = image_name
    built_site.make("base")
    assert unnamed not in engine.all_images
    assert derived.id in engine.all_images


def test_kill_between_two_commits_keeps_the_base_stage(built_site: Site) -> None:
    commits = []

    def fault(_number: int, name: str, when: str) -> None:
        if name == "commit" and when == "after":
            commits.append(name)
            raise Killed

    built_site.engine.fault = fault
    with pytest.raises(Killed):
        built_site.make("base", force=True)
    built_site.engine.fault = lambda *_: None
    assert commits
    assert built_site.ledger.find("base")


def test_leftover_tag_of_the_cache_is_removed(cached: Site) -> None:
    def fault(_number: int, name: str, when: str) -> None:
        if name == "push" and when == "before":
            raise Killed

    cached.env["GUIX_PACKAGES"] = "tar"
    cached.engine.fault = fault
    with suppress(Killed):
        cached.make("install")
    # A killed process runs no `finally`.
    key = cached.image("install").labels[KEY_LABEL]
    cached.engine.tag(cached.image("install").id, f"registry.test/cache:install-{key}")
    cached.engine.fault = lambda *_: None
    cached.make("install")
    assert not [tag for tag in cached.engine.tags if tag.startswith("registry.test/cache")]


@hypothesis_settings(DETERMINISTIC, max_examples=6)
@given(st.lists(st.sampled_from([*STAGES, "force", "packages", "lock", "Dockerfile"]), max_size=6))
def test_upstream_updates_any_project(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    site = new_site(tmp_path_factory.mktemp("site"))
    for number, step in enumerate(steps):
        if step in STAGES:
            with suppress(UsageError):
                site.make(step)
        elif step == "force":
            site.make("base", force=True)
        elif step == "packages":
            site.env["GUIX_PACKAGES"] = f"hello p{number}"
        elif step == "lock":
            site.lock.write_text(LOCKED.replace(COMMITS["guix"], f"{number:040}"))
        else:
            site.write("Dockerfile", f"FROM x{number}\n")
    site.make("install", upstream=True)
    assert [site.why(stage) for stage in STAGES] == [None] * 3
    assert site.engine.tags[IMAGE] == site.image("install").id
    assert 2 < len(site.image("install").layers) <= 2 + 10
    assert site.push()


# --- Engines and labels ---------------------------------------------------------------------


def test_missing_built_image_is_an_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.engine, "build", lambda _spec, _output: "sha256:gone")
    with pytest.raises(EngineError, match="which the engine has built"):
        site.make("base")


def test_label_contains_the_number_of_layers(built_site: Site) -> None:
    for number, stage in enumerate(STAGES, 2):
        assert built_site.image(stage).labels[LAYERS_LABEL].startswith(f"{number} sha256:")


# --- Channels to pull -----------------------------------------------------------------------


def test_pull_uses_the_lock_or_the_channels(built_site: Site) -> None:
    settings = built_site.settings()
    assert stage_to_run(settings).files["channels.scm"].decode() == LOCKED.strip()
    requested = (built_site.directory / "channels.scm").read_bytes().strip()
    assert stage_to_run(settings, update=True).files["channels.scm"] == requested
    built_site.lock.unlink()
    assert stage_to_run(settings).files["channels.scm"] == requested


def test_update_prefers_built_commits_and_compares_the_lock(built_site: Site) -> None:
    settings, built = built_site.settings(), "/var/guix/guix-tasks/built-channels.scm"
    updated, newest = (stage_to_run(settings, **{option: True}) for option in ("update", "newest"))
    assert updated.commands[0] == ("guix", "pull", f"--channels={built}")
    assert updated.files["locked.scm"].decode() == LOCKED.strip()
    assert newest.commands[0] == stage_to_run(settings).commands[0]
    assert newest.files.keys() == {"channels.scm"}
    # The key depends only on the commits.
    assert updated.pinned
    pinned = updated.pinned(LOCKED.strip()).inputs({})
    assert pinned == stage_to_run(settings).inputs({})
    built_site.lock.unlink()
    assert "locked.scm" not in stage_to_run(settings).files


# --- Unauthenticated channels ---------------------------------------------------------------

UNINTRODUCED = channel("mine", "https://m.test", introduced=False)
PARTLY_INTRODUCED = f"(list {channel('guix', 'https://guix.test')} {UNINTRODUCED})"


def test_channel_without_an_introduction_is_an_error_before_the_work(site: Site) -> None:
    site.write("channels.scm", PARTLY_INTRODUCED)
    with pytest.raises(UsageError) as caught:
        site.make("pull")
    assert f"{site.directory / 'channels.scm'}: the channel 'mine' has no introduc" in str(
        caught.value
    )
    assert "(introduction ...)" in str(caught.value)
    assert "`--disable-authentication`" in str(caught.value)
    assert site.engine.changing_calls() == []


@pytest.mark.parametrize("commit", [True, False])
def test_computed_channel_without_an_introduction_is_an_error(site: Site, *, commit: bool) -> None:
    """For example a channel that another channel depends on."""
    site.make("base")
    initial_state = outline(site.engine)
    site.write("channels.scm", "(my-channels)")
    site.engine.guix.evaluate = lambda _text: PARTLY_INTRODUCED
    with pytest.raises(StageError, match="the channel 'mine' has no introduction"):
        site.make("pull", commit=commit)
    assert outline(site.engine) == initial_state
    assert site.engine.all_containers == {}
    assert not site.lock.exists()


@pytest.mark.parametrize("text", [PARTLY_INTRODUCED, "(my-channels)"], ids=["literal", "computed"])
def test_unauthenticated_channel_is_pulled_only_with_the_option(site: Site, text: str) -> None:
    site.write("channels.scm", text)
    site.engine.guix.evaluate = lambda _text: PARTLY_INTRODUCED
    assert "+ guix pull --disable-authentication --channels=" in site.make(
        "pull", disable_authentication=True
    )
    assert site.image("pull").labels[AUTHENTICATION_LABEL] == "disabled"
    assert site.why("pull") is None
    assert site.make("pull", disable_authentication=True) == "pull: up to date\n"
    with pytest.raises(UsageError, match=r"channels\.lock\.scm: .* `inv pull --update`"):
        site.make("pull")
    site.make("install")
    assert site.push()


def test_unauthenticated_pull_is_repeated_without_the_option(built_site: Site) -> None:
    built_site.make("pull", disable_authentication=True, force=True)
    key = built_site.keys()["pull"]
    assert "+ guix pull --channels=" in built_site.make("pull")
    assert built_site.image("pull").labels[AUTHENTICATION_LABEL] == ""
    assert built_site.keys()["pull"] != key


def test_authenticated_pull_is_not_repeated_with_the_option(built_site: Site) -> None:
    assert built_site.make("pull", disable_authentication=True) == "pull: up to date\n"


def test_unauthenticated_stage_of_a_cache_is_ignored(
    tmp_path: Path,
) -> None:
    first = new_site(tmp_path / "first", CACHE_IMAGE="registry.test/cache")
    first.make("base")
    first.make("pull", disable_authentication=True)
    second = new_site(tmp_path / "second", first.engine.registry, CACHE_IMAGE="registry.test/cache")
    second.lock.write_text(first.lock.read_text())
    output = second.make("base", "pull")
    assert "base: taken from" in output
    assert "+ guix pull --channels=" in output


def test_image_without_its_layers_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    """The containerd store reports such an image if it has the layers in another compression."""
    first = new_site(tmp_path / "first", CACHE_IMAGE="registry.test/cache")
    first.make("base")
    second = new_site(tmp_path / "second", first.engine.registry, CACHE_IMAGE="registry.test/cache")
    pulled = second.engine.pull

    def pull(reference: str, *arguments: Any, **keywords: Any) -> None:
        pulled(reference, *arguments, **keywords)
        image_id = second.engine.tags[reference]
        image = replace(second.engine.all_images[image_id], layers=(), config={})
        second.engine.all_images[image_id] = image

    second.engine.pull = pull  # type: ignore[method-assign]
    assert "base: cannot use registry.test/cache:base-" in second.make("base")
    assert second.why("base") is None


# --- Platforms ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_emulated_platform_is_an_error_before_the_work(site: Site, stage: str) -> None:
    site.env["PLATFORMS"] = "linux/arm64"
    with pytest.raises(UsageError, match="linux/arm64 is emulated by this engine"):
        site.make(stage)
    assert site.engine.changing_calls() == []


def test_emulated_platform_is_built_without_isolation(site: Site) -> None:
    site.env.update(PLATFORMS="linux/arm64", GUIX_SANDBOX="nochroot")
    output = site.make(*STAGES)
    assert "pull: in a nochroot container" in output
    assert {spec.platform for spec in site.engine.specs} == {"linux/arm64"}
    assert not any(spec.privileged for spec in site.engine.specs)
    specs = [arguments[0] for name, arguments in site.engine.calls if name == "build"]
    assert [spec.platform for spec in specs] == ["linux/arm64"]
    assert site.make("install") == "install: up to date\n"


def test_platforms_are_built_from_one_lock(site: Site) -> None:
    site.env.update(PLATFORMS="linux/amd64 linux/386")
    for project in site.project().each_platform():
        site.env["PLATFORMS"] = str(project.settings.platform)
        site.make(*STAGES)
        site.engine.guix.heads["guix"] = NEW
    assert site.image("pull").labels[CHANNELS_LABEL] == LOCKED.strip()


def test_proxy_of_the_build_arguments_overrides_the_settings(built_site: Site) -> None:
    """Names in lower and upper case are the same name for a builder."""
    built_site.env.update(BUILD_ARGS="http_proxy=http://argument.test", https_proxy="http://p.test")
    built_site.env["HTTP_PROXY"] = "http://environment.test"
    spec = base_spec(built_site.settings(), None)
    assert spec.args["http_proxy"] == "http://argument.test"
    assert spec.proxies == {"https_proxy": "http://p.test", "HTTPS_PROXY": "http://p.test"}
