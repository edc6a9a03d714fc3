"""The private engine on a real machine, in a separate network and mount namespace."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import expect_error, find_processes, wait_until

from guix_tasks.bootstrap.engine import answers
from guix_tasks.cli.session import helpers
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.engine.discovery import Address
from guix_tasks.engine.docker import DockerEngine

if TYPE_CHECKING:
    from isolated_host import IsolatedHost

    from guix_tasks.bootstrap.engine import PrivateEngine

pytestmark = pytest.mark.engine

SLEEP = "98765"


def sleepers() -> list[int]:
    """Return the processes of the container of these tests."""
    return find_processes("sleep", SLEEP)


def is_deserted(host: IsolatedHost) -> bool:
    """Whether only the files of the engine remain."""
    return host.is_clean() and not sleepers()


def start_container(engine: PrivateEngine) -> None:
    """Start a container that runs the programs of this machine."""
    client = DockerEngine(Address(engine.url, "test"), helpers({}))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("empty"))
    image = client.import_rootfs(iter([archive.getvalue()]), "island:latest")
    directories = [path for path in ("/usr", "/bin", "/lib", "/lib64") if Path(path).exists()]
    container = client.create(
        ContainerSpec(
            name="island",
            image=image,
            command=("sleep", SLEEP),
            network="none",
            binds=tuple(f"{path}:{path}:ro" for path in directories),
        )
    )
    client.start(container)
    wait_until(lambda: sleepers() != [], "the container runs")


def test_engine_is_started_and_stopped(host: IsolatedHost) -> None:
    assert "`inv engine.up`" in expect_error(host.inv("status"), 3)
    assert f"started the private engine: {host.engine.url}" in host.ok("engine.up")
    assert f"at {host.engine.url} (private engine)" in host.ok("status")
    assert "already running" in host.ok("engine.up")
    start_container(host.engine)
    assert "stopped the private engine" in host.ok("engine.down")
    assert is_deserted(host)
    assert "no private engine is running" in host.ok("engine.down")
    assert "`inv engine.up`" in expect_error(host.inv("status"), 3)


def test_engine_is_restarted_after_a_crash(host: IsolatedHost) -> None:
    host.ok("engine.up")
    start_container(host.engine)
    host.kill_engine()
    assert "`inv engine.up`" in expect_error(host.inv("status"), 3)
    assert "started the private engine" in host.ok("engine.up")
    assert answers(host.engine.socket)
    assert sleepers() == []
    client = DockerEngine(Address(host.engine.url, "test"), helpers({}))
    assert client.image("island:latest")
    assert not any(container.running for container in client.containers({}))
    host.ok("engine.down")
    assert is_deserted(host)


def test_engine_is_removed_after_a_crash(host: IsolatedHost) -> None:
    host.ok("engine.up")
    start_container(host.engine)
    host.kill_engine()
    assert "removed processes and mounts of a killed private engine" in host.ok("engine.down")
    assert is_deserted(host)


def test_engine_does_not_start_in_the_network_of_another(host: IsolatedHost) -> None:
    host.ok("engine.up")
    elsewhere = host.directory / "elsewhere"
    elsewhere.mkdir()
    error = expect_error(host.inv("engine.up", XDG_DATA_HOME=str(elsewhere)), 3)
    assert f"the network of another Docker Engine (process {host.engine._daemon.pid()})" in error
    assert "DOCKER_HOST" in error
    assert answers(host.engine.socket)


def test_dry_run_starts_no_engine(host: IsolatedHost) -> None:
    host.ok("--dry", "engine.up")
    assert not host.engine.running()
