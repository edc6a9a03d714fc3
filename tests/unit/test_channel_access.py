"""Credentials, SSH agent and mirrors for stages that fetch channels, and their limits."""

from __future__ import annotations

import socket
import socketserver
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import FakeEngine, Site, new_site

from guix_tasks.errors import UsageError
from guix_tasks.stages.channel_access import (
    AGENT,
    access_files,
    by_ssh,
    grant_access,
    mirrored,
    programs,
)
from guix_tasks.stages.container import proxy_error_line

if TYPE_CHECKING:
    from collections.abc import Iterator

BY_SSH = '(list (channel (name \'a) (url "ssh://git@forge.test/a")))'
BY_HTTPS = '(list (channel (name \'a) (url "https://forge.test/a")))'

LIST, SIGN, ADD, REMOVE_ALL, LOCK = 11, 13, 17, 19, 22


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return new_site(tmp_path)


@contextmanager
def run_agent(requests: list[bytes]) -> Iterator[str]:
    """Run an SSH agent that records and repeats its requests."""

    class Agent(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(1 << 16):
                requests.append(data)
                self.request.sendall(data)

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/agent"
        with socketserver.ThreadingUnixStreamServer(path, Agent) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield path
            server.shutdown()


def message(kind: int, text: bytes = b"") -> bytes:
    return (1 + len(text)).to_bytes(4, "big") + bytes([kind]) + text


def test_public_channel_needs_no_access_files(site: Site) -> None:
    assert access_files(site.settings(), BY_HTTPS) == {}
    with grant_access(site.engine, site.settings(), BY_HTTPS) as access:
        assert access.files == programs()
        assert access.binds == ()
    with grant_access(site.engine, site.settings(), None) as access:
        assert access.files == {}


def test_credentials_are_a_guile_list(site: Site) -> None:
    site.env["GUIX_CHANNEL_CREDENTIALS"] = (
        'https://me:a%22b%5Cc%40d@forge.test:8/x/ http://to"ken@other.test'
    )
    files = access_files(site.settings(), BY_HTTPS)
    assert files["access/credentials"].decode() == (
        r'(("https://forge.test:8/x/" "me" "a\"b\\c@d")'
        "\n"
        r'("http://other.test/" "to\"ken" "")'
        "\n)\n"
    )
    assert b"forge" not in files["access/.gitconfig"]


def test_longest_matching_mirror_is_used(site: Site) -> None:
    site.env["GUIX_CHANNEL_MIRRORS"] = (
        "https://forge.test/=https://near.test/ https://forge.test/a=ssh://git@c.test/b"
    )
    settings = site.settings()
    assert mirrored(settings, "https://forge.test/x") == "https://near.test/x"
    assert mirrored(settings, "https://forge.test/a.git") == "ssh://git@c.test/b.git"
    assert mirrored(settings, "https://else.test/a") == "https://else.test/a"
    assert by_ssh(settings, BY_HTTPS) == "ssh://git@c.test/b"
    site.env["SSH_KNOWN_HOSTS"] = str(site.write("hosts", "c.test ssh-ed25519 AAAA\n"))
    files = access_files(site.settings(), BY_HTTPS)
    config = files["access/.gitconfig"].decode()
    assert '[url "https://near.test/"]\n\tinsteadOf = https://forge.test/\n' in config
    assert files["access/.ssh/known_hosts"] == b"c.test ssh-ed25519 AAAA\n"


@pytest.mark.parametrize(
    ("url", "is_by_ssh"),
    [
        ("ssh://git@forge.test/a", True),
        ("git@forge.test:group/a.git", True),
        ("git+ssh://forge.test/a", True),
        ("https://forge.test/a", False),
        ("https://me@forge.test:8/a", False),
        ("file:///a@b:c", False),
    ],
)
def test_ssh_urls_are_recognised(site: Site, url: str, is_by_ssh: bool) -> None:
    assert by_ssh(site.settings(), BY_HTTPS + f'(computed "{url}")') == (url if is_by_ssh else "")


def test_missing_agent_or_known_hosts_is_an_error(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(site.directory))
    for missing in (r"SSH_KNOWN_HOSTS: .*/\.ssh/known_hosts: No such file", "SSH_AUTH_SOCK is not"):
        with (
            pytest.raises(UsageError, match=missing),
            grant_access(site.engine, site.settings(), BY_SSH),
        ):
            pass
        site.write(".ssh/known_hosts", "forge.test ssh-ed25519 AAAA\n")


def test_remote_engine_cannot_use_the_agent(site: Site) -> None:
    engine = FakeEngine(url="tcp://far.test:2376")
    site.env["SSH_KNOWN_HOSTS"] = str(site.write("hosts", "x"))
    with run_agent([]) as agent:
        site.env["SSH_AUTH_SOCK"] = agent
        with (
            pytest.raises(UsageError, match="is on another machine"),
            grant_access(engine, site.settings(), BY_SSH),
        ):
            pass


def test_long_path_of_the_temporary_directory_is_reported(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.env["SSH_KNOWN_HOSTS"] = str(site.write("hosts", "x"))
    directory = tmp_path / ("x" * 100)
    directory.mkdir()
    with run_agent([]) as agent:
        monkeypatch.setattr(tempfile, "tempdir", str(directory))
        site.env["SSH_AUTH_SOCK"] = agent
        access = grant_access(site.engine, site.settings(), BY_SSH)
        with pytest.raises(UsageError, match=r"longer than 107 bytes; set TMPDIR"), access:
            pass


def test_relay_forwards_only_list_and_sign(site: Site) -> None:
    site.env["SSH_KNOWN_HOSTS"] = str(site.write("hosts", "x"))
    requests: list[bytes] = []
    with run_agent(requests) as agent:
        site.env["SSH_AUTH_SOCK"] = agent
        with grant_access(site.engine, site.settings(), BY_SSH) as access:
            (bind,) = access.binds
            source, _, target = bind.partition(":")
            assert target == AGENT
            assert Path(source).parent.stat().st_mode & 0o777 == 0o700
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(source)
                for kind in (LIST, ADD, SIGN, REMOVE_ALL, LOCK):
                    request = message(kind, b"x" * 5000)
                    client.sendall(request)
                    reply = b""
                    while len(reply) < 5:
                        reply += client.recv(1 << 16)
                    if kind in (LIST, SIGN):
                        while len(reply) < len(request):
                            reply += client.recv(1 << 16)
                        assert reply == request
                    else:
                        assert reply == message(5), "failure"
        assert not Path(source).exists()
    assert {data[4] for data in requests} <= {LIST, SIGN, ord("x")}
    assert b"".join(requests) == message(LIST, b"x" * 5000) + message(SIGN, b"x" * 5000)


@pytest.mark.parametrize(
    ("proxy", "network", "is_unreachable"),
    [
        ("http://127.0.0.1:3128", "", True),
        ("http://me:x@localhost:3128", "somewhere", True),
        ("[::1]:3128", "", True),
        ("http://127.0.0.1:3128", "host", False),
        ("http://127.0.0.1:3128", "none", False),
        ("http://proxy.test:3128", "", False),
        ("http://[", "", False),
    ],
)
def test_proxy_on_loopback_is_reported(
    site: Site, proxy: str, network: str, is_unreachable: bool
) -> None:
    site.env.update(https_proxy=proxy, no_proxy="localhost", NETWORK=network)
    line = proxy_error_line(site.engine, site.settings())
    assert ("set NETWORK=host" in line) == is_unreachable
    if is_unreachable:
        assert "https_proxy" in line
        assert "me:" not in line
