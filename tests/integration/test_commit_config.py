"""A commit keeps the configuration of the image that its container was created from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from guix_tasks.cli.session import helpers
from guix_tasks.engine.docker import DockerEngine
from guix_tasks.settings import load_settings
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
    from harness import Project, ProjectFactory

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
# Other users than root can create this file.
TOUCH = ("touch", "/var/guix/touched")
CUSTOM = Stage("pull", [TOUCH], ("echo", "x"), lambda output: {CHANNELS_LABEL: output})


@dataclass(frozen=True)
class Configs:
    """The configurations of an image and of the images that were committed from it."""

    image: dict[str, Any]
    stage: dict[str, Any]
    by_hand: dict[str, Any]


@pytest.fixture(scope="module", params=DOCKERFILES)
def configs(
    request: pytest.FixtureRequest,
    factory: ProjectFactory,
    engine: DockerEngine,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Configs]:
    project = factory.create(tmp_path_factory.mktemp("config") / "project")
    lines = DOCKERFILES[request.param].splitlines()
    project.write_dockerfile(START + "".join(f"{line.strip()}\n" for line in lines))
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Use the same builder as the command line.
            patch.setenv("HOME", project.environment["HOME"])
            patch.setenv("XDG_DATA_HOME", project.environment["XDG_DATA_HOME"])
            client = DockerEngine(engine.address, helpers(project.environment))
            configs = commit_images(project, client)
        yield configs
    finally:
        project.remove()


def commit_images(project: Project, engine: DockerEngine) -> Configs:
    settings = load_settings(project.directory, project.directory, {"ENV_FILE": "project.env"})
    opened = EngineProject(settings, engine, Console())
    image = engine.build(base_spec(settings, network(engine, settings)), Console().stream)
    project.image_ids.add(image)
    config = project.docker.config(image)
    project.ok("base")
    base = opened.ledger.find("base")
    assert base
    run_stage(opened, CUSTOM, base)
    project.ok("run", "--stage=base", "--keep", "--", *TOUCH)
    project.ok("commit")
    return Configs(config, *map(project.docker.config, (project.tag("pull"), project.image)))


@pytest.mark.both_stores
def test_stage_is_committed(configs: Configs) -> None:
    assert configs.stage["Labels"][CHANNELS_LABEL] == "x"


@pytest.mark.both_stores
@pytest.mark.parametrize("committed", ["stage", "by_hand"])
def test_commit_keeps_the_configuration(configs: Configs, committed: str) -> None:
    assert normalise(getattr(configs, committed)) == normalise(configs.image)


def normalise(config: dict[str, Any]) -> dict[str, Any]:
    """Remove labels of guix-tasks and empty values from a configuration."""
    prefixes = ("org.guix-tasks.", "org.opencontainers.image.")
    labels = config.get("Labels") or {}
    others = {name: text for name, text in labels.items() if not name.startswith(prefixes)}
    # The default user is root; see stage.commit_image.
    user = "" if config.get("User") == "root" else config.get("User")
    changed = {**config, "Labels": others, "User": user}
    return {key: value for key, value in changed.items() if value}


@pytest.mark.both_stores
@pytest.mark.parametrize("sandbox", ["capabilities", "privileged"])
def test_mount_points_are_in_no_image(
    new_project: NewProject, factory: ProjectFactory, engine: DockerEngine, sandbox: str
) -> None:
    """This includes mounted files and the parent directories of mount points."""
    project = new_project("base", GUIX_SANDBOX=sandbox)
    inner = project.directory / "outer" / "inner"
    inner.mkdir(parents=True)
    project.set(
        MOUNTS=f"{factory.offline}:/offline:ro project.env:/etc/secret.conf:ro "
        "outer:/srv/a/b outer:/srv/a/b/inner context:/etc/skel"
    )
    project.write_dockerfile("FROM scratch\n")
    settings = load_settings(project.directory, project.directory, {"ENV_FILE": "project.env"})
    opened = EngineProject(settings, engine, Console())
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
