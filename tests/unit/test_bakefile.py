"""The Dockerfile of the insecure steps, and the bake file."""

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
from fake_engine import STEADY
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
    platforms: Sequence[Platform], stages: Sequence[Stage] = (), **options: Any
) -> Definition:
    return replace(PLAIN, platforms=platforms, stages=stages, **options)


def blocks(definition: Definition) -> dict[str, tuple[str, list[str]]]:
    """The stages of the Dockerfile by name: what each is made from, and its instructions."""
    text = dockerfile(definition).replace(" \\\n    ", " ")
    found: dict[str, tuple[str, list[str]]] = {}
    for block in text.strip().split("\n\n"):
        first, *lines = block.split("\n")
        words = re.fullmatch(r"FROM (\S+) AS (\S+)", first)
        assert words, block
        found[words[2]] = (words[1], lines)
    return found


def mounts(line: str) -> list[str]:
    return re.findall(r"--mount=(\S+)", line)


def step(definition: Definition, name: str = "pull") -> str:
    (line,) = [line for line in blocks(definition)[name][1] if "security=insecure" in line]
    return line


def arguments(line: str) -> list[str]:
    """The argument list of a ``RUN``."""
    argv: list[str] = json.loads(line[line.index("[") :])
    return argv


# --- The Dockerfile -------------------------------------------------------------------------


def test_each_stage_is_made_of_the_one_before() -> None:
    found = blocks(define([AMD64], [PULL, INSTALL]))
    assert {name: parent for name, (parent, _) in found.items()} == {
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
        made = [each.name for each in definition.stages]
        assert insecure == (["resolving", *made] if definition.resolve else made)


def test_a_step_runs_the_script_of_its_stage_and_has_its_folder() -> None:
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


def test_without_a_stage_the_image_is_the_base() -> None:
    found = blocks(define([AMD64]))
    assert found["image-linuxamd64"][0] == found["described"][0] == "base"
    assert "pull" not in found
    assert "resolving" not in found


def test_floating_channels_are_asked_for_first() -> None:
    found = blocks(define([AMD64], user="guest", resolve=True))
    parent, (user, run) = found["resolving"]
    assert (parent, user) == ("base", "USER root")
    assert "source=resolve,target=/var/guix/guix-tasks" in run
    # The error of the step is then one of the pull.
    assert arguments(run)[-1] == "pull"
    assert found["asked"][1] == [
        f"COPY --from=owner {OWNER} /",
        "COPY --from=keys /keys /",
        "COPY --from=resolving /.guix-tasks-reports /",
    ]


def test_the_reports_are_those_of_the_last_image() -> None:
    found = blocks(define([AMD64], [PULL, INSTALL]))
    directory, first, second, created = (arguments(line)[2] for line in found["described"][1])
    assert directory == "mkdir -p /.guix-tasks-reports"
    assert first.endswith(" guix describe >/.guix-tasks-reports/pull")
    assert first.startswith('PATH="/var/guix/profiles/per-user/root/current-guix/bin:')
    assert shlex.split(second)[1:-1] == ["guix", "package", "-I", "it's"]
    assert created == "date -u +%Y-%m-%dT%H:%M:%SZ >/.guix-tasks-reports/created"
    assert found["reports"][1] == ["COPY --from=described /.guix-tasks-reports /"]


def test_every_platform_has_labels_of_its_own() -> None:
    labels = {AMD64: {"org.a": "1"}, ARM32: {"org.b": "3", "org.a": "2"}}
    definition = define([AMD64, ARM32], [PULL], labels=labels)
    found = blocks(definition)
    assert found["image-linuxarmv7"] == (
        "pull",
        [
            "ARG LABEL_0_linuxarmv7",
            'LABEL org.a="${LABEL_0_linuxarmv7}"',
            "ARG LABEL_1_linuxarmv7",
            'LABEL org.b="${LABEL_1_linuxarmv7}"',
        ],
    )
    assert found["image-linuxamd64"][1][1:] == ['LABEL org.a="${LABEL_0_linuxamd64}"']
    assert targets(definition)[IMAGE_TARGET]["args"] == {
        "LABEL_0_linuxamd64": "1",
        "LABEL_0_linuxarmv7": "2",
        "LABEL_1_linuxarmv7": "3",
    }


def test_each_platform_has_its_own_variables() -> None:
    value = "/profile ${HOME}"
    definition = define(
        [AMD64, ARM64], environment={AMD64: {"A_PATH": value}}, labels={AMD64: {"org.a": "1"}}
    )
    found = blocks(definition)
    assert found["image-linuxamd64"][1] == [
        "ARG LABEL_0_linuxamd64",
        'LABEL org.a="${LABEL_0_linuxamd64}"',
        "ARG ENV_0_linuxamd64",
        'ENV A_PATH="${ENV_0_linuxamd64}"',
    ]
    assert found["image-linuxarm64"][1] == []
    assert targets(definition)[IMAGE_TARGET]["args"] == {
        "LABEL_0_linuxamd64": "1",
        "ENV_0_linuxamd64": "/profile $${HOME}",
    }


def test_an_image_for_another_user_is_made_by_root() -> None:
    found = blocks(define([AMD64, ARM64], [PULL, INSTALL], user="guest"))
    assert found["pull"][1][0] == "USER root"
    assert len(found["install"][1]) == 1  # it is root already
    assert found["image-linuxamd64"][1] == found["image-linuxarm64"][1] == ["USER guest"]
    plain = blocks(define([AMD64], [PULL, INSTALL], store="s"))
    assert [name for name, (_, lines) in plain.items() if "USER" in "".join(lines)] == ["keys"]


def test_a_stage_with_the_warm_store_is_assembled_from_it() -> None:
    found = blocks(define([AMD64], [PULL, INSTALL], store="app-store", user="guest"))
    assert [found[f"install{step}"][0] for step in ("-seed", "-work", "")] == [
        "pull", "install-seed", "pull",
    ]  # fmt: skip
    cache = "type=cache,id=app-store-${TARGETARCH}${TARGETVARIANT},sharing=locked,target="
    seed, work, last = (found[f"install{step}"][1][-1] for step in ("-seed", "-work", ""))
    assert mounts(seed)[-1] == mounts(last)[-1] == f"{cache}/dev/guix-tasks"
    assert mounts(work)[-1] == f"{cache}/gnu"
    assert "insecure" not in seed + last
    assert mounts(last)[0] == (
        "type=bind,from=install-work,source=/.guix-tasks-reports,target=/dev/guix-tasks-report"
    )
    assert "ENV GUIX_DATABASE_DIRECTORY=/gnu/guix-tasks/db" in found["install-work"][1]
    assert not [line for line in found["install"][1] if line.startswith("ENV")]
    assert found["pull"][1][0] == found["pull-seed"][1][0] == "USER root"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('[ "$1" = -u ] && echo 1000 || echo guest', ("1000", "guest")),
        # What coreutils do for a number without a name, and what busybox does.
        ('echo 1000; [ "$1" = -u ]', ("1000", "1000")),
        ('[ "$1" = -u ] && echo 1000', ("1000", "1000")),
    ],
)
def test_the_user_of_the_base_is_asked_for(
    tmp_path: Path, script: str, expected: tuple[str, str]
) -> None:
    program = tmp_path / "id"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    (run,) = blocks(define([AMD64]))["owner"][1]
    *shell, command = arguments(run)
    assert shell == ["/bin/sh", "-c"]
    place = tmp_path / "owner"
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run([*shell, command.replace(OWNER, str(place))], check=True, env={"PATH": path})
    read = ((place / name).read_text() for name in ("user", "name"))
    assert tuple(read) == tuple(f"{each}\n" for each in expected)
    assert f"PATH={path}" in (place / "environment").read_text().splitlines()


@pytest.mark.parametrize("network", ["host", "none"])
def test_a_step_has_the_network_that_is_asked_for(network: str) -> None:
    assert f" --network={network} " in step(define([AMD64], [PULL], network=network))
    assert "--network" not in dockerfile(define([AMD64], [PULL]))


def test_local_files_are_seen_by_every_step() -> None:
    binds = {target: f"type=bind,from=work,target={target}" for target in ("/a", "/b")}
    definition = define([AMD64], [PULL, INSTALL], binds=binds)
    for name in ("pull", "install"):
        seen = [each for each in mounts(step(definition, name))[1:] if "type=bind" in each]
        assert seen == list(binds.values())


def test_what_opens_private_channels_is_seen_by_the_steps_that_fetch() -> None:
    definition = define([AMD64], [PULL, INSTALL], resolve=True, ssh_agent=Path("/agent"))
    for line in (step(definition), step(definition, "resolving")):
        secrets = [each for each in mounts(line) if each.startswith("type=secret,id=access-")]
        assert [each.rpartition("/access/")[2] for each in secrets] == [
            ".gitconfig", ".ssh/known_hosts", "credentials",
        ]  # fmt: skip
        assert "type=ssh" in mounts(line)
        assert step(define([AMD64], [PULL])).replace(" ", "").count("type=ssh") == 0
    assert "access" not in step(definition, "install")
    assert "type=ssh" not in step(definition, "install")


def test_caches_are_mounted_and_each_build_has_a_tmp_of_its_own() -> None:
    assert mounts(step(define([AMD64], [PULL], cache="c-1")))[6:] == [
        "type=cache,id=c-1-tmp,target=/tmp,mode=1777,sharing=private",
        "type=cache,id=c-1-home,target=/root/.cache,sharing=locked",
        "type=cache,id=c-1-substitutes,target=/var/guix/substitute,sharing=locked",
    ]


@pytest.mark.parametrize("platforms", [[ARM32], [AMD64, ARM32]])
def test_where_a_platform_has_32_bits_one_cache_is_in_memory(platforms: list[Platform]) -> None:
    found = mounts(step(define(platforms, [PULL], cache="c")))[2:]
    assert "type=tmpfs,target=/root/.cache" in found
    assert not [each for each in found if "c-home" in each]
    assert "type=cache,id=c-substitutes,target=/var/guix/substitute,sharing=locked" in found


def test_without_a_cache_everything_stays_in_the_image() -> None:
    text = dockerfile(define([ARM32], [PULL, INSTALL]))
    assert "type=cache" not in text
    assert "type=tmpfs" not in text


def test_the_resolving_script_stops_at_the_first_error() -> None:
    own, given_ones = (resolve_script(each).decode() for each in (None, "channels.scm"))
    assert own.startswith("#!/bin/sh\nset -eu\n")
    assert "/var/guix/guix-tasks/channels.scm" not in own
    assert (
        "resolve.scm /var/guix/guix-tasks/channels.scm >/.guix-tasks-reports/resolved\n"
        in given_ones
    )
    bold = resolve_script("channels.scm", authenticate=False).decode()
    assert "resolve.scm --disable-authentication /var/guix/guix-tasks/channels.scm >" in bold


# --- The bake file --------------------------------------------------------------------------

LABEL = "LABEL_0_linuxamd64"


def targets(definition: Definition) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(bake_file(definition))["target"]
    assert list(found) == ["base", ASKED_TARGET, REPORTS_TARGET, IMAGE_TARGET]
    return found


def test_the_base_is_built_as_ever_and_linked_to_the_steps() -> None:
    found = targets(
        replace(
            PLAIN,
            base=replace(BASE, network="none", secrets={"token": Path("/s/t")}),
            base_contexts={"a:1": "oci-layout:///f/x@sha256:1"},
            contexts={"work": Path("/f/work"), "mount-0": Path("/srv")},
            platforms=[AMD64, ARM64],
            network="none",
        )
    )
    assert found["base"] == {
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
        assert found[name]["target"] == name
        assert found[name]["platforms"] == ["linux/amd64", "linux/arm64"]
        assert found[name]["context"] == "/f/empty"
        assert found[name]["dockerfile"] == "/f/Dockerfile"
        assert found[name]["contexts"] == {
            "base": "target:base",
            "work": "/f/work",
            "mount-0": "/srv",
        }
        assert found[name]["secret"] == ["id=environment,src=/f/environment"]
        assert found[name]["network"] == "none"


def test_only_the_steps_may_be_insecure_and_the_hosts_network_is_asked_for() -> None:
    for network, more in ((None, []), ("none", []), ("host", ["network.host"])):
        base = replace(BASE, network=network)
        found = targets(replace(PLAIN, base=base, network=network))
        assert found["base"].get("entitlements", []) == more
        assert found["base"].get("network") == found["image"].get("network") == network
        for name in (ASKED_TARGET, REPORTS_TARGET, IMAGE_TARGET):
            assert found[name]["entitlements"] == ["security.insecure", *more]


def test_the_frontend_and_the_labels_are_arguments_of_the_steps() -> None:
    found = targets(replace(labelled('a "b"\n${c}'), syntax="docker/dockerfile:1"))
    assert found[IMAGE_TARGET]["args"] == {
        "BUILDKIT_SYNTAX": "docker/dockerfile:1",
        "LABEL_0_linuxamd64": 'a "b"\n$${c}',
    }
    assert "BUILDKIT_SYNTAX" not in found["base"]["args"]
    assert targets(PLAIN)[IMAGE_TARGET]["args"] == {}


def test_a_path_with_a_comma_or_a_quote_stays_one_path() -> None:
    base = replace(BASE, secrets={"a": Path('/s/"t"'), "b": Path("/s/t u")})
    found = targets(replace(PLAIN, base=base, directory=Path("/f,g")))
    assert found["base"]["secret"] == ['id=a,"src=/s/""t"""', "id=b,src=/s/t u"]
    assert found["image"]["secret"] == ['id=environment,"src=/f,g/environment"']
    assert found["asked"]["output"] == ['type=local,"dest=/f,g/reports"']


def labelled(value: str) -> Definition:
    return define([AMD64], labels={AMD64: {"a": value}})


def read_template(text: str) -> str:
    """What bake makes of a string that is nothing but text (hclsyntax/spec.md, templates)."""
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
def test_no_text_is_a_template(text: str, expected: str) -> None:
    """Wherever it may stand: each ``expected`` was read back as ``text`` by bake itself."""
    place = Path("/") / text
    definition = replace(
        labelled(text),
        base=BuildSpec(place, place, args={"A": text}, secrets={"s": place}),
        base_contexts={"a:1": text},
        directory=place,
        contexts={"mount-0": place},
        output=text,
        cache_from=[text],
        cache_to=[text],
    )
    found = targets(definition)
    assert found["base"]["args"]["A"] == found["image"]["args"][LABEL] == expected
    assert found["base"]["context"] == found["base"]["dockerfile"] == f"/{expected}"
    assert found["base"]["contexts"]["a:1"] == found["image"]["output"][0] == expected
    assert found["image"]["contexts"]["mount-0"] == f"/{expected}"
    assert found["image"]["cache-to"] == found["base"]["cache-from"] == [expected]
    read_template(bake_file(definition))


@STEADY
@given(st.lists(st.sampled_from([*'${}% \\"\n', "é", "\u2028"]), max_size=12).map("".join))
def test_bake_reads_every_argument_as_it_was(text: str) -> None:
    found = targets(labelled(text))["image"]["args"][LABEL]
    assert read_template(found) == text
