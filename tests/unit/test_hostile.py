"""Nothing gets in: whatever settings, arguments, images and archives say is data, and stays so.

Each test tries many texts of those that have hurt other programs: words of shells, of file
systems, of terminals, of Dockerfiles and of Scheme.
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
from fake_engine import IMAGE, Heard, Site, made_site, new_site, serial
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

# --- What is tried --------------------------------------------------------------------------

CANARY = "canary"
"""A file that is made where a shell gets to read what it is not to."""

PIECES = (
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

HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)


def of_system(text: str) -> str:
    """What the system can hand to a program: no NUL, and any bytes as Python has them."""
    raw = text.replace("\0", "").encode("utf-8", "surrogatepass")
    return raw.decode("utf-8", "surrogateescape")


WORD = HOSTILE.map(of_system)
"""An argument, or the value of a variable."""

INSIDE = WORD.map(lambda text: text.replace("..", "").replace("/", ""))
"""A name that leads nowhere else: some tests write there, perhaps as root."""

NAMES = [*settings_module.DECLARATIONS]
PROXIES = ("http_proxy", "https_proxy", "NO_PROXY")

LIKELY = st.sampled_from(
    [
        "a/b:c", "localhost:5000/x", "hello git@1:out", "linux/arm64 linux/386", "yes",
        "privileged", "4g", "90m", "1", "none", "a=b c=d", ".:/x:ro", "remote", "oci", "type=gha",
        "tcp://h:1,cacert=x", "https://a.test b", "file:///x", "provenance sbom", "0" * 64, "x.pub",
        "channels.scm", "Dockerfile",
    ]
)  # fmt: skip
VALUES = HOSTILE | LIKELY | st.builds("{}{}".format, LIKELY, HOSTILE)


@st.composite
def env_files(draw: st.DrawFn) -> bytes:
    """Lines of settings, some of them right, or anything at all."""
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
    st.sampled_from([*NAMES, *PROXIES, "ENV_FILE", "HOME"]), VALUES.map(of_system), max_size=4
)


@pytest.fixture(scope="module")
def tally(soak: Soak) -> Iterator[Counter[str]]:
    """How many of each kind were tried."""
    tried: Counter[str] = Counter()
    yield tried
    numbers = ", ".join(f"{count} {what}" for what, count in tried.items())
    soak.tell(
        "nothing gets in", f"{numbers}; {tried.total()} in all: no traceback, no shell, no canary"
    )


@pytest.fixture
def attempt(soak: Soak, tally: Counter[str]) -> Attempt:
    return Attempt(soak, tally)


class Attempt:
    """Tries a check with many values of a kind."""

    def __init__(self, soak: Soak, tally: Counter[str]) -> None:
        self._soak = soak
        self._tally = tally

    def __call__(
        self,
        what: str,
        values: st.SearchStrategy[V],
        check: Callable[[V], None],
        short: int,
        long: int,
    ) -> None:
        def counted(value: V) -> None:
            self._tally[what] += 1
            check(value)

        wanted = settings(
            max_examples=self._soak.times(short, long),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        seed(self._soak.seed)(wanted(given(values)(counted)))()


@pytest.fixture(autouse=True)
def _no_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing here may start a shell on text; and nobody's files are those of this machine."""
    start = subprocess.Popen.__init__

    def checked(self: Any, args: Any, *more: Any, **options: Any) -> None:
        words = [args] if isinstance(args, (str, bytes)) else [os.fspath(each) for each in args]
        assert not options.get("shell"), words
        if Path(os.fsdecode(words[0])).name in ("sh", "dash", "bash"):
            assert "-c" not in words, words
        start(self, args, *more, **options)

    def system(command: object) -> int:
        raise AssertionError(command)

    monkeypatch.setattr(subprocess.Popen, "__init__", checked)
    monkeypatch.setattr(os, "system", system)
    monkeypatch.setattr(files_module, "ThreadPoolExecutor", serial)
    for name in (*NAMES, "ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(discovery, "DEFAULT_SOCKET", tmp_path / "no.sock")
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    yield
    session._engines.clear()
    assert not list(tmp_path.rglob(CANARY))


def is_line(text: str) -> bool:
    """Whether a terminal shows it as one line, and does nothing else."""
    return text.isprintable()


def only_lines(texts: Iterable[str]) -> None:
    assert texts
    wrong = [text for text in texts if not is_line(text)]
    assert not wrong


# --- Settings -------------------------------------------------------------------------------


def test_any_env_file_and_any_environment(attempt: Attempt, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("channels.scm", "Dockerfile", "x.pub"):
        (project / name).write_text("x\n")

    def check(given: tuple[bytes, dict[str, str]]) -> None:
        (project / ".env").write_bytes(given[0])
        started = time.monotonic()
        try:
            found = load_settings(project, project, given[1])
        except SettingsError as error:
            only_lines(error.problems)
        else:
            assert all(map(is_line, found.notes)), found.notes
            paths = (
                found.dockerfile,
                found.build_context,
                found.guix_channels,
                found.output_directory,
            )
            assert all(path.is_absolute() for path in paths if path)
            assert found.output_directory == project / "out"
            common_files(found)
        assert time.monotonic() - started < 5

    attempt("env files", st.tuples(env_files(), ENVIRONMENTS), check, 40, 12_000)


def test_any_text_of_any_setting(attempt: Attempt, tmp_path: Path) -> None:
    def check(given: tuple[str, str | list[str]]) -> None:
        name, value = given
        try:
            found = load_settings(tmp_path, tmp_path, {}, {name: value})
        except SettingsError as error:
            only_lines(error.problems)
        else:
            assert all(map(is_line, (*found.notes, str(found.image), str(found.base_image))))

    values = VALUES | st.lists(VALUES, max_size=3)
    attempt("values of settings", st.tuples(st.sampled_from(NAMES), values), check, 40, 10_000)


# --- What others say ------------------------------------------------------------------------

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


def test_any_labels_of_an_image(attempt: Attempt, tmp_path: Path) -> None:
    """Of an image that somebody made with the tag of a stage, sealed or not."""
    directory = tmp_path / "project"

    def check(given: tuple[str, dict[str, str], bool, str]) -> None:
        stage, labels, sealed, created = given
        site = made_site(directory)
        before = site.image(stage)
        if sealed:
            labels = {STAGE_LABEL: stage, **labels}
        config = {**before.config, "Labels": labels}
        if sealed:
            labels = {**labels, LAYERS_LABEL: seal(before.layers[:-1], 1, config)}
        config["Labels"] = labels
        fake = replace(before, id=f"sha256:{'e' * 64}", config=config, created=created)
        site.engine.all_images[fake.id] = fake
        site.engine.tags[site.ledger.tag(stage)] = site.engine.tags[IMAGE] = fake.id
        proven_stage(fake)
        given_packages(fake)
        assert all(isinstance(each, str) for pair in inputs_of(fake).items() for each in pair)
        project = site.project()
        project.console.table(["x"] * 7, status_rows(tag_statuses(project)))
        assert isinstance(project.console, Heard)
        assert all(map(is_line, project.console.text.splitlines()))
        with contextlib.suppress(GuixTasksError):
            site.push()

    times = st.sampled_from(["0000-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "", "2026-01-01"])
    values = st.tuples(
        st.sampled_from(["base", "pull", "install"]), LABELS, st.booleans(), times | HOSTILE
    )
    attempt("labels of images", values, check, 10, 2_500)


def test_what_is_printable_stays_as_it_is(attempt: Attempt) -> None:
    def check(text: str) -> None:
        assert is_line(printable(text))
        if is_line(text):
            assert printable(text) == text
        assert all(map(is_line, printable(text, "\n\t").replace("\t", " ").split("\n")))

    attempt("texts for a terminal", HOSTILE, check, 20, 4_000)


# --- Whole tasks ----------------------------------------------------------------------------

CODES = {0, 1, 2, 3, 4, 5, 6, 130}

PATHS = ("BUILD_CONTEXT", "GUIX_CHANNELS_LOCK")
"""Settings that a task would write to, or read whole, wherever they point."""

ARGUMENTS: st.SearchStrategy[list[str]] = st.one_of(
    st.sampled_from(
        [["base"], ["pull"], ["install"], ["status"], ["push"], ["clean"], ["commit"], ["rollback"],
         ["squash"], ["verify"], ["--dry", "install"], ["base", "pull", "install", "push"]]
    ),
    st.builds(lambda word: ["push", f"--stage={word}"], WORD),
    st.builds(lambda word: ["verify", "--stage", word], WORD),
    st.builds(lambda word: ["install", f"--package={word}"], WORD),
    st.builds(lambda words: ["--echo", "run", "--", *words], st.lists(WORD, max_size=3)),
    st.builds(lambda one, two: ["run", f"--stage={one}", "--", two], WORD, WORD),
    st.builds(lambda word: ["status", f"--plot=plots/{word}"], INSIDE),
    st.lists(WORD, max_size=3),
)  # fmt: skip


def run(
    site: Site, argv: list[str], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """``inv`` in this process, with streams such as a real one has: its code, and what it said."""
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


def test_any_task_with_any_arguments_and_settings(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "project"
    made_site(directory).write("tasks.py", "")
    (directory / "plots").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(directory)
    outside = sorted(tmp_path.iterdir())

    def check(given: tuple[list[str], dict[str, str], dict[str, str]]) -> None:
        argv, environ, paths = given
        site = made_site(directory)
        plain = {**site.env, "DOCKER_HOST": "unix:///fake.sock", "BUILDX_NODES": ""}
        code, out, err = run(site, argv, {**plain, **environ, **paths}, monkeypatch)
        assert code in CODES, (code, err)
        assert "Traceback" not in out + err
        errors = [line for line in err.split("\n") if line.startswith("error: ")]
        # With 1 it may be Invoke, which knows no such task or option.
        assert bool(errors) == (code != 0) or code == 1, (code, err)
        assert all(map(is_line, errors)), errors
        if code > 2:
            assert len(errors) == 1, errors
        assert not site.engine.all_containers
        # A shell that a stage starts in its container gets nothing of it, either.
        for spec in site.engine.specs:
            if "-c" in spec.command:
                assert CANARY not in spec.command[spec.command.index("-c") + 1]
        assert sorted(tmp_path.iterdir()) == outside

    free = [name for name in NAMES if name not in PATHS and not name.startswith("DOCKER_")]
    environs = st.dictionaries(st.sampled_from(free), VALUES.map(of_system), max_size=2)
    # A mount or a context of the whole machine would be read, as it was asked for.
    environs = environs.filter(lambda found: "/" not in found.get("MOUNTS", "").partition(":")[0])
    paths = st.dictionaries(st.sampled_from(PATHS), INSIDE.map("sub/{}".format), max_size=1)
    attempt("tasks", st.tuples(ARGUMENTS, environs, paths), check, 12, 4_000)


# --- Real shells ----------------------------------------------------------------------------

SHELLS = [shell for shell in ("/bin/dash", "/bin/bash") if Path(shell).exists()]

STUB = '#!/bin/sh\nexec 9>>"$SAID"\nflock 9\nprintf "%s\\0" "$#" "$@" >&9\n'
"""A program that tells which words it was given, one call after the other."""


def words_of(said: bytes) -> list[list[bytes]]:
    """The calls of the stub, each with its words."""
    parts, calls = said.split(b"\0")[:-1], []
    while parts:
        count = int(parts[0])
        calls.append(parts[1 : count + 1])
        parts = parts[count + 1 :]
    return calls


def shell(program: str, script: Path, directory: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [program, str(script)],
        cwd=directory,
        env={"PATH": f"{directory / 'bin'}:/usr/bin:/bin", "SAID": str(directory / "said")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=False,
    )


@pytest.fixture
def stubbed(tmp_path: Path) -> Path:
    """A directory with a ``guix`` that tells what it is given."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "guix"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("program", SHELLS)
def test_the_script_of_a_stage_hands_on_its_words(
    attempt: Attempt, stubbed: Path, program: str
) -> None:
    said, script = stubbed / "said", stubbed / "script"

    def check(given: tuple[list[list[str]], list[str], str]) -> None:
        commands, report, word = given
        calls = [["guix", *words] for words in commands]
        text = guix.script(calls, ["guix", *report], finish=shlex.join(["guix", "finish", word]))
        script.write_bytes(text.encode(errors="surrogateescape"))
        said.unlink(missing_ok=True)
        done = shell(program, script, stubbed)
        assert done.returncode == 0, (text, done.stderr)
        meant = [*commands, ["finish", word], report]
        wanted = [[os.fsencode(word) for word in words] for words in meant]
        # The last two run at the same time.
        got = words_of(said.read_bytes())
        assert got[: len(commands)] == wanted[: len(commands)]
        assert sorted(got) == sorted(wanted)
        assert not (stubbed / CANARY).exists()

    words = st.lists(WORD, min_size=1, max_size=4)
    attempt(
        f"scripts in {Path(program).name}",
        st.tuples(st.lists(words, min_size=1, max_size=3), words, WORD), check, 12, 1_200,
    )  # fmt: skip


@pytest.mark.parametrize("program", SHELLS)
def test_the_environment_of_a_stage_is_read_as_it_was_meant(
    attempt: Attempt, stubbed: Path, program: str
) -> None:
    site = new_site(stubbed / "project")
    found = site.settings()
    said, script = stubbed / "said", stubbed / "script"

    def check(given: dict[str, str]) -> None:
        # As settings are made of the process's environment.
        own = replace(found, proxies=MappingProxyType({k: v for k, v in given.items() if v}))
        meant = environment(own)
        (stubbed / "environment").write_bytes(common_files(own)["environment"])
        names = " ".join(f'"${name}"' for name in meant)
        script.write_text(f"set -a; . ./environment; set +a\nguix {names}\n")
        said.unlink(missing_ok=True)
        done = shell(program, script, stubbed)
        assert done.returncode == 0, done.stderr
        assert words_of(said.read_bytes()) == [[os.fsencode(value) for value in meant.values()]]
        assert not (stubbed / CANARY).exists()

    attempt(
        f"environments in {Path(program).name}",
        st.dictionaries(st.sampled_from(PROXIES), WORD, max_size=3), check, 12, 1_000,
    )  # fmt: skip


@pytest.mark.parametrize("program", SHELLS)
def test_what_is_shown_as_a_command_can_be_pasted(
    attempt: Attempt, stubbed: Path, program: str
) -> None:
    said, script = stubbed / "said", stubbed / "script"

    def check(words: list[str]) -> None:
        console = Heard()
        console.command(["guix", *words])
        script.write_bytes(console.text.removeprefix("+ ").encode())
        said.unlink(missing_ok=True)
        shell(program, script, stubbed)
        assert not (stubbed / CANARY).exists()
        if program.endswith("bash") or all(map(is_line, words)):
            assert words_of(said.read_bytes()) == [[os.fsencode(word) for word in words]]

    attempt(f"shown commands in {Path(program).name}", st.lists(WORD), check, 15, 800)


# --- Dockerfiles and bake files -------------------------------------------------------------


def test_no_text_becomes_an_instruction_of_a_dockerfile(attempt: Attempt, tmp_path: Path) -> None:
    platform = (Platform.parse("linux/amd64"),)
    site, directory = new_site(tmp_path / "project"), tmp_path / "directory"
    base = BuildSpec(tmp_path, tmp_path / "Dockerfile")
    plain = Definition(base=base, platforms=platform, directory=directory)
    lines = dockerfile(replace(plain, binds={"/x": "type=bind,from=a,target=/x"})).count("\n")

    def check(given: tuple[str, str, str]) -> None:
        target, value, path = given
        values: dict[str, str | list[str]] = {"MOUNTS": shlex.join([f"context:/{target}"])}
        try:
            own = load_settings(
                site.directory,
                site.directory,
                {},
                {**values, "BUILD_ARGS": [f"A={value}"], "IMAGE": IMAGE},
            )
            binds, contexts = write_mounts(own, directory)
        except GuixTasksError as error:
            only_lines(getattr(error, "problems", [str(error)]))
            return
        base = BuildSpec(tmp_path / path, tmp_path / path / "Dockerfile", args=own.build_args)
        definition = replace(plain, base=base, binds=binds, contexts=contexts)
        assert dockerfile(definition).count("\n") == lines
        text = bake_file(definition)
        target_of = json.loads(text)["target"]["base"]
        meant = {"args": {"A": own.build_args["A"]}, "context": str(base.context)}
        for name, each in meant.items():
            assert unescaped(target_of[name]) == each

    attempt("Dockerfiles", st.tuples(HOSTILE, HOSTILE, HOSTILE), check, 10, 2_500)


def unescaped(value: Any) -> Any:
    """What bake makes of a string that has no template left in it."""
    if isinstance(value, dict):
        return {name: unescaped(each) for name, each in value.items()}
    rest = value.replace("$${", "").replace("%%{", "")
    assert "${" not in rest
    assert "%{" not in rest
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


def archived(members: list[tuple[str, bytes, str, bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, target, content, more in members:
            member = tarfile.TarInfo(of_system(name) or "x")
            member.type, member.mode = kind, 0o6777
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname = target
            if kind == tarfile.REGTYPE:
                member.size = len(content)
                start = buffer.tell()
                tar.addfile(member, io.BytesIO(content))
                if more:  # a header that promises what does not come
                    member.size += more
                    end = buffer.tell()
                    buffer.seek(start)
                    buffer.write(member.tobuf(tarfile.GNU_FORMAT)[:512])
                    buffer.seek(end)
            else:
                tar.addfile(member)
    return buffer.getvalue()


def everything_below(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def test_an_archive_of_a_container_writes_nothing_but_logs_in_out(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = new_site(tmp_path / "project")
    site.engine.make_image({}, {"/x": b""}, tag="work:1")
    container = site.engine.create(ContainerSpec("failed", "work:1", ("x",)))
    found = site.settings()
    out = site.directory / "out"

    def check(given: tuple[list[Any], list[str]]) -> None:
        members, names = given
        archive = archived(members)
        monkeypatch.setattr(site.engine, "copy_out", lambda *_: iter([archive]))
        before = everything_below(tmp_path) - everything_below(out)
        log = "".join(f"View build log at '/var/log/guix/drvs/{name}'.\n" for name in names).encode(
            errors="replace"
        )
        kept = save_diagnostics(
            site.engine, found, Failure("install", container, b"x", io.BytesIO(log))
        )
        assert kept
        assert kept.parent == out / "failed"
        files = everything_below(kept)
        assert all(stat.S_ISREG(path.lstat().st_mode) for path in files), files
        assert {path.name for path in files if path.suffix != ".gz"} <= {
            "command", "settings", "versions", "log",
        }  # fmt: skip
        assert everything_below(tmp_path) - everything_below(out) - {out} == before - {out}
        for path in files:
            path.unlink()
        kept.rmdir()

    drv = st.builds("ab/{}-{}".format, st.just("c" * 30), HOSTILE | st.just("hello.drv.gz"))
    attempt(
        "archives of containers", st.tuples(MEMBERS, st.lists(drv, max_size=3)), check, 20, 2_000
    )


def test_an_archive_of_an_engine_writes_nothing_beside_its_folder(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = made_site(tmp_path / "project")
    image, reference = site.image(), ImageReference.parse(IMAGE)
    directory = tmp_path / "directory"
    directory.mkdir()

    def check(members: list[Any]) -> None:
        archive = archived(members)
        monkeypatch.setattr(site.engine, "save", lambda _image: iter([archive]))
        before = everything_below(tmp_path)
        place = directory / "work"
        place.mkdir()
        try:
            answer = save_as_layout(site.engine, image, reference, place)
        except BuilderError as error:
            only_lines([str(error)])
        else:
            assert answer.startswith(f"oci-layout://{place}/{image.id.replace(':', '-')}@")
        inside = everything_below(place)
        assert everything_below(tmp_path) - inside - {place} == before
        for path in inside:
            # Not Path.resolve, to which links in a circle are an error.
            assert Path(os.path.realpath(path)).is_relative_to(place)
        subprocess.run(["rm", "-rf", str(place)], check=True)

    attempt("archives of engines", MEMBERS, check, 8, 1_000)


def test_a_file_is_written_whole_or_not_at_all(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = st.text(st.sampled_from("ab $`'\";|&*?\\-é\n"), min_size=1, max_size=12)

    def check(given: tuple[str, bytes, bytes, str]) -> None:
        name, old, new, fault = given
        path = tmp_path / f"x{name}"
        path.write_bytes(old)
        with monkeypatch.context() as patch:
            if fault in {"touch", "replace"}:
                patch.setattr(Path, fault, broken)
            with contextlib.suppress(OSError):
                write_whole(path, half(new) if fault == "content" else new)
        assert path.read_bytes() == (old if fault else new)
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()

    def half(content: bytes) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        raise OSError(28, "No space left on device")

    def broken(self: Path, *_: object) -> int:
        if not self.exists():
            with self.open("wb") as file:
                file.write(b"half")
        raise OSError(28, "No space left on device")

    faults = st.sampled_from(["", "content", "touch", "replace"])
    attempt("files", st.tuples(names, st.binary(), st.binary(), faults), check, 15, 1_500)
