"""A second, independent reader, written from `workers/vault/FORMAT.md` alone. It imports nothing of Stillframe: if it
and the vault disagree, the vault's format is not what the document says.

`python second_reader.py VAULT KEYFILE` lists the points; with `POINT TARGET` it writes that disk to standard output.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

ZERO = bytes(32)
DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class Wrong(Exception):
    """Something is not as the format says."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)


def hkdf(key: bytes, salt: bytes, info: str) -> bytes:
    return HKDF(SHA256(), 32, salt, info.encode()).derive(key)


def plain_object(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_text())
    check = fields.pop("sum")
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    require(hashlib.sha256(canonical.encode()).hexdigest() == check, f"sum of {path}")
    return fields


def phrase_secret(phrase: str) -> bytes:
    text = phrase.upper().replace("-", "").replace(" ", "").translate(str.maketrans("OIL", "011"))
    number = 0
    for digit in text[:40]:
        number = number * 32 + DIGITS.index(digit)
    require((DIGITS + "*~$=U")[number % 37] == text[40], "check digit")
    return number.to_bytes(25, "big")


class SecondReader:
    def __init__(self, root: Path, *, key: bytes = b"", phrase: str = "", passphrase: bytes = b"") -> None:
        self.root = root
        marker = plain_object(root / "vault.json")
        require(marker["format"] == 1 and marker["stillframe"] == "vault", "marker")
        self.vault = bytes.fromhex(marker["id"])
        secret = {"keyfile": key, "passphrase": passphrase, "recovery": phrase_secret(phrase) if phrase else b""}
        self.keys = {0: self._master(marker["id"], secret)}
        id_keys = set()
        for path in sorted((root / "keyring").iterdir()):
            ring = json.loads(self._open_sealed(path, b"SFKRING\0", "keyring", f"keyring/{path.name}"))
            require(f"{ring['version']:08d}" == path.name, "version of a keyring")
            self.keys[ring["version"]] = bytes.fromhex(ring["data_key"])
            id_keys.add(bytes.fromhex(ring["id_key"]))
        (id_key,) = id_keys
        self.id_keys = {
            0: hkdf(id_key, self.vault, "stillframe id data"),
            1: hkdf(id_key, self.vault, "stillframe id page"),
        }
        self.index: dict[bytes, list[tuple[str, bytes]]] = {}
        """Block id → its copies: pack and entry."""
        self.damage = self._damage()

    def lock_periods(self) -> list[int]:
        """The periods of all locks, in order; each must be a valid successor of the one before."""
        found: list[int] = []
        before: dict[str, Any] = {"days": 0}
        for path in sorted((self.root / "locks").iterdir()):
            lock = plain_object(path)
            require(f"{lock['number']:08d}" == path.name, "number of a lock")
            longer = lock["days"] >= before["days"] and lock["approvers"] == before.get("approvers")
            if before["days"] and not longer:
                self._check_approval(lock, before)
            found.append(lock["days"])
            before = lock
        return found

    def _check_approval(self, lock: dict[str, Any], before: dict[str, Any]) -> None:
        require(lock["approval"] != "", "a lock was shortened without an approval")
        asked, slot = lock["approval"]["request"], lock["approval"]["slot"]
        require(asked["vault"] == self.vault.hex() and asked["number"] == lock["number"], "what was approved")
        require(asked["days_before"] == before["days"] and asked["days"] == lock["days"], "what was approved")
        require(asked["approvers"] == lock["approvers"], "what was approved")
        require(slot in before["approvers"] and slot not in asked["requesters"], "who approved")
        text = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(before["approvers"][slot]))
        try:
            public.verify(bytes.fromhex(lock["approval"]["signature"]), b"stillframe approval\n" + text.encode())
        except InvalidSignature:
            raise Wrong("signature of an approval") from None

    def _master(self, vault: str, secrets: dict[str, bytes]) -> bytes:
        for path in (self.root / "keys").iterdir():
            slot = plain_object(path)
            secret, kdf = secrets[slot["kind"]], slot["kdf"]
            if not secret:
                continue
            salt = bytes.fromhex(kdf["salt"])
            if kdf["name"] == "argon2id":
                from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

                cost = {"iterations": kdf["iterations"], "lanes": kdf["lanes"], "memory_cost": kdf["memory_kib"]}
                kek = Argon2id(salt=salt, length=32, **cost).derive(secret)
            else:
                require(kdf["name"] == "hkdf-sha256", "kdf")
                kek = hkdf(secret, salt, "stillframe slot")
            aad = f"stillframe slot {vault} {slot['id']} {slot['kind']}".encode()
            try:
                master = AESGCM(kek).decrypt(bytes(12), bytes.fromhex(slot["wrapped"]), aad)
            except InvalidTag:
                continue  # another holder's
            if "approver" in slot:
                approver = Ed25519PrivateKey.from_private_bytes(hkdf(kek, self.vault, "stillframe approver"))
                require(approver.public_key().public_bytes_raw().hex() == slot["approver"], "approver of a slot")
            return master
        raise Wrong("no slot for the secret")

    def _cipher(self, header: bytes, magic: bytes, info: str) -> AESGCM:
        found, version, key, vault, salt = struct.unpack(">8sII16s32s", header)
        require((found, version, vault) == (magic, 1, self.vault), f"header of a {info}")
        return AESGCM(hkdf(self.keys[key], salt, f"stillframe {info}"))

    def _open_sealed(self, path: Path, magic: bytes, info: str, name: str) -> bytes:
        data = path.read_bytes()
        plain = self._cipher(data[:64], magic, info).decrypt(bytes(12), data[64:], data[:64] + name.encode())
        require(0 <= zstandard.frame_content_size(plain) <= 16 << 20, f"size of {path}")
        return zstandard.ZstdDecompressor().decompress(plain)

    # --- where blocks are ------------------------------------------------------------------------------------------

    def load_segments(self) -> None:
        for path in (self.root / "index").iterdir():
            require(hashlib.sha256(path.read_bytes()).hexdigest() == path.name, "name of a segment")
            plain = self._open_sealed(path, b"SFINDEX\0", "index", "")
            at = 0
            while at < len(plain):
                pack, count = struct.unpack_from(">32sI", plain, at)
                at += 36
                for _ in range(count):
                    self.index.setdefault(plain[at : at + 32], []).append((pack.hex(), plain[at : at + 46]))
                    at += 46

    def load_footers(self) -> None:
        for path in (self.root / "packs").iterdir():
            data = path.read_bytes()
            require(hashlib.sha256(data).hexdigest() == path.name, "name of a pack")
            offset, length, count, tail = struct.unpack(">QII8s", data[-24:])
            require(tail == b"SFPKTAIL" and offset + length + 24 == len(data), "trailer")
            footer = self._unseal(data, offset, length, 255, 0, ZERO, length - 16)
            require(len(footer) == 46 * count, "footer")
            position = 64
            for at in range(0, len(footer), 46):
                entry = footer[at : at + 46]
                _, start, stored, *_ = struct.unpack(">32sIIIBB", entry)
                require(start == position, "gaps")
                position += stored
                self.index.setdefault(entry[:32], []).append((path.name, entry))
            require(position == offset, "gaps")

    def _unseal(self, data: bytes, offset: int, length: int, kind: int, codec: int, id: bytes, plain: int) -> bytes:
        aad = self.vault + bytes([kind, codec]) + id + plain.to_bytes(4, "big")
        cipher = self._cipher(data[:64], b"SFPACK\0\0", "pack")
        return cipher.decrypt(offset.to_bytes(12, "big"), data[offset : offset + length], aad)

    def block(self, id: bytes, kind: int) -> bytes:
        """From the first copy that is whole; copies that are known to be damaged are not looked at."""
        known = self.index.get(id, [])
        copies = [copy for copy in known if not {(copy[0], id), (copy[0], ZERO)} & self.damage]
        for pack, entry in copies:
            try:
                return self._copy(id, kind, pack, entry)
            except (Wrong, InvalidTag, OSError, zstandard.ZstdError) as error:
                if (pack, entry) == copies[-1]:
                    raise Wrong(f"block {id.hex()}: {error}") from error
        raise Wrong(f"block {id.hex()}: {'damaged' if known else 'in no segment'}")

    def _copy(self, id: bytes, kind: int, pack: str, entry: bytes) -> bytes:
        _, offset, stored, plain, its_kind, codec = struct.unpack(">32sIIIBB", entry)
        require(its_kind == kind, "kind")
        data = self._unseal((self.root / "packs" / pack).read_bytes(), offset, stored, kind, codec, id, plain)
        if codec == 1:
            data = zstandard.ZstdDecompressor().decompress(data)
        require(len(data) == plain and blake3(data, key=self.id_keys[kind]).digest() == id, "id of a block")
        return data

    # --- points ----------------------------------------------------------------------------------------------------

    def points(self) -> dict[str, dict[str, Any]]:
        """All that are not deleted for good; those whose deletion can be taken back are complete and among them."""
        found = {}
        gone = {point for point, outcome in self.deletions().items() if outcome == "final"}
        for path in (self.root / "points").iterdir():
            if path.name in gone:
                continue
            content = json.loads(self._open_sealed(path, b"SFPOINT\0", "point", f"points/{path.name}"))
            if "aborted" in content:
                require(content["aborted"] == path.name, "aborted")
                continue
            require(content["point"]["id"] == path.name, "id of a point")
            found[path.name] = content["point"]
        return found

    def deletions(self) -> dict[str, str]:
        """Point → how its last deletion ended; empty if it stands."""
        last: dict[str, int] = {}
        for path in self._listed("trash"):
            point, _, number = path.name.removesuffix(".end").rpartition(".")
            last[point] = max(last.get(point, 0), int(number))
        found = {}
        for point, number in last.items():
            end = self.root / "trash" / f"{point}.{number}.end"
            found[point] = plain_object(end)["outcome"] if end.exists() else ""
            require(found[point] in ("", "restored", "final"), f"outcome of {end}")
        return found

    def pins(self) -> dict[str, str]:
        """Point → why it is not to be deleted."""
        return {path.name: plain_object(path)["reason"] for path in self._listed("pins")}

    def lock_days(self) -> int:
        """For how many days a point made now could not be deleted."""
        last = max(self._listed("locks"), default=None)
        return 0 if last is None else int(plain_object(last)["days"])

    # --- what sweeps and verifications leave -----------------------------------------------------------------------

    def condemned(self) -> dict[str, tuple[set[str], set[str] | None]]:
        """Condemnation → its packs, and those of them that are removed (None: it is not decided). Readers need not
        care: what a point needs stays."""
        found = {}
        for path in self._listed("condemned"):
            require(hashlib.sha256(path.read_bytes()).hexdigest() == path.name, "name of a condemnation")
            packs = self._digests(self._open_sealed(path, b"SFCONDM\0", "condemned", ""))
            verdict, dead = self.root / "verdicts" / path.name, None
            if verdict.exists():
                dead = self._digests(self._open_sealed(verdict, b"SFVERDT\0", "verdict", f"verdicts/{path.name}"))
                require(dead <= packs, "a verdict on packs that are not condemned")
            found[path.name] = (packs, dead)
        return found

    def _damage(self) -> set[tuple[str, bytes]]:
        """Pack and block id of damaged copies; ZERO: the whole pack."""
        found = set()
        for path in self._listed("damage"):
            require(hashlib.sha256(path.read_bytes()).hexdigest() == path.name, "name of a damage list")
            plain = self._open_sealed(path, b"SFDAMAG\0", "damage", "")
            require(len(plain) % 64 == 0, "length of a damage list")
            found |= {(plain[at : at + 32].hex(), plain[at + 32 : at + 64]) for at in range(0, len(plain), 64)}
        return found

    @staticmethod
    def _digests(plain: bytes) -> set[str]:
        names = [plain[at : at + 32].hex() for at in range(0, len(plain), 32)]
        require(len(plain) % 32 == 0 and names == sorted(set(names)), "ascending names")
        return set(names)

    def _listed(self, kind: str) -> list[Path]:
        folder = self.root / kind
        return sorted(folder.iterdir()) if folder.exists() else []

    # --- disks -----------------------------------------------------------------------------------------------------

    def disk(self, point: dict[str, Any], target: str) -> bytes:
        (disk,) = [disk for disk in point["disks"] if disk["target"] == target]
        size, block = disk["capacity"], disk["block_size"]
        ids = list(self._leaves(bytes.fromhex(disk["root"]), -(-size // block)))
        pieces = []
        for at, id in enumerate(ids):
            length = min(block, size - at * block)
            data = bytes(length) if id == ZERO else self.block(id, 0)
            require(len(data) == length, "length of a block")
            pieces.append(data)
        return b"".join(pieces)

    def _leaves(self, root: bytes, count: int) -> Iterator[bytes]:
        widths = [count]
        while len(widths) == 1 or widths[-1] > 1:
            widths.append(max(1, -(-widths[-1] // 1024)))

        def page(level: int, at: int, id: bytes) -> Iterator[bytes]:
            entries = min(1024, widths[level] - 1024 * at)
            if id == ZERO:
                yield from [ZERO] * min(1024 ** (level + 1), count - at * 1024 ** (level + 1))
                return
            data = self.block(id, 1)
            require(data[:8] == b"SFMP" + bytes([1, level]) + entries.to_bytes(2, "big"), "head of a page")
            for number in range(entries):
                child = data[8 + 32 * number : 40 + 32 * number]
                if level:
                    yield from page(level - 1, 1024 * at + number, child)
                else:
                    yield child

        yield from page(len(widths) - 2, 0, root)


def main(arguments: list[str]) -> None:
    reader = SecondReader(Path(arguments[0]), key=bytes.fromhex(Path(arguments[1]).read_text().strip()))
    points = reader.points()
    if len(arguments) == 2:
        print("\n".join(points))
        return
    reader.load_segments()
    sys.stdout.buffer.write(reader.disk(points[arguments[2]], arguments[3]))


if __name__ == "__main__":
    main(sys.argv[1:])
