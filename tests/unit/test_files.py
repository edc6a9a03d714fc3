"""Digests of files and directories, atomic writes and the digest cache."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import DETERMINISTIC
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from guix_tasks import files
from guix_tasks.engine.accounts import docker_config_directory
from guix_tasks.files import (
    check_writable,
    file_digest,
    text_digest,
    tree_digest,
    write_whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

Tree = dict[str, bytes]

TREES = st.dictionaries(
    st.sampled_from(["a", "b", "c d", "deep/a", "deep/er/b", "é", "-x"]),
    st.binary(max_size=4),
    max_size=5,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clear_memory()
    return tmp_path / "cache"


def clear_memory() -> None:
    """Empty the cache in memory, as a new process would."""
    files._digest_of_state.cache_clear()


def write_tree(directory: Path, tree: Tree, *, backwards: bool = False) -> Path:
    clear_memory()
    directory.mkdir(parents=True)
    for name in sorted(tree, reverse=backwards):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tree[name])
    return directory


@DETERMINISTIC
@given(st.lists(st.text(max_size=3)), st.lists(st.text(max_size=3)))
def test_digests_of_different_lists_of_texts_differ(first: list[str], second: list[str]) -> None:
    assert (text_digest(*first) == text_digest(*second)) == (first == second)
    assert text_digest("a", "b") != text_digest("ab")
    assert text_digest("a") != text_digest("a", "")


@hypothesis_settings(DETERMINISTIC, max_examples=12)
@given(TREES, TREES)
def test_tree_digest_depends_on_names_and_contents(
    tmp_path_factory: pytest.TempPathFactory, tree: Tree, other_tree: Tree
) -> None:
    directory = tmp_path_factory.mktemp("trees")
    first = write_tree(directory / "x", tree)
    second = write_tree(directory / "y" / "z", tree, backwards=True)
    for path in second.rglob("*"):
        os.utime(path, (1, 1))
    digest = tree_digest(first)
    clear_memory()
    assert digest == tree_digest(second)
    other_digest = tree_digest(write_tree(directory / "other", other_tree))
    assert (digest == other_digest) == (tree == other_tree)


def test_empty_directory_changes_the_digest(tmp_path: Path) -> None:
    directory = write_tree(tmp_path / "x", {"a": b"1"})
    digest = tree_digest(directory)
    (directory / "deep").mkdir()
    empty = tree_digest(directory)
    assert empty != digest
    (directory / "deep" / "er").mkdir()
    assert tree_digest(directory) not in (digest, empty)


def test_target_of_a_directory_link_changes_the_digest(tmp_path: Path) -> None:
    directory = write_tree(tmp_path / "x", {"one/a": b"1", "two/a": b"1"})
    (directory / "current").symlink_to("one")
    digest = tree_digest(directory)
    (directory / "current").unlink()
    (directory / "current").symlink_to("two")
    assert tree_digest(directory) != digest


def test_executable_bit_changes_the_digest(tmp_path: Path) -> None:
    directory = write_tree(tmp_path / "x", {"a": b"1"})
    digest = tree_digest(directory)
    (directory / "a").chmod(0o664)
    assert tree_digest(directory) == digest
    (directory / "a").chmod(0o755)
    assert tree_digest(directory) != digest


def test_link_target_changes_the_digest(tmp_path: Path) -> None:
    directory = write_tree(tmp_path / "x", {"a": b"1", "b": b"1"})
    (directory / "link").symlink_to("a")
    to_a = tree_digest(directory)
    for target in ("b", "nowhere", "/", ".."):
        (directory / "link").unlink()
        (directory / "link").symlink_to(target)
        assert tree_digest(directory) != to_a, target
    (directory / "link").unlink()
    (directory / "link").write_bytes(b"1")
    assert tree_digest(directory) != to_a


def test_special_files_do_not_hang(tmp_path: Path) -> None:
    directory = write_tree(tmp_path / "x", {"a": b"1"})
    digest = tree_digest(directory)
    os.mkfifo(directory / "pipe")
    assert tree_digest(directory) != digest


def test_tree_digest_accepts_a_file(tmp_path: Path) -> None:
    file = write_tree(tmp_path / "x", {"a": b"1"}) / "a"
    assert tree_digest(file) == file_digest(file)
    file.chmod(0o755)
    assert tree_digest(file) != file_digest(file)


def test_unreadable_directory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine, which runs as root, would read files that the digest does not cover."""
    directory = write_tree(tmp_path / "x", {"a": b"1", "deep/a": b"1"})
    list_directory = os.scandir

    def scan(path: str) -> object:
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return list_directory(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(PermissionError):
        tree_digest(directory)


def test_excluded_output_does_not_change_the_digest(tmp_path: Path) -> None:
    directory = write_tree(tmp_path / "x", {"a": b"1"})
    without = [directory / "lock", directory / "out" / "logs"]
    digest = tree_digest(directory, without=without)
    write_tree(directory / "out" / "logs", {"one": b"1"})
    (directory / "lock").touch()
    assert tree_digest(directory, without=without) == digest
    (directory / "out" / "pack").touch()
    assert tree_digest(directory, without=without) != digest


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "no")


# --- Writing --------------------------------------------------------------------------------


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    """A file of a user whose mode differs from that of a new file."""
    path = tmp_path / "project" / "file"
    path.parent.mkdir()
    path.write_text("old")
    path.chmod(0o664)
    return path


def test_written_file_keeps_its_mode_and_owner(user_file: Path) -> None:
    if os.geteuid() == 0:
        os.chown(user_file, 1234, 4321)
    previous = user_file.stat()
    write_whole(user_file, b"new")
    current = user_file.stat()
    assert user_file.read_bytes() == b"new"
    assert (current.st_mode, current.st_uid, current.st_gid) == (
        previous.st_mode, previous.st_uid, previous.st_gid,
    )  # fmt: skip


def test_content_of_a_private_file_is_private_from_the_start(user_file: Path) -> None:
    user_file.chmod(0o600)

    def content() -> Iterator[bytes]:
        (unfinished,) = {*user_file.parent.iterdir()} - {user_file}
        assert stat.S_IMODE(unfinished.stat().st_mode) == 0o600
        yield b"new"

    write_whole(user_file, content())
    assert user_file.read_bytes() == b"new"


def test_new_file_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", b"new")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_target_of_links_is_written(user_file: Path, tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to("project/file")
    (tmp_path / "second").symlink_to(tmp_path / "first")
    write_whole(tmp_path / "second", iter([b"n", b"ew"]))
    assert user_file.read_bytes() == b"new"
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()


def test_link_to_a_missing_file_creates_that_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["chown", "replace"])
def test_irreplaceable_file_is_overwritten(
    user_file: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """For example a mounted file, or the file of another user in a directory of this user."""

    def fail(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os if call == "chown" else Path, call, fail)
    inode = user_file.stat().st_ino
    write_whole(user_file, b"new")
    assert user_file.read_bytes() == b"new"
    assert user_file.stat().st_ino == inode
    assert [*user_file.parent.iterdir()] == [user_file]


def test_file_in_an_unwritable_directory_is_overwritten(
    user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path != user_file.parent)
    inode = user_file.stat().st_ino
    write_whole(user_file, b"new")
    assert user_file.read_bytes() == b"new"
    assert user_file.stat().st_ino == inode


def test_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert pipe.is_fifo()


def test_failed_content_does_not_change_the_file(user_file: Path) -> None:
    def content() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(user_file, content())
    assert user_file.read_text() == "old"
    assert [*user_file.parent.iterdir()] == [user_file]


def test_file_without_permission_is_not_written(
    user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path != user_file)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/file'"):
        check_writable(user_file)
    with pytest.raises(PermissionError):
        write_whole(user_file, b"new")
    assert user_file.read_text() == "old"


def test_new_file_needs_a_writable_directory(
    user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = user_file.parent / "out"
    check_writable(missing)
    with pytest.raises(FileNotFoundError):
        check_writable(missing / "file")
    with pytest.raises(NotADirectoryError):
        check_writable(user_file / "file")
    monkeypatch.setattr(os, "access", lambda path, _: path != user_file.parent)
    with pytest.raises(PermissionError):
        check_writable(missing)


# --- Digest cache ---------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "WORTH_CACHING", 4)
    path = tmp_path / "large"
    path.write_bytes(b"0123456789")
    return path


def cached_files(cache: Path) -> list[Path]:
    directory = cache / "guix-tasks" / "digests"
    return sorted(directory.iterdir()) if directory.exists() else []


def test_large_file_has_the_digest_of_its_content(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = file_digest(large)
    monkeypatch.setattr(files, "WORTH_CACHING", 1 << 20)
    clear_memory()
    assert file_digest(large) == digest


def test_large_file_is_read_once(large: Path, cache: Path) -> None:
    digest = file_digest(large)
    (cached,) = cached_files(cache)
    assert cached.read_text() == digest
    cached.write_text("0" * 64)
    clear_memory()
    assert file_digest(large) == "0" * 64


@pytest.mark.parametrize("content", [b"", b"\xff", b"0" * 63])
def test_damaged_cache_file_is_replaced(large: Path, cache: Path, content: bytes) -> None:
    digest = file_digest(large)
    (cached,) = cached_files(cache)
    cached.write_bytes(content)
    clear_memory()
    assert file_digest(large) == cached.read_text() == digest


def test_changed_large_file_of_the_same_size_and_time_is_read_again(large: Path) -> None:
    os.utime(large, ns=(1, 1))
    digest = file_digest(large)
    large.write_bytes(b"9876543210")
    os.utime(large, ns=(1, 1))
    clear_memory()
    assert file_digest(large) != digest


@pytest.mark.parametrize("content", [b"9876543210", b"0123456789+"])
def test_changed_large_file_is_read_again(large: Path, cache: Path, content: bytes) -> None:
    digest = file_digest(large)
    large.write_bytes(content)
    os.utime(large, ns=(1, 1))
    clear_memory()
    assert file_digest(large) != digest
    assert len(cached_files(cache)) == 2


def test_file_written_by_an_earlier_task_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"one")
    digest = file_digest(path)
    path.write_bytes(b"another")
    assert file_digest(path) != digest


def test_modification_time_does_not_change_the_digest(large: Path) -> None:
    digest = file_digest(large)
    os.utime(large, (1, 1))
    clear_memory()
    assert file_digest(large) == digest


def test_small_file_is_not_cached(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"x")
    file_digest(path)
    assert cached_files(cache) == []


def test_unwritable_cache_is_not_an_error(large: Path, cache: Path) -> None:
    digest = file_digest(large)
    clear_memory()
    for path in cached_files(cache):
        path.unlink()
    (cache / "guix-tasks" / "digests").rmdir()
    (cache / "guix-tasks" / "digests").write_text("in the way")
    assert files.cache_home() == cache / "guix-tasks"
    assert file_digest(large) == digest


def test_user_without_a_home_directory_has_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", without_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert not docker_config_directory({}).exists()
    assert not files.cache_home().exists()
