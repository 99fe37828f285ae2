"""Putting the extension into a Windows guest and asking it: real driver, real channel, the stand-in's agent."""

from __future__ import annotations

import json

import pytest

from tests.extension.windows.conftest import package
from tests.guests.fake_windows import FakeWindowsAgent
from tests.guests.fake_windows_shell import DATA, EXT, ROOT, Ended, Payload
from tests.guests.fake_windows_system import DISABLED, PROVIDER_ID_KEY, PROVIDER_KEY, VSS_KEY
from workers.contract.errors import Busy, ExtensionError, GuestError, PackageRefused
from workers.contract.guests import GuestOs
from workers.contract.points import Consistency
from workers.contract.seams import Extension, QuiesceRequest
from workers.guests import windows
from workers.guests.agent import AgentChannel
from workers.guests.windows import WindowsExtension

UUID = "7c4b3c5e-0001-4000-8000-000000000001"
OTHER = "7c4b3c5e-0002-4000-8000-000000000002"
OLD, NEW = package("0.1.0+11111111", 1000), package("0.1.1+22222222", 2000)


def request(job: str = "job1", uuid: str = UUID, **options: str) -> QuiesceRequest:
    return QuiesceRequest(job, uuid, Consistency.APPLICATION, 90, 120, options=options)


def folders(agent: FakeWindowsAgent) -> list[str]:
    return sorted(agent.windows.disk.folders_in(ROOT))


class TestInstall:
    def test_into_a_guest_that_has_none(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        assert extension.status(UUID) is None
        status = extension.install(OLD, UUID)
        assert (status.version, status.serial, status.contract) == (OLD.version, 1000, 1)
        assert (status.machine, status.root, status.transient) == (UUID, ROOT, False)
        assert folders(agent) == [OLD.version]
        assert agent.windows.disk.text(f"{ROOT}\\{OLD.version}\\ext.ps1") == EXT.read_text()
        assert extension.status(UUID) == status

    def test_what_it_is_made_of_comes_first(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        """A closed folder, then the files, then their hashes, and only then is anything of them run."""
        extension.install(OLD, UUID)
        done = [name for name in agent.shell.asked if name not in ("look", "status")]
        assert done == ["stage", "check", "install", "remove", "enable"]
        assert agent.windows.disk.came_open == []
        for folder in (ROOT, DATA, f"{ROOT}\\{OLD.version}"):
            assert agent.windows.disk.rules(folder) == windows.CLOSED

    def test_files_in_folders(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        others = {f"data/sub/file{number}.txt": bytes([number]) * number for number in range(45)}
        extension.install(package(others=others), UUID)
        assert agent.windows.disk.text(f"{ROOT}\\{OLD.version}\\data\\sub\\file44.txt") == "," * 44
        assert agent.shell.asked.count("check") == 3
        assert agent.windows.disk.came_open == []

    def test_a_file_that_was_changed_on_the_way(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        agent.trouble.changed.append("ext.ps1")
        with pytest.raises(ExtensionError, match=r"ext\.ps1 is not as it was sent"):
            extension.install(OLD, UUID)
        assert folders(agent) == []
        assert "install" not in agent.shell.asked
        assert extension.status(UUID) is None

    def test_an_upgrade_keeps_one_old_version(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        extension.install(OLD, UUID)
        assert extension.install(NEW, UUID).previous == OLD.version
        newest = package("0.1.2+33333333", 3000)
        assert extension.install(newest, UUID).previous == NEW.version
        assert folders(agent) == [NEW.version, newest.version]

    def test_the_same_version_again(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        extension.install(OLD, UUID)
        assert extension.install(OLD, UUID).version == OLD.version
        assert folders(agent) == [OLD.version]

    @pytest.mark.parametrize("verb", ["install", "enable", "status"])
    @pytest.mark.parametrize(
        "instead",
        [
            Ended(20, b'{"verb": "x", "ok": false, "error": "the disk is full"}\r\n'),
            Ended(1, err=b"At line:1 char:1\r\n#< CLIXML\r\n<Objs>"),
            Ended(0, b"what?\r\n"),
            Ended(0, b""),
            Ended(0, b'{"verb": "x", "ok": true}\r\n{"verb": "x", "ok": true}\r\n'),
            Ended(0, b'{"verb": "x", "ok": true, "version": "9+9", "contract": 1}\xff\r\n'),
            Ended(0, b" " * (600 << 10)),
        ],
    )
    def test_a_broken_version_leaves_the_one_before_in_force(
        self, extension: Extension, agent: FakeWindowsAgent, verb: str, instead: Ended
    ) -> None:
        before = extension.install(OLD, UUID)
        broken = EXT.read_bytes() + b"# broken\n"
        agent.shell.payloads.append(Payload(broken, {verb: instead}))
        with pytest.raises(ExtensionError) as caught:
            extension.install(package("0.2.0+99999999", 9000, broken), UUID)
        assert "CLIXML" not in str(caught.value)
        after = extension.status(UUID)
        assert after is not None
        assert after.version == before.version
        assert not [name for name in folders(agent) if name.startswith(".stage")]

    def test_a_broken_first_version_leaves_nothing(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        agent.shell.payloads[0].instead["status"] = Ended(20, b'{"verb": "status", "ok": false, "error": "no"}\r\n')
        with pytest.raises(ExtensionError, match="no"):
            extension.install(OLD, UUID)
        assert folders(agent) == []
        assert extension.status(UUID) is None

    def test_a_version_that_says_it_is_another(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        before = extension.install(OLD, UUID)
        line = json.dumps({"verb": "status", "ok": True, "version": "9.9+9", "contract": 1}).encode()
        broken = EXT.read_bytes() + b"# another\n"
        agent.shell.payloads.append(Payload(broken, {"status": Ended(0, line)}))
        with pytest.raises(ExtensionError, match=r"says that it is 9\.9"):
            extension.install(package("0.2.0+99999999", 9000, broken), UUID)
        after = extension.status(UUID)
        assert after is not None
        assert after.version == before.version

    def test_an_answer_of_any_length(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        extension.install(OLD, UUID)
        line = json.dumps({"verb": "resume", "ok": True, "watchdog": "silent", "more": "x" * (512 << 10)}).encode()
        for too_long in (line, b" " * (17 << 20)):
            agent.shell.payloads[0].instead["resume"] = Ended(0, too_long)
            with pytest.raises(ExtensionError, match="more than 512 KiB"):
                extension.resume("job1")

    def test_nothing_is_touched_by_what_is_refused(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        extension.install(NEW, UUID)
        for refused, words in (
            (OLD, "older"),
            (package(NEW.version, 1999), "older"),
            (package(os=GuestOs.LINUX), "for linux"),
        ):
            agent.shell.asked.clear()
            with pytest.raises(PackageRefused, match=words):
                extension.install(refused, UUID)
            assert set(agent.shell.asked) <= {"look", "status"}

    def test_not_while_a_job_holds_the_guest(self, extension: Extension) -> None:
        extension.install(OLD, UUID)
        extension.quiesce(request())
        with pytest.raises(Busy, match="job1"):
            extension.install(NEW, UUID)
        extension.resume("job1")
        assert extension.install(NEW, UUID).version == NEW.version

    def test_an_agent_that_forbids_files(self, agent: FakeWindowsAgent, extension: Extension) -> None:
        agent.blocked.add("guest-file-open")
        with pytest.raises(ExtensionError, match="disabled"):
            extension.install(OLD, UUID)
        assert folders(agent) == []


class TestUninstall:
    def test_all_is_gone(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        assert not extension.uninstall()
        extension.install(OLD, UUID)
        assert extension.uninstall()
        assert not agent.windows.disk.is_folder(ROOT)
        assert not agent.windows.disk.is_folder(DATA)
        assert not extension.uninstall()
        assert extension.install(OLD, UUID).version == OLD.version

    def test_not_while_a_job_holds_the_guest(self, extension: Extension) -> None:
        extension.install(OLD, UUID)
        extension.quiesce(request())
        with pytest.raises(Busy, match="job1"):
            extension.uninstall()
        assert extension.status(UUID) is not None


class TestQuiesce:
    @pytest.fixture(autouse=True)
    def installed(self, extension: WindowsExtension) -> None:
        extension.install(OLD, UUID)

    def test_a_copy_backup_unless_the_policy_says_otherwise(
        self, extension: Extension, agent: FakeWindowsAgent, channel: AgentChannel
    ) -> None:
        quiesced = extension.quiesce(request())
        assert quiesced.watchdog
        assert (quiesced.mounts, quiesced.partial, quiesced.scripts) == ([], False, [])
        assert "VssOption" in quiesced.notes[0]
        assert extension.quiesce(request()).notes == []
        channel.freeze()
        channel.thaw()
        assert extension.resume("job1").watchdog == "silent"
        extension.quiesce(request(vss="primary", postgresql="it's not for us"))
        channel.freeze()
        channel.thaw()
        extension.resume("job1")
        assert agent.windows.vss.kinds == [5, 1]

    def test_the_lease(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        extension.quiesce(request())
        status = extension.status(UUID)
        assert status is not None
        assert status.lease is not None
        assert (status.lease.job, 0 < status.lease.left_s <= 210) == ("job1", True)
        with pytest.raises(Busy, match="job1"):
            extension.quiesce(request("job2"))
        assert extension.resume("job2").watchdog == "absent"
        agent.restart()
        agent.windows.started += 1000  # an uptime below that of the lease
        assert extension.quiesce(request("job2")).watchdog

    def test_a_clone_is_not_held_by_the_job_of_its_model(self, extension: Extension) -> None:
        extension.quiesce(request())
        status = extension.status(OTHER)
        assert status is not None
        assert (status.machine, status.lease) == (OTHER, None)

    @pytest.mark.parametrize(
        ("key", "start", "words"),
        [
            (VSS_KEY, DISABLED, "Volume Shadow Copy"),
            (PROVIDER_KEY, DISABLED, "Provider is disabled"),
            (PROVIDER_KEY, None, "not registered"),
            (PROVIDER_ID_KEY, None, "not registered"),
        ],
    )
    def test_no_freeze_where_vss_cannot(
        self, extension: Extension, agent: FakeWindowsAgent, key: str, start: int | None, words: str
    ) -> None:
        if start is None:
            del agent.windows.registry[key]
        else:
            agent.windows.registry[key]["Start"] = start
        quiesced = extension.quiesce(request())
        assert not quiesced.watchdog
        assert words in quiesced.watchdog_detail

    def test_resume_is_idempotent_and_hands_out_the_writers(
        self, extension: Extension, agent: FakeWindowsAgent
    ) -> None:
        agent.windows.vss.failing["SqlServerWriter"] = (8, "Non-retryable error")
        extension.quiesce(request())
        assert extension.resume("job1").watchdog == "silent"
        again = extension.resume("job1")
        assert again.watchdog == "absent"
        assert again.writers

    def test_not_there_any_more(self, extension: Extension) -> None:
        extension.uninstall()
        with pytest.raises(ExtensionError, match="no longer"):
            extension.quiesce(request())
        assert extension.resume("job1").watchdog == "absent"

    @pytest.mark.parametrize("word", ["", "-Command", "a b", "a;b", "a'b", 'a"b', "a`b", "$a", "ö", "a\nb", "a" * 300])
    def test_words_that_powershell_could_misread_are_not_sent(
        self, extension: Extension, agent: FakeWindowsAgent, word: str
    ) -> None:
        agent.shell.asked.clear()
        with pytest.raises(ExtensionError, match="cannot be passed"):
            extension.resume(word)
        with pytest.raises(ExtensionError, match="cannot be passed"):
            extension.quiesce(request(vss=word))
        assert set(agent.shell.asked) == {"look"}


class TestAnswersOfAHostileGuest:
    @pytest.mark.parametrize(
        "root", ["", "relative", "/opt", "\\\\server\\share", 'C:\\a"b', "C:\\x\n", "C:\\" + "a" * 300]
    )
    def test_a_strange_root(self, extension: Extension, agent: FakeWindowsAgent, root: str) -> None:
        line = json.dumps({"verb": "look", "ok": True, "root": root, "current": "1"}).encode()
        agent.shell.instead["look"] = Ended(0, line)
        with pytest.raises(ExtensionError, match="look with nonsense"):
            extension.status(UUID)
        assert agent.seen.count("guest-exec") == 1, "nothing of it was used"

    @pytest.mark.parametrize("current", ["..\\..\\Temp", "a b", "-x", ".stage-1", "a" * 100, "a\n"])
    def test_a_strange_version(self, extension: Extension, agent: FakeWindowsAgent, current: str) -> None:
        line = json.dumps({"verb": "look", "ok": True, "root": ROOT, "current": current}).encode()
        agent.shell.instead["look"] = Ended(0, line)
        with pytest.raises(ExtensionError, match="look with nonsense"):
            extension.status(UUID)
        assert agent.seen.count("guest-exec") == 1, "nothing of it was used"

    def test_no_powershell(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        agent.shell.instead["look"] = Ended(1, err=b"blocked by a policy\r\n")
        with pytest.raises(ExtensionError, match="blocked by a policy"):
            extension.status(UUID)
        agent.blocked.add("guest-exec")
        with pytest.raises(GuestError, match="disabled"):
            extension.status(UUID)

    def test_a_mark_at_the_beginning_is_no_nonsense(self, extension: Extension, agent: FakeWindowsAgent) -> None:
        line = json.dumps({"verb": "look", "ok": True, "root": ROOT, "current": ""}).encode()
        agent.shell.instead["look"] = Ended(0, b"\xef\xbb\xbf" + line + b"\r\n")
        assert extension.status(UUID) is None


def test_the_times_that_the_host_keeps() -> None:
    assert windows.FREEZE_SECONDS == 75
    assert windows.HOLD_SECONDS == 8


def test_every_command_fits_into_a_command_line() -> None:
    """32,767 characters for Windows."""
    names = {f"{'d' * 190}/{number:09d}": "a" * 64 for number in range(windows._FILES_AT_ONCE)}
    argv = windows.encoded(windows.script("check", {"stage": ".stage-00000000", "files": names}))
    assert sum(len(word) + 3 for word in argv) < 32_000
