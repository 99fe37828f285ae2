"""What a controller does again and again, whoever is its leader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Chore:
    """Done by the leading controller only, one chore after the other in one thread: whoever has long work to do makes
    a job of it. A chore that fails is told as an alert and tried again at its next turn; it never ends the others."""

    name: str
    seconds: float
    """From the end of one turn to the beginning of the next, at most: news (a job that ended, a new configuration)
    bring it forward."""
    act: Callable[[datetime], None]
    """What to do, given the time."""
