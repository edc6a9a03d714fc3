"""Options ``--quiet`` and ``--verbose`` of long-running tasks."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any

from invoke.tasks import task

from guix_tasks.cli.session import set_display

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from invoke.context import Context
    from invoke.tasks import Task

_HELP = {
    "quiet": "show only results, warnings and errors; OUTPUT=quiet sets it for all tasks",
    "verbose": "show the whole output of Guix and its builds; OUTPUT=verbose for all tasks",
}


def long_task(
    help: Mapping[str, str] | None = None,  # noqa: A002 -- as Invoke names it
    **options: Any,
) -> Callable[[Callable[..., None]], Task[Any]]:
    """Decorate a task like Invoke's ``task``, and add ``--quiet`` and ``--verbose``."""

    def decorate(body: Callable[..., None]) -> Task[Any]:
        @wraps(body)
        def wrapper(
            c: Context, *arguments: Any, quiet: bool = False, verbose: bool = False, **keywords: Any
        ) -> None:
            with set_display(quiet=quiet, verbose=verbose):
                body(c, *arguments, **keywords)

        signature = inspect.signature(body)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False) for name in _HELP
        ]
        parameters = [*signature.parameters.values(), *added]
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        decorated: Task[Any] = task(
            help={**(help or {}), **_HELP}, auto_shortflags=False, **options
        )(wrapper)
        return decorated

    return decorate
