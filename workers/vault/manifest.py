"""What a point's manifest says. Whoever reads one may rely on its disks having maps that can be walked."""

from __future__ import annotations

import json
import re

from pydantic import ValidationError

from workers.contract.errors import Corrupt, NewerFormat
from workers.contract.points import DiskPoint, Point
from workers.vault.packs import LARGEST_BLOCK
from workers.vault.sealing import UPGRADE

SCHEMA_VERSION = 2
"""Of `Point`."""
_ROOT = re.compile(r"[0-9a-f]{64}")


def decode_manifest(plain: bytes, point_id: str, what: str) -> Point | None:
    """None for an aborted marker. Raises Corrupt, NewerFormat."""
    try:
        content = json.loads(plain)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and content.get("aborted") == point_id:
        return None
    fields = content.get("point") if isinstance(content, dict) else None
    version = fields.get("schema_version", 0) if isinstance(fields, dict) else None
    if not isinstance(version, int):
        raise Corrupt(f"{what} does not describe a point")
    if version > SCHEMA_VERSION:
        raise NewerFormat(f"{what} was written by a newer Stillframe", hint=UPGRADE)
    try:
        point = Point.model_validate_json(json.dumps(fields))
    except (ValidationError, RecursionError):
        raise Corrupt(f"{what} does not describe a point") from None
    if point.id != point_id:
        raise Corrupt(f"{what} describes another point")
    if not all(map(_has_a_map, point.disks)):
        raise Corrupt(f"{what} describes a disk that cannot be")
    return point


def _has_a_map(disk: DiskPoint) -> bool:
    block = disk.block_size
    whole = 0 < block <= LARGEST_BLOCK and block & (block - 1) == 0
    return whole and 0 <= disk.capacity < 1 << 63 and _ROOT.fullmatch(disk.root) is not None
