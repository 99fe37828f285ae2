"""What every Host must do, on this machine's own files and over a real sshd."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.host import Host as Lab
from tests.hosts.remote import ssh_host
from workers.contract.errors import DiskError, NoSpace, TargetExists
from workers.contract.hosts import Host, looked
from workers.hosts.local import LocalHost

HOSTILE = (
    "plain",
    "with space",
    "$(touch pwned)",
    "`touch pwned`",
    "a'b\"c",
    "semi;touch pwned;",
    "new\nline",
    "-rf",
    "\\",
    "*",
    "ünïcödé",
    "\x01\x1b[31m",
    "EOF",
    "!!",
    "~",
    "#x",
)


@pytest.fixture(scope="module", params=["local", "ssh"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    if request.param == "local":
        yield LocalHost()
        return
    lab: Lab = request.getfixturevalue("lab")
    with ssh_host(lab, tmp_path_factory.mktemp("run")) as opened:
        yield opened


def test_programs(host: Host) -> None:
    assert host.run(["echo", *HOSTILE]) == " ".join(HOSTILE) + "\n"
    assert host.run(["printf", "%s.", "", "a"]) == ".a."
    assert host.run(["cat"], stdin=b"x\n\ny") == "x\n\ny"
    assert host.run(["cat"]) == ""  # and not what comes next
    with pytest.raises(DiskError, match=r"sh -c failed.*: because"):
        host.run(["sh", "-c", "echo x; echo because >&2; exit 255"])
    with pytest.raises(DiskError, match="no-such-program is not installed"):
        host.run(["no-such-program"])
    with pytest.raises(DiskError, match="did not end within 0 s"):
        host.run(["sleep", "30"], timeout=0.2)
    assert host.run(["echo", "on"]) == "on\n"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(host: Host, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    host.make_folder(folder, 0o711)
    assert folder.stat().st_mode & 0o777 == 0o711
    file = folder / name
    host.write(file, name.encode())
    assert host.read(file) == name.encode()
    host.link(file, folder / "other")
    seen = host.look([file, folder / "other", folder, tmp_path / "none"], head=3)
    assert seen[file].head == name.encode()[:3]
    assert seen[file].same_file(seen[folder / "other"])
    assert seen[folder].is_folder
    assert not seen[tmp_path / "none"].exists
    assert host.names(folder, "*") == sorted([name, "other"])
    assert host.names(folder, "oth*") == ["other"]
    host.remove([file])
    assert host.names(folder, "*") == ["other"]
    host.remove([folder, tmp_path / "none"])
    assert [*tmp_path.iterdir()] == []
    assert not Path("pwned").exists()


def test_a_zero_byte_is_refused(host: Host) -> None:
    with pytest.raises((DiskError, ValueError)):
        host.run(["echo", "a\0b"])
    assert host.run(["echo", "on"]) == "on\n"


def test_looking_is_as_the_system_sees_it(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"QFI\xfb\0" * 40)
    os.utime(file, ns=(1, 1_700_000_000_123_456_789))
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "lost").symlink_to(tmp_path / "none")
    found = looked(host, file)
    stat = file.stat()
    assert (found.device, found.inode, found.size) == (stat.st_dev, stat.st_ino, stat.st_size)
    assert (found.mtime_ns, found.ctime_ns, found.mode) == (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_mode)
    assert host.look([file], head=112)[file].head == file.read_bytes()[:112]
    assert looked(host, tmp_path / "link").same_file(found)
    with pytest.raises(DiskError, match=r"none: No such file or directory"):
        looked(host, tmp_path / "none")
    assert not host.look([tmp_path / "lost"])[tmp_path / "lost"].exists
    assert host.taken(tmp_path / "lost")
    assert host.taken(file)
    assert not host.taken(tmp_path / "none")
    assert host.look([Path("/dev/null")], head=4)[Path("/dev/null")].head == b""
    many = [tmp_path / str(number) for number in range(1200)]
    assert not any(seen.exists for seen in host.look(many).values())
    assert host.look([]) == {}


def test_files_are_written_whole_and_for_their_owner(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    assert host.read(file) is None
    data = os.urandom(300_000)
    host.write(file, data)
    assert host.read(file) == data
    assert file.stat().st_mode & 0o777 == 0o600
    host.write(file, b"")
    assert host.read(file) == b""
    assert os.listdir(file.parent) == ["file"]  # noqa: PTH208
    with pytest.raises(DiskError, match="cannot write"):
        host.write(file / "below", b"x")
    with pytest.raises(DiskError):
        host.read(file.parent)
    host.sync(file)
    with pytest.raises(DiskError):
        host.sync(tmp_path / "none")


def test_a_name_that_is_taken_stays(host: Host, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("2")
    for taken in (two, tmp_path):
        with pytest.raises(TargetExists):
            host.link(one, taken)
    (tmp_path / "lost").symlink_to("none")
    with pytest.raises(TargetExists):
        host.link(one, tmp_path / "lost")
    with pytest.raises(DiskError):
        host.link(tmp_path / "none", tmp_path / "three")
    assert two.read_text() == "2"


def test_space(host: Host, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    host.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)])
    try:
        assert 0 < host.free(small) <= 1 << 20
        with pytest.raises(NoSpace):
            host.write(small / "file", bytes(2 << 20))
        assert host.names(small, "*") == []
    finally:
        host.run(["umount", str(small)])
    with pytest.raises(DiskError):
        host.free(tmp_path / "none")


def test_only_the_named_process_is_ended(host: Host, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    host.end(pid_file, "x")  # there is none
    script = 'trap "sleep 0.2; exit" TERM; echo $$ > "$1"; while :; do sleep 0.05; done'
    start = f"setsid sh -c '{script}' ours-{tmp_path.name} {pid_file} >/dev/null 2>&1 </dev/null &"
    host.run(["sh", "-c", start])
    while not pid_file.exists() or not pid_file.read_text().strip():
        threading.Event().wait(0.02)
    host.end(pid_file, "another")
    alive = ["sh", "-c", 'tr "\\0" " " < "/proc/$(cat "$0")/cmdline" 2>/dev/null; :', str(pid_file)]
    assert "ours" in host.run(alive)
    host.end(pid_file, f"ours-{tmp_path.name}")
    assert host.run(alive) == ""
    host.end(pid_file, f"ours-{tmp_path.name}")
    for nonsense in (b"", b"-1", b"nonsense", b"1 1"):
        host.write(pid_file, nonsense)
        host.end(pid_file, "")


@pytest.mark.parametrize("name", ["s", "a:b", "x%h%%", "sp ace", "back\\slash", "$(x)`", "[::1]:2"])
def test_sockets_lead_there(host: Host, tmp_path: Path, name: str) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / name))
        server.listen()
        with host.socket(tmp_path / name) as here, socket.socket(socket.AF_UNIX) as client:
            client.connect(str(here))
            server.settimeout(10)
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"there")
                assert accepted.recv(5) == b"there"
                accepted.sendall(b"back!")
                assert client.recv(5) == b"back!"
    assert host.local or not here.exists()


def test_a_socket_that_ssh_would_misread_is_refused(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "${HOME}"
    if host.local:
        with host.socket(path) as here:
            assert here == path
        return
    with pytest.raises(DiskError, match="looks like a variable"), host.socket(path):
        pass


def test_many_at_once(host: Host) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(3):
            word = f"{number}-{turn}"
            if host.run(["echo", word]) != word + "\n":
                wrong.append(word)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_command_for_a_process_that_outlives_this_one(host: Host) -> None:
    done = subprocess.run(host.command(["printf", "%s|", *HOSTILE]), capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"{word}|" for word in HOSTILE)
