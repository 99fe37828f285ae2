"""The way into a guest by the QEMU guest agent, over whatever carries its JSON.

Every call has a time limit of its own: a freeze waits for writes of the whole guest and may hang, and without a limit
it would hold the caller, and with it the thaw, for ever. A freeze that timed out may succeed later, so every failed
freeze must be followed by a thaw. While frozen the agent answers only ping, sync, info, status and thaw.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable

from workers.contract.errors import GuestError

FREEZE_SECONDS = 30.0
THAW_SECONDS = 10.0
ASK_SECONDS = 5.0
_ALLOW = "allow the guest-fsfreeze-* commands in the guest: /etc/qemu/qemu-ga.conf or /etc/sysconfig/qemu-ga"


class AgentChannel:
    """See `seams.GuestChannel`. `command(request, timeout)` sends one JSON command and returns the JSON reply; it
    raises GuestError when there is none within `timeout` seconds."""

    def __init__(self, command: Callable[[str, float], str]) -> None:
        self._command = command

    def ping(self) -> bool:
        """Whether an agent answers now, and to this very question. Never raises GuestError."""
        token = secrets.randbelow(1 << 31)
        try:
            return self._ask("guest-sync", ASK_SECONDS, {"id": token}) == token
        except GuestError:
            return False

    def freeze(self) -> int:
        """After any error the guest may be frozen, or become so later, all the same: thaw."""
        return self._count("guest-fsfreeze-freeze", FREEZE_SECONDS)

    def thaw(self) -> int:
        return self._count("guest-fsfreeze-thaw", THAW_SECONDS)

    def frozen(self) -> bool:
        return self._ask("guest-fsfreeze-status", ASK_SECONDS) == "frozen"

    def _count(self, name: str, timeout: float) -> int:
        found = self._ask(name, timeout)
        if not isinstance(found, int):
            raise GuestError(f"the guest agent answered {name} with {found!r}")
        return found

    def _ask(self, name: str, timeout: float, arguments: dict[str, object] | None = None) -> object:
        request: dict[str, object] = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        try:
            return _returned(name, self._command(json.dumps(request), timeout))
        except GuestError as error:
            if "disabled" in str(error):
                raise GuestError(str(error), hint=_ALLOW) from None
            raise


def _returned(name: str, raw: str) -> object:
    try:
        reply = json.loads(raw)
    except ValueError:
        raise GuestError(f"the guest agent answered {name} with something that is not JSON") from None
    if isinstance(reply, dict) and "return" in reply:
        return reply["return"]
    error = reply.get("error") if isinstance(reply, dict) else None
    words = error.get("desc") if isinstance(error, dict) else None
    raise GuestError(f"the guest agent refused {name}: {words or raw}")
