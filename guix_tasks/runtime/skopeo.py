"""The program skopeo, which copies images between layouts and registries as they are.

It asks the registry for each blob before it reads it. An engine would pack the layers again, and
the digest would be another one.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, cast

from guix_tasks.engine.accounts import accounts_for, auth_config
from guix_tasks.errors import RegistryError, UsageError
from guix_tasks.ui.format import printable
from guix_tasks.ui.log import LogReader
from guix_tasks.ui.redact import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guix_tasks.oci.reference import ImageReference
    from guix_tasks.stages.project import Project


def find_skopeo() -> str:
    """Return the program. Raise ``UsageError`` if it is not installed."""
    program = shutil.which("skopeo")
    if program is None:
        raise UsageError(
            "skopeo is not installed, and an engine would change the digest of the image; install "
            "the package skopeo"
        )
    return program


def copy(
    project: Project, source: str, image: ImageReference, show: Callable[[list[bytes]], object]
) -> None:
    """Copy an image to its registry, and pass the lines of the log to ``show``.

    Raise ``RegistryError`` if the registry refuses.
    """
    program = find_skopeo()
    log, lines = LogReader(show), list[str]()
    with _account(project, image) as (tls, authfile, descriptors):
        options = [f"--dest-{option}" for option in (*tls, authfile)]
        argv = [program, "--insecure-policy", "copy", *options, source, f"docker://{image}"]
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=descriptors, bufsize=0,
        ) as process:  # fmt: skip
            try:
                while data := cast("IO[bytes]", process.stdout).read(1 << 16):
                    lines += log.read(data)
            except BaseException:
                process.terminate()
                raise
        lines += log.end()
    if process.returncode:
        raise _failure(image, "\n".join(lines))


def inspect(project: Project, image: ImageReference) -> bytes:
    """Return the manifest of an image in its registry.

    Raise ``RegistryError`` if the registry does not have it.
    """
    program = find_skopeo()
    with _account(project, image) as (tls, authfile, descriptors):
        options = [f"--{option}" for option in (*tls, authfile)]
        done = subprocess.run(
            [program, "inspect", "--raw", *options, f"docker://{image}"],
            stdin=subprocess.DEVNULL, capture_output=True, pass_fds=descriptors, check=False,
        )  # fmt: skip
    if done.returncode:
        raise _failure(image, done.stderr.decode(errors="replace"))
    return done.stdout


@contextmanager
def _account(
    project: Project, image: ImageReference
) -> Iterator[tuple[list[str], str, tuple[int, ...]]]:
    """Yield options for a registry, without their prefix, and the descriptors that they name.

    Other users can read command lines, so the account is in a file in memory.
    """
    host = image.registry
    tls = ["tls-verify=false"] if _is_loopback(host) else []
    account = accounts_for(project.engine, project.settings).find(host)
    if account is None:
        yield tls, "no-creds", ()
        return
    with os.fdopen(os.memfd_create("guix-tasks"), "wb") as file:
        file.write(auth_config({host: account}).encode())
        file.flush()
        yield tls, f"authfile=/dev/fd/{file.fileno()}", (file.fileno(),)


def _is_loopback(host: str) -> bool:
    """Whether a registry is on this machine, where Docker too uses plain HTTP."""
    name = re.sub(r":\d+$", "", host)
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _failure(image: ImageReference, log: str) -> RegistryError:
    """Return skopeo's last message, without the fields of its log format."""
    line = next((line for line in reversed(log.splitlines()) if line.strip()), "no message")
    message = re.search(r'msg="((?:[^"\\]|\\.)*)"', line)
    cause = printable(clean(message[1].replace('\\"', '"') if message else line))
    if re.search("(manifest|name) unknown", cause):
        return RegistryError(f"{image} is not in its registry; run `inv runtime.push`")
    return RegistryError(f"skopeo: {image}: {cause}; check RUNTIME_IMAGE and its account")
