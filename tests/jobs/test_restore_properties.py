"""A restore in any order, loss and repetition of events: it ends, and what it did not finish is gone; nothing of
anybody else is touched (invariant 9)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from orchestrator.jobs.docs import JOB
from orchestrator.jobs.restore import RestoreJob, advance, retry_release, start
from orchestrator.jobs.states import TERMINAL, JobState
from tests.jobs.test_backup import run_backup
from tests.jobs.world import MACHINE, World, failed
from workers.contract.messages import CancelRequested, Command, Event, PrepareRestore, RestoreDisk, WorkerLost

FOREIGN = "/new/vdb.qcow2"


class Restores(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.in_flight: list[Command] = []
        self.mailbox: list[Event] = []
        self.delivered: list[Event] = []
        self.disturbed = 0
        self.job = RestoreJob(id="r1", vault="main", point="p1")

    @initialize(kind=st.sampled_from(["disk", "machine", "replace"]), foreign_file=st.booleans())
    def begin(self, kind: str, foreign_file: bool) -> None:
        run_backup(self.world, "p1")
        if foreign_file:
            self.world.files[FOREIGN] = "somebody else"
        if kind == "disk":
            self.job = self.job.model_copy(update={"targets": ["vdb"], "to": FOREIGN})
        else:
            replace = kind == "replace"
            uuid = MACHINE.uuid if replace else "new"
            more = {"hypervisor": "lab", "name": "web2", "uuid": uuid, "directory": "/new", "replace": replace}
            self.job = self.job.model_copy(update=more)
        self._apply(start(self.job))

    def _apply(self, step: tuple[RestoreJob, list[Command]]) -> None:
        self.job, commands = step
        assert JOB.validate_json(JOB.dump_json(self.job)) == self.job
        for command in commands:
            if isinstance(command, RestoreDisk):
                assert command.path in self.job.files.values()
        self.in_flight += commands

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), steps=st.integers(1, 6))
    def goes_well(self, data: st.DataObject, steps: int) -> None:
        """Some commands in a row, in any order, each performed and reported: deep states are reached by this."""
        for _ in range(steps):
            if self.in_flight:
                command = data.draw(st.sampled_from(self.in_flight))
                self.in_flight.remove(command)
                event = self.world.perform(command)
                self.delivered.append(event)
                self._apply(advance(self.job, event))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), outcome=st.sampled_from(["ok", "ok", "ok", "fails before", "fails after"]))
    def perform(self, data: st.DataObject, outcome: str) -> None:
        command = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(command)
        if outcome == "fails before":
            self.mailbox.append(failed(command))
            return
        event = self.world.perform(command)
        self.mailbox.append(event if outcome == "ok" else failed(command))

    @precondition(lambda self: self.mailbox)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        event = data.draw(st.sampled_from(self.mailbox))
        self.mailbox.remove(event)
        self.delivered.append(event)
        self._apply(advance(self.job, event))

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        self._apply(advance(self.job, data.draw(st.sampled_from(self.delivered))))

    @precondition(lambda self: self.disturbed < 2)
    @rule()
    def cancel(self) -> None:
        self.disturbed += 1
        self._apply(advance(self.job, CancelRequested(by="anna")))

    @precondition(lambda self: self.job.state not in TERMINAL and self.disturbed < 2)
    @rule()
    def crash(self) -> None:
        self.disturbed += 1
        self.in_flight, self.mailbox = [], []
        self._apply(advance(self.job, WorkerLost(detail="process 7 is gone")))

    def teardown(self) -> None:
        for _ in range(4):
            if self.job.state not in TERMINAL:
                self.in_flight = []
                self._apply(advance(self.job, WorkerLost(detail="process 7 is gone")))
            elif self.job.leftover:
                self._apply(retry_release(self.job))
            for command in list(self.in_flight):
                if not isinstance(command, PrepareRestore | RestoreDisk):
                    self._apply(advance(self.job, self.world.perform(command)))
            self.in_flight = []
        assert self.job.state in TERMINAL
        assert not self.job.leftover
        ours = {path for path, who in self.world.files.items() if who == "r1"}
        succeeded = self.job.state is JobState.SUCCEEDED
        if succeeded:
            assert ours == set(self.job.files.values())
        elif not self.job.replace:
            assert not ours
            assert "r1" not in self.world.machines.values()
        if self.world.machines[MACHINE.uuid] == "r1":  # replaced: its disks are never deleted
            assert ours == set(self.job.files.values())
        if not self.job.replace:
            assert self.world.machines[MACHINE.uuid] == "original"


Restores.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestRestores = Restores.TestCase
