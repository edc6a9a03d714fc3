"""Generate the tables of tasks, settings and exit codes, and ``.env.example``, from the code.

``python -m docs.tables`` updates README.md, docs/reference/ and .env.example.  With ``--check`` it
only reports outdated files.  A unit test compares them with the code.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from enum import Enum, EnumMeta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from guix_tasks import errors
from guix_tasks.cli.tasks import grouped
from guix_tasks.settings import (
    Settings,
    example_text,
    settings_headings,
    settings_reference,
    values,
)
from guix_tasks.tasks import ns
from guix_tasks.ui.console import Display

if TYPE_CHECKING:
    from collections.abc import Iterable

    from invoke.parser import Argument

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "reference").glob("*.md"))]


class About(NamedTuple):
    """Documentation of a setting that is not in the code."""

    example: str
    concerns: str
    """Stages and tasks that use the setting; a stage in bold is stale after a change."""


_WORK = "pull, install"
_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_BUILDX = "`buildx.*`"

ABOUT = {
    "IMAGE": About("ghcr.io/me/app:1.0", "all"),
    "TAGS": About("1.0 stable", "`push`, `buildx.build`"),
    "PLATFORMS": About("linux/amd64 linux/arm64", "**base**, **pull**, **install**, `push`"),
    "BASE_IMAGE": About("debian:sid", "**base**"),
    "DOCKERFILE": About("docker/Dockerfile", "**base**"),
    "BUILD_CONTEXT": About(".", "**base**"),
    "BUILD_ARGS": About("JOBS=4 'NAME=two words'", "**base**"),
    "BUILD_SECRETS": About("token=token.txt", "base"),
    "GUIX_BINARY_URL": About("https://mirror.example/guix-binary.tar.xz", "**base**"),
    "GUIX_BINARY_SHA256": About(_SHA256, "**base**"),
    "GUIX_CHANNELS": About("channels.scm", "**pull**"),
    "GUIX_CHANNELS_LOCK": About("channels.lock.scm", "**pull**"),
    "GUIX_MANIFEST": About("manifest.scm", "**install**, `pack`"),
    "GUIX_PACKAGES": About("guile@3.0 git:send-email", "**install**, `pack`"),
    "GUIX_SUBSTITUTE_URLS": About("https://mirror.example https://bordeaux.guix.gnu.org", _WORK),
    "GUIX_SUBSTITUTE_KEYS": About("keys/mirror.pub", "**pull**, **install**"),
    "GUIX_FALLBACK": About("yes", _WORK),
    "GUIX_REQUIRE_SUBSTITUTES": About("yes", "install"),
    "SUBSTITUTES_LISTEN": About("0.0.0.0:8181", "`substitutes.up`"),
    "GUIX_SANDBOX": About("rootless", f"{_WORK}, `run`, `shell`, `verify`, `pack`"),
    "GUIX_CORES": About("2", _WORK),
    "GUIX_MAX_JOBS": About("1", _WORK),
    "EXTRA_CA_FILE": About("company-ca.pem", f"{_WORK}, `run`, `shell`, `buildx.build`, `doctor`"),
    "GUIX_CHANNEL_MIRRORS": About("https://git.guix.gnu.org/=https://mirror.example/", "pull"),
    "GUIX_CHANNEL_CREDENTIALS": About("https://me:TOKEN@git.example", "pull"),
    "GUIX_CHANNEL_CREDENTIALS_FILE": About("/run/secrets/channels", "pull"),
    "SSH_KNOWN_HOSTS": About("known_hosts", "pull"),
    "MOUNTS": About("substitutes:/srv/substitutes:ro", "**pull**, **install**, `run`, `shell`"),
    "NETWORK": About("none", f"base, {_WORK}, `run`, `shell`"),
    "STAGE_MEMORY": About("4g", _WORK),
    "STAGE_TIMEOUT": About("90m", _WORK),
    "CACHE_VOLUME": About(
        "guix-tasks-cache", "**pull**, **install** (stale only if it becomes empty or non-empty)"
    ),
    "CACHE_IMAGE": About("ghcr.io/me/app-cache", "base, pull, install"),
    "BUILDX_BUILDER": About("insecure-builder", _BUILDX),
    "BUILDX_DRIVER": About("remote", _BUILDX),
    "BUILDX_NODES": About("tcp://10.0.0.5:1234,cacert=ca.pem", _BUILDX),
    "BUILDX_OUTPUT": About("oci", "`buildx.build`"),
    "BUILDX_ATTESTATIONS": About("provenance sbom", "`buildx.build`"),
    "BUILDX_CACHE_FROM": About("type=gha", "`buildx.build`"),
    "BUILDX_CACHE_TO": About("type=local,dest=cache,mode=max", "`buildx.build`"),
    "BUILDKIT_SYNTAX": About("docker/dockerfile:1.20", "`buildx.build`"),
    "BUILDX_URL": About("https://mirror.example/buildx", "`buildx.setup`"),
    "BUILDX_SHA256": About(_SHA256, "`buildx.setup`"),
    "ENGINE_IMAGE_STORE": About("containerd", "`engine.up`"),
    "OUTPUT": About("quiet", "long-running tasks"),
    "RELEASE_URL": About("https://example.org/downloads/1.0", "`release`"),
    "DOCKER_USERNAME": About("me", "`push`, pulls from the same registry"),
    "DOCKER_USERNAME_FILE": About("secrets/user", "`push`, pulls from the same registry"),
    "DOCKER_PASSWORD": About("a token", "`push`, pulls from the same registry"),
    "DOCKER_PASSWORD_FILE": About("/run/secrets/token", "`push`, pulls from the same registry"),
    "DOCKER_HOST": About("ssh://me@build-box", "all"),
    "DOCKER_CONTEXT": About("build-box", "all"),
    "DOCKER_CONFIG": About("/srv/docker-config", "all"),
    "DOCKER_TLS_VERIFY": About("1", "all"),
    "DOCKER_CERT_PATH": About("certificates", "all"),
}

SHORT = (
    "IMAGE", "BASE_IMAGE", "GUIX_CHANNELS", "GUIX_MANIFEST", "GUIX_PACKAGES",
    "GUIX_SUBSTITUTE_URLS", "GUIX_SANDBOX", "CACHE_IMAGE", "DOCKER_USERNAME", "DOCKER_PASSWORD",
)  # fmt: skip
"""Settings in the table of the README."""

KINDS = {
    "str": "text",
    "int": "whole number",
    "bool": "`yes` or `no`",
    "Path": "path",
    "ImageReference": "image",
    "Secret": "text, secret",
    "Mount": "`SOURCE:TARGET[:ro]`",
    "Listen": "`ADDRESS:PORT`",
    "Node": "`ENDPOINT[,NAME=VALUE]`",
    "Platform": "platform",
    **{
        name: ", ".join(f"`{word.value}`" for word in kind)
        for name, kind in {**vars(values), "Display": Display}.items()
        if isinstance(kind, EnumMeta) and kind is not Enum
    },
    "Mapping[str, str]": "`NAME=VALUE`, any number",
    "Mapping[str, Path]": "`NAME=PATH`, any number",
}
"""Names of types in the documentation, by type of a field of ``Settings``."""

KINDS_BY_SETTING = {
    "STAGE_MEMORY": "bytes, or with `k`, `m`, `g`",
    "STAGE_TIMEOUT": "seconds, or with `s`, `m`, `h`",
}


def task_table() -> str:
    rows = []
    for title, names in grouped(ns.task_names):
        rows += [(f"*{title}*", ""), *((f"`{name}`", _summary(name)) for name in names)]
    return _table(("task", "description"), rows)


def task_reference() -> str:
    parts = []
    for title, names in grouped(ns.task_names):
        parts += [f"## {title}", *map(_one_task, names)]
    return "\n\n".join(parts)


def settings_table() -> str:
    rows = [
        (_code(name), _code(default), doc)
        for name, default, doc in settings_reference()
        if name in SHORT
    ]
    return _table(("setting", "default", "description"), rows)


def exit_codes() -> str:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {
        error.__dict__["exit_code"]: (error.__doc__ or "").splitlines()[0].rstrip(".")
        for error in classes
        if "exit_code" in error.__dict__ and error is not errors.GuixTasksError
    }
    rows = [("0", "Done"), *((str(code), doc) for code, doc in sorted(codes.items()))]
    return _table(("exit code", "meaning"), rows)


def settings_reference_table() -> str:
    kinds = {field.name.upper(): str(field.type) for field in fields(Settings)}
    headings = settings_headings()
    header = ("setting", "type", "default", "description", "example", "used by")
    parts: list[str] = []
    rows: list[tuple[str, ...]] = []
    for name, default, doc in settings_reference():
        if group := headings.get(name):
            parts += [_table(header, rows)] if rows else []
            parts.append(f"## {group}")
            rows = []
        about = ABOUT.get(name, About("", ""))
        kind = KINDS_BY_SETTING.get(name) or _kind(name, kinds.get(name, ""))
        row = (_code(name), kind, _code(default), doc, _code(about.example), about.concerns)
        rows.append(row)
    return "\n\n".join([*parts, _table(header, rows)])


def fill_tables(page: str) -> str:
    """Return a page with up-to-date tables."""
    for name, make in TABLES.items():
        marks = (f"<!-- {name} -->\n", f"<!-- /{name} -->")
        if all(mark in page for mark in marks):
            start, end = page.index(marks[0]) + len(marks[0]), page.index(marks[1])
            page = f"{page[:start]}{make()}\n{page[end:]}"
    return page


TABLES = {
    "tasks": task_table,
    "task-reference": task_reference,
    "settings": settings_table,
    "settings-reference": settings_reference_table,
    "exit-codes": exit_codes,
}


def _one_task(name: str) -> str:
    # The first call of get_arguments removes the help from a task, so call it only once.
    arguments = ns[name].get_arguments()
    lines = [f"### `{name}`", inspect.getdoc(ns[name].body) or ""]
    if arguments:
        rows = [(f"`{_option(item)}`", _default(item), str(item.help)) for item in arguments]
        lines.append(_table(("option", "default", "meaning"), rows))
    return "\n\n".join(lines)


def _option(argument: Argument) -> str:
    value = {str: "=TEXT", int: "=NUMBER", list: "=VALUE"}.get(argument.kind, "")
    return f"--{argument.names[0]}{'' if argument.incrementable else value}"


def _default(argument: Argument) -> str:
    return _code(str(argument.default)) if argument.default else ""


def _kind(name: str, declared: str) -> str:
    """Describe the type of a setting; settings without a field are files or Docker's strings."""
    declared = declared.removesuffix(" | None")
    if item := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", declared):
        return f"list of {KINDS[item[1]]}"
    if not declared:
        return KINDS["Path"] if name.endswith(("_FILE", "_CONFIG", "_PATH")) else KINDS["str"]
    return KINDS[declared]


def _summary(name: str) -> str:
    return (ns[name].__doc__ or "").strip().splitlines()[0].rstrip(".")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
    )


def main() -> None:
    pages = {page: fill_tables(page.read_text(encoding="utf-8")) for page in PAGES}
    pages[ROOT / ".env.example"] = example_text()
    stale = {page: text for page, text in pages.items() if page.read_text("utf-8") != text}
    if "--check" in sys.argv:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        sys.exit(f"outdated: {names}; run python -m docs.tables" if stale else None)
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
