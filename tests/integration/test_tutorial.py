"""The tutorial, word by word: its commands are run, and what it shows is what comes."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

import pytest
from harness import OFFLINE, ROOT, call

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject

PAGE = ROOT / "docs" / "tutorial.md"
IMAGE = "localhost:5055/tutorial"
MARK = "--- the end of a command"


class Step(NamedTuple):
    """A command, and the lines that it is said to print; ``…`` stands for anything."""

    command: str
    shown: list[str]


def steps(text: str) -> list[Step]:
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Step(line[2:], []))
            elif line == ">" or line.startswith("> "):
                command, shown = found.pop()
                found.append(Step(f"{command}\n{line[2:]}", shown))
            else:
                found[-1].shown.append(line)
    return found


def missing(shown: list[str], said: str) -> list[str]:
    """The lines that are not in an output, in their order."""
    rest = said.splitlines()
    lost = []
    for line in (each for each in shown if each != "…"):
        pattern = ".*".join(
            re.escape(part) for part in re.split(r"\s*…\s*", " ".join(line.split()))
        )
        at = next(
            (n for n, real in enumerate(rest) if re.fullmatch(pattern, " ".join(real.split()))),
            None,
        )
        if at is None:
            lost.append(line)
        else:
            rest = rest[at + 1 :]
    return lost


def test_a_line_that_does_not_come_is_missed() -> None:
    assert missing(["a … c", "…", "d"], "a b c\nx\nd") == []
    assert missing(["a", "…", "b"], "a\nb") == []
    assert missing(["d", "a … c"], "a b c\nx\nd") == ["a … c"]


@pytest.mark.engine
def test_the_tutorial(new_project: NewProject, tmp_path: Path, registry: object) -> None:
    project = new_project()
    image = project.image
    text = PAGE.read_text(encoding="utf-8").replace(f"{IMAGE}:latest", image).replace(IMAGE, image)
    place, *following = steps(text)
    assert place.command.startswith("export PATH=$PWD:$PATH OFFLINE=$PWD/examples/offline/out")
    begin, *following = following
    assert begin.command == "mkdir ../tutorial && cd ../tutorial"
    directory = tmp_path / "tutorial"
    directory.mkdir()
    env = {name: text for name, text in project.environment.items() if name != "ENV_FILE"}
    env |= {"PATH": f"{ROOT}:{os.environ['PATH']}", "OFFLINE": str(OFFLINE / "out")}
    script = "".join(f"{step.command}\necho '{MARK}'\n" for step in following)
    result = call(["bash", "-ec", f"exec 2>&1\n{script}"], env, 240, directory)
    outputs = result.stdout.split(f"{MARK}\n")
    assert result.returncode == 0, outputs[-1]
    for step, said in zip(following, outputs, strict=False):
        assert missing(step.shown, said) == [], f"{step.command}:\n{said}"
