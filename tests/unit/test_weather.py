"""The task ``weather``: the parser of its report, its messages and required substitutes."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fake_engine import BufferConsole, FakeContainer, FakeGuix, Output, Site, console_text, outline

from guix_tasks import guix
from guix_tasks.commands.weather import weather
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.errors import CheckError, StageError, UsageError
from guix_tasks.guix import Forecast
from guix_tasks.stages.container import WORK_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guix_tasks.stages.project import Project

pytestmark = pytest.mark.usefixtures("serial_hashing")

# Output of resources/weather.scm with Guix 1.5 in the offline example.
RECORDED = """\
weather:system\tx86_64-linux
weather:wanted\thello@2.12.2\tsubstitutable
weather:wanted\tgreet@1.0\tmissing
weather:wanted\tgit@2.52.0:send-email\tmissing
weather:fetch\t1\t2345496\t0\t1
weather:system\tpowerpc64le-linux
weather:wanted\thello@2.12.2\tmissing
weather:wanted\ticecat@140.6.0-gnu1\tunsupported
weather:fetch\t0\t0\t0\t0
"""


def test_report_of_guix_is_parsed() -> None:
    native, other = guix.forecasts(RECORDED)
    assert native == Forecast(
        "x86_64-linux",
        {
            "hello@2.12.2": "substitutable",
            "greet@1.0": "missing",
            "git@2.52.0:send-email": "missing",
        },
        items=1,
        unpacked=2345496,
        packed=0,
        unknown=1,
    )
    assert native.missing == ["greet@1.0", "git@2.52.0:send-email"]
    assert other.missing == ["hello@2.12.2", "icecat@140.6.0-gnu1"]


@pytest.mark.parametrize(
    "report", ["", "a manifest said this\n", "weather:system\tx\nweather:wanted\ta\tmissing\n"]
)
def test_incomplete_report_is_ignored(report: str) -> None:
    assert guix.forecasts(report) == []


def test_output_of_a_manifest_is_ignored() -> None:
    noise = "fetch\t1\nwanted\tx\tmissing\nweather:what\tis\tthis\n"
    assert guix.forecasts(noise + RECORDED + noise) == guix.forecasts(RECORDED)


def play_report(built_site: Site, report: str) -> list[str]:
    """Play a report and return the scripts that query the servers."""
    scripts: list[str] = []
    guix_behaviour = FakeGuix()

    def behaviour(container: FakeContainer) -> Output:
        if "-weather-" not in container.spec.name:
            yield from guix_behaviour(container)
            return
        scripts.append(container.text(f"{WORK_DIRECTORY}/stage"))
        yield True, b"looking...\n"
        yield False, report.encode()
        container.remove_files(WORK_DIRECTORY)

    built_site.engine.behaviour = behaviour
    return scripts


def read_results(project: Project) -> str:
    assert isinstance(project.console, BufferConsole)
    return project.console.results.getvalue()


def make_report(
    *packages: str, sizes: Iterable[int] = (0, 0, 0, 0), system: str = "x86_64-linux"
) -> str:
    lines = [f"wanted\t{package.replace(' ', chr(9))}" for package in packages]
    fetch = "\t".join(map(str, sizes))
    return "".join(f"weather:{line}\n" for line in (f"system\t{system}", *lines, f"fetch\t{fetch}"))


def test_query_runs_in_the_image_of_pull(built_site: Site) -> None:
    built_site.write("manifest.scm", "(manifest)")
    built_site.env |= {"GUIX_MANIFEST": "manifest.scm", "GUIX_PACKAGES": "hello git:send-email"}
    scripts = play_report(
        built_site, make_report("hello@1 substitutable", sizes=(3, 4000, 2000, 0))
    )
    initial_state = outline(built_site.engine)
    project = built_site.project()
    weather(project)
    (script,) = scripts
    assert shlex.split(script.splitlines()[-1]) == [
        "exec", "guix", "repl", "--", f"{WORK_DIRECTORY}/weather.scm", "x86_64-linux",
        f"{WORK_DIRECTORY}/manifest.scm", "hello", "git:send-email",
    ]  # fmt: skip
    assert built_site.engine.specs[-1].image == built_site.image("pull").id
    line = "x86_64-linux: 1 of 1 available, 2 kB to download (4 kB of store items)"
    assert line in console_text(project).splitlines()
    assert outline(built_site.engine) == initial_state
    assert built_site.engine.all_containers == {}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 0, 0, 0), "nothing to download"),
        ((2, 4000, 0, 2), "a download of unknown size (4 kB of store items)"),
        ((2, 4000, 1000, 1), "at least 1 kB to download (4 kB of store items)"),
    ],
)
def test_known_sizes_are_printed(built_site: Site, sizes: tuple[int, ...], message: str) -> None:
    play_report(built_site, make_report("hello@1 stored", sizes=sizes))
    project = built_site.project()
    weather(project)
    assert console_text(project).splitlines()[0] == f"x86_64-linux: 1 of 1 available, {message}"


def test_missing_substitutes_are_an_error(built_site: Site) -> None:
    built_site.env["PLATFORMS"] = "linux/amd64 linux/ppc64le"
    scripts = play_report(built_site, RECORDED)
    project = built_site.project()
    with pytest.raises(CheckError) as raised:
        weather(project)
    assert str(raised.value) == (
        "weather: substitutes are missing for x86_64-linux (greet@1.0 git@2.52.0:send-email), "
        "powerpc64le-linux (hello@2.12.2 icecat@140.6.0-gnu1)"
    )
    assert "'x86_64-linux powerpc64le-linux'" in scripts[0]
    lines = console_text(project).splitlines()
    assert "  missing: greet@1.0" in lines
    assert "  not for this system: icecat@140.6.0-gnu1" in lines


def test_result_is_printed_as_json(built_site: Site) -> None:
    play_report(built_site, make_report("hello@1 substitutable", sizes=(3, 4000, 2000, 1)))
    project = built_site.project()
    weather(project, as_json=True)
    (item,) = json.loads(read_results(project))
    assert item == {
        "system": "x86_64-linux",
        "wanted": {"hello@1": "substitutable"},
        "missing": [],
        "items": 3,
        "download_bytes": 2000,
        "download_unknown_items": 1,
        "store_bytes": 4000,
    }


def test_empty_report_is_an_error(built_site: Site) -> None:
    play_report(built_site, "")
    with pytest.raises(StageError, match="Guix did not report all systems"):
        weather(built_site.project())


def test_query_without_packages_is_an_error(built_site: Site) -> None:
    built_site.env["GUIX_PACKAGES"] = ""
    with pytest.raises(UsageError, match="cannot query substitutes: no packages"):
        weather(built_site.project())


def test_dry_run_sends_no_query(built_site: Site) -> None:
    scripts, project = play_report(built_site, ""), built_site.project()
    weather(
        replace(project, engine=TracedEngine(built_site.engine, project.console, perform=False))
    )
    assert scripts == []


def test_missing_pull_is_made_before_the_query(site: Site) -> None:
    play_report(site, make_report("hello@1 stored"))
    weather(site.project())
    assert site.image("pull")
    assert site.ledger.find("install") is None


def test_required_substitute_that_is_missing_is_an_error(built_site: Site) -> None:
    built_site.env["GUIX_REQUIRE_SUBSTITUTES"] = "yes"
    initial_state = outline(built_site.engine)
    scripts = play_report(built_site, make_report("hello@1 substitutable", "greet@1 missing"))
    with pytest.raises(CheckError, match="no substitute for greet@1, and GUIX_REQUIRE_SUBSTITUTES"):
        built_site.make("install", packages=("greet", "hello"))
    assert "greet hello" in scripts[0]
    assert outline(built_site.engine) == initial_state
    play_report(built_site, make_report("hello@1 substitutable", "greet@1 stored"))
    built_site.make("install", packages=("greet", "hello"))
    assert outline(built_site.engine) != initial_state


def test_current_stage_requires_no_substitutes(built_site: Site) -> None:
    built_site.env["GUIX_REQUIRE_SUBSTITUTES"] = "yes"
    scripts = play_report(built_site, make_report("hello@1 missing"))
    assert built_site.make("install").endswith("install: up to date\n")
    built_site.make("pull", force=True)
    assert scripts == []
