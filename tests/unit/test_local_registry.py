"""The local registry: its configuration, account, process and container."""

from __future__ import annotations

import io
import json
import socket
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import bcrypt
import pytest
from fake_engine import FakeEngine

from guix_tasks import files
from guix_tasks.bootstrap import apt, registry
from guix_tasks.bootstrap.apt import Apt
from guix_tasks.bootstrap.registry import (
    PORT,
    USER,
    Account,
    ContainerRegistry,
    LocalRegistry,
    accounts,
    answers,
    local_registry,
    registry_for,
)
from guix_tasks.errors import RegistryError
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.engine.api import EngineInfo


def engine_at(url: str, **changes: Any) -> EngineInfo:
    return replace(FakeEngine(url=url).info(), **changes)


def silent() -> Console:
    return Console(out=io.StringIO(), err=io.StringIO())


def test_registry_is_in_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    local = local_registry()
    assert local.directory == files.data_home() / "registry"
    assert (local.port, local.url) == (PORT, "http://127.0.0.1:5055")
    assert not local.running()
    assert not local.installed()


def test_configuration_has_loopback_directory_and_password(tmp_path: Path) -> None:
    configuration = LocalRegistry(tmp_path, 5056)._configure()
    assert configuration["http"] == {"addr": "127.0.0.1:5056"}
    assert f'"{tmp_path}/data"' in json.dumps(configuration["storage"])
    assert f'"{tmp_path}/htpasswd"' in json.dumps(configuration["auth"])


@pytest.fixture
def account(tmp_path: Path) -> Account:
    new_account = Account(tmp_path)
    new_account.make()
    return new_account


def test_password_is_private(account: Account) -> None:
    credentials = account.credentials()
    assert credentials
    assert (credentials.username, len(credentials.password) >= 43) == (USER, True)
    assert credentials.password not in repr((account, credentials))
    assert credentials.password not in account.login_hint(5055)
    for file in (account.password_file, account.accounts_file):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_password_is_created_once(account: Account) -> None:
    contents = [file.read_bytes() for file in (account.password_file, account.accounts_file)]
    account.make()
    assert [f.read_bytes() for f in (account.password_file, account.accounts_file)] == contents


@pytest.mark.parametrize("missing_file", ["password_file", "accounts_file"])
def test_incomplete_account_is_recreated(account: Account, missing_file: str) -> None:
    previous = account.password_file.read_text(), account.accounts_file.read_text()
    getattr(account, missing_file).unlink()
    account.make()
    current = account.password_file.read_text(), account.accounts_file.read_text()
    assert current[0] != previous[0]
    assert current[1] != previous[1]


def test_accounts_file_contains_the_hash_of_the_password(account: Account) -> None:
    user, _, hashed = account.accounts_file.read_text().strip().partition(":")
    assert user == USER
    assert hashed.startswith("$2b$04$")
    assert bcrypt.checkpw(account.password_file.read_bytes(), hashed.encode())


@pytest.fixture
def registries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the registries of this user."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    directory = local_registry().directory
    directory.mkdir(parents=True)
    return directory


def test_password_is_sent_only_to_local_registries(
    registries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert accounts(engine_at("unix:///fake.sock")) == {}
    Account(registries).make()
    # Stopped registries and registries of other engines get no password.
    for port in ("1", "2", "x"):
        (registries / f"{port}.pid").write_text("1")
    (registries / "3.engine").write_text("tcp://other:2375")
    monkeypatch.setattr(LocalRegistry, "running", lambda self: self.port == 2)
    local_accounts = accounts(engine_at("unix:///fake.sock"))
    assert list(local_accounts) == ["localhost:2", "127.0.0.1:2"]
    assert set(local_accounts.values()) == {Account(registries).credentials()}
    assert list(accounts(engine_at("tcp://other:2375"))) == ["localhost:3", "127.0.0.1:3"]
    assert accounts(engine_at("ssh://third")) == {}


def test_engine_with_another_loopback_gets_a_container(
    registries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rootless Docker and Docker Desktop have a local socket, but another loopback interface."""
    Account(registries).make()
    (registries / "2.pid").write_text("1")
    monkeypatch.setattr(LocalRegistry, "running", lambda self: True)
    monkeypatch.setattr(registry, "on_debian", lambda: True)
    engine = FakeEngine()
    kinds: dict[type, list[dict[str, Any]]] = {
        LocalRegistry: [{}, {"product": "Podman", "security": ("rootless",)}],
        ContainerRegistry: [{"security": ("rootless",)}, {"name": "docker-desktop"}],
    }
    for kind, engines in kinds.items():
        for about in engines:
            engine.details = engine_at("unix:///fake.sock", **about)
            assert isinstance(registry_for(engine), kind)
            assert bool(accounts(engine.details)) is (kind is LocalRegistry)


REMOTE_URL = "tcp://engine.test:2375"


@pytest.fixture
def remote(registries: Path) -> FakeEngine:
    """An engine on another machine, whose registry is a container."""
    other = FakeEngine()
    other.import_rootfs(iter([b""]), "registry:3")
    other.push("registry:3", None)
    return FakeEngine(other.registry, url=REMOTE_URL)


def test_container_requires_the_password(remote: FakeEngine, registries: Path) -> None:
    output = io.StringIO()
    container_registry = ContainerRegistry(remote, 5056)
    container_registry.up(Console(err=output))
    (spec,) = remote.specs
    assert spec.environment["REGISTRY_AUTH"] == "htpasswd"
    account = Account(registries)
    (container,) = remote.all_containers.values()
    path = spec.environment["REGISTRY_AUTH_HTPASSWD_PATH"]
    assert container.changes[path] == account.accounts_file.read_bytes()
    credentials = account.credentials()
    assert accounts(engine_at(REMOTE_URL)) == {
        f"{h}:5056": credentials for h in ("localhost", "127.0.0.1")
    }
    assert credentials
    assert credentials.password not in output.getvalue() + repr(spec)
    assert account.login_hint(5056) in output.getvalue()
    container_registry.up(silent())
    assert len(remote.specs) == 1
    container_registry.down(silent())
    assert accounts(engine_at(REMOTE_URL)) == {}


def test_container_without_a_record_is_recreated(remote: FakeEngine, registries: Path) -> None:
    container_registry = ContainerRegistry(remote, 5056)
    container_registry.up(silent())
    (registries / "5056.engine").unlink()
    container_registry.up(silent())
    assert len(remote.specs) == 2
    assert len(remote.all_containers) == 1


def test_used_port_is_reported(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RegistryError, match=rf"port {port} .*--port N.*localhost:N/"):
            LocalRegistry(tmp_path, port).up(silent())


def test_other_distribution_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: None)
    with pytest.raises(RegistryError, match="not Debian; set IMAGE"):
        LocalRegistry(tmp_path)._unpack(silent())


def test_package_comes_from_another_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suites: list[str] = []

    def unpack(self: Apt, packages: list[str], root: Path) -> None:
        suites.extend(self.suites)
        assert packages == ["docker-registry"]
        if self.suites == ["bookworm"]:
            raise RegistryError("no package")
        root.mkdir()

    monkeypatch.setattr(apt, "host_suite", lambda: "bookworm")
    monkeypatch.setattr(Apt, "unpack", unpack)
    LocalRegistry(tmp_path)._unpack(silent())
    assert suites == ["bookworm", "sid"]


def test_failed_start_reports_the_error(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = LocalRegistry(tmp_path, port)
    program = tmp_path / "root/usr/bin/docker-registry"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 'level=fatal msg=\"no room\"'; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(RegistryError, match="cannot start the local registry: no room; see /"):
        local.up(silent())
    assert not answers(port)
    assert not local.running()


def test_down_reports_a_stopped_registry(tmp_path: Path) -> None:
    console = Console(err=(output := io.StringIO()))
    LocalRegistry(tmp_path / "none", 5057).down(console)
    assert output.getvalue() == "no local registry of guix-tasks is running on port 5057\n"
