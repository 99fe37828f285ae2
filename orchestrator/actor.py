"""Who does what this process does."""

from __future__ import annotations

import getpass
import os
import socket

SCHEDULE = "schedule"
"""Who did what was due."""


def whoami() -> str:
    """For people who read later who did it: `anna@host`; behind sudo, who typed it: `anna (root)@host`."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "somebody"
    behind = os.environ.get("SUDO_USER", "")
    if behind.isprintable() and 0 < len(behind) <= 64 and behind != name:
        name = f"{behind} ({name})"
    return f"{name}@{socket.gethostname()}"
