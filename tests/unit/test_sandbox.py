"""``GUIX_SANDBOX``: privileges of each value, and the value that ``auto`` selects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import FakeContainer, FakeGuix, Output, Site, made_site

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
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    site = made_site(tmp_path / "project")
    site.env["GUIX_SANDBOX"] = "auto"
    return site


def kind_of(spec: ContainerSpec) -> str:
    if spec.privileged:
        return "privileged"
    if spec.user == USER:
        return "rootless"
    return "capabilities" if spec.capabilities else "nochroot"


def builds_with(*kinds: str) -> Callable[[FakeContainer], Output]:
    """An engine on which the probe goes well in containers of these kinds only."""
    usual = FakeGuix()

    def behaviour(container: FakeContainer) -> Output:
        if "-probe-" in container.spec.name:
            if kind_of(container.spec) not in kinds:
                container.status = 1
                yield True, f"{DENIED}\n".encode()
            return
        yield from usual(container)

    return behaviour


def install(site: Site) -> tuple[list[str], str]:
    """Install anew; what containers were made, with the kind of each, and what was said."""
    before = len(site.engine.specs)
    said = site.make("install", force=True)
    made = site.engine.specs[before:]
    return [f"{spec.name.split('-')[2]} {kind_of(spec)}" for spec in made], said


def test_auto_selects_the_fewest_privileges_that_work(made: Site) -> None:
    made.engine.behaviour = builds_with("rootless", "capabilities", "privileged")
    containers, said = install(made)
    assert containers == ["probe rootless", "install rootless"]
    assert "sandbox: rootless: Guix can build\n" in said
    assert "install: in a rootless container\n" in said


def test_probe_is_repeated_for_another_dockerfile_on_the_same_base_image(made: Site) -> None:
    """One may make the users that builds run as, and the other not."""
    made.engine.behaviour = builds_with("rootless", "capabilities", "privileged")
    install(made)
    made.write("Dockerfile", "FROM another\n")
    made.engine.behaviour = builds_with("privileged")
    made.make("base")
    made.make("pull", force=True)
    assert install(made)[0] == ["install privileged"]


def test_reason_of_a_failed_probe_is_printed(made: Site) -> None:
    made.engine.behaviour = builds_with("privileged")
    containers, said = install(made)
    probes = ["probe rootless", "probe capabilities", "probe privileged"]
    assert containers == [*probes, "install privileged"]
    why = f"rootless fails ({DENIED}); capabilities fails ({DENIED})"
    assert f"sandbox: privileged, because {why}\n" in said


def test_podman_refuses_rootless(made: Site) -> None:
    """It says of each file in a container that it is the container's user's."""
    made.engine.about = replace(made.engine.about, product="Podman")
    made.engine.behaviour = builds_with("rootless", "capabilities")
    containers, said = install(made)
    assert containers == ["probe capabilities", "install capabilities"]
    assert "Podman does not report the owners of files" in said
    made.env["GUIX_SANDBOX"] = "rootless"
    with pytest.raises(EngineError, match="set GUIX_SANDBOX to auto or capabilities"):
        install(made)


def test_result_of_the_probe_is_cached(made: Site) -> None:
    made.engine.behaviour = builds_with("capabilities")
    install(made)
    containers, said = install(made)
    assert containers == ["install capabilities"]
    assert "sandbox:" not in said


def test_invalid_cache_is_ignored(made: Site) -> None:
    made.engine.behaviour = builds_with("capabilities")
    install(made)
    for kept in (files.cache_home() / "sandbox").iterdir():
        kept.write_text("what no sandbox is called")
    containers, _ = install(made)
    assert containers == ["probe rootless", "probe capabilities", "install capabilities"]


def test_auto_never_selects_nochroot(made: Site) -> None:
    made.engine.behaviour = builds_with("nochroot")
    with pytest.raises(EngineError, match=r"cannot build in a container.*GUIX_SANDBOX=nochroot"):
        install(made)
    assert made.engine.all_containers == {}
    made.env["GUIX_SANDBOX"] = "nochroot"
    assert install(made)[0] == ["install nochroot"]


def test_image_without_guix_is_reported_by_the_stage(made: Site) -> None:
    """No rights would help it, so nothing is remembered."""
    no_guix = b"entry-point: error: this image has no guix-daemon: it was built on a base without"

    def behaviour(container: FakeContainer) -> Output:
        container.status = 69
        yield True, no_guix + b" Guix\n"

    made.engine.behaviour = behaviour
    with pytest.raises(StageError, match="install: the command failed with exit status 69"):
        install(made)
    assert not (files.cache_home() / "sandbox").exists()


def test_key_that_only_an_unprivileged_daemon_cannot_authorise_is_no_fault_of_the_key(
    made: Site,
) -> None:
    usual = FakeGuix()

    def behaviour(container: FakeContainer) -> Output:
        if kind_of(container.spec) != "rootless":
            return usual(container)
        container.status = 69
        return iter([(True, b"entry-point: error: cannot authorise the substitute key 0-a.pub\n")])

    made.engine.behaviour = behaviour
    containers, said = install(made)
    assert containers == ["probe rootless", "probe capabilities", "install capabilities"]
    assert "sandbox: capabilities, because rootless fails (entry-point: error: cannot" in said


def test_refused_value_is_skipped(made: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    create = made.engine.create

    def refusing(spec: ContainerSpec) -> str:
        if spec.capabilities is not None:
            raise EngineError("the engine could not create a container: seccomp is not enabled")
        return create(spec)

    monkeypatch.setattr(made.engine, "create", refusing)
    _, said = install(made)
    assert "sandbox: privileged, because rootless fails (the engine could not" in said


def test_lost_engine_is_reported_unchanged(made: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_spec: ContainerSpec) -> str:
        raise EngineError("the Docker Engine at x does not answer")

    monkeypatch.setattr(made.engine, "create", gone)
    with pytest.raises(EngineError, match=r"^the Docker Engine at x does not answer$"):
        install(made)


def test_stage_that_needs_root_runs_as_root(made: Site) -> None:
    made.engine.behaviour = builds_with("rootless", "capabilities")
    stage = replace(pull_stage(None), as_root=True)
    run_stage(made.project(), stage, made.image("base"), force=True)
    assert kind_of(made.engine.specs[-1]) == "capabilities"


def test_run_and_verify_run_as_root(made: Site) -> None:
    """With no more rights than that takes."""
    made.engine.behaviour = builds_with("rootless", "capabilities")
    run.run(made.project(), ["true"], stage=None, keep=False)
    verify(made.project())
    kinds = {kind_of(spec) for spec in made.engine.specs if "-run-" in spec.name}
    kinds |= {kind_of(spec) for spec in made.engine.specs if "-verify-" in spec.name}
    assert kinds == {"capabilities"}


def test_dry_run_does_not_probe(made: Site) -> None:
    from guix_tasks.engine.dry_run import TracedEngine  # noqa: PLC0415
    from guix_tasks.ui.console import Console  # noqa: PLC0415

    before = len(made.engine.specs)
    dry = TracedEngine(made.engine, Console(), perform=False)
    made.make("install", engine=dry, force=True)
    assert len(made.engine.specs) == before


def test_filter_refuses_system_calls_that_no_build_needs() -> None:
    profile = json.loads(Path(container_module.__file__).with_name("seccomp.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ALLOW"
    (rule,) = profile["syscalls"]
    assert rule["action"] == "SCMP_ACT_ERRNO"
    assert {"init_module", "kexec_load", "bpf", "setns", "open_by_handle_at"} <= {*rule["names"]}
    # What a daemon isolates its builds with, whoever it is.
    needed = {"clone", "mount", "umount2", "pivot_root", "personality", "unshare", "sethostname"}
    assert needed.isdisjoint(rule["names"])
    assert rule["names"] == sorted({*rule["names"]}, key=rule["names"].index)
