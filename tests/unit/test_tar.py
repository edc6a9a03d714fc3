"""Tar archives for engines."""

from __future__ import annotations

import io
import tarfile

from guix_tasks.oci.tar import archive


def test_archive_ends_with_the_end_mark() -> None:
    """Podman closes the pipe after the end mark, and can report an error if padding follows."""
    data = archive({"a": b"x" * 600, "zeros": bytes(512)})
    assert len(data) == 3 * 512 + 2 * 512 + 2 * 512
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["a", "zeros"]
