"""Builds with BuildKit: the calls of bake, and the use of their results."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_buildx import DIGEST, FLAGS, NAME, REFUSED, UNKNOWN_FLAG, Call, FakeBuildx
from fake_engine import (
    BASE_IMAGE,
    COMMITS,
    IMAGE,
    SEARCH_PATHS,
    BufferConsole,
    Site,
    channel,
    console_text,
    new_site,
)

from guix_tasks.buildkit.build import BuildOptions, build
from guix_tasks.engine.api import NoEngine
from guix_tasks.errors import BuilderError, NoEngineError, RegistryError, StageError, UsageError
from guix_tasks.guix import search_paths, with_search_paths
from guix_tasks.oci.labels import BASE_DIGEST, BASE_NAME, CREATED
from guix_tasks.stages.declarations import CustomStage
from guix_tasks.stages.images import CHANNELS_LABEL, PACKAGES_LABEL, PREVIOUS
from guix_tasks.stages.project import Project
from guix_tasks.stages.runner import STAGE_TRIES

if TYPE_CHECKING:
    from collections.abc import Callable

RESOLVED = f"(list {channel('guix', 'https://guix.test', COMMITS['guix'])})"
REPORT = f"(list\n  {channel('guix', 'https://guix.test', COMMITS['guix'])})"
"""The same channels in the format of another program."""
INSTALLED = "hello\t1.0\tout\t/gnu/store/hello"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return new_site(tmp_path / "project")


@pytest.fixture
def fake(tmp_path: Path) -> FakeBuildx:
    answers = {"resolved": RESOLVED, "pull": REPORT, "install": INSTALLED}
    buildx = FakeBuildx(tmp_path / "buildx", answers=answers)
    buildx.add()
    return buildx


def bake(site: Site, fake: FakeBuildx, **options: bool) -> str:
    return build(site.project(), fake.program(), BuildOptions(**options))


def bake_messages(site: Site, fake: FakeBuildx, **options: bool) -> str:
    project = site.project()
    build(project, fake.program(), BuildOptions(**options))
    return console_text(project)


def bakes(fake: FakeBuildx) -> list[Call]:
    return fake.calls("bake")


def write_lock(site: Site) -> None:
    site.lock.write_text(f"{RESOLVED}\n")


# --- Calls of bake --------------------------------------------------------------------------


def test_build_makes_three_calls_of_bake(site: Site, fake: FakeBuildx) -> None:
    assert bake(site, fake) == f"{IMAGE}@{DIGEST}"
    assert [call.argv[-1] for call in bakes(fake)] == ["asked", "reports", "image"]
    for call in bakes(fake):
        assert f"--builder={NAME}" in call.argv
        assert "--allow=security.insecure" in call.argv
        assert "--allow=network.host" not in call.argv
        assert "--progress=plain" in call.argv
        assert "--allow=fs=*" in call.argv


def test_only_the_last_call_has_an_output(site: Site, fake: FakeBuildx) -> None:
    site.env["TAGS"] = "1.0 stable"
    bake(site, fake)
    asked, reports, image = (call.target for call in bakes(fake))
    for target in (asked, reports):
        assert [output.split(",")[0] for output in target["output"]] == ["type=local"]
        assert "tags" not in target
    assert {"tags", "output", "cache-to"}.isdisjoint(bakes(fake)[-1].base)
    assert image["output"] == ["type=registry"]
    assert image["tags"] == [IMAGE, f"{IMAGE.rpartition(':')[0]}:1.0",
                             f"{IMAGE.rpartition(':')[0]}:stable"]  # fmt: skip


def test_steps_run_the_scripts_of_work_containers(site: Site, fake: FakeBuildx) -> None:
    site.write("a.pub", "a key")
    site.env.update(GUIX_SUBSTITUTE_KEYS="a.pub", GUIX_CORES="2")
    bake(site, fake)
    files = bakes(fake)[1].files
    assert "guix pull --channels=/var/guix/guix-tasks/channels.scm" in files["work/pull/stage"]
    assert files["work/pull/channels.scm"] == RESOLVED
    assert "guix package --install=hello" in files["work/install/stage"]
    for stage in ("pull", "install"):
        assert files[f"work/{stage}/entry-point.sh"].startswith("#!")
        assert files[f"work/{stage}/keys/0-a.pub"] == "a key"
        assert files[f"work/{stage}/environment"] == ""  # a secret is mounted over it
    assert "GUIX_CORES=2" in files["environment"]


def test_build_without_pull_only_installs(site: Site, fake: FakeBuildx) -> None:
    bake(site, fake, pull=False)
    asked, reports, _ = (call.files for call in bakes(fake))
    assert "AS resolving" not in asked["Dockerfile"]
    assert "AS pull" not in reports["Dockerfile"]
    assert "AS install" in reports["Dockerfile"]
    assert not site.lock.exists()


def test_build_without_packages_only_pulls(site: Site, fake: FakeBuildx) -> None:
    site.env["GUIX_PACKAGES"] = ""
    bake(site, fake)
    dockerfile = bakes(fake)[-1].files["Dockerfile"]
    assert "AS pull" in dockerfile
    assert "AS install" not in dockerfile
    assert PACKAGES_LABEL not in dockerfile


def test_empty_build_is_rejected_before_the_first_call(site: Site, fake: FakeBuildx) -> None:
    site.env["GUIX_PACKAGES"] = ""
    with pytest.raises(UsageError, match="cannot install: no packages"):
        bake(site, fake, pull=False)
    assert fake.calls() == []


@pytest.mark.parametrize("force", [True, False])
def test_force_makes_each_step_unique(site: Site, fake: FakeBuildx, *, force: bool) -> None:
    write_lock(site)
    for _ in range(2):
        bake(site, fake, force=force)
    first, second = (call.files for call in bakes(fake)[1::3])
    for stage in ("pull", "install"):
        name = f"work/{stage}/again"
        assert (name in first) == force
        assert (first.get(name) != second.get(name)) == force


def test_frontend_is_set_for_an_old_builder(site: Site, fake: FakeBuildx) -> None:
    bake(site, fake)
    assert "BUILDKIT_SYNTAX" not in bakes(fake)[-1].target["args"]
    fake.fail(UNKNOWN_FLAG, "--call=check", without=("BUILDKIT_SYNTAX",))
    bake(site, fake)
    assert bakes(fake)[-1].target["args"]["BUILDKIT_SYNTAX"] == "docker/dockerfile:1"


def test_host_network_is_allowed_if_configured(site: Site, fake: FakeBuildx) -> None:
    site.env["NETWORK"] = "host"
    bake(site, fake)
    for call in bakes(fake):
        assert "--allow=network.host" in call.argv
        assert call.base["network"] == "host"
    assert "--network=host" in bakes(fake)[-1].files["Dockerfile"]


def store_ids(fake: FakeBuildx) -> set[str]:
    """Return the IDs of the cache mounts with the warm store in the last call of bake."""
    return set(re.findall(r"id=([^,]*-store-[^,$]*)", bakes(fake)[-1].files["Dockerfile"]))


def test_each_trust_setting_has_its_own_store(site: Site, fake: FakeBuildx, tmp_path: Path) -> None:
    stores = []
    key = tmp_path / "other.pub"
    key.write_text("(public-key (ecc (curve Ed25519) (q #ABCD#)))")
    for answers, env, options in (
        ({}, {}, {}),
        ({}, {"GUIX_PACKAGES": "hello tar"}, {}),
        ({"keys": "other"}, {}, {}),
        ({"keys": ""}, {"GUIX_SUBSTITUTE_KEYS": str(key)}, {}),
        ({}, {}, {"authenticate": False}),
    ):
        fake.answer(**answers)
        site.env |= env
        bake(site, fake, **options)
        stores.append(store_ids(fake))
    assert [len(names) for names in stores] == [1] * len(stores)
    assert stores[0] == stores[1]
    assert len(set.union(*stores)) == len(stores) - 1


def test_disabled_cache_volume_uses_the_store_of_the_image(site: Site, fake: FakeBuildx) -> None:
    site.env["CACHE_VOLUME"] = ""
    bake(site, fake)
    assert "type=cache" not in bakes(fake)[-1].files["Dockerfile"]
    assert "work/pull/collect.scm" in bakes(fake)[-1].files


@pytest.mark.parametrize("process", ["/var/guix/guix-tasks/stage pull", "/bin/sh -c result"])
def test_steps_run_again_if_the_builder_has_lost_the_store(
    site: Site, fake: FakeBuildx, process: str
) -> None:
    write_lock(site)
    error = f'process "{process}" did not complete successfully: exit code: 113'
    fake.fail(f"ERROR: failed to solve: {error}", "bake", "reports", once=True)
    assert "the builder's cache lacks store items" in bake_messages(site, fake)
    assert [call.argv[-1] for call in bakes(fake)] == ["asked", "reports", "reports", "image"]
    again = [{name for name in call.files if name.endswith("/again")} for call in bakes(fake)]
    assert again[1] == set()
    assert again[2] == {"work/pull/again", "work/install/again"}


@pytest.mark.parametrize("name", ["guest\nRUN touch /canary", "$HOME", "a b", "", "-x"])
def test_user_name_cannot_become_an_instruction(site: Site, fake: FakeBuildx, name: str) -> None:
    fake.answer(user="1000", name=name)
    bake(site, fake)
    users = [line for line in bakes(fake)[-1].files["Dockerfile"].splitlines() if "USER" in line]
    # The keys of the base, the two parts of the first stage, and the image.
    assert users == ["USER root", "USER root", "USER root", "USER 1000"]
    fake.answer(user="-1")
    with pytest.raises(BuilderError, match="has an invalid name"):
        bake(site, fake)


def test_engine_without_a_bridge_builds_on_the_host_network(site: Site, fake: FakeBuildx) -> None:
    site.engine.details = replace(site.engine.details, has_bridge=False)
    fake.add("default", "docker")
    bake(site, fake)
    assert "--allow=network.host" not in bakes(fake)[-1].argv  # the builder has a bridge
    site.env["BUILDX_DRIVER"] = "docker"
    bake(site, fake)
    assert "--allow=network.host" in bakes(fake)[-1].argv


def test_image_keeps_the_user_of_the_base(site: Site, fake: FakeBuildx) -> None:
    fake.answer(user="1000", name="guest")
    bake(site, fake)
    dockerfile = bakes(fake)[-1].files["Dockerfile"]
    assert dockerfile.index("USER root") < dockerfile.index("AS install")
    assert dockerfile.rindex("USER guest") > dockerfile.index("AS install")


def test_mounts_are_available_in_the_steps(site: Site, fake: FakeBuildx) -> None:
    site.env["MOUNTS"] = "context:/a channels.scm:/b:ro"
    bake(site, fake)
    call = bakes(fake)[-1]
    assert call.target["contexts"]["mount-0"] == str(site.directory / "context")
    assert "https://guix.test" in call.files["work/mounts/1"]


# --- Channels and the lock file -------------------------------------------------------------


def test_floating_channels_are_resolved_first_and_locked(site: Site, fake: FakeBuildx) -> None:
    assert "the channels are locked in" in bake_messages(site, fake)
    asked, reports, _ = (call.files for call in bakes(fake))
    assert "AS resolving" in asked["Dockerfile"]
    assert (
        asked["work/resolve/channels.scm"] == (site.directory / "channels.scm").read_text().strip()
    )
    assert "resolve.scm" in asked["work/resolve/stage"]
    assert asked["work/resolve/again"]
    assert "AS resolving" not in reports["Dockerfile"]
    assert site.lock.read_text() == f"{RESOLVED}\n"


def test_next_build_repeats_the_same_pull(site: Site, fake: FakeBuildx) -> None:
    """The builder's cache then has the step of the pull."""
    for _ in range(3):
        bake(site, fake)
    steps = [call.files for call in bakes(fake)[1::3]]
    assert len({step["work/pull/channels.scm"] for step in steps}) == 1
    assert len({step["Dockerfile"] for step in steps}) == 1
    assert site.lock.read_text() == f"{RESOLVED}\n"
    assert ["AS resolving" in call.files["Dockerfile"] for call in bakes(fake)[::3]] == [
        True, False, False,
    ]  # fmt: skip


def test_pulled_channels_are_locked_if_they_differ(site: Site, fake: FakeBuildx) -> None:
    other = f"(list {channel('guix', 'https://guix.test', 'c' * 40)})"
    fake.answer(pull=other)
    bake(site, fake)
    assert site.lock.read_text() == f"{other}\n"


def test_update_ignores_the_lock(site: Site, fake: FakeBuildx) -> None:
    site.lock.write_text(f"(list {channel('guix', 'https://guix.test', 'c' * 40)})\n")
    bake(site, fake, update=True)
    assert bakes(fake)[1].files["work/pull/channels.scm"] == RESOLVED
    assert site.lock.read_text() == f"{RESOLVED}\n"


BARE = f"(list {channel('mine', 'https://m.test', 'c' * 40, introduced=False)})"


@pytest.mark.parametrize("update", [True, False])
def test_channel_without_introduction_is_rejected_before_the_first_call(
    site: Site, fake: FakeBuildx, *, update: bool
) -> None:
    site.write("channels.scm", BARE)
    with pytest.raises(UsageError, match="the channel 'mine' has no introduction"):
        bake(site, fake, update=update)
    assert fake.calls() == []


@pytest.mark.parametrize(
    ("report", "calls"), [("resolved", ["asked"]), ("pull", ["asked", "reports"])]
)
def test_computed_channel_without_introduction_is_rejected_after_its_report(
    site: Site, fake: FakeBuildx, report: str, calls: list[str]
) -> None:
    site.write("channels.scm", "(my-channels)")
    fake.answer(**{report: BARE})
    with pytest.raises(StageError, match="the channel 'mine' has no introduction"):
        bake(site, fake)
    assert [call.argv[-1] for call in bakes(fake)] == calls
    assert not site.lock.exists()


def test_channel_without_introduction_is_pulled_if_allowed(site: Site, fake: FakeBuildx) -> None:
    site.write("channels.scm", BARE)
    fake.answer(resolved=BARE, pull=BARE)
    assert bake(site, fake, authenticate=False)
    asked, reports, image = bakes(fake)
    assert "resolve.scm --disable-authentication" in asked.files["work/resolve/stage"]
    assert "guix pull --disable-authentication" in reports.files["work/pull/stage"]
    assert "org.guix-tasks.authentication" in image.files["Dockerfile"]


def test_channels_without_a_lock_are_resolved_in_every_build(site: Site, fake: FakeBuildx) -> None:
    site.env["GUIX_CHANNELS_LOCK"] = ""
    for _ in range(2):
        bake(site, fake)
    assert all("AS resolving" in call.files["Dockerfile"] for call in bakes(fake)[::3])
    assert not site.lock.exists()


def test_channels_of_the_base_are_resolved_by_default(site: Site, fake: FakeBuildx) -> None:
    site.env["GUIX_CHANNELS"] = ""
    bake(site, fake)
    files = bakes(fake)[0].files
    assert "work/resolve/channels.scm" not in files
    assert "built-channels.scm" in files["work/resolve/stage"]
    assert bakes(fake)[1].files["work/pull/channels.scm"] == RESOLVED


def test_mismatched_lock_is_rejected_before_the_first_call(site: Site, fake: FakeBuildx) -> None:
    write_lock(site)
    site.write("channels.scm", f"(list {channel('mine', 'https://m.test')})")
    with pytest.raises(UsageError, match="does not fit GUIX_CHANNELS"):
        bake(site, fake)
    assert fake.calls() == []


def test_failed_pull_writes_no_lock(site: Site, fake: FakeBuildx) -> None:
    fake.fail(
        'ERROR: target reports: failed to solve: process "/var/guix/guix-tasks/entry-point.sh '
        '/var/guix/guix-tasks/stage pull" did not complete successfully: exit code: 1',
        "bake",
        "reports",
    )
    with pytest.raises(StageError, match="pull: the command failed with exit status 1"):
        bake(site, fake)
    assert not site.lock.exists()
    assert [call.argv[-1] for call in bakes(fake)] == ["asked", "reports"]


# --- Labels and platforms -------------------------------------------------------------------


def label_values(call: Call) -> dict[str, str]:
    """Return the labels of an image by platform and name, with the values of their arguments."""
    lines = call.files["Dockerfile"].splitlines()
    names = [line.split(" ", 1)[1].split("=", 1) for line in lines if line.startswith("LABEL ")]
    arguments = call.target["args"]
    return {f"{value} {name}": arguments[value.strip('"${}')] for name, value in names}


def test_labels_describe_the_content_of_the_image(site: Site, fake: FakeBuildx) -> None:
    bake(site, fake)
    labels = {name.split()[1]: value for name, value in label_values(bakes(fake)[-1]).items()}
    assert labels[CHANNELS_LABEL] == REPORT
    assert labels[PACKAGES_LABEL] == "hello@1.0"
    assert "LABEL" not in bakes(fake)[1].files["Dockerfile"]


def test_search_paths_are_variables_of_the_image(site: Site, fake: FakeBuildx) -> None:
    report = f"{INSTALLED}\n{SEARCH_PATHS['python']}\n{SEARCH_PATHS['curl']}"
    base = ["GUIX_PYTHONPATH=/srv/python", "PATH=/bin", "HOME=/root"]
    fake.answer(install=report, environment="\n".join(base))
    bake(site, fake)
    call = bakes(fake)[-1]
    arguments = re.findall(r'^ENV (\w+)="\${(\w+)}"$', call.files["Dockerfile"], re.MULTILINE)
    variables = [f"{name}={call.target['args'][argument]}" for name, argument in arguments]
    expected = with_search_paths(base, search_paths(report))
    assert sorted(variables) == sorted(set(expected) - set(base))
    assert [name for name, _ in arguments] == ["GUIX_PYTHONPATH", "SSL_CERT_FILE"]


def test_creation_label_is_the_time_of_the_steps(site: Site, fake: FakeBuildx) -> None:
    """The time of a cached step stays the same, and so does the digest of the image."""
    fake.answer(created="2001-02-03T04:05:06Z")
    bake(site, fake)
    labels = {name.split()[1]: value for name, value in label_values(bakes(fake)[-1]).items()}
    assert labels[CREATED] == "2001-02-03T04:05:06Z"
    assert labels[BASE_NAME] == str(site.settings().base_image)
    assert labels[BASE_DIGEST] == site.engine.remote_digest(labels[BASE_NAME])


def test_each_platform_has_separate_labels(site: Site, fake: FakeBuildx) -> None:
    fake.add(endpoint="ssh://b.test", platforms=["linux/arm64"])
    site.env["PLATFORMS"] = "linux/amd64 linux/arm64"
    fake.answer(**{"linux_arm64/install": "tar\t2.0\tout\t/gnu/store/tar"})
    bake(site, fake)
    call = bakes(fake)[-1]
    assert call.target["platforms"] == ["linux/amd64", "linux/arm64"]
    packages = {value for name, value in label_values(call).items() if PACKAGES_LABEL in name}
    assert packages == {"hello@1.0", "tar@2.0"}


def test_default_platform_is_the_platform_of_the_builder(site: Site, fake: FakeBuildx) -> None:
    fake.change(builders={})
    fake.add(platforms=["linux/arm64", "linux/amd64"])
    bake(site, fake)
    assert bakes(fake)[0].target["platforms"] == ["linux/arm64"]


@pytest.mark.parametrize("platforms", ["", "linux/arm64"])
def test_stopped_builder_is_started_to_get_its_platforms(
    site: Site, fake: FakeBuildx, platforms: str
) -> None:
    fake.change(builders={})
    fake.add(status="stopped", platforms=["linux/arm64"])
    site.env["PLATFORMS"] = platforms
    bake(site, fake)
    assert bakes(fake)[0].target["platforms"] == ["linux/arm64"]


def test_missing_platform_of_a_stopped_builder_is_rejected(site: Site, fake: FakeBuildx) -> None:
    fake.change(builders={})
    fake.add(status="stopped")
    site.env["PLATFORMS"] = "linux/arm64"
    with pytest.raises(BuilderError, match="has no linux/arm64"):
        bake(site, fake)
    assert bakes(fake) == []


@pytest.mark.parametrize("platforms", ["", "linux/amd64"])
def test_remote_buildkit_needs_no_engine(site: Site, fake: FakeBuildx, platforms: str) -> None:
    site.env.update(
        BUILDX_DRIVER="remote", BUILDX_NODES="tcp://b.test:1", BUILDX_BUILDER="far",
        PLATFORMS=platforms,
    )  # fmt: skip
    fake.add("far", "remote", endpoint="tcp://b.test:1")
    project = site.project(NoEngine(NoEngineError("no engine")))
    assert build(project, fake.program(), BuildOptions()) == f"{IMAGE}@{DIGEST}"


# --- Rejected builds ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "options", "words"),
    [
        ({"BUILDX_OUTPUT": "oci"}, {"by_digest": True}, "--by-digest .* BUILDX_OUTPUT=registry"),
        (
            {"BUILDX_OUTPUT": "load", "PLATFORMS": "linux/amd64 linux/386"},
            {},
            "BUILDX_OUTPUT=load holds one platform",
        ),
        (
            {"BUILDX_OUTPUT": "docker", "PLATFORMS": "linux/amd64 linux/386"},
            {},
            "BUILDX_OUTPUT=docker holds one platform",
        ),
    ],
)
def test_impossible_output_is_rejected_before_the_first_call(
    site: Site, fake: FakeBuildx, env: dict[str, str], options: dict[str, bool], words: str
) -> None:
    site.env.update(env)
    with pytest.raises(UsageError, match=words):
        bake(site, fake, **options)
    assert fake.calls() == []


def test_load_without_an_engine_is_rejected_at_once(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_OUTPUT"] = "load"
    project = site.project(NoEngine(NoEngineError("no engine")))
    with pytest.raises(NoEngineError):
        build(project, fake.program(), BuildOptions())
    assert fake.calls() == []


def test_builder_without_insecure_steps_builds_nothing(site: Site, fake: FakeBuildx) -> None:
    fake.fail(REFUSED, "--call=check")
    with pytest.raises(BuilderError, match="does not allow insecure steps"):
        bake(site, fake)
    assert bakes(fake) == []


def test_emulated_platform_is_built_only_without_isolation(site: Site, fake: FakeBuildx) -> None:
    fake.change(builders={})
    fake.add(platforms=["linux/amd64", "linux/arm64"])
    site.env["PLATFORMS"] = "linux/arm64"
    with pytest.raises(UsageError, match="is emulated by the builder"):
        bake(site, fake)
    assert bakes(fake) == []
    site.env["GUIX_SANDBOX"] = "nochroot"
    assert ", builds not isolated" in bake_messages(site, fake)


def test_warning_names_the_unused_setting_stage_memory(site: Site, fake: FakeBuildx) -> None:
    assert "STAGE_MEMORY" not in bake_messages(site, fake)
    site.env["STAGE_MEMORY"] = "1g"
    assert "warning: STAGE_MEMORY is for work containers" in bake_messages(site, fake)


def test_warning_names_the_omitted_custom_stages(site: Site, fake: FakeBuildx) -> None:
    stages = tuple(CustomStage(name, ("make",), "install") for name in ("deps", "tested"))
    project = replace(site.project(), custom_stages=stages)
    build(project, fake.program(), BuildOptions())
    warning = "warning: deps and tested will not be in the image: buildx.build"
    assert warning in console_text(project)


# --- Outputs --------------------------------------------------------------------------------


def test_push_by_digest_has_no_tag_and_writes_a_record(site: Site, fake: FakeBuildx) -> None:
    site.env.update(PLATFORMS="linux/amd64", TAGS="stable")
    name = IMAGE.rpartition(":")[0]
    assert bake(site, fake, by_digest=True) == f"{name}@{DIGEST}"
    target = bakes(fake)[-1].target
    assert target["tags"] == []
    (output,) = target["output"]
    assert set(output.split(",")) == {
        "type=image", f"name={name}", "push-by-digest=true", "name-canonical=true", "push=true",
    }  # fmt: skip
    (file,) = (site.directory / "out" / "digests").iterdir()
    assert file.name == "linux-amd64.json"
    assert json.loads(file.read_text()) == {
        "repository": name, "platforms": ["linux/amd64"], "digest": DIGEST,
        "commits": {"guix": COMMITS["guix"]},
    }  # fmt: skip


def output_names(site: Site) -> list[str]:
    """Return the names of the files in ``out/`` except the logs."""
    return [file.name for file in (site.directory / "out").iterdir() if file.name != "logs"]


def test_failed_push_by_digest_writes_no_record(site: Site, fake: FakeBuildx) -> None:
    fake.fail("ERROR: failed to push registry.test/x: 403 Forbidden", "bake", "image")
    with pytest.raises(RegistryError, match="the registry refuses"):
        bake(site, fake, by_digest=True)
    assert output_names(site) == []


@pytest.mark.parametrize("kind", ["oci", "docker"])
def test_archive_is_written_to_out(site: Site, fake: FakeBuildx, kind: str) -> None:
    site.env["BUILDX_OUTPUT"] = kind
    path = site.directory / "out" / f"app-1.{kind}.tar"
    assert bake(site, fake) == str(path)
    assert output_names(site) == [path.name]
    assert path.read_text() == "an archive"
    target = bakes(fake)[-1].target
    assert target["tags"] == [IMAGE]
    assert target["output"][0].startswith(f"type={kind},dest={path.parent}/.")


def test_archive_is_written_to_a_directory_with_a_comma(tmp_path: Path, fake: FakeBuildx) -> None:
    site = new_site(tmp_path / "a, b", BUILDX_OUTPUT="oci")
    assert bake(site, fake) == str(site.directory / "out" / "app-1.oci.tar")


@pytest.mark.parametrize("fault", ["an error", "Ctrl-C"])
def test_archive_is_replaced_only_when_complete(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    site.env["BUILDX_OUTPUT"] = "oci"
    path = site.write("out/app-1.oci.tar", "the one before")
    if fault == "Ctrl-C":

        def put(_console: BufferConsole, data: bytes) -> None:
            if b"baking image" in data:
                (temporary,) = {*output_names(site)} - {path.name}
                assert (path.parent / temporary).read_text() == "an archive"
                raise KeyboardInterrupt

        monkeypatch.setattr(BufferConsole, "put", put)
        with pytest.raises(KeyboardInterrupt):
            bake(site, fake)
    else:
        fake.fail("ERROR: no space left on device", "bake", "image")
        with pytest.raises(BuilderError):
            bake(site, fake)
    assert output_names(site) == [path.name]
    assert path.read_text() == "the one before"


def load_image_on_bake(site: Site, monkeypatch: pytest.MonkeyPatch, image: str = IMAGE) -> None:
    """Make the engine load a new image when bake builds the image."""

    def put(_console: BufferConsole, data: bytes) -> None:
        if b"baking image" in data:
            site.engine.make_image({}, {"/new": b""}, tag=image)

    monkeypatch.setattr(BufferConsole, "put", put)


def test_loading_an_image_keeps_the_previous_image(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.env["BUILDX_OUTPUT"] = "load"
    previous_image = site.engine.make_image({}, {"/old": b""}, tag=IMAGE)
    load_image_on_bake(site, monkeypatch)
    assert bake(site, fake) == IMAGE
    target = bakes(fake)[-1].target
    assert (target["output"], target["tags"]) == (["type=docker"], [IMAGE])
    assert site.image().id != previous_image.id
    assert site.image(PREVIOUS).id == previous_image.id


def test_loading_an_unchanged_image_keeps_the_previous_image(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_OUTPUT"] = "load"
    previous_image = site.engine.make_image({}, {"/old": b""}, tag=f"{IMAGE}-{PREVIOUS}")
    site.engine.make_image({}, {"/new": b""}, tag=IMAGE)
    bake(site, fake)
    assert site.image(PREVIOUS).id == previous_image.id


def test_image_of_another_platform_is_loaded_under_the_tag_of_the_platform(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks such as `inv verify` and `inv push` use that tag."""
    site.env.update(
        BUILDX_OUTPUT="load", PLATFORMS="linux/arm64", GUIX_SANDBOX="nochroot", TAGS="stable"
    )
    fake.change(builders={})
    fake.add(platforms=["linux/amd64", "linux/arm64"])
    native = site.engine.make_image({}, {"/native": b""}, tag=IMAGE)
    load_image_on_bake(site, monkeypatch, f"{IMAGE}-linux-arm64")
    assert bake(site, fake) == f"{IMAGE}-linux-arm64" == str(site.ledger.image)
    assert bakes(fake)[-1].target["tags"] == [f"{IMAGE}-linux-arm64"]
    assert site.engine.tags[IMAGE] == native.id


def test_failed_load_changes_no_tag(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_OUTPUT"] = "load"
    site.engine.make_image({}, {"/old": b""}, tag=IMAGE)
    tags = dict(site.engine.tags)
    fake.fail("ERROR: no", "bake", "image")
    with pytest.raises(BuilderError):
        bake(site, fake)
    assert site.engine.tags == tags


# --- Caches and attestations ----------------------------------------------------------------


def test_all_calls_read_caches_and_the_last_one_writes_them(site: Site, fake: FakeBuildx) -> None:
    site.env.update(
        CACHE_IMAGE="registry.test/cache",
        BUILDX_CACHE_FROM="type=gha",
        BUILDX_CACHE_TO="type=local,dest=/x",
    )
    bake(site, fake)
    sources = [call.target["cache-from"] for call in bakes(fake)]
    assert sources[0] == sources[1] == sources[2] == bakes(fake)[0].base["cache-from"]
    github, registry = sources[0]
    assert github == "type=gha"
    assert registry.startswith("type=registry,ref=registry.test/cache:buildx-")
    assert [call.target.get("cache-to", []) for call in bakes(fake)[:2]] == [[], []]
    assert bakes(fake)[2].target["cache-to"] == ["type=local,dest=/x", f"{registry},mode=max"]


def test_builder_of_the_engine_uses_no_cache_image(site: Site, fake: FakeBuildx) -> None:
    site.env.update(CACHE_IMAGE="registry.test/cache", BUILDX_DRIVER="docker")
    fake.add("default", "docker")
    bake(site, fake)
    assert bakes(fake)[-1].target["cache-from"] == bakes(fake)[-1].target["cache-to"] == []


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", ["type=provenance,disabled=true"]),
        ("sbom", ["type=provenance,disabled=true", "type=sbom"]),
        ("provenance sbom", ["type=provenance,mode=min", "type=sbom"]),
    ],
)
def test_attestations_follow_the_settings(
    site: Site, fake: FakeBuildx, setting: str, expected: list[str]
) -> None:
    site.env["BUILDX_ATTESTATIONS"] = setting
    bake(site, fake)
    disabled = ["type=provenance,disabled=true"]
    assert [call.target["attest"] for call in bakes(fake)] == [disabled, disabled, expected]
    assert bakes(fake)[-1].base["attest"] == disabled


# --- The base image -------------------------------------------------------------------------


def test_local_base_image_is_copied_to_the_builder(
    site: Site, fake: FakeBuildx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    site.engine.make_image({}, {"/x": b""}, tag=BASE_IMAGE)
    assert f"base: copying {BASE_IMAGE} " in bake_messages(site, fake)
    for call in bakes(fake):
        location, _, digest = call.base["contexts"][BASE_IMAGE].rpartition("@")
        index = Path(location.removeprefix("oci-layout://")) / "index.json"
        assert json.loads(index.read_text())["manifests"][0]["digest"] == digest


@pytest.mark.parametrize("location", ["registry", "pulled", "engine"])
def test_available_base_image_is_not_copied(site: Site, fake: FakeBuildx, location: str) -> None:
    if location == "pulled":
        site.engine.pull(BASE_IMAGE, None)
    if location == "engine":
        site.engine.make_image({}, {"/x": b""}, tag=BASE_IMAGE)
        site.env["BUILDX_DRIVER"] = "docker"
        fake.add("default", "docker")
    assert "copying" not in bake_messages(site, fake)
    assert bakes(fake)[0].base["contexts"] == {}


# --- Secrets --------------------------------------------------------------------------------


def test_credentials_are_only_in_the_environment(site: Site, fake: FakeBuildx) -> None:
    site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD="hunter2-x")  # noqa: S106
    messages = bake_messages(site, fake)
    pair = base64.b64encode(b"some-user:hunter2-x").decode()
    for call in bakes(fake):
        assert json.loads(call.env.pop("DOCKER_AUTH_CONFIG")) == {
            "auths": {"registry.test": {"auth": pair}}
        }
        recorded = repr((call.argv, call.env, call.files, call.config))
        assert "hunter2-x" not in recorded
        assert pair not in recorded
    assert "hunter2-x" not in messages
    assert not (fake.directory / "config" / "config.json").exists()


def test_password_of_a_proxy_is_only_in_private_files(site: Site, fake: FakeBuildx) -> None:
    site.env["https_proxy"] = "http://me:hunter2-x@proxy.test:1"
    messages = bake_messages(site, fake)
    for call in bakes(fake):
        holders = [name for name, text in call.files.items() if "hunter2-x" in text]
        # Both are in a private directory; builders do not record such arguments.
        assert sorted(holders) == ["bake.json", "environment"]
        assert json.loads(call.files["bake.json"])["target"]["base"]["args"]["https_proxy"]
        assert call.target["secret"][0].startswith("id=environment,src=")
        assert "hunter2-x" not in call.text
    assert "hunter2-x" not in messages


def test_dry_run_redacts_secrets_of_the_bake_file(site: Site, fake: FakeBuildx) -> None:
    site.env.update(
        BUILD_ARGS='VERSION=1.0 TOKEN="hunter2\\"x"',
        BUILDX_CACHE_TO="type=s3,bucket=buck,secret_access_key=hunter3",
    )
    project = site.project()
    build(project, fake.program(project.console, perform=False), BuildOptions())
    messages = console_text(project)
    assert '"TOKEN": "***"' in messages
    assert '"VERSION": "1.0"' in messages
    assert "type=s3,bucket=buck,secret_access_key=***" in messages
    assert "hunter" not in messages


KILLED_BUILD = """
import subprocess, sys
from pathlib import Path
from fake_buildx import FakeBuildx, Program
from fake_engine import new_site
from guix_tasks.buildkit.build import BuildOptions, build
subprocess.Popen = Program
directory = Path(sys.argv[1])
site = new_site(directory / "site", BUILDX_DRIVER="docker-container", BUILD_ARGS="TOKEN=hunter2-x")
fake = FakeBuildx(directory / "fake")
fake.add()
fake.fail("too late", "bake", sleeps=60)
project = site.project()
build(project, fake.program(project.console), BuildOptions())
"""


def test_killed_build_leaves_no_secret(tmp_path: Path) -> None:
    """The inputs of BuildKit are files, which are removed even if ``inv`` is killed."""
    temp = tmp_path / "tmp"
    temp.mkdir()
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "TMPDIR": str(temp),
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parents[1])]),
    }
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_BUILD, str(tmp_path)], env=environment, start_new_session=True
    ) as process:
        try:
            wait_until(lambda: any("hunter2-x" in read_text(f) for f in temp.rglob("bake.json")))
            process.kill()
            process.wait()
            wait_until(lambda: list(temp.iterdir()) == [])
        finally:
            with suppress(ProcessLookupError):  # the whole group may have ended
                os.killpg(process.pid, signal.SIGKILL)  # buildx outlives inv


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def read_text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def test_files_of_bake_are_removed(site: Site, fake: FakeBuildx, tmp_path: Path) -> None:
    bake(site, fake)
    (file,) = {word.partition("=")[2] for word in bakes(fake)[0].argv if "--file=" in word}
    assert file.endswith("/bake.json")
    assert not type(tmp_path)(file).parent.exists()


# --- Timeout and dry run --------------------------------------------------------------------


def test_build_is_stopped_at_the_timeout(site: Site, fake: FakeBuildx) -> None:
    site.env["STAGE_TIMEOUT"] = "1s"
    fake.fail("never said", "bake", "reports", sleeps=30)
    with pytest.raises(StageError, match=r"STAGE_TIMEOUT \(1\.0 s a stage\); nothing was pushed"):
        bake(site, fake, pull=False)
    assert not site.lock.exists()


def test_dry_run_prints_calls_and_files_without_changes(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_OUTPUT"] = "oci"
    site.engine.make_image({}, {"/x": b""}, tag=BASE_IMAGE)
    snapshot = (dict(site.engine.tags), site.engine.changing_calls())
    console, project = BufferConsole(), site.project()
    dry = Project(project.settings, project.engine, console)
    assert build(dry, fake.program(console, perform=False), BuildOptions()) == ""
    messages = console.text
    assert messages.count("+ docker buildx bake ") == 3
    assert "--- Dockerfile\n" in messages
    assert messages.count("RUN --security=insecure") == 2
    assert '"output"' in messages.partition("--- bake.json\n")[2]
    assert fake.changes() == []
    assert (site.engine.tags, site.engine.changing_calls()) == snapshot
    assert not (site.directory / "out").exists()
    assert not site.lock.exists()


@pytest.mark.parametrize("output", ["registry", "load"])
def test_dry_run_has_no_result(site: Site, fake: FakeBuildx, output: str) -> None:
    write_lock(site)
    site.env["BUILDX_OUTPUT"] = output
    project = site.project()
    assert build(project, fake.program(perform=False), BuildOptions()) == ""
    assert "buildx.build: registry.test" not in console_text(project)
    assert fake.changes() == []


def test_output_of_the_builder_is_shown(site: Site, fake: FakeBuildx) -> None:
    messages = bake_messages(site, fake)
    for target in ("asked", "reports", "image"):
        assert f"#1 baking {target}\n" in messages
    assert FLAGS not in messages


def test_unavailable_registry_is_reported_before_the_build(site: Site, fake: FakeBuildx) -> None:
    site.engine.registry.refusal = "connection refused"
    with pytest.raises(RegistryError, match="connection refused"):
        bake(site, fake)
    assert bakes(fake) == []


@pytest.mark.parametrize(
    "env",
    [{"BUILDX_OUTPUT": "load"}, {"BUILDX_NODES": "ssh://b.test", "BUILDX_OUTPUT": "registry"}],
)
def test_registry_is_checked_only_for_a_push_from_the_host_of_the_engine(
    site: Site, fake: FakeBuildx, env: dict[str, str]
) -> None:
    site.engine.registry.refusal = "connection refused"
    site.env |= env
    assert bake(site, fake)


def test_dry_run_continues_without_a_builder(site: Site, tmp_path: Path) -> None:
    """A real run of ``buildx.setup``, which a dry run only shows, would have created it."""
    empty = FakeBuildx(tmp_path / "empty")
    project = site.project()
    assert build(project, empty.program(project.console, perform=False), BuildOptions()) == ""
    assert console_text(project).count("+ docker buildx bake") == 3
    assert f"there is no builder {NAME} yet" in console_text(project)
    assert empty.changes() == []


def test_transient_failure_of_the_registry_is_retried(
    site: Site, fake: FakeBuildx, waits: list[float]
) -> None:
    error = "ERROR: failed to push registry.test/x: 429 Too Many Requests"
    fake.fail(error, "bake", "image", once=True)
    assert bake(site, fake)
    assert len(waits) == 1


STEP_FAILED = (
    'ERROR: failed to solve: process "/var/guix/guix-tasks/stage pull" '
    "did not complete successfully: exit code: 1"
)
CONNECTION_LOST = "guix pull: error: Git error: unexpected EOF"
BUILD_FAILED = "guix build: error: build of `/gnu/store/x.drv' failed"


def server_warning(host: str) -> str:
    return f"guix substitute: warning: {host}: connection failed: Connection refused"


def step_log(*lines: str, number: int = 7) -> str:
    """Format the output of a step as buildx does."""
    return "".join(f"#{number} {time}.5 {line}\n" for time, line in enumerate(lines, 1))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def test_transient_network_failure_of_a_step_is_retried(
    site: Site, fake: FakeBuildx, waits: list[float]
) -> None:
    fake.fail(step_log(CONNECTION_LOST) + STEP_FAILED, "bake", "reports", once=True)
    assert bake(site, fake)
    assert len(waits) == 1
    assert [call.argv[-1] for call in bakes(fake)] == ["asked", "reports", "reports", "image"]


def test_permanent_network_failure_of_a_step_is_reported(
    site: Site, fake: FakeBuildx, waits: list[float]
) -> None:
    fake.fail(step_log(CONNECTION_LOST) + STEP_FAILED, "bake", "reports")
    with pytest.raises(StageError, match="pull: the command failed with exit status 1"):
        bake(site, fake)
    assert len(waits) == STAGE_TRIES - 1


@pytest.mark.parametrize(
    "log",
    [
        step_log(BUILD_FAILED),
        step_log(CONNECTION_LOST, BUILD_FAILED),
        step_log("guix install: error: nonesuch: unknown package"),
        # The quoted log of a package's build is no message of Guix.
        step_log("entry-point: the last lines of /var/log/guix/x", CONNECTION_LOST),
        "",
    ],
)
def test_failed_package_build_is_not_retried(
    site: Site, fake: FakeBuildx, waits: list[float], log: str
) -> None:
    fake.fail(log + STEP_FAILED, "bake", "reports")
    with pytest.raises(StageError):
        bake(site, fake)
    assert waits == []


def test_build_fails_if_all_substitute_servers_are_unavailable(
    site: Site, fake: FakeBuildx, waits: list[float]
) -> None:
    site.env["GUIX_SUBSTITUTE_URLS"] = "https://a.test https://b.test"
    fake.fail(
        step_log(server_warning("a.test"), server_warning("b.test"), BUILD_FAILED) + STEP_FAILED,
        "bake", "reports",
    )  # fmt: skip
    with pytest.raises(StageError, match=r"no substitute server answers \(a\.test, b\.test\)"):
        bake(site, fake)
    assert len(waits) == STAGE_TRIES - 1


def test_one_available_server_is_enough(site: Site, fake: FakeBuildx, waits: list[float]) -> None:
    site.env["GUIX_SUBSTITUTE_URLS"] = "https://a.test https://b.test"
    fake.fail(step_log(server_warning("a.test"), BUILD_FAILED) + STEP_FAILED, "bake", "reports")
    with pytest.raises(StageError, match="the command failed"):
        bake(site, fake)
    assert waits == []


def test_unavailable_servers_are_ignored_with_fallback(
    site: Site, fake: FakeBuildx, waits: list[float]
) -> None:
    site.env |= {"GUIX_SUBSTITUTE_URLS": "https://a.test", "GUIX_FALLBACK": "yes"}
    fake.fail(step_log(server_warning("a.test")) + STEP_FAILED, "bake", "reports")
    with pytest.raises(StageError, match="the command failed"):
        bake(site, fake)
