"""Decorator of the tasks.

Importing a task imports only Invoke, so that ``inv --list`` is fast and works if a package is
missing: when a task runs, the decorator imports the session, and the task imports its command.
"""

from __future__ import annotations

import inspect
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from invoke.tasks import task as invoke_task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from invoke.context import Context
    from invoke.tasks import Task

_OUTPUT_HELP = {
    "quiet": "show only results, warnings and errors; OUTPUT=quiet sets it for all tasks",
    "verbose": "show the whole output of Guix and its builds; OUTPUT=verbose for all tasks",
}


def task(
    *,
    help: Mapping[str, str] | None = None,  # noqa: A002 -- as Invoke names it
    has_log: bool = False,
    **options: Any,
) -> Callable[[Callable[..., None]], Task[Any]]:
    """Decorate a function of a ``Session`` as a task that exits with one line after an error.

    ``has_log`` adds ``--quiet`` and ``--verbose``, which override the setting ``OUTPUT``.
    """
    output_help = _OUTPUT_HELP if has_log else {}

    def decorate(body: Callable[..., None]) -> Task[Any]:
        @wraps(body)
        def wrapper(
            c: Context, *arguments: Any, quiet: bool = False, verbose: bool = False, **keywords: Any
        ) -> None:
            from guix_tasks.cli.errors import report_errors

            with report_errors():
                from guix_tasks.cli.session import Session

                body(Session(c, quiet=quiet, verbose=verbose), *arguments, **keywords)

        signature = inspect.signature(body)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False)
            for name in output_help
        ]
        parameters = [*signature.parameters.values(), *added]
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        decorated: Task[Any] = invoke_task(
            help={**(help or {}), **output_help}, auto_shortflags=False, **options
        )(wrapper)
        return decorated

    return decorate


long_task = partial(task, has_log=True)
