"""What the messages of builders mean: their kind of error, and what fixes it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from guix_tasks.engine import retry
from guix_tasks.errors import BuilderError, GuixTasksError, RegistryError, StageError, full_disk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guix_tasks.engine.api import BuildSpec


_CONTROL = re.compile(
    # What draws on a terminal (ECMA-48), and other characters that have no place in a line.
    r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(\x07|\x1b\\)?|[ -/]*[0-~])"
    r"|[\x00-\x08\x0e-\x1b\x1f\x7f]"
)


def cause(log: str) -> str:
    """The line of a build's log that says why it failed."""
    lines = [line.strip() for line in _CONTROL.sub("", log).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    text = errors[-1] if errors else (lines[-1] if lines else "buildx gave no reason")
    # A target of bake stands before the error.
    return re.sub(r"^(ERROR: |target [\w-]+: |failed to build: |failed to solve: )+", "", text)


UNKNOWN_FLAG = "unknown flag: --security"


INSECURE_REFUSED = re.compile(
    r"security\.insecure is not allowed|granting entitlement security\.insecure"
)


_OTHER_DRIVER = (
    "use another driver (BUILDX_DRIVER=docker-container), or an engine with the containerd "
    "image store"
)


_HOST_NETWORK = "`inv buildx.setup --recreate` makes one that does, or set NETWORK=none"


_OLD_FRONTEND = (
    "the builder's Dockerfile frontend is older than 1.20: set BUILDKIT_SYNTAX to one that it can "
    "get, or use a builder with BuildKit 0.26 or newer"
)


_NO_PLATFORM = (
    "the builder, or the base image, does not have that platform: `inv buildx.setup --binfmt`, or "
    "mend PLATFORMS"
)


_REFUSED = (
    "the registry refuses: see that it is there (`inv registry.up` for a local one), and that "
    "DOCKER_USERNAME and DOCKER_PASSWORD, or `docker login`, may write there"
)


_NO_REGISTRY = (
    "no registry listens there for the builder: start it (`inv registry.up` for a local one), or "
    "mend IMAGE; a builder in a network of its own does not see this machine's localhost "
    "(`inv buildx.setup --recreate`)"
)


_CACHE = "mend BUILDX_CACHE_FROM or BUILDX_CACHE_TO"


_UNREACHABLE = (
    "what a node needs cannot be reached: start it, or mend BUILDX_DRIVER and BUILDX_NODES; "
    "`inv buildx.status` shows the nodes that there are"
)


_MENDS: Mapping[str, tuple[type[GuixTasksError], str]] = {
    INSECURE_REFUSED.pattern: (BuilderError, "`inv buildx.setup` says what mends it"),
    r"network\.host is not allowed|granting entitlement network\.host": (
        BuilderError, f"the builder does not allow steps on the host's network: {_HOST_NETWORK}",
    ),
    re.escape(UNKNOWN_FLAG): (BuilderError, _OLD_FRONTEND),
    r"no builder .* found": (BuilderError, "`inv buildx.setup` makes it"),
    r"multi-?platform|multiple platforms": (
        BuilderError, f"this builder makes one platform at a time: {_OTHER_DRIVER}",
    ),
    r"(attestation|cache export|(oci|docker) exporter).* not supported|exporter .* not be found": (
        BuilderError, f"the engine's own builder cannot do that: {_OTHER_DRIVER}",
    ),
    r"exec format error|no match for platform|does not match the specified platform": (
        BuilderError, _NO_PLATFORM,
    ),
    r"(cache|importer|exporter) requires|unknown cache": (BuilderError, _CACHE),
    r"(failed to push|failed to do request).*connection refused": (RegistryError, _NO_REGISTRY),
    r"failed to (push|authorize)|push access denied|insufficient_scope|"
    r"40[13] (unauthorized|forbidden)|no basic auth|failed to do request": (
        RegistryError, _REFUSED,
    ),
    r"failed to list workers|failed to initialize builder|connection refused|no such host|"
    r"cannot connect to the docker daemon|i/o timeout|deadline exceeded|no route to host": (
        BuilderError, _UNREACHABLE,
    ),
}  # fmt: skip
"""What mends a fault, and its kind, by words that buildx's message for it has."""


_STEP = re.compile(
    r'process ".*/var/guix/guix-tasks/stage (?P<stage>\S+)" did not complete successfully: '
    r"exit code: (?P<status>\d+)"
)


SCANNER = "docker/buildkit-syft-scanner"
"""What BuildKit makes an SBOM with."""


NO_BASE = (
    "failed to resolve source metadata",
    "pull access denied",
    "manifest unknown",
    "manifest for",
)
"""What builders say where the image that a Dockerfile begins from cannot be had."""


def failure(log: str, spec: BuildSpec | None = None) -> GuixTasksError:
    """The error that a log of buildx tells of, in one line, with what mends it if it is known.

    ``spec`` is what was being built, if anything was.
    """
    why = cause(log)
    if spec and any(words in why for words in NO_BASE):
        return build_error(spec, why)
    if step := _STEP.search(why):
        return StageError(
            f"{step['stage']}: the command failed with exit status {step['status']}, and nothing "
            "was pushed; the output above says why"
        )
    for words, (kind, mend) in _MENDS.items():
        if re.search(words, why, re.IGNORECASE):
            error = kind(f"{why}; {mend}")
            error.passes = retry.passes(why)
            return error
    return build_error(spec, why) if spec else BuilderError(f"{why}{full_disk(why)}")


def build_error(spec: BuildSpec, why: str) -> BuilderError:
    """The failure of a build in one line, with what mends it where that is known."""
    error = _build_error(spec, why)
    # What a step said, or a Dockerfile has, is nothing of a network; a number in it may look so.
    error.passes = retry.passes(why) and not _OWN_FAULT.search(why)
    return error


_OWN_FAULT = re.compile(
    r"did not complete successfully|non-zero code|parse error|not found|failed to compute cache key"
)


_ASKED = re.compile(
    r'failed to resolve source metadata for \S+: (failed to do request: )?((Head|Get) "\S+": )?'
)


def _build_error(spec: BuildSpec, why: str) -> BuilderError:
    base = spec.args.get("BASE_IMAGE", "")
    if SCANNER in why:
        return BuilderError(
            f"the SBOM's scanner {SCANNER} is out of the builder's reach: {why}; leave sbom out of "
            "BUILDX_ATTESTATIONS"
        )
    if "invalid UTF-8" in why:
        return BuilderError(
            f"a name in BUILD_CONTEXT is not UTF-8, which BuildKit cannot send: {why}; rename the "
            "file, or name it in .dockerignore"
        )
    if "unknown scheme oci-layout" in why:
        return BuilderError(
            f"only the engine has {base}, and this builder is one that no image can be handed to; "
            "push it to a registry that the builder reaches, and name that in BASE_IMAGE"
        )
    if any(word in why for word in NO_BASE):
        # Which image it was, and where it was asked for, is in it up to three times.
        short = _ASKED.sub("", why.removeprefix(f"{base}: "))
        return BuilderError(
            f"cannot get the base image {base}: {short}; set BASE_IMAGE to one that the engine has "
            "or can pull (`inv rootfs` makes one from Debian's packages)"
        )
    more = full_disk(why) or "; the output above says more"
    return BuilderError(f"{spec.dockerfile} does not build: {why}{more}")
