"""Where the text of the settings comes from: env files, the environment, a task's options.

What the settings are is not known here: the sources are given a table of them.  Nothing that
is wrong stops the reading, so that all of it can be told at once.
"""

from __future__ import annotations

import difflib
import io
import re
import shlex
from collections import ChainMap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

# dotenv's own functions interpolate from os.environ and keep no line numbers.  So its two
# halves are used: the grammar of a file, and the grammar of ${NAME}.
from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

from guix_tasks.files import is_pipe, read_once
from guix_tasks.oci.reference import quoted
from guix_tasks.settings.parsers import check_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from guix_tasks.settings.parsers import Parser


@dataclass(frozen=True)
class Setting:
    """How a setting is read, what it does, in one line, and its default as in an env file."""

    parse: Parser
    doc: str
    default: str = ""
    group: str = ""  # the heading above it, on the first one of a group
    option: str = ""  # the task option that sets it, where that is not its own name
    secret: bool = False  # taken literally and never shown; NAME_FILE is in the table too


@dataclass(frozen=True)
class _Given:
    """A value as it was given: how to read it, the folder its paths start from, its place."""

    text: str = field(repr=False)
    parse: Parser
    base: Path
    origin: str


class Sources:
    """What the sources say, added from the weakest to the strongest, and what is wrong there."""

    def __init__(
        self, known: Mapping[str, Setting], environ: Mapping[str, str], project: Path
    ) -> None:
        self._known = known
        self._secrets = [name for name, setting in known.items() if setting.secret]
        self._environ = environ
        self._given = {
            name: self._as_given(name, setting.default, project, f"default: {name}")
            for name, setting in known.items()
        }
        self.problems: list[str] = []
        self.notes: list[str] = []
        # What ${NAME} can stand for.  The environment wins here too; secrets take no part.
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
        asked_by: str = "",
    ) -> None:
        """Add an env file, ``label`` in messages.  It may be missing where it is ``optional``.

        Relative paths in it start from ``base``, by default the file's own directory.  An error
        about the file itself begins with ``asked_by``: what named the file.
        """
        text = self._read(path, label, asked_by, optional=optional)
        layer: dict[str, _Given] = {}
        first: dict[str, int] = {}
        for line, binding in _bindings(text):
            where, key, value = f"{label}:{line}", binding.key, binding.value
            # What is no known name is not repeated: it may be the second line of a password.
            name = f"{key}: " if key in self._known else ""
            if binding.error:
                self.problems.append(
                    f"{where}: not NAME=VALUE; close each quote, and put quotes around the whole"
                    " of a value that begins with one"
                )
            elif key is None:
                continue  # a comment
            elif value is None:
                self.problems.append(
                    f"{where}: {name}has no '='; write {key if name else 'NAME'}=VALUE"
                )
            elif key in first:
                self.problems.append(f"{where}: {name}is set on line {first[key]} too; keep one")
            else:
                first[key] = line
                self._add_value(layer, key, value, base or path.parent, where)
        self._add_layer(layer)

    def add_environ(self, cwd: Path) -> None:
        """Add the process's environment, where an empty value counts as not set."""
        layer = {
            name: self._as_given(name, self._environ.get(name, ""), cwd, f"environment: {name}")
            for name in self._known
        }
        self._add_layer({name: given for name, given in layer.items() if given.text})

    def add_overrides(self, overrides: Mapping[str, str | Sequence[str]], cwd: Path) -> None:
        """Add a task's options, where an empty value counts as not given."""
        layer = {}
        for name, value in overrides.items():
            setting = self._known.get(name)
            option = (setting and setting.option) or name.lower().replace("_", "-")
            if setting is None:
                self.problems.append(f"option --{option}: is not a setting; see .env.example")
            elif value:
                text = value if isinstance(value, str) else shlex.join(value)
                layer[name] = self._as_given(name, text, cwd, f"option --{option}")
        self._add_layer(layer)

    def values(self) -> dict[str, Any]:
        """What the strongest source says of each setting; ``None`` where that is wrong."""
        return {name: self._value(name) for name in self._known}

    def is_set(self, name: str) -> bool:
        return bool(self._given[name].text)

    def written(self) -> dict[str, str]:
        """What the strongest source says of each setting, as text."""
        return {name: given.text for name, given in self._given.items()}

    def origins(self) -> dict[str, str]:
        """How an error about each setting begins: ``.env:3: IMAGE``, ``option --image``."""
        return {name: given.origin for name, given in self._given.items()}

    def refuse(self, name: str, *problems: str) -> None:
        self.problems += [f"{self._given[name].origin}: {problem}" for problem in problems]

    def _value(self, name: str) -> Any:
        given = self._given[name]
        try:
            check_text(given.text)
            return given.parse(given.text, given.base)
        except ValueError as error:
            self.refuse(name, *error.args)
            return None

    def _as_given(self, name: str, text: str, base: Path, origin: str) -> _Given:
        # A space at an end is a slip of the pen, but in a password it may be meant.
        kept = text if name in self._secrets else text.strip()
        return _Given(kept, self._known[name].parse, base, origin)

    def _add_layer(self, layer: dict[str, _Given]) -> None:
        """Put a source above the earlier ones; in one source a secret has one place."""
        for name in self._secrets:
            itself, file = layer.get(name), layer.pop(f"{name}_FILE", None)
            if itself and itself.text and file and file.text:
                self.problems.append(f"{file.origin}: {name} is set too; keep one of the two")
            elif file and (file.text or not itself):
                layer[name] = file
        self._given.update(layer)

    def _read(self, path: Path, label: str, asked_by: str, *, optional: bool) -> str:
        """The text of an env file; empty, with the problem noted, where it cannot be had."""
        try:
            content = read_once(path)
            if not content and is_pipe(path):
                self.notes.append(
                    f"{asked_by}{label}: nothing was written to this pipe, so it sets nothing"
                )
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            self.problems.append(f"{label}:{line}: is not UTF-8; save the file as UTF-8")
        except (OSError, ValueError) as error:  # ValueError: no file can have that name
            if not (optional and isinstance(error, FileNotFoundError)):
                reason = getattr(error, "strerror", None) or "not a file's name"
                self.problems.append(f"{asked_by}{label}: {reason}; name a file that can be read")
        return ""

    def _add_value(
        self, layer: dict[str, _Given], key: str, value: str, base: Path, where: str
    ) -> None:
        if key in self._known:
            origin = f"{where}: {key}"
            text = value if key in self._secrets else self._interpolate(value, origin)
            layer[key] = self._as_given(key, text, base, origin)
        else:
            self._add_unknown(key, where)
            text = self._interpolate(value, where)
        if key not in self._secrets:
            self._written[key] = text

    def _add_unknown(self, key: str, where: str) -> None:
        """A key that is nobody's: a mistake if it is near to a setting, else worth a note."""
        near = self._nearest(key)
        if key == "ENV_FILE":
            self.problems.append(
                f"{where}: ENV_FILE: names no file here; set it in the environment"
            )
        elif near:
            self.problems.append(f"{where}: {quoted(key)} is not a setting; did you mean {near}?")
        elif re.fullmatch(r"[A-Z][A-Z0-9_]{,40}|[a-z][a-z0-9_]{,40}", key):
            self.notes.append(f"{where}: {key}: is not a setting of guix-tasks; ignored")
        else:
            self.notes.append(f"{where}: sets what is not a setting of guix-tasks; ignored")

    def _nearest(self, key: str) -> str | None:
        """The setting that was probably meant, or None."""
        name = key.upper()
        if f"GUIX_{name}" in self._known:
            return f"GUIX_{name}"
        return next(iter(difflib.get_close_matches(name, self._known, n=1, cutoff=0.8)), None)

    def _interpolate(self, value: str, origin: str) -> str:
        text = []
        for atom in parse_variables(value):
            if isinstance(atom, Variable):
                if atom.name in self._secrets:
                    self.problems.append(
                        f"{origin}: would show {atom.name}, a secret; write the text itself"
                    )
                elif atom.default is None and atom.name not in self._variables:
                    self.notes.append(
                        f"{origin}: {quoted(atom.name)} in ${{...}} is not set; taken as empty"
                    )
            text.append(atom.resolve(self._variables))
        return "".join(text)


def _bindings(text: str) -> Iterator[tuple[int, Binding]]:
    """What dotenv finds in a file, each with the line that it begins on."""
    # newline=None turns CRLF into one newline; dotenv counts two after a malformed line.
    for binding in parse_stream(io.StringIO(text, newline=None)):
        # dotenv counts from the blank lines above.
        written = binding.original.string
        blank = written[: len(written) - len(written.lstrip())]
        yield binding.original.line + blank.count("\n"), binding
