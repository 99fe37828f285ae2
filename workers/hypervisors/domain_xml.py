"""What a machine's definition (libvirt's domain XML) says of disks, firmware and agent, and the definition of a machine
restored from it. Pure: no I/O, so that every odd definition can be a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from workers.contract.errors import UsageError
from workers.hypervisors import xml

AGENT_CHANNEL = "org.qemu.guest_agent.0"
ENCRYPTED = "it is encrypted on the host, and would be restored without its encryption"
"""Measured with libvirt 9.0: a backup reads it decrypted, and keeps what the guest overwrites meanwhile as plain data
in scratch unless that has an `<encryption>` of its own; once it is off, no bitmap of it can be removed without its
secret."""
_DEVICES = {"cdrom": "CD-ROM", "floppy": "floppy", "lun": "SCSI device passed through"}


@dataclass(frozen=True, slots=True)
class DiskElement:
    """One `<disk>` as written in a definition."""

    target: str
    format: str
    path: str
    """Of a file or block device; empty for other kinds of source."""
    volume: tuple[str, str] | None
    """Pool and volume, where the definition names those instead of a path."""
    excluded: str
    """Why it takes no part in backups; empty: it does."""
    address: str
    """See `machines.Disk.address`."""
    refused: bool = False
    """See `machines.Disk.refused`."""


def disks(definition: str) -> list[DiskElement]:
    """All disks, CD-ROM and floppy drives included, in the order of the definition."""
    root = xml.parse(definition)
    scsi = {
        controller.get("index", ""): _pci(controller.find("address"))
        for controller in root.iterfind("devices/controller[@type='scsi']")
    }
    return [_disk(element, scsi) for element in root.iterfind("devices/disk")]


def _pci(address: ET.Element | None) -> str:
    if address is None or address.get("type") != "pci":
        return ""
    domain, bus, slot, function = (int(address.get(part, "0"), 16) for part in ("domain", "bus", "slot", "function"))
    return f"pci:{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"


def _address(element: ET.Element, scsi: Mapping[str, str]) -> str:
    """Of a virtio disk, or of one on a SCSI controller. Others have no address that the guest would see the same."""
    address, target = element.find("address"), element.find("target")
    if address is None or address.get("type") != "drive":
        return _pci(address)
    if target is None or target.get("bus") != "scsi":
        return ""
    controller = scsi.get(address.get("controller", "0"), "")
    unit = ":".join(address.get(part, "0") for part in ("bus", "target", "unit"))
    return f"{controller}/{unit}" if controller else ""


def _disk(element: ET.Element, scsi: Mapping[str, str]) -> DiskElement:
    target, source, driver = element.find("target"), element.find("source"), element.find("driver")
    path, volume, device = "", None, element.get("device", "disk")
    if source is not None:
        path = source.get("file") or source.get("dev") or ""
        if source.get("pool") and source.get("volume"):
            volume = (source.get("pool", ""), source.get("volume", ""))
    return DiskElement(
        target=target.get("dev", "") if target is not None else "",
        format=(driver.get("type") if driver is not None else None) or "raw",
        path=path,
        volume=volume,
        excluded=_excluded(element, source, bool(path or volume)),
        address=_address(element, scsi),
        refused=device == "disk" and _encrypted(element),
    )


def _encrypted(element: ET.Element) -> bool:
    """Encrypted by QEMU, with a secret of libvirt's; what a guest encrypts by itself is data as any other."""
    return element.find("encryption") is not None or element.find("source/encryption") is not None


def _excluded(element: ET.Element, source: ET.Element | None, located: bool) -> str:
    device = element.get("device", "disk")
    if device != "disk":
        return _DEVICES.get(device, device)
    if element.find("shareable") is not None:
        return "shared between machines"
    if element.find("transient") is not None:
        return "transient"
    if _encrypted(element):
        return ENCRYPTED
    if element.find("readonly") is not None:
        return "read-only"
    kind = element.get("type", "file")
    if kind == "network":
        protocol = source.get("protocol", "") if source is not None else ""
        return f"network disk ({protocol})" if protocol else "network disk"
    if kind not in ("file", "block", "volume"):
        return f"{kind} disk"
    return "" if located else "no medium"


def nvram_path(definition: str) -> str | None:
    """Where the UEFI variable store of the machine lives; None if it has none, or not as a local file."""
    element = xml.parse(definition).find("os/nvram")
    if element is None:
        return None
    source = element.find("source")
    if source is not None:
        return source.get("file")
    return (element.text or "").strip() or None


def agent_connected(live_definition: str) -> bool:
    """Whether the guest has opened its end of the agent's channel (a running machine's definition says so)."""
    return any(
        target.get("name") == AGENT_CHANNEL and target.get("state") == "connected"
        for target in xml.parse(live_definition).iterfind("devices/channel/target")
    )


def pool_folder(pool_definition: str) -> str | None:
    """Folder of a storage pool whose volumes are files in one; None for other pools."""
    root = xml.parse(pool_definition)
    return root.findtext("target/path") if root.get("type") in ("dir", "fs", "netfs") else None


# --- a definition for restored disks ---------------------------------------------------------------------------

ET.register_namespace("qemu", "http://libvirt.org/schemas/domain/qemu/1.0")
_BUSES = {"vd": "virtio", "sd": "sata", "hd": "ide"}


def restored(
    definition: str,
    *,
    name: str,
    uuid: str,
    disks: Mapping[str, tuple[str, str]],
    nvram_path: str | None,
    fresh_macs: bool,
) -> str:
    """`definition` for a machine `name` with `uuid` on restored `disks` (target → path and format).

    Other disks are left out and drives are emptied: their images may be gone, or be somebody's. `fresh_macs` is for a
    machine that may live beside its original: MAC addresses, host interfaces' names, fixed console ports and vsock
    numbers are left for libvirt to choose. The NVRAM goes to `nvram_path`, or where libvirt chooses. A generation id
    is always new, as its specification asks after a restore. TPM state is untouched.
    """
    if not definition.lstrip().startswith("<"):
        raise UsageError(
            "the point is of a QEMU without libvirt, which libvirt cannot run",
            hint="name a hypervisor of that kind, or restore its disks: stillframe restore disk POINT DISK --to FILE",
        )
    root = xml.parse(definition)
    root.attrib.pop("id", None)
    _set_text(root, "name", name)
    _set_text(root, "uuid", uuid)
    for entry in root.iterfind("sysinfo/system/entry[@name='uuid']"):
        entry.text = uuid
    for old in [*root.findall("seclabel"), *root.findall("genid")]:
        root.remove(old)
        if old.tag == "genid":
            ET.SubElement(root, "genid")
    _place_nvram(root, nvram_path)
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
    _place_disks(devices, disks)
    for source in devices.iterfind("channel/source[@mode='bind']"):
        source.attrib.pop("path", None)
    if fresh_macs:
        _forget_addresses(devices)
    return ET.tostring(root, encoding="unicode")


def _set_text(root: ET.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ET.Element(tag)
        root.insert(0, element)
    element.text = text


def _place_nvram(root: ET.Element, path: str | None) -> None:
    os, nvram = root.find("os"), root.find("os/nvram")
    if os is None or nvram is None:
        return
    if path is None and "template" not in nvram.attrib:
        os.remove(nvram)
        return
    for child in list(nvram):
        nvram.remove(child)
    nvram.attrib.pop("type", None)
    nvram.text = path


def _place_disks(devices: ET.Element, disks: Mapping[str, tuple[str, str]]) -> None:
    placed = set()
    for element in devices.findall("disk"):
        target = element.find("target")
        name = target.get("dev", "") if target is not None else ""
        if name in disks:
            _place_disk(element, *disks[name])
            placed.add(name)
        elif element.get("device") in ("cdrom", "floppy"):
            _drop(element, "source", "backingStore", "mirror", "auth", "encryption")
            element.set("type", "file")
        else:
            devices.remove(element)
    for name in sorted(disks.keys() - placed):  # attached to the running machine only
        element = ET.SubElement(devices, "disk", type="file", device="disk")
        ET.SubElement(element, "target", dev=name, bus=_BUSES.get(name[:2], "virtio"))
        _place_disk(element, *disks[name])


def _place_disk(element: ET.Element, path: str, format: str) -> None:
    _drop(element, "source", "backingStore", "mirror", "auth", "encryption", "transient", "shareable", "readonly")
    element.set("type", "file")
    element.attrib.pop("snapshot", None)
    driver = element.find("driver")
    if driver is None:
        driver = ET.Element("driver", name="qemu")
        element.insert(0, driver)
    driver.set("type", format)
    element.insert(1, ET.Element("source", file=path))


def _drop(element: ET.Element, *tags: str) -> None:
    for tag in tags:
        for child in element.findall(tag):
            element.remove(child)


def _forget_addresses(devices: ET.Element) -> None:
    for interface in devices.iterfind("interface"):
        _drop(interface, "mac", "target")
    for graphics in devices.iterfind("graphics"):
        if graphics.get("port"):
            graphics.attrib.pop("port")
            graphics.attrib.pop("tlsPort", None)
            graphics.set("autoport", "yes")
    for cid in devices.iterfind("vsock/cid"):
        cid.attrib.pop("address", None)
        cid.set("auto", "yes")
    # Two machines cannot write one console file: virtlogd refuses to start the second.
    for console in (*devices.iterfind("serial"), *devices.iterfind("console"), *devices.iterfind("parallel")):
        _drop(console, "log")
        if console.get("type") == "file":
            console.set("type", "pty")
            _drop(console, "source")
