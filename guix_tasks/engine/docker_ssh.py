"""Client of the docker SDK without Docker's config.json, which can connect with the ssh program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import docker
import docker.auth
import docker.transport
import docker.transport.unixconn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guix_tasks.engine.ssh import Ssh


class Client(docker.APIClient):
    """SDK client that does not read Docker's config.json.

    Accounts come from ``set_accounts``, so that a broken config.json is not an error. With ``ssh``,
    the connection is made over SSH; the SDK's SSH support needs paramiko even if it runs ssh.
    """

    def __init__(self, base_url: str, timeout: int, ssh: Ssh | None = None, **options: Any) -> None:
        self._ssh_adapter = _SshAdapter(ssh, timeout) if ssh else None
        # Over SSH, the protocol is the same as on a Unix socket.
        super().__init__("unix:///ssh" if ssh else base_url, timeout=timeout, **options)
        self.set_accounts({})

    def get_adapter(self, url: str) -> Any:
        return self._ssh_adapter or super().get_adapter(url)

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


class _SshAdapter(docker.transport.UnixHTTPAdapter):
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
