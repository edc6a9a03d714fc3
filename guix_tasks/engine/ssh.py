"""Connections to an engine at an ``ssh://`` address, with the ssh program.

The docker command line connects in the same way. Each connection is an ssh process with a socket
as both standard input and output. ssh runs in batch mode: there may be no user at the terminal,
and a prompt would look like an engine that hangs.
"""

from __future__ import annotations

import re
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import docker.transport
import docker.transport.unixconn

from guix_tasks.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SECONDS = 30
"""Timeout of a new connection."""

_HINTS = {
    "Host key verification failed": "this machine does not know the host's key: run `{ssh}` once "
    "to see and accept it",
    "permission denied while": "the remote user may not use the engine: add the user to the group "
    "that owns its socket",
    "Permission denied": "ssh cannot log in without a prompt: use a key in the agent or without a "
    "passphrase, and add it to authorized_keys on the host",
    "not found": "the docker command is missing on the host, or not on the PATH of `{ssh}`: "
    "install it there",
    "Could not resolve": "fix the host's name",
    "Connection refused": "nothing answers there: start sshd, or fix the host and the port",
    "timed out": "nothing answers there: fix the host and the port, or the network",
    "no such file or directory": "no engine listens there: start it",
    "Cannot connect to the Docker daemon": "start it on the host",
}
"""Hints, by words in the messages of ssh and of the remote docker command."""


@dataclass
class Ssh:
    """An address ``ssh://[USER@]HOST[:PORT][/SOCKET]`` and the messages of its ssh processes."""

    url: str
    _log: IO[bytes] = field(default_factory=tempfile.TemporaryFile, repr=False)

    def connect(self) -> socket.socket:
        """Return a new connection to the engine.

        Raise ``EngineError`` if ssh is not installed or the address is invalid.
        """
        connection, ssh_end = socket.socketpair()
        with ssh_end:
            try:
                # A new session protects ssh from Ctrl-C: cleanup still needs the engine.
                subprocess.Popen(
                    ["ssh", *ssh_arguments(self.url)],
                    stdin=ssh_end.fileno(), stdout=ssh_end.fileno(), stderr=self._log,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                connection.close()
                raise EngineError(
                    f"{self.url} needs the program ssh: {error.strerror}; install openssh-client"
                ) from None
        return connection

    def error_line(self) -> str:
        """Return the error of ssh with a hint; empty if ssh printed nothing."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip() and "Warning:" not in line]
        hints = ((line, hint) for words, hint in _HINTS.items() for line in lines if words in line)
        line, hint = next(hints, (lines[-1] if lines else "", ""))
        return f"{line}; {hint.format(ssh=ssh_command(self.url))}" if hint else line


def ssh_command(url: str) -> str:
    """Return the ssh command that a user runs for an address."""
    parts = urlsplit(url)
    port = f"-p {parts.port} " if parts.port else ""
    return f"ssh {port}{parts.netloc.partition(':')[0]}"


def ssh_arguments(url: str) -> Sequence[str]:
    """Return the arguments of ssh for an address.

    Raise ``EngineError`` if the address is invalid.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _address_error(url, str(error)) from None
    if not host:
        raise _address_error(url, "it has no host")
    if parts.password is not None:
        url = url.replace(f":{parts.password}@", ":...@")
        raise _address_error(url, "it cannot contain a password")
    if parts.query or parts.fragment:
        raise _address_error(url, "nothing may follow the path")
    if not re.fullmatch(r"[\w./+@%-]*", parts.path):
        raise _address_error(url, "its path is not a valid path of a socket")
    host_option = f" --host=unix://{parts.path}" if parts.path.strip("/") else ""
    return (
        "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SECONDS}", "-T",
        *(["-l", parts.username] if parts.username else []),
        *(["-p", str(port)] if port else []),
        "--", host, f"docker{host_option} system dial-stdio",
    )  # fmt: skip


def _address_error(url: str, reason: str) -> EngineError:
    return EngineError(f"DOCKER_HOST: {url}: {reason}; write ssh://[USER@]HOST[:PORT]")


class SshAdapter(docker.transport.UnixHTTPAdapter):
    """HTTP adapter for an engine over SSH; the protocol is the same as on a Unix socket."""

    def __init__(self, ssh: Ssh, timeout: int) -> None:
        super().__init__("http+unix:///ssh", timeout)
        self._ssh = ssh

    def get_connection(self, url: str | bytes, proxies: Any = None) -> Any:  # noqa: ARG002
        pool = self.pools.get(url)
        if pool is None:
            pool = self.pools[url] = _SshPool(str(url), self.socket_path, self.timeout)
            pool.ssh = self._ssh
        return pool


class _SshPool(docker.transport.unixconn.UnixHTTPConnectionPool):
    ssh: Ssh

    def _new_conn(self) -> Any:
        connection = _SshConnection(self.base_url, self.socket_path, cast("int", self.timeout))
        connection.ssh = self.ssh
        return connection


class _SshConnection(docker.transport.unixconn.UnixHTTPConnection):
    ssh: Ssh

    def connect(self) -> None:
        self.sock = self.ssh.connect()
        self.sock.settimeout(self.timeout)
