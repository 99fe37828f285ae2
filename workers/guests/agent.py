"""The way into a guest by the QEMU guest agent, over whatever carries its JSON.

Every call has a time limit of its own: a freeze waits for writes of the whole guest and may hang, and without a limit
it would hold the caller, and with it the thaw, for ever. A freeze that timed out may succeed later, so every failed
freeze must be followed by a thaw. While frozen the agent answers only ping, sync, info, status and thaw.

What it allows is read from its own list (`guest-info`) each time: distributions switch commands off, EL 9 all that run
programs or touch files. A command's status can be read once only, and it cannot be killed from outside.

The output of a command travels in one reply. libvirt 9 carries replies of 4 MiB (3 MiB of output); one of more than
10 MiB breaks its link to the agent until the agent is started anew (measured). So ask for little.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from workers.contract.errors import GuestError, GuestTimeout, HypervisorError
from workers.contract.guests import GuestInfo, GuestOs, Ran

FREEZE_SECONDS = 30.0
WINDOWS_FREEZE_SECONDS = 75.0
"""VSS asks every writer first: up to 60 s, and qemu-ga waits as long."""
THAW_SECONDS = 10.0
ASK_SECONDS = 5.0
PIECE = 64 << 10
"""Bytes of a file per message. libvirt carries strings of 4 MiB, but the agent reads its port in small steps: 1 MiB
took more than 5 s in an emulated guest, 64 KiB some 50 ms."""
FILE_SECONDS = 30.0
STATUS_SECONDS = 30.0
"""For a status: the last one carries all output."""
_POLL_FIRST, _POLL_MOST = 0.005, 0.1
_POLL_SHARE = 8
"""A pause is an eighth of the time until then, and as long as three questions took: waiting costs the result at most an
eighth more, and the guest a quarter of its time where it is slow (an emulated one takes 7 ms for an answer)."""
_LINUX_ONLY = {"guest-set-vcpus", "guest-get-memory-blocks", "guest-suspend-hybrid"}
"""No other system's agent allows these."""
_SETTINGS = "/etc/qemu/qemu-ga.conf or /etc/sysconfig/qemu-ga"

Json = dict[str, Any]


class AgentChannel:
    """See `seams.GuestChannel`. `command(request, timeout)` sends one JSON command and returns the JSON reply; it
    raises GuestError when there is none within `timeout` seconds."""

    def __init__(self, command: Callable[[str, float], str], *, freeze_seconds: float | None = None) -> None:
        """`freeze_seconds`: None: as the guest's system needs it, once `info` has seen it."""
        self._command = command
        self._freeze_seconds = freeze_seconds
        self._windows = False

    def close(self) -> None:
        """Nothing is open between two commands."""

    # --- what it is --------------------------------------------------------------------------------------------

    def ping(self) -> bool:
        """Whether an agent answers now, and to this very question. Never raises GuestError."""
        token = secrets.randbelow(1 << 31)
        try:
            return self._ask("guest-sync", ASK_SECONDS, {"id": token}) == token
        except GuestError:
            return False

    def info(self) -> GuestInfo:
        said = self._table("guest-info")
        commands = said.get("supported_commands")
        allowed = {
            str(command.get("name"))
            for command in (commands if isinstance(commands, list) else [])
            if isinstance(command, dict) and command.get("enabled")
        }
        os, release = self._os(allowed)
        self._windows = os is GuestOs.WINDOWS
        return GuestInfo(
            os=os,
            release=release,
            agent=str(said.get("version", "")),
            can_run={"guest-exec", "guest-exec-status"} <= allowed,
            can_copy={f"guest-file-{act}" for act in ("open", "read", "write", "close")} <= allowed,
            can_freeze={f"guest-fsfreeze-{act}" for act in ("freeze", "thaw", "status")} <= allowed,
            can_freeze_some="guest-fsfreeze-freeze-list" in allowed,
            can_plant_keys={f"guest-ssh-{act}-authorized-keys" for act in ("add", "remove")} <= allowed,
        )

    def _os(self, allowed: set[str]) -> tuple[GuestOs, str]:
        """Linux is known by its kernel's version, which begins with `#` (an `id` is there only with an os-release);
        where the agent does not tell, since it is old or frozen, by what no other system's agent allows."""
        said: Json = {}
        if "guest-get-osinfo" in allowed:
            with suppress(GuestError):
                said = self._table("guest-get-osinfo")
        if said.get("id") == "mswindows":
            os = GuestOs.WINDOWS
        elif str(said.get("kernel-version", "")).startswith("#") or (not said and allowed & _LINUX_ONLY):
            os = GuestOs.LINUX
        else:
            os = GuestOs.OTHER
        return os, str(said.get("pretty-name") or said.get("name") or said.get("kernel-release") or "")

    # --- commands and files ------------------------------------------------------------------------------------

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Ran:
        if len(stdin) > PIECE:
            raise GuestError(f"{len(stdin)} bytes are too many for the standard input of a command: put a file")
        if any("\0" in word for word in argv):
            raise GuestError(f"an argument of {argv[0]!r} has a zero byte in it")
        arguments: Json = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        if stdin:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        begun = asked = time.monotonic()
        pid = self._table("guest-exec", arguments=arguments).get("pid")
        while True:
            now = time.monotonic()
            time.sleep(min(max(_POLL_FIRST, (now - begun) / _POLL_SHARE, 3 * (now - asked)), _POLL_MOST))
            asked = time.monotonic()
            said = self._status(argv[0], pid)
            if said.get("exited"):
                return _ran(said)
            if time.monotonic() > begun + timeout:
                raise GuestTimeout(f"{argv[0]} did not end within {timeout:g} s in the guest, and may still run")

    def _status(self, program: str, pid: object) -> Json:
        """An agent tells the end of a command once: when that reply is lost, so is the end. To libvirt's client a reply
        that is too long looks like a lost connection."""
        try:
            return self._table("guest-exec-status", STATUS_SECONDS, {"pid": pid})
        except (GuestError, HypervisorError) as error:
            words = f"{program} was started in the guest, and how it ended is not known: {error}"
            raise GuestError(words, hint=error.hint) from None

    def put_file(self, path: str, data: bytes) -> None:
        """The agent creates files with mode 0666 whatever its umask: measured."""
        with self._opened(path, "wb") as handle:
            for at in range(0, len(data), PIECE):
                self._write_piece(handle, path, data[at : at + PIECE])

    def _write_piece(self, handle: object, path: str, piece: bytes) -> None:
        while piece:
            sent = {"handle": handle, "buf-b64": base64.b64encode(piece).decode()}
            count = self._table("guest-file-write", FILE_SECONDS, sent).get("count")
            if not isinstance(count, int) or not 0 < count <= len(piece):
                raise GuestError(f"{path} could not be written in the guest: {count} of {len(piece)} bytes taken")
            piece = piece[count:]

    def get_file(self, path: str, *, limit: int) -> bytes:
        found = bytearray()
        with self._opened(path, "rb") as handle:
            while len(found) < limit:
                wanted = {"handle": handle, "count": min(PIECE, limit - len(found))}
                said = self._table("guest-file-read", FILE_SECONDS, wanted)
                piece = _bytes(said.get("buf-b64"))
                found += piece
                if said.get("eof") or not piece:
                    break
        return bytes(found[:limit])

    @contextmanager
    def _opened(self, path: str, mode: str) -> Iterator[object]:
        """An agent keeps a handle for ever that nobody closes."""
        if "\0" in path:
            raise GuestError(f"{path!r} has a zero byte in it")
        handle = self._ask("guest-file-open", ASK_SECONDS, {"path": path, "mode": mode})
        try:
            yield handle
        except BaseException:
            with suppress(GuestError):  # the first error is the news
                self._ask("guest-file-close", ASK_SECONDS, {"handle": handle})
            raise
        # What is left in the agent's buffer is written now: a full disk may show only here.
        self._ask("guest-file-close", FILE_SECONDS, {"handle": handle})

    # --- freeze ------------------------------------------------------------------------------------------------

    def freeze(self, mounts: Sequence[str] = ()) -> int:
        """After any error the guest may be frozen, or become so later, all the same: thaw."""
        timeout = self._freeze_seconds or (WINDOWS_FREEZE_SECONDS if self._windows else FREEZE_SECONDS)
        if mounts:
            return self._count("guest-fsfreeze-freeze-list", timeout, {"mountpoints": list(mounts)})
        return self._count("guest-fsfreeze-freeze", timeout)

    def thaw(self) -> int:
        return self._count("guest-fsfreeze-thaw", THAW_SECONDS)

    def frozen(self) -> bool:
        found = self._ask("guest-fsfreeze-status", ASK_SECONDS)
        if found not in ("frozen", "thawed"):
            raise GuestError(f"the guest agent answered guest-fsfreeze-status with {found!r}")
        return found == "frozen"

    # --- for the other way in ----------------------------------------------------------------------------------

    def plant_key(self, user: str, key: str) -> None:
        """Let the SSH public key `key` in as `user`."""
        self._ask("guest-ssh-add-authorized-keys", ASK_SECONDS, {"username": user, "keys": [key]})

    def remove_key(self, user: str, key: str) -> None:
        """Absent already: no error."""
        self._ask("guest-ssh-remove-authorized-keys", ASK_SECONDS, {"username": user, "keys": [key]})

    def keys(self, user: str) -> list[str]:
        """Public keys that are let in as `user`."""
        said = self._table("guest-ssh-get-authorized-keys", arguments={"username": user})
        found = said.get("keys")
        return [str(key) for key in found] if isinstance(found, list) else []

    def addresses(self) -> list[str]:
        """Of the guest's interfaces, IPv4 first; those that nobody outside can reach are left out."""
        found = []
        said = self._ask("guest-network-get-interfaces", ASK_SECONDS)
        for interface in _tables(said):
            for entry in _tables(interface.get("ip-addresses")):
                with suppress(ValueError):
                    address = ipaddress.ip_address(str(entry.get("ip-address")))
                    if not (address.is_loopback or address.is_link_local or address.is_unspecified):
                        found.append(address)
        return [str(address) for address in sorted(found, key=lambda address: address.version)]

    # --- the wire ----------------------------------------------------------------------------------------------

    def _table(self, name: str, timeout: float = ASK_SECONDS, arguments: Json | None = None) -> Json:
        found = self._ask(name, timeout, arguments)
        if not isinstance(found, dict):
            raise GuestError(f"the guest agent answered {name} with {found!r}")
        return found

    def _count(self, name: str, timeout: float, arguments: Json | None = None) -> int:
        found = self._ask(name, timeout, arguments)
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise GuestError(f"the guest agent answered {name} with {found!r}")
        return found

    def _ask(self, name: str, timeout: float, arguments: Json | None = None) -> object:
        request: Json = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        try:
            return _returned(name, self._command(json.dumps(request), timeout))
        except GuestError as error:
            if "disabled" not in str(error) or error.hint:
                raise
            words = str(error)
            if "frozen" not in words and name != "guest-fsfreeze-status" and self._surely_frozen():
                words += " (the guest is frozen)"
            raise GuestError(words, hint=_hint(name, words)) from None

    def _surely_frozen(self) -> bool:
        """A frozen agent older than QEMU 6 refuses in the words of one that never allows the command."""
        with suppress(GuestError):
            return self.frozen()
        return False


def _hint(name: str, refusal: str) -> str:
    """What to do about a command that is switched off."""
    if "frozen" in refusal:
        return "a frozen guest agent does nothing but thaw"
    groups = ("guest-fsfreeze-", "guest-file-", "guest-exec", "guest-ssh-")
    group = next((f"{group}*" for group in groups if name.startswith(group)), name)
    return f"allow {group} in the guest: {_SETTINGS}"


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


def _ran(said: Json) -> Ran:
    """How a command ended. Windows' agent reports a status of 0xC0000000 and above as a signal: it is none, and stays
    what it is, whatever its sign on the wire."""
    code, signal = said.get("exitcode"), said.get("signal")
    if isinstance(signal, int) and signal:
        code = 128 + signal if 0 < signal < 128 else signal & 0xFFFFFFFF
    if not isinstance(code, int):
        raise GuestError("the guest agent does not say how a command ended")
    return Ran(
        code=code,
        out=_bytes(said.get("out-data")),
        err=_bytes(said.get("err-data")),
        truncated=bool(said.get("out-truncated") or said.get("err-truncated")),
    )


def _tables(found: object) -> list[Json]:
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _bytes(data: object) -> bytes:
    try:
        return base64.b64decode(str(data or ""), validate=True)
    except ValueError:  # binascii.Error is one
        raise GuestError("the guest agent sent something that is not base64") from None
