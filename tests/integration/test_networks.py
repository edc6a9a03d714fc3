"""Private channels, mirrors and proxies, and no trace of them in images, volumes or output."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from git_servers import GitServers, run_git_servers
from harness import LOCK, builder_environment, expect_error
from planted_secrets import PLANTED_SECRETS
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
def servers(
    docker: Docker, offline: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GitServers]:
    with run_git_servers(docker, offline, tmp_path_factory.mktemp("git")) as git_servers:
        yield git_servers


def set_channels(project: Project, offline: Path, url: str) -> None:
    """Use the channels of the offline example at another address."""
    text = (offline / "channels.scm").read_text()
    (project.directory / "channels.scm").write_text(
        text.replace("file:///offline", f"{url}/offline")
    )
    project.set(GUIX_CHANNELS="channels.scm", NETWORK="host", GUIX_PACKAGES="")


def check_layers_and_volume(project: Project) -> None:
    """Search all layers, and the volume of the channels' checkouts, for planted secrets."""
    search_layers(project.docker, project.tag("pull"))
    check_volume(project)


def check_volume(project: Project) -> None:
    (volume, *_) = [name for name in project.volumes() if "substitutes" not in name]
    listing = project.docker.run(
        BASE_TAG, "tar", "-c", "-C", "/cache", ".", options=(f"--volume={volume}:/cache:ro",)
    )
    assert "FETCH_HEAD" in listing.stdout
    PLANTED_SECRETS.check("a volume", listing.stdout)


def test_pull_from_https_needs_the_certificate_authority_and_the_token(
    new_project: NewProject, servers: GitServers, offline: Path
) -> None:
    project, servers.token = new_project(), PLANTED_SECRETS.plant()
    set_channels(project, offline, servers.https)
    project.ok("base")
    with project.assert_unchanged():
        error = expect_error(project.inv("pull"), 4)
        assert "set EXTRA_CA_FILE to the certificate of its authority" in error
    project.set(EXTRA_CA_FILE=servers.file("ca.pem"))
    wrong = {"GUIX_CHANNEL_CREDENTIALS": servers.https.replace("//", "//me:no@")}
    for credentials in ({}, wrong):
        with project.assert_unchanged():
            error = expect_error(project.inv("pull", env=credentials), 4)
        assert "check that GUIX_CHANNEL_CREDENTIALS contains an " in error
    servers.accounts.clear()
    project.set(GUIX_CHANNEL_CREDENTIALS_FILE="token")
    (project.directory / "token").write_text(
        f"https://other:x@elsewhere.test\n"
        f"https://me:{servers.token}@localhost:{servers.https_port}\n"
    )
    # This proxy does not answer, so the test fails if it is used for localhost.
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with watch_command_lines():
        result = project.inv("pull", env={**proxy, "no_proxy": "localhost"})
    assert result.returncode == 0, result.stderr
    assert servers.accounts == {"", f"me:{servers.token}"}
    assert f'"{servers.https}/offline/channels/guix"' in (project.directory / LOCK).read_text()
    check_layers_and_volume(project)
    findings = project.ok("doctor").stdout
    assert f"channel guix: {servers.https}/offline/channels/guix answers" in findings
    image = project.docker.run(
        project.tag("pull"), "sh", "-c", "env; ls /var/guix /root/.ssh /root/.gitconfig",
        options=("--entrypoint=",),
    )  # fmt: skip
    assert "SSL_CERT" not in image.stdout
    assert "guix-tasks" not in image.stdout


def test_pull_over_ssh_needs_known_hosts_and_an_agent_with_the_key(
    new_project: NewProject, servers: GitServers, offline: Path
) -> None:
    project = new_project()
    set_channels(project, offline, servers.ssh)
    project.ok("base")
    with project.assert_unchanged():
        assert "SSH_KNOWN_HOSTS: " in expect_error(project.inv("pull"), 2)
        (project.directory / "empty").write_text("")
        project.set(SSH_KNOWN_HOSTS=servers.file("known_hosts"))
        error = expect_error(project.inv("pull"), 2)
        assert "SSH_AUTH_SOCK is not the socket of an SSH agent" in error
        without_key = project.inv("pull", env={"SSH_AUTH_SOCK": servers.file("empty")})
        assert "accepts no key of your SSH agent" in expect_error(without_key, 4)
        agent = {"SSH_AUTH_SOCK": servers.file("agent")}
        unknown_host = project.inv("pull", env={**agent, "SSH_KNOWN_HOSTS": "empty"})
        assert "SSH_KNOWN_HOSTS" in expect_error(unknown_host, 4)
    result = project.inv("pull", env=agent)
    assert result.returncode == 0, result.stderr
    assert f'"{servers.ssh}/offline/channels/guix"' in (project.directory / LOCK).read_text()
    for line in (servers.directory / "user").read_text().splitlines()[3:4]:
        PLANTED_SECRETS.add(line)
    check_layers_and_volume(project)
    image = project.docker.run(
        project.tag("pull"), "sh", "-c", "env; ls -A /root /dev/shm", options=("--entrypoint=",)
    )
    assert "SSH" not in image.stdout
    assert ".ssh" not in image.stdout
    assert "agent" not in image.stdout


def test_all_requests_use_the_proxy(
    new_project: NewProject, servers: GitServers, offline: Path
) -> None:
    """Only the proxy can resolve the names of the hosts."""
    project, servers.token = new_project(), ""
    set_channels(project, offline, "https://forge.test")
    project.write_dockerfile(
        f"FROM {BASE_TAG}\n"
        "RUN /usr/lib/apt/apt-helper download-file http://files.test/nix-cache-info /fetched\n"
    )
    project.set(
        EXTRA_CA_FILE=servers.file("ca.pem"), GUIX_SUBSTITUTE_URLS="http://substitutes.test"
    )
    assert "download-file" in expect_error(project.inv("base"), 6)
    proxy = f"http://me:{PLANTED_SECRETS.plant()}@127.0.0.1:{servers.proxy_port}"
    for stage in ("base", "pull"):
        result = project.inv(stage, env={"HTTP_PROXY": proxy, "https_proxy": proxy})
        assert result.returncode == 0, result.stderr
    requests = servers.proxy_requests
    assert "GET http://files.test/nix-cache-info" in requests
    assert "CONNECT forge.test:443" in requests
    assert any(line.startswith("GET http://substitutes.test/nar/") for line in requests)
    assert "pull: up to date" in project.ok("pull").stderr
    PLANTED_SECRETS.check(
        "the configuration", json.dumps(project.docker.config(project.tag("pull")))
    )
    check_volume(project)


def test_pull_from_a_mirror_locks_the_original_url(new_project: NewProject, offline: Path) -> None:
    project = new_project()
    set_channels(project, offline, "https://official.test")
    # The docker command line sets these proxies in each container.
    config = project.directory / "home" / ".docker" / "config.json"
    proxies = {"default": {"ftpProxy": f"http://me:{PLANTED_SECRETS.plant()}@127.0.0.1:9"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), "proxies": proxies}))
    project.ok("base")
    project.set(NETWORK="none")
    guix = "https://official.test/offline/channels/guix"
    other = "https://official.test/offline/channels/offline"
    with project.assert_unchanged():
        swapped = f"{guix}=file:///offline/channels/offline {other}=file:///offline/channels/guix"
        assert expect_error(project.inv("pull", env={"GUIX_CHANNEL_MIRRORS": swapped}), 4)
    project.docker.ok("volume", "rm", *project.volumes())
    project.set(GUIX_CHANNEL_MIRRORS="https://official.test/offline/=file:///offline/")
    project.ok("pull")
    assert f'"{guix}"' in (project.directory / LOCK).read_text()
    environment = project.docker.config(project.tag("pull"))["Env"]
    assert not [variable for variable in environment if "proxy" in variable.lower()]
    assert "channel guix: /offline/channels/guix is " in project.ok("doctor").stdout


@pytest.mark.parametrize("protocol", ["https", "ssh"])
def test_step_of_a_build_resolves_private_channels(
    new_project: NewProject, servers: GitServers, offline: Path, engine: DockerEngine, protocol: str
) -> None:
    """This step builds nothing, so it runs without an insecure builder."""
    project, servers.token = new_project(), PLANTED_SECRETS.plant()
    set_channels(project, offline, getattr(servers, protocol))
    credentials = servers.https.replace("//", f"//me:{servers.token}@")
    project.set(
        SSH_KNOWN_HOSTS=servers.file("known_hosts"),
        EXTRA_CA_FILE=servers.file("ca.pem"),
        GUIX_CHANNEL_CREDENTIALS=credentials,
        CACHE_VOLUME="",
    )
    text = (project.directory / "channels.scm").read_text()
    environment = {**project.environment, "ENV_FILE": str(project.directory / "project.env")}
    settings = load_settings(project.directory, project.directory, environment)
    directory = project.directory / "build"
    for name in ("empty", WORK, "base"):
        (directory / name).mkdir(parents=True)
    (directory / "base" / "Dockerfile").write_text(f"FROM {BASE_TAG}\n")
    write_environment(settings, directory)
    resolve = (RESOURCES / "resolve.scm").read_bytes()
    files = {"stage": resolve_script("channels.scm"), "resolve.scm": resolve}
    files |= {**programs(), "channels.scm": text.encode()}
    write_step(settings, directory, RESOLVE, files, force=True)
    definition = Definition(
        base=BuildSpec(directory / "base", directory / "base" / "Dockerfile", network="host"),
        platforms=[Platform.parse(engine.info().platform)],
        resolve=True,
        network="host",
        directory=directory,
        contexts={WORK: directory / WORK},
        secrets=write_secrets(settings, directory, text),
        ssh_agent=Path(servers.file("agent")) if protocol == "ssh" else None,
    )
    insecure = dockerfile(definition)
    assert "--security=insecure" in insecure
    assert servers.token not in insecure + bake_file(definition)
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
    PLANTED_SECRETS.check_output("a build", b"".join(log))
    resolved = (directory / "reports" / f"{RESOLVE}d").read_text()
    assert f'"{getattr(servers, protocol)}/offline/channels/guix"' in resolved
