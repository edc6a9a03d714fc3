"""Keys that sign substitutes, and keys that Guix trusts."""

from __future__ import annotations

import base64
import binascii
import re
from contextlib import suppress

ACL = "/etc/guix/acl"
"""File with the keys that Guix trusts (``%acl-file``)."""


def public_keys(text: str) -> set[str]:
    """Return the keys of an access control list, of a key file, or of a signature.

    Each is given by its point (Ed25519) or its modulus (RSA).
    """
    return {key.upper() for key in re.findall(r"\([qn]\s+#([0-9A-Fa-f]+)#\)", text)}


def signing_keys(narinfo: str) -> set[str]:
    """Return the keys that signed a narinfo, also one in the daemon's cache of narinfos."""
    keys: set[str] = set()
    for signature in re.findall(r"Signature: 1;[^;]*;([A-Za-z0-9+/=]+)", narinfo):
        with suppress(binascii.Error):
            keys |= public_keys(base64.b64decode(signature).decode(errors="replace"))
    return keys
