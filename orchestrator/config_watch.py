"""The configuration of a process that stays: read again when its file changes, and the last good one kept in force.

A mistake in the file is told as an alert, with file, line and suggestion, until it is mended; nothing else changes
meanwhile. A file is read when two looks at it, one after the other, found the same: an editor that is still writing
gives no half of a configuration, which would be a whole one without some machines.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from orchestrator.alarms import Severity
from orchestrator.catalog.alerts import raise_alert, resolve_alert
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config, load_config
from workers.contract.errors import ConfigError

log = logging.getLogger(__name__)

LOOK_SECONDS = 3.0
FIXED = {
    "[catalog] url": "catalog_url",
    "[broker] url": "broker_url",
    "[paths] state": "state_dir",
}
"""What cannot change while a process runs, and the field of `Config` that has it; of `[paths]` the others too."""
_WORKER_FIXED = ("scratch_dir", "runtime_dir", "cache_dir")

_Stamp = tuple[int, int, int, int] | None
"""Of a file: mtime, size, inode, device; None: it is not there."""


class ConfigWatch:
    """`config`: the one in force. For each process that stays, whether it leads or not: `followed`, or `look` from one
    thread every few seconds. `apply` puts another configuration in force."""

    def __init__(self, config: Config, catalog: Catalog, apply: Callable[[Config], None]) -> None:
        self.config = config
        self._catalog = catalog
        self._apply = apply
        self._read = self._seen = _stamp(config.path)
        self._key = f"config {socket.gethostname()}:{config.path}"
        self._forced = False
        self._asked = Event()

    @contextmanager
    def followed(self) -> Iterator[None]:
        """While open, a thread looks every few seconds."""
        ending = Event()

        def follow() -> None:
            while not ending.is_set():
                self._asked.wait(LOOK_SECONDS)
                self._asked.clear()
                try:
                    self.look()
                except Exception:  # a catalog that is away must not end it: what is in force stays so
                    log.exception("the configuration could not be looked up")

        thread = Thread(target=follow, name="configuration", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            self._asked.set()
            thread.join()

    def again(self) -> None:
        """Somebody asks for it: the next look, which is soon, reads the file, whether it seems changed or not. For any
        thread."""
        self._forced = True
        self._asked.set()

    def look(self) -> bool:
        """Read the file if it has changed; whether another configuration came into force."""
        stamp, forced = _stamp(self.config.path), self._forced
        settled, self._seen = stamp == self._seen, stamp
        if not forced and (stamp == self._read or not settled):
            return False
        self._forced = False
        try:
            found = load_config(self.config.path)
        except ConfigError as error:
            self._read = stamp
            self._tell(str(error), "stillframe config check")
            return False
        if _stamp(self.config.path) != stamp:
            return False  # written while it was read
        self._read = stamp
        wanted, fixed = keep_fixed(self.config, found)
        changed = wanted != self.config
        if changed:
            self._apply(wanted)
            self.config = wanted
        if fixed:
            self._tell(f"{', '.join(fixed)} changed in the file: that counts from the next start on", "restart it")
        else:
            with self._catalog.write() as session:
                resolve_alert(session, self._key, "the file is in force")
        return changed

    def _tell(self, text: str, hint: str) -> None:
        with self._catalog.write() as session:
            subject = f"{self.config.path}"
            raise_alert(session, self._key, Severity.WARNING, subject, f"{text}; the last good one is in force", hint)


def keep_fixed(old: Config, new: Config) -> tuple[Config, list[str]]:
    """`new` with what cannot change at run time as it is in `old`, and the names of what differs there."""
    fixed = [name for name, field in FIXED.items() if getattr(old, field) != getattr(new, field)]
    fixed += [
        f"[paths] {name.removesuffix('_dir')}"
        for name in _WORKER_FIXED
        if getattr(old.worker, name) != getattr(new.worker, name)
    ]
    kept = {field: getattr(old, field) for field in FIXED.values()}
    worker = new.worker.model_copy(update={name: getattr(old.worker, name) for name in _WORKER_FIXED})
    return new.model_copy(update={**kept, "worker": worker}), fixed


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
