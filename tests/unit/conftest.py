"""Import the fixtures of ``sites``, because mypy accepts only one module ``conftest``."""

from sites import (
    built_site,
    fake_programs,
    no_accounts,
    no_ci_job,
    no_repository,
    no_secrets,
    serial_hashing,
    site,
)

__all__ = [
    "built_site",
    "fake_programs",
    "no_accounts",
    "no_ci_job",
    "no_repository",
    "no_secrets",
    "serial_hashing",
    "site",
]
