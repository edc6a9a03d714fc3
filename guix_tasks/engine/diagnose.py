"""Exceptions and hints for the error messages of builders."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from guix_tasks.engine import retry
from guix_tasks.errors import (
    FEWER_LAYERS,
    UPLOAD_LIMIT,
    BuilderError,
    GuixTasksError,
    RegistryError,
    StageError,
    full_disk,
)
from guix_tasks.ui.log import LogReader
from guix_tasks.ui.redact import to_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guix_tasks.engine.api import BuildSpec


def cause(log: str) -> str:
    """Return the line of a build's log with the error."""
    reader = LogReader()
    lines = [*filter(None, map(str.strip, [*reader.read(to_bytes(log)), *reader.end()]))]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    text = errors[-1] if errors else (lines[-1] if lines else "buildx gave no reason")
    # bake prefixes the error with the target.
    return re.sub(r"^(ERROR: |target [\w-]+: |failed to build: |failed to solve: )+", "", text)


UNKNOWN_FLAG = "unknown flag: --security"

INSECURE_REFUSED = re.compile(
    r"security\.insecure is not allowed|granting entitlement security\.insecure"
)

EMULATE = "docker run --privileged --rm tonistiigi/binfmt --install"
"""Command that installs emulators, from docs.docker.com/build/building/multi-platform."""

_OTHER_DRIVER = (
    "use another driver (BUILDX_DRIVER=docker-container), or an engine with the containerd "
    "image store"
)

_HINTS: Mapping[str, GuixTasksError] = {
    INSECURE_REFUSED.pattern: BuilderError("run `inv buildx.setup`, which prints the fix"),
    r"network\.host is not allowed|granting entitlement network\.host": BuilderError(
        "the builder does not allow steps on the host's network: run "
        "`inv buildx.setup --recreate`, which allows it, or set NETWORK=none"
    ),
    re.escape(UNKNOWN_FLAG): BuilderError(
        "the builder's Dockerfile frontend is older than 1.20: set BUILDKIT_SYNTAX to one that the "
        "builder can pull, or use a builder with BuildKit 0.26 or newer"
    ),
    r"no builder .* found": BuilderError("run `inv buildx.setup` to create it"),
    r"multi-?platform|multiple platforms": BuilderError(
        f"this builder builds one platform at a time: {_OTHER_DRIVER}"
    ),
    r"(attestation|cache export|(oci|docker) exporter).* not supported|"
    r"exporter .* not be found": BuilderError(
        f"the engine's built-in builder cannot do that: {_OTHER_DRIVER}"
    ),
    r"exec format error|no match for platform|does not match the specified platform": BuilderError(
        "the builder or the base image does not have this platform: install its emulator with "
        f"`{EMULATE} ARCH`, or change PLATFORMS"
    ),
    r"(cache|importer|exporter) requires|unknown cache": BuilderError(
        "fix BUILDX_CACHE_FROM or BUILDX_CACHE_TO"
    ),
    r"driver option|tls enabled|duplicate endpoint|failed to parse endpoint": BuilderError(
        "correct BUILDX_NODES"
    ),
    r"(failed to push|failed to do request).*connection refused": RegistryError(
        "no registry listens there for the builder: start it (`inv registry.up` for a local one), "
        "or change IMAGE; a builder in a separate network cannot reach this machine's localhost "
        "(`inv buildx.setup --recreate`)"
    ),
    r"413 (request entity|payload|content) too large|unexpected status.*: 413\b": RegistryError(
        UPLOAD_LIMIT
    ),
    r"failed to (push|authorize)|push access denied|insufficient_scope|"
    r"40[13] (unauthorized|forbidden)|no basic auth|failed to do request": RegistryError(
        "the registry refuses: check that it runs (`inv registry.up` for a local one), and that "
        "the account of DOCKER_USERNAME and DOCKER_PASSWORD, or of `docker login`, may write to it"
    ),
    r"failed to list workers|failed to initialize builder|connection refused|no such host|"
    r"cannot connect to the docker daemon|i/o timeout|deadline exceeded|"
    r"no route to host": BuilderError(
        "the builder's node is unreachable: start it, or fix BUILDX_DRIVER and BUILDX_NODES; "
        "`inv buildx.status` shows the nodes"
    ),
}
"""Kind of error and its hint, by a pattern of buildx's message."""

_STEP = re.compile(
    r'process ".*/var/guix/guix-tasks/stage (?P<stage>\S+)" did not complete successfully: '
    r"exit code: (?P<status>\d+)"
)


SCANNER = "docker/buildkit-syft-scanner"
"""Image with which BuildKit generates an SBOM."""


NO_BASE = (
    "failed to resolve source metadata",
    # The classic builder, if the engine has the containerd image store.
    "failed to resolve reference",
    "error from registry",
    "httpReadSeeker",
    "pull access denied",
    "manifest unknown",
    "manifest for",
)
"""Messages of builders about an unavailable base image."""


def failure(log: str, spec: BuildSpec | None = None) -> GuixTasksError:
    """Return the error in a log of buildx, in one line, with a hint if one is known.

    ``spec`` has the options of the build, if the call was one.
    """
    reason = cause(log)
    if spec and any(words in reason for words in NO_BASE):
        return build_error(spec, reason)
    if step := _STEP.search(reason):
        return StageError(
            f"{step['stage']}: the command failed with exit status {step['status']}, and nothing "
            "was pushed; see the output above"
        )
    hints = (hint for pattern, hint in _HINTS.items() if re.search(pattern, reason, re.IGNORECASE))
    hint = next(hints, None)
    if spec and not hint:
        return build_error(spec, reason)
    error = type(hint)(f"{reason}; {hint}") if hint else BuilderError(reason + full_disk(reason))
    error.is_transient = retry.is_transient(reason)
    return error


_PERMANENT = re.compile(
    r"did not complete successfully|non-zero code|parse error|not found|failed to compute cache key"
)


_REQUEST = re.compile(
    r"(unknown: )?failed to resolve (source metadata for|reference) \S+: "
    r'(failed to do request: )?((Head|Get) "\S+": )?'
)


def build_error(spec: BuildSpec, reason: str) -> BuilderError:
    """Return the error of a failed build, in one line, with a hint if one is known."""
    base = spec.args.get("BASE_IMAGE", "")
    if SCANNER in reason:
        message = (
            f"the builder cannot pull the SBOM scanner {SCANNER}: {reason}; remove sbom from "
            "BUILDX_ATTESTATIONS"
        )
    elif "invalid UTF-8" in reason:
        message = (
            f"a name in BUILD_CONTEXT is not UTF-8, which BuildKit cannot send: {reason}; rename "
            "the file, or list it in .dockerignore"
        )
    elif "unknown scheme oci-layout" in reason:
        message = (
            f"only the engine has {base}, and this builder cannot read an image of the engine; "
            "push it to a registry that the builder reaches, and set BASE_IMAGE to that reference"
        )
    # The classic builder reports only its request to a registry.
    elif any(words in reason for words in NO_BASE) or reason.startswith(('Get "', 'Head "')):
        # The message repeats the reference and the URL up to three times.
        short = _REQUEST.sub("", reason.removeprefix(f"{base}: ")).removeprefix(f"{base}: ")
        message = (
            f"cannot get the base image {base}: {short}; set BASE_IMAGE to one that the engine has "
            "or can pull (`inv rootfs` builds one from Debian's packages)"
        )
    else:
        hint = full_disk(reason) or "; see the output above"
        if "max depth exceeded" in reason:
            hint = f"; {FEWER_LAYERS}"
        message = f"cannot build {spec.dockerfile}: {reason}{hint}"
    error = BuilderError(message)
    # A number in the output of a step, in a Dockerfile or in a tag may look like an HTTP status.
    text = reason.replace(base, "")
    error.is_transient = retry.is_transient(text) and not _PERMANENT.search(text)
    return error
