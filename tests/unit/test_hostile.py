"""Injection tests: settings, arguments, image labels and archives are only ever treated as data.

Each test tries many texts that are special to shells, file systems, terminals, Dockerfiles or
Scheme.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shlex
import stat
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from fake_engine import IMAGE, BufferConsole, Site, new_built_site, new_site, serial_executor
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from invoke.program import Program

from guix_tasks import files as files_module
from guix_tasks import guix
from guix_tasks import settings as settings_module
from guix_tasks.buildkit.bakefile import Definition, bake_file, dockerfile
from guix_tasks.buildkit.context import save_as_layout, write_mounts
from guix_tasks.cli import session
from guix_tasks.commands.status import status_rows, tag_statuses
from guix_tasks.engine import discovery, podman
from guix_tasks.engine.api import BuildSpec, ContainerSpec
from guix_tasks.errors import BuilderError, GuixTasksError, SettingsError
from guix_tasks.files import write_whole
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import ImageReference
from guix_tasks.settings import load_settings
from guix_tasks.stages.container import common_files, environment
from guix_tasks.stages.diagnostics import Failure, save_diagnostics
from guix_tasks.stages.images import (
    CHANNELS_LABEL,
    INPUTS_LABEL,
    KEY_LABEL,
    LAYERS_LABEL,
    PACKAGES_LABEL,
    STAGE_LABEL,
    inputs_of,
    proven_stage,
    seal,
)
from guix_tasks.stages.install import ASKED_LABEL, given_packages
from guix_tasks.tasks import ns
from guix_tasks.ui.format import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from soak import Soak

pytestmark = pytest.mark.soak

V = TypeVar("V")

# --- Test data ------------------------------------------------------------------------------

CANARY = "canary"
"""A file that exists if a shell ran a text of the test data."""

FRAGMENTS = (
    f"$(touch {CANARY})", f"`touch {CANARY}`", f";touch {CANARY};", f"|touch {CANARY}",
    f"&&touch {CANARY}", f"\ntouch {CANARY}\n", f"';touch {CANARY};'", f'";touch {CANARY};"',
    "'", '"', "\\", "\\\n", "\n", "\r", "\r\n", "\t", " ", "\0", "\x07", "\x1b[2J", "\x1b]0;x\x07",
    "\x9b2J", "\x7f", "\x85", "\u202e", "\u200f", "\u2028", "\u2029", "\ufeff", "\u200b", "\udcff",
    "\udc80", "\ud800", "\uffff", "\U000e0001", "é", "ß", "İ", "٣", "\uff46", "..", "../", "../../",
    "/no/such/place", "/", "~", "-", "--", "--help", "-e", "${HOME}", "$HOME", "$IFS", "${", "%{",
    "$${", "}", "*", "?", "[", "]", "!", "#", "&", "<", ">", "(", ")", "#|", "|#", "#;", ";", "'(",
    ",", ":", "@", "=", "://", "sha256:", "a", "hello", "0", "9" * 30, "A" * 300, "a/" * 200,
    "::error::", "error: ", "USER root", "\nRUN touch canary\n", "EOF",
)  # fmt: skip

HOSTILE = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=8).map("".join)


def as_system_text(text: str) -> str:
    """Convert to a text that the system can pass to a program: no NUL, bytes as surrogates."""
    raw = text.replace("\0", "").encode("utf-8", "surrogatepass")
    return raw.decode("utf-8", "surrogateescape")


WORD = HOSTILE.map(as_system_text)
"""An argument, or the value of a variable."""

CONTAINED_NAME = WORD.map(lambda text: text.replace("..", "").replace("/", ""))
"""A name without path separators: some tests write to it, perhaps as root."""

NAMES = [*settings_module.DECLARATIONS]
PROXIES = ("http_proxy", "https_proxy", "NO_PROXY")

PLAUSIBLE = st.sampled_from(
    [
        "a/b:c", "localhost:5000/x", "hello git@1:out", "linux/arm64 linux/386", "yes",
        "privileged", "4g", "90m", "1", "none", "a=b c=d", ".:/x:ro", "remote", "oci", "type=gha",
        "tcp://h:1,cacert=x", "https://a.test b", "file:///x", "provenance sbom", "0" * 64, "x.pub",
        "channels.scm", "Dockerfile",
    ]
)  # fmt: skip
VALUES = HOSTILE | PLAUSIBLE | st.builds("{}{}".format, PLAUSIBLE, HOSTILE)


@st.composite
def env_files(draw: st.DrawFn) -> bytes:
    """Generate lines of settings, some of them valid, or arbitrary bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    lines = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["", "export ", " "]),
                st.sampled_from([*NAMES, "ENV_FILE", "OTHER", "IMAGES"]) | HOSTILE,
                st.sampled_from(["=", " = ", "", "='", '="', ":"]),
                VALUES,
                st.sampled_from(["\n", "'\n", '"\n', "\r\n", ""]),
            ).map("".join),
            max_size=6,
        )
    )
    return "".join(lines).encode("utf-8", "surrogatepass")


ENVIRONMENTS = st.dictionaries(
    st.sampled_from([*NAMES, *PROXIES, "ENV_FILE", "HOME"]), VALUES.map(as_system_text), max_size=4
)


@pytest.fixture(scope="module")
def tally(soak: Soak) -> Iterator[Counter[str]]:
    """Count the values of each kind."""
    counts: Counter[str] = Counter()
    yield counts
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    soak.report(
        "hostile text is only data",
        f"{summary}; {counts.total()} in all: no traceback, no shell, no canary",
    )


@pytest.fixture
def attempt(soak: Soak, tally: Counter[str]) -> Attempt:
    return Attempt(soak, tally)


class Attempt:
    """Run a check with many values of a kind."""

    def __init__(self, soak: Soak, tally: Counter[str]) -> None:
        self._soak = soak
        self._tally = tally

    def __call__(
        self,
        kind: str,
        values: st.SearchStrategy[V],
        check: Callable[[V], None],
        short: int,
        long: int,
    ) -> None:
        def count_and_check(value: V) -> None:
            self._tally[kind] += 1
            check(value)

        configure = settings(
            max_examples=self._soak.times(short, long),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        seed(self._soak.seed)(configure(given(values)(count_and_check)))()


@pytest.fixture(autouse=True)
def _forbid_shells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Fail if a test runs a text in a shell, and use no files of this machine."""
    original = subprocess.Popen.__init__

    def start(self: Any, args: Any, *arguments: Any, **options: Any) -> None:
        words = [args] if isinstance(args, (str, bytes)) else [os.fspath(word) for word in args]
        assert not options.get("shell"), words
        if Path(os.fsdecode(words[0])).name in ("sh", "dash", "bash"):
            assert "-c" not in words, words
        original(self, args, *arguments, **options)

    def system(command: object) -> int:
        raise AssertionError(command)

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    monkeypatch.setattr(os, "system", system)
    monkeypatch.setattr(files_module, "ThreadPoolExecutor", serial_executor)
    for name in (*NAMES, "ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(discovery, "DEFAULT_SOCKET", tmp_path / "no.sock")
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    yield
    session._engines.clear()
    assert not list(tmp_path.rglob(CANARY))


def is_printable_line(text: str) -> bool:
    """Return whether a terminal shows the text as one line and does nothing else."""
    return text.isprintable()


def check_printable_lines(texts: Iterable[str]) -> None:
    assert texts
    unprintable = [text for text in texts if not is_printable_line(text)]
    assert not unprintable


# --- Settings -------------------------------------------------------------------------------


def test_env_file_is_loaded_or_is_an_error(attempt: Attempt, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("channels.scm", "Dockerfile", "x.pub"):
        (project / name).write_text("x\n")

    def check(example: tuple[bytes, dict[str, str]]) -> None:
        (project / ".env").write_bytes(example[0])
        started = time.monotonic()
        try:
            loaded = load_settings(project, project, example[1])
        except SettingsError as error:
            check_printable_lines(error.problems)
        else:
            assert all(map(is_printable_line, loaded.notes)), loaded.notes
            paths = (
                loaded.dockerfile,
                loaded.build_context,
                loaded.guix_channels,
                loaded.output_directory,
            )
            assert all(path.is_absolute() for path in paths if path)
            assert loaded.output_directory == project / "out"
            common_files(loaded)
        assert time.monotonic() - started < 5

    attempt("env files", st.tuples(env_files(), ENVIRONMENTS), check, 40, 12_000)


def test_value_of_a_setting_is_loaded_or_is_an_error(attempt: Attempt, tmp_path: Path) -> None:
    def check(example: tuple[str, str | list[str]]) -> None:
        name, value = example
        try:
            loaded = load_settings(tmp_path, tmp_path, {}, {name: value})
        except SettingsError as error:
            check_printable_lines(error.problems)
        else:
            assert all(
                map(is_printable_line, (*loaded.notes, str(loaded.image), str(loaded.base_image)))
            )

    values = VALUES | st.lists(VALUES, max_size=3)
    attempt("values of settings", st.tuples(st.sampled_from(NAMES), values), check, 40, 10_000)


# --- Content of images ----------------------------------------------------------------------

SCHEME = st.lists(
    st.sampled_from(
        ["(", ")", "[", "]", "'", '"', "\\", ";", "#|", "|#", "#;", "\n", " ", "list", "channel",
         "(channel (name 'a) (url \"u\")", "(introduction", "#f", "(inherit", "name", "url", "\t"]
    )
    | HOSTILE,
    max_size=30,
).map("".join)  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=6,
).map(json.dumps)
LABELS = st.fixed_dictionaries(
    {},
    optional={
        STAGE_LABEL: HOSTILE | st.sampled_from(["base", "pull", "install", "squash", "commit"]),
        KEY_LABEL: HOSTILE,
        INPUTS_LABEL: HOSTILE | JSON | st.just("[" * 100_000),
        LAYERS_LABEL: HOSTILE,
        CHANNELS_LABEL: SCHEME,
        PACKAGES_LABEL: HOSTILE,
        ASKED_LABEL: HOSTILE,
    },
)


def test_image_labels_are_only_data(attempt: Attempt, tmp_path: Path) -> None:
    """Another tool built an image with the tag of a stage, with a valid seal or without."""
    directory = tmp_path / "project"

    def check(example: tuple[str, dict[str, str], bool, str]) -> None:
        stage, labels, sealed, created = example
        site = new_built_site(directory)
        original = site.image(stage)
        if sealed:
            labels = {STAGE_LABEL: stage, **labels}
        config = {**original.config, "Labels": labels}
        if sealed:
            labels = {**labels, LAYERS_LABEL: seal(original.layers[:-1], 1, config)}
        config["Labels"] = labels
        image = replace(original, id=f"sha256:{'e' * 64}", config=config, created=created)
        site.engine.all_images[image.id] = image
        site.engine.tags[site.ledger.tag(stage)] = site.engine.tags[IMAGE] = image.id
        proven_stage(image)
        given_packages(image)
        assert all(isinstance(text, str) for pair in inputs_of(image).items() for text in pair)
        project = site.project()
        project.console.table(["x"] * 7, status_rows(tag_statuses(project)))
        assert isinstance(project.console, BufferConsole)
        assert all(map(is_printable_line, project.console.text.splitlines()))
        with contextlib.suppress(GuixTasksError):
            site.push()

    times = st.sampled_from(["0000-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "", "2026-01-01"])
    values = st.tuples(
        st.sampled_from(["base", "pull", "install"]), LABELS, st.booleans(), times | HOSTILE
    )
    attempt("labels of images", values, check, 10, 2_500)


def test_printable_text_is_unchanged(attempt: Attempt) -> None:
    def check(text: str) -> None:
        assert is_printable_line(printable(text))
        if is_printable_line(text):
            assert printable(text) == text
        assert all(map(is_printable_line, printable(text, "\n\t").replace("\t", " ").split("\n")))

    attempt("texts for a terminal", HOSTILE, check, 20, 4_000)


# --- Whole tasks ----------------------------------------------------------------------------

EXIT_CODES = {0, 1, 2, 3, 4, 5, 6, 130}

PATH_SETTINGS = ("BUILD_CONTEXT", "GUIX_CHANNELS_LOCK")
"""Settings with paths that a task writes to or reads completely."""

ARGUMENTS: st.SearchStrategy[list[str]] = st.one_of(
    st.sampled_from(
        [["base"], ["pull"], ["install"], ["status"], ["push"], ["clean"], ["commit"], ["rollback"],
         ["squash"], ["verify"], ["--dry", "install"], ["base", "pull", "install", "push"]]
    ),
    st.builds(lambda word: ["push", f"--stage={word}"], WORD),
    st.builds(lambda word: ["verify", "--stage", word], WORD),
    st.builds(lambda word: ["install", f"--package={word}"], WORD),
    st.builds(lambda words: ["--echo", "run", "--", *words], st.lists(WORD, max_size=3)),
    st.builds(lambda stage, word: ["run", f"--stage={stage}", "--", word], WORD, WORD),
    st.builds(lambda word: ["status", f"--plot=plots/{word}"], CONTAINED_NAME),
    st.lists(WORD, max_size=3),
)  # fmt: skip


def run_inv(
    site: Site, argv: list[str], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Run ``inv`` in this process with real streams and return its exit code, output and errors."""
    session._engines.clear()
    session._printed_notes.clear()
    files_module._digest_of_state.cache_clear()
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with monkeypatch.context() as patch:
        patch.setattr(podman, "open_engine", lambda *_: site.engine)
        patch.setattr(sys, "argv", ["inv", *argv])
        for name, value in environ.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code: object = 0
        try:
            Program(namespace=ns).run(["inv", *argv])
        except SystemExit as error:
            code = error.code
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return code, *texts


def test_task_fails_with_a_printable_error(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "project"
    new_built_site(directory).write("tasks.py", "")
    (directory / "plots").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(directory)
    siblings = sorted(tmp_path.iterdir())

    def check(example: tuple[list[str], dict[str, str], dict[str, str]]) -> None:
        argv, environment, paths = example
        site = new_built_site(directory)
        defaults = {**site.env, "DOCKER_HOST": "unix:///fake.sock", "BUILDX_NODES": ""}
        code, out, err = run_inv(site, argv, {**defaults, **environment, **paths}, monkeypatch)
        assert code in EXIT_CODES, (code, err)
        assert "Traceback" not in out + err
        errors = [line for line in err.split("\n") if line.startswith("error: ")]
        # The exit code 1 can be of Invoke, for an unknown task or option.
        assert bool(errors) == (code != 0) or code == 1, (code, err)
        assert all(map(is_printable_line, errors)), errors
        if code > 2:
            assert len(errors) == 1, errors
        assert not site.engine.all_containers
        # Shells in the containers of stages run no text either.
        for spec in site.engine.specs:
            if "-c" in spec.command:
                assert CANARY not in spec.command[spec.command.index("-c") + 1]
        assert sorted(tmp_path.iterdir()) == siblings

    names = [name for name in NAMES if name not in PATH_SETTINGS and not name.startswith("DOCKER_")]
    variables = st.dictionaries(st.sampled_from(names), VALUES.map(as_system_text), max_size=2)
    # A mount of the whole machine would be read completely.
    variables = variables.filter(lambda env: "/" not in env.get("MOUNTS", "").partition(":")[0])
    paths = st.dictionaries(
        st.sampled_from(PATH_SETTINGS), CONTAINED_NAME.map("sub/{}".format), max_size=1
    )
    attempt("tasks", st.tuples(ARGUMENTS, variables, paths), check, 12, 4_000)


# --- Real shells ----------------------------------------------------------------------------

SHELLS = [shell for shell in ("/bin/dash", "/bin/bash") if Path(shell).exists()]

RECORDER = '#!/bin/sh\nexec 9>>"$CALLS_FILE"\nflock 9\nprintf "%s\\0" "$#" "$@" >&9\n'
"""A program that records the arguments of each call."""


def parse_calls(record: bytes) -> list[list[bytes]]:
    """Return the arguments of each recorded call."""
    fields, calls = record.split(b"\0")[:-1], []
    while fields:
        count = int(fields[0])
        calls.append(fields[1 : count + 1])
        fields = fields[count + 1 :]
    return calls


def shell(program: str, script: Path, directory: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [program, str(script)],
        cwd=directory,
        env={"PATH": f"{directory / 'bin'}:/usr/bin:/bin", "CALLS_FILE": str(directory / "calls")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A directory with a ``guix`` that records its calls."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "guix"
    program.write_text(RECORDER)
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("program", SHELLS)
def test_stage_script_passes_its_arguments_unchanged(
    attempt: Attempt, recorder: Path, program: str
) -> None:
    record, script = recorder / "calls", recorder / "script"

    def check(example: tuple[list[list[str]], list[str], str]) -> None:
        commands, report, word = example
        calls = [["guix", *words] for words in commands]
        text = guix.script(calls, ["guix", *report], finish=shlex.join(["guix", "finish", word]))
        script.write_bytes(text.encode(errors="surrogateescape"))
        record.unlink(missing_ok=True)
        result = shell(program, script, recorder)
        assert result.returncode == 0, (text, result.stderr)
        expected_words = [*commands, ["finish", word], report]
        expected = [[os.fsencode(word) for word in words] for words in expected_words]
        # The last two run concurrently.
        recorded = parse_calls(record.read_bytes())
        assert recorded[: len(commands)] == expected[: len(commands)]
        assert sorted(recorded) == sorted(expected)
        assert not (recorder / CANARY).exists()

    words = st.lists(WORD, min_size=1, max_size=4)
    attempt(
        f"scripts in {Path(program).name}",
        st.tuples(st.lists(words, min_size=1, max_size=3), words, WORD), check, 12, 1_200,
    )  # fmt: skip


@pytest.mark.parametrize("program", SHELLS)
def test_stage_environment_is_unchanged(attempt: Attempt, recorder: Path, program: str) -> None:
    site = new_site(recorder / "project")
    site_settings = site.settings()
    record, script = recorder / "calls", recorder / "script"

    def check(example: dict[str, str]) -> None:
        # Empty variables are not settings.
        proxied = replace(
            site_settings, proxies=MappingProxyType({k: v for k, v in example.items() if v})
        )
        expected = environment(proxied)
        (recorder / "environment").write_bytes(common_files(proxied)["environment"])
        names = " ".join(f'"${name}"' for name in expected)
        script.write_text(f"set -a; . ./environment; set +a\nguix {names}\n")
        record.unlink(missing_ok=True)
        result = shell(program, script, recorder)
        assert result.returncode == 0, result.stderr
        arguments = [os.fsencode(value) for value in expected.values()]
        assert parse_calls(record.read_bytes()) == [arguments]
        assert not (recorder / CANARY).exists()

    attempt(
        f"environments in {Path(program).name}",
        st.dictionaries(st.sampled_from(PROXIES), WORD, max_size=3), check, 12, 1_000,
    )  # fmt: skip


@pytest.mark.parametrize("program", SHELLS)
def test_shown_command_can_be_pasted(attempt: Attempt, recorder: Path, program: str) -> None:
    record, script = recorder / "calls", recorder / "script"

    def check(words: list[str]) -> None:
        console = BufferConsole()
        console.command(["guix", *words])
        script.write_bytes(console.text.removeprefix("+ ").encode())
        record.unlink(missing_ok=True)
        shell(program, script, recorder)
        assert not (recorder / CANARY).exists()
        if program.endswith("bash") or all(map(is_printable_line, words)):
            assert parse_calls(record.read_bytes()) == [[os.fsencode(word) for word in words]]

    attempt(f"shown commands in {Path(program).name}", st.lists(WORD), check, 15, 800)


# --- Dockerfiles and bake files -------------------------------------------------------------


def test_text_does_not_become_a_dockerfile_instruction(attempt: Attempt, tmp_path: Path) -> None:
    platform = (Platform.parse("linux/amd64"),)
    site, directory = new_site(tmp_path / "project"), tmp_path / "directory"
    base = BuildSpec(tmp_path, tmp_path / "Dockerfile")
    empty = Definition(base=base, platforms=platform, directory=directory)
    lines = dockerfile(replace(empty, binds={"/x": "type=bind,from=a,target=/x"})).count("\n")

    def check(example: tuple[str, str, str]) -> None:
        target, value, path = example
        values: dict[str, str | list[str]] = {"MOUNTS": shlex.join([f"context:/{target}"])}
        try:
            loaded = load_settings(
                site.directory,
                site.directory,
                {},
                {**values, "BUILD_ARGS": [f"A={value}"], "IMAGE": IMAGE},
            )
            binds, contexts = write_mounts(loaded, directory)
        except GuixTasksError as error:
            check_printable_lines(getattr(error, "problems", [str(error)]))
            return
        base = BuildSpec(tmp_path / path, tmp_path / path / "Dockerfile", args=loaded.build_args)
        definition = replace(empty, base=base, binds=binds, contexts=contexts)
        assert dockerfile(definition).count("\n") == lines
        text = bake_file(definition)
        target_json = json.loads(text)["target"]["base"]
        expected = {"args": {"A": loaded.build_args["A"]}, "context": str(base.context)}
        for name, content in expected.items():
            assert unescape(target_json[name]) == content

    attempt("Dockerfiles", st.tuples(HOSTILE, HOSTILE, HOSTILE), check, 10, 2_500)


def unescape(value: Any) -> Any:
    """Evaluate a string without templates as bake does."""
    if isinstance(value, dict):
        return {name: unescape(item) for name, item in value.items()}
    literal = value.replace("$${", "").replace("%%{", "")
    assert "${" not in literal
    assert "%{" not in literal
    return value.replace("$${", "${").replace("%%{", "%{")


# --- Files ----------------------------------------------------------------------------------

KINDS = (
    tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
    tarfile.FIFOTYPE, tarfile.DIRTYPE,
)  # fmt: skip
MEMBERS = st.lists(
    st.tuples(
        HOSTILE | st.sampled_from(["index.json", "../out-of-it", "/no/such/place/x", "a/../../b"]),
        st.sampled_from(KINDS),
        st.sampled_from(["..", "../..", "/etc", "index.json", "a"]),
        st.binary(max_size=20) | st.just(gzip.compress(b"a line\n" * 50)) | JSON.map(str.encode),
        st.sampled_from([0, 0, 0, 1 << 40]),
    ),
    max_size=4,
)


def make_archive(members: list[tuple[str, bytes, str, bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, target, content, missing in members:
            member = tarfile.TarInfo(as_system_text(name) or "x")
            member.type, member.mode = kind, 0o6777
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname = target
            if kind == tarfile.REGTYPE:
                member.size = len(content)
                start = buffer.tell()
                tar.addfile(member, io.BytesIO(content))
                if missing:  # the header declares more bytes than follow
                    member.size += missing
                    end = buffer.tell()
                    buffer.seek(start)
                    buffer.write(member.tobuf(tarfile.GNU_FORMAT)[:512])
                    buffer.seek(end)
            else:
                tar.addfile(member)
    return buffer.getvalue()


def paths_below(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def test_container_archive_writes_only_logs_to_out(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = new_site(tmp_path / "project")
    site.engine.make_image({}, {"/x": b""}, tag="work:1")
    container = site.engine.create(ContainerSpec("failed", "work:1", ("x",)))
    site_settings = site.settings()
    out = site.directory / "out"

    def check(example: tuple[list[Any], list[str]]) -> None:
        members, names = example
        archive = make_archive(members)
        monkeypatch.setattr(site.engine, "copy_out", lambda *_: iter([archive]))
        other_paths = paths_below(tmp_path) - paths_below(out)
        log = "".join(f"View build log at '/var/log/guix/drvs/{name}'.\n" for name in names).encode(
            errors="replace"
        )
        directory = save_diagnostics(
            site.engine, site_settings, Failure("install", container, b"x", io.BytesIO(log))
        )
        assert directory
        assert directory.parent == out / "failed"
        files = paths_below(directory)
        assert all(stat.S_ISREG(path.lstat().st_mode) for path in files), files
        assert {path.name for path in files if path.suffix != ".gz"} <= {
            "command", "settings", "versions", "log",
        }  # fmt: skip
        assert paths_below(tmp_path) - paths_below(out) - {out} == other_paths - {out}
        for path in files:
            path.unlink()
        directory.rmdir()

    drv = st.builds("ab/{}-{}".format, st.just("c" * 30), HOSTILE | st.just("hello.drv.gz"))
    attempt(
        "archives of containers", st.tuples(MEMBERS, st.lists(drv, max_size=3)), check, 20, 2_000
    )


def test_engine_archive_writes_only_inside_its_directory(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = new_built_site(tmp_path / "project")
    image, reference = site.image(), ImageReference.parse(IMAGE)
    directory = tmp_path / "directory"
    directory.mkdir()

    def check(members: list[Any]) -> None:
        archive = make_archive(members)
        monkeypatch.setattr(site.engine, "save", lambda _image: iter([archive]))
        other_paths = paths_below(tmp_path)
        layout = directory / "work"
        layout.mkdir()
        try:
            context = save_as_layout(site.engine, image, reference, layout)
        except BuilderError as error:
            check_printable_lines([str(error)])
        else:
            assert context.startswith(f"oci-layout://{layout}/{image.id.replace(':', '-')}@")
        new_paths = paths_below(layout)
        assert paths_below(tmp_path) - new_paths - {layout} == other_paths
        for path in new_paths:
            # Path.resolve raises an error for circular links.
            assert Path(os.path.realpath(path)).is_relative_to(layout)
        subprocess.run(["rm", "-rf", str(layout)], check=True)

    attempt("archives of engines", MEMBERS, check, 8, 1_000)


def test_file_is_written_completely_or_not_at_all(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = st.text(st.sampled_from("ab $`'\";|&*?\\-é\n"), min_size=1, max_size=12)

    def check(example: tuple[str, bytes, bytes, str]) -> None:
        name, previous, current, fault = example
        path = tmp_path / f"x{name}"
        path.write_bytes(previous)
        with monkeypatch.context() as patch:
            if fault in {"touch", "replace"}:
                patch.setattr(Path, fault, fail_after_half)
            with contextlib.suppress(OSError):
                write_whole(path, interrupted(current) if fault == "content" else current)
        assert path.read_bytes() == (previous if fault else current)
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()

    def interrupted(content: bytes) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        raise OSError(28, "No space left on device")

    def fail_after_half(self: Path, *_: object) -> int:
        if not self.exists():
            with self.open("wb") as file:
                file.write(b"half")
        raise OSError(28, "No space left on device")

    faults = st.sampled_from(["", "content", "touch", "replace"])
    attempt("files", st.tuples(names, st.binary(), st.binary(), faults), check, 15, 1_500)
