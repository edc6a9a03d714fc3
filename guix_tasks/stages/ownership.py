"""Owners of Guix's directories in containers in which nothing runs as root.

Guix's daemon needs no privilege if it owns the store and its state ("Build Environment Setup" in
Guix's manual). In an image root owns them, and only root can change that. Nothing in the container
runs as root, so the engine sets the owner, by the headers of an archive that is copied in. Store
items keep their owner, because a layer would otherwise contain all of them again.
"""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from typing import TYPE_CHECKING

from guix_tasks.oci.tar import as_file, new_archive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from guix_tasks.engine.api import Engine

USER = "guix-daemon"
"""Account of an unprivileged daemon, with the name that Guix's installer uses."""

_DIRECTORIES = ("/gnu", "/gnu/store", "/gnu/store/.links", "/root", "/root/.config")
"""Directories that change owner without their content; missing ones are created."""

_TREES = ("/var/guix", "/var/log/guix", "/etc/guix", "/root/.config/guix")
"""Directories that change owner with their content: Guix's state, mostly its database."""

_RESERVED = "var/guix/db/reserved"
"""8 MB that the daemon only ever removes, to free space on a full disk: it keeps its owner."""

_ACCOUNTS, _GROUPS = "/etc/passwd", "/etc/group"

_FIRST_ID = 60706
"""ID of the account if the image has none, the first that no system assigns (systemd.io/UIDS-GIDS).

It is the same in every image, because cache volumes are shared.
"""


def grant_ownership(
    engine: Engine, container: str, more: Iterable[str] = (), unread: Iterable[str] = ()
) -> int:
    """Give Guix's directories and ``more`` directories to ``USER`` and return the user ID.

    The account is created if the image has none. ``unread`` are directories to create that only
    that user can read.
    """
    accounts = _read_text(engine, container, _ACCOUNTS)
    groups = _read_text(engine, container, _GROUPS)
    user, account = _user_id(accounts), []
    if user is None:
        user = _free_id(accounts, groups)
        line = f"{USER}:x:{user}:{user}:Guix daemon:/var/empty:/usr/sbin/nologin\n"
        account = [
            _file(_ACCOUNTS, accounts + line),
            _file(_GROUPS, f"{groups}{USER}:x:{user}:\n"),
        ]
    changed = _change_owner(engine, container, 0, user, (*_DIRECTORIES, *more))
    private = ((_directory(path, user, 0o700), None) for path in unread)
    _copy_in(engine, container, (*account, *changed, *private))
    return user


def restore_ownership(engine: Engine, container: str) -> bool:
    """Give Guix's directories back to root; return whether another user owned them."""
    state = next(_members(engine, container, _TREES[0]), None)
    if state is None or state[0].uid == 0:
        return False
    _copy_in(engine, container, _change_owner(engine, container, state[0].uid, 0, _DIRECTORIES))
    return True


def daemon_user(engine: Engine, container: str) -> int:
    """Return the ID of ``USER`` in a container, also if the account does not exist yet."""
    accounts = _read_text(engine, container, _ACCOUNTS)
    user = _user_id(accounts)
    return _free_id(accounts, _read_text(engine, container, _GROUPS)) if user is None else user


_Member = tuple[tarfile.TarInfo, "bytes | None"]


def _change_owner(
    engine: Engine, container: str, old: int, new: int, directories: Iterable[str]
) -> Iterator[_Member]:
    """Yield the files of user ``old`` in directories and trees, as files of user ``new``."""
    for path in (*directories, *_TREES):
        members = _members(engine, container, path)
        first = next(members, (_directory(path, old), None))
        for header, content in (first, *(members if path in _TREES else ())):
            if header.uid == old and header.name != _RESERVED:
                header.uid = header.gid = new
                yield header, content


def _copy_in(engine: Engine, container: str, members: Iterable[_Member]) -> None:
    buffer = io.BytesIO()
    with new_archive(buffer) as tar:
        for header, content in members:
            header.uname = header.gname = ""  # the names are of the engine's machine
            tar.addfile(header, None if content is None else io.BytesIO(content))
    engine.copy_in(container, buffer.getvalue())


def _members(engine: Engine, container: str, path: str) -> Iterator[_Member]:
    """Yield the files at a path of a container, with full names; none if the path is missing."""
    first_id = engine.info().first_id
    parent = path.rpartition("/")[0].lstrip("/")
    chunks = engine.copy_out(container, path)
    first = next(chunks, None)
    if first is None:
        return
    with tarfile.open(fileobj=as_file(itertools.chain([first], chunks)), mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            member.name = f"{parent}/{member.name}".lstrip("/")
            if member.uid >= first_id:
                member.uid -= first_id
            if member.islnk():
                member.linkname = f"{parent}/{member.linkname}".lstrip("/")
            yield member, file.read() if file else None


def _read_text(engine: Engine, container: str, path: str) -> str:
    _, content = next(_members(engine, container, path), (None, b""))
    return (content or b"").decode(errors="surrogateescape")


def _user_id(accounts: str) -> int | None:
    """Return the ID of ``USER``; the file is that of any image, so an ID can be malformed."""
    lines = (line.split(":") for line in accounts.splitlines())
    ids = (fields[2] for fields in lines if fields[0] == USER and len(fields) > 2)  # noqa: PLR2004
    return next((int(user) for user in ids if re.fullmatch("[0-9]{1,10}", user)), None)


def _free_id(accounts: str, groups: str) -> int:
    lines = [*accounts.splitlines(), *groups.splitlines()]
    taken = {line.split(":")[2] for line in lines if line.count(":") > 1}
    return next(user for user in itertools.count(_FIRST_ID) if str(user) not in taken)


def _directory(path: str, owner: int, mode: int = 0o755) -> tarfile.TarInfo:
    header = tarfile.TarInfo(path.lstrip("/"))
    header.type, header.mode, header.uid = tarfile.DIRTYPE, mode, owner
    return header


def _file(path: str, text: str) -> _Member:
    content = text.encode(errors="surrogateescape")
    header = tarfile.TarInfo(path.lstrip("/"))
    header.size, header.mode = len(content), 0o644
    return header, content
