"""Is an object what its name says? Packs and segments are named by their SHA-256: no key is needed.

One thread reads ahead while another hashes; both let go of the interpreter's lock. Where the vault has several stores,
each one's bytes are looked at: a mirror that has rotted must be found before it is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from workers.contract.errors import Corrupt, ObjectMissing
from workers.contract.seams import ObjectInfo, Store
from workers.vault.findings import Finding, Level, OnProgress, Progress, Share, VerifyReport, quiet
from workers.vault.index import PREFIX as INDEX

_CHUNK = 4 << 20
_AHEAD = 3
"""Chunks that are being read while one is hashed; 16 MiB in memory with it."""
NOT_ITS_NAME = "its bytes are not what its name says"


def problems(
    store: Store, objects: Iterable[ObjectInfo], unneeded: Container[str] = ()
) -> Iterator[tuple[ObjectInfo, str]]:
    """Each of `objects` with what is wrong with it, wherever it should be; empty: nothing. Those that are `unneeded`
    may be missing: a put to several stores was cut off, and nobody relies on it."""
    places = store.copies()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="verify") as reader:
        for info in objects:
            found = (_problem(reader, place, info, len(places) > 1, info.name in unneeded) for place in places)
            yield info, next(filter(None, found), "")


def problem_of(store: Store, info: ObjectInfo) -> str:
    """The same of one object, in this very store."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="verify") as reader:
        return _problem(reader, store, info)


def _problem(
    reader: ThreadPoolExecutor, store: Store, info: ObjectInfo, name_place: bool = False, unneeded: bool = False
) -> str:
    try:
        good = _digest(reader, store, info) == info.name.rpartition("/")[2]
        problem = "" if good else NOT_ITS_NAME
    except ObjectMissing as error:
        problem = "" if unneeded else str(error)
    except Corrupt as error:
        problem = str(error)
    return f"{store.features.place}: {problem}" if problem and name_place else problem


def _digest(reader: ThreadPoolExecutor, store: Store, info: ObjectInfo) -> str:
    sha = hashlib.sha256()
    ahead: list[Future[bytes]] = []
    try:
        for offset in range(0, info.size, _CHUNK):
            ahead.append(reader.submit(store.get, info.name, offset, min(_CHUNK, info.size - offset)))
            if len(ahead) > _AHEAD:
                sha.update(ahead.pop(0).result())
        while ahead:
            sha.update(ahead.pop(0).result())
    finally:
        for future in ahead:
            future.cancel()
    return sha.hexdigest()


def verify_packs(store: Store, *, on_progress: OnProgress | None = None, share: Share | None = None) -> VerifyReport:
    """Compare every pack and index segment, or those of a share, with the SHA-256 in its name. Needs no key."""
    objects = [info for prefix in ("packs/", INDEX) for info in store.list(prefix)]
    objects = [info for info in objects if share is None or share.holds(info.name)]
    tell = on_progress or quiet
    findings: list[Finding] = []
    read = 0
    for done, (info, problem) in enumerate(problems(store, objects)):
        tell(Progress(stage="packs", done=done, total=len(objects)))
        read += info.size
        if problem:
            findings.append(Finding(object=info.name, problem=problem))
    tell(Progress(stage="packs", done=len(objects), total=len(objects)))
    return VerifyReport(
        level=Level.PACKS, share=str(share or ""), findings=findings, packs=len(objects), read_bytes=read
    )
