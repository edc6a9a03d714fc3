"""The tasks from base to push, and those of work done by hand, on a real engine."""

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
    Result,
    Terminal,
    Witness,
    Workshop,
    errors,
    eventually,
    free_port,
    inv_argv,
    one_error,
    running,
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
    from harness import Made


pytestmark = pytest.mark.engine

GREETING = "Hello, world!\n"
SIMPLE = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n"
NOTED = f"{SIMPLE}ARG NOTE\nRUN echo $NOTE >/note\n"


# --- the pushed image


@dataclass(frozen=True)
class Pushed:
    """An image that was made and pushed by one call, removed, and pulled back by its digest."""

    project: Project
    call: Result
    image: str

    def run(self, *command: str, options: tuple[str, ...] = ()) -> str:
        result = self.project.docker.run(self.image, *command, options=options)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def pushed(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    project = workshop.project(tmp_path_factory.mktemp("pushed") / "project")
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
def test_the_digest_is_all_that_is_on_standard_output(pushed: Pushed) -> None:
    reference = re.escape(pushed.project.image)
    assert re.fullmatch(rf"{reference}@sha256:[0-9a-f]{{64}}\n", pushed.call.stdout)


def test_a_missing_parent_is_made_first(pushed: Pushed) -> None:
    base = pushed.project.tag("base")
    assert f"\npull: {base} is missing, so base comes first\n" in pushed.call.stderr
    assert "commit: nothing to commit\n" in pushed.call.stderr


@pytest.mark.both_stores
def test_one_call_does_what_several_do(pushed: Pushed, made: Made) -> None:
    one = pushed.project.docker.config(pushed.image)
    several = made.project.docker.config(made.project.image)
    for config in (one, several):
        # The layers, also those of the base, hold times, and a project has its own name.
        for label in (LAYERS_LABEL, FILES_LABEL, CREATED, IMAGE_LABEL):
            del config["Labels"][label]
    assert one == several


@pytest.mark.both_stores
def test_the_image_is_configured_as_its_base(pushed: Pushed, made: Made) -> None:
    ours = pushed.project.docker.config(pushed.image)
    base = made.project.docker.config(made.project.tag("base"))
    assert ours["Entrypoint"] == ["/entry-point.sh"]
    assert ours["Cmd"] == ["bash"]
    del ours["Labels"], base["Labels"]
    assert ours == base


@pytest.mark.both_stores
def test_nothing_of_the_work_containers_is_in_the_image(pushed: Pushed) -> None:
    labels = pushed.project.docker.labels(pushed.image)
    assert not labels[PROJECT_LABEL]
    assert set(pushed.run("ls", "-A", "/").split()) >= {"gnu", "entry-point.sh"}
    assert "guix-tasks" not in pushed.run("ls", "-A", "/", "/var/guix")
    assert pushed.run("find", "/tmp", "-mindepth", "1") == ""  # noqa: S108
    assert ".cache" not in pushed.run("ls", "-A", "/root").split()
    assert "GUIX_SUBSTITUTE_URLS" not in pushed.run("env")


def test_its_guix_is_of_the_channels(pushed: Pushed, workshop: Workshop) -> None:
    expected = {name: workshop.commit_of(name) for name in ("guix", "offline")}
    described = pushed.run("guix", "describe", "--format=channels")
    assert guix.commits(described) == expected
    assert guix.commits(pushed.project.docker.labels(pushed.image)[CHANNELS_LABEL]) == expected


def test_its_channels_file_is_what_was_pulled(pushed: Pushed, workshop: Workshop) -> None:
    inside = guix.channels(pushed.run("cat", guix.CHANNELS_FILE))
    asked = guix.channels((workshop.offline / "channels.scm").read_text())
    assert {name: each.url for name, each in inside.items()} == {
        name: each.url for name, each in asked.items()
    }


def test_its_profile_has_the_packages(pushed: Pushed) -> None:
    installed = guix.installed(pushed.run("guix", "package", "--list-installed"))
    assert [package.partition("@")[0] for package in installed] == ["greet", "hello"]
    assert pushed.project.docker.labels(pushed.image)[PACKAGES_LABEL].split() == installed


def test_history_names_the_stage_of_each_layer(project: Project) -> None:
    comments = project.docker.ok("history", "--format={{.Comment}}", project.image).split("\n")
    # The base stage adds no layer to the image of its Dockerfile, only a configuration.
    assert comments[:3] == ["guix-tasks: install", "guix-tasks: pull", "guix-tasks: base"]


@pytest.mark.parametrize("user", ["0", "1000", "65534:65534"])
def test_hello_runs(pushed: Pushed, user: str) -> None:
    assert pushed.run("hello", options=(f"--user={user}",)) == GREETING


# --- stages


@pytest.mark.both_stores
def test_what_is_up_to_date_is_not_run_again(project: Project) -> None:
    with project.unharmed():
        result = project.ok("pull", "install")
    assert "pull: up to date" in result.stderr
    assert "install: up to date" in result.stderr
    assert "container" not in result.stderr


@pytest.mark.both_stores
def test_a_stale_parent_stops_a_stage_until_it_is_mended(new_project: NewProject) -> None:
    project = new_project("base", "pull", "install", BUILD_ARGS="NOTE=1")
    project.dockerfile(NOTED)
    project.set(BASE_IMAGE=f"{project.repository}:ground")
    project.docker.ok("tag", project.tag("base"), f"{project.repository}:ground")
    project.ok("base")
    with project.unharmed():
        error = one_error(project.inv("install", "--force"), 2)
        assert "pull is stale" in error
        assert "`inv pull`" in error
        assert "`inv install --upstream`" in error
        assert "is stale" in one_error(project.inv("push"), 2)
    image = project.id()
    project.ok("pull")
    assert project.id() == image == project.id("install")
    with project.unharmed():
        assert "`inv install" in one_error(project.inv("push"), 2)
    project.set(BUILD_ARGS="NOTE=2")
    project.ok("base")
    project.ok("install", "--upstream", "push", timeout=480)
    assert project.id() == project.id("install") != image
    assert project.docker.run(project.image, "cat", "/note").stdout == "2\n"
    assert project.docker.run(project.image, "hello").stdout == GREETING


@pytest.fixture(scope="module")
def greeter(
    workshop: Workshop, made: Made, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Project, Result]]:
    """An image that was installed anew, with one package instead of two."""
    project = workshop.project(tmp_path_factory.mktemp("greeter") / "project")
    try:
        for stage in ("base", "pull", "install"):
            project.take(stage, made.project)
        yield project, project.ok("install", "--package", "greet")
    finally:
        project.remove()


def test_another_list_of_packages_replaces_the_first(greeter: tuple[Project, Result]) -> None:
    project, call = greeter
    assert re.search(r"^install: removed hello@\S+$", call.stderr, re.MULTILINE)
    greeting = f"{guix.PROFILE}/share/greeting"
    assert project.docker.run(project.image, "cat", greeting).stdout == "hello from a channel\n"
    assert project.docker.run(project.image, "hello").returncode == 127


def test_a_manifest_keeps_what_the_profile_of_the_base_has(
    greeter: tuple[Project, Result], new_project: NewProject
) -> None:
    project = new_project(
        BASE_IMAGE=greeter[0].image,
        GUIX_CHANNELS="",
        GUIX_CHANNELS_LOCK="",
        GUIX_PACKAGES="",
        GUIX_MANIFEST=str(OFFLINE / "manifest.scm"),
    )
    project.dockerfile(SIMPLE)
    result = project.ok("install")
    # Without channels there is nothing to pull.
    assert f"install: {project.tag('base')} is missing, so base comes first\n" in result.stderr
    assert project.id("pull") is None
    listing = project.docker.run(project.image, "guix", "package", "--list-installed").stdout
    names = {each.partition("@")[0] for each in guix.installed(listing)}
    assert names == {"greet", "hello", "tar"}


def test_search_paths_of_the_profile_are_set_for_every_program(new_project: NewProject) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="", GUIX_MANIFEST="manifest.scm")
    (project.directory / "manifest.scm").write_text(READER)
    project.ok("install")
    docker, greet = project.docker, f"{guix.PROFILE}/share/greet\n"
    for user in ("0", "1000"):
        assert docker.run(project.image, "reader", options=(f"--user={user}",)).stdout == greet
    assert docker.run(project.image, options=("--entrypoint=reader",)).stdout == greet
    assert project.ok("run", "--", "reader").stdout == greet
    # --- a variable of the base
    docker.ok("tag", project.tag("base"), f"{project.repository}:ground")
    project.dockerfile(f"{SIMPLE}ENV GREET_PATH=/srv/greet\n")
    project.set(BASE_IMAGE=f"{project.repository}:ground")
    project.ok("base", "pull", "install")
    both = f"{guix.PROFILE}/share/greet:/srv/greet\n"
    assert docker.run(project.image, "reader").stdout == both
    # --- and without the package
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


def test_nothing_to_install_is_an_error(new_project: NewProject) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="")
    with project.unharmed():
        error = one_error(project.inv("install"), 2)
    assert "GUIX_PACKAGES" in error
    assert "GUIX_MANIFEST" in error


def test_a_stage_that_takes_too_long_is_stopped(new_project: NewProject) -> None:
    project = new_project("base", STAGE_TIMEOUT="1s")
    with project.unharmed():
        assert "STAGE_TIMEOUT (1.0 s)" in one_error(project.inv("pull"), 4)


@pytest.mark.both_stores
def test_base_leaves_no_nameless_image(new_project: NewProject) -> None:
    project = new_project()
    project.dockerfile(f"{SIMPLE}LABEL of={project.repository}\n")
    project.ok("base", "base", "--force")
    only = f"--filter=label=of={project.repository}"
    listing = project.docker.ok("image", "ls", "--quiet", "--filter=dangling=true", only)
    project.seen |= set(listing.split())
    assert listing == ""


# --- work by hand


def test_run_keeps_arguments_and_the_status(project: Project) -> None:
    words = ["a b", "", '"', "it's", "$HOME", "*", "\\n", "--", "--keep", "a=b", "ü", "x\ny", ";"]
    with project.unharmed():
        result = project.ok("run", "--", "printf", "<%s>", *words)
        assert result.stdout == "".join(f"<{word}>" for word in words)
        assert project.inv("run", "--", "sh", "-c", "exit 3").returncode == 3
        assert "the command is missing" in one_error(project.inv("run"), 2)


def test_output_is_shown_while_a_command_runs(project: Project) -> None:
    started = project.start("run", "--", "sh", "-c", "echo begun; exec sleep 1000")
    started.await_output("begun")
    assert started.signal(signal.SIGINT) == 130
    assert project.containers() == []


@pytest.mark.both_stores
def test_what_run_kept_becomes_the_image(project: Project) -> None:
    before, stages = project.tags(), [project.id(stage) for stage in STAGES]
    project.ok("run", "--keep", "--", "sh", "-c", "echo made >/by-hand")
    assert project.tags() == before
    assert "inv commit" in one_error(project.inv("run", "--keep", "--", "true"), 2)
    project.ok("commit", "push")
    assert [project.id(stage) for stage in STAGES] == stages
    assert project.containers() == []
    assert project.docker.run(project.image, "cat", "/by-hand").stdout == "made\n"
    hand_made = project.id()
    result = project.ok("install", "--package", "hello")
    assert f"{project.image}: replaced the image of `inv commit`" in result.stderr
    assert project.id() == project.id("install") != hand_made


def test_a_command_that_failed_is_not_kept(project: Project) -> None:
    with project.unharmed():
        assert project.inv("run", "--keep", "--", "false").returncode == 1
        assert "nothing to commit" in project.ok("commit").stderr


@pytest.mark.both_stores
def test_a_stage_can_be_left_for_commit(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    before = project.tags()
    project.ok("install", "--no-commit")
    assert project.tags() == before
    project.ok("commit")
    assert project.id("install") is None
    assert project.docker.run(project.image, "hello").stdout == GREETING


def test_a_shell_is_entered_again_and_committed(project: Project) -> None:
    before = project.tags()
    shell = Terminal(project, "shell")
    # The terminal echoes what is typed, so what is waited for is not typed as it is.
    shell.type("echo made >/by-hand; echo 'do''ne'")
    shell.expect("done\r")
    shell.type("exit")
    assert shell.end() == 0
    assert project.tags() == before
    again = Terminal(project, "shell")
    again.type("cat /by-hand /entry-point.sh | head -n 1")
    again.expect("made\r")
    again.type("exit")
    assert again.end() == 0
    project.ok("commit")
    assert project.docker.run(project.image, "cat", "/by-hand").stdout == "made\n"
    config = project.docker.config(project.image)
    assert (config["Entrypoint"], config["Cmd"]) == (["/entry-point.sh"], ["bash"])
    assert project.docker.run(project.image, "ls", "/var/guix/guix-tasks").returncode != 0


def test_a_shell_needs_a_terminal(project: Project) -> None:
    with project.unharmed():
        assert "inv run" in one_error(project.inv("shell"), 2)


def test_an_error_has_a_line_of_its_own(project: Project) -> None:
    """Also after output that did not end its line, as a progress bar does."""
    started = project.start("run", "--", "sh", "-c", "printf 50%% >&2; exec sleep 1000")
    started.await_output("50%")
    assert started.signal(signal.SIGINT) == 130
    assert "50%\nerror: " in started.said()


# --- what there is, and away with it


@pytest.mark.both_stores
def test_status(new_project: NewProject, workshop: Workshop) -> None:
    project = new_project("base", "pull")
    rows = {line.split()[0]: line for line in project.ok("status").stdout.splitlines()}
    assert list(rows) == ["stage", "base", "pull", "install", "IMAGE"]
    assert "up to date" in rows["base"]
    assert "up to date" in rows["pull"]
    assert "missing" in rows["install"]
    assert "stage pull" in rows["IMAGE"]
    for name in ("guix", "offline"):
        assert f"{name}@{workshop.commit_of(name)[:7]}" in rows["pull"]


@pytest.mark.both_stores
def test_clean_removes_what_is_ours_alone(project: Project) -> None:
    project.dockerfile(f"FROM {project.tag('install')}\nCOPY Dockerfile /mine\n")
    theirs = f"{project.repository}:mine"
    context = str(project.directory / "context")
    project.docker.ok("build", "--quiet", f"--tag={theirs}", context)
    container = project.container_name()
    project.docker.ok("create", f"--name={container}", theirs, "true")
    # Labels of a stage are inherited, but make no stage of it.
    project.docker.ok("tag", theirs, project.tag("install"))
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
    assert project.docker.run(theirs, "hello").stdout == GREETING


@pytest.mark.both_stores
def test_clean_after_base_alone(new_project: NewProject) -> None:
    project = new_project()
    project.dockerfile(SIMPLE)
    project.ok("base")
    project.ok("clean")
    assert project.tags() == {}
    assert project.volumes() == []
    assert "nothing to remove" in project.ok("clean").stderr


@pytest.mark.both_stores
def test_clean_leaves_the_container_that_a_user_made_of_the_image(new_project: NewProject) -> None:
    project = new_project()
    project.dockerfile(f"{SIMPLE}LABEL of={project.repository}\n")
    project.ok("base")
    container = project.container_name()
    project.docker.ok("create", f"--name={container}", project.tag("base"), "true")
    project.ok("clean")
    assert project.tags() == {}
    assert project.volumes() == []
    assert project.docker("container", "inspect", container).returncode == 0


# --- verify


def test_verify(project: Project) -> None:
    with project.unharmed():
        result = project.ok("verify")
    for check in ("daemon", "build", "channels", "packages", "certificates"):
        assert f"verify: {check}: ok\n" in result.stderr


def test_verify_finds_that_a_package_is_gone(project: Project) -> None:
    project.ok("run", "--keep", "--", "guix", "package", "--remove", "hello")
    project.ok("commit")
    with project.unharmed():
        result = project.inv("verify")
    assert one_error(result, 1).endswith(" failed: packages")
    assert "verify: packages: failed: " in result.stderr


# --- run


@pytest.mark.both_stores
def test_the_command_of_run_reads_what_is_piped_in(project: Project) -> None:
    def piped(data: bytes, *argv: str) -> tuple[int, bytes]:
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
    assert piped(b"echo hi; exit 3\n", "sh") == (3, b"hi\n")
    assert piped(large, "sha256sum") == (0, f"{sha256(large).hexdigest()}  -\n".encode())
    # A command can end before its input does.
    assert piped(large, "true") == (0, b"")


# --- a dry run


def dry(project: Project, *tasks: str) -> str:
    """What a dry run says, after making sure that it asked the engine for nothing but answers."""
    witness = Witness(project.docker.host)
    with project.unharmed(), witness.listening() as host:
        result = project.inv("--dry", *tasks, env={"DOCKER_HOST": host})
    assert result.returncode == 0, result.stderr
    assert witness.requests
    assert [each for each in witness.requests if not each.startswith(("GET ", "HEAD "))] == []
    return result.stderr


def test_a_dry_run_shows_the_whole_lifecycle(new_project: NewProject) -> None:
    project = new_project()
    said = dry(project, "base", "pull", "install", "commit", "push")
    for stage in ("base", "pull", "install"):
        assert re.search(rf"^\+ docker tag \S+ {project.tag(stage)}$", said, re.MULTILINE)
    assert "+ docker create --name=guix-tasks-pull-" in said
    assert "+ docker commit guix-tasks-assemble-" in said
    assert f"+ docker push {project.image}\n" in said
    assert not (project.directory / LOCK).exists()


@pytest.mark.parametrize("tasks", ["run -- false", "run --keep -- false", "verify", "clean"])
def test_a_dry_run_changes_nothing(project: Project, tasks: str) -> None:
    assert "\n+ docker " in dry(project, *tasks.split())


def test_a_dry_run_enters_no_shell(project: Project) -> None:
    with project.unharmed():
        shell = Terminal(project, "--dry", "shell")
        assert shell.end() == 0
    assert "+ docker create" in shell.said
    assert "Error" not in shell.said


def test_a_dry_run_starts_no_registry(project: Project) -> None:
    port = free_port()
    project.ok("--dry", "registry.up", f"--port={port}")
    answered = answers(port)
    project.ok("registry.down", f"--port={port}")
    assert not answered


# --- what stops in the middle


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_undoes_what_was_under_way(
    new_project: NewProject, number: signal.Signals
) -> None:
    project = new_project("base")
    with project.unharmed():
        started = project.start("pull")
        started.await_output("Updating channel")
        assert started.signal(number) == 130
    assert "Traceback" not in started.said()
    assert len(errors(started.said())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_ends_a_build(
    new_project: NewProject, builder: dict[str, str], number: signal.Signals
) -> None:
    project = new_project("base")
    seconds = str(secrets.randbelow(10**6) + 10**5)
    project.dockerfile(f"{SIMPLE}RUN exec sleep {seconds}\n")
    with project.unharmed():
        started = project.start("base", env=builder)
        eventually(lambda: running("sleep", seconds) != [], "the build")
        assert started.signal(number) == 130
        eventually(lambda: running("sleep", seconds) == [], "the end of the build")
    assert "Traceback" not in started.said()


def test_two_at_a_time_leave_each_other_alone(project: Project) -> None:
    with project.unharmed():
        first = project.start("run", "--", "sh", "-c", "echo begun; exec sleep 1000")
        first.await_output("begun")
        project.ok("run", "--", "true")
        assert len(project.containers()) == 1
        assert first.signal(signal.SIGTERM) == 130


@pytest.mark.both_stores
def test_the_run_after_a_kill_mends_everything(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    started = project.start("install")
    started.await_output("+ guix package")
    eventually(lambda: project.containers() != [], "a container")
    assert started.signal(signal.SIGKILL) == -signal.SIGKILL
    (left,) = project.containers()
    project.ok("install")
    assert project.containers() == []
    assert project.docker("container", "inspect", left).returncode != 0
    assert project.docker.run(project.image, "hello").stdout == GREETING
