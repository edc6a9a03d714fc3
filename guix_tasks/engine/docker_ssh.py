"""Client of the docker SDK that connects with the ssh program.

The SDK's SSH support needs paramiko even if it runs the ssh program.
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
    """SDK client that does not read Docker's config.json.

    Accounts come from ``set_accounts``, so that a broken config.json is not an error.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.set_accounts({})

    @property
    def _general_configs(self) -> dict[str, Any]:
        return {"auths": {}}  # an empty dictionary would let the SDK read the file

    @_general_configs.setter
    def _general_configs(self, _: object) -> None: ...

    def set_accounts(self, accounts: Mapping[str, Any]) -> None:
        """Set the accounts of a build, by ``docker_key`` of their hosts."""
        self._auth_configs = _Accounts({"auths": dict(accounts)})


class _Accounts(docker.auth.AuthConfig):
    is_empty = False  # True would let the SDK read the file


def client_over_ssh(ssh: Ssh, timeout: int, version: str) -> Client:
    """Return a client that connects over SSH.

    ``timeout`` is in seconds. ``version`` is an API version, or ``auto`` for the engine's.
    """
    adapter = _SshAdapter(ssh, timeout)

    def client(version: str) -> Client:
        client = Client(base_url="unix:///ssh", timeout=timeout, version=version)
        client.mount("http+docker://", adapter)
        return client

    if version == "auto":
        oldest = client(docker.constants.MINIMUM_DOCKER_API_VERSION)
        version = oldest.version(api_version=False)["ApiVersion"]
    return client(version)


class _SshAdapter(docker.transport.UnixHTTPAdapter):
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
