"""`stillframe status`: the one screen for the morning. What needs somebody first, then how everything stands.

A hundred columns, and one screen for three machines as for three hundred: machines that are well are counted, and
listed with `--all`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command
from orchestrator.cli.output import Output, coloured, printable, size
from orchestrator.cli.run import DEGRADED, OK, Session

if TYPE_CHECKING:
    from orchestrator.status_desk import AlertView, MachineStatus, StatusView, VaultStatus
    from workers.contract.machines import Value

WIDTH = 100
FEW = 20
"""So many machines are all shown."""
WORST = 10
"""Of more, so many that need somebody."""
_COLOURS = {"critical": "\x1b[1;31m", "warning": "\x1b[33m", "info": "\x1b[36m"}


def register(app: typer.Typer) -> None:
    command(app, "status")(show_status)


def show_status(
    session: Session,
    all: Annotated[bool, typer.Option("--all", "-a", help="Every machine and every alert.")] = False,
) -> int:
    """How everything stands: alerts, machines, vaults, jobs. Ends with 3 if something needs somebody."""
    from datetime import UTC

    status = session.service.status.status(datetime.now(UTC))
    shown = status.machines if all or session.out.as_json or len(status.machines) <= FEW else _worst(status)
    _records(session.out, status, shown)
    if not session.out.as_json:
        _show(session.out, status, shown, all=all)
    return DEGRADED if status.stands else OK


def _worst(status: StatusView) -> list[MachineStatus]:
    """Those with an alert, and protected ones without a point, as far as there is room."""
    return [one for one in status.machines if one.alert or (one.protected and one.last is None)][:WORST]


def _records(out: Output, status: StatusView, machines: list[MachineStatus]) -> None:
    figures = {"machines": len(machines), "alerts": len(status.alerts), "jobs": len(status.jobs)}
    head = status.model_dump(mode="json", include={"time", "leader", "scheduled"})
    out.record("status", {**head, **figures, "ok": not status.stands})
    kinds: dict[str, Sequence[Value]] = {
        "alert": status.alerts,
        "machine_status": machines,
        "vault_status": status.vaults,
        "job_status": status.jobs,
        "worker_status": status.workers,
    }
    for kind, values in kinds.items():
        for value in values:
            out.record(kind, value.model_dump(mode="json"))


# --- for people ------------------------------------------------------------------------------------------------------


def _show(out: Output, status: StatusView, machines: list[MachineStatus], *, all: bool) -> None:
    _headline(out, status)
    _alerts(out, status, all=all)
    _machines(out, status, machines)
    _vaults(out, status)
    _jobs(out, status)
    _alive(out, status)


def _headline(out: Output, status: StatusView) -> None:
    from orchestrator.alarms import Severity

    standing = [alert for alert in status.alerts if not alert.acknowledged]
    counts = [
        f"{count} {severity.value}"
        for severity in reversed(Severity)
        if (count := sum(alert.severity is severity for alert in standing))
    ]
    if not status.leader and status.scheduled:
        counts.insert(0, "no controller")
    words = ", ".join(counts) or "all is well"
    when = f"{status.time.astimezone():%a %Y-%m-%d %H:%M}"
    out.say(f"{words}{when:>{max(1, WIDTH - len(words))}}")


def _alerts(out: Output, status: StatusView, *, all: bool) -> None:
    if not status.leader and status.scheduled:
        _alert_lines(
            "critical", "", "controller", "nobody runs what is due: no controller is there", "stillframe serve"
        )
    shown = status.alerts if all else [alert for alert in status.alerts if not alert.acknowledged][:WORST]
    for alert in shown:
        severity = "seen" if alert.acknowledged else alert.severity.value
        _alert_lines(severity, _since(alert, status.time), alert.subject, alert.text, alert.hint)
    rest = len(status.alerts) - len(shown)
    if rest:
        out.say(f"  and {rest} more: stillframe alert list")
    if shown or rest or (status.scheduled and not status.leader):
        out.say()


def _since(alert: AlertView, now: datetime) -> str:
    count = f", {alert.count} times" if alert.count > 1 else ""
    return f"since {_when(alert.first, now)}{count}"


def _alert_lines(severity: str, since: str, subject: str, text: str, hint: str) -> None:
    """`CRITICAL  web: no space left …`, folded, and what to type."""
    import textwrap

    colour, plain = (_COLOURS.get(severity, ""), "\x1b[0m") if coloured(sys.stdout) else ("", "")
    words = printable(f"{subject}: {' '.join(text.split())}" + (f" ({since})" if since else ""))
    lines = textwrap.wrap(words, WIDTH - 10, max_lines=3, placeholder=" …") or [""]
    sys.stdout.write(f"{colour}{severity.upper():<8}{plain}  {lines[0]}\n")
    for line in lines[1:]:
        sys.stdout.write(f"{'':10}{line}\n")
    if hint:
        sys.stdout.write(f"{'':10}try: {printable(hint)}\n")


def _machines(out: Output, status: StatusView, shown: list[MachineStatus]) -> None:
    total = len(status.machines)
    if not total:
        out.say("MACHINES  none is known yet: stillframe vm list")
        out.say()
        return
    out.say(f"MACHINES  {_counted(status)}")
    if shown:
        columns = ("name", "hypervisor", "last point", "age", "consistency", "next run", "")
        out.table(columns, [_machine(one, status.time) for one in shown], right=("age",))
    if len(shown) < total:
        out.say(f"  {'and ' if shown else ''}{total - len(shown)} more: stillframe status --all")
    out.say()


def _counted(status: StatusView) -> str:
    machines = status.machines
    unprotected = sum(not one.protected for one in machines)
    never = sum(one.protected and one.last is None for one in machines)
    alerted = sum(one.alert is not None for one in machines)
    day = sum(one.last is not None and status.time - one.last < timedelta(days=1) for one in machines)
    parts = [f"{len(machines)} known", f"{day} with a point of the last 24 hours"]
    parts += [f"{alerted} with an alert"] if alerted else []
    parts += [f"{never} without a point"] if never else []
    parts += [f"{unprotected} not protected"] if unprotected else []
    return ", ".join(parts)


def _machine(one: MachineStatus, now: datetime) -> tuple[str, ...]:
    notes = [one.job, one.alert.value if one.alert else "", "" if one.protected else "not protected"]
    return (
        _short(one.name, 28),
        _short(one.hypervisor, 14),
        _when(one.last, now) if one.last else "never",
        _age(now - one.last) if one.last else "–",
        one.consistency.value if one.consistency else "–",
        _when(one.next_run, now) if one.next_run else "–",
        ", ".join(note for note in notes if note),
    )


def _vaults(out: Output, status: StatusView) -> None:
    if not status.vaults:
        return
    columns = ("vault", "used", "free", "a day", "verified", "swept", "replicated", "")
    rows = [_vault(one, status.time) for one in status.vaults]
    out.table(columns, rows, right=("used", "free", "a day"))
    out.say()


def _vault(one: VaultStatus, now: datetime) -> tuple[str, ...]:
    def done(time: datetime | None) -> str:
        return _when(time, now) if time else "never"

    return (
        _short(one.name, 20),
        size(one.used_bytes),
        size(one.free_bytes),
        "–" if one.growth is None else f"{'+' if one.growth >= 0 else '-'}{size(abs(one.growth))}",
        done(one.verified),
        done(one.swept),
        done(one.replicated),
        "cannot be used" if one.problem else "",
    )


def _jobs(out: Output, status: StatusView) -> None:
    waiting = sum(job.state == "queued" for job in status.jobs)
    running = [job for job in status.jobs if job.state != "queued"]
    if not status.jobs:
        out.say("JOBS      none runs")
        return
    out.say(f"JOBS      {len(running)} run{'s' if len(running) == 1 else ''}, {waiting} wait")
    for job in running[:5]:
        age = _age(status.time - job.created)
        out.say(f"  {job.id}  {job.kind} of {_short(job.machine, 30)}  {job.state}, for {age}")
    if len(running) > 5:
        out.say(f"  and {len(running) - 5} more: stillframe job list --active")


def _alive(out: Output, status: StatusView) -> None:
    if status.leader:
        out.say(f"RUNS      controller {_short(status.leader, 60)}")
    elif not status.scheduled:
        out.say("RUNS      no controller, and no schedule that needs one")
    for worker in status.workers:
        alive = "alive" if worker.alive else f"SILENT for {_age(status.time - worker.seen)}"
        out.say(f"          worker {_short(worker.name, 40)} for {', '.join(worker.hypervisors)}: {alive}")


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _when(time: datetime, now: datetime) -> str:
    """`02:00` today, `Mon 02:00` within six days either way, else the date."""
    local, today = time.astimezone(), now.astimezone()
    if local.date() == today.date():
        return f"{local:%H:%M}"
    return f"{local:%a %H:%M}" if abs(time - now) < timedelta(days=6) else f"{local:%Y-%m-%d}"


def _age(length: timedelta) -> str:
    """`3 min`, `26 h`, `12 d`."""
    minutes = max(0, int(length.total_seconds() // 60))
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} d"
