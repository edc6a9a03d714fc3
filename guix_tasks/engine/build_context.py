"""The build context: its entries as BuildKit sends them, its digest, and its archive.

The walk follows github.com/tonistiigi/fsutil (``filter.go``), which ``docker buildx`` uses. The
digest ignores owners and times: BuildKit sends all files as root's, and its cache ignores times.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from guix_tasks.errors import UsageError
from guix_tasks.files import cache_home, file_digest, list_digest, text_digest
from guix_tasks.oci.dockerignore import Matcher, Matches, PatternError, read_patterns
from guix_tasks.oci.tar import add_file, new_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from collections.abc import Set as AbstractSet

IGNORE_FILE = ".dockerignore"

OUTSIDE = ".guix-tasks.dockerfile"
"""Name in the archive of a Dockerfile from outside the context."""


@dataclass(frozen=True)
class Entry:
    """A file, directory or link of a build context."""

    name: str
    """Relative to the context."""
    path: Path
    """Real path of the parent directory, joined with the entry's base name."""
    mode: int
    """Type and permissions, like ``st_mode``."""
    target: str = ""
    """Target of a symbolic link, or the first name of a file with several hard links."""
    device: int = 0
    is_emptied: bool = False
    """True if BuildKit sends the file without its content."""

    @property
    def has_content(self) -> bool:
        return stat.S_ISREG(self.mode) and not self.target and not self.is_emptied


def context_entries(context: Path, dockerfile: Path) -> list[Entry]:
    """Return the entries that ``COPY . .`` copies.

    Raise ``UsageError`` if the ignore file or a directory cannot be read.
    """
    file = ignore_file(context, dockerfile)
    try:
        matcher = Matcher(read_patterns(file.read_bytes()) if file else ())
        return _walk(context, matcher)
    except PatternError as error:
        raise UsageError(f"{file}:{error.line}: {error.reason}; correct this line") from None
    except OSError as error:
        raise _unreadable(error) from None


def context_digest(entries: Sequence[Entry], without: AbstractSet[Path] = frozenset()) -> str:
    """Return the digest of a build context.

    Files and directories in ``without`` are excluded, and so are directories that contain nothing
    else. ``without`` has real paths.

    Raise ``UsageError`` if a file cannot be read.
    """
    above = {parent for path in without for parent in path.parents}
    counted = [
        entry
        for entry in entries
        if entry.path not in without and without.isdisjoint(entry.path.parents)
    ]
    try:
        return list_digest(_description, _without_empty(counted, lambda entry: entry.path in above))
    except OSError as error:
        raise _unreadable(error) from None


def _description(entry: Entry) -> str:
    content = file_digest(entry.path) if entry.has_content else ""
    # No name contains a zero byte.
    return f"{entry.name}\0{entry.mode:o}\0{entry.target}\0{entry.device}\0{content}"


def ignore_file(context: Path, dockerfile: Path) -> Path | None:
    """Return the ignore file of a build: ``DOCKERFILE.dockerignore``, else ``.dockerignore``.

    Like BuildKit, skip whatever is not a file, and links that leave the directory.
    """
    specific = dockerfile.with_name(f"{dockerfile.name}{IGNORE_FILE}")
    for file in (specific, context / IGNORE_FILE):
        real = Path(os.path.realpath(file))
        if real.is_file() and real.is_relative_to(os.path.realpath(file.parent)):
            return file
    return None


def linked_context(context: Path, dockerfile: Path) -> Path:
    """Return a link to the context whose path depends on the modes of all directories.

    BuildKit keeps the content of a context path for the next build and does not notice if only
    the mode of a directory changes: the image would have the old mode. Return ``context`` itself
    if no link can be created.
    """
    real = os.path.realpath(context)
    entries = context_entries(context, dockerfile)
    modes = (f"{entry.name} {entry.mode:o}" for entry in entries if stat.S_ISDIR(entry.mode))
    link = cache_home() / "contexts" / text_digest(real, *modes)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        # The link stays, because another project may use the same context at the same time.
        with suppress(FileExistsError):
            link.symlink_to(real)
    except OSError:
        return context
    return link


def context_archive(context: Path, dockerfile: Path) -> tuple[IO[bytes], str]:
    """Return the context's archive for a build without BuildKit, and the Dockerfile's name in it.

    The engine reads the Dockerfile and ``.dockerignore`` from the archive and then removes each
    of the two that ``.dockerignore`` matches. The archive therefore contains both even if they
    are ignored, and its ``.dockerignore`` matches them.

    Raise ``UsageError`` if a file cannot be read.
    """
    entries = context_entries(context, dockerfile)
    names = {entry.name for entry in entries}
    name = os.path.relpath(os.path.realpath(dockerfile), os.path.realpath(context))
    directory = name.rpartition("/")[0]
    # The engine removes an ignored Dockerfile, but not its ignored directory.
    if directory and not {name, directory} & names:
        name = OUTSIDE
    try:
        ignore = _archive_ignore_file(context, dockerfile, name, names)
        archive = tempfile.TemporaryFile()  # noqa: SIM115 -- the caller closes it
        # GNU's format stores names as bytes, without a re-encoding.
        with new_archive(archive, tarfile.GNU_FORMAT) as tar:
            for entry in entries:
                if ignore is None or entry.name != IGNORE_FILE:
                    _add(tar, entry)
            if ignore is not None:
                add_file(tar, IGNORE_FILE, ignore)
            if name not in names:
                add_file(tar, name, dockerfile.read_bytes())
    except OSError as error:
        if error.filename is None:  # not a file of the context
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None
        raise _unreadable(error) from None
    archive.seek(0)
    return archive, name


def _archive_ignore_file(
    context: Path, dockerfile: Path, name: str, names: Collection[str]
) -> bytes | None:
    """Return the archive's ``.dockerignore``, or None for the context's file, if any."""
    file = context / IGNORE_FILE
    ignored = [path for path in (name, IGNORE_FILE) if path not in names]
    if IGNORE_FILE in names:
        if not ignored or (ignore_file(context, dockerfile) == file and name != OUTSIDE):
            return None
        return file.read_bytes() + f"\n{_escaped(name)}\n".encode()
    if ignored == [IGNORE_FILE] and not file.exists():
        return None
    return "".join(f"{_escaped(path)}\n" for path in ignored).encode()


def _escaped(name: str) -> str:
    """Return the pattern that matches only this name."""
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
        f"change its permissions, or list it in {IGNORE_FILE}"
    )


# --- Walking --------------------------------------------------------------------------------


def _walk(context: Path, matcher: Matcher) -> list[Entry]:
    """Return the entries that are not ignored and their directories, in BuildKit's order."""
    root = Path(os.path.realpath(context))
    entries: list[Entry] = []
    ignored_directories: set[str] = set()
    first_names: dict[tuple[int, int], str] = {}
    stack: list[tuple[str, Matches | None]] = [(name, None) for name in _names(root)]
    while stack:
        name, parent = stack.pop()
        ignored, matches = matcher.ignores_below(name, parent)
        path = root / name
        try:
            status = path.lstat()
            is_directory = stat.S_ISDIR(status.st_mode)
            if ignored and (not is_directory or matcher.skips(name)):
                continue
            first_name = first_names.setdefault((status.st_dev, status.st_ino), name)
            entries.append(_entry(matcher, name, path, status, first_name))
            if ignored:
                ignored_directories.add(name)
            if is_directory:
                stack += [(f"{name}/{child}", matches) for child in _names(path)]
        except FileNotFoundError:  # deleted during the walk
            continue
        except PermissionError:
            if not ignored:
                raise
    return _without_empty(entries, lambda entry: entry.name in ignored_directories)


def _entry(
    matcher: Matcher, name: str, path: Path, status: os.stat_result, first_name: str
) -> Entry:
    """Return an entry; ``first_name`` is the first name of a file with several hard links."""
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        target = os.readlink(path)  # noqa: PTH115 -- a Path would normalize a/./b
        return Entry(name, path, stat.S_IFLNK | 0o777, target=target)
    if stat.S_ISSOCK(mode):
        # BuildKit's archive cannot have a socket, so it has an empty file.
        return Entry(name, path, stat.S_IFREG | stat.S_IMODE(mode), is_emptied=True)
    if not stat.S_ISREG(mode):
        return Entry(name, path, mode, device=0 if stat.S_ISDIR(mode) else status.st_rdev)
    if first_name != name:
        return Entry(name, path, mode, first_name)
    # BuildKit matches a file twice, when it lists it and when it reads it, with different
    # results if a pattern follows an exception.
    emptied = bool(matcher.exceptions) and matcher.ignores(name)
    return Entry(name, path, mode, is_emptied=emptied)


def _names(directory: Path) -> list[str]:
    """Return the names in a directory, last first."""
    with os.scandir(directory) as entries:
        return sorted((entry.name for entry in entries), key=os.fsencode, reverse=True)


def _without_empty(entries: Sequence[Entry], is_optional: Callable[[Entry], bool]) -> list[Entry]:
    """Return the entries without the optional directories that contain no other entry."""
    kept: list[Entry] = []
    not_empty: set[str] = set()
    for entry in reversed(entries):  # the content of a directory precedes it in this order
        if not is_optional(entry) or entry.name in not_empty:
            not_empty.add(entry.name.rpartition("/")[0])
            kept.append(entry)
    return kept[::-1]
