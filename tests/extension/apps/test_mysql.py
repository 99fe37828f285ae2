"""`50-mysql` against a real MariaDB: the lock is held, is given back whatever happens, and stalls nobody for long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.extension.apps.runs import Script, until
from tests.guests.database_guest import MARIADB, mariadb, only
from tests.guests.machines import Guest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

ACCESS = "/etc/stillframe/mysql.cnf"


@pytest.fixture(scope="module", autouse=True)
def _only_mariadb(database_guest: Guest) -> None:
    only(database_guest, MARIADB)
    mariadb(database_guest, "CREATE DATABASE IF NOT EXISTS d; CREATE TABLE IF NOT EXISTS d.t (n int) ENGINE=Aria")


@pytest.fixture
def script(database_guest: Guest, shell: str) -> Iterator[Script]:
    script = Script(database_guest, "50-mysql", shell)
    script.fresh()
    yield script
    assert script.sweep() == ""


class Background:
    """A client that runs SQL beside the test."""

    def __init__(self, guest: Guest, sql: str, *, stay: bool = False) -> None:
        """With `stay` it is idle afterwards, and keeps its session."""
        self.guest = guest
        inner = f"mariadb -BN -e '{sql}' && echo done >/run/background || echo failed >/run/background"
        if stay:
            inner = f"(echo '{sql};'; sleep 999) | mariadb"
        guest.out("rm -f /run/background")
        self.pid = guest.out(f'setsid sh -c "{inner}" </dev/null >/dev/null 2>&1 & echo $!').strip()

    def done(self) -> bool:
        return self.guest.out("cat /run/background 2>/dev/null || :") == "done\n"

    def state(self) -> str:
        """Of all other connections, as the server sees them."""
        return mariadb(self.guest, "SELECT STATE, INFO FROM information_schema.PROCESSLIST WHERE ID <> CONNECTION_ID()")

    def kill(self) -> None:
        self.guest.run(f"kill -KILL -{self.pid}")


def writes_pass(guest: Guest) -> bool:
    return Background(guest, "INSERT INTO d.t VALUES (1)").done() or guest.run("sleep 1; cat /run/background")[0] == 0


def status(guest: Guest) -> list[str]:
    return mariadb(guest, "SHOW MASTER STATUS").split("\t")[:2]


class TestHeld:
    def test_writes_wait_and_the_position_is_recorded(self, script: Script) -> None:
        guest = script.guest
        mariadb(guest, "INSERT INTO d.t VALUES (1)")
        assert script("probe") == (0, "")
        assert script("pre") == (0, "")
        assert script.holder_lives()
        writer = Background(guest, "INSERT INTO d.t VALUES (2)")
        until(lambda: "Waiting for" in writer.state())
        file, at = status(guest)
        gtid = mariadb(guest, "SELECT @@global.gtid_binlog_pos")
        record = script.records()["binlog_position"].splitlines()
        assert record[0] == "server /run/mysqld/mysqld.sock"
        assert "MariaDB" in record[1]
        assert record[2:] == [f"binlog {file} {at}", f"gtid {gtid}"]
        assert gtid.startswith("0-1-")
        assert not writer.done()
        assert script("post") == (0, "")
        until(writer.done)
        assert status(guest) != [file, at]
        assert script("post") == (0, "")

    def test_the_holder_dies(self, script: Script) -> None:
        assert script("pre") == (0, "")
        script.guest.out(f"kill -KILL {script.holder()}")
        assert not script.holder_lives()
        until(lambda: writes_pass(script.guest))
        code, said = script("post")
        assert code == 1
        assert said == "mysql: not locked to the end: its session had ended before"

    def test_the_client_dies(self, script: Script) -> None:
        assert script("pre") == (0, "")
        script.guest.out("kill -KILL $(pidof mariadb)")
        until(lambda: not script.holder_lives())
        until(lambda: writes_pass(script.guest))
        assert script("post")[0] == 1

    def test_the_server_restarts(self, script: Script) -> None:
        """The lock is gone with the server, and the client must not just connect again."""
        assert script("pre") == (0, "")
        script.guest.out("systemctl restart mariadb", timeout=300)
        until(lambda: not script.holder_lives())
        assert script("post")[0] == 1

    def test_its_time_is_over(self, script: Script) -> None:
        script.hold = 12
        assert script("pre") == (0, "")
        until(lambda: not script.holder_lives(), timeout=60)
        assert writes_pass(script.guest)
        assert script("post")[0] == 1

    def test_its_folder_is_removed(self, script: Script) -> None:
        assert script("pre") == (0, "")
        pid = script.holder()
        script.fresh()
        until(lambda: script.guest.run(f"kill -0 {pid}")[0] != 0)
        until(lambda: writes_pass(script.guest))


class TestNotHeld:
    def test_a_long_query_runs(self, script: Script) -> None:
        query = Background(script.guest, "SELECT SLEEP(600)")
        try:
            long = "SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE TIME > 6 AND STATE = 'User sleep'"
            until(lambda: mariadb(script.guest, long) == "1")
            code, said = script("pre")
            assert code == 75
            assert "a query runs (number " in said
            assert "of root for " in said
            assert "SLEEP" not in said
            assert writes_pass(script.guest)
            assert script("post") == (0, "")
        finally:
            query.kill()
            _end_sleepers(script.guest)

    def test_the_lock_cannot_be_had(self, script: Script) -> None:
        """Somebody's own lock is in the way: we wait 5 s, and let go of what we have."""
        owner = Background(script.guest, "LOCK TABLES d.t WRITE; DO 1", stay=True)
        try:
            until(lambda: self.is_locked(script.guest))
            code, said = script("pre")
            assert code == 75
            assert "Lock wait timeout" in said
            assert script("post") == (0, "")
            assert "FLUSH TABLES" not in owner.state()
        finally:
            owner.kill()
        until(lambda: writes_pass(script.guest))

    def is_locked(self, guest: Guest) -> bool:
        return mariadb(guest, "SHOW OPEN TABLES FROM d WHERE In_use > 0") != ""

    def test_pre_is_killed_half_way(self, script: Script) -> None:
        guest = script.guest
        owner = Background(guest, "LOCK TABLES d.t WRITE; DO 1", stay=True)
        try:
            until(lambda: self.is_locked(guest))
            killer = f"until [ -s {script.home}/state/holder ]; do sleep 0.1; done; pkill -KILL -f 'fd/[9] pre'"
            guest.out(f'setsid sh -c "{killer}" </dev/null >/dev/null 2>&1 &')
            assert script("pre")[0] == 137
            code, said = script("post")
            assert code == 1
            assert "not locked to the end" in said
        finally:
            owner.kill()
        until(lambda: writes_pass(guest))

    def test_access(self, script: Script) -> None:
        guest = script.guest
        mariadb(guest, "ALTER USER root@localhost IDENTIFIED VIA mysql_native_password USING PASSWORD('Geheim7')")
        guest.out(f"mkdir -p -m 0700 /etc/stillframe; printf '[client]\\nuser=root\\npassword=Geheim7\\n' >{ACCESS}")
        try:
            guest.out(f"mv {ACCESS} {ACCESS}.off")
            code, said = script("pre")
            assert code == 1
            assert "ERROR 1045" in said
            assert said.endswith(f"(root must be known by the socket, or {ACCESS} name a user and password)")
            guest.out(f"mv {ACCESS}.off {ACCESS}; chmod 0640 {ACCESS}")
            assert script("pre") == (1, f"mysql: {ACCESS} holds a password: it must belong to root and have mode 0600")
            guest.out(f"chmod 0600 {ACCESS}")
            assert script("pre") == (0, "")
            assert guest.run("cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | grep -q Geheim[7]")[0] == 1
            assert script("post") == (0, "")
        finally:
            restore = "ALTER USER root@localhost IDENTIFIED VIA unix_socket"
            guest.out(f'mariadb --defaults-extra-file={ACCESS} -e "{restore}"; rm -rf /etc/stillframe')
        assert script("pre") == (0, "")
        assert script("post") == (0, "")


class TestNothingToDo:
    def test_the_server_is_down(self, script: Script) -> None:
        only(script.guest)
        try:
            assert script("probe") == (3, "")
            assert script("pre") == (3, "")
            assert script("post") == (0, "")
        finally:
            only(script.guest, MARIADB)

    def test_post_without_pre(self, script: Script) -> None:
        assert script("post") == (0, "")


def _end_sleepers(guest: Guest) -> None:
    """The server does not notice that a client has gone while its query sleeps."""
    sleeping = "SELECT ID FROM information_schema.PROCESSLIST WHERE ID <> CONNECTION_ID()"
    for number in mariadb(guest, sleeping).split():
        guest.run(f"mariadb -e 'KILL {number}'")
