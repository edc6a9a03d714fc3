"""Translation of exceptions to one-line messages and exit codes."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from invoke.exceptions import Exit

from guix_tasks.errors import EngineError, GuixTasksError, SettingsError, StoppedError, UsageError
from guix_tasks.ui.console import Console
from guix_tasks.ui.redact import clean

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType


@contextmanager
def report_errors() -> Iterator[None]:
    """Exit with one line and an exit code after an error that a user can cause."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise StoppedError

    previous_handler = signal.signal(signal.SIGTERM, interrupt)
    _redact_logs_and_tracebacks()
    try:
        yield
    except GuixTasksError as error:
        for problem in error.problems if isinstance(error, SettingsError) else [str(error)]:
            Console().error(problem)
        raise Exit(code=error.exit_code) from None
    except KeyboardInterrupt:
        Console().error("interrupted; the unfinished step was undone")
        raise Exit(code=StoppedError.exit_code) from None
    except BrokenPipeError:
        raise Exit(code=end_output()) from None
    except OSError as error:
        raise Exit(code=_report_os_error(error)) from None
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("docker", "dotenv", "requests"):
            raise
        Console().error(
            f"cannot import the package {error.name} with the Python of this inv "
            f"({sys.executable}); use ./inv, or install guix-tasks in its environment"
        )
        raise Exit(code=2) from None
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _report_os_error(error: OSError) -> int:
    """Print what a file of this machine cannot do, and return the exit code."""
    name, hint, code = "a file", "fix the cause and run the task again", UsageError.exit_code
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # Of what this project writes, only temporary files and the output have no name.
        name, code = f"a file, perhaps in {tempfile.gettempdir()}", EngineError.exit_code
        hint = "free space there, or set TMPDIR to a directory on a larger disk"
    Console().error(f"cannot access {error.filename or name}: {error.strerror or error}; {hint}")
    return code


def end_output() -> int:
    """Drop further output, whose reader has ended; return the exit status for that."""
    # Python writes buffered output again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE  # as a shell reports it


def _redact_logs_and_tracebacks() -> None:
    """Redact secrets in tracebacks and in log messages of libraries (``inv --debug``)."""

    class RedactingFormatter(logging.Formatter):
        def __init__(self, formatter: logging.Formatter) -> None:
            super().__init__()
            self._formatter = formatter

        def format(self, record: logging.LogRecord) -> str:
            return clean(self._formatter.format(record))

    for handler in logging.root.handlers:
        if not isinstance(handler.formatter, RedactingFormatter):
            handler.setFormatter(RedactingFormatter(handler.formatter or logging.Formatter()))

    def print_redacted(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stderr.write(clean("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = print_redacted
    threading.excepthook = lambda args: print_redacted(
        args.exc_type, args.exc_value, args.exc_traceback
    )
