"""Files of a runtime image that are no store items: users, links and a few directories."""

from __future__ import annotations

import difflib
import tarfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeAlias

from guix_tasks.errors import UsageError
from guix_tasks.guix.nar import STORE_TIME
from guix_tasks.runtime.contents import LINK

if TYPE_CHECKING:
    from guix_tasks.runtime.contents import Contents
    from guix_tasks.settings import Settings

Members: TypeAlias = "dict[str, tuple[tarfile.TarInfo, bytes]]"
"""Members of an archive with their contents, by absolute path."""


def image_files(settings: Settings, contents: Contents) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Return the members of the last layer that are no store items, parents first.

    Raise ``UsageError`` if the entry point is no program of the profile, or if two paths of the
    settings exclude each other.
    """
    name, uid = settings.runtime_user
    _check_program(settings, contents)
    home = "/root" if uid == 0 else "/"
    users = {"root": (0, "/root"), "nobody": (65534, "/"), name: (uid, home)}
    passwd = "".join(
        f"{user}:x:{number}:{number}:{user}:{directory}:/bin/sh\n"
        for user, (number, directory) in users.items()
    )
    group = "".join(f"{user}:x:{number}:\n" for user, (number, _) in users.items())
    links = {LINK: contents.profile}
    if contents.has_certificates:
        links["/etc/ssl/certs"] = f"{LINK}/etc/ssl/certs"
    links |= {path: f"{LINK}/{target}" for path, target in settings.runtime_links.items()}
    files = {
        "/etc/passwd": passwd,
        "/etc/group": group,
        # Without it, glibc asks name servers for localhost.
        "/etc/nsswitch.conf": "hosts: files dns\n",
    }
    directories = {"/tmp": 0o1777, "/var/tmp": 0o1777, "/root": 0o700}  # noqa: S108
    members: Members = {}
    for path, mode in directories.items():
        _add(members, path, tarfile.DIRTYPE, mode)
    if settings.runtime_directory not in ("/", *members):
        _add(members, settings.runtime_directory, tarfile.DIRTYPE, 0o755, owner=uid)
    for path, text in files.items():
        _add(members, path, tarfile.REGTYPE, 0o644, data=text.encode())
    for path, target in links.items():
        _check_link(settings, members, path)
        _add(members, path, tarfile.SYMTYPE, 0o777, target=target)
    return list(members.values())


def _add(
    members: Members,
    path: str,
    kind: bytes,
    mode: int,
    *,
    owner: int = 0,
    data: bytes = b"",
    target: str = "",
) -> None:
    """Add a file with the directories above it."""
    for parent in reversed(PurePosixPath(path).parents[:-1]):
        if str(parent) not in members:
            _add(members, str(parent), tarfile.DIRTYPE, 0o755)
    member = tarfile.TarInfo(path.lstrip("/"))
    member.type, member.mode, member.mtime = kind, mode, STORE_TIME
    member.uid = member.gid = owner
    member.size, member.linkname = len(data), target
    members[path] = member, data


def _check_link(settings: Settings, members: Members, path: str) -> None:
    """Raise ``UsageError`` if a link would replace or hide another path."""
    for other, (member, _) in members.items():
        is_above = path.startswith(f"{other}/") and not member.isdir()
        if other == path or other.startswith(f"{path}/") or is_above:
            raise UsageError(
                f"{settings.origin('RUNTIME_LINKS')}: {path} and {other} exclude each other; "
                "remove one of them"
            )


def _check_program(settings: Settings, contents: Contents) -> None:
    for name in ("runtime_entrypoint", "runtime_command"):
        words = getattr(settings, name)
        if not words:
            continue
        if "/" not in words[0] and words[0] not in contents.programs:
            similar = difflib.get_close_matches(words[0], contents.programs)
            raise UsageError(
                f"{settings.origin(name.upper())}: the packages have no program {words[0]}; "
                f"set one of theirs, for example {(similar or contents.programs or ['none'])[0]}"
            )
        return  # A command after an entry point is only its arguments.


def describe(member: tuple[tarfile.TarInfo, bytes]) -> str:
    """Describe a file of the image completely, for the key of its layer."""
    info, data = member
    return f"{info.name} {info.type!r} {info.mode:o} {info.uid} {info.linkname} {data!r}"
