"""The start of a project: that nothing is overwritten, and that what is written is right."""

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


def written(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_all_files_are_written_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_start(tmp_path, Console())
    assert set(written(tmp_path)) == set(FILES)
    *said, after = capsys.readouterr().err.splitlines()
    assert said == [f"init: wrote {name}" for name in FILES]
    assert "`inv base pull install verify push`" in after


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_overwritten(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine\n")
    for ci in CI_FILES:
        write_start(tmp_path, Console(), ci=ci)
    assert mine.read_text() == "mine\n"
    assert set(written(tmp_path)) == set(ALL)
    assert f"init: {name} exists, unchanged" in capsys.readouterr().err


def test_a_tasks_py_without_these_tasks_is_told_how_to_have_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks.py").write_text("from invoke import task\n")
    write_start(tmp_path, Console())
    assert "add `from guix_tasks.tasks import ns` to your tasks.py" in capsys.readouterr().err


def test_a_link_to_nothing_is_something(tmp_path: Path) -> None:
    (tmp_path / ".env").symlink_to(tmp_path / "elsewhere")
    write_start(tmp_path, Console(), dry=True)
    write_start(tmp_path, Console())
    assert not (tmp_path / "elsewhere").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Dockerfile").write_text("")
    write_start(tmp_path, Console(), dry=True)
    assert set(written(tmp_path)) == {"Dockerfile"}
    said = capsys.readouterr().err
    assert "init: would write .env" in said
    assert "init: Dockerfile exists, unchanged" in said


def test_half_a_file_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.open

    def full(self: Path, mode: str = "r", **how: str) -> object:
        file = write(self, mode, **how)  # type: ignore[call-overload]
        if mode == "wb":
            file.close()  # what is written to it is lost
        return file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ValueError, match="closed file"):
        write_start(tmp_path, Console())
    assert written(tmp_path) == {}


@pytest.mark.parametrize(
    ("directory", "name"),
    [("app", "app"), ("My App_2", "my-app-2"), ("ß", "my-image"), ("-x-", "x")],
)
def test_the_image_has_the_name_of_the_folder(tmp_path: Path, directory: str, name: str) -> None:
    place = tmp_path / directory
    place.mkdir()
    assert image_name(place) == name
    write_start(place, Console())
    settings = load_settings(place, place, {})
    assert str(settings.image) == f"localhost:5055/{name}:latest"


def test_the_settings_are_read_without_a_note(tmp_path: Path) -> None:
    write_start(tmp_path, Console())
    settings = load_settings(tmp_path, tmp_path, {})
    assert settings.notes == ()
    assert settings.guix_channels == tmp_path / "channels.scm"
    assert settings.guix_manifest == tmp_path / "manifest.scm"


def test_the_settings_that_are_commented_out_are_there() -> None:
    known = set(DECLARATIONS)
    text = (TEMPLATES / "env").read_text()
    assert set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE)) <= known


def test_the_channel_is_guixs_own_with_its_introduction() -> None:
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
def test_a_ci_file_is_written_if_it_is_asked_for(
    tmp_path: Path, ci: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_start(tmp_path, Console(), ci=ci)
    file = CI_FILES[ci][0]
    assert set(written(tmp_path)) == {*FILES, file}
    assert f"set the variable TASKS_PACKAGE of the CI, see {file}" in capsys.readouterr().err


def test_a_ci_that_there_is_not_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_start(tmp_path, Console(), ci="jenkins")
    assert str(caught.value) == "--ci: 'jenkins' is not one of github, gitlab, none"
    assert written(tmp_path) == {}


def test_the_files_name_only_tasks_and_settings_that_exist() -> None:
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
        own = {"PLATFORMS"} if path.parent == examples else set()
        assert expected | own <= set(env), path
        assert set(env) - settings <= {"RUNNER", "DOCKER_TLS_CERTDIR", "TASKS_PACKAGE"}, path


def test_the_actions_of_the_workflow_are_pinned() -> None:
    """To the commit, with its version behind it; one action at one version."""
    files = (TEMPLATES / "github.yml", *(ROOT / "examples/ci").glob("github-*.yml"))
    used = {line for path in files for line in re.findall(r"uses: (.*)", path.read_text())}
    pinned = {
        line: re.fullmatch(r"actions/([a-z-]+)@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)
        for line in used
    }
    assert all(pinned.values()), used
    names = [found[1] for found in pinned.values() if found]
    assert len(names) == len(set(names)) >= 4
