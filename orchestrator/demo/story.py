"""The story of `./deploy/quickstart`, told with the product's own service: nothing here knows how a backup works.

Every step can be repeated: after a run that was interrupted, or for a second run, what is there is used, and the vault
with its points is kept.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from orchestrator.cli.output import size
from orchestrator.config import load_config
from orchestrator.demo.host import connect
from orchestrator.demo.in_guest import guest_hashes, guest_out, wait_for_agent
from orchestrator.demo.place import DEFAULT, Place
from orchestrator.demo.stage import Stage
from orchestrator.service import Service
from orchestrator.views import JobView, PointView
from workers.contract.errors import StillframeError

if TYPE_CHECKING:
    import libvirt

# Between the two backups: a new file on each disk, a file changed in its middle, one removed, one renamed.
CHANGES = """set -e
dd if=/dev/urandom of=/data/vda/orders-$(date +%s).db bs=1M count=12 2>/dev/null
dd if=/dev/urandom of=/data/vdb/database.bin bs=1M seek=20 count=4 conv=notrunc 2>/dev/null
rm -f /data/vda/site/this.py
mv /data/vda/site/abc.py /data/vda/site/abc-renamed.py 2>/dev/null || :
date > /data/vda/changed-at.txt
sync
"""


class DemoFailed(StillframeError):
    """The demo ended otherwise than it should."""


class Story:
    """One run of the demo in `place`."""

    def __init__(self, place: Place, stage: Stage) -> None:
        self._place = place
        self._stage = stage

    def tell(self) -> int:
        """The whole story; 0 if the restored machine's files are those of the original. Raises StillframeError."""
        stage, place = self._stage, self._place
        stage.say(f"[bold]Stillframe demo[/] in {place.root}")
        place.make()
        connection = connect()
        try:
            place.drop_restored(connection)
            web = self._machine(connection)
            with Service.open(load_config(place.config)) as service:
                points, same = self._backups_and_restore(service, connection, web)
        finally:
            connection.close()
        stage.points(points)
        self._next(points[-1])
        stage.record("demo", {"ok": same, "seconds": round(stage.seconds, 1), "directory": str(place.root)})
        return 0 if same else 1

    def _machine(self, connection: libvirt.virConnect) -> libvirt.virDomain:
        with self._stage.step(
            "A real machine: Linux with its guest agent, two disks", f"virsh start {self._place.machine}"
        ) as done:
            web = self._place.web(connection)
            if not web.isActive():
                web.create()
            seconds = wait_for_agent(web)
            guest_out(web, "mount-data")
            done.append(f"{self._place.machine} is up, its agent answered after {seconds:.1f} s")
        return web

    def _backups_and_restore(
        self, service: Service, connection: libvirt.virConnect, web: libvirt.virDomain
    ) -> tuple[list[PointView], bool]:
        with self._stage.step("A vault with its key", "stillframe init") as done:
            phrase = service.init_vault("main")
            if phrase is not None:
                self._place.write_phrase(phrase)
            made = f"encrypted vault, recovery phrase in {self._place.phrase.name}" if phrase else "kept as it was"
            done.append(f"{self._place.root / 'vault'}: {made}")
        with self._stage.step("Stillframe sees the machine", f"stillframe vm show {self._place.machine}") as done:
            for disk in service.machine(self._place.machine).disks:
                done.append(f"{disk.target}  {disk.format}  {size(disk.capacity)}  {disk.source}")
        first = self._backup(service, "Full backup, while it runs", full=True)
        with self._stage.step("Files are written, changed and removed in the guest") as done:
            guest_out(web, CHANGES)
            before = guest_hashes(web)
            done.append(f"{len(before)} files, hashed from inside")
        second = self._backup(service, "Incremental backup", full=False)
        self._restore(service, second)
        return [first, second], self._compare(connection, before)

    def _backup(self, service: Service, title: str, *, full: bool) -> PointView:
        command = f"stillframe backup run {self._place.machine}{' --full' if full else ''}"
        with self._stage.step(title, command) as done:
            view = self._wait(service, service.start_backup(self._place.machine, full=full))
            point = service.point(str(view.point))
            for disk in point.disks:
                done.append(
                    f"{disk.target} {disk.mode.value}: read {size(disk.read_bytes)}, "
                    f"stored {size(disk.stored_bytes)} ({disk.reason})"
                )
            frozen = f", file systems frozen for {point.frozen_ms} ms" if point.frozen_ms is not None else ""
            done.append(f"point {point.id[:8]}: {point.consistency.value} consistency{frozen}")
            done.extend(f"warning: {warning}" for warning in view.warnings)
        return point

    def _restore(self, service: Service, point: PointView) -> None:
        place = self._place
        command = f"stillframe restore vm {place.machine}@latest --name {place.copy} --dir {place.restored} --start"
        with self._stage.step("Restored from the vault as a new machine", command) as done:
            job = service.start_restore_machine(
                point.id, name=self._place.copy, directory=self._place.restored, start=True
            )
            view = self._wait(service, job)
            for target, file in dict(view.result.get("files") or {}).items():
                done.append(f"{target} → {file}")
            done.append(f"{self._place.copy}, UUID {view.result.get('uuid')}")

    def _compare(self, connection: libvirt.virConnect, before: dict[str, str]) -> bool:
        with self._stage.step("The restored machine boots; its files are hashed from inside") as done:
            restored = connection.lookupByName(self._place.copy)
            seconds = wait_for_agent(restored)
            after = guest_hashes(restored)
            wrong = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
            if wrong:
                done.append(f"DIFFERENT: {len(wrong)} of {len(before)} files, the first is {wrong[0]}")
            else:
                done.append(f"up after {seconds:.1f} s; all {len(before)} files are the same, bit for bit")
        return not wrong

    def _wait(self, service: Service, job: str) -> JobView:
        with self._stage.follower() as watcher:
            view = service.wait(job, on_progress=watcher.update)
        if view.error is not None:
            raise DemoFailed(f"{view.kind} of {view.machine}: {view.error.message}", hint=view.error.hint)
        return view

    def _next(self, point: PointView) -> None:
        stage, place = self._stage, self._place
        program = "stillframe" if shutil.which("stillframe") else os.path.relpath(sys.argv[0])
        stage.say(f"\nDone in {stage.seconds:.0f} s. Both machines run; play with them:\n")
        stage.command(f"export STILLFRAME_CONFIG={place.config}")
        for command, remark in (
            (f"backup run {place.machine}", "again: only what changed"),
            (f"point list {place.machine}", "all points"),
            (f"restore disk {point.id[:8]} vda --to /tmp/vda.qcow2", "one disk"),
            ("vault verify --full", "every byte of the vault"),
            ("doctor", "what else to look at"),
        ):
            stage.command(f"{program} {command}", remark)
        where = f" --dir {place.root}" if place.root != DEFAULT else ""
        stage.command(f"{program} demo --clean{where}", "remove all of it")
