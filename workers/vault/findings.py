"""What a verification is asked for, and what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from enum import StrEnum

from workers.contract.errors import UsageError
from workers.contract.machines import Value


class Level(StrEnum):
    IDS = "ids"
    PACKS = "packs"
    SAMPLE = "sample"
    FULL = "full"


class Share(Value):
    """A part of the packs: those whose names fall into it, so that every pack is in exactly one of `of` parts."""

    number: int
    """From 1."""
    of: int

    @staticmethod
    def parse(text: str, today: date) -> Share:
        """`3/30`, or `auto`: of 30, the one whose day it is. Raises UsageError."""
        if text == "auto":
            return Share(number=today.toordinal() % AUTO + 1, of=AUTO)
        found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(f"{text!r} is no share", hint=f"write 1/{AUTO} to {AUTO}/{AUTO}, or auto")
        return Share(number=int(found[1]), of=int(found[2]))

    def holds(self, pack: str) -> bool:
        return int(pack.rpartition("/")[2][:8], 16) % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


AUTO = 30
"""Shares of a vault that is verified a part each night."""


class Progress(Value):
    """Where a verification is: `done` of `total` packs or disks."""

    stage: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]


def quiet(_: Progress) -> None:
    """Progress that nobody watches."""


class Affected(Value):
    """A disk of a point that cannot be restored whole."""

    point: str
    machine: str
    target: str


class Finding(Value):
    object: str
    """Name of the object that is damaged or missing; `block <id>` if no object of the index holds it."""
    problem: str
    affected: list[Affected] = []


class VerifyReport(Value):
    level: Level
    share: str = ""
    """`3/30`: only the packs of this part were read; empty: all that the level asks for."""
    findings: list[Finding]
    points: int = 0
    packs: int = 0
    """Whose SHA-256 was computed."""
    blocks: int = 0
    """Decrypted and hashed again."""
    read_bytes: int = 0
    repaired: int = 0
    """Packs that were known to be damaged, and were found whole."""

    @property
    def ok(self) -> bool:
        return not self.findings
