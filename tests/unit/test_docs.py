"""Tables, links, commands and settings in the documentation."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from invoke.collection import Collection
from invoke.exceptions import ParseError
from invoke.parser import Parser
from invoke.parser.argument import Argument
from invoke.parser.context import ParserContext
from invoke.program import Program

import dev.tasks
from guix_tasks.cli.tasks import GROUPS
from guix_tasks.settings import DECLARATIONS, load_settings
from guix_tasks.stages.images import STAGES, inputs_of
from guix_tasks.stages.lifecycle import Lifecycle, _StaleError
from guix_tasks.tasks import ns

if TYPE_CHECKING:
    from fake_engine import Site

    from guix_tasks.engine.api import Image

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(page for page in (ROOT / "examples").rglob("*.md") if "out" not in page.parts),
]


FILES = ("ca.pem", "token.txt", "known_hosts", "channels.scm", "manifest.scm")

CHANGED_VALUES = {
    "PLATFORMS": "linux/arm64",
    "BUILD_CONTEXT": "docker",
    "CACHE_VOLUME": "",
    "GUIX_CHANNELS": "other.scm",
    "GUIX_MANIFEST": "other.scm",
    "GUIX_CHANNELS_LOCK": "other.scm",
}
"""Values that differ from those of the test project, unlike the examples."""

IRRELEVANT_SETTINGS = ("IMAGE", "GUIX_CHANNEL_CREDENTIALS_FILE")
"""Settings that are not changed: another image has other stages, the secret has no file."""

OTHER_VARIABLES = {
    "CHECK_IMAGE", "CI", "ENV_FILE", "GITHUB_ACTIONS", "GITLAB_CI", "JOBS", "NAME", "NO_COLOR",
    "OFFLINE", "PATH", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PYTHONUTF8", "SOURCE_DATE_EPOCH", "TERM",
}  # fmt: skip
"""Variables on the pages that are not settings."""

REQUIRED_SETTINGS = {
    "GUIX_BINARY_URL": {"GUIX_BINARY_SHA256": "0" * 64},
    "GUIX_BINARY_SHA256": {"GUIX_BINARY_URL": "https://a.test/guix"},
    "BUILDX_DRIVER": {"BUILDX_NODES": "tcp://a.test:1"},
    "BUILDX_NODES": {"BUILDX_DRIVER": "remote"},
    "BUILDX_URL": {"BUILDX_SHA256": "0" * 64},
    "BUILDX_SHA256": {"BUILDX_URL": "https://a.test/buildx"},
}
"""Other settings that a setting requires."""


def test_tables_are_up_to_date() -> None:
    # In a new process, because Invoke removes the help of tasks when it first reads it.
    argv = [sys.executable, "-m", "docs.tables", "--check"]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_every_task_has_a_group() -> None:
    grouped = " ".join(GROUPS.values()).split()
    assert sorted(grouped) == sorted(ns.task_names), "add it to guix_tasks/cli/tasks/__init__.py"


def write_files(directory: Path) -> None:
    """Create the files that the examples of settings name."""
    for name in (*FILES, "keys/mirror.pub", "secrets/docker_username", "substitutes/x"):
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("(list)")
    shutil.copy(Path(__file__).with_name("authority.pem"), directory / "company-ca.pem")


def test_picture_of_a_run_shows_existing_tasks() -> None:
    svg = (ROOT / "docs" / "images" / "terminal.svg").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]*>", "\n", svg).replace("&#160;", " ")
    commands = re.findall(r"^inv (.*?)(?: -.*)?$", text, re.MULTILINE)
    shown = {name for command in commands for name in command.split()}
    assert shown >= {*STAGES, "verify", "push", "status"}
    assert shown <= set(ns.task_names)


def test_examples_of_settings_are_valid(tmp_path: Path) -> None:
    """All are set together, so that settings that require others are valid."""
    write_files(tmp_path)
    examples = {name: setting.example for name, setting in DECLARATIONS.items()}
    assert all(examples.values())
    # A secret is set directly or as a file, and the files of the examples do not exist here.
    for name in ("DOCKER_USERNAME", "DOCKER_PASSWORD_FILE", "GUIX_CHANNEL_CREDENTIALS_FILE"):
        del examples[name]
    text = "".join(f"{name}={value}\n" for name, value in examples.items())
    (tmp_path / ".env").write_text(text)
    settings = load_settings(tmp_path, tmp_path, {})
    assert settings.notes == ()
    assert set(settings.written) >= {"IMAGE", "BUILDX_NODES", "RELEASE_URL"}


def is_changed(lifecycle: Lifecycle, stage: str, image: Image) -> bool:
    """Whether the inputs of a stage changed, except its parent."""
    try:
        return lifecycle._inputs(stage, image, ()) != inputs_of(image)
    except _StaleError:
        return True


def test_exactly_the_stages_in_bold_are_stale_when_a_setting_changes(built_site: Site) -> None:
    """Stages that are stale only because of their parent are not in bold."""
    channels = (built_site.directory / "channels.scm").read_bytes()
    write_files(built_site.directory)
    (built_site.directory / "channels.scm").write_bytes(channels)
    built_site.write("other.scm", "(list)")
    built_site.write("docker/Dockerfile", "FROM other\n")
    images = {stage: built_site.image(stage) for stage in STAGES}
    env = dict(built_site.env)
    errors = {}
    for name, setting in DECLARATIONS.items():
        if name in IRRELEVANT_SETTINGS or name.startswith("DOCKER_"):
            continue
        built_site.env.update(env)
        for extra in built_site.env.keys() - env.keys():
            del built_site.env[extra]
        built_site.env.update(
            REQUIRED_SETTINGS.get(name, {}) | {name: CHANGED_VALUES.get(name, setting.example)}
        )
        lifecycle = built_site.lifecycle
        stale = [stage for stage in STAGES if is_changed(lifecycle, stage, images[stage])]
        if stale != (bold := re.findall(r"\*\*(\w+)\*\*", setting.used_by)):
            errors[name] = (stale, bold)
    assert errors == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_existing_targets(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target in (first or second for first, second in links):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in _anchors(linked.read_text(encoding="utf-8")), (
                f"{target}: no such heading"
            )


def _anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_of(text: str) -> list[str]:
    """Return the code on a page: the lines of blocks, and the code in sentences on one line."""
    fences = re.compile(r"^ *```[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    blocks = "".join(fences.findall(text))
    sentences = fences.sub("", text)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", sentences)]
    indented = re.findall(r"^ {4}([^`\n]*)$", sentences, re.MULTILINE)
    return [*blocks.splitlines(), *indented, *inline]


def command_lines(line: str) -> list[list[str]]:
    """Return the words after each ``inv`` or ``guix-tasks`` in a line, without placeholders."""
    lexer = shlex.shlex(line.replace("`", ";"), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a sentence with an apostrophe
        words = line.split()
    commands: list[list[str]] = []
    is_command = False
    for word in words:
        if word in {"inv", "./inv", "guix-tasks"}:
            commands.append([])
            is_command = True
        elif is_command and not re.match(r"[|&;<>()]", word):
            commands[-1].extend([] if re.fullmatch("[A-Z]*…", word) else [word])
        else:
            is_command = False
    return commands


def test_commands_end_at_shell_operators_and_omit_placeholders() -> None:
    assert command_lines("A=b inv pull && ./inv push | cat  # twice") == [["pull"], ["push"]]
    assert command_lines("$ inv run -- sh -c 'a || b'") == [["run", "--", "sh", "-c", "a || b"]]
    assert command_lines("then run `inv pull TASK…`, or") == [["pull"]]


@pytest.fixture(scope="module")
def contexts() -> list[ParserContext]:
    """Return the tasks that pages can name, with their options."""
    # Parsing a command removes the help of its task.
    collections = deepcopy((ns, Collection(dev.tasks.demo, dev.tasks.test)))
    return [context for collection in collections for context in collection.to_contexts()]


def parse_error(words: list[str], contexts: list[ParserContext]) -> str:
    """Return the error of Invoke for a command line, or an empty string."""
    program = Program()
    core = ParserContext(args=[*program.core_args(), *program.task_args()])
    try:
        Parser(contexts, core).parse_argv(words)
    except ParseError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_settings_of_a_page_exist(page: Path, contexts: list[ParserContext]) -> None:
    text = page.read_text(encoding="utf-8")
    example = (ROOT / "examples" / "distributable" / "tasks.py").read_text(encoding="utf-8")
    options = [Argument(name, kind=bool) for name in ("force", "upstream", "no-commit")]
    custom = [
        ParserContext(name, args=options)
        for name in set(re.findall(r'add_(?:stage|test)\(\s*"([\w-]+)"', text + example))
    ]
    mistakes = []
    for line in code_of(text):
        errors = (parse_error(words, [*contexts, *custom]) for words in command_lines(line))
        mistakes += [f"{line}: {error}" for error in errors if error]
        names = re.findall(r"(?:^|[\s\"])([A-Z][A-Z0-9_]+)=", line)
        mistakes += [f"{line}: {name}" for name in {*names} - OTHER_VARIABLES - {*DECLARATIONS}]
    assert not mistakes, "\n".join(mistakes)
