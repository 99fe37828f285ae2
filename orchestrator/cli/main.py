"""Entry point of `stillframe`.

Start-up time is a feature: this file and the groups it assembles import Typer and the standard library only, and
everything that costs (pydantic, the catalog, Celery, libvirt) is imported inside the command that needs it, so that
`stillframe --help` answers in a fraction of a second.
"""

from __future__ import annotations

import gc
import signal
import sys
from typing import Annotated, Protocol, cast

import typer

from orchestrator.cli import (
    alert,
    apply,
    audit,
    backup,
    config,
    extension,
    first_steps,
    hypervisor,
    job,
    notify,
    point_content,
    policy,
    protect,
    restore,
    schedule,
    serve,
    status,
    upkeep,
    vault,
    vm,
)
from orchestrator.cli.options import ConfigOption, JsonOption, QuietOption, VerboseOption, YesOption
from orchestrator.cli.run import INTERRUPTED, Settings

app = typer.Typer(
    name="stillframe",
    help="Backup of KVM machines: one point in time across all disks, only changed blocks, encrypted, deduplicated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
first_steps.register(app)
serve.register(app)
status.register(app)
protect.register(vm.app)
app.add_typer(vm.app, name="vm")
app.add_typer(hypervisor.app, name="hypervisor")
app.add_typer(backup.app, name="backup")
app.add_typer(point_content.app, name="point")
apply.register(policy.app)
app.add_typer(policy.app, name="policy")
app.add_typer(schedule.app, name="schedule")
app.add_typer(config.app, name="config")
app.add_typer(restore.app, name="restore")
app.add_typer(job.app, name="job")
app.add_typer(vault.app, name="vault")
app.add_typer(extension.app, name="extension")
app.add_typer(alert.app, name="alert")
app.add_typer(audit.app, name="audit")
app.add_typer(notify.app, name="notify")
app.add_typer(upkeep.app, name="upkeep")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"stillframe {version('stillframe')}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    yes: YesOption = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,  # noqa: ARG001
) -> None:
    context.obj = Settings(config=config, json=json, quiet=quiet, verbose=verbose, yes=yes)


class _Misuse(Protocol):
    """What Typer raises for a command line that it cannot read."""

    ctx: typer.Context | None

    def format_message(self) -> str: ...


_MISUSE: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Base of those errors: click's class in older releases of Typer, its own copy in newer ones."""


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code."""
    try:
        code: object = app(args=arguments, prog_name="stillframe", standalone_mode=False)
    except _MISUSE as error:
        return _misuse(error, "--json" in arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _misuse(error: Exception, as_json: bool) -> int:
    from orchestrator.cli.output import Output
    from workers.contract.errors import UsageError

    misuse = cast(_Misuse, error)
    message = misuse.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        if message:
            typer.echo(message, err=True)
        return UsageError.exit_code
    path = misuse.ctx.command_path if misuse.ctx is not None else "stillframe"
    output = Output(as_json=as_json, quiet=False, verbose=False)
    output.error(UsageError(message.rstrip("."), hint=f"{path} --help").info())
    return UsageError.exit_code


def main() -> None:
    """`stillframe`."""
    gc.set_threshold(100_000, 20, 20)  # a start makes many objects and no garbage: measured, 9 % of its time
    # A polite request to end (systemd, a closing terminal) is an interruption: jobs are cancelled and released.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
