"""The fixtures of ``sites``: nothing else is here, for mypy takes no two modules of this name."""

from sites import (
    fake_programs,
    made,
    no_accounts,
    no_ci_job,
    no_repository,
    no_secrets,
    serial_hashing,
    site,
)

__all__ = [
    "fake_programs",
    "made",
    "no_accounts",
    "no_ci_job",
    "no_repository",
    "no_secrets",
    "serial_hashing",
    "site",
]
