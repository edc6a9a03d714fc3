"""Only changed stages run, a fresh machine uses the cache, and images do not grow."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from harness import LOCK, check_cache_is_shared, free_port

from guix_tasks.bootstrap.registry import LocalRegistry
from guix_tasks.stages.images import IMAGE_LABEL, KEY_LABEL
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project, ProjectFactory
    from isolated_host import IsolatedHost

pytestmark = pytest.mark.engine

STAGES = ("base", "pull", "install")


def layers_of(docker: Docker, image: str) -> list[str]:
    return docker.ok("image", "inspect", "--format={{json .RootFS.Layers}}", image).split(",")


def keys_of(docker: Docker, project: Project) -> dict[str, str]:
    return {stage: docker.labels(project.tag(stage))[KEY_LABEL] for stage in STAGES}


@pytest.mark.both_stores
def test_unchanged_project_is_up_to_date(project: Project) -> None:
    project.ok("push")
    before = project.tags()
    output = project.ok("base", "pull", "install", "push").stderr
    assert [line for line in output.splitlines() if line.endswith(": up to date")] == [
        f"{stage}: up to date" for stage in STAGES
    ]
    assert "container" not in output
    assert project.tags() == before


@pytest.mark.both_stores
def test_previous_images_of_a_stage_are_removed(project: Project) -> None:
    for packages in ("hello", "hello greet", "hello", "hello greet"):
        project.set(GUIX_PACKAGES=packages)
        project.ok("install", "push")
    # These start from the parent, so no image is based on the previous ones any more.
    for _ in range(2):
        project.ok("install", "--force")
    project.ok("base")
    only = f"--filter=label={IMAGE_LABEL}={project.image}"
    listing = project.docker.ok("image", "ls", "--quiet", "--filter=dangling=true", only)
    assert listing.split() == []


def test_lock_is_restored_from_the_image(project: Project, docker: Docker) -> None:
    lock = project.directory / LOCK
    text = lock.read_text()
    described = docker.run(project.tag("pull"), "guix", "describe", "--format=channels")
    assert text.strip() == described.stdout.strip()
    lock.unlink()
    assert "up to date" in project.ok("pull").stderr
    assert lock.read_text() == text


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
def test_changed_channels_are_refused_until_the_lock_is_updated(
    project: Project, factory: ProjectFactory, pattern: str, replacement: str, expected: str
) -> None:
    text = (factory.offline / "channels.scm").read_text()
    channels = project.directory / "channels.scm"
    channels.write_text(text)
    project.set(GUIX_CHANNELS="channels.scm")
    assert "pull: up to date" in project.ok("pull").stderr
    changed = re.sub(pattern, replacement, text)
    assert changed != text
    channels.write_text(changed)
    assert "GUIX_CHANNELS changed" in project.ok("status").stdout
    with project.assert_unchanged():
        refused, push = project.inv("pull"), project.inv("push")
    assert (refused.returncode, push.returncode) == (2, 2)
    assert expected in refused.stderr
    assert "`inv pull --update` updates the lock" in refused.stderr
    assert "GUIX_CHANNELS changed" in push.stderr


def test_channels_with_an_open_parenthesis_are_an_error_of_each_task(
    project: Project, factory: ProjectFactory
) -> None:
    text = (factory.offline / "channels.scm").read_text().rstrip()
    (project.directory / "channels.scm").write_text(f"\n{text[:-1]}\n")
    project.set(GUIX_CHANNELS="channels.scm")
    with project.assert_unchanged():
        for task in ("pull", "status", "push"):
            result = project.inv(task)
            assert result.returncode == 2, task
            assert f"{project.directory / 'channels.scm'}:2: ( is not closed" in result.stderr
            assert "Traceback" not in result.stderr


@pytest.mark.both_stores
def test_fresh_machine_takes_stages_from_the_cache(
    new_project: NewProject, docker: Docker, tmp_path: Path
) -> None:
    first = new_project(*STAGES)
    cache = f"{first.repository}-cache"
    first.set(CACHE_IMAGE=cache)
    # With other packages, the stages run and are pushed to the cache.
    first.set(GUIX_PACKAGES="hello")
    first.ok("base", "--force")
    first.ok("pull", "--force")
    first.ok("install")
    expected = keys_of(docker, first)

    second = new_project(CACHE_IMAGE=cache, GUIX_PACKAGES="hello")
    assert second.directory != first.directory
    shutil.copy(first.directory / LOCK, second.directory)
    first.remove()
    result = second.ok("install", "push")
    assert "install: taken from" in result.stderr
    assert "container" not in result.stderr
    assert docker.labels(second.tag("install"))[KEY_LABEL] == expected["install"]
    assert "base: taken from" in second.ok("base").stderr
    assert "pull: taken from" in second.ok("pull").stderr
    assert keys_of(docker, second) == expected
    assert docker.run(second.image, "hello").stdout == "Hello, world!\n"
    assert not docker.ok("image", "ls", "--quiet", cache)


@pytest.mark.other_store
def test_cache_is_shared_by_both_image_stores(
    new_project: NewProject, factory: ProjectFactory, other_store: IsolatedHost,
    machine_docker: Docker, tmp_path: Path,
) -> None:  # fmt: skip
    # The engines have different networks, so the same images need a second process.
    registry = LocalRegistry(other_store.registry.directory, free_port())
    registry.up(Console())
    on_machine = replace(factory, docker=machine_docker, registry=f"localhost:{registry.port}")
    other = on_machine.create(tmp_path / "machine")
    try:
        check_cache_is_shared(new_project(*STAGES), other)
    finally:
        other.remove()
        registry.down(Console())


@pytest.mark.parametrize(
    ("sandbox", "directory"),
    [("capabilities", "/root/.cache"), ("rootless", "/tmp/guix-tasks-cache")],  # noqa: S108
)
def test_fresh_machine_takes_channel_checkouts_from_the_cache(
    new_project: NewProject, docker: Docker, sandbox: str, directory: str
) -> None:
    first = new_project("base", GUIX_SANDBOX=sandbox)
    settings = {"GUIX_SANDBOX": sandbox, "CACHE_IMAGE": f"{first.repository}-cache"}
    first.set(**settings)
    checkouts = f"{settings['CACHE_IMAGE']}:checkouts-"
    assert f"push: {checkouts}" in first.ok("pull").stderr
    assert f"push: {checkouts}" not in first.ok("pull", "--force").stderr
    mark = f"for git in {directory}/guix/checkouts/*/.git; do touch $git/mark || exit; done"
    first.ok("run", "--", "sh", "-c", f"{mark}; rm {directory}/pushed-checkouts")
    assert f"push: {checkouts}" in first.ok("pull", "--force").stderr
    first.remove()

    second = new_project("base", repository=first.repository, **settings)
    log = second.ok("pull", "--update").stderr
    assert f"pull: starts from the checkouts of {checkouts}" in log
    assert f"push: {checkouts}" not in log
    marks = second.ok("run", "--", "sh", "-c", f"ls {directory}/guix/checkouts/*/.git/mark")
    assert len(marks.stdout.split()) == len(("guix", "offline"))
    assert not docker.ok("image", "ls", "--quiet", settings["CACHE_IMAGE"])


@pytest.mark.parametrize(
    ("sandbox", "directory", "volumes"),
    [("capabilities", "/root/.cache", 3), ("rootless", "/tmp/guix-tasks-cache", 2)],  # noqa: S108
)
def test_caches_are_on_volumes_and_removed_by_clean(
    new_project: NewProject, sandbox: str, directory: str, volumes: int
) -> None:
    project = new_project("base", GUIX_SANDBOX=sandbox)
    project.ok("pull")
    assert len(project.volumes()) == volumes
    checkouts = project.ok("run", "--", "find", f"{directory}/guix/checkouts", "-maxdepth", "1")
    assert len(checkouts.stdout.split()) > 1
    assert project.docker.run(project.image, "ls", directory).stdout == ""
    project.ok("clean")
    assert project.volumes() == []


def test_checkout_with_too_many_packs_is_cloned_again(new_project: NewProject) -> None:
    """After about 25 updates, Debian's Guix needs git, which the base image does not have."""
    project = new_project("base", GUIX_SANDBOX="capabilities")
    project.ok("pull")
    script = (
        'cd "/root/.cache/guix/checkouts" && for checkout in */; do for pack in $(seq 26); '
        'do : >"$checkout/.git/objects/pack/pack-$pack.pack"; done; done'
    )
    project.ok("run", "--", "sh", "-c", script)
    assert "Guix has no git to pack the checkout" in project.ok("pull", "--force").stderr
    assert "Guix has no git" not in project.ok("pull", "--force").stderr


@pytest.mark.both_stores
def test_squash_makes_one_layer_above_the_base(project: Project, docker: Docker) -> None:
    config = docker.config(project.image)
    project.ok("squash")
    base, squashed = layers_of(docker, project.tag("base")), layers_of(docker, project.image)
    assert len(squashed) == len(base) + 1
    squashed_config = docker.config(project.image)
    assert {k: v for k, v in squashed_config.items() if k != "Labels"} == {
        k: v for k, v in config.items() if k != "Labels"
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
def test_second_rollback_undoes_the_first(project: Project) -> None:
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
def test_status_shows_the_contents_of_the_image(project: Project, tmp_path: Path) -> None:
    table = project.ok("status", "--size", f"--plot={tmp_path / 'sizes.svg'}").stdout
    assert [line.split()[1] for line in table.splitlines() if line.startswith("stage ")] == list(
        STAGES
    )
    assert "hello-2.12" in table
    picture = ET.parse(tmp_path / "sizes.svg").getroot()  # noqa: S314 -- written by guix-tasks
    assert picture.tag.endswith("svg")
    texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert any(text and "hello-2.12" in text for text in texts)
