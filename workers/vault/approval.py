"""What one key holder asks for, and another one approves (multi-user authorisation).

The failure prevented: a stolen configuration, or one careless or hostile administrator, makes the vault forget its
lock. So a lock is shortened only with the signature of somebody who opens the vault with *another* key. Every key slot
has an Ed25519 key pair, derived from the slot's secret: its holder can sign, nobody else can, and whoever verifies
needs the public key only. Which public keys count is written in the lock itself, so a slot that the requester adds
today approves nothing.

The two meet by text: a request, which the second holder reads and signs, and an approval, which the first one enters.
FORMAT.md, "Locks", has the rules; a second implementation can verify them.
"""

from __future__ import annotations

import base64
import binascii
import json
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import AwareDatetime, ValidationError

from workers.contract.errors import Locked, UsageError
from workers.contract.machines import Value
from workers.vault.keys import Opened

REQUEST = "stillframe-request:"
APPROVAL = "stillframe-approval:"
LIFETIME = timedelta(days=2)
"""For how long a request can be approved and entered."""
_SIGNED = b"stillframe approval\n"
V = TypeVar("V", bound=Value)


class Request(Value):
    """A change of a vault's lock that one person alone may not make."""

    vault: str
    number: int
    """Of the lock that it would create: so an approval is good once."""
    days_before: int
    days: int
    approvers: dict[str, str]
    """Who may approve the next change: slot → public key, 64 hex digits."""
    requesters: list[str]
    """Slots that the requester's key opens: these cannot approve it."""
    by: str
    nonce: str
    expires: AwareDatetime

    def signed(self) -> bytes:
        """What an approver signs."""
        return _SIGNED + _canonical(self)

    def text(self) -> str:
        """To be handed to the approver."""
        return REQUEST + _encode(self)


class Approval(Value):
    """A request with the signature of a second key holder."""

    request: Request
    slot: str
    signature: str
    """128 hex digits."""

    def text(self) -> str:
        """To be handed back to the requester."""
        return APPROVAL + _encode(self)


def _canonical(value: Value) -> bytes:
    return json.dumps(value.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()


def _encode(value: Value) -> str:
    return base64.urlsafe_b64encode(_canonical(value)).decode().rstrip("=")


def parse_request(text: str) -> Request:
    """Raises UsageError."""
    return _decode(text, REQUEST, Request)


def parse_approval(text: str) -> Approval:
    """Raises UsageError."""
    return _decode(text, APPROVAL, Approval)


def _decode(text: str, prefix: str, kind: type[V]) -> V:
    clean = "".join(text.split())
    what = prefix.rstrip(":")
    if not clean.startswith(prefix):
        raise UsageError(
            f"that is no {what}: it does not begin with {prefix}", hint="copy all of it, as it was printed"
        )
    body = clean.removeprefix(prefix)
    try:
        return kind.model_validate_json(base64.b64decode(body + "=" * (-len(body) % 4), b"-_", validate=True))
    except (binascii.Error, ValueError, ValidationError):
        raise UsageError(f"that {what} is damaged", hint="copy all of it, as it was printed") from None


def approve(request: Request, approvers: dict[str, str], opened: list[Opened]) -> Approval:
    """Sign with a slot of `opened` (those that the approver's key opens) that is among `approvers` (those of the lock
    that stands). Raises Locked if none may."""
    own = [one for one in opened if one.slot.id in request.requesters]
    if own:
        raise Locked(
            "this key is the one that asks: another key holder must approve",
            hint="run it with another key: --key-file or --phrase-file",
        )
    for one in opened:
        if approvers.get(one.slot.id) == one.approver.public_key().public_bytes_raw().hex():
            signature = one.approver.sign(request.signed()).hex()
            return Approval(request=request, slot=one.slot.id, signature=signature)
    raise Locked(
        "this key may not approve: it was added after the lock was set, and nobody has approved it since",
        hint="`stillframe vault lock` shows whose key may",
    )


def problem(approval: Approval, approvers: dict[str, str]) -> str:
    """Why an approval does not count, with the approvers of the lock before; empty: it does."""
    if approval.slot in approval.request.requesters:
        return "it is approved by the one who asks"
    if approval.slot not in approvers:
        return "it is approved by a key that may not"
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(approvers[approval.slot]))
        public.verify(bytes.fromhex(approval.signature), approval.request.signed())
    except (ValueError, InvalidSignature):
        return "its signature is wrong"
    return ""


def expired(request: Request) -> bool:
    return datetime.now(UTC) > request.expires
