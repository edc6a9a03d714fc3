"""The docker SDK's client by way of the user's own ssh.

The SDK's own way wants paramiko here, also for the user's ssh client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import docker
import docker.auth
import docker.constants
import docker.transport
import docker.transport.unixconn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guix_tasks.engine.ssh import Ssh


class Client(docker.APIClient):
    """The SDK's client without its own look into Docker's configuration.

    Accounts are handed to it, and a broken config.json is none of its business.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.give({})

    @property
    def _general_configs(self) -> dict[str, Any]:
        return {"auths": {}}  # an empty dictionary would let the SDK read the file

    @_general_configs.setter
    def _general_configs(self, _: object) -> None: ...

    def give(self, accounts: Mapping[str, Any]) -> None:
        """Set the accounts of a build, by the names that Docker's configuration has for hosts."""
        self._auth_configs = _Given({"auths": dict(accounts)})


class _Given(docker.auth.AuthConfig):
    is_empty = False  # else the SDK reads the file


def client_over_ssh(ssh: Ssh, timeout: int, version: str) -> Client:
    """A client with a ``timeout`` in seconds; ``auto`` is the version that the engine has."""
    way = _OverSsh(ssh, timeout)

    def client(version: str) -> Client:
        made = Client(base_url="unix:///ssh", timeout=timeout, version=version)
        made.mount("http+docker://", way)
        return made

    if version == "auto":
        oldest = client(docker.constants.MINIMUM_DOCKER_API_VERSION)
        version = oldest.version(api_version=False)["ApiVersion"]
    return client(version)


class _OverSsh(docker.transport.UnixHTTPAdapter):
    """What speaks HTTP with an engine by way of ssh, as with one on a socket of this machine."""

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
