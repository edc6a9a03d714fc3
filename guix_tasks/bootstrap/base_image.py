"""Base image with Guix from Debian's packages, for machines without access to a registry.

Only Debian's suite ``sid`` has a recent enough Guix.  The engine imports the root file system while
mmdebstrap writes it.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from guix_tasks.bootstrap.apt import ENGLISH, KEYRING, Apt, on_debian, required_suite
from guix_tasks.bootstrap.registry import pull_missing
from guix_tasks.bootstrap.service import kept_environment
from guix_tasks.engine.api import ContainerSpec, run_to_end
from guix_tasks.errors import BuilderError, GuixTasksError
from guix_tasks.files import temporary_directory
from guix_tasks.ui.format import human_size, human_time
from guix_tasks.ui.log import LogReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import IO

    from guix_tasks.engine.api import Engine
    from guix_tasks.ui.console import Console

SUITE = "sid"
PACKAGES = ("guix", "guile-zstd", "slirp4netns", "ca-certificates", "netbase")
"""Debian's guix only recommends guile-zstd, without which Guix unpacks downloads with lzip, several
times slower, and slirp4netns, without which builds cannot download (``svn-fetch`` and the like).
It also recommends git: 90 MB with Perl, to pack checkouts of channels."""

BASE_TAG = f"guix-tasks/debian-guix:{SUITE}"
PLAIN_TAG = f"guix-tasks/debian:{SUITE}"
"""Debian without Guix, to test packs in."""
DEBIAN_IMAGE = f"debian:{SUITE}-slim"

# Directories of documentation to exclude, except licences.  dpkg in the image also excludes them.
# (As a --dpkgopt, mmdebstrap would start a Python process for each package, which takes 6 s.)
_LEFT_OUT = (
    *("doc", "doc-base", "info", "man", "locale", "lintian", "bug", "gtk-doc"),
    *("bash-completion", "fish", "zsh", "emacs"),
)
_BEFOREHAND = f"""\
mkdir -p "$1"/etc/dpkg/dpkg.cfg.d
cd "$1"/etc/dpkg/dpkg.cfg.d
printf 'path-exclude=/usr/share/%s/*\\n' {" ".join(_LEFT_OUT)} >slim
echo 'path-include=/usr/share/doc/*/copyright' >>slim
echo force-unsafe-io >>slim"""

# Headers and static libraries (55 MB) are only installed because Guile's bindings depend on -dev
# packages.  To get them back: apt-get install --reinstall libc6-dev linux-libc-dev ...
_AFTERWARDS = f"""\
cd "$1"
rm -rf usr/include/* usr/lib/linux/uapi
find usr/lib -name '*.a' -delete
for directory in {" ".join(_LEFT_OUT)}; do
  find "usr/share/$directory" -mindepth 1 ! -type d ! -name copyright -delete 2>/dev/null
  find "usr/share/$directory" -mindepth 1 -type d -empty -delete 2>/dev/null
done
rm -f etc/apt/apt.conf.d/99mmdebstrap var/cache/debconf/*-old var/lib/dpkg/*-old"""

# guix-daemon fails without build users, and a Dockerfile on this image may have only one line.
_PREPARE = Path(__file__).parents[1] / "stages" / "resources" / "prepare.sh"


def make_base(
    engine: Engine, console: Console, tag: str, *, plain: bool = False, force: bool = False
) -> None:
    """Make the image ``tag``, on Debian or in a Debian container; without Guix if ``plain``.

    An image of that name is replaced only with ``force``, because projects are made from it.

    Raise ``BuilderError`` if neither is possible.
    """
    if engine.image(tag) and not force:
        console.print(
            f"rootfs: {tag} is on the engine; `inv rootfs --force` makes it again, and the stages "
            "that are made from it become stale"
        )
        return
    packages = () if plain else PACKAGES
    started = time.monotonic()
    with console.step("rootfs"):
        if on_debian():
            archive = debian_rootfs(console, packages)
        else:
            archive = _in_container(engine, console, packages)
        # The engine imports the archive while mmdebstrap writes it.
        engine.import_rootfs(archive, tag)
    image = engine.image(tag)
    size = human_size(image.size) if image else ""
    took = human_time(time.monotonic() - started)
    console.print(f"rootfs: {tag}: {description(packages)}; {size}, {took}")
    if packages:
        console.print(f"rootfs: use it as BASE_IMAGE={tag}")


def _in_container(engine: Engine, console: Console, packages: Sequence[str]) -> Iterator[bytes]:
    console.print(f"rootfs: this host is not Debian; using a container of {DEBIAN_IMAGE}")
    try:
        pull_missing(engine, console, DEBIAN_IMAGE)
    except GuixTasksError as error:
        raise BuilderError(
            "cannot make the base image: this host is not Debian, and the image "
            f"{DEBIAN_IMAGE} is unavailable: {error}"
        ) from None
    spec = ContainerSpec(
        name=f"guix-tasks-rootfs-{secrets.token_hex(3)}",
        image=DEBIAN_IMAGE,
        command=tuple(container_argv(packages)),
        privileged=True,
        network=None if engine.info().has_bridge else "host",
    )

    def failed(status: int) -> BuilderError:
        return BuilderError(f"rootfs: mmdebstrap failed with status {status}; its output is above")

    with console.step("rootfs") as step:
        yield from LogReader(step.log).results(run_to_end(engine, spec, failed))


def debian_rootfs(console: Console, packages: Sequence[str] = PACKAGES) -> Iterator[bytes]:
    """Yield the tar file of the root file system in chunks."""
    hint = (
        "run this task on Debian or in a Debian container, or set BASE_IMAGE to an image with Guix"
    )
    suite = required_suite("a root file system", hint, BuilderError)
    _check_namespaces()
    apt = Apt([suite], failure=BuilderError)
    environment = _mmdebstrap(apt, console)
    with temporary_directory() as scratch:
        settings = scratch / "apt.conf"
        settings.write_text(_machine_settings(), encoding="utf-8")
        keyring = [f"--keyring={KEYRING}"] if KEYRING.exists() else []
        options = [f"--aptopt={settings}", *keyring]
        argv = [*mmdebstrap_argv(packages), *options, SUITE, "-", apt.mirror]
        console.print(f"making a {description(packages)} from {apt.mirror}")
        yield from _stream(argv, environment, console)


def description(packages: Sequence[str]) -> str:
    """Describe the root file system for messages."""
    return f"Debian {SUITE}" + (f" with {', '.join(packages)}" if packages else "")


def mmdebstrap_argv(packages: Sequence[str]) -> list[str]:
    """Return the mmdebstrap command without its last arguments: suite, target and mirror."""
    prepare = f'chroot "$1" sh -c {shlex.quote(_PREPARE.read_text(encoding="utf-8"))}'
    return [
        "mmdebstrap",
        f"--variant={'apt' if packages else 'essential'}",
        "--format=tar",
        *([f"--include={','.join(packages)}"] if packages else []),
        '--aptopt=Acquire::Check-Valid-Until "false"',  # a mirror may be a snapshot
        f"--setup-hook={_BEFOREHAND}",
        f"--customize-hook={_AFTERWARDS}",
        *([f"--customize-hook={prepare}"] if "guix" in packages else []),
        "--skip=check/signed-by",  # the check needs gpg
    ]


def container_argv(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Return the command that makes the root file system in a container of a Debian image.

    It writes the tar file to standard output and needs ``--privileged`` and a network.
    """
    script = f"""
        set -eu
        {{
            apt-get -qq -o Acquire::Check-Valid-Until=false update
            DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 install \\
                --yes --no-install-recommends mmdebstrap mount
        }} >&2
        mirror=$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' |
            sed -n 's/^Debian Debian //p' | head -n 1)
        exec {shlex.join(mmdebstrap_argv(packages))} {SUITE} - "$mirror"
    """
    return ["sh", "-c", script]


def _check_namespaces() -> None:
    if os.geteuid() == 0:
        return
    ranges = Path("/etc/subuid")
    text = ranges.read_text(encoding="utf-8", errors="replace") if ranges.exists() else ""
    is_granted = any(
        line.startswith((f"{getpass.getuser()}:", f"{os.getuid()}:")) for line in text.splitlines()
    )
    if not (shutil.which("newuidmap") and is_granted):
        raise BuilderError(
            "cannot make a root file system: it needs root, or newuidmap (package uidmap) and a "
            "line for your user in /etc/subuid; run this task as root, or set BASE_IMAGE to an "
            "image with Guix"
        )


def _mmdebstrap(apt: Apt, console: Console) -> dict[str, str]:
    """Return the environment to run mmdebstrap in; unpack mmdebstrap if it is not installed."""
    root = apt.directory / "mmdebstrap"
    if not shutil.which("mmdebstrap") and not root.exists():
        console.print(f"unpacking Debian's mmdebstrap into {root}")
        installed = Path("/var/lib/dpkg/status")
        replace(apt, status=installed).unpack(["mmdebstrap"], root, closure=True)
    # Programs of the machine take precedence.  A small Debian has no complete Perl.
    kept = kept_environment()
    programs = [kept["PATH"], f"{root}/usr/bin", f"{root}/usr/sbin"]
    patterns = ("usr/share/perl5", "usr/share/perl/*", "usr/lib/*/perl/*")
    modules = [directory for pattern in patterns for directory in root.glob(pattern)]
    return {
        **kept,
        **ENGLISH,
        "PATH": os.pathsep.join(programs),
        **({"PERL5LIB": os.pathsep.join(map(str, modules))} if modules else {}),
    }


def _machine_settings() -> str:
    """Return the part of the machine's apt configuration that reaches its mirror.

    mmdebstrap ignores the machine's configuration.  Pass this to it in a file, because the address
    of a proxy may contain a password.
    """
    kept = ("Acquire::http", "Acquire::https", "Acquire::ForceIPv", "Acquire::Retries")
    dump = subprocess.run(
        ["apt-config", "dump", "--no-empty"], capture_output=True, encoding="utf-8", check=False
    )
    return "".join(f"{line}\n" for line in dump.stdout.splitlines() if line.startswith(kept))


def _stream(argv: Sequence[str], environment: dict[str, str], console: Console) -> Iterator[bytes]:
    """Yield the output of mmdebstrap, and show its progress on the console."""
    last_lines: deque[str] = deque(maxlen=20)

    def show_progress(messages: IO[bytes]) -> None:
        for line in messages:
            # A progress bar overwrites its line.
            text = line.decode(errors="replace").rstrip().split("\r")[-1]
            last_lines.append(text)
            if text.startswith("I: ") and "-hook" not in text:
                console.detail(f"  {text.removeprefix('I: ')}")

    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # mmdebstrap terminates its process group
    )
    output, messages = cast("IO[bytes]", process.stdout), cast("IO[bytes]", process.stderr)
    reader = threading.Thread(target=show_progress, args=[messages])
    reader.start()
    try:
        while chunk := output.read(1 << 20):
            yield chunk
    except BaseException:
        process.terminate()  # mmdebstrap removes its directory and mounts
        raise
    finally:
        output.close()
        process.wait()
        reader.join()
        messages.close()
    if process.returncode:
        for line in last_lines:
            console.detail(f"  {line}")
        causes = [line.removeprefix("E: ") for line in last_lines if line.startswith("E: ")]
        cause = causes[0] if causes else f"exit code {process.returncode}"
        raise BuilderError(f"mmdebstrap failed: {cause}; its output is above")
