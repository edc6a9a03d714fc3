from __future__ import annotations

import io
import json
import socket
from typing import TYPE_CHECKING

import pytest

from guix_tasks import paths
from guix_tasks.console import Console
from guix_tasks.errors import RegistryError
from guix_tasks.local import registry
from guix_tasks.local.debian import Apt
from guix_tasks.local.registry import PORT, LocalRegistry, answers, local_registry

if TYPE_CHECKING:
    from pathlib import Path


def silent() -> Console:
    return Console(out=io.StringIO(), err=io.StringIO())


def test_it_is_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    local = local_registry()
    assert local.folder == paths.data_home() / "registry"
    assert (local.port, local.url) == (PORT, "http://127.0.0.1:5055")
    assert not local.running()
    assert not local.installed()


def test_it_listens_on_loopback_and_keeps_to_its_folder(tmp_path: Path) -> None:
    configuration = LocalRegistry(tmp_path, 5056)._configure()
    assert configuration["http"] == {"addr": "127.0.0.1:5056"}
    assert f'"{tmp_path}/data"' in json.dumps(configuration["storage"])


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RegistryError, match=rf"port {port} .*--port N .*localhost:N/"):
            LocalRegistry(tmp_path, port).up(silent())


def test_not_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "host_suite", lambda: None)
    with pytest.raises(RegistryError, match="not Debian: set IMAGE"):
        LocalRegistry(tmp_path)._unpack(silent())


def test_another_suite_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def unpacked(self: Apt, packages: list[str], root: Path) -> None:
        tried.extend(self.suites)
        assert packages == ["docker-registry"]
        if self.suites == ["bookworm"]:
            raise RegistryError("not there")
        root.mkdir()

    monkeypatch.setattr(registry, "host_suite", lambda: "bookworm")
    monkeypatch.setattr(Apt, "unpacked", unpacked)
    LocalRegistry(tmp_path)._unpack(silent())
    assert tried == ["bookworm", "sid"]


def test_one_that_dies_says_why(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = LocalRegistry(tmp_path, port)
    program = tmp_path / "root/usr/bin/docker-registry"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 'level=fatal msg=\"no room\"'; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(RegistryError, match="did not start: no room; see /"):
        local.up(silent())
    assert not answers(port)
    assert not local.running()


def test_down_where_nothing_runs(tmp_path: Path) -> None:
    console = Console(err=(heard := io.StringIO()))
    LocalRegistry(tmp_path / "none", 5057).down(console)
    assert heard.getvalue() == "no local registry of ours runs on port 5057\n"
