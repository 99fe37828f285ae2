"""What the stand-in for a Windows guest has in place of Windows: a disk, a registry, VSS.

As little as the extension touches. Data that tests may set are plain fields; what is measured of a run is noted in them
too: the kind of backup that each freeze was (`Vss.kinds`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

SERVICES = "HKLM:\\SYSTEM\\CurrentControlSet\\Services"
VSS_KEY = f"{SERVICES}\\VSS"
PROVIDER_KEY = f"{SERVICES}\\QEMU Guest Agent VSS Provider"
PROVIDER_ID_KEY = f"{VSS_KEY}\\Providers\\{{3629d4ed-ee09-4e0e-9a5c-6d8ba2872aef}}"
DISABLED = 4
INHERITED = "inherited"
"""Access rules of a folder that was made without any: others may write into many of those."""

WRITERS = {
    "Task Scheduler Writer": "{d61d61c8-d73a-4eee-8cdd-f6f9786b7124}",
    "VSS Metadata Store Writer": "{75dfb225-e2e4-4d39-9ac9-ffaff65ddf06}",
    "Performance Counters Writer": "{0bada1de-01a9-4625-8278-69e735f39dd2}",
    "System Writer": "{e8132975-6f93-4464-a53e-1050253ae220}",
    "SqlServerWriter": "{a65faa63-5ea8-4ebc-9dbd-a0c4db26912a}",
    "Registry Writer": "{afbab4a2-367d-4d15-a586-71dbb18f8485}",
}


class WindowsError(Exception):
    """In the words that Windows has for it."""


class Disk:
    """Files and folders, whose names are the same in capitals. A folder has access rules in SDDL."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}
        self._folders: dict[str, str] = {}
        for path in ("C:", "C:\\Windows", "C:\\Temp", "C:\\Program Files", "C:\\ProgramData"):
            self._folders[path.lower()] = INHERITED
        self.came_open: list[str] = []
        """Files that came into a folder that was not closed."""

    def make_folder(self, path: str, rules: str = INHERITED) -> None:
        """With its parents; one that is there keeps its rules."""
        key = self._key(path)
        if key in self._folders:
            return
        self.make_folder(self._parent(key), rules)
        self._folders[key] = rules

    def set_rules(self, path: str, rules: str) -> None:
        self._folders[self._key(path)] = rules

    def rules(self, path: str) -> str:
        """Of a folder: its own, or those it inherits."""
        key = self._key(path)
        while self._folders.get(key) == INHERITED and "\\" in key:
            key = self._parent(key)
        return self._folders.get(key, INHERITED)

    def is_folder(self, path: str) -> bool:
        return self._key(path) in self._folders

    def open(self, path: str, *, write: bool) -> bytearray:
        """The content of a file, emptied if it is to be written."""
        key = self._key(path)
        if any(char in path for char in '"<>|?*') or ":" in path[2:]:
            raise WindowsError("The filename, directory name, or volume label syntax is incorrect.")
        if key in self._folders:
            raise WindowsError("Access is denied.")
        if self._parent(key) not in self._folders:
            raise WindowsError("The system cannot find the path specified.")
        if not write:
            if key not in self.files:
                raise WindowsError("The system cannot find the file specified.")
            return self.files[key]
        if self.rules(self._parent(key)) == INHERITED:
            self.came_open.append(path)
        self.files[key] = bytearray()
        return self.files[key]

    def text(self, path: str) -> str:
        """Of a file; empty without one."""
        return bytes(self.files.get(self._key(path), b"")).decode()

    def write(self, path: str, text: str) -> None:
        self.open(path, write=True)[:] = text.encode()

    def move_folder(self, path: str, to: str) -> None:
        old, new = self._key(path), self._key(to)
        if new in self._folders:
            raise WindowsError(f"Cannot create '{to}' because a file or directory with the same name already exists.")
        self._folders = {self._moved(key, old, new): rules for key, rules in self._folders.items()}
        self.files = {self._moved(key, old, new): data for key, data in self.files.items()}

    def remove(self, path: str) -> None:
        """A file, or a folder with all that is in it. Absent: no error."""
        gone = self._key(path)
        self._folders = {key: rules for key, rules in self._folders.items() if not self._is_in(key, gone)}
        self.files = {key: data for key, data in self.files.items() if not self._is_in(key, gone)}

    def folders_in(self, path: str) -> list[str]:
        """Names, as small letters."""
        parent = self._key(path)
        return [key.rpartition("\\")[2] for key in self._folders if "\\" in key and self._parent(key) == parent]

    @staticmethod
    def _key(path: str) -> str:
        return path.replace("/", "\\").rstrip("\\").lower()

    @staticmethod
    def _parent(key: str) -> str:
        return key.rpartition("\\")[0]

    @staticmethod
    def _is_in(key: str, folder: str) -> bool:
        return key == folder or key.startswith(f"{folder}\\")

    @classmethod
    def _moved(cls, key: str, old: str, new: str) -> str:
        return new + key[len(old) :] if cls._is_in(key, old) else key


@dataclass
class Vss:
    """The agent's requester and provider, as `qga/vss-win32` has them."""

    registry: dict[str, dict[str, int]]
    volumes: list[str] = field(default_factory=lambda: ["C:\\", "D:\\"])
    freeze_seconds: float = 0.05
    """How long the writers take until they are at rest."""
    hold_seconds: float = 10.0
    """After that Windows lets go by itself."""
    failing: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Writers that fail: name → (state, last error)."""
    kinds: list[int] = field(default_factory=list)
    """VSS_BACKUP_TYPE of each freeze: 1 full, 5 copy."""
    held: int = 0
    """Volumes of the freeze that was begun and not ended."""
    since: float = 0.0
    timed_out: bool = False

    def freeze(self, chosen: list[str] | None) -> None:
        """Begin. Raises WindowsError; nothing is held then."""
        if self.registry.get(VSS_KEY, {}).get("Start") == DISABLED:
            raise WindowsError(
                "failed to create VSS backup components: The service cannot be started, either because it is disabled "
                "or because it has no enabled devices associated with it. "
            )
        unknown = [volume for volume in chosen or [] if volume not in self.volumes]
        for volume in unknown or ([] if PROVIDER_ID_KEY in self.registry else self.volumes):
            raise WindowsError(f"failed to add {volume} to snapshot set: ")
        kind = self.registry.get(PROVIDER_KEY, {}).get("VssOption", 1)
        self.kinds.append(kind if 1 <= kind <= 5 else 1)
        self.held, self.since, self.timed_out = len(chosen or self.volumes), time.monotonic(), False

    @property
    def holding(self) -> bool:
        """Whether writes are really held."""
        return self.held > 0 and time.monotonic() - self.since <= self.hold_seconds

    def thaw(self) -> int:
        """End; nothing is held afterwards. Raises WindowsError if Windows had let go before."""
        held, holding = self.held, self.holding
        self.held = 0
        if held and not holding:
            self.timed_out = True
            raise WindowsError("couldn't hold writes: fsfreeze is limited up to 10 seconds: ")
        return held

    def list_writers(self) -> str:
        """What `vssadmin list writers` prints."""
        blocks = [
            "vssadmin 1.1 - Volume Shadow Copy Service administrative command-line tool\n"
            "(C) Copyright 2001-2013 Microsoft Corp.\n"
        ]
        for name, id in WRITERS.items():
            state, error = self.failing.get(name, (7, "Timed out") if self.timed_out else (1, "No error"))
            blocks.append(
                f"Writer name: '{name}'\n   Writer Id: {id}\n"
                f"   Writer Instance Id: {{1bddd48e-5052-49db-9b07-b96f967{len(blocks):05x}}}\n"
                f"   State: [{state}] {'Stable' if state == 1 else 'Failed'}\n   Last error: {error}\n"
            )
        return "\n".join(blocks)


@dataclass
class Windows:
    """One machine. Its uptime begins anew with each `restart`."""

    disk: Disk = field(default_factory=Disk)
    registry: dict[str, dict[str, int]] = field(
        default_factory=lambda: {
            VSS_KEY: {"Start": 3},
            PROVIDER_KEY: {"Start": 3, "VssOption": 1},
            PROVIDER_ID_KEY: {},
        }
    )
    vss: Vss = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.vss = Vss(self.registry)

    def uptime(self) -> float:
        return time.monotonic() - self.started

    def restart(self) -> None:
        self.started = time.monotonic()
        self.vss.held, self.vss.timed_out = 0, False
