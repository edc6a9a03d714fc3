"""Stage pull: Guix itself, from the channels asked for."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.errors import StageError, UsageError
from guix_tasks.files import read_text, text_digest, write_whole
from guix_tasks.oci.reference import quoted
from guix_tasks.stages.container import FOLDER
from guix_tasks.stages.images import CHANNELS_LABEL
from guix_tasks.stages.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings


CHANNELS_INPUT = "GUIX_CHANNELS"

AUTHENTICATION_LABEL = "org.guix-tasks.authentication"
"""``disabled`` where the channels were pulled with ``--disable-authentication``."""


def pull_stage(
    channels: str | None, wanted: str | None = None, *, authenticate: bool = True
) -> Stage:
    """``guix pull`` of this channels file; of what the image itself knows where there is none.

    The stage is settled by what was pulled: pulled again by the commits that it got, it would
    come out the same, so that is what its key is made of.  ``wanted`` is what ``GUIX_CHANNELS``
    holds: where it computes channels, none can tell what of it matters, so all of it does.

    Without ``authenticate`` the command is another, and so is the key.  The commits that come out
    are the same, but nobody vouches for them: neither ``CACHE_IMAGE`` nor a later ``inv pull``
    may take such an image for one whose channels were authenticated.
    """
    computed = wanted is not None and not guix.is_literal(wanted)
    file = f"{FOLDER}/channels.scm" if channels else None
    commands = [guix.pull_argv(file, authenticate=authenticate)]
    trust = {AUTHENTICATION_LABEL: "" if authenticate else "disabled"}
    if channels:
        # The image says what was pulled, whether by a lock or not, and its own `guix pull` stays
        # there.
        commands.append(("sh", "-c", guix.record_channels()))
    return Stage(
        name="pull",
        commands=commands,
        report=("cat", guix.CHANNELS_FILE) if channels else guix.describe_argv(),
        labels=lambda report: {CHANNELS_LABEL: report, **trust},
        files={"channels.scm": channels.encode()} if channels else {},
        keep=guix.CURRENT_GUIX,
        given={CHANNELS_INPUT: text_digest(wanted or "")} if computed else {},
        settled=partial(pull_stage, wanted=wanted, authenticate=authenticate),
        check=_refuse_unauthenticated if authenticate else None,
        fetches=channels or "",
    )


def is_authenticated(image: Image | None) -> bool:
    """Whether no pull with ``--disable-authentication`` is in an image of the pull stage."""
    return image is None or not image.labels.get(AUTHENTICATION_LABEL)


def _refuse_unauthenticated(channels: str) -> None:
    """Refuse what was pulled of channels that Guix could not authenticate.

    Only here is it seen of channels that a file computes, and of those that channels depend on:
    Guix itself takes them without a word.
    """
    if names := guix.unauthenticated(channels):
        raise StageError(
            f"pull: the channel {quoted(names[0])} has no introduction, so nothing authenticated "
            f"what was pulled; {_mends()}"
        )


def _mends() -> str:
    return (
        "write the `(introduction ...)` that its authors publish into its form in GUIX_CHANNELS, "
        "or say `--disable-authentication` to trust whoever serves it"
    )


def stage_to_run(settings: Settings, *, update: bool = False, authenticate: bool = True) -> Stage:
    """The stage that pulls what the lock says, else (or to ``update``) what is asked for.

    Raises ``UsageError`` where the lock is not one of ``GUIX_CHANNELS``, and where Guix could not
    ``authenticate`` a channel that is spelled out.
    """
    wanted = wanted_text(settings)
    lock = None if update else lock_text(settings)
    if lock and (problem := misfit(wanted, lock)):
        raise UsageError(lock_misfits(settings, problem))
    unknown = guix.unauthenticated(lock or wanted or "") if authenticate else []
    if unknown:
        # A lock has what its channels had when it was made.
        path, again = settings.guix_channels, ""
        if lock:
            path, again = settings.guix_channels_lock, " (and `inv pull --update`)"
        raise UsageError(
            f"{path}: the channel {quoted(unknown[0])} has no introduction, so nothing "
            f"authenticates it; {_mends()}{again}"
        )
    return pull_stage(lock or wanted, wanted, authenticate=authenticate)


def lock_misfits(settings: Settings, problem: str) -> str:
    return (
        f"{settings.guix_channels_lock} does not fit GUIX_CHANNELS: {problem}; "
        "`inv pull --update` locks anew"
    )


def uncompared_lock(settings: Settings) -> str | None:
    """A line for a lock that cannot be compared, since ``GUIX_CHANNELS`` computes its channels."""
    wanted = wanted_text(settings)
    if not wanted or guix.is_literal(wanted) or not lock_text(settings):
        return None
    return (
        f"pull: {settings.guix_channels_lock} holds, and cannot be compared with GUIX_CHANNELS, "
        "which computes its channels; `inv pull --update` locks anew"
    )


def write_lock(settings: Settings, channels: str) -> bool:
    """Write what was pulled to ``GUIX_CHANNELS_LOCK``; whether that was not there yet.

    Raises ``UsageError`` where it cannot be written.
    """
    path = settings.guix_channels_lock
    if path is None or not channels:
        return False
    content = f"{channels}\n".encode()
    try:
        if path.exists() and path.read_bytes() == content:
            return False
        write_whole(path, content)
    except OSError as error:
        raise UsageError(
            f"GUIX_CHANNELS_LOCK: {path}: {error.strerror}; name a file that can be written"
        ) from None
    return True


def lock_text(settings: Settings) -> str | None:
    """What ``GUIX_CHANNELS_LOCK`` holds; None where it is empty or the file is yet to be made.

    Raises ``UsageError`` where it cannot be read.
    """
    path = settings.guix_channels_lock
    return _text("GUIX_CHANNELS_LOCK", path).strip() if path and path.exists() else None


def wanted_text(settings: Settings) -> str | None:
    """What ``GUIX_CHANNELS`` holds.

    Raises ``UsageError`` if it cannot be read, or if Guile could not read it.
    """
    path = settings.guix_channels
    text = _text("GUIX_CHANNELS", path) if path else None
    if text and (error := guix.syntax_error(text)):
        raise UsageError(f"{path}:{error[0]}: {error[1]}; correct this line")
    return None if text is None else text.strip()


def _text(name: str, path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError:
        raise UsageError(f"{name}: {path} is not UTF-8; write a channels file") from None
    except OSError as error:
        raise UsageError(f"{name}: {path}: {error.strerror}; name a channels file") from None


def misfit(wanted: str | None, lock: str) -> str | None:
    """Why a lock is not one of these channels, or None.

    A channels file is a program, so only what it spells out can be compared: a channel it names
    must be in the lock, from the same URL and branch, trusted by the same introduction, and at
    the commit that it asks for, if any.
    """
    return next(_misfits(wanted or "", lock), None)


def _misfits(wanted: str, lock: str) -> Iterator[str]:
    if error := guix.syntax_error(lock):
        yield f"in line {error[0]}, {error[1]}"
    asked, locked = guix.channels(wanted), guix.channels(lock)
    if not locked:
        yield "it names no channel"
    for name, channel in asked.items():
        if name not in locked:
            yield f"it lacks the channel {name}"
        else:
            yield from _differences(channel, locked[name])
    surplus = locked.keys() - asked.keys()
    if surplus and guix.is_literal(wanted):
        yield f"it has the channel {min(surplus)}"


def _differences(asked: guix.Channel, locked: guix.Channel) -> Iterator[str]:
    name = asked.name
    if asked.url != locked.url:
        yield f"{name} is from {locked.url}, not from {asked.url}"
    if asked.commit not in (None, locked.commit):
        yield f"{name} is at {locked.commit}, not at {asked.commit}"
    computed = asked.computed | locked.computed
    wanted, there = (each.branch or guix.DEFAULT_BRANCH for each in (asked, locked))
    if wanted != there and "branch" not in computed:
        yield f"{name} is of the branch {there}, not of {wanted}"
    if asked.introduction != locked.introduction and "introduction" not in computed:
        yield f"{name} {_trust(locked)}, and in GUIX_CHANNELS {_trust(asked)}"


def _trust(channel: guix.Channel) -> str:
    found = channel.introduction
    if found is None:
        return "has no introduction"
    return f"is introduced by commit {found.commit} of key {found.fingerprint.upper()}"
