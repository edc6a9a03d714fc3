"""Arguments of ssh for an address, and errors of ssh as one line with a hint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guix_tasks.engine.discovery import Address
from guix_tasks.engine.docker import DockerEngine
from guix_tasks.engine.ssh import Ssh, ssh_arguments
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
def test_ssh_arguments_are_those_of_the_address(url: str, expected: tuple[str, ...]) -> None:
    options = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=30", "-T")
    assert tuple(ssh_arguments(url)) == (*options, *expected)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ssh://", "it has no host"),
        ("ssh://far.test:x", "Port could not be cast"),
        ("ssh://me:secret1@far.test", "it cannot contain a password"),
        ("ssh://far.test?x", "nothing may follow the path"),
        ("ssh://far.test/a;b", "its path is not a valid path of a socket"),
    ],
)
def test_invalid_address_is_an_error(url: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason) as raised:
        DockerEngine(Address(url, "test")).info()
    assert "secret1" not in str(raised.value)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            "Warning: x\nHost key verification failed.\r\n",
            "this machine does not know the host's key: run `ssh -p 7 me@far.test` once",
        ),
        (
            "bash: line 1: docker: command not found\n",
            "the docker command is missing on the host, or not on the PATH of `ssh -p 7 me@far.te",
        ),
        (
            "permission denied while trying to connect to the docker API\n",
            "the remote user may not use the engine",
        ),
        ("an unknown error\n\n", ""),
    ],
)
def test_message_of_ssh_is_reported_with_a_hint(
    output: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "output").write_text(output)
    (tmp_path / "ssh").write_text(f'#!/bin/sh\n/bin/cat "{tmp_path}/output" >&2; exit 255\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    url = "ssh://me@far.test:7"
    with pytest.raises(EngineError) as raised:
        DockerEngine(Address(url, "DOCKER_HOST")).info()
    engine = f"the Docker Engine at {url} (DOCKER_HOST)"
    line = output.strip().splitlines()[-1]
    hint = f"; {expected}" if expected else ""
    assert str(raised.value).startswith(f"{engine} cannot be reached: {line}{hint}")


def test_missing_ssh_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"needs the program ssh: .*; install openssh-client"):
        Ssh("ssh://far.test").connect()
