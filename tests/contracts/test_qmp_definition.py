"""A QEMU's command line read and rewritten: every way to write an image, hostile names, and what is refused. Pure."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.contract.errors import UsageError
from workers.contract.seams import NewMachine
from workers.hypervisors import command_line, domain_xml, qmp_definition
from workers.hypervisors.command_line import Option
from workers.hypervisors.qmp_definition import Definition, Image

OLD, NEW = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"
SOCKETS = Path("/run/qemu")
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
WAYS = [
    "-drive file=a.qcow2,if=virtio,format=qcow2",
    "-hda a.qcow2",
    "a.qcow2",
    "-blockdev driver=file,filename=a.qcow2,node-name=f -blockdev driver=qcow2,file=f,node-name=n",
    """-blockdev '{"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "a.qcow2"}}'""",
    "-drive file.driver=file,file.filename=/vm/a.qcow2,if=virtio",
]


def definition(arguments: str, **images: Image) -> Definition:
    return Definition(
        name="web",
        uuid=OLD,
        program="/usr/bin/qemu-system-x86_64",
        arguments=shlex.split(arguments),
        folder="/vm",
        monitor="/run/qemu/web.sock",
        images=images or {"vda": Image(names=["a.qcow2", "/vm/a.qcow2"], format="qcow2")},
    )


def machine(*, name: str = "copy", path: str = "/new/a.qcow2", fresh: bool = True, format: str = "qcow2") -> NewMachine:
    return NewMachine(name, NEW if fresh else OLD, {"vda": (path, format)}, None, fresh)


def rewritten(old: Definition, new: NewMachine) -> Definition:
    return qmp_definition.read(qmp_definition.restored(old.model_dump_json(), new, SOCKETS))


class TestFields:
    @given(st.lists(st.tuples(words.filter(lambda word: not {"=", ","} & {*word}), st.none() | words), min_size=1))
    def test_what_is_joined_is_read_again(self, pairs: list[tuple[str, str | None]]) -> None:
        assert command_line.fields(command_line.joined(pairs)) == pairs

    def test_flags_take_no_value_and_images_no_option(self) -> None:
        found = command_line.parse(["-S", "-name", "-odd", "disk.img", "--snapshot", "-hda", "x"])
        assert [(option.name, option.value) for option in found] == [
            ("S", None),
            ("name", "-odd"),
            ("", "disk.img"),
            ("snapshot", None),
            ("hda", "x"),
        ]
        assert command_line.words(found)[:3] == ["-S", "-name", "-odd"]
        with pytest.raises(UsageError, match="wants a value"):
            command_line.parse(["-hda"])

    def test_monitors_and_other_sockets_are_told_apart(self) -> None:
        options = command_line.parse(
            shlex.split(
                "-qmp unix:/q.sock,server,nowait -chardev socket,path=/m.sock,server=on,wait=off,id=mon "
                "-mon chardev=mon,mode=control -chardev socket,path=/qga.sock,server=on,wait=off,id=qga "
                "-chardev socket,path=/tpm.sock,id=tpm -serial unix:/s.sock,server=on -serial unix:/theirs.sock "
                "-vnc unix:/v.sock -monitor stdio -pidfile /p -serial mon:stdio"
            )
        )
        assert command_line.monitor_paths(options) == {"/q.sock", "/m.sock"}
        assert command_line.made(options) == {"/q.sock", "/m.sock", "/qga.sock", "/s.sock", "/v.sock", "/p"}


class TestRestored:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("path", ["/new/a.qcow2", "/new, or 'not'/a\"=b\n.qcow2"])
    def test_every_way_to_name_an_image(self, way: str, path: str) -> None:
        found = rewritten(definition(way), machine(path=path))
        seen: list[str] = []
        for option in command_line.parse(found.arguments):
            command_line.images(option, lambda image: seen.append(image) or image)  # type: ignore[func-returns-value]
        assert path in seen
        assert "a.qcow2" not in seen
        assert found.images == {"vda": Image(names=[path], format="qcow2")}

    def test_a_copy_shares_nothing_with_its_original(self) -> None:
        found = rewritten(
            definition(
                "-uuid 11111111-2222-3333-4444-555555555555 -name guest=web,debug-threads=on -hda a.qcow2 -S "
                "-nographic -qmp unix:/run/qemu/web.sock,server=on,wait=off -pidfile web.pid -serial mon:stdio "
                "-incoming tcp:0:1 "
                "-smbios type=1,uuid=11111111-2222-3333-4444-555555555555 -nic user,mac=52:54:00:00:00:01 "
                "-chardev socket,path=/run/web.qga,server=on,wait=off,id=qga0 -chardev file,path=/log/web.qga,id=log "
                """-device '{"driver": "virtio-net-pci", "mac": "52:54:00:00:00:02"}' -D /log/web.qga"""
            ),
            machine(),
        )
        line = shlex.join(found.arguments)
        for gone in (
            OLD,
            "/run/qemu/web.sock",
            "/run/web.qga,",
            "/log/",
            "52:54:00:00:00:0",
            "-S",
            "incoming",
            "stdio",
        ):
            assert gone not in line
        assert "-qmp unix:/run/qemu/copy.sock,server=on,wait=off" in line
        assert "guest=copy,debug-threads=on" in line
        assert "path=/run/qemu/copy-web.qga," in line
        assert "path=/run/qemu/copy-2-web.qga," in line
        assert f"type=1,uuid={NEW}" in line
        assert line.count("-daemonize") == 1
        assert "-display none" in line
        assert (found.name, found.uuid, found.monitor, found.place) == ("copy", NEW, "/run/qemu/copy.sock", "/new")

    def test_one_that_takes_its_place_keeps_its_sockets_and_addresses(self) -> None:
        old = definition("-hda a.qcow2 -qmp unix:/run/qemu/web.sock,server=on -nic user,mac=52:54:00:00:00:01")
        line = shlex.join(rewritten(old, machine(name="web", fresh=False)).arguments)
        assert line.count("/run/qemu/web.sock") == 1
        assert "52:54:00:00:00:01" in line

    def test_a_machine_without_a_monitor_of_its_own_gets_one(self) -> None:
        found = rewritten(definition("-hda a.qcow2"), machine(name="a,b"))
        assert found.arguments[-3:-1] == ["-qmp", "unix:/run/qemu/a,,b.sock,server=on,wait=off"]

    def test_what_is_not_in_the_point_is_left_out_unless_it_is_only_read(self) -> None:
        old = definition(
            "-hda a.qcow2 -drive file=b.raw,if=none,id=two -device virtio-blk-pci,drive=two,id=vdb "
            "-blockdev driver=file,filename=/c,node-name=cf -blockdev driver=raw,file=cf,node-name=cn "
            """-device '{"driver": "scsi-hd", "drive": "cn"}' -cdrom boot.iso""",
            vda=Image(names=["a.qcow2"], format="qcow2"),
            vdb=Image(names=["b.raw"], format="raw"),
            vdc=Image(names=["/c"], format="raw"),
            cd=Image(names=["boot.iso"], format="raw", read_only=True),
        )
        found = rewritten(old, machine())
        assert found.arguments[:4] == ["-name", "guest=copy", "-uuid", NEW]
        assert found.arguments[4:8] == ["-hda", "/new/a.qcow2", "-cdrom", "boot.iso"]
        assert sorted(found.images) == ["cd", "vda"]

    def test_its_firmware_variables_are_its_own(self) -> None:
        old = definition("-hda a.qcow2 -drive if=pflash,format=raw,unit=1,file=VARS.fd").model_copy(
            update={"nvram": Image(names=["VARS.fd", "/vm/VARS.fd"], format="raw")}
        )
        new = NewMachine("copy", NEW, {"vda": ("/new/a.qcow2", "qcow2")}, "/new/copy_VARS.fd", True)
        found = rewritten(old, new)
        assert "if=pflash,format=raw,unit=1,file=/new/copy_VARS.fd" in found.arguments
        with pytest.raises(UsageError, match="firmware variables"):
            rewritten(old, machine())

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            ("-hda a.qcow2 -netdev tap,id=n,fd=7", "file descriptor"),
            ("-hda /dev/fdset/3", "file descriptor"),
            ("-hda a.qcow2 -readconfig vm.cfg", "-readconfig"),
            ("-drive file=other.qcow2", "does not name the image"),
            ("", "does not name the image"),
            ("-drive file=a.qcow2,backing.file.filename=base.qcow2", "backing file"),
            ("-blockdev \"{'driver': 'qcow2'}\"", "no JSON"),
        ],
    )
    def test_what_cannot_be_brought_back_is_refused(self, arguments: str, why: str) -> None:
        with pytest.raises(UsageError, match=why):
            rewritten(definition(arguments), machine())

    def test_other_refusals(self) -> None:
        with pytest.raises(UsageError, match="is qcow2 for its command line"):
            rewritten(definition("-hda a.qcow2"), machine(format="raw"))
        with pytest.raises(UsageError, match="too long"):
            rewritten(definition("-hda a.qcow2 -pidfile p"), machine(name="x" * 120))
        with pytest.raises(UsageError, match="of libvirt's") as caught:
            qmp_definition.read("<domain/>")
        assert "restore disk" in caught.value.hint
        with pytest.raises(UsageError, match="cannot be read"):
            qmp_definition.read('{"kind": "qemu-command-line", "version": 2}')
        with pytest.raises(UsageError, match="without libvirt"):
            domain_xml.restored(
                definition("").model_dump_json(), name="x", uuid=NEW, disks={}, nvram_path=None, fresh_macs=True
            )


def test_the_script_says_what_was_meant(tmp_path: Path) -> None:
    """Every word reaches QEMU as it is, and nothing else is run."""
    program = tmp_path / "it's a $(touch pwned) program"
    program.write_text('#!/bin/sh\npwd; for word; do printf "%s\\0" "$word"; done\n')
    program.chmod(0o700)
    arguments = ["-name", "guest=$(touch pwned)`touch pwned`'\"\n; touch pwned", "-hda", "", "a b"]
    shown = definition("").model_copy(
        update={"program": str(program), "arguments": arguments, "folder": str(tmp_path), "name": "x\ntouch pwned"}
    )
    done = subprocess.run(["/bin/sh", "-c", qmp_definition.script(shown)], capture_output=True, text=True, check=True)
    folder, _, rest = done.stdout.partition("\n")
    assert (folder, rest.split("\0")[:-1]) == (str(tmp_path), arguments)
    assert not (tmp_path / "pwned").exists()
    assert json.loads(shown.model_dump_json())["version"] == 1
    assert Option("S").words() == ["-S"]
