"""A vault in a bucket: S3, or what speaks like it.

Exclusivity rests on `If-None-Match: *`, and on telling our own object from somebody else's. A create that was cut off
may have happened; its repetition is then refused as *taken* (as is one that a proxy repeated behind our back). So
each `put` writes a number of its own with the object, and whoever is refused looks whose number is there. Where a store
keeps no such metadata the content decides; what a vault must not lose to another (points, verdicts, sessions) is sealed
with a random salt or carries the time of its writer, so equal content is the same writer's.

The failure prevented, as in a directory: a vault that was removed, or replaced by another, must not swallow a backup.
A look at the marker costs a round trip, so it is had before a point is created and, for all other writes, once a
minute: a pack that nobody refers to is waste, a point in the wrong vault would be a lie.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import finalize

from workers.config import S3Access
from workers.contract.errors import (
    ConfigError,
    Corrupt,
    Locked,
    ObjectMissing,
    StillframeError,
    StoreUnreachable,
    VaultError,
    VaultMissing,
)
from workers.contract.seams import ObjectInfo, Store, StoreFeatures
from workers.vault.s3_client import (
    PATIENCE,
    Denied,
    File,
    PastEnd,
    Patience,
    ShortAnswer,
    Taken,
    Unsupported,
    UploadGone,
    call,
    make_client,
    md5_of,
)
from workers.vault.staging import Staging, local_folder
from workers.vault.stores import MARKER, NAME, checked

T = TypeVar("T")
WHOLE = 96 << 20
"""Bytes of the largest file that goes up with one request, as a usual pack does: a store charges by the request, and
several packs are on their way at a time anyhow."""
PART = 16 << 20
"""Bytes of a part of a larger one."""
_PARTS_AT_ONCE = 4
_READS_AT_ONCE = 16
_GUARD_SECONDS = 60.0
_NUMBER = "stillframe-put"
"""Metadata of each object: the number of the `put` that made it."""
_RETAINED = ".retained/"
"""Where there is no Object Lock: empty objects `.retained/<name>/<Unix time>`; never replaced, so never shortened."""
_ABANDONED = timedelta(days=1)
"""Age at which an upload that was not completed is removed. A slower one starts again: no safety rests on it."""
_A_MOMENT = timedelta(minutes=1)
"""That a refusal and the question why may be apart."""
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_MISSING_HINT = "check the URL; `stillframe init` makes a new vault"


def open_bucket(url: str, access: S3Access, create: bool) -> Store:
    """The store at `s3://bucket/prefix`. Raises ConfigError, VaultMissing, StoreUnreachable. With `create` objects may
    be written before the marker is; the bucket must be there: its owner chooses region and lock."""
    return S3Store(url, access, create=create)


class S3Store:
    """Objects of one bucket, under one prefix. Thread-safe; any number of processes may share it."""

    def __init__(
        self,
        url: str,
        access: S3Access,
        *,
        create: bool = False,
        patience: Patience = PATIENCE,
        guard_seconds: float = _GUARD_SECONDS,
        whole: int = WHOLE,
        part: int = PART,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            hint = "write s3://bucket or s3://bucket/folder"
            raise ConfigError(f"vault URL {url!r} is not one of a bucket", hint=hint)
        self._bucket = parts.netloc
        self._prefix = f"{parts.path.strip('/')}/".lstrip("/")
        self._patience = patience
        self._guard_seconds = guard_seconds
        self._whole = whole
        self._part = part
        self._place = url if access.endpoint is None else f"{url} at {access.endpoint}"
        self._client = make_client(access, patience)
        self._disconnect = finalize(self, self._client.close)  # also of a store that nobody closes
        self._staging = Staging(local_folder())
        self._marker = self._read_marker()
        self._guarded = time.monotonic()
        if self._marker is None and not create:
            raise VaultMissing(f"there is no vault at {self._place}", hint=_MISSING_HINT)
        self.features = StoreFeatures(url, locks=self._has_lock(), reads_at_once=_READS_AT_ONCE)

    # --- requests ----------------------------------------------------------------------------------------------------

    def _call(self, what: str, request: Callable[..., Any], **fields: Any) -> Any:
        return self._try(what, partial(request, Bucket=self._bucket, **fields))

    def _try(self, what: str, act: Callable[[], T]) -> T:
        return call(self._patience, self._place, what, act)

    def _key(self, name: str) -> str:
        return self._prefix + checked(name)

    def _has_lock(self) -> bool:
        try:
            answer = self._call("ask for Object Lock", self._client.get_object_lock_configuration)
        except (Denied, Unsupported, ObjectMissing):
            return False  # not allowed, not known there, not set up: all the same, it cannot be relied on
        return bool(answer.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled")

    def _read_marker(self) -> bytes | None:
        try:
            return self._fetched(MARKER, 0, None)
        except ObjectMissing:
            return None

    def _guard(self, name: str = "") -> None:
        """Raises VaultMissing where the vault is not the one that was opened; see the header for when it looks."""
        due = name.startswith("points/") or time.monotonic() - self._guarded >= self._guard_seconds
        if self._marker is None or not due:
            return
        if self._read_marker() != self._marker:
            where = f"the vault at {self._place}"
            raise VaultMissing(f"{where} is gone, or another one is in its place", hint=_MISSING_HINT)
        self._guarded = time.monotonic()

    # --- writing -----------------------------------------------------------------------------------------------------

    def staging(self) -> Path:
        """A folder of this process's own on this host."""
        if not self._staging.present:
            self._remove_abandoned()
        try:
            return self._staging.folder()
        except OSError as error:
            hint = "set TMPDIR to a folder with room for a few packs"
            raise VaultError(f"cannot make a folder to build packs in: {error}", hint=hint) from error

    def put(self, name: str, data: bytes) -> bool:
        file, size = BytesIO(data), len(data)
        return self._create(name, partial(self._send, name, file, size, IfNoneMatch="*"), file, size)

    def put_file(self, name: str, path: Path) -> bool:
        """Of two that create a large object at the same time both may succeed where the store does not know conditions
        on uploads in parts; only packs are as large, and who creates the same pack has the same bytes."""
        size = path.stat().st_size
        with path.open("rb") as file:
            whole = partial(self._send, name, file, size, IfNoneMatch="*")
            send = whole if size <= self._whole else partial(self._upload, name, file, size)
            created = self._create(name, send, file, size)
        path.unlink(missing_ok=True)
        return created

    def _send(self, name: str, file: File, size: int, number: str, **fields: object) -> None:
        fields |= {"Bucket": self._bucket, "Key": self._key(name), "Metadata": {_NUMBER: number}}
        md5 = md5_of(file)

        def attempt() -> None:
            file.seek(0)
            self._client.put_object(Body=file, ContentLength=size, ContentMD5=md5, **fields)

        self._try(f"write {name}", attempt)

    def replace(self, name: str, path: Path) -> None:
        """With one request, whatever its size. What was there stays as an older version where it is locked."""
        self._guard(name)
        lock = {}
        with suppress(ObjectMissing, KeyError):
            found = self._call(f"look at {name}", self._client.head_object, Key=self._key(name))
            lock = {kept: found[kept] for kept in ("ObjectLockMode", "ObjectLockRetainUntilDate")}
        with path.open("rb") as file:
            self._send(name, file, path.stat().st_size, secrets.token_hex(16), **lock)
        path.unlink(missing_ok=True)

    def _create(self, name: str, send: Callable[[str], object], file: File, size: int) -> bool:
        """Have `send` create the object with a number of its own; whether it is ours that is there."""
        self._guard(name)
        number = secrets.token_hex(16)
        for _ in range(self._patience.attempts):
            try:
                send(number)
                break
            except (Taken, UploadGone):  # by somebody, or by a try of ours whose answer was lost
                pass
            with suppress(ObjectMissing):  # removed meanwhile, or an upload that somebody took for abandoned
                if not self._is_ours(name, number, file, size):
                    return False
                break
        else:
            raise StoreUnreachable(f"cannot write {name}: others create and remove it all the time")
        if name == MARKER:
            self._marker = self._read_marker()
        return True

    def _is_ours(self, name: str, number: str, file: File, size: int) -> bool:
        """Raises ObjectMissing."""
        found = self._call(f"look at {name}", self._client.head_object, Key=self._key(name))
        if _NUMBER in found["Metadata"]:
            return bool(found["Metadata"][_NUMBER] == number)
        if found["ContentLength"] != size:
            return False
        file.seek(0)
        for start in range(0, size, self._part):
            data = file.read(self._part)
            if self._fetched(name, start, len(data)) != data:
                return False
        return True

    def _upload(self, name: str, file: File, size: int, number: str) -> None:
        """In parts, some at a time. Raises Taken, UploadGone."""
        key, what = self._key(name), f"write {name}"
        begun = self._call(what, self._client.create_multipart_upload, Key=key, Metadata={_NUMBER: number})
        upload = {"Key": key, "UploadId": begun["UploadId"]}

        def send(part: int) -> dict[str, object]:
            data = os.pread(file.fileno(), self._part, (part - 1) * self._part)
            fields = {"PartNumber": part, "Body": data, "ContentMD5": md5_of(BytesIO(data))}
            answer = self._call(what, self._client.upload_part, **upload, **fields)
            return {"PartNumber": part, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
                parts = list(pool.map(send, range(1, -(-size // self._part) + 1)))
            complete, made = self._client.complete_multipart_upload, {"Parts": parts}
            self._call(what, complete, **upload, IfNoneMatch="*", MultipartUpload=made)
        except BaseException:
            self._abort(upload)
            raise

    def _abort(self, upload: dict[str, str]) -> None:
        with suppress(StillframeError):
            self._call("remove an upload", self._client.abort_multipart_upload, **upload)

    def _remove_abandoned(self) -> None:
        """Parts of uploads that killed processes left; they cost money and are in no listing."""
        old = datetime.now(UTC) - _ABANDONED
        with suppress(StillframeError):
            found = self._call("list uploads", self._client.list_multipart_uploads, Prefix=self._prefix)
            for upload in found.get("Uploads", []):
                if upload["Initiated"] < old:
                    self._abort({"Key": upload["Key"], "UploadId": upload["UploadId"]})

    # --- removing ----------------------------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        self._guard()
        key = self._key(name)
        if self.features.locks:
            self._delete_versions(name, key)
            return
        until = max(self._retained(key), default=0)
        if until > time.time():
            raise _locked(name, datetime.fromtimestamp(until, UTC))
        self._call(f"delete {name}", self._client.delete_object, Key=key)
        for mark in self._retained(key):
            self._call(f"delete {name}", self._client.delete_object, Key=self._mark(key, mark))

    def _delete_versions(self, name: str, key: str) -> None:
        """In a bucket with Object Lock a plain delete only hides an object; what is meant is that it is gone."""
        found = self._call(f"look at {name}", self._client.list_object_versions, Prefix=key)
        for version in [*found.get("Versions", []), *found.get("DeleteMarkers", [])]:
            if version["Key"] != key:
                continue
            one = {"Key": key, "VersionId": version["VersionId"]}
            try:
                self._call(f"delete {name}", self._client.delete_object, **one)
            except Denied:
                until = self._call(f"look at {name}", self._client.head_object, **one).get("ObjectLockRetainUntilDate")
                if until is not None and until > datetime.now(UTC) - _A_MOMENT:
                    raise _locked(name, until) from None
                raise

    def retain(self, name: str, until: datetime) -> None:
        self._guard()
        key = self._key(name)
        found = self._call(f"look at {name}", self._client.head_object, Key=key)
        if not self.features.locks:
            mark = self._mark(key, int(until.timestamp()) + 1)
            self._call(f"retain {name}", self._client.put_object, Key=mark, Body=b"", ContentMD5=md5_of(BytesIO()))
        elif (known := found.get("ObjectLockRetainUntilDate")) is None or known < until:
            retention = {"Mode": "COMPLIANCE", "RetainUntilDate": until}
            self._call(f"retain {name}", self._client.put_object_retention, Key=key, Retention=retention)

    def _mark(self, key: str, until: int) -> str:
        return f"{self._prefix}{_RETAINED}{key.removeprefix(self._prefix)}/{until}"

    def _retained(self, key: str) -> list[int]:
        """Until when an object is retained: Unix times, in a bucket without Object Lock."""
        return [int(found.rpartition("/")[2]) for found, _ in self._listed(self._mark(key, 0).removesuffix("0"))]

    def copies(self) -> Sequence[Store]:
        return (self,)

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            return self._fetched(name, offset, length)
        except ObjectMissing:
            if self._marker is not None and self._read_marker() != self._marker:
                raise VaultMissing(f"the vault at {self._place} is gone", hint=_MISSING_HINT) from None
            raise ObjectMissing(f"{name} is missing from the vault at {self._place}") from None

    def _fetched(self, name: str, offset: int, length: int | None) -> bytes:
        key, what = self._key(name), f"read {name}"
        if length == 0:  # there is no range without bytes
            size = self._call(what, self._client.head_object, Key=key)["ContentLength"]
            data = b""
        else:
            try:
                data, size = self._try(what, partial(self._fetch, key, offset, length))
            except PastEnd:
                if length is None:
                    return b""
                raise Corrupt(f"{name} is cut short: wanted {offset} to {offset + length}") from None
        if length is not None and offset + length > size:
            raise Corrupt(f"{name} is cut short: {size} bytes, wanted {offset} to {offset + length}")
        return data

    def _fetch(self, key: str, offset: int, length: int | None) -> tuple[bytes, int]:
        """The bytes of a range, or what there is of it; and the size of the object. Raises ShortAnswer."""
        end = "" if length is None else offset + length - 1
        wanted = {} if not offset and length is None else {"Range": f"bytes={offset}-{end}"}
        answer = self._client.get_object(Bucket=self._bucket, Key=key, **wanted)
        data = answer["Body"].read()
        if len(data) != answer["ContentLength"]:
            raise ShortAnswer(f"{len(data)} bytes of {answer['ContentLength']}")
        if not wanted:
            return data, len(data)
        if "ContentRange" not in answer:
            raise VaultError(f"{self._place} does not honour ranges: it answers with {len(data)} bytes")
        found = _RANGE.fullmatch(answer["ContentRange"])
        if found is None:
            raise ShortAnswer(f"a range that makes no sense: {answer['ContentRange']}")
        first, last, size = map(int, found.groups())
        stop = size if length is None else min(size, offset + length)
        if (first, last + 1) != (offset, stop) or len(data) != stop - offset:
            raise ShortAnswer(f"{len(data)} bytes, {answer['ContentRange']}, instead of {wanted}")
        return data, size

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        checked(prefix.rpartition("/")[0] or MARKER)
        nothing = True
        for key, size in self._listed(self._prefix + prefix):
            nothing = False
            name = key.removeprefix(self._prefix)
            if NAME.fullmatch(name):
                yield ObjectInfo(name, size)
        if nothing and self._marker is not None and self._read_marker() != self._marker:
            raise VaultMissing(f"the vault at {self._place} is gone", hint=_MISSING_HINT)  # it must not look empty

    def _listed(self, prefix: str) -> Iterator[tuple[str, int]]:
        more: dict[str, str] = {}
        while True:
            page = self._call(f"list {prefix}", self._client.list_objects_v2, Prefix=prefix, **more)
            for found in page.get("Contents", []):
                yield found["Key"], found["Size"]
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def free_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        """Remove this process's staging folder, and let go of connections."""
        self._staging.close()
        self._disconnect()


def _locked(name: str, until: datetime) -> Locked:
    return Locked(f"{name} is retained until {until:%Y-%m-%d %H:%M} UTC")
