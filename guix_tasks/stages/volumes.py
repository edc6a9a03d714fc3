"""Check that an image declares no volume where stages write their results.

The engine mounts a volume at each ``VOLUME`` of an image, in all of its containers, and a commit
excludes volumes. The volumes are read from the image, which includes those of ``BASE_IMAGE``. The
Dockerfile is only read for the line number of the error.
"""

from __future__ import annotations

import glob
import json
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from guix_tasks.errors import SettingsError
from guix_tasks.guix.result_paths import conflict, normal_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings


class _Instruction(NamedTuple):
    """An instruction of a Dockerfile, with its continuation lines joined."""

    line: int
    name: str
    text: str


def check_volumes(settings: Settings, image: Image) -> None:
    """Raise ``SettingsError`` if an image declares a volume where stages write their results."""
    volumes = sorted(image.config.get("Volumes") or {})
    conflicts = {volume: reason for volume in volumes if (reason := conflict(volume))}
    if not conflicts:
        return
    instructions, problems = _last_build_stage(settings), []
    for volume, reason in conflicts.items():
        origin, hint = _origin_and_hint(settings, instructions, volume)
        problems.append(
            f"{origin} {reason}, and a commit takes nothing of what is on a volume, so the image "
            f"would lack what the stages make; {hint}"
        )
    raise SettingsError(problems)


def _origin_and_hint(
    settings: Settings, instructions: Sequence[_Instruction], volume: str
) -> tuple[str, str]:
    """Return where a volume is declared, a line or else the base image, and how to remove it."""
    path = settings.shown(settings.dockerfile)
    if line := _declaration(instructions, volume):
        return f"{path}:{line}: VOLUME {volume}", "remove it from that line"
    image = f"{settings.origin('BASE_IMAGE')}: {settings.base_image}"
    if instructions and "BASE_IMAGE" not in instructions[0].text:
        image = f"{path}:{instructions[0].line}: FROM {instructions[0].text}"
    hint = "no Dockerfile can remove a volume, so use a base image without it"
    return f"{image}: its VOLUME {volume}", hint


def _declaration(instructions: Sequence[_Instruction], volume: str) -> int | None:
    """Return the line of the last ``VOLUME`` that declares a volume, perhaps by a variable."""
    declarations = [instruction for instruction in instructions if instruction.name == "VOLUME"]
    for matches in (_is_literally, _can_expand_to):
        for declaration in reversed(declarations):
            if any(matches(word, volume) for word in _words(declaration.text)):
                return declaration.line
    return None


def _is_literally(word: str, volume: str) -> bool:
    return normal_path(word) == normal_path(volume)


def _can_expand_to(word: str, volume: str) -> bool:
    texts = re.split(r"\$(?:\w+|\{[^}]*\})", word)
    return len(texts) > 1 and fnmatchcase(volume, "*".join(map(glob.escape, texts)))


def _words(text: str) -> list[str]:
    """Return the paths of a ``VOLUME``, in its JSON form or its plain form."""
    try:
        paths = json.loads(text)
    except (ValueError, RecursionError):
        paths = None
    if isinstance(paths, list):
        return [str(path) for path in paths]
    return [word.replace('"', "").replace("'", "") for word in text.split()]


def _last_build_stage(settings: Settings) -> list[_Instruction]:
    """Return the ``FROM`` and ``VOLUME`` instructions of the last build stage and its ancestors.

    The first instruction is the ``FROM`` of an image that is not a build stage.
    """
    try:
        text = settings.dockerfile.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    stages: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            words = [word for word in instruction.text.split() if not word.startswith("--")]
            image = words[0] if words else ""
            current = [*stages.get(image.lower(), [instruction._replace(text=image)])]
            if len(words) == len(("image", "AS", "name")):
                stages[words[2].lower()] = current
        else:
            current.append(instruction)
    return [instruction for instruction in current if instruction.name in ("FROM", "VOLUME")]


def _instructions(text: str) -> Iterator[_Instruction]:
    """Split a Dockerfile by the rules of its reference: comments, continuation, here-documents.

    The lines of a here-document are not instructions.
    """
    directive = re.match(r"(?:\s*#\s*\w+\s*=.*\n)*?\s*#\s*escape\s*=\s*(\S)", text, re.IGNORECASE)
    escape = directive[1] if directive else "\\"
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        words = "" if _is_comment(line) else line.rstrip()
        while words.endswith(escape):
            # Comments and empty lines do not end a continued line.
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
