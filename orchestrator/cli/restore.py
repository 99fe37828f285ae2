"""`stillframe restore`: a whole machine, or one disk into a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.follow import follower, wait_for
from orchestrator.cli.options import command, group
from orchestrator.cli.output import duration, moment
from orchestrator.cli.point import PointRef
from orchestrator.cli.run import OK, Session

if TYPE_CHECKING:
    from orchestrator.views import JobView, PointView

app = group("Bring back a machine or a disk.")

_SUFFIXES = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw", ".vhd": "vhd", ".vhdx": "vhdx", ".vmdk": "vmdk"}
ToOption = Annotated[Path, typer.Option("--to", metavar="FILE", help="File to write; it must not exist.")]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="qcow2, raw, vhd, vhdx or vmdk; default: by the file's name, else qcow2 or raw as it was.",
    ),
]
FromOption = Annotated[
    str | None,
    typer.Option("--vault", metavar="NAME", help="Vault to read from; default: the point's, else a replica."),
]


def _absolute(path: Path | None) -> Path | None:
    return path.expanduser().absolute() if path else None


@command(app, "vm")
def restore_machine(
    session: Session,
    point: PointRef,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name of the new machine; default: with -restored.")
    ] = None,
    directory: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Folder for its disks.")] = None,
    pool: Annotated[str | None, typer.Option("--pool", metavar="POOL", help="libvirt pool for its disks.")] = None,
    start: Annotated[bool, typer.Option("--start", help="Start it afterwards.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Stop the machine it was taken from, and take its place.")
    ] = False,
    hypervisor: Annotated[
        str | None, typer.Option("--hypervisor", metavar="NAME", help="Where; default: where it was.")
    ] = None,
    vault: FromOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what --replace would replace.")] = False,
) -> int:
    """Restore a machine: as a new one (new name, UUID, MACs), or in place of the original (--replace)."""
    from workers.contract.errors import UsageError

    service = session.service
    if directory is not None and pool is not None:
        raise UsageError("--dir and --pool exclude each other")
    if replace and name is not None:
        raise UsageError("--replace keeps the machine's own name: leave --name out")
    found = service.point(point)
    if dry_run:
        _show_plan(session, found, replace=replace)
        return OK
    if replace:
        session.confirm(f"Stop {found.machine} and replace it by its point {found.id[:8]}?")
    job = service.start_restore_machine(
        found.id,
        name=name,
        directory=_absolute(directory),
        pool=pool,
        start=start,
        replace=replace,
        hypervisor=hypervisor,
        vault=vault,
    )
    return _finish(session, job)


def _show_plan(session: Session, point: PointView, *, replace: bool) -> None:
    """What a restore of `point` would do, as far as it can be known beforehand."""
    from workers.contract.errors import NotFound

    out = session.out
    disks = [disk.target for disk in point.disks]
    replaced = None
    if replace:
        try:
            replaced = session.service.machine(point.machine_uuid)
        except NotFound:
            out.note(f"{point.machine} does not exist any more: nothing to replace")
    out.record(
        "plan",
        {"point": point.id, "disks": disks, "replaces": replaced.model_dump(mode="json") if replaced else None},
    )
    out.say(f"would restore {' '.join(disks)} of {point.machine} as of {moment(point.time)}")
    if replaced is not None:
        out.say(f"would stop {replaced.name} ({replaced.power} on {replaced.hypervisor}) and keep its disks aside:")
        for disk in replaced.disks:
            if not disk.excluded:
                out.say(f"  {disk.target}  {disk.source}")


@command(app, "disk")
def restore_disk(
    session: Session,
    point: PointRef,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Disk of the point, like vda.")],
    to: ToOption,
    format: FormatOption = None,
    vault: FromOption = None,
) -> int:
    """Restore one disk into a new file."""
    return write_disk(session, point, target, to, format, vault)


def write_disk(
    session: Session, point: str, target: str, to: Path, format: str | None, vault: str | None = None
) -> int:
    """One disk of a point into a new file, in the format that was asked for or that the file's name tells."""
    file = to.expanduser().absolute()
    wanted = format or _SUFFIXES.get(file.suffix.lower())
    return _finish(session, session.service.start_restore_disk(point, target, to=file, format=wanted, vault=vault))


def _finish(session: Session, job: str) -> int:
    [view] = wait_for(session, [job], follower(session.out), cancel=True)
    out = session.out
    code = view.error.exit_code if view.error else OK
    out.record(
        "restore",
        {
            "job": view.id,
            "machine": view.machine,
            "state": str(view.state),
            "point": view.point,
            **view.result,
            "error": view.error.model_dump(mode="json") if view.error else None,
            "warnings": list(view.warnings),
            "exit_code": code,
        },
    )
    if view.error is not None:
        if not out.as_json:
            out.error(view.error)
    else:
        _show(session, view)
    for warning in view.warnings:
        out.note(f"warning: {warning}")
    return code


def _show(session: Session, view: JobView) -> None:
    result = view.result
    files = result.get("files") or {}
    took = duration((view.updated - view.created).total_seconds())
    for target, path in dict(files).items():
        session.out.say(f"{target} → {path}")
    if result.get("name"):
        state = "running" if result.get("started") else "defined, not started"
        session.out.say(f"machine {result['name']}  {result.get('uuid', '')}  {state}")
        if not result.get("started") and result.get("start_with"):
            session.out.say(f"start it with: {result['start_with']}")
    for path in result.get("replaced") or []:
        session.out.say(f"kept aside: {path}")
    session.out.say(f"every block was checked while written, {took}")
