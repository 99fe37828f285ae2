"""How to get into a guest: by its agent, by SSH, or by both for what each allows.

An agent that may run nothing (EL 9) can still freeze, and can often let an SSH key in: then a key is made for one job,
planted, used and removed. The mark on it lets a later visit remove one that a killed process left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from workers.config import GuestAccess
from workers.contract.errors import GuestError
from workers.contract.guests import GuestInfo, GuestOs
from workers.contract.seams import GuestChannel
from workers.guests.agent import AgentChannel

MARK = "stillframe-one-job"
NO_AGENT = "no guest agent answers: install and start qemu-guest-agent in the guest"
_ALLOW = (
    "allow guest-exec, guest-exec-status and guest-file-* in the agent's configuration in the guest, "
    'or name an SSH key under [guests."NAME"]'
)

Connect = Callable[[str, bytes | None], GuestChannel]
"""(address, private key in OpenSSH form, None: the configured one) → SSH channel. Raises GuestError, HostKeyRefused."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What was found. Either channel may be None."""

    commands: GuestChannel | None
    freezer: GuestChannel | None
    described: str
    """Of `commands`, for people."""
    why_not: str
    """Why `commands` is None."""
    agent_freezes: bool
    """`freezer` is the guest agent."""


@contextmanager
def open_ways(access: GuestAccess, agent: AgentChannel | None, connect: Connect, *, job: str) -> Iterator[Ways]:
    """Find the ways into one guest, and close them. Raises nothing: who cannot get in is told why."""
    alive = agent is not None and agent.ping()
    info, trouble = _info(agent) if alive and agent else (GuestInfo(os=GuestOs.OTHER), NO_AGENT)
    if access.channel != "ssh" and info.can_run and info.can_copy:
        yield Ways(agent, agent, "guest agent", "", agent_freezes=True)
        return
    freezer = agent if alive and info.can_freeze else None
    why = trouble or f"the guest agent {info.agent} does not allow commands and files: {_ALLOW}"
    if access.channel == "agent":
        yield Ways(None, freezer, "", why, agent_freezes=freezer is not None)
        return
    with _ssh(access, agent if alive else None, info, connect, job) as (channel, words):
        described = f"ssh {access.user}@{words}" if channel else ""
        why_not = "" if channel else "; ".join(part for part in (why, words) if part)
        yield Ways(channel, freezer or channel, described, why_not, agent_freezes=freezer is not None)


def _info(agent: AgentChannel) -> tuple[GuestInfo, str]:
    try:
        return agent.info(), ""
    except GuestError as error:
        return GuestInfo(os=GuestOs.OTHER), str(error)


@contextmanager
def _ssh(
    access: GuestAccess, agent: AgentChannel | None, info: GuestInfo, connect: Connect, job: str
) -> Iterator[tuple[GuestChannel | None, str]]:
    """A channel and its address, or None and why."""
    if access.key_file is None and not info.can_plant_keys:
        yield None, ""
        return
    address = access.address or _address(agent)
    if not address:
        yield None, f'no address for SSH is known: set address under [guests."{access.machines}"]'
        return
    planted = None
    try:
        private = None
        if access.key_file is None:
            assert agent is not None
            private, planted = _one_job_key(job)
            _remove_marked(agent, access.user)
            agent.plant_key(access.user, planted)
        channel, words = connect(address, private), address
    except GuestError as error:
        channel, words = None, str(error)
    try:
        yield channel, words
    finally:
        if channel is not None:
            channel.close()
        if planted is not None and agent is not None:
            with suppress(GuestError):  # the next visit removes what is marked
                agent.remove_key(access.user, planted)


def _address(agent: AgentChannel | None) -> str:
    try:
        return next(iter(agent.addresses()), "") if agent else ""
    except GuestError:
        return ""


def _remove_marked(agent: AgentChannel, user: str) -> None:
    with suppress(GuestError):
        for key in agent.keys(user):
            if MARK in key:
                agent.remove_key(user, key)


def _one_job_key(job: str) -> tuple[bytes, str]:
    """(private key, public key with our mark)."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private, f"{public.decode()} {MARK}-{job}"
