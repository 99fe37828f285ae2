"""The entry point: answers, exit codes, and what is in force. In a sandbox, with dash and with busybox."""

from __future__ import annotations

import pytest

from tests.extension.sandbox import ROOT, UUID, VERSION, Sandbox, wait_for
from workers.contract.guests import Lease, Quiesced, Resumed, Status

STAGE = f"{ROOT}/.stage-0a1b2c3d"
TRANSIENT = "/run/stillframe-ext"
OTHER = "99999999-2222-3333-4444-555555555555"
NEWER = "0.2.0+99999999"


def put(sandbox: Sandbox, version: str, root: str = ROOT, serial: int = 7) -> int:
    """As the host does: a stage, `install`, `enable`; the last exit code."""
    stage = f"{root}/.stage-0a1b2c3d"
    sandbox.place(stage)
    sandbox.out(f"chmod 0700 {stage}")
    words = ["--root", root, "--version", version, "--uuid", UUID, "--serial", str(serial), "--contract", "1"]
    said = sandbox.ext("install", *words, path=f"{stage}/ext")
    if said.code:
        return said.code
    return sandbox.ext("enable", "--uuid", UUID, path=f"{root}/{version}/ext").code


class TestAnswers:
    def test_an_unknown_verb(self, installed: Sandbox) -> None:
        said = installed.ext('no"such\\verb')
        assert said.code == 30
        assert "verb" in said.answer["error"]

    @pytest.mark.parametrize(
        "words",
        [
            ["quiesce"],
            ["quiesce", "--job", "a/../b"],
            ["quiesce", "--job", "a b"],
            ["quiesce", "--job", "a", "--freeze-s", "x"],
            ["quiesce", "--job", "a", "--freeze-s", "010"],
            ["quiesce", "--job", "a", "--freeze-s", "0"],
            ["quiesce", "--job", "a", "--limit-s", "99999999999999999999"],
            ["quiesce", "--job", "a", "--goal", "best"],
            ["quiesce", "--job"],
            ["resume"],
            ["resume", "a"],
            ["enable", "extra"],
        ],
    )
    def test_a_wrong_option_changes_nothing(self, installed: Sandbox, words: list[str]) -> None:
        assert installed.ext(*words).code == 30
        assert installed.run("ls /run/stillframe/lease")[0] != 0

    def test_unknown_options_are_passed_over(self, installed: Sandbox) -> None:
        said = installed.quiesce("j", "--colour", "blue sky", "--verbose", "--option", "x=y")
        assert said.code == 0
        assert installed.resume("j").code == 0

    def test_only_root(self, installed: Sandbox) -> None:
        said = installed.ext("status", user=65534)
        assert said.code == 30
        assert "root" in said.answer["error"]

    def test_missing_tools_are_named(self, installed: Sandbox) -> None:
        if installed.shell == "busybox":
            pytest.skip("this busybox's shell has them all built in")
        for tool in ("setsid", "base64", "sha256sum"):
            installed.out(f"mount --bind /dev/null /usr/bin/{tool}")
        said = installed.ext("probe")
        assert said.code == 10
        assert {"setsid", "base64", "sha256sum"} <= set(said.answer["error"].split())
        assert installed.quiesce().code == 10
        assert installed.run("ls /run/stillframe/lease")[0] != 0

    def test_memory_that_is_full(self, installed: Sandbox) -> None:
        installed.run("dd if=/dev/zero of=/run/full bs=64k; dd if=/dev/zero of=/run/more bs=1 count=4096")
        said = installed.quiesce()
        assert said.code == 20
        assert "full" in said.answer["error"]
        assert installed.processes("watchdog") == []
        installed.out("rm /run/full")
        assert installed.quiesce().code == 0
        installed.run("dd if=/dev/zero of=/run/full bs=64k; dd if=/dev/zero of=/run/more bs=1 count=4096")
        assert installed.resume().answer["watchdog"] == "silent"

    def test_probe(self, installed: Sandbox) -> None:
        installed.app("50-here", "[ $1 = probe ] || exit 9")
        installed.app("51-absent", "exit 3")
        before = installed.out("ls -R /run /var /etc/stillframe")
        said = installed.ext("probe")
        assert (said.code, said.answer["watchdog"], said.answer["detail"]) == (0, True, "sysrq")
        assert said.answer["apps"] == ["50-here"]
        assert installed.out("rmdir /run/stillframe 2>/dev/null; ls -R /run /var /etc/stillframe") == before


class TestInForce:
    def test_install_enable_status(self, sandbox: Sandbox) -> None:
        assert put(sandbox, VERSION) == 0
        said = sandbox.ext("status", "--uuid", UUID)
        status = Status.model_validate(said.answer)
        assert (status.contract, status.version, status.serial, status.machine) == (1, VERSION, 7, UUID)
        assert (status.root, status.transient, status.lease, status.previous) == (ROOT, False, None, "")
        assert sandbox.out(f"ls -A {ROOT}").split() == [VERSION, "current"]
        assert sandbox.out("find /opt/stillframe /var/lib/stillframe /var/log/stillframe ! -type l -perm /022") == ""
        assert sandbox.out(f"stat -c %a {ROOT}/{VERSION} /var/lib/stillframe").split() == ["755", "700"]

    def test_an_update_keeps_one_old_version_and_goes_back(self, sandbox: Sandbox) -> None:
        for version in ("0.0.8+aaaaaaaa", VERSION, NEWER):
            assert put(sandbox, version) == 0
        status = Status.model_validate(sandbox.ext("status", "--uuid", UUID).answer)
        assert (status.version, status.previous) == (NEWER, VERSION)
        assert sorted(sandbox.out(f"ls -A {ROOT}").split()) == sorted([VERSION, NEWER, "current", "previous"])
        assert sandbox.ext("enable", "--uuid", UUID, path=f"{ROOT}/{VERSION}/ext").code == 0
        status = Status.model_validate(sandbox.ext("status", "--uuid", UUID).answer)
        assert (status.version, status.previous) == (VERSION, NEWER)

    def test_the_same_version_again(self, sandbox: Sandbox) -> None:
        assert put(sandbox, VERSION) == 0
        sandbox.out(f"rm {ROOT}/{VERSION}/lib/mounts.sh")
        assert put(sandbox, VERSION) == 0
        status = Status.model_validate(sandbox.ext("status", "--uuid", UUID).answer)
        assert (status.version, status.previous) == (VERSION, "")
        assert sandbox.quiesce().code == 0
        assert sorted(sandbox.out(f"ls -A {ROOT}").split()) == sorted([VERSION, "current"])

    def test_current_never_leads_nowhere(self, sandbox: Sandbox) -> None:
        """Renamed, not removed and made again: somebody who looks all the time always finds a version."""
        assert put(sandbox, VERSION) == 0
        watcher = sandbox.background(
            f"while [ ! -e /run/stop ]; do [ -e {ROOT}/current/ext ] || echo lost; done; echo end"
        )
        for version in (NEWER, VERSION) * 10:
            assert put(sandbox, version) == 0
        sandbox.out("touch /run/stop")
        assert watcher.communicate(timeout=60)[0] == b"end\n"

    @pytest.mark.parametrize(
        ("root", "version"),
        [("/tmp", VERSION), (ROOT, "../../etc"), (ROOT, "current"), (ROOT, ".x"), (TRANSIENT, VERSION)],
    )
    def test_install_only_where_it_belongs(self, sandbox: Sandbox, root: str, version: str) -> None:
        sandbox.place(STAGE)
        said = sandbox.ext("install", "--root", root, "--version", version, path=f"{STAGE}/ext")
        assert said.code == 30
        assert sandbox.out(f"ls -A {ROOT}").split() == [".stage-0a1b2c3d"]

    def test_not_even_from_a_stage_there(self, sandbox: Sandbox) -> None:
        sandbox.place("/run/other/.stage-1")
        said = sandbox.ext("install", "--root", "/run/other", "--version", VERSION, path="/run/other/.stage-1/ext")
        assert said.code == 30

    def test_in_memory_where_the_root_cannot_be_written(self, sandbox: Sandbox) -> None:
        sandbox.out("mount -o remount,ro /opt && mount -o remount,bind,ro /var")
        assert put(sandbox, VERSION, TRANSIENT) == 0
        status = Status.model_validate(sandbox.ext("status", "--uuid", UUID, path=f"{TRANSIENT}/current/ext").answer)
        assert (status.root, status.transient, status.machine) == (TRANSIENT, True, UUID)

    def test_scripts_run_from_memory_that_may_not_be_executed(self, sandbox: Sandbox) -> None:
        sandbox.out("mount -o remount,noexec /run")
        assert put(sandbox, VERSION, TRANSIENT) == 0
        sandbox.app("50-x", "echo $1 $0", own=False)
        sandbox.out(f"mkdir {TRANSIENT}/{VERSION}/apps; cp -R {ROOT}/{VERSION}/apps/50-x {TRANSIENT}/{VERSION}/apps/")
        words = ["--job", "j", "--uuid", UUID, "--goal", "application"]
        said = sandbox.ext("quiesce", *words, path=f"{TRANSIENT}/current/ext")
        assert [run.outcome for run in Quiesced.model_validate(said.answer).scripts] == ["ok"]

    def test_uninstall(self, installed: Sandbox) -> None:
        installed.app("50-x", "echo said")
        assert installed.quiesce().code == 0
        assert installed.ext("uninstall").code == 11
        assert installed.ext("enable", path=f"{ROOT}/{VERSION}/ext").code == 11
        installed.resume()
        wait_for(lambda: installed.run("grep said /var/log/stillframe/scripts.log")[0] == 0)
        said = installed.ext("uninstall")
        assert said.code == 0
        assert installed.run(f"ls {ROOT}/current || ls {ROOT} || ls /var/lib/stillframe || ls /run/stillframe")[0] != 0
        assert installed.run("ls /var/log/stillframe/scripts.log /etc/stillframe/apps/50-x/run")[0] == 0
        installed.place(STAGE)
        assert installed.ext("uninstall", path=f"{STAGE}/ext").code == 3

    def test_a_clone_starts_anew(self, installed: Sandbox) -> None:
        installed.app("50-x", "echo said $1 >>/run/seen")
        assert installed.quiesce().code == 0
        assert Status.model_validate(installed.ext("status", "--uuid", UUID).answer).lease is not None
        status = Status.model_validate(installed.ext("status", "--uuid", OTHER).answer)
        assert (status.machine, status.lease) == (OTHER, None)
        assert installed.out("cat /run/seen").split("\n")[:2] == ["said pre", "said post"], "what it held is let go"
        assert installed.resume().answer["watchdog"] == "absent"
        assert installed.out("cat /var/lib/stillframe/machine").strip() == OTHER


class TestLease:
    def test_status_names_the_job(self, installed: Sandbox) -> None:
        installed.quiesce("job-1", freeze_s=50)
        lease = Status.model_validate(installed.ext("status", "--uuid", UUID).answer).lease
        assert isinstance(lease, Lease)
        assert lease.job == "job-1"
        assert 40 < lease.left_s <= 50
        installed.resume("job-1")
        assert Status.model_validate(installed.ext("status", "--uuid", UUID).answer).lease is None

    def test_another_job_waits(self, installed: Sandbox) -> None:
        installed.app("50-x", "echo $STILLFRAME_JOB $1 >>/run/seen")
        installed.quiesce("job-1")
        said = installed.quiesce("job-2")
        assert said.code == 11
        assert "job-1" in said.answer["error"]
        assert installed.resume("job-2").answer["watchdog"] == "absent"
        assert installed.out("cat /run/seen").splitlines() == ["job-1 pre"], "nothing of the first job was touched"
        assert len(installed.processes("watchdog job-1") or installed.processes("watchdog")) == 1
        assert Resumed.model_validate(installed.resume("job-1").answer).watchdog == "silent"
        assert installed.quiesce("job-2").code == 0

    def test_two_at_once(self, installed: Sandbox) -> None:
        command = f"/bin/sh {ROOT}/current/ext quiesce --job $n >/run/said.$n; echo $? >>/run/codes"
        for _ in range(8):
            installed.out(f"for n in 1 2 3 4 5 6; do ( {command} ) & done; wait")
            assert sorted(installed.out("cat /run/codes").split()) == ["0"] + ["11"] * 5
            installed.out(
                f"rm /run/codes; read -r job rest </run/stillframe/lease; /bin/sh {ROOT}/current/ext resume --job $job"
            )

    def test_the_same_job_again(self, installed: Sandbox) -> None:
        installed.app("50-x", "echo $1 >>/run/seen")
        installed.quiesce()
        said = installed.quiesce()
        assert said.code == 0
        assert installed.out("cat /run/seen").split() == ["pre", "post", "pre"]
        assert installed.resume().answer["watchdog"] == "silent"
        assert installed.out("cat /run/seen").split() == ["pre", "post", "pre", "post"]

    def test_a_stale_one_is_taken_over(self, installed: Sandbox) -> None:
        installed.app("50-x", "echo $STILLFRAME_JOB $1 >>/run/seen")
        installed.quiesce("job-1", freeze_s=60)
        [*_, watchdog] = installed.processes("job-1 1")
        installed.out(f"kill -KILL {watchdog}")
        installed.out("f=$(echo /run/stillframe/job.*/armed.2); read -r late pid start <$f; echo 1 $pid $start >$f")
        wait_for(lambda: installed.ext("status", "--uuid", UUID).answer["lease"] is None)
        said = installed.quiesce("job-2")
        assert said.code == 0
        assert "job-1" in said.answer["notes"][0]
        assert installed.out("cat /run/seen").splitlines() == ["job-1 pre", "job-1 post", "job-2 pre"]

    def test_the_clock_does_not_matter(self, installed: Sandbox) -> None:
        installed.quiesce(freeze_s=60)
        installed.out("find /run/stillframe -exec touch -d '2001-01-01 00:00:00' {} +")
        assert installed.quiesce("job-2").code == 11
