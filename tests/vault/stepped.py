"""Actors on different hosts that work in one vault at once, interleaved call by call.

Every actor runs in a thread of its own, and stops at each call to the store until it is told to go on: so exactly one
runs at a time, and which one is a choice of the test. An actor that is killed at a call never makes it; one that is not
chosen for a long while is a zombie, which may wake at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from tests.vault.faulty import Died
from workers.contract.errors import Corrupt, ObjectMissing, StillframeError
from workers.contract.seams import ObjectInfo, Store, StoreFeatures


class MemoryStore:
    """Objects in a dictionary, shared by all hosts."""

    def __init__(self, staging: Path) -> None:
        self.features = StoreFeatures("memory")
        self.objects: dict[str, bytes] = {}
        self._staging = staging

    def put(self, name: str, data: bytes) -> bool:
        return self.objects.setdefault(name, data) is data

    def put_file(self, name: str, path: Path) -> bool:
        created = self.put(name, path.read_bytes())
        path.unlink()
        return created

    def replace(self, name: str, path: Path) -> None:
        self.objects[name] = path.read_bytes()
        path.unlink()

    def staging(self) -> Path:
        return self._staging

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name not in self.objects:
            raise ObjectMissing(f"{name} is missing")
        data = self.objects[name]
        end = len(data) if length is None else offset + length
        if end > len(data):
            raise Corrupt(f"{name} is cut short")
        return data[offset:end]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(
            [ObjectInfo(name, len(self.objects[name])) for name in sorted(self.objects) if name.startswith(prefix)]
        )

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    def retain(self, name: str, until: datetime) -> None:
        """Nothing is locked here."""

    def copies(self) -> Sequence[Store]:
        return (self,)

    def free_bytes(self) -> int | None:
        return None


class Actor:
    """A piece of work that can be moved on by one call to the store."""

    def __init__(self, name: str, inner: Store, work: Callable[[Store], None]) -> None:
        self.name = name
        self.error: BaseException | None = None
        self.ended = False
        self.calls: list[str] = []
        """Made so far."""
        self.waits_for = ""
        """The one that it makes when it is moved on."""
        self._kill = False
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        store = SteppedStore(inner, self)
        self._thread = threading.Thread(target=self._run, args=(work, store), name=name, daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def _run(self, work: Callable[[Store], None], store: Store) -> None:
        try:
            self.pause("begin")
            work(store)
        except StillframeError as error:
            self.error = error
        except Died:
            pass
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.ended = True
            self._stopped.release()

    def pause(self, call: str) -> None:
        """In the actor's thread: wait until it is told to make the call."""
        self.waits_for = call
        self._stopped.release()
        self._go.acquire()
        if self._kill:
            raise Died
        self.calls.append(call)

    def step(self) -> None:
        """Let it make one call, up to the next one or its end."""
        if not self.ended:
            self._go.release()
            self._stopped.acquire()

    def run(self) -> None:
        while not self.ended:
            self.step()

    def kill(self) -> None:
        """It makes no call any more."""
        self._kill = True
        self.step()
        self._thread.join()


class SteppedStore:
    """`inner`, for one actor. The listing of names is one moment, as an object store promises no more and no less."""

    def __init__(self, inner: Store, actor: Actor) -> None:
        self.inner = inner
        self.features = inner.features
        self._actor = actor

    def put(self, name: str, data: bytes) -> bool:
        self._actor.pause(f"put {name}")
        return self.inner.put(name, data)

    def put_file(self, name: str, path: Path) -> bool:
        self._actor.pause(f"put {name}")
        return self.inner.put_file(name, path)

    def replace(self, name: str, path: Path) -> None:
        self._actor.pause(f"replace {name}")
        self.inner.replace(name, path)

    def staging(self) -> Path:
        return self.inner.staging()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self._actor.pause(f"get {name}")
        return self.inner.get(name, offset, length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._actor.pause(f"list {prefix}")
        return self.inner.list(prefix)

    def delete(self, name: str) -> None:
        self._actor.pause(f"delete {name}")
        self.inner.delete(name)

    def retain(self, name: str, until: datetime) -> None:
        self._actor.pause(f"retain {name}")
        self.inner.retain(name, until)

    def copies(self) -> Sequence[Store]:
        return (self,) if len(self.inner.copies()) == 1 else self.inner.copies()

    def free_bytes(self) -> int | None:
        return self.inner.free_bytes()
