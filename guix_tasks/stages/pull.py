"""Stage pull: update Guix from the channels of ``GUIX_CHANNELS`` or of the lock."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.errors import StageError, UsageError
from guix_tasks.files import check_writable, read_text, text_digest, write_whole
from guix_tasks.oci.reference import quoted
from guix_tasks.stages.container import WORK_DIRECTORY, resource_files
from guix_tasks.stages.images import CHANNELS_LABEL
from guix_tasks.stages.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings


CHANNELS_INPUT = "GUIX_CHANNELS"

BUILT_CHANNELS = "built-channels.scm"
"""Channels file with Guix at the newest commit that a substitute server has built."""

AUTHENTICATION_LABEL = "org.guix-tasks.authentication"
"""``disabled`` if the channels were pulled with ``--disable-authentication``, else empty."""

_INTRODUCTION_HINT = (
    "add the `(introduction ...)` that its authors publish to its form in GUIX_CHANNELS, or pass "
    "`--disable-authentication` to trust the server"
)


def pull_stage(
    channels: str | None, wanted: str | None = None, *, authenticate: bool = True
) -> Stage:
    """Return the stage that pulls a channels file, or the image's own channels without one.

    The key is that of a pull of the commits that were fetched, because the same commits give the
    same result.  ``wanted`` is the content of ``GUIX_CHANNELS``.  If that is a program that
    computes its channels, all of it is an input, because nothing shows which parts matter.

    Without ``authenticate`` the command and so the key differ.  Neither ``CACHE_IMAGE`` nor a
    later ``inv pull`` may use such an image as one whose channels were authenticated.
    """
    computed = wanted is not None and not guix.is_literal(wanted)
    file = f"{WORK_DIRECTORY}/channels.scm" if channels else None
    commands = [guix.pull_argv(file, authenticate=authenticate)]
    trust = {AUTHENTICATION_LABEL: "" if authenticate else "disabled"}
    if channels:
        # The commits are recorded in the image, so that a `guix pull` inside it stays at them.
        commands.append(("sh", "-c", guix.record_channels()))
    return Stage(
        name="pull",
        commands=commands,
        report=("cat", guix.CHANNELS_FILE) if channels else guix.DESCRIBE,
        labels=lambda report: {CHANNELS_LABEL: report, **trust},
        files={"channels.scm": channels.encode()} if channels else {},
        keep=guix.CURRENT_GUIX,
        extra_inputs={CHANNELS_INPUT: text_digest(wanted or "")} if computed else {},
        pinned=partial(pull_stage, wanted=wanted, authenticate=authenticate),
        check=_check_authenticated if authenticate else None,
        fetches=channels or "",
        is_pure=bool(channels) and guix.is_literal(channels or ""),
    )


def is_authenticated(image: Image | None) -> bool:
    """Whether an image of the pull stage, if there is one, was pulled with authentication."""
    return image is None or not image.labels.get(AUTHENTICATION_LABEL)


def _check_authenticated(channels: str) -> None:
    """Raise ``StageError`` if Guix pulled a channel that has no introduction.

    Guix accepts such a channel silently.  Computed channels and dependencies of channels are
    known only after the pull.
    """
    if names := guix.unauthenticated(channels):
        raise StageError(
            f"pull: the channel {quoted(names[0])} has no introduction, so Guix did not "
            f"authenticate the commits that it pulled; {_INTRODUCTION_HINT}"
        )


def stage_to_run(
    settings: Settings, *, update: bool = False, newest: bool = False, authenticate: bool = True
) -> Stage:
    """Return the stage that pulls the lock, or ``GUIX_CHANNELS`` without a lock or to ``update``.

    ``newest`` is an update that also takes commits of Guix that no substitute server has built.

    Raise ``UsageError`` if the lock does not match ``GUIX_CHANNELS`` or cannot be written, or if
    ``authenticate`` is true and a channel has no introduction.
    """
    wanted, locked = channels_text(settings), lock_text(settings)
    lock = None if update or newest else locked
    if settings.guix_channels_lock and not lock:
        with _lock_errors(settings.guix_channels_lock):
            check_writable(settings.guix_channels_lock)
    if lock and (problem := lock_mismatch(wanted, lock)):
        raise UsageError(lock_mismatch_line(settings, problem))
    unauthenticated = guix.unauthenticated(lock or wanted or "") if authenticate else []
    if unauthenticated:
        path, hint = settings.guix_channels, _INTRODUCTION_HINT
        if lock:
            # An introduction reaches the lock only when the lock is updated.
            path, hint = settings.guix_channels_lock, f"{hint} (and `inv pull --update`)"
        raise UsageError(
            f"{path}: the channel {quoted(unauthenticated[0])} has no introduction, so Guix cannot "
            f"authenticate it; {hint}"
        )
    stage = pull_stage(lock or wanted, wanted, authenticate=authenticate)
    if lock or newest:
        return stage
    pull, *others = stage.commands
    pull = guix.pull_argv(f"{WORK_DIRECTORY}/{BUILT_CHANNELS}", authenticate=authenticate)
    files = {**stage.files, **resource_files((BUILT_CHANNELS,))}
    if locked:
        files["locked.scm"] = locked.encode()
    return replace(stage, commands=[pull, *others], files=files)


def lock_mismatch_line(settings: Settings, problem: str) -> str:
    return (
        f"{settings.guix_channels_lock} does not fit GUIX_CHANNELS: {problem}; "
        "`inv pull --update` updates the lock"
    )


def uncompared_lock(settings: Settings) -> str | None:
    """Return a line that reports a lock of a ``GUIX_CHANNELS`` that computes its channels.

    Return None if the lock can be compared with ``GUIX_CHANNELS``, or if either is missing.
    """
    wanted = channels_text(settings)
    if not wanted or guix.is_literal(wanted) or not lock_text(settings):
        return None
    return (
        f"pull: using {settings.guix_channels_lock} without comparing it with GUIX_CHANNELS, "
        "which computes its channels; `inv pull --update` updates the lock"
    )


def write_lock(settings: Settings, channels: str) -> bool:
    """Write the pulled channels to ``GUIX_CHANNELS_LOCK`` and return whether the file changed.

    Raise ``UsageError`` if the file cannot be written.
    """
    path = settings.guix_channels_lock
    if path is None or not channels:
        return False
    content = f"{channels}\n".encode()
    with _lock_errors(path):
        if path.exists() and path.read_bytes() == content:
            return False
        write_whole(path, content)
    return True


@contextmanager
def _lock_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"GUIX_CHANNELS_LOCK: cannot write {path}: {error.strerror}; choose a writable file"
        ) from None


def lock_text(settings: Settings) -> str | None:
    """Return the content of ``GUIX_CHANNELS_LOCK``, or None if it is unset or does not exist.

    Raise ``UsageError`` if the file cannot be read.
    """
    path = settings.guix_channels_lock
    return _text("GUIX_CHANNELS_LOCK", path).strip() if path and path.exists() else None


def channels_text(settings: Settings) -> str | None:
    """Return the content of ``GUIX_CHANNELS``, or None if it is unset.

    Raise ``UsageError`` if the file cannot be read or is not valid Scheme.
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
        raise UsageError(
            f"{name}: cannot read {path}: {error.strerror}; choose a channels file"
        ) from None


def lock_mismatch(wanted: str | None, lock: str) -> str | None:
    """Return the first difference between a lock and ``GUIX_CHANNELS``, or None.

    A channels file is a program, so only its literal parts can be compared.  Each channel that it
    names must be in the lock, with the same URL, branch and introduction, and at the commit that
    it names, if any.
    """
    return next(_mismatches(wanted or "", lock), None)


def _mismatches(wanted: str, lock: str) -> Iterator[str]:
    if error := guix.syntax_error(lock):
        yield f"in line {error[0]}, {error[1]}"
    channels, locked = guix.channels(wanted), guix.channels(lock)
    if not locked:
        yield "it names no channel"
    for name, channel in channels.items():
        if name not in locked:
            yield f"it lacks the channel {name}"
        else:
            yield from _differences(channel, locked[name])
    surplus = locked.keys() - channels.keys()
    if surplus and guix.is_literal(wanted):
        yield f"it has the channel {min(surplus)}"


def _differences(channel: guix.Channel, locked: guix.Channel) -> Iterator[str]:
    name = channel.name
    if channel.url != locked.url:
        yield f"{name} is from {locked.url}, not from {channel.url}"
    if channel.commit not in (None, locked.commit):
        yield f"{name} is at {locked.commit}, not at {channel.commit}"
    computed = channel.computed | locked.computed
    branch = channel.branch or guix.DEFAULT_BRANCH
    locked_branch = locked.branch or guix.DEFAULT_BRANCH
    if branch != locked_branch and "branch" not in computed:
        yield f"{name} is on branch {locked_branch}, not on {branch}"
    if channel.introduction != locked.introduction and "introduction" not in computed:
        yield f"{name} {_introduced(locked)}, and in GUIX_CHANNELS {_introduced(channel)}"


def _introduced(channel: guix.Channel) -> str:
    introduction = channel.introduction
    if introduction is None:
        return "has no introduction"
    key = introduction.fingerprint.upper()
    return f"is introduced by commit {introduction.commit} of key {key}"
