"""`50-postgresql` against real clusters: checkpoint, backup mode, and everything that may go wrong in between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.extension.apps.runs import Script, until
from tests.guests.database_guest import POSTGRESQL, SECOND, only, psql
from tests.guests.machines import Guest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stillframe'"
HBA = "$(ls -d /etc/postgresql/*)/main/pg_hba.conf"


@pytest.fixture(scope="module", autouse=True)
def _only_postgresql(database_guest: Guest) -> None:
    only(database_guest, POSTGRESQL)
    psql(database_guest, "CREATE TABLE IF NOT EXISTS t (n int)")


@pytest.fixture
def script(database_guest: Guest, shell: str) -> Iterator[Script]:
    yield from _script(database_guest, shell, "")


@pytest.fixture
def backup(database_guest: Guest, shell: str) -> Iterator[Script]:
    yield from _script(database_guest, shell, "backup")


def _script(guest: Guest, shell: str, option: str) -> Iterator[Script]:
    script = Script(guest, "50-postgresql", shell, option)
    script.fresh()
    yield script
    assert script.sweep() == ""


def checkpoint(guest: Guest, port: int = 5432) -> str:
    return psql(guest, "SELECT checkpoint_lsn FROM pg_control_checkpoint()", port=port)


class TestCheckpoint:
    def test_it_is_written(self, script: Script) -> None:
        psql(script.guest, "INSERT INTO t VALUES (1)")
        before = checkpoint(script.guest)
        assert script("probe") == (0, "")
        assert script("pre") == (0, "")
        assert checkpoint(script.guest) != before
        assert script.holder() == ""
        assert script("post") == (0, "")
        assert script.records() == {}

    def test_it_takes_too_long(self, script: Script) -> None:
        """The server goes on with it, and recovers without it, too."""
        checkpointer = script.guest.out("pgrep -f 'main: checkpointer'").split()[0]
        script.guest.out(f"kill -STOP {checkpointer}")
        script.deadline = 8
        try:
            assert script("pre") == (0, "postgresql: a checkpoint takes longer than 7 s")
        finally:
            script.guest.out(f"kill -CONT {checkpointer}")

    def test_it_cannot_log_in(self, script: Script) -> None:
        script.guest.out(f"cp -p {HBA} /tmp/hba; echo local all all reject >{HBA}")
        script.guest.out("systemctl reload 'postgresql@*'")
        try:
            until(lambda: script.guest.run("cd /; su postgres -c 'psql -c SELECT\\ 1'")[0] != 0)
            code, said = script("pre")
            assert code == 1
            assert said.startswith("postgresql: cluster on port 5432: ")
            assert "pg_hba.conf" in said
            assert len(said.splitlines()) == 1
            script.option = "backup"
            assert script("pre") == (1, said)
            assert script("post") == (0, "")
        finally:
            script.guest.out(f"cp -p /tmp/hba {HBA}; systemctl reload 'postgresql@*'")
        until(lambda: script("pre")[0] == 0)
        script("post")

    def test_an_option_that_it_does_not_know(self, script: Script) -> None:
        script.option = "backups"
        assert script("pre") == (1, "postgresql: unknown option backups")

    def test_what_is_no_server(self, script: Script) -> None:
        """A pooler's socket has no lock file beside it."""
        perl = "my $s = IO::Socket::UNIX->new(Local => q(/tmp/.s.PGSQL.7777), Listen => 1) or die; sleep 999"
        pid = script.guest.out(
            f"setsid perl -MIO::Socket::UNIX -e '{perl}' </dev/null >/dev/null 2>&1 & echo $!"
        ).strip()
        try:
            until(lambda: script.guest.run("grep -q PGSQL.7777 /proc/net/unix")[0] == 0)
            assert script("pre") == (0, "")
        finally:
            script.guest.out(f"kill {pid}; rm /tmp/.s.PGSQL.7777")


class TestBackupMode:
    def test_the_label_is_recorded_and_writes_go_on(self, backup: Script) -> None:
        guest = backup.guest
        assert backup("pre") == (0, "")
        assert backup.holder_lives()
        assert psql(guest, SESSIONS) == "1"
        psql(guest, "INSERT INTO t VALUES (2)")
        assert guest.run("ls /var/lib/postgresql/*/main/backup_label")[0] != 0
        assert backup("post") == (0, "")
        assert not backup.holder_lives()
        until(lambda: psql(guest, SESSIONS) == "0")
        records = backup.records()
        assert sorted(records) == ["backup_label", "wal_position"]
        start, stop = (line.split() for line in records["wal_position"].splitlines())
        assert (start[0], stop[0]) == ("start", "stop")
        assert psql(guest, f"SELECT '{start[1]}'::pg_lsn < '{stop[1]}'::pg_lsn") == "t"
        assert records["backup_label"].startswith(f"START WAL LOCATION: {start[1]} (file ")
        assert "\nLABEL: stillframe 0123abcd\n" in records["backup_label"]

    def test_a_copy_with_the_label_recovers(self, database_guest: Guest) -> None:
        """The label belongs to these very files: a server recovers from it, to where backup mode ended."""
        guest, backup = database_guest, Script(database_guest, "50-postgresql", "dash", "backup")
        backup.fresh()
        psql(guest, "DROP TABLE IF EXISTS c; CREATE TABLE c AS SELECT 1 AS n")
        assert backup("pre") == (0, "")
        guest.out("rm -rf /data/vdb/copy; cp -a /data/vdb/postgresql/*/main /data/vdb/copy")
        psql(guest, "INSERT INTO c VALUES (2)")
        assert backup("post") == (0, "")
        folder = "/data/vdb/copy"
        guest.out(
            f"rm -rf {folder}/pg_wal {folder}/postmaster.*; cp -a /data/vdb/postgresql/*/main/pg_wal {folder}/;"
            f"cp {backup.home}/records/backup_label {folder}/ && chown postgres {folder}/backup_label"
        )
        server = "$(ls -d /usr/lib/postgresql/*/bin)/pg_ctl -D /data/vdb/copy -l /tmp/copy.log"
        settings = (
            "-p 5499 -c config_file=$(ls /etc/postgresql/*/main/postgresql.conf) -c data_directory=/data/vdb/copy"
        )
        settings += " -c external_pid_file="
        try:
            guest.out(f"cd /; su postgres -c \"{server} -w -t 200 -o '{settings}' start\"", timeout=250)
            assert psql(guest, "SELECT count(*) FROM c", port=5499) == "2"
            assert "consistent recovery state reached" in guest.out("cat /tmp/copy.log")
        finally:
            guest.run(f'cd /; su postgres -c "{server} -m immediate stop"; rm -rf {folder}')

    def test_the_holder_dies(self, backup: Script) -> None:
        assert backup("pre") == (0, "")
        backup.guest.out(f"kill -KILL {backup.holder()}")
        assert not backup.holder_lives()
        until(lambda: psql(backup.guest, SESSIONS) == "0")
        code, said = backup("post")
        assert code == 1
        assert "not in backup mode to the end" in said
        assert backup.records() == {}

    def test_the_server_stops(self, backup: Script) -> None:
        assert backup("pre") == (0, "")
        try:
            only(backup.guest)
            until(lambda: not backup.holder_lives())
            code, said = backup("post")
            assert code == 1
            assert said.startswith("postgresql: not in backup mode to the end: ")
        finally:
            only(backup.guest, POSTGRESQL)
        assert backup.records() == {}

    def test_its_time_is_over(self, backup: Script) -> None:
        backup.hold = 15
        assert backup("pre") == (0, "")
        until(lambda: not backup.holder_lives(), timeout=60)
        until(lambda: psql(backup.guest, SESSIONS) == "0")
        assert backup("post")[0] == 1
        assert backup.records() == {}

    def test_two_clusters(self, backup: Script) -> None:
        guest = backup.guest
        only(guest, POSTGRESQL, SECOND)
        try:
            before = checkpoint(guest), checkpoint(guest, 5433)
            assert backup("pre") == (0, "")
            assert psql(guest, SESSIONS) == psql(guest, SESSIONS, port=5433) == "1"
            assert checkpoint(guest) != before[0]
            assert checkpoint(guest, 5433) != before[1]
            assert backup("post") == (0, "")
            assert sorted(backup.records()) == [
                f"{name}.{port}" for name in ("backup_label", "wal_position") for port in (5432, 5433)
            ]
            self.one_of_two_is_lost(backup)
        finally:
            only(guest, POSTGRESQL)

    def one_of_two_is_lost(self, backup: Script) -> None:
        backup.fresh()
        assert backup("pre") == (0, "")
        only(backup.guest, POSTGRESQL)
        until(lambda: not backup.holder_lives())
        code, said = backup("post")
        assert code == 1
        assert "in backup mode" in said

    def test_a_tablespace(self, backup: Script) -> None:
        guest = backup.guest
        guest.out("install -d -o postgres '/var/lib/postgresql/my space'")
        psql(guest, "CREATE TABLESPACE s LOCATION '/var/lib/postgresql/my space'")
        try:
            assert backup("pre") == (0, "")
            assert backup("post") == (0, "")
            oid = psql(guest, "SELECT oid FROM pg_tablespace WHERE spcname = 's'")
            assert backup.records()["tablespace_map"] == f"{oid} /var/lib/postgresql/my space\n"
        finally:
            psql(guest, "DROP TABLESPACE s")


class TestNothingToDo:
    def test_the_server_is_down(self, script: Script) -> None:
        only(script.guest)
        try:
            assert script("probe") == (3, "")
            assert script("pre") == (3, "")
            assert script("post") == (0, "")
        finally:
            only(script.guest, POSTGRESQL)

    def test_the_server_was_killed_and_left_its_socket(self, script: Script) -> None:
        script.guest.out("systemctl kill -s KILL 'postgresql@*'; systemctl stop 'postgresql@*'")
        script.guest.out("ls /run/postgresql/.s.PGSQL.5432")
        try:
            assert script("pre") == (3, "")
        finally:
            only(script.guest, POSTGRESQL)

    def test_post_without_pre(self, backup: Script) -> None:
        assert backup("post") == (0, "")
