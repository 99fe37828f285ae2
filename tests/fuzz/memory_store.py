"""A store in memory: for decoders that read from one, a million times a minute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from workers.contract.errors import Corrupt, ObjectMissing
from workers.contract.seams import ObjectInfo, Store, StoreFeatures


class MemoryStore:
    """`Store` over a dictionary; retains nothing."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = dict(objects or {})
        self.features = StoreFeatures("memory")

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
        raise NotADirectoryError("there is no folder in memory")

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self.objects.get(name)
        if data is None:
            raise ObjectMissing(f"{name} is missing")
        found = data[offset:] if length is None else data[offset : offset + length]
        if length is not None and len(found) != length:
            raise Corrupt(f"{name} is cut short")
        return found

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for name in sorted(self.objects):
            if name.startswith(prefix):
                yield ObjectInfo(name, len(self.objects[name]))

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    def retain(self, name: str, until: datetime) -> None:
        """Nothing outlives the test."""

    def copies(self) -> Sequence[Store]:
        return (self,)

    def free_bytes(self) -> int | None:
        return None
