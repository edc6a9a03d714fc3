"""Images from the warm store are exact and reproducible, and changes add small layers."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, ProjectFactory, check_store, expect_error, read_contents
from isolated_host import copy_image

from guix_tasks.stages.container import PROJECT_LABEL

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import BuiltProject, Docker, Project, Result
    from isolated_host import IsolatedHost
    from soak import Soak


pytestmark = pytest.mark.engine

STAGES = ("base", "pull", "install")

PACKAGES = ("greet", "hello", "tar", "gzip")

LISTING = "find /gnu /var/guix /etc/guix /root -printf '%p %m %U:%G %s %T@ %l\n' | sort"


def layers(docker: Docker, image: str) -> list[str]:
    listing = docker.ok("image", "inspect", "--format={{json .RootFS.Layers}}", image)
    return re.findall(r"sha256:[0-9a-f]{64}", listing)


def files(docker: Docker, image: str) -> list[str]:
    """Return the files of Guix in an image, with mode, owner, size and time."""
    return docker.run(image, "sh", "-c", LISTING, options=["--entrypoint="]).stdout.splitlines()


def all_files(docker: Docker, image: str) -> list[str]:
    """Return all files of an image except those that the engine creates in each container.

    Times are in whole seconds, as in a layer; those of a locally built image can have fractions.
    """
    paths = "/dev /proc /sys /.dockerenv /etc /etc/hosts /etc/hostname /etc/mtab /etc/resolv.conf"
    skipped = " -o ".join(f"-path {path}" for path in paths.split())
    listing = (
        f"find / -mindepth 1 -xdev '(' {skipped} ')' '(' -path /etc -o -prune ')' -o "
        r"-type d -printf '%p %y %m %U:%G %T@\n' -o -printf '%p %y %m %U:%G %s %T@ %l\n'"
    )
    output = docker.run(image, "sh", "-c", listing, options=["--entrypoint=", "--user=0"]).stdout
    return sorted(re.sub(r"( \d+)\.\d{10}( |$)", r"\1\2", line) for line in output.splitlines())


def store_volumes(project: Project) -> set[str]:
    return {name for name in project.volumes() if "-store-" in name}


def run_on_volume(project: Project, volume: str, command: str) -> None:
    """Run a shell command with a volume at ``/dev/store``."""
    project.docker.ok(
        "run", "--rm", "--network=none", f"--volume={volume}:/dev/store", "--entrypoint=sh",
        project.image, "-c", command,
    )  # fmt: skip


def ran_guix(result: Result) -> bool:
    return "guix package" in result.stderr


@pytest.mark.both_stores
def test_image_after_changes_equals_a_new_image(new_project: NewProject, docker: Docker) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="hello")
    project.ok("install")
    for packages in ("hello greet", "greet tar", "tar greet gzip"):
        project.set(GUIX_PACKAGES=packages)
        project.ok("install")
    base, changed = layers(docker, project.tag("base")), layers(docker, project.image)
    assert len(base) < len(changed) <= len(base) + 10
    new = new_project("base", "pull", GUIX_PACKAGES="tar greet gzip")
    new.ok("install")
    assert len(layers(docker, new.image)) == len(base) + 2
    assert files(docker, project.image) == files(docker, new.image)
    check_store(docker, project.image)
    project.ok("verify")


def test_previous_packages_come_from_the_volume(new_project: NewProject, docker: Docker) -> None:
    reused = "Guix has made this before"
    project = new_project(*STAGES)
    for packages, is_reused in (("hello", False), ("hello greet", False), ("hello", True)):
        project.set(GUIX_PACKAGES=packages)
        result = project.ok("install")
        assert (reused in result.stderr) == is_reused, packages
    expected = files(docker, project.image)
    installed = docker.labels(project.image)["org.guix-tasks.packages"].split()
    assert [package.partition("@")[0] for package in installed] == ["hello"]
    assert reused not in project.ok("install", "--force").stderr
    assert files(docker, project.image) == expected
    # A damaged volume lacks an item of the database.
    project.set(GUIX_PACKAGES="hello greet")
    (volume,) = store_volumes(project)
    run_on_volume(project, volume, "rm -rf /dev/store/store/*-greet-*")
    assert "lacked store items" in expect_error(project.inv("install"), 4)
    assert reused not in project.ok("install").stderr
    check_store(docker, project.image)


def test_same_inputs_give_the_same_layers_on_each_engine(
    new_project: NewProject, other_store: IsolatedHost, factory: ProjectFactory, tmp_path: Path
) -> None:
    first, second = (new_project("base", GUIX_SANDBOX=box) for box in ("auto", "capabilities"))
    address = f"localhost:{other_store.registry.port}"
    other_factory = ProjectFactory(
        other_store.docker, address, factory.offline, other_store.directory
    )
    other = other_factory.create(tmp_path / "other")
    copy_image(first.tag("base"), first.docker, other.docker)
    other.docker.ok("tag", first.tag("base"), other.tag("base"))
    try:
        for project in (first, second, other):
            project.ok("pull", "install")
        expected = layers(first.docker, first.image)
        assert layers(second.docker, second.image) == expected
        assert layers(other.docker, other.image) == expected
    finally:
        other.remove()


ONE = """RUN mkdir /srv/a /srv/b /srv/d && echo 1 >/srv/a/file && ln -s a /srv/link \\
    && echo 1 >/srv/b/same-size && ln /srv/a/file /srv/second && echo 1 >/srv/gone
"""
TWO = """RUN mkdir -p /srv/a/file /srv/b && echo 2 >/srv/a/file/below && ln -s b /srv/link \\
    && echo 2 >/srv/b/same-size && echo 2 >/srv/d && ln /srv/d /srv/second && chmod 4755 /srv/d \\
    && mkdir -m 700 /srv/new && chown 1000:9 /srv/new && chmod 711 /opt && rm /etc/issue \\
    && cp -p /usr/bin/tar /srv/tar && mv /srv/tar /usr/bin/tar
"""
"""Steps of a Dockerfile: the second changes, adds and removes files, links and directories."""


@pytest.mark.both_stores(only_soak=True)
def test_changed_file_of_the_base_adds_one_layer(new_project: NewProject, docker: Docker) -> None:
    project = new_project(GUIX_PACKAGES="hello", DOCKERFILE="Dockerfile")
    dockerfile, text = project.directory / "Dockerfile", (ROOT / "Dockerfile").read_text()
    dockerfile.write_text(text + ONE)
    project.ok("base", "pull", "install", "push")
    previous = layers(docker, project.image)
    dockerfile.write_text(text + TWO)
    result = project.ok("base", "pull", "install", "push")
    assert not ran_guix(result)
    assert docker.run(project.image, "hello").stdout == "Hello, world!\n"
    assert layers(docker, project.image)[:-1] == previous
    assert project.ok("base", "pull", "install").stderr.count("up to date") == len(STAGES)
    check_store(docker, project.image)

    new = new_project(GUIX_PACKAGES="hello", DOCKERFILE="Dockerfile")
    (new.directory / "Dockerfile").write_text(text + TWO)
    # Another build of the base could have other times.
    new.copy_stage("base", project)
    new.ok("pull", "install")
    expected = all_files(docker, new.image)
    assert all_files(docker, project.image) == expected
    project.set(GUIX_PACKAGES="hello greet")
    assert "cannot compare" not in project.ok("install").stderr
    assert len(layers(docker, project.image)) == len(previous) + 2
    project.ok("squash")
    project.set(GUIX_PACKAGES="hello")
    project.ok("install", "squash")
    assert all_files(docker, project.image) == expected


def test_missing_volume_is_seeded_from_the_image(new_project: NewProject, docker: Docker) -> None:
    project = new_project(*STAGES)
    project.set(GUIX_PACKAGES="hello greet tar")
    project.ok("install")
    for volume in project.volumes():
        docker.ok("volume", "rm", volume)
    project.set(GUIX_PACKAGES="hello tar")
    result = project.ok("install")
    # Only the programs that build a profile are downloaded.
    assert not re.search(r"substitution of \S+-(hello|tar|greet)-", result.stderr)
    assert docker.run(project.image, "hello").stdout == "Hello, world!\n"
    check_store(docker, project.image)


def test_item_that_is_missing_on_the_volume_is_copied_from_the_image(
    new_project: NewProject, docker: Docker
) -> None:
    project = new_project(*STAGES)
    project.set(GUIX_PACKAGES="hello tar")
    project.ok("install")
    (volume,) = store_volumes(project)
    run_on_volume(project, volume, "rm -rf /dev/store/store/* /dev/store/guix-tasks/db/*")
    project.set(GUIX_PACKAGES="hello greet tar")
    project.ok("install")
    check_store(docker, project.image)


def test_volume_with_files_of_root_is_recreated(new_project: NewProject, docker: Docker) -> None:
    """A killed run can leave such a volume."""
    project = new_project("base", GUIX_SANDBOX="rootless", GUIX_PACKAGES="hello")
    project.ok("pull", "install")
    (volume,) = store_volumes(project)
    run_on_volume(project, volume, "chown 0:0 /dev/store/guix-tasks/db/*")
    project.set(GUIX_PACKAGES="hello greet")
    assert "is damaged; recreating it" in project.ok("install").stderr
    check_store(docker, project.image)


GROW = """
(use-modules (sqlite3))
(sqlite-exec (sqlite-open "/dev/store/guix-tasks/db/db.sqlite")
             "update ValidPaths set narSize = 90000000000 where path like '%-profile.drv'")
"""


def test_volume_with_many_unused_items_is_recreated(
    new_project: NewProject, docker: Docker
) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="hello", GUIX_SANDBOX="capabilities")
    project.ok("install")
    (volume,) = store_volumes(project)
    grow = f"echo {shlex.quote(GROW)} >/tmp/grow.scm; guix repl -- /tmp/grow.scm"
    run_on_volume(project, volume, grow)
    project.set(GUIX_PACKAGES="hello tar")
    assert f"removing the volume {volume}, because " in project.ok("install").stderr
    assert volume not in project.volumes()
    project.set(GUIX_PACKAGES="tar")
    assert "removing the volume" not in project.ok("install").stderr
    check_store(docker, project.image)


@pytest.mark.parametrize("killed", ["inv", "container"])
@pytest.mark.parametrize("work", ["seed", "assemble"])
def test_run_after_killed_work_on_the_volume_finishes(
    new_project: NewProject, docker: Docker, work: str, killed: str
) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="hello tar")
    events = docker.argv(
        "events", f"--filter=label={PROJECT_LABEL}={project.image}", "--filter=event=start",
        "--format={{.Actor.Attributes.name}}",
    )  # fmt: skip
    with subprocess.Popen(events, stdout=subprocess.PIPE, text=True) as listener:
        task = project.start("install")
        assert listener.stdout
        name = next(line.strip() for line in listener.stdout if f"-{work}-" in line)
        if killed == "inv":
            task.process.kill()
        else:
            docker.ok("kill", name)
        listener.kill()
    status = -signal.SIGKILL if killed == "inv" else 4
    assert task.process.wait(timeout=60) == status, task.output()
    assert project.id("install") is None
    project.ok("install")
    assert project.containers() == []
    assert docker.run(project.image, "hello").stdout == "Hello, world!\n"
    check_store(docker, project.image)


def test_image_after_random_changes_has_only_needed_items(
    new_project: NewProject, docker: Docker, soak: Soak
) -> None:
    project = new_project("base")
    base = len(layers(docker, project.tag("base")))
    project.ok("pull")
    rng, times = soak.rng("changes of the packages"), soak.times(10, 100)
    for _ in range(times):
        packages = rng.sample(PACKAGES, rng.randint(1, len(PACKAGES)))
        project.set(GUIX_PACKAGES=" ".join(packages))
        project.ok("install")
        assert len(layers(docker, project.image)) <= base + 11
    check_store(docker, project.image)
    expected = files(docker, project.image)
    project.ok("install", "--force")
    assert files(docker, project.image) == expected
    soak.report("assembled images", f"{times} random changes of the packages")


@pytest.mark.parametrize(
    "sandbox",
    [
        "capabilities",
        pytest.param("privileged", marks=pytest.mark.only_soak),
        pytest.param("nochroot", marks=pytest.mark.only_soak),
    ],
)
def test_each_sandbox_makes_the_same_image_with_the_warm_store(
    new_project: NewProject, built_project: BuiltProject, docker: Docker, sandbox: str
) -> None:
    assert "in a rootless container" in built_project.calls["pull"].stderr
    check_store(docker, built_project.project.image)
    project = new_project("base", GUIX_SANDBOX=sandbox, GUIX_PACKAGES="hello")
    project.ok("pull", "install")
    project.set(GUIX_PACKAGES=built_project.project.settings["GUIX_PACKAGES"])
    project.ok("install")
    check_store(docker, project.image)
    assert read_contents(docker, project.image) == read_contents(
        docker, built_project.project.image
    )
    if sandbox != "nochroot":  # a build that is not isolated can write other bytes
        assert files(docker, project.image) == files(docker, built_project.project.image)
    assert [line for line in files(docker, project.image) if " 0:0 " not in line] == [
        line for line in files(docker, project.tag("base")) if " 0:0 " not in line
    ]


def test_item_of_other_trust_settings_reaches_no_image(
    new_project: NewProject, docker: Docker, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = new_project(*STAGES)
    project.ok("install", "--force")
    trusted = store_volumes(project)
    key = tmp_path_factory.mktemp("keys") / "other.pub"
    script = "guix archive --generate-key >/dev/null 2>&1; cat /etc/guix/signing-key.pub"
    key.write_text(docker.run(project.image, "sh", "-c", script).stdout)
    keys = project.settings["GUIX_SUBSTITUTE_KEYS"]
    project.set(GUIX_SUBSTITUTE_KEYS=f"{keys} {key}")
    project.ok("pull", "install")
    (other,) = store_volumes(project) - trusted
    # A daemon that trusts the other key could have accepted this item.
    plant = "for file in /dev/store/store/*-hello-*/bin/hello; do echo planted >$file; done"
    run_on_volume(project, other, f"chmod -R u+w /dev/store/store/*-hello-*; {plant}")
    project.ok("install", "--force")
    assert docker.run(project.image, "cat", "/root/.guix-profile/bin/hello").stdout == "planted\n"
    project.set(GUIX_SUBSTITUTE_KEYS=keys)
    project.ok("pull", "install")
    assert docker.run(project.image, "hello").stdout == "Hello, world!\n"
    check_store(docker, project.image)


@pytest.mark.both_stores(only_soak=True)
def test_image_without_a_cache_volume_has_the_same_packages(
    new_project: NewProject, built_project: BuiltProject, docker: Docker
) -> None:
    project = new_project("base", CACHE_VOLUME="")
    project.ok("pull", "install")
    command = ("guix", "package", "--list-installed")
    expected = docker.run(built_project.project.image, *command).stdout
    assert docker.run(project.image, *command).stdout == expected
