"""What Guix's log says of faults.  Pure."""

from __future__ import annotations

import re

# Guix 1.5, substitutes.scm, scripts/substitute.scm, scripts/pull.scm and git.scm.
_SILENT = re.compile(
    r"guix substitute: warning: (\S+): (?:host not found|(?:TLS )?connection failed): "
)


_NETWORK = re.compile(
    r"usually happens due to networking issues"
    r"|^guix [a-z-]+: error: (?!.*unknown package)"
    r"(?:Git error(?!.*(?:status code: 4|authentication|credentials|certificate|hostkey"
    r"|object not found|cannot locate))"
    r"|.*(?:\bTLS|connect|timed out|resolv|unexpected EOF))"
    r"|guix substitute: error: "
    r"|In procedure (getaddrinfo|connect): ",
    re.MULTILINE,
)


_BUILD = re.compile(r"builder for [`']\S+' failed|build of \S+ failed")


_BUILD_LOG = re.compile(r"'(/var/log/guix/drvs/[0-9a-z]{2}/[0-9a-z]{30}-[\w+.?=-]+)'", re.ASCII)


def silent_servers(log: str) -> set[str]:
    """The hosts of the substitute servers that did not answer, as a log tells."""
    return {host.lower() for host in _SILENT.findall(log)}


def network_fault(log: str) -> bool:
    """Whether a command failed for want of a network, and not because something does not build."""
    return _NETWORK.search(log) is not None and not build_fault(log)


_FETCH_MENDS = {
    r"authentication required|refused the credentials|status code: 40[13]": (
        "the channel's server does not let it in: see that GUIX_CHANNEL_CREDENTIALS has an account "
        "for its address, which may read there"
    ),
    r"remote rejected authentication|SSH credentials|no auth sock|ssh agent": (
        "the channel's host takes no key of your SSH agent: `ssh-add` the right one, and name the "
        "user in the channel's URL, as ssh://git@HOST/PATH"
    ),
    r"remote ssh hostkey": (
        "SSH_KNOWN_HOSTS does not have the host's key: check it, and add what `ssh-keyscan` says"
    ),
    r"certificate (?:is invalid|verif)|could not be verified|tls-certificate-error": (
        "no authority that is trusted vouches for the server: name that authority's certificate in "
        "EXTRA_CA_FILE"
    ),
}
"""What libgit2, libssh2 and Guix say where a server may not be used, and what mends it."""


def fetch_mend(log: str) -> str:
    """What mends a fault between Guix and a server, as a log tells; empty where it tells none."""
    faults = "\n".join(re.findall(r"^(?:guix .*error:|X\.509) .*$", log, re.MULTILINE))
    found = (mend for says, mend in _FETCH_MENDS.items() if re.search(says, faults))
    return next(found, "")


_ERROR = re.compile(r"^(?:guix [\w-]+: |(/\S+:\d+:\d+: ))error: (.+)$", re.MULTILINE)


def last_error(log: str) -> str:
    """The last error of Guix in a log, with its place in a file; empty where there is none."""
    found = ["".join(each) for each in _ERROR.findall(log)]
    # That a file does not load, with a colon behind it, Guix says after why, too.
    told = [each for each in found if not each.endswith(":")]
    return (told or found or [""])[-1].rstrip(":")


def package_mend(error: str) -> str:
    """How to find the package that an error of Guix does not know; empty where it is another."""
    found = re.match(r"([\w.+-]+)(?:@\S+)?: (?:unknown package|package not found)", error)
    return f"look for it with `inv run -- guix search {found[1]}`" if found else ""


def build_fault(log: str) -> bool:
    """Whether something did not build, as a log tells."""
    return _BUILD.search(log) is not None


def build_logs(log: str) -> list[str]:
    """Where the build logs are that a log points to."""
    return list(dict.fromkeys(_BUILD_LOG.findall(log)))
