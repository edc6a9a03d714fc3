"""Stage base: the project's Dockerfile on the base image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.engine import BuildSpec
from guix_tasks.errors import UsageError
from guix_tasks.fingerprint import file_digest, text_digest, tree_digest
from guix_tasks.work import IMAGE_FOLDER, network, platform_input

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guix_tasks.engine import Engine, Image
    from guix_tasks.settings import Settings

BASE_INPUT = "BASE_IMAGE"


def base_spec(engine: Engine, settings: Settings) -> BuildSpec:
    """The build that makes the base stage."""
    reachable = network(engine, settings)
    return BuildSpec(
        context=settings.build_context,
        dockerfile=settings.dockerfile,
        args=_arguments(settings),
        secrets=settings.build_secrets,
        platform=str(settings.platform) if settings.platform else None,
        network=reachable if reachable in ("host", "none") else None,
    )


def base_inputs(engine: Engine, settings: Settings, known: Mapping[str, str]) -> dict[str, str]:
    """What the base stage is made from, by name, with the digest of each content.

    ``known`` are the inputs of the image that is there: the base image need not be here to tell
    that nothing changed.  Raises ``UsageError`` where the Dockerfile cannot be read.
    """
    spec = base_spec(engine, settings)
    arguments = {name: text for name, text in spec.args.items() if name != BASE_INPUT}
    return {
        "Dockerfile": _dockerfile_digest(spec),
        "build context": tree_digest(spec.context, engine.context_files(spec)),
        "build arguments": text_digest(*(f"{name}={text}" for name, text in arguments.items())),
        "entry point": tree_digest(IMAGE_FOLDER),
        BASE_INPUT: _base_image(engine, settings, known.get(BASE_INPUT, "")),
        **platform_input(settings),
    }


def content_of(image: Image, repository: str) -> str:
    """The digest that the registry knows an image by, or that of its content, if it knows none.

    Content is layers and configuration: an image's ID and date differ from build to build.
    """
    for reference in image.digests:
        name, _, digest = reference.partition("@")
        if name == repository:
            return digest
    return text_digest(*image.layers, *(f"{k}={v}" for k, v in sorted(image.config.items())))


def _arguments(settings: Settings) -> dict[str, str]:
    arguments = {BASE_INPUT: str(settings.base_image), **settings.build_args}
    if settings.guix_binary_url:
        arguments["GUIX_BINARY_URL"] = settings.guix_binary_url
        arguments["GUIX_BINARY_SHA256"] = settings.guix_binary_sha256 or ""
    return arguments


def _base_image(engine: Engine, settings: Settings, known: str) -> str:
    reference = settings.base_image
    image = engine.image(str(reference))
    if image:
        digest = content_of(image, reference.name)
    elif known.startswith(f"{reference} "):
        return known
    else:
        digest = engine.remote_digest(str(reference)) or ""
    return f"{reference} {digest}"


def _dockerfile_digest(spec: BuildSpec) -> str:
    try:
        return file_digest(spec.dockerfile)
    except OSError as error:
        raise UsageError(
            f"DOCKERFILE: {spec.dockerfile}: {error.strerror}; name one that can be read"
        ) from None
