"""What ssh is called with for an address, and what it says is told in one line with the mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guix_tasks.engine.discovery import Address
from guix_tasks.engine.docker import DockerEngine
from guix_tasks.engine.ssh import Ssh, arguments
from guix_tasks.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

END = ("docker system dial-stdio",)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ssh://far.test", ("--", "far.test", *END)),
        ("ssh://me@far.test/", ("-l", "me", "--", "far.test", *END)),
        ("ssh://me@far.test:22", ("-l", "me", "-p", "22", "--", "far.test", *END)),
        ("ssh://[::1]:22", ("-p", "22", "--", "::1", *END)),
        (
            "ssh://far.test/run/user/1000/docker.sock",
            ("--", "far.test", "docker --host=unix:///run/user/1000/docker.sock system dial-stdio"),
        ),
        ("ssh://-oProxyCommand=x", ("--", "-oproxycommand=x", *END)),
    ],
)
def test_what_ssh_is_called_with(url: str, expected: tuple[str, ...]) -> None:
    options = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=30", "-T")
    assert tuple(arguments(url)) == (*options, *expected)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ssh://", "it names no host"),
        ("ssh://far.test:x", "Port could not be cast"),
        ("ssh://me:secret1@far.test", "a password cannot be in it"),
        ("ssh://far.test?x", "nothing may follow the path"),
        ("ssh://far.test/a;b", "its path cannot be that of a socket"),
    ],
)
def test_what_is_no_address(url: str, said: str) -> None:
    with pytest.raises(EngineError, match=said) as raised:
        DockerEngine(Address(url, "test")).info()
    assert "secret1" not in str(raised.value)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            "Warning: x\nHost key verification failed.\r\n",
            "its key is not known here: `ssh -p 7 me@far.test` once by hand shows it",
        ),
        (
            "bash: line 1: docker: command not found\n",
            "the docker command is not there, or not on the PATH of `ssh -p 7 me@far.test`",
        ),
        (
            "permission denied while trying to connect to the docker API\n",
            "the user there may not use that engine",
        ),
        ("what nobody knows\n\n", ""),
    ],
)
def test_what_ssh_says_is_told(
    told: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "said").write_text(told)
    (tmp_path / "ssh").write_text(f'#!/bin/sh\n/bin/cat "{tmp_path}/said" >&2; exit 255\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    url = "ssh://me@far.test:7"
    with pytest.raises(EngineError) as raised:
        DockerEngine(Address(url, "DOCKER_HOST")).info()
    where = f"the Docker Engine at {url} (DOCKER_HOST)"
    line = told.strip().splitlines()[-1]
    mend = f"; {expected}" if expected else ""
    assert str(raised.value).startswith(f"{where} cannot be reached: {line}{mend}")


def test_without_ssh_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"needs the program ssh: .*; install openssh-client"):
        Ssh("ssh://far.test").connect()
