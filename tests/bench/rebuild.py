"""How long it takes to get index and catalog back from nothing but the packs and manifests of a vault.

    python -m tests.bench.rebuild [--blocks 200000] [--points 100] [--folder /dev/shm]

The vault is synthetic: small blocks of random bytes, as many in each pack as real ones of 256 KiB fill it with, so that
what is measured (packs opened, footers read, entries written, manifests read) is what a vault of that many blocks has.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from orchestrator.catalog.store import Catalog
from orchestrator.config import load_config
from orchestrator.service import Service
from tests.vault.pictures import point_of
from workers.context import Context
from workers.contract.points import DiskPoint, Mode
from workers.vault import MapWriter, Vault

BLOCK = 512
"""Bytes of a block here."""
PER_PACK = 256
"""Blocks of 256 KiB that fill a pack of 64 MiB."""


def build(vault: Vault, blocks: int, points: int) -> None:
    """One disk per point, whose blocks are its own: together `blocks` different ones."""
    chance, each = random.Random(4), blocks // points
    for number in range(points):
        with vault.writer(pack_size=PER_PACK * (BLOCK + 16)) as writer:
            pages = MapWriter(writer, vault.reader(), each * BLOCK, BLOCK, None)
            for at in range(each):
                pages.set(at, writer.put(memoryview(chance.randbytes(BLOCK))))
            root = pages.finish()
            writer.finish()
        disk = DiskPoint(
            target="vda",
            source="/images/vda",
            format="qcow2",
            identity="i",
            capacity=each * BLOCK,
            block_size=BLOCK,
            root=root.hex(),
            mode=Mode.FULL,
            reason="a bench",
            checkpoint=None,
        )
        point = point_of(f"{number:032x}", [disk])
        vault.commit(point.model_copy(update={"time": point.time + timedelta(hours=number)}))


def measure(folder: Path, blocks: int, points: int) -> None:
    file = folder / "stillframe.toml"
    file.write_text('[paths]\nstate = "state"\n[vaults.main]\nurl = "file://./vault"\nkey_file = "main.key"\n')
    config = load_config(file)
    with Service(config, Catalog.open(config.catalog_url)) as service:
        service.init_vault("main")
        vault = Context(config.worker).vault("main")
        started = time.perf_counter()
        build(vault, blocks, points)
        print(f"made: {blocks} blocks, {points} points in {time.perf_counter() - started:.1f} s")
        for info in list(vault.store.list("index/")):
            vault.store.delete(info.name)
        done = service.rebuild_index("main")
        rate = done.entries / done.seconds
        print(
            f"rebuild-index: {done.entries} entries of {done.packs} packs in {done.seconds:.2f} s, {rate:,.0f} a second"
        )
        started = time.perf_counter()
        found = service.rebuild_catalog("main")
        seconds = time.perf_counter() - started
        print(f"rebuild-catalog: {found} points in {seconds:.2f} s, {found / seconds:,.0f} a second")
        assert done.entries >= blocks
        assert found == points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=200_000)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        measure(Path(folder), chosen.blocks, chosen.points)


if __name__ == "__main__":
    main()
