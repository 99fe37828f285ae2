"""Application scripts: order, outcomes, limits, output, who may have written them. In a sandbox, with both shells."""

from __future__ import annotations

import base64
import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.extension.sandbox import ROOT, UUID, VERSION, Said, Sandbox, wait_for
from workers.contract.guests import Quiesced, Resumed, ScriptRun

SAY = 'echo "$1 ${STILLFRAME_APP_DIR##*/}" >>/run/seen\n'


TOLD = ["JOB", "UUID", "PHASE", "GOAL", "APP_DIR", "OPTION", "DEADLINE", "HOLD", "MOUNTS", "STATE", "RECORDS"]
TOLD.append("SOCKETS")


def runs(said: Said) -> list[ScriptRun]:
    kind = Quiesced if said.answer["verb"] == "quiesce" else Resumed
    return list(kind.model_validate(said.answer).scripts)


def outcomes(said: Said) -> dict[str, str]:
    return {f"{run.name} {run.phase}": run.outcome.value for run in runs(said)}


def seen(sandbox: Sandbox) -> list[str]:
    return sandbox.out("cat /run/seen 2>/dev/null || :").splitlines()


def log_of(said: Said) -> str:
    return base64.b64decode(Resumed.model_validate(said.answer).log).decode(errors="replace")


class TestOrder:
    def test_numbers_rise_and_fall(self, installed: Sandbox) -> None:
        for name in ("70-c", "10-a", "50-b"):
            installed.app(name, SAY, own=name != "50-b")
        assert outcomes(installed.quiesce()) == {f"{name} pre": "ok" for name in ("10-a", "50-b", "70-c")}
        assert outcomes(installed.resume()) == {f"{name} post": "ok" for name in ("10-a", "50-b", "70-c")}
        assert seen(installed) == [
            *("pre 10-a", "pre 50-b", "pre 70-c"),
            *("post 70-c", "post 50-b", "post 10-a"),
        ]

    def test_the_same_number_at_once(self, installed: Sandbox) -> None:
        """Each waits for the other: one after the other they would never end."""
        for own, other in ("ab", "ba"):
            wait = f"touch /run/here-{own}; until [ -e /run/here-{other} ]; do sleep 0.05; done"
            installed.app(f"50-{own}", f"[ $1 = post ] && exit; {wait}")
        said = installed.quiesce(limit_s=20)
        assert outcomes(said) == {"50-a pre": "ok", "50-b pre": "ok"}

    def test_the_administrators_own_takes_the_place_of_ours(self, installed: Sandbox) -> None:
        installed.app("50-x", "echo ours >>/run/seen", own=False)
        installed.app("50-x", "echo own >>/run/seen", own=True)
        installed.quiesce()
        assert seen(installed) == ["own"]

    def test_other_names_are_noted_and_passed_over(self, installed: Sandbox) -> None:
        for name in ("x", "5-x", "50x", "50-", "50-X", "50-a.b", "50-a b"):
            installed.app(f"'{name}'", SAY)
        installed.out("touch /etc/stillframe/apps/README")
        said = installed.quiesce()
        assert runs(said) == []
        assert len(said.answer["notes"]) == 7
        assert seen(installed) == []

    def test_only_for_the_goal_application(self, installed: Sandbox) -> None:
        installed.app("50-x", SAY)
        assert runs(installed.quiesce("j", "--goal", "filesystem")) == []
        assert runs(installed.resume("j")) == []


class TestOutcomes:
    def test_each(self, installed: Sandbox) -> None:
        installed.app("10-ok", SAY)
        installed.app("20-not", SAY + "exit 3")
        installed.app("30-bad", SAY + "[ $1 = pre ] || exit 0\necho first; echo 'no such \"role\" é' >&2; exit 7")
        installed.app("40-late", SAY)
        said = installed.quiesce()
        assert said.code == 0
        assert outcomes(said) == {
            "10-ok pre": "ok",
            "20-not pre": "not_applicable",
            "30-bad pre": "failed",
            "40-late pre": "skipped",
            "30-bad post": "ok",
            "10-ok post": "ok",
        }
        assert "post 20-not" not in seen(installed), "what is not there has nothing to let go of"
        bad = next(run for run in runs(said) if run.name == "30-bad")
        assert (bad.code, bad.tries) == (7, 1)
        assert bad.detail.startswith('no such "role"')

    def test_after_a_failed_pre_post_is_run_at_once_and_once(self, installed: Sandbox) -> None:
        installed.app("10-a", SAY)
        installed.app("30-b", SAY + "[ $1 = pre ] && exit 1\necho $STILLFRAME_RESULT >>/run/seen")
        installed.app("40-c", SAY)
        installed.quiesce()
        assert seen(installed) == ["pre 10-a", "pre 30-b", "post 30-b", "failed", "post 10-a"]
        assert runs(installed.resume()) == []
        assert len(seen(installed)) == 5

    def test_post_is_run_once_however_often_resume_is_called(self, installed: Sandbox) -> None:
        installed.app("50-a", SAY)
        installed.quiesce()
        command = f"/bin/sh {ROOT}/current/ext resume --job job-1"
        installed.out(f"for n in 1 2 3 4; do {command} >/run/said.$n & done; wait")
        said = {installed.out(f"cat /run/said.{n}") for n in (1, 2, 3, 4)}
        assert len(said) == 1, "all are told the same"
        assert seen(installed) == ["pre 50-a", "post 50-a"]
        assert outcomes(installed.resume()) == {"50-a post": "ok"}
        assert seen(installed) == ["pre 50-a", "post 50-a"]

    def test_again(self, installed: Sandbox) -> None:
        """Twice at most."""
        installed.app("10-third", "echo x >>$STILLFRAME_STATE/n; [ $(wc -l <$STILLFRAME_STATE/n) -gt 2 ] || exit 75")
        installed.app("20-never", "exit 75")
        first, second, *_ = runs(installed.quiesce())
        assert (first.outcome, first.tries) == ("ok", 3)
        assert (second.outcome, second.tries, second.code) == ("failed", 3, 75)

    def test_no_time_is_left_to_try_again(self, installed: Sandbox) -> None:
        installed.app("10-x", "sleep 1.5; exit 75")
        begun = time.monotonic()
        [run, *_] = runs(installed.quiesce(limit_s=2))
        assert run.outcome == "failed"
        assert run.tries < 3
        assert time.monotonic() - begun < 15

    def test_too_late_for_the_next_number(self, installed: Sandbox) -> None:
        installed.app("10-a", "[ $1 = post ] || sleep 1.2")
        installed.app("20-b", SAY)
        said = installed.quiesce(limit_s=2)
        assert outcomes(said)["20-b pre"] == "skipped"
        assert seen(installed) == []


class TestLimits:
    def test_a_time_out_ends_the_whole_group(self, installed: Sandbox) -> None:
        """TERM first; KILL 5 s later for the one that does not listen."""
        installed.app("10-good", "[ $1 = pre ] || exit 0\ntrap 'echo told >>/run/seen; exit 1' TERM\nsleep 1000 & wait")
        stubborn = "[ $1 = pre ] || exit 0\ntrap '' TERM\n(trap '' TERM; sleep 2000) &\nsleep 1001\nsleep 1002"
        installed.app("10-stubborn", stubborn)
        begun = time.monotonic()
        said = installed.quiesce(limit_s=2)
        assert 6.5 < time.monotonic() - begun < 25
        assert outcomes(said)["10-good pre"] == outcomes(said)["10-stubborn pre"] == "timeout"
        assert outcomes(said)["10-stubborn post"] == "ok"
        assert seen(installed) == ["told"]
        wait_for(lambda: not installed.processes("sleep 1001") and not installed.processes("sleep 2000"))
        assert installed.processes("sleep 1000") == []

    def test_what_it_is_told(self, installed: Sandbox) -> None:
        installed.app("50-my_sql", "env | sort >/run/env.$1; cat $STILLFRAME_MOUNTS >/run/mounts; umask >/run/umask")
        installed.quiesce("j7", "--option", "my_sql=backup", "--option", "other=x", freeze_s=50, limit_s=20)
        installed.resume("j7")
        told = dict(line.split("=", 1) for line in installed.out("cat /run/env.pre").splitlines())
        after = dict(line.split("=", 1) for line in installed.out("cat /run/env.post").splitlines())
        # What a shell makes for itself is not inherited.
        assert set(told) - {"PWD", "SHLVL", "_", "OLDPWD"} == {"PATH"} | {f"STILLFRAME_{word}" for word in TOLD}
        assert set(after) - set(told) == {"STILLFRAME_RESULT"}
        assert (told["STILLFRAME_JOB"], told["STILLFRAME_UUID"], told["STILLFRAME_PHASE"]) == ("j7", UUID, "pre")
        assert (told["STILLFRAME_GOAL"], told["STILLFRAME_OPTION"]) == ("application", "backup")
        assert told["STILLFRAME_APP_DIR"] == "/etc/stillframe/apps/50-my_sql"
        assert 17 <= int(told["STILLFRAME_DEADLINE"]) <= 20
        assert 77 <= int(told["STILLFRAME_HOLD"]) <= 80, "longer than the watchdog waits"
        assert after["STILLFRAME_PHASE"] == "post"
        assert after["STILLFRAME_RESULT"] == "ok"
        assert after["STILLFRAME_STATE"] == told["STILLFRAME_STATE"]
        assert installed.out("cat /run/umask").strip() in ("0077", "077")
        assert installed.out("cat /run/mounts").splitlines() != [""]

    def test_a_daemon_that_keeps_the_output_open(self, installed: Sandbox) -> None:
        installed.app("50-x", "[ $1 = post ] || { sleep 3000 & }\necho said")
        said = installed.quiesce()
        assert outcomes(said) == {"50-x pre": "ok"}
        assert said.seconds < 10
        resumed = installed.resume()
        assert resumed.seconds < 10
        assert "said" in log_of(resumed)
        assert len(installed.processes("sleep 3000")) == 1, "it is the application's own affair"

    def test_much_output(self, installed: Sandbox) -> None:
        installed.app("50-x", "echo begin; dd if=/dev/zero bs=1048576 count=100 2>/dev/null; echo end")
        said = installed.quiesce(timeout=120)
        assert outcomes(said) == {"50-x pre": "ok"}
        size = installed.out("cat /run/stillframe/job.*/out/50-x.pre | wc -c")
        assert int(size) == 64 << 10
        text = log_of(installed.resume(timeout=120))
        assert "begin" in text
        assert len(text) < (129 << 10)
        wait_for(lambda: installed.run("test -s /var/log/stillframe/scripts.log")[0] == 0)
        wait_for(lambda: installed.run("ls -d /run/stillframe/job.*")[0] != 0)
        assert 120 << 10 < int(installed.out("wc -c </var/log/stillframe/scripts.log")) < 140 << 10

    def test_the_log_is_rotated(self, installed: Sandbox) -> None:
        installed.app("50-x", "echo fresh words")
        installed.out(
            "umask 077; mkdir -p /var/log/stillframe; cd /var/log/stillframe;"
            " dd if=/dev/zero of=scripts.log bs=1024 count=1025"
        )
        installed.quiesce()
        installed.resume()
        wait_for(lambda: installed.run("grep -q fresh /var/log/stillframe/scripts.log")[0] == 0)
        assert int(installed.out("wc -c </var/log/stillframe/scripts.log.1")) == 1025 << 10
        assert installed.out("stat -c %a /var/log/stillframe").strip() == "700"
        assert "fresh words" in installed.out("cat /var/lib/stillframe/last.log")

    def test_a_quiesce_that_is_killed(self, installed: Sandbox) -> None:
        """Its script is ended before `post` is run."""
        installed.app("50-x", SAY + "[ $1 = post ] || exec sleep 4000")
        installed.background(f"/bin/sh {ROOT}/current/ext quiesce --job job-1 --freeze-s 50 --limit-s 30")
        wait_for(lambda: bool(installed.processes("sleep 4000")))
        assert installed.quiesce("job-2").code == 11
        said = installed.resume()
        assert outcomes(said) == {"50-x post": "ok"}
        assert seen(installed) == ["pre 50-x", "post 50-x"]
        assert installed.processes("sleep 4000") == []
        wait_for(lambda: not installed.processes("ext quiesce"))
        assert installed.quiesce("job-2", limit_s=1).code == 0


class TestWhoMayHaveWrittenIt:
    @pytest.mark.parametrize(
        ("harm", "why"),
        [
            ("chmod 0775 $app/run", "others than root"),
            ("chmod 0757 $app/run", "others than root"),
            ("chown 65534 $app/run", "not belong to root"),
            ("chmod 4755 $app/run", "set-uid"),
            ("chmod 2755 $app/run", "set-uid"),
            ("chmod 0644 $app/run", "not executable"),
            ("chmod 0777 $app", "folder"),
            ("chmod 1777 $app/..", "folder"),
            ("chown 65534 /etc/stillframe", "folder"),
            ("chmod 0770 /etc", "folder"),
            ("mv $app/run /etc/stillframe/run; ln -s /etc/stillframe/run $app/run", "plain file"),
            ("rm $app/run; mkfifo $app/run", "plain file"),
            ("rm $app/run; mkdir $app/run", "plain file"),
            ("rm $app/run", "plain file"),
            ("mkdir -m 0777 /run/open; mv $app /run/open/; ln -s /run/open/50-x $app", "folder"),
        ],
    )
    def test_it_is_refused(self, installed: Sandbox, harm: str, why: str) -> None:
        installed.app("50-x", SAY)
        installed.out(f"app=/etc/stillframe/apps/50-x; {harm}")
        [run] = runs(installed.quiesce())
        assert run.outcome == "refused", run
        assert why in run.detail
        assert seen(installed) == []
        assert runs(installed.resume()) == [], "nothing was done that could be undone"

    def test_what_was_judged_is_what_is_run(self, installed: Sandbox) -> None:
        """A file of the same name that takes its place in between is not."""
        installed.app("50-x", "echo $0 >>/run/name\n" + SAY)
        installed.quiesce()
        assert installed.out("cat /run/name").startswith("/proc/self/fd/")

    def test_a_shipped_one_is_judged_too(self, installed: Sandbox) -> None:
        installed.app("50-x", SAY, own=False)
        installed.out(f"chmod 0777 {ROOT}/{VERSION}")
        assert outcomes(installed.quiesce()) == {"50-x pre": "refused"}


class TestNeeds:
    def test_a_script_without_what_it_needs_is_not_started(self, installed: Sandbox) -> None:
        installed.app("10-file", SAY, own=False)
        installed.app("20-there", SAY, own=False)
        installed.app("30-socket", SAY, own=False)
        installed.app("40-unknown", SAY, own=False)
        apps = f"{ROOT}/{VERSION}/apps"
        installed.out(
            f"echo 'file /nowhere' >{apps}/10-file/needs; printf 'file /nowhere\\nfile /etc\\n' >{apps}/20-there/needs;"
            f" echo 'socket */no/such.[0-9]*' >{apps}/30-socket/needs; echo 'moon full' >{apps}/40-unknown/needs"
        )
        assert outcomes(installed.quiesce()) == {
            "10-file pre": "not_applicable",
            "20-there pre": "ok",
            "30-socket pre": "not_applicable",
            "40-unknown pre": "ok",
        }
        assert outcomes(installed.resume()) == {"40-unknown post": "ok", "20-there post": "ok"}
        assert seen(installed) == ["pre 20-there", "pre 40-unknown", "post 40-unknown", "post 20-there"]
        assert installed.ext("probe").answer["apps"] == ["20-there", "40-unknown"]

    def test_a_socket_that_somebody_listens_at(self, installed: Sandbox, tmp_path: Path) -> None:
        """By the kernel's list, which the scripts are given too."""
        path = tmp_path / ".s.TEST.7"
        installed.app("50-x", "grep -c TEST $STILLFRAME_SOCKETS >/run/listed", own=False)
        installed.out(f"echo 'socket */.s.TEST.[0-9]*' >{ROOT}/{VERSION}/apps/50-x/needs")
        assert outcomes(installed.quiesce()) == {"50-x pre": "not_applicable"}
        installed.resume()
        with closing(socket.socket(socket.AF_UNIX)) as server:
            server.bind(str(path))
            server.listen()
            assert outcomes(installed.quiesce("job-2")) == {"50-x pre": "ok"}
        assert installed.out("cat /run/listed").strip() == "1"

    def test_nothing_at_all_is_needed(self, installed: Sandbox) -> None:
        """Then no phase is run, and nothing has been left for `resume`."""
        installed.app("50-x", SAY, own=False)
        installed.out(f"echo 'file /nowhere' >{ROOT}/{VERSION}/apps/50-x/needs")
        assert outcomes(installed.quiesce()) == {"50-x pre": "not_applicable"}
        assert runs(installed.resume()) == []

    def test_no_post_where_nothing_is_held(self, installed: Sandbox) -> None:
        installed.app("10-free", SAY + ": >$STILLFRAME_STATE/no-post")
        installed.app("20-held", SAY)
        installed.quiesce()
        assert outcomes(installed.resume()) == {"20-held post": "ok"}
        assert seen(installed) == ["pre 10-free", "pre 20-held", "post 20-held"]

    def test_a_holder_that_asks_for_a_signal_gets_it_before_post(self, installed: Sandbox) -> None:
        holder = "trap 'echo signal >>/run/seen' USR1; while [ ! -e /run/end ]; do sleep 0.1; done"
        installed.app(
            "50-x",
            f"""[ $1 = post ] && {{ touch /run/end; sleep 0.5; echo post >>/run/seen; exit; }}
: >$STILLFRAME_STATE/signal
({holder}) >/dev/null 2>&1 </dev/null &
echo $! >$STILLFRAME_STATE/holder
sleep 0.3""",
        )
        installed.quiesce()
        assert installed.resume().answer["holders_lost"] == []
        assert seen(installed) == ["signal", "post"]


class TestHoldersAndRecords:
    HOLDER = (
        "if [ $1 = pre ]; then setsid sleep 5000 >/dev/null 2>&1 </dev/null & echo $! >$STILLFRAME_STATE/holder\n"
        "else kill $(cat $STILLFRAME_STATE/holder); fi"
    )

    def test_a_holder_that_lives(self, installed: Sandbox) -> None:
        installed.app("50-x", self.HOLDER)
        assert installed.quiesce().seconds < 10
        assert len(installed.processes("sleep 5000")) == 1
        assert installed.resume().answer["holders_lost"] == []
        wait_for(lambda: not installed.processes("sleep 5000"))

    @pytest.mark.parametrize("how", ["gone", "another", "never", "nonsense"])
    def test_a_holder_that_does_not(self, installed: Sandbox, how: str) -> None:
        script = {
            "never": "[ $1 = post ] || echo 999999 >$STILLFRAME_STATE/holder",
            "nonsense": "[ $1 = post ] || echo 'a b' >$STILLFRAME_STATE/holder",
        }.get(how, self.HOLDER)
        installed.app("50-x", script)
        installed.app("60-y", self.HOLDER.replace("5000", "6000"))
        installed.quiesce()
        if how == "gone":
            installed.out(f"kill -KILL {installed.processes('sleep 5000')[0]}")
            wait_for(lambda: not installed.processes("sleep 5000"))
        if how == "another":
            # The same number, but not the process that was there after `pre`.
            installed.out("f=$(echo /run/stillframe/job.*/app/50-x/holder); read -r p s <$f; echo $p $((s - 1)) >$f")
        assert installed.resume().answer["holders_lost"] == ["50-x"]

    def test_records(self, installed: Sandbox) -> None:
        installed.app(
            "50-x",
            "cd $STILLFRAME_RECORDS\n"
            "if [ $1 = pre ]; then printf 'a\\0b' >position; ln -s /etc/passwd link; echo >'odd name'\n"
            "else echo label >backup_label; dd if=/dev/zero of=huge bs=1024 count=65 2>/dev/null; fi",
        )
        installed.quiesce()
        resumed = Resumed.model_validate(installed.resume().answer)
        found = {name: base64.b64decode(text) for name, text in resumed.records.items()}
        assert found == {"50-x/position": b"a\0b", "50-x/backup_label": b"label\n"}
        assert len(resumed.notes) == 2

    def test_all_together_stay_below_the_limit(self, installed: Sandbox) -> None:
        """An answer of more than 512 KiB would be refused as a whole."""
        for number in range(10, 22):
            noise = "dd if=/dev/urandom bs=1024 count=60 2>/dev/null"
            installed.app(f"{number}-x", f"{noise} >$STILLFRAME_RECORDS/r; {noise}; exit 0")
        installed.quiesce(timeout=120)
        said = installed.resume(timeout=120)
        resumed = Resumed.model_validate(said.answer)
        assert len(str(said.answer)) < 512 << 10
        assert len(resumed.records) == 2
        assert len(resumed.notes) == 10
        assert all(f"{number}-x post" in log_of(said) for number in range(10, 22))
