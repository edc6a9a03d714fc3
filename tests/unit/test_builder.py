"""Selection, platforms and frontend of a builder."""

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
    parsed = (BuilderNode(f"n{i}", platforms=node, fixed=fixed) for i, node in enumerate(nodes))
    return Builder("mine", "docker-container", tuple(parsed))


# --- Selection ------------------------------------------------------------------------------


def test_builder_of_the_settings_is_selected(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.add("mine")
    fake.add()
    assert find_builder(settings(tmp_path), fake.program()).name == NAME
    selected = find_builder(settings(tmp_path, BUILDX_BUILDER="mine"), fake.program())
    assert selected.name == "mine"
    assert [node.platforms for node in selected.nodes] == [("linux/amd64", "linux/386")]


def test_driver_docker_selects_the_builder_of_the_engine(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.add()
    fake.add("far", "docker")
    selected = find_builder(settings(tmp_path, BUILDX_DRIVER="docker"), fake.program(builder="far"))
    assert (selected.name, selected.driver) == ("far", "docker")


def test_missing_builder_is_reported_with_setup_as_hint(tmp_path: Path, fake: FakeBuildx) -> None:
    with pytest.raises(BuilderError, match=r"no builder 'insecure-builder'; `inv buildx\.setup`"):
        find_builder(settings(tmp_path), fake.program())


def test_failed_inspection_is_reported(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.fail("ERROR: open /x: permission denied", "inspect")
    with pytest.raises(BuilderError, match="permission denied"):
        find_builder(settings(tmp_path), fake.program())


# --- Platforms ------------------------------------------------------------------------------


def test_first_platform_of_a_node_is_native() -> None:
    platforms = native_platforms(builder(("linux/amd64", "linux/arm64"), ("linux/arm64",), ()))
    assert list(platforms) == [AMD64, ARM64]


def test_fixed_platforms_of_a_node_are_native() -> None:
    node = builder(("linux/arm64", "linux/386", "linux/amd64"), fixed=("linux/arm64", "linux/386"))
    assert list(native_platforms(node)) == [ARM64, I386]


def test_platform_without_a_guix_system_is_ignored() -> None:
    assert list(native_platforms(builder(("linux/s390x",), ("linux/arm64",)))) == [ARM64]


def test_platform_is_available_from_any_node_or_by_emulation() -> None:
    two_nodes = builder(("linux/amd64", "linux/arm64"), ("linux/riscv64",))
    assert has_platform(two_nodes, ARM64)
    assert has_platform(two_nodes, Platform.parse("linux/riscv64"))
    assert not has_platform(two_nodes, I386)


@pytest.mark.parametrize(
    ("nodes", "platform"),
    [
        ([("linux/amd64",)], AMD64),
        ([("linux/amd64", "linux/386")], I386),  # without emulation
        ([("linux/amd64",), ("linux/arm64",)], ARM64),
        ([()], ARM64),  # a stopped node
    ],
)
def test_platform_of_a_node_is_accepted(
    tmp_path: Path, nodes: list[tuple[str, ...]], platform: Platform
) -> None:
    check_platform(settings(tmp_path), builder(*nodes), platform)


@pytest.mark.parametrize("sandbox", ["privileged", "nochroot"])
def test_missing_platform_is_rejected(tmp_path: Path, sandbox: str) -> None:
    with pytest.raises(
        BuilderError, match=r"mine has no linux/arm64; `docker run .* --install arm64"
    ):
        check_platform(settings(tmp_path, GUIX_SANDBOX=sandbox), builder(("linux/amd64",)), ARM64)


def test_emulated_platform_is_accepted_only_with_nochroot(tmp_path: Path) -> None:
    emulating = builder(("linux/amd64", "linux/arm64"))
    with pytest.raises(UsageError, match=r"linux/arm64 is emulated .* set GUIX_SANDBOX=nochroot"):
        check_platform(settings(tmp_path), emulating, ARM64)
    check_platform(settings(tmp_path, GUIX_SANDBOX="nochroot"), emulating, ARM64)


def test_builder_with_another_driver_is_rejected(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.add()
    remote = settings(tmp_path, BUILDX_DRIVER="remote", BUILDX_NODES="tcp://b.test:1")
    with pytest.raises(BuilderError, match="the driver docker-container, not remote"):
        find_builder(remote, fake.program())


# --- Frontend -------------------------------------------------------------------------------


def test_current_builder_needs_no_frontend(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.add()
    assert needed_syntax(settings(tmp_path), fake.program(), NAME) is None
    (call,) = fake.calls("build")
    assert "RUN --security=insecure" in call.stdin
    assert {f"--builder={NAME}", "--call=check", "--allow=security.insecure"} <= set(call.argv)
    assert "BUILDKIT_SYNTAX" not in call.text


def test_old_builder_uses_the_frontend_of_the_settings(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.fail(UNKNOWN_FLAG, "build", without=("BUILDKIT_SYNTAX=reg.test/frontend:1",))
    with_frontend = settings(tmp_path, BUILDKIT_SYNTAX="reg.test/frontend:1")
    assert needed_syntax(with_frontend, fake.program(), NAME) == "reg.test/frontend:1"
    assert len(fake.calls("build")) == 2


@pytest.mark.parametrize(
    "reason",
    [
        NO_IMAGE,
        f"{NO_IMAGE}: dial tcp: lookup reg.test: no such host",
        "ERROR: failed to solve: x: pull access denied, insufficient_scope",
    ],
)
def test_unavailable_frontend_is_named(tmp_path: Path, fake: FakeBuildx, reason: str) -> None:
    fake.fail(reason, "BUILDKIT_SYNTAX")
    fake.fail(UNKNOWN_FLAG, "build")
    with pytest.raises(BuilderError) as error:
        needed_syntax(settings(tmp_path), fake.program(), NAME)
    message = str(error.value)
    assert "cannot pull docker/dockerfile:1; set BUILDKIT_SYNTAX" in message
    assert "older than 1.20" in message
    assert "\n" not in message


def test_old_frontend_is_reported(tmp_path: Path, fake: FakeBuildx) -> None:
    fake.fail(UNKNOWN_FLAG, "build")
    with pytest.raises(BuilderError, match=r"unknown flag: --security; .*BUILDKIT_SYNTAX"):
        needed_syntax(settings(tmp_path), fake.program(), NAME)


@pytest.mark.parametrize(
    ("driver", "reason", "hint"),
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
def test_forbidden_insecure_steps_are_reported_with_a_hint(
    tmp_path: Path, fake: FakeBuildx, driver: str, reason: str, hint: str
) -> None:
    fake.fail(reason, "build")
    nodes = {"BUILDX_NODES": "tcp://far.test:1234"} if driver == "remote" else {}
    with_driver = settings(tmp_path, BUILDX_DRIVER=driver, **nodes)
    with pytest.raises(BuilderError, match=f"{NAME} does not allow insecure steps .*{hint}"):
        needed_syntax(with_driver, fake.program(), NAME)
    assert len(fake.calls("build")) == 1


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("ERROR: failed to list workers: connection refused", BuilderError),
        ("ERROR: failed to authorize: 401 Unauthorized", RegistryError),
    ],
)
def test_other_failures_are_reported_unchanged(
    tmp_path: Path, fake: FakeBuildx, reason: str, kind: type[Exception]
) -> None:
    fake.fail(reason, "build")
    with pytest.raises(kind, match=reason.removeprefix("ERROR: ")):
        needed_syntax(settings(tmp_path), fake.program(), NAME)
    assert len(fake.calls("build")) == 1
