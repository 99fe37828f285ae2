"""`stillframe config`: whether a configuration is right, and what is in force by it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import command, group
from orchestrator.cli.run import DEGRADED, OK, Session

app = group("The configuration: check it, see what is in force.")


@command(app, "check")
def check_config(
    session: Session,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Default: the configuration in use.")] = None,
) -> int:
    """Check a configuration: every mistake with its line, and what is allowed but probably not meant."""
    from orchestrator.config import load_config
    from orchestrator.config_doubts import doubts

    config = load_config(file) if file is not None else session.config
    found = doubts(config)
    for doubt in found:
        session.out.record("doubt", {"file": str(config.path), "line": doubt.line, "text": doubt.text})
        session.out.say(f"{config.path}:{doubt.line}: {doubt.text}", label="WARN")
    session.out.record("checked", {"file": str(config.path), "doubts": len(found)})
    names = (
        (len(config.worker.vaults), "vault"),
        (len(config.worker.hypervisors), "hypervisor"),
        (len(config.policies), "policy"),
        (len(config.protect), "protect section"),
    )
    session.out.say(f"{config.path}: {', '.join(_count(number, noun) for number, noun in names)}", label="OK")
    return DEGRADED if found else OK


def _count(number: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


@command(app, "show")
def show_config(
    session: Session,
    origin: Annotated[bool, typer.Option("--origin", help="With file and line of each, or `default`.")] = False,
) -> None:
    """Show every setting that is in force (-v: also those that are empty). Passwords are left out."""
    from orchestrator.config_origin import settings

    config = session.config
    found = settings(config)
    for one in found:
        record: dict[str, object] = {"key": one.key, "value": one.value}
        where = f"{config.path}:{one.line}" if one.line else "default"
        session.out.record("setting", {**record, "origin": where} if origin else record)
    if not session.out.verbose:
        found = [one for one in found if one.line or one.value not in (None, [])]
    if origin:
        rows = [(one.key, one.text, f"{config.path.name}:{one.line}" if one.line else "default") for one in found]
        session.out.note(f"{config.path}")
        session.out.table(("setting", "value", "from"), rows)
    else:
        session.out.table(("setting", "value"), [(one.key, one.text) for one in found])
