"""Builders: made where they are missing, reported where they are otherwise, and removed."""

from __future__ import annotations

import shlex
import socket
from typing import TYPE_CHECKING, Any

import pytest
from fake_buildx import FLAGS, NAME, OPTIONS, REFUSED, SOCKET, UNKNOWN_FLAG, FakeBuildx
from fake_engine import Heard, Site, heard, new_site

from guix_tasks.buildkit import buildx as command
from guix_tasks.commands import buildx_setup
from guix_tasks.commands.buildx_setup import (
    STATUS_HEADER,
    cache_size,
    check_endpoint,
    create_argv,
    remove_builder,
    set_up,
    status_rows,
)
from guix_tasks.errors import BuilderError

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.buildkit.buildx import Builder


@pytest.fixture(autouse=True)
def _endpoints_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of these tests are names only."""
    monkeypatch.setattr(buildx_setup, "check_endpoint", lambda _endpoint: None)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return new_site(tmp_path / "project")


@pytest.fixture
def fake(tmp_path: Path) -> FakeBuildx:
    return FakeBuildx(tmp_path / "buildx")


def setup(site: Site, fake: FakeBuildx, *, own: str = "default", **options: bool) -> str:
    """Set up; what was said."""
    project = site.project()
    set_up(project, fake.program(own=own), **options)
    return heard(project)


def refused(site: Site, fake: FakeBuildx, **options: Any) -> str:
    with pytest.raises(BuilderError) as caught:
        setup(site, fake, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made(fake: FakeBuildx, name: str = NAME) -> Builder:
    found = command.inspect(fake.program(), name)
    assert found
    return found


# --- Answering ------------------------------------------------------------------------------


def test_an_endpoint_that_is_listened_at_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_endpoint(f"tcp://127.0.0.1:{server.getsockname()[1]}")
    with socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        local.listen()
        check_endpoint(f"unix://{tmp_path}/s")


@pytest.mark.parametrize("endpoint", ["ssh://b.test", "a-context", "", "tcp://b.test"])
def test_what_only_others_can_reach_is_left_to_them(endpoint: str) -> None:
    check_endpoint(endpoint)


def test_an_endpoint_that_nobody_listens_at_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    for endpoint in (free, f"unix://{tmp_path}/none", "tcp://b.test:99999", "tcp://[::1:1"):
        with pytest.raises(BuilderError, match="does not answer") as caught:
            check_endpoint(endpoint)
        assert endpoint in str(caught.value)
        assert "correct BUILDX_NODES" in str(caught.value)


def test_where_one_of_the_nodes_is_silent_nothing_is_made(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buildx_setup, "check_endpoint", check_endpoint)
    site.env |= {"BUILDX_DRIVER": "remote", "BUILDX_NODES": "unix:///none"}
    assert "unix:///none" in refused(site, fake)
    assert fake.calls("create") == []


# --- Made -----------------------------------------------------------------------------------


def test_a_missing_one_is_made_on_the_engine_and_started(site: Site, fake: FakeBuildx) -> None:
    said = setup(site, fake)
    builder = made(fake)
    (node,) = builder.nodes
    assert (builder.driver, node.endpoint, node.status) == ("docker-container", SOCKET, "running")
    assert node.flags == tuple(FLAGS.split())
    assert node.options == OPTIONS
    assert f"creating {NAME} (docker-container)" in said
    assert f"{NAME} (docker-container) runs insecure steps\n" in said


def test_the_builder_that_the_user_has_selected_stays_selected(
    site: Site, fake: FakeBuildx
) -> None:
    setup(site, fake)
    setup(site, fake, recreate=True)
    assert fake.state["selected"] == "mine"
    assert "--use" not in " ".join(call.text for call in fake.calls("create"))


def test_it_is_selected_where_that_is_asked_for(site: Site, fake: FakeBuildx) -> None:
    said = setup(site, fake, use=True)
    assert fake.state["selected"] == NAME
    assert f"`docker buildx` now builds with {NAME}" in said


def test_one_that_cannot_do_it_is_not_selected(site: Site, fake: FakeBuildx) -> None:
    fake.fail(REFUSED, "build")
    refused(site, fake, use=True)
    assert fake.state["selected"] == "mine"


def test_an_engine_of_a_context_is_taken_by_the_contexts_name(site: Site, fake: FakeBuildx) -> None:
    setup(site, fake, own="far")
    assert made(fake).nodes[0].endpoint == "far"


def test_each_node_of_the_settings_is_made(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_NODES"] = (
        '"ssh://a.test,platform=linux/amd64,memory=4g" '
        "tcp://b.test:2376,platform=linux/arm64,platform=linux/arm/v7"
    )
    setup(site, fake)
    first, second = made(fake).nodes
    assert (first.endpoint, second.endpoint) == ("ssh://a.test", "tcp://b.test:2376")
    assert first.options == {**OPTIONS, "memory": "4g"}
    assert second.options == OPTIONS
    assert second.fixed == ("linux/arm64", "linux/arm/v7")
    assert ["--append" in call.argv for call in fake.calls("create")] == [False, True]
    assert first.name != second.name


def test_an_option_of_a_node_comes_before_the_usual_one(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_NODES"] = "ssh://a.test,network=bridge,env.BUILDKIT_STEP_LOG_MAX_SIZE=1"
    setup(site, fake)
    options = made(fake).nodes[0].options
    assert (options["network"], options["env.BUILDKIT_STEP_LOG_MAX_SIZE"]) == ("bridge", "1")


def test_a_builder_has_the_proxies_that_hold_no_account(site: Site, fake: FakeBuildx) -> None:
    """Its options are for all to see; and where a proxy is another day's, it stays as it is."""
    site.env.update(http_proxy="http://p.test:1", https_proxy="http://me:hunter2@p.test:1")
    assert "does not use https_proxy" in setup(site, fake)
    options = made(fake).nodes[0].options
    assert options["env.http_proxy"] == options["env.HTTP_PROXY"] == "http://p.test:1"
    assert "hunter2" not in repr(fake.calls("create"))
    assert "env.https_proxy" not in options
    site.env.update(http_proxy="http://q.test:1", https_proxy="")
    assert "exists" in setup(site, fake)


def test_an_option_with_commas_is_one_option(site: Site) -> None:
    site.env["BUILDX_NODES"] = """'ssh://a.test,"env.NO_PROXY=a,b"'"""
    settings = site.settings()
    (node,) = settings.buildx_nodes
    assert '--driver-opt="env.NO_PROXY=a,b"' in create_argv(settings, node, append=False)


def test_buildkit_elsewhere_gets_neither_flags_nor_options_of_ours(
    site: Site, fake: FakeBuildx
) -> None:
    site.env.update(BUILDX_DRIVER="remote", BUILDX_NODES="tcp://far.test:1234")
    setup(site, fake)
    (call,) = fake.calls("create")
    assert call.argv == [
        "create", f"--name={NAME}", "--driver=remote", "--", "tcp://far.test:1234",
    ]  # fmt: skip


def test_another_driver_gets_its_options_and_no_endpoint(site: Site, fake: FakeBuildx) -> None:
    site.env.update(BUILDX_DRIVER="kubernetes", BUILDX_NODES="namespace=ci,replicas=2")
    setup(site, fake)
    (call,) = fake.calls("create")
    assert call.argv[-2:] == ["--driver-opt=namespace=ci", "--driver-opt=replicas=2"]
    assert f"--buildkitd-flags={FLAGS}" in call.argv
    assert "network=host" not in call.text
    assert f"{NAME} exists" in setup(site, fake)


def test_a_node_without_an_endpoint_is_on_the_engine(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_NODES"] = "memory=4g ssh://b.test"
    setup(site, fake)
    first, second = made(fake).nodes
    assert (first.endpoint, second.endpoint) == (SOCKET, "ssh://b.test")
    assert first.options == {**OPTIONS, "memory": "4g"}


def test_the_engine_itself_is_not_made_and_is_looked_at(site: Site, fake: FakeBuildx) -> None:
    fake.add("default", "docker")
    site.env["BUILDX_DRIVER"] = "docker"
    assert "default (docker) runs insecure steps" in setup(site, fake)
    assert fake.changes() == []


def test_a_frontend_that_it_needs_is_said(site: Site, fake: FakeBuildx) -> None:
    fake.fail(UNKNOWN_FLAG, "build", without=("BUILDKIT_SYNTAX",))
    assert "runs insecure steps, with the Dockerfile frontend docker/" in setup(site, fake)


# --- There already --------------------------------------------------------------------------


def test_nothing_is_changed_where_all_is_well(site: Site, fake: FakeBuildx) -> None:
    setup(site, fake)
    before = fake.changes()
    assert f"{NAME} exists" in setup(site, fake)
    assert fake.changes() == before


def test_one_that_is_stopped_is_started(site: Site, fake: FakeBuildx) -> None:
    fake.add(status="stopped")
    assert f"{NAME}0 is not running; starting it" in setup(site, fake)
    assert fake.changes() == [f"inspect --bootstrap {NAME}"]
    assert made(fake).nodes[0].status == "running"


@pytest.mark.parametrize(
    ("driver", "there", "said"),
    [
        ("remote", {}, "its driver is remote, not docker-container"),
        ("", {"endpoint": "tcp://b.test:1"}, f"{NAME}0 is at tcp://b.test:1, not at {SOCKET}"),
        ("", {"flags": ""}, "created without the entitlement security.insecure"),
        ("", {"options": {**OPTIONS, "network": "bridge"}}, "created without network=host"),
        ("", {"options": {}}, "created without network=host"),
    ],
)
def test_what_is_otherwise_is_reported_and_left_alone(
    site: Site, fake: FakeBuildx, driver: str, there: dict[str, Any], said: str
) -> None:
    fake.add(driver=driver or "docker-container", status="stopped", **there)
    told = refused(site, fake)
    assert said in told
    assert "`inv buildx.setup --recreate` (keeps the cache)" in told
    assert told.endswith("or change BUILDX_DRIVER and BUILDX_NODES")
    assert fake.changes() == []


def test_another_number_of_nodes_is_reported(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    fake.add(endpoint="ssh://b.test")
    assert "it has 2 nodes, not 1" in refused(site, fake)


def test_other_platforms_of_a_node_are_reported(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_NODES"] = f"{SOCKET},platform=linux/amd64"
    fake.add()
    assert f"{NAME}0 is for all that it supports, not linux/amd64" in refused(site, fake)
    setup(site, fake, recreate=True)
    site.env["BUILDX_NODES"] = f"{SOCKET},platform=linux/arm64"
    assert f"{NAME}0 is for linux/amd64, not linux/arm64" in refused(site, fake)


def test_all_that_is_otherwise_is_told_at_once(site: Site, fake: FakeBuildx) -> None:
    fake.add(flags="", endpoint="ssh://b.test")
    told = refused(site, fake)
    for words in ("is at ssh://b.test", "security.insecure"):
        assert words in told


def test_what_a_builder_of_others_can_do_without_is_no_difference(
    site: Site, fake: FakeBuildx
) -> None:
    """Its log is clipped, and it may not join the host's network."""
    flags = "--allow-insecure-entitlement security.insecure"
    fake.add(flags=flags, options={"network": "host"})
    setup(site, fake)
    assert fake.changes() == []


def test_one_that_works_stays_where_the_new_one_could_not_be_made(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add()
    monkeypatch.setattr(buildx_setup, "check_endpoint", check_endpoint)
    site.env["BUILDX_NODES"] = "unix:///none"
    assert "unix:///none does not answer" in refused(site, fake, recreate=True)
    assert fake.changes() == []


def test_what_it_has_besides_is_no_difference(site: Site, fake: FakeBuildx) -> None:
    flags = "--debug --allow-insecure-entitlement network.host"
    fake.add(
        flags=f"{flags} --allow-insecure-entitlement security.insecure",
        options={**OPTIONS, "memory": "4g"},
        fixed=("linux/amd64",),
    )
    setup(site, fake)
    assert fake.changes() == []


@pytest.mark.parametrize("flags", [FLAGS, ""])
def test_made_anew_it_keeps_its_state(site: Site, fake: FakeBuildx, flags: str) -> None:
    fake.add(flags=flags)
    setup(site, fake, recreate=True)
    assert fake.changes()[0] == f"rm --keep-state {NAME}"
    assert [verb for verb in fake.verbs() if verb in ("rm", "create")] == ["rm", "create"]
    assert made(fake).nodes[0].flags == tuple(FLAGS.split())


# --- What fails -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("create", "--append"), ("inspect", "--bootstrap")])
def test_what_was_begun_is_removed(site: Site, fake: FakeBuildx, words: tuple[str, ...]) -> None:
    site.env["BUILDX_NODES"] = "ssh://a.test ssh://b.test"
    fake.fail("ERROR: b.test: no route to host", *words)
    assert "b.test: no route to host" in refused(site, fake)
    assert fake.state["builders"] == {}
    assert f"rm --keep-state {NAME}" in fake.changes()


def test_where_nothing_was_begun_nothing_is_removed(site: Site, fake: FakeBuildx) -> None:
    fake.fail("ERROR: no space left on device", "create")
    refused(site, fake)
    assert not fake.calls("rm")


def test_the_error_that_is_told_is_the_first(site: Site, fake: FakeBuildx) -> None:
    fake.fail("ERROR: b.test: no route to host", "--bootstrap")
    fake.fail("ERROR: it does not go away", "rm")
    project = site.project()
    with pytest.raises(BuilderError, match="no route to host"):
        set_up(project, fake.program())
    assert (
        f"warning: {NAME} is only partly created (it does not go away); `inv buildx.down`"
        in heard(project)
    )


# --- Platforms ------------------------------------------------------------------------------


def test_a_platform_that_no_node_has_is_told_with_the_command(site: Site, fake: FakeBuildx) -> None:
    site.env["PLATFORMS"] = "linux/amd64 linux/arm64 linux/arm/v7"
    said = setup(site, fake)
    assert (
        "warning: no node supports linux/arm64, linux/arm/v7: "
        "`docker run --privileged --rm tonistiigi/binfmt --install arm64,arm` installs" in said
    )
    assert site.engine.specs == []


def test_nothing_is_said_of_platforms_that_it_has(site: Site, fake: FakeBuildx) -> None:
    site.env["PLATFORMS"] = "linux/amd64 linux/386"
    assert "warning" not in setup(site, fake)


# --- A dry run ------------------------------------------------------------------------------


def dry(site: Site, fake: FakeBuildx, **options: bool) -> list[str]:
    """The commands that are shown; none is run."""
    console = Heard()
    set_up(site.project(), fake.program(console, perform=False), **options)
    assert fake.changes() == []
    return [line for line in console.text.splitlines() if line.startswith("+ ")]


def test_a_dry_run_shows_every_call_and_makes_none(site: Site, fake: FakeBuildx) -> None:
    shown = dry(site, fake, use=True)
    create, boot, use = shown
    settings = site.settings()
    assert shlex.split(create)[1:3] == ["docker", "buildx"]
    assert shlex.split(create)[3:5] == ["create", f"--name={settings.buildx_builder}"]
    assert boot == f"+ docker buildx inspect --bootstrap {NAME}"
    assert use == f"+ docker buildx use {NAME}"


def test_a_dry_run_of_what_is_there(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    assert dry(site, fake) == []
    shown = dry(site, fake, recreate=True)
    assert [line.split()[3] for line in shown] == ["rm", "create", "inspect"]


def test_a_dry_run_of_what_fails_shows_no_removal(site: Site, fake: FakeBuildx) -> None:
    fake.add(status="stopped")
    assert dry(site, fake) == [f"+ docker buildx inspect --bootstrap {NAME}"]


# --- Status and down ------------------------------------------------------------------------


def status(site: Site, fake: FakeBuildx) -> list[dict[str, str]]:
    rows = status_rows(site.project(), fake.program())
    return [dict(zip(STATUS_HEADER, row, strict=True)) for row in rows]


def test_status_has_a_row_for_each_node(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    fake.add(endpoint="ssh://b.test", status="stopped")
    first, second = status(site, fake)
    assert first == {
        "node": f"{NAME}0", "endpoint": SOCKET, "status": "running", "BuildKit": "v0.26.2",
        "platforms": "linux/amd64 linux/386", "entitlements": "network.host security.insecure",
    }  # fmt: skip
    assert (second["status"], second["BuildKit"], second["platforms"]) == ("stopped", "-", "-")
    assert fake.changes() == []


def test_status_of_none_names_setup(site: Site, fake: FakeBuildx) -> None:
    with pytest.raises(BuilderError, match=r"`inv buildx\.setup` creates it"):
        status(site, fake)


@pytest.mark.parametrize(
    ("why", "allowed"),
    [
        ("", "security.insecure"),
        (REFUSED, "none"),
        ("ERROR: failed to list workers: connection refused", "unknown"),
    ],
)
@pytest.mark.parametrize("driver", ["docker", "docker-container"])
def test_one_without_flags_of_ours_is_asked_what_it_allows(
    site: Site, fake: FakeBuildx, driver: str, why: str, allowed: str
) -> None:
    site.env["BUILDX_DRIVER"] = driver
    fake.add("default" if driver == "docker" else NAME, driver, flags="")
    if why:
        fake.fail(why, "build")
    assert status(site, fake)[0]["entitlements"] == allowed


def test_an_old_frontend_says_that_the_entitlement_is_given(site: Site, fake: FakeBuildx) -> None:
    fake.add(flags="")
    fake.fail(UNKNOWN_FLAG, "build")
    assert status(site, fake)[0]["entitlements"] == "security.insecure"


def test_one_with_other_flags_allows_nothing_of_it(site: Site, fake: FakeBuildx) -> None:
    fake.add(flags="--debug")
    assert status(site, fake)[0]["entitlements"] == "none"
    assert not fake.calls("build")


def test_the_size_of_the_cache(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    assert cache_size(site.project(), fake.program()) == "1.23GB"
    assert fake.calls("du")[0].argv == ["du", f"--builder={NAME}"]
    fake.fail("ERROR: it does not answer", "du")
    assert cache_size(site.project(), fake.program()) == "unknown"


@pytest.mark.parametrize(
    ("keep", "argv"), [(True, f"rm --keep-state {NAME}"), (False, f"rm {NAME}")]
)
def test_down_removes_it(site: Site, fake: FakeBuildx, *, keep: bool, argv: str) -> None:
    fake.add()
    fake.add("other")
    project = site.project()
    remove_builder(project, fake.program(), keep_cache=keep)
    assert fake.changes() == [argv]
    assert list(fake.state["builders"]) == ["other"]
    assert (", kept its cache" in heard(project)) == keep


def test_down_of_none_says_so(site: Site, fake: FakeBuildx) -> None:
    project = site.project()
    remove_builder(project, fake.program(), keep_cache=False)
    assert heard(project) == f"buildx.down: builder {NAME} does not exist\n"


def test_down_leaves_the_engine(site: Site, fake: FakeBuildx) -> None:
    fake.add("default", "docker")
    site.env["BUILDX_DRIVER"] = "docker"
    project = site.project()
    remove_builder(project, fake.program(), keep_cache=False)
    assert "the engine itself is the builder; nothing to remove" in heard(project)
    assert fake.changes() == []
