"""Stage pull: Guix itself, from the channels asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.ledger import CHANNELS_LABEL
from guix_tasks.stage import Stage
from guix_tasks.work import FOLDER

if TYPE_CHECKING:
    from guix_tasks.settings import Settings


def pull_stage(settings: Settings) -> Stage:
    """``guix pull`` of ``GUIX_CHANNELS``, or of the channels that the image knows."""
    channels = settings.guix_channels
    commands = [guix.pull_argv(f"{FOLDER}/channels.scm" if channels else None)]
    if channels:
        # The image says where its Guix came from, and its own `guix pull` stays there.
        commands.append(
            ("install", "-D", "--mode=644", f"{FOLDER}/channels.scm", guix.CHANNELS_FILE)
        )
    return Stage(
        name="pull",
        commands=commands,
        report=guix.describe_argv(),
        labels=lambda report: {CHANNELS_LABEL: report.strip()},
        files={"channels.scm": channels.read_bytes()} if channels else {},
    )
