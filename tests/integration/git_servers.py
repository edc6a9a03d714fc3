"""Servers of channels: Git over HTTPS with a token, Git over SSH, and a proxy.

Git, sshd and an SSH agent run in a container on the loopback interface of the engine's machine.
The test process serves HTTPS and the proxy.
"""

from __future__ import annotations

import base64
import select
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import token_hex
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from harness import free_port, wait_until

from guix_tasks import files
from guix_tasks.bootstrap.apt import Apt
from guix_tasks.bootstrap.base_image import BASE_TAG, SUITE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness import Docker

PACKAGES = (
    "git", "libedit2", "libwrap0", "libwtmpdb0", "openssh-client", "openssh-common",
    "openssh-server",
)  # fmt: skip

SERVE = """
    cp -r /programs/usr/bin /programs/usr/sbin /programs/usr/lib /usr/
    mkdir -p /run/sshd /root/.ssh
    echo 'sshd:x:990:65534::/run/sshd:/usr/sbin/nologin' >>/etc/passwd
    cd /shared
    for key in user host; do ssh-keygen -q -t ed25519 -N '' -f $key; done
    cp user.pub /root/.ssh/authorized_keys
    echo "[localhost]:$PORT $(cut -d ' ' -f 1,2 host.pub)" >known_hosts
    new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
    openssl req -x509 $new -keyout ca.key -out ca.pem -subj /CN=tests -days 2 \
        -addext basicConstraints=critical,CA:TRUE
    openssl req $new -keyout server.key -out server.csr -subj /CN=localhost
    echo 'subjectAltName=DNS:localhost,DNS:forge.test' >names
    openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -days 2 -extfile names -out server.pem
    for name in agent empty; do ssh-agent -a /shared/$name >/dev/null; done
    SSH_AUTH_SOCK=/shared/agent ssh-add -q user
    git config --global safe.directory '*'
    /usr/sbin/sshd -f /dev/null -p $PORT -h /shared/host -o ListenAddress=127.0.0.1 -o PidFile=none
    chmod -R a+rX .
    touch ready
    exec sleep 3600
"""


@dataclass
class GitServers:
    """The servers and their requests."""

    docker: Docker
    directory: Path
    ssh_port: int
    container: str
    token: str = ""
    https_port: int = 0
    proxy_port: int = 0
    substitutes: Path | None = None
    proxy_requests: list[str] = field(default_factory=list)
    accounts: set[str] = field(default_factory=set)
    """The accounts that the Git server received."""

    def git(self, *arguments: str, text: bytes = b"") -> bytes:
        argv = self.docker.argv("exec", "--interactive", self.container, "git", *arguments)
        return subprocess.run(argv, input=text, capture_output=True, check=True).stdout

    @property
    def https(self) -> str:
        return f"https://localhost:{self.https_port}"

    @property
    def ssh(self) -> str:
        return f"ssh://root@localhost:{self.ssh_port}"

    def file(self, name: str) -> str:
        return str(self.directory / name)


@contextmanager
def run_git_servers(docker: Docker, offline: Path, directory: Path) -> Iterator[GitServers]:
    programs = files.cache_home() / "tests" / "git-servers"
    if not programs.exists():
        programs.parent.mkdir(parents=True, exist_ok=True)
        Apt([SUITE]).unpack(PACKAGES, programs)
    name, port = f"guix-tasks-test-{token_hex(6)}", free_port()
    servers = GitServers(docker, directory, port, name, substitutes=offline / "substitutes")
    docker.ok(
        "run", "--detach", "--init", f"--name={name}", "--network=host", f"--env=PORT={port}",
        f"--volume={programs}:/programs:ro", f"--volume={directory}:/shared",
        f"--volume={offline}:/offline:ro", "--entrypoint=sh", BASE_TAG, "-euc", SERVE,
    )  # fmt: skip
    try:
        wait_until((directory / "ready").exists, "the Git servers are ready", 60)
        with _serve(_git_handler(servers)) as https, _serve(_proxy_handler(servers)) as proxy:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(servers.file("server.pem"), servers.file("server.key"))
            https.socket = context.wrap_socket(https.socket, server_side=True)
            servers.https_port, servers.proxy_port = https.server_port, proxy.server_port
            yield servers
    finally:
        docker.ok("rm", "--force", "--volumes", name)


@contextmanager
def _serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def _git_handler(servers: GitServers) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """The smart protocol (gitprotocol-http(5)), for clients with the token."""

        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            header = self.headers.get("Authorization", "").removeprefix("Basic ")
            account = base64.b64decode(header).decode()
            servers.accounts.add(account)
            length = int(self.headers.get("Content-Length") or 0)
            text = self.rfile.read(length) if length else self._chunks()
            if servers.token and servers.token not in account:
                self._answer(401, "text/plain", b"")
                return
            repository = urlsplit(self.path).path.rpartition("/info/refs")[0]
            if repository:
                refs = servers.git("upload-pack", "--stateless-rpc", "--advertise-refs", repository)
                refs = b"001e# service=git-upload-pack\n0000" + refs
                self._answer(200, "application/x-git-upload-pack-advertisement", refs)
            else:
                repository = self.path.removesuffix("/git-upload-pack")
                result = servers.git("upload-pack", "--stateless-rpc", repository, text=text)
                self._answer(200, "application/x-git-upload-pack-result", result)

        do_POST = do_GET  # noqa: N815 -- the base class's names

        def _chunks(self) -> bytes:
            text = b""
            while self.headers.get("Transfer-Encoding") == "chunked":
                size = int(self.rfile.readline(), 16)
                text += self.rfile.read(size)
                self.rfile.readline()
                if not size:
                    break
            return text

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            if status == 401:
                self.send_header("WWW-Authenticate", 'Basic realm="tests"')
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    return Handler


def _proxy_handler(servers: GitServers) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Connect all HTTPS hosts to the Git server, and answer HTTP from the substitutes."""

        def do_CONNECT(self) -> None:
            servers.proxy_requests.append(f"CONNECT {self.path}")
            with socket.create_connection(("127.0.0.1", servers.https_port)) as upstream:
                self.send_response(200)
                self.end_headers()
                pair = [self.connection, upstream]
                while True:
                    for ready in select.select(pair, [], [])[0]:
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        pair[ready is self.connection].sendall(data)

        def do_GET(self) -> None:
            servers.proxy_requests.append(f"GET {self.path}")
            assert servers.substitutes
            path = servers.substitutes / urlsplit(self.path).path.lstrip("/")
            exists = path.is_file()
            body = path.read_bytes() if exists else b""
            self.send_response(200 if exists else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    return Handler
