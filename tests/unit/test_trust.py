"""Substitutes whose key the image does not trust: a stage that Guix would build from source."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

import pytest
from fake_engine import FakeContainer, Output, Site, console_text, new_site

from guix_tasks import guix
from guix_tasks.errors import StageError
from guix_tasks.guix.progress import Activity
from guix_tasks.stages.make import run_stage
from guix_tasks.stages.stage import Stage

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("serial_hashing")

STAGE = Stage("own", [("guix", "pull")], ("guix", "describe"), lambda _: {})
KEY, OTHER_KEY = "D0" * 32, "8D" * 32
ITEM = "a" * 32
DERIVATION = f"/gnu/store/{'b' * 32}-hello-2.12.drv"
URL = "https://a.test"
ACL = """(acl
 (entry
  (public-key
   (ecc
    (curve Ed25519)
    (q #{}#)))
  (tag (guix import))))
"""
BUILDING = f"""The following derivations will be built:
  {DERIVATION}
building {DERIVATION}...
"""
DOWNLOADING = f"""The following derivations will be built:
  {DERIVATION}
The following file will be downloaded:
  /gnu/store/{ITEM}-x
substituting /gnu/store/{ITEM}-x...
building {DERIVATION}...
"""


def narinfo(key: str) -> str:
    signature = (
        f"(signature (data (hash sha256 #{OTHER_KEY}#)) (sig-val (ecdsa (r #00#) (s #{KEY}#)))"
        f" (public-key (ecc (curve Ed25519) (q #{key}#))))"
    )
    encoded = base64.b64encode(signature.encode()).decode()
    return f"StorePath: /gnu/store/{ITEM}-hello\nSignature: 1;a.test;{encoded}\nURL: nar/x\n"


def cache_directory(url: str) -> str:
    """Return the directory in which Guix's daemon keeps the narinfos of a server."""
    name = base64.b32encode(hashlib.sha256(url.encode()).digest()).decode().lower().rstrip("=")
    return f"/var/guix/substitute/cache/{name}"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return new_site(tmp_path, GUIX_SANDBOX="privileged", GUIX_SUBSTITUTE_URLS=URL)


def run(site: Site, files: dict[str, str], log: str = BUILDING) -> str:
    """Run a stage in a container with these files, which prints a log; return the messages."""

    def behaviour(container: FakeContainer) -> Output:
        for line in log.splitlines(keepends=True):
            yield True, line.encode()
            if not container.running:
                return
        yield False, b"report\n"

    site.engine.behaviour = behaviour
    content = {name: text.encode() for name, text in files.items()}
    parent = site.engine.make_image({}, {"/x": b"", **content}, tag="parent:1")
    project = site.project()
    run_stage(project, STAGE, parent)
    return console_text(project)


def fail(site: Site, files: dict[str, str], log: str = BUILDING) -> str:
    with pytest.raises(StageError) as caught:
        run(site, files, log)
    return str(caught.value)


@pytest.mark.parametrize("acl", [{}, {guix.ACL: ACL.format(OTHER_KEY)}], ids=["none", "other"])
def test_stage_stops_if_the_image_trusts_no_key(site: Site, acl: dict[str, str]) -> None:
    line = fail(site, {**acl, cache_directory(URL): f'(narinfo (value "{narinfo(KEY)}"))'})
    assert line.startswith("own: the image does not trust the key of the substitutes of a.test,")
    assert "set GUIX_SUBSTITUTE_KEYS to the server's public key, or set GUIX_FALLBACK=yes" in line
    assert site.engine.changing_calls().count("stop") == 1


def test_narinfos_of_a_directory_are_read_from_its_mount(site: Site) -> None:
    site.env |= {"GUIX_SUBSTITUTE_URLS": "file:///srv/substitutes", "MOUNTS": "server:/srv"}
    site.write(f"server/substitutes/{ITEM}.narinfo", narinfo(KEY))
    assert "of file:///srv/substitutes, so" in fail(site, {})
    run(site, {guix.ACL: ACL.format(KEY)})


def test_fallback_prints_a_warning(site: Site) -> None:
    site.env["GUIX_FALLBACK"] = "yes"
    messages = run(site, {cache_directory(URL): narinfo(KEY)}, BUILDING * 2)
    assert messages.count("own: the image does not trust the key of the substitutes") == 1
    assert "stop" not in site.engine.changing_calls()


@pytest.mark.parametrize("log", [BUILDING, BUILDING * 2, DOWNLOADING])
def test_trusted_substitutes_do_not_stop_a_stage(site: Site, log: str) -> None:
    run(site, {guix.ACL: ACL.format(KEY.lower()), cache_directory(URL): narinfo(KEY)}, log)


def test_package_without_substitutes_is_built(site: Site) -> None:
    run(site, {})


def test_one_trusted_server_is_enough(site: Site) -> None:
    site.env["GUIX_SUBSTITUTE_URLS"] = f"{URL} https://b.test"
    trusted = {guix.ACL: ACL.format(KEY), cache_directory("https://b.test"): narinfo(KEY)}
    run(site, {**trusted, cache_directory(URL): narinfo(OTHER_KEY)})


def test_builds_without_substitutes_are_detected_after_their_list() -> None:
    activity, detected = Activity(), []
    for line in (BUILDING + BUILDING).splitlines():
        activity.look(line)
        detected.append(activity.take_build_without_substitutes())
    assert detected == [False, False, True] * 2


def test_invalid_signature_has_no_keys() -> None:
    assert guix.signing_keys("Signature: 1;a.test;x\nSignature: nothing\n") == set()
    assert guix.public_keys("(public-key (rsa (n #0A#) (e #010001#)))") == {"0A"}
