"""A real live migration between two hosts with shared storage, seen by a Stillframe on a third: `python -m
tests.discovery.migration FOLDER SOCKET_A SOCKET_B`, in a mount namespace where no libvirt has run."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path

import libvirt
import libvirt_qemu

from orchestrator.config import parse_config
from orchestrator.service import Service
from orchestrator.views import JobView

MIB = 1 << 20
CONFIGURATION = """
    [paths]
    state = "{folder}/state"
    runtime = "{folder}/run"
    cache = "{folder}/cache"
    [vaults.main]
    url = "file://{folder}/vault"
    key_file = "{folder}/main.key"
    [backup]
    consistency = "crash"
    scratch_floor = 1
    [hypervisors.a]
    uri = "{a}"
    [hypervisors.b]
    uri = "{b}"
"""
MACHINE = """<domain type='qemu'><name>mover</name><uuid>{uuid}</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices><disk type='file' device='disk'>
<driver name='qemu' type='qcow2' cache='none'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"""
LIVE = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    | libvirt.VIR_MIGRATE_UNSAFE  # no network file system: one kernel sees to it that both see the same
)


def write(domain: libvirt.virDomain, offset: int, byte: int) -> None:
    device = "/machine/peripheral/virtio-disk0/virtio-backend"
    command = f'qemu-io -d {device} "write -P {byte} {offset} {MIB}"'
    libvirt_qemu.qemuMonitorCommand(domain, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)


def backup(service: Service) -> JobView:
    return service.wait(service.start_backup("mover"))


def main(folder: Path, a: str, b: str) -> None:
    config = parse_config(CONFIGURATION.format(folder=folder, a=a, b=b), folder / "stillframe.toml")
    source, target = libvirt.open(a), libvirt.open(b)
    domain = source.defineXML(MACHINE.format(uuid=uuid.uuid4(), disk=folder / "disk.qcow2"))
    domain.create()
    with Service.open(config) as service:
        service.init_vault("main")
        write(domain, 0, 1)
        first = backup(service)
        write(domain, 4 * MIB, 2)
        moved = domain.migrate3(target, {libvirt.VIR_MIGRATE_PARAM_URI: f"unix://{folder}/migration.sock"}, LIVE)
        write(moved, 8 * MIB, 3)
        known = [checkpoint.getName() for checkpoint in moved.listAllCheckpoints()]
        news = [str(kind) for change in service.machine_desk.look().changes for kind, _ in change.news]
        second = backup(service)
        service.wait(service.start_restore_disk(second.point or "", "vda", to=folder / "restored.qcow2"))
    moved.destroy()
    told = {"disks": [first.disks, second.disks], "checkpoints": known, "news": news, "where": second.hypervisor}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
