"""A Podman service for tests: Debian's package, unpacked, with its own directory of images."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guix_tasks import files
from guix_tasks.bootstrap import service as service_module
from guix_tasks.bootstrap.apt import Apt, host_suite
from guix_tasks.bootstrap.engine import answers
from guix_tasks.cli.session import helpers
from guix_tasks.engine.discovery import Address
from guix_tasks.engine.podman import PodmanEngine, open_engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PACKAGES = ("podman", "buildah", "skopeo", "runc", "catatonit", "netavark", "openssh-server")

STATUS = Path("/var/lib/dpkg/status")

START = """
set -e
# Make the packages look installed to this process and its children.
mount -t overlay -o "lowerdir=$1/etc:/etc" none /etc
mount -t overlay -o "lowerdir=$1/usr:/usr" none /usr
shift
exec "$@"
"""

CONFIGURATION = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{directory}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{directory}/networks"
"""

STORAGE = """
[storage]
driver = "overlay"
graphroot = "{directory}/images"
runroot = "{directory}/run"
"""


REGISTRIES = """
[[registry]]
location = "{registry}"
insecure = true
"""


def unpack_packages(
    name: str = "containers", packages: Sequence[str] = PACKAGES, suites: Sequence[str] = ()
) -> Path:
    """Unpack packages and their dependencies to a cached directory, and return it.

    ``suites`` are the suites of packages ``NAME/SUITE``, in addition to that of this machine.
    Skip the test if this machine is not Debian or the user is not root.
    """
    suite = host_suite()
    if os.geteuid() != 0 or suite is None:
        pytest.skip(f"{name}: only root on Debian can unpack and run the packages")
    root = files.cache_home() / "tests" / f"{name}-{suite}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        apt = Apt(list(dict.fromkeys((suite, *suites))), status=STATUS)
        apt.unpack(packages, root, closure=True)
    return root


def write_skopeo(directory: Path) -> None:
    """Write a program ``skopeo`` that runs the unpacked one without a mount namespace."""
    root = unpack_packages()
    directory.mkdir(exist_ok=True)
    program = directory / "skopeo"
    program.write_text(
        f"#!/bin/sh\nLD_LIBRARY_PATH=$(echo {root}/usr/lib/*-linux-gnu) "
        f'exec {root}/usr/bin/skopeo "$@"\n'
    )
    program.chmod(0o755)


def overlay_argv(root: Path, *argv: str) -> list[str]:
    """Return a command in a mount namespace in which unpacked packages look installed."""
    unshare = ("unshare", "--mount", "--propagation=private", "--", "sh", "-c", START, "sh")
    return [*unshare, str(root), *argv]


@dataclass(frozen=True)
class PodmanService:
    """``podman system service`` on a socket."""

    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def socket(self) -> Path:
        return _socket(self.directory)

    def client(self) -> PodmanEngine:
        """Return a client of the service."""
        engine = open_engine(Address(self.url, "test"), helpers({}))
        assert isinstance(engine, PodmanEngine)
        return engine


@contextmanager
def run_podman(registry: str) -> Iterator[PodmanService]:
    """Run a Podman service while the block runs, and remove its containers and images.

    It pulls from ``registry`` without TLS.
    """
    root = unpack_packages()
    # The path of a socket must be short, so this directory is not in that of pytest.
    directory = Path(tempfile.mkdtemp(prefix="podman-"))
    (directory / "registries.conf").write_text(REGISTRIES.format(registry=registry))
    podman = PodmanService(directory, _start(root, directory))
    try:
        log = directory / "log"
        assert service_module.wait_until(lambda: answers(podman.socket), 30), log.read_text()
        yield podman
        client = podman.client()
        for container in client.containers({}):
            client.remove(container.id)
    finally:
        # The mounts are in a namespace, which the last process in it removes.
        podman.process.terminate()
        podman.process.wait(timeout=30)
        shutil.rmtree(directory)


def write_configuration(directory: Path) -> dict[str, str]:
    """Write the configuration files of Podman and Buildah, and return the environment for them."""
    files = {
        "CONTAINERS_CONF": CONFIGURATION.format(files=_file_limit(), directory=directory),
        "CONTAINERS_STORAGE_CONF": STORAGE.format(directory=directory),
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    return {"HOME": str(directory), **{name: str(directory / name) for name in files}}


def _socket(directory: Path) -> Path:
    return directory / "podman.sock"


def _start(root: Path, directory: Path) -> subprocess.Popen[bytes]:
    serve = ("system", "service", "--time=0", f"unix://{_socket(directory)}")
    environment = {
        "PATH": os.environ["PATH"],
        "CONTAINERS_REGISTRIES_CONF": str(directory / "registries.conf"),
        **write_configuration(directory),
    }
    with (directory / "log").open("wb") as output:
        return subprocess.Popen(
            overlay_argv(root, "podman", *serve),
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip


def _file_limit() -> int:
    """Return the limit of open files on this machine; the default of Podman can exceed it."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 16 if limit == resource.RLIM_INFINITY else limit
