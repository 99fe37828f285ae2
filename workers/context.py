"""Names in commands, resolved on this worker: vaults, hypervisors, and ways into guests. Opened once, when asked for.

This is where the parts of `workers` meet that do not know each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from workers.config import GuestAccess, WorkerConfig
from workers.contract.errors import GuestError, NotFound
from workers.contract.guests import GuestOs
from workers.contract.hosts import Host
from workers.contract.machines import MachineRef
from workers.contract.seams import GuestChannel, Hypervisor, Package
from workers.hosts import open_host
from workers.key_sources import secrets_of
from workers.quiesce import unfrozen
from workers.snapshot import Places

if TYPE_CHECKING:
    from workers.disks.pace import Bucket
    from workers.guests.ways import Connect
    from workers.vault import Vault
    from workers.visit import Visit


T = TypeVar("T")

FAR_SCRATCH = Path("/var/lib/stillframe/scratch")
FAR_RUNTIME = Path("/run/stillframe")


class Context:
    """Everything a task needs of its worker. Thread-safe; a connection is shared by all threads."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self._vaults: dict[str, Vault] = {}
        self._hypervisors: dict[str, Hypervisor] = {}
        self._hosts: dict[str, Host] = {}
        self._buckets: dict[str, Bucket] = {}
        self._connecting: dict[str, Lock] = {}
        self._lock = Lock()
        self._retired: list[Hypervisor | Host] = []

    def use(self, config: WorkerConfig) -> None:
        """From now on names mean what they mean in `config`. What is configured as before stays open, and what is not
        serves those that have it already."""
        with self._lock:
            old, self.config = self.config, config
            for name in [one for one in self._vaults if old.vaults.get(one) != config.vaults.get(one)]:
                del self._vaults[name]
            for opened in (self._hypervisors, self._hosts):
                for name in [one for one in opened if old.hypervisors.get(one) != config.hypervisors.get(one)]:
                    self._retired.append(opened.pop(name))
            self._buckets.clear()

    def vault(self, name: str) -> Vault:
        """Raises NotFound for a name that is not configured, VaultMissing, WrongKey, NewerFormat."""
        from workers.vault import Vault
        from workers.vault.places import open_place

        with self._lock:
            if name not in self._vaults:
                wanted = _named(self.config.vaults, name, "vault")
                store = open_place(wanted)  # first: where no vault is, a missing key is not the news
                key, passphrase = secrets_of(name, wanted)
                # A replica has the id of its original, and not always the same segments: a look-up cache of its own.
                cache = self.config.cache_dir / "replicas" / name if wanted.replica_of else self.config.cache_dir
                self._vaults[name] = Vault.open(store, key=key, passphrase=passphrase, cache_dir=cache)
            return self._vaults[name]

    def require_hypervisor(self, name: str) -> None:
        """Raises NotFound for a name that is not configured."""
        _named(self.config.hypervisors, name, "hypervisor")

    def host(self, name: str) -> Host:
        """Where that hypervisor runs. Raises NotFound for a name that is not configured."""
        with self._lock:
            if name not in self._hosts:
                wanted = _named(self.config.hypervisors, name, "hypervisor")
                self._hosts[name] = open_host(wanted, name=name, runtime_dir=self.config.runtime_dir)
            return self._hosts[name]

    def hypervisor(self, name: str) -> Hypervisor:
        """Raises NotFound for a name that is not configured, HypervisorUnreachable."""
        from workers.hypervisors import open_hypervisor

        wanted = _named(self.config.hypervisors, name, "hypervisor")
        with self._lock:
            connecting = self._connecting.setdefault(name, Lock())
        with connecting:  # one that does not answer keeps nobody from the others
            if name not in self._hypervisors:
                places = self.places(name)
                self._hypervisors[name] = open_hypervisor(
                    wanted.uri, name=name, runtime_dir=places.runtime, host=places.host
                )
            return self._hypervisors[name]

    def blind_to_off(self) -> list[str]:
        """Names of hypervisors, of those connected to, that do not know machines that are off."""
        with self._lock:
            return sorted(name for name, one in self._hypervisors.items() if not one.features.knows_off)

    @contextmanager
    def visit(self, machine: MachineRef, job: str, *, rescue: bool = False) -> Iterator[Visit]:
        """A visit to the guest of `machine`; `job` marks what is left in it. That nobody can get in is no error: the
        visit says so. `rescue`: to thaw; otherwise a freeze that is found in the way is waited for, and ended, since a
        frozen agent runs nothing. Raises NotFound, HypervisorError."""
        from workers.guests.agent import AgentChannel
        from workers.guests.ways import open_ways
        from workers.visit import Visit

        access = self.access(machine)
        hypervisor = self.hypervisor(machine.hypervisor)
        agent = AgentChannel(hypervisor.agent_command(machine.uuid))
        found = ""
        if not rescue:
            with suppress(GuestError):  # whether it answers at all, the ways say
                found = unfrozen(agent)
        with open_ways(access, agent, self._connect(machine, access), job=job) as ways:
            yield Visit(
                ways,
                machine.uuid,
                self._newest_package,
                off=self._why_off(access),
                found=found,
                thaw_command=tuple(hypervisor.thaw_command(machine.uuid)) if ways.agent_freezes else (),
            )

    def _why_off(self, access: GuestAccess) -> str:
        if self.config.extension is None:
            return "the configuration says install = false under [extension]"
        if not access.extension:
            return f'the configuration says extension = false under [guests."{access.machines}"]'
        return ""

    def _newest_package(self, os: GuestOs) -> Package | None:
        from workers.guests.package import newest_package

        wanted = self.config.extension
        if wanted is None or wanted.public_key is None:
            return None
        return newest_package(wanted.packages, wanted.public_key, os)

    def access(self, machine: MachineRef) -> GuestAccess:
        """How to get into a guest: the first section that fits."""
        for access in self.config.guests:
            name = f"{machine.hypervisor}/{machine.name}" if "/" in access.machines else machine.name
            if fnmatchcase(name, access.machines):
                return access
        return GuestAccess(machines="*")

    def _connect(self, machine: MachineRef, access: GuestAccess) -> Connect:
        def connect(address: str, key: bytes | None) -> GuestChannel:
            from workers.guests.host_keys import host_key_policy
            from workers.guests.ssh import SshChannel

            pins = self.config.extension.host_keys if self.config.extension else self.config.runtime_dir / "host_keys"
            secret = key or access.key_file
            assert secret is not None
            return SshChannel(
                address=address,
                key=secret,
                host_key=host_key_policy(access.host_key, pins, machine.uuid),
                port=access.port,
                user=access.user,
            )

        return connect

    def bucket(self, hypervisor: str) -> Bucket | None:
        """What caps the bytes per second of all transfers from and to it; None: nothing."""
        from workers.disks.pace import Bucket

        rate = _named(self.config.hypervisors, hypervisor, "hypervisor").bandwidth
        if rate is None:
            return None
        with self._lock:
            return self._buckets.setdefault(hypervisor, Bucket(rate))

    def places(self, hypervisor: str) -> Places:
        """Where its snapshots keep their files; nothing is connected for that. On another host the folders are of the
        usual names: those under [paths] are this host's."""
        wanted = _named(self.config.hypervisors, hypervisor, "hypervisor")
        host = self.host(hypervisor)
        return Places(
            host=host,
            scratch=wanted.scratch_dir or (self.config.scratch_dir if host.local else FAR_SCRATCH),
            runtime=self.config.runtime_dir if host.local else FAR_RUNTIME,
            floor=self.config.scratch_floor,
        )

    def close(self) -> None:
        with self._lock:
            for hypervisor in [*self._hypervisors.values(), *self._retired]:
                hypervisor.close()
            self._retired.clear()
            self._hypervisors.clear()
            for host in self._hosts.values():
                host.close()
            self._hosts.clear()
            self._vaults.clear()


def _named(found: dict[str, T], name: str, what: str) -> T:
    if name not in found:
        raise NotFound(
            f"no {what} named {name!r} is configured", hint=f"configured: {', '.join(sorted(found)) or 'none'}"
        )
    return found[name]
