"""Stages: how one is run and committed, and which of them a run makes."""

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
from typing import TYPE_CHECKING

import pytest
from fake_engine import (
    BASE_CONFIG,
    BASE_IMAGE,
    CHANNELS,
    COMMITS,
    IMAGE,
    INTRODUCTION,
    PROFILE,
    READING,
    STEADY,
    STORE_SCRIPTS,
    FakeContainer,
    FakeEngine,
    FakeRegistry,
    Killed,
    Output,
    Site,
    another_process,
    channel,
    heard,
    new_site,
    outline,
    publish_base,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from guix_tasks.commands.squash import squash
from guix_tasks.errors import (
    BuilderError,
    EngineError,
    RegistryError,
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
    """Made, and put into a cache."""
    site = new_site(tmp_path / "one", CACHE_IMAGE="registry.test/cache")
    site.make(*STAGES)
    return site


def fresh_machine(site: Site, directory: Path) -> Site:
    """Another checkout of the same commit, on an engine that has nothing."""
    other = Site(directory, FakeEngine(site.engine.registry), **site.env)
    other.write("channels.lock.scm", site.lock.read_text())
    return other


def packages(image: Image) -> str:
    return image.labels[PACKAGES_LABEL]


# --- A stage and its commit -----------------------------------------------------------------


def with_config(site: Site, config: dict[str, object]) -> None:
    """Give the base image another configuration."""
    site.engine.make_image(config, {PROFILE: b"certs"}, tag=BASE_IMAGE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_commit_keeps_every_field_of_the_configuration(made: Site, stage: str) -> None:
    expected = {**BASE_CONFIG, "Entrypoint": ["/entry-point.sh"], "Cmd": ["bash"]}
    found = made.image(stage).config
    assert {name: found[name] for name in expected} == {**expected, "Labels": found["Labels"]}
    assert not {name: value for name, value in found.items() if value and name not in expected}


@pytest.mark.parametrize("stage", STAGES)
def test_a_commit_keeps_the_labels(made: Site, stage: str) -> None:
    labels = made.image(stage).labels
    assert labels["maintainer"] == "me"
    assert labels[STAGE_LABEL] == stage
    assert not labels[PROJECT_LABEL]


def test_a_commit_of_a_sparse_configuration_adds_nothing(site: Site) -> None:
    """What the image leaves open is not filled from the container: neither command nor user."""
    made_by_docker = site.engine.make_image({"Labels": None}, {PROFILE: b"certs"})
    project = site.project()
    stage = Stage("own", [("guix", "describe")], ("guix", "describe"), lambda _: {})
    image = run_stage(project, stage, made_by_docker)
    assert image
    for name in ("Entrypoint", "Cmd", "Env", "User", "Healthcheck", "ExposedPorts"):
        assert not image.config.get(name), name


def test_nothing_of_a_work_container_is_committed(made: Site) -> None:
    for stage in STAGES:
        image = made.image(stage)
        assert not [path for path in made.engine.files(image) if "guix-tasks" in path]
        assert set(made.engine.files(image)) <= {PROFILE, CHANNELS, "/entry-point.sh"}


def test_each_stage_is_one_layer_on_its_parent(made: Site) -> None:
    base, pull, install = (made.image(stage) for stage in STAGES)
    assert pull.layers[:-1] == base.layers
    assert install.layers[:-1] == pull.layers
    assert is_child(install, pull)
    made.make("install", force=True)
    assert len(made.image("install").layers) == len(install.layers)


def test_a_stage_that_changes_nothing_has_no_layer_and_is_proven(site: Site) -> None:
    site.env["GUIX_PACKAGES"] = "certs"  # the base's profile has it
    site.make(*STAGES)
    assert site.image("install").layers == site.image("pull").layers
    assert proven_stage(site.image("install")) == "install"
    assert site.make("install") == "install: up to date\n"


def test_a_commit_that_is_not_understood_is_an_error(site: Site) -> None:
    """Such as one of an engine that adds a layer of its own."""
    parent = site.engine.make_image({}, {"/a": b""})
    project = site.project()

    class Odd(FakeEngine):
        def commit(self, container: str, config: object, comment: str = "") -> str:
            return self.make_image({}, {"/a": b""}, parent=self.make_image({}, {"/b": b""})).id

        def copy_out(self, container: str, path: str) -> Iterator[bytes]:
            return iter(())

    odd = Odd()
    with pytest.raises(EngineError, match="the engine changes the layers or the configuration"):
        commit_image(Project(project.settings, odd, project.console), "x", parent, IMAGE, {})


def test_stage_is_a_few_lines_of_data(made: Site) -> None:
    project = made.project()
    stage = Stage(
        name="tests",
        commands=[("guix", "package", "--install=check me")],
        report=("guix", "package", "--list-installed"),
        labels=lambda report: {"tested": str("me" in report.split())},
        files={"data": b"1"},
    )
    image = run_stage(project, stage, made.image("install"))
    assert image
    assert proven_stage(image) == "tests"
    assert image.labels["tested"] == "True"
    assert made.engine.tags[f"{IMAGE}-tests"] == image.id
    assert "+ guix package '--install=check me'" in heard(project)
    other = replace(stage, files={"data": b"2"}).inputs({})
    assert other != stage.inputs({})
    assert other.keys() == {"command", "data"}


def test_a_command_that_fails_commits_nothing(made: Site) -> None:
    before = outline(made.engine)
    made.env["GUIX_PACKAGES"] = "no-such-package"
    with pytest.raises(StageError, match="install: no-such-package: unknown package"):
        made.make("install")
    assert outline(made.engine) == before
    assert made.engine.all_containers == {}


def test_the_log_is_shown_and_the_report_is_not(site: Site) -> None:
    said = site.make("pull")
    assert "Updating channel..." in said
    assert "https://guix.test" not in said


def test_output_is_shown_as_it_comes(site: Site) -> None:
    project, seen = site.project(), []

    def behaviour(container: FakeContainer) -> Output:
        yield True, b"one\n"
        seen.append(heard(project))
        yield True, b"t\xffwo\n"

    site.make("base")
    site.engine.behaviour = behaviour
    run_stage(project, Stage("own", [("true",)], ("true",), lambda _: {}), site.image("base"))
    assert seen[0].endswith("one\n")
    assert "t\N{REPLACEMENT CHARACTER}wo" in heard(project)


def test_a_stage_that_takes_too_long_is_stopped(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.env["STAGE_TIMEOUT"] = "1"
    stopped = threading.Event()
    monkeypatch.setattr(
        threading,
        "Timer",
        lambda _seconds, function: threading.Thread(target=function),
    )
    monkeypatch.setattr(threading.Thread, "cancel", lambda _self: None, raising=False)
    real = made.engine.stop

    def stop(container: str, seconds: int) -> None:
        real(container, seconds)
        stopped.set()

    def behaviour(container: FakeContainer) -> Output:
        assert stopped.wait(10)
        yield True, b"stopped\n"

    monkeypatch.setattr(made.engine, "stop", stop)
    made.engine.behaviour = behaviour
    before = outline(made.engine)
    with pytest.raises(StageError, match=r"install: stopped after STAGE_TIMEOUT \(1\.0 s\)"):
        made.make("install", force=True)
    assert outline(made.engine) == before
    assert made.engine.all_containers == {}


def test_a_stage_that_cannot_be_stopped_is_no_traceback(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.env["STAGE_TIMEOUT"] = "1"
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
    made.engine.fault = fault
    with suppress(StageError, EngineError):
        made.make("install", force=True)
    assert raised == []


# --- Which stages a run makes ---------------------------------------------------------------


def test_a_missing_parent_is_made_first_with_a_line_that_says_so(site: Site) -> None:
    said = site.make("install")
    assert f"install: {IMAGE}-pull is missing, so pull comes first" in said
    assert f"pull: {IMAGE}-base is missing, so base comes first" in said
    assert [proven_stage(site.image(stage)) for stage in STAGES] == list(STAGES)


def test_what_is_up_to_date_is_not_run(made: Site) -> None:
    before = made.engine.changing_calls()
    assert made.make(*STAGES) == "base: up to date\npull: up to date\ninstall: up to date\n"
    assert made.engine.changing_calls() == before


@pytest.mark.parametrize("stage", STAGES)
def test_force_runs_a_stage_although_nothing_changed(made: Site, stage: str) -> None:
    before = made.image(stage)
    made.make(stage, force=True)
    assert made.image(stage).id != before.id
    assert made.why(stage) is None


def test_force_of_base_makes_its_children_stale(made: Site) -> None:
    made.make("base", force=True)
    assert made.why("pull") == "base is newer"
    why = made.why("install")
    assert why
    assert "base" in why


def test_force_of_pull_makes_its_children_stale(made: Site) -> None:
    made.make("pull", force=True)
    assert made.why("install") == "pull is newer"


def test_a_stale_parent_stops_with_the_command_to_run(made: Site) -> None:
    made.write("Dockerfile", "FROM y\n")
    before = outline(made.engine)
    for stage, parent in (("pull", "base"), ("install", "pull")):
        with pytest.raises(UsageError) as caught:
            made.make(stage)
        text = str(caught.value)
        assert text.startswith(f"{parent} is stale (")
        assert "Dockerfile changed" in text
        assert f"run `inv {parent}`, or `inv {stage} --upstream`" in text
    assert outline(made.engine) == before


def test_upstream_brings_stale_parents_up_to_date(made: Site) -> None:
    made.write("Dockerfile", "FROM y\n")
    assert made.ran(lambda: made.make("install", upstream=True)) == ["label"]
    assert [made.why(stage) for stage in STAGES] == [None] * 3
    assert made.engine.tags[IMAGE] == made.image("install").id


def test_upstream_leaves_parents_that_are_up_to_date(made: Site) -> None:
    made.env["GUIX_PACKAGES"] = "tar"
    assert made.ran(lambda: made.make("install", upstream=True)) == ["install"]


def test_guix_does_not_run_if_only_other_files_of_the_base_changed(made: Site) -> None:
    before = {stage: made.image(stage) for stage in STAGES}
    made.write("Dockerfile", "FROM y\n")
    assert made.ran(lambda: made.make(*STAGES)) == ["label"]
    for parent, stage in itertools.pairwise(STAGES):
        assert is_child(made.image(stage), made.image(parent))
        assert made.image(stage).id != before[stage].id
        for label in REPORTED_LABELS:
            assert made.image(stage).labels.get(label) == before[stage].labels.get(label)
    assert [made.why(stage) for stage in STAGES] == [None] * 3


def test_guix_runs_again_if_the_guix_of_the_base_changed(made: Site) -> None:
    made.engine.make_image(BASE_CONFIG, {PROFILE: b"certs tar"}, tag=BASE_IMAGE)
    assert made.ran(lambda: made.make(*STAGES)) == ["label", "pull", "install"]
    assert "tar@1.0" in made.image("install").labels[PACKAGES_LABEL]


def test_guix_runs_again_if_the_volume_of_its_store_is_gone(made: Site) -> None:
    made.write("Dockerfile", "FROM y\n")
    made.engine.stores.clear()
    assert made.ran(lambda: made.make(*STAGES)) == ["label", "pull", "install"]


@pytest.mark.parametrize("variable", ["GUIX_PACKAGE_PATH=/srv", "GUILE_LOAD_PATH=/srv"])
def test_guix_runs_again_if_other_files_of_the_base_can_matter(made: Site, variable: str) -> None:
    engine = made.engine
    config = {**BASE_CONFIG, "Env": [*BASE_CONFIG["Env"], variable]}
    engine.make_image(config, {PROFILE: b"certs"}, tag=BASE_IMAGE)
    made.make(*STAGES)
    made.write("Dockerfile", "FROM y\n")
    assert made.ran(lambda: made.make(*STAGES)) == ["label", "pull", "install"]


def test_base_without_a_shell_can_be_built(site: Site) -> None:
    def fault(_number: int, name: str, _when: str) -> None:
        if name == "run":
            raise EngineError("the engine could not run a container: executable file not found")

    site.engine.fault = fault
    site.make("base")
    assert site.image("base").labels[GUIX_KEY_LABEL] == ""
    assert site.engine.all_containers == {}


def test_guix_runs_again_without_a_cache_volume(made: Site) -> None:
    made.env["CACHE_VOLUME"] = ""
    made.make(*STAGES)
    made.write("Dockerfile", "FROM y\n")
    assert made.ran(lambda: made.make(*STAGES)) == ["label", "pull", "install"]
    assert made.engine.specs[-1].name.split("-")[2] == "install"


def test_image_is_assembled_on_the_previous_image_of_its_stage(made: Site) -> None:
    previous = made.image("install")
    made.env["GUIX_PACKAGES"] = "hello tar"
    made.make("install")
    image = made.image("install")
    assert image.layers[:-1] == previous.layers
    assert is_child(image, made.image("pull"))
    assert proven_stage(image) == "install"


def test_warning_of_a_program_in_the_image_is_not_taken_for_a_size(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(container: FakeContainer) -> Output:
        yield True, b"tar: file: time stamp is 3 s in the future\n"
        yield from assemble(container)

    assemble = STORE_SCRIPTS["assemble.sh"]
    monkeypatch.setitem(STORE_SCRIPTS, "assemble.sh", warn)
    made.env["GUIX_PACKAGES"] = "hello tar"
    assert made.ran(lambda: made.make("install")) == ["install"]
    assert made.image("install").labels[LIVE_LABEL] == "1000"


def test_image_is_assembled_in_one_layer_if_there_are_many(made: Site) -> None:
    base = len(made.image("base").layers)
    counts = []
    for number in range(12):
        made.env["GUIX_PACKAGES"] = f"hello tar{number}"
        made.make("install")
        counts.append(len(made.image("install").layers) - base)
    assert max(counts) == 10
    assert counts.index(10) < len(counts) - 1
    assert counts[counts.index(10) + 1] == len(made.image("pull").layers) - base + 1


def test_changed_base_is_a_layer_on_the_previous_image_of_a_stage(made: Site) -> None:
    previous = {stage: made.image(stage) for stage in STAGES}
    made.write("Dockerfile", "FROM y\n")
    text = made.make(*STAGES)
    assert text.count("Guix has nothing to do") == 2
    for parent, stage in (("base", "pull"), ("pull", "install")):
        assert made.image(stage).layers[:-1] == previous[stage].layers
        assert is_child(made.image(stage), made.image(parent))
        assert files_digest(made.image(stage)) == files_digest(made.image("base"))
        assert files_digest(made.image(stage)) != files_digest(previous[stage])
    squash(made.project())
    squashed, base = made.image(), made.image("base")
    assert squashed.layers[:-1] == base.layers
    wanted = made.engine.files(made.image("install"))
    assert wanted.items() <= made.engine.files(squashed).items()


def test_stage_of_a_changed_base_is_assembled_on_its_parent_without_gnu_tools(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(container: FakeContainer) -> Iterator[tuple[bool, bytes]]:
        container.status = 1
        yield False, b"comm: unrecognized option: z\n"

    monkeypatch.setitem(STORE_SCRIPTS, "other-files.sh", fail)
    made.write("Dockerfile", "FROM y\n")
    made.make(*STAGES)
    for parent, stage in (("base", "pull"), ("pull", "install")):
        assert made.image(stage).layers[:-1] == made.image(parent).layers


def test_stage_of_another_base_image_is_assembled_on_its_parent(made: Site) -> None:
    made.engine.registry.put("other.test/debian:1", made.engine.make_image({}, {"/b": b""}))
    made.env["BASE_IMAGE"] = "other.test/debian:1"
    made.make(*STAGES)
    for parent, stage in (("base", "pull"), ("pull", "install")):
        assert made.image(stage).layers[:-1] == made.image(parent).layers


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


def test_items_that_other_keys_signed_do_not_reach_an_image(made: Site, tmp_path: Path) -> None:
    """Neither from the layers of the previous image nor from its volume."""
    made.make("pull", "install", force=True)
    volumes = set(made.engine.stores)
    key = tmp_path / "other.pub"
    key.write_text("(public-key (ecc (curve Ed25519) (q #ABCD#)))")
    made.env["GUIX_SUBSTITUTE_KEYS"] = str(key)
    seeds = []
    made.engine.fault = lambda _number, name, when: (
        seeds.append(made.engine.calls[-1][1][0].image)
        if (name, when) == ("create", "before") and "-seed-" in made.engine.calls[-1][1][0].name
        else None
    )
    previous = {made.image(stage).id for stage in ("pull", "install")}
    made.make("pull", "install")
    assert len(made.engine.stores.keys() - volumes) == 1
    assert seeds
    assert not previous & set(seeds)
    for parent, stage in (("base", "pull"), ("pull", "install")):
        assert made.image(stage).layers[:-1] == made.image(parent).layers


def test_forced_stage_is_assembled_on_its_parent(made: Site) -> None:
    made.make("install", force=True)
    assert made.image("install").layers[:-1] == made.image("pull").layers


def test_a_parent_made_anew_makes_its_children_stale(made: Site) -> None:
    """Even where its key is what it was: two builds of the same are not the same."""
    made.engine.untag(f"{IMAGE}-pull")
    made.make("pull")
    assert made.why("install") == "pull is newer"


def test_image_follows_the_last_stage(site: Site) -> None:
    for stage in STAGES:
        site.make(stage)
        assert site.engine.tags[IMAGE] == site.image(stage).id


def test_pull_does_not_move_image_while_install_exists(made: Site) -> None:
    install = made.image("install")
    made.lock.write_text(LOCKED.replace(COMMITS["guix"], NEW))
    made.make("pull")
    assert made.engine.tags[IMAGE] == install.id
    assert made.why("install") == "pull is newer"


def test_install_starts_again_from_pull_and_says_what_went(made: Site) -> None:
    made.env["GUIX_PACKAGES"] = "tar"
    said = made.make("install")
    assert packages(made.image("install")) == "certs@1.0 tar@1.0"
    assert said.startswith("install: stale: packages changed\n")
    assert "install: removed hello@1.0" in said
    assert "install: added tar@1.0" in said


def test_a_manifest_drops_nothing_of_the_bases_profile(site: Site) -> None:
    site.write("manifest.scm", '(specifications->manifest \'("tar"))')
    site.env["GUIX_MANIFEST"] = "manifest.scm"
    site.make("install")
    assert packages(site.image("install")) == "certs@1.0 hello@1.0 tar@1.0"


def test_neither_packages_nor_a_manifest_is_an_error(site: Site) -> None:
    site.env["GUIX_PACKAGES"] = ""
    site.make("pull")
    with pytest.raises(
        UsageError, match="cannot install: no packages are specified; set GUIX_PACKAGES"
    ):
        site.make("install")


def test_install_starts_from_base_where_no_channels_are_asked_for(site: Site) -> None:
    del site.env["GUIX_CHANNELS"]
    site.make("install")
    assert is_child(site.image("install"), site.image("base"))
    assert site.make("install") == "install: up to date\n"
    site.make("pull")
    assert site.why("install") == "pull is newer"
    site.make("install")
    assert is_child(site.image("install"), site.image("pull"))


def test_install_starts_from_pull_where_it_was_made_without_channels_or_a_lock(site: Site) -> None:
    del site.env["GUIX_CHANNELS"]
    site.env["GUIX_CHANNELS_LOCK"] = ""
    site.make("pull", "install")
    assert is_child(site.image("install"), site.image("pull"))


def test_a_lock_alone_makes_pull_come_first(site: Site) -> None:
    del site.env["GUIX_CHANNELS"]
    site.lock.write_text(LOCKED)
    site.make("install")
    assert is_child(site.image("install"), site.image("pull"))


def test_no_commit_leaves_the_container(made: Site) -> None:
    before = outline(made.engine)
    said = made.make("install", commit=False)
    assert "`inv commit` commits the container" in said
    assert outline(made.engine) == before
    (container,) = made.engine.all_containers.values()
    assert "-kept-" in container.spec.name


def test_a_second_container_is_not_left(made: Site) -> None:
    made.make("install", commit=False)
    with pytest.raises(UsageError, match="is not committed yet"):
        made.make("install", commit=False)


def test_a_build_that_fails_changes_nothing(site: Site) -> None:
    site.env["BASE_IMAGE"] = "registry.test/none:1"
    with pytest.raises(BuilderError):
        site.make("base")
    assert site.engine.tags == {}


def test_a_base_image_that_no_registry_can_tell_of_is_built_on(site: Site) -> None:
    site.engine.pull(BASE_IMAGE, None)
    site.engine.registry.refusal = "connection refused"
    site.make(*STAGES)
    assert site.make("base") == "base: up to date\n"


# --- The lock -------------------------------------------------------------------------------


def test_the_lock_is_written_after_the_commit(site: Site) -> None:
    site.make("base")

    def fault(_number: int, name: str, when: str) -> None:
        if name == "commit" and when == "before":
            assert not site.lock.exists()

    site.engine.fault = fault
    said = site.make("pull")
    assert f"pull: the channels are locked in {site.lock}" in said
    assert COMMITS["guix"] in site.lock.read_text()
    assert site.image("pull").labels[CHANNELS_LABEL] == site.lock.read_text().strip()


def test_a_pull_that_fails_writes_no_lock(site: Site) -> None:
    site.engine.guix.heads.clear()
    with pytest.raises(KeyError):
        site.make("pull")
    assert not site.lock.exists()


def test_what_is_locked_is_pulled_again(made: Site) -> None:
    made.engine.guix.heads["guix"] = NEW
    assert made.make("pull") == "pull: up to date\n"
    made.engine.untag(f"{IMAGE}-pull")
    made.make("pull")
    assert COMMITS["guix"] in made.image("pull").labels[CHANNELS_LABEL]


def test_update_moves_the_lock(made: Site) -> None:
    made.engine.guix.heads["guix"] = NEW
    made.make("pull", update=True)
    assert NEW in made.lock.read_text()
    assert NEW in made.image("pull").labels[CHANNELS_LABEL]
    assert made.why("pull") is None
    assert made.why("install") == "pull is newer"


def test_update_with_nothing_new_commits_nothing(made: Site) -> None:
    before, lock = outline(made.engine), made.lock.read_text()
    assert "pull: unchanged" in made.make("pull", update=True)
    assert outline(made.engine) == before
    assert made.lock.read_text() == lock
    assert made.why("install") is None


GUIX = channel("guix", "https://guix.test")
OTHER_KEY = GUIX.replace("ABCD", "0000", 1)
OTHER_COMMIT = GUIX.replace("1" * 40, NEW)

MISFITS = {
    "another branch": (
        f'(channel (name \'guix) (url "https://guix.test") (branch "b") {INTRODUCTION})',
        "is on branch master, not on b",
    ),
    "another key": (OTHER_KEY, "guix is introduced by commit"),
    "another first commit": (OTHER_COMMIT, f"in GUIX_CHANNELS is introduced by commit {NEW}"),
    "another channel": (channel("mine", "https://m.test"), "it lacks the channel mine"),
    "another address": (channel("guix", "https://fork.test"), "not from https://fork.test"),
    "another commit": (channel("guix", "https://guix.test", NEW), f"not at {NEW}"),
}


@pytest.mark.parametrize(("asked", "said"), MISFITS.values(), ids=MISFITS)
def test_a_lock_that_does_not_fit_names_update(made: Site, asked: str, said: str) -> None:
    made.write("channels.scm", f"(list {asked})\n")
    with pytest.raises(UsageError) as caught:
        made.make("pull")
    assert f"{made.lock} does not fit GUIX_CHANNELS" in str(caught.value)
    assert said in str(caught.value)
    assert "`inv pull --update`" in str(caught.value)


@pytest.mark.parametrize("asked", [asked for asked, _ in MISFITS.values()], ids=MISFITS)
def test_lock_that_does_not_fit_makes_pull_stale(made: Site, asked: str) -> None:
    made.write("channels.scm", f"(list {asked})\n")
    assert (made.why("pull") or "").startswith("GUIX_CHANNELS changed (")
    assert (made.why("install") or "").startswith("pull: GUIX_CHANNELS changed (")


@pytest.mark.parametrize("text", ["(list\n (channel", "(list))"])
def test_channels_that_guile_cannot_read_are_an_error_with_their_line(
    made: Site, text: str
) -> None:
    made.write("channels.scm", f"; mine\n{text}\n")
    line = made.directory / f"channels.scm:{text.count(chr(10)) + 2}: "
    for stage in ("pull", "install"):
        with pytest.raises(UsageError, match=re.escape(str(line))):
            made.why(stage)
    for update in (False, True):
        with pytest.raises(UsageError, match=re.escape(str(line))):
            made.make("pull", update=update)


def test_lock_that_guile_cannot_read_names_its_line(made: Site) -> None:
    made.lock.write_text(f"{made.lock.read_text()})")
    with pytest.raises(UsageError, match=r"in line 2, unexpected \); `inv pull --update`"):
        made.make("pull")
    made.make("pull", update=True)
    assert made.why("pull") is None


def test_update_mends_a_lock_that_does_not_fit(made: Site) -> None:
    asked = (channel("guix", "https://guix.test"), channel("mine", "https://m.test"))
    made.write("channels.scm", f"(list {' '.join(asked)})\n")
    made.make("pull", update=True)
    assert COMMITS["mine"] in made.lock.read_text()


def introduced(commit: str = "1", key: str = "AB") -> str:
    return f'(make-channel-introduction "{commit}" (openpgp-fingerprint "{key}"))'


def spelled(**fields: str) -> str:
    own = {"name": "'guix", "url": '"https://guix.test"', **fields}
    return f"(list (channel {' '.join(f'({name} {text})' for name, text in own.items())}))"


@pytest.mark.parametrize(
    ("wanted", "lock", "problem"),
    [
        (spelled(), spelled(commit='"a"'), None),
        (None, spelled(commit='"a"'), None),
        (spelled(branch='"b"'), spelled(branch='"b"', commit='"a"'), None),
        (spelled(branch='"b"'), spelled(commit='"a"'), "guix is on branch master, not on b"),
        (spelled(), spelled(branch='"b"'), "guix is on branch b, not on master"),
        (spelled(branch='"master"'), spelled(), None),
        (spelled(), spelled(branch='"master"'), None),
        (spelled(branch="%branch"), spelled(branch='"b"'), None),
        (spelled(commit="%commit"), spelled(commit='"a"'), None),
        (spelled(introduction=introduced()), spelled(introduction=introduced()), None),
        (
            spelled(introduction=introduced("AB", "CDEF")),
            spelled(introduction=introduced("ab", "cd ef")),
            None,
        ),
        (
            spelled(introduction=introduced("1a")),
            spelled(introduction=introduced("2b")),
            (
                "guix is introduced by commit 2b of key AB, and in GUIX_CHANNELS is introduced by "
                "commit 1a of key AB"
            ),
        ),
        (
            spelled(introduction=introduced(key="AB")),
            spelled(introduction=introduced(key="CD")),
            (
                "guix is introduced by commit 1 of key CD, and in GUIX_CHANNELS is introduced by "
                "commit 1 of key AB"
            ),
        ),
        (
            spelled(introduction=introduced()),
            spelled(),
            "guix has no introduction, and in GUIX_CHANNELS is introduced by commit 1 of key AB",
        ),
        (
            spelled(),
            spelled(introduction=introduced()),
            "guix is introduced by commit 1 of key AB, and in GUIX_CHANNELS has no introduction",
        ),
        (spelled(introduction="%mine"), spelled(introduction=introduced()), None),
        (spelled(), f"{spelled()})", "in line 1, unexpected )"),
        ("%default-channels", spelled(commit='"a"'), None),
        (spelled(branch='"b"'), spelled(branch='"c"'), "guix is on branch c, not on b"),
        (spelled(commit='"b"'), spelled(commit='"a"'), "guix is at a, not at b"),
        (spelled(), "", "it names no channel"),
        (None, "%default-channels", "it names no channel"),
        (spelled(name="'mine"), spelled(), "it lacks the channel mine"),
        ("(list)", spelled(), "it has the channel guix"),
    ],
)
def test_what_does_not_fit_is_said(wanted: str | None, lock: str, problem: str | None) -> None:
    assert lock_mismatch(wanted, lock) == problem


NOT_LITERAL = {
    "inherited": '(list (channel (inherit %default-guix-channel) (url "https://guix.test")))',
    "computed": f'(cons {channel("mine", "https://m.test")} (load "others.scm"))',
}


@pytest.mark.parametrize("text", NOT_LITERAL.values(), ids=NOT_LITERAL)
def test_lock_of_computed_channels_is_named_on_a_fresh_machine(site: Site, text: str) -> None:
    site.write("channels.scm", text)
    site.lock.write_text(LOCKED + channel("mine", "https://m.test", NEW))
    site.engine.guix.evaluate = lambda _text: site.lock.read_text()
    said = site.make("pull")
    assert "without comparing it with GUIX_CHANNELS" in said
    assert "`inv pull --update` updates the lock" in said


@pytest.mark.parametrize("text", NOT_LITERAL.values(), ids=NOT_LITERAL)
def test_channels_that_are_computed_are_no_misfit(site: Site, text: str) -> None:
    site.write("channels.scm", text)
    both = (channel("guix", "https://guix.test"), channel("mine", "https://m.test"))
    site.engine.guix.evaluate = lambda _text: f"(list {' '.join(both)})"
    site.make("pull")
    assert "pull: up to date" in site.make("pull")


def test_a_lock_that_was_lost_is_written_from_the_label(made: Site) -> None:
    text = made.lock.read_text()
    made.lock.unlink()
    said = made.make("pull")
    assert "pull: up to date" in said
    assert made.lock.read_text() == text


def test_a_lock_that_cannot_be_written_is_one_line(made: Site) -> None:
    made.env["GUIX_CHANNELS_LOCK"] = "no/such/directory/lock.scm"
    with pytest.raises(UsageError, match=r"GUIX_CHANNELS_LOCK: .*lock\.scm: No such file"):
        made.make("pull")


def test_a_lock_that_cannot_be_written_is_reported_before_the_pull(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.make("base")
    writable = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != site.directory and writable(p, mode))

    def pull() -> None:
        with pytest.raises(UsageError, match=r"cannot write .*lock\.scm: Permission denied"):
            site.make("pull")

    assert site.ran(pull) == []


def test_a_pull_of_a_lock_needs_no_file_that_can_be_written(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkout of a CI job can be read-only."""
    writable = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != made.directory and writable(p, mode))
    made.make("pull", force=True)
    assert made.why("pull") is None


@pytest.mark.parametrize("name", ["channels.lock.scm", "channels.scm"])
def test_channels_that_are_not_text_are_one_line(made: Site, name: str) -> None:
    made.write(name, b"\xff\xfe")
    with pytest.raises(UsageError):
        made.make("pull")


def test_a_lock_that_is_not_text_is_written_anew(made: Site) -> None:
    made.lock.write_bytes(b"\xff")
    assert write_lock(made.settings(), LOCKED.strip())
    assert made.lock.read_text() == LOCKED
    assert not write_lock(made.settings(), LOCKED.strip())


def test_nothing_half_written_is_left_of_a_lock(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(made.directory.iterdir())
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UsageError, match=r"GUIX_CHANNELS_LOCK: .*No space left on device"):
        write_lock(made.settings(), "(list)")
    assert sorted(made.directory.iterdir()) == before
    assert made.lock.read_text() == LOCKED


def test_a_lock_that_is_a_folder_is_one_line(site: Site) -> None:
    site.env["GUIX_CHANNELS_LOCK"] = "context"
    with pytest.raises(UsageError):
        site.make("pull")


# --- Floating channels ----------------------------------------------------------------------


@pytest.fixture
def floating(tmp_path: Path) -> Site:
    site = new_site(tmp_path, GUIX_CHANNELS_LOCK="")
    site.make(*STAGES)
    return site


def test_floating_channels_with_nothing_new_change_nothing(floating: Site) -> None:
    before = outline(floating.engine)
    said = floating.make("pull")
    assert "set GUIX_CHANNELS_LOCK to lock them" in said
    assert "pull: unchanged" in said
    assert outline(floating.engine) == before
    assert floating.make("install") == "install: up to date\n"


def test_floating_channels_with_something_new_are_committed(floating: Site) -> None:
    floating.engine.guix.heads["guix"] = NEW
    floating.make("pull")
    assert NEW in floating.image("pull").labels[CHANNELS_LABEL]
    assert floating.why("pull") is None
    assert floating.why("install") == "pull is newer"
    assert not floating.lock.exists()


def test_floating_channels_are_not_pulled_by_install(floating: Site) -> None:
    floating.engine.guix.heads["guix"] = NEW
    floating.env["GUIX_PACKAGES"] = "tar"
    assert floating.ran(lambda: floating.make("install")) == ["install"]


def test_floating_channels_that_are_others_make_pull_stale(floating: Site) -> None:
    floating.write("channels.scm", f"(list {channel('mine', 'https://m.test')})\n")
    assert floating.why("pull")
    with pytest.raises(UsageError, match="stale"):
        floating.push()


def test_an_install_of_what_is_no_longer_asked_for_is_stale(made: Site) -> None:
    made.env["GUIX_PACKAGES"] = ""
    assert made.why("install") == "no packages are specified"


# --- --package ------------------------------------------------------------------------------


def test_package_replaces_the_packages_and_can_be_pushed(made: Site) -> None:
    made.make("install", packages=("tar",))
    assert packages(made.image("install")) == "certs@1.0 tar@1.0"
    assert made.why("install") is None
    assert made.push().keys() == {IMAGE}
    pushed = made.engine.registry.find(IMAGE)
    assert pushed
    assert packages(pushed) == "certs@1.0 tar@1.0"


def test_package_is_for_one_call(made: Site) -> None:
    made.make("install", packages=("tar",))
    made.make("install")
    assert packages(made.image("install")) == "certs@1.0 hello@1.0"


def test_package_of_what_is_there_is_up_to_date(made: Site) -> None:
    made.make("install", packages=("tar",))
    assert made.make("install", packages=("tar",)) == "install: up to date\n"


def test_package_of_what_was_there_before_can_be_pushed(made: Site) -> None:
    made.env["GUIX_PACKAGES"] = "tar"
    made.make("install", packages=("hello",))
    assert made.push()


# --- CACHE_IMAGE ----------------------------------------------------------------------------


def test_finished_stages_are_put_into_the_cache(cached: Site) -> None:
    expected = {f"registry.test/cache:{stage}-{key}" for stage, key in cached.keys().items()}
    assert expected <= cached.engine.registry.images.keys()
    assert not [tag for tag in cached.engine.tags if tag.startswith("registry.test/cache")]


def test_a_fresh_machine_resumes_from_the_cache(cached: Site, tmp_path: Path) -> None:
    other = fresh_machine(cached, tmp_path / "two")
    assert other.ran(lambda: other.make(*STAGES)) == []
    for stage in STAGES:
        assert other.image(stage).id == cached.image(stage).id
        assert other.why(stage) is None
    assert other.engine.tags[IMAGE] == other.image("install").id
    assert not [tag for tag in other.engine.tags if tag.startswith("registry.test/cache")]


def test_install_alone_is_taken_from_the_cache(cached: Site, tmp_path: Path) -> None:
    other = fresh_machine(cached, tmp_path / "two")
    assert other.ran(lambda: other.make("install")) == []
    assert other.make("install") == "install: up to date\n"
    assert other.push()


def test_a_fresh_machine_resumes_from_the_last_good_stage(cached: Site, tmp_path: Path) -> None:
    other = fresh_machine(cached, tmp_path / "two")
    other.env["GUIX_PACKAGES"] = "tar"
    assert other.ran(lambda: other.make(*STAGES)) == ["install"]
    assert is_child(other.image("install"), cached.image("pull"))


def test_a_stage_from_the_cache_does_not_stay_on_a_strange_parent(
    cached: Site, tmp_path: Path
) -> None:
    """A parent made here has other layers; the one that the stage was made from comes along."""
    other = fresh_machine(cached, tmp_path / "two")
    cache, other.env["CACHE_IMAGE"] = other.env["CACHE_IMAGE"], ""
    other.make("base", "pull")
    other.env["CACHE_IMAGE"] = cache
    other.make(*STAGES)
    assert [other.why(stage) for stage in STAGES] == [None] * 3
    assert other.image("install").id == cached.image("install").id


def test_the_cache_can_be_in_the_repository_of_image(made: Site) -> None:
    made.env["CACHE_IMAGE"] = "registry.test/team/app"
    made.engine.tag(made.image().id, "registry.test/team/app:mine")
    before = outline(made.engine)
    assert made.ran(lambda: made.make(*STAGES)) == []
    assert outline(made.engine) == before


@pytest.mark.parametrize("refusal", ["connection refused", "denied"])
def test_a_cache_that_is_down_is_no_error(cached: Site, tmp_path: Path, refusal: str) -> None:
    other = fresh_machine(cached, tmp_path / "two")
    other.engine.pull(BASE_IMAGE, None)
    other.engine.registry.refusal = refusal
    assert other.ran(lambda: other.make(*STAGES)) == ["label", "pull", "install"]
    assert not [tag for tag in other.engine.tags if tag.startswith("registry.test/cache")]


def test_a_cache_that_does_not_take_is_said(cached: Site) -> None:
    cached.engine.registry.refusal = "denied"
    cached.env["GUIX_PACKAGES"] = "tar"
    said = cached.make("install")
    assert "warning: install was not pushed to CACHE_IMAGE: cannot push" in said
    assert cached.why("install") is None


def test_what_the_cache_has_under_a_wrong_name_is_not_taken(cached: Site, tmp_path: Path) -> None:
    """Such as an image that somebody made FROM a stage, or another stage."""
    other = fresh_machine(cached, tmp_path / "two")
    registry, keys = cached.engine.registry, cached.keys()
    stranger = FakeEngine(registry)
    stranger.pull(f"registry.test/cache:install-{keys['install']}", None)
    (image,) = stranger.all_images.values()
    child = stranger.make_image(image.config, {"/mine": b""}, parent=image, tag="registry.test/x:1")
    stranger.push("registry.test/x:1", None)
    registry.put(f"registry.test/cache:install-{keys['install']}", child)
    registry.put(
        f"registry.test/cache:pull-{keys['pull']}",
        registry.images[f"registry.test/cache:base-{keys['base']}"],
    )
    assert other.ran(lambda: other.make(*STAGES)) == ["pull", "install"]


@pytest.mark.parametrize("call", ["pull", "push"])
def test_sigterm_is_not_taken_for_a_cache_that_is_down(cached: Site, call: str) -> None:
    def fault(_number: int, name: str, _when: str) -> None:
        if name == call:
            raise StoppedError

    cached.env["GUIX_PACKAGES"] = "tar"
    cached.engine.fault = fault
    with pytest.raises(StoppedError):
        cached.make("install")


# --- Faults ---------------------------------------------------------------------------------


def prepared(directory: Path) -> Site:
    return new_site(directory, CACHE_IMAGE="registry.test/cache", TAGS="stable")


def first(site: Site) -> None:
    site.make(*STAGES)
    site.push()


def again(site: Site) -> None:
    """Everything changes: the base, the channels, the packages."""
    site.engine.guix.heads["guix"] = NEW
    site.env.update(GUIX_PACKAGES="tar", BUILD_ARGS="A=1")
    site.make("base")
    site.make("pull", update=True)
    site.make("install", upstream=True)
    site.push()


def prepare_first(site: Site) -> None:
    pass


SCENARIOS: dict[str, tuple[Callable[[Site], None], Callable[[Site], None]]] = {
    "the first run": (prepare_first, first),
    "another run": (first, again),
}


def allowed(site: Site, steps: Callable[[Site], None]) -> dict[str, list[object]]:
    """What each tag stands for in the course of a run to which nothing happens.

    Only tags whose stage is finished are looked at, as each is set by one call.
    """
    seen: dict[str, list[object]] = {}

    def look(_number: int, _name: str, _when: str) -> None:
        now = outline(site.engine)
        for tag in {*seen, *now}:
            states = seen.setdefault(tag, [None])
            if now.get(tag) not in states:
                states.append(now.get(tag))

    site.engine.fault = look
    look(0, "", "")
    steps(site)
    look(0, "", "")
    return seen


class Run:
    """A run to which something happens at one call, and then another to which nothing does."""

    def __init__(self, trial: Trial) -> None:
        self.engine = trial.engine.clone()
        self.site = copy.copy(trial.site)
        self.site.engine, self.site.env = self.engine, dict(trial.env)
        self.lock = trial.lock

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
    """From this call on, or from its end on, nothing reaches the engine any more."""

    def fault(now: int, _name: str, at: str) -> None:
        if now > number or (now == number and when in (at, "before")):
            raise Killed

    return fault


def once_at(number: int, error: BaseException) -> Callable[[int, str, str], None]:
    def fault(now: int, _name: str, at: str) -> None:
        if now == number and at == "before":
            raise error

    return fault


class Trial:
    """A scenario, what its tags may be, and how often the engine is called in it."""

    def __init__(self, directory: Path, scenario: str) -> None:
        prepare, self.steps = SCENARIOS[scenario]
        self.site = prepared(directory)
        prepare(self.site)
        self.engine, self.env = self.site.engine, dict(self.site.env)
        self.lock = self.site.lock.read_text() if self.site.lock.exists() else None
        tried = self.run()
        self.allowed: dict[str, list[object]] = {}
        tried.engine.calls.clear()
        self.allowed = allowed(tried.site, self.steps)
        self.end = outline(tried.engine)
        self.end_lock = tried.site.lock.read_text()
        self.calls = [name for name, _ in tried.engine.calls]

    def run(self) -> Run:
        return Run(self)

    def places(self, soak: Soak) -> list[tuple[int, str, str]]:
        """Every call before which the engine is not as it was before the one before it.

        In a short run, only the first after each kind of call that changes something.
        """
        calls = list(enumerate(self.calls))
        before = [
            (number, name, "before")
            for number, name in calls
            if number == 0 or self.calls[number - 1] not in READING
        ]
        if not soak.long:
            firsts = {self.calls[place[0] - 1]: place for place in before[:0:-1]}
            before = sorted(firsts.values())
        last = [(number, name, "after") for number, name in calls[-1:]]
        return before + last

    def check_tags(self, engine: FakeEngine, place: object) -> None:
        for tag, state in outline(engine).items():
            assert state in self.allowed.get(tag, []), (place, tag)
            if tag.rpartition("-")[2] in STAGES:
                assert proven_stage(engine.all_images[engine.tags[tag]]), (place, tag)

    def check_end(self, run: Run, place: object) -> None:
        """A next run finishes, and leaves nothing behind."""
        run.step(self.steps, lambda *_: None)
        own = {tag: state for tag, state in self.end.items() if not tag.endswith(PREVIOUS)}
        found = outline(run.engine)
        assert {tag: found.get(tag) for tag in own} == own, place
        assert run.lock == self.end_lock, place
        assert run.engine.all_containers == {}, place
        assert run.engine.unnamed({IMAGE_LABEL: str(run.site.settings().image)}) == [], place


@pytest.mark.soak
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_any_call_the_tags_are_right_and_the_next_run_finishes(
    tmp_path: Path, scenario: str, soak: Soak
) -> None:
    trial = Trial(tmp_path, scenario)
    runs = []
    with another_process():
        for number, name, when in trial.places(soak):
            run = trial.run()
            run.step(trial.steps, killed_at(number, when))
            trial.check_tags(run.engine, (number, name, when))
            runs.append(((number, name, when), run))
    assert len(runs) > soak.times(10, 30)
    for place, run in runs:
        trial.check_end(run, place)


@pytest.mark.soak
@pytest.mark.parametrize(
    "error", [EngineError("the engine is gone"), KeyboardInterrupt()], ids=repr
)
def test_an_error_at_any_call_leaves_no_container_and_the_tags_right(
    tmp_path: Path, error: BaseException, soak: Soak
) -> None:
    trial = Trial(tmp_path, "the first run")
    for number, name, _ in trial.places(soak):
        run = trial.run()
        run.step(trial.steps, once_at(number, error))
        trial.check_tags(run.engine, (number, name))
        if name != "remove":
            assert run.engine.all_containers == {}, (number, name)


@pytest.mark.parametrize("call", ["create", "remove"])
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_while_a_container_comes_or_goes_leaves_none(
    made: Site, stage: str, call: str
) -> None:
    def fault(_number: int, name: str, when: str) -> None:
        if name == call and when == ("after" if call == "create" else "before"):
            made.engine.fault = lambda *_: None
            signal.raise_signal(signal.SIGINT)

    made.engine.fault = fault
    with pytest.raises(KeyboardInterrupt):
        made.make(stage, force=True)
    assert made.engine.all_containers == {}


def test_a_container_that_was_left_goes_with_the_next_run(site: Site) -> None:
    site.make("base", "pull")

    def fault(_number: int, name: str, when: str) -> None:
        if name == "tag" and when == "after":
            site.engine.fault = no_effect

    def no_effect(*_: object) -> None:
        raise Killed

    with another_process(), suppress(Killed):
        site.engine.fault = fault
        site.make("install")
    site.engine.fault = lambda *_: None
    assert len(site.engine.all_containers) == 1
    assert "install: up to date" in site.make("install")
    assert site.engine.all_containers == {}


def test_images_without_a_name_are_removed_where_they_are_this_projects_stages(made: Site) -> None:
    engine, image = made.engine, made.image("install")
    theirs = engine.make_image(image.config, {"/theirs": b""}, parent=image)
    made.env["GUIX_PACKAGES"] = "tar"

    def fault(_number: int, name: str, when: str) -> None:
        if name == "tag" and when == "before":
            raise Killed

    engine.fault = fault
    before = set(engine.all_images)
    with another_process(), suppress(Killed):
        made.make("install")
    engine.fault = lambda *_: None
    (left,) = set(engine.all_images) - before
    own, made.env["IMAGE"] = made.env["IMAGE"], "registry.test/another:1"
    made.project().ledger.drop_unnamed()
    assert left in engine.all_images
    made.env["IMAGE"] = own
    made.make("base")
    assert left not in engine.all_images
    assert theirs.id in engine.all_images


def test_killed_between_two_commits_the_base_stage_is_what_it_was(made: Site) -> None:
    commits = []

    def fault(_number: int, name: str, when: str) -> None:
        if name == "commit" and when == "after":
            commits.append(name)
            raise Killed

    made.engine.fault = fault
    with pytest.raises(Killed):
        made.make("base", force=True)
    made.engine.fault = lambda *_: None
    assert commits
    assert made.ledger.find("base")


def test_a_tag_of_the_cache_that_a_killed_run_left_goes(cached: Site) -> None:
    def fault(_number: int, name: str, when: str) -> None:
        if name == "push" and when == "before":
            raise Killed

    cached.env["GUIX_PACKAGES"] = "tar"
    cached.engine.fault = fault
    with suppress(Killed):
        cached.make("install")
    # A `finally` cannot run in a process that was killed.
    key = cached.image("install").labels[KEY_LABEL]
    cached.engine.tag(cached.image("install").id, f"registry.test/cache:install-{key}")
    cached.engine.fault = lambda *_: None
    cached.make("install")
    assert not [tag for tag in cached.engine.tags if tag.startswith("registry.test/cache")]


@hypothesis_settings(STEADY, max_examples=6)
@given(st.lists(st.sampled_from([*STAGES, "force", "packages", "lock", "Dockerfile"]), max_size=6))
def test_whatever_was_done_before_upstream_makes_it_right(
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


# --- Odds -----------------------------------------------------------------------------------


def test_an_engine_that_loses_what_it_made_is_an_error(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site.engine, "build", lambda _spec, _output: "sha256:gone")
    with pytest.raises(EngineError, match="which the engine has built"):
        site.make("base")


def test_labels_say_the_layers(made: Site) -> None:
    for number, stage in enumerate(STAGES, 2):
        assert made.image(stage).labels[LAYERS_LABEL].startswith(f"{number} sha256:")


def test_registries_do_not_mix() -> None:
    """The fake itself: what one registry has, another has not."""
    one = FakeRegistry()
    publish_base(one)
    with pytest.raises(RegistryError):
        FakeEngine().pull(BASE_IMAGE, None)


# --- Which pull -----------------------------------------------------------------------------


def test_the_lock_is_pulled_and_without_one_what_is_asked_for(made: Site) -> None:
    settings = made.settings()
    assert stage_to_run(settings).files["channels.scm"].decode() == LOCKED.strip()
    asked = (made.directory / "channels.scm").read_bytes().strip()
    assert stage_to_run(settings, update=True).files["channels.scm"] == asked
    made.lock.unlink()
    assert stage_to_run(settings).files["channels.scm"] == asked


def test_an_update_prefers_commits_that_are_built_and_knows_the_lock(made: Site) -> None:
    settings, built = made.settings(), "/var/guix/guix-tasks/built-channels.scm"
    updated, newest = (stage_to_run(settings, **{option: True}) for option in ("update", "newest"))
    assert updated.commands[0] == ("guix", "pull", f"--channels={built}")
    assert updated.files["locked.scm"].decode() == LOCKED.strip()
    assert newest.commands[0] == stage_to_run(settings).commands[0]
    assert newest.files.keys() == {"channels.scm"}
    # The key is that of the commits, however they were found.
    assert updated.pinned
    pinned = updated.pinned(LOCKED.strip()).inputs({})
    assert pinned == stage_to_run(settings).inputs({})
    made.lock.unlink()
    assert "locked.scm" not in stage_to_run(settings).files


def test_a_lock_of_other_channels_is_pulled_by_nobody(made: Site) -> None:
    made.write("channels.scm", f"(list {channel('mine', 'https://m.test')})")
    with pytest.raises(UsageError, match="it lacks the channel mine; `inv pull --update`"):
        stage_to_run(made.settings())
    assert b"m.test" in stage_to_run(made.settings(), update=True).files["channels.scm"]


# --- Channels that nothing authenticates ----------------------------------------------------

BARE = channel("mine", "https://m.test", introduced=False)
BOTH = f"(list {channel('guix', 'https://guix.test')} {BARE})"


def test_a_channel_without_an_introduction_is_refused_before_anything_is_done(site: Site) -> None:
    site.write("channels.scm", BOTH)
    with pytest.raises(UsageError) as caught:
        site.make("pull")
    assert f"{site.directory / 'channels.scm'}: the channel 'mine' has no introduc" in str(
        caught.value
    )
    assert "(introduction ...)" in str(caught.value)
    assert "`--disable-authentication`" in str(caught.value)
    assert site.engine.changing_calls() == []


@pytest.mark.parametrize("commit", [True, False])
def test_one_that_is_computed_is_refused_when_it_is_seen(site: Site, *, commit: bool) -> None:
    """As one is that another channel depends on."""
    site.make("base")
    before = outline(site.engine)
    site.write("channels.scm", "(my-channels)")
    site.engine.guix.evaluate = lambda _text: BOTH
    with pytest.raises(StageError, match="the channel 'mine' has no introduction"):
        site.make("pull", commit=commit)
    assert outline(site.engine) == before
    assert site.engine.all_containers == {}
    assert not site.lock.exists()


@pytest.mark.parametrize("text", [BOTH, "(my-channels)"], ids=["spelled out", "computed"])
def test_it_is_pulled_where_that_is_said_and_by_nobody_else(site: Site, text: str) -> None:
    site.write("channels.scm", text)
    site.engine.guix.evaluate = lambda _text: BOTH
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


def test_what_was_not_authenticated_does_for_nobody_who_wants_it_so(made: Site) -> None:
    made.make("pull", disable_authentication=True, force=True)
    key = made.keys()["pull"]
    assert "+ guix pull --channels=" in made.make("pull")
    assert made.image("pull").labels[AUTHENTICATION_LABEL] == ""
    assert made.keys()["pull"] != key


def test_what_was_authenticated_does_for_everybody(made: Site) -> None:
    assert made.make("pull", disable_authentication=True) == "pull: up to date\n"


def test_a_cache_has_no_unauthenticated_stage_for_whoever_wants_it_authenticated(
    tmp_path: Path,
) -> None:
    first = new_site(tmp_path / "first", CACHE_IMAGE="registry.test/cache")
    first.make("base")
    first.make("pull", disable_authentication=True)
    second = new_site(tmp_path / "second", first.engine.registry, CACHE_IMAGE="registry.test/cache")
    second.lock.write_text(first.lock.read_text())
    said = second.make("base", "pull")
    assert "base: taken from" in said
    assert "+ guix pull --channels=" in said


# --- Platforms ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_an_emulated_platform_is_refused_before_anything_is_done(site: Site, stage: str) -> None:
    site.env["PLATFORMS"] = "linux/arm64"
    with pytest.raises(UsageError, match="linux/arm64 is emulated by this engine"):
        site.make(stage)
    assert site.engine.changing_calls() == []


def test_without_isolation_an_emulated_platform_is_made(site: Site) -> None:
    site.env.update(PLATFORMS="linux/arm64", GUIX_SANDBOX="nochroot")
    said = site.make(*STAGES)
    assert "pull: in a nochroot container" in said
    assert {spec.platform for spec in site.engine.specs} == {"linux/arm64"}
    assert not any(spec.privileged for spec in site.engine.specs)
    specs = [arguments[0] for name, arguments in site.engine.calls if name == "build"]
    assert [spec.platform for spec in specs] == ["linux/arm64"]
    assert site.make("install") == "install: up to date\n"


def test_one_platform_after_the_other_is_made_of_one_lock(site: Site) -> None:
    site.env.update(PLATFORMS="linux/amd64 linux/386")
    for each in site.project().each_platform():
        site.env["PLATFORMS"] = str(each.settings.platform)
        site.make(*STAGES)
        site.engine.guix.heads["guix"] = NEW
    assert site.image("pull").labels[CHANNELS_LABEL] == LOCKED.strip()


def test_a_proxy_of_the_build_arguments_is_the_only_one(made: Site) -> None:
    """In either case of its letters, which a builder takes for one name."""
    made.env.update(BUILD_ARGS="http_proxy=http://own.test", https_proxy="http://p.test")
    made.env["HTTP_PROXY"] = "http://environment.test"
    spec = base_spec(made.settings(), None)
    assert spec.args["http_proxy"] == "http://own.test"
    assert spec.proxies == {"https_proxy": "http://p.test", "HTTPS_PROXY": "http://p.test"}
