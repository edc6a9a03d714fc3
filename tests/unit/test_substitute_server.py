"""Substitutes near by: what is started, who is told of it, and that no image is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fake_engine import FakeContainer, FakeGuix, Output, Site, heard, outline

from guix_tasks.commands import clean, substitutes
from guix_tasks.engine.api import Container
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.errors import EngineError, UsageError
from guix_tasks.guix import DEFAULT_SUBSTITUTE_URLS
from guix_tasks.stages import substitute_server
from guix_tasks.stages.container import LOCAL_SERVER_KEY, WORK_DIRECTORY
from guix_tasks.stages.ownership import USER

if TYPE_CHECKING:
    from guix_tasks.stages.project import Project

pytestmark = pytest.mark.usefixtures("serial_hashing")

KEY = "(public-key (ecc (curve Ed25519) (q #00#)))\n"
LISTENING = "guix publish: publishing /gnu/store on 0.0.0.0, port 8181\n"


class Publishing:
    """A Guix that serves, too, and takes down what work containers were given."""

    def __init__(self, said: str = LISTENING) -> None:
        self.said = said
        self.guix = FakeGuix()
        self.scripts: list[str] = []
        self.given: list[dict[str, str]] = []

    def __call__(self, container: FakeContainer) -> Output:
        if container.spec.name.startswith("guix-tasks-substitutes-"):
            self.scripts.append(container.text(f"{WORK_DIRECTORY}/serve"))
            container.write(substitute_server.PUBLIC_KEY, KEY)
            yield True, b"guix publish: using 'gzip' compression method, level 1\n"
            yield True, self.said.encode()
        else:
            names = ("environment", LOCAL_SERVER_KEY, "keys/local-server.pub")
            self.given.append({name: container.text(f"{WORK_DIRECTORY}/{name}") for name in names})
            yield from self.guix(container)


@pytest.fixture
def guix(made: Site) -> Publishing:
    found = Publishing()
    made.engine.behaviour = found
    return found


def up(made: Site, **env: str) -> Project:
    made.env.update(env)
    project = made.project()
    substitutes.up(project)
    return project


def server(made: Site) -> FakeContainer:
    (box,) = made.engine.all_containers.values()
    return box


def key_volumes(made: Site) -> list[str]:
    return [each for each in made.engine.all_volumes if each.endswith("-signing-key")]


def test_the_newest_stage_is_served_with_no_right(made: Site, guix: Publishing) -> None:
    before = outline(made.engine)
    project = up(made)
    spec, image = server(made).spec, made.image("install")
    assert spec.image == image.id
    assert (spec.user, spec.capabilities, spec.security) == (USER, (), ("no-new-privileges",))
    assert not spec.privileged
    assert not spec.unmasked
    assert (spec.publish, spec.publish_on) == ({8181: 8181}, "127.0.0.1")
    assert spec.no_healthcheck
    assert spec.environment == {}
    (volume,) = key_volumes(made)
    assert spec.binds == (f"{volume}:{substitute_server.KEYS}",)
    assert "--listen=0.0.0.0 --port=8181" in guix.scripts[0]
    assert "serves" not in heard(project)
    assert "serving the stage install\n" in heard(project)
    assert (made.directory / "out/substitutes-app.pub").read_text() == KEY
    assert outline(made.engine) == before


def test_another_machine_is_told_what_to_set(made: Site, guix: Publishing) -> None:
    own = made.write("own.pub", "key")
    project = up(
        made,
        SUBSTITUTES_LISTEN="0.0.0.0:9",
        GUIX_SUBSTITUTE_URLS="https://a.test file:///here",
        GUIX_SUBSTITUTE_KEYS=str(own),
    )
    lines = heard(project).splitlines()
    assert "replace fake with a name" in heard(project)
    assert 'GUIX_SUBSTITUTE_URLS="http://fake:9 https://a.test"' in lines
    assert 'GUIX_SUBSTITUTE_KEYS="substitutes-app.pub own.pub"' in lines
    assert "unreachable for other machines" not in heard(project)
    assert server(made).spec.publish_on == "0.0.0.0"  # noqa: S104


def test_guixs_own_servers_come_behind_it(made: Site, guix: Publishing) -> None:
    project = up(made, SUBSTITUTES_LISTEN="10.0.0.1:9")
    urls = " ".join(("http://10.0.0.1:9", *DEFAULT_SUBSTITUTE_URLS))
    assert f'GUIX_SUBSTITUTE_URLS="{urls}"' in heard(project).splitlines()
    assert "in the place of" not in heard(project)


def test_keys_of_servers_that_another_machine_lacks_are_left_out(
    made: Site, guix: Publishing
) -> None:
    own = made.write("own.pub", "key")
    directories = {"GUIX_SUBSTITUTE_URLS": "file:///here", "GUIX_SUBSTITUTE_KEYS": str(own)}
    lines = heard(up(made, SUBSTITUTES_LISTEN="10.0.0.1:9", **directories)).splitlines()
    assert 'GUIX_SUBSTITUTE_URLS="http://10.0.0.1:9"' in lines
    assert 'GUIX_SUBSTITUTE_KEYS="substitutes-app.pub"' in lines


def test_on_loopback_other_machines_are_told_nothing(made: Site, guix: Publishing) -> None:
    said = heard(up(made))
    assert "`inv substitutes.up --listen 0.0.0.0:8181` makes it reachable" in said
    assert "another machine" not in said
    assert "GUIX_SUBSTITUTE" not in said


def test_on_the_hosts_network_it_listens_there_itself(made: Site, guix: Publishing) -> None:
    up(made, NETWORK="host", SUBSTITUTES_LISTEN="10.0.0.1:9")
    assert server(made).spec.publish == {}
    assert "--listen=10.0.0.1 --port=9" in guix.scripts[0]


def test_once_is_enough(made: Site, guix: Publishing) -> None:
    up(made, NETWORK="host")
    first = server(made).id
    assert "already serving the stage" in heard(up(made))
    assert server(made).id == first
    # Other settings, another image, or one that has ended: a new one.
    up(made, SUBSTITUTES_LISTEN="127.0.0.1:9")
    assert server(made).id != first
    second = server(made)
    second.running = False
    up(made)
    assert server(made).id != second.id
    made.make("install", packages=("other",))
    up(made)
    assert server(made).spec.image == made.image("install").id


def test_what_is_left_of_an_older_image_goes_with_it(made: Site, guix: Publishing) -> None:
    up(made, NETWORK="host")
    old = server(made).image.id
    made.make("install", force=True, packages=("other",))
    made.make("install", force=True, packages=("third",))
    assert old in made.engine.all_images
    up(made)
    assert old not in made.engine.all_images


def test_without_a_stage_or_a_network_nothing_is_started(site: Site) -> None:
    with pytest.raises(UsageError, match="there is no stage to serve"):
        substitutes.up(site.project())
    site.env["NETWORK"] = "none"
    with pytest.raises(UsageError, match="remove the NETWORK line, or set a network"):
        substitutes.up(site.project())
    assert site.engine.specs == []


def test_one_that_does_not_start_is_told_and_removed(made: Site) -> None:
    made.engine.behaviour = Publishing("guix publish: error: bind: Address already in use\n")
    with pytest.raises(
        EngineError, match=r"cannot start the substitute server: .*in use; if its port"
    ):
        substitutes.up(made.project())
    assert made.engine.all_containers == {}


def test_a_dry_run_shows_it(made: Site) -> None:
    project = made.project()
    engine = TracedEngine(made.engine, project.console, perform=False)
    substitutes.up(replace(project, engine=engine))
    assert "--publish=127.0.0.1:8181:8181" in heard(project)
    assert "serving" not in heard(project)
    assert made.engine.all_containers == {}


def test_a_dry_down_stops_nothing(made: Site, guix: Publishing) -> None:
    project = up(made)
    engine = TracedEngine(made.engine, project.console, perform=False)
    substitutes.down(replace(project, engine=engine))
    assert "+ docker rm" in heard(project)
    assert "stopped" not in heard(project)
    assert server(made)


def test_down_leaves_the_key_and_clean_does_not(made: Site, guix: Publishing) -> None:
    up(made)
    clean.clean(made.project(), work_only=True)
    assert server(made)
    substitutes.down(made.project())
    assert made.engine.all_containers == {}
    assert len(key_volumes(made)) == 1
    assert "no server of this project" in _said(made)
    up(made)
    clean.clean(made.project())
    assert made.engine.all_containers == {}
    assert made.engine.all_volumes == {}


def _said(made: Site) -> str:
    project = made.project()
    substitutes.down(project)
    return heard(project)


def test_stages_ask_it_first_and_no_image_knows(made: Site, guix: Publishing) -> None:
    states = made.keys()
    up(made, NETWORK="host")
    assert made.keys() == states
    made.make("install", force=True)
    (given,) = guix.given
    urls = " ".join(("http://127.0.0.1:8181", *DEFAULT_SUBSTITUTE_URLS))
    assert f"GUIX_SUBSTITUTE_URLS='{urls}'" in given["environment"]
    assert given[LOCAL_SERVER_KEY] == KEY
    # What is in this directory would be the image's from then on.
    assert given["keys/local-server.pub"] == ""
    assert made.keys() == states


def test_proxy_before_the_server_is_reported(made: Site, guix: Publishing) -> None:
    up(made, NETWORK="host")
    assert "through http_proxy" not in made.make("install", force=True)
    made.env["https_proxy"] = "http://proxy.test:3128"
    assert "through http_proxy" not in made.make("install", force=True)
    made.env["http_proxy"] = "http://proxy.test:3128"
    assert "substitutes: Guix asks http://" in made.make("install", force=True)


def test_what_is_not_reached_is_told(made: Site, guix: Publishing) -> None:
    up(made, NETWORK="net")
    said = made.make("install", force=True)
    assert "work containers cannot reach the running server" in said
    assert "GUIX_SUBSTITUTE_URLS" not in guix.given[-1]["environment"]


def test_one_that_has_ended_is_none(made: Site, guix: Publishing) -> None:
    up(made, NETWORK="host")
    server(made).running = False
    assert "substitutes" not in made.make("install", force=True)


def test_an_older_one_is_told(made: Site, guix: Publishing) -> None:
    up(made, NETWORK="host")
    assert "of an older image" not in made.make("install", packages=("other",))
    assert "of an older image" in made.make("install", packages=("third",))


@pytest.mark.parametrize(
    ("network", "listen", "addresses", "url"),
    [
        ("", "127.0.0.1:1", {"bridge": "172.17.0.2"}, "http://172.17.0.2:1"),
        ("", "127.0.0.1:1", {"podman": "10.88.0.2"}, "http://10.88.0.2:1"),
        ("", "127.0.0.1:1", {"net": "10.0.0.2"}, None),
        ("net", "0.0.0.0:1", {"net": "10.0.0.2", "bridge": "172.17.0.2"}, "http://10.0.0.2:1"),
        ("net", "127.0.0.1:1", {}, None),
        ("none", "127.0.0.1:1", {"bridge": "172.17.0.2"}, None),
        ("host", "127.0.0.1:1", {"bridge": "172.17.0.2"}, "http://127.0.0.1:1"),
        ("host", "10.0.0.1:1", {}, "http://10.0.0.1:1"),
        ("host", "0.0.0.0:1", {}, "http://127.0.0.1:1"),
    ],
)
def test_where_it_is_reached(
    made: Site, network: str, listen: str, addresses: dict[str, str], url: str | None
) -> None:
    made.env["NETWORK"] = network
    project = made.project()
    labels = {substitute_server.LISTEN_LABEL: listen}
    found = Container("i", "n", "m", labels, running=True, addresses=addresses)
    assert substitute_server.server_url(project.engine, project.settings, found) == url
