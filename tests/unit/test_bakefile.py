"""The generated Dockerfile of the insecure steps, and the bake file."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import DETERMINISTIC
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.buildkit.bakefile import (
    ASKED_TARGET,
    IMAGE_TARGET,
    OWNER,
    REPORTS_TARGET,
    Definition,
    bake_file,
    dockerfile,
    resolve_script,
)
from guix_tasks.engine.api import BuildSpec
from guix_tasks.oci.platform import Platform
from guix_tasks.stages.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

AMD64, ARM64 = Platform.parse("linux/amd64"), Platform.parse("linux/arm64")
ARM32 = Platform.parse("linux/arm/v7")


def stage(name: str, report: tuple[str, ...] = ("guix", "describe")) -> Stage:
    return Stage(name, [("true",)], report, lambda _: {})


PULL, INSTALL = stage("pull"), stage("install", ("guix", "package", "-I", "it's"))

BASE = BuildSpec(Path("/context"), Path("/context/Dockerfile"), args={"BASE_IMAGE": "a:1"})
PLAIN = Definition(base=BASE, platforms=[AMD64], directory=Path("/f"))


def define(
    platforms: Sequence[Platform], stages: Sequence[Stage] = (), **fields: Any
) -> Definition:
    return replace(PLAIN, platforms=platforms, stages=stages, **fields)


def blocks(definition: Definition) -> dict[str, tuple[str, list[str]]]:
    """Return the parent and the instructions of each stage of the Dockerfile, by name."""
    text = dockerfile(definition).replace(" \\\n    ", " ")
    stages: dict[str, tuple[str, list[str]]] = {}
    for block in text.strip().split("\n\n"):
        first, *lines = block.split("\n")
        match = re.fullmatch(r"FROM (\S+) AS (\S+)", first)
        assert match, block
        stages[match[2]] = (match[1], lines)
    return stages


def mounts(line: str) -> list[str]:
    return re.findall(r"--mount=(\S+)", line)


def step(definition: Definition, name: str = "pull") -> str:
    (line,) = [line for line in blocks(definition)[name][1] if "security=insecure" in line]
    return line


def arguments(line: str) -> list[str]:
    """Return the argument list of a ``RUN``."""
    argv: list[str] = json.loads(line[line.index("[") :])
    return argv


# --- The Dockerfile -------------------------------------------------------------------------


def test_each_stage_is_based_on_the_previous_stage() -> None:
    stages = blocks(define([AMD64], [PULL, INSTALL]))
    assert {name: parent for name, (parent, _) in stages.items()} == {
        "owner": "base",
        "keys": "base",
        "asked": "scratch",
        "pull": "base",
        "install": "pull",
        "described": "install",
        "reports": "scratch",
        "image-linuxamd64": "install",
        "image": "image-${TARGETOS}${TARGETARCH}${TARGETVARIANT}",
    }


def test_only_the_steps_of_guix_are_insecure() -> None:
    for definition in (define([AMD64], [PULL, INSTALL]), define([AMD64], [PULL], resolve=True)):
        insecure = [
            name for name, (_, lines) in blocks(definition).items() if "insecure" in "".join(lines)
        ]
        names = [stage.name for stage in definition.stages]
        assert insecure == (["resolving", *names] if definition.resolve else names)


def test_step_runs_the_script_of_its_stage_with_mounted_files() -> None:
    line = step(define([AMD64], [PULL, INSTALL]), "install")
    assert line.startswith("RUN --security=insecure --mount=")
    assert mounts(line) == [
        "type=bind,from=work,source=install,target=/var/guix/guix-tasks,rw",
        "type=secret,id=environment,target=/var/guix/guix-tasks/environment",
        "type=secret,id=extra-capem,target=/var/guix/guix-tasks/extra-ca.pem",
    ]
    assert arguments(line) == [
        "/var/guix/guix-tasks/entry-point.sh",
        "/var/guix/guix-tasks/stage",
        "install",
    ]


def test_image_without_stages_is_the_base() -> None:
    stages = blocks(define([AMD64]))
    assert stages["image-linuxamd64"][0] == stages["described"][0] == "base"
    assert "pull" not in stages
    assert "resolving" not in stages


def test_floating_channels_are_resolved_first() -> None:
    stages = blocks(define([AMD64], user="guest", resolve=True))
    parent, (user, run) = stages["resolving"]
    assert (parent, user) == ("base", "USER root")
    assert "source=resolve,target=/var/guix/guix-tasks" in run
    # An error of this step is reported as an error of the pull.
    assert arguments(run)[-1] == "pull"
    assert stages["asked"][1] == [
        f"COPY --from=owner {OWNER} /",
        "COPY --from=keys /keys /",
        "COPY --from=resolving /.guix-tasks-reports /",
    ]


def test_reports_describe_the_last_stage() -> None:
    stages = blocks(define([AMD64], [PULL, INSTALL]))
    directory, first, second, created = (arguments(line)[2] for line in stages["described"][1])
    assert directory == "mkdir -p /.guix-tasks-reports"
    assert first.endswith(" guix describe >/.guix-tasks-reports/pull")
    assert first.startswith('PATH="/var/guix/profiles/per-user/root/current-guix/bin:')
    assert shlex.split(second)[1:-1] == ["guix", "package", "-I", "it's"]
    assert created == "date -u +%Y-%m-%dT%H:%M:%SZ >/.guix-tasks-reports/created"
    assert stages["reports"][1] == ["COPY --from=described /.guix-tasks-reports /"]


def test_each_platform_has_separate_labels() -> None:
    labels = {AMD64: {"org.a": "1"}, ARM32: {"org.b": "3", "org.a": "2"}}
    definition = define([AMD64, ARM32], [PULL], labels=labels)
    stages = blocks(definition)
    assert stages["image-linuxarmv7"] == (
        "pull",
        [
            "ARG LABEL_0_linuxarmv7",
            'LABEL org.a="${LABEL_0_linuxarmv7}"',
            "ARG LABEL_1_linuxarmv7",
            'LABEL org.b="${LABEL_1_linuxarmv7}"',
        ],
    )
    assert stages["image-linuxamd64"][1][1:] == ['LABEL org.a="${LABEL_0_linuxamd64}"']
    assert targets(definition)[IMAGE_TARGET]["args"] == {
        "LABEL_0_linuxamd64": "1",
        "LABEL_0_linuxarmv7": "2",
        "LABEL_1_linuxarmv7": "3",
    }


def test_each_platform_has_separate_variables() -> None:
    value = "/profile ${HOME}"
    definition = define(
        [AMD64, ARM64], environment={AMD64: {"A_PATH": value}}, labels={AMD64: {"org.a": "1"}}
    )
    stages = blocks(definition)
    assert stages["image-linuxamd64"][1] == [
        "ARG LABEL_0_linuxamd64",
        'LABEL org.a="${LABEL_0_linuxamd64}"',
        "ARG ENV_0_linuxamd64",
        'ENV A_PATH="${ENV_0_linuxamd64}"',
    ]
    assert stages["image-linuxarm64"][1] == []
    assert targets(definition)[IMAGE_TARGET]["args"] == {
        "LABEL_0_linuxamd64": "1",
        "ENV_0_linuxamd64": "/profile $${HOME}",
    }


def test_image_of_another_user_is_built_by_root() -> None:
    stages = blocks(define([AMD64, ARM64], [PULL, INSTALL], user="guest"))
    assert stages["pull"][1][0] == "USER root"
    assert len(stages["install"][1]) == 1  # it is root already
    assert stages["image-linuxamd64"][1] == stages["image-linuxarm64"][1] == ["USER guest"]
    plain = blocks(define([AMD64], [PULL, INSTALL], store="s"))
    assert [name for name, (_, lines) in plain.items() if "USER" in "".join(lines)] == ["keys"]


def test_stage_with_a_warm_store_is_assembled_from_the_store() -> None:
    stages = blocks(define([AMD64], [PULL, INSTALL], store="app-store", user="guest"))
    assert [stages[f"install{step}"][0] for step in ("-seed", "-work", "")] == [
        "pull", "install-seed", "pull",
    ]  # fmt: skip
    cache = "type=cache,id=app-store-${TARGETARCH}${TARGETVARIANT},sharing=locked,target="
    seed, work, last = (stages[f"install{step}"][1][-1] for step in ("-seed", "-work", ""))
    assert mounts(seed)[-1] == mounts(last)[-1] == f"{cache}/dev/guix-tasks"
    assert mounts(work)[-1] == f"{cache}/gnu"
    assert "insecure" not in seed + last
    assert mounts(last)[0] == (
        "type=bind,from=install-work,source=/.guix-tasks-reports,target=/dev/guix-tasks-report"
    )
    assert "ENV GUIX_DATABASE_DIRECTORY=/gnu/guix-tasks/db" in stages["install-work"][1]
    assert not [line for line in stages["install"][1] if line.startswith("ENV")]
    assert stages["pull"][1][0] == stages["pull-seed"][1][0] == "USER root"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('[ "$1" = -u ] && echo 1000 || echo guest', ("1000", "guest")),
        # The output for an id without a name: of coreutils, and of busybox.
        ('echo 1000; [ "$1" = -u ]', ("1000", "1000")),
        ('[ "$1" = -u ] && echo 1000', ("1000", "1000")),
    ],
)
def test_user_of_the_base_is_read(tmp_path: Path, script: str, expected: tuple[str, str]) -> None:
    program = tmp_path / "id"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    (run,) = blocks(define([AMD64]))["owner"][1]
    *shell, command = arguments(run)
    assert shell == ["/bin/sh", "-c"]
    directory = tmp_path / "owner"
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run([*shell, command.replace(OWNER, str(directory))], check=True, env={"PATH": path})
    lines = ((directory / name).read_text() for name in ("user", "name"))
    assert tuple(lines) == tuple(f"{text}\n" for text in expected)
    assert f"PATH={path}" in (directory / "environment").read_text().splitlines()


@pytest.mark.parametrize("network", ["host", "none"])
def test_step_uses_the_configured_network(network: str) -> None:
    assert f" --network={network} " in step(define([AMD64], [PULL], network=network))
    assert "--network" not in dockerfile(define([AMD64], [PULL]))


def test_local_files_are_mounted_in_every_step() -> None:
    binds = {target: f"type=bind,from=work,target={target}" for target in ("/a", "/b")}
    definition = define([AMD64], [PULL, INSTALL], binds=binds)
    for name in ("pull", "install"):
        step_mounts = mounts(step(definition, name))[1:]
        assert [mount for mount in step_mounts if "type=bind" in mount] == list(binds.values())


def test_credentials_of_channels_are_mounted_only_in_fetching_steps() -> None:
    definition = define([AMD64], [PULL, INSTALL], resolve=True, ssh_agent=Path("/agent"))
    for line in (step(definition), step(definition, "resolving")):
        secrets = [mount for mount in mounts(line) if mount.startswith("type=secret,id=access-")]
        assert [mount.rpartition("/access/")[2] for mount in secrets] == [
            ".gitconfig", ".ssh/known_hosts", "credentials",
        ]  # fmt: skip
        assert "type=ssh" in mounts(line)
        assert step(define([AMD64], [PULL])).replace(" ", "").count("type=ssh") == 0
    assert "access" not in step(definition, "install")
    assert "type=ssh" not in step(definition, "install")


def test_caches_are_mounted_and_tmp_is_private() -> None:
    assert mounts(step(define([AMD64], [PULL], cache="c-1")))[6:] == [
        "type=cache,id=c-1-tmp,target=/tmp,mode=1777,sharing=private",
        "type=cache,id=c-1-home,target=/root/.cache,sharing=locked",
        "type=cache,id=c-1-substitutes,target=/var/guix/substitute,sharing=locked",
    ]


@pytest.mark.parametrize("platforms", [[ARM32], [AMD64, ARM32]])
def test_cache_of_a_32_bit_platform_is_in_memory(platforms: list[Platform]) -> None:
    step_mounts = mounts(step(define(platforms, [PULL], cache="c")))[2:]
    assert "type=tmpfs,target=/root/.cache" in step_mounts
    assert not [mount for mount in step_mounts if "c-home" in mount]
    assert "type=cache,id=c-substitutes,target=/var/guix/substitute,sharing=locked" in step_mounts


def test_disabled_cache_is_not_mounted() -> None:
    text = dockerfile(define([ARM32], [PULL, INSTALL]))
    assert "type=cache" not in text
    assert "type=tmpfs" not in text


def test_resolving_script_stops_at_the_first_error() -> None:
    default, with_file = (resolve_script(channels).decode() for channels in (None, "channels.scm"))
    assert default.startswith("#!/bin/sh\nset -eu\n")
    assert "/var/guix/guix-tasks/channels.scm" not in default
    assert (
        "resolve.scm /var/guix/guix-tasks/channels.scm >/.guix-tasks-reports/resolved\n"
        in with_file
    )
    unauthenticated = resolve_script("channels.scm", authenticate=False).decode()
    argument = "--disable-authentication /var/guix/guix-tasks/channels.scm"
    assert f"resolve.scm {argument} >" in unauthenticated


# --- The bake file --------------------------------------------------------------------------

LABEL = "LABEL_0_linuxamd64"


def targets(definition: Definition) -> dict[str, dict[str, Any]]:
    target: dict[str, dict[str, Any]] = json.loads(bake_file(definition))["target"]
    assert list(target) == ["base", ASKED_TARGET, REPORTS_TARGET, IMAGE_TARGET]
    return target


def test_base_is_a_target_for_the_other_targets() -> None:
    baked = targets(
        replace(
            PLAIN,
            base=replace(BASE, network="none", secrets={"token": Path("/s/t")}),
            base_contexts={"a:1": "oci-layout:///f/x@sha256:1"},
            contexts={"work": Path("/f/work"), "mount-0": Path("/srv")},
            platforms=[AMD64, ARM64],
            network="none",
        )
    )
    assert baked["base"] == {
        "platforms": ["linux/amd64", "linux/arm64"],
        "cache-from": [],
        "attest": ["type=provenance,disabled=true"],
        "context": "/context",
        "dockerfile": "/context/Dockerfile",
        "args": {"BASE_IMAGE": "a:1"},
        "contexts": {"a:1": "oci-layout:///f/x@sha256:1"},
        "secret": ["id=token,src=/s/t"],
        "network": "none",
    }
    for name in (ASKED_TARGET, REPORTS_TARGET, IMAGE_TARGET):
        assert baked[name]["target"] == name
        assert baked[name]["platforms"] == ["linux/amd64", "linux/arm64"]
        assert baked[name]["context"] == "/f/empty"
        assert baked[name]["dockerfile"] == "/f/Dockerfile"
        assert baked[name]["contexts"] == {
            "base": "target:base",
            "work": "/f/work",
            "mount-0": "/srv",
        }
        assert baked[name]["secret"] == ["id=environment,src=/f/environment"]
        assert baked[name]["network"] == "none"


def test_base_is_not_insecure_and_the_host_network_is_an_entitlement() -> None:
    for network, entitlements in ((None, []), ("none", []), ("host", ["network.host"])):
        base = replace(BASE, network=network)
        baked = targets(replace(PLAIN, base=base, network=network))
        assert baked["base"].get("entitlements", []) == entitlements
        assert baked["base"].get("network") == baked["image"].get("network") == network
        for name in (ASKED_TARGET, REPORTS_TARGET, IMAGE_TARGET):
            assert baked[name]["entitlements"] == ["security.insecure", *entitlements]


def test_frontend_and_labels_are_arguments_of_the_steps() -> None:
    baked = targets(replace(labelled('a "b"\n${c}'), syntax="docker/dockerfile:1"))
    assert baked[IMAGE_TARGET]["args"] == {
        "BUILDKIT_SYNTAX": "docker/dockerfile:1",
        "LABEL_0_linuxamd64": 'a "b"\n$${c}',
    }
    assert "BUILDKIT_SYNTAX" not in baked["base"]["args"]
    assert targets(PLAIN)[IMAGE_TARGET]["args"] == {}


def test_path_with_a_comma_or_a_quote_is_quoted() -> None:
    base = replace(BASE, secrets={"a": Path('/s/"t"'), "b": Path("/s/t u")})
    baked = targets(replace(PLAIN, base=base, directory=Path("/f,g")))
    assert baked["base"]["secret"] == ['id=a,"src=/s/""t"""', "id=b,src=/s/t u"]
    assert baked["image"]["secret"] == ['id=environment,"src=/f,g/environment"']
    assert baked["asked"]["output"] == ['type=local,"dest=/f,g/reports"']


def labelled(value: str) -> Definition:
    return define([AMD64], labels={AMD64: {"a": value}})


def read_template(text: str) -> str:
    """Evaluate a template that is only text, as bake does (hclsyntax/spec.md, templates)."""
    assert not re.search(r"(?<!\$)\$\{|(?<!%)%\{", text), text
    return text.replace("$${", "${").replace("%%{", "%{")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain $x %y {z}", "plain $x %y {z}"),
        ("${HOME}", "$${HOME}"),
        ("$${HOME}", "$$${HOME}"),
        ("%{ if x }", "%%{ if x }"),
        ("%${", "%$${"),
        ("$%{", "$%%{"),
        ("${${", "$${$${"),
        ("\\${x}", "\\$${x}"),
    ],
)
def test_text_is_escaped_in_every_field(text: str, expected: str) -> None:
    """Bake itself read each ``expected`` as ``text``."""
    path = Path("/") / text
    definition = replace(
        labelled(text),
        base=BuildSpec(path, path, args={"A": text}, secrets={"s": path}),
        base_contexts={"a:1": text},
        directory=path,
        contexts={"mount-0": path},
        output=text,
        cache_from=[text],
        cache_to=[text],
    )
    baked = targets(definition)
    assert baked["base"]["args"]["A"] == baked["image"]["args"][LABEL] == expected
    assert baked["base"]["context"] == baked["base"]["dockerfile"] == f"/{expected}"
    assert baked["base"]["contexts"]["a:1"] == baked["image"]["output"][0] == expected
    assert baked["image"]["contexts"]["mount-0"] == f"/{expected}"
    assert baked["image"]["cache-to"] == baked["base"]["cache-from"] == [expected]
    read_template(bake_file(definition))


@DETERMINISTIC
@given(st.lists(st.sampled_from([*'${}% \\"\n', "é", "\u2028"]), max_size=12).map("".join))
def test_argument_is_unchanged_when_bake_reads_it(text: str) -> None:
    value = targets(labelled(text))["image"]["args"][LABEL]
    assert read_template(value) == text
