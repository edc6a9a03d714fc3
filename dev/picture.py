"""Write the picture of the README: a terminal in which a real image is built and changed.

Run ``python -m dev.picture`` after ``./inv demo``, whose engine, registry and channels it uses.
"""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from io import StringIO
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from dev import CHECKOUT
from guix_tasks.bootstrap.engine import private_engine

PICTURE = CHECKOUT / "docs" / "images" / "terminal.svg"
COLUMNS, ROWS = 88, 200

SESSION = (
    "cat .env",
    "inv base pull install verify push",
    "sed -i 's/hello/hello greet/' .env",
    "inv status",
    "inv install push",
    "inv run -- greet",
)
"""Commands that the picture shows, with all of their output."""

PROJECT = """\
IMAGE=localhost:5055/my-image
GUIX_PACKAGES=hello
"""

OFFLINE = """\
BASE_IMAGE=guix-tasks/debian-guix:sid
MOUNTS={out}:/offline:ro
NETWORK=none
GUIX_CHANNELS={out}/channels.scm
GUIX_SUBSTITUTE_URLS=file:///offline/substitutes
GUIX_SUBSTITUTE_KEYS={out}/substitutes.pub
"""
"""What makes the example work without a network; ``ENV_FILE`` names it, so it is not shown."""

THEME = TerminalTheme(
    (22, 27, 34),
    (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34), (88, 166, 255), (188, 140, 255),
     (57, 197, 207), (177, 186, 196)],
)  # fmt: skip

FORMAT = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, Menlo, Consolas, monospace }}
.{unique_id}-title {{ font: 16px system-ui, sans-serif }}
{styles}
</style>
<defs>{lines}
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""
"""Format of Rich's export, without its web fonts; the window is dark on light pages too."""


def main() -> None:
    """Run the session in a new project, and write the picture."""
    directory = Path(tempfile.gettempdir()) / "my-image"
    directory.mkdir()
    offline = directory.with_suffix(".env")
    # The path of the private engine's socket is that of a home.
    socket = directory.with_suffix(".sock")
    environment = {
        **os.environ,
        "DOCKER_HOST": f"unix://{socket}",
        "PATH": f"{CHECKOUT}:{os.environ['PATH']}",
        "ENV_FILE": str(offline),
        "TERM": "xterm-256color",
    }
    environment.pop("CI", None)
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    try:
        socket.symlink_to(private_engine().socket)
        offline.write_text(
            OFFLINE.format(out=CHECKOUT / "examples" / "offline" / "out"), encoding="utf-8"
        )
        subprocess.run(["inv", "init"], cwd=directory, env=environment, check=True)
        (directory / "channels.scm").unlink()
        (directory / ".env").write_text(PROJECT, encoding="utf-8")
        for command in SESSION:
            stream.feed(f"\x1b[1;32m$ \x1b[0;1m{command}\x1b[0m\r\n".encode())
            status = run(command, directory, environment, stream)
            if status:
                sys.exit(f"{command} failed with status {status}: {screen.display}")
            stream.feed(b"\r\n")
        subprocess.run(["inv", "clean"], cwd=directory, env=environment, check=True)
    finally:
        shutil.rmtree(directory)
        offline.unlink(missing_ok=True)
        socket.unlink()
    console = Console(record=True, width=COLUMNS, file=StringIO())
    for row in range(screen.cursor.y - 1):
        console.print(styled_line(screen, row), soft_wrap=True)
    svg = console.export_svg(title="", theme=THEME, code_format=FORMAT, unique_id="t")
    PICTURE.write_text(svg, encoding="utf-8")


def run(command: str, directory: Path, environment: dict[str, str], stream: pyte.ByteStream) -> int:
    """Run a command on a terminal, feed its output to ``stream``, and return its exit status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(
        ["sh", "-c", command], cwd=directory, env=environment,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        while data := os.read(ours, 65536):
            stream.feed(data)
    except OSError:  # Linux reports the end of the other side so.
        pass
    finally:
        os.close(ours)
    return process.wait()


def styled_line(screen: pyte.Screen, row: int) -> Text:
    """Return a line of the screen with its colours, without the blanks at its end."""
    cells = [screen.buffer[row][column] for column in range(len(screen.display[row].rstrip()))]
    line = Text()
    names = {"default": None, "brown": "yellow"}
    for (name, bold), run in groupby(cells, lambda cell: (cell.fg, cell.bold)):
        style = Style(color=names.get(name, name), bold=bold)
        line.append("".join(cell.data for cell in run), style)
    return line


if __name__ == "__main__":
    main()
