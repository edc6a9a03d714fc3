"""The way to an engine by ``ssh://``: the user's own ssh client, as the docker command takes it.

Each connection is a client whose standard input and output are one socket.  It never asks for
anything: nobody may sit before the terminal, and a question would look like an engine that hangs.
"""

from __future__ import annotations

import re
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SECONDS = 30
"""How long a connection may take to be made."""

_MENDS = {
    "Host key verification failed": "its key is not known here: `{ssh}` once by hand shows "
    "it, and remembers it",
    "permission denied while": "the user there may not use that engine: put them into the group "
    "that owns its socket",
    "Permission denied": "ssh lets nobody in without a question: give it a key, in the agent or "
    "without a passphrase, that is in authorized_keys there",
    "not found": "the docker command is not there, or not on the PATH of `{ssh}`: install it there",
    "Could not resolve": "mend the host's name",
    "Connection refused": "nothing answers there: start sshd, or mend the host and the port",
    "timed out": "nothing answers there: mend the host and the port, or the network",
    "no such file or directory": "no engine is there: start it",
    "Cannot connect to the Docker daemon": "start it there",
}
"""What mends a fault, by words of what ssh, or the docker command there, says of it."""


@dataclass
class Ssh:
    """An address ``ssh://[USER@]HOST[:PORT][/SOCKET]``, and what was said on the way to it."""

    url: str
    _log: IO[bytes] = field(default_factory=tempfile.TemporaryFile, repr=False)

    def connect(self) -> socket.socket:
        """A connection to the engine there.  Raises ``EngineError`` where there is no ssh here."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # In a session of its own: Ctrl-C is for us, who then still need the engine.
                subprocess.Popen(
                    ["ssh", *arguments(self.url)],
                    stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=self._log,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise EngineError(
                    f"{self.url} needs the program ssh: {error.strerror}; install openssh-client"
                ) from None
        return ours

    def complaint(self) -> str:
        """Why there is no connection, and what mends it; empty where nothing was said."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip() and "Warning:" not in line]
        told = ((line, mend) for words, mend in _MENDS.items() for line in lines if words in line)
        line, mend = next(told, (lines[-1] if lines else "", ""))
        return f"{line}; {mend.format(ssh=by_hand(self.url))}" if mend else line


def by_hand(url: str) -> str:
    """How somebody calls ssh for an address."""
    parts = urlsplit(url)
    port = f"-p {parts.port} " if parts.port else ""
    return f"ssh {port}{parts.netloc.partition(':')[0]}"


def arguments(url: str) -> Sequence[str]:
    """What ssh is called with.  Raises ``EngineError`` where the address is none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _wrong(url, str(error)) from None
    if not host:
        raise _wrong(url, "it names no host")
    if parts.password is not None:
        raise _wrong(url.replace(f":{parts.password}@", ":...@"), "a password cannot be in it")
    if parts.query or parts.fragment:
        raise _wrong(url, "nothing may follow the path")
    if not re.fullmatch(r"[\w./+@%-]*", parts.path):
        raise _wrong(url, "its path cannot be that of a socket")
    there = f" --host=unix://{parts.path}" if parts.path.strip("/") else ""
    return (
        "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SECONDS}", "-T",
        *(["-l", parts.username] if parts.username else []),
        *(["-p", str(port)] if port else []),
        "--", host, f"docker{there} system dial-stdio",
    )  # fmt: skip


def _wrong(url: str, why: str) -> EngineError:
    return EngineError(f"DOCKER_HOST: {url}: {why}; it is to be ssh://[USER@]HOST[:PORT]")
