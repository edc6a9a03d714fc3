"""The key of a build context covers exactly the files that a real build copies (random trees)."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import stat
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guix_tasks import files as files_module
from guix_tasks.cli.session import local_buildx
from guix_tasks.engine.api import BuildSpec
from guix_tasks.engine.build_context import context_digest, context_entries
from guix_tasks.engine.docker import Helpers
from guix_tasks.errors import BuilderError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from soak import Soak

    from guix_tasks.engine.build_context import Entry
    from guix_tasks.engine.docker import DockerEngine

pytestmark = pytest.mark.engine

NAMES = [
    "a", "b", "A", "ab", "a.py", "b.txt", ".x", "é", "[a]", "a|b", "b^", "a b", "n\nl", "a{2}",
]  # fmt: skip
PARTS = [
    "*", "**", "?", "a*", "*.py", "[ab]", "[^a]", "[a-b]*", "a?", "**b", "a**", r"\[a\]", r"\**",
    "a|b*", "a{2}*", ".", "..", "{a,b}", "é*", "^a*", "[*]",
]  # fmt: skip
MALFORMED = ["[", "!", "[]a]", "[b-a]", "a[", "\\", "[-x]"]

DOCKERFILE = "FROM scratch\nARG NUMBER\nLABEL number=$NUMBER\nCOPY . /ctx/\n"

Content = tuple[str, int, "bytes | str", frozenset[str]]
"""Type, mode, content or link target, and all names of the file within the context."""


@dataclass
class Tree:
    """A random build context."""

    root: Path
    random: Random
    classic: bool
    """For the classic builder, which keeps names that are not UTF-8, but no setgid bit."""

    @property
    def dockerfile(self) -> Path:
        return self.root / "Dockerfile"

    def create(self) -> None:
        self.root.mkdir()
        self.dockerfile.write_text(DOCKERFILE)
        for _ in range(self.random.randint(3, 14)):
            self.add()
        self.write_rules()

    def write_rules(self) -> None:
        for name in (".dockerignore", "Dockerfile.dockerignore"):
            (self.root / name).unlink(missing_ok=True)
        name = self.random.choice([".dockerignore", ".dockerignore", "Dockerfile.dockerignore"])
        lines = [self.rule() for _ in range(self.random.randint(0, 6))]
        (self.root / name).write_text("\n".join(lines), encoding="utf-8")

    def rule(self) -> str:
        if self.random.random() < 0.01:
            return self.random.choice(MALFORMED)
        parts = [
            self.random.choice(PARTS if self.random.random() < 0.5 else NAMES).partition("\n")[0]
            for _ in range(self.random.choice([1, 1, 1, 2, 2, 3]))
        ]
        prefix = self.random.choice(["", "", "", "!", "!", "/", "!/", " ", "! ", "./", "#"])
        return prefix + "/".join(parts) + self.random.choice(["", "", "", "/", " ", "\r"])

    def directories(self) -> list[Path]:
        return [self.root, *(path for path in self.paths() if is_directory(path))]

    def paths(self) -> list[Path]:
        paths = (Path(parent) / name for parent, directories, files in os.walk(self.root)
                 for name in (*directories, *files))  # fmt: skip
        fixed = {"Dockerfile", ".dockerignore", "Dockerfile.dockerignore"}
        return sorted(path for path in paths if path.name not in fixed)

    def new_path(self) -> Path:
        name = self.random.choice(NAMES)
        if self.classic and self.random.random() < 0.1:
            name = "n\udcff"
        return self.random.choice(self.directories()) / name

    def add(self) -> None:
        path = self.new_path()
        if os.path.lexists(path):
            return
        kind = self.random.choice(["file"] * 5 + ["directory"] * 4 + ["link"] * 2 + ["hard"] * 2
                                  + ["pipe", "socket"])  # fmt: skip
        files = [file for file in self.paths() if stat.S_ISREG(file.lstat().st_mode)]
        if kind == "file":
            path.write_text(self.random.choice(["", "1", "2", "three"]))
        elif kind == "directory":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(self.random.choice([*NAMES, "../a", "./a//b", "/etc", "."]))
        elif kind == "hard" and files:
            os.link(self.random.choice(files), path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            bind(path)
        if os.path.lexists(path) and self.random.random() < 0.4:
            self.change_mode(path)

    def change_mode(self, path: Path) -> None:
        if not path.is_symlink():
            least = 0o700 if path.is_dir() else 0o600
            mode = least | self.random.choice([0, 0o4, 0o44, 0o66, 0o55, 0o111, 0o1022, 0o2050])
            path.chmod(mode if path.is_dir() or not self.classic else mode & 0o1777)

    def edit(self) -> str:
        """Make one random change, which may affect the build or not, and describe it."""
        paths = self.paths()
        kind = self.random.choice(["add", "remove", "mode", "content", "rename", "time", "rules"])
        path = self.random.choice(paths) if paths else self.root
        if kind == "add" or not paths:
            self.add()
        elif kind == "remove":
            shutil.rmtree(path) if is_directory(path) else path.unlink()
        elif kind == "mode":
            self.change_mode(path)
        elif kind == "content" and stat.S_ISREG(path.lstat().st_mode):
            path.write_text(f"edited {self.random.random()}")
        elif kind == "rename":
            target = self.new_path()
            if not os.path.lexists(target) and path not in target.parents:
                path.rename(target)
        elif kind == "time":
            os.utime(path, (1, 1), follow_symlinks=False)
        elif kind == "rules":
            self.write_rules()
        return f"{kind} {path.relative_to(self.root)}"

    def describe(self) -> str:
        """Describe the tree and its rules for the message of a failure."""
        rules = {name: (self.root / name).read_bytes() for name in
                 (".dockerignore", "Dockerfile.dockerignore")
                 if (self.root / name).exists()}  # fmt: skip
        entries = [
            f"{path.lstat().st_mode:o} {path.relative_to(self.root)}" for path in self.paths()
        ]
        return f"{rules} {entries}"


def is_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def bind(path: Path) -> None:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{directory}/s")  # the path of a socket must be short
        Path(directory, "s").rename(path)


def merge_links(files: dict[str, Content], links: dict[str, str]) -> dict[str, Content]:
    """Return all files, where every hard link has the content of its first name."""
    names: dict[str, set[str]] = {}
    for name, target in links.items():
        names.setdefault(target, {target}).add(name)
    merged = dict(files)
    for target, group in names.items():
        kind, mode, content, _ = files[target]
        merged |= dict.fromkeys(group, (kind, mode, content, frozenset(group)))
    return merged


def expected_files(entries: list[Entry]) -> dict[str, Content]:
    files, links = dict[str, Content](), dict[str, str]()
    for entry in entries:
        kind = "bcd-lp"[[stat.S_IFBLK, stat.S_IFCHR, stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK,
                         stat.S_IFIFO].index(stat.S_IFMT(entry.mode))]  # fmt: skip
        if kind == "-" and entry.target:
            links[entry.name] = entry.target
            continue
        content = entry.path.read_bytes() if entry.has_content else entry.target
        files[entry.name] = kind, stat.S_IMODE(entry.mode), content or b"", frozenset()
    return merge_links(files, links)


KINDS = {tarfile.DIRTYPE: "d", tarfile.REGTYPE: "-", tarfile.SYMTYPE: "l", tarfile.FIFOTYPE: "p"}


def copied_files(engine: DockerEngine, image: str) -> dict[str, Content]:
    """Return the files below ``/ctx`` in an image."""
    files, links = dict[str, Content](), dict[str, str]()
    with tempfile.TemporaryFile() as file:
        file.writelines(engine.save(image))
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            manifest = archive.extractfile("manifest.json")
            assert manifest
            for layer_name in json.load(manifest)[0]["Layers"]:
                layer = archive.extractfile(layer_name)
                with tarfile.open(fileobj=layer) as tar:
                    for member in tar:
                        name = member.name.removeprefix("ctx").removeprefix("/")
                        if member.islnk():
                            links[name] = member.linkname.removeprefix("ctx/")
                        elif name:
                            content = tar.extractfile(member) if member.isfile() else None
                            text = content.read() if content else member.linkname or b""
                            files[name] = KINDS[member.type], member.mode, text, frozenset()
    return merge_links(files, links)


class Builds:
    """Builds with one builder; the fixture removes their images."""

    def __init__(self, engine: DockerEngine) -> None:
        self.engine = engine
        self.images: set[str] = set()
        self.error = ""

    def build(self, tree: Tree) -> dict[str, Content] | None:
        """Build, and return the copied files, or None if the build fails.

        The build must not use a cached copy: both builders would if only the mode of a directory
        has changed. BuildKit caches by the path of the context, the classic builder by labels.
        """
        number = secrets.token_hex(8)
        tree.root = tree.root.rename(tree.root.with_name(number))
        arguments = {"NUMBER": number}
        spec = BuildSpec(tree.root, tree.dockerfile, arguments)
        try:
            image = self.engine.build(spec, lambda _: None)
        except (BuilderError, UsageError) as caught:
            self.error = str(caught)
            return None
        self.images.add(image)
        return copied_files(self.engine, image)


@pytest.fixture(params=["buildx", "classic"])
def builds(
    request: pytest.FixtureRequest, engine: DockerEngine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Builds]:
    if request.param == "classic":
        monkeypatch.setattr(engine, "_helpers", Helpers())
    elif local_buildx(os.environ, engine.address) is None:
        pytest.skip("buildx is not on this machine")
    builds = Builds(engine)
    yield builds
    for image in builds.images:
        engine.drop(image)


def compute_key(tree: Tree) -> tuple[dict[str, Content] | None, str]:
    """Return the files in the key and the key, or None if the ignore file is malformed."""
    files_module._digest_of_state.cache_clear()
    try:
        entries = context_entries(tree.root, tree.dockerfile)
    except UsageError:
        return None, ""
    return expected_files(entries), context_digest(entries)


@pytest.mark.soak
def test_key_covers_the_files_that_the_builder_copies(
    builds: Builds, request: pytest.FixtureRequest, soak: Soak, tmp_path: Path
) -> None:
    name = str(request.node.callspec.params["builds"])
    classic = name == "classic"
    random = soak.rng(f"build contexts {name}")
    builds_made = changed = malformed = 0
    for number in range(soak.times(5, 400)):
        tree = Tree(tmp_path / f"{number}", random, classic)
        tree.create()
        edits: list[str] = []
        previous: tuple[dict[str, Content] | None, str] | None = None
        for _ in range(3):
            expected, key = compute_key(tree)
            if classic and expected == {}:
                break  # the classic builder fails if there are no files to copy
            copied = builds.build(tree)
            case = f"--seed={soak.seed}, tree {number}, {edits}: {tree.describe()}"
            assert copied == expected, f"{case}: {builds.error}"
            if previous:
                assert (key != previous[1]) == (copied != previous[0]), case
                changed += key != previous[1]
            builds_made, malformed = builds_made + 1, malformed + (expected is None)
            previous = copied, key
            edits.append(tree.edit())
        shutil.rmtree(tree.root)
    soak.report(
        f"a key covers the files that the builder copies ({name})",
        f"{builds_made} builds of random trees, {changed} that changed, {malformed} malformed",
    )


@pytest.mark.parametrize("builds", ["buildx"], indirect=True)
def test_changed_mode_of_a_directory_is_in_the_next_image(builds: Builds, tmp_path: Path) -> None:
    """BuildKit itself would use its cached copy of the context."""
    (tmp_path / "spool").mkdir()
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /ctx/\n")
    spec = BuildSpec(tmp_path, tmp_path / "Dockerfile")
    for mode in (0o755, 0o1777, 0o700):
        (tmp_path / "spool").chmod(mode)
        image = builds.engine.build(spec, lambda _: None)
        builds.images.add(image)
        assert copied_files(builds.engine, image)["spool"][1] == mode
