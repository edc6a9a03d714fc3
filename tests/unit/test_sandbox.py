"""``GUIX_SANDBOX``: privileges of each value, and the value that ``auto`` selects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import FakeContainer, FakeGuix, Output, Site, new_built_site

from guix_tasks import files
from guix_tasks.commands import run
from guix_tasks.commands.verify import verify
from guix_tasks.errors import EngineError, StageError
from guix_tasks.stages import container as container_module
from guix_tasks.stages.make import run_stage
from guix_tasks.stages.ownership import USER
from guix_tasks.stages.pull import pull_stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from guix_tasks.engine.api import ContainerSpec

DENIED = "guix repl: error: clone: Operation not permitted"


@pytest.fixture
def built_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    site = new_built_site(tmp_path / "project")
    site.env["GUIX_SANDBOX"] = "auto"
    return site


def sandbox_of(spec: ContainerSpec) -> str:
    if spec.privileged:
        return "privileged"
    if spec.user == USER:
        return "rootless"
    return "capabilities" if spec.capabilities else "nochroot"


def builds_with(*sandboxes: str) -> Callable[[FakeContainer], Output]:
    """Return the behaviour of an engine whose probes succeed only in these sandboxes."""
    guix = FakeGuix()

    def behaviour(container: FakeContainer) -> Output:
        if "-probe-" in container.spec.name:
            if sandbox_of(container.spec) not in sandboxes:
                container.status = 1
                yield True, f"{DENIED}\n".encode()
            return
        yield from guix(container)

    return behaviour


def install(site: Site) -> tuple[list[str], str]:
    """Run install again; return each container with its sandbox, and the output."""
    count = len(site.engine.specs)
    output = site.make("install", force=True)
    specs = site.engine.specs[count:]
    return [f"{spec.name.split('-')[2]} {sandbox_of(spec)}" for spec in specs], output


def test_auto_selects_the_fewest_privileges_that_work(built_site: Site) -> None:
    built_site.engine.behaviour = builds_with("rootless", "capabilities", "privileged")
    containers, output = install(built_site)
    assert containers == ["probe rootless", "install rootless"]
    assert "sandbox: rootless: Guix can build\n" in output
    assert "install: in a rootless container\n" in output


def test_probe_is_repeated_for_another_dockerfile_on_the_same_base_image(built_site: Site) -> None:
    """Only one of the Dockerfiles may create the users of builds."""
    built_site.engine.behaviour = builds_with("rootless", "capabilities", "privileged")
    install(built_site)
    built_site.write("Dockerfile", "FROM another\n")
    built_site.engine.behaviour = builds_with("privileged")
    built_site.make("base")
    built_site.make("pull", force=True)
    assert install(built_site)[0] == ["install privileged"]


def test_reason_of_a_failed_probe_is_printed(built_site: Site) -> None:
    built_site.engine.behaviour = builds_with("privileged")
    containers, output = install(built_site)
    probes = ["probe rootless", "probe capabilities", "probe privileged"]
    assert containers == [*probes, "install privileged"]
    reason = f"rootless fails ({DENIED}); capabilities fails ({DENIED})"
    assert f"sandbox: privileged, because {reason}\n" in output


def test_podman_does_not_support_rootless(built_site: Site) -> None:
    """Podman reports the user of a container as the owner of all its files."""
    built_site.engine.details = replace(built_site.engine.details, product="Podman")
    built_site.engine.behaviour = builds_with("rootless", "capabilities")
    containers, output = install(built_site)
    assert containers == ["probe capabilities", "install capabilities"]
    assert "Podman does not report the owners of files" in output
    built_site.env["GUIX_SANDBOX"] = "rootless"
    with pytest.raises(EngineError, match="set GUIX_SANDBOX to auto or capabilities"):
        install(built_site)


def test_result_of_the_probe_is_cached(built_site: Site) -> None:
    built_site.engine.behaviour = builds_with("capabilities")
    install(built_site)
    containers, output = install(built_site)
    assert containers == ["install capabilities"]
    assert "sandbox:" not in output


def test_invalid_cache_is_ignored(built_site: Site) -> None:
    built_site.engine.behaviour = builds_with("capabilities")
    install(built_site)
    for file in (files.cache_home() / "sandbox").iterdir():
        file.write_text("no sandbox")
    containers, _ = install(built_site)
    assert containers == ["probe rootless", "probe capabilities", "install capabilities"]


def test_auto_never_selects_nochroot(built_site: Site) -> None:
    built_site.engine.behaviour = builds_with("nochroot")
    with pytest.raises(EngineError, match=r"cannot build in a container.*GUIX_SANDBOX=nochroot"):
        install(built_site)
    assert built_site.engine.all_containers == {}
    built_site.env["GUIX_SANDBOX"] = "nochroot"
    assert install(built_site)[0] == ["install nochroot"]


def test_image_without_guix_is_reported_by_the_stage(built_site: Site) -> None:
    """More privileges do not help, so no result is cached."""
    no_guix = b"entry-point: error: this image has no guix-daemon: it was built on a base without"

    def behaviour(container: FakeContainer) -> Output:
        container.status = 69
        yield True, no_guix + b" Guix\n"

    built_site.engine.behaviour = behaviour
    with pytest.raises(StageError, match="install: the command failed with exit status 69"):
        install(built_site)
    assert not (files.cache_home() / "sandbox").exists()


def test_sandbox_that_cannot_authorise_a_key_is_skipped(
    built_site: Site,
) -> None:
    guix = FakeGuix()

    def behaviour(container: FakeContainer) -> Output:
        if sandbox_of(container.spec) != "rootless":
            return guix(container)
        container.status = 69
        return iter([(True, b"entry-point: error: cannot authorise the substitute key 0-a.pub\n")])

    built_site.engine.behaviour = behaviour
    containers, output = install(built_site)
    assert containers == ["probe rootless", "probe capabilities", "install capabilities"]
    assert "sandbox: capabilities, because rootless fails (entry-point: error: cannot" in output


def test_sandbox_refused_by_the_engine_is_skipped(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = built_site.engine.create

    def fail_with_capabilities(spec: ContainerSpec) -> str:
        if spec.capabilities is not None:
            raise EngineError("the engine could not create a container: seccomp is not enabled")
        return create(spec)

    monkeypatch.setattr(built_site.engine, "create", fail_with_capabilities)
    _, output = install(built_site)
    assert "sandbox: privileged, because rootless fails (the engine could not" in output


def test_lost_engine_is_reported_unchanged(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_spec: ContainerSpec) -> str:
        raise EngineError("the Docker Engine at x does not answer")

    monkeypatch.setattr(built_site.engine, "create", fail)
    with pytest.raises(EngineError, match=r"^the Docker Engine at x does not answer$"):
        install(built_site)


def test_stage_that_needs_root_runs_as_root(built_site: Site) -> None:
    built_site.engine.behaviour = builds_with("rootless", "capabilities")
    stage = replace(pull_stage(None), as_root=True)
    run_stage(built_site.project(), stage, built_site.image("base"), force=True)
    assert sandbox_of(built_site.engine.specs[-1]) == "capabilities"


def test_run_and_verify_run_as_root(built_site: Site) -> None:
    """They run as root with the fewest privileges."""
    built_site.engine.behaviour = builds_with("rootless", "capabilities")
    run.run(built_site.project(), ["true"], stage=None, keep=False)
    verify(built_site.project())
    sandboxes = {sandbox_of(spec) for spec in built_site.engine.specs if "-run-" in spec.name}
    sandboxes |= {sandbox_of(spec) for spec in built_site.engine.specs if "-verify-" in spec.name}
    assert sandboxes == {"capabilities"}


def test_dry_run_does_not_probe(built_site: Site) -> None:
    from guix_tasks.engine.dry_run import TracedEngine  # noqa: PLC0415
    from guix_tasks.ui.console import Console  # noqa: PLC0415

    count = len(built_site.engine.specs)
    traced = TracedEngine(built_site.engine, Console(), perform=False)
    built_site.make("install", engine=traced, force=True)
    assert len(built_site.engine.specs) == count


def test_filter_denies_unneeded_system_calls() -> None:
    profile = json.loads(Path(container_module.__file__).with_name("seccomp.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ALLOW"
    (rule,) = profile["syscalls"]
    assert rule["action"] == "SCMP_ACT_ERRNO"
    assert {"init_module", "kexec_load", "bpf", "setns", "open_by_handle_at"} <= {*rule["names"]}
    # The daemon isolates builds with these system calls.
    needed = {"clone", "mount", "umount2", "pivot_root", "personality", "unshare", "sethostname"}
    assert needed.isdisjoint(rule["names"])
    assert rule["names"] == sorted({*rule["names"]}, key=rule["names"].index)
