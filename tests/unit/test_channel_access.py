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
def an_agent(asked: list[bytes]) -> Iterator[str]:
    """An SSH agent that repeats what it is asked."""

    class Agent(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(1 << 16):
                asked.append(data)
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
    far = FakeEngine(url="tcp://far.test:2376")
    site.env["SSH_KNOWN_HOSTS"] = str(site.write("hosts", "x"))
    with an_agent([]) as agent:
        site.env["SSH_AUTH_SOCK"] = agent
        with (
            pytest.raises(UsageError, match="is on another machine"),
            grant_access(far, site.settings(), BY_SSH),
        ):
            pass


def test_temporary_directory_that_is_too_long_for_the_relay_is_named(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.env["SSH_KNOWN_HOSTS"] = str(site.write("hosts", "x"))
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with an_agent([]) as agent:
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        site.env["SSH_AUTH_SOCK"] = agent
        access = grant_access(site.engine, site.settings(), BY_SSH)
        with pytest.raises(UsageError, match=r"longer than 107 bytes; set TMPDIR"), access:
            pass


def test_relay_passes_on_only_list_and_sign(site: Site) -> None:
    site.env["SSH_KNOWN_HOSTS"] = str(site.write("hosts", "x"))
    asked: list[bytes] = []
    with an_agent(asked) as agent:
        site.env["SSH_AUTH_SOCK"] = agent
        with grant_access(site.engine, site.settings(), BY_SSH) as access:
            (bind,) = access.binds
            place, _, target = bind.partition(":")
            assert target == AGENT
            assert Path(place).parent.stat().st_mode & 0o777 == 0o700
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(place)
                for kind in (LIST, ADD, SIGN, REMOVE_ALL, LOCK):
                    sent = message(kind, b"x" * 5000)
                    client.sendall(sent)
                    got = b""
                    while len(got) < 5:
                        got += client.recv(1 << 16)
                    if kind in (LIST, SIGN):
                        while len(got) < len(sent):
                            got += client.recv(1 << 16)
                        assert got == sent
                    else:
                        assert got == message(5), "a failure"
        assert not Path(place).exists()
    assert {data[4] for data in asked} <= {LIST, SIGN, ord("x")}
    assert b"".join(asked) == message(LIST, b"x" * 5000) + message(SIGN, b"x" * 5000)


@pytest.mark.parametrize(
    ("proxy", "network", "is_out"),
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
def test_proxy_on_loopback_is_reported(site: Site, proxy: str, network: str, is_out: bool) -> None:
    site.env.update(https_proxy=proxy, no_proxy="localhost", NETWORK=network)
    why = proxy_error_line(site.engine, site.settings())
    assert ("set NETWORK=host" in why) == is_out
    if is_out:
        assert "https_proxy" in why
        assert "me:" not in why
