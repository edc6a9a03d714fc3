"""Channels that are private, mirrored or behind a proxy, and none of it in what comes out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from forge import Forge, serving
from harness import LOCK, builder_environment, one_error
from planted import PLANTED
from test_leaks import search_layers, watch_command_lines

from guix_tasks.bootstrap.base_image import BASE_TAG
from guix_tasks.buildkit.bakefile import (
    ASKED_TARGET,
    RESOLVE,
    WORK,
    Definition,
    bake_file,
    dockerfile,
    resolve_script,
)
from guix_tasks.buildkit.context import write_environment, write_secrets, write_step
from guix_tasks.cli.session import local_buildx
from guix_tasks.engine.api import BuildSpec
from guix_tasks.oci.platform import Platform
from guix_tasks.settings import load_settings
from guix_tasks.stages.channel_access import programs
from guix_tasks.stages.container import RESOURCES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Docker, Project

    from guix_tasks.engine.docker import DockerEngine

pytestmark = [pytest.mark.engine]


@pytest.fixture(scope="module")
def forge(
    docker: Docker, offline: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Forge]:
    with serving(docker, offline, tmp_path_factory.mktemp("forge")) as servers:
        yield servers


def channels_at(project: Project, offline: Path, url: str) -> None:
    """The channels of the offline example, at another address."""
    text = (offline / "channels.scm").read_text()
    (project.directory / "channels.scm").write_text(
        text.replace("file:///offline", f"{url}/offline")
    )
    project.set(GUIX_CHANNELS="channels.scm", NETWORK="host", GUIX_PACKAGES="")


def look_at_all(project: Project) -> None:
    """Look for planted secrets in all layers, and in the volume of the channels' checkouts."""
    search_layers(project.docker, project.tag("pull"))
    look_at_volume(project)


def look_at_volume(project: Project) -> None:
    (volume, *_) = [name for name in project.volumes() if "substitutes" not in name]
    listing = project.docker.run(
        BASE_TAG, "tar", "-c", "-C", "/cache", ".", options=(f"--volume={volume}:/cache:ro",)
    )
    assert "FETCH_HEAD" in listing.stdout
    PLANTED.look("a volume", listing.stdout)


def test_a_token_and_an_authority_of_ones_own(
    new_project: NewProject, forge: Forge, offline: Path
) -> None:
    project, forge.token = new_project(), PLANTED.plant()
    channels_at(project, offline, forge.https)
    project.ok("base")
    with project.unharmed():
        refused = project.inv("pull")
        assert "set EXTRA_CA_FILE to the certificate of its authority" in one_error(refused, 4)
    project.set(EXTRA_CA_FILE=forge.file("ca.pem"))
    with project.unharmed():
        refused = project.inv("pull")
        assert "check that GUIX_CHANNEL_CREDENTIALS contains an " in one_error(refused, 4)
        other = {"GUIX_CHANNEL_CREDENTIALS": f"{forge.https}".replace("//", "//me:no@")}
        refused = project.inv("pull", env=other)
        assert "check that GUIX_CHANNEL_CREDENTIALS contains an " in one_error(refused, 4)
    forge.shown.clear()
    project.set(GUIX_CHANNEL_CREDENTIALS_FILE="token")
    (project.directory / "token").write_text(
        f"https://other:x@elsewhere.test\nhttps://me:{forge.token}@localhost:{forge.https_port}\n"
    )
    # A proxy that nobody answers at is left alone for what it is not for.
    nobody = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with watch_command_lines():
        made = project.inv("pull", env={**nobody, "no_proxy": "localhost"})
    assert made.returncode == 0, made.stderr
    assert forge.shown == {"", f"me:{forge.token}"}
    assert f'"{forge.https}/offline/channels/guix"' in (project.directory / LOCK).read_text()
    look_at_all(project)
    said = project.ok("doctor").stdout
    assert f"channel guix: {forge.https}/offline/channels/guix answers" in said
    certificates = project.docker.run(
        project.tag("pull"), "sh", "-c", "env; ls /var/guix /root/.ssh /root/.gitconfig",
        options=("--entrypoint=",),
    )  # fmt: skip
    assert "SSL_CERT" not in certificates.stdout
    assert "guix-tasks" not in certificates.stdout


def test_an_ssh_agent(new_project: NewProject, forge: Forge, offline: Path) -> None:
    project = new_project()
    channels_at(project, offline, forge.ssh)
    project.ok("base")
    with project.unharmed():
        assert "SSH_KNOWN_HOSTS: " in one_error(project.inv("pull"), 2)
        (project.directory / "nobody").write_text("")
        project.set(SSH_KNOWN_HOSTS=forge.file("known_hosts"))
        assert "SSH_AUTH_SOCK is not the socket of an SSH agent" in one_error(
            project.inv("pull"), 2
        )
        empty = project.inv("pull", env={"SSH_AUTH_SOCK": forge.file("empty")})
        assert "accepts no key of your SSH agent" in one_error(empty, 4)
        agent = {"SSH_AUTH_SOCK": forge.file("agent")}
        stranger = project.inv("pull", env={**agent, "SSH_KNOWN_HOSTS": "nobody"})
        assert "SSH_KNOWN_HOSTS" in one_error(stranger, 4)
    made = project.inv("pull", env=agent)
    assert made.returncode == 0, made.stderr
    assert f'"{forge.ssh}/offline/channels/guix"' in (project.directory / LOCK).read_text()
    for line in (forge.directory / "user").read_text().splitlines()[3:4]:
        PLANTED.know(line)
    look_at_all(project)
    shown = project.docker.run(
        project.tag("pull"), "sh", "-c", "env; ls -A /root /dev/shm", options=("--entrypoint=",)
    )
    assert "SSH" not in shown.stdout
    assert ".ssh" not in shown.stdout
    assert "agent" not in shown.stdout


def test_a_proxy(new_project: NewProject, forge: Forge, offline: Path) -> None:
    """All goes through it: none of the hosts is known by anybody else."""
    project, forge.token = new_project(), ""
    channels_at(project, offline, "https://forge.test")
    project.dockerfile(
        f"FROM {BASE_TAG}\n"
        "RUN /usr/lib/apt/apt-helper download-file http://files.test/nix-cache-info /fetched\n"
    )
    project.set(EXTRA_CA_FILE=forge.file("ca.pem"), GUIX_SUBSTITUTE_URLS="http://substitutes.test")
    assert "download-file" in one_error(project.inv("base"), 6)
    proxy = f"http://me:{PLANTED.plant()}@127.0.0.1:{forge.proxy_port}"
    environment = {"HTTP_PROXY": proxy, "https_proxy": proxy}
    made = project.inv("base", env=environment)
    assert made.returncode == 0, made.stderr
    assert "GET http://files.test/nix-cache-info" in forge.asked
    made = project.inv("pull", env=environment)
    assert made.returncode == 0, made.stderr
    assert "CONNECT forge.test:443" in forge.asked
    assert any(line.startswith("GET http://substitutes.test/nar/") for line in forge.asked)
    assert "pull: up to date" in project.ok("pull").stderr
    PLANTED.look("the configuration", json.dumps(project.docker.config(project.tag("pull"))))
    look_at_volume(project)


def test_a_mirror(new_project: NewProject, offline: Path) -> None:
    project = new_project()
    channels_at(project, offline, "https://official.test")
    # What the docker command line gives to each container is not to be in an image either.
    config = project.directory / "home" / ".docker" / "config.json"
    proxies = {"default": {"ftpProxy": f"http://me:{PLANTED.plant()}@127.0.0.1:9"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), "proxies": proxies}))
    project.ok("base")
    project.set(NETWORK="none")
    guix = "https://official.test/offline/channels/guix"
    offers = "https://official.test/offline/channels/offline"
    with project.unharmed():
        swapped = f"{guix}=file:///offline/channels/offline {offers}=file:///offline/channels/guix"
        assert one_error(project.inv("pull", env={"GUIX_CHANNEL_MIRRORS": swapped}), 4)
    project.docker.ok("volume", "rm", *project.volumes())
    project.set(GUIX_CHANNEL_MIRRORS="https://official.test/offline/=file:///offline/")
    project.ok("pull")
    assert f'"{guix}"' in (project.directory / LOCK).read_text()
    made = project.docker.config(project.tag("pull"))
    assert not [each for each in made["Env"] if "proxy" in each.lower()]
    said = project.ok("doctor").stdout
    assert "channel guix: /offline/channels/guix is " in said


@pytest.mark.parametrize("way", ["https", "ssh"])
def test_a_step_of_a_build(
    new_project: NewProject, forge: Forge, offline: Path, engine: DockerEngine, way: str
) -> None:
    """The one that asks where channels are builds nothing, and so needs no insecure builder."""
    project, forge.token = new_project(), PLANTED.plant()
    channels_at(project, offline, getattr(forge, way))
    credentials = forge.https.replace("//", f"//me:{forge.token}@")
    project.set(
        SSH_KNOWN_HOSTS=forge.file("known_hosts"),
        EXTRA_CA_FILE=forge.file("ca.pem"),
        GUIX_CHANNEL_CREDENTIALS=credentials,
        CACHE_VOLUME="",
    )
    text = (project.directory / "channels.scm").read_text()
    environment = {**project.environment, "ENV_FILE": str(project.directory / "project.env")}
    settings = load_settings(project.directory, project.directory, environment)
    directory = project.directory / "build"
    for each in ("empty", WORK, "base"):
        (directory / each).mkdir(parents=True)
    (directory / "base" / "Dockerfile").write_text(f"FROM {BASE_TAG}\n")
    write_environment(settings, directory)
    resolve = (RESOURCES / "resolve.scm").read_bytes()
    files = {"stage": resolve_script("channels.scm"), "resolve.scm": resolve}
    files |= {**programs(), "channels.scm": text.encode()}
    write_step(settings, directory, RESOLVE, files, force=True)
    own = Platform.parse(engine.info().platform)
    definition = Definition(
        base=BuildSpec(directory / "base", directory / "base" / "Dockerfile", network="host"),
        platforms=[own],
        resolve=True,
        network="host",
        directory=directory,
        contexts={WORK: directory / WORK},
        secrets=write_secrets(settings, directory, text),
        ssh_agent=Path(forge.file("agent")) if way == "ssh" else None,
    )
    insecure = dockerfile(definition)
    assert "--security=insecure" in insecure
    assert forge.token not in insecure + bake_file(definition)
    (directory / "Dockerfile").write_text(insecure.replace("--security=insecure ", ""))
    (directory / "bake.json").write_text(bake_file(definition))
    program = local_buildx({**os.environ, **builder_environment("buildx")}, engine.address)
    assert program
    log: list[bytes] = []
    program.stream(
        "bake", "--builder=default", f"--file={directory / 'bake.json'}",
        "--allow=security.insecure",
        "--allow=network.host", "--allow=fs=*", "--allow=ssh", "--progress=plain", ASKED_TARGET,
        output=log.append,
    )  # fmt: skip
    PLANTED.look_at_output("a build", b"".join(log))
    resolved = (directory / "reports" / f"{RESOLVE}d").read_text()
    assert f'"{getattr(forge, way)}/offline/channels/guix"' in resolved
