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


def engine_at(url: str, **more: Any) -> EngineInfo:
    return replace(FakeEngine(url=url).info(), **more)


def silent() -> Console:
    return Console(out=io.StringIO(), err=io.StringIO())


def test_it_is_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    local = local_registry()
    assert local.directory == files.data_home() / "registry"
    assert (local.port, local.url) == (PORT, "http://127.0.0.1:5055")
    assert not local.running()
    assert not local.installed()


def test_it_listens_on_loopback_and_keeps_to_its_folder(tmp_path: Path) -> None:
    configuration = LocalRegistry(tmp_path, 5056)._configure()
    assert configuration["http"] == {"addr": "127.0.0.1:5056"}
    assert f'"{tmp_path}/data"' in json.dumps(configuration["storage"])


def test_it_asks_for_a_password(tmp_path: Path) -> None:
    configuration = LocalRegistry(tmp_path, 5056)._configure()
    auth = json.dumps(configuration["auth"])
    assert f'"{tmp_path}/htpasswd"' in auth


@pytest.fixture
def account(tmp_path: Path) -> Account:
    made = Account(tmp_path)
    made.make()
    return made


def test_the_password_is_for_this_user_alone(account: Account) -> None:
    credentials = account.credentials()
    assert credentials
    assert (credentials.username, len(credentials.password) >= 43) == (USER, True)
    assert credentials.password not in repr((account, credentials))
    assert credentials.password not in account.login_hint(5055)
    for file in (account.password_file, account.accounts_file):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_password_is_made_once(account: Account) -> None:
    before = [file.read_bytes() for file in (account.password_file, account.accounts_file)]
    account.make()
    assert [f.read_bytes() for f in (account.password_file, account.accounts_file)] == before


@pytest.mark.parametrize("lost", ["password_file", "accounts_file"])
def test_half_an_account_is_made_anew(account: Account, lost: str) -> None:
    before = account.password_file.read_text(), account.accounts_file.read_text()
    getattr(account, lost).unlink()
    account.make()
    after = account.password_file.read_text(), account.accounts_file.read_text()
    assert after[0] != before[0]
    assert after[1] != before[1]


def test_what_the_registry_reads_is_the_hash_of_the_password(account: Account) -> None:
    user, _, hashed = account.accounts_file.read_text().strip().partition(":")
    assert user == USER
    assert hashed.startswith("$2b$04$")
    assert bcrypt.checkpw(account.password_file.read_bytes(), hashed.encode())


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory where the registries of this user are."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    directory = local_registry().directory
    directory.mkdir(parents=True)
    return directory


def test_only_a_registry_of_ours_is_told_the_password(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert accounts(engine_at("unix:///fake.sock")) == {}
    Account(shared).make()
    # Not one that is gone, and not one that is somewhere else.
    for port in ("1", "2", "x"):
        (shared / f"{port}.pid").write_text("1")
    (shared / "3.engine").write_text("tcp://other:2375")
    monkeypatch.setattr(LocalRegistry, "running", lambda self: self.port == 2)
    here = accounts(engine_at("unix:///fake.sock"))
    assert list(here) == ["localhost:2", "127.0.0.1:2"]
    assert set(here.values()) == {Account(shared).credentials()}
    assert list(accounts(engine_at("tcp://other:2375"))) == ["localhost:3", "127.0.0.1:3"]
    assert accounts(engine_at("ssh://third")) == {}


def test_engine_with_another_loopback_gets_a_container(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rootless Docker and Docker Desktop have a local socket, but not this machine's localhost."""
    Account(shared).make()
    (shared / "2.pid").write_text("1")
    monkeypatch.setattr(LocalRegistry, "running", lambda self: True)
    monkeypatch.setattr(registry, "on_debian", lambda: True)
    engine = FakeEngine()
    kinds: dict[type, list[dict[str, Any]]] = {
        LocalRegistry: [{}, {"product": "Podman", "security": ("rootless",)}],
        ContainerRegistry: [{"security": ("rootless",)}, {"name": "docker-desktop"}],
    }
    for kind, engines in kinds.items():
        for about in engines:
            engine.about = engine_at("unix:///fake.sock", **about)
            assert isinstance(registry_for(engine), kind)
            assert bool(accounts(engine.about)) is (kind is LocalRegistry)


FAR = "tcp://engine.test:2375"


@pytest.fixture
def far(shared: Path) -> FakeEngine:
    """An engine on another machine, whose registry is a container."""
    other = FakeEngine()
    other.import_rootfs(iter([b""]), "registry:3")
    other.push("registry:3", None)
    return FakeEngine(other.registry, url=FAR)


def test_a_container_asks_for_the_password_too(far: FakeEngine, shared: Path) -> None:
    said = io.StringIO()
    container_registry = ContainerRegistry(far, 5056)
    container_registry.up(Console(err=said))
    (spec,) = far.specs
    assert spec.environment["REGISTRY_AUTH"] == "htpasswd"
    account = Account(shared)
    (container,) = far.all_containers.values()
    path = spec.environment["REGISTRY_AUTH_HTPASSWD_PATH"]
    assert container.changes[path] == account.accounts_file.read_bytes()
    credentials = account.credentials()
    assert accounts(engine_at(FAR)) == {
        f"{h}:5056": credentials for h in ("localhost", "127.0.0.1")
    }
    assert credentials
    assert credentials.password not in said.getvalue() + repr(spec)
    assert account.login_hint(5056) in said.getvalue()
    container_registry.up(silent())
    assert len(far.specs) == 1
    container_registry.down(silent())
    assert accounts(engine_at(FAR)) == {}


def test_container_without_a_record_is_recreated(far: FakeEngine, shared: Path) -> None:
    container_registry = ContainerRegistry(far, 5056)
    container_registry.up(silent())
    (shared / "5056.engine").unlink()
    container_registry.up(silent())
    assert len(far.specs) == 2
    assert len(far.all_containers) == 1


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RegistryError, match=rf"port {port} .*--port N.*localhost:N/"):
            LocalRegistry(tmp_path, port).up(silent())


def test_not_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: None)
    with pytest.raises(RegistryError, match="not Debian; set IMAGE"):
        LocalRegistry(tmp_path)._unpack(silent())


def test_another_suite_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def unpack(self: Apt, packages: list[str], root: Path) -> None:
        tried.extend(self.suites)
        assert packages == ["docker-registry"]
        if self.suites == ["bookworm"]:
            raise RegistryError("not there")
        root.mkdir()

    monkeypatch.setattr(apt, "host_suite", lambda: "bookworm")
    monkeypatch.setattr(Apt, "unpack", unpack)
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
    with pytest.raises(RegistryError, match="cannot start the local registry: no room; see /"):
        local.up(silent())
    assert not answers(port)
    assert not local.running()


def test_down_where_nothing_runs(tmp_path: Path) -> None:
    console = Console(err=(heard := io.StringIO()))
    LocalRegistry(tmp_path / "none", 5057).down(console)
    assert heard.getvalue() == "no local registry of guix-tasks is running on port 5057\n"
