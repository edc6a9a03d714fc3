"""Diagnosis of errors in logs of Guix."""

from __future__ import annotations

import re

# Guix 1.5, substitutes.scm, scripts/substitute.scm, scripts/pull.scm and git.scm.
_SILENT = re.compile(
    r"guix substitute: warning: (\S+): (?:host not found|(?:TLS )?connection failed): "
)


_NETWORK = re.compile(
    r"usually happens due to networking issues"
    r"|^guix [a-z-]+: error: (?!.*unknown package)"
    r"(?!Git error.*(?:status code: 4|authentication|credentials|certificate|hostkey"
    r"|not found|cannot locate|failed to resolve path|not owned|unsupported URL))"
    r"(?:Git error|.*(?:\bTLS|connect|timed out|resolv|unexpected EOF))"
    r"|guix substitute: error: "
    r"|In procedure (getaddrinfo|connect): ",
    re.MULTILINE,
)


_BUILD = re.compile(r"builder for [`']\S+' failed|build of \S+ failed")


_BUILD_LOG = re.compile(r"'(/var/log/guix/drvs/[0-9a-z]{2}/[0-9a-z]{30}-[\w+.?=-]+)'", re.ASCII)


def silent_servers(log: str) -> set[str]:
    """Return the hosts of substitute servers that did not answer."""
    return {host.lower() for host in _SILENT.findall(log)}


def network_fault(log: str) -> bool:
    """Return True if a command failed because of the network, and no build failed."""
    return _NETWORK.search(log) is not None and not build_fault(log)


_FETCH_HINTS = {
    r"authentication required|refused the credentials|status code: 40[13]": (
        "the channel's server denies access: check that GUIX_CHANNEL_CREDENTIALS contains an "
        "account for its address with permission to read the channel"
    ),
    r"remote rejected authentication|SSH credentials|no auth sock|ssh agent": (
        "the channel's host accepts no key of your SSH agent: add the right key with `ssh-add`, "
        "and put the user into the channel's URL, for example ssh://git@HOST/PATH"
    ),
    r"remote ssh hostkey": (
        "SSH_KNOWN_HOSTS does not contain the host's key: add the output of `ssh-keyscan` after "
        "you have checked it"
    ),
    r"certificate (?:is invalid|verif)|could not be verified|tls-certificate-error": (
        "the server's certificate is not signed by a trusted authority: set EXTRA_CA_FILE to the "
        "certificate of its authority"
    ),
    r"unsupported manifest format": (
        "the Guix of the lock is older than that of the base image and cannot read its profile: "
        "update the lock with `inv pull --update`, or use an older BASE_IMAGE"
    ),
}
"""Hints by errors of libgit2, libssh2 and Guix."""


_NO_BUILD_NETWORK = (
    "a build had no network to download with: that needs slirp4netns in the base image, and "
    "GUIX_SANDBOX=privileged, or rootless and a /dev/net/tun that every user of the engine's "
    "machine may open"
)


def fetch_hint(log: str) -> str:
    """Return the hint about an error between Guix and a server or an older Guix, or nothing."""
    if "network access disabled" in log:  # build.cc of Guix 1.5
        return _NO_BUILD_NETWORK
    errors = "\n".join(re.findall(r"^(?:guix .*error:|X\.509) .*$", log, re.MULTILINE))
    hints = (hint for pattern, hint in _FETCH_HINTS.items() if re.search(pattern, errors))
    return next(hints, "")


_ERROR = re.compile(
    r"^(?:guix [\w-]+: error: (.+)"
    r"|(/\S+:\d+:\d+: )(?:error: (.+)|(missing closing parenthesis))"
    r"|error: (\S+: unbound variable)|(no code for module \(.*\)))$",
    re.MULTILINE,
)


_FAILED_BUILD = re.compile(
    r"^builder for [`']/gnu/store/[0-9a-z]{32}-([\w+.?=-]+)\.drv' failed", re.ASCII | re.MULTILINE
)


def last_error(log: str) -> str:
    """Return the last error of Guix in a log, with its position in a file, or nothing."""
    errors = ["".join(groups) for groups in _ERROR.findall(log)]
    # An error that ends in a colon reports that a file failed to load, after the actual error.
    causes = [error for error in errors if not error.endswith(":")]
    error = (causes or errors or [""])[-1].rstrip(":")
    # The last error is about the profile or another item that needs the package.
    packages = dict.fromkeys(_FAILED_BUILD.findall(log))
    if packages and build_fault(error):
        return f"the build of {', '.join(packages)} failed"
    return error


def package_hint(error: str) -> str:
    """Return the hint about an unknown package, or nothing for other errors of Guix."""
    match = re.match(r"([\w.+-]+)(?:@\S+)?: (?:unknown package|package not found)", error)
    return f"search for it with `inv run -- guix search {match[1]}`" if match else ""


def build_fault(log: str) -> bool:
    return _BUILD.search(log) is not None


def build_logs(log: str) -> list[str]:
    """Return the paths of build logs that a log mentions."""
    return list(dict.fromkeys(_BUILD_LOG.findall(log)))
