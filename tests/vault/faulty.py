"""A store that goes wrong on purpose: the same interface, wrapped around a real one.

`Plan` says what happens to which call. Calls are counted from 0 in the order they are made, so a test can walk through
every call of a piece of work and let each one fail in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from workers.contract.errors import NoSpace, VaultError
from workers.contract.seams import ObjectInfo, Store

WRITES = frozenset({"put", "put_file", "replace", "delete", "retain"})


class Died(BaseException):
    """The process was killed here; nothing of it runs any more."""


@dataclass
class Plan:
    """What goes wrong. `*_at` are numbers of calls."""

    die_before: int | None = None
    die_after: int | None = None
    fail_at: int | None = None
    full_at: int | None = None
    """No space, from this call on, for calls that write."""
    mangle: Callable[[str, bytes], bytes] | None = None
    """Applied to what `get` of a name returns."""
    calls: list[tuple[str, str]] = field(default_factory=list)


class FaultyStore:
    """`inner`, with the faults of `plan`."""

    def __init__(self, inner: Store, plan: Plan | None = None) -> None:
        self.inner = inner
        self.features = inner.features
        self.plan = plan or Plan()
        self._lock = threading.Lock()
        self._dead = False

    def _enter(self, call: str, name: str) -> int:
        with self._lock:
            if self._dead:
                raise Died
            number = len(self.plan.calls)
            self.plan.calls.append((call, name))
            if number == self.plan.die_before:
                self._dead = True
                raise Died
            if number == self.plan.fail_at:
                raise VaultError(f"injected: {call} {name} failed")
            if self.plan.full_at is not None and number >= self.plan.full_at and call in WRITES - {"delete", "retain"}:
                raise NoSpace("injected: no space left")
            return number

    def _leave(self, number: int) -> None:
        if number == self.plan.die_after:
            self._dead = True
            raise Died

    def put(self, name: str, data: bytes) -> bool:
        number = self._enter("put", name)
        done = self.inner.put(name, data)
        self._leave(number)
        return done

    def put_file(self, name: str, path: Path) -> bool:
        number = self._enter("put_file", name)
        done = self.inner.put_file(name, path)
        self._leave(number)
        return done

    def replace(self, name: str, path: Path) -> None:
        number = self._enter("replace", name)
        self.inner.replace(name, path)
        self._leave(number)

    def staging(self) -> Path:
        return self.inner.staging()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        number = self._enter("get", name)
        data = self.inner.get(name, offset, length)
        self._leave(number)
        return data if self.plan.mangle is None else self.plan.mangle(name, data)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        number = self._enter("list", prefix)
        yield from self.inner.list(prefix)
        self._leave(number)

    def delete(self, name: str) -> None:
        number = self._enter("delete", name)
        self.inner.delete(name)
        self._leave(number)

    def retain(self, name: str, until: datetime) -> None:
        number = self._enter("retain", name)
        self.inner.retain(name, until)
        self._leave(number)

    def copies(self) -> Sequence[Store]:
        return (self,)

    def free_bytes(self) -> int | None:
        return self.inner.free_bytes()
