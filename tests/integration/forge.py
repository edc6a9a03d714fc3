"""Where channels are: a Git server by HTTPS that wants a token, one by SSH, and a proxy.

Git, sshd and an SSH agent run in a container on the loopback of the engine's machine; HTTPS and the
proxy are the test's own.
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

from harness import eventually, free_port

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
class Forge:
    """The servers, and what was asked of them."""

    docker: Docker
    directory: Path
    ssh_port: int
    container: str
    token: str = ""
    https_port: int = 0
    proxy_port: int = 0
    substitutes: Path | None = None
    asked: list[str] = field(default_factory=list)
    """What came to the proxy."""
    shown: set[str] = field(default_factory=set)
    """The accounts that came to the Git server."""

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
def serving(docker: Docker, offline: Path, directory: Path) -> Iterator[Forge]:
    programs = files.cache_home() / "tests" / "forge"
    if not programs.exists():
        programs.parent.mkdir(parents=True, exist_ok=True)
        Apt([SUITE]).unpack(PACKAGES, programs)
    name, port = f"guix-tasks-test-{token_hex(6)}", free_port()
    forge = Forge(docker, directory, port, name, substitutes=offline / "substitutes")
    docker.ok(
        "run", "--detach", "--init", f"--name={name}", "--network=host", f"--env=PORT={port}",
        f"--volume={programs}:/programs:ro", f"--volume={directory}:/shared",
        f"--volume={offline}:/offline:ro", "--entrypoint=sh", BASE_TAG, "-euc", SERVE,
    )  # fmt: skip
    try:
        eventually((directory / "ready").exists, "the Git servers are up", 60)
        with _listening(_git_server(forge)) as https, _listening(_proxy(forge)) as proxy:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(forge.file("server.pem"), forge.file("server.key"))
            https.socket = context.wrap_socket(https.socket, server_side=True)
            forge.https_port, forge.proxy_port = https.server_port, proxy.server_port
            yield forge
    finally:
        docker.ok("rm", "--force", "--volumes", name)


@contextmanager
def _listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def _git_server(forge: Forge) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """The smart protocol (gitprotocol-http(5)), for who has the token."""

        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            account = self.headers.get("Authorization", "").removeprefix("Basic ")
            forge.shown.add(base64.b64decode(account).decode())
            length = int(self.headers.get("Content-Length") or 0)
            text = self.rfile.read(length) if length else self._chunks()
            if forge.token and forge.token not in base64.b64decode(account).decode():
                self._answer(401, "text/plain", b"")
                return
            repository = urlsplit(self.path).path.rpartition("/info/refs")[0]
            if repository:
                said = forge.git("upload-pack", "--stateless-rpc", "--advertise-refs", repository)
                said = b"001e# service=git-upload-pack\n0000" + said
                self._answer(200, "application/x-git-upload-pack-advertisement", said)
            else:
                repository = self.path.removesuffix("/git-upload-pack")
                said = forge.git("upload-pack", "--stateless-rpc", repository, text=text)
                self._answer(200, "application/x-git-upload-pack-result", said)

        do_POST = do_GET  # noqa: N815 -- as the base class calls them

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


def _proxy(forge: Forge) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """To it ``forge.test`` is the Git server, and any other host the substitute server."""

        def do_CONNECT(self) -> None:
            forge.asked.append(f"CONNECT {self.path}")
            with socket.create_connection(("127.0.0.1", forge.https_port)) as there:
                self.send_response(200)
                self.end_headers()
                pair = [self.connection, there]
                while True:
                    for ready in select.select(pair, [], [])[0]:
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        pair[ready is self.connection].sendall(data)

        def do_GET(self) -> None:
            forge.asked.append(f"GET {self.path}")
            assert forge.substitutes
            path = forge.substitutes / urlsplit(self.path).path.lstrip("/")
            found = path.is_file()
            body = path.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    return Handler
