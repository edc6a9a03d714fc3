"""The build context as BuildKit sends it: which entries, and what of them reaches an image.

The walk is that of github.com/tonistiigi/fsutil (``filter.go``), which ``docker buildx`` uses.
Owners and times do not count: BuildKit sends all files as root's, and its cache ignores times.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from guix_tasks import files
from guix_tasks.errors import UsageError
from guix_tasks.files import file_digest, list_digest, text_digest
from guix_tasks.oci.dockerignore import Matcher, Matches, PatternError, read_patterns

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from collections.abc import Set as AbstractSet

IGNORE_FILE = ".dockerignore"

OUTSIDE = ".guix-tasks.dockerfile"
"""The name that a Dockerfile from outside of the context has within it."""


@dataclass(frozen=True)
class Entry:
    """A file, directory or link of a build context."""

    name: str
    """Relative to the context."""
    path: Path
    """Without a symbolic link, unless it is one."""
    mode: int
    """Type and permissions, as in ``st_mode``."""
    target: str = ""
    """Where a symbolic link leads, or the first name of a file that has several (hard links)."""
    device: int = 0
    is_emptied: bool = False
    """Whether BuildKit sends the file without its content."""

    @property
    def has_content(self) -> bool:
        return stat.S_ISREG(self.mode) and not self.target and not self.is_emptied


def context_entries(context: Path, dockerfile: Path) -> list[Entry]:
    """The entries that ``COPY . .`` copies.

    Raises ``UsageError`` if the ignore file or a directory cannot be read.
    """
    file = ignore_file(context, dockerfile)
    try:
        matcher = Matcher(read_patterns(file.read_bytes()) if file else ())
        return list(_Walker(context, matcher).entries())
    except PatternError as error:
        raise UsageError(f"{file}:{error.line}: {error.reason}; correct this line") from None
    except OSError as error:
        raise _unreadable(error) from None


def context_digest(entries: Sequence[Entry], without: AbstractSet[Path] = frozenset()) -> str:
    """The digest of a build context.

    Files and directories in ``without``, by their real paths, do not count, nor does a directory
    that holds nothing else.  Raises ``UsageError`` if a file cannot be read.
    """
    try:
        return list_digest(_description, _counted(entries, without))
    except OSError as error:
        raise _unreadable(error) from None


def ignore_file(context: Path, dockerfile: Path) -> Path | None:
    """The ignore file of a build: the Dockerfile's own, or else that of the context.

    BuildKit follows a link only within the directory that it is in, and takes what is no file
    for missing.
    """
    own = dockerfile.with_name(f"{dockerfile.name}{IGNORE_FILE}")
    for file in (own, context / IGNORE_FILE):
        real = Path(os.path.realpath(file))
        if real.is_file() and real.is_relative_to(os.path.realpath(file.parent)):
            return file
    return None


def linked_context(context: Path, dockerfile: Path) -> Path:
    """Return a path to the context that differs if the mode of a directory differs.

    BuildKit keeps what it was sent for the next build from the same path, and does not notice
    there that only the mode of a directory changed: the image would have the old one.  The path
    is a link, which stays for other builds of the same context; if none can be made, it is the
    context's own.
    """
    real = os.path.realpath(context)
    found = (each for each in context_entries(context, dockerfile) if stat.S_ISDIR(each.mode))
    modes = (f"{each.name} {each.mode:o}" for each in found)
    link = files.cache_home() / "contexts" / text_digest(real, *modes)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        # It stays, since another project may be built from the same context meanwhile.
        with suppress(FileExistsError):
            link.symlink_to(real)
    except OSError:
        return context
    return link


def context_archive(context: Path, dockerfile: Path) -> tuple[IO[bytes], str]:
    """The context for an engine that builds without BuildKit, and the Dockerfile's name in it.

    Such an engine reads the Dockerfile and ``.dockerignore`` in the archive, and removes those of
    the two that ``.dockerignore`` matches.  So the archive has an ignored one as well, and a
    ``.dockerignore`` that matches it.  Raises ``UsageError`` if a file cannot be read.
    """
    entries = context_entries(context, dockerfile)
    names = {entry.name for entry in entries}
    name = _name_within(context, dockerfile, names)
    try:
        rules = _rules(context, dockerfile, name, names)
        archive = tempfile.TemporaryFile()  # noqa: SIM115 -- for the caller, who closes it
        # GNU's format has names as the bytes that they are.
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for entry in entries:
                if rules is None or entry.name != IGNORE_FILE:
                    _add(tar, entry)
            if rules is not None:
                _add_content(tar, tarfile.TarInfo(IGNORE_FILE), rules)
            if name not in names:
                _add_content(tar, tarfile.TarInfo(name), dockerfile.read_bytes())
    except OSError as error:
        raise _unreadable(error) from None
    archive.seek(0)
    return archive, name


def _name_within(context: Path, dockerfile: Path, names: Collection[str]) -> str:
    name = os.path.relpath(os.path.realpath(dockerfile), os.path.realpath(context))
    directory = name.rpartition("/")[0]
    # An engine that removes the file would leave a directory that is ignored.
    is_reachable = name in names or not directory or directory in names
    return name if is_reachable else OUTSIDE


def _rules(context: Path, dockerfile: Path, name: str, names: Collection[str]) -> bytes | None:
    """What to send as ``.dockerignore``, or None for the file itself, if there is one."""
    own = context / IGNORE_FILE
    ignored = [each for each in (name, IGNORE_FILE) if each not in names]
    if IGNORE_FILE in names:
        if not ignored or (ignore_file(context, dockerfile) == own and name != OUTSIDE):
            return None
        return own.read_bytes() + f"\n{_quoted(name)}\n".encode()
    if ignored == [IGNORE_FILE] and not own.exists():
        return None
    return "".join(f"{_quoted(each)}\n" for each in ignored).encode()


def _quoted(name: str) -> str:
    """The pattern that matches this name alone."""
    return re.sub(r"[!-,:-@\[-^`{-~]", r"\\\g<0>", name)


def _add(tar: tarfile.TarFile, entry: Entry) -> None:
    info = tarfile.TarInfo(entry.name)
    info.mode = stat.S_IMODE(entry.mode)
    info.linkname = entry.target
    info.devmajor, info.devminor = os.major(entry.device), os.minor(entry.device)
    is_link = stat.S_ISREG(entry.mode) and entry.target
    info.type = tarfile.LNKTYPE if is_link else _TAR_TYPES[stat.S_IFMT(entry.mode)]
    info.mtime = int(entry.path.lstat().st_mtime)
    if entry.has_content:
        with entry.path.open("rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            tar.addfile(info, file)
    else:
        tar.addfile(info)


def _add_content(tar: tarfile.TarFile, info: tarfile.TarInfo, content: bytes) -> None:
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


_TAR_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


def _unreadable(error: OSError) -> UsageError:
    return UsageError(
        f"BUILD_CONTEXT: cannot read {error.filename}: {error.strerror}; "
        f"change its permissions, or name it in {IGNORE_FILE}"
    )


# --- Walking --------------------------------------------------------------------------------


@dataclass
class _Level:
    """A directory that is being walked."""

    rest: Iterator[str]
    directory: Entry | None
    """What is still to be sent of it: None if it has been, or is the context itself."""
    prefix: str
    matches: Matches | None


class _Walker:
    """Walks a context in BuildKit's order, as far as its ignore file lets it."""

    def __init__(self, context: Path, matcher: Matcher) -> None:
        self._context = Path(os.path.realpath(context))
        self._matcher = matcher
        self._first_names: dict[tuple[int, int], str] = {}
        self._levels: list[_Level] = []

    def entries(self) -> Iterator[Entry]:
        self._levels = [_Level(_names(self._context), None, "", None)]
        while self._levels:
            level = self._levels[-1]
            name = next(level.rest, None)
            if name is None:
                self._levels.pop()
            else:
                yield from self._visit(f"{level.prefix}{name}", level.matches)

    def _visit(self, name: str, parent: Matches | None) -> Iterator[Entry]:
        ignored, matches = self._matcher.ignores_below(name, parent)
        path = self._context / name
        with _tolerated(ignored=ignored):
            status = path.lstat()
            is_directory = stat.S_ISDIR(status.st_mode)
            if ignored and (not is_directory or self._matcher.skips(name)):
                return
            entry = self._entry(name, path, status)
            if not ignored:
                yield from self._unsent()
                yield entry
            if is_directory:
                unsent = entry if ignored else None
                self._levels.append(_Level(_names(path), unsent, f"{name}/", matches))

    def _unsent(self) -> Iterator[Entry]:
        """Directories that are ignored themselves, above an entry that is not."""
        for level in self._levels:
            if level.directory:
                yield level.directory
                level.directory = None

    def _entry(self, name: str, path: Path, status: os.stat_result) -> Entry:
        mode = status.st_mode
        if stat.S_ISLNK(mode):
            return Entry(name, path, stat.S_IFLNK | 0o777, target=_target(path))
        if stat.S_ISSOCK(mode):
            # It arrives as a file, since archives know no sockets, and cannot be read.
            return Entry(name, path, stat.S_IFREG | stat.S_IMODE(mode), is_emptied=True)
        if not stat.S_ISREG(mode):
            return Entry(name, path, mode, device=0 if stat.S_ISDIR(mode) else status.st_rdev)
        first = self._first_names.setdefault((status.st_dev, status.st_ino), name)
        if first != name:
            return Entry(name, path, mode, first)
        # BuildKit asks twice, when it lists a file and when it reads it, and not in the same way:
        # there is a difference if a pattern comes behind an exception.
        emptied = bool(self._matcher.exceptions) and self._matcher.ignores(name)
        return Entry(name, path, mode, is_emptied=emptied)


def _names(directory: Path) -> Iterator[str]:
    with os.scandir(directory) as found:
        return iter(sorted((each.name for each in found), key=os.fsencode))


def _target(link: Path) -> str:
    return os.readlink(link)  # noqa: PTH115 -- a Path would be another text for a/./b


@contextmanager
def _tolerated(*, ignored: bool) -> Iterator[None]:
    """Pass over what is gone meanwhile and, if it is ignored, over what cannot be read."""
    try:
        yield
    except FileNotFoundError:
        return
    except PermissionError:
        if not ignored:
            raise


# --- Digests --------------------------------------------------------------------------------


def _description(entry: Entry) -> str:
    content = file_digest(entry.path) if entry.has_content else ""
    # No name has a zero in it.
    return f"{entry.name}\0{entry.mode:o}\0{entry.target}\0{entry.device}\0{content}"


def _counted(entries: Sequence[Entry], without: AbstractSet[Path]) -> list[Entry]:
    above = {parent for path in without for parent in path.parents}
    counted: list[Entry] = []
    holds: set[str] = set()
    for entry in reversed(entries):  # what a directory holds comes first then
        if entry.path in without or not without.isdisjoint(entry.path.parents):
            continue
        if entry.path not in above or entry.name in holds:
            holds.add(entry.name.rpartition("/")[0])
            counted.append(entry)
    return counted[::-1]
