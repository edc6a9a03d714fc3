"""A commit keeps the configuration of the image that a stage began from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from guix_tasks.cli.session import helpers
from guix_tasks.engine.docker import DockerEngine
from guix_tasks.settings import load_isolated
from guix_tasks.stages.base import base_spec
from guix_tasks.stages.container import network
from guix_tasks.stages.images import CHANNELS_LABEL
from guix_tasks.stages.make import run_stage
from guix_tasks.stages.project import Project as EngineProject
from guix_tasks.stages.stage import Stage
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Project, Workshop

pytestmark = pytest.mark.engine

START = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n"
DOCKERFILES = {
    "everything": """
        ENTRYPOINT ["/usr/bin/env", "-i", "a b"]
        CMD ["printf", "<%s>", "it's", ""]
        ENV NAME="a value" PATH=/usr/bin:/bin:/usr/sbin EMPTY=
        WORKDIR /over/here
        USER 1000:1000
        EXPOSE 80 53/udp
        VOLUME ["/data", "/more data"]
        LABEL org.example.name="a label" org.example.empty=""
        HEALTHCHECK --interval=7s --retries=2 CMD ["true"]
        STOPSIGNAL SIGUSR1
        ONBUILD RUN true
        SHELL ["/bin/bash", "-c"]
    """,
    "nothing": "",
    "only-entrypoint": 'ENTRYPOINT ["/usr/bin/env"]',
    "only-cmd": 'CMD ["true"]',
    "shell-form": "ENTRYPOINT exec env\nCMD true",
}
# Where also one that is not root may.
TOUCH = ("touch", "/var/guix/touched")
CUSTOM = Stage("pull", [TOUCH], ("echo", "x"), lambda said: {CHANNELS_LABEL: said})


@dataclass(frozen=True)
class Configs:
    """The configuration of an image, and of those that were committed from it."""

    before: dict[str, Any]
    stage: dict[str, Any]
    by_hand: dict[str, Any]


@pytest.fixture(scope="module", params=DOCKERFILES)
def configs(
    request: pytest.FixtureRequest,
    workshop: Workshop,
    engine: DockerEngine,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Configs]:
    project = workshop.project(tmp_path_factory.mktemp("config") / "project")
    lines = DOCKERFILES[request.param].splitlines()
    project.dockerfile(START + "".join(f"{line.strip()}\n" for line in lines))
    try:
        with pytest.MonkeyPatch.context() as patch:
            # The builder is to be the one that the command line finds.
            patch.setenv("HOME", project.environment["HOME"])
            patch.setenv("XDG_DATA_HOME", project.environment["XDG_DATA_HOME"])
            made = make(project, DockerEngine(engine.address, helpers(project.environment)))
        yield made
    finally:
        project.remove()


def make(project: Project, engine: DockerEngine) -> Configs:
    settings = load_isolated(project.directory / "project.env")
    opened = EngineProject(settings, engine, Console())
    built = engine.build(base_spec(settings, network(engine, settings)), Console().stream)
    project.seen.add(built)
    before = project.docker.config(built)
    project.ok("base")
    base = opened.ledger.find("base")
    assert base
    run_stage(opened, CUSTOM, base)
    project.ok("run", "--stage=base", "--keep", "--", *TOUCH)
    project.ok("commit")
    return Configs(before, *map(project.docker.config, (project.tag("pull"), project.image)))


@pytest.mark.both_stores
def test_the_stage_is_committed(configs: Configs) -> None:
    assert configs.stage["Labels"][CHANNELS_LABEL] == "x"


@pytest.mark.both_stores
@pytest.mark.parametrize("committed", ["stage", "by_hand"])
@pytest.mark.parametrize(
    "key",
    [
        "Entrypoint",
        "Cmd",
        "Env",
        "WorkingDir",
        "User",
        "ExposedPorts",
        "Volumes",
        "Labels",
        "Healthcheck",
        "StopSignal",
        "OnBuild",
        "Shell",
    ],
)
def test_a_part_of_the_configuration_is_kept(configs: Configs, committed: str, key: str) -> None:
    assert plain(getattr(configs, committed)).get(key) == plain(configs.before).get(key)


@pytest.mark.both_stores
@pytest.mark.parametrize("committed", ["stage", "by_hand"])
def test_nothing_else_comes_in(configs: Configs, committed: str) -> None:
    assert plain(getattr(configs, committed)) == plain(configs.before)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without labels that we set, and without what says nothing."""
    ours = ("org.guix-tasks.", "org.opencontainers.image.")
    labels = config.get("Labels") or {}
    others = {name: text for name, text in labels.items() if not name.startswith(ours)}
    # An image that names no user is root's; see stage.commit_image.
    user = "" if config.get("User") == "root" else config.get("User")
    plainer = {**config, "Labels": others, "User": user}
    return {key: value for key, value in plainer.items() if value}


@pytest.mark.both_stores
@pytest.mark.parametrize("sandbox", ["capabilities", "privileged"])
def test_mount_points_are_in_no_image(
    new_project: NewProject, workshop: Workshop, engine: DockerEngine, sandbox: str
) -> None:
    """Those of files and of directories, with the directories above; and no file of a mount."""
    project = new_project("base", GUIX_SANDBOX=sandbox)
    inner = project.directory / "outer" / "inner"
    inner.mkdir(parents=True)
    project.set(
        MOUNTS=f"{workshop.offline}:/offline:ro project.env:/etc/secret.conf:ro outer:/srv/a/b "
        "outer:/srv/a/b/inner context:/etc/skel"
    )
    project.dockerfile("FROM scratch\n")
    opened = EngineProject(load_isolated(project.directory / "project.env"), engine, Console())
    base = opened.ledger.find("base")
    assert base
    stage = replace(CUSTOM, commands=[("touch", "/opt/made")], as_root=True)
    run_stage(opened, stage, base)
    cold = replace(opened, settings=replace(opened.settings, cache_volume=None))
    project.ok("run", "--stage=base", "--keep", "--", "touch", "/opt/made")
    project.ok("commit")
    images = [project.tag("pull"), project.image]
    run_stage(cold, stage, base, force=True)
    for image in [*images, project.tag("pull")]:
        argv = ("run", "--rm", "--network=none", "--entrypoint=", image, "sh", "-c")
        paths = "/opt/made /offline /etc/secret.conf /srv/a /etc/skel"
        listing = project.docker.ok(*argv, f"ls -d {paths} 2>/dev/null || true")
        assert listing.split() == ["/etc/skel", "/opt/made"]
    assert inner.is_dir()
