"""The vault: encrypted, deduplicated blocks, and the points that name them. `FORMAT.md` is the specification."""

from workers.vault.blockmap import BlockMap
from workers.vault.keys import SlotInfo, read_key_file, write_key_file
from workers.vault.mapwriter import MapWriter
from workers.vault.packs import ZERO_ID
from workers.vault.reader import BlockReader, Span
from workers.vault.sessions import SessionInfo
from workers.vault.stores import DirectoryStore, open_store
from workers.vault.vault import Vault, VaultStats
from workers.vault.writer import BlockWriter

__all__ = [
    "ZERO_ID",
    "BlockMap",
    "BlockReader",
    "BlockWriter",
    "DirectoryStore",
    "MapWriter",
    "SessionInfo",
    "SlotInfo",
    "Span",
    "Vault",
    "VaultStats",
    "open_store",
    "read_key_file",
    "write_key_file",
]
