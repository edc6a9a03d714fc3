"""The tasks: `inv --list` shows them."""

import os

from guix_tasks.tasks import add_stage, add_test, ns

# All that the program is built with: made again only when the package changes, not its sources.
add_stage(
    "deps",
    "guix package --profile=/var/guix/profiles/deps --manifest=deps.scm",
    parent="pull",
    inputs=["deps.scm", "guix.scm"],
    summary="Build the dependencies.",
)

# The program itself, of the sources that are here.  They stay in the image, for `inv pack`.
add_stage(
    "build",
    "rm -rf /project && cp -R . /project && guix package --install-from-file=/project/guix.scm",
    parent="deps",
    inputs=["guix.scm", "src"],
    summary="Build the program.",
)

# Each in a container without Guix, in which the tarball has been unpacked.
add_test(
    "check",
    ["sh", "/test/tests/check.sh"],
    image=os.environ.get("CHECK_IMAGE", "debian:stable-slim"),
    inputs="tests",
    summary="Test the tarball in Debian.",
)
add_test(
    "bare",
    ["/opt/announce/bin/announce", "/test/tests/guests.json"],
    inputs="tests",
    summary="Test the tarball where there is nothing else.",
)

__all__ = ["ns"]
