"""The fixtures of ``sites``: nothing else is here, for mypy takes no two modules of this name."""

from sites import made, serial_hashing, site

__all__ = ["made", "serial_hashing", "site"]
