"""The options that every command takes, declared once.

`--config`, `--json` and their like may stand before or after the command's name (`stillframe --json vm list`,
`stillframe vm list --json`): people type both. `command` adds them to a function's own parameters, and gives it the
`Session` in their place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Concatenate, ParamSpec, cast, get_type_hints

import typer

from orchestrator.cli.run import Session, Settings

P = ParamSpec("P")

_PANEL = "Options of every command"
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Configuration file.", rich_help_panel=_PANEL)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="JSON lines, each with its type, for programs.", rich_help_panel=_PANEL)
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No remarks, no progress.", rich_help_panel=_PANEL)]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Tell more.", rich_help_panel=_PANEL)]
YesOption = Annotated[
    bool, typer.Option("--yes", help="Do not ask before something is destroyed.", rich_help_panel=_PANEL)
]
VaultArgument = Annotated[
    str | None, typer.Argument(metavar="VAULT", help="Name in the configuration; default: the default vault.")
]

_COMMON = {
    "config": (ConfigOption, None),
    "json": (JsonOption, False),
    "quiet": (QuietOption, False),
    "verbose": (VerboseOption, False),
    "yes": (YesOption, False),
}


def group(help: str) -> typer.Typer:
    """An app for one group of commands."""
    return typer.Typer(help=help, no_args_is_help=True, pretty_exceptions_enable=False)


def command(
    app: typer.Typer, name: str, *, hidden: bool = False
) -> Callable[[Callable[Concatenate[Session, P], int | None]], Callable[Concatenate[Session, P], int | None]]:
    """Register a function of `(session, its own parameters…)` as the command `name`; it returns an exit code, or
    None for 0."""

    def register(
        function: Callable[Concatenate[Session, P], int | None],
    ) -> Callable[Concatenate[Session, P], int | None]:
        hints = get_type_hints(function, include_extras=True)
        _, *own = inspect.signature(function).parameters.values()
        parameters = [
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name]) for one in own),
            *(
                inspect.Parameter(f"common_{key}", inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
                for key, (kind, default) in _COMMON.items()
            ),
        ]

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
            values: dict[str, object] = dict(kwargs)
            context = values.pop("context")
            typed = {key: values.pop(f"common_{key}") for key in _COMMON}
            with Session(merged(cast(typer.Context, context).obj, typed)) as session:
                session.code = function(session, *args, **values) or 0  # type: ignore[arg-type]
            raise typer.Exit(session.code)

        del wrapper.__wrapped__
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {one.name: one.annotation for one in parameters}
        app.command(name, hidden=hidden)(wrapper)
        return function

    return register


def merged(before: Settings | None, after: dict[str, object]) -> Settings:
    """Settings from before the command's name, with those after it on top."""
    base = before or Settings()
    config = after["config"]
    return Settings(
        config=config if isinstance(config, Path) else base.config,
        json=bool(after["json"]) or base.json,
        quiet=bool(after["quiet"]) or base.quiet,
        verbose=bool(after["verbose"]) or base.verbose,
        yes=bool(after["yes"]) or base.yes,
    )
