"""Search paths: the environment variables with which programs find files of a profile."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from guix_tasks.guix.commands import LIST_INSTALLED, PROFILE

if TYPE_CHECKING:
    from collections.abc import Sequence

REPORT_PROFILE = ("sh", "-c", f"{shlex.join(LIST_INSTALLED)} && cat {PROFILE}/etc/profile")
"""Command that prints the installed packages and the definitions of the profile's search paths.

``guix package --search-paths`` prints ``/root/.guix-profile``, which only root can read.
"""

_ROOT = r"\$\{GUIX_PROFILE:-[^}\"\n]*\}"
_DEFINITION = re.compile(
    rf'^export ([A-Za-z_]\w*)="((?:{_ROOT}|[^$`"\\\n])+)(?:\$\{{\1:\+([^$`"\\\n}}]+)\}}\$\1)?"$',
    re.MULTILINE | re.ASCII,
)
"""Name, value and separator of a line of ``etc/profile`` (``build-etc/profile`` of Guix).

A variable that holds one path has no separator and no suffix.
"""


def search_paths(report: str, profile: str = PROFILE) -> str:
    """Return the definitions of search paths in a report of ``REPORT_PROFILE``, sorted by name.

    They refer to the link ``profile``, so they stay valid if packages are installed later. ``PATH``
    is not one of them, because the base image sets it.
    """
    definitions = {match[1]: match[0] for match in _DEFINITION.finditer(report)}
    definitions.pop("PATH", None)
    return re.sub(_ROOT, profile, "\n".join(definitions[name] for name in sorted(definitions)))


def with_search_paths(environment: Sequence[str], definitions: str) -> list[str]:
    """Return an image's environment with the variables of ``search_paths``.

    The paths of the profile come before those that the image sets. A variable that holds one path
    keeps the value that the image sets.
    """
    lines = {line.partition("=")[0]: line for line in environment}
    for name, value, separator in _DEFINITION.findall(definitions):
        current = lines.get(name, "").partition("=")[2]
        if not current:
            lines[name] = f"{name}={value}"
        elif separator:
            # The base image can have the same paths, if it is an install image itself.
            paths = f"{value}{separator}{current}".split(separator)
            lines[name] = f"{name}={separator.join(dict.fromkeys(paths))}"
    return list(lines.values())
