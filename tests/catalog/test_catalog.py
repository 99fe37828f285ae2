from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlmodel import SQLModel

from orchestrator.catalog import owner
from orchestrator.catalog.jobs import (
    Stale,
    add_job,
    append_event,
    events_of,
    find_job,
    jobs_using,
    load_job,
    recent_jobs,
    store_job,
)
from orchestrator.catalog.points import (
    document,
    extensions,
    mark_damaged,
    newest_base,
    points_of,
    put_extension,
    put_point,
    remove_point,
    see_machine,
    seen_machines,
)
from orchestrator.catalog.schema import HEAD
from orchestrator.catalog.store import Catalog
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.states import JobState
from tests.controller.scripted import add_backup
from tests.jobs.test_backup import run_backup
from tests.jobs.world import MACHINE, World
from workers.contract.errors import Busy, ConfigError, NotFound, StillframeError, UsageError
from workers.contract.guests import ExtensionState, ExtensionUse, GuestOs
from workers.contract.points import Point


@pytest.fixture
def url(catalog_url: str) -> str:
    """On SQLite and on PostgreSQL."""
    return catalog_url


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    with Catalog.open(url) as catalog:
        yield catalog


def point(point_id: str, seconds: int = 0) -> Point:
    world = World()
    run_backup(world, point_id)
    made = world.points[point_id]
    return made.model_copy(update={"time": made.time + timedelta(seconds=seconds)})


# --- opening -------------------------------------------------------------------------------------------------------


def test_migrations_lead_to_the_tables_that_the_code_expects(catalog: Catalog) -> None:
    with catalog.read() as session:
        context = MigrationContext.configure(session.connection())
        differences = compare_metadata(context, SQLModel.metadata)
    # These are made by the migration alone (see JobRow); anything else would be a table that the code misreads.
    assert {(what, index.name) for what, index in differences} == {
        ("remove_index", "alert_one_standing_per_key"),
        ("remove_index", "job_one_active_per_lock"),
        ("remove_index", "job_unsettled"),
        ("remove_index", "point_newest"),
    }
    config = Config()
    config.set_main_option("script_location", "orchestrator.catalog:migrations")
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_opened_again_it_keeps_what_it_has(url: str) -> None:
    with Catalog.open(url) as first:
        add_backup(first, "one")
    with Catalog.open(url) as second, second.read() as session:
        assert load_job(session, "one")[1].id == "one"


def test_many_open_a_new_catalog_at_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        for catalog in pool.map(lambda _: Catalog.open(url), range(6)):
            catalog.close()
    with Catalog.open(url) as catalog, catalog.read() as session:
        assert session.connection().execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1


def test_newer_schema_is_refused_and_left_alone(url: str) -> None:
    with Catalog.open(url) as catalog, catalog.write() as session:
        session.connection().execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StillframeError, match="newer Stillframe"):
        Catalog.open(url)


@pytest.mark.parametrize("bad", ["sqlite://", "nonsense", "carrier+pigeon://x", "sqlite:////proc/nowhere/c.db"])
def test_url_that_cannot_be_meant(bad: str) -> None:
    with pytest.raises(ConfigError):
        Catalog.open(bad)


def test_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "c.db").write_text("this is a letter, not a database, and quite a long one" * 40)
    with pytest.raises(ConfigError, match="cannot be opened"):
        Catalog.open(f"sqlite:///{tmp_path}/c.db")
    assert (tmp_path / "c.db").read_text().startswith("this is a letter")


# --- jobs ----------------------------------------------------------------------------------------------------------


def test_a_transition_from_an_older_version_loses(catalog: Catalog) -> None:
    job = add_backup(catalog, "one")
    with catalog.write() as session:
        store_job(session, job.model_copy(update={"state": JobState.PREPARING}), 0)
    with pytest.raises(Stale), catalog.write() as session:
        store_job(session, job.model_copy(update={"state": JobState.CANCELLED}), 0)
    with catalog.read() as session:
        row, stored = load_job(session, "one")
    assert (row.version, row.state, stored.state) == (1, "preparing", JobState.PREPARING)


def test_the_index_itself_allows_one_active_job_per_lock(catalog: Catalog) -> None:
    add_backup(catalog, "one")
    with pytest.raises(IntegrityError), catalog.write() as session:
        session.connection().execute(
            text(
                "INSERT INTO job (id,kind,machine_uuid,machine_name,hypervisor,vault,uses_point,lock,state,active,"
                "leftover,version,owner_host,owner_boot,owner_pid,owner_started,created,updated,doc) "
                "SELECT 'two',kind,machine_uuid,machine_name,hypervisor,vault,uses_point,lock,state,active,"
                "leftover,version,owner_host,owner_boot,owner_pid,owner_started,created,updated,doc FROM job"
            )
        )


def test_of_many_that_begin_at_once_one_wins(catalog: Catalog) -> None:
    def begin(number: int) -> bool:
        try:
            add_backup(catalog, f"job{number}")
        except Busy:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(begin, range(8))) == 1


def test_an_ended_job_frees_its_lock(catalog: Catalog) -> None:
    job = add_backup(catalog, "one")
    with catalog.write() as session:
        store_job(session, job.model_copy(update={"state": JobState.CANCELLED}), 0)
    add_backup(catalog, "two")
    with catalog.read() as session:
        assert [row.id for row in recent_jobs(session, active_only=True, limit=9)] == ["two"]
        assert {row.id for row in recent_jobs(session, active_only=False, limit=9)} == {"one", "two"}


@pytest.mark.parametrize("statement", ["UPDATE job_event SET text = 'else'", "DELETE FROM job_event"])
def test_events_are_append_only(catalog: Catalog, statement: str) -> None:
    add_backup(catalog, "one")
    with catalog.write() as session:
        append_event(session, "one", "started", "begun")
    with pytest.raises(DBAPIError, match="append-only"), catalog.write() as session:
        session.connection().execute(text(statement))
    with catalog.read() as session:
        assert [event.text for event in events_of(session, "one")] == ["begun"]


def test_an_event_needs_its_job(catalog: Catalog) -> None:
    with pytest.raises(IntegrityError), catalog.write() as session:
        append_event(session, "none", "started", "begun")


def test_a_failed_transaction_leaves_nothing(catalog: Catalog) -> None:
    add_backup(catalog, "one")

    def begin_and_fail() -> None:
        with catalog.write() as session:
            append_event(session, "one", "started", "begun")
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        begin_and_fail()
    with catalog.read() as session:
        assert events_of(session, "one") == []


def test_jobs_are_found_by_their_beginning(catalog: Catalog) -> None:
    job = BackupJob(id="abc1", machine=MACHINE, vault="main", point="p")
    with catalog.write() as session:
        for name in ("abc1", "abc2"):
            renamed = job.model_copy(update={"id": name})
            add_job(session, renamed, owner.this_process(), machine=("u", "web"), lock=name, uses_point="p0")
    with catalog.read() as session:
        assert find_job(session, "abc2").id == "abc2"
        assert {row.id for row in jobs_using(session, "p0")} == {"abc1", "abc2"}
        with pytest.raises(UsageError, match="abc1, abc2"):
            find_job(session, "abc")
        for wrong in ("x", "", "%", "abc_"):
            with pytest.raises(NotFound):
                find_job(session, wrong)


# --- points --------------------------------------------------------------------------------------------------------


def test_base_is_the_newest_point_with_a_checkpoint(catalog: Catalog) -> None:
    first, second, third = point("p1", 10), point("p2", 20), point("p3", 30)
    third = third.model_copy(update={"disks": [d.model_copy(update={"checkpoint": None}) for d in third.disks]})
    with catalog.write() as session:
        for one in (third, first, second):
            put_point(session, "main", one)

    def base() -> str | None:
        with catalog.read() as session:
            found = newest_base(session, MACHINE.uuid, "main")
        return found.id if found else None

    assert base() == "p2"
    with catalog.write() as session:
        mark_damaged(session, "p2", "a block is corrupt")
    assert base() == "p2", "what is lost of it is read again"
    with catalog.write() as session:
        remove_point(session, "p2")
    assert base() == "p1"
    with catalog.write() as session:
        remove_point(session, "p1")
    assert base() is None
    with catalog.read() as session:
        assert newest_base(session, MACHINE.uuid, "other") is None
        assert [row.id for row in points_of(session)] == ["p3"]


def test_a_point_registered_twice_is_one(catalog: Catalog) -> None:
    one = point("p1")
    for _ in range(2):
        with catalog.write() as session:
            put_point(session, "main", one)
    with catalog.read() as session:
        [row] = points_of(session)
    assert document(row) == one.model_copy(update={"definition": "", "nvram": None})


def test_moments_come_back_in_utc(catalog: Catalog) -> None:
    berlin = timezone(timedelta(hours=1))
    with catalog.write() as session:
        see_machine(session, MACHINE, datetime(2026, 11, 22, 3, tzinfo=berlin))
    with catalog.read() as session:
        [row] = seen_machines(session)
    assert row.seen == datetime(2026, 11, 22, 2, tzinfo=UTC)
    assert row.seen.utcoffset() == timedelta(0)


# --- machines ------------------------------------------------------------------------------------------------------

ENABLED = ExtensionState(use=ExtensionUse.ENABLED, version="0.1.0+1a2b3c4d", channel="guest agent", os=GuestOs.LINUX)


def test_what_is_known_of_an_extension_outlives_the_next_look_at_the_machine(catalog: Catalog) -> None:
    with catalog.write() as session:
        see_machine(session, MACHINE)
        assert extensions(session) == {}
        put_extension(session, MACHINE.uuid, ENABLED)
        see_machine(session, MACHINE.model_copy(update={"name": "renamed"}))
    with catalog.write() as session:
        see_machine(session, MACHINE)
    with catalog.read() as session:
        assert extensions(session) == {MACHINE.uuid: ENABLED}


def test_of_a_machine_that_was_never_seen_nothing_is_kept(catalog: Catalog) -> None:
    with catalog.write() as session:
        put_extension(session, MACHINE.uuid, ENABLED)
        assert extensions(session) == {}
        see_machine(session, MACHINE)
        assert extensions(session) == {}


def test_a_catalog_of_the_first_schema_keeps_its_machines(url: str) -> None:
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(exist_ok=True)
    engine = create_engine(url)
    with engine.begin() as connection:
        first = Config()
        first.set_main_option("script_location", "orchestrator.catalog:migrations")
        first.attributes["connection"] = connection
        command.upgrade(first, "0001")
        row = {
            "uuid": MACHINE.uuid,
            "hypervisor": MACHINE.hypervisor,
            "name": MACHINE.name,
            "seen": "2026-11-22 02:00:00.000000",
        }
        connection.execute(text("INSERT INTO machine VALUES (:uuid, :hypervisor, :name, :seen)"), row)
    engine.dispose()
    with Catalog.open(url) as catalog, catalog.write() as session:
        assert [row.name for row in seen_machines(session)] == [MACHINE.name]
        put_extension(session, MACHINE.uuid, ENABLED)
    with Catalog.open(url) as catalog, catalog.read() as session:
        assert extensions(session) == {MACHINE.uuid: ENABLED}
