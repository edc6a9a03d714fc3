"""Creation, check, status and removal of builders."""

from __future__ import annotations

import shlex
import socket
from typing import TYPE_CHECKING, Any

import pytest
from fake_buildx import FLAGS, NAME, OPTIONS, REFUSED, SOCKET, UNKNOWN_FLAG, FakeBuildx
from fake_engine import BufferConsole, Site, console_text, new_site

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
def _no_endpoint_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the check of endpoints, which do not exist in these tests."""
    monkeypatch.setattr(buildx_setup, "check_endpoint", lambda _endpoint: None)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return new_site(tmp_path / "project")


@pytest.fixture
def fake(tmp_path: Path) -> FakeBuildx:
    return FakeBuildx(tmp_path / "buildx")


def setup(site: Site, fake: FakeBuildx, *, builder: str = "default", **options: bool) -> str:
    """Set up a builder and return the messages."""
    project = site.project()
    set_up(project, fake.program(builder=builder), **options)
    return console_text(project)


def setup_error(site: Site, fake: FakeBuildx, **options: Any) -> str:
    with pytest.raises(BuilderError) as error:
        setup(site, fake, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def inspected_builder(fake: FakeBuildx, name: str = NAME) -> Builder:
    builder = command.inspect(fake.program(), name)
    assert builder
    return builder


# --- Endpoints ------------------------------------------------------------------------------


def test_available_endpoint_is_accepted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_endpoint(f"tcp://127.0.0.1:{server.getsockname()[1]}")
    with socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        local.listen()
        check_endpoint(f"unix://{tmp_path}/s")


@pytest.mark.parametrize("endpoint", ["ssh://b.test", "a-context", "", "tcp://b.test"])
def test_endpoint_without_a_local_check_is_accepted(endpoint: str) -> None:
    check_endpoint(endpoint)


def test_unavailable_endpoint_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    for endpoint in (free, f"unix://{tmp_path}/none", "tcp://b.test:99999", "tcp://[::1:1"):
        with pytest.raises(BuilderError, match="does not answer") as error:
            check_endpoint(endpoint)
        assert endpoint in str(error.value)
        assert "correct BUILDX_NODES" in str(error.value)


def test_builder_is_not_created_if_a_node_is_unavailable(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buildx_setup, "check_endpoint", check_endpoint)
    site.env |= {"BUILDX_DRIVER": "remote", "BUILDX_NODES": "unix:///none"}
    assert "unix:///none" in setup_error(site, fake)
    assert fake.calls("create") == []


# --- Creation -------------------------------------------------------------------------------


def test_missing_builder_is_created_on_the_engine_and_started(site: Site, fake: FakeBuildx) -> None:
    messages = setup(site, fake)
    builder = inspected_builder(fake)
    (node,) = builder.nodes
    assert (builder.driver, node.endpoint, node.status) == ("docker-container", SOCKET, "running")
    assert node.flags == tuple(FLAGS.split())
    assert node.options == OPTIONS
    assert f"creating {NAME} (docker-container)" in messages
    assert f"{NAME} (docker-container) runs insecure steps\n" in messages


def test_selected_builder_of_the_user_is_unchanged(site: Site, fake: FakeBuildx) -> None:
    setup(site, fake)
    setup(site, fake, recreate=True)
    assert fake.state["selected"] == "mine"
    assert "--use" not in " ".join(call.text for call in fake.calls("create"))


def test_builder_is_selected_on_request(site: Site, fake: FakeBuildx) -> None:
    messages = setup(site, fake, use=True)
    assert fake.state["selected"] == NAME
    assert f"`docker buildx` now builds with {NAME}" in messages


def test_builder_without_insecure_steps_is_not_selected(site: Site, fake: FakeBuildx) -> None:
    fake.fail(REFUSED, "build")
    setup_error(site, fake, use=True)
    assert fake.state["selected"] == "mine"


def test_endpoint_of_an_engine_in_a_context_is_the_context(site: Site, fake: FakeBuildx) -> None:
    setup(site, fake, builder="far")
    assert inspected_builder(fake).nodes[0].endpoint == "far"


def test_all_nodes_of_the_settings_are_created(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_NODES"] = (
        '"ssh://a.test,platform=linux/amd64,memory=4g" '
        "tcp://b.test:2376,platform=linux/arm64,platform=linux/arm/v7"
    )
    setup(site, fake)
    first, second = inspected_builder(fake).nodes
    assert (first.endpoint, second.endpoint) == ("ssh://a.test", "tcp://b.test:2376")
    assert first.options == {**OPTIONS, "memory": "4g"}
    assert second.options == OPTIONS
    assert second.fixed == ("linux/arm64", "linux/arm/v7")
    assert ["--append" in call.argv for call in fake.calls("create")] == [False, True]
    assert first.name != second.name


def test_option_of_a_node_overrides_the_default(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_NODES"] = "ssh://a.test,network=bridge,env.BUILDKIT_STEP_LOG_MAX_SIZE=1"
    setup(site, fake)
    options = inspected_builder(fake).nodes[0].options
    assert (options["network"], options["env.BUILDKIT_STEP_LOG_MAX_SIZE"]) == ("bridge", "1")


def test_builder_uses_only_proxies_without_credentials(site: Site, fake: FakeBuildx) -> None:
    """The options of a builder are public. A change of the proxies does not recreate it."""
    site.env.update(http_proxy="http://p.test:1", https_proxy="http://me:hunter2@p.test:1")
    assert "does not use https_proxy" in setup(site, fake)
    options = inspected_builder(fake).nodes[0].options
    assert options["env.http_proxy"] == options["env.HTTP_PROXY"] == "http://p.test:1"
    assert "hunter2" not in repr(fake.calls("create"))
    assert "env.https_proxy" not in options
    site.env.update(http_proxy="http://q.test:1", https_proxy="")
    assert "exists" in setup(site, fake)


def test_option_with_commas_is_quoted(site: Site) -> None:
    site.env["BUILDX_NODES"] = """'ssh://a.test,"env.NO_PROXY=a,b"'"""
    settings = site.settings()
    (node,) = settings.buildx_nodes
    assert '--driver-opt="env.NO_PROXY=a,b"' in create_argv(settings, node, append=False)


def test_remote_buildkit_gets_no_default_flags_and_options(site: Site, fake: FakeBuildx) -> None:
    site.env.update(BUILDX_DRIVER="remote", BUILDX_NODES="tcp://far.test:1234")
    setup(site, fake)
    (call,) = fake.calls("create")
    assert call.argv == [
        "create", f"--name={NAME}", "--driver=remote", "--", "tcp://far.test:1234",
    ]  # fmt: skip


def test_kubernetes_driver_gets_its_options_and_no_endpoint(site: Site, fake: FakeBuildx) -> None:
    site.env.update(BUILDX_DRIVER="kubernetes", BUILDX_NODES="namespace=ci,replicas=2")
    setup(site, fake)
    (call,) = fake.calls("create")
    assert call.argv[-2:] == ["--driver-opt=namespace=ci", "--driver-opt=replicas=2"]
    assert f"--buildkitd-flags={FLAGS}" in call.argv
    assert "network=host" not in call.text
    assert f"{NAME} exists" in setup(site, fake)


def test_node_without_an_endpoint_is_on_the_engine(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_NODES"] = "memory=4g ssh://b.test"
    setup(site, fake)
    first, second = inspected_builder(fake).nodes
    assert (first.endpoint, second.endpoint) == (SOCKET, "ssh://b.test")
    assert first.options == {**OPTIONS, "memory": "4g"}


def test_builder_of_the_engine_is_checked_and_not_created(site: Site, fake: FakeBuildx) -> None:
    fake.add("default", "docker")
    site.env["BUILDX_DRIVER"] = "docker"
    assert "default (docker) runs insecure steps" in setup(site, fake)
    assert fake.changes() == []


def test_needed_frontend_is_reported(site: Site, fake: FakeBuildx) -> None:
    fake.fail(UNKNOWN_FLAG, "build", without=("BUILDKIT_SYNTAX",))
    assert "runs insecure steps, with the Dockerfile frontend docker/" in setup(site, fake)


# --- Existing builders ----------------------------------------------------------------------


def test_matching_builder_is_unchanged(site: Site, fake: FakeBuildx) -> None:
    setup(site, fake)
    changes = fake.changes()
    assert f"{NAME} exists" in setup(site, fake)
    assert fake.changes() == changes


def test_stopped_builder_is_started(site: Site, fake: FakeBuildx) -> None:
    fake.add(status="stopped")
    assert f"{NAME}0 is not running; starting it" in setup(site, fake)
    assert fake.changes() == [f"inspect --bootstrap {NAME}"]
    assert inspected_builder(fake).nodes[0].status == "running"


@pytest.mark.parametrize(
    ("driver", "fields", "difference"),
    [
        ("remote", {}, "its driver is remote, not docker-container"),
        ("", {"endpoint": "tcp://b.test:1"}, f"{NAME}0 is at tcp://b.test:1, not at {SOCKET}"),
        ("", {"flags": ""}, "created without the entitlement security.insecure"),
        ("", {"options": {**OPTIONS, "network": "bridge"}}, "created without network=host"),
        ("", {"options": {}}, "created without network=host"),
    ],
)
def test_difference_is_reported_and_not_changed(
    site: Site, fake: FakeBuildx, driver: str, fields: dict[str, Any], difference: str
) -> None:
    fake.add(driver=driver or "docker-container", status="stopped", **fields)
    message = setup_error(site, fake)
    assert difference in message
    assert "`inv buildx.setup --recreate` (keeps the cache)" in message
    assert message.endswith("or change BUILDX_DRIVER and BUILDX_NODES")
    assert fake.changes() == []


def test_different_number_of_nodes_is_reported(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    fake.add(endpoint="ssh://b.test")
    assert "it has 2 nodes, not 1" in setup_error(site, fake)


def test_different_platforms_of_a_node_are_reported(site: Site, fake: FakeBuildx) -> None:
    site.env["BUILDX_NODES"] = f"{SOCKET},platform=linux/amd64"
    fake.add()
    assert f"{NAME}0 is for all that it supports, not linux/amd64" in setup_error(site, fake)
    setup(site, fake, recreate=True)
    site.env["BUILDX_NODES"] = f"{SOCKET},platform=linux/arm64"
    assert f"{NAME}0 is for linux/amd64, not linux/arm64" in setup_error(site, fake)


def test_all_differences_are_reported_together(site: Site, fake: FakeBuildx) -> None:
    fake.add(flags="", endpoint="ssh://b.test")
    message = setup_error(site, fake)
    for words in ("is at ssh://b.test", "security.insecure"):
        assert words in message


@pytest.mark.parametrize(
    "fields",
    [
        # Without the log options and the entitlement network.host.
        {"flags": "--allow-insecure-entitlement security.insecure", "options": {"network": "host"}},
        {
            "flags": f"--debug {FLAGS.replace('=', ' ')}",
            "options": {**OPTIONS, "memory": "4g"},
            "fixed": ("linux/amd64",),
        },
    ],
)
def test_harmless_differences_are_accepted(
    site: Site, fake: FakeBuildx, fields: dict[str, Any]
) -> None:
    fake.add(**fields)
    setup(site, fake)
    assert fake.changes() == []


def test_builder_is_kept_if_its_replacement_is_impossible(
    site: Site, fake: FakeBuildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add()
    monkeypatch.setattr(buildx_setup, "check_endpoint", check_endpoint)
    site.env["BUILDX_NODES"] = "unix:///none"
    assert "unix:///none does not answer" in setup_error(site, fake, recreate=True)
    assert fake.changes() == []


@pytest.mark.parametrize("flags", [FLAGS, ""])
def test_recreated_builder_keeps_its_state(site: Site, fake: FakeBuildx, flags: str) -> None:
    fake.add(flags=flags)
    setup(site, fake, recreate=True)
    assert fake.changes()[0] == f"rm --keep-state {NAME}"
    assert [verb for verb in fake.verbs() if verb in ("rm", "create")] == ["rm", "create"]
    assert inspected_builder(fake).nodes[0].flags == tuple(FLAGS.split())


# --- Failures -------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("create", "--append"), ("inspect", "--bootstrap")])
def test_partly_created_builder_is_removed(
    site: Site, fake: FakeBuildx, words: tuple[str, ...]
) -> None:
    site.env["BUILDX_NODES"] = "ssh://a.test ssh://b.test"
    fake.fail("ERROR: b.test: no route to host", *words)
    assert "b.test: no route to host" in setup_error(site, fake)
    assert fake.state["builders"] == {}
    assert f"rm --keep-state {NAME}" in fake.changes()


def test_failed_creation_removes_no_other_builder(site: Site, fake: FakeBuildx) -> None:
    fake.fail("ERROR: no space left on device", "create")
    setup_error(site, fake)
    assert not fake.calls("rm")


def test_first_error_is_reported(site: Site, fake: FakeBuildx) -> None:
    fake.fail("ERROR: b.test: no route to host", "--bootstrap")
    fake.fail("ERROR: it does not go away", "rm")
    project = site.project()
    with pytest.raises(BuilderError, match="no route to host"):
        set_up(project, fake.program())
    assert (
        f"warning: {NAME} is only partly created (it does not go away); `inv buildx.down`"
        in console_text(project)
    )


# --- Platforms ------------------------------------------------------------------------------


def test_missing_platform_is_reported_with_a_command(site: Site, fake: FakeBuildx) -> None:
    site.env["PLATFORMS"] = "linux/amd64 linux/arm64 linux/arm/v7"
    messages = setup(site, fake)
    assert (
        "warning: no node supports linux/arm64, linux/arm/v7: "
        "`docker run --privileged --rm tonistiigi/binfmt --install arm64,arm` installs" in messages
    )
    assert site.engine.specs == []


def test_supported_platforms_have_no_warning(site: Site, fake: FakeBuildx) -> None:
    site.env["PLATFORMS"] = "linux/amd64 linux/386"
    assert "warning" not in setup(site, fake)


# --- Dry run --------------------------------------------------------------------------------


def dry_run_commands(site: Site, fake: FakeBuildx, **options: bool) -> list[str]:
    """Return the printed commands of a dry run, and check that it runs none."""
    console = BufferConsole()
    set_up(site.project(), fake.program(console, perform=False), **options)
    assert fake.changes() == []
    return [line for line in console.text.splitlines() if line.startswith("+ ")]


def test_dry_run_prints_all_commands(site: Site, fake: FakeBuildx) -> None:
    commands = dry_run_commands(site, fake, use=True)
    create, boot, use = commands
    settings = site.settings()
    assert shlex.split(create)[1:3] == ["docker", "buildx"]
    assert shlex.split(create)[3:5] == ["create", f"--name={settings.buildx_builder}"]
    assert boot == f"+ docker buildx inspect --bootstrap {NAME}"
    assert use == f"+ docker buildx use {NAME}"


def test_dry_run_prints_the_changes_of_an_existing_builder(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    assert dry_run_commands(site, fake) == []
    commands = dry_run_commands(site, fake, recreate=True)
    assert [line.split()[3] for line in commands] == ["rm", "create", "inspect"]


def test_dry_run_prints_the_start_of_a_stopped_builder(site: Site, fake: FakeBuildx) -> None:
    fake.add(status="stopped")
    assert dry_run_commands(site, fake) == [f"+ docker buildx inspect --bootstrap {NAME}"]


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


def test_status_of_a_missing_builder_names_setup(site: Site, fake: FakeBuildx) -> None:
    with pytest.raises(BuilderError, match=r"`inv buildx\.setup` creates it"):
        status(site, fake)


@pytest.mark.parametrize(
    ("error", "allowed"),
    [
        ("", "security.insecure"),
        (REFUSED, "none"),
        ("ERROR: failed to list workers: connection refused", "unknown"),
    ],
)
@pytest.mark.parametrize("driver", ["docker", "docker-container"])
def test_entitlements_of_a_builder_without_flags_are_probed(
    site: Site, fake: FakeBuildx, driver: str, error: str, allowed: str
) -> None:
    site.env["BUILDX_DRIVER"] = driver
    fake.add("default" if driver == "docker" else NAME, driver, flags="")
    if error:
        fake.fail(error, "build")
    assert status(site, fake)[0]["entitlements"] == allowed


def test_old_frontend_shows_that_the_entitlement_is_granted(site: Site, fake: FakeBuildx) -> None:
    fake.add(flags="")
    fake.fail(UNKNOWN_FLAG, "build")
    assert status(site, fake)[0]["entitlements"] == "security.insecure"


def test_builder_with_other_flags_has_no_entitlements(site: Site, fake: FakeBuildx) -> None:
    fake.add(flags="--debug")
    assert status(site, fake)[0]["entitlements"] == "none"
    assert not fake.calls("build")


def test_size_of_the_cache_is_reported(site: Site, fake: FakeBuildx) -> None:
    fake.add()
    assert cache_size(site.project(), fake.program()) == "1.23GB"
    assert fake.calls("du")[0].argv == ["du", f"--builder={NAME}"]
    fake.fail("ERROR: it does not answer", "du")
    assert cache_size(site.project(), fake.program()) == "unknown"


@pytest.mark.parametrize(
    ("keep", "argv"), [(True, f"rm --keep-state {NAME}"), (False, f"rm {NAME}")]
)
def test_down_removes_the_builder(site: Site, fake: FakeBuildx, *, keep: bool, argv: str) -> None:
    fake.add()
    fake.add("other")
    project = site.project()
    remove_builder(project, fake.program(), keep_cache=keep)
    assert fake.changes() == [argv]
    assert list(fake.state["builders"]) == ["other"]
    assert (", kept its cache" in console_text(project)) == keep


def test_down_reports_a_missing_builder(site: Site, fake: FakeBuildx) -> None:
    project = site.project()
    remove_builder(project, fake.program(), keep_cache=False)
    assert console_text(project) == f"buildx.down: builder {NAME} does not exist\n"


def test_down_does_not_remove_the_builder_of_the_engine(site: Site, fake: FakeBuildx) -> None:
    fake.add("default", "docker")
    site.env["BUILDX_DRIVER"] = "docker"
    project = site.project()
    remove_builder(project, fake.program(), keep_cache=False)
    assert "the engine itself is the builder; nothing to remove" in console_text(project)
    assert fake.changes() == []
