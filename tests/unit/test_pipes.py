"""Settings from pipes, which are read once for all tasks of a call."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import clear_file_cache
from test_settings import AUTHORITY

from guix_tasks import files
from guix_tasks.errors import SettingsError
from guix_tasks.files import file_digest, text_digest
from guix_tasks.settings import Settings, load_settings
from guix_tasks.stages.channel_access import _known_hosts
from guix_tasks.stages.container import common_files
from guix_tasks.stages.install import install_stage
from guix_tasks.stages.pull import channels_text
from guix_tasks.ui.console import Display

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FORMS = ("named", "descriptor")


@contextmanager
def pipe(
    directory: Path, content: str | bytes, form: str = "named", name: str = "p"
) -> Iterator[str]:
    """Create a pipe, write to it once, and return its path."""
    data = content if isinstance(content, bytes) else content.encode()
    if form == "named":
        path = directory / name
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_bytes, args=(data,))
        writer.start()
        yield str(path)
        writer.join(5)
        assert not writer.is_alive(), "the pipe was not read"
    else:
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        yield f"/dev/fd/{reading}"
        os.close(reading)


def load(directory: Path, **variables: str) -> Settings:
    return load_settings(directory, directory, variables)


@pytest.mark.parametrize("form", FORMS)
def test_env_file_is_read_once_for_all_tasks(tmp_path: Path, form: str) -> None:
    with pipe(tmp_path, "IMAGE=example.org/mine:1\nTAGS=2\n", form) as path:
        settings = [load(tmp_path, ENV_FILE=path) for _ in range(3)]
    assert {str(item.image) for item in settings} == {"example.org/mine:1"}
    assert {item.tags for item in settings} == {("2",)}


@pytest.mark.parametrize("form", FORMS)
def test_relative_paths_in_a_pipe_start_from_a_directory_with_files(
    tmp_path: Path, form: str
) -> None:
    (tmp_path / "manifest.scm").write_text("(a)")
    with pipe(tmp_path, "GUIX_MANIFEST=manifest.scm\n", form) as path:
        settings = load(tmp_path, ENV_FILE=path)
    assert settings.guix_manifest == tmp_path / "manifest.scm"


def test_env_file_of_the_project_can_be_a_pipe(tmp_path: Path) -> None:
    with pipe(tmp_path, "IMAGE=example.org/mine:1\n", name=".env"):
        images = {str(load(tmp_path).image) for _ in range(2)}
    assert images == {"example.org/mine:1"}


def test_several_pipes_are_independent(tmp_path: Path) -> None:
    with pipe(tmp_path, "TAGS=1\n", "descriptor") as first, pipe(tmp_path, "TAGS=2\n") as second:
        assert load(tmp_path, ENV_FILE=f"{second},{first}").tags == ("1",)
        assert load(tmp_path, ENV_FILE=f"{first},{second}").tags == ("2",)


def test_mistake_in_a_pipe_is_reported_each_time(tmp_path: Path) -> None:
    with pipe(tmp_path, "# mine\nTAGS=-\n") as path:
        for _ in range(2):
            with pytest.raises(SettingsError, match=r"^p:2: TAGS: "):
                load(tmp_path, ENV_FILE=path)


def test_changed_env_file_is_not_read_again_in_a_call(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("IMAGE=example.org/one:1\n")
    first = load(tmp_path)
    (tmp_path / ".env").write_text("IMAGE=example.org/two:1\n")
    assert load(tmp_path) == first
    clear_file_cache()
    assert str(load(tmp_path).image) == "example.org/two:1"


def test_new_env_file_of_a_task_is_read_by_the_next(tmp_path: Path) -> None:
    load(tmp_path)
    (tmp_path / ".env").write_text("TAGS=1\n")
    assert load(tmp_path).tags == ("1",)


def test_empty_pipe_is_reported(tmp_path: Path) -> None:
    with pipe(tmp_path, "") as path:
        (note,) = load(tmp_path, ENV_FILE=path).notes
    assert note.startswith("environment: ENV_FILE: p: this pipe is empty")
    assert load(tmp_path, ENV_FILE="/dev/null").notes == ()


@pytest.mark.parametrize("form", FORMS)
def test_secret_is_read_once(tmp_path: Path, form: str) -> None:
    with pipe(tmp_path, "a secret\r\n", form) as path:
        for _ in range(2):
            settings = load(tmp_path, DOCKER_USERNAME="me", DOCKER_PASSWORD_FILE=path)
            assert settings.docker_password
            assert settings.docker_password.reveal() == "a secret"


CHANNELS = '(list (channel (name \'guix) (url "https://guix.test")))'


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("GUIX_CHANNELS", CHANNELS, lambda s: (channels_text(s) or "").encode()),
        ("GUIX_MANIFEST", "(a)", lambda settings: install_stage(settings).files["manifest.scm"]),
        ("SSH_KNOWN_HOSTS", "host key", _known_hosts),
        ("EXTRA_CA_FILE", AUTHORITY.read_text(), lambda s: common_files(s)["extra-ca.pem"]),
        ("GUIX_SUBSTITUTE_KEYS", "(key)", lambda s: common_files(s)["keys/0-p.pub"]),
        ("BUILD_SECRETS", "token", lambda settings: settings.build_secrets["id"].read_bytes()),
    ],
)
def test_file_of_a_setting_is_read_once(
    tmp_path: Path, name: str, content: str, read: Callable[[Settings], bytes]
) -> None:
    with pipe(tmp_path, content, name="p.pub") as path:
        value = f"id={path}" if name == "BUILD_SECRETS" else path
        contents = [read(load(tmp_path, **{name: value})) for _ in range(2) for _ in range(2)]
    assert set(contents) == {content.encode()}


def test_pipe_has_the_digest_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("(key)")
    with pipe(tmp_path, "(key)") as path:
        files.read_file(Path(path))
        assert file_digest(Path(path)) == file_digest(tmp_path / "file") != text_digest("")


def test_build_secret_from_a_pipe_can_be_read_by_another_process(tmp_path: Path) -> None:
    with pipe(tmp_path, b"\0\xff" * 40_000) as path:
        (secret,) = load(tmp_path, BUILD_SECRETS=f"id={path}").build_secrets.values()
    for _ in range(2):
        assert subprocess.check_output(["cat", secret]) == b"\0\xff" * 40_000
    assert load(tmp_path, BUILD_SECRETS=f"id={path}").build_secrets == {"id": secret}


def test_pipe_as_dockerfile_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    with pytest.raises(SettingsError, match=r"DOCKERFILE: '.*/p' is a pipe, which"):
        load(tmp_path, DOCKERFILE="p")


def test_regular_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "manifest.scm").write_text("(a)")
    settings = load(tmp_path, GUIX_MANIFEST="manifest.scm")
    assert install_stage(settings).files["manifest.scm"] == b"(a)"
    (tmp_path / "manifest.scm").write_text("(b)")
    assert install_stage(settings).files["manifest.scm"] == b"(b)"


def test_waiting_for_a_writer_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "_SILENT_WAIT", 0.05)
    path = tmp_path / "p"
    os.mkfifo(path)
    writer = threading.Timer(0.5, path.write_text, args=["TAGS=1\n"])
    writer.start()
    assert load(tmp_path, ENV_FILE="p").tags == ("1",)
    assert capsys.readouterr().err == f"waiting for '{path}': nothing has been written to it yet\n"


def test_output_of_a_slow_writer_is_read_completely(tmp_path: Path) -> None:
    script = "import time; print('TAGS=1', flush=True); time.sleep(.3); print('OUTPUT=quiet')"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        settings = load(tmp_path, ENV_FILE=f"/dev/fd/{writer.stdout.fileno()}")
    assert settings.tags == ("1",)
    assert settings.output is Display.QUIET
