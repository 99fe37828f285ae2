"""`stillframe hypervisor` against a real sshd: what is written, what is refused, and that no key is believed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.hosts.host import Host as Lab
from workers.hosts.ssh_link import fingerprint

pytestmark = pytest.mark.guest

WRITTEN = """\
# my own words
[paths]
state = "state"   # here
runtime = "run"
[vaults.main]
url = "file://./vault"
key_file = "main.key"
"""


@pytest.fixture
def mine(cli: Cli) -> Cli:
    cli.configure(WRITTEN)
    return cli


def uri(lab: Lab) -> str:
    return f"qemu+ssh://root@127.0.0.1:{lab.port}/system"


def added(cli: Cli, lab: Lab) -> None:
    key = ("--key-file", lab.client_key, "--fingerprint", fingerprint(lab.host_key))
    ran = cli.run("hypervisor", "add", "lab1", uri(lab), *key, "--json")
    assert ran.code == 0, ran
    assert ran.line("hypervisor")["host_key"] == lab.host_key


def another_key(folder: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "other")], check=True)
    return " ".join((folder / "other.pub").read_text().split()[:2])


def test_add_list_check_remove(mine: Cli, lab: Lab) -> None:
    mine.file.chmod(0o640)
    added(mine, lab)
    text = mine.file.read_text()
    assert text.startswith(WRITTEN)
    assert mine.file.stat().st_mode & 0o777 == 0o640
    assert f'host_key = "{lab.host_key}"' in text
    assert mine.run("hypervisor", "list", "--json").line("hypervisor")["uri"] == uri(lab)
    assert fingerprint(lab.host_key) in mine.run("hypervisor", "list").out
    ran = mine.run("hypervisor", "check", "lab1", "--json")
    assert ran.code == 0, ran
    assert {line["level"] for line in ran.lines} == {"OK"}, ran.out
    words = " ".join(line["detail"] for line in ran.lines)
    assert all(word in words for word in ("over SSH", "clock", "qemu-nbd 7", "free for scratch", "libvirt 9")), words
    assert mine.run("vm", "list").code == 0
    again = mine.run("hypervisor", "add", "lab1", "qemu:///system")
    assert (again.code, "configured already" in again.err) == (2, True)
    assert mine.run("hypervisor", "remove", "lab1").code == 2  # nobody was asked
    assert mine.run("hypervisor", "remove", "lab1", "--dry-run").code == 0
    assert mine.file.read_text() == text
    assert mine.run("hypervisor", "remove", "lab1", "--yes").code == 0
    assert mine.file.read_text().strip() == WRITTEN.strip()
    assert mine.run("hypervisor", "remove", "lab1", "--yes").code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["qemu+ssh://root@127.0.0.1:{port}/system", "--key-file", "{key}"], "nobody is there to compare"),
        (["qemu+ssh://root@127.0.0.1:{port}/system", "--key-file", "{key}", "--yes"], "nobody is there to compare"),
        (["qemu+ssh://root@127.0.0.1:{port}/system", "--fingerprint", "SHA256:x"], "shows other keys"),
        (
            ["qemu+ssh://root@127.0.0.1:{port}/system", "--key-file", "/none", "--fingerprint", "{print}"],
            "no key /none",
        ),
        (["qemu+ssh://root@127.0.0.1:{port}/system", "--key-file", "{other}", "--fingerprint", "{print}"], "refuses"),
        (["qemu+ssh://root@127.0.0.1:1/system", "--fingerprint", "{print}"], "shows no host key"),
        (["qemu+ssh://-oProxyCommand=touch pwned/system"], "names no host"),
        (["qemu+tls://lab1/system"], "no way to the disks"),
        (["qemu:///system", "--fingerprint", "{print}"], "are for qemu+ssh://"),
        (["qemu+unix:///system?socket=/none"], "cannot connect"),
        (["gibberish"], "is of no kind known here"),
        ([], "say where it is"),
        (["--new-key"], "no hypervisor 'lab1'"),
    ],
)
def test_what_is_refused_writes_nothing(mine: Cli, lab: Lab, tmp_path: Path, arguments: list[str], words: str) -> None:
    another_key(tmp_path)
    names = {"port": str(lab.port), "key": str(lab.client_key), "print": fingerprint(lab.host_key)}
    names["other"] = str(tmp_path / "other")
    filled = [argument.format(**names) for argument in arguments]
    ran = mine.run("hypervisor", "add", "lab1", *filled)
    assert ran.code in (1, 2), ran
    assert words in ran.err, ran
    assert "try:" in ran.err or "there are:" in ran.err
    assert mine.file.read_text() == WRITTEN
    assert not (mine.folder / "pwned").exists()


@pytest.mark.parametrize("name", ["../x", "a b", "", "x" * 65, "a\nb", "[x]"])
def test_a_name_that_cannot_be_one(mine: Cli, name: str) -> None:
    ran = mine.run("hypervisor", "add", name, "qemu+unix:///system?socket=/none")
    assert ran.code != 0
    assert "cannot connect" not in ran.err, "said before anything is connected to"
    assert mine.file.read_text() == WRITTEN


def test_a_changed_host_key_is_loud_until_somebody_vouches_for_the_new_one(mine: Cli, lab: Lab, tmp_path: Path) -> None:
    added(mine, lab)
    mine.configure(mine.file.read_text().replace(lab.host_key, another_key(tmp_path)) + "bandwidth = 1048576 # mine\n")
    ran = mine.run("hypervisor", "check", "--json")
    [finding] = ran.lines
    assert (ran.code, finding["level"]) == (1, "FAIL")
    assert "HAS CHANGED" in finding["detail"]
    assert fingerprint(lab.host_key) in finding["detail"]
    assert "hypervisor add lab1 --new-key" in finding["mend"]
    assert mine.run("hypervisor", "add", "lab1", "--new-key", "--fingerprint", fingerprint(lab.host_key)).code == 0
    assert mine.run("hypervisor", "check").code == 0
    assert "bandwidth = 1048576 # mine" in mine.file.read_text()
    assert str(lab.client_key) in mine.file.read_text()


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_somebody_is_asked_to_compare(mine: Cli, lab: Lab, answer: str, code: int) -> None:
    asks, terminal = os.openpty()
    argv = [sys.executable, "-m", "orchestrator.cli.main", "hypervisor", "add", "lab1", uri(lab)]
    argv += ["--key-file", str(lab.client_key)]
    env = {"HOME": str(mine.folder), "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    os.write(asks, f"{answer}\n".encode())
    done = subprocess.run(
        argv, cwd=mine.folder, env={**env, "TERM": "xterm"}, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal,
        timeout=60, check=False,
    )  # fmt: skip
    shown = os.read(asks, 65536).decode()
    os.close(asks)
    os.close(terminal)
    assert done.returncode == code, shown
    assert fingerprint(lab.host_key) in shown
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in shown
    assert (lab.host_key in mine.file.read_text()) == (answer == "y")


def test_what_is_missing_there_is_said_with_its_mend(mine: Cli, lab: Lab) -> None:
    added(mine, lab)
    mine.configure(mine.file.read_text() + 'scratch_dir = "/srv/lab/fixed/scratch"\n')
    lab.run("mkdir", "-p", "/srv/lab/fixed")
    lab.run("mount", "-t", "tmpfs", "-o", "ro", "fixed", "/srv/lab/fixed")
    lab.run("mount", "--bind", "/dev/null", "/usr/bin/qemu-nbd")
    try:
        ran = mine.run("hypervisor", "check", "--json")
    finally:
        lab.run("umount", "/usr/bin/qemu-nbd")
        lab.run("umount", "/srv/lab/fixed")
    assert ran.code == 1
    failed = {line["detail"]: line["mend"] for line in ran.lines if line["level"] == "FAIL"}
    assert len(failed) == 2, failed
    nbd, scratch = failed
    assert "qemu-nbd" in nbd
    assert "qemu-utils" in failed[nbd]
    assert "/srv/lab/fixed" in scratch
