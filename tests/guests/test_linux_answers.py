"""What a guest answers is not believed beyond its form, and what is asked of it cannot be read as something else.

The entry points here are small scripts that stand where the extension's is, in a sandbox behind a real sshd.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest

from tests.guests.extension_targets import UUID, V1, Watched, emptied, ssh_target
from workers.contract.errors import Busy, ExtensionError
from workers.contract.points import Consistency
from workers.contract.seams import QuiesceRequest
from workers.guests.linux import MARGIN_SECONDS, MAX_ANSWER, ROOT, TRANSIENT, LinuxExtension

REQUEST = QuiesceRequest("job-a", UUID, Consistency.APPLICATION, freeze_s=90, limit_s=120)
GOOD = """echo '{"verb": "quiesce", "ok": true, "watchdog": true, "mounts": ["/data"], "new": {"in": 2030}}'"""


@pytest.fixture(scope="module")
def one_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with ssh_target(tmp_path_factory.mktemp("sshd"), "dash") as made:
        yield made


@pytest.fixture
def sandbox(one_sandbox: Watched) -> Watched:
    return emptied(one_sandbox)


def put(target: Watched, script: str, root: str = ROOT) -> LinuxExtension:
    """Let `script` be the extension's entry point."""
    text = base64.b64encode(script.encode()).decode()
    target.out(f"mkdir -p {root}/{V1}; echo {text} | base64 -d >{root}/{V1}/ext; ln -sfn {V1} {root}/current")
    return LinuxExtension(target)


def error(words: str, verb: str = "quiesce") -> str:
    return f"""printf '%s\\n' '{{"verb": "{verb}", "ok": false, "error": "{words}"}}'"""


def test_fields_of_a_newer_extension_are_passed_over(sandbox: Watched) -> None:
    answer = put(sandbox, GOOD).quiesce(REQUEST)
    assert (answer.watchdog, answer.mounts, answer.scripts) == (True, ["/data"], [])


def test_what_it_says_besides_does_no_harm(sandbox: Watched) -> None:
    assert put(sandbox, f"echo careful >&2; echo; {GOOD}; echo").quiesce(REQUEST).watchdog


@pytest.mark.parametrize("code", [10, 20, 30, 60, 77])
def test_its_own_words_say_why_not(sandbox: Watched, code: int) -> None:
    driver = put(sandbox, f"{error('no setsid here')}; exit {code}")
    with pytest.raises(ExtensionError, match="quiesce: no setsid here"):
        driver.quiesce(REQUEST)


def test_busy(sandbox: Watched) -> None:
    driver = put(sandbox, f"{error('job job-b holds the guest')}; exit 11")
    with pytest.raises(Busy, match="job-b"):
        driver.quiesce(REQUEST)
    driver = put(sandbox, f"{error('job-c holds it', 'uninstall')}; exit 11")
    with pytest.raises(Busy, match="job-c"):
        driver.uninstall()


@pytest.mark.parametrize(
    "script",
    [
        "exit 0",
        "exit 20",
        "exit 127",
        "nosuchprogram",
        "echo what",
        "echo absent; exit 0",
        "echo '{}'",
        "echo '[1]'",
        f"{GOOD}; {GOOD}",
        f"echo hello; {GOOD}",
        GOOD.replace('"quiesce"', '"status"'),
        GOOD.replace('"watchdog": true', '"watchdog": "perhaps"'),
        GOOD.replace('"watchdog": true, ', ""),
        GOOD.replace('["/data"]', '"/data"'),
        GOOD.replace("}'", "'"),
        f"{GOOD}; exit 1",
        f"{GOOD}; kill -9 $$",
        "printf '\\377\\376\\n'",
        f"echo '{'[' * 5000}'",
        f"head -c {MAX_ANSWER + 1} /dev/zero | tr '\\0' x",
        f"""printf '{{"verb": "quiesce", "ok": true, "watchdog": true, "x": "'; head -c {MAX_ANSWER} /dev/zero |
            tr '\\0' x; echo '"}}'""",
    ],
)
def test_nonsense(sandbox: Watched, script: str) -> None:
    driver = put(sandbox, script)
    with pytest.raises(ExtensionError) as caught:
        driver.quiesce(REQUEST)
    assert len(str(caught.value)) < 1000


def test_an_answer_that_was_cut_off(sandbox: Watched) -> None:
    driver = put(sandbox, GOOD)
    sandbox.truncated = True
    with pytest.raises(ExtensionError, match="512 KiB"):
        driver.quiesce(REQUEST)


def test_words_cannot_command_a_terminal(sandbox: Watched) -> None:
    for script in (f"{error('red' + chr(92) + 'u001b[31m')}; exit 20", "printf 'red\\033[31m' >&2; exit 20"):
        with pytest.raises(ExtensionError, match="red") as caught:
            put(sandbox, script).quiesce(REQUEST)
        assert "\033" not in str(caught.value)


def test_it_is_not_waited_for_much_longer_than_the_watchdog_allows(sandbox: Watched) -> None:
    put(sandbox, GOOD).quiesce(REQUEST)
    assert sandbox.timeouts == [REQUEST.limit_s + REQUEST.freeze_s + MARGIN_SECONDS]


class TestAbsent:
    def test_nothing_is_there(self, sandbox: Watched) -> None:
        driver = LinuxExtension(sandbox)
        assert driver.status(UUID) is None
        assert not driver.uninstall()
        assert driver.resume("job-a").watchdog == "absent"
        with pytest.raises(ExtensionError, match="no longer in the guest"):
            driver.quiesce(REQUEST)

    def test_nonsense_is_not_nothing(self, sandbox: Watched) -> None:
        driver = put(sandbox, "echo what; exit 3")
        with pytest.raises(ExtensionError, match="nonsense"):
            driver.status(UUID)

    def test_a_link_to_nowhere(self, sandbox: Watched) -> None:
        put(sandbox, "exit 0")
        sandbox.out(f"rm -r {ROOT}/{V1}")
        assert LinuxExtension(sandbox).status(UUID) is None

    @pytest.mark.parametrize("ok", ["true", "false"])
    def test_nothing_to_uninstall(self, sandbox: Watched, ok: str) -> None:
        assert not put(sandbox, f"""echo '{{"verb": "uninstall", "ok": {ok}}}'; exit 3""").uninstall()

    def test_the_one_in_memory_counts(self, sandbox: Watched) -> None:
        put(sandbox, "echo disk; exit 1")
        assert put(sandbox, GOOD, TRANSIENT).quiesce(REQUEST).watchdog


class TestWhatIsAsked:
    def test_every_word_arrives_as_it_is(self, sandbox: Watched) -> None:
        driver = put(sandbox, f'for word in "$@"; do echo "$word"; done >/tmp/asked; {GOOD}')
        disks, options = ["pci:0000:00:07.0", "pci:0000:00:08.0/0:0:1"], {"postgresql": "backup", "vss": ""}
        driver.quiesce(QuiesceRequest("job-a", UUID, Consistency.APPLICATION, 90, 120, disks, options))
        assert sandbox.lines("cat /tmp/asked") == [
            *("quiesce", "--job", "job-a", "--uuid", UUID, "--goal", "application", "--freeze-s", "90"),
            *("--limit-s", "120", "--skip-disk", disks[0], "--skip-disk", disks[1]),
            *("--option", "postgresql=backup", "--option", "vss="),
        ]

    @pytest.mark.parametrize("word", ["", "a b", "a;b", "$(id)", "*", "--job", "a\nb", "a\n", "-x", "ü", "a" * 300])
    def test_what_could_mean_something_else_is_not_sent(self, sandbox: Watched, word: str) -> None:
        driver = LinuxExtension(sandbox)
        with pytest.raises(ExtensionError, match="cannot be passed"):
            driver.resume(word)
        with pytest.raises(ExtensionError, match="cannot be passed"):
            driver.status(word)
        for request in (
            QuiesceRequest("job-a", UUID, Consistency.CRASH, 90, 120, skip_disks=[word]),
            QuiesceRequest("job-a", UUID, Consistency.CRASH, 90, 120, options={word or "a b": "x"}),
        ):
            with pytest.raises(ExtensionError, match="cannot be passed"):
                driver.quiesce(request)
        assert sandbox.calls == []
