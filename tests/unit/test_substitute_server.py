"""The local substitute server: its container, its use by stages, and instructions for machines."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fake_engine import FakeContainer, FakeGuix, Output, Site, console_text, outline

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


class FakePublish:
    """A fake Guix that also serves, and records the files of work containers."""

    def __init__(self, log: str = LISTENING) -> None:
        self.log = log
        self.guix = FakeGuix()
        self.scripts: list[str] = []
        self.work_files: list[dict[str, str]] = []

    def __call__(self, container: FakeContainer) -> Output:
        if container.spec.name.startswith("guix-tasks-substitutes-"):
            self.scripts.append(container.text(f"{WORK_DIRECTORY}/serve"))
            container.write(substitute_server.PUBLIC_KEY, KEY)
            yield True, b"guix publish: using 'gzip' compression method, level 1\n"
            yield True, self.log.encode()
        else:
            names = ("environment", LOCAL_SERVER_KEY, "keys/local-server.pub")
            self.work_files.append(
                {name: container.text(f"{WORK_DIRECTORY}/{name}") for name in names}
            )
            yield from self.guix(container)


@pytest.fixture
def guix(built_site: Site) -> FakePublish:
    publish = FakePublish()
    built_site.engine.behaviour = publish
    return publish


def start_server(built_site: Site, **env: str) -> Project:
    built_site.env.update(env)
    project = built_site.project()
    substitutes.up(project)
    return project


def find_server(built_site: Site) -> FakeContainer:
    (container,) = built_site.engine.all_containers.values()
    return container


def find_key_volumes(built_site: Site) -> list[str]:
    return [name for name in built_site.engine.all_volumes if name.endswith("-signing-key")]


def test_newest_stage_is_served_without_privileges(built_site: Site, guix: FakePublish) -> None:
    initial_state = outline(built_site.engine)
    project = start_server(built_site)
    spec, image = find_server(built_site).spec, built_site.image("install")
    assert spec.image == image.id
    assert (spec.user, spec.capabilities, spec.security) == (USER, (), ("no-new-privileges",))
    assert not spec.privileged
    assert not spec.unmasked
    assert (spec.publish, spec.publish_on) == ({8181: 8181}, "127.0.0.1")
    assert spec.no_healthcheck
    assert spec.environment == {}
    (volume,) = find_key_volumes(built_site)
    assert spec.binds == (f"{volume}:{substitute_server.KEYS}",)
    assert "--listen=0.0.0.0 --port=8181" in guix.scripts[0]
    assert "serves" not in console_text(project)
    assert "serving the stage install\n" in console_text(project)
    assert (built_site.directory / "out/substitutes-app.pub").read_text() == KEY
    assert outline(built_site.engine) == initial_state


def test_settings_for_another_machine_are_printed(built_site: Site, guix: FakePublish) -> None:
    key = built_site.write("custom.pub", "key")
    project = start_server(
        built_site,
        SUBSTITUTES_LISTEN="0.0.0.0:9",
        GUIX_SUBSTITUTE_URLS="https://a.test file:///here",
        GUIX_SUBSTITUTE_KEYS=str(key),
    )
    lines = console_text(project).splitlines()
    assert "replace fake with a name" in console_text(project)
    assert 'GUIX_SUBSTITUTE_URLS="http://fake:9 https://a.test"' in lines
    assert 'GUIX_SUBSTITUTE_KEYS="substitutes-app.pub custom.pub"' in lines
    assert "unreachable for other machines" not in console_text(project)
    assert find_server(built_site).spec.publish_on == "0.0.0.0"  # noqa: S104


def test_default_servers_follow_the_local_server(built_site: Site, guix: FakePublish) -> None:
    project = start_server(built_site, SUBSTITUTES_LISTEN="10.0.0.1:9")
    urls = " ".join(("http://10.0.0.1:9", *DEFAULT_SUBSTITUTE_URLS))
    assert f'GUIX_SUBSTITUTE_URLS="{urls}"' in console_text(project).splitlines()
    assert "with a name" not in console_text(project)


def test_keys_of_local_directories_are_omitted(built_site: Site, guix: FakePublish) -> None:
    key = built_site.write("custom.pub", "key")
    directories = {"GUIX_SUBSTITUTE_URLS": "file:///here", "GUIX_SUBSTITUTE_KEYS": str(key)}
    lines = console_text(
        start_server(built_site, SUBSTITUTES_LISTEN="10.0.0.1:9", **directories)
    ).splitlines()
    assert 'GUIX_SUBSTITUTE_URLS="http://10.0.0.1:9"' in lines
    assert 'GUIX_SUBSTITUTE_KEYS="substitutes-app.pub"' in lines


def test_server_on_loopback_prints_no_settings(built_site: Site, guix: FakePublish) -> None:
    output = console_text(start_server(built_site))
    assert "`inv substitutes.up --listen 0.0.0.0:8181` makes it reachable" in output
    assert "another machine" not in output
    assert "GUIX_SUBSTITUTE" not in output


def test_server_on_the_host_network_publishes_no_port(built_site: Site, guix: FakePublish) -> None:
    start_server(built_site, NETWORK="host", SUBSTITUTES_LISTEN="10.0.0.1:9")
    assert find_server(built_site).spec.publish == {}
    assert "--listen=10.0.0.1 --port=9" in guix.scripts[0]


def test_running_server_is_used_until_a_change(built_site: Site, guix: FakePublish) -> None:
    start_server(built_site, NETWORK="host")
    first = find_server(built_site).id
    assert "already serving the stage" in console_text(start_server(built_site))
    assert find_server(built_site).id == first
    # Other settings, another image or a stopped server require a new server.
    start_server(built_site, SUBSTITUTES_LISTEN="127.0.0.1:9")
    assert find_server(built_site).id != first
    second = find_server(built_site)
    second.running = False
    start_server(built_site)
    assert find_server(built_site).id != second.id
    built_site.make("install", packages=("other",))
    start_server(built_site)
    assert find_server(built_site).spec.image == built_site.image("install").id


def test_older_image_is_removed_with_its_server(built_site: Site, guix: FakePublish) -> None:
    start_server(built_site, NETWORK="host")
    old_image = find_server(built_site).image.id
    built_site.make("install", force=True, packages=("other",))
    built_site.make("install", force=True, packages=("third",))
    assert old_image in built_site.engine.all_images
    start_server(built_site)
    assert old_image not in built_site.engine.all_images


def test_missing_stage_or_network_is_an_error(site: Site) -> None:
    with pytest.raises(UsageError, match="there is no stage to serve"):
        substitutes.up(site.project())
    site.env["NETWORK"] = "none"
    with pytest.raises(UsageError, match="remove the NETWORK line, or set a network"):
        substitutes.up(site.project())
    assert site.engine.specs == []


def test_failed_start_is_reported_and_removed(built_site: Site) -> None:
    built_site.engine.behaviour = FakePublish("guix publish: error: bind: Address already in use\n")
    with pytest.raises(
        EngineError, match=r"cannot start the substitute server: .*in use; if its port"
    ):
        substitutes.up(built_site.project())
    assert built_site.engine.all_containers == {}


def test_dry_run_shows_the_container(built_site: Site) -> None:
    project = built_site.project()
    engine = TracedEngine(built_site.engine, project.console, perform=False)
    substitutes.up(replace(project, engine=engine))
    assert "--publish=127.0.0.1:8181:8181" in console_text(project)
    assert "serving" not in console_text(project)
    assert built_site.engine.all_containers == {}


def test_dry_down_stops_nothing(built_site: Site, guix: FakePublish) -> None:
    project = start_server(built_site)
    engine = TracedEngine(built_site.engine, project.console, perform=False)
    substitutes.down(replace(project, engine=engine))
    assert "+ docker rm" in console_text(project)
    assert "stopped" not in console_text(project)
    assert find_server(built_site)


def test_down_keeps_the_key_and_clean_removes_it(built_site: Site, guix: FakePublish) -> None:
    start_server(built_site)
    clean.clean(built_site.project(), work_only=True)
    assert find_server(built_site)
    substitutes.down(built_site.project())
    assert built_site.engine.all_containers == {}
    assert len(find_key_volumes(built_site)) == 1
    assert "no server of this project" in stop_server(built_site)
    start_server(built_site)
    clean.clean(built_site.project())
    assert built_site.engine.all_containers == {}
    assert built_site.engine.all_volumes == {}


def stop_server(built_site: Site) -> str:
    project = built_site.project()
    substitutes.down(project)
    return console_text(project)


def test_stages_use_the_server_and_images_do_not_contain_it(
    built_site: Site, guix: FakePublish
) -> None:
    keys = built_site.keys()
    start_server(built_site, NETWORK="host")
    assert built_site.keys() == keys
    built_site.make("install", force=True)
    (work_files,) = guix.work_files
    urls = " ".join(("http://127.0.0.1:8181", *DEFAULT_SUBSTITUTE_URLS))
    assert f"GUIX_SUBSTITUTE_URLS='{urls}'" in work_files["environment"]
    assert work_files[LOCAL_SERVER_KEY] == KEY
    # A key in this directory would become part of the image.
    assert work_files["keys/local-server.pub"] == ""
    assert built_site.keys() == keys


def test_proxy_before_the_server_is_reported(built_site: Site, guix: FakePublish) -> None:
    start_server(built_site, NETWORK="host")
    assert "through http_proxy" not in built_site.make("install", force=True)
    built_site.env["https_proxy"] = "http://proxy.test:3128"
    assert "through http_proxy" not in built_site.make("install", force=True)
    built_site.env["http_proxy"] = "http://proxy.test:3128"
    assert "substitutes: Guix asks http://" in built_site.make("install", force=True)


def test_unreachable_server_is_reported(built_site: Site, guix: FakePublish) -> None:
    start_server(built_site, NETWORK="net")
    output = built_site.make("install", force=True)
    assert "work containers cannot reach the running server" in output
    assert "GUIX_SUBSTITUTE_URLS" not in guix.work_files[-1]["environment"]


def test_stopped_server_is_ignored(built_site: Site, guix: FakePublish) -> None:
    start_server(built_site, NETWORK="host")
    find_server(built_site).running = False
    assert "substitutes" not in built_site.make("install", force=True)


def test_server_of_an_older_image_is_reported(built_site: Site, guix: FakePublish) -> None:
    start_server(built_site, NETWORK="host")
    assert "of an older image" not in built_site.make("install", packages=("other",))
    assert "of an older image" in built_site.make("install", packages=("third",))


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
def test_url_of_the_server_depends_on_the_network(
    built_site: Site, network: str, listen: str, addresses: dict[str, str], url: str | None
) -> None:
    built_site.env["NETWORK"] = network
    project = built_site.project()
    labels = {substitute_server.LISTEN_LABEL: listen}
    container = Container("i", "n", "m", labels, running=True, addresses=addresses)
    assert substitute_server.server_url(project.engine, project.settings, container) == url
