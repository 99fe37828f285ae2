"""A machine that real libvirt takes for one with Windows: a tiny guest hands its agent's bytes to `FakeWindowsAgent`.

What is between the backup and the stand-in is real: libvirt's own agent protocol, QEMU's ports, the guest's disks. The
guest passes bytes between its two ports and does nothing else (`agent-relay` in orchestrator/demo/tiny_init.sh).

In a conftest: `from tests.guests.windows_relay import fake_windows_guest  # noqa: F401`
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

import libvirt
import pytest

from orchestrator.demo.disks import make_ext4_disk
from orchestrator.demo.host import remove_machine
from orchestrator.demo.tiny_guest import CMDLINE, TinyDisk, TinyImage, tiny_xml
from tests.guests.fake_windows import FakeWindowsAgent
from tests.guests.machines import MACHINE_PREFIX, MIB, Guest

RELAY = "stillframe.relay"
_numbers = itertools.count(1)


@dataclass
class FakeWindowsGuest(Guest):
    """`run`, `out` and `hashes` do not work: there is no shell behind this agent."""

    agent: FakeWindowsAgent


MakeFakeWindows = Callable[..., FakeWindowsGuest]


def make_fake_windows(
    connection: libvirt.virConnect,
    image: TinyImage,
    folder: Path,
    stack: ExitStack,
    *,
    disks: dict[str, int] | None = None,
    start: bool = True,
) -> FakeWindowsGuest:
    """A machine with ext4 `disks` (target → bytes); if `start`, up until its agent answers. It is removed when `stack`
    ends."""
    name = f"{MACHINE_PREFIX}{os.getpid()}-win-{next(_numbers)}"
    home = folder / name
    home.mkdir(mode=0o755)
    stack.callback(shutil.rmtree, home, ignore_errors=True)
    made = []
    for target, size in (disks if disks is not None else {"vda": 64 * MIB, "vdb": 64 * MIB}).items():
        made.append(TinyDisk(target, home / f"{target}.qcow2"))
        make_ext4_disk(made[-1].path, size, format="qcow2")
    socket = home / "relay.sock"
    agent = stack.enter_context(FakeWindowsAgent(socket))
    xml = tiny_xml(name, image, made, home / f"{name}.log", cmdline=f"{CMDLINE} agent-relay")
    port = (
        f"<channel type='unix'><source mode='connect' path={quoteattr(str(socket))}>"
        f"<reconnect enabled='yes' timeout='1'/></source><target type='virtio' name='{RELAY}'/></channel>"
    )
    domain = connection.defineXML(xml.replace("</devices>", f"{port}</devices>"))
    stack.callback(remove_machine, domain)
    guest = FakeWindowsGuest(domain, made, image, home, agent)
    if start:
        guest.start()
    return guest


@pytest.fixture
def fake_windows_guest(
    libvirt_host: libvirt.virConnect, tiny_guest_image: TinyImage, guest_folder: Path
) -> Iterator[MakeFakeWindows]:
    """Makes machines: `fake_windows_guest(disks={"vda": …}, start=True)`."""
    with ExitStack() as stack:
        yield lambda **wanted: make_fake_windows(libvirt_host, tiny_guest_image, guest_folder, stack, **wanted)
