"""Volumes that an image declares where stages write: what is written there is never committed.

The engine puts a volume at each ``VOLUME`` of an image, in every container of it.  Whether there is
one is read from the image, which also knows those of ``BASE_IMAGE``; the Dockerfile is read only
to name the line.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

from guix_tasks.errors import SettingsError
from guix_tasks.guix.result_paths import conflict, normal_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings


class _Instruction(NamedTuple):
    """An instruction of a Dockerfile, its lines joined."""

    line: int
    name: str
    text: str


def check_volumes(settings: Settings, image: Image) -> None:
    """Raise ``SettingsError`` if a volume of an image is where stages write their results."""
    volumes = sorted(image.config.get("Volumes") or {})
    found = {volume: reason for volume in volumes if (reason := conflict(volume))}
    if not found:
        return
    stages = _last_stage(settings)
    raise SettingsError(
        [
            f"{_origin(settings, stages, volume)} {reason}, and a commit takes nothing of what is "
            "on a volume, so the image would lack what the stages make; "
            f"{_hint(stages, volume)}"
            for volume, reason in found.items()
        ]
    )


def _origin(settings: Settings, instructions: Sequence[_Instruction], volume: str) -> str:
    """Name the line that declares a volume, else the base image that brings it."""
    file = settings.dockerfile
    inside = file.is_relative_to(settings.folder)
    shown = file.relative_to(settings.folder) if inside else file
    if line := _declaration(instructions, volume):
        return f"{shown}:{line}: VOLUME {volume}"
    first = instructions[0] if instructions else None
    if first and "BASE_IMAGE" not in first.text:
        return f"{shown}:{first.line}: FROM {first.text}: its VOLUME {volume}"
    return f"{settings.origin('BASE_IMAGE')}: {settings.base_image}: its VOLUME {volume}"


def _hint(instructions: Sequence[_Instruction], volume: str) -> str:
    if _declaration(instructions, volume):
        return "remove it from that line"
    return "no Dockerfile can undo it, so use a base image without it"


def _declaration(instructions: Sequence[_Instruction], volume: str) -> int | None:
    """Return the line of the last ``VOLUME`` that is this one, or can be by its variables."""
    declared = [each for each in instructions if each.name == "VOLUME"]
    for matches in (_is_literally, _can_be):
        for each in reversed(declared):
            if any(matches(word, volume) for word in _words(each.text)):
                return each.line
    return None


def _is_literally(word: str, volume: str) -> bool:
    return normal_path(word) == normal_path(volume)


def _can_be(word: str, volume: str) -> bool:
    texts = re.split(r"\$(?:\w+|\{[^}]*\})", word)
    return len(texts) > 1 and bool(re.fullmatch(".*".join(map(re.escape, texts)), volume))


def _words(text: str) -> list[str]:
    """Return the paths of a ``VOLUME``, in either of its forms."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, list):
        return [str(each) for each in found]
    return [word.replace('"', "").replace("'", "") for word in text.split()]


def _last_stage(settings: Settings) -> list[_Instruction]:
    """Return the instructions of the Dockerfile's last stage, after those of its parents in it.

    The first one is the ``FROM`` of the image that is no stage.
    """
    try:
        text = settings.dockerfile.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    stages: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for each in _instructions(text):
        if each.name == "FROM":
            words = [word for word in each.text.split() if not word.startswith("--")]
            parent = words[0].lower() if words else ""
            source = each._replace(text=words[0] if words else "")
            current = [*stages.get(parent, [source])]
            if len(words) == len(("image", "AS", "name")):
                stages[words[2].lower()] = current
        else:
            current.append(each)
    return [each for each in current if each.name in ("FROM", "VOLUME")]


def _instructions(text: str) -> Iterator[_Instruction]:
    """Split a Dockerfile by the rules of its reference: comments, continued lines, here-documents.

    What stands in a here-document is no instruction.
    """
    directive = re.match(r"(?:\s*#\s*\w+\s*=.*\n)*?\s*#\s*escape\s*=\s*(\S)", text, re.IGNORECASE)
    escape = directive[1] if directive else "\\"
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        words = "" if _is_comment(line) else line.rstrip()
        while words.endswith(escape):
            # Neither a comment nor an empty line ends a line that is continued.
            more = (next_line.rstrip() for _, next_line in lines if not _is_comment(next_line))
            words = words.removesuffix(escape) + next(filter(None, more), "")
        name, *rest = words.split(maxsplit=1) or [""]
        if name:
            yield _Instruction(number, name.upper(), "".join(rest))
        if name.upper() in ("RUN", "COPY", "ADD"):
            for tab, _, end in re.findall(r"<<(-?)([\"']?)(\w+)\2", words):
                ends = (more.lstrip("\t") if tab else more for _, more in lines)
                next((line for line in ends if line == end), None)


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")
