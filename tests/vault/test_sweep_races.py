"""The one interleaving that each rule of the protocol is for (FORMAT.md, "Condemned packs, and the sweep"), played on
purpose: the random plays meet some of them too seldom to be relied on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.vault.pictures import BLOCK, KEY, backup, image, point_of, read_disk, store_disk
from tests.vault.stepped import Actor, MemoryStore
from workers.contract.seams import Store
from workers.vault import MapWriter, Vault
from workers.vault.condemned import condemn
from workers.vault.sealing import encode_plain
from workers.vault.sweep import Settings, sweep

NOW = datetime.now(UTC)


class Hosts:
    """Vaults on several hosts over one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = MemoryStore(folder)
        Vault.create(self.store, key=KEY, cache_dir=folder / "first")[0].close()

    def vault(self, host: str, store: Store | None = None) -> Vault:
        return Vault.open(store or self.store, key=KEY, cache_dir=self.folder / host)

    def actor(self, host: str, work: Callable[[Vault], object]) -> Actor:
        def run(store: Store) -> None:
            work(self.vault(host, store))

        return Actor(host, self.store, run)

    def sweeper(self, host: str) -> Actor:
        return self.actor(host, lambda vault: sweep(vault, now=NOW, settings=Settings(empty=True, compact=False)))

    def content(self) -> dict[str, bytes]:
        vault = self.vault(f"fresh-{len(list(self.folder.iterdir()))}")
        return {point.id: read_disk(vault, point.disks[0]) for point in vault.points()}

    def names(self, prefix: str) -> list[str]:
        return [info.name for info in self.store.list(prefix)]


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path)


def until(actor: Actor, call: str, times: int = 1) -> None:
    """Move `actor` on until it has made such a call; `call` is its beginning."""
    while sum(made.startswith(call) for made in actor.calls) < times:
        assert not actor.ended, actor.calls
        actor.step()


def before(actor: Actor, call: str) -> None:
    """Move `actor` on until such a call is the next one that it makes."""
    while not actor.waits_for.startswith(call):
        assert not actor.ended, actor.calls
        actor.step()


def put(vault: Vault, letter: str) -> bytes:
    with vault.writer() as writer:
        id = writer.put(image(letter))
        writer.finish()
    return id


def two_copies(hosts: Hosts) -> tuple[bytes, bytes]:
    """A point that needs block A, of which there are two copies, alone in their packs: the packs' digests."""
    one, other = hosts.vault("one"), hosts.vault("other")
    with one.writer() as first, other.writer() as second:
        for writer in (first, second):
            id = writer.put(image("A"))
            writer.finish()
    backup(one, "p1", {"vda": "AB"})
    x, y = sorted(bytes.fromhex(copy.pack.removeprefix("packs/")) for copy in one.index.find(id))
    return x, y


def test_two_sweeps_with_one_copy_each(hosts: Hosts) -> None:
    """Step 2, condemnations: the other's copy does not count, or both go."""
    x, y = two_copies(hosts)
    vault = hosts.vault("one")
    names = [condemn(vault.store, vault.keys, [digest]) for digest in (x, y)]
    first = hosts.sweeper("h1")
    before(first, "delete packs/")
    second = hosts.sweeper("h2")
    second.run()
    first.run()
    assert hosts.content() == {"p1": image("AB")}
    assert len(hosts.names("packs/")) == 2
    assert not {*names} & {*hosts.names("condemned/")}


def condemn_after(vault: Vault, first: str, pack: bytes) -> str:
    """A condemnation that sweeps come to after `first`."""
    while (name := condemn(vault.store, vault.keys, [pack])) < first:
        vault.store.delete(name)
    return name


def test_a_verdict_counts_once(hosts: Hosts) -> None:
    """Step 4: who is late acts on the verdict that is there, whatever it found itself."""
    x, y = two_copies(hosts)
    vault = hosts.vault("one")
    first = condemn(vault.store, vault.keys, [x])
    late = hosts.sweeper("h1")
    before(late, "put verdicts/")  # it has found x dead, since y is there
    condemn_after(vault, first, y)
    quick = hosts.sweeper("h2")
    before(quick, f"delete {first}")  # it has said that x is needed, since y is condemned
    while not late.ended and f"list {first}" not in late.calls:  # it would do that to act on its own verdict
        late.step()
    quick.run()  # y is dead, since x is there
    late.run()
    assert hosts.content() == {"p1": image("AB")}


def test_a_verdict_after_its_condemnation_is_void(hosts: Hosts) -> None:
    x, y = two_copies(hosts)
    vault = hosts.vault("one")
    first = condemn(vault.store, vault.keys, [x])
    late = hosts.sweeper("h1")
    before(late, "put verdicts/")
    condemn_after(vault, first, y)
    hosts.sweeper("h2").run()
    assert f"packs/{y.hex()}" not in hosts.names("packs/")
    late.run()
    assert hosts.content() == {"p1": image("AB")}
    assert hosts.names("verdicts/") == []


def test_a_writer_lists_condemnations_before_packs(hosts: Hosts) -> None:
    """Between the two listings a sweep may remove a pack and its condemnation."""
    vault = hosts.vault("one")
    put(vault, "A")
    [pack] = hosts.names("packs/")
    condemn(vault.store, vault.keys, [bytes.fromhex(pack.removeprefix("packs/"))])

    def work(vault: Vault) -> None:
        vault.announce("job", "p1")
        backup(vault, "p1", {"vda": "A"})

    writer = hosts.actor("h1", work)
    while not {"list packs/"} & {*writer.calls} and writer.calls.count("list condemned/") < 2:
        writer.step()
    hosts.sweeper("h2").run()
    assert pack not in hosts.names("packs/")
    writer.run()
    assert hosts.content() == {"p1": image("A")}


def test_a_segment_that_names_a_missing_pack_is_not_believed(hosts: Hosts) -> None:
    """As it is left where two sweeps rewrite segments at once, or where a pack is lost."""
    vault = hosts.vault("one")
    put(vault, "A")
    [pack] = hosts.names("packs/")
    hosts.store.delete(pack)
    backup(hosts.vault("two"), "p1", {"vda": "A"})
    assert hosts.content() == {"p1": image("A")}
    assert sweep(vault, now=NOW, settings=Settings(empty=True)).removed == 0
    assert vault.index.packs() == hosts.names("packs/")


def test_a_base_that_is_going_is_not_read(hosts: Hosts) -> None:
    vault = hosts.vault("one")
    backup(vault, "p1", {"vda": "A"})
    assert vault.readable("p1")
    hosts.store.put("trash/p1.1", encode_plain({"point": "p1"}))
    assert vault.readable("p1")
    hosts.store.put("trash/p1.1.end", encode_plain({"outcome": "restored"}))
    assert vault.readable("p1")
    hosts.store.put("trash/p1.2.end", encode_plain({"outcome": "final"}))
    assert not vault.readable("p1")
    assert not vault.readable("p2")
    vault.settle("p3")
    assert not vault.readable("p3")


def test_a_pack_that_is_new_to_a_sweep_stays_in_the_index(hosts: Hosts) -> None:
    """It was listed neither as a pack nor as needed, but a segment names it."""
    vault = hosts.vault("one")
    backup(vault, "p1", {"vda": "A"})
    sweeper = hosts.sweeper("h1")
    until(sweeper, "list packs/")

    def work(vault: Vault) -> None:
        vault.announce("job", "p2")
        vault.commit(point_of("p2", [store_disk(vault, "vda", "B", None)]))

    writer = hosts.actor("h2", work)
    before(writer, "put points/p2")
    sweeper.run()
    writer.run()
    assert hosts.content() == {"p1": image("A"), "p2": image("B")}


def test_a_point_that_is_committed_during_the_marking(hosts: Hosts) -> None:
    """By a session that began before the condemnation: its end is waited for, then its point is among those listed."""
    vault = hosts.vault("one")
    put(vault, "A")

    def work(vault: Vault) -> None:
        vault.announce("job", "p1")
        with vault.writer() as writer:
            blocks = MapWriter(writer, vault.reader(), BLOCK, BLOCK, None)
            blocks.set(0, writer.put(image("A")))
            root = blocks.finish()
            writer.finish()
        [disk] = point_of("x", [store_disk(vault, "vda", "A", None)]).disks
        vault.commit(point_of("p1", [disk.model_copy(update={"root": root.hex()})]))
        vault.withdraw("job")

    writer = hosts.actor("h1", work)
    before(writer, "put points/p1")
    sweeper = hosts.sweeper("h2")
    until(sweeper, "put condemned/")
    writer.run()
    sweeper.run()
    assert hosts.content() == {"p1": image("A")}
