"""The build context: which entries BuildKit sends, and that all of each is in the digest."""

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
    return [each.name for each in context_entries(context, dockerfile or context / "Dockerfile")]


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
def test_entries_are_those_that_are_not_ignored(
    context: Path, lines: str, expected: list[str]
) -> None:
    ignore(context, *lines.split(), ".dockerignore")
    assert names(context) == expected


def test_dockerfile_and_ignore_file_are_entries(context: Path) -> None:
    ignore(context, "src")
    assert {"Dockerfile", ".dockerignore"} <= set(names(context))


@pytest.mark.parametrize("content", ["docs", "", "# nothing"])
def test_ignore_file_of_the_dockerfile_comes_first(context: Path, content: str) -> None:
    ignore(context, "*")
    (context / "Dockerfile.dockerignore").write_text(content)
    assert ("docs" not in names(context)) == (content == "docs")
    assert "src" in names(context)


def test_ignore_file_of_a_dockerfile_elsewhere_is_next_to_it(context: Path, tmp_path: Path) -> None:
    (tmp_path / "other.dockerignore").write_text("*\n!docs")
    assert names(context, tmp_path / "other") == ["docs", "docs/a.md"]


def test_link_to_an_ignore_file_is_followed_within_the_context_only(
    context: Path, tmp_path: Path
) -> None:
    (context / "docs/ignore").write_text("*")
    (context / ".dockerignore").symlink_to("docs/ignore")
    assert names(context) == []
    (tmp_path / "outside").write_text("*")
    (context / ".dockerignore").unlink()
    (context / ".dockerignore").symlink_to("../outside")
    assert "src" in names(context)


def test_directory_of_that_name_is_no_ignore_file(context: Path) -> None:
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


def become_file(link: Path) -> None:
    link.unlink()
    link.write_text("./no//where")


def become_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_copy(context: Path) -> None:
    (context / "docs/b.md").unlink()
    (context / "docs/b.md").write_text("docs/a.md")


CHANGES: dict[str, Callable[[Path], object]] = {
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
    "link becomes a file": lambda context: become_file(context / "dangling"),
    "file becomes a pipe": lambda context: become_pipe(context / "docs/a.md"),
    "hard link": lambda context: os.link(context / "docs/a.md", context / "docs/z.md"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_of_what_is_sent_changes_the_digest(
    context: Path, change: Callable[[Path], object]
) -> None:
    before = digest(context)
    change(context)
    assert digest(context) != before


def test_hard_link_is_not_the_same_as_a_copy(context: Path) -> None:
    os.link(context / "docs/a.md", context / "docs/b.md")
    before = digest(context)
    replace_by_copy(context)
    assert digest(context) != before


def test_first_name_that_is_sent_has_the_content(context: Path) -> None:
    os.link(context / "docs/a.md", context / "src/z.md")
    ignore(context, "docs")
    (entry,) = [each for each in context_entries(context, context / "d") if each.name == "src/z.md"]
    assert entry.has_content


UNSEEN: dict[str, Callable[[Path], object]] = {
    "time": lambda context: os.utime(context / "docs/a.md", (1, 1)),
    "mode of the context": lambda context: context.chmod(0o700),
    "ignored file": lambda context: (context / "docs/secret.log").write_text("new"),
    "behind a link": lambda context: (context.parent / "outside" / "new").touch(),
    "mode of an ignored directory": lambda context: (context / "cache").chmod(0o700),
}


@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
def test_change_of_what_is_not_sent_does_not(
    context: Path, change: Callable[[Path], object]
) -> None:
    ignore(context, "**/*.log", "cache")
    (context / "cache").mkdir()
    (context.parent / "outside").mkdir()
    (context / "beyond").symlink_to("../outside")
    before = digest(context)
    change(context)
    assert digest(context) == before


def test_order_in_which_files_were_made_does_not_count(context: Path, tmp_path: Path) -> None:
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


def test_content_that_buildkit_does_not_send_does_not_count(context: Path) -> None:
    """It lists the file, and refuses to open it: the image has an empty one."""
    ignore(context, "d*", "!docs/a.md", "docs")
    assert "docs/a.md" in names(context)
    before = digest(context)
    (context / "docs/a.md").write_text("other")
    assert digest(context) == before


def test_socket_is_an_empty_file(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(context)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    (entry,) = [each for each in context_entries(context, context / "d") if each.name == "socket"]
    assert stat.S_ISREG(entry.mode)
    assert not entry.has_content
    digest(context)


def test_name_that_is_not_utf8_counts(context: Path) -> None:
    before = digest(context)
    path = os.fsencode(context) + b"/n\xff"
    Path(os.fsdecode(path)).write_text("1")
    first = digest(context)
    Path(os.fsdecode(path)).rename(os.fsdecode(path[:-1] + b"\xfe"))
    assert len({before, first, digest(context)}) == 3


@pytest.mark.parametrize("place", ["out/logs", "deep/out/logs"])
def test_what_is_left_out_does_not_count(context: Path, place: str) -> None:
    logs = context.resolve() / place
    before = digest(context, frozenset([logs]))
    logs.parent.mkdir(parents=True)
    assert digest(context, frozenset([logs])) == before
    logs.mkdir()
    (logs / "one.log").touch()
    assert digest(context, frozenset([logs])) == before
    (logs.parent / "more").touch()
    assert digest(context, frozenset([logs])) != before


def test_file_that_cannot_be_read_is_a_usage_error(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("guix_tasks.engine.build_context.file_digest", refuse)
    with pytest.raises(UsageError, match=r"BUILD_CONTEXT: cannot read .*: Permission denied; "):
        digest(context)


# --- The path that BuildKit is given --------------------------------------------------------


def link_of(context: Path) -> Path:
    link = linked_context(context, context / "Dockerfile")
    assert link.resolve() == context.resolve()
    return link


def test_context_has_another_path_if_the_mode_of_a_directory_changes(context: Path) -> None:
    before = link_of(context)
    (context / "docs/a.md").write_text("new")
    assert link_of(context) == before
    (context / "docs").chmod(0o700)
    assert link_of(context) != before


def test_context_has_its_own_path_if_there_can_be_no_link(
    context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert link_of(context) == context


# --- The archive for an engine without BuildKit ---------------------------------------------


def archive(context: Path, dockerfile: Path) -> tuple[dict[str, bytes | None], str]:
    file, name = context_archive(context, dockerfile)
    with file, tarfile.open(fileobj=file) as tar:
        found = {}
        for each in tar:
            content = tar.extractfile(each) if each.isfile() else None
            found[each.name] = content.read() if content else None
    return found, name


def test_archive_has_the_entries_alone(context: Path) -> None:
    found, name = archive(context, context / "Dockerfile")
    assert name == "Dockerfile"
    assert sorted(found) == sorted(names(context))


def test_archive_has_what_the_engine_reads_and_removes(context: Path) -> None:
    ignore(context, "*", "!docs")
    found, name = archive(context, context / "Dockerfile")
    assert sorted(found) == [".dockerignore", "Dockerfile", "docs", "docs/a.md"]
    assert found[".dockerignore"] == b"Dockerfile\n.dockerignore\n"
    assert name == "Dockerfile"


def test_archive_keeps_an_ignore_file_that_ignores_the_dockerfile(context: Path) -> None:
    ignore(context, "Dockerfile")
    found, _ = archive(context, context / "Dockerfile")
    assert found[".dockerignore"] == b"Dockerfile"
    assert "Dockerfile" in found


def test_archive_has_a_dockerfile_from_elsewhere(context: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("FROM x")
    found, name = archive(context, tmp_path / "other")
    assert (found.pop(name), name) == (b"FROM x", OUTSIDE)
    assert found.pop(".dockerignore") == b".guix-tasks.dockerfile\n.dockerignore\n"
    assert sorted(found) == sorted(names(context))


def test_archive_has_no_directory_for_the_sake_of_the_dockerfile(context: Path) -> None:
    (context / "build").mkdir()
    (context / "build/Dockerfile").write_text("FROM y")
    ignore(context, "build", ".dockerignore")
    found, name = archive(context, context / "build/Dockerfile")
    assert name == OUTSIDE
    assert not [each for each in found if each.startswith("build")]


def test_archive_names_a_dockerfile_as_a_pattern_for_it_alone(context: Path) -> None:
    (context / "D[a]|{2}").write_text("FROM y")
    ignore(context, "D*", ".dockerignore")
    found, name = archive(context, context / "D[a]|{2}")
    assert name == "D[a]|{2}"
    patterns = Matcher(read_patterns(found[".dockerignore"] or b""))
    assert [each for each in ("D[a]|{2}", "Da", "Dockerfile") if patterns.ignores(each)] == [name]


def test_full_disk_of_the_archive_is_not_blamed_on_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM x\n")
    monkeypatch.setattr(
        tempfile,
        "TemporaryFile",
        lambda: open("/dev/full", "wb", buffering=0),  # noqa: SIM115, PTH123
    )
    with pytest.raises(OSError, match="No space left on device") as caught:
        context_archive(tmp_path, tmp_path / "Dockerfile")
    assert caught.value.filename == tempfile.gettempdir()
