"""`stillframe hypervisor`: which hosts there are, and whether they are fit for backups."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command, group
from orchestrator.cli.output import size
from orchestrator.cli.run import FAILED, OK, Session

if TYPE_CHECKING:
    from workers.config import HypervisorConfig
    from workers.hosts.address import SshAddress

app = group("Hosts that run machines.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name in the configuration.")]


@command(app, "list")
def list_hypervisors(session: Session) -> int:
    """List what is configured; nothing is connected to."""
    rows = []
    for name, one in session.config.worker.hypervisors.items():
        session.out.record("hypervisor", {"name": name, **one.model_dump(mode="json")})
        limit = size(one.bandwidth) + "/s" if one.bandwidth else "–"
        rows.append([name, one.uri, _host_key_words(one), str(one.max_jobs), limit])
    if not rows:
        session.out.note(f"{session.config.path} names no hypervisor: stillframe hypervisor add local qemu:///system")
        return OK
    session.out.table(["name", "uri", "host key", "jobs", "bandwidth"], rows, right=["jobs", "bandwidth"])
    return OK


def _host_key_words(one: HypervisorConfig) -> str:
    if not one.uri.startswith("qemu+ssh://"):
        return "–"
    if one.host_key is None:
        return "in known_hosts"
    from workers.hosts.ssh_link import fingerprint

    return fingerprint(one.host_key)


@command(app, "add")
def add(
    session: Session,
    name: Name,
    uri: Annotated[
        str | None, typer.Argument(metavar="URI", help="qemu:///system, qemu+ssh://root@lab1/system, qmp+unix:///…")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="Private SSH key to log in with.")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option("--fingerprint", metavar="SHA256:…", help="Of the host's key, instead of being asked.")
    ] = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="The host was installed anew: show and pin its new key.")
    ] = False,
) -> int:
    """Add a hypervisor to the configuration file, after connecting to it.

    The key of an SSH host is shown, to be compared with the host's own, and pinned.
    """
    from orchestrator.config_hosts import with_hypervisor
    from workers.contract.errors import NotFound, UsageError

    config, known = session.config, session.config.worker.hypervisors
    if new_key:
        if name not in known:
            raise NotFound(f"no hypervisor {name!r} is configured", hint=f"there are: {', '.join(known) or 'none'}")
        uri = uri or known[name].uri
        key_file = key_file or known[name].key_file
    elif name in known:
        raise UsageError(f"hypervisor {name} is configured already: {known[name].uri}", hint="choose another name")
    if uri is None:
        raise UsageError("say where it is", hint=f"stillframe hypervisor add {name} qemu+ssh://root@{name}/system")
    wanted = _wanted(uri, key_file, fingerprint)
    with_hypervisor(config, name, wanted)  # what cannot be written is said before anything is connected to
    _connect(session, name, wanted)

    session.peek().audit.note("hypervisor.add", name, wanted.uri)
    with_hypervisor(config, name, wanted).write()
    session.out.record("hypervisor", {"name": name, **wanted.model_dump(mode="json")})
    session.out.say(f"{name} is in {config.path}")
    return OK


def _wanted(uri: str, key_file: Path | None, fingerprint: str | None) -> HypervisorConfig:
    """With the host's key, once somebody has vouched for it."""
    from workers.config import HypervisorConfig
    from workers.contract.errors import UsageError
    from workers.hosts.address import remote_libvirt
    from workers.hypervisors import require_known

    require_known(uri)
    absolute = key_file.expanduser().absolute() if key_file else None
    if not uri.startswith("qemu+ssh://"):
        if key_file or fingerprint:
            raise UsageError("--key-file and --fingerprint are for qemu+ssh://", hint="leave them out")
        return HypervisorConfig(uri=uri)
    key = _vouched(remote_libvirt(uri).ssh, fingerprint)
    return HypervisorConfig(uri=uri, key_file=absolute, host_key=key)


def _vouched(address: SshAddress, expected: str | None) -> str:
    """A host key that somebody has compared: `--yes` is no comparison. Raises UsageError, Cancelled."""
    from orchestrator.cli.output import is_terminal
    from workers.contract.errors import Cancelled, HypervisorRefused, UsageError
    from workers.hosts.ssh_link import fingerprint, host_keys

    keys = host_keys(address)
    if expected is not None:
        for key in keys:
            if fingerprint(key) == expected.strip():
                return key
        shown = ", ".join(fingerprint(key) for key in keys)
        raise HypervisorRefused(
            f"{address} shows other keys than {expected}: {shown}",
            hint=f"on {address.host} itself: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
        )
    key = keys[0]
    words = f"{address} shows the {key.split()[0]} key {fingerprint(key)}"
    if not (sys.stdin.isatty() and is_terminal(sys.stderr)):
        raise UsageError(
            f"{words}, and nobody is there to compare it",
            hint=f"compare, then add: --fingerprint {fingerprint(key)}",
        )
    sys.stderr.write(
        f"{words}\nOn {address.host} itself, this must say the same:\n"
        f"  ssh-keygen -lf /etc/ssh/ssh_host_{key.split()[0].removeprefix('ssh-').split('-')[0]}_key.pub\n"
        "Is it the same? [y/N] "
    )
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Cancelled("nothing was changed")
    return key


def _connect(session: Session, name: str, wanted: HypervisorConfig) -> None:
    """It must be reachable as it will be written."""
    from workers.context import Context

    context = Context(session.config.worker.model_copy(update={"hypervisors": {name: wanted}}))
    try:
        version = context.hypervisor(name).features.version
        machines = len(context.hypervisor(name).machines(disks=False))
        session.out.note(f"{name}: {version}, {machines} machines")
    finally:
        context.close()


@command(app, "check")
def check(
    session: Session,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this one.")] = None,
) -> int:
    """See whether hypervisors can be reached and have what backups need; nothing is changed on them."""
    from orchestrator.cli.check_hosts import check_host
    from workers.context import Context
    from workers.contract.errors import NotFound

    known = session.config.worker.hypervisors
    if name is not None and name not in known:
        raise NotFound(f"no hypervisor {name!r} is configured", hint=f"there are: {', '.join(known) or 'none'}")
    code = OK
    context = Context(session.config.worker)
    try:
        for one in [name] if name else known:
            for finding in check_host(context, one, known[one]):
                session.out.record("check", finding.as_dict())
                finding.show(session.out)
                code = FAILED if finding.level == "FAIL" else code
    finally:
        context.close()
    return code


@command(app, "remove")
def remove(
    session: Session,
    name: Name,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> int:
    """Take a hypervisor out of the configuration file. Its points stay, and can be restored elsewhere."""
    from orchestrator.config_hosts import without_hypervisor
    from workers.contract.errors import Busy, NotFound

    known = session.config.worker.hypervisors
    if name not in known:
        raise NotFound(f"no hypervisor {name!r} is configured", hint=f"there are: {', '.join(known) or 'none'}")
    running = [job.id for job in session.peek().jobs(active_only=True) if job.hypervisor == name]
    if running:
        raise Busy(f"jobs run on {name}: {', '.join(running)}", hint=f"stillframe job watch {running[0]}")
    edit = without_hypervisor(session.config, name)
    if dry_run:
        session.out.say(f"would take {name} ({known[name].uri}) out of {session.config.path}")
        return OK
    session.confirm(f"Take {name} ({known[name].uri}) out of {session.config.path}?")

    session.peek().audit.note("hypervisor.remove", name, known[name].uri)
    edit.write()
    session.out.record("removed", {"name": name})
    session.out.say(f"{name} is no longer in {session.config.path}; its points stay")
    return OK
