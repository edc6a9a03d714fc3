"""Selection of the builder, its features and its errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_buildx import NAME, NO_IMAGE, REFUSED, UNKNOWN_FLAG, FakeBuildx

from guix_tasks.buildkit.builder import (
    check_platform,
    find_builder,
    has_platform,
    native_platforms,
    needed_syntax,
)
from guix_tasks.buildkit.buildx import Builder, BuilderNode
from guix_tasks.errors import BuilderError, RegistryError, UsageError
from guix_tasks.oci.platform import Platform
from guix_tasks.settings import Settings, load_settings

if TYPE_CHECKING:
    from pathlib import Path

AMD64, ARM64, I386 = map(Platform.parse, ("linux/amd64", "linux/arm64", "linux/386"))


@pytest.fixture
def fake(tmp_path: Path) -> FakeBuildx:
    return FakeBuildx(tmp_path / "buildx")


def settings(directory: Path, **env: str) -> Settings:
    return load_settings(directory, directory, env)


def builder(*nodes: tuple[str, ...], fixed: tuple[str, ...] = ()) -> Builder:
    made = (BuilderNode(f"n{i}", platforms=each, fixed=fixed) for i, each in enumerate(nodes))
    return Builder("mine", "docker-container", tuple(made))


# --- Which one ------------------------------------------------------------------------------


def test_it_is_the_one_that_the_settings_name(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.add("mine")
    fake.add()
    assert find_builder(settings(tmp_path), fake.program()).name == NAME
    found = find_builder(settings(tmp_path, BUILDX_BUILDER="mine"), fake.program())
    assert found.name == "mine"
    assert [node.platforms for node in found.nodes] == [("linux/amd64", "linux/386")]


def test_with_the_driver_docker_it_is_the_engine_itself(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.add()
    fake.add("far", "docker")
    found = find_builder(settings(tmp_path, BUILDX_DRIVER="docker"), fake.program(own="far"))
    assert (found.name, found.driver) == ("far", "docker")


def test_where_there_is_none_setup_is_named(tmp_path: Path, fake: FakeBuildx) -> None:
    with pytest.raises(BuilderError, match=r"no builder 'insecure-builder'; `inv buildx\.setup`"):
        find_builder(settings(tmp_path), fake.program())


def test_another_fault_than_a_missing_builder_is_told(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.fail("ERROR: open /x: permission denied", "inspect")
    with pytest.raises(BuilderError, match="permission denied"):
        find_builder(settings(tmp_path), fake.program())


# --- Its platforms --------------------------------------------------------------------------


def test_the_first_platform_of_a_node_is_its_own() -> None:
    found = native_platforms(builder(("linux/amd64", "linux/arm64"), ("linux/arm64",), ()))
    assert list(found) == [AMD64, ARM64]


def test_what_a_node_is_said_to_be_for_counts_as_its_own() -> None:
    found = builder(("linux/arm64", "linux/386", "linux/amd64"), fixed=("linux/arm64", "linux/386"))
    assert list(native_platforms(found)) == [ARM64, I386]


def test_a_platform_that_guix_has_no_system_for_is_passed_over() -> None:
    assert list(native_platforms(builder(("linux/s390x",), ("linux/arm64",)))) == [ARM64]


def test_a_platform_is_had_by_any_node_and_by_emulation() -> None:
    found = builder(("linux/amd64", "linux/arm64"), ("linux/riscv64",))
    assert has_platform(found, ARM64)
    assert has_platform(found, Platform.parse("linux/riscv64"))
    assert not has_platform(found, I386)


@pytest.mark.parametrize(
    ("nodes", "platform"),
    [
        ([("linux/amd64",)], AMD64),
        ([("linux/amd64", "linux/386")], I386),  # it runs those programs itself
        ([("linux/amd64",), ("linux/arm64",)], ARM64),
        ([()], ARM64),  # it is not running yet
    ],
)
def test_what_a_machine_of_it_runs_is_not_refused(
    tmp_path: Path, nodes: list[tuple[str, ...]], platform: Platform
) -> None:
    check_platform(settings(tmp_path), builder(*nodes), platform)


@pytest.mark.parametrize("sandbox", ["privileged", "nochroot"])
def test_a_platform_that_it_lacks_is_refused(tmp_path: Path, sandbox: str) -> None:
    with pytest.raises(
        BuilderError, match=r"mine has no linux/arm64; `docker run .* --install arm64"
    ):
        check_platform(settings(tmp_path, GUIX_SANDBOX=sandbox), builder(("linux/amd64",)), ARM64)


def test_a_platform_that_it_emulates_is_refused_but_without_isolation(tmp_path: Path) -> None:
    emulating = builder(("linux/amd64", "linux/arm64"))
    with pytest.raises(UsageError, match=r"linux/arm64 is emulated .* set GUIX_SANDBOX=nochroot"):
        check_platform(settings(tmp_path), emulating, ARM64)
    check_platform(settings(tmp_path, GUIX_SANDBOX="nochroot"), emulating, ARM64)


def test_a_builder_of_another_driver_is_refused(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.add()
    remote = settings(tmp_path, BUILDX_DRIVER="remote", BUILDX_NODES="tcp://b.test:1")
    with pytest.raises(BuilderError, match="the driver docker-container, not remote"):
        find_builder(remote, fake.program())


# --- Its frontend ---------------------------------------------------------------------------


def test_a_builder_that_knows_insecure_steps_needs_no_frontend(
    tmp_path: Path, fake: FakeBuildx
) -> None:
    fake.add()
    assert needed_syntax(settings(tmp_path), fake.program(), NAME) is None
    (call,) = fake.calls("build")
    assert "RUN --security=insecure" in call.stdin
    assert {f"--builder={NAME}", "--call=check", "--allow=security.insecure"} <= set(call.argv)
    assert "BUILDKIT_SYNTAX" not in call.text


def test_an_old_one_is_given_the_frontend_of_the_settings(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.fail(UNKNOWN_FLAG, "build", without=("BUILDKIT_SYNTAX=reg.test/frontend:1",))
    wanted = settings(tmp_path, BUILDKIT_SYNTAX="reg.test/frontend:1")
    assert needed_syntax(wanted, fake.program(), NAME) == "reg.test/frontend:1"
    assert len(fake.calls("build")) == 2


@pytest.mark.parametrize(
    "why",
    [
        NO_IMAGE,
        f"{NO_IMAGE}: dial tcp: lookup reg.test: no such host",
        "ERROR: failed to solve: x: pull access denied, insufficient_scope",
    ],
)
def test_a_frontend_that_is_out_of_reach_is_named(
    tmp_path: Path, fake: FakeBuildx, why: str
) -> None:
    fake.fail(why, "BUILDKIT_SYNTAX")
    fake.fail(UNKNOWN_FLAG, "build")
    with pytest.raises(BuilderError) as caught:
        needed_syntax(settings(tmp_path), fake.program(), NAME)
    said = str(caught.value)
    assert "cannot pull docker/dockerfile:1; set BUILDKIT_SYNTAX" in said
    assert "older than 1.20" in said
    assert "\n" not in said


def test_a_frontend_that_is_too_old_itself_is_told(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.fail(UNKNOWN_FLAG, "build")
    with pytest.raises(BuilderError, match=r"unknown flag: --security; .*BUILDKIT_SYNTAX"):
        needed_syntax(settings(tmp_path), fake.program(), NAME)


@pytest.mark.parametrize(
    ("driver", "why", "fix"),
    [
        ("docker", REFUSED, r"daemon\.json .*BUILDX_DRIVER=docker-container"),
        ("docker-container", REFUSED, r"`inv buildx\.setup --recreate`"),
        (
            "kubernetes",
            "ERROR: security.insecure is not allowed",
            r"`inv buildx\.setup --recreate`",
        ),
        ("remote", REFUSED, "--allow-insecure-entitlement security.insecure"),
    ],
)
def test_refused_insecure_steps_are_reported_with_a_fix(
    tmp_path: Path, fake: FakeBuildx, driver: str, why: str, fix: str
) -> None:
    fake.fail(why, "build")
    nodes = {"BUILDX_NODES": "tcp://far.test:1234"} if driver == "remote" else {}
    wanted = settings(tmp_path, BUILDX_DRIVER=driver, **nodes)
    with pytest.raises(BuilderError, match=f"{NAME} does not allow insecure steps .*{fix}"):
        needed_syntax(wanted, fake.program(), NAME)
    assert len(fake.calls("build")) == 1


@pytest.mark.parametrize(
    ("why", "kind"),
    [
        ("ERROR: failed to list workers: connection refused", BuilderError),
        ("ERROR: failed to authorize: 401 Unauthorized", RegistryError),
    ],
)
def test_any_other_fault_is_passed_on(
    tmp_path: Path, fake: FakeBuildx, why: str, kind: type[Exception]
) -> None:
    fake.fail(why, "build")
    with pytest.raises(kind, match=why.removeprefix("ERROR: ")):
        needed_syntax(settings(tmp_path), fake.program(), NAME)
    assert len(fake.calls("build")) == 1
