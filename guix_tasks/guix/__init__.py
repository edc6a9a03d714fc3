"""Guix: its commands, channels files and logs. Pure functions without side effects."""

from __future__ import annotations

from guix_tasks.guix.channels import (
    DEFAULT_BRANCH as DEFAULT_BRANCH,
    Channel as Channel,
    Introduction as Introduction,
    channels as channels,
    commits as commits,
    is_literal as is_literal,
    syntax_error as syntax_error,
    unauthenticated as unauthenticated,
)
from guix_tasks.guix.commands import (
    CHANNELS_FILE as CHANNELS_FILE,
    COMPRESSIONS as COMPRESSIONS,
    CURRENT_GUIX as CURRENT_GUIX,
    DEFAULT_SUBSTITUTE_URLS as DEFAULT_SUBSTITUTE_URLS,
    DOCKER as DOCKER,
    PACK_FORMATS as PACK_FORMATS,
    PROFILE as PROFILE,
    TARBALL as TARBALL,
    UNAUTHENTICATED as UNAUTHENTICATED,
    Forecast as Forecast,
    Pack as Pack,
    describe_argv as describe_argv,
    forecasts as forecasts,
    install_argv as install_argv,
    installed as installed,
    is_publishing as is_publishing,
    list_installed_argv as list_installed_argv,
    pack_argv as pack_argv,
    pack_manifest as pack_manifest,
    pack_suffix as pack_suffix,
    packed as packed,
    publish_script as publish_script,
    pull_argv as pull_argv,
    record_channels as record_channels,
    script as script,
    union_manifest as union_manifest,
    weather_argv as weather_argv,
)
from guix_tasks.guix.faults import (
    build_fault as build_fault,
    build_logs as build_logs,
    fetch_hint as fetch_hint,
    last_error as last_error,
    network_fault as network_fault,
    package_hint as package_hint,
    silent_servers as silent_servers,
)
