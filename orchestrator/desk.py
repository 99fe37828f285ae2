"""A part of `Service`: what several of them have in common."""

from __future__ import annotations

from orchestrator.config import Config


class Desk:
    """Decides by a configuration, which may be replaced while it stays: each call looks it up once more."""

    _config: Config

    def use(self, config: Config) -> None:
        """From now on this one is in force."""
        self._config = config
