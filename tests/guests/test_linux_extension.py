"""The driver of the Linux extension puts the real payload in place, upgrades it and takes it away. Whatever goes wrong,
the version before is in force, and nothing else is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import cast

import pytest

from tests.guests.extension_targets import (
    BROKEN,
    OTHER_UUID,
    UUID,
    V1,
    V2,
    V3,
    Watched,
    agent_target,
    emptied,
    package,
    says,
    ssh_target,
)
from tests.guests.machines import GuestFactory
from workers.contract.errors import Busy, ExtensionError, PackageRefused
from workers.contract.guests import CONTRACT_VERSION, GuestOs, Status
from workers.contract.points import Consistency
from workers.contract.seams import QuiesceRequest
from workers.guests.linux import ROOT, TRANSIENT, LinuxExtension

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def one_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with ssh_target(tmp_path_factory.mktemp("sshd"), "dash") as made:
        yield made


@pytest.fixture(scope="module")
def one_busybox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with ssh_target(tmp_path_factory.mktemp("sshd"), "busybox") as made:
        yield made


@pytest.fixture(scope="module")
def one_guest(request: pytest.FixtureRequest) -> Iterator[Watched]:
    needs = [request.getfixturevalue(name) for name in ("libvirt_host", "tiny_guest_image", "guest_folder")]
    with agent_target(GuestFactory(*needs)) as made:
        yield made


PLACES = {"dash": "one_sandbox", "busybox": "one_busybox", "guest": "one_guest"}


@pytest.fixture(scope="module", params=["dash", "busybox", pytest.param("guest", marks=pytest.mark.guest)])
def one_target(request: pytest.FixtureRequest) -> Watched:
    return cast(Watched, request.getfixturevalue(PLACES[request.param]))


@pytest.fixture(params=["dash", "busybox"])
def shell(request: pytest.FixtureRequest) -> Watched:
    return emptied(request.getfixturevalue(PLACES[request.param]))


@pytest.fixture
def target(one_target: Watched) -> Iterator[Watched]:
    yield emptied(one_target)
    emptied(one_target)


@pytest.fixture
def sandbox(one_sandbox: Watched) -> Watched:
    return emptied(one_sandbox)


@pytest.fixture
def guest(one_guest: Watched) -> Iterator[Watched]:
    yield emptied(one_guest)
    emptied(one_guest)


def found_in(target: Watched) -> list[str]:
    """Everything that there is of an extension."""
    return target.lines(f"for root in {ROOT} {TRANSIENT}; do [ ! -e $root ] || find $root; done | sort")


def in_force(driver: LinuxExtension) -> Status:
    found = driver.status(UUID)
    assert found
    return found


def listed(target: Watched) -> str:
    """The same with modes and times, and what is in force."""
    return target.out(
        f"cd {ROOT} && find . -exec stat -c '%n %a %u %s %y' {{}} + | sort; readlink current; readlink previous || :"
    )


def test_from_nothing(target: Watched) -> None:
    driver, sent = LinuxExtension(target), package()
    assert driver.status(UUID) is None
    status = driver.install(sent, UUID)
    assert (status.version, status.serial, status.contract) == (V1, 1, CONTRACT_VERSION)
    assert (status.machine, status.root, status.transient, status.lease) == (UUID, ROOT, False, None)
    assert driver.status(UUID) == status
    hashes = target.lines(f"cd {ROOT}/{V1} && sha256sum $(find . -type f)")
    sums = dict(zip(hashes[1::2], hashes[::2], strict=True))
    assert {f"./{path}": file.sha256 for path, file in sent.files.items()}.items() <= sums.items()
    assert len(set(sums) - {f"./{path}" for path in sent.files}) <= 1, "what `install` notes of it"
    words = target.lines(f"cd {ROOT}/{V1} && stat -c '%n %a' $(find . -type f)")
    modes = dict(zip(words[::2], words[1::2], strict=True))
    assert {modes[f"./{path}"]: file.mode for path, file in sent.files.items()} == {"755": 0o755, "644": 0o644}
    assert target.lines(f"stat -c %a:%u {ROOT} {ROOT}/{V1} {ROOT}/{V1}/lib") == ["755:0"] * 3
    assert ".stage" not in "".join(found_in(target))


def test_status_is_one_command(target: Watched) -> None:
    driver = LinuxExtension(target)
    driver.install(package(), UUID)
    target.calls.clear()
    driver.status(UUID)
    assert target.calls == ["run"]


def test_an_upgrade_keeps_one_old_version(target: Watched) -> None:
    driver = LinuxExtension(target)
    for serial, version in enumerate((V1, V2, V3)):
        driver.install(package(version, serial), UUID)
    status = in_force(driver)
    assert (status.version, status.previous) == (V3, V2)
    assert target.lines(f"cd {ROOT} && find . -name ext | sort") == [f"./{V2}/ext", f"./{V3}/ext"]
    assert target.lines(f"cd {ROOT} && readlink current && readlink previous") == [V3, V2]


def test_the_same_again(target: Watched) -> None:
    driver = LinuxExtension(target)
    driver.install(package(V1, 1), UUID)
    driver.install(package(V2, 2), UUID)
    target.out(f"rm {ROOT}/current/watchdog")
    assert driver.install(package(V2, 2), UUID).previous == V1
    assert target.lines(f"ls {ROOT}/current/watchdog")
    assert driver.install(package(V1, 3), UUID).previous == V2  # what was taken back is built anew


def taken_back(target: Watched, replaced: dict[str, str]) -> None:
    driver = LinuxExtension(target)
    driver.install(package(V1, 1), UUID)
    before = found_in(target)
    broken = package(V2, 2, replaced=replaced, time_limits={"status": 2})
    with pytest.raises(ExtensionError, match=f"{V1.replace('+', '.')} is in force again") as caught:
        driver.install(broken, UUID)
    for words in ("no room", "lacks: setsid", "cannot make the link", "broken"):
        assert words in str(caught.value) or words not in str(replaced)
    assert found_in(target) == before
    status = in_force(driver)
    assert (status.version, status.previous) == (V1, "")
    assert driver.install(package(V3, 3), UUID).previous == V1


@pytest.mark.parametrize("replaced", BROKEN.values(), ids=BROKEN)
class TestBroken:
    def test_an_upgrade_is_taken_back(self, shell: Watched, replaced: dict[str, str]) -> None:
        taken_back(shell, replaced)

    def test_a_first_one_leaves_nothing(self, sandbox: Watched, replaced: dict[str, str]) -> None:
        with pytest.raises(ExtensionError, match="nothing of it was left"):
            LinuxExtension(sandbox).install(package(V2, 2, replaced=replaced, time_limits={"status": 1}), UUID)
        assert found_in(sandbox) == []


@pytest.mark.guest
@pytest.mark.parametrize("name", ["install and a signal", "enable, then nonsense", "status fails", "it hangs"])
def test_an_upgrade_is_taken_back_in_a_guest(guest: Watched, name: str) -> None:
    taken_back(guest, BROKEN[name])


def test_enable_that_lost_the_version_before(sandbox: Watched) -> None:
    driver = LinuxExtension(sandbox)
    driver.install(package(V1, 1), UUID)
    with pytest.raises(ExtensionError, match=r"could not be put back: 0.1.0\+aaaaaaaa is gone"):
        driver.install(package(V2, 2, replaced={"enable": f"rm -rf {ROOT}/{V1}; exit 20"}), UUID)
    assert driver.status(UUID) is None
    assert found_in(sandbox) == []


def test_nonsense_in_force_is_replaced(target: Watched) -> None:
    driver = LinuxExtension(target)
    driver.install(package(V1, 1), UUID)
    target.out(f"echo 'echo what?' >{ROOT}/current/ext")
    with pytest.raises(ExtensionError, match="nonsense") as caught:
        driver.status(UUID)
    assert f"rm -rf {ROOT}" in caught.value.hint
    assert driver.install(package(V2, 2), UUID).previous == V1


def test_a_downgrade_touches_nothing(target: Watched) -> None:
    driver = LinuxExtension(target)
    driver.install(package(V2, 5), UUID)
    before = listed(target)
    target.calls.clear()
    for version, serial in ((V1, 4), ("0.0.9+ffffffff", 9)):
        with pytest.raises(PackageRefused, match="is older than"):
            driver.install(package(version, serial), UUID)
    assert target.calls == ["run"] * 2  # it was asked for its status
    assert listed(target) == before


def test_another_systems_package(sandbox: Watched) -> None:
    with pytest.raises(PackageRefused, match="windows"):
        LinuxExtension(sandbox).install(package(os=GuestOs.WINDOWS), UUID)
    assert sandbox.calls == []


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("change", [flipped, lambda data: data[:-1], lambda data: b"x" + data, lambda _data: b""])
def test_what_is_not_what_was_sent_is_not_put_in_place(target: Watched, change: Callable[[bytes], bytes]) -> None:
    driver = LinuxExtension(target)
    driver.install(package(V1, 1), UUID)
    before = found_in(target)
    target.change = change
    with pytest.raises(ExtensionError, match="did not arrive in the guest as it was sent"):
        driver.install(package(V2, 2), UUID)
    assert in_force(driver).version == V1
    assert found_in(target) == before


def test_a_first_one_that_does_not_arrive_leaves_nothing(sandbox: Watched) -> None:
    sandbox.change = flipped
    with pytest.raises(ExtensionError):
        LinuxExtension(sandbox).install(package(), UUID)
    assert found_in(sandbox) == []


def test_uninstalled_and_again(target: Watched) -> None:
    driver = LinuxExtension(target)
    assert not driver.uninstall()
    driver.install(package(V2, 2), UUID)
    assert driver.uninstall()
    assert found_in(target) == []
    assert driver.status(UUID) is None
    assert not driver.uninstall()
    assert driver.install(package(V1, 1), UUID).version == V1  # an older one: there is nothing to compare with


class TestReadOnly:
    def test_it_goes_to_memory(self, target: Watched) -> None:
        target.out("mount -t tmpfs -o ro none /opt")
        driver = LinuxExtension(target)
        first = driver.install(package(V1, 1), UUID)
        assert (first.transient, first.root) == (True, TRANSIENT)
        target.out("umount /opt")  # what is in force stays so, and where it is, until the next boot
        assert driver.install(package(V2, 2), UUID).root == TRANSIENT
        with pytest.raises(ExtensionError, match="is in force again"):
            driver.install(package(V3, 3, replaced={"status": "exit 0"}), UUID)
        status = in_force(driver)
        assert (status.version, status.root) == (V2, TRANSIENT)
        assert driver.uninstall()
        assert found_in(target) == []

    def test_a_newer_one_in_memory_is_in_force(self, target: Watched) -> None:
        driver = LinuxExtension(target)
        driver.install(package(V1, 1), UUID)
        target.out("mount --bind /opt /opt && mount -o remount,bind,ro /opt")
        with pytest.raises(ExtensionError, match="nothing of it was left"):
            driver.install(package(V2, 2, replaced={"probe": "exit 1"}), UUID)
        status = in_force(driver)
        assert (status.version, status.transient) == (V1, False)
        assert driver.install(package(V2, 2), UUID).transient
        assert in_force(driver).version == V2


def test_a_full_disk(target: Watched) -> None:
    target.out("mount -t tmpfs -o size=400k none /opt")
    driver = LinuxExtension(target)
    driver.install(package(V1, 1), UUID)
    target.out("cd /opt && n=10; while dd if=/dev/zero of=fill.$n bs=24k count=1 2>/dev/null; do n=$((n + 1)); done")
    before = [path for path in found_in(target) if "fill" not in path]
    big = package(V2, 2, files={"lib/big.sh": bytes(96 << 10)})
    for number in range(10, 16):
        with pytest.raises(ExtensionError, match="No space left on device"):
            driver.install(big, UUID)
        assert found_in(target) == before
        assert in_force(driver).version == V1
        target.out(f"rm /opt/fill.{number}")
    target.out("rm /opt/fill*")
    driver.install(package(V2, 2), UUID)


def test_a_disk_without_room_for_a_folder_is_full_too(target: Watched) -> None:
    target.out("mount -t tmpfs -o nr_inodes=2 none /opt")
    with pytest.raises(ExtensionError, match="No space left on device"):
        LinuxExtension(target).install(package(), UUID)
    assert [path for path in found_in(target) if path != ROOT] == []


def test_what_a_killed_process_left_is_removed(target: Watched) -> None:
    driver = LinuxExtension(target)
    for refused in ({}, {"install": says("install", code=20)}):
        target.out(f"mkdir -p {ROOT}/.stage-0badf00d/lib; echo old >{ROOT}/.stage-0badf00d/lib/x")
        with suppress(ExtensionError):
            driver.install(package(V2 if refused else V1, 2, replaced=refused), UUID)
        assert not [path for path in found_in(target) if ".stage" in path]
        assert driver.status(UUID)


LOOK = """while [ ! -e /tmp/stop ]; do
    find {roots} -type d ! -perm -0001 -name '.stage*' 2>/dev/null >>/tmp/stages
    find {roots} -type d ! -perm -0001 -prune -o ! -type l -perm -0002 -print 2>/dev/null >>/tmp/writable
    echo >>/tmp/rounds
done"""


def test_nothing_can_be_written_by_others_at_any_moment(target: Watched) -> None:
    look = LOOK.format(roots=f"{ROOT} {TRANSIENT}")
    target.out(f"cd /tmp && rm -f stop stages writable rounds; ({look}) >/dev/null 2>&1 </dev/null &")

    def looked() -> int:
        return int(target.out("wc -l </tmp/rounds 2>/dev/null || echo 0"))

    def wait_for_a_look() -> None:
        deadline, seen = time.monotonic() + 60, looked()
        while looked() < seen + 2:
            assert time.monotonic() < deadline, "nobody looks"

    try:
        wait_for_a_look()
        target.after_put = wait_for_a_look  # with the file of the guest agent's mode, if it is the agent
        for serial, version in enumerate((V1, V2, V3)):
            LinuxExtension(target).install(package(version, serial), UUID)
        wait_for_a_look()
    finally:
        target.out("touch /tmp/stop")
    assert target.out("cat /tmp/stages")
    assert target.out("cat /tmp/writable") == ""


def test_files_travel_as_one(target: Watched) -> None:
    folder = f"apps/50-many/{'long-' * 16}name"  # their list alone is more than an agent takes at once
    many = {f"{folder}/{number:03}": b"x" * number for number in range(450)}
    driver, few, all_of_them = LinuxExtension(target), package(V1, 1), package(V2, 2, files=many)
    driver.install(few, UUID)
    assert target.calls.count("put") == 1
    assert target.calls.count("run") <= 8
    target.calls.clear()
    driver.install(all_of_them, UUID)
    assert target.calls.count("put") == 3
    names = target.out(f"cd {ROOT}/current/{folder} && wc -c 000 001 299 449; ls | wc -l").split()
    assert names == ["0", "000", "1", "001", "299", "299", "449", "449", "749", "total", "450"]


class TestUnderALease:
    """In a guest only: the watchdog of a quiesced sandbox would be this host's."""

    REQUEST = QuiesceRequest("job-a", UUID, Consistency.CRASH, freeze_s=60, limit_s=30)

    @pytest.mark.guest
    def test_nothing_is_replaced_or_removed(self, guest: Watched) -> None:
        driver = LinuxExtension(guest)
        driver.install(package(V1, 1), UUID)
        assert driver.quiesce(self.REQUEST).watchdog
        status = in_force(driver)
        assert status.lease
        assert status.lease.job == "job-a"
        for act in (lambda: driver.install(package(V2, 2), UUID), driver.uninstall):
            with pytest.raises(Busy, match="job-a"):
                act()
        assert driver.resume("job-a").watchdog == "silent"
        assert driver.install(package(V2, 2), UUID).version == V2
        assert driver.resume("job-a").watchdog == "silent"  # again
        assert driver.resume("job-b").watchdog == "absent"

    @pytest.mark.guest
    def test_a_clone_is_under_none(self, guest: Watched) -> None:
        driver = LinuxExtension(guest)
        driver.install(package(V1, 1), UUID)
        driver.quiesce(self.REQUEST)
        assert (status := driver.status(OTHER_UUID))
        assert (status.machine, status.lease) == (OTHER_UUID, None)
        assert driver.install(package(V2, 2), OTHER_UUID).machine == OTHER_UUID


def test_a_lease_is_seen_before_anything_is_sent(sandbox: Watched) -> None:
    driver = LinuxExtension(sandbox)
    fields = f'"contract": 1, "version": "{V1}", "serial": 1, "lease": {{"job": "job-a", "left_s": 9}}'
    driver.install(package(V1, 1), UUID)
    sandbox.out(f"cat >{ROOT}/current/ext <<'END'\n{says('status', fields)}\nEND")
    sandbox.calls.clear()
    with pytest.raises(Busy, match="job-a"):
        driver.install(package(V2, 2), UUID)
    assert sandbox.calls == ["run"]
