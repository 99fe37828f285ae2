"""Who did what: which calls of the service's desks change something, and what the audit log says of them.

One table in one place instead of a line in each method, so that what is missing can be seen. A call is noted before it
is made: one that kills the process has still left its trace; one that was refused, or failed, says so in a second
line. Looking and dry runs are not noted, and of arguments only those that are named here: no passphrase is among them.
Jobs are noted when they are added (`catalog/jobs.py`), in the same transaction.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any, TypeVar

from orchestrator.actor import whoami
from orchestrator.catalog import audit
from orchestrator.catalog.store import Catalog
from workers.contract.errors import StillframeError
from workers.contract.machines import Value

D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Act:
    """How a call is noted: `action` on what the argument `of` names, with the arguments `detail`, where they are
    given."""

    action: str
    of: str
    detail: tuple[str, ...] = ()


_VAULT = "name"
POINTS = {
    "delete": Act("point.delete", "ref", ("days", "reason")),
    "undelete": Act("point.undelete", "ref"),
    "pin": Act("point.pin", "ref", ("reason",)),
    "unpin": Act("point.unpin", "ref"),
    "expire": Act("policy.expire", "vault_name"),
}
UPKEEP = {"sweep": Act("vault.sweep", _VAULT, ("empty", "fence_days"))}
INTEGRITY = {"repair": Act("vault.repair", _VAULT, ("source",))}
REPLICAS = {
    "replicate": Act("vault.replicate", "source", ("to", "force")),
    "sync_mirrors": Act("vault.mirror-sync", _VAULT),
}
KEYS = {
    "add_passphrase": Act("key.add-passphrase", _VAULT),
    "add_key_file": Act("key.add-file", _VAULT, ("path",)),
    "remove": Act("key.remove", _VAULT, ("slot",)),
    "rotate": Act("key.rotate", _VAULT, ("keep_old",)),
    "rotate_data_key": Act("key.rotate-data", _VAULT),
    "new_recovery": Act("key.recovery", _VAULT),
    "drop_recoveries": Act("key.drop-recoveries", _VAULT, ("but",)),
    "restore": Act("key.restore", _VAULT, ("key_file",)),
}
LOCKS = {
    "lengthen": Act("lock.lengthen", _VAULT, ("days",)),
    "request": Act("lock.request", _VAULT, ("days",)),
    "approve": Act("lock.approve", _VAULT),
    "change": Act("lock.change", _VAULT, ("days",)),
    "extend": Act("lock.extend", _VAULT),
}
VAULTS = {
    "init": Act("vault.init", _VAULT),
    "rebuild_catalog": Act("vault.rebuild-catalog", _VAULT),
    "rebuild_index": Act("vault.rebuild-index", _VAULT),
}
GUESTS = {"uninstall": Act("extension.uninstall", "wanted")}
STATUS = {"acknowledge": Act("alert.acknowledge", "id")}
SERVICE = {"cancel": Act("job.cancel", "job_id")}


class AuditView(Value):
    time: datetime
    actor: str
    action: str
    subject: str
    detail: str


Named = Callable[[str, object], object]
"""What an argument of that name means: the default vault for none, the point's id for `web@latest`."""


class Journal:
    """Thread-safe."""

    def __init__(self, catalog: Catalog, named: Named) -> None:
        self._catalog = catalog
        self._named = named

    def note(self, action: str, subject: str, detail: str = "") -> None:
        with self._catalog.write() as session:
            audit.record(session, whoami(), action, subject, detail)

    def recent(self, limit: int, *, action: str = "", actor: str = "") -> list[AuditView]:
        """Newest first; of actions that begin with `action`, of actors whose name contains `actor`."""
        with self._catalog.read() as session:
            rows = audit.recent(session, limit, action=action, actor=actor)
        return [AuditView.model_validate({name: getattr(row, name) for name in AuditView.model_fields}) for row in rows]

    def subject(self, name: str, value: object) -> str:
        with suppress(StillframeError):  # whatever is wrong with it, the call will say
            value = self._named(name, value)
        return "" if value is None else str(value)


def audited(desk: D, journal: Journal, acts: Mapping[str, Act]) -> D:
    """The desk, whose calls in `acts` are noted from now on, those among themselves too."""
    for name, act in acts.items():
        setattr(desk, name, _noted(getattr(desk, name), journal, act))
    return desk


def _noted(call: Callable[..., Any], journal: Journal, act: Act) -> Callable[..., Any]:
    signature = inspect.signature(call)

    @wraps(call)
    def noted(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("dry_run"):
            return call(*args, **kwargs)
        subject = journal.subject(act.of, given.get(act.of))
        detail = ", ".join(f"{key} {given[key]}" for key in act.detail if given.get(key) not in (None, "", False))
        journal.note(act.action, subject, detail)
        try:
            return call(*args, **kwargs)
        except BaseException as error:
            ours = isinstance(error, StillframeError)
            journal.note(act.action, subject, f"refused: {error}" if ours else f"failed: {type(error).__name__}")
            raise

    return noted
