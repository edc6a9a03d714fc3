"""Search paths of the profile: their parser and the environment of images."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from fake_engine import BASE_CONFIG, BASE_IMAGE, DETERMINISTIC, Site
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks import guix
from guix_tasks.commands.squash import squash
from guix_tasks.stages.images import SEARCH_PATHS_LABEL

if TYPE_CHECKING:
    from pathlib import Path

ROOT = "${GUIX_PROFILE:-/gnu/store/01-profile}"
ETC_PROFILE = f"""\
# Source this file to define all the relevant environment variables in Bash
#
#  GUIX_PROFILE=/path/to/profile ; \\
#  source /path/to/profile/etc/profile

export PATH="{ROOT}/bin:{ROOT}/sbin${{PATH:+:}}$PATH"
export XML_CATALOG_FILES="{ROOT}/xml/a.xml {ROOT}/xml/b.xml${{XML_CATALOG_FILES:+ }}$XML_CATALOG_FILES"
export SSL_CERT_DIR="{ROOT}/etc/ssl/certs"
export C_INCLUDE_PATH="{ROOT}/include/c++:{ROOT}/include${{C_INCLUDE_PATH:+:}}$C_INCLUDE_PATH"
"""  # noqa: E501 -- these are lines of Guix
"""A file written by ``build-etc/profile`` of Guix."""

INCLUDE = f"{guix.PROFILE}/include/c++:{guix.PROFILE}/include"
CERTIFICATES = f"{guix.PROFILE}/etc/ssl/certs"
CATALOGS = f"{guix.PROFILE}/xml/a.xml {guix.PROFILE}/xml/b.xml"
DEFINITIONS = guix.search_paths(ETC_PROFILE)


# --- Reports --------------------------------------------------------------------------------


def test_search_paths_are_sorted_and_refer_to_the_link_of_the_profile() -> None:
    names = [line.removeprefix("export ").partition("=")[0] for line in DEFINITIONS.splitlines()]
    assert names == ["C_INCLUDE_PATH", "SSL_CERT_DIR", "XML_CATALOG_FILES"]
    assert "/gnu/store" not in DEFINITIONS
    assert guix.search_paths(DEFINITIONS) == DEFINITIONS


def test_search_paths_of_a_report_exclude_its_packages() -> None:
    report = f"hello\t1.0\tout\t/gnu/store/02-hello\n{ETC_PROFILE}"
    assert guix.search_paths(report) == DEFINITIONS
    assert guix.installed(report) == ["hello@1.0"]
    assert guix.search_paths("hello\t1.0\tout\t/gnu/store/02-hello\n") == ""


@pytest.mark.parametrize(
    "line",
    [
        "",
        "export A",
        "A=/b",
        'export A="/b',
        'export A=""',
        'export A="$(id)"',
        'export A="`id`"',
        'export A="/b\\"c"',
        'export A="/b$C"',
        'export A="/b${C:+:}$C"',
        'export A="/b${A:+:}$C"',
        'export 1A="/b"',
        'export A B="/b"',
        'export A="/b"; id',
        'export Ä="/b"',
    ],
)
def test_unexpected_line_is_ignored(line: str) -> None:
    assert guix.search_paths(f"{line}\n{ETC_PROFILE}{line}\n") == DEFINITIONS


@DETERMINISTIC
@given(st.lists(st.sampled_from(['export A="', ROOT, "/b", "${A:+:}$A", '"', "\n", "$", "}"])))
def test_any_report_is_parsed(parts: list[str]) -> None:
    definitions = guix.search_paths("".join(parts))
    assert len(guix.with_search_paths([], definitions)) == len(definitions.splitlines())


def test_report_command_prints_packages_then_definitions() -> None:
    shell, option, command = guix.REPORT_PROFILE
    assert (shell, option) == ("sh", "-c")
    assert command == f"guix package --list-installed && cat {guix.PROFILE}/etc/profile"


# --- Environments ---------------------------------------------------------------------------


def test_variables_are_added_after_those_of_the_image() -> None:
    assert guix.with_search_paths(["PATH=/bin", "LANG=C"], DEFINITIONS) == [
        "PATH=/bin",
        "LANG=C",
        f"C_INCLUDE_PATH={INCLUDE}",
        f"SSL_CERT_DIR={CERTIFICATES}",
        f"XML_CATALOG_FILES={CATALOGS}",
    ]


def test_paths_of_the_profile_come_before_those_of_the_image() -> None:
    environment = ["C_INCLUDE_PATH=/a:/b", "XML_CATALOG_FILES=/c.xml", "LANG=C"]
    assert guix.with_search_paths(environment, DEFINITIONS) == [
        f"C_INCLUDE_PATH={INCLUDE}:/a:/b",
        f"XML_CATALOG_FILES={CATALOGS} /c.xml",
        "LANG=C",
        f"SSL_CERT_DIR={CERTIFICATES}",
    ]


def test_variable_with_one_path_keeps_the_value_of_the_image() -> None:
    assert "SSL_CERT_DIR=/certs" in guix.with_search_paths(["SSL_CERT_DIR=/certs"], DEFINITIONS)


def test_empty_variable_counts_as_unset() -> None:
    environment = ["SSL_CERT_DIR=", "C_INCLUDE_PATH="]
    assert guix.with_search_paths(environment, DEFINITIONS) == guix.with_search_paths(
        [f"SSL_CERT_DIR={CERTIFICATES}", f"C_INCLUDE_PATH={INCLUDE}"], DEFINITIONS
    )


def test_paths_are_not_repeated_if_the_base_is_an_install_image() -> None:
    environment = guix.with_search_paths(["C_INCLUDE_PATH=/a"], DEFINITIONS)
    assert guix.with_search_paths(environment, DEFINITIONS) == environment


def test_environment_without_definitions_is_unchanged() -> None:
    environment = ["PATH=/bin", "NO_VALUE", "A=b=c"]
    assert guix.with_search_paths(environment, "") == environment


@pytest.mark.parametrize("value", ["", "/a:/b"])
def test_shell_that_sources_the_file_has_the_same_values(tmp_path: Path, value: str) -> None:
    file = tmp_path / "profile"
    file.write_text(ETC_PROFILE)
    names = ("C_INCLUDE_PATH", "XML_CATALOG_FILES")
    environment = {"GUIX_PROFILE": guix.PROFILE, **dict.fromkeys(names, value)}
    script = f". {file}; printf '%s\\n' " + " ".join(f'"{name}=${name}"' for name in names)
    output = subprocess.run(
        ["/bin/sh", "-c", script], check=True, capture_output=True, text=True, env=environment
    ).stdout
    lines = guix.with_search_paths([f"{name}={value}" for name in names], DEFINITIONS)
    assert output.splitlines() == lines[:2]


# --- Images ---------------------------------------------------------------------------------

SITE_PACKAGES = f"{guix.PROFILE}/lib/python3/site-packages"
BUNDLE = f"{guix.PROFILE}/etc/ssl/all.crt"


@pytest.fixture
def python(built_site: Site) -> Site:
    """A project whose packages declare search paths."""
    built_site.env["GUIX_PACKAGES"] = "python curl"
    built_site.make("install")
    return built_site


def environment(site: Site, stage: str = "install") -> list[str]:
    lines = site.image(stage).config["Env"]
    assert isinstance(lines, list)
    return lines


def set_base_environment(site: Site, *lines: str) -> None:
    config = {**BASE_CONFIG, "Env": [*BASE_CONFIG["Env"], *lines]}
    site.engine.make_image(config, {}, parent=site.engine.registry.find(BASE_IMAGE), tag=BASE_IMAGE)


def test_install_image_sets_the_search_paths(python: Site) -> None:
    assert environment(python) == [
        *BASE_CONFIG["Env"],
        f"GUIX_PYTHONPATH={SITE_PACKAGES}",
        f"SSL_CERT_FILE={BUNDLE}",
    ]
    assert environment(python, "pull") == environment(python, "base") == BASE_CONFIG["Env"]
    assert python.why("install") is None


def test_install_image_without_search_paths_has_the_environment_of_its_parent(
    built_site: Site,
) -> None:
    assert environment(built_site) == BASE_CONFIG["Env"]
    assert built_site.image("install").labels[SEARCH_PATHS_LABEL] == ""


def test_paths_of_the_base_follow_those_of_the_profile(python: Site) -> None:
    set_base_environment(python, "GUIX_PYTHONPATH=/srv/python", "SSL_CERT_FILE=/srv/own.crt")
    python.make("base", "pull", "install")
    assert f"GUIX_PYTHONPATH={SITE_PACKAGES}:/srv/python" in environment(python)
    assert "SSL_CERT_FILE=/srv/own.crt" in environment(python)


def test_removed_package_removes_its_variable(python: Site) -> None:
    python.env["GUIX_PACKAGES"] = "python"
    python.make("install")
    assert environment(python) == [*BASE_CONFIG["Env"], f"GUIX_PYTHONPATH={SITE_PACKAGES}"]
    python.env["GUIX_PACKAGES"] = "hello"
    python.make("install")
    assert environment(python) == BASE_CONFIG["Env"]


def test_added_search_path_is_set_in_an_image_on_the_previous_one(built_site: Site) -> None:
    previous = built_site.image("install")
    built_site.env["GUIX_PACKAGES"] = "hello python"
    built_site.make("install")
    assert built_site.image("install").layers[:-1] == previous.layers
    assert f"GUIX_PYTHONPATH={SITE_PACKAGES}" in environment(built_site)


def test_removed_variable_of_the_base_is_removed_from_stages(python: Site) -> None:
    set_base_environment(python, "NAME=value")
    python.make("base", "pull", "install")
    assert "NAME=value" in environment(python)
    set_base_environment(python)
    python.make("base", "pull", "install")
    assert "NAME=value" not in environment(python, "pull") + environment(python)


def test_stage_assembled_without_guix_keeps_the_search_paths(python: Site) -> None:
    initial_environment = environment(python)
    python.write("Dockerfile", "FROM y\n")
    assert python.trace_stages(lambda: python.make("base", "pull", "install")) == ["label"]
    assert environment(python) == initial_environment


def test_stage_without_a_warm_store_sets_the_search_paths(python: Site) -> None:
    initial_environment = environment(python)
    python.env["CACHE_VOLUME"] = ""
    python.make("install", upstream=True)
    assert environment(python) == initial_environment


def test_squashed_image_keeps_the_search_paths(python: Site) -> None:
    initial_environment = environment(python)
    squash(python.project())
    assert environment(python, "squash") == environment(python, "") == initial_environment


def test_install_image_as_base_has_each_path_once(python: Site) -> None:
    initial_environment = environment(python)
    python.engine.tag(python.image("install").id, BASE_IMAGE)
    python.make("base", "pull", "install")
    assert environment(python, "base") == environment(python) == initial_environment
