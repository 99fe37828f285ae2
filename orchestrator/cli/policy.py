"""`stillframe policy`: what policies say, what they would keep in the long run, and what they let go now."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command, group
from orchestrator.cli.output import moment
from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from orchestrator.config import Config
    from orchestrator.config_file import Policy, Retention
    from orchestrator.policies import Simulation
    from orchestrator.views import ExpiryView

app = group("Policies: when to back up, how long to keep.")

PolicyName = Annotated[str, typer.Argument(metavar="POLICY", help="Name in the configuration.")]
MAX_DAYS = 36500


@command(app, "list")
def list_policies(session: Session) -> None:
    """List configured policies, and which sections use them."""
    config = session.config
    for name, policy in config.policies.items():
        session.out.record("policy", _record(config, name, policy))
    if not config.policies:
        session.out.say("No policy is configured: add a [policies.gold] section, and [protect.*] sections that use it.")
        return
    session.out.table(
        ("policy", "schedule", "consistency", "keeps", "used by"),
        [
            (
                name,
                _schedule(policy),
                policy.consistency.value if policy.consistency else "–",
                _rules(policy.retention) or "everything",
                ", ".join(_used_by(config, name)) or "nobody",
            )
            for name, policy in config.policies.items()
        ],
    )


@command(app, "show")
def show_policy(session: Session, policy: PolicyName) -> None:
    """Show one policy, and the machines that it is for."""
    config = session.config
    found = _named(config, policy)
    out = session.out
    out.record("policy", _record(config, policy, found))
    out.say(f"policy       {policy}")
    out.say(f"schedule     {_schedule(found)}")
    out.say(f"time zone    {found.timezone or 'that of this host'}")
    if found.consistency:
        out.say(f"consistency  {found.consistency.value}{', required' if found.require else ''}")
    out.say(f"keeps        {_rules(found.retention) or 'everything'}")
    for section in _used_by(config, policy):
        protect = config.protect[section]
        but = f", but not {', '.join(protect.exclude)}" if protect.exclude else ""
        out.say(f"protect      {section}: {', '.join(protect.machines or ['*'])}{but}")


@command(app, "simulate")
def simulate_policy(
    session: Session,
    policy: PolicyName,
    days: Annotated[int, typer.Option("--days", metavar="N", min=1, max=MAX_DAYS, help="For how long.")] = 400,
    begin: Annotated[
        str | None, typer.Option("--from", metavar="DATE", help="First day, like 2026-11-22; default: today.")
    ] = None,
) -> None:
    """Make the points of N days in thought, and tell which would be kept in the end, and why."""
    from orchestrator.policies import simulate
    from orchestrator.schedules import zone_of

    found = _named(session.config, policy)
    zone = zone_of(found)
    if found.retention is None:
        session.out.record("simulation", {"policy": policy, "days": days, "retention": None})
        session.out.say(f"policy {policy} has no retention: every point is kept")
        return
    result = simulate(_moments(found, _first_day(begin), days), found.retention, zone)
    figures = {"made": result.made, "peak": result.peak, "kept": len(result.kept)}
    session.out.record(
        "simulation", {"policy": policy, "days": days, **figures, "retention": found.retention.model_dump()}
    )
    for decision in reversed(result.kept):
        when = decision.point.time.astimezone(zone).isoformat()
        session.out.record("simulated_point", {"time": when, "reasons": list(decision.reasons)})
    _show_simulation(session, found, days, result)


def _show_simulation(session: Session, policy: Policy, days: int, result: Simulation) -> None:
    from orchestrator.schedules import zone_of

    session.out.table(
        ("point", "kept because"),
        [
            (
                f"{decision.point.time.astimezone(zone_of(policy)):%a %Y-%m-%d %H:%M}",
                "; ".join(decision.reasons),
            )
            for decision in reversed(result.kept)
        ],
    )
    session.out.say(
        f"{result.made} points made in {days} days ({_schedule(policy)}); {len(result.kept)} kept in the end, "
        f"at most {result.peak} at a time, and those that were deleted in the days before."
    )


@command(app, "expire")
def expire_points(
    session: Session,
    vault: Annotated[str | None, typer.Option("--vault", metavar="VAULT", help="Only in this one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be kept, and what not.")] = False,
) -> None:
    """Delete, so that it can be taken back, what no rule of a policy keeps."""
    desk = session.service.point_desk
    decisions = desk.expire(vault, dry_run=True)
    goes = [view for view in decisions if not view.keep]
    if dry_run:
        _show_expiry(session, decisions, dry_run=True)
        session.out.say(f"{len(goes)} of {len(decisions)} points would be deleted")
        return
    if goes:
        for view in goes:
            session.out.note(f"{view.point[:8]}  {view.machine}  {moment(view.time)}  {'; '.join(view.reasons)}")
        session.confirm(f"Delete {len(goes)} of {len(decisions)} points? That can be taken back for some days.")
    done = [view for view in desk.expire(vault) if not view.keep]
    _show_expiry(session, done, dry_run=False)
    session.out.say(f"{len(done)} of {len(decisions)} points deleted")


def _show_expiry(session: Session, views: list[ExpiryView], *, dry_run: bool) -> None:
    for view in views:
        session.out.record("expiry", {"dry_run": dry_run, **view.model_dump(mode="json")})
    if views:
        session.out.table(
            ("point", "machine", "time", "vault", "", "because"),
            [
                (
                    view.point[:8],
                    view.machine,
                    moment(view.time),
                    view.vault,
                    "keep" if view.keep else "delete",
                    "; ".join(view.reasons),
                )
                for view in views
            ],
        )


def _named(config: Config, name: str) -> Policy:
    """Raises NotFound."""
    import difflib

    from workers.contract.errors import NotFound

    if name not in config.policies:
        near = difflib.get_close_matches(name, config.policies, n=1, cutoff=0.5)
        known = ", ".join(config.policies)
        others = f"there are: {known}" if known else "add a [policies.gold] section"
        hint = f"did you mean {near[0]}?" if near else others
        raise NotFound(f"no policy is named {name!r} in {config.path}", hint=hint)
    return config.policies[name]


def _first_day(begin: str | None) -> datetime:
    """Midnight of that day, still without a zone. Raises UsageError."""
    from workers.contract.errors import UsageError

    if begin is None:
        return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        return datetime.strptime(begin, "%Y-%m-%d")
    except ValueError:
        raise UsageError(f"{begin!r} is no day", hint="--from 2026-11-22") from None


def _moments(policy: Policy, first: datetime, days: int) -> list[datetime]:
    from datetime import timedelta

    from orchestrator.policies import daily
    from orchestrator.schedules import moments, zone_of

    start = first.replace(tzinfo=zone_of(policy))
    if policy.schedule or policy.cron:
        return list(moments(policy, start, start + timedelta(days=days)))
    return list(daily(start, days))


def _schedule(policy: Policy) -> str:
    return policy.schedule or (f"cron {policy.cron}" if policy.cron else "no schedule: one a day")


def _rules(retention: Retention | None) -> str:
    """`7 daily, 4 weekly`; empty: all is kept."""
    counts = retention.model_dump() if retention else {}
    return ", ".join(f"{count} {rule}" for rule, count in counts.items() if count)


def _used_by(config: Config, policy: str) -> list[str]:
    return [name for name, section in config.protect.items() if section.policy == policy]


def _record(config: Config, name: str, policy: Policy) -> dict[str, object]:
    return {"name": name, **policy.model_dump(mode="json"), "used_by": _used_by(config, name)}
