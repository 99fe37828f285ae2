"""Who does what this process does."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SCHEDULE = "schedule"
"""Who did what was due."""
_acting: ContextVar[str] = ContextVar("acting", default="")


@contextmanager
def acting_as(actor: str) -> Iterator[None]:
    """Whatever this thread does meanwhile, `actor` does."""
    token = _acting.set(actor)
    try:
        yield
    finally:
        _acting.reset(token)


def whoami() -> str:
    """For people who read later who did it: `anna@host`; behind sudo, who typed it: `anna (root)@host`."""
    if acting := _acting.get():
        return acting
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "somebody"
    behind = os.environ.get("SUDO_USER", "")
    if behind.isprintable() and 0 < len(behind) <= 64 and behind != name:
        name = f"{behind} ({name})"
    return f"{name}@{socket.gethostname()}"
