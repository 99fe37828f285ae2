"""Random generations of a real machine on real QEMU: whatever happens to its disks, its bitmaps and its backups, every
point that was committed is restored byte for byte; also with the catalog lost, and with the index rebuilt from packs.

The seed is printed; set STILLFRAME_MODEL_SEED to play one again, STILLFRAME_MODEL_GENERATIONS for a longer play."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from orchestrator.config import load_config
from orchestrator.service import JobView, Service
from tests.guests.machines import MIB
from tests.model.machine import CHUNK, ModelMachine, Picture
from tests.model.test_generations_memory import memory_folder
from workers.key_sources import secrets_of
from workers.vault import Vault, open_store
from workers.vault.rebuild import rebuild_index

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

CONFIG = """
[catalog]
url = "sqlite:///{folder}/catalog.db"
[vaults.main]
url = "file://{folder}/vault"
key_file = "{folder}/key"
[hypervisors.lab]
uri = "qemu:///system"
[backup]
consistency = "crash"
block_sizes = {{ "*/vda" = "64KiB", "*/vdc" = "256KiB", "*/vdd" = "64KiB" }}
scratch_floor = "{floor}"
[paths]
state = "{folder}"
scratch = "{folder}/scratch"
runtime = "{folder}/run"
cache = "{folder}/cache"
"""
PLUGGED = ["vde", "vdf"]


def test_every_point_of_a_real_machine_is_restored(libvirt_host: libvirt.virConnect) -> None:
    seed = int(os.environ.get("STILLFRAME_MODEL_SEED") or random.SystemRandom().randrange(1 << 32))
    generations = int(os.environ.get("STILLFRAME_MODEL_GENERATIONS") or 25)
    print(f"STILLFRAME_MODEL_SEED={seed}")
    with memory_folder() as folder:
        folder.chmod(0o755)
        play = Play(libvirt_host, folder, random.Random(seed))
        try:
            for number in range(generations):
                play.generation(number)
            play.settle_down()
            play.finish()
            print(dict(play.seen))
        finally:
            play.close()


class Play:
    """The machine, its backups, and what each point must hold."""

    def __init__(self, connection: libvirt.virConnect, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.truth: dict[str, dict[str, Picture]] = {}
        self.cut: set[str] = set()
        """Targets that shrank and grew since the last point: their bitmap cannot know."""
        self.off = 0
        """For how many generations the machine has been off."""
        self.seen: Counter[str] = Counter()
        self.config = self._written("stillframe.toml", "1MiB")
        self.tight = self._written("tight.toml", "1000TiB")
        self.service = Service.open(load_config(self.config))
        self.service.init_vault("main")
        self.machine = ModelMachine.define(connection, folder)
        for target, size, format in (
            ("vda", 24, "qcow2"),
            ("vdb", 32, "qcow2"),
            ("vdc", 16, "qcow2"),
            ("vdd", 8, "raw"),
        ):
            self.machine.add(target, size * MIB + rng.choice([0, 512, CHUNK]), format)
        self.machine.start()
        for target in self.machine.disks:
            self.do_fill(target, 40)

    def _written(self, name: str, floor: str) -> Path:
        path = self.folder / name
        path.write_text(CONFIG.format(folder=self.folder, floor=floor))
        return path

    def close(self) -> None:
        self.service.close()
        self.machine.remove()

    # --- what happens to the machine -------------------------------------------------------------------------------

    def generation(self, number: int) -> None:
        """A few things happen, then a backup, which may fail."""
        told = [self.happen() for _ in range(self.rng.randint(1, 5))]
        self.off = 0 if self.machine.on else self.off + 1
        if self.off == 3:  # what is off for long is dull
            told.append(self.power(""))
        for target in self.machine.disks:
            assert not self.machine.difference(target), f"the picture of {target} is wrong after {told}"
        run = self.rng.choices([self.good, self.full, self.failing], [12, 1, 5])[0]
        print(f"generation {number}, {'on' if self.machine.on else 'off'}: {', '.join(told)}: {run()}")

    def happen(self) -> str:
        target = self.rng.choice(sorted(self.machine.disks))
        what = self.rng.choices(
            [self.write, self.grow, self.cut_and_grow, self.shrink, self.power, self.kill, self.plug, self.lose],
            [24, 1, 1, 1, 4, 1, 1, 1],
        )[0]
        return what(target)

    def write(self, target: str) -> str:
        self.do_fill(target, 6)
        return f"{target} written"

    def do_fill(self, target: str, times: int, *, discard: bool = True) -> None:
        size, rng = self.machine.pictures[target].size, self.rng
        for _ in range(rng.randint(1, times)):
            start = rng.randrange(0, size, 512)
            length = min(rng.choice([512, 4096, CHUNK, 3 * CHUNK + 512, MIB]), size - start)
            what = rng.choice(["fill", "fill", "fill", "zero", "discard"])
            if what == "discard":
                start, length = start // CHUNK * CHUNK, length // CHUNK * CHUNK
                if length and discard and target != "vdd":
                    self.machine.discard(target, start, length)
            elif what == "zero":
                self.machine.zero(target, start, length)
            else:
                self.machine.fill(target, start, length, rng.randint(0, 255))

    def grow(self, target: str) -> str:
        return self._resized(target, self.rng.choice([512, CHUNK, MIB]))

    def shrink(self, target: str) -> str:
        return self._resized(target, -self.rng.choice([512, CHUNK, MIB]))

    def cut_and_grow(self, target: str) -> str:
        size = self.machine.pictures[target].size
        said = self._resized(target, -self.rng.choice([CHUNK, size // 4 // 512 * 512]))
        return said + self._resized(target, size - self.machine.pictures[target].size)

    def _resized(self, target: str, by: int) -> str:
        size = self.machine.pictures[target].size
        if by < 0:  # at a border of clusters: QEMU keeps what is beyond the end in the last one
            by = max((size + by) // CHUNK, 1) * CHUNK - size
        try:
            self.machine.resize(target, size + by)
        except (libvirt.libvirtError, subprocess.CalledProcessError):
            return f"{target} cannot be resized (a bitmap in use)"
        self.cut |= {target} if by < 0 else set()
        return f"{target} {by:+}"

    def power(self, _target: str) -> str:
        if self.machine.on:
            self.machine.stop()
            return "stopped"
        self.machine.start()
        return "started"

    def kill(self, _target: str) -> str:
        if not self.machine.on:
            return self.power("")
        self.machine.kill()
        return "killed"

    def plug(self, _target: str) -> str:
        there = [target for target in PLUGGED if target in self.machine.disks]
        if there and not self.machine.on:
            self.machine.remove_disk(there[0])
            return f"{there[0]} removed"
        free = [target for target in PLUGGED if target not in self.machine.disks]
        if free:
            self.machine.add(free[0], 4 * MIB)
            self.do_fill(free[0], 3)
        return f"plugged {free[:1]}"

    def lose(self, target: str) -> str:
        if self.machine.on or self.rng.random() < 0.5:
            self.machine.lose_metadata()
            return "libvirt lost the checkpoints"
        self.machine.lose_bitmaps(target)
        return f"{target} lost its bitmaps"

    # --- backups ---------------------------------------------------------------------------------------------------

    def good(self, *, full: bool = False) -> str:
        view = self._run(full=full)
        assert view.state == "succeeded", view
        return self._described(view)

    def full(self) -> str:
        return self.good(full=True)

    def failing(self) -> str:
        fault = self.rng.choice([self._without_space, self._without_packs, self._cancelled, self._killed])
        return f"{fault.__name__}: {fault()}"

    def settle_down(self) -> None:
        """Whatever has happened: a machine that runs on comes to incrementals, of every disk that tracks changes."""
        if not self.machine.on:
            self.machine.start()
        self.good()
        for target in self.machine.disks:
            self.do_fill(target, 2)
        view = self._run()
        modes = {disk["target"]: disk["mode"] for disk in view.disks}
        assert modes == {target: "full" if target == "vdd" else "incremental" for target in self.machine.disks}, view

    def _run(self, *, full: bool = False, cancel: bool = False) -> JobView:
        """One backup, with writes while the snapshot stands that the point must not see."""
        truth = {target: picture.copy() for target, picture in self.machine.pictures.items()}
        job = self.service.start_backup(self.machine.name, full=full)
        if cancel:
            self.service.cancel(job)
        written = False

        def write(view: JobView) -> None:
            nonlocal written
            if view.state in ("transferring", "committing") and self.machine.on and not written:
                written = True
                # QEMU ignores discards while a backup runs.
                self.do_fill(self.rng.choice(sorted(self.machine.disks)), 2, discard=False)

        view = self.service.wait(job, on_progress=write)
        assert not [text for text in view.warnings if "release failed" in text], view
        if view.state == "succeeded":
            assert view.point is not None
            self._committed(view.point, truth)
        return view

    def _committed(self, point: str, truth: dict[str, Picture]) -> None:
        found = self.service.point(point)
        assert {disk.target for disk in found.disks} == set(truth)
        self.truth[point] = truth
        for alert in found.alerts:
            assert alert.partition(":")[0] in self.cut, f"change tracking is said to have lied: {alert}"
        self.cut.clear()
        self.seen.update(str(disk.mode) for disk in found.disks)
        assert len(self.machine.checkpoints()) <= 1, self.machine.checkpoints()

    def _described(self, view: JobView) -> str:
        return "; ".join(f"{disk['target']} {disk['mode']} ({disk['reason']})" for disk in view.disks)

    def _without_space(self) -> str:
        if not self.machine.on:
            return "not while it is off"
        self.service.close()  # services of one process share its broker
        with Service.open(load_config(self.tight)) as self.service:
            view = self._run()
        self._reopened()
        assert view.error is not None
        assert view.error.code == "NoSpace", view
        return "failed"

    def _without_packs(self) -> str:
        """The vault's store breaks under the writers, after the snapshot was taken."""
        packs, away = self.folder / "vault" / "packs", self.folder / "packs.away"
        packs.mkdir(exist_ok=True)
        packs.rename(away)
        packs.write_text("in the way")
        try:
            view = self._run()
        finally:
            packs.unlink()
            away.rename(packs)
        assert view.state == "failed", view
        return str(view.error and view.error.message)

    def _cancelled(self) -> str:
        return str(self._run(cancel=True).state)

    def _killed(self) -> str:
        """The process of a backup is killed at any moment; the next start settles what it left."""
        truth = {target: picture.copy() for target, picture in self.machine.pictures.items()}
        before = {point.id for point in self.service.points()}
        program = "import sys; from orchestrator.cli.main import main; main()"
        argv = [sys.executable, "-c", program, "backup", "run", self.machine.name, "--config", str(self.config)]
        child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(self.rng.uniform(0.7, 2.2))  # waits for nothing: the moment is what is random
        child.send_signal(signal.SIGKILL)
        child.wait()
        settled = self.service.reconcile()
        for point in {point.id for point in self.service.points()} - before:
            self._committed(point, truth)
        assert len(self.machine.checkpoints()) <= 1, (settled, self.machine.checkpoints())
        return str(settled)

    # --- the truth -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Every point, three times: as it is, without the catalog, and with the index made again from packs."""
        self.machine.remove()  # a restore needs nothing of it
        self.check(random_formats=True)
        self._reopened("catalog.db", "catalog.db-wal", "catalog.db-shm")
        assert self.service.rebuild_catalog() == len(self.truth)
        self.check()
        self._reopened("vault/index", "cache")
        config = load_config(self.config).worker
        vault = Vault.open(
            open_store(config.vaults["main"].url),
            key=secrets_of("main", config.vaults["main"])[0],
            cache_dir=self.folder / "another",
        )
        assert rebuild_index(vault).entries > 0
        vault.close()
        self.check()

    def _reopened(self, *lost: str) -> None:
        self.service.close()
        for name in lost:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.service = Service.open(load_config(self.config))

    def check(self, *, random_formats: bool = False) -> None:
        assert {point.id for point in self.service.points()} == set(self.truth)
        for point, pictures in self.truth.items():
            for target, picture in pictures.items():
                as_qcow2 = random_formats and self.rng.random() < 0.2
                image = next(self._restored(point, target, "qcow2" if as_qcow2 else "raw"))
                wrong = picture.difference(image)
                assert not wrong, f"point {point[:8]} {target}: {wrong}"
                image.unlink()

    def _restored(self, point: str, target: str, format: str) -> Iterator[Path]:
        path = self.folder / f"restored.{format}"
        view = self.service.wait(self.service.start_restore_disk(point, target, to=path, format=format))
        assert view.state == "succeeded", view
        if format == "qcow2":
            raw = path.with_suffix(".raw")
            subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True)
            path.unlink()
            path = raw
        yield path
