"""Only what changed is run, a fresh machine resumes, and images do not grow."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from harness import LOCK

from guix_tasks.stages.images import IMAGE_LABEL, KEY_LABEL

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project, Workshop

pytestmark = pytest.mark.engine

STAGES = ("base", "pull", "install")


def layers(docker: Docker, image: str) -> list[str]:
    return docker.ok("image", "inspect", "--format={{json .RootFS.Layers}}", image).split(",")


def keys(docker: Docker, project: Project) -> dict[str, str]:
    return {stage: docker.labels(project.tag(stage))[KEY_LABEL] for stage in STAGES}


@pytest.mark.both_stores
def test_nothing_changed_nothing_is_run(project: Project) -> None:
    project.ok("push")
    before = project.tags()
    again = project.ok("base", "pull", "install", "push")
    assert [line for line in again.stderr.splitlines() if line.endswith(": up to date")] == [
        f"{stage}: up to date" for stage in STAGES
    ]
    assert "container" not in again.stderr
    assert project.tags() == before


@pytest.mark.both_stores
def test_images_that_others_were_assembled_on_do_not_stay(project: Project) -> None:
    for packages in ("hello", "hello greet", "hello", "hello greet"):
        project.set(GUIX_PACKAGES=packages)
        project.ok("install", "push")
    # These start from the parent, so the last of the others goes, and then all below it.
    for _ in range(2):
        project.ok("install", "--force")
    project.ok("base")
    only = f"--filter=label={IMAGE_LABEL}={project.image}"
    listing = project.docker.ok("image", "ls", "--quiet", "--filter=dangling=true", only)
    assert listing.split() == []


def test_the_lock_is_what_the_image_describes_and_is_written_again(
    project: Project, docker: Docker
) -> None:
    lock = project.directory / LOCK
    text = lock.read_text()
    described = docker.run(project.tag("pull"), "guix", "describe", "--format=channels")
    assert text.strip() == described.stdout.strip()
    lock.unlink()
    assert "up to date" in project.ok("pull").stderr
    assert lock.read_text() == text


def test_a_lock_of_other_channels_names_update(project: Project) -> None:
    lock = project.directory / LOCK
    lock.write_text(lock.read_text().replace("file:///offline", "file:///elsewhere"))
    with project.unharmed():
        refused = project.inv("pull")
    assert refused.returncode == 2
    assert "inv pull --update" in refused.stderr


CHANNEL_CHANGES = {
    "branch": (
        r"(\(name .offline\))", r'\1 (branch "next")', "is on branch master, not on next",
    ),
    "key": (
        r'(openpgp-fingerprint\s+")....', r"\g<1>0000", "and in GUIX_CHANNELS is introduced by",
    ),
    "first commit": (
        r'(make-channel-introduction\s+")....', r"\g<1>0000", "introduced by commit 0000",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "replacement", "expected"), CHANNEL_CHANGES.values(), ids=CHANNEL_CHANGES
)
def test_change_of_the_channels_is_refused_until_the_lock_is_updated(
    project: Project, workshop: Workshop, pattern: str, replacement: str, expected: str
) -> None:
    text = (workshop.offline / "channels.scm").read_text()
    channels = project.directory / "channels.scm"
    channels.write_text(text)
    project.set(GUIX_CHANNELS="channels.scm")
    assert "pull: up to date" in project.ok("pull").stderr
    changed = re.sub(pattern, replacement, text)
    assert changed != text
    channels.write_text(changed)
    assert "GUIX_CHANNELS changed" in project.ok("status").stdout
    with project.unharmed():
        refused, push = project.inv("pull"), project.inv("push")
    assert (refused.returncode, push.returncode) == (2, 2)
    assert expected in refused.stderr
    assert "`inv pull --update` updates the lock" in refused.stderr
    assert "GUIX_CHANNELS changed" in push.stderr


def test_channels_with_an_open_parenthesis_are_an_error_everywhere(
    project: Project, workshop: Workshop
) -> None:
    text = (workshop.offline / "channels.scm").read_text().rstrip()
    (project.directory / "channels.scm").write_text(f"\n{text[:-1]}\n")
    project.set(GUIX_CHANNELS="channels.scm")
    with project.unharmed():
        for task in ("pull", "status", "push"):
            result = project.inv(task)
            assert result.returncode == 2, task
            assert f"{project.directory / 'channels.scm'}:2: ( is not closed" in result.stderr
            assert "Traceback" not in result.stderr


@pytest.mark.both_stores
def test_a_fresh_machine_resumes_from_the_cache(
    new_project: NewProject, docker: Docker, tmp_path: Path
) -> None:
    first = new_project(*STAGES)
    cache = f"{first.repository}-cache"
    first.set(CACHE_IMAGE=cache)
    # Another list, so that it is made here and put into the cache; and its parents with it.
    first.set(GUIX_PACKAGES="hello")
    first.ok("base", "--force")
    first.ok("pull", "--force")
    first.ok("install")
    made = keys(docker, first)

    second = new_project(CACHE_IMAGE=cache, GUIX_PACKAGES="hello")
    assert second.directory != first.directory
    shutil.copy(first.directory / LOCK, second.directory)
    first.remove()
    result = second.ok("install", "push")
    assert "install: taken from" in result.stderr
    assert "container" not in result.stderr
    assert docker.labels(second.tag("install"))[KEY_LABEL] == made["install"]
    assert "base: taken from" in second.ok("base").stderr
    assert "pull: taken from" in second.ok("pull").stderr
    assert keys(docker, second) == made
    assert docker.run(second.image, "hello").stdout == "Hello, world!\n"
    assert not docker.ok("image", "ls", "--quiet", cache)


@pytest.mark.parametrize(
    ("sandbox", "directory"),
    [("capabilities", "/root/.cache"), ("rootless", "/tmp/guix-tasks-cache")],  # noqa: S108
)
def test_a_fresh_machine_takes_the_checkouts_of_the_channels_from_the_cache(
    new_project: NewProject, docker: Docker, sandbox: str, directory: str
) -> None:
    first = new_project("base", GUIX_SANDBOX=sandbox)
    settings = {"GUIX_SANDBOX": sandbox, "CACHE_IMAGE": f"{first.repository}-cache"}
    first.set(**settings)
    checkouts = f"{settings['CACHE_IMAGE']}:checkouts-"
    assert f"push: {checkouts}" in first.ok("pull").stderr
    assert f"push: {checkouts}" not in first.ok("pull", "--force").stderr
    mark = f"for each in {directory}/guix/checkouts/*/.git; do touch $each/mark || exit; done"
    first.ok("run", "--", "sh", "-c", f"{mark}; rm {directory}/pushed-checkouts")
    assert f"push: {checkouts}" in first.ok("pull", "--force").stderr
    first.remove()

    second = new_project("base", repository=first.repository, **settings)
    log = second.ok("pull", "--update").stderr
    assert f"pull: starts from the checkouts of {checkouts}" in log
    assert f"push: {checkouts}" not in log
    found = second.ok("run", "--", "sh", "-c", f"ls {directory}/guix/checkouts/*/.git/mark")
    assert len(found.stdout.split()) == len(("guix", "offline"))
    assert not docker.ok("image", "ls", "--quiet", settings["CACHE_IMAGE"])


@pytest.mark.parametrize(
    ("sandbox", "directory", "volumes"),
    [("capabilities", "/root/.cache", 3), ("rootless", "/tmp/guix-tasks-cache", 2)],  # noqa: S108
)
def test_caches_are_on_volumes_and_go_with_the_project(
    new_project: NewProject, sandbox: str, directory: str, volumes: int
) -> None:
    project = new_project("base", GUIX_SANDBOX=sandbox)
    project.ok("pull")
    assert len(project.volumes()) == volumes
    found = project.ok("run", "--", "find", f"{directory}/guix/checkouts", "-maxdepth", "1")
    assert len(found.stdout.split()) > 1
    assert project.docker.run(project.image, "ls", directory).stdout == ""
    project.ok("clean")
    assert project.volumes() == []


def test_a_checkout_that_only_git_could_pack_is_cloned_again(new_project: NewProject) -> None:
    """As after some 25 updates, on a base image with Debian's Guix and without git."""
    project = new_project("base", GUIX_SANDBOX="capabilities")
    project.ok("pull")
    many = (
        'cd "/root/.cache/guix/checkouts" && for each in */; do '
        'for pack in $(seq 26); do : >"$each/.git/objects/pack/pack-$pack.pack"; done; done'
    )
    project.ok("run", "--", "sh", "-c", many)
    assert "Guix has no git to pack the checkout" in project.ok("pull", "--force").stderr
    assert "Guix has no git" not in project.ok("pull", "--force").stderr


@pytest.mark.both_stores
def test_squash_makes_one_layer_above_the_base(project: Project, docker: Docker) -> None:
    before = docker.config(project.image)
    project.ok("squash")
    base, squashed = layers(docker, project.tag("base")), layers(docker, project.image)
    assert len(squashed) == len(base) + 1
    after = docker.config(project.image)
    assert {k: v for k, v in after.items() if k != "Labels"} == {
        k: v for k, v in before.items() if k != "Labels"
    }
    assert docker.run(project.image, "hello").stdout == "Hello, world!\n"
    listing = (
        "find / -xdev ! -path '/proc*' ! -path '/dev*' ! -path '/sys*' -printf '%p %m %U %l\n'"
    )
    files = [
        sorted(docker.run(image, "sh", "-c", listing).stdout.splitlines())
        for image in (project.tag("install"), project.image)
    ]
    assert files[0] == files[1]
    assert "squash: up to date" in project.ok("install", "squash").stderr
    project.ok("verify")


@pytest.mark.both_stores
def test_rollback_and_back(project: Project) -> None:
    first = project.id()
    project.set(GUIX_PACKAGES="hello")
    project.ok("install")
    second = project.id()
    assert second != first
    project.ok("rollback")
    assert project.id() == first
    project.ok("push")
    assert project.id() == first
    project.ok("rollback")
    assert project.id() == second


@pytest.mark.both_stores
def test_what_is_in_the_image(project: Project, tmp_path: Path) -> None:
    table = project.ok("status", "--size", f"--plot={tmp_path / 'sizes.svg'}").stdout
    assert [line.split()[1] for line in table.splitlines() if line.startswith("stage ")] == list(
        STAGES
    )
    assert "hello-2.12" in table
    picture = ET.parse(tmp_path / "sizes.svg").getroot()  # noqa: S314 -- our own
    assert picture.tag.endswith("svg")
    words = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert any(word and "hello-2.12" in word for word in words)
