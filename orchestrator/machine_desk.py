"""What is known of machines: hypervisors are asked for them, now and then by the controller and whenever somebody
looks, and the catalog remembers the answers.

Asking is one command of the contract (`ListMachines`). Where workers are elsewhere it goes to the worker beside the
hypervisor, and whichever controller gets the answer hands it to `MachineNews.heard`. Where this process is the worker,
threads of their own perform it: a hypervisor that hangs holds up neither jobs nor the others.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from orchestrator.catalog import machines as cache
from orchestrator.catalog.store import Catalog
from orchestrator.chores import Chore
from orchestrator.config import Config
from orchestrator.discovery import Change
from orchestrator.find import machine_among
from orchestrator.machine_news import MachineNews
from workers.context import Context
from workers.contract.errors import (
    ConfigError,
    ErrorInfo,
    HypervisorError,
    HypervisorRefused,
    HypervisorUnreachable,
    NotFound,
    StillframeError,
    UsageError,
)
from workers.contract.machines import MachineSummary, Power
from workers.contract.messages import ListMachines, MachinesListed
from workers.listing import list_machines

EVERY_SECONDS = 300.0
"""Between two rounds of the controller."""
LOOK_SECONDS = 10.0
DISKS_SECONDS = 40.0
"""libvirt waits up to 30 s to tell of the disks of a machine that is just being started."""
_POLL = 0.05
_BLIND = "a machine without libvirt is known only while it runs"

Send = Callable[[ListMachines], None]


@dataclass(frozen=True, slots=True)
class Look:
    """What came of asking."""

    changes: list[Change] = field(default_factory=list)
    silent: dict[str, ErrorInfo] = field(default_factory=dict)
    """Hypervisor → why it did not answer."""


class MachineDesk:
    """`news`: what becomes of answers. `send`: how a command reaches the worker beside a hypervisor; None: this process
    asks by itself. Thread-safe."""

    def __init__(
        self,
        config: Callable[[], Config],
        catalog: Catalog,
        context: Context,
        news: MachineNews,
        send: Send | None = None,
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._context = context
        self._news = news
        self._send = send
        self._lock = threading.Lock()
        self._asking: set[str] = set()
        self._closed = False

    @property
    def hypervisors(self) -> list[str]:
        return list(self._config().worker.hypervisors)

    def close(self) -> None:
        """Answers that come later are for nobody."""
        with self._lock:
            self._closed = True

    # --- finding ---------------------------------------------------------------------------------------------------

    def listed(self, hypervisor: str | None = None, *, ask: bool | None = None) -> tuple[list[cache.Sighting], Look]:
        """Machines with their disks, by name, and what came of asking; those of a hypervisor that does not answer as it
        last listed them. `ask` None: if this process can ask by itself; elsewhere the controller does in its rounds."""
        wanted = self._send is None if ask is None else ask
        look = self.look(hypervisor, disks=True) if wanted else None
        with self._catalog.read() as session:
            silent = {name: _remembered(name, row.problem) for name, row in cache.hypervisors(session).items()}
            known = Look(silent={name: error for name, error in silent.items() if error and hypervisor in (None, name)})
            return cache.sightings(session, hypervisor), look or known

    def find(self, wanted: str, *, disks: bool = False) -> MachineSummary:
        """The machine that is meant by a UUID, a name, or `hypervisor/name`, as it is now. Raises NotFound, UsageError,
        HypervisorUnreachable if the one that had it last does not answer, or nobody does."""
        hypervisor = wanted.partition("/")[0]
        only = hypervisor if "/" in wanted and hypervisor in self.hypervisors else None
        look = self.look(only, disks=disks)
        with self._catalog.read() as session:
            seen = [one.summary for one in cache.sightings(session, only)]
        if not seen and look.silent:
            raise _raised(next(iter(look.silent.values())))
        try:
            found = machine_among(seen, wanted)
        except NotFound as error:
            unheard = f"; {', '.join(sorted(look.silent))} did not answer" if look.silent else ""
            blind = self._context.blind_to_off()
            remark = f"; {', '.join(blind)}: {_BLIND}" if blind else ""
            raise NotFound(f"{error}{unheard}", hint=f"{error.hint}{remark}") from None
        if found.machine.hypervisor in look.silent:
            raise _raised(look.silent[found.machine.hypervisor])
        if found.power is Power.OFF and found.machine.hypervisor in self._context.blind_to_off():
            raise NotFound(f"{found.machine.name} does not run", hint=f"{found.machine.hypervisor}: {_BLIND}")
        return found

    # --- now and then ----------------------------------------------------------------------------------------------

    def chores(self) -> list[Chore]:
        return [Chore("discovery", EVERY_SECONDS, self.turn)]

    def turn(self, now: datetime) -> None:
        """Conclude the last round, and begin another. Waits for nobody."""
        for name in self._news.round(now):
            self._ask(ListMachines(job=_nobody(), hypervisor=name, asked=now), self._heard_later)

    def _heard_later(self, listing: MachinesListed) -> None:
        if not self._closed:
            self._news.heard([listing])

    # --- on demand -------------------------------------------------------------------------------------------------

    def look(self, hypervisor: str | None = None, *, disks: bool = False, seconds: float | None = None) -> Look:
        """Ask one hypervisor, or all, and wait at most `seconds` for the answers. If that raises a question that only
        the others can answer, they are asked too. Raises UsageError if none is configured."""
        names = [hypervisor] if hypervisor else self.hypervisors
        if not names:
            raise UsageError(f"{self._config().path} names no hypervisor", hint="add a [hypervisors.local] section")
        patience = seconds or (DISKS_SECONDS if disks else LOOK_SECONDS)
        first = self._round(names, patience, disks=disks)
        if not any(change.machine.missed or change.machine.doubt for change in first.changes):
            return first
        second = self._round(self.hypervisors, patience, disks=disks)
        return Look([*first.changes, *second.changes], {**second.silent, **first.silent})

    def _round(self, names: Sequence[str], seconds: float, *, disks: bool) -> Look:
        now = datetime.now(UTC)
        commands = [ListMachines(job=_nobody(), hypervisor=name, disks=disks, asked=now) for name in names]
        return self._look_afar(commands, seconds) if self._send else self._look_here(commands, seconds)

    def _look_here(self, commands: Sequence[ListMachines], seconds: float) -> Look:
        answers: queue.SimpleQueue[MachinesListed] = queue.SimpleQueue()
        deadline = time.monotonic() + seconds
        waiting = {command.hypervisor for command in commands if self._ask(command, answers.put)}
        heard: list[MachinesListed] = []
        while waiting:
            try:
                heard.append(answers.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
            waiting.discard(heard[-1].hypervisor)
        told = {listing.hypervisor for listing in heard}
        late = [_late(command, seconds) for command in commands if command.hypervisor not in told]
        changes = self._news.heard([*heard, *late])
        return Look(changes, {one.hypervisor: one.error for one in [*heard, *late] if one.error is not None})

    def _look_afar(self, commands: Sequence[ListMachines], seconds: float) -> Look:
        names = [command.hypervisor for command in commands]
        with self._catalog.write() as session:
            cache.alone(session)
            before = cache.known(session)
            cache.ask(session, names, commands[0].asked)
        for command in commands:
            self._ask(command, self._heard_later)
        deadline = time.monotonic() + seconds
        waiting = set(names)
        while waiting and time.monotonic() < deadline:
            time.sleep(_POLL)
            with self._catalog.read() as session:
                waiting = {name for name, row in cache.hypervisors(session).items() if row.asked and name in waiting}
        with self._catalog.read() as session:
            rows = cache.hypervisors(session)
            after = cache.known(session)
        silent = {
            name: ErrorInfo(
                code="HypervisorUnreachable",
                message=f"{name} did not answer: {rows[name].problem or _nobody_asks(seconds)}",
                hint=f"stillframe worker --hypervisor {name}" if name in waiting else "",
                retryable=True,
            )
            for name in names
            if name in waiting or rows[name].problem
        }
        return Look([Change(new) for uuid, new in after.items() if before.get(uuid) != new], silent)

    def _ask(self, command: ListMachines, answer: Callable[[MachinesListed], object]) -> bool:
        """False: it is being asked already, and hangs."""
        if self._send is not None:
            self._send(command)
            return True
        with self._lock:
            if command.hypervisor in self._asking or self._closed:
                return False
            self._asking.add(command.hypervisor)
        thread = threading.Thread(target=partial(self._perform, command, answer), daemon=True, name="listing")
        thread.start()
        return True

    def _perform(self, command: ListMachines, answer: Callable[[MachinesListed], object]) -> None:
        listing = list_machines(self._context, command)
        with self._lock:
            self._asking.discard(command.hypervisor)
        answer(listing)


def _remembered(name: str, problem: str) -> ErrorInfo | None:
    message = f"{name} did not answer when it was last asked: {problem}"
    return ErrorInfo(code="HypervisorUnreachable", message=message, retryable=True) if problem else None


_ERRORS = {kind.__name__: kind for kind in (ConfigError, NotFound, HypervisorRefused, HypervisorUnreachable)}


def _raised(info: ErrorInfo) -> StillframeError:
    return _ERRORS.get(info.code, HypervisorError)(info.message, hint=info.hint)


def _nobody() -> str:
    """In place of a job's id."""
    return f"list-{secrets.token_hex(6)}"


def _nobody_asks(seconds: float) -> str:
    return f"no worker has asked it within {seconds:.0f} s"


def _late(command: ListMachines, seconds: float) -> MachinesListed:
    error = ErrorInfo(
        code="HypervisorUnreachable",
        message=f"{command.hypervisor} has not listed its machines within {seconds:.0f} s",
        hint="stillframe doctor",
        retryable=True,
    )
    return MachinesListed(hypervisor=command.hypervisor, asked=command.asked, disks=command.disks, error=error)
