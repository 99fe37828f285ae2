"""Who begins next: the rule by itself, and dispatchers that meet on one catalog."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.catalog import owner
from orchestrator.catalog.jobs import BACKUP, RESTORE, Ticket, add_job, find_job
from orchestrator.catalog.owner import NOBODY, Owner
from orchestrator.catalog.queue import Entry
from orchestrator.catalog.store import Catalog
from orchestrator.config import parse_config
from orchestrator.controller import Controller
from orchestrator.dispatcher import Dispatcher, Limits, decide
from orchestrator.jobs.backup_job import BackupJob
from tests.controller.scripted import Bench
from tests.controller.test_reconciler import dead
from tests.jobs.world import World
from workers.contract.machines import MachineRef
from workers.contract.messages import CancelRequested, Command

ME = Owner("here", "boot", 1, 1)
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
LIMITS = Limits(hypervisors={"lab": 2, "lab2": 1}, vaults={"main": 3})


def entry(name: str, **changes: object) -> Entry:
    fields: dict[str, object] = {
        "id": name,
        "kind": "backup",
        "machine": f"m-{name}",
        "hypervisor": "lab",
        "vault": "main",
        "queued": True,
        "priority": BACKUP,
        "moment": NOON,
        "owner": ME,
    }
    return Entry(**{**fields, **changes})  # type: ignore[arg-type]


def begins(*entries: Entry, limits: Limits = LIMITS, served: set[str] | None = None) -> list[str]:
    return [job for job, why in decide(entries, limits, ME, served=served).items() if not why]


def test_as_many_as_there_are_slots_the_oldest_first() -> None:
    jobs = [entry(f"{n}", moment=NOON - timedelta(minutes=n)) for n in range(4)]
    assert begins(*jobs) == ["3", "2"]
    assert begins(*jobs, entry("busy", queued=False)) == ["3"]
    assert begins(*jobs, entry("busy", queued=False), entry("busy2", queued=False)) == []


def test_a_scheduled_backup_does_not_begin_in_a_blackout() -> None:
    text = """
        [vaults.main]
        url = "file:///v"
        key_file = "k"
        [policies.gold]
        timezone = "UTC"
        blackout = ["08:00 to 18:00"]
        [policies.free]
        [protect.web]
        machines = ["*"]
        policy = "gold"
        [protect.free]
        machines = ["free"]
        policy = "free"
    """
    config = parse_config(text, Path("/c.toml"))
    jobs = [entry("asked"), entry("web", section="web"), entry("free", section="free")]
    closed = decide(jobs, Limits.of(config, NOON), ME)
    assert closed == {"asked": "", "free": "", "web": "in a blackout of policy gold until Sun 18:00"}
    assert set(begins(*jobs, limits=Limits.of(config, NOON + timedelta(hours=6)))) == {"asked", "web", "free"}


def test_why_it_waits() -> None:
    verdicts = decide([entry("a", queued=False), entry("b", queued=False), entry("c")], LIMITS, ME)
    assert verdicts == {"c": "2 jobs on hypervisor lab before it (max_jobs = 2)"}
    limits = Limits(hypervisors={}, vaults={"main": 1})
    assert decide([entry("a"), entry("b")], limits, ME) == {
        "a": "",
        "b": "1 job in vault main before it (max_jobs = 1)",
    }
    assert decide([entry("a")], LIMITS, ME, served={"lab2"}) == {"a": "no worker of hypervisor lab is heard of"}


def test_a_more_urgent_policy_goes_first() -> None:
    assert begins(entry("a"), entry("b"), entry("c", priority=BACKUP - 4)) == ["c", "a"]


def test_a_restore_has_a_slot_of_its_own() -> None:
    full = [entry("x", queued=False), entry("y", queued=False)]
    restores = [entry(name, kind="restore", priority=RESTORE) for name in ("r1", "r2")]
    assert begins(*full, *restores) == ["r1"]
    assert begins(*full, entry("r0", kind="restore", queued=False), *restores) == []
    assert begins(entry("a"), entry("b"), *restores) == ["r1", "r2"], "and goes first where there is room"
    assert begins(*full, entry("r", kind="restore", priority=RESTORE), limits=Limits({"lab": 2}, {"main": 2})) == ["r"]


def test_a_full_hypervisor_is_in_nobody_elses_way() -> None:
    full = [entry("x", queued=False), entry("y", queued=False)]
    assert begins(*full, entry("a"), entry("b", hypervisor="lab2")) == ["b"]
    assert begins(entry("f", hypervisor="", kind="restore"), limits=Limits({}, {})) == ["f"]


def test_jobs_of_others_are_counted_and_not_begun() -> None:
    other = Owner("here", "boot", 2, 2)
    assert begins(entry("a", owner=other), entry("b", owner=other, queued=False), entry("c"), entry("d")) == ["c"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["backup", "restore"]), st.sampled_from(["lab", "lab2", ""]), st.booleans(), st.booleans()
        ),
        max_size=30,
    )
)
def test_never_more_than_the_limits_and_never_fewer(jobs: list[tuple[str, str, bool, bool]]) -> None:
    entries = [
        entry(f"{n:02}", kind=kind, hypervisor=host, queued=queued, owner=ME if mine else NOBODY)
        for n, (kind, host, queued, mine) in enumerate(jobs)
    ]
    chosen = begins(*entries)
    under_way = [one for one in entries if not one.queued]
    after = under_way + [one for one in entries if one.id in chosen]
    before_by, after_by = (Counter(one.hypervisor for one in group) for group in (under_way, after))
    for host, limit in LIMITS.hypervisors.items():
        if after_by[host] > before_by[host]:
            assert after_by[host] <= limit + 1
            begun = {one.kind for one in entries if one.id in chosen and one.hypervisor == host}
            assert after_by[host] <= limit or "restore" in begun
    for one in entries:
        if one.queued and one.owner == ME and one.id not in chosen:
            room = after_by[one.hypervisor] < LIMITS.hypervisors.get(one.hypervisor, 99)
            assert not (room and len(after) < LIMITS.vaults["main"]), "a slot was left free"


# --- on a catalog --------------------------------------------------------------------------------------------------


def queue(catalog: Catalog, name: str, *, of: Owner, host: str = "lab", ticket: Ticket | None = None) -> None:
    machine = MachineRef(hypervisor=host, uuid=f"uuid-{name}", name=name)
    job = BackupJob(id=name, machine=machine, vault="main", point=f"point-{name}")
    lock = f"machine:{machine.uuid}"
    with catalog.write() as session:
        add_job(session, job, of, machine=(machine.uuid, name), lock=lock, ticket=ticket or Ticket())


def dispatcher(bench: Bench, of: Owner = ME) -> Dispatcher:
    return Dispatcher(bench.catalog, bench.controller, lambda: LIMITS, of)


def states(catalog: Catalog) -> dict[str, str]:
    with catalog.read() as session:
        return {name: find_job(session, name).state for name in ("a", "b", "c")}


def test_jobs_begin_as_others_end(bench: Bench) -> None:
    for name in "abc":
        queue(bench.catalog, name, of=ME)
    assert dispatcher(bench).dispatch() == ["a", "b"]
    assert states(bench.catalog) == {"a": "preparing", "b": "preparing", "c": "queued"}
    assert dispatcher(bench).dispatch() == []
    bench.run()
    assert dispatcher(bench).dispatch() == ["c"]


def test_what_was_cancelled_meanwhile_does_not_begin(bench: Bench) -> None:
    queue(bench.catalog, "a", of=ME)
    bench.controller.advance("a", CancelRequested(by="anna"))
    assert dispatcher(bench).dispatch() == []
    assert bench.queue == []


def test_jobs_of_a_dead_process_take_no_slot(bench: Bench) -> None:
    gone = dead()
    for name in "ab":
        queue(bench.catalog, name, of=gone)
    assert dispatcher(bench, gone).dispatch() == ["a", "b"]
    queue(bench.catalog, "c", of=owner.this_process())
    assert dispatcher(bench, owner.this_process()).dispatch() == ["c"]


def test_many_dispatchers_at_once_never_count_a_slot_twice(catalog: Catalog, tmp_path: Path) -> None:
    """Each with a connection of its own, as processes have."""
    many_at_once(f"sqlite:///{tmp_path}/catalog.db", catalog)


def many_at_once(url: str, catalog: Catalog, *, dispatchers: int = 4) -> None:
    for number in range(12):
        queue(catalog, f"j{number:02}", of=NOBODY, host="lab" if number % 2 else "lab2")
    benches = [Bench(Catalog.open(url), World()) for _ in range(dispatchers)]
    try:
        with ThreadPoolExecutor(dispatchers) as pool:
            begun = [job for jobs in pool.map(lambda one: dispatcher(one, NOBODY).dispatch(), benches) for job in jobs]
    finally:
        for one in benches:
            one.catalog.close()
    assert sorted(begun) == ["j00", "j01", "j03"]
    assert sorted(command.job for one in benches for command in one.queue) == sorted(begun)


def test_a_command_that_cannot_be_sent_holds_up_no_other(catalog: Catalog) -> None:
    tried = []

    def send(command: Command, _queue: str) -> None:
        tried.append(command.job)
        if len(tried) == 1:
            raise OSError("the broker is away for a moment")

    with catalog.write() as session:
        for name in ("one", "two", "three"):
            machine = MachineRef(hypervisor="lab", uuid=name, name=name)
            job = BackupJob(id=name, machine=machine, vault="main", point=f"point-{name}")
            add_job(session, job, ME, machine=(name, name), lock=f"machine:{name}")
    begun = Dispatcher(catalog, Controller(catalog, send), lambda: Limits({}, {}), ME).dispatch()
    assert sorted(tried) == sorted(begun) == ["one", "three", "two"]
