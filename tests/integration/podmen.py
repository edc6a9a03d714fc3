"""A Podman of the tests' own: Debian's package, unpacked, with its images in a directory apart."""

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
# As if they were installed, for this process and what it starts.
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


def unpacked(
    name: str = "containers", packages: Sequence[str] = PACKAGES, suites: Sequence[str] = ()
) -> Path:
    """Unpack packages and their dependencies to a cached directory, and return it.

    ``suites`` are those of packages ``NAME/SUITE``, in addition to the suite of this machine.
    Skip the test if this machine is not Debian or the user is not root.
    """
    own = host_suite()
    if os.geteuid() != 0 or own is None:
        pytest.skip(f"{name}: only root on Debian can unpack and run the packages")
    root = files.cache_home() / "tests" / f"{name}-{own}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        apt = Apt(list(dict.fromkeys((own, *suites))), status=STATUS)
        apt.unpack(packages, root, closure=True)
    return root


def as_installed(root: Path, *argv: str) -> list[str]:
    """A command in mounts of its own, where unpacked packages look as if they were installed."""
    apart = ("unshare", "--mount", "--propagation=private", "--", "sh", "-c", START, "sh")
    return [*apart, str(root), *argv]


@dataclass(frozen=True)
class Podman:
    """``podman system service`` on a socket, and the command line beside it."""

    directory: Path
    service: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def socket(self) -> Path:
        return _socket(self.directory)

    def client(self) -> PodmanEngine:
        """It, as the product speaks to it."""
        engine = open_engine(Address(self.url, "test"), helpers({}))
        assert isinstance(engine, PodmanEngine)
        return engine


@contextmanager
def served() -> Iterator[Podman]:
    """A Podman that answers while the block runs, and leaves nothing."""
    root = unpacked()
    # Not in pytest's directory: the path of a socket has to be short.
    directory = Path(tempfile.mkdtemp(prefix="podman-"))
    podman = Podman(directory, _started(root, directory))
    try:
        log = directory / "log"
        assert service_module.wait_until(lambda: answers(podman.socket), 30), log.read_text()
        yield podman
        client = podman.client()
        for container in client.containers({}):
            client.remove(container.id)
    finally:
        # Its mounts are in a place of their own, and go with the last process there.
        podman.service.terminate()
        podman.service.wait(timeout=30)
        shutil.rmtree(directory)


def write_configuration(directory: Path) -> dict[str, str]:
    """Write the configuration of Podman and Buildah; the variables that name its files."""
    files = {
        "CONTAINERS_CONF": CONFIGURATION.format(files=_most_files(), directory=directory),
        "CONTAINERS_STORAGE_CONF": STORAGE.format(directory=directory),
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    return {"HOME": str(directory), **{name: str(directory / name) for name in files}}


def _socket(directory: Path) -> Path:
    return directory / "podman.sock"


def _started(root: Path, directory: Path) -> subprocess.Popen[bytes]:
    serve = ("system", "service", "--time=0", f"unix://{_socket(directory)}")
    environment = {"PATH": os.environ["PATH"], **write_configuration(directory)}
    with (directory / "log").open("wb") as output:
        return subprocess.Popen(
            as_installed(root, "podman", *serve),
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip


def _most_files() -> int:
    """The open files that a container may have here: Podman asks for more, and is refused."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 16 if most == resource.RLIM_INFINITY else most
