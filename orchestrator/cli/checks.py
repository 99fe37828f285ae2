"""What `stillframe doctor` looks at: this host, the configuration, catalog, vaults. `check_machines.py` does the rest.

Each check is a generator of findings, so that lines appear as they are found, and one that cannot be made (no
configuration, no hypervisor) is a finding itself and never the end of the others. Nothing is changed or made, but for a
few objects beside each vault, which are removed again: what a store honours is found out by doing it.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.cli.output import Output, size
from orchestrator.cli.run import Session
from workers.contract.errors import ConfigError, StillframeError, VaultMissing, WrongKey

if TYPE_CHECKING:
    from orchestrator.config import Config
    from workers.config import VaultConfig
    from workers.vault import Vault

Level = Literal["OK", "WARN", "FAIL"]

_MIN_QEMU = (4, 2)
_LOW_SPACE = 1 << 30
_SOCKET_LIMIT = 107
_SOCKET_TAIL = len("/sf-0123456789abcdef0123456789abcdef/backup-vda.sock")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `mend` is what to do about it."""

    level: Level
    subject: str
    detail: str
    mend: str = ""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def show(self, out: Output) -> None:
        """As a line, and a second one with the mend."""
        out.say(f"{self.subject}: {self.detail}", label=self.level)
        if self.mend:
            out.say(f"      → {self.mend}")


def all_checks(session: Session) -> Iterator[Check]:
    """Everything, in the order in which it is to be mended."""
    yield from _modules()
    yield from _programs()
    try:
        config = session.config
    except ConfigError as error:
        yield Check("FAIL", "configuration", str(error), error.hint or "mend these lines, then `stillframe doctor`")
        return
    yield Check("OK", "configuration", str(config.path))
    yield from _catalog(session, config)
    yield from _schedules(session, config)
    if not config.worker.vaults:
        yield Check("FAIL", "vault", "none is configured", f"add a [vaults.main] section to {config.path}")
    for name, vault in config.worker.vaults.items():
        yield from _vault(config, name, vault)
    yield from _folders(config)
    from orchestrator.cli.check_extension import check_extension

    yield from check_extension(config)
    from orchestrator.cli.check_machines import check_hypervisors

    yield from check_hypervisors(session, config)


def _modules() -> Iterator[Check]:
    for name, package in (("libvirt", "python3-libvirt"), ("nbd", "python3-libnbd")):
        try:
            importlib.import_module(name)
        except ImportError as error:
            mend = f"apt-get install {package}, and a virtual environment made with --system-site-packages"
            yield Check("FAIL", f"python module {name}", f"cannot be imported: {error}", mend)
        else:
            yield Check("OK", f"python module {name}", "present")


def _programs() -> Iterator[Check]:
    from workers.tools import run

    for name in ("qemu-img", "qemu-nbd"):
        if shutil.which(name) is None:
            yield Check("FAIL", name, "not installed", "apt-get install qemu-utils")
            continue
        try:
            text = run([name, "--version"], timeout=10)
        except StillframeError as error:
            yield Check("FAIL", name, str(error), "apt-get install --reinstall qemu-utils")
            continue
        match = re.search(r"(\d+)\.(\d+)(\.\d+)*", text)
        version = (int(match[1]), int(match[2])) if match else (0, 0)
        if version < _MIN_QEMU:
            yield Check("FAIL", name, f"version {match[0] if match else '?'} is too old", "QEMU 4.2 or newer is needed")
        else:
            yield Check("OK", name, match[0] if match else "")


def _catalog(session: Session, config: Config) -> Iterator[Check]:
    file = Path(config.catalog_url.removeprefix("sqlite:///"))
    if config.catalog_url.startswith("sqlite:///") and not file.exists():
        yield Check("WARN", "catalog", f"{file} is not there yet", "stillframe init, or `vault rebuild-catalog`")
        return
    try:
        active = session.peek().jobs(active_only=True)
    except (StillframeError, sqlite3.Error) as error:
        hint = error.hint if isinstance(error, StillframeError) else ""
        yield Check("FAIL", "catalog", str(error), hint or "stillframe vault rebuild-catalog, with another catalog url")
    else:
        running = f"{len(active)} job{'' if len(active) == 1 else 's'} running" if active else "no job running"
        yield Check("OK", "catalog", running)


def _schedules(session: Session, config: Config) -> Iterator[Check]:
    """Whether what is due is begun, and somebody told if it is not."""
    used = {protect.policy for protect in config.protect.values()}
    timed = sorted(name for name in used if config.policies[name].schedule or config.policies[name].cron)
    if not timed:
        return
    sqlite, _, file = config.catalog_url.partition("sqlite:///")
    try:
        unmade = not sqlite and not Path(file).exists()  # looking must not make it
        leader = "" if unmade else session.peek().status.leader(datetime.now(UTC))
    except (StillframeError, sqlite3.Error):
        return  # the catalog has said so
    if leader:
        yield Check("OK", "schedules", f"run by controller {leader}")
    else:
        mend = "stillframe serve, for good by deploy/stillframe.service"
        yield Check("WARN", "schedules", f"policy {', '.join(timed)}: nobody runs them", mend)
    if config.notify.email is None and not config.notify.webhooks:
        mend = "add a [notify.email] or [notify.webhooks.NAME] section, then `stillframe notify test`"
        yield Check("WARN", "alerts", "nobody is told of them: they are in `stillframe status` only", mend)


# --- vaults ----------------------------------------------------------------------------------------------------


def _vault(config: Config, name: str, vault: VaultConfig) -> Iterator[Check]:
    from workers.vault.places import away, open_place
    from workers.vault.probe import Probed, probe

    subject = f"vault {name}"
    try:
        store = open_place(vault)
        problems = away(store)
        probed = Probed(vault.url) if problems else probe(store)
        free = store.free_bytes()
    except VaultMissing as error:
        mend = error.hint
        if vault.replica_of is not None:
            mend = f"mount its file system, or `stillframe vault replicate {vault.replica_of} --to {name}`"
        yield Check("FAIL", subject, str(error), mend)
        return
    except StillframeError as error:
        yield Check("FAIL", subject, str(error), error.hint or "check that this user may write there")
        return
    for problem in problems:
        yield Check("FAIL", subject, f"nothing is written: {problem}", f"stillframe vault mirror-sync {name}")
    room = "" if free is None else f", {size(free)} free"
    if probed.unfit:
        seen = "; ".join(f"{ability}: {what}" for ability, what in probed.unfit.items())
        yield Check("FAIL", subject, f"{vault.url} cannot be relied on: {seen}", "move the vault to another place")
    elif free is not None and free < _LOW_SPACE:
        yield Check("WARN", subject, f"{vault.url}, only {size(free)} free", "free space, or delete points")
    else:
        yield Check("OK", subject, f"{vault.url}{room}{', with object lock' if store.features.locks else ''}")
    yield from _key(config, name, vault)


def _lies_in(file: Path, url: str) -> bool:
    """Whether a file is inside a vault that is a folder."""
    return url.startswith("file://") and file.resolve().is_relative_to(Path(url.removeprefix("file://")).resolve())


def _key(config: Config, name: str, vault: VaultConfig) -> Iterator[Check]:
    from workers.context import Context

    subject = f"key of vault {name}"
    file = vault.key_file or vault.passphrase_file
    context = Context(config.worker)
    try:
        opened = context.vault(name)
        damaged = opened.damaged_points()
        locked = list(_lock(name, opened))
    except WrongKey as error:
        yield Check("FAIL", subject, str(error), error.hint or "put the right key file in its place")
        return
    except StillframeError as error:
        yield Check("FAIL", f"vault {name}", str(error), error.hint or f"stillframe vault verify {name} --full")
        return
    finally:
        context.close()
    yield from locked
    for point, why in damaged:
        yield Check("FAIL", f"vault {name}", f"point {point}: {why}", f"stillframe vault verify {name} --full")
    if file is not None and _lies_in(file, vault.url):
        yield Check("WARN", subject, f"{file} lies in the vault that it locks", "keep it elsewhere")
    elif file is not None and file.stat().st_mode & 0o077:
        yield Check("WARN", subject, f"{file} can be read by others", f"chmod 600 {file}")
    else:
        yield Check("OK", subject, f"{file or 'key_command'} opens it")


def _lock(name: str, vault: Vault) -> Iterator[Check]:
    """What is weak about a lock. Raises Corrupt."""
    from workers.vault.locks import read_chain
    from workers.vault.stores import DirectoryStore

    subject = f"lock of vault {name}"
    lock, wrong = read_chain(vault.store, vault.id)
    for why in wrong:
        yield Check("FAIL", subject, why, "somebody wrote to the store by other means: find out who can")
    if not lock.days:
        return
    soft = [one for one in vault.store.copies() if isinstance(one, DirectoryStore) and not one.keeps_immutable()]
    for store in soft:
        yield Check(
            "WARN",
            subject,
            f"{store.root} takes no immutable flag: only this software refuses to delete",
            "run as root on ext4, XFS or Btrfs, or use a place that locks by itself (S3 Object Lock)",
        )
    if not soft:
        yield Check("OK", subject, f"{lock.days} days")


# --- folders ---------------------------------------------------------------------------------------------------


def _folders(config: Config) -> Iterator[Check]:
    worker = config.worker
    scratch = {worker.scratch_dir: worker.scratch_floor}
    for one in worker.hypervisors.values():
        if one.scratch_dir is not None:
            scratch[one.scratch_dir] = worker.scratch_floor
    for folder, floor in scratch.items():
        yield from _scratch(folder, floor)
    length = len(os.fsencode(worker.runtime_dir)) + _SOCKET_TAIL
    if length > _SOCKET_LIMIT:
        yield Check(
            "FAIL",
            "runtime folder",
            f"{worker.runtime_dir} is too long for unix sockets ({length} bytes of {_SOCKET_LIMIT})",
            'set runtime = "/run/stillframe" under [paths]',
        )


def _scratch(folder: Path, floor: int) -> Iterator[Check]:
    subject = f"scratch {folder}"
    present = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(present, os.W_OK | os.X_OK):
        yield Check("FAIL", subject, f"{present} cannot be written", "set scratch under [paths]")
        return
    closed = [place for place in (present, *present.parents) if not place.stat().st_mode & 0o001]
    if closed:
        mend = f"set scratch under [paths], or chmod o+x {closed[0]}"
        yield Check("WARN", subject, f"QEMU runs as another user and cannot pass {closed[0]}", mend)
    free = shutil.disk_usage(present).free
    kind = _file_system(present)
    if free < 2 * floor:
        mend = "free space there, or set scratch under [paths] to a larger file system"
        yield Check("FAIL" if free < floor else "WARN", subject, f"only {size(free)} free ({kind})", mend)
    elif kind in ("tmpfs", "ramfs"):
        yield Check("WARN", subject, f"{size(free)} free, in memory ({kind})", "set scratch under [paths] to a disk")
    elif not closed:
        yield Check("OK", subject, f"{size(free)} free ({kind})")


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, found, *_ = line.split(" ")
        mount = place.replace("\\040", " ")
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind
