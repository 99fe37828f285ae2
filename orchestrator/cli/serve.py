"""`stillframe serve | controller | worker`: the processes that stay."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command
from orchestrator.cli.run import FAILED, OK, Session

if TYPE_CHECKING:
    from orchestrator.config import Config

Hypervisors = Annotated[
    list[str], typer.Option("--hypervisor", metavar="NAME", help="Work for this hypervisor; may be given again.")
]
Grace = Annotated[
    int,
    typer.Option("--grace", min=0, help="At the end: seconds for what is being done now; transfers stop after that."),
]


def register(app: typer.Typer) -> None:
    command(app, "serve")(serve)
    command(app, "controller")(controller)
    command(app, "worker")(worker)


def serve(session: Session) -> int:
    """Stay, and do everything in this process: schedules, jobs, upkeep."""
    from orchestrator.roles import Signals, run_serve
    from workers.contract.errors import UsageError

    _write_down(session)
    config = session.config
    if not session.service.engine.embedded:
        raise UsageError(
            f"{config.path} names a broker: the work is done by controllers and workers",
            hint="stillframe controller; beside each hypervisor: stillframe worker --hypervisor NAME",
        )
    service = session.service
    _tell(session, "serve", config)
    with service.config_watch.followed():
        left = run_serve(service.catalog, service.engine, service.chores(), Signals(), service.reload)
    for job in left:
        session.out.note(f"job {job} has not ended; the next start settles it")
    return FAILED if left else OK


def controller(session: Session) -> None:
    """Stay, and decide: schedules, jobs, upkeep. Workers beside the hypervisors do the work."""
    from orchestrator.roles import Signals, run_controller
    from workers.contract.errors import UsageError

    _write_down(session)
    service = session.peek()
    if service.engine.embedded:
        raise UsageError(
            f"{session.config.path} names no broker that workers could listen at",
            hint='add url = "redis://…" under [broker], or run everything in one process: stillframe serve',
        )
    _tell(session, "controller", session.config)
    with service.config_watch.followed():
        run_controller(
            lambda: service.config, service.catalog, service.engine, service.chores(), Signals(), service.reload
        )


def worker(session: Session, hypervisor: Hypervisors, grace: Grace = 60) -> int:
    """Stay, and work for hypervisors: on them, or beside them. Needs no catalog."""
    from orchestrator.roles import Signals
    from workers import app as celery
    from workers.context import Context
    from workers.contract.errors import UsageError
    from workers.host import HostWorker

    _write_down(session)
    config = session.config
    if celery.is_embedded(config.broker_url):
        raise UsageError(
            f"{config.path} names no broker to listen at",
            hint='add url = "redis://…" under [broker], or run everything in one process: stillframe serve',
        )
    context = Context(config.worker)
    for name in hypervisor:
        context.require_hypervisor(name)
    app = celery.make_app(broker_url=config.broker_url, backend_url=config.broker_url)
    signals = Signals()
    with HostWorker(app, context, hypervisor) as host, signals.heard():
        _tell(session, "worker", config, name=host.name)
        signals.ending.wait()
        left = host.finish(grace)
        for one in left:
            session.out.note(f"{one.kind} of job {one.job} goes on no longer; its controller finds out by itself")
        if left:
            os._exit(FAILED)  # its threads would keep the process
    context.close()
    return OK


def _write_down(session: Session) -> None:
    """From here on, what happens is written to standard error, line by line."""
    from workers.logs import setup

    setup(verbose=session.settings.verbose, as_json=True if session.settings.json else None)


def _tell(session: Session, role: str, config: Config, name: str = "") -> None:
    session.out.record("serving", {"role": role, "pid": os.getpid(), "name": name, "config": str(config.path)})
    what = f"{role} {name}".rstrip() + f" is up (process {os.getpid()}, {config.path})"
    logging.getLogger(__name__).info(what)
