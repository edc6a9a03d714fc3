"""Files of ``inv init``: existing files are kept and new files are valid."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from guix_tasks import guix
from guix_tasks.cli import custom
from guix_tasks.commands.init import CI_FILES, FILES, TEMPLATES, image_name, write_start
from guix_tasks.errors import UsageError
from guix_tasks.settings import DECLARATIONS, load_settings
from guix_tasks.stages.declarations import CustomStage
from guix_tasks.tasks import ns
from guix_tasks.ui.console import Console

ROOT = Path(__file__).parents[2]
ALL = {**FILES, **dict(CI_FILES.values())}


def read_files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_all_files_are_written_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_start(tmp_path, Console())
    assert set(read_files(tmp_path)) == set(FILES)
    *messages, last_message = capsys.readouterr().err.splitlines()
    assert messages == [f"init: wrote {name}" for name in FILES]
    assert "`inv base pull install verify push`" in last_message


@pytest.mark.parametrize("name", ALL)
def test_existing_file_is_kept(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    existing = tmp_path / name
    existing.parent.mkdir(parents=True, exist_ok=True)
    existing.write_text("mine\n")
    for ci in CI_FILES:
        write_start(tmp_path, Console(), ci=ci)
    assert existing.read_text() == "mine\n"
    assert set(read_files(tmp_path)) == set(ALL)
    assert f"init: {name} exists, unchanged" in capsys.readouterr().err


def test_existing_tasks_py_gets_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tasks.py").write_text("from invoke import task\n")
    write_start(tmp_path, Console())
    assert "add `from guix_tasks.tasks import ns` to your tasks.py" in capsys.readouterr().err


def test_dangling_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".env").symlink_to(tmp_path / "elsewhere")
    write_start(tmp_path, Console(), dry=True)
    write_start(tmp_path, Console())
    assert not (tmp_path / "elsewhere").exists()


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Dockerfile").write_text("")
    write_start(tmp_path, Console(), dry=True)
    assert set(read_files(tmp_path)) == {"Dockerfile"}
    messages = capsys.readouterr().err
    assert "init: would write .env" in messages
    assert "init: Dockerfile exists, unchanged" in messages


def test_partial_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def open_and_close(self: Path, mode: str = "r", **options: str) -> object:
        file = original(self, mode, **options)  # type: ignore[call-overload]
        if mode == "wb":
            file.close()  # a later write fails
        return file

    monkeypatch.setattr(Path, "open", open_and_close)
    with pytest.raises(ValueError, match="closed file"):
        write_start(tmp_path, Console())
    assert read_files(tmp_path) == {}


@pytest.mark.parametrize(
    ("directory_name", "name"),
    [("app", "app"), ("My App_2", "my-app-2"), ("ß", "my-image"), ("-x-", "x")],
)
def test_image_is_named_after_the_directory(tmp_path: Path, directory_name: str, name: str) -> None:
    directory = tmp_path / directory_name
    directory.mkdir()
    assert image_name(directory) == name
    write_start(directory, Console())
    settings = load_settings(directory, directory, {})
    assert str(settings.image) == f"localhost:5055/{name}:latest"


def test_settings_load_without_notes(tmp_path: Path) -> None:
    write_start(tmp_path, Console())
    settings = load_settings(tmp_path, tmp_path, {})
    assert settings.notes == ()
    assert settings.guix_channels == tmp_path / "channels.scm"
    assert settings.guix_manifest == tmp_path / "manifest.scm"


def test_settings_of_the_template_exist() -> None:
    names = set(DECLARATIONS)
    text = (TEMPLATES / "env").read_text()
    assert set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE)) <= names


def test_channel_is_guix_with_its_introduction() -> None:
    text = (TEMPLATES / "channels.scm").read_text()
    assert guix.is_literal(text)
    assert guix.unauthenticated(text) == []
    assert [*guix.channels(text)] == ["guix"]
    assert "9edb3f66fd807b096b48283debdcddccfea34bad" in text
    assert "BBB0 2DDF 2CEA F6A8 0D1D  E643 A2A0 6DF2 A33A 54FA" in text


def test_example_in_tasks_py_adds_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (TEMPLATES / "tasks.txt").read_text().splitlines()
    example = "\n".join(line[6:] for line in lines if line.startswith("#     "))
    tasks, stages = copy.deepcopy(ns), list[CustomStage]()
    monkeypatch.setattr(custom, "ns", tasks)
    monkeypatch.setattr(custom, "custom_stages", stages)
    exec(example, {})  # noqa: S102 -- as Invoke does
    assert [stage.name for stage in stages] == ["deps"]
    assert "deps" in tasks.task_names


@pytest.mark.parametrize("ci", CI_FILES)
def test_ci_file_is_written_on_request(
    tmp_path: Path, ci: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_start(tmp_path, Console(), ci=ci)
    file = CI_FILES[ci][0]
    assert set(read_files(tmp_path)) == {*FILES, file}
    assert f"set the variable TASKS_PACKAGE of the CI, see {file}" in capsys.readouterr().err


def test_unknown_ci_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_start(tmp_path, Console(), ci="jenkins")
    assert str(caught.value) == "--ci: 'jenkins' is not one of github, gitlab, none"
    assert read_files(tmp_path) == {}


def test_tasks_and_settings_of_the_files_exist() -> None:
    settings, examples = set(DECLARATIONS), ROOT / "examples/ci"
    for path in (*(TEMPLATES / source for source in ALL.values()), *examples.iterdir()):
        for call in re.findall(r"(?:`|run: |- )inv ((?:--[a-z]+ |[a-z.]+ ?)+)", path.read_text()):
            tasks = [word for word in call.split() if not word.startswith("--")]
            assert set(tasks) <= {*ns.task_names, "deps"}, path
    expected = {"IMAGE", "CACHE_IMAGE", "DOCKER_USERNAME", "DOCKER_PASSWORD"}
    files = [
        *(TEMPLATES / source for _, source in CI_FILES.values()),
        *examples.glob("*-platforms.yml"),
    ]
    assert len(files) == 4
    for path in files:
        env = re.findall(r"^[ -]+([A-Z_]+):", path.read_text(), re.MULTILINE)
        required = {"PLATFORMS"} if path.parent == examples else set()
        assert expected | required <= set(env), path
        assert set(env) - settings <= {"RUNNER", "DOCKER_TLS_CERTDIR", "TASKS_PACKAGE"}, path


def test_workflow_actions_are_pinned() -> None:
    """Each action has one version: a commit, followed by a comment with the version."""
    files = (TEMPLATES / "github.yml", *(ROOT / "examples/ci").glob("github-*.yml"))
    uses = {line for path in files for line in re.findall(r"uses: (.*)", path.read_text())}
    pinned = {
        line: re.fullmatch(r"actions/([a-z-]+)@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)
        for line in uses
    }
    assert all(pinned.values()), uses
    names = [match[1] for match in pinned.values() if match]
    assert len(names) == len(set(names)) >= 4
