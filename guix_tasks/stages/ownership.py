"""Containers in which nothing runs as root, and the folders that are lent to their user.

Guix's daemon needs no privilege where it owns the store and its state ("Build Environment Setup"
in Guix's manual).  Those of an image are root's, and what gives them to another user has to be
root.  So nothing in the container does: the engine itself sets the owner, by the headers of an
archive that is copied in.  The store items stay root's, or a layer would hold all of them again.
"""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from typing import TYPE_CHECKING

from guix_tasks.oci.tar import as_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from guix_tasks.engine.api import Engine

USER = "guix-daemon"
"""As Guix's own installer calls the account of an unprivileged daemon."""

_FOLDERS = ("/gnu", "/gnu/store", "/gnu/store/.links", "/root", "/root/.config")
"""Lent without what is in them, and made where they are missing."""

_TREES = ("/var/guix", "/var/log/guix", "/etc/guix", "/root/.config/guix")
"""Lent with all that is in them: Guix's state, of which the database is the largest part."""

_LEFT = "var/guix/db/reserved"
"""8 MB that the daemon only ever removes, for room where the disk is full."""

_ACCOUNTS, _GROUPS = "/etc/passwd", "/etc/group"

_ID = 60706
"""The first of those that nobody gives out (systemd.io/UIDS-GIDS), for the account where the image
has none: the same in each image, since the files of a cache outlive them."""


def lend(
    engine: Engine, container: str, more: Iterable[str] = (), unread: Iterable[str] = ()
) -> int:
    """Give what the daemon needs, and ``more`` folders, to ``USER``; the user's ID.

    The account is made where the image has none.  Folders that are to stay ``unread`` become that
    user's alone.
    """
    accounts, groups = (_text(engine, container, each) for each in (_ACCOUNTS, _GROUPS))
    user, account = _user_in(accounts), []
    if user is None:
        user = _free_id(accounts, groups)
        line = f"{USER}:x:{user}:{user}:Guix daemon:/var/empty:/usr/sbin/nologin\n"
        account = [
            _file(_ACCOUNTS, accounts + line),
            _file(_GROUPS, f"{groups}{USER}:x:{user}:\n"),
        ]
    lent = _handed_over(engine, container, 0, user, (*_FOLDERS, *more))
    own = ((_missing(folder, user, 0o700), None) for folder in unread)
    _copy_in(engine, container, (*account, *lent, *own))
    return user


def take_back(engine: Engine, container: str) -> bool:
    """Let root own again what was lent, as in any image; whether something was."""
    state = next(_members(engine, container, _TREES[0]), None)
    if state is None or state[0].uid == 0:
        return False
    _copy_in(engine, container, _handed_over(engine, container, state[0].uid, 0, _FOLDERS))
    return True


_Member = tuple[tarfile.TarInfo, "bytes | None"]


def _handed_over(
    engine: Engine, container: str, old: int, new: int, folders: Iterable[str]
) -> Iterator[_Member]:
    """What is one user's in these folders and in the trees, as another's."""
    for folder in (*folders, *_TREES):
        members = _members(engine, container, folder)
        first = next(members, (_missing(folder, old), None))
        for header, content in (first, *(members if folder in _TREES else ())):
            if header.uid == old and header.name != _LEFT:
                header.uid = header.gid = new
                yield header, content


def _copy_in(engine: Engine, container: str, members: Iterable[_Member]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for header, content in members:
            header.uname = header.gname = ""  # names of the engine's machine
            tar.addfile(header, None if content is None else io.BytesIO(content))
    engine.copy_in(container, buffer.getvalue())


def _members(engine: Engine, container: str, path: str) -> Iterator[_Member]:
    """What is at a path in a container, with its full name; nothing where nothing is there."""
    parent = path.rpartition("/")[0].lstrip("/")
    pieces = engine.copy_out(container, path)
    first = next(pieces, None)
    if first is None:
        return
    with tarfile.open(fileobj=as_file(itertools.chain([first], pieces)), mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            member.name = f"{parent}/{member.name}".lstrip("/")
            if member.islnk():
                member.linkname = f"{parent}/{member.linkname}".lstrip("/")
            yield member, file.read() if file else None


def _text(engine: Engine, container: str, path: str) -> str:
    _, content = next(_members(engine, container, path), (None, b""))
    return (content or b"").decode(errors="surrogateescape")


def _user_in(accounts: str) -> int | None:
    fields = (line.split(":") for line in accounts.splitlines())
    found = (each[2] for each in fields if each[0] == USER and len(each) > 2)  # noqa: PLR2004
    # The file is whatever the image has; a user's ID has 32 bits.
    return next((int(each) for each in found if re.fullmatch("[0-9]{1,10}", each)), None)


def _free_id(accounts: str, groups: str) -> int:
    lines = [*accounts.splitlines(), *groups.splitlines()]
    taken = {line.split(":")[2] for line in lines if line.count(":") > 1}
    return next(each for each in itertools.count(_ID) if str(each) not in taken)


def _missing(folder: str, owner: int, mode: int = 0o755) -> tarfile.TarInfo:
    header = tarfile.TarInfo(folder.lstrip("/"))
    header.type, header.mode, header.uid = tarfile.DIRTYPE, mode, owner
    return header


def _file(path: str, text: str) -> _Member:
    content = text.encode(errors="surrogateescape")
    header = tarfile.TarInfo(path.lstrip("/"))
    header.size, header.mode = len(content), 0o644
    return header, content
