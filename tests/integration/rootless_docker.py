"""A rootless Docker Engine of the tests' own: the private engine's programs, run by another user.

Rootlesskit and slirp4netns come from Debian's packages. The engine has its own user, mount and
network namespace, so its ``localhost`` is not that of this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from island import link
from podmen import unpacked

from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.apt import host_suite
from guix_tasks.bootstrap.engine import SUITE, answers

if TYPE_CHECKING:
    from collections.abc import Iterator

USER = 65534
"""The user nobody, who owns nothing."""

START = """
set -e
top=$1 programs=$2 run=$3 user=$4
# As if the packages were installed, for this process and what it starts.
mount -t overlay -o "lowerdir=$top/etc:/etc" none /etc
mount -t overlay -o "lowerdir=$top/usr:/usr" none /usr
# The device of this machine may be root's alone.
mount -t tmpfs none /dev/net
mknod -m 666 /dev/net/tun c 10 200
exec setpriv --reuid="$user" --regid="$user" --clear-groups env -i \
  HOME="$run" XDG_RUNTIME_DIR="$run" PATH="$programs/usr/bin:$programs/usr/sbin:$PATH" \
  rootlesskit --state-dir="$run/rootlesskit" --net=slirp4netns --mtu=65520 \
    --disable-host-loopback --slirp4netns-sandbox=false --slirp4netns-seccomp=false \
    --copy-up=/etc --copy-up=/run --propagation=rslave \
    sh -c 'rm -f /run/docker /run/containerd && exec "$@"' sh \
    dockerd --rootless --host="unix://$run/docker.sock" --data-root="$run/data" \
      --exec-root="$run/exec" --pidfile="$run/docker.pid" --iptables=false --ip6tables=false
"""


@contextmanager
def rootless_docker(programs: Path) -> Iterator[str]:
    """A rootless engine while the block runs, from the private engine's programs; its URL."""
    own = host_suite()
    names = (f"rootlesskit/{SUITE}", f"slirp4netns/{own}", f"uidmap/{own}")
    packages = unpacked("rootless", names, [SUITE])
    with tempfile.TemporaryDirectory(prefix="rootless-") as name:
        # The user must be able to read its programs, which are in a home of root.
        directory = Path(name)
        directory.chmod(0o755)
        copies = {"packages": packages, "programs": programs}
        for copy, source in copies.items():
            shutil.copytree(source, directory / copy, symlinks=True, copy_function=link)
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
            # Rootlesskit ends its engine, and the mounts go with the last process.
            process.terminate()
            process.wait(timeout=60)
