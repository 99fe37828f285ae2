"""Objects from one store to another, as they are: what mirrors and replicas are made with. No key is needed.

Where an object's name is the SHA-256 of its bytes they are checked while they pass, so that damage stays where it is.
A pack goes by way of a file in pieces: memory does not depend on its size.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from workers.contract.errors import Cancelled, Corrupt, ObjectMissing
from workers.contract.machines import Value
from workers.contract.seams import ObjectInfo, Store
from workers.vault.packs import write_error

THREADS = 4
"""Transfers in flight: enough to hide the delay of a far store."""
_PIECE = 8 << 20
_ADDRESSED = ("packs/", "index/", "condemned/", "damage/")


class NotCopied(Value):
    """An object that was left where it is, because it is not what was written."""

    object: str
    problem: str


@dataclass
class Copies:
    """What became of some objects."""

    objects: int = 0
    bytes: int = 0
    refused: list[NotCopied] = field(default_factory=list)


class Pace:
    """At most `rate` bytes a second over all threads; None: as fast as it goes. May be stopped from anywhere."""

    def __init__(self, rate: int | None = None) -> None:
        self._rate = rate
        self._next = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.piece = _PIECE if rate is None else max(64 << 10, min(_PIECE, rate // 4))
        """Bytes to ask for at a time: small where they are few, so that they flow evenly."""

    def take(self, count: int) -> None:
        """Wait until `count` bytes may be moved. Raises Cancelled once it is stopped."""
        delay = 0.0
        if self._rate is not None:
            with self._lock:
                begin = max(time.monotonic(), self._next)
                self._next = begin + count / self._rate
            delay = begin - time.monotonic()
        if self._stopped.wait(delay) if delay > 0 else self._stopped.is_set():
            raise Cancelled("the copying was ended")

    def stop(self) -> None:
        self._stopped.set()


def addressed(name: str) -> bool:
    """Whether an object's name is the SHA-256 of its bytes."""
    return name.startswith(_ADDRESSED)


def copy_object(
    source: Store, target: Store, info: ObjectInfo, pace: Pace | None = None, *, replace: bool = False
) -> bool:
    """Copy one object, from a good copy if the source is a mirror; False: the target has one of that name. With
    `replace` it takes the place of that one, once the right bytes are at hand. Raises ObjectMissing if the source has
    it no more, Corrupt if it is not what was written, and what else stores raise."""
    try:
        return _copy(source, target, info, pace or Pace(), replace=replace)
    except Corrupt:
        for one in source.copies() if len(source.copies()) > 1 else ():
            with suppress(Corrupt, ObjectMissing):
                return _copy(one, target, info, pace or Pace(), replace=replace)
        raise


def _copy(source: Store, target: Store, info: ObjectInfo, pace: Pace, *, replace: bool) -> bool:
    pieces = _pieces(source, info, pace)
    if info.size <= _PIECE and not replace:
        data = b"".join(pieces)
        _check(info.name, hashlib.sha256(data))
        return target.put(info.name, data)
    path = target.staging() / f"copy-{secrets.token_hex(8)}"
    try:
        _check(info.name, _write(path, pieces))
        if replace:
            target.replace(info.name, path)
            return True
        return target.put_file(info.name, path)
    finally:
        path.unlink(missing_ok=True)


def _pieces(source: Store, info: ObjectInfo, pace: Pace) -> Iterator[bytes]:
    for offset in range(0, info.size, pace.piece):
        length = min(pace.piece, info.size - offset)
        pace.take(length)
        yield source.get(info.name, offset, length)


def _write(path: Path, pieces: Iterator[bytes]) -> hashlib._Hash:
    sha = hashlib.sha256()
    try:
        path.touch(mode=0o600, exist_ok=False)
        with path.open("wb") as file:
            for piece in pieces:
                sha.update(piece)
                file.write(piece)
    except OSError as error:
        raise write_error(error) from error
    return sha


def _check(name: str, sha: hashlib._Hash) -> None:
    if addressed(name) and sha.hexdigest() != name.rpartition("/")[2]:
        raise Corrupt(f"{name}: its bytes are not what its name says")


def copy_all(
    source: Store,
    target: Store,
    wanted: Sequence[ObjectInfo],
    *,
    threads: int = THREADS,
    pace: Pace | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Copies:
    """Copy objects, some at a time, in any order. What is damaged is left out, what is gone is passed over; all else
    that goes wrong ends it, with what was copied in place."""
    copies, lock, pace = Copies(), threading.Lock(), pace or Pace()

    def one(info: ObjectInfo) -> None:
        try:
            copy_object(source, target, info, pace)
        except ObjectMissing:
            return  # removed since it was listed
        except Corrupt as error:
            copies.refused.append(NotCopied(object=info.name, problem=str(error)))
        else:
            with lock:
                copies.objects += 1
                copies.bytes += info.size
                on_bytes(info.size)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in as_completed([pool.submit(one, info) for info in wanted]):
                done.result()
        except BaseException:
            pace.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return copies


def listed(store: Store, *prefixes: str) -> dict[str, ObjectInfo]:
    """Everything under those prefixes, by name; each listing ends before the next begins."""
    return {info.name: info for prefix in prefixes for info in store.list(prefix)}


def missing(source: Store, target: Store, *prefixes: str) -> list[ObjectInfo]:
    """What the target lacks of them."""
    there = listed(target, *prefixes)
    return [info for name, info in listed(source, *prefixes).items() if name not in there]
