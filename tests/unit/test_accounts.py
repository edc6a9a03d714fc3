"""Which account a registry gets, and what Docker's own configuration may hold."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING

import pytest

from guix_tasks.bootstrap.registry import Account, accounts
from guix_tasks.engine.accounts import Accounts, Credentials, auth_config, docker_accounts
from guix_tasks.engine.api import NoEngine
from guix_tasks.engine.credentials import accounts_for, credentials_for, remote_digest
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


def coded(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def docker(tmp_path: Path, config: object, **environment: str) -> Accounts:
    """The accounts of a user with this config.json and a credential helper ``test``."""
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    helper = tmp_path / "docker-credential-test"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return docker_accounts({"DOCKER_CONFIG": str(tmp_path), "PATH": path, **environment})


def test_an_account_of_config_json_is_for_its_host_alone(tmp_path: Path) -> None:
    found = docker(tmp_path, {"auths": {"a.example": coded("me", "hunter2:€")}})
    assert found.find("a.example") == ME
    for other in ("b.example", "a.example:5000", "docker.io", "example", "xa.example"):
        assert found.find(other) is None


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
def test_a_name_may_be_a_url_as_docker_takes_it(tmp_path: Path, name: str, host: str) -> None:
    assert docker(tmp_path, {"auths": {name: coded("me", "hunter2:€")}}).find(host) == ME


def test_the_exact_name_of_a_host_wins(tmp_path: Path) -> None:
    auths = {"https://a.example/v1/": coded("old", "x"), "a.example": coded("me", "hunter2:€")}
    assert docker(tmp_path, {"auths": auths}).find("a.example") == ME


def test_an_identity_token_takes_the_place_of_the_password(tmp_path: Path) -> None:
    entry = {**coded("00000000", ""), "identitytoken": "a-refresh-token"}
    found = docker(tmp_path, {"auths": {"a.example": entry}}).find("a.example")
    assert found == Credentials("", "", "a-refresh-token")
    assert clean("a-refresh-token") == "***"
    assert "a-refresh-token" not in repr(found)


def test_docker_auth_config_comes_before_config_json(tmp_path: Path) -> None:
    variable = {"auths": {"a.example": coded("me", "hunter2:€"), "b.example": coded("b", "bee")}}
    config = {"auths": {"a.example": coded("old", "x"), "c.example": coded("c", "sea")}}
    found = docker(tmp_path, config, DOCKER_AUTH_CONFIG=json.dumps(variable))
    assert found.find("a.example") == ME
    assert found.find("b.example") == Credentials("b", "bee")
    assert found.find("c.example") == Credentials("c", "sea")
    assert sorted(found.given) == ["a.example", "b.example"]
    assert clean("hunter2:€") == "***"


def test_a_helper_is_asked_for_the_hosts_that_it_is_for(tmp_path: Path) -> None:
    auths = {"a.example": coded("me", "in-the-file"), "b.example": coded("me", "in-the-file")}
    found = docker(tmp_path, {"auths": auths, "credHelpers": {"a.example": "test", HUB: "test"}})
    assert found.find("a.example") == Credentials("robot", "from-helper")
    assert found.find("b.example") == Credentials("me", "in-the-file")
    assert found.find("docker.io") == Credentials("", "", "from-helper")


def test_a_store_is_asked_for_all_and_an_empty_helper_means_the_file(tmp_path: Path) -> None:
    auths = {"a.example": coded("me", "in-the-file"), "c.example": coded("me", "in-the-file")}
    config = {"auths": auths, "credsStore": "test", "credHelpers": {"c.example": ""}}
    found = docker(tmp_path, config)
    assert found.find("a.example") == Credentials("robot", "from-helper")
    assert found.find("c.example") == Credentials("me", "in-the-file")
    assert found.find("empty.example") is None
    assert found.find("unknown.example") is None


@pytest.mark.parametrize(
    ("helper", "host", "why"),
    [
        ("nowhere", "a.example", "docker-credential-nowhere is not installed"),
        ("test", "locked.example", "docker-credential-test: the key ring is locked"),
        ("test", "odd.example", "without Username and Secret"),
        ("a\0b", "a.example", "null byte"),
    ],
)
def test_a_helper_that_fails_is_an_error_of_one_line(
    tmp_path: Path, helper: str, host: str, why: str
) -> None:
    found = docker(tmp_path, {"credsStore": helper, "auths": {host: {}, "b.example": {}}})
    with pytest.raises(RegistryError) as caught:
        found.find(host)
    assert why in str(caught.value)
    assert str(caught.value).startswith(f"cannot get the account of {host} from Docker's conf")
    # A build goes on without, as with Docker's command line: its images may be public.
    assert host not in found.every()


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
def test_a_broken_configuration_has_no_account(tmp_path: Path, config: str) -> None:
    variable = "x" if "\0" in config or "\udcff" in config else config
    found = docker(tmp_path, config, DOCKER_AUTH_CONFIG=variable)
    assert found.find("a.example") is None
    assert found.given == found.every() == {}


def test_a_configuration_that_cannot_be_read_has_no_account(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert docker_accounts({"DOCKER_CONFIG": str(tmp_path)}).find("a.example") is None


def test_a_build_has_the_accounts_of_all_hosts_that_are_named(tmp_path: Path) -> None:
    config = {
        "auths": {"b.example": coded("b", "bee"), "empty.example": {}},
        "credHelpers": {"a.example": "test", "locked.example": "test"},
    }
    variable = json.dumps({"auths": {"c.example": coded("me", "hunter2:€")}})
    assert docker(tmp_path, config, DOCKER_AUTH_CONFIG=variable).every() == {
        "a.example": Credentials("robot", "from-helper"),
        "b.example": Credentials("b", "bee"),
        "c.example": ME,
    }


def test_what_is_given_is_written_as_docker_reads_it(tmp_path: Path) -> None:
    given = {"docker.io": ME, "a.example:5000": Credentials("b", "bee")}
    text = auth_config(given)
    assert sorted(json.loads(text)["auths"]) == ["a.example:5000", HUB]
    assert docker(tmp_path, {}, DOCKER_AUTH_CONFIG=text).given == given


# --- Of a project ---------------------------------------------------------------------------


def test_the_account_of_the_settings_is_for_the_registry_of_the_image_alone(site: Site) -> None:
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


def test_the_settings_come_first_then_the_variable_then_the_file(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docker").mkdir()
    config = {"auths": {f"{host}.test": coded("file", "x") for host in ("registry", "b", "c")}}
    (tmp_path / "docker" / "config.json").write_text(json.dumps(config))
    variable = {"auths": {f"{host}.test": coded("variable", "x") for host in ("registry", "b")}}
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", json.dumps(variable))
    site.env.update(
        DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2:€", DOCKER_CONFIG=str(tmp_path / "docker")  # noqa: S106
    )  # fmt: skip
    project = site.project()
    found = accounts_for(project.engine, project.settings)
    users = {host: getattr(found.find(f"{host}.test"), "username", "") for host in "bcd"}
    assert users == {"b": "variable", "c": "file", "d": ""}
    assert found.find("registry.test") == ME


def test_a_local_registry_gets_its_own_account_whatever_the_settings_have(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It knows no other."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    directory = tmp_path / "guix-tasks" / "registry"
    directory.mkdir(parents=True)
    account = Account(directory)
    account.make()
    (directory / "5056.engine").write_text(site.engine.about.url)
    site.engine.registry.local_accounts = accounts(site.engine.about)
    assert site.engine.registry.local_accounts
    site.env.update(
        IMAGE="localhost:5056/app:1", DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2:€"  # noqa: S106
    )  # fmt: skip
    project = site.project()
    found = accounts_for(project.engine, project.settings)
    assert found.find("localhost:5056") == account.credentials()
    assert found.find("127.0.0.1:5056") == account.credentials()
    assert found.find("localhost:5057") is None


def test_without_an_engine_there_is_no_local_registry(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2:€")  # noqa: S106
    nothing = NoEngine(NoEngineError("none"))
    assert accounts_for(nothing, site.settings()).given == {"registry.test": ME}


def test_a_helper_that_fails_leaves_a_digest_unknown(site: Site, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"credsStore": "nowhere"}')
    site.env["DOCKER_CONFIG"] = str(tmp_path)
    settings = site.settings()
    assert remote_digest(site.engine, settings, str(settings.base_image)) is None
