"""Tab completion of tasks and options in real shells: bash, zsh and fish."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import ROOT, call

from guix_tasks import files
from guix_tasks.bootstrap.apt import Apt, host_suite
from guix_tasks.errors import EngineError

PROMPT = "READY:"
SECONDS = 20

PACKAGES = {"zsh": ("zsh", "zsh-common"), "fish": ("fish", "fish-common", "libpcre2-32-0")}


@pytest.fixture(scope="session")
def shells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of unpacked shells that are not installed on this machine."""
    roots = {}
    for name, packages in PACKAGES.items():
        suite = host_suite()
        if shutil.which(name) or not suite:
            continue
        root = files.cache_home() / "tests" / name
        if not root.exists():
            root.parent.mkdir(parents=True, exist_ok=True)
            try:
                Apt([suite]).unpack(packages, root)
            except EngineError as error:
                pytest.skip(f"{name} is neither installed nor available as a package: {error}")
        roots[name] = root
    return roots


@dataclass
class Terminal:
    """A shell in a pseudo-terminal."""

    process: int
    screen: int
    output: str = field(default="")

    def type(self, keys: str) -> None:
        self.output = ""
        os.write(self.screen, keys.encode())

    def wait_for(self, pattern: str) -> str:
        """Wait for a match in the output, and return the output without escape sequences."""
        end = time.monotonic() + SECONDS
        while True:
            plain = re.sub(
                r"\x1b(\[[0-9;?>=]*[A-Za-z]|[()][A-B0-2]|[=>])|[\r\x07\x0f]", "", self.output
            )
            if re.search(pattern, plain, re.MULTILINE):
                return plain
            ready, _, _ = select.select([self.screen], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} within {SECONDS} s: {plain!r}"
            self.output += os.read(self.screen, 1 << 16).decode(errors="replace")


def configure(shell: str, home: Path, root: Path | None) -> tuple[list[str], dict[str, str]]:
    """Give a shell a plain prompt, and return its command line and environment."""
    usr = (root or Path("/")) / "usr"
    script = f'"{ROOT}/inv" --print-completion-script={shell}'
    if shell == "bash":
        (home / "rc").write_text(
            f"PS1='{PROMPT}'\nbind 'set bell-style none'\nsource <({script})\n"
        )
        return ["bash", "--noprofile", "--rcfile", str(home / "rc"), "-i"], {}
    if shell == "zsh":
        modules = " ".join(map(str, (usr / "lib").glob("*/zsh/*")))
        functions = " ".join(str(path) for path in (usr / "share/zsh/functions").glob("**/"))
        (home / ".zshenv").write_text(
            f"module_path=({modules} $module_path)\nfpath=({functions} $fpath)\n" if root else ""
        )
        (home / ".zshrc").write_text(
            f"PS1='{PROMPT}'\nunsetopt PROMPT_SP\nautoload -Uz compinit; compinit -u\n"
            f"source <({script})\n"
        )
        program = shutil.which("zsh") or str((root or Path("/")) / "bin/zsh")
        return [program, "-i"], {"ZDOTDIR": str(home)}
    if root and not (usr / "etc").exists():
        (usr / "etc").symlink_to("../etc")
    (home / "fish").mkdir()
    (home / "fish/config.fish").write_text(
        f"function fish_prompt; echo -n {PROMPT}; end\nset -g fish_greeting\n{script} | source\n"
    )
    libraries = ":".join(map(str, (usr / "lib").glob("*-linux-*"))) if root else ""
    env = {"XDG_CONFIG_HOME": str(home), "LD_LIBRARY_PATH": libraries}
    return [str(usr / "bin/fish"), "-i"], env


@pytest.fixture(params=["bash", "zsh", "fish"])
def terminal(request: pytest.FixtureRequest, shells: dict[str, Path], tmp_path: Path) -> object:
    shell, root = request.param, shells.get(request.param)
    if root is None and not shutil.which(shell):
        pytest.skip(f"{shell} is neither installed nor in the packages of the distribution")
    argv, variables = configure(shell, tmp_path, root)
    env = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm", "LANG": "C.UTF-8",
        "COLUMNS": "80", **{name: value for name, value in variables.items() if value},
    }  # fmt: skip
    process, screen = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execvpe(argv[0], argv, env)  # noqa: S606
    try:
        yield Terminal(process, screen)
    finally:
        os.kill(process, signal.SIGHUP)
        os.close(screen)
        os.waitpid(process, 0)


def test_tab_completes_tasks_and_options(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("./inv rollb\t")
    terminal.wait_for("rollback ")
    terminal.type("buildx.st\t")
    terminal.wait_for(r"buildx\.status ")
    terminal.type("install --keep\t")
    terminal.wait_for("--keep-failed ")
    terminal.type("pack --\t\t")
    output = terminal.wait_for("--symlink")
    assert "--upstream" not in output
    assert "note" not in output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), {"base", "pull", "install", "push", "buildx.build", "init"}),
        (("pull", "--"), {"--force", "--upstream", "--update"}),
        (("pull", "push", "--st"), {"--stage"}),
        (("--",), {"--list", "--dry", "--echo"}),
    ],
)
def test_completions_are_the_same_from_each_program(
    words: tuple[str, ...], expected: set[str]
) -> None:
    """The output is quick and contains only names."""
    env = {"PATH": os.environ["PATH"], "IMAGE": "Not An Image"}
    inv, guix_tasks = [str(ROOT / "inv")], [sys.executable, "-m", "guix_tasks"]
    for program in (inv, guix_tasks, [sys.executable, "-m", "invoke"]):
        started = time.monotonic()
        result = call([*program, "--complete", "--", *words], env, 60, ROOT)
        assert time.monotonic() - started < 5
        assert (result.returncode, result.stderr) == (0, "")
        assert expected <= set(result.stdout.split())
        assert " " not in result.stdout
