"""Options that several commands share. A decorator adds the options to a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, get_type_hints

import typer

Command = Callable[..., None]


def with_options(
    argument: str,
    options: Mapping[str, Any],
    opened: Callable[[typer.Context, Mapping[str, Any]], AbstractContextManager[Any]],
) -> Callable[[Command], Command]:
    """Return a decorator that adds options to a command, and calls the command with an object made from the options.

    `argument`: name of the command's argument that receives the object. `options`: annotated type of each option by
    name; every option has the default None. `opened`: returns a context manager that opens and closes the object.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name != argument
        ]
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        more = [inspect.Parameter("ctx", positional, annotation=typer.Context)]
        more += [inspect.Parameter(name, positional, default=None, annotation=kind) for name, kind in options.items()]

        def run(ctx: typer.Context, **given: Any) -> None:
            with opened(ctx, {name: given.pop(name) for name in options}) as selected:
                command(**{argument: selected}, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([more[0], *own, *more[1:]])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *more)}
        return run

    return decorate
