"""What a stage that fetches channels gets for it: accounts, an SSH agent, mirrors.

It is there for the time of the stage.  In the container it lies in memory; it is in no image, in
no key, and in no URL, since Guix keeps those in its caches and in what it says of the channels.
"""

from __future__ import annotations

import json
import re
import socket
import socketserver
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError
from guix_tasks.files import read_file, temporary_directory
from guix_tasks.settings.parsers import channel_credentials
from guix_tasks.stages.container import IMAGE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings

ACCESS = "access"
"""The folder below ``container.FOLDER`` that is a home for libgit2."""

_SETTINGS, _HOSTS, _CREDENTIALS = ".gitconfig", ".ssh/known_hosts", "credentials"
ACCESS_FILES = tuple(f"{ACCESS}/{name}" for name in (_SETTINGS, _HOSTS, _CREDENTIALS))

AGENT = "/dev/shm/guix-tasks-agent"  # noqa: S108 -- the container's own, and never committed

_BY_SSH = re.compile(r'"((?:git\+)?ssh://[^"\s]+|[\w.-]+@[\w.-]+:[^"\s]+)"', re.ASCII)
"""A URL, or an address as scp takes it, in a channels file."""


@dataclass(frozen=True)
class Access:
    """What a work container gets: files below ``container.FOLDER``, and mounts."""

    files: Mapping[str, bytes]
    binds: tuple[str, ...] = ()


def programs() -> dict[str, bytes]:
    """The ``guix`` that knows of ``ACCESS``, the same whatever is there."""
    return {
        "bin/guix": (IMAGE_FOLDER / "guix.sh").read_bytes(),
        "fetch.scm": (IMAGE_FOLDER / "fetch.scm").read_bytes(),
    }


def access_files(settings: Settings, channels: str) -> dict[str, bytes]:
    """The files of ``ACCESS`` for a channels file; none where Guix needs nothing of it.

    Raises ``UsageError`` where a channel is fetched by SSH, and no host is known.
    """
    given = settings.guix_channel_credentials
    known = _known_hosts(settings) if by_ssh(settings, channels) else b""
    if not (given or known or settings.guix_channel_mirrors or settings.proxies):
        return {}
    # Whoever a repository of a file:// URL belongs to: what is trusted is who signed commits.
    lines = ["[include]", "\tpath = /root/.gitconfig", "[safe]", "\tdirectory = *"]
    for url, mirror in settings.guix_channel_mirrors.items():
        lines += [f'[url "{mirror}"]', f"\tinsteadOf = {url}"]
    files = {_SETTINGS: "\n".join([*lines, ""]).encode()}
    if known:
        files[_HOSTS] = known
    if given:
        # What JSON writes as a text is one of Guile's, too.
        rows = ([json.dumps(word, ensure_ascii=False) for word in row]
                for row in channel_credentials(given.reveal()))  # fmt: skip
        files[_CREDENTIALS] = "".join(
            ["(", *(f"({' '.join(row)})\n" for row in rows), ")\n"]
        ).encode()
    return {f"{ACCESS}/{name}": content for name, content in files.items()}


def by_ssh(settings: Settings, channels: str) -> str:
    """The first URL in a channels file that is fetched by SSH, from a mirror if there is one."""
    found = (mirrored(settings, url) for url in _urls(channels))
    return next((url for url in found if _BY_SSH.fullmatch(f'"{url}"')), "")


def _urls(channels: str) -> list[str]:
    # Also where the file computes its channels.
    return re.findall(r'"((?:[a-z+]+://|[\w.-]+@[\w.-]+:)[^"\s]+)"', channels)


def mirrored(settings: Settings, url: str) -> str:
    """Where a URL is fetched from: of what it begins with, Git takes the longest."""
    mirrors = settings.guix_channel_mirrors
    for start in sorted(mirrors, key=len, reverse=True):
        if url.startswith(start):
            return mirrors[start] + url.removeprefix(start)
    return url


def _known_hosts(settings: Settings) -> bytes:
    path = settings.ssh_known_hosts or Path.home() / ".ssh" / "known_hosts"
    try:
        return read_file(path)
    except OSError as error:
        raise UsageError(
            f"SSH_KNOWN_HOSTS: {path}: {error.strerror}; channels are fetched by SSH from hosts "
            "that are known alone: name a file that `ssh-keyscan` wrote, and that you have checked"
        ) from None


@contextmanager
def lent_access(engine: Engine, settings: Settings, channels: str | None) -> Iterator[Access]:
    """What a work container needs to fetch the channels of a file, for the time of the block.

    None: it fetches none.  Raises ``UsageError`` where a channel cannot be fetched.
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
            f"the engine at {engine.info().url} is on another machine, and your SSH agent cannot "
            f"be lent to it for {_shown(url)}; use an https URL with GUIX_CHANNEL_CREDENTIALS, "
            "`inv buildx.build`, or a local engine"
        )
    with _relay(agent) as place:
        yield Access(files, (f"{place}:{AGENT}",))


def _shown(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def agent_socket(settings: Settings, url: str) -> Path:
    """The socket of the user's agent.  Raises ``UsageError`` where there is none."""
    agent = settings.ssh_agent
    if agent is None or not agent.is_socket():
        raise UsageError(
            f"{_shown(url)} is fetched by SSH, and SSH_AUTH_SOCK names no agent; start one and add "
            'your key: `eval "$(ssh-agent)" && ssh-add`'
        )
    return agent


_LIST, _SIGN = 11, 13
_REFUSED = b"\0\0\0\1\5"
"""Of the agent's protocol: what may be asked of it, and the answer to all else."""


@contextmanager
def _relay(agent: Path) -> Iterator[Path]:
    """A socket that leads to an agent, which may be listed and may sign, and no more.

    Every user of the container may open it, whoever the work container runs as; on this machine
    the folder that it is in is closed to others.
    """

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.socket(socket.AF_UNIX) as there:
                there.connect(str(agent))
                while asked := _message(self.request):
                    answer = _REFUSED
                    if asked[4] in (_LIST, _SIGN):
                        there.sendall(asked)
                        answer = _message(there)
                    self.request.sendall(answer)

    with temporary_directory() as folder:
        path = folder / "agent"
        with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
            server.daemon_threads = True
            path.chmod(0o666)
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            try:
                yield path
            finally:
                server.shutdown()


_LONGEST = 256 << 10
"""Bytes of a message, as OpenSSH's own agent has it."""


def _message(connection: socket.socket) -> bytes:
    """The next message with its length; empty at the end, and for what is none."""
    head = _exactly(connection, 4)
    size = struct.unpack(">I", head)[0] if head else 0
    body = _exactly(connection, size) if 0 < size <= _LONGEST else b""
    return head + body if body else b""


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            return b""
        data += piece
    return data
