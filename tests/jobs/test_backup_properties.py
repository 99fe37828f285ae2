"""Any order, loss and repetition of events, crashes at any moment, generation after generation: a backup ends, thaws,
releases, and never deletes the base (invariants 1, 2, 3, 8)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.jobs.backup import advance, retry_release, start
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.docs import JOB
from orchestrator.jobs.states import TERMINAL, JobState
from tests.jobs.world import MACHINE, World, failed
from workers.contract.machines import Power
from workers.contract.messages import (
    CancelRequested,
    Command,
    Event,
    Prepare,
    TakeSnapshot,
    TimedOut,
    TransferDisk,
    WorkerLost,
    sf_name,
)


class Backups(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.job = BackupJob(id="none", machine=MACHINE, vault="main", point="0", state=JobState.FAILED)
        self.number = 0
        self.disturbed = 0
        self.in_flight: list[Command] = []
        self.mailbox: list[tuple[str, Event]] = []
        self.delivered: list[tuple[str, Event]] = []

    def _apply(self, step: tuple[BackupJob, list[Command]]) -> None:
        after, commands = step
        # What is stored is what is read back: the state survives its journey through the catalog.
        stored = JOB.validate_json(JOB.dump_json(after))
        assert isinstance(stored, BackupJob)
        assert stored == after
        self._obligations_first(stored, commands)
        self.job = stored
        self.in_flight += commands

    def _obligations_first(self, job: BackupJob, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, TakeSnapshot) and command.online:
                assert job.must_thaw
                assert job.new_checkpoint == sf_name(job.id)

    # --- what can happen -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.job.state in TERMINAL and not self.job.leftover)
    @rule(force=st.booleans(), off=st.booleans())
    def new_job(self, force: bool, off: bool) -> None:
        self.number += 1
        self.disturbed = 0
        self.world.power = Power.OFF if off else Power.RUNNING
        base = self.world.newest_base()
        self.job = BackupJob(
            id=f"j{self.number}",
            machine=MACHINE,
            vault="main",
            point=f"p{self.number}",
            force_full=force,
            base=base.model_copy(update={"definition": "", "nvram": None}) if base else None,
        )
        self._apply(start(self.job))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), steps=st.integers(1, 12))
    def goes_well(self, data: st.DataObject, steps: int) -> None:
        """Some commands in a row, in any order, each performed and reported: deep states are reached by this."""
        for _ in range(steps):
            if self.in_flight:
                command = data.draw(st.sampled_from(self.in_flight))
                self.in_flight.remove(command)
                item = (command.job, self.world.perform(command))
                self.delivered.append(item)
                self._deliver(item)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), outcome=st.sampled_from(["ok", "ok", "ok", "fails before", "fails after", "half"]))
    def perform(self, data: st.DataObject, outcome: str) -> None:
        command = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(command)
        event: Event
        if outcome == "ok":
            event = self.world.perform(command)
        elif outcome == "half" and isinstance(command, TakeSnapshot):
            self.world.half_snapshot(command)
            event = failed(command)
        else:
            if outcome == "fails after":
                self.world.perform(command)
            event = failed(command)
        self.mailbox.append((command.job, event))

    @precondition(lambda self: self.mailbox)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.mailbox))
        self.mailbox.remove(item)
        self.delivered.append(item)
        self._deliver(item)

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        self._deliver(data.draw(st.sampled_from(self.delivered[-6:])))

    def _deliver(self, item: tuple[str, Event]) -> None:
        job, event = item
        if job == self.job.id:
            self._apply(advance(self.job, event))

    @precondition(lambda self: self.job.state not in TERMINAL and self.disturbed < 2)
    @rule(half=st.booleans(), timed_out=st.booleans())
    def crash(self, half: bool, timed_out: bool) -> None:
        """The process dies: in the middle of a snapshot perhaps; what it had not yet reported is lost."""
        self.disturbed += 1
        for command in self.in_flight:
            if half and isinstance(command, TakeSnapshot):
                self.world.half_snapshot(command)
        # A commit or a transfer may go on in a zombie; a snapshot or a session may not begin any more.
        self.in_flight = [c for c in self.in_flight if not isinstance(c, TakeSnapshot | Prepare)]
        self.mailbox = []
        lost: Event = TimedOut(detail="10 minutes") if timed_out else WorkerLost(detail="process 7 is gone")
        self._apply(advance(self.job, lost))

    @precondition(lambda self: self.disturbed < 2)
    @rule()
    def cancel(self) -> None:
        self.disturbed += 1
        self._apply(advance(self.job, CancelRequested(by="anna")))

    @rule(which=st.sampled_from(["vda", "vdb"]))
    def bitmap_breaks(self, which: str) -> None:
        for name in self.world.checkpoints:
            self.world.inconsistent.add((name, which))

    @precondition(lambda self: self.job.leftover)
    @rule()
    def release_again(self) -> None:
        self._apply(retry_release(self.job))

    # --- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def point_of_a_committed_job_exists(self) -> None:
        if self.job.state is JobState.SUCCEEDED:
            assert self.job.point in self.world.points
            assert self.job.error is None

    @invariant()
    def base_stands(self) -> None:
        """The newest point's checkpoint exists on the hypervisor: the chain is never cut."""
        newest = self.world.newest()
        if newest is not None:
            assert {d.checkpoint for d in newest.disks if d.checkpoint} <= set(self.world.checkpoints)

    def teardown(self) -> None:
        """The process dies, and the next start settles it with a worker that works."""
        for _ in range(4):
            if self.job.state not in TERMINAL:
                self.in_flight, self.mailbox = [], []
                self._apply(advance(self.job, WorkerLost(detail="process 7 is gone")))
            elif self.job.leftover:
                self._apply(retry_release(self.job))
            for command in list(self.in_flight):
                if command.job == self.job.id and not isinstance(command, TransferDisk):
                    self._apply(advance(self.job, self.world.perform(command)))
            self.in_flight = []
        assert self.job.state in TERMINAL
        assert not self.job.leftover
        assert not self.world.frozen
        assert not self.world.snapshots
        assert not self.world.sessions
        assert (self.job.state is JobState.SUCCEEDED) == (self.job.point in self.world.points)
        # Nothing stays but what a point refers to.
        kept = {d.checkpoint for p in self.world.points.values() for d in p.disks if d.checkpoint}
        assert set(self.world.checkpoints) <= kept
        assert "secret" not in self.job.model_dump_json()


Backups.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestBackups = Backups.TestCase
