"""The BuildKit way: what each call of bake is given, and what becomes of its answers."""

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
    Heard,
    Site,
    channel,
    heard,
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
"""The same channels in the words of another program."""
INSTALLED = "hello\t1.0\tout\t/gnu/store/hello"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return new_site(tmp_path / "project")


@pytest.fixture
def fake(tmp_path: Path) -> FakeBuildx:
    answers = {"resolved": RESOLVED, "pull": REPORT, "install": INSTALLED}
    made = FakeBuildx(tmp_path / "buildx", answers=answers)
    made.add()
    return made


def bake(site: Site, fake: FakeBuildx, **options: bool) -> str:
    return build(site.project(), fake.program(), BuildOptions(**options))


def said(site: Site, fake: FakeBuildx, **options: bool) -> str:
    project = site.project()
    build(project, fake.program(), BuildOptions(**options))
    return heard(project)


def bakes(fake: FakeBuildx) -> list[Call]:
    return fake.calls("bake")


def locked(site: Site) -> None:
    site.lock.write_text(f"{RESOLVED}\n")


# --- The calls ------------------------------------------------------------------------------


def test_it_takes_three_calls_of_bake(site: Site, fake: FakeBuildx) -> None:
    assert bake(site, fake) == f"{IMAGE}@{DIGEST}"
    assert [call.argv[-1] for call in bakes(fake)] == ["asked", "reports", "image"]
    for call in bakes(fake):
        assert f"--builder={NAME}" in call.argv
        assert "--allow=security.insecure" in call.argv
        assert "--allow=network.host" not in call.argv
        assert "--progress=plain" in call.argv
        assert "--allow=fs=*" in call.argv


def test_only_the_last_call_puts_anything_anywhere(site: Site, fake: FakeBuildx) -> None:
    site.env["TAGS"] = "1.0 stable"
    bake(site, fake)
    asked, reports, image = (call.target for call in bakes(fake))
    for target in (asked, reports):
        assert [each.split(",")[0] for each in target["output"]] == ["type=local"]
        assert "tags" not in target
    assert {"tags", "output", "cache-to"}.isdisjoint(bakes(fake)[-1].base)
    assert image["output"] == ["type=registry"]
    assert image["tags"] == [IMAGE, f"{IMAGE.rpartition(':')[0]}:1.0",
                             f"{IMAGE.rpartition(':')[0]}:stable"]  # fmt: skip


def test_the_steps_run_what_a_work_container_runs(site: Site, fake: FakeBuildx) -> None:
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


def test_without_pull_it_installs_alone(site: Site, fake: FakeBuildx) -> None:
    bake(site, fake, pull=False)
    asked, reports, _ = (call.files for call in bakes(fake))
    assert "AS resolving" not in asked["Dockerfile"]
    assert "AS pull" not in reports["Dockerfile"]
    assert "AS install" in reports["Dockerfile"]
    assert not site.lock.exists()


def test_without_packages_it_pulls_alone(site: Site, fake: FakeBuildx) -> None:
    site.env["GUIX_PACKAGES"] = ""
    bake(site, fake)
    dockerfile = bakes(fake)[-1].files["Dockerfile"]
    assert "AS pull" in dockerfile
    assert "AS install" not in dockerfile
    assert PACKAGES_LABEL not in dockerfile


def test_nothing_to_do_is_told_before_anything_is_done(site: Site, fake: FakeBuildx) -> None:
    site.env["GUIX_PACKAGES"] = ""
    with pytest.raises(UsageError, match="cannot install: no packages"):
        bake(site, fake, pull=False)
    assert fake.calls() == []


@pytest.mark.parametrize("again", [True, False])
def test_force_lets_each_step_be_like_none_before(
    site: Site, fake: FakeBuildx, *, again: bool
) -> None:
    locked(site)
    for _ in range(2):
        bake(site, fake, force=again)
    first, second = (call.files for call in bakes(fake)[1::3])
    for stage in ("pull", "install"):
        name = f"work/{stage}/again"
        assert (name in first) == again
        assert (first.get(name) != second.get(name)) == again


def test_a_frontend_is_asked_for_where_the_builders_own_is_old(
    site: Site, fake: FakeBuildx
) -> None:
    bake(site, fake)
    assert "BUILDKIT_SYNTAX" not in bakes(fake)[-1].target["args"]
    fake.fail(UNKNOWN_FLAG, "--call=check", without=("BUILDKIT_SYNTAX",))
    bake(site, fake)
    assert bakes(fake)[-1].target["args"]["BUILDKIT_SYNTAX"] == "docker/dockerfile:1"


def test_the_hosts_network_is_allowed_where_it_is_asked_for(site: Site, fake: FakeBuildx) -> None:
    site.env["NETWORK"] = "host"
    bake(site, fake)
    for call in bakes(fake):
        assert "--allow=network.host" in call.argv
        assert call.base["network"] == "host"
    assert "--network=host" in bakes(fake)[-1].files["Dockerfile"]


def stores(fake: FakeBuildx) -> set[str]:
    """The IDs of the cache mounts with the warm store in the last call of bake."""
    return set(re.findall(r"id=([^,]*-store-[^,$]*)", bakes(fake)[-1].files["Dockerfile"]))


def test_each_trust_setting_has_a_store_of_its_own(
    site: Site, fake: FakeBuildx, tmp_path: Path
) -> None:
    found = []
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
        found.append(stores(fake))
    assert [len(names) for names in found] == [1] * len(found)
    assert found[0] == found[1]
    assert len(set.union(*found)) == len(found) - 1


def test_without_a_cache_volume_guix_has_the_store_of_the_image(
    site: Site, fake: FakeBuildx
) -> None:
    site.env["CACHE_VOLUME"] = ""
    bake(site, fake)
    assert "type=cache" not in bakes(fake)[-1].files["Dockerfile"]
    assert "work/pull/collect.scm" in bakes(fake)[-1].files


@pytest.mark.parametrize("process", ["/var/guix/guix-tasks/stage pull", "/bin/sh -c result"])
def test_steps_run_again_if_the_builder_has_lost_the_store(
    site: Site, fake: FakeBuildx, process: str
) -> None:
    locked(site)
    error = f'process "{process}" did not complete successfully: exit code: 113'
    fake.fail(f"ERROR: failed to solve: {error}", "bake", "reports", once=True)
    assert "the builder's cache lacks store items" in said(site, fake)
    assert [call.argv[-1] for call in bakes(fake)] == ["asked", "reports", "reports", "image"]
    again = [{name for name in call.files if name.endswith("/again")} for call in bakes(fake)]
    assert again[1] == set()
    assert again[2] == {"work/pull/again", "work/install/again"}


@pytest.mark.parametrize("name", ["guest\nRUN touch /canary", "$HOME", "a b", "", "-x"])
def test_no_name_of_a_user_becomes_an_instruction(site: Site, fake: FakeBuildx, name: str) -> None:
    fake.answer(user="1000", name=name)
    bake(site, fake)
    users = [line for line in bakes(fake)[-1].files["Dockerfile"].splitlines() if "USER" in line]
    # The keys of the base, the two parts of the first stage that start from it, the image.
    assert users == ["USER root", "USER root", "USER root", "USER 1000"]
    fake.answer(user="-1")
    with pytest.raises(BuilderError, match="has an invalid name"):
        bake(site, fake)


def test_an_engine_without_a_bridge_builds_on_the_hosts_network(
    site: Site, fake: FakeBuildx
) -> None:
    site.engine.about = type(site.engine.about)(**{**vars(site.engine.about), "has_bridge": False})
    fake.add("default", "docker")
    bake(site, fake)
    assert "--allow=network.host" not in bakes(fake)[-1].argv  # its builder has its own
    site.env["BUILDX_DRIVER"] = "docker"
    bake(site, fake)
    assert "--allow=network.host" in bakes(fake)[-1].argv


def test_the_image_is_for_the_user_of_the_base(site: Site, fake: FakeBuildx) -> None:
    fake.answer(user="1000", name="guest")
    bake(site, fake)
    dockerfile = bakes(fake)[-1].files["Dockerfile"]
    assert dockerfile.index("USER root") < dockerfile.index("AS install")
    assert dockerfile.rindex("USER guest") > dockerfile.index("AS install")


def test_mounts_are_seen_by_the_steps(site: Site, fake: FakeBuildx) -> None:
    site.env["MOUNTS"] = "context:/a channels.scm:/b:ro"
    bake(site, fake)
    call = bakes(fake)[-1]
    assert call.target["contexts"]["mount-0"] == str(site.directory / "context")
    assert "https://guix.test" in call.files["work/mounts/1"]


# --- Channels and the lock ------------------------------------------------------------------


def test_floating_channels_are_resolved_first_and_locked(site: Site, fake: FakeBuildx) -> None:
    assert "the channels are locked in" in said(site, fake)
    asked, reports, _ = (call.files for call in bakes(fake))
    assert "AS resolving" in asked["Dockerfile"]
    assert (
        asked["work/resolve/channels.scm"] == (site.directory / "channels.scm").read_text().strip()
    )
    assert "resolve.scm" in asked["work/resolve/stage"]
    assert asked["work/resolve/again"]
    assert "AS resolving" not in reports["Dockerfile"]
    assert site.lock.read_text() == f"{RESOLVED}\n"


def test_the_next_build_pulls_in_the_same_words_and_changes_nothing(
    site: Site, fake: FakeBuildx
) -> None:
    """So the step of the pull is found in the builder's cache."""
    for _ in range(3):
        bake(site, fake)
    steps = [call.files for call in bakes(fake)[1::3]]
    assert len({step["work/pull/channels.scm"] for step in steps}) == 1
    assert len({step["Dockerfile"] for step in steps}) == 1
    assert site.lock.read_text() == f"{RESOLVED}\n"
    assert ["AS resolving" in call.files["Dockerfile"] for call in bakes(fake)[::3]] == [
        True, False, False,
    ]  # fmt: skip


def test_what_was_pulled_is_locked_where_it_is_not_what_was_asked_for(
    site: Site, fake: FakeBuildx
) -> None:
    other = f"(list {channel('guix', 'https://guix.test', 'c' * 40)})"
    fake.answer(pull=other)
    bake(site, fake)
    assert site.lock.read_text() == f"{other}\n"


def test_update_resolves_whatever_the_lock_says(site: Site, fake: FakeBuildx) -> None:
    site.lock.write_text(f"(list {channel('guix', 'https://guix.test', 'c' * 40)})\n")
    bake(site, fake, update=True)
    assert bakes(fake)[1].files["work/pull/channels.scm"] == RESOLVED
    assert site.lock.read_text() == f"{RESOLVED}\n"


BARE = f"(list {channel('mine', 'https://m.test', 'c' * 40, introduced=False)})"


@pytest.mark.parametrize("update", [True, False])
def test_a_channel_without_an_introduction_is_refused_before_anything_is_done(
    site: Site, fake: FakeBuildx, *, update: bool
) -> None:
    site.write("channels.scm", BARE)
    with pytest.raises(UsageError, match="the channel 'mine' has no introduction"):
        bake(site, fake, update=update)
    assert fake.calls() == []


@pytest.mark.parametrize(
    ("report", "calls"), [("resolved", ["asked"]), ("pull", ["asked", "reports"])]
)
def test_one_that_is_computed_is_refused_when_it_is_seen(
    site: Site, fake: FakeBuildx, report: str, calls: list[str]
) -> None:
    site.write("channels.scm", "(my-channels)")
    fake.answer(**{report: BARE})
    with pytest.raises(StageError, match="the channel 'mine' has no introduction"):
        bake(site, fake)
    assert [call.argv[-1] for call in bakes(fake)] == calls
    assert not site.lock.exists()


def test_it_is_pulled_where_that_is_said(site: Site, fake: FakeBuildx) -> None:
    site.write("channels.scm", BARE)
    fake.answer(resolved=BARE, pull=BARE)
    assert bake(site, fake, authenticate=False)
    asked, reports, image = bakes(fake)
    assert "resolve.scm --disable-authentication" in asked.files["work/resolve/stage"]
    assert "guix pull --disable-authentication" in reports.files["work/pull/stage"]
    assert "org.guix-tasks.authentication" in image.files["Dockerfile"]


def test_channels_without_a_lock_float(site: Site, fake: FakeBuildx) -> None:
    site.env["GUIX_CHANNELS_LOCK"] = ""
    for _ in range(2):
        bake(site, fake)
    assert all("AS resolving" in call.files["Dockerfile"] for call in bakes(fake)[::3])
    assert not site.lock.exists()


def test_without_channels_those_of_the_base_are_resolved(site: Site, fake: FakeBuildx) -> None:
    site.env["GUIX_CHANNELS"] = ""
    bake(site, fake)
    files = bakes(fake)[0].files
    assert "work/resolve/channels.scm" not in files
    assert "built-channels.scm" in files["work/resolve/stage"]
    assert bakes(fake)[1].files["work/pull/channels.scm"] == RESOLVED


def test_a_lock_that_does_not_fit_is_told_before_anything_is_done(
    site: Site, fake: FakeBuildx
) -> None:
    locked(site)
    site.write("channels.scm", f"(list {channel('mine', 'https://m.test')})")
    with pytest.raises(UsageError, match="does not fit GUIX_CHANNELS"):
        bake(site, fake)
    assert fake.calls() == []


def test_a_pull_that_fails_writes_no_lock(site: Site, fake: FakeBuildx) -> None:
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


def values(call: Call) -> dict[str, str]:
    """The labels of an image, through the arguments that their values are in."""
    lines = call.files["Dockerfile"].splitlines()
    names = [line.split(" ", 1)[1].split("=", 1) for line in lines if line.startswith("LABEL ")]
    given = call.target["args"]
    return {f"{value} {name}": given[value.strip('"${}')] for name, value in names}


def test_the_labels_say_what_is_in_the_image(site: Site, fake: FakeBuildx) -> None:
    bake(site, fake)
    found = {name.split()[1]: value for name, value in values(bakes(fake)[-1]).items()}
    assert found[CHANNELS_LABEL] == REPORT
    assert found[PACKAGES_LABEL] == "hello@1.0"
    assert "LABEL" not in bakes(fake)[1].files["Dockerfile"]


def test_search_paths_of_the_profile_are_variables_of_the_image(
    site: Site, fake: FakeBuildx
) -> None:
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


def test_oci_labels_say_when_the_steps_were_run(site: Site, fake: FakeBuildx) -> None:
    """Not when they were found in the cache, or the same would never have the same digest."""
    fake.answer(created="2001-02-03T04:05:06Z")
    bake(site, fake)
    found = {name.split()[1]: value for name, value in values(bakes(fake)[-1]).items()}
    assert found[CREATED] == "2001-02-03T04:05:06Z"
    assert found[BASE_NAME] == str(site.settings().base_image)
    assert found[BASE_DIGEST] == site.engine.remote_digest(found[BASE_NAME])


def test_each_platform_has_its_own_labels(site: Site, fake: FakeBuildx) -> None:
    fake.add(endpoint="ssh://b.test", platforms=["linux/arm64"])
    site.env["PLATFORMS"] = "linux/amd64 linux/arm64"
    fake.answer(**{"linux_arm64/install": "tar\t2.0\tout\t/gnu/store/tar"})
    bake(site, fake)
    call = bakes(fake)[-1]
    assert call.target["platforms"] == ["linux/amd64", "linux/arm64"]
    found = {value for name, value in values(call).items() if PACKAGES_LABEL in name}
    assert found == {"hello@1.0", "tar@2.0"}


def test_without_platforms_it_is_for_the_builders_own(site: Site, fake: FakeBuildx) -> None:
    fake.change(builders={})
    fake.add(platforms=["linux/arm64", "linux/amd64"])
    bake(site, fake)
    assert bakes(fake)[0].target["platforms"] == ["linux/arm64"]


@pytest.mark.parametrize("platforms", ["", "linux/arm64"])
def test_a_builder_that_does_not_run_is_started_and_asked_what_it_is(
    site: Site, fake: FakeBuildx, platforms: str
) -> None:
    fake.change(builders={})
    fake.add(status="stopped", platforms=["linux/arm64"])
    site.env["PLATFORMS"] = platforms
    bake(site, fake)
    assert bakes(fake)[0].target["platforms"] == ["linux/arm64"]


def test_a_platform_that_a_stopped_builder_lacks_is_refused(site: Site, fake: FakeBuildx) -> None:
    fake.change(builders={})
    fake.add(status="stopped")
    site.env["PLATFORMS"] = "linux/arm64"
    with pytest.raises(BuilderError, match="has no linux/arm64"):
        bake(site, fake)
    assert bakes(fake) == []


@pytest.mark.parametrize("platforms", ["", "linux/amd64"])
def test_buildkit_elsewhere_needs_no_engine(site: Site, fake: FakeBuildx, platforms: str) -> None:
    site.env.update(
        BUILDX_DRIVER="remote", BUILDX_NODES="tcp://b.test:1", BUILDX_BUILDER="far",
        PLATFORMS=platforms,
    )  # fmt: skip
    fake.add("far", "remote", endpoint="tcp://b.test:1")
    project = site.project(NoEngine(NoEngineError("no engine")))
    assert build(project, fake.program(), BuildOptions()) == f"{IMAGE}@{DIGEST}"


# --- What is refused ------------------------------------------------------------------------


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
def test_what_no_builder_can_do_is_told_before_anything_is_done(
    site: Site, fake: FakeBuildx, env: dict[str, str], options: dict[str, bool], words: str
) -> None:
    site.env.update(env)
    with pytest.raises(UsageError, match=words):
        bake(site, fake, **options)
    assert fake.calls() == []


def test_without_an_engine_nothing_is_built_to_be_loaded(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_OUTPUT"] = "load"
    project = site.project(NoEngine(NoEngineError("no engine")))
    with pytest.raises(NoEngineError):
        build(project, fake.program(), BuildOptions())
    assert fake.calls() == []


def test_a_builder_that_refuses_insecure_steps_builds_nothing(site: Site, fake: FakeBuildx) -> None:
    fake.fail(REFUSED, "--call=check")
    with pytest.raises(BuilderError, match="does not allow insecure steps"):
        bake(site, fake)
    assert bakes(fake) == []


def test_a_platform_that_is_emulated_is_refused_but_without_isolation(
    site: Site, fake: FakeBuildx
) -> None:
    fake.change(builders={})
    fake.add(platforms=["linux/amd64", "linux/arm64"])
    site.env["PLATFORMS"] = "linux/arm64"
    with pytest.raises(UsageError, match="is emulated by the builder"):
        bake(site, fake)
    assert bakes(fake) == []
    site.env["GUIX_SANDBOX"] = "nochroot"
    assert ", builds not isolated" in said(site, fake)


def test_the_memory_of_a_stage_is_no_business_of_a_builder(site: Site, fake: FakeBuildx) -> None:
    assert "STAGE_MEMORY" not in said(site, fake)
    site.env["STAGE_MEMORY"] = "1g"
    assert "warning: STAGE_MEMORY is for work containers" in said(site, fake)


def test_stages_of_a_projects_own_are_not_in_it(site: Site, fake: FakeBuildx) -> None:
    stages = tuple(CustomStage(name, ("make",), "install") for name in ("deps", "tested"))
    project = replace(site.project(), custom_stages=stages)
    build(project, fake.program(), BuildOptions())
    assert "warning: deps and tested will not be in the image: buildx.build" in heard(project)


# --- Where it goes --------------------------------------------------------------------------


def test_a_push_by_digest_has_no_tag_and_is_written_down(site: Site, fake: FakeBuildx) -> None:
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


def in_out(site: Site) -> list[str]:
    """The names of what is in ``out/`` besides the logs."""
    return [each.name for each in (site.directory / "out").iterdir() if each.name != "logs"]


def test_a_push_by_digest_that_fails_writes_nothing_down(site: Site, fake: FakeBuildx) -> None:
    fake.fail("ERROR: failed to push registry.test/x: 403 Forbidden", "bake", "image")
    with pytest.raises(RegistryError):
        bake(site, fake, by_digest=True)
    assert in_out(site) == []


@pytest.mark.parametrize("kind", ["oci", "docker"])
def test_an_archive_is_in_out(site: Site, fake: FakeBuildx, kind: str) -> None:
    site.env["BUILDX_OUTPUT"] = kind
    path = site.directory / "out" / f"app-1.{kind}.tar"
    assert bake(site, fake) == str(path)
    assert in_out(site) == [path.name]
    assert path.read_text() == "an archive"
    target = bakes(fake)[-1].target
    assert target["tags"] == [IMAGE]
    assert target["output"][0].startswith(f"type={kind},dest={path.parent}/.")


def test_an_archive_in_a_folder_with_a_comma(tmp_path: Path, fake: FakeBuildx) -> None:
    site = new_site(tmp_path / "a, b", BUILDX_OUTPUT="oci")
    assert bake(site, fake) == str(site.directory / "out" / "app-1.oci.tar")


@pytest.mark.parametrize("fault", ["an error", "Ctrl-C"])
def test_an_archive_is_written_whole_or_not_at_all(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    site.env["BUILDX_OUTPUT"] = "oci"
    path = site.write("out/app-1.oci.tar", "the one before")
    if fault == "Ctrl-C":

        def put(_console: Heard, data: bytes) -> None:
            if b"baking image" in data:
                (half_done,) = {*in_out(site)} - {path.name}
                assert (path.parent / half_done).read_text() == "an archive"
                raise KeyboardInterrupt

        monkeypatch.setattr(Heard, "put", put)
        with pytest.raises(KeyboardInterrupt):
            bake(site, fake)
    else:
        fake.fail("ERROR: no space left on device", "bake", "image")
        with pytest.raises(BuilderError):
            bake(site, fake)
    assert in_out(site) == [path.name]
    assert path.read_text() == "the one before"


def loading(site: Site, monkeypatch: pytest.MonkeyPatch, image: str = IMAGE) -> None:
    """Let the engine have something new under a name when the image is baked."""

    def put(_console: Heard, data: bytes) -> None:
        if b"baking image" in data:
            site.engine.make_image({}, {"/new": b""}, tag=image)

    monkeypatch.setattr(Heard, "put", put)


def test_an_image_that_is_loaded_keeps_the_one_before(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.env["BUILDX_OUTPUT"] = "load"
    before = site.engine.make_image({}, {"/old": b""}, tag=IMAGE)
    loading(site, monkeypatch)
    assert bake(site, fake) == IMAGE
    target = bakes(fake)[-1].target
    assert (target["output"], target["tags"]) == (["type=docker"], [IMAGE])
    assert site.image().id != before.id
    assert site.image(PREVIOUS).id == before.id


def test_an_image_that_is_loaded_again_does_not_lose_the_one_before(
    site: Site, fake: FakeBuildx
) -> None:
    site.env["BUILDX_OUTPUT"] = "load"
    before = site.engine.make_image({}, {"/old": b""}, tag=f"{IMAGE}-{PREVIOUS}")
    site.engine.make_image({}, {"/new": b""}, tag=IMAGE)
    bake(site, fake)
    assert site.image(PREVIOUS).id == before.id


def test_an_image_of_another_platform_is_loaded_under_its_own_tag(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `inv verify`, `inv push` and the rest look for it."""
    site.env.update(
        BUILDX_OUTPUT="load", PLATFORMS="linux/arm64", GUIX_SANDBOX="nochroot", TAGS="stable"
    )
    fake.change(builders={})
    fake.add(platforms=["linux/amd64", "linux/arm64"])
    native = site.engine.make_image({}, {"/native": b""}, tag=IMAGE)
    loading(site, monkeypatch, f"{IMAGE}-linux-arm64")
    assert bake(site, fake) == f"{IMAGE}-linux-arm64" == str(site.ledger.image)
    assert bakes(fake)[-1].target["tags"] == [f"{IMAGE}-linux-arm64"]
    assert site.engine.tags[IMAGE] == native.id


def test_a_load_that_fails_changes_nothing(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_OUTPUT"] = "load"
    site.engine.make_image({}, {"/old": b""}, tag=IMAGE)
    tags = dict(site.engine.tags)
    fake.fail("ERROR: no", "bake", "image")
    with pytest.raises(BuilderError):
        bake(site, fake)
    assert site.engine.tags == tags


def test_a_registry_that_refuses_is_an_error(site: Site, fake: FakeBuildx) -> None:
    fake.fail("ERROR: failed to push registry.test/x: 403 Forbidden", "bake", "image")
    with pytest.raises(RegistryError, match="the registry refuses"):
        bake(site, fake)


# --- Caches and attestations ----------------------------------------------------------------


def test_caches_are_read_by_all_calls_and_written_by_the_last(site: Site, fake: FakeBuildx) -> None:
    site.env.update(
        CACHE_IMAGE="registry.test/cache",
        BUILDX_CACHE_FROM="type=gha",
        BUILDX_CACHE_TO="type=local,dest=/x",
    )
    bake(site, fake)
    read = [call.target["cache-from"] for call in bakes(fake)]
    assert read[0] == read[1] == read[2] == bakes(fake)[0].base["cache-from"]
    own, registry = read[0]
    assert own == "type=gha"
    assert registry.startswith("type=registry,ref=registry.test/cache:buildx-")
    assert [call.target.get("cache-to", []) for call in bakes(fake)[:2]] == [[], []]
    assert bakes(fake)[2].target["cache-to"] == ["type=local,dest=/x", f"{registry},mode=max"]


def test_the_engines_own_builder_makes_no_cache_in_a_registry(site: Site, fake: FakeBuildx) -> None:
    site.env.update(CACHE_IMAGE="registry.test/cache", BUILDX_DRIVER="docker")
    fake.add("default", "docker")
    bake(site, fake)
    assert bakes(fake)[-1].target["cache-from"] == bakes(fake)[-1].target["cache-to"] == []


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("", ["type=provenance,disabled=true"]),
        ("sbom", ["type=provenance,disabled=true", "type=sbom"]),
        ("provenance sbom", ["type=provenance,mode=min", "type=sbom"]),
    ],
)
def test_attestations_are_those_of_the_settings(
    site: Site, fake: FakeBuildx, wanted: str, expected: list[str]
) -> None:
    site.env["BUILDX_ATTESTATIONS"] = wanted
    bake(site, fake)
    disabled = ["type=provenance,disabled=true"]
    assert [call.target["attest"] for call in bakes(fake)] == [disabled, disabled, expected]
    assert bakes(fake)[-1].base["attest"] == disabled


# --- The base image -------------------------------------------------------------------------


def test_a_base_image_that_only_the_engine_has_is_handed_over(
    site: Site, fake: FakeBuildx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    site.engine.make_image({}, {"/x": b""}, tag=BASE_IMAGE)
    assert f"base: copying {BASE_IMAGE} " in said(site, fake)
    for call in bakes(fake):
        location, _, digest = call.base["contexts"][BASE_IMAGE].rpartition("@")
        index = Path(location.removeprefix("oci-layout://")) / "index.json"
        assert json.loads(index.read_text())["manifests"][0]["digest"] == digest


@pytest.mark.parametrize("place", ["not here", "pulled", "engine"])
def test_one_that_the_builder_can_get_is_not(site: Site, fake: FakeBuildx, place: str) -> None:
    if place == "pulled":
        site.engine.pull(BASE_IMAGE, None)
    if place == "engine":
        site.engine.make_image({}, {"/x": b""}, tag=BASE_IMAGE)
        site.env["BUILDX_DRIVER"] = "docker"
        fake.add("default", "docker")
    assert "copying" not in said(site, fake)
    assert bakes(fake)[0].base["contexts"] == {}


# --- Secrets --------------------------------------------------------------------------------


def test_credentials_are_in_the_environment_and_nowhere_else(site: Site, fake: FakeBuildx) -> None:
    site.env.update(DOCKER_USERNAME="some-user", DOCKER_PASSWORD="hunter2-x")  # noqa: S106
    shown = said(site, fake)
    pair = base64.b64encode(b"some-user:hunter2-x").decode()
    for call in bakes(fake):
        assert json.loads(call.env.pop("DOCKER_AUTH_CONFIG")) == {
            "auths": {"registry.test": {"auth": pair}}
        }
        kept = repr((call.argv, call.env, call.files, call.config))
        assert "hunter2-x" not in kept
        assert pair not in kept
    assert "hunter2-x" not in shown
    assert not (fake.directory / "config" / "config.json").exists()


def test_a_proxys_password_is_in_no_layer_and_on_no_command_line(
    site: Site, fake: FakeBuildx
) -> None:
    site.env["https_proxy"] = "http://me:hunter2-x@proxy.test:1"
    shown = said(site, fake)
    for call in bakes(fake):
        holders = [name for name, text in call.files.items() if "hunter2-x" in text]
        # Both in a directory that nobody else may open; builders keep such arguments to themselves.
        assert sorted(holders) == ["bake.json", "environment"]
        assert json.loads(call.files["bake.json"])["target"]["base"]["args"]["https_proxy"]
        assert call.target["secret"][0].startswith("id=environment,src=")
        assert "hunter2-x" not in call.text
    assert "hunter2-x" not in shown


def test_a_dry_run_shows_no_secret_of_the_bake_file(site: Site, fake: FakeBuildx) -> None:
    site.env.update(
        BUILD_ARGS='VERSION=1.0 TOKEN="hunter2\\"x"',
        BUILDX_CACHE_TO="type=s3,bucket=buck,secret_access_key=hunter3",
    )
    project = site.project()
    build(project, fake.program(project.console, perform=False), BuildOptions())
    shown = heard(project)
    assert '"TOKEN": "***"' in shown
    assert '"VERSION": "1.0"' in shown
    assert "type=s3,bucket=buck,secret_access_key=***" in shown
    assert "hunter" not in shown


KILLED = """
import subprocess, sys
from pathlib import Path
from fake_buildx import FakeBuildx, Program
from fake_engine import new_site
from guix_tasks.buildkit.build import BuildOptions, build
subprocess.Popen = Program
place = Path(sys.argv[1])
site = new_site(place / "site", BUILDX_DRIVER="docker-container", BUILD_ARGS="TOKEN=hunter2-x")
fake = FakeBuildx(place / "fake")
fake.add()
fake.fail("too late", "bake", sleeps=60)
project = site.project()
build(project, fake.program(project.console), BuildOptions())
"""


def test_a_killed_build_leaves_no_secret(tmp_path: Path) -> None:
    """The inputs of BuildKit are files, which are removed when ``inv`` is killed."""
    place = tmp_path / "tmp"
    place.mkdir()
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "TMPDIR": str(place),
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
    }
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, start_new_session=True
    ) as process:
        try:
            await_true(lambda: any("hunter2-x" in text(each) for each in place.rglob("bake.json")))
            process.kill()
            process.wait()
            await_true(lambda: list(place.iterdir()) == [])
        finally:
            with suppress(ProcessLookupError):  # the whole group may have ended
                os.killpg(process.pid, signal.SIGKILL)  # buildx outlives inv


def await_true(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def test_nothing_is_left_of_the_folder(site: Site, fake: FakeBuildx, tmp_path: Path) -> None:
    bake(site, fake)
    (file,) = {word.partition("=")[2] for word in bakes(fake)[0].argv if "--file=" in word}
    assert file.endswith("/bake.json")
    assert not type(tmp_path)(file).parent.exists()


# --- Time, and a dry run --------------------------------------------------------------------


def test_a_build_that_takes_too_long_is_stopped(site: Site, fake: FakeBuildx) -> None:
    site.env["STAGE_TIMEOUT"] = "1s"
    fake.fail("never said", "bake", "reports", sleeps=30)
    with pytest.raises(StageError, match=r"STAGE_TIMEOUT \(1\.0 s a stage\); nothing was pushed"):
        bake(site, fake, pull=False)
    assert not site.lock.exists()


def test_a_dry_run_shows_the_calls_and_the_files_and_does_nothing(
    site: Site, fake: FakeBuildx
) -> None:
    site.env["BUILDX_OUTPUT"] = "oci"
    site.engine.make_image({}, {"/x": b""}, tag=BASE_IMAGE)
    before = (dict(site.engine.tags), site.engine.changing_calls())
    console, project = Heard(), site.project()
    dry = Project(project.settings, project.engine, console)
    assert build(dry, fake.program(console, perform=False), BuildOptions()) == ""
    shown = console.text
    assert shown.count("+ docker buildx bake ") == 3
    assert "--- Dockerfile\n" in shown
    assert shown.count("RUN --security=insecure") == 2
    assert '"output"' in shown.partition("--- bake.json\n")[2]
    assert fake.changes() == []
    assert (site.engine.tags, site.engine.changing_calls()) == before
    assert not (site.directory / "out").exists()
    assert not site.lock.exists()


@pytest.mark.parametrize("output", ["registry", "load"])
def test_a_dry_run_answers_nothing(site: Site, fake: FakeBuildx, output: str) -> None:
    locked(site)
    site.env["BUILDX_OUTPUT"] = output
    project = site.project()
    assert build(project, fake.program(perform=False), BuildOptions()) == ""
    assert "buildx.build: registry.test" not in heard(project)
    assert fake.changes() == []


def test_what_the_builder_says_is_shown_as_it_comes(site: Site, fake: FakeBuildx) -> None:
    shown = said(site, fake)
    for target in ("asked", "reports", "image"):
        assert f"#1 baking {target}\n" in shown
    assert FLAGS not in shown


def test_a_registry_that_is_out_of_reach_is_told_before_anything_is_built(
    site: Site, fake: FakeBuildx
) -> None:
    site.engine.registry.refusal = "connection refused"
    with pytest.raises(RegistryError, match="connection refused"):
        bake(site, fake)
    assert bakes(fake) == []


@pytest.mark.parametrize(
    "elsewhere",
    [{"BUILDX_OUTPUT": "load"}, {"BUILDX_NODES": "ssh://b.test", "BUILDX_OUTPUT": "registry"}],
)
def test_only_a_builder_beside_the_engine_is_spoken_for(
    site: Site, fake: FakeBuildx, elsewhere: dict[str, str]
) -> None:
    site.engine.registry.refusal = "connection refused"
    site.env |= elsewhere
    assert bake(site, fake)


def test_a_dry_run_goes_on_without_a_builder(site: Site, tmp_path: Path) -> None:
    """The task before, which was left at being shown, would have made it."""
    none = FakeBuildx(tmp_path / "none")
    project = site.project()
    assert build(project, none.program(project.console, perform=False), BuildOptions()) == ""
    assert heard(project).count("+ docker buildx bake") == 3
    assert f"there is no builder {NAME} yet" in heard(project)
    assert none.changes() == []


def test_a_fault_of_the_registry_that_passes_is_survived(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    said_by_it = "ERROR: failed to push registry.test/x: 429 Too Many Requests"
    fake.fail(said_by_it, "bake", "image", once=True)
    assert bake(site, fake)
    assert len(waits) == 1


FAILED = (
    'ERROR: failed to solve: process "/var/guix/guix-tasks/stage pull" '
    "did not complete successfully: exit code: 1"
)
HANGS_UP = "guix pull: error: Git error: unexpected EOF"
BROKEN = "guix build: error: build of `/gnu/store/x.drv' failed"


def silent_server(host: str) -> str:
    return f"guix substitute: warning: {host}: connection failed: Connection refused"


def steps_log(*lines: str, number: int = 7) -> str:
    """As buildx shows what a step says."""
    return "".join(f"#{number} {at}.5 {line}\n" for at, line in enumerate(lines, 1))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("time.sleep", found.append)
    return found


def test_a_fault_of_a_steps_network_is_tried_again(
    site: Site, fake: FakeBuildx, waits: list[float]
) -> None:
    fake.fail(steps_log(HANGS_UP) + FAILED, "bake", "reports", once=True)
    assert bake(site, fake)
    assert len(waits) == 1
    assert [call.argv[-1] for call in bakes(fake)] == ["asked", "reports", "reports", "image"]


def test_a_fault_of_a_steps_network_that_stays(
    site: Site, fake: FakeBuildx, waits: list[float]
) -> None:
    fake.fail(steps_log(HANGS_UP) + FAILED, "bake", "reports")
    with pytest.raises(StageError, match="pull: the command failed with exit status 1"):
        bake(site, fake)
    assert len(waits) == STAGE_TRIES - 1


@pytest.mark.parametrize(
    "log",
    [
        steps_log(BROKEN),
        steps_log(HANGS_UP, BROKEN),
        steps_log("guix install: error: nonesuch: unknown package"),
        # What a build has said is quoted, and nothing of it is Guix' own.
        steps_log("entry-point: the last lines of /var/log/guix/x", HANGS_UP),
        "",
    ],
)
def test_what_does_not_build_is_not_tried_again(
    site: Site, fake: FakeBuildx, waits: list[float], log: str
) -> None:
    fake.fail(log + FAILED, "bake", "reports")
    with pytest.raises(StageError):
        bake(site, fake)
    assert waits == []


def test_where_no_server_answers_the_build_is_stopped(
    site: Site, fake: FakeBuildx, waits: list[float]
) -> None:
    site.env["GUIX_SUBSTITUTE_URLS"] = "https://a.test https://b.test"
    fake.fail(
        steps_log(silent_server("a.test"), silent_server("b.test"), BROKEN) + FAILED,
        "bake", "reports",
    )  # fmt: skip
    with pytest.raises(StageError, match=r"no substitute server answers \(a\.test, b\.test\)"):
        bake(site, fake)
    assert len(waits) == STAGE_TRIES - 1


def test_a_server_that_answers_is_enough(site: Site, fake: FakeBuildx, waits: list[float]) -> None:
    site.env["GUIX_SUBSTITUTE_URLS"] = "https://a.test https://b.test"
    fake.fail(steps_log(silent_server("a.test"), BROKEN) + FAILED, "bake", "reports")
    with pytest.raises(StageError, match="the command failed"):
        bake(site, fake)
    assert waits == []


def test_with_fallback_silent_servers_are_nothing(
    site: Site, fake: FakeBuildx, waits: list[float]
) -> None:
    site.env |= {"GUIX_SUBSTITUTE_URLS": "https://a.test", "GUIX_FALLBACK": "yes"}
    fake.fail(steps_log(silent_server("a.test")) + FAILED, "bake", "reports")
    with pytest.raises(StageError, match="the command failed"):
        bake(site, fake)
