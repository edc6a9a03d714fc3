"""Guix: its commands, channels files and logs. Pure functions without side effects."""

from guix_tasks.guix.channels import *
from guix_tasks.guix.commands import *
from guix_tasks.guix.faults import *
from guix_tasks.guix.search_paths import *
from guix_tasks.guix.signatures import *
