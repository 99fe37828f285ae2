"""The watchdog's life, without a freeze: when it thaws, what it leaves, how it ends. In a sandbox, with both shells."""

from __future__ import annotations

import time

from tests.extension.sandbox import ROOT, UUID, VERSION, Sandbox, wait_for

SAY = 'echo "$1" >>/run/seen\n'


def dogs(sandbox: Sandbox) -> list[int]:
    return [pid for pid in sandbox.processes("/watchdog-") if pid]


class TestArmed:
    def test_it_is_a_process_of_its_own(self, installed: Sandbox) -> None:
        installed.quiesce(freeze_s=77)
        [dog] = dogs(installed)
        stat = installed.out(f"cat /proc/{dog}/stat").rpartition(") ")[2].split()
        assert (int(stat[2]), int(stat[3])) == (dog, dog), "process group and session"
        for stream in (0, 1, 2):
            assert installed.out(f"readlink /proc/{dog}/fd/{stream}").strip() == "/dev/null"
        assert installed.out("cat /sys/fs/cgroup/cgroup.procs").split() == [str(dog)]
        assert len(installed.processes("sleep 77")) == 1, "it sleeps before anything is frozen"
        assert installed.out(f"tr '\\0' '\\n' </proc/{dog}/cmdline").split()[1].startswith("/run/stillframe/")
        assert installed.out(f"readlink /proc/{dog}/cwd").strip() == "/", "it keeps no file system from being unmounted"

    def test_control_groups_of_version_1(self, installed: Sandbox) -> None:
        installed.out(
            "cd /sys/fs/cgroup; rm cgroup.procs; mkdir cpu systemd; touch cpu/cgroup.procs systemd/cgroup.procs"
        )
        installed.quiesce()
        [dog] = dogs(installed)
        assert (
            installed.out("cat /sys/fs/cgroup/cpu/cgroup.procs /sys/fs/cgroup/systemd/cgroup.procs").split()
            == [str(dog)] * 2
        )

    def test_it_is_armed_before_the_scripts_and_again_after_them(self, installed: Sandbox) -> None:
        """First for as long as both may take; then for the freeze alone, by the same process."""
        installed.app("50-x", "[ $1 = post ] || tr '\\0' ' ' <$STILLFRAME_STATE/../../../armed.1 >/run/armed; sleep 1")
        installed.quiesce(freeze_s=40, limit_s=60)
        now = float(installed.out("cut -d' ' -f1 /proc/uptime"))
        first = int(installed.out("cat /run/armed").split()[0]) / 100
        assert 95 < first - now < 101
        assert len(dogs(installed)) == 1
        wait_for(lambda: len(installed.processes("sleep 40")) == 1 and not installed.processes("sleep 100"))
        left = installed.ext("status", "--uuid", UUID).answer["lease"]["left_s"]
        assert 35 < left <= 40

    def test_another_takes_the_place_of_one_that_does_not_answer(self, installed: Sandbox) -> None:
        installed.app("50-x", "read -r pid _ </run/stillframe/watchdog; [ $1 = post ] || kill -STOP $pid")
        assert installed.quiesce(freeze_s=41).answer["watchdog"] is True
        wait_for(lambda: len(dogs(installed)) == 1)
        assert len(installed.processes("sleep 41")) == 1
        assert installed.resume().answer["watchdog"] == "silent"

    def test_there_is_always_one(self, installed: Sandbox) -> None:
        installed.app("50-x", "sleep 1")  # a process that is dead, but that nobody has buried, has no command line
        watch = "while [ ! -e /run/stop ]; do n=0; for f in /run/stillframe/job.*/armed.*; do"
        watch += ' read -r d p s <$f || continue; c=; read -r c </proc/$p/cmdline; [ -z "$c" ] || n=1; done;'
        watch += " [ $n = 1 ] || echo none; done 2>/dev/null; echo end"
        quiesce = installed.background(f"/bin/sh {ROOT}/current/ext quiesce --job j --freeze-s 50")
        wait_for(lambda: installed.run("test -s /run/stillframe/job.*/armed.1")[0] == 0)
        watcher = installed.background(watch)
        quiesce.communicate(timeout=60)
        installed.out("touch /run/stop")
        assert watcher.communicate(timeout=60)[0] == b"end\n"

    def test_resume_ends_it(self, installed: Sandbox) -> None:
        installed.quiesce()
        assert installed.resume().answer["watchdog"] == "silent"
        wait_for(lambda: not dogs(installed) and not installed.processes("sleep 60"))
        assert installed.thaws() == 0


class TestFired:
    def test_it_thaws_and_lets_go(self, installed: Sandbox) -> None:
        installed.app("50-x", SAY)
        begun = time.monotonic()
        installed.quiesce(freeze_s=2, limit_s=5)
        wait_for(lambda: installed.thaws() > 0)
        assert 1.9 < time.monotonic() - begun < 20
        wait_for(lambda: "post" in installed.out("cat /run/seen"))
        wait_for(lambda: installed.ext("status", "--uuid", UUID).answer["lease"] is None)
        wait_for(lambda: installed.thaws() >= 2)  # for a freeze that came late
        said = installed.resume()
        assert said.answer["watchdog"] == "fired"
        assert [run["phase"] for run in said.answer["scripts"]] == ["post"]
        assert installed.out("cat /run/seen").split() == ["pre", "post"]
        wait_for(lambda: not dogs(installed))
        thaws = installed.thaws()
        wait_for(lambda: not installed.processes("sleep 5"))
        assert installed.thaws() == thaws
        assert installed.resume().answer["watchdog"] == "fired"

    def test_its_last_thaws_are_not_for_the_next_job(self, installed: Sandbox) -> None:
        installed.quiesce("job-1", freeze_s=1)
        wait_for(lambda: installed.thaws() > 0)
        wait_for(lambda: installed.ext("status", "--uuid", UUID).answer["lease"] is None)
        wait_for(lambda: len(dogs(installed)) == 1)
        assert installed.quiesce("job-2").code == 0
        wait_for(lambda: len(dogs(installed)) == 1)
        thaws = installed.thaws()
        wait_for(lambda: not installed.processes("sleep 5"))
        assert installed.thaws() == thaws
        assert installed.resume("job-1").answer["watchdog"] == "fired"
        assert len(dogs(installed)) == 1, "the second job's watchdog stays"
        assert installed.resume("job-2").answer["watchdog"] == "silent"

    def test_memory_is_full(self, installed: Sandbox) -> None:
        """`fired` is written over `armed` in place: a broken freeze must not look whole."""
        installed.quiesce(freeze_s=3)
        installed.run("dd if=/dev/zero of=/run/full bs=64k; dd if=/dev/zero of=/run/more bs=1 count=4096")
        # Its own `resume` would tidy up and answer: it cannot.
        installed.out(f"chmod 0644 {ROOT}/{VERSION}/ext; mv {ROOT}/{VERSION}/ext {ROOT}/ext")
        wait_for(lambda: installed.thaws() > 0)
        installed.out(f"mv {ROOT}/ext {ROOT}/{VERSION}/ext")
        assert installed.resume().answer["watchdog"] == "fired"

    def test_it_was_told_to_end(self, installed: Sandbox) -> None:
        """The guest shuts down: it thaws now, and does not hold up the shutdown."""
        installed.quiesce()
        [dog] = dogs(installed)
        installed.out(f"kill -TERM {dog}")
        wait_for(lambda: installed.thaws() > 0, 10)
        assert installed.resume().answer["watchdog"] == "fired"
        wait_for(lambda: not dogs(installed), 10)

    def test_somebody_ends_its_sleep(self, installed: Sandbox) -> None:
        installed.quiesce(freeze_s=70)
        installed.out(f"kill {installed.processes('sleep 70')[0]}")
        wait_for(lambda: bool(installed.processes("sleep 70") or installed.processes("sleep 69")))
        assert installed.thaws() == 0
        assert installed.resume().answer["watchdog"] == "silent"

    def test_it_was_killed(self, installed: Sandbox) -> None:
        installed.app("50-x", SAY)
        installed.quiesce()
        wait_for(lambda: len(dogs(installed)) == 1)  # the one before needs a moment to die
        installed.out(f"kill -KILL {dogs(installed)[0]}")
        wait_for(lambda: not dogs(installed))
        assert installed.resume().answer["watchdog"] == "absent"
        assert installed.out("cat /run/seen").split() == ["pre", "post"]

    def test_another_process_with_its_number_is_not_ended(self, installed: Sandbox) -> None:
        installed.quiesce()
        [dog] = dogs(installed)
        installed.out(f"kill -KILL -{dog}")
        installed.background("setsid sh -c 'echo $$ >/run/innocent; exec sleep 7000'")
        wait_for(lambda: bool(installed.processes("sleep 7000")))
        pid = installed.out("cat /run/innocent").strip()
        installed.out(
            f"echo '{pid} 1' >/run/stillframe/watchdog; f=$(echo /run/stillframe/job.*/armed.1); echo '9 {pid} 1' >$f"
        )
        assert installed.resume().answer["watchdog"] == "absent"
        assert len(installed.processes("sleep 7000")) >= 1


class TestOtherWays:
    def test_without_sysrq_each_mount_point_is_thawed(self, installed: Sandbox) -> None:
        installed.out(f"rm -r {installed.seen}/kernel")
        said = installed.quiesce(freeze_s=1)
        assert (said.answer["watchdog"], said.answer["watchdog_detail"]) == (True, "fsfreeze")
        mounts = said.answer["mounts"]
        if mounts:  # none where this host has no file system on a block device
            log = installed.seen / "fsfreeze.log"
            wait_for(lambda: len(log.read_text().splitlines()) >= len(mounts))
            assert {f"--unfreeze {mount}" for mount in mounts} <= set(log.read_text().splitlines())
        wait_for(lambda: installed.ext("status", "--uuid", UUID).answer["lease"] is None)
        assert installed.resume().answer["watchdog"] == "fired"

    def test_without_any_way_to_thaw_it_still_lets_go(self, installed: Sandbox) -> None:
        installed.app("50-x", SAY)
        installed.out(f"rm -r {installed.seen}/kernel {installed.seen}/tools")
        said = installed.quiesce(freeze_s=1)
        assert said.answer["watchdog"] is False
        assert "sysrq" in said.answer["watchdog_detail"]
        wait_for(lambda: "post" in installed.out("cat /run/seen"))
        wait_for(lambda: installed.ext("status", "--uuid", UUID).answer["lease"] is None)

    def test_it_cannot_be_started(self, installed: Sandbox) -> None:
        installed.out(f"rm {ROOT}/{VERSION}/watchdog")
        said = installed.quiesce()
        assert (said.code, said.answer["watchdog"]) == (0, False)
        assert installed.resume().answer["watchdog"] == "absent"
