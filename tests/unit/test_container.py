"""Work containers: their configuration, their files and their removal."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import (
    BASE_CONFIG,
    DETERMINISTIC,
    IMAGE,
    FakeEngine,
    Killed,
    Site,
    another_process,
    console_text,
    new_site,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from guix_tasks.engine.api import ContainerSpec
from guix_tasks.errors import EngineError, StageError, StoppedError, UsageError
from guix_tasks.stages.container import (
    ENTRY_POINT,
    MOUNT_POINTS,
    PROJECT_LABEL,
    RESOURCES,
    WORK_DIRECTORY,
    Work,
    archive,
    cache_volumes,
    check_native_platform,
    environment,
    fill,
    is_kept,
    kept_containers,
    mount_points,
    sweep,
    unstarted_container,
    work_container,
    work_containers,
)
from guix_tasks.stages.images import STAGES
from guix_tasks.stages.make import committed_work

if TYPE_CHECKING:
    from guix_tasks.settings import Settings

WORK = Work("try", ("true", "a b"), {"stage": b"#!/bin/sh\n", "data/x": b"1"})


pytestmark = pytest.mark.usefixtures("serial_hashing")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = new_site(tmp_path)
    site.engine.make_image(BASE_CONFIG, {"/x": b""}, tag="work:1")
    return site


def spec_of(site: Site, work: Work = WORK) -> ContainerSpec:
    with work_container(site.engine, site.settings(), "work:1", work):
        pass
    return site.engine.specs[-1]


# --- The archive ----------------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3}){0,2}", fullmatch=True)


@DETERMINISTIC
@given(st.dictionaries(NAMES, st.binary(max_size=20), max_size=4))
def test_archive_contains_its_files_in_the_directory(files: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive(files))) as tar:
        members = tar.getmembers()
        contents = {f"/{m.name}": file.read() for m in members if (file := tar.extractfile(m))}
    assert contents == {f"{WORK_DIRECTORY}/{name}": content for name, content in files.items()}
    names: set[str] = set()
    for member in members:
        parent = os.path.dirname(member.name)  # noqa: PTH120 -- "" for none, not "."
        has_parent = parent in names or f"/{parent}" == os.path.dirname(WORK_DIRECTORY)  # noqa: PTH120
        assert has_parent, "a directory precedes its content"
        names.add(member.name)
        assert member.uid == member.gid == 0


def test_only_scripts_are_executable_and_other_files_are_private() -> None:
    files = {"a": b"#!/bin/sh\n", "b": b"x", "c/d": b"y"}
    with tarfile.open(fileobj=io.BytesIO(archive(files))) as tar:
        modes = {member.name: member.mode for member in tar}
    root = WORK_DIRECTORY.lstrip("/")
    assert modes == {
        root: 0o755, f"{root}/a": 0o755, f"{root}/b": 0o600,
        f"{root}/c": 0o755, f"{root}/c/d": 0o600,
    }  # fmt: skip


def test_entry_point_and_files_are_copied_in(site: Site) -> None:
    site.write("a.pub", "key a")
    site.write("sub/a.pub", "key b")
    site.env["GUIX_SUBSTITUTE_KEYS"] = "a.pub sub/a.pub"
    with work_container(site.engine, site.settings(), "work:1", WORK) as container:
        box = site.engine.all_containers[container]
    assert box.read(ENTRY_POINT) == (RESOURCES / "entry-point.sh").read_bytes()
    assert box.text(f"{WORK_DIRECTORY}/data/x") == "1"
    keys = {path: text for path, text in box.changes.items() if "/keys/" in path}
    assert sorted(keys.values(), key=str) == [b"key a", b"key b"]


# --- The environment ------------------------------------------------------------------------


def with_proxies(settings: Settings, proxies: dict[str, str]) -> Settings:
    return replace(settings, proxies=proxies)


@hypothesis_settings(DETERMINISTIC, max_examples=10)
@given(
    value=st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30
    )
)
def test_values_of_the_environment_are_quoted_for_the_shell(
    tmp_path_factory: pytest.TempPathFactory, value: str
) -> None:
    site = new_site(tmp_path_factory.getbasetemp() / "environment")
    site.engine.make_image({}, {"/x": b""}, tag="work:1")
    settings = with_proxies(site.settings(), {"https_proxy": value})
    with work_container(site.engine, settings, "work:1", WORK) as container:
        content = site.engine.all_containers[container].read(f"{WORK_DIRECTORY}/environment")
    assert content is not None
    script = content.decode() + 'printf %s "$https_proxy"\n'
    result = subprocess.run(["sh"], input=script.encode(), capture_output=True, check=True)
    assert result.stdout.decode() == value


CONSTANT = {
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "GUIX_DISTRO_AGE_WARNING": "12000m",
}
"""Variables that do not depend on settings: the user and so its profile, and no advice."""


def test_environment_contains_the_settings(site: Site) -> None:
    site.env.update(
        GUIX_CORES="0", GUIX_MAX_JOBS="2", GUIX_SUBSTITUTE_URLS="https://a.test https://b.test"
    )
    assert environment(site.settings()) == {
        "GUIX_SUBSTITUTE_URLS": "https://a.test https://b.test",
        "GUIX_CORES": "0",
        "GUIX_MAX_JOBS": "2",
        "GUIX_SANDBOX": "privileged",
        **CONSTANT,
    }


def test_unset_settings_are_not_in_the_environment(site: Site) -> None:
    assert environment(site.settings()) == {"GUIX_SANDBOX": "privileged", **CONSTANT}


def test_more_jobs_run_if_everything_is_downloaded(site: Site) -> None:
    site.env["GUIX_REQUIRE_SUBSTITUTES"] = "yes"
    assert environment(site.settings())["GUIX_MAX_JOBS"] == "4"
    site.env["GUIX_MAX_JOBS"] = "1"
    assert environment(site.settings())["GUIX_MAX_JOBS"] == "1"


def test_environment_has_no_secrets(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    assert "hunter2" not in repr(environment(site.settings()))


# --- The container --------------------------------------------------------------------------


def test_work_container_runs_the_entry_point_of_guix_tasks(site: Site) -> None:
    spec = spec_of(site)
    assert spec.command == (ENTRY_POINT, "true", "a b")
    assert spec.privileged
    assert spec.environment == {}
    assert spec.labels == {PROJECT_LABEL: IMAGE}


def test_work_container_overrides_the_user_and_the_healthcheck_of_its_image(site: Site) -> None:
    spec = spec_of(site)
    assert spec.user == "root"
    assert spec.no_healthcheck
    site.engine.make_image({}, {"/x": b""}, tag="work:1")
    spec = spec_of(site)
    # A commit takes fields that the image does not set from the container.
    assert spec.user is None
    assert not spec.no_healthcheck


def test_settings_determine_the_container(site: Site) -> None:
    site.env.update(
        MOUNTS="context:/a channels.scm:/b:ro",
        STAGE_MEMORY="1g",
        NETWORK="none",
        PLATFORMS="linux/arm64",
    )
    spec = spec_of(site)
    assert spec.binds[:2] == (
        f"{site.directory}/context:/a",
        f"{site.directory}/channels.scm:/b:ro",
    )
    assert spec.memory == 1 << 30
    assert spec.network == "none"
    assert spec.platform == "linux/arm64"


@pytest.mark.parametrize(("has_bridge", "network"), [(True, None), (False, "host")])
def test_engine_without_a_bridge_uses_the_host_network(
    tmp_path: Path, *, has_bridge: bool, network: str | None
) -> None:
    site = Site(tmp_path, FakeEngine(has_bridge=has_bridge))
    site.engine.make_image({}, {"/x": b""}, tag="work:1")
    assert spec_of(site).network == network


def test_mounts_are_rejected_by_a_remote_engine(tmp_path: Path) -> None:
    site = Site(tmp_path, FakeEngine(url="tcp://far.test:2376"), MOUNTS="context:/a")
    site.engine.make_image({}, {"/x": b""}, tag="work:1")
    with pytest.raises(UsageError, match=r"MOUNTS: .*tcp://far\.test:2376 .*unset MOUNTS"):
        spec_of(site)
    assert site.engine.all_containers == {}


def test_isolated_container_has_no_mounts_and_no_network(site: Site) -> None:
    site.env.update(MOUNTS="context:/a", PLATFORMS="linux/386")
    spec = spec_of(site, replace(WORK, isolated=True))
    assert (spec.binds, spec.scratch, spec.network) == ((), None, "none")
    assert spec.tmpfs_directories == ()
    assert site.engine.all_volumes == {}


def test_mount_points_are_the_missing_directories_of_the_image(site: Site) -> None:
    site.env["MOUNTS"] = "context:/x context:/srv/a/b context:/dev/c"
    site.engine.make_image({}, {"/x": b"", "/srv": b"", "/root/.cache": b""}, tag="work:2")
    work = replace(WORK, isolated=False)
    points = mount_points(site.engine, site.settings(), "work:2", work)
    assert points == ["/var/guix/substitute", "/var/guix", "/srv/a/b", "/srv/a", "/var"]
    assert site.engine.all_containers == {}


@pytest.mark.parametrize("sandbox", ["privileged", "capabilities", "rootless", "nochroot"])
def test_mount_points_are_removed_or_reported(site: Site, sandbox: str) -> None:
    site.env |= {"MOUNTS": "context:/a/b", "GUIX_SANDBOX": sandbox, "CACHE_VOLUME": ""}
    project = site.project()
    work = committed_work(project, "work:1", WORK)
    note = f"try: /a/b will be in the image, empty, because a {sandbox} container cannot remove"
    if sandbox in ("privileged", "capabilities"):
        assert work.files[MOUNT_POINTS] == b"/a/b\n/a\n"
        assert note not in console_text(project)
    else:
        assert work == WORK
        assert note in console_text(project)


def test_caches_are_on_volumes_of_the_project(site: Site) -> None:
    spec = spec_of(site)
    volumes = cache_volumes(site.settings())
    assert set(spec.binds) == {f"{name}:{target}" for name, target in volumes.items()}
    assert set(volumes.values()) == {"/root/.cache", "/var/guix/substitute"}
    assert spec.scratch == "/tmp"  # noqa: S108
    assert site.engine.all_volumes == {name: {PROJECT_LABEL: IMAGE} for name in volumes}


def test_each_project_has_separate_volumes(site: Site) -> None:
    volumes = cache_volumes(site.settings())
    site.env["IMAGE"] = "registry.test/other:1"
    assert not volumes.keys() & cache_volumes(site.settings()).keys()
    assert all(name.startswith("guix-tasks-cache-") for name in volumes)


@pytest.mark.parametrize("platform", ["", "linux/386"])
def test_disabled_cache_stays_in_the_image(site: Site, platform: str) -> None:
    site.env.update(CACHE_VOLUME="", PLATFORMS=platform)
    spec = spec_of(site)
    assert (spec.binds, spec.scratch, spec.tmpfs_directories) == ((), None, ())
    assert site.engine.all_volumes == {}


def test_container_without_isolation_is_unprivileged(site: Site) -> None:
    """It may set the personality of builds, which Docker's seccomp profile forbids."""
    assert (spec_of(site).privileged, spec_of(site).security) == (True, ())
    site.env["GUIX_SANDBOX"] = "nochroot"
    assert (spec_of(site).privileged, spec_of(site).security) == (False, ("seccomp=unconfined",))
    assert environment(site.settings())["GUIX_SANDBOX"] == "nochroot"


@pytest.mark.parametrize("platform", ["linux/386", "linux/arm/v7"])
def test_cache_of_a_32_bit_platform_is_in_memory(site: Site, platform: str) -> None:
    """On these platforms a program under QEMU fails on the inode numbers of a disk."""
    site.env["PLATFORMS"] = platform
    spec = spec_of(site)
    assert spec.tmpfs_directories == ("/root/.cache",)
    assert [bind.partition(":")[2] for bind in spec.binds] == ["/var/guix/substitute"]
    assert spec.scratch == "/tmp"  # noqa: S108
    assert all(name.endswith("-substitutes") for name in site.engine.all_volumes)


@pytest.mark.parametrize("platform", ["", "linux/amd64", "linux/arm64"])
def test_cache_of_a_64_bit_platform_is_on_disk(site: Site, platform: str) -> None:
    site.env["PLATFORMS"] = platform
    spec = spec_of(site)
    assert spec.tmpfs_directories == ()
    assert len(spec.binds) == 2


@pytest.mark.parametrize(
    ("native", "platform"),
    [
        ("linux/amd64", ""),
        ("linux/amd64", "linux/amd64"),
        ("linux/amd64", "linux/386"),
        ("linux/arm64", "linux/arm64"),
        ("linux/s390x", ""),
    ],
)
def test_native_platform_is_accepted(tmp_path: Path, native: str, platform: str) -> None:
    site = Site(tmp_path, FakeEngine(platform=native), PLATFORMS=platform)
    check_native_platform(site.engine, site.settings())


@pytest.mark.parametrize(
    ("native", "platform"),
    [
        ("linux/amd64", "linux/arm64"),
        ("linux/arm64", "linux/arm/v7"),
        ("linux/386", "linux/amd64"),
        ("linux/s390x", "linux/amd64"),
        ("linux/armv8l", "linux/arm/v7"),
    ],
)
def test_emulated_platform_is_accepted_only_with_nochroot(
    tmp_path: Path, native: str, platform: str
) -> None:
    site = Site(tmp_path, FakeEngine(platform=native), PLATFORMS=platform)
    with pytest.raises(UsageError) as error:
        check_native_platform(site.engine, site.settings())
    assert str(error.value).startswith(f"{platform} is emulated by this engine ({native})")
    assert "set GUIX_SANDBOX=nochroot" in str(error.value)
    site.env["GUIX_SANDBOX"] = "nochroot"
    check_native_platform(site.engine, site.settings())


def test_names_of_containers_are_unique(site: Site) -> None:
    assert spec_of(site).name != spec_of(site).name


# --- Removal --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_failed", [True, False])
def test_container_is_removed_at_the_end(site: Site, *, keep_failed: bool) -> None:
    spec_of(site, replace(WORK, keep_failed=keep_failed))
    assert site.engine.all_containers == {}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "error", [EngineError("x"), KeyboardInterrupt(), ValueError(), StageError("x")], ids=repr
)
def test_container_is_removed_after_an_error(
    site: Site, error: BaseException, *, keep: bool
) -> None:
    fail(site, replace(WORK, keep=keep), error)
    assert site.engine.all_containers == {}


@pytest.mark.parametrize("keep_failed", [True, False])
def test_container_is_removed_if_files_cannot_be_copied(site: Site, *, keep_failed: bool) -> None:
    def fault(_number: int, name: str, _when: str) -> None:
        if name == "copy_in":
            raise EngineError("no space left on device")

    site.engine.fault = fault
    with pytest.raises(EngineError, match="no space left"):
        spec_of(site, replace(WORK, keep_failed=keep_failed))
    assert site.engine.all_containers == {}


def test_lost_engine_does_not_hide_the_error(site: Site) -> None:
    def fault(_number: int, name: str, _when: str) -> None:
        if name == "remove":
            raise EngineError("does not answer")

    site.engine.fault = fault
    settings = site.settings()
    with (
        pytest.raises(EngineError, match="the first"),
        work_container(site.engine, settings, "work:1", WORK),
    ):
        raise EngineError("the first")


def test_kept_container_stays(site: Site) -> None:
    with another_process():
        spec_of(site, replace(WORK, keep=True))
    spec_of(site)
    (container,) = kept_containers(site.engine, site.settings())
    assert is_kept(container)
    assert work_containers(site.engine, site.settings()) == [container]


KEEP_FAILED = replace(WORK, keep_failed=True)


def fail(site: Site, work: Work, error: BaseException) -> None:
    """Raise an error in a work container."""
    with (
        pytest.raises(type(error)),
        work_container(site.engine, site.settings(), "work:1", work),
    ):
        raise error


def test_failed_container_stays_with_keep_failed(site: Site) -> None:
    with another_process():
        fail(site, KEEP_FAILED, StageError("x"))
    spec_of(site)
    (container,) = kept_containers(site.engine, site.settings())
    assert is_kept(container)


@pytest.mark.parametrize(
    "error", [EngineError("x"), KeyboardInterrupt(), StoppedError(), ValueError()], ids=repr
)
def test_keep_failed_applies_only_to_failed_commands(site: Site, error: BaseException) -> None:
    fail(site, KEEP_FAILED, error)
    assert site.engine.all_containers == {}


def test_unstarted_container_is_removed(site: Site) -> None:
    with unstarted_container(site.engine, site.settings(), "work:1") as container:
        assert site.engine.all_containers[container].changes == {}
    assert site.engine.all_containers == {}
    assert "run" not in site.engine.changing_calls()


def test_files_are_copied_in_for_another_start(site: Site) -> None:
    spec_of(site, replace(WORK, keep=True))
    (container,) = kept_containers(site.engine, site.settings())
    list(site.engine.run(container.id))
    assert site.engine.all_containers[container.id].read(ENTRY_POINT) is None
    fill(site.engine, site.settings(), container.id, WORK)
    assert site.engine.all_containers[container.id].read(ENTRY_POINT)


def leave_container(site: Site) -> str:
    """Kill a process that has a work container, and return the container."""
    context = work_container(site.engine, site.settings(), "work:1", WORK)
    with another_process():
        container = context.__enter__()
        site.engine.fault = _kill
        with pytest.raises(Killed):
            context.__exit__(Killed, Killed(), None)
    site.engine.fault = lambda *_: None
    assert container in site.engine.all_containers
    return container


def _kill(*_: object) -> None:
    raise Killed


def test_container_of_a_killed_run_is_removed_by_the_next_run(site: Site) -> None:
    container = leave_container(site)
    spec_of(site)
    assert container not in site.engine.all_containers


def test_container_of_a_running_process_is_not_removed(site: Site) -> None:
    with work_container(site.engine, site.settings(), "work:1", WORK) as container:
        spec_of(site)
        assert container in site.engine.all_containers


def test_container_of_another_machine_or_project_is_not_removed(site: Site) -> None:
    container = leave_container(site)
    site.env["IMAGE"] = "registry.test/other:1"
    sweep(site.engine, site.settings())
    assert container in site.engine.all_containers
    site.env["IMAGE"] = IMAGE
    box = site.engine.all_containers[container]
    *words, host, pid, started = box.spec.name.split("-")
    other_name = "-".join([*words, host[::-1], pid, started])
    box.spec = replace(box.spec, name=other_name)
    sweep(site.engine, site.settings())
    assert container in site.engine.all_containers


def test_container_with_another_name_is_not_removed(site: Site) -> None:
    """For example a container that a user created with the project's label."""
    for name in ("mine", "a-b", "guix-tasks-demo-0123456789ab"):
        site.engine.create(ContainerSpec(name, "work:1", ("x",), {PROJECT_LABEL: IMAGE}))
    sweep(site.engine, site.settings())
    assert len(site.engine.all_containers) == 3


def test_container_of_a_stage_image_is_not_a_work_container(site: Site) -> None:
    site.make(*STAGES)
    site.engine.create(ContainerSpec("mine", IMAGE, ("x",)))
    assert work_containers(site.engine, site.settings()) == []


def test_container_is_not_removed_without_proc(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc a process cannot be distinguished from a later one with the same number."""
    real = Path.read_text

    def read_text(self: Path, *arguments: Any, **options: Any) -> str:
        if str(self).startswith("/proc/"):
            raise FileNotFoundError
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    container = leave_container(site)
    sweep(site.engine, site.settings())
    assert container in site.engine.all_containers


def test_files_of_the_project_are_readable_by_every_user() -> None:
    with tarfile.open(fileobj=io.BytesIO(archive({"project/a": b"", "project/b": b"#!"}))) as tar:
        modes = {Path(member.name).name: member.mode for member in tar if member.isfile()}
    assert modes == {"a": 0o644, "b": 0o755}
