"""Checks of registries, and of channels and substitutes on servers and on mounts."""

from __future__ import annotations

import base64
import http.client
import re
import ssl
import urllib.error
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from guix_tasks import guix
from guix_tasks.commands.doctor.finding import Finding, failed, from_error, note, ok
from guix_tasks.engine.accounts import credentials_for, remote_digest
from guix_tasks.errors import UsageError
from guix_tasks.files import read_text
from guix_tasks.settings.parsers import channel_credentials
from guix_tasks.stages.channel_access import by_ssh, grant_access, mirrored, without_user
from guix_tasks.stages.container import (
    mounted_path,
    read_container_file,
    unstarted_container,
)
from guix_tasks.stages.log_faults import NO_SERVICES
from guix_tasks.stages.pull import channels_text, lock_mismatch, lock_mismatch_line, lock_text
from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.guix import Channel
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

_TIMEOUT = 10.0
"""Seconds to wait for a server."""


def check_base_image(project: Project) -> Finding:
    engine, reference = project.engine, str(project.settings.base_image)
    if image := engine.image(reference):
        return ok(f"{reference} is on the engine, {human_size(image.size)}")
    if remote_digest(engine, project.settings, reference):
        return ok(f"{reference} is in its registry")
    if project.ledger.find("base"):
        # BuildKit does not store the image of a FROM line on the engine.
        return note(f"{reference} is unavailable; the existing base stage can still be used")
    if engine.info().is_podman:
        return note(
            f"{reference} is not on the engine, and Podman cannot query its registry",
            f"`podman pull {reference}` shows whether it can be pulled",
        )
    return failed(
        f"{reference} is neither on the engine nor in its registry",
        "set BASE_IMAGE to an image that the engine can pull, or run `inv rootfs`",
    )


def check_registry(engine: Engine, settings: Settings) -> Finding:
    """Query the registry for the image. A missing image is not an error."""
    reference, registry = str(settings.image), settings.image.registry
    account = credentials_for(engine, settings, reference)
    if not engine.check_registry(reference, account):
        return note(
            f"{registry} was not tested: Podman only tests registries with an account",
            "set DOCKER_USERNAME and DOCKER_PASSWORD",
        )
    if registry in engine.local_accounts():
        return ok(f"{registry} answers to the account that `inv registry.up` created")
    if settings.docker_username:
        return ok(f"{registry} answers to DOCKER_USERNAME")
    return ok(f"{registry} answers to the account of Docker's configuration, if any")


def check_channels(settings: Settings) -> Finding | None:
    """Check the channels files; None if they name the channels to check."""
    lock, configured = lock_text(settings), channels_text(settings)
    if lock and (problem := lock_mismatch(configured, lock)):
        return from_error(lock_mismatch_line(settings, problem))
    text = lock or configured
    if text is None:
        return note("no channels are set; those of the base image are used")
    if not guix.channels(text):
        return note("GUIX_CHANNELS computes the channels; none was tested")
    return None


def channels(settings: Settings) -> list[Channel]:
    """Return the channels to check; none if ``check_channels`` has a finding."""
    with suppress(UsageError, OSError):
        if check_channels(settings) is None:
            text = lock_text(settings) or channels_text(settings) or ""
            return list(guix.channels(text).values())
    return []


def check_channel(engine: Engine, settings: Settings, channel: Channel) -> Finding:
    url = mirrored(settings, channel.url)
    shown_url = without_user(url)
    if url.startswith(("https://", "http://")) and settings.network != "none":
        return _contact(
            settings,
            # The first request of Git's smart protocol, see gitprotocol-http(5). Guix's libgit2
            # supports no older protocol.
            f"{url.rstrip('/')}/info/refs?service=git-upload-pack",
            shown_url=shown_url,
            kind="a Git repository",
            response="service=git-upload-pack",
            fix="correct GUIX_CHANNELS or the network; for a private channel set "
            "GUIX_CHANNEL_CREDENTIALS",
        )
    if url.startswith(("file://", "/")):
        return _check_mounted(settings, url.removeprefix("file://"))
    if by_ssh(settings, f'"{url}"'):
        with grant_access(engine, settings, f'"{url}"'):
            return ok("an SSH agent and known hosts are available")
    return note(f"{shown_url} was not tested")


def check_substitutes(project: Project, url: str) -> Finding:
    """Check that a substitute server answers, and that the image trusts its key if it shows one."""
    settings, url, file = project.settings, url.rstrip("/"), "nix-cache-info"
    if url.startswith("file://"):
        found = _check_mounted(settings, url.removeprefix("file://"), file)
    elif settings.network == "none":
        return note(f"{url} is unreachable with NETWORK=none")
    else:
        found = _contact(
            settings,
            f"{url}/{file}",
            shown_url=url,
            kind="a substitute server",
            response="^StoreDir:",
            fix="correct GUIX_SUBSTITUTE_URLS: without substitutes Guix builds everything from "
            "source",
        )
    if found.state != "ok":
        return found
    return _check_use(project, url, found.message)


def _check_use(project: Project, url: str, answer: str) -> Finding:
    """Check that Guix in an image can reach a server that answers, and trusts its key."""
    settings, keys = project.settings, _signing_keys(project.settings, url)
    base = None if project.engine.is_dry else project.ledger.find("base")
    if base:
        trusted, has_services = _image_files(project, base)
        if not (has_services or settings.proxies or urlsplit(url).port or url.startswith("file:")):
            return failed(f"{answer}, but not to Guix", NO_SERVICES)
        if keys and not keys & trusted:
            return failed(
                f"{answer}, but the image does not trust its key",
                "set GUIX_SUBSTITUTE_KEYS to its public key: Guix ignores these substitutes",
            )
        if keys:
            return ok(answer)
    if url in guix.DEFAULT_SUBSTITUTE_URLS or settings.guix_substitute_keys:
        return ok(answer)
    return note(
        f"{answer}, but no key is set for it",
        "set GUIX_SUBSTITUTE_KEYS, or Guix refuses its substitutes unless the base image trusts "
        "the key",
    )


def _signing_keys(settings: Settings, url: str) -> set[str]:
    """Return the keys that sign a server's substitutes, as far as it shows them."""
    if url.startswith("file://"):
        source = mounted_path(settings, url.removeprefix("file://"))
        narinfo = next(source.glob("*.narinfo"), None) if source else None
        return guix.signing_keys(read_text(narinfo, "utf-8", "replace")) if narinfo else set()
    # `guix publish` has this file.
    with suppress(OSError, ValueError, http.client.HTTPException):
        return guix.public_keys(_get(settings, f"{url}/signing-key.pub"))
    return set()


def _image_files(project: Project, image: Image) -> tuple[set[str], bool]:
    """Return the keys that Guix trusts in containers of an image, and if it has /etc/services."""
    engine, settings = project.engine, project.settings
    keys = [read_text(path, "utf-8", "replace") for path in settings.guix_substitute_keys]
    with unstarted_container(engine, settings, image.id, name="files") as container:
        acl = read_container_file(engine, container, guix.ACL, follow=True)
        services = next(engine.copy_out(container, "/etc/services"), b"")
    return guix.public_keys("\n".join([acl.decode(errors="replace"), *keys])), bool(services)


def _check_mounted(settings: Settings, path: str, file: str = "") -> Finding:
    """Check that a mount provides a path of the work container, and in it ``file``."""
    source = mounted_path(settings, path)
    if source is None:
        return note(f"{path} must be in the base image, because MOUNTS does not contain it")
    required = source / file
    if required.exists():
        return ok(f"{path} is {source}")
    message = f"{path} is mounted from {source}, but {required} does not exist"
    return failed(message, "correct MOUNTS")


def _contact(
    settings: Settings, url: str, *, shown_url: str, kind: str, response: str, fix: str
) -> Finding:
    """Check that an HTTP service answers.

    ``url`` may contain an account, ``shown_url`` must not. Only a response of this kind of service
    matches ``response``, not that of a captive portal.
    """
    try:
        text = _get(settings, url)
        if re.search(response, text, re.MULTILINE):
            return ok(f"{shown_url} answers")
        answer = f"answers, but not as {kind}"
    except urllib.error.HTTPError as error:
        answer = f"answers {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            fix = guix.fetch_hint("guix error: certificate verification") or fix
        answer = f"does not answer: {str(cause) or type(cause).__name__}"
    return failed(f"{shown_url} {' '.join(answer.split())}", fix)


def _get(settings: Settings, url: str) -> str:
    """Return the first 1000 bytes of a file on a server."""
    tls = ssl.create_default_context()
    if settings.extra_ca_file:
        tls.load_verify_locations(cadata=read_text(settings.extra_ca_file, "ascii", "replace"))
    request = _request(settings, url)
    # Callers pass only http and https URLs.
    with urllib.request.urlopen(request, timeout=_TIMEOUT, context=tls) as body:  # noqa: S310
        text: str = body.read(1000).decode(errors="replace")
        return text


def _request(settings: Settings, url: str) -> urllib.request.Request:
    """Return a request with Git's user agent, because many servers refuse Python's.

    Its account is that of the URL, or of ``GUIX_CHANNEL_CREDENTIALS``, as for `inv pull`.
    """
    parts = urlsplit(url)
    account, _, host = parts.netloc.rpartition("@")
    account = unquote(account)
    credentials = settings.guix_channel_credentials
    for prefix, user, password in channel_credentials(credentials.reveal() if credentials else ""):
        if url.startswith(prefix):
            account = f"{user}:{password}"
            break
    request = urllib.request.Request(  # noqa: S310
        parts._replace(netloc=host).geturl(), headers={"User-Agent": "git/2 guix-tasks"}
    )
    if account:
        token = base64.b64encode(account.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request
