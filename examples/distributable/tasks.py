"""Tasks of this project; `inv --list` lists them."""

import os

from guix_tasks.tasks import add_stage, add_test, ns

# Dependencies of the program.  A change of the package rebuilds them, a change of src/ does not.
add_stage(
    "deps",
    "guix package --profile=/var/guix/profiles/deps --manifest=deps.scm",
    parent="pull",
    inputs=["deps.scm", "guix.scm"],
    summary="Build the dependencies.",
)

# The program.  Its sources stay in the image, for `inv pack`.
add_stage(
    "build",
    "rm -rf /project && cp -R . /project && guix package --install-from-file=/project/guix.scm",
    parent="deps",
    inputs=["guix.scm", "src"],
    summary="Build the program.",
)

# Tests in containers without Guix, in which the tarball is unpacked.
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
    summary="Test the tarball in an empty container.",
)

__all__ = ["ns"]
