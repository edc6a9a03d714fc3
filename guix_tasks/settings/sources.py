"""Sources of the text of settings: env files, the environment and task options.

The caller passes the declarations. Problems are collected, so that one error reports all.
"""

from __future__ import annotations

import difflib
import io
import re
import shlex
from collections import ChainMap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

# The public functions of dotenv interpolate from os.environ and drop line numbers, so this module
# uses its two parsers: that of env files and that of ${NAME}.
from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

from guix_tasks.files import is_pipe, read_once
from guix_tasks.oci.reference import quoted
from guix_tasks.settings.parsers import check_text
from guix_tasks.ui import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from guix_tasks.settings.parsers import Parser


@dataclass(frozen=True)
class Setting:
    """Declaration of a setting."""

    parse: Parser
    doc: str
    """Description, one line."""
    example: str
    """Value as written in an env file."""
    used_by: str = "all"
    """Stages and tasks that use the setting; a stage in bold is stale after a change."""
    default: str = ""
    """Default as written in an env file."""
    section: str = ""
    """Heading above the setting, for the first setting of a section."""
    kind: str = ""
    """Kind of value in the documentation, unless named after the type of the field."""
    option: str = ""
    """Task option that sets it, unless named after the setting."""
    secret: bool = False
    """True if the value is not expanded and never shown; there is then also NAME_FILE."""
    confidential: bool = False
    """True if diagnostics leave out the value."""
    secrets: Callable[[str, Any], Iterable[str]] = lambda text, _value: redact.secrets_in(text)
    """Function that returns texts to redact, from the unparsed text and the value, if valid."""


@dataclass(frozen=True)
class RawValue:
    """Unparsed value of a setting."""

    text: str = field(repr=False)
    parse: Parser
    base: Path
    """Directory from which relative paths start."""
    origin: str
    """Start of an error about the value, for example ``.env:3: IMAGE``."""


class Sources:
    """Unparsed settings of all sources, added in increasing precedence, and their problems."""

    def __init__(
        self, known: Mapping[str, Setting], environ: Mapping[str, str], project: Path
    ) -> None:
        self._known = known
        self._secrets = [name for name, setting in known.items() if setting.secret]
        self._environ = environ
        self.raw = {
            name: self._raw_value(name, setting.default, project, f"default: {name}")
            for name, setting in known.items()
        }
        """Values of all settings, of the source with the highest precedence."""
        self.problems: list[str] = []
        self.notes: list[str] = []
        # Values of ${NAME}. The environment has precedence, and secrets are excluded.
        self._written: dict[str, str] = {}
        outer = {k: text for k, text in environ.items() if text and k not in self._secrets}
        self._variables = ChainMap(outer, self._written)

    def add_file(
        self,
        path: Path,
        label: str,
        *,
        base: Path | None = None,
        optional: bool = False,
        referrer: str = "",
    ) -> None:
        """Add an env file, which messages call ``label``.

        A missing file is an error unless it is ``optional``. Relative paths in the file start from
        ``base``, by default its directory. ``referrer`` is the start of an error about the file
        itself: the variable that refers to it.
        """
        text = self._read(path, label, referrer, optional=optional)
        layer: dict[str, RawValue] = {}
        lines: dict[str, int] = {}
        for line, binding in _bindings(text):
            location, key, value = f"{label}:{line}", binding.key, binding.value
            # An unknown name is not repeated, because it can be the second line of a password.
            name = f"{key}: " if key in self._known else ""
            if binding.error:
                problem = (
                    "not NAME=VALUE; close each quote, and if a value begins with a quote, quote "
                    "all of it"
                )
            elif key is None:
                continue  # a comment
            elif value is None:
                problem = f"{name}has no '='; write {key if name else 'NAME'}=VALUE"
            elif key in lines:
                problem = f"{name}is also set on line {lines[key]}; keep one"
            else:
                lines[key] = line
                self._add_value(layer, key, value, base or path.parent, location)
                continue
            self.problems.append(f"{location}: {problem}")
        self._add_layer(layer)

    def add_environ(self, cwd: Path) -> None:
        """Add the process environment, in which an empty value counts as not set."""
        layer = {
            name: self._raw_value(name, self._environ.get(name, ""), cwd, f"environment: {name}")
            for name in self._known
        }
        self._add_layer({name: value for name, value in layer.items() if value.text})

    def add_overrides(self, overrides: Mapping[str, str | Sequence[str]], cwd: Path) -> None:
        """Add the options of a task, in which an empty value counts as not set."""
        layer = {}
        for name, value in overrides.items():
            if value:
                option = self._known[name].option or name.lower().replace("_", "-")
                text = value if isinstance(value, str) else shlex.join(value)
                layer[name] = self._raw_value(name, text, cwd, f"option --{option}")
        self._add_layer(layer)

    def values(self) -> dict[str, Any]:
        """Parse all settings; the value of an invalid setting is None."""
        return {name: self._parse(name) for name in self._known}

    def refuse(self, name: str, *problems: str) -> None:
        self.problems += [f"{self.raw[name].origin}: {problem}" for problem in problems]

    def _parse(self, name: str) -> Any:
        value = self.raw[name]
        try:
            check_text(value.text)
            return value.parse(value.text, value.base)
        except ValueError as error:
            self.refuse(name, *error.args)
            return None

    def _raw_value(self, name: str, text: str, base: Path, origin: str) -> RawValue:
        # White space at the ends is a typing mistake, but can be a part of a password.
        text = text if name in self._secrets else text.strip()
        return RawValue(text, self._known[name].parse, base, origin)

    def _add_layer(self, layer: dict[str, RawValue]) -> None:
        """Add a source above the earlier ones; a source sets either a secret or its file."""
        for name in self._secrets:
            literal, file = layer.get(name), layer.pop(f"{name}_FILE", None)
            if literal and literal.text and file and file.text:
                self.problems.append(f"{file.origin}: {name} is also set; keep one of the two")
            elif file and (file.text or not literal):
                layer[name] = file
        self.raw.update(layer)

    def _read(self, path: Path, label: str, referrer: str, *, optional: bool) -> str:
        """Return the text of an env file, or report the problem and return nothing."""
        try:
            content = read_once(path)
            if not content and is_pipe(path):
                self.notes.append(f"{referrer}{label}: this pipe is empty, so it sets nothing")
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            self.problems.append(f"{label}:{line}: is not UTF-8; save the file as UTF-8")
        except (OSError, ValueError) as error:  # ValueError: no file can have that name
            if not (optional and isinstance(error, FileNotFoundError)):
                reason = getattr(error, "strerror", None) or "not a file name"
                self.problems.append(f"{referrer}{label}: {reason}; set a readable file")
        return ""

    def _add_value(
        self, layer: dict[str, RawValue], key: str, value: str, base: Path, location: str
    ) -> None:
        if key in self._known:
            origin = f"{location}: {key}"
            text = value if key in self._secrets else self._interpolate(value, origin)
            layer[key] = self._raw_value(key, text, base, origin)
        else:
            self._report_unknown(key, location)
            text = self._interpolate(value, location)
        if key not in self._secrets:
            self._written[key] = text

    def _report_unknown(self, key: str, location: str) -> None:
        """Report an unknown key: as a problem if it resembles a setting of ours, else as a note.

        Other tools, such as docker compose, can read the same file.
        """
        name = key.upper()
        similar = difflib.get_close_matches(name, self._known, n=1, cutoff=0.8)
        if f"GUIX_{name}" in self._known:
            similar = [f"GUIX_{name}"]
        if key == "ENV_FILE":
            self.problems.append(
                f"{location}: ENV_FILE: has no effect in a file; set it in the environment"
            )
        elif similar:
            own = name.startswith(("GUIX_", "BUILDX_"))
            (self.problems if own else self.notes).append(
                f"{location}: {quoted(key)} is not a setting; did you mean {similar[0]}?"
            )
        elif re.fullmatch(r"[A-Z][A-Z0-9_]{,40}|[a-z][a-z0-9_]{,40}", key):
            self.notes.append(f"{location}: {key}: is not a setting of guix-tasks; ignored")
        else:
            self.notes.append(
                f"{location}: sets a name that is not a setting of guix-tasks; ignored"
            )

    def _interpolate(self, value: str, origin: str) -> str:
        text = []
        for atom in parse_variables(value):
            if isinstance(atom, Variable):
                if atom.name in self._secrets:
                    self.problems.append(
                        f"{origin}: would reveal the secret {atom.name}; write the text itself"
                    )
                elif atom.default is None and atom.name not in self._variables:
                    self.notes.append(
                        f"{origin}: {quoted(atom.name)} in ${{...}} is not set; using empty text"
                    )
            text.append(atom.resolve(self._variables))
        return "".join(text)


def _bindings(text: str) -> Iterator[tuple[int, Binding]]:
    """Parse an env file and yield each line number with its binding."""
    # newline=None converts CRLF to one newline; dotenv counts two after a malformed line.
    for binding in parse_stream(io.StringIO(text, newline=None)):
        # The text and line of a binding include the blank lines above it.
        original = binding.original.string
        blank = original[: len(original) - len(original.lstrip())]
        yield binding.original.line + blank.count("\n"), binding
