"""The options of every task that takes its time: how much it is to show."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any

from invoke.tasks import task

from guix_tasks.cli.session import displayed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from invoke.context import Context
    from invoke.tasks import Task

_HELP = {
    "quiet": "show results, warnings and errors alone; OUTPUT=quiet for all tasks of a call",
    "verbose": "show all that Guix says, its builds too; OUTPUT=verbose for all tasks",
}


def long_task(
    help: Mapping[str, str] | None = None,  # noqa: A002 -- as Invoke names it
    **more: Any,
) -> Callable[[Callable[..., None]], Task[Any]]:
    """A task, as Invoke's own ``task`` makes it, with ``--quiet`` and ``--verbose``."""

    def decorated(body: Callable[..., None]) -> Task[Any]:
        @wraps(body)
        def shown(
            c: Context, *arguments: Any, quiet: bool = False, verbose: bool = False, **options: Any
        ) -> None:
            with displayed(quiet=quiet, verbose=verbose):
                body(c, *arguments, **options)

        own = inspect.signature(body)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False) for name in _HELP
        ]
        signature = own.replace(parameters=[*own.parameters.values(), *added])
        shown.__signature__ = signature  # type: ignore[attr-defined]
        made: Task[Any] = task(help={**(help or {}), **_HELP}, auto_shortflags=False, **more)(shown)
        return made

    return decorated
