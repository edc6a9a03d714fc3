"""The build context: the entries that BuildKit sends, and their digest."""

from __future__ import annotations

import os
import socket
import stat
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guix_tasks import files
from guix_tasks.engine.build_context import (
    OUTSIDE,
    context_archive,
    context_digest,
    context_entries,
    linked_context,
)
from guix_tasks.errors import UsageError
from guix_tasks.oci.dockerignore import Matcher, read_patterns

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A context with a file, a link and an empty directory."""
    root = tmp_path / "context"
    for name in ("src/app/main.py", "src/app/notes.txt", "docs/a.md", "Dockerfile"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty").mkdir()
    (root / "current").symlink_to("src")
    (root / "dangling").symlink_to("./no//where")
    for path in root.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    return root


def names(context: Path, dockerfile: Path | None = None) -> list[str]:
    return [entry.name for entry in context_entries(context, dockerfile or context / "Dockerfile")]


def digest(context: Path, without: frozenset[Path] = frozenset()) -> str:
    files._digest_of_state.cache_clear()
    return context_digest(context_entries(context, context / "Dockerfile"), without)


def ignore(context: Path, *lines: str) -> None:
    (context / ".dockerignore").write_text("\n".join(lines))


ALL = [
    "Dockerfile", "current", "dangling", "docs", "docs/a.md", "empty", "src", "src/app",
    "src/app/main.py", "src/app/notes.txt",
]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", ALL),
        ("*", []),
        ("src", [name for name in ALL if not name.startswith("src")]),
        ("SRC", ALL),
        ("* !**/*.py", ["src", "src/app", "src/app/main.py"]),
        ("* !src/app/*.txt", ["src", "src/app", "src/app/notes.txt"]),
        ("* !empty", ["empty"]),
        ("* !e*", ["empty"]),
        ("** !docs", ["docs", "docs/a.md"]),
        ("src/** !src/none", [name for name in ALL if not name.startswith("src/")]),
        ("* !current", ["current"]),
        ("* !current/app", []),
    ],
)
def test_ignored_files_are_not_entries(context: Path, lines: str, expected: list[str]) -> None:
    ignore(context, *lines.split(), ".dockerignore")
    assert names(context) == expected


def test_dockerfile_and_ignore_file_are_entries(context: Path) -> None:
    ignore(context, "src")
    assert {"Dockerfile", ".dockerignore"} <= set(names(context))


@pytest.mark.parametrize("content", ["docs", "", "# nothing"])
def test_ignore_file_of_the_dockerfile_takes_precedence(context: Path, content: str) -> None:
    ignore(context, "*")
    (context / "Dockerfile.dockerignore").write_text(content)
    assert ("docs" not in names(context)) == (content == "docs")
    assert "src" in names(context)


def test_ignore_file_of_an_outside_dockerfile_is_next_to_it(context: Path, tmp_path: Path) -> None:
    (tmp_path / "other.dockerignore").write_text("*\n!docs")
    assert names(context, tmp_path / "other") == ["docs", "docs/a.md"]


def test_link_to_an_ignore_file_is_followed_within_the_context(
    context: Path, tmp_path: Path
) -> None:
    (context / "docs/ignore").write_text("*")
    (context / ".dockerignore").symlink_to("docs/ignore")
    assert names(context) == []
    (tmp_path / "outside").write_text("*")
    (context / ".dockerignore").unlink()
    (context / ".dockerignore").symlink_to("../outside")
    assert "src" in names(context)


def test_directory_named_dockerignore_is_not_an_ignore_file(context: Path) -> None:
    (context / ".dockerignore").mkdir()
    assert set(names(context)) == {*ALL, ".dockerignore"}


@pytest.mark.parametrize("line", ["[", "!", "[Local-Only]"])
def test_malformed_pattern_names_file_and_line(context: Path, line: str) -> None:
    ignore(context, "# one", line)
    with pytest.raises(UsageError, match=r"\.dockerignore:2: .*; correct this line"):
        names(context)


def chmod(mode: int, name: str) -> Callable[[Path], None]:
    return lambda context: (context / name).chmod(mode)


def link(context: Path, target: str, name: str = "current") -> None:
    (context / name).unlink()
    (context / name).symlink_to(target)


def replace_by_file(link: Path) -> None:
    link.unlink()
    link.write_text("./no//where")


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_copy(context: Path) -> None:
    (context / "docs/b.md").unlink()
    (context / "docs/b.md").write_text("docs/a.md")


SENT_CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda context: (context / "docs/a.md").write_text("docs/b.md"),
    "name": lambda context: (context / "docs/a.md").rename(context / "docs/c.md"),
    "new file": lambda context: (context / "new").touch(),
    "new directory": lambda context: (context / "docs/new").mkdir(),
    "empty directory gone": lambda context: (context / "empty").rmdir(),
    "mode of a file": chmod(0o600, "docs/a.md"),
    "mode for the group": chmod(0o664, "docs/a.md"),
    "setuid": chmod(0o4644, "docs/a.md"),
    "mode of a directory": chmod(0o700, "docs"),
    "mode of an empty directory": chmod(0o1777, "empty"),
    "link to a directory": lambda context: link(context, "docs"),
    "dangling link": lambda context: link(context, "nowhere", "dangling"),
    "another text of the same target": lambda context: link(context, "no/where", "dangling"),
    "link becomes a file": lambda context: replace_by_file(context / "dangling"),
    "file becomes a pipe": lambda context: replace_by_pipe(context / "docs/a.md"),
    "hard link": lambda context: os.link(context / "docs/a.md", context / "docs/z.md"),
}


@pytest.mark.parametrize("change", SENT_CHANGES.values(), ids=SENT_CHANGES)
def test_digest_changes_with_sent_entries(context: Path, change: Callable[[Path], object]) -> None:
    original = digest(context)
    change(context)
    assert digest(context) != original


def test_hard_link_differs_from_a_copy(context: Path) -> None:
    os.link(context / "docs/a.md", context / "docs/b.md")
    original = digest(context)
    replace_by_copy(context)
    assert digest(context) != original


def test_first_sent_name_of_a_hard_link_has_the_content(context: Path) -> None:
    os.link(context / "docs/a.md", context / "src/z.md")
    ignore(context, "docs")
    (entry,) = [e for e in context_entries(context, context / "d") if e.name == "src/z.md"]
    assert entry.has_content


UNSENT_CHANGES: dict[str, Callable[[Path], object]] = {
    "time": lambda context: os.utime(context / "docs/a.md", (1, 1)),
    "mode of the context": lambda context: context.chmod(0o700),
    "ignored file": lambda context: (context / "docs/secret.log").write_text("new"),
    "behind a link": lambda context: (context.parent / "outside" / "new").touch(),
    "mode of an ignored directory": lambda context: (context / "cache").chmod(0o700),
}


@pytest.mark.parametrize("change", UNSENT_CHANGES.values(), ids=UNSENT_CHANGES)
def test_digest_ignores_unsent_entries(context: Path, change: Callable[[Path], object]) -> None:
    ignore(context, "**/*.log", "cache")
    (context / "cache").mkdir()
    (context.parent / "outside").mkdir()
    (context / "beyond").symlink_to("../outside")
    original = digest(context)
    change(context)
    assert digest(context) == original


def test_digest_ignores_the_order_of_creation(context: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for entry in reversed(context_entries(context, context / "Dockerfile")):
        path = other / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if stat.S_ISDIR(entry.mode):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        elif entry.target:
            path.symlink_to(entry.target)
        else:
            path.write_bytes(entry.path.read_bytes())
            path.chmod(0o644)
    assert digest(other) == digest(context)


def test_digest_ignores_unsent_content(context: Path) -> None:
    """BuildKit lists the file and does not open it, so that the image has an empty file."""
    ignore(context, "d*", "!docs/a.md", "docs")
    assert "docs/a.md" in names(context)
    original = digest(context)
    (context / "docs/a.md").write_text("other")
    assert digest(context) == original


def test_socket_is_an_empty_file(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(context)  # the path of a socket has a maximum length
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    (entry,) = [e for e in context_entries(context, context / "d") if e.name == "socket"]
    assert stat.S_ISREG(entry.mode)
    assert not entry.has_content
    digest(context)


def test_digest_changes_with_names_without_utf8(context: Path) -> None:
    original = digest(context)
    path = os.fsencode(context) + b"/n\xff"
    Path(os.fsdecode(path)).write_text("1")
    first = digest(context)
    Path(os.fsdecode(path)).rename(os.fsdecode(path[:-1] + b"\xfe"))
    assert len({original, first, digest(context)}) == 3


@pytest.mark.parametrize("path", ["out/logs", "deep/out/logs"])
def test_digest_ignores_excluded_directories(context: Path, path: str) -> None:
    logs = context.resolve() / path
    original = digest(context, frozenset([logs]))
    logs.parent.mkdir(parents=True)
    assert digest(context, frozenset([logs])) == original
    logs.mkdir()
    (logs / "one.log").touch()
    assert digest(context, frozenset([logs])) == original
    (logs.parent / "more").touch()
    assert digest(context, frozenset([logs])) != original


def test_unreadable_file_is_a_usage_error(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("guix_tasks.engine.build_context.file_digest", deny)
    with pytest.raises(UsageError, match=r"BUILD_CONTEXT: cannot read .*: Permission denied; "):
        digest(context)


# --- The path for BuildKit ------------------------------------------------------------------


def context_link(context: Path) -> Path:
    link = linked_context(context, context / "Dockerfile")
    assert link.resolve() == context.resolve()
    return link


def test_path_changes_with_the_mode_of_a_directory(context: Path) -> None:
    original = context_link(context)
    (context / "docs/a.md").write_text("new")
    assert context_link(context) == original
    (context / "docs").chmod(0o700)
    assert context_link(context) != original


def test_context_is_used_directly_if_links_are_impossible(
    context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert context_link(context) == context


# --- The archive for an engine without BuildKit ---------------------------------------------


def archive(context: Path, dockerfile: Path) -> tuple[dict[str, bytes | None], str]:
    file, name = context_archive(context, dockerfile)
    with file, tarfile.open(fileobj=file) as tar:
        members = {}
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            members[member.name] = content.read() if content else None
    return members, name


def test_archive_has_exactly_the_entries(context: Path) -> None:
    members, name = archive(context, context / "Dockerfile")
    assert name == "Dockerfile"
    assert sorted(members) == sorted(names(context))


def test_archive_has_the_dockerfile_and_the_ignore_file(context: Path) -> None:
    ignore(context, "*", "!docs")
    members, name = archive(context, context / "Dockerfile")
    assert sorted(members) == [".dockerignore", "Dockerfile", "docs", "docs/a.md"]
    assert members[".dockerignore"] == b"Dockerfile\n.dockerignore\n"
    assert name == "Dockerfile"


def test_archive_keeps_an_ignore_file_with_the_dockerfile(context: Path) -> None:
    ignore(context, "Dockerfile")
    members, _ = archive(context, context / "Dockerfile")
    assert members[".dockerignore"] == b"Dockerfile"
    assert "Dockerfile" in members


def test_archive_has_an_outside_dockerfile(context: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("FROM x")
    members, name = archive(context, tmp_path / "other")
    assert (members.pop(name), name) == (b"FROM x", OUTSIDE)
    assert members.pop(".dockerignore") == b".guix-tasks.dockerfile\n.dockerignore\n"
    assert sorted(members) == sorted(names(context))


def test_archive_has_no_ignored_directory_of_the_dockerfile(context: Path) -> None:
    (context / "build").mkdir()
    (context / "build/Dockerfile").write_text("FROM y")
    ignore(context, "build", ".dockerignore")
    members, name = archive(context, context / "build/Dockerfile")
    assert name == OUTSIDE
    assert not [member for member in members if member.startswith("build")]


def test_archive_escapes_the_name_of_the_dockerfile_in_the_pattern(context: Path) -> None:
    (context / "D[a]|{2}").write_text("FROM y")
    ignore(context, "D*", ".dockerignore")
    members, name = archive(context, context / "D[a]|{2}")
    assert name == "D[a]|{2}"
    patterns = Matcher(read_patterns(members[".dockerignore"] or b""))
    assert [path for path in ("D[a]|{2}", "Da", "Dockerfile") if patterns.ignores(path)] == [name]


def test_full_disk_is_reported_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM x\n")
    monkeypatch.setattr(
        tempfile,
        "TemporaryFile",
        lambda: open("/dev/full", "wb", buffering=0),  # noqa: SIM115, PTH123
    )
    with pytest.raises(OSError, match="No space left on device") as error:
        context_archive(tmp_path, tmp_path / "Dockerfile")
    assert error.value.filename == tempfile.gettempdir()
