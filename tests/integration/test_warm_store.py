"""Images that are assembled from the warm store: exact, deterministic, and cheap to change."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, Workshop, check_store, contents, one_error
from island import load_image

from guix_tasks.stages.container import PROJECT_LABEL

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Made, Project, Result
    from island import Island
    from soak import Soak


pytestmark = pytest.mark.engine

STAGES = ("base", "pull", "install")

PACKAGES = ("greet", "hello", "tar", "gzip")

LISTING = "find /gnu /var/guix /etc/guix /root -printf '%p %m %U:%G %s %T@ %l\n' | sort"


def layers(docker: Docker, image: str) -> list[str]:
    listed = docker.ok("image", "inspect", "--format={{json .RootFS.Layers}}", image)
    return re.findall(r"sha256:[0-9a-f]{64}", listed)


def files(docker: Docker, image: str) -> list[str]:
    """Return the files of Guix in an image, with mode, owner, size and time."""
    return docker.run(image, "sh", "-c", LISTING, options=["--entrypoint="]).stdout.splitlines()


def all_files(docker: Docker, image: str) -> list[str]:
    """Return all files of an image but those that the engine makes in each container.

    Times are in whole seconds, as in a layer; what a builder made here can have fractions.
    """
    ours = "/dev /proc /sys /.dockerenv /etc /etc/hosts /etc/hostname /etc/mtab /etc/resolv.conf"
    skipped = " -o ".join(f"-path {path}" for path in ours.split())
    listing = (
        f"find / -mindepth 1 -xdev '(' {skipped} ')' '(' -path /etc -o -prune ')' -o "
        r"-type d -printf '%p %y %m %U:%G %T@\n' -o -printf '%p %y %m %U:%G %s %T@ %l\n'"
    )
    found = docker.run(image, "sh", "-c", listing, options=["--entrypoint=", "--user=0"]).stdout
    return sorted(re.sub(r"( \d+)\.\d{10}( |$)", r"\1\2", line) for line in found.splitlines())


def run_on_volume(project: Project, volume: str, command: str) -> None:
    """Run a shell command with a volume at ``/dev/store``."""
    project.docker.ok(
        "run", "--rm", "--network=none", f"--volume={volume}:/dev/store", "--entrypoint=sh",
        project.image, "-c", command,
    )  # fmt: skip


def ran_guix(result: Result) -> bool:
    return "guix package" in result.stderr


@pytest.mark.both_stores
def test_image_after_changes_equals_one_that_is_made_at_once(
    new_project: NewProject, docker: Docker
) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="hello")
    project.ok("install")
    for packages in ("hello greet", "greet tar", "tar greet gzip"):
        project.set(GUIX_PACKAGES=packages)
        project.ok("install")
    base, changed = layers(docker, project.tag("base")), layers(docker, project.image)
    assert len(base) < len(changed) <= len(base) + 10
    at_once = new_project("base", "pull", GUIX_PACKAGES="tar greet gzip")
    at_once.ok("install")
    assert len(layers(docker, at_once.image)) == len(base) + 2
    assert files(docker, project.image) == files(docker, at_once.image)
    check_store(docker, project.image)
    project.ok("verify")


def test_earlier_packages_come_from_the_volume(new_project: NewProject, docker: Docker) -> None:
    reused = "Guix has made this before"
    project = new_project(*STAGES)
    for packages, is_reused in (("hello", False), ("hello greet", False), ("hello", True)):
        project.set(GUIX_PACKAGES=packages)
        result = project.ok("install")
        assert (reused in result.stderr) == is_reused, packages
    back = files(docker, project.image)
    listed = docker.labels(project.image)["org.guix-tasks.packages"].split()
    assert [package.partition("@")[0] for package in listed] == ["hello"]
    assert reused not in project.ok("install", "--force").stderr
    assert files(docker, project.image) == back
    # Nobody deletes an item without telling Guix, but a volume can be damaged.
    project.set(GUIX_PACKAGES="hello greet")
    (volume,) = [name for name in project.volumes() if "-store-" in name]
    run_on_volume(project, volume, "rm -rf /dev/store/store/*-greet-*")
    assert "lacked store items" in one_error(project.inv("install"), 4)
    assert reused not in project.ok("install").stderr
    check_store(docker, project.image)


def test_same_inputs_give_the_same_layers_on_each_engine(
    new_project: NewProject, other_store: Island, workshop: Workshop, tmp_path: Path
) -> None:
    here = [new_project("base", GUIX_SANDBOX=sandbox) for sandbox in ("auto", "capabilities")]
    where = f"localhost:{other_store.registry.port}"
    there = Workshop(other_store.docker, where, workshop.offline, other_store.directory).project(
        tmp_path / "there"
    )
    load_image(here[0].tag("base"), workshop.docker, there.docker)
    there.docker.ok("tag", here[0].tag("base"), there.tag("base"))
    try:
        for project in (*here, there):
            project.ok("pull", "install")
        wanted = layers(workshop.docker, here[0].image)
        assert layers(workshop.docker, here[1].image) == wanted
        assert layers(there.docker, there.image) == wanted
    finally:
        there.remove()


ONE = """RUN mkdir /srv/a /srv/b /srv/d && echo 1 >/srv/a/file && ln -s a /srv/link \\
    && echo 1 >/srv/b/same-size && ln /srv/a/file /srv/second && echo 1 >/srv/gone
"""
TWO = """RUN mkdir -p /srv/a/file /srv/b && echo 2 >/srv/a/file/below && ln -s b /srv/link \\
    && echo 2 >/srv/b/same-size && echo 2 >/srv/d && ln /srv/d /srv/second && chmod 4755 /srv/d \\
    && mkdir -m 700 /srv/new && chown 1000:9 /srv/new && chmod 711 /opt && rm /etc/issue \\
    && cp -p /usr/bin/tar /srv/tar && mv /srv/tar /usr/bin/tar
"""
"""Steps of a Dockerfile: the second changes, adds and removes files, links and directories."""


@pytest.mark.both_stores
def test_changed_file_of_the_base_costs_only_that_file(
    new_project: NewProject, docker: Docker
) -> None:
    project = new_project(GUIX_PACKAGES="hello", DOCKERFILE="Dockerfile")
    dockerfile, text = project.directory / "Dockerfile", (ROOT / "Dockerfile").read_text()
    dockerfile.write_text(text + ONE)
    project.ok("base", "pull", "install", "push")
    before = layers(docker, project.image)
    dockerfile.write_text(text + TWO)
    result = project.ok("base", "pull", "install", "push")
    assert not ran_guix(result)
    assert docker.run(project.image, "hello").stdout == "Hello, world!\n"
    assert layers(docker, project.image)[:-1] == before
    assert project.ok("base", "pull", "install").stderr.count("up to date") == len(STAGES)
    check_store(docker, project.image)

    at_once = new_project(GUIX_PACKAGES="hello", DOCKERFILE="Dockerfile")
    (at_once.directory / "Dockerfile").write_text(text + TWO)
    # Built again, it could have other times.
    at_once.take("base", project)
    at_once.ok("pull", "install")
    wanted = all_files(docker, at_once.image)
    assert all_files(docker, project.image) == wanted
    project.set(GUIX_PACKAGES="hello greet")
    assert "cannot compare" not in project.ok("install").stderr
    assert len(layers(docker, project.image)) == len(before) + 2
    project.ok("squash")
    project.set(GUIX_PACKAGES="hello")
    project.ok("install", "squash")
    assert all_files(docker, project.image) == wanted


def test_lost_volume_is_seeded_from_the_image(new_project: NewProject, docker: Docker) -> None:
    project = new_project(*STAGES)
    project.set(GUIX_PACKAGES="hello greet tar")
    project.ok("install")
    for volume in project.volumes():
        docker.ok("volume", "rm", volume)
    project.set(GUIX_PACKAGES="hello tar")
    result = project.ok("install")
    # What is in the image is not downloaded; only what builds a profile is.
    assert not re.search(r"substitution of \S+-(hello|tar|greet)-", result.stderr)
    assert docker.run(project.image, "hello").stdout == "Hello, world!\n"
    check_store(docker, project.image)


def test_item_that_is_missing_on_the_volume_is_copied_from_the_image(
    new_project: NewProject, docker: Docker
) -> None:
    project = new_project(*STAGES)
    project.set(GUIX_PACKAGES="hello tar")
    project.ok("install")
    (volume,) = [name for name in project.volumes() if "-store-" in name]
    run_on_volume(project, volume, "rm -rf /dev/store/store/* /dev/store/guix-tasks/db/*")
    project.set(GUIX_PACKAGES="hello greet tar")
    project.ok("install")
    check_store(docker, project.image)


def test_volume_that_a_killed_run_left_to_root_is_created_again(
    new_project: NewProject, docker: Docker
) -> None:
    project = new_project("base", GUIX_SANDBOX="rootless", GUIX_PACKAGES="hello")
    project.ok("pull", "install")
    (volume,) = [name for name in project.volumes() if "-store-" in name]
    run_on_volume(project, volume, "chown 0:0 /dev/store/guix-tasks/db/*")
    project.set(GUIX_PACKAGES="hello greet")
    assert "is damaged; recreating it" in project.ok("install").stderr
    check_store(docker, project.image)


GROW = """
(use-modules (sqlite3))
(sqlite-exec (sqlite-open "/dev/store/guix-tasks/db/db.sqlite")
             "update ValidPaths set narSize = 90000000000 where path like '%-profile.drv'")
"""


def test_volume_with_much_unused_is_created_again(new_project: NewProject, docker: Docker) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="hello", GUIX_SANDBOX="capabilities")
    project.ok("install")
    (volume,) = [name for name in project.volumes() if "-store-" in name]
    grow = f"echo {shlex.quote(GROW)} >/tmp/grow.scm; guix repl -- /tmp/grow.scm"
    run_on_volume(project, volume, grow)
    project.set(GUIX_PACKAGES="hello tar")
    assert f"removing the volume {volume}, because " in project.ok("install").stderr
    assert volume not in project.volumes()
    project.set(GUIX_PACKAGES="tar")
    assert "removing the volume" not in project.ok("install").stderr
    check_store(docker, project.image)


@pytest.mark.parametrize("who", ["inv", "container"])
@pytest.mark.parametrize("work", ["seed", "assemble"])
def test_killed_work_on_the_volume_is_done_by_the_next_run(
    new_project: NewProject, docker: Docker, work: str, who: str
) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="hello tar")
    events = docker.argv(
        "events", f"--filter=label={PROJECT_LABEL}={project.image}", "--filter=event=start",
        "--format={{.Actor.Attributes.name}}",
    )  # fmt: skip
    with subprocess.Popen(events, stdout=subprocess.PIPE, text=True) as listening:
        started = project.start("install")
        assert listening.stdout
        name = next(line.strip() for line in listening.stdout if f"-{work}-" in line)
        if who == "inv":
            started.inv.kill()
        else:
            docker.ok("kill", name)
        listening.kill()
    assert started.inv.wait(timeout=60) == (-signal.SIGKILL if who == "inv" else 4), started.said()
    assert project.id("install") is None
    project.ok("install")
    assert project.containers() == []
    assert docker.run(project.image, "hello").stdout == "Hello, world!\n"
    check_store(docker, project.image)


def test_random_changes_leave_exactly_what_is_needed(
    new_project: NewProject, docker: Docker, soak: Soak
) -> None:
    project = new_project("base")
    base = len(layers(docker, project.tag("base")))
    project.ok("pull")
    chance, times = soak.chance("changes of the packages"), soak.times(10, 100)
    for _ in range(times):
        packages = chance.sample(PACKAGES, chance.randint(1, len(PACKAGES)))
        project.set(GUIX_PACKAGES=" ".join(packages))
        project.ok("install")
        assert len(layers(docker, project.image)) <= base + 11
    check_store(docker, project.image)
    changed = files(docker, project.image)
    project.ok("install", "--force")
    assert files(docker, project.image) == changed
    soak.tell("assembled images", f"{times} random changes of the packages")


@pytest.mark.parametrize("sandbox", ["privileged", "capabilities", "nochroot"])
def test_each_sandbox_makes_the_same_with_the_warm_store(
    new_project: NewProject, made: Made, docker: Docker, sandbox: str
) -> None:
    assert "in a rootless container" in made.calls["pull"].stderr
    check_store(docker, made.project.image)
    project = new_project("base", GUIX_SANDBOX=sandbox, GUIX_PACKAGES="hello")
    project.ok("pull", "install")
    project.set(GUIX_PACKAGES=made.project.settings["GUIX_PACKAGES"])
    project.ok("install")
    check_store(docker, project.image)
    assert contents(docker, project.image) == contents(docker, made.project.image)
    if sandbox != "nochroot":  # a build that is not isolated can write other bytes
        assert files(docker, project.image) == files(docker, made.project.image)
    assert [line for line in files(docker, project.image) if " 0:0 " not in line] == [
        line for line in files(docker, project.tag("base")) if " 0:0 " not in line
    ]


def test_item_of_other_trust_settings_reaches_no_image(
    new_project: NewProject, docker: Docker, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = new_project(*STAGES)
    project.ok("install", "--force")
    trusted = {name for name in project.volumes() if "-store-" in name}
    key = tmp_path_factory.mktemp("keys") / "other.pub"
    script = "guix archive --generate-key >/dev/null 2>&1; cat /etc/guix/signing-key.pub"
    key.write_text(docker.run(project.image, "sh", "-c", script).stdout)
    own = project.settings["GUIX_SUBSTITUTE_KEYS"]
    project.set(GUIX_SUBSTITUTE_KEYS=f"{own} {key}")
    project.ok("pull", "install")
    (other,) = {name for name in project.volumes() if "-store-" in name} - trusted
    # What a daemon that trusts the other key could have accepted.
    plant = "for file in /dev/store/store/*-hello-*/bin/hello; do echo planted >$file; done"
    run_on_volume(project, other, f"chmod -R u+w /dev/store/store/*-hello-*; {plant}")
    project.ok("install", "--force")
    assert docker.run(project.image, "cat", "/root/.guix-profile/bin/hello").stdout == "planted\n"
    project.set(GUIX_SUBSTITUTE_KEYS=own)
    project.ok("pull", "install")
    assert docker.run(project.image, "hello").stdout == "Hello, world!\n"
    check_store(docker, project.image)


@pytest.mark.both_stores
def test_without_a_cache_volume_images_have_the_same_packages(
    new_project: NewProject, made: Made, docker: Docker
) -> None:
    cold = new_project("base", CACHE_VOLUME="")
    cold.ok("pull", "install")
    listed = [
        docker.run(project.image, "guix", "package", "--list-installed").stdout
        for project in (cold, made.project)
    ]
    assert listed[0] == listed[1]


def test_clean_removes_the_volume(project: Project) -> None:
    project.ok("install", "--force")
    assert [name for name in project.volumes() if "-store-" in name]
    project.ok("clean")
    assert project.volumes() == []
