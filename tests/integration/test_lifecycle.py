"""The tasks of the lifecycle and of changes by hand, on a real engine."""

from __future__ import annotations

import re
import secrets
import signal
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from harness import (
    LOCK,
    OFFLINE,
    READER,
    Project,
    ProjectFactory,
    RecordingProxy,
    Result,
    Terminal,
    error_lines,
    expect_error,
    find_processes,
    free_port,
    inv_argv,
    wait_until,
)

from guix_tasks import guix
from guix_tasks.bootstrap.registry import answers
from guix_tasks.oci.labels import CREATED
from guix_tasks.stages.container import PROJECT_LABEL
from guix_tasks.stages.images import (
    CHANNELS_LABEL,
    FILES_LABEL,
    IMAGE_LABEL,
    LAYERS_LABEL,
    PACKAGES_LABEL,
    STAGES,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import BuiltProject


pytestmark = pytest.mark.engine

GREETING = "Hello, world!\n"
SIMPLE = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n"
WITH_NOTE = f"{SIMPLE}ARG NOTE\nRUN echo $NOTE >/note\n"


# --- the pushed image


@dataclass(frozen=True)
class Pushed:
    """An image that was made and pushed by one call, removed, and pulled by its digest."""

    project: Project
    call: Result
    image: str

    def run(self, *command: str, options: tuple[str, ...] = ()) -> str:
        result = self.project.docker.run(self.image, *command, options=options)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def pushed(factory: ProjectFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    project = factory.create(tmp_path_factory.mktemp("pushed") / "project")
    try:
        call = project.ok("pull", "install", "commit", "push", timeout=480)
        image = f"{project.repository}@{call.stdout.strip().rpartition('@')[2]}"
        for tag in project.tags():
            project.docker.ok("rmi", f"{project.repository}:{tag}")
        project.docker.ok("pull", "--quiet", image)
        yield Pushed(project, call, image)
        project.docker.ok("rmi", image)
    finally:
        project.remove()


@pytest.mark.both_stores
def test_push_prints_only_the_digest_on_standard_output(pushed: Pushed) -> None:
    reference = re.escape(pushed.project.image)
    assert re.fullmatch(rf"{reference}@sha256:[0-9a-f]{{64}}\n", pushed.call.stdout)


def test_missing_parent_is_made_first(pushed: Pushed) -> None:
    base = pushed.project.tag("base")
    assert f"\npull: {base} is missing, so base comes first\n" in pushed.call.stderr
    assert "commit: nothing to commit\n" in pushed.call.stderr


@pytest.mark.both_stores
def test_one_call_makes_the_same_image_as_several(
    pushed: Pushed, built_project: BuiltProject
) -> None:
    one = pushed.project.docker.config(pushed.image)
    several = built_project.project.docker.config(built_project.project.image)
    for config in (one, several):
        # Layers contain times, and projects have different names.
        for label in (LAYERS_LABEL, FILES_LABEL, CREATED, IMAGE_LABEL):
            del config["Labels"][label]
    assert one == several


@pytest.mark.both_stores
def test_image_has_the_configuration_of_its_base(
    pushed: Pushed, built_project: BuiltProject
) -> None:
    config = pushed.project.docker.config(pushed.image)
    base = built_project.project.docker.config(built_project.project.tag("base"))
    assert config["Entrypoint"] == ["/entry-point.sh"]
    assert config["Cmd"] == ["bash"]
    del config["Labels"], base["Labels"]
    assert config == base


@pytest.mark.both_stores
def test_image_contains_nothing_of_work_containers(pushed: Pushed) -> None:
    labels = pushed.project.docker.labels(pushed.image)
    assert not labels[PROJECT_LABEL]
    assert set(pushed.run("ls", "-A", "/").split()) >= {"gnu", "entry-point.sh"}
    assert "guix-tasks" not in pushed.run("ls", "-A", "/", "/var/guix")
    assert pushed.run("find", "/tmp", "-mindepth", "1") == ""  # noqa: S108
    assert ".cache" not in pushed.run("ls", "-A", "/root").split()
    assert "GUIX_SUBSTITUTE_URLS" not in pushed.run("env")


def test_guix_of_the_image_is_from_the_channels(pushed: Pushed, factory: ProjectFactory) -> None:
    expected = {name: factory.channel_commit(name) for name in ("guix", "offline")}
    description = pushed.run("guix", "describe", "--format=channels")
    assert guix.commits(description) == expected
    assert guix.commits(pushed.project.docker.labels(pushed.image)[CHANNELS_LABEL]) == expected


def test_channels_file_of_the_image_has_the_pulled_channels(
    pushed: Pushed, factory: ProjectFactory
) -> None:
    channels = guix.channels(pushed.run("cat", guix.CHANNELS_FILE))
    expected = guix.channels((factory.offline / "channels.scm").read_text())
    assert {name: channel.url for name, channel in channels.items()} == {
        name: channel.url for name, channel in expected.items()
    }


def test_profile_of_the_image_has_the_packages(pushed: Pushed) -> None:
    installed = guix.installed(pushed.run("guix", "package", "--list-installed"))
    assert [package.partition("@")[0] for package in installed] == ["greet", "hello"]
    assert pushed.project.docker.labels(pushed.image)[PACKAGES_LABEL].split() == installed


def test_history_names_the_stage_of_each_layer(project: Project) -> None:
    comments = project.docker.ok("history", "--format={{.Comment}}", project.image).split("\n")
    # The base stage adds no layer to the image of its Dockerfile, only a configuration.
    assert comments[:3] == ["guix-tasks: install", "guix-tasks: pull", "guix-tasks: base"]


@pytest.mark.parametrize("user", ["0", "1000", "65534:65534"])
def test_installed_program_runs_for_every_user(pushed: Pushed, user: str) -> None:
    assert pushed.run("hello", options=(f"--user={user}",)) == GREETING


# --- stages


def test_stale_parent_stops_a_stage(new_project: NewProject) -> None:
    project = new_project("base", "pull", "install", BUILD_ARGS="NOTE=1")
    project.write_dockerfile(WITH_NOTE)
    project.set(BASE_IMAGE=f"{project.repository}:ground")
    project.docker.ok("tag", project.tag("base"), f"{project.repository}:ground")
    project.ok("base")
    with project.assert_unchanged():
        error = expect_error(project.inv("install", "--force"), 2)
        assert "pull is stale" in error
        assert "`inv pull`" in error
        assert "`inv install --upstream`" in error
        assert "is stale" in expect_error(project.inv("push"), 2)
    image = project.id()
    project.ok("pull")
    assert project.id() == image == project.id("install")
    with project.assert_unchanged():
        assert "`inv install" in expect_error(project.inv("push"), 2)
    project.set(BUILD_ARGS="NOTE=2")
    project.ok("base")
    project.ok("install", "--upstream", "push", timeout=480)
    assert project.id() == project.id("install") != image
    assert project.docker.run(project.image, "cat", "/note").stdout == "2\n"
    assert project.docker.run(project.image, "hello").stdout == GREETING


@pytest.fixture(scope="module")
def greeter(
    factory: ProjectFactory, built_project: BuiltProject, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Project, Result]]:
    """Replace the two packages of an image by one."""
    project = factory.create(tmp_path_factory.mktemp("greeter") / "project")
    try:
        for stage in ("base", "pull", "install"):
            project.copy_stage(stage, built_project.project)
        yield project, project.ok("install", "--package", "greet")
    finally:
        project.remove()


def test_other_packages_replace_the_previous_ones(greeter: tuple[Project, Result]) -> None:
    project, call = greeter
    assert re.search(r"^install: removed hello@\S+$", call.stderr, re.MULTILINE)
    greeting = f"{guix.PROFILE}/share/greeting"
    assert project.docker.run(project.image, "cat", greeting).stdout == "hello from a channel\n"
    assert project.docker.run(project.image, "hello").returncode == 127


def test_manifest_keeps_the_packages_of_the_base(
    greeter: tuple[Project, Result], new_project: NewProject
) -> None:
    project = new_project(
        BASE_IMAGE=greeter[0].image,
        GUIX_CHANNELS="",
        GUIX_CHANNELS_LOCK="",
        GUIX_PACKAGES="",
        GUIX_MANIFEST=str(OFFLINE / "manifest.scm"),
    )
    project.write_dockerfile(SIMPLE)
    result = project.ok("install")
    # Without channels, the pull stage is not needed.
    assert f"install: {project.tag('base')} is missing, so base comes first\n" in result.stderr
    assert project.id("pull") is None
    listing = project.docker.run(project.image, "guix", "package", "--list-installed").stdout
    names = {package.partition("@")[0] for package in guix.installed(listing)}
    assert names == {"greet", "hello", "tar"}


def test_search_paths_are_set_for_every_program(new_project: NewProject) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="", GUIX_MANIFEST="manifest.scm")
    (project.directory / "manifest.scm").write_text(READER)
    project.ok("install")
    docker, greet = project.docker, f"{guix.PROFILE}/share/greet\n"
    for user in ("0", "1000"):
        assert docker.run(project.image, "reader", options=(f"--user={user}",)).stdout == greet
    assert docker.run(project.image, options=("--entrypoint=reader",)).stdout == greet
    assert project.ok("run", "--", "reader").stdout == greet
    # --- the base sets the variable
    docker.ok("tag", project.tag("base"), f"{project.repository}:ground")
    project.write_dockerfile(f"{SIMPLE}ENV GREET_PATH=/srv/greet\n")
    project.set(BASE_IMAGE=f"{project.repository}:ground")
    project.ok("base", "pull", "install")
    both = f"{guix.PROFILE}/share/greet:/srv/greet\n"
    assert docker.run(project.image, "reader").stdout == both
    # --- the package is removed
    project.set(GUIX_MANIFEST="", GUIX_PACKAGES="hello")
    project.ok("install")
    assert docker.config(project.image)["Env"] == docker.config(project.tag("base"))["Env"]
    project.ok("rollback")
    assert docker.run(project.image, "reader").stdout == both


def test_variable_of_a_removed_package_is_removed(new_project: NewProject) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="", GUIX_MANIFEST="manifest.scm")
    (project.directory / "manifest.scm").write_text(READER)
    project.ok("install")
    project.set(GUIX_MANIFEST="", GUIX_PACKAGES="hello")
    project.ok("install")
    assert "GREET_PATH" not in str(project.docker.config(project.image)["Env"])
    assert project.docker.run(project.image, "hello").stdout == GREETING


def test_stage_that_takes_too_long_is_stopped(new_project: NewProject) -> None:
    project = new_project("base", STAGE_TIMEOUT="1s")
    with project.assert_unchanged():
        assert "STAGE_TIMEOUT (1.0 s)" in expect_error(project.inv("pull"), 4)


@pytest.mark.both_stores
def test_base_leaves_no_untagged_image(new_project: NewProject) -> None:
    project = new_project()
    project.write_dockerfile(f"{SIMPLE}LABEL of={project.repository}\n")
    project.ok("base", "base", "--force")
    label = f"--filter=label=of={project.repository}"
    listing = project.docker.ok("image", "ls", "--quiet", "--filter=dangling=true", label)
    project.image_ids |= set(listing.split())
    assert listing == ""


# --- changes by hand


def test_run_preserves_arguments_and_exit_status(project: Project) -> None:
    arguments = [
        "a b", "", '"', "it's", "'", "$HOME", "$(touch canary)", "`touch canary`", "*", "\\n", "\\",
        "-n", "--", "--keep", "a=b", "ü", "x\ny", "\n", ";",
    ]  # fmt: skip
    with project.assert_unchanged():
        result = project.ok("run", "--", "printf", "<%s>", *arguments)
        assert result.stdout == "".join(f"<{argument}>" for argument in arguments)
        assert not list(project.directory.rglob("canary"))
        assert project.inv("run", "--", "sh", "-c", "exit 3").returncode == 3
        assert "the command is missing" in expect_error(project.inv("run"), 2)


@pytest.mark.both_stores
def test_kept_container_is_committed(project: Project) -> None:
    tags, stages = project.tags(), [project.id(stage) for stage in STAGES]
    project.ok("run", "--keep", "--", "sh", "-c", "echo made >/by-hand")
    assert project.tags() == tags
    assert "inv commit" in expect_error(project.inv("run", "--keep", "--", "true"), 2)
    project.ok("commit", "push")
    assert [project.id(stage) for stage in STAGES] == stages
    assert project.containers() == []
    assert project.docker.run(project.image, "cat", "/by-hand").stdout == "made\n"
    hand_made = project.id()
    result = project.ok("install", "--package", "hello")
    assert f"{project.image}: replaced the image of `inv commit`" in result.stderr
    assert project.id() == project.id("install") != hand_made


def test_container_of_a_failed_command_is_not_kept(project: Project) -> None:
    with project.assert_unchanged():
        assert project.inv("run", "--keep", "--", "false").returncode == 1
        assert "nothing to commit" in project.ok("commit").stderr


def test_stage_can_be_committed_later(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    tags = project.tags()
    project.ok("install", "--no-commit")
    assert project.tags() == tags
    project.ok("commit")
    assert project.id("install") is None
    assert project.docker.run(project.image, "hello").stdout == GREETING


def test_shell_is_continued_and_committed(project: Project) -> None:
    tags = project.tags()
    unused = Terminal(project, "shell")
    unused.type("exit")
    assert unused.end() == 0
    assert project.containers() == []
    shell = Terminal(project, "shell")
    # The terminal echoes input, so the expected output must differ from it.
    shell.type("echo made >/by-hand; echo 'do''ne'")
    shell.expect("done\r")
    shell.type("exit")
    assert shell.end() == 0
    assert project.tags() == tags
    second = Terminal(project, "shell")
    second.type("cat /by-hand /entry-point.sh | head -n 1")
    second.expect("made\r")
    second.type("exit")
    assert second.end() == 0
    project.ok("commit")
    assert project.docker.run(project.image, "cat", "/by-hand").stdout == "made\n"
    config = project.docker.config(project.image)
    assert (config["Entrypoint"], config["Cmd"]) == (["/entry-point.sh"], ["bash"])
    assert project.docker.run(project.image, "ls", "/var/guix/guix-tasks").returncode != 0


def test_error_begins_on_a_new_line(project: Project) -> None:
    """A progress bar, for example, leaves an unfinished line."""
    task = project.start("run", "--", "sh", "-c", "printf 50%% >&2; exec sleep 1000")
    task.wait_for_output("50%")
    assert task.signal(signal.SIGINT) == 130
    assert "50%\nerror: " in task.output()
    assert project.containers() == []


# --- status and clean


def test_status_shows_stages_and_channels(new_project: NewProject, factory: ProjectFactory) -> None:
    project = new_project("base", "pull")
    rows = {line.split()[0]: line for line in project.ok("status").stdout.splitlines()}
    assert list(rows) == ["stage", "base", "pull", "install", "IMAGE"]
    assert "up to date" in rows["base"]
    assert "up to date" in rows["pull"]
    assert "missing" in rows["install"]
    assert "stage pull" in rows["IMAGE"]
    for name in ("guix", "offline"):
        assert f"{name}@{factory.channel_commit(name)[:7]}" in rows["pull"]


@pytest.mark.both_stores
def test_clean_removes_only_objects_of_the_project(project: Project) -> None:
    project.write_dockerfile(f"FROM {project.tag('install')}\nCOPY Dockerfile /mine\n")
    other_image = f"{project.repository}:mine"
    context = str(project.directory / "context")
    project.docker.ok("build", "--quiet", f"--tag={other_image}", context)
    container = project.container_name()
    project.docker.ok("create", f"--name={container}", other_image, "true")
    # The image inherits the labels of a stage, but is not a stage.
    project.docker.ok("tag", other_image, project.tag("install"))
    rows = project.ok("status").stdout.splitlines()
    assert "missing" in next(row for row in rows if row.startswith("install"))
    project.docker.ok("rmi", project.tag("install"))
    project.ok("run", "--keep", "--", "true")
    assert project.volumes() != []
    project.ok("clean")
    assert set(project.tags()) == {"mine"}
    assert project.containers() == []
    assert project.volumes() == []
    assert project.docker("container", "inspect", container).returncode == 0
    assert project.docker.run(other_image, "hello").stdout == GREETING


def test_clean_after_base_removes_all_tags(new_project: NewProject) -> None:
    project = new_project()
    project.write_dockerfile(SIMPLE)
    project.ok("base")
    project.ok("clean")
    assert project.tags() == {}
    assert project.volumes() == []
    assert "nothing to remove" in project.ok("clean").stderr


def test_clean_keeps_a_container_of_the_user(new_project: NewProject) -> None:
    project = new_project()
    project.write_dockerfile(f"{SIMPLE}LABEL of={project.repository}\n")
    project.ok("base")
    container = project.container_name()
    project.docker.ok("create", f"--name={container}", project.tag("base"), "true")
    project.ok("clean")
    assert project.tags() == {}
    assert project.volumes() == []
    assert project.docker("container", "inspect", container).returncode == 0


# --- verify


def test_verify_reports_all_checks(project: Project) -> None:
    with project.assert_unchanged():
        result = project.ok("verify")
    for check in ("daemon", "build", "channels", "packages", "certificates"):
        assert f"verify: {check}: ok\n" in result.stderr


def test_verify_reports_a_missing_package(project: Project) -> None:
    project.ok("run", "--keep", "--", "guix", "package", "--remove", "hello")
    project.ok("commit")
    with project.assert_unchanged():
        result = project.inv("verify")
    assert expect_error(result, 1).endswith(" failed: packages")
    assert "verify: packages: failed: " in result.stderr


# --- run


def test_command_of_run_reads_standard_input(project: Project) -> None:
    def pipe(data: bytes, *argv: str) -> tuple[int, bytes]:
        result = subprocess.run(
            inv_argv("run", "--", *argv),
            input=data,
            stdout=subprocess.PIPE,
            cwd=project.directory,
            env=project.environment,
            check=False,
        )
        return result.returncode, result.stdout

    large = bytes(range(256)) * 20_000
    assert pipe(b"echo hi; exit 3\n", "sh") == (3, b"hi\n")
    assert pipe(large, "sha256sum") == (0, f"{sha256(large).hexdigest()}  -\n".encode())
    # A command can end before its input does.
    assert pipe(large, "true") == (0, b"")


# --- dry runs


def run_dry(project: Project, *tasks: str) -> str:
    """Check that a dry run sends only read requests to the engine, and return its output."""
    proxy = RecordingProxy(project.docker.host)
    with project.assert_unchanged(), proxy.listen() as host:
        result = project.inv("--dry", *tasks, env={"DOCKER_HOST": host})
    assert result.returncode == 0, result.stderr
    assert proxy.requests
    assert [line for line in proxy.requests if not line.startswith(("GET ", "HEAD "))] == []
    return result.stderr


def test_dry_run_shows_the_whole_lifecycle(new_project: NewProject) -> None:
    project = new_project()
    output = run_dry(project, "base", "pull", "install", "commit", "push")
    for stage in ("base", "pull", "install"):
        assert re.search(rf"^\+ docker tag \S+ {project.tag(stage)}$", output, re.MULTILINE)
    assert "+ docker create --name=guix-tasks-pull-" in output
    assert "+ docker commit guix-tasks-assemble-" in output
    assert f"+ docker push {project.image}\n" in output
    assert not (project.directory / LOCK).exists()


@pytest.mark.parametrize("tasks", ["run -- false", "run --keep -- false", "verify", "clean"])
def test_dry_run_changes_nothing(project: Project, tasks: str) -> None:
    assert "\n+ docker " in run_dry(project, *tasks.split())


def test_dry_run_starts_no_shell(project: Project) -> None:
    with project.assert_unchanged():
        shell = Terminal(project, "--dry", "shell")
        assert shell.end() == 0
    assert "+ docker create" in shell.output
    assert "Error" not in shell.output


def test_dry_run_starts_no_registry(project: Project) -> None:
    port = free_port()
    project.ok("--dry", "registry.up", f"--port={port}")
    is_running = answers(port)
    project.ok("registry.down", f"--port={port}")
    assert not is_running


# --- interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_signal_stops_a_stage_and_changes_nothing(
    new_project: NewProject, number: signal.Signals
) -> None:
    project = new_project("base")
    with project.assert_unchanged():
        task = project.start("pull")
        task.wait_for_output("Updating channel")
        assert task.signal(number) == 130
    assert "Traceback" not in task.output()
    assert len(error_lines(task.output())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_signal_stops_a_build(
    new_project: NewProject, builder: dict[str, str], number: signal.Signals
) -> None:
    project = new_project("base")
    seconds = str(secrets.randbelow(10**6) + 10**5)
    project.write_dockerfile(f"{SIMPLE}RUN exec sleep {seconds}\n")
    with project.assert_unchanged():
        task = project.start("base", env=builder)
        wait_until(lambda: find_processes("sleep", seconds) != [], "the build is running")
        assert task.signal(number) == 130
        wait_until(lambda: find_processes("sleep", seconds) == [], "the build has ended")
    assert "Traceback" not in task.output()


def test_two_commands_run_at_the_same_time(project: Project) -> None:
    with project.assert_unchanged():
        first = project.start("run", "--", "sh", "-c", "echo begun; exec sleep 1000")
        first.wait_for_output("begun")
        project.ok("run", "--", "true")
        assert len(project.containers()) == 1
        assert first.signal(signal.SIGTERM) == 130


@pytest.mark.both_stores
def test_run_after_a_kill_removes_its_container(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    task = project.start("install")
    task.wait_for_output("+ guix package")
    wait_until(lambda: project.containers() != [], "a container exists")
    assert task.signal(signal.SIGKILL) == -signal.SIGKILL
    (container,) = project.containers()
    project.ok("install")
    assert project.containers() == []
    assert project.docker("container", "inspect", container).returncode != 0
    assert project.docker.run(project.image, "hello").stdout == GREETING
