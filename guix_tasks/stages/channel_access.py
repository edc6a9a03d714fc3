"""Credentials, SSH agent and mirrors for stages that fetch channels.

They exist only while the stage runs, in the container's memory. They are in no image, in no key
and in no URL, because Guix keeps URLs in its caches and in descriptions of channels.
"""

from __future__ import annotations

import json
import os
import re
import socket
import socketserver
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError
from guix_tasks.files import LONGEST_SOCKET, read_file, temporary_directory, user_home
from guix_tasks.settings.parsers import channel_credentials
from guix_tasks.stages.container import RESOURCES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import BufferedIOBase
    from pathlib import Path

    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings

ACCESS = "access"
"""Subdirectory of ``container.WORK_DIRECTORY`` that is the home directory of libgit2."""

_CONFIG, _HOSTS, _CREDENTIALS = ".gitconfig", ".ssh/known_hosts", "credentials"
ACCESS_FILES = tuple(f"{ACCESS}/{name}" for name in (_CONFIG, _HOSTS, _CREDENTIALS))

AGENT = "/dev/shm/guix-tasks-agent"  # noqa: S108 -- inside the container, and never committed

_BY_SSH = re.compile(r'(?:git\+)?ssh://[^"\s]+|[\w.-]+@[\w.-]+:[^"\s]+', re.ASCII)
"""An SSH URL or an address in the form of scp."""


@dataclass(frozen=True)
class Access:
    """Files in ``container.WORK_DIRECTORY`` and mounts that let a work container fetch channels."""

    files: Mapping[str, bytes]
    binds: tuple[str, ...] = ()


def programs() -> dict[str, bytes]:
    """Return the ``guix`` wrapper that reads ``ACCESS``; it is the same for all settings."""
    return {
        "bin/guix": (RESOURCES / "guix.sh").read_bytes(),
        "fetch.scm": (RESOURCES / "fetch.scm").read_bytes(),
    }


def access_files(settings: Settings, channels: str) -> dict[str, bytes]:
    """Return the files of ``ACCESS`` for a channels file; none if Guix needs none of them.

    Raise ``UsageError`` if a channel is fetched by SSH and there are no known hosts.
    """
    credentials = settings.guix_channel_credentials
    known_hosts = _known_hosts(settings) if by_ssh(settings, channels) else b""
    if not (credentials or known_hosts or settings.guix_channel_mirrors or settings.proxies):
        return {}
    # Any user may own the repository of a file:// URL: trust comes from signed commits.
    lines = ["[include]", "\tpath = /root/.gitconfig", "[safe]", "\tdirectory = *"]
    for url, mirror in settings.guix_channel_mirrors.items():
        lines += [f'[url "{mirror}"]', f"\tinsteadOf = {url}"]
    files = {_CONFIG: "\n".join([*lines, ""]).encode()}
    if known_hosts:
        files[_HOSTS] = known_hosts
    if credentials:
        # A JSON string is a valid Guile string.
        rows = ([json.dumps(word, ensure_ascii=False) for word in row]
                for row in channel_credentials(credentials.reveal()))  # fmt: skip
        files[_CREDENTIALS] = "".join(
            ["(", *(f"({' '.join(row)})\n" for row in rows), ")\n"]
        ).encode()
    return {f"{ACCESS}/{name}": content for name, content in files.items()}


def by_ssh(settings: Settings, channels: str) -> str:
    """Return the first SSH URL of a channels file, after ``GUIX_CHANNEL_MIRRORS``, or ""."""
    # Any string literal counts, because a channels file can compute its channels.
    urls = re.findall(r'"((?:[a-z+]+://|[\w.-]+@[\w.-]+:)[^"\s]+)"', channels)
    return next(filter(_BY_SSH.fullmatch, (mirrored(settings, url) for url in urls)), "")


def mirrored(settings: Settings, url: str) -> str:
    """Replace the longest prefix of a URL that has a mirror, as Git does."""
    mirrors = settings.guix_channel_mirrors
    for prefix in sorted(mirrors, key=len, reverse=True):
        if url.startswith(prefix):
            return mirrors[prefix] + url.removeprefix(prefix)
    return url


def _known_hosts(settings: Settings) -> bytes:
    path = settings.ssh_known_hosts or user_home() / ".ssh" / "known_hosts"
    try:
        return read_file(path)
    except OSError as error:
        raise UsageError(
            f"SSH_KNOWN_HOSTS: {path}: {error.strerror}; SSH fetches channels only from known "
            "hosts: specify a file written by `ssh-keyscan` whose keys you have verified"
        ) from None


@contextmanager
def grant_access(engine: Engine, settings: Settings, channels: str | None) -> Iterator[Access]:
    """Yield the access that a work container needs to fetch the channels of a channels file.

    It ends with the block. ``channels`` is None for a stage that fetches none.

    Raise ``UsageError`` if a channel cannot be fetched.
    """
    if channels is None:
        yield Access({})
        return
    files = {**programs(), **access_files(settings, channels)}
    if not (url := by_ssh(settings, channels)):
        yield Access(files)
        return
    agent = agent_socket(settings, url)
    if not engine.info().is_local:
        raise UsageError(
            f"the engine at {engine.info().url} is on another machine and cannot use your SSH "
            f"agent for {without_user(url)}; use an https URL with GUIX_CHANNEL_CREDENTIALS, "
            "`inv buildx.build`, or a local engine"
        )
    with _agent_relay(agent) as path:
        yield Access(files, (f"{path}:{AGENT}",))


def without_user(url: str) -> str:
    """Remove the account from a URL, because it may contain a token."""
    return re.sub(r"//[^/@]*@", "//", url)


def agent_socket(settings: Settings, url: str) -> Path:
    """Return the socket of the user's SSH agent. Raise ``UsageError`` if there is none."""
    agent = settings.ssh_agent
    if agent is None or not agent.is_socket():
        raise UsageError(
            f"cannot fetch {without_user(url)} by SSH: SSH_AUTH_SOCK is not the socket of an SSH "
            'agent; start an agent and add your key: `eval "$(ssh-agent)" && ssh-add`'
        )
    return agent


_LIST, _SIGN = 11, 13
"""Requests of the agent protocol that the relay passes on."""

_FAILURE = b"\0\0\0\1\5"
"""Answer of the agent protocol to all other requests."""


@contextmanager
def _agent_relay(agent: Path) -> Iterator[Path]:
    """Yield a socket on which an SSH agent lists its keys and signs, and does nothing else.

    Every user of the container can open it, whatever user the container runs as. On this machine
    the directory of the socket is closed to other users.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with (
                socket.socket(socket.AF_UNIX) as connection,
                connection.makefile("rb") as responses,
            ):
                connection.connect(str(agent))
                while request := _read_message(self.rfile):
                    response = _FAILURE
                    if request[4] in (_LIST, _SIGN):
                        connection.sendall(request)
                        response = _read_message(responses)
                    self.wfile.write(response)

    with temporary_directory() as directory:
        path = directory / "agent"
        if len(os.fsencode(path)) > LONGEST_SOCKET:
            raise UsageError(
                f"the socket {path}, which passes on the SSH agent, would have a path longer than "
                f"{LONGEST_SOCKET} bytes; set TMPDIR to a shorter one"
            )
        with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
            server.daemon_threads = True
            path.chmod(0o666)
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            try:
                yield path
            finally:
                server.shutdown()


_MAX_MESSAGE = 256 << 10
"""Maximum bytes of a message, as in OpenSSH's agent."""


def _read_message(stream: BufferedIOBase) -> bytes:
    """Read a message with its length; return nothing at the end or if the length is invalid."""
    head = stream.read(4)
    size = int.from_bytes(head, "big") if len(head) == 4 else 0  # noqa: PLR2004
    body = stream.read(size) if 0 < size <= _MAX_MESSAGE else b""
    return head + body if size == len(body) > 0 else b""
