"""A root file system with Guix from Debian's packages, where no image registry is in reach.

Only Debian's suite ``sid`` has a Guix that is new enough.  mmdebstrap makes the tar file; it
is handed on while it is made, so that the engine imports it at the same time.
"""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import subprocess
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, cast

from guix_tasks.bootstrap.apt import KEYRING, Apt, host_suite, on_debian
from guix_tasks.errors import BuilderError
from guix_tasks.files import temporary_directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import IO

    from guix_tasks.ui.console import Console

SUITE = "sid"
PACKAGES = ("guix", "ca-certificates", "netbase")

# Documentation in all its forms, with the licences kept; the image's dpkg goes on leaving it
# out.  (As a --dpkgopt it would start a Python for each package: 6 s.)
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

# What is compiled C with is there only because Guile's bindings name the -dev packages: 55 MB.
# Whoever needs it: apt-get install --reinstall libc6-dev linux-libc-dev, and so on.
_AFTERWARDS = f"""\
cd "$1"
rm -rf usr/include/* usr/lib/linux/uapi
find usr/lib -name '*.a' -delete
for folder in {" ".join(_LEFT_OUT)}; do
  find "usr/share/$folder" -mindepth 1 ! -type d ! -name copyright -delete 2>/dev/null
  find "usr/share/$folder" -mindepth 1 -type d -empty -delete 2>/dev/null
done
rm -f etc/apt/apt.conf.d/99mmdebstrap var/cache/debconf/*-old var/lib/dpkg/*-old"""

# A Dockerfile on it may be one line, and guix-daemon fails without build users.
_PREPARE = Path(__file__).parents[1] / "stages" / "resources" / "prepare.sh"

_CHUNK = 1 << 20


def debian_rootfs(
    apt_folder: Path, console: Console, packages: Sequence[str] = PACKAGES
) -> Iterator[bytes]:
    """Yield the tar file of the root file system piece by piece."""
    apt = Apt(apt_folder, [host_suite() or SUITE], failure=BuilderError)
    _check_host()
    environment = _mmdebstrap(apt, console)
    with temporary_directory() as scratch:
        settings = scratch / "apt.conf"
        settings.write_text(_machine_settings())
        keyring = [f"--keyring={KEYRING}"] if KEYRING.exists() else []
        how = [f"--aptopt={settings}", *keyring]
        argv = [*mmdebstrap_argv(packages), *how, SUITE, "-", apt.mirror]
        console.say(f"making a {described(packages)}: {apt.mirror}")
        yield from _stream(argv, environment, console)


def described(packages: Sequence[str]) -> str:
    """The root file system in words."""
    return f"Debian {SUITE}" + (f" with {', '.join(packages)}" if packages else "")


def mmdebstrap_argv(packages: Sequence[str]) -> list[str]:
    """Say what kind of root file system it is; suite, target and mirror are to follow."""
    return [
        "mmdebstrap",
        f"--variant={'apt' if packages else 'essential'}",
        "--format=tar",
        *([f"--include={','.join(packages)}"] if packages else []),
        '--aptopt=Acquire::Check-Valid-Until "false"',  # the mirror may be a snapshot
        f"--setup-hook={_BEFOREHAND}",
        f"--customize-hook={_AFTERWARDS}",
        *([f"--customize-hook={_prepared()}"] if "guix" in packages else []),
        "--skip=check/signed-by",  # it would need gpg
    ]


def _prepared() -> str:
    return f'chroot "$1" sh -c {shlex.quote(_PREPARE.read_text(encoding="utf-8"))}'


def container_argv(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Say what makes it in a container of a Debian image, for a host that is not Debian.

    The tar file comes on standard output; the container needs ``--privileged`` and a network.
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


def _check_host() -> None:
    if not on_debian() or host_suite() is None:
        raise BuilderError(
            "a root file system of Debian's packages is made on Debian, or in a container of "
            "a Debian image: set BASE_IMAGE to an image that has Guix"
        )
    if os.geteuid() == 0:
        return
    ranges = Path("/etc/subuid")
    mine = (f"{getpass.getuser()}:", f"{os.getuid()}:")
    granted = ranges.exists() and any(
        line.startswith(mine) for line in ranges.read_text().splitlines()
    )
    if not (shutil.which("newuidmap") and granted):
        raise BuilderError(
            "making a root file system needs root, or newuidmap (package uidmap) and a line "
            "for you in /etc/subuid: run this as root, or set BASE_IMAGE to an image with Guix"
        )


def _mmdebstrap(apt: Apt, console: Console) -> dict[str, str]:
    """Return the environment in which mmdebstrap is found; unpack it if it is not here."""
    root = apt.folder / "mmdebstrap"
    if not shutil.which("mmdebstrap") and not root.exists():
        console.say(f"unpacking Debian's mmdebstrap into {root}")
        installed = Path("/var/lib/dpkg/status")
        missing = Apt(apt.folder, apt.suites, status=installed, failure=BuilderError)
        missing.unpacked(["mmdebstrap"], root, closure=True)
    # What the machine has itself comes first. A small Debian has no complete Perl.
    programs = [os.environ.get("PATH", os.defpath), f"{root}/usr/bin", f"{root}/usr/sbin"]
    modules = [
        *root.glob("usr/share/perl5"),
        *root.glob("usr/share/perl/*"),
        *root.glob("usr/lib/*/perl/*"),
    ]
    return {
        **os.environ,
        "LC_ALL": "C.UTF-8",
        "PATH": os.pathsep.join(programs),
        **({"PERL5LIB": os.pathsep.join(map(str, modules))} if modules else {}),
    }


def _machine_settings() -> str:
    """Return how this machine reaches its mirror, as apt's configuration.

    mmdebstrap leaves the machine's configuration aside.  It goes through a file, since a
    proxy's address may hold a password.
    """
    kept = ("Acquire::http", "Acquire::https", "Acquire::ForceIPv", "Acquire::Retries")
    dump = subprocess.run(
        ["apt-config", "dump", "--no-empty"], capture_output=True, text=True, check=False
    )
    return "".join(f"{line}\n" for line in dump.stdout.splitlines() if line.startswith(kept))


def _stream(argv: Sequence[str], environment: dict[str, str], console: Console) -> Iterator[bytes]:
    """Yield what mmdebstrap writes, while its progress goes to the console."""
    said: deque[str] = deque(maxlen=20)

    def listen(messages: IO[bytes]) -> None:
        for line in messages:
            # A progress bar writes over itself.
            text = line.decode(errors="replace").rstrip().split("\r")[-1]
            said.append(text)
            if text.startswith("I: ") and "-hook" not in text:
                console.detail(f"  {text.removeprefix('I: ')}")

    maker = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # it ends its whole process group, which is not to be ours
    )
    output, messages = cast("IO[bytes]", maker.stdout), cast("IO[bytes]", maker.stderr)
    listener = threading.Thread(target=listen, args=[messages])
    listener.start()
    try:
        while chunk := output.read(_CHUNK):
            yield chunk
    except BaseException:
        maker.terminate()  # it removes its folder and its mounts first
        raise
    finally:
        output.close()
        maker.wait()
        listener.join()
        messages.close()
    if maker.returncode:
        for line in said:
            console.detail(f"  {line}")
        causes = [line.removeprefix("E: ") for line in said if line.startswith("E: ")]
        cause = causes[0] if causes else f"exit code {maker.returncode}"
        raise BuilderError(f"mmdebstrap failed: {cause}; what it said is above")
