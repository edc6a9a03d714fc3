"""Stage base: build the project's Dockerfile on the base image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.engine.accounts import remote_digest
from guix_tasks.engine.api import BuildSpec
from guix_tasks.engine.build_context import context_digest, context_entries
from guix_tasks.errors import UsageError
from guix_tasks.files import file_digest, text_digest, tree_digest
from guix_tasks.oci.labels import BASE_DIGEST, BASE_NAME
from guix_tasks.stages.container import RESOURCES, image_platform, network

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.settings import Settings

BASE_INPUT = "BASE_IMAGE"


def base_spec(settings: Settings, network: str | None) -> BuildSpec:
    """Return the build of the base stage.  Of the networks, builds support only host and none."""
    arguments = {BASE_INPUT: str(settings.base_image), **settings.build_args}
    if settings.guix_binary_url:
        arguments["GUIX_BINARY_URL"] = settings.guix_binary_url
        arguments["GUIX_BINARY_SHA256"] = settings.guix_binary_sha256 or ""
    # A builder treats HTTP_PROXY and http_proxy as one argument and uses either if both are set.
    names = {name.lower() for name in arguments}
    return BuildSpec(
        context=settings.build_context,
        dockerfile=settings.dockerfile,
        args=arguments,
        secrets=settings.build_secrets,
        proxies={name: url for name, url in settings.proxies.items() if name.lower() not in names},
        platform=str(settings.platform) if settings.platform else None,
        network=network if network in ("host", "none") else None,
    )


def base_platform_error(engine: Engine, settings: Settings) -> str | None:
    """Return an error line if no base image for the platform of the settings is available."""
    platform, reference = settings.platform, str(settings.base_image)
    image = engine.image(reference)
    if not platform or not image or image.platform == str(platform):
        return None
    if remote_digest(engine, settings, reference):
        return None
    return other_platform(reference, image, str(platform))


def other_platform(reference: str, image: Image, platform: str) -> str:
    return (
        f"{reference} is in no registry, and the engine's image is for {image.platform}, not for "
        f"{platform}; push an image for all PLATFORMS to a registry and set BASE_IMAGE to it"
    )


def file_inputs(engine: Engine, settings: Settings) -> dict[str, str]:
    """Return the inputs of the base stage without the base image: digests by name.

    Raise ``UsageError`` if the Dockerfile or the build context cannot be read.
    """
    spec = base_spec(settings, network(engine, settings))
    if not spec.context.is_dir():
        raise UsageError(f"BUILD_CONTEXT: {spec.context} is not a directory; choose a directory")
    arguments = {name: text for name, text in spec.args.items() if name != BASE_INPUT}
    return {
        "Dockerfile": _dockerfile_digest(spec.dockerfile),
        "build context": context_digest(
            context_entries(spec.context, spec.dockerfile), settings.no_inputs
        ),
        "build arguments": text_digest(*sorted(f"{n}={text}" for n, text in arguments.items())),
        "image/": tree_digest(RESOURCES),
        "platform": image_platform(engine, settings),
    }


def base_annotations(settings: Settings, inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the OCI labels that name the base image of an image made from these inputs."""
    _, _, digest = inputs[BASE_INPUT].partition(" ")
    # A base image that is in no registry has a content digest without a prefix instead.
    digest_label = {BASE_DIGEST: digest} if digest.startswith("sha256:") else {}
    return {BASE_NAME: str(settings.base_image), **digest_label}


def base_image_input(engine: Engine, settings: Settings, known: str) -> str:
    """Return the base image's reference and digest, separated by a space.

    The digest is the one of the registry, which is the same on all machines.  An image that is in
    no registry has a digest of its layers and configuration instead, because its ID and date
    differ between builds.

    ``known`` is the input that the current base stage was made from.  It is returned if it still
    describes the image: a push adds a registry's digest to an image whose content is the same.
    With it the base image need not be in the engine to find that nothing changed.
    """
    reference = settings.base_image
    image = engine.image(str(reference))
    if image is None:
        if known.startswith(f"{reference} "):
            return known
        return f"{reference} {remote_digest(engine, settings, str(reference)) or ''}"

    # Engines differ in the fields that they report without a value.
    config = (f"{name}={value}" for name, value in sorted(image.config.items()) if value)
    content_digest = text_digest(*image.layers, *config)
    digests = [text.removeprefix(f"{reference.name}@") for text in image.digests
               if text.startswith(f"{reference.name}@")]  # fmt: skip
    if known in [f"{reference} {digest}" for digest in (*digests, content_digest)]:
        return known
    if digests and engine.info().uses_containerd:
        # containerd's image store gives a digest even to an image that is in no registry.
        remote = remote_digest(engine, settings, str(reference))
        digests = [digest for digest in digests if digest == remote]
    return f"{reference} {digests[0] if digests else content_digest}"


def _dockerfile_digest(dockerfile: Path) -> str:
    try:
        return file_digest(dockerfile)
    except OSError as error:
        raise UsageError(
            f"DOCKERFILE: cannot read {dockerfile}: {error.strerror}; choose a readable file"
        ) from None
