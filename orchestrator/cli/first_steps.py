"""`stillframe init`, `doctor` and `demo`: from nothing to a first point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import command
from orchestrator.cli.run import FAILED, OK, Session


def register(app: typer.Typer) -> None:
    """Put these commands at the top level."""
    command(app, "init")(init)
    command(app, "doctor")(doctor)
    command(app, "demo")(demo)


def init(
    session: Session,
    vault: Annotated[
        Path | None, typer.Option("--vault", metavar="DIR", help="Folder for the vault of a new configuration.")
    ] = None,
    hypervisor: Annotated[
        str, typer.Option("--hypervisor", metavar="URI", help="libvirt URI for a new configuration.")
    ] = "qemu:///system",
) -> None:
    """Make configuration, catalog, vault and key, as far as they are missing.

    The recovery phrase of a new vault is shown once. Beside an existing configuration, just what it names is made.
    """
    from orchestrator.cli.initial import initialise

    initialise(session, vault=vault, hypervisor=hypervisor)


def doctor(session: Session) -> int:
    """Check all that a backup needs, and say how to mend it."""
    from orchestrator.cli.checks import all_checks

    failed = False
    for check in all_checks(session):
        session.out.record("check", check.as_dict())
        if not session.out.as_json:
            check.show(session.out)
        failed = failed or check.level == "FAIL"
    return FAILED if failed else OK


def demo(
    session: Session,
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Folder to work in; default: one made for it.")
    ] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Remove everything that a demo made.")] = False,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", hidden=True)] = None,
) -> int:
    """Back up and restore a small real machine made for it.

    Full backup, files written in the guest, incremental backup, restore as a new machine, boot, comparison of the
    files from inside.
    """
    from orchestrator.demo import run_demo

    return run_demo(directory, clean=clean, json=session.settings.json, svg=svg)
