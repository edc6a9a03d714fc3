"""Accounts of registries, from the settings and from Docker's configuration."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING

import pytest

from guix_tasks.bootstrap.registry import Account, accounts
from guix_tasks.engine.accounts import (
    Accounts,
    Credentials,
    accounts_for,
    auth_config,
    credentials_for,
    docker_accounts,
    remote_digest,
)
from guix_tasks.engine.api import NoEngine
from guix_tasks.errors import NoEngineError, RegistryError
from guix_tasks.ui.redact import clean

if TYPE_CHECKING:
    from pathlib import Path

    from fake_engine import Site

HUB = "https://index.docker.io/v1/"
ME = Credentials("me", "hunter2:€")

HELPER = """#!/bin/sh
[ "$1" = get ] || exit 9
read -r server
case $server in
  a.example) echo '{"Username": "robot", "Secret": "from-helper"}' ;;
  https://index.docker.io/v1/) echo '{"Username": "<token>", "Secret": "from-helper"}' ;;
  empty.example) echo '{"Username": "", "Secret": ""}' ;;
  odd.example) echo 'what?' ;;
  locked.example) echo 'the key ring is locked'; exit 1 ;;
  *) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"""


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def load_accounts(tmp_path: Path, config: object, **environment: str) -> Accounts:
    """Load the accounts of a user with a config.json and a credential helper ``test``."""
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    helper = tmp_path / "docker-credential-test"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return docker_accounts({"DOCKER_CONFIG": str(tmp_path), "PATH": path, **environment})


def test_account_of_config_json_is_used_for_its_host_only(tmp_path: Path) -> None:
    user_accounts = load_accounts(tmp_path, {"auths": {"a.example": auth("me", "hunter2:€")}})
    assert user_accounts.find("a.example") == ME
    for other in ("b.example", "a.example:5000", "docker.io", "example", "xa.example"):
        assert user_accounts.find(other) is None


@pytest.mark.parametrize(
    ("name", "host"),
    [
        (HUB, "docker.io"),
        ("docker.io", "docker.io"),
        ("index.docker.io", "docker.io"),
        ("https://a.example/v1/", "a.example"),
        ("http://a.example:5000", "a.example:5000"),
        ("a.example/v2/", "a.example"),
    ],
)
def test_name_of_a_registry_can_be_a_url(tmp_path: Path, name: str, host: str) -> None:
    assert load_accounts(tmp_path, {"auths": {name: auth("me", "hunter2:€")}}).find(host) == ME


def test_exact_name_of_a_host_takes_precedence(tmp_path: Path) -> None:
    auths = {"https://a.example/v1/": auth("old", "x"), "a.example": auth("me", "hunter2:€")}
    assert load_accounts(tmp_path, {"auths": auths}).find("a.example") == ME


def test_identity_token_replaces_the_password(tmp_path: Path) -> None:
    entry = {**auth("00000000", ""), "identitytoken": "a-refresh-token"}
    account = load_accounts(tmp_path, {"auths": {"a.example": entry}}).find("a.example")
    assert account == Credentials("", "", "a-refresh-token")
    assert clean("a-refresh-token") == "***"
    assert "a-refresh-token" not in repr(account)


def test_docker_auth_config_takes_precedence_over_config_json(tmp_path: Path) -> None:
    variable = {"auths": {"a.example": auth("me", "hunter2:€"), "b.example": auth("b", "bee")}}
    config = {"auths": {"a.example": auth("old", "x"), "c.example": auth("c", "sea")}}
    user_accounts = load_accounts(tmp_path, config, DOCKER_AUTH_CONFIG=json.dumps(variable))
    assert user_accounts.find("a.example") == ME
    assert user_accounts.find("b.example") == Credentials("b", "bee")
    assert user_accounts.find("c.example") == Credentials("c", "sea")
    assert sorted(user_accounts.given) == ["a.example", "b.example"]
    assert clean("hunter2:€") == "***"


def test_credential_helper_is_used_for_its_hosts(tmp_path: Path) -> None:
    auths = {"a.example": auth("me", "in-the-file"), "b.example": auth("me", "in-the-file")}
    user_accounts = load_accounts(
        tmp_path, {"auths": auths, "credHelpers": {"a.example": "test", HUB: "test"}}
    )
    assert user_accounts.find("a.example") == Credentials("robot", "from-helper")
    assert user_accounts.find("b.example") == Credentials("me", "in-the-file")
    assert user_accounts.find("docker.io") == Credentials("", "", "from-helper")


def test_credential_store_is_used_except_for_an_empty_helper(tmp_path: Path) -> None:
    auths = {"a.example": auth("me", "in-the-file"), "c.example": auth("me", "in-the-file")}
    config = {"auths": auths, "credsStore": "test", "credHelpers": {"c.example": ""}}
    user_accounts = load_accounts(tmp_path, config)
    assert user_accounts.find("a.example") == Credentials("robot", "from-helper")
    assert user_accounts.find("c.example") == Credentials("me", "in-the-file")
    assert user_accounts.find("empty.example") is None
    assert user_accounts.find("unknown.example") is None


@pytest.mark.parametrize(
    ("helper", "host", "reason"),
    [
        ("nowhere", "a.example", "docker-credential-nowhere is not installed"),
        ("test", "locked.example", "docker-credential-test: the key ring is locked"),
        ("test", "odd.example", "without Username and Secret"),
        ("a\0b", "a.example", "null byte"),
    ],
)
def test_failure_of_a_credential_helper_is_one_line(
    tmp_path: Path, helper: str, host: str, reason: str
) -> None:
    user_accounts = load_accounts(
        tmp_path, {"credsStore": helper, "auths": {host: {}, "b.example": {}}}
    )
    with pytest.raises(RegistryError) as error:
        user_accounts.find(host)
    assert reason in str(error.value)
    assert str(error.value).startswith(f"cannot get the account of {host} from Docker's conf")
    # A build continues without the account, as Docker's does: its images may be public.
    assert host not in user_accounts.every()


@pytest.mark.parametrize(
    "config",
    [
        "", "{", "[]", "null", "\x00", "\udcff", '{"auths": "x", "credHelpers": 5}',
        '{"auths": [], "credsStore": 7}', '{"auths": {"a.example": "x"}}',
        '{"auths": {"a.example": {"auth": ""}}}', '{"auths": {"a.example": {"auth": "abc"}}}',
        '{"auths": {"a.example": {"auth": "Zm9v"}}}', '{"auths": {"a.example": {"auth": 5}}}',
        '{"auths": {"a.example": {"auth": "bfxsbGVyOng="}}}', '{"auths": {"a.example": {}}}',
        '{"auths": {"a.example": {"auth": "\u20ac"}}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_invalid_configuration_has_no_account(tmp_path: Path, config: str) -> None:
    variable = "x" if "\0" in config or "\udcff" in config else config
    user_accounts = load_accounts(tmp_path, config, DOCKER_AUTH_CONFIG=variable)
    assert user_accounts.find("a.example") is None
    assert user_accounts.given == user_accounts.every() == {}


def test_unreadable_configuration_has_no_account(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert docker_accounts({"DOCKER_CONFIG": str(tmp_path)}).find("a.example") is None


def test_build_has_the_accounts_of_all_configured_hosts(tmp_path: Path) -> None:
    config = {
        "auths": {"b.example": auth("b", "bee"), "empty.example": {}},
        "credHelpers": {"a.example": "test", "locked.example": "test"},
    }
    variable = json.dumps({"auths": {"c.example": auth("me", "hunter2:€")}})
    assert load_accounts(tmp_path, config, DOCKER_AUTH_CONFIG=variable).every() == {
        "a.example": Credentials("robot", "from-helper"),
        "b.example": Credentials("b", "bee"),
        "c.example": ME,
    }


def test_auth_config_is_written_in_the_format_of_docker(tmp_path: Path) -> None:
    credentials = {"docker.io": ME, "a.example:5000": Credentials("b", "bee")}
    text = auth_config(credentials)
    assert sorted(json.loads(text)["auths"]) == ["a.example:5000", HUB]
    assert load_accounts(tmp_path, {}, DOCKER_AUTH_CONFIG=text).given == credentials


# --- Accounts of a project ------------------------------------------------------------------


def test_account_of_the_settings_is_used_for_the_registry_of_image_only(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2:€")  # noqa: S106
    project = site.project()
    for reference, account in (
        ("registry.test/team/app:1", ME),
        ("registry.test/other/base", ME),
        ("registry.test:5000/team/app", None),
        ("elsewhere.test/team/app:1", None),
        ("team/app", None),
    ):
        assert credentials_for(project.engine, project.settings, reference) == account


def test_account_of_the_settings_precedes_the_variable_and_the_file(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docker").mkdir()
    config = {"auths": {f"{host}.test": auth("file", "x") for host in ("registry", "b", "c")}}
    (tmp_path / "docker" / "config.json").write_text(json.dumps(config))
    variable = {"auths": {f"{host}.test": auth("variable", "x") for host in ("registry", "b")}}
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", json.dumps(variable))
    site.env.update(
        DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2:€", DOCKER_CONFIG=str(tmp_path / "docker")  # noqa: S106
    )  # fmt: skip
    project = site.project()
    project_accounts = accounts_for(project.engine, project.settings)
    users = {host: getattr(project_accounts.find(f"{host}.test"), "username", "") for host in "bcd"}
    assert users == {"b": "variable", "c": "file", "d": ""}
    assert project_accounts.find("registry.test") == ME


def test_local_registry_always_gets_its_generated_account(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It accepts no other account."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    directory = tmp_path / "guix-tasks" / "registry"
    directory.mkdir(parents=True)
    account = Account(directory)
    account.make()
    (directory / "5056.engine").write_text(site.engine.details.url)
    site.engine.registry.local_accounts = accounts(site.engine.details)
    assert site.engine.registry.local_accounts
    site.env.update(
        IMAGE="localhost:5056/app:1", DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2:€"  # noqa: S106
    )  # fmt: skip
    project = site.project()
    project_accounts = accounts_for(project.engine, project.settings)
    assert project_accounts.find("localhost:5056") == account.credentials()
    assert project_accounts.find("127.0.0.1:5056") == account.credentials()
    assert project_accounts.find("localhost:5057") is None


def test_without_an_engine_local_registries_are_ignored(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2:€")  # noqa: S106
    no_engine = NoEngine(NoEngineError("none"))
    assert accounts_for(no_engine, site.settings()).given == {"registry.test": ME}


def test_digest_is_unknown_if_the_credential_helper_fails(site: Site, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"credsStore": "nowhere"}')
    site.env["DOCKER_CONFIG"] = str(tmp_path)
    settings = site.settings()
    assert remote_digest(site.engine, settings, str(settings.base_image)) is None
