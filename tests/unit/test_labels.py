"""What an image says of itself in OCI's words."""

from __future__ import annotations

import subprocess
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest

from guix_tasks.oci.labels import (
    BASE_DIGEST,
    BASE_NAME,
    CREATED,
    REVISION,
    SOURCE,
    oci_annotations,
    web_address,
)
from guix_tasks.stages.base import base_annotations

if TYPE_CHECKING:
    from pathlib import Path

    from fake_engine import Site


def git(directory: Path, *arguments: str) -> str:
    person = ("-c", "user.name=N", "-c", "user.email=n@example.org")
    command = ["git", "-C", str(directory), *person, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("git is not on this machine")
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def no_repository() -> None:
    """The repositories of these tests are real."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message=one")
    git(tmp_path, "remote", "add", "origin", "https://me:hunter2@example.org/me/image.git")
    return tmp_path


def test_labels_name_revision_and_source(checkout: Path) -> None:
    found = oci_annotations(checkout)
    assert found[REVISION] == git(checkout, "rev-parse", "HEAD")
    assert found[SOURCE] == "https://example.org/me/image"
    made = datetime.strptime(found[CREATED], "%Y-%m-%dT%H:%M:%S%z")
    assert abs((datetime.now(timezone.utc) - made).total_seconds()) < 60


def test_changed_revision_is_dirty(checkout: Path) -> None:
    git(checkout, "tag", "v1")
    (checkout / "file").write_text("two")
    assert oci_annotations(checkout)[REVISION] == f"{git(checkout, 'rev-parse', 'HEAD')}-dirty"


def test_labels_without_git_have_only_the_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(oci_annotations(tmp_path)) == [CREATED]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(oci_annotations(tmp_path)) == [CREATED]


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://example.org/a/b.git", "https://example.org/a/b"),
        ("https://token@example.org/a/b", "https://example.org/a/b"),
        ("http://u:p@example.org:8080/a/b/", "http://example.org:8080/a/b"),
        ("https://u:p@ss@example.org/a@b", "https://example.org/a@b"),
        ("git@example.org:a/b.git", "https://example.org/a/b"),
        ("ssh://git@example.org:2222/a/b.git", "https://example.org/a/b"),
        ("ssh://git@example.org/a/b", "https://example.org/a/b"),
        ("/srv/git/b.git", ""),
        ("../b", ""),
        ("file:///srv/b", ""),
        ("", ""),
    ],
)
def test_web_address_of_a_remote_has_no_account(remote: str, address: str) -> None:
    assert web_address(remote) == address


def test_each_stage_is_labelled_with_its_date_and_base(made: Site) -> None:
    labels = [made.image(stage).labels for stage in ("base", "pull", "install")]
    base = str(made.settings().base_image)
    assert [each[BASE_NAME] for each in labels] == [base] * 3
    assert [CREATED in each for each in labels] == [True] * 3


def test_base_in_a_registry_has_a_digest_label(site: Site) -> None:
    site.make("base")
    known = site.engine.remote_digest(str(site.settings().base_image))
    assert known
    assert site.image("base").labels[BASE_DIGEST] == known


def test_base_in_no_registry_has_no_digest_label(site: Site) -> None:
    settings = site.settings()
    inputs = {"BASE_IMAGE": f"{settings.base_image} {'a' * 64}"}  # of what is in it
    assert base_annotations(settings, inputs) == {BASE_NAME: str(settings.base_image)}


def test_new_date_makes_no_stage_stale(made: Site) -> None:
    """Or a pull of floating channels would make everything above it stale each day."""
    made.env["GUIX_CHANNELS_LOCK"] = ""
    before = made.image("pull").id
    assert "pull: unchanged" in made.make("pull")
    assert made.image("pull").id == before
