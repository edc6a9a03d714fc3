"""Commands of Guix, the script that runs them, and parsers of output and channels files."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from fake_engine import DETERMINISTIC
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks import guix
from guix_tasks.guix import Channel, Introduction

if TYPE_CHECKING:
    from pathlib import Path

# --- Argument lists -------------------------------------------------------------------------


def test_pull_command_has_an_optional_channels_file() -> None:
    assert guix.pull_argv("/c.scm") == ("guix", "pull", "--channels=/c.scm")
    assert guix.pull_argv(None) == ("guix", "pull")
    assert guix.pull_argv("") == ("guix", "pull")


def test_install_command_is_one_transaction() -> None:
    assert guix.install_argv("/m.scm", ["hello", "git:send-email"]) == (
        "guix",
        "package",
        "--manifest=/m.scm",
        "--install=hello",
        "--install=git:send-email",
    )
    assert guix.install_argv(None, ["hello"]) == ("guix", "package", "--install=hello")
    assert guix.install_argv("/m.scm", []) == ("guix", "package", "--manifest=/m.scm")


@pytest.mark.parametrize("name", ["--do-not-upgrade", "-r", "a b", "$(id)"])
def test_package_is_never_parsed_as_an_option(name: str) -> None:
    assert guix.install_argv(None, [name])[-1] == f"--install={name}"


def test_union_manifest_adds_to_the_profile() -> None:
    assert guix.union_manifest("/var/guix/guix-tasks/manifest.scm") == (
        "(use-modules (guix profiles))\n"
        f'(manifest-add (profile-manifest "{guix.PROFILE}")\n'
        '              (manifest-entries (primitive-load "/var/guix/guix-tasks/manifest.scm")))\n'
    )


# --- Logs -----------------------------------------------------------------------------------

WARNING = "guix substitute: warning: "


@pytest.mark.parametrize(
    "reason",
    [
        "connection failed: Connection refused",
        "connection failed: No route to host",
        "host not found: Name or service not known",
        "TLS connection failed: in 'handshake': The TLS connection was non-properly terminated.",
    ],
)
def test_unreachable_server_is_silent(reason: str) -> None:
    assert guix.silent_servers(f"\r\x1b[Ksubstitute: {WARNING}CI.test: {reason}\n") == {"ci.test"}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "connection failed: Connection refused",
        f"{WARNING}ACL for archive imports seems to be uninitialized",
        f"{WARNING}a.test: some substitutes are missing",
        "guix pull: warning: a.test: connection failed: Connection refused",
    ],
)
def test_other_warnings_name_no_silent_server(line: str) -> None:
    assert guix.silent_servers(line) == set()


def test_silent_servers_are_returned_once() -> None:
    hosts = ["a.test", "::1", "192.0.2.1", "a.test"]
    log = "".join(f"{WARNING}{host}: connection failed: x\n" for host in hosts)
    assert guix.silent_servers(log) == set(hosts)


@pytest.mark.parametrize(
    "line",
    [
        "guix pull: error: Git error: failed to resolve address for git.test: Name or service",
        "guix pull: error: Git error: unexpected http status code: 503",
        "guix pull: error: Git error: SSL error: received early EOF",
        "guix package: error: connect*: Connection timed out",
        "guix package: error: TLS error in procedure 'handshake': premature termination",
        "guix substitute: error: connecting to server 'a.test' failed",
        "some substitutes for x failed (usually happens due to networking issues); try `--f…'",
        "In procedure getaddrinfo: Temporary failure in name resolution",
        "In procedure connect: Network is unreachable",
    ],
)
def test_network_fault_is_recognised(line: str) -> None:
    assert guix.network_fault(f"Updating channel...\n{line}\nmore\n")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "guix package: error: kdeconnect: unknown package",
        "guix package: error: python-resolvelib: unknown package",
        "guix package: error: corrupt input while restoring archive",
        "guix pull: error: Git error: cannot locate remote-tracking branch 'origin/no'",
        "guix pull: error: Git error: object not found - no match for id (0123)",
        "guix pull: error: Git error: reference 'refs/remotes/origin/no' not found",
        "guix pull: error: Git error: failed to resolve path '/no': No such file or directory",
        "guix pull: error: Git error: repository path '/x' is not owned by current user",
        "guix pull: error: Git error: unsupported URL protocol",
        "guix pull: error: Git error: remote authentication required but no callback set",
        "guix pull: error: Git error: the server refused the credentials given for it",
        "guix pull: error: Git error: the SSL certificate is invalid",
        "guix pull: error: Git error: invalid or unknown remote ssh hostkey",
        "guix pull: error: Git error: unexpected http status code: 404",
        "guix pull: error: commit 0123 not signed by an authorized key",
        "  a test says: guix pull: error: connection timed out",
    ],
)
def test_other_fault_is_not_a_network_fault(line: str) -> None:
    assert not guix.network_fault(f"Updating channel...\n{line}\nmore\n")


@pytest.mark.parametrize(
    "line",
    [
        "builder for `/gnu/store/x-hello.drv' failed with exit code 1",
        "builder for '/gnu/store/x-hello.drv' failed with exit code 1",
        "guix package: error: build of `/gnu/store/x-hello.drv' failed",
        "build of /gnu/store/x-hello.drv failed",
    ],
)
def test_failed_build_is_not_a_network_fault(line: str) -> None:
    network = "In procedure connect: Connection refused"
    assert guix.build_fault(line)
    assert guix.network_fault(network)
    assert not guix.network_fault(f"{network}\n{line}\n")
    assert not guix.network_fault(f"{line}\n{network}\n")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("remote authentication required but no callback set", "GUIX_CHANNEL_CREDENTIALS"),
        ("the server refused the credentials given for it", "GUIX_CHANNEL_CREDENTIALS"),
        ("unexpected http status code: 403", "GUIX_CHANNEL_CREDENTIALS"),
        ("the SSL certificate is invalid", "EXTRA_CA_FILE"),
        ("invalid or unknown remote ssh hostkey", "SSH_KNOWN_HOSTS"),
        ("remote rejected authentication: Failed getting response", "`ssh-add`"),
        ("unexpected http status code: 404", ""),
        ("object not found - no match for id (0123)", ""),
    ],
)
def test_denied_access_has_a_hint(line: str, hint: str) -> None:
    message = guix.fetch_hint(f"Updating\nguix pull: error: Git error: {line}\n")
    assert hint in message
    assert bool(hint) == bool(message)
    assert guix.fetch_hint(f"a package says: {line}") == ""


def test_build_without_a_network_has_a_hint() -> None:
    log = "|   `/dev/net/tun' is missing, network access disabled\n"
    assert "slirp4netns in the base image" in guix.fetch_hint(log)


def test_lock_older_than_the_profile_has_a_hint() -> None:
    log = "guix package: error: unsupported manifest format\n"
    assert "`inv pull --update`, or use an older BASE_IMAGE" in guix.fetch_hint(log)


LOGS = [f"/var/log/guix/drvs/{at}/{'c' * 30}-a+b_1.0.drv{end}" for at, end in
        [("ab", ".gz"), ("0z", ".bz2"), ("zz", "")]]  # fmt: skip


def test_build_logs_are_returned_once_in_order() -> None:
    text = "".join(f"View build log at '{path}'.\n" for path in [*LOGS, LOGS[0]])
    assert guix.build_logs(text) == LOGS


@pytest.mark.parametrize(
    "path",
    [
        "/var/log/guix/drvs/../../../etc/shadow",
        "/var/log/guix/drvs/ab",
        f"{LOGS[0]}/../../x",
        f"{LOGS[0]}\nx",
        f"/etc{LOGS[0]}",
        f"{LOGS[0]} x",
        LOGS[0].replace("/ab/", "/../"),
    ],
)
def test_other_paths_are_not_build_logs(path: str) -> None:
    assert guix.build_logs(f"View build log at '{path}'.\n") == []


# --- Channels -------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INTRODUCTION = """(introduction
          (make-channel-introduction
            "9edb3f66fd807b096b48283debdcddccfea34bad"
            (openpgp-fingerprint
              "BBB0 2DDF 2CEA F6A8 0D1D  E643 A2A0 6DF2 A33A 54FA")))"""

INTRODUCED = Introduction(
    "9edb3f66fd807b096b48283debdcddccfea34bad", "bbb02ddf2ceaf6a80d1de643a2a06df2a33a54fa"
)

DESCRIBED = f"""(list (channel
        (name 'guix)
        (url "https://git.guix.gnu.org/guix.git")
        (branch "master")
        (commit
          "{COMMIT}")
        {INTRODUCTION})
      (channel
        (name 'nonguix)
        (url "https://gitlab.com/nonguix/nonguix")
        (commit
          "{COMMIT[::-1]}")))
"""


def test_output_of_guix_describe_is_parsed() -> None:
    assert guix.channels(DESCRIBED) == {
        "guix": Channel("guix", "https://git.guix.gnu.org/guix.git", "master", COMMIT, INTRODUCED),
        "nonguix": Channel("nonguix", "https://gitlab.com/nonguix/nonguix", None, COMMIT[::-1]),
    }
    assert guix.commits(DESCRIBED) == {"guix": COMMIT, "nonguix": COMMIT[::-1]}


LITERAL_CHANNELS = {
    "a quoted name": '(channel (name \'a) (url "u"))',
    "a string": '(channel (name "a") (url "u"))',
    "another order": '(channel (url "u") (name \'a))',
    "lines": '(channel\n\t(name \'a)\n  (url\n "u"))',
    "in a program": '(cons* (channel (name \'a) (url "u")) %default-channels)',
    "a comment": '; (channel (name \'b) (url "v"))\n(channel (name \'a) ; the first\n (url "u"))',
    "a datum comment": '(list (channel (name \'a) (url "u")) #;(channel\n (name \'b) (url "v")))',
    "a block comment": '#| (channel (name \'b) #| (url |# "v") |#(channel (name \'a) (url "u"))',
    "a character": '(list #\\( #\\; (channel (name \'a) (url "u")))',
}


@pytest.mark.parametrize("text", LITERAL_CHANNELS.values(), ids=LITERAL_CHANNELS)
def test_literal_channel_is_parsed(text: str) -> None:
    assert guix.channels(text) == {"a": Channel("a", "u")}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (INTRODUCTION, INTRODUCED),
        (INTRODUCTION.replace("BBB0 2DDF", "bbb02d\n df"), INTRODUCED),
        ("", None),
        ("(introduction #f)", None),
    ],
)
def test_introduction_is_commit_and_key(fields: str, expected: Introduction | None) -> None:
    (channel,) = guix.channels(f'(list (channel (name \'a) (url "u") {fields}))').values()
    assert (channel.introduction, channel.computed) == (expected, frozenset())


def test_guix_channel_has_the_built_in_introduction() -> None:
    text = '(list (channel (name \'guix) (url "https://git.guix.gnu.org/guix.git")))'
    assert guix.channels(text)["guix"].introduction == INTRODUCED
    assert guix.channels(text.replace("gnu.org", "x.test"))["guix"].introduction is None


@pytest.mark.parametrize(
    ("fields", "computed"),
    [
        ("(branch %branch)", {"branch"}),
        ('(commit (getenv "C"))', {"commit"}),
        ("(introduction %mine)", {"introduction"}),
        ('(introduction (make-channel-introduction "c" %key))', {"introduction"}),
        ("(inherit %other)", {"branch", "commit", "introduction"}),
        ('(inherit %other) (branch "b")', {"commit", "introduction"}),
    ],
)
def test_computed_field_is_unknown(fields: str, computed: set[str]) -> None:
    text = f'(list (channel (name \'a) (url "u") {fields}))'
    assert guix.channels(text)["a"].computed == computed
    assert not guix.is_literal(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DESCRIBED, None),
        ("", None),
        ('(a [b] #\\( #\\) "(\\"" ; (\n #| ( #| ( |# |# #;(b))', None),
        ("(list\n (a\n (b)", (2, "( is not closed")),
        ("(list (a)))", (1, "unexpected )")),
        ("\n(list (a])", (2, "unexpected ]")),
        ("(list\n [a)", (2, "unexpected )")),
        ('(a\n "b)', (2, "the string is not closed")),
        ("(a\n\n#| #| |#)", (3, "the comment is not closed")),
    ],
)
def test_syntax_error_has_a_line_number(text: str, expected: tuple[int, str] | None) -> None:
    assert guix.syntax_error(text) == expected


def test_semicolon_in_a_url_is_not_a_comment() -> None:
    text = '(channel (name \'a) (url "https://x/?a=1;b=2") (commit "c")) ; (branch "no")'
    assert guix.channels(text) == {"a": Channel("a", "https://x/?a=1;b=2", None, "c")}


COMPUTED_CHANNELS = {
    "nothing": "",
    "the default": "%default-channels",
    "a load": '(load "channels.scm")',
    "a computed address": '(channel (name \'a) (url (string-append "u" "v")))',
    "a computed name": '(channel (name (string->symbol "a")) (url "u"))',
    "inherited": '(channel (inherit %default-guix-channel) (url "u"))',
    "a map": '(map (lambda (c) (channel (inherit c) (url "u"))) %default-channels)',
}


@pytest.mark.parametrize("text", COMPUTED_CHANNELS.values(), ids=COMPUTED_CHANNELS)
def test_computed_channels_are_not_recognised(text: str) -> None:
    assert guix.channels(text) == {}


def test_computed_commit_is_omitted() -> None:
    text = '(channel (name \'a) (url "u") (commit (getenv "COMMIT")) (branch branch))'
    assert guix.channels(text)["a"].commit is None


def test_commit_after_the_introduction_is_parsed() -> None:
    text = f'(channel (name \'a) (url "u") {INTRODUCTION} (commit "{COMMIT}"))'
    assert guix.channels(text)["a"].commit == COMMIT


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ('(list (channel (name \'a) (url "u")))', True),
        ('(list\n ;; one\n (channel (name \'a) (url "u"))\n #;(channel)\n)\n', True),
        (DESCRIBED, True),
        ("", False),
        ("%default-channels", False),
        ('(cons (channel (name \'a) (url "u")) %default-channels)', False),
        ('(list (channel (name \'a) (url "u")) (my-channel))', False),
        ('(list (channel (inherit %default-guix-channel) (url "u")))', False),
        ('(use-modules (x)) (list (channel (name \'a) (url "u")))', False),
    ],
)
def test_literal_file_contains_only_literal_channels(text: str, *, literal: bool) -> None:
    assert guix.is_literal(text) == literal


OFFICIAL = '(channel (name \'guix) (url "https://git.guix.gnu.org/guix.git"))'


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (DESCRIBED, ["nonguix"]),
        (f'(channel (name \'a) (url "u") {INTRODUCTION})', []),
        ('(channel (name \'a) (url "u") (introduction #f))', ["a"]),
        ('(channel (name \'a) (url "u") (introduction mine))', []),
        ('(channel (name \'a) (url "u") #;(introduction mine))', ["a"]),
        ('(cons* (channel (name \'a) (url "u")) %default-channels)', ["a"]),
        ('(channel (inherit mine) (name \'a) (url "u"))', []),
        (OFFICIAL, []),
        (OFFICIAL.replace("https:", "http:"), ["guix"]),
        (OFFICIAL.replace("guix)", "other)"), ["other"]),
        ("%default-channels", []),
        ("", []),
    ],
)
def test_unauthenticated_channels_are_returned(text: str, names: list[str]) -> None:
    assert guix.unauthenticated(text) == names


NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
COMMITS = st.from_regex(r"[0-9a-f]{40}", fullmatch=True)


@DETERMINISTIC
@given(st.dictionaries(NAMES, COMMITS, max_size=4))
def test_every_channel_of_a_list_is_parsed(commits: dict[str, str]) -> None:
    forms = [
        f'(channel\n (name \'{name})\n (url "https://x/{name}")\n (commit "{commit}")\n'
        f" {INTRODUCTION})"
        for name, commit in commits.items()
    ]
    assert guix.commits(f"(list {' '.join(forms)})\n") == commits


# --- Packages -------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["\t", "a\t1", "\t\t\t", "a\t1\tout", "\x1b[2J"])
def test_malformed_row_of_a_report_is_ignored(line: str) -> None:
    row = "hello\t2.12\tout\t/gnu/store/a"
    assert "hello@2.12" in guix.installed(f"{line}\n{row}\n")


def test_installed_packages_are_sorted() -> None:
    report = (
        "hello        \t2.12.2\tout\t/gnu/store/aaa-hello-2.12.2\n"
        "git          \t2.46.0\tsend-email\t/gnu/store/bbb-git\n"
        "git          \t2.46.0\tout\t/gnu/store/ccc-git\n"
    )
    assert guix.installed(report) == ["git@2.46.0", "git@2.46.0:send-email", "hello@2.12.2"]
    assert guix.installed("") == []
    assert guix.installed("guile: warning: failed to install locale\n") == []


PLAIN_MANIFEST = """; tools
(specifications->manifest
  (list "hello" "guile@3.0:debug"))"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PLAIN_MANIFEST, True),
        ('(specifications->manifest \'("hello"))', True),
        ("(specifications->manifest names)", False),
        ('(specifications->manifest (list (getenv "NAME")))', False),
        (f'(load "/srv/packages.scm")\n{PLAIN_MANIFEST}', False),
        ("(packages->manifest (list hello))", False),
        ("", False),
    ],
)
def test_plain_manifest_contains_only_names(text: str, expected: bool) -> None:
    assert guix.is_plain_manifest(text) is expected


# --- Scripts --------------------------------------------------------------------------------

GUIX_STUB = """#!/bin/sh
# Records its arguments, each with a NUL after it, and an empty one at the end of the call.
case $1 in
repl) exit "${FINISH_STATUS:-0}" ;;
gc) exit 0 ;;
esac
printf '%s\\0' "$@" '' >>"$GUIX_STUB/calls"
case $1 in
fail) echo 'guix: error: no' >&2; exit 7 ;;
describe) echo "the report"; echo 'noise' >&2 ;;
*) echo "the log of $1" ;;
esac
"""


@dataclass
class Shell:
    """A directory with a ``guix`` that records its calls."""

    directory: Path

    def __post_init__(self) -> None:
        stub = self.directory / "guix"
        stub.write_text(GUIX_STUB)
        stub.chmod(0o755)

    def run(
        self, commands: list[list[str]], report: list[str], **environment: str
    ) -> subprocess.CompletedProcess[str]:
        (self.directory / "calls").unlink(missing_ok=True)
        text = guix.script(commands, report, finish="guix repl finish")
        return subprocess.run(
            ["sh", "-c", text],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "PATH": f"{self.directory}:{os.environ['PATH']}",
                "GUIX_STUB": str(self.directory),
                **environment,
            },
        )

    @property
    def calls(self) -> list[list[str]]:
        calls: list[list[str]] = [[]]
        for word in (self.directory / "calls").read_bytes().decode().split("\0")[:-1]:
            if word:
                calls[-1].append(word)
            else:
                calls.append([])
        return calls[:-1]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("guix"))


def test_standard_output_contains_only_the_report(shell: Shell) -> None:
    result = shell.run([["guix", "pull"]], ["guix", "describe"])
    assert result.stdout == "the report\n"
    assert "the log of pull" in result.stderr
    assert "noise" in result.stderr


def test_script_stops_at_the_first_failed_command(shell: Shell) -> None:
    result = shell.run([["guix", "one"], ["guix", "fail"], ["guix", "two"]], ["guix", "describe"])
    assert result.returncode == 7
    assert shell.calls == [["one"], ["fail"]]
    assert result.stdout == ""


def test_failed_report_fails_the_script(shell: Shell) -> None:
    result = shell.run([["guix", "one"]], ["guix", "fail"])
    assert result.returncode == 7


def test_failed_finish_fails_the_script(shell: Shell) -> None:
    result = shell.run([["guix", "one"]], ["guix", "describe"], FINISH_STATUS="3")
    assert result.returncode == 3


def test_pulled_guix_prints_the_report(shell: Shell, tmp_path: Path) -> None:
    """A shell caches the paths of programs, which a pull makes invalid."""
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    pull = first / "guix"
    pull.write_text(f"#!/bin/sh\nprintf '#!/bin/sh\\necho new\\n' >{second}/guix\n")
    pull.chmod(0o755)
    text = guix.script([["guix", "pull"], ["chmod", "755", f"{second}/guix"]], ["guix", "describe"])
    path = f"{second}:{first}:{os.environ['PATH']}"
    result = subprocess.run(
        ["sh", "-c", text], capture_output=True, text=True, check=False, env={"PATH": path}
    )
    assert result.stdout == "new\n", result.stderr


def test_script_is_valid_posix_shell(shell: Shell) -> None:
    text = guix.script([["true"]], ["true"], before=["true"], after=["true"], start="/")
    assert text.startswith("#!/bin/sh\n")
    assert text.endswith("\n")
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
