"""An exception becomes one message and an exit code."""

from __future__ import annotations

import errno
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from invoke.exceptions import Exit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType


@contextmanager
def guarded() -> Iterator[None]:
    """Turn what a user can cause into one line and an exit code."""
    from guix_tasks.errors import (
        EngineError,
        GuixTasksError,
        SettingsError,
        StoppedError,
        UsageError,
    )
    from guix_tasks.ui.console import Console

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise StoppedError

    before = signal.signal(signal.SIGTERM, interrupt)
    _hide_in_what_others_say()
    try:
        yield
    except SettingsError as error:
        for problem in error.problems:
            Console().error(problem)
        raise Exit(code=error.exit_code) from None
    except GuixTasksError as error:
        Console().error(str(error))
        raise Exit(code=error.exit_code) from None
    except KeyboardInterrupt:
        Console().error("stopped; what was under way has been undone")
        raise Exit(code=StoppedError.exit_code) from None
    except OSError as error:
        Console().error(
            f"{error.filename or 'a file'}: {error.strerror or error}; mend it and run again"
        )
        code = EngineError.exit_code if error.errno == errno.ENOSPC else UsageError.exit_code
        raise Exit(code=code) from None
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("docker", "dotenv", "requests"):
            raise
        Console().error(
            f"the Python of this inv ({sys.executable}) lacks the package {error.name}; "
            "use ./inv, or `pip install guix-tasks` into the environment that inv runs in"
        )
        raise Exit(code=2) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _hide_in_what_others_say() -> None:
    """Let tracebacks, and what libraries log under ``inv --debug``, pass the filter of all else."""
    import logging
    import threading
    import traceback

    from guix_tasks.ui.redact import clean

    class Masked(logging.Formatter):
        def __init__(self, own: logging.Formatter) -> None:
            super().__init__()
            self._own = own

        def format(self, record: logging.LogRecord) -> str:
            return clean(self._own.format(record))

    for handler in logging.root.handlers:
        if not isinstance(handler.formatter, Masked):
            handler.setFormatter(Masked(handler.formatter or logging.Formatter()))

    def tell(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stderr.write(clean("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = tell
    threading.excepthook = lambda args: tell(args.exc_type, args.exc_value, args.exc_traceback)
