"""A rootless Docker Engine for tests: the programs of the private engine, run by another user.

Rootlesskit and slirp4netns come from Debian's packages. The engine has its own user, mount and
network namespaces, so its ``localhost`` is not that of this machine. This machine reaches the ports
that its containers publish.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from isolated_host import link_or_copy
from podman_service import unpack_packages

from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.apt import host_suite
from guix_tasks.bootstrap.engine import SUITE, answers

if TYPE_CHECKING:
    from collections.abc import Iterator

USER = 65534
"""The user nobody, which owns no files."""

START = """
set -e
top=$1 programs=$2 run=$3 user=$4
# Make the packages look installed to this process and its children.
mount -t overlay -o "lowerdir=$top/etc:/etc" none /etc
mount -t overlay -o "lowerdir=$top/usr:/usr" none /usr
# Only root may be able to open the device of this machine.
mount -t tmpfs none /dev/net
mknod -m 666 /dev/net/tun c 10 200
exec setpriv --reuid="$user" --regid="$user" --clear-groups env -i \
  HOME="$run" XDG_RUNTIME_DIR="$run" PATH="$programs/usr/bin:$programs/usr/sbin:$PATH" \
  rootlesskit --state-dir="$run/rootlesskit" --net=slirp4netns --mtu=65520 \
    --port-driver=builtin --disable-host-loopback \
    --slirp4netns-sandbox=false --slirp4netns-seccomp=false \
    --copy-up=/etc --copy-up=/run --propagation=rslave \
    sh -c 'rm -f /run/docker /run/containerd && exec "$@"' sh \
    dockerd --rootless --host="unix://$run/docker.sock" --data-root="$run/data" \
      --exec-root="$run/exec" --pidfile="$run/docker.pid" --iptables=false --ip6tables=false
"""


@contextmanager
def run_rootless_docker(programs: Path) -> Iterator[str]:
    """Run a rootless engine from the programs of the private engine, and yield its URL."""
    suite = host_suite()
    names = (f"rootlesskit/{SUITE}", f"slirp4netns/{suite}", f"uidmap/{suite}")
    packages = unpack_packages("rootless", names, [SUITE])
    with tempfile.TemporaryDirectory(prefix="rootless-") as name:
        # The programs are in the home directory of root, which the user cannot read.
        directory = Path(name)
        directory.chmod(0o755)
        sources = {"packages": packages, "programs": programs}
        for target, source in sources.items():
            shutil.copytree(source, directory / target, symlinks=True, copy_function=link_or_copy)
        for table in ("subuid", "subgid"):
            (directory / "packages" / "etc").mkdir(exist_ok=True)
            (directory / "packages" / "etc" / table).write_text(f"{USER}:100000:65536\n")
        run = directory / "run"
        run.mkdir(mode=0o700)
        os.chown(run, USER, USER)
        arguments = [directory / "packages", directory / "programs", run, USER]
        with (directory / "log").open("wb") as output:
            process = subprocess.Popen(
                ["unshare", "--mount", "--propagation=private", "--", "sh", "-c", START, "sh",
                 *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            log = (directory / "log").read_text
            assert service.wait_until(lambda: answers(run / "docker.sock"), 60), log()
            yield f"unix://{run}/docker.sock"
        finally:
            # Rootlesskit stops its engine, and the last process removes the mount namespace.
            process.terminate()
            process.wait(timeout=60)
