"""Settings from pipes are read once, and every task of a call has them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import forget_contents
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
    """The path of a pipe that somebody writes to once."""
    data = content if isinstance(content, bytes) else content.encode()
    if form == "named":
        path = directory / name
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_bytes, args=(data,))
        writer.start()
        yield str(path)
        writer.join(5)
        assert not writer.is_alive(), "nobody read the pipe"
    else:
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        yield f"/dev/fd/{reading}"
        os.close(reading)


def load(directory: Path, **environ: str) -> Settings:
    return load_settings(directory, directory, environ)


@pytest.mark.parametrize("form", FORMS)
def test_env_file_is_read_once_for_all_tasks(tmp_path: Path, form: str) -> None:
    with pipe(tmp_path, "IMAGE=example.org/mine:1\nTAGS=2\n", form) as path:
        settings = [load(tmp_path, ENV_FILE=path) for _ in range(3)]
    assert {str(each.image) for each in settings} == {"example.org/mine:1"}
    assert {each.tags for each in settings} == {("2",)}


@pytest.mark.parametrize("form", FORMS)
def test_relative_paths_in_a_pipe_start_from_a_directory_with_files(
    tmp_path: Path, form: str
) -> None:
    (tmp_path / "manifest.scm").write_text("(a)")
    with pipe(tmp_path, "GUIX_MANIFEST=manifest.scm\n", form) as path:
        found = load(tmp_path, ENV_FILE=path)
    assert found.guix_manifest == tmp_path / "manifest.scm"


def test_env_file_of_the_project_can_be_a_pipe(tmp_path: Path) -> None:
    with pipe(tmp_path, "IMAGE=example.org/mine:1\n", name=".env"):
        found = {str(load(tmp_path).image) for _ in range(2)}
    assert found == {"example.org/mine:1"}


def test_several_pipes_do_not_mix(tmp_path: Path) -> None:
    with pipe(tmp_path, "TAGS=1\n", "descriptor") as one, pipe(tmp_path, "TAGS=2\n") as two:
        assert load(tmp_path, ENV_FILE=f"{two},{one}").tags == ("1",)
        assert load(tmp_path, ENV_FILE=f"{one},{two}").tags == ("2",)


def test_mistake_in_a_pipe_is_named_each_time(tmp_path: Path) -> None:
    with pipe(tmp_path, "# mine\nTAGS=-\n") as path:
        for _ in range(2):
            with pytest.raises(SettingsError, match=r"^p:2: TAGS: "):
                load(tmp_path, ENV_FILE=path)


def test_env_file_that_changes_during_a_call_does_not_change_its_settings(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("IMAGE=example.org/one:1\n")
    first = load(tmp_path)
    (tmp_path / ".env").write_text("IMAGE=example.org/two:1\n")
    assert load(tmp_path) == first
    forget_contents()
    assert str(load(tmp_path).image) == "example.org/two:1"


def test_env_file_that_a_task_writes_is_read_by_the_next(tmp_path: Path) -> None:
    load(tmp_path)
    (tmp_path / ".env").write_text("TAGS=1\n")
    assert load(tmp_path).tags == ("1",)


def test_empty_pipe_is_worth_a_note(tmp_path: Path) -> None:
    with pipe(tmp_path, "") as path:
        (note,) = load(tmp_path, ENV_FILE=path).notes
    assert note.startswith("environment: ENV_FILE: p: this pipe is empty")
    assert load(tmp_path, ENV_FILE="/dev/null").notes == ()


@pytest.mark.parametrize("form", FORMS)
def test_secret_is_read_once(tmp_path: Path, form: str) -> None:
    with pipe(tmp_path, "a secret\r\n", form) as path:
        for _ in range(2):
            found = load(tmp_path, DOCKER_USERNAME="me", DOCKER_PASSWORD_FILE=path)
            assert found.docker_password
            assert found.docker_password.reveal() == "a secret"


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
def test_file_that_a_setting_names_is_read_once(
    tmp_path: Path, name: str, content: str, read: Callable[[Settings], bytes]
) -> None:
    with pipe(tmp_path, content, name="p.pub") as path:
        value = f"id={path}" if name == "BUILD_SECRETS" else path
        found = [read(load(tmp_path, **{name: value})) for _ in range(2) for _ in range(2)]
    assert set(found) == {content.encode()}


def test_digest_of_a_pipe_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("(key)")
    with pipe(tmp_path, "(key)") as path:
        files.read_file(Path(path))
        assert file_digest(Path(path)) == file_digest(tmp_path / "file") != text_digest("")


def test_build_secret_from_a_pipe_is_read_by_another_process(tmp_path: Path) -> None:
    with pipe(tmp_path, b"\0\xff" * 40_000) as path:
        (secret,) = load(tmp_path, BUILD_SECRETS=f"id={path}").build_secrets.values()
    for _ in range(2):
        assert subprocess.check_output(["cat", secret]) == b"\0\xff" * 40_000
    assert load(tmp_path, BUILD_SECRETS=f"id={path}").build_secrets == {"id": secret}


def test_dockerfile_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    with pytest.raises(SettingsError, match=r"DOCKERFILE: '.*/p' is a pipe, which"):
        load(tmp_path, DOCKERFILE="p")


def test_regular_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "manifest.scm").write_text("(a)")
    settings = load(tmp_path, GUIX_MANIFEST="manifest.scm")
    assert install_stage(settings).files["manifest.scm"] == b"(a)"
    (tmp_path / "manifest.scm").write_text("(b)")
    assert install_stage(settings).files["manifest.scm"] == b"(b)"


def test_pipe_without_a_writer_is_reported_while_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "_SILENT_WAIT", 0.05)
    path = tmp_path / "p"
    os.mkfifo(path)
    writer = threading.Timer(0.5, path.write_text, args=["TAGS=1\n"])
    writer.start()
    assert load(tmp_path, ENV_FILE="p").tags == ("1",)
    assert capsys.readouterr().err == f"waiting for '{path}': nothing has been written to it yet\n"


def test_slow_writer_is_read_to_its_end(tmp_path: Path) -> None:
    slow = "import time; print('TAGS=1', flush=True); time.sleep(.3); print('OUTPUT=quiet')"
    with subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        settings = load(tmp_path, ENV_FILE=f"/dev/fd/{writer.stdout.fileno()}")
    assert settings.tags == ("1",)
    assert settings.output is Display.QUIET
