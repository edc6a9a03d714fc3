"""Stage base: the project's Dockerfile on the base image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.engine.api import BuildSpec
from guix_tasks.engine.build_context import context_digest, context_entries
from guix_tasks.engine.credentials import remote_digest
from guix_tasks.errors import UsageError
from guix_tasks.files import file_digest, text_digest, tree_digest
from guix_tasks.oci.labels import BASE_DIGEST, BASE_NAME
from guix_tasks.stages.container import IMAGE_FOLDER, network, platform_input

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.settings import Settings

BASE_INPUT = "BASE_IMAGE"


def base_spec(settings: Settings, network: str | None) -> BuildSpec:
    """The build that makes the base stage, with a network if a build can join it."""
    arguments = _arguments(settings)
    # A builder takes HTTP_PROXY and http_proxy for one, and either of them if both are given.
    own = {name.lower() for name in arguments}
    return BuildSpec(
        context=settings.build_context,
        dockerfile=settings.dockerfile,
        args=arguments,
        secrets=settings.build_secrets,
        proxies={name: url for name, url in settings.proxies.items() if name.lower() not in own},
        platform=str(settings.platform) if settings.platform else None,
        network=network if network in ("host", "none") else None,
    )


def other_platform_only(engine: Engine, settings: Settings) -> str | None:
    """That the base image cannot be had for the platform that is asked for, if it is so."""
    wanted, reference = settings.platform, str(settings.base_image)
    image = engine.image(reference)
    if not wanted or not image or image.platform == str(wanted):
        return None
    if remote_digest(engine, settings, reference):
        return None
    return other_platform(reference, image, str(wanted))


def other_platform(reference: str, image: Image, wanted: str) -> str:
    return (
        f"only the engine has {reference}, and that for {image.platform} alone, not for {wanted}; "
        "push one for all of PLATFORMS to a registry, and name that in BASE_IMAGE"
    )


def base_inputs(engine: Engine, settings: Settings, known: Mapping[str, str]) -> dict[str, str]:
    """What the base stage is made from, by name, with the digest of each content.

    ``known`` are the inputs of the image that is there: the base image need not be here to tell
    that nothing changed.  Raises ``UsageError`` where the Dockerfile cannot be read.
    """
    spec = base_spec(settings, network(engine, settings))
    if not spec.context.is_dir():
        raise UsageError(f"BUILD_CONTEXT: {spec.context} is not a folder; name one")
    arguments = {name: text for name, text in spec.args.items() if name != BASE_INPUT}
    return {
        "Dockerfile": _dockerfile_digest(spec),
        "build context": _context_digest(settings, spec),
        "build arguments": text_digest(*sorted(f"{n}={text}" for n, text in arguments.items())),
        "image/": tree_digest(IMAGE_FOLDER),
        BASE_INPUT: _base_image(engine, settings, known.get(BASE_INPUT, "")),
        **platform_input(engine, settings),
    }


def base_annotations(settings: Settings, inputs: Mapping[str, str]) -> dict[str, str]:
    """What an image made from these inputs is built on, in the words of OCI, as labels."""
    _, _, digest = inputs[BASE_INPUT].partition(" ")
    # Of an image that is in no registry, what is there tells its content.
    known = {BASE_DIGEST: digest} if digest.startswith("sha256:") else {}
    return {BASE_NAME: str(settings.base_image), **known}


def _context_digest(settings: Settings, spec: BuildSpec) -> str:
    """The digest of the build context without what is written after the base is made.

    That is the lock, and logs.
    """
    without = set(settings.logs)
    if lock := settings.guix_channels_lock:
        without |= {lock.parent.resolve() / lock.name, lock.resolve()}
    return context_digest(context_entries(spec.context, spec.dockerfile), without)


def _arguments(settings: Settings) -> dict[str, str]:
    arguments = {BASE_INPUT: str(settings.base_image), **settings.build_args}
    if settings.guix_binary_url:
        arguments["GUIX_BINARY_URL"] = settings.guix_binary_url
        arguments["GUIX_BINARY_SHA256"] = settings.guix_binary_sha256 or ""
    return arguments


def _base_image(engine: Engine, settings: Settings, known: str) -> str:
    """Return the base image's name, and what distinguishes one content of that name from another.

    That is the digest by which a registry knows the image, because any machine can ask for it.
    For an image that no registry has, it is a digest of its layers and configuration, because
    its ID and date differ from build to build.  ``known`` is what the current base stage was made
    from: an image that got a registry's digest by being pushed is still the same.
    """
    reference = settings.base_image
    image = engine.image(str(reference))
    if image is None:
        here = known.startswith(f"{reference} ")
        if here:
            return known
        return f"{reference} {remote_digest(engine, settings, str(reference)) or ''}"
    config = (f"{name}={value}" for name, value in sorted(image.config.items()))
    content = f"{reference} {text_digest(*image.layers, *config)}"
    digests = [digest for name, _, digest in (each.partition("@") for each in image.digests)
               if name == reference.name]  # fmt: skip
    names = [f"{reference} {digest}" for digest in digests]
    if known in (*names, content):
        return known
    if names and engine.info().uses_containerd:
        # This store gives every image a digest, also one that was never in a registry.
        remote = remote_digest(engine, settings, str(reference))
        names = [f"{reference} {digest}" for digest in digests if digest == remote]
    return (names or [content])[0]


def _dockerfile_digest(spec: BuildSpec) -> str:
    try:
        return file_digest(spec.dockerfile)
    except OSError as error:
        raise UsageError(
            f"DOCKERFILE: {spec.dockerfile}: {error.strerror}; name one that can be read"
        ) from None
