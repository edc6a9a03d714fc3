"""The private engine on a real machine, in a separate network and mount namespace."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import eventually, one_error, running

from guix_tasks.bootstrap.engine import answers
from guix_tasks.cli.session import helpers
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.engine.discovery import Address
from guix_tasks.engine.docker import DockerEngine

if TYPE_CHECKING:
    from island import Island

    from guix_tasks.bootstrap.engine import PrivateEngine

pytestmark = pytest.mark.engine

SLEEP = "98765"


def sleepers() -> list[int]:
    """Return the processes of the container of these tests."""
    return running("sleep", SLEEP)


def is_deserted(island: Island) -> bool:
    """Whether only the files of the engine remain."""
    return island.is_deserted() and not sleepers()


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
    eventually(lambda: sleepers() != [], "the container runs")


def test_engine_is_started_and_stopped(island: Island) -> None:
    assert "`inv engine.up`" in one_error(island.inv("status"), 3)
    assert f"started the private engine: {island.engine.url}" in island.ok("engine.up")
    assert f"at {island.engine.url} (private engine)" in island.ok("status")
    assert "already running" in island.ok("engine.up")
    start_container(island.engine)
    assert "stopped the private engine" in island.ok("engine.down")
    assert is_deserted(island)
    assert "no private engine is running" in island.ok("engine.down")
    assert "`inv engine.up`" in one_error(island.inv("status"), 3)


def test_engine_is_restarted_after_a_crash(island: Island) -> None:
    island.ok("engine.up")
    start_container(island.engine)
    island.kill_engine()
    assert "`inv engine.up`" in one_error(island.inv("status"), 3)
    assert "started the private engine" in island.ok("engine.up")
    assert answers(island.engine.socket)
    assert sleepers() == []
    client = DockerEngine(Address(island.engine.url, "test"), helpers({}))
    assert client.image("island:latest")
    assert not any(container.running for container in client.containers({}))
    island.ok("engine.down")
    assert is_deserted(island)


def test_engine_is_removed_after_a_crash(island: Island) -> None:
    island.ok("engine.up")
    start_container(island.engine)
    island.kill_engine()
    assert "removed processes and mounts of a killed private engine" in island.ok("engine.down")
    assert is_deserted(island)


def test_engine_does_not_start_in_the_network_of_another(island: Island) -> None:
    island.ok("engine.up")
    elsewhere = island.directory / "elsewhere"
    elsewhere.mkdir()
    error = one_error(island.inv("engine.up", XDG_DATA_HOME=str(elsewhere)), 3)
    assert f"the network of another Docker Engine (process {island.engine._daemon.pid()})" in error
    assert "DOCKER_HOST" in error
    assert answers(island.engine.socket)


def test_dry_run_starts_no_engine(island: Island) -> None:
    island.ok("--dry", "engine.up")
    assert not island.engine.running()
