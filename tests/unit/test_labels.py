"""OCI annotations of images: revision, source, date and base image."""

from __future__ import annotations

import os
import subprocess
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest

from guix_tasks.oci import labels
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


def read_annotations(directory: Path, *lines: str, **environment: str) -> dict[str, str]:
    """Return the annotations of a directory, for which exactly ``lines`` are reported."""
    reported: list[str] = []
    annotations = oci_annotations(directory, environment, reported.append)
    assert reported == [*lines]
    return annotations


def read_source(directory: Path, **environment: str) -> tuple[str, str]:
    """Return the revision and the address of the source."""
    annotations = read_annotations(directory, **environment)
    return annotations[REVISION], annotations[SOURCE]


def git(directory: Path, *arguments: str) -> str:
    person = ("-c", "user.name=N", "-c", "user.email=n@example.org")
    command = ["git", "-C", str(directory), *person, *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("git is not on this machine")
    return result.stdout.strip()


@pytest.fixture(autouse=True)
def no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use real repositories in these tests."""
    monkeypatch.setattr(labels, "_reported", set())


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message=one")
    git(tmp_path, "remote", "add", "origin", "https://me:hunter2@example.org/me/image.git")
    return tmp_path


def test_annotations_contain_revision_and_source(checkout: Path) -> None:
    annotations = read_annotations(checkout)
    assert annotations[REVISION] == git(checkout, "rev-parse", "HEAD")
    assert annotations[SOURCE] == "https://example.org/me/image"
    created = datetime.strptime(annotations[CREATED], "%Y-%m-%dT%H:%M:%S%z")
    assert abs((datetime.now(timezone.utc) - created).total_seconds()) < 60


def test_changed_revision_is_dirty(checkout: Path) -> None:
    git(checkout, "tag", "v1")
    (checkout / "file").write_text("two")
    assert read_annotations(checkout)[REVISION] == f"{git(checkout, 'rev-parse', 'HEAD')}-dirty"


def test_project_in_a_subdirectory_has_the_revision_of_its_repository(checkout: Path) -> None:
    project = checkout / "images" / "one"
    project.mkdir(parents=True)
    assert read_annotations(project)[REVISION] == git(checkout, "rev-parse", "HEAD")


def test_repository_of_the_environment_is_ignored(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git sets these variables in a hook of another repository."""
    expected = read_source(checkout)
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "index"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "remote.origin.url")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://example.org/other")
    assert read_source(checkout) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_checkout_owned_by_one_other_user_is_read(checkout: Path) -> None:
    revision = git(checkout, "rev-parse", "HEAD")
    index = (checkout / ".git/index").stat().st_ino
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 1234, 1234)
    os.utime(checkout / "file")
    assert read_annotations(checkout)[REVISION] == revision
    assert (checkout / ".git/index").stat().st_ino == index
    # Git would run hooks of a user who does not own the project's tasks.py.
    project = checkout / "project"
    project.mkdir()
    error = f"git: fatal: detected dubious ownership in repository at '{checkout}'"
    line = f"note: the image gets no label with the revision of {checkout}: {error}"
    assert REVISION not in read_annotations(project, line)
    assert REVISION not in read_annotations(project)  # reported once


def test_unreadable_checkout_has_the_revision_of_the_ci_job(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    github = {"GITHUB_SERVER_URL": "https://github.test", "GITHUB_REPOSITORY": "me/image"}
    github["GITHUB_WORKSPACE"] = str(checkout)
    source = read_source(checkout, GITHUB_SHA="a" * 40, **github)
    assert source == ("a" * 40, "https://github.test/me/image")
    gitlab = {"CI_PROJECT_URL": "https://gitlab.test/me/image"}
    source = read_source(checkout, CI_COMMIT_SHA="b" * 40, **gitlab)
    assert source == ("b" * 40, "https://gitlab.test/me/image")
    source = read_source(checkout, GIT_COMMIT="c" * 40, GIT_URL="https://me:secret@git.test/i.git")
    assert source == ("c" * 40, "https://git.test/i")
    line = f"note: the image gets no label with the revision of {checkout}: git is not installed"
    elsewhere = {"CI_COMMIT_SHA": "b" * 40, "CI_PROJECT_DIR": "/elsewhere"}
    assert [*read_annotations(checkout, line, **elsewhere)] == [CREATED]


def test_annotations_without_git_contain_only_the_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(read_annotations(tmp_path)) == [CREATED]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(read_annotations(tmp_path)) == [CREATED]


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://example.org/a/b.git", "https://example.org/a/b"),
        ("https://token@example.org/a/b", "https://example.org/a/b"),
        ("http://u:p@example.org:8080/a/b/", "http://example.org:8080/a/b"),
        ("https://u:p@ss@example.org/a@b", "https://example.org/a@b"),
        ("https://example.org/b.git" + "/" * 100_000, "https://example.org/b"),
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


def test_stage_is_labelled_with_date_and_base(built_site: Site) -> None:
    annotations = [built_site.image(stage).labels for stage in ("base", "pull", "install")]
    base = str(built_site.settings().base_image)
    assert [stage_labels[BASE_NAME] for stage_labels in annotations] == [base] * 3
    assert [CREATED in stage_labels for stage_labels in annotations] == [True] * 3


def test_base_in_a_registry_has_a_digest_label(site: Site) -> None:
    site.make("base")
    digest = site.engine.remote_digest(str(site.settings().base_image))
    assert digest
    assert site.image("base").labels[BASE_DIGEST] == digest


def test_base_outside_registries_has_no_digest_label(site: Site) -> None:
    settings = site.settings()
    inputs = {"BASE_IMAGE": f"{settings.base_image} {'a' * 64}"}  # a digest of its content
    assert base_annotations(settings, inputs) == {BASE_NAME: str(settings.base_image)}


def test_new_date_does_not_make_a_stage_stale(built_site: Site) -> None:
    """Otherwise a pull of floating channels would make later stages stale each day."""
    built_site.env["GUIX_CHANNELS_LOCK"] = ""
    image_id = built_site.image("pull").id
    assert "pull: unchanged" in built_site.make("pull")
    assert built_site.image("pull").id == image_id
