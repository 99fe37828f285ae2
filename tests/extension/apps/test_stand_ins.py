"""`50-mongodb` and `50-oracle`, against stand-ins: what outlives its session is let go of once, whoever dies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.extension.apps.runs import Script, until
from tests.extension.apps.stand_ins import MONGO, ORACLE, mongodb_down, mongodb_up, oracle_down, oracle_up
from tests.guests.database_guest import only
from tests.guests.machines import Guest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _no_others(database_guest: Guest) -> None:
    only(database_guest)


class TestMongodb:
    @pytest.fixture
    def script(self, database_guest: Guest, shell: str) -> Iterator[Script]:
        script = Script(database_guest, "50-mongodb", shell)
        script.fresh()
        mongodb_up(database_guest)
        try:
            yield script
            assert script.sweep() == ""
        finally:
            mongodb_down(database_guest)

    def log(self, script: Script) -> list[str]:
        return script.guest.out(f"cat {MONGO}/log").split()

    def test_locked_and_unlocked_once(self, script: Script) -> None:
        assert script("probe") == (0, "")
        assert script("pre") == (0, "")
        assert script.holder_lives()
        assert self.log(script) == ["lock"]
        uri = "mongodb://%2Ftmp%2Fmongodb-27017.sock/admin?directConnection=true&serverSelectionTimeoutMS=5000"
        assert f'connect("{uri}")' in script.guest.out(f"cat {MONGO}/last.js")
        assert "mongodb:" not in script.guest.out(f"cat {MONGO}/argv")
        assert script("post") == (0, "")
        assert script("post") == (0, "")
        assert self.log(script) == ["lock", "unlock"]

    def test_somebody_elses_lock_is_left_alone(self, script: Script) -> None:
        script.guest.out(f"echo 1 >{MONGO}/count")
        assert script("pre") == (1, "mongodb: Error: somebody else holds a lock (fsyncLock) already")
        script("post")
        assert self.log(script) == []
        assert script.guest.out(f"cat {MONGO}/count") == "1\n"

    def test_its_time_is_over(self, script: Script) -> None:
        script.hold = 10
        assert script("pre") == (0, "")
        until(lambda: not script.holder_lives(), timeout=60)
        until(lambda: self.log(script) == ["lock", "unlock"])
        assert script("post") == (1, "mongodb: not locked to the end: its session had ended before")
        assert self.log(script) == ["lock", "unlock"]

    def test_the_holder_dies(self, script: Script) -> None:
        assert script("pre") == (0, "")
        script.guest.out(f"kill -KILL {script.holder()}")
        until(lambda: self.log(script) == ["lock", "unlock"])
        assert script("post")[0] == 1
        assert self.log(script) == ["lock", "unlock"]

    def test_all_of_it_is_killed(self, script: Script) -> None:
        assert script("pre") == (0, "")
        script.guest.out(f"kill -KILL -{script.holder()}")
        assert self.log(script) == ["lock"]
        assert script("post")[0] == 1
        assert self.log(script) == ["lock", "unlock"]

    def test_the_lock_comes_without_an_answer(self, script: Script) -> None:
        script.guest.out(f": >{MONGO}/hang")
        script.deadline = 20
        code, said = script("pre")
        assert code == 1
        assert said.startswith("mongodb: not held within ")
        assert self.log(script) == ["lock", "unlock"]
        assert script("post") == (0, "")
        assert self.log(script) == ["lock", "unlock"]

    def test_it_cannot_log_in(self, script: Script) -> None:
        script.guest.out(f": >{MONGO}/refuse")
        assert script("pre") == (1, "mongodb: MongoServerError: not authorized on admin to execute command")
        assert script("post") == (0, "")

    def test_access(self, script: Script) -> None:
        access = "/etc/stillframe/mongodb.uri"
        uri = "mongodb://backup:Geheim7@localhost/admin"
        script.guest.out(f"mkdir -p /etc/stillframe; umask 077; echo '{uri}' >{access}; chmod 0644 {access}")
        try:
            code, said = script("pre")
            assert code == 1
            assert "mode 0600" in said
            script.guest.out(f"chmod 0600 {access}")
            assert script("pre") == (0, "")
            assert f'connect("{uri}")' in script.guest.out(f"cat {MONGO}/last.js")
            assert "Geheim7" not in script.guest.out(f"cat {MONGO}/argv")
            assert script.guest.run("cat /proc/[0-9]*/cmdline | grep -q Geheim[7]")[0] == 1
            assert script("post") == (0, "")
        finally:
            script.guest.out("rm -r /etc/stillframe")


class TestOracle:
    @pytest.fixture
    def script(self, database_guest: Guest, shell: str) -> Iterator[Script]:
        script = Script(database_guest, "50-oracle", shell)
        script.fresh()
        oracle_up(database_guest)
        try:
            yield script
            assert script.sweep() == ""
        finally:
            oracle_down(database_guest)

    def logs(self, script: Script) -> tuple[str, str]:
        one, two = (" ".join(script.guest.out(f"cat {ORACLE}/{sid}/log").split()) for sid in ("ONE", "TWO"))
        return one, two

    def test_all_databases_are_in_backup_mode(self, script: Script) -> None:
        assert script("probe") == (0, "")
        assert script("pre") == (0, "")
        assert script.holder_lives()
        assert self.logs(script) == ("archive begin",) * 2
        assert script.records() == {"scn.ONE": "scn 4711\n", "scn.TWO": "scn 4711\n"}
        assert script.guest.out(f"sort -u {ORACLE}/*/argv") == "oracle -S -L / as sysdba\n"
        assert script("post") == (0, "")
        assert self.logs(script) == ("archive begin end archive",) * 2
        assert script("post") == (0, "")

    def test_one_cannot(self, script: Script) -> None:
        """The other one is let go of at once."""
        script.guest.out(f": >{ORACLE}/TWO/noarchivelog")
        code, said = script("pre")
        assert code == 1
        assert "ORA-01123" in said
        assert script.guest.out(f"cat {ORACLE}/*/mode") == "off\noff\n"
        assert script("post") == (0, "")
        assert script.records() == {}

    def test_its_time_is_over(self, script: Script) -> None:
        script.hold = 10
        assert script("pre") == (0, "")
        until(lambda: not script.holder_lives(), timeout=60)
        until(lambda: self.logs(script) == ("archive begin end",) * 2)
        assert script("post")[0] == 1
        assert self.logs(script) == ("archive begin end",) * 2

    def test_all_of_it_is_killed(self, script: Script) -> None:
        assert script("pre") == (0, "")
        script.guest.out(f"kill -KILL -{script.holder()}; pkill -KILL sqlplus; :")
        assert script("post")[0] == 1
        assert script.guest.out(f"cat {ORACLE}/*/mode") == "off\noff\n"


@pytest.mark.parametrize("verb", ["probe", "pre"])
def test_no_application_costs_next_to_nothing(database_guest: Guest, verb: str, shell: str) -> None:
    """Most guests have none, and under emulation each program started costs milliseconds: four shells, three greps."""
    programs = ["50-postgresql", "50-mysql", "50-mongodb", "50-oracle"]
    scripts = [Script(database_guest, name, shell) for name in programs]
    for script in scripts:
        script.fresh()
        assert script(verb) == (3, "")
    path = "env -i PATH=/opt/busybox-only /opt/busybox-only/sh" if shell == "busybox" else "sh"
    runs = "; ".join(f"{path} /opt/apps-under-test/{name}/run {verb}" for name in programs)
    counted = "grep ^processes /proc/stat"
    text = database_guest.out(f"sync; {counted}; {runs}; {counted}; {counted}")
    first, second, third = (int(line.split()[1]) for line in text.splitlines())
    assert second - first - (third - second) <= 7
