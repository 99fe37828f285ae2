"""How to get into a guest: by its agent, by SSH, or by both for what each allows.

An agent that may run nothing (EL 9) can still freeze, and can often let an SSH key in: then a key is made for one job,
planted, used and removed. Its private half never leaves this process, so one that a killed process left behind opens
nothing; the mark on it lets the visit of a later job remove it.

A frozen guest is a case of its own: its agent then says that it allows nothing but the thaw, and a new SSH session may
hang on a frozen root. So nothing but the agent is tried there, and nothing may come before the thaw.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass

from workers.config import GuestAccess
from workers.contract.errors import GuestError
from workers.contract.guests import GuestInfo, GuestOs
from workers.contract.seams import GuestChannel
from workers.guests.agent import AgentChannel

MARK = "stillframe-one-job"
NO_AGENT = "no guest agent answers: install and start qemu-guest-agent in the guest"
MAX_ADDRESSES = 4
"""Of those that an agent names; the addresses of containers' bridges are among them."""
_ALLOW = "allow guest-exec, guest-exec-status and guest-file-* in the agent's configuration in the guest"
_ALLOW_FREEZE = "allow guest-fsfreeze-* in the agent's configuration, or install util-linux (fsfreeze) in the guest"
_NOTHING = GuestInfo(os=GuestOs.OTHER)

Connect = Callable[[str, bytes | None], GuestChannel]
"""(address, private key in OpenSSH form, None: the configured one) → SSH channel, which need not be connected yet.
Raises GuestError, HostKeyRefused."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What was found. Either channel may be None."""

    commands: GuestChannel | None
    freezer: GuestChannel | None
    described: str
    """Of `commands`, for people."""
    why_not: str
    """What is missing, and what to do about it, where `commands` or `freezer` is None."""
    agent_freezes: bool
    """`freezer` is the guest agent."""


@contextmanager
def open_ways(access: GuestAccess, agent: AgentChannel | None, connect: Connect, *, job: str) -> Iterator[Ways]:
    """Find the ways into one guest, and close them. Raises nothing: who cannot get in is told why."""
    if agent is not None and not agent.ping():
        agent = None
    info, trouble = _asked(agent)
    # Frozen, it says that it may not freeze. One that answers, but not what it can do, is believed able.
    frozen = agent is not None and not info.can_freeze and _is_frozen(agent)
    freezer = agent if info.can_freeze or frozen or (agent is not None and trouble) else None
    with ExitStack() as stack:
        if access.channel != "ssh" and info.can_run and info.can_copy:
            found = _Found(agent, "guest agent")
        elif frozen:
            found = _Found(why="the guest is frozen: its agent runs nothing before the thaw")
        else:
            found = _Found(why=trouble or f"the guest agent {info.agent} does not allow commands and files: {_ALLOW}")
            if access.channel != "agent":
                over_ssh = stack.enter_context(_ssh(access, agent, info, connect, job))
                agent_words = "" if access.channel == "ssh" else f"{found.why}; "
                found = over_ssh if over_ssh.channel else _Found(why=f"{agent_words}{over_ssh.why}")
        if freezer is None and found.can_freeze:
            yield Ways(found.channel, found.channel, found.described, "", agent_freezes=False)
        else:
            why = found.why or ("" if freezer else f"nothing here can freeze: {_ALLOW_FREEZE}")
            yield Ways(found.channel, freezer, found.described, why, agent_freezes=freezer is not None)


@dataclass(frozen=True, slots=True)
class _Found:
    """A way to run commands, or why there is none."""

    channel: GuestChannel | None = None
    described: str = ""
    can_freeze: bool = False
    """It, in place of the agent."""
    why: str = ""


def _asked(agent: AgentChannel | None) -> tuple[GuestInfo, str]:
    """What the agent can do, and why that is not known."""
    if agent is None:
        return _NOTHING, NO_AGENT
    try:
        return agent.info(), ""
    except GuestError as error:
        return _NOTHING, str(error)


def _is_frozen(agent: AgentChannel) -> bool:
    try:
        return agent.frozen()
    except GuestError:
        return False


# --- SSH ---------------------------------------------------------------------------------------------------------


@contextmanager
def _ssh(
    access: GuestAccess, agent: AgentChannel | None, info: GuestInfo, connect: Connect, job: str
) -> Iterator[_Found]:
    section = f'[guests."{access.machines}"]'
    own_key = access.key_file is not None
    addresses = [access.address] if access.address else _addresses(agent, proven=not own_key)
    if not own_key and (agent is None or not info.can_plant_keys):
        yield _Found(why=f"for SSH, set key_file and address under {section}")
        return
    if not addresses:
        yield _Found(why=f"no address for SSH is known: set address under {section}")
        return
    with ExitStack() as stack:
        try:
            private = None
            if not own_key:
                assert agent is not None
                private = stack.enter_context(_planted(agent, access.user, job))
            found = _connected(addresses, private, connect, access.user)
            if found.channel is not None:
                stack.callback(found.channel.close)
        except GuestError as error:
            found = _Found(why=_words(error))
        yield found


def _addresses(agent: AgentChannel | None, *, proven: bool) -> list[str]:
    """Where the guest may be. It names the addresses of its containers' bridges too, and this host may have the same
    ones. `proven`: only this guest will let us in. Otherwise our own key might open this very host, which would then be
    frozen in the guest's place: what is ours is left out."""
    try:
        found = agent.addresses() if agent is not None else []
    except GuestError:
        return []
    return [address for address in found if proven or not _is_ours(address)][:MAX_ADDRESSES]


def _is_ours(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def _connected(addresses: Sequence[str], private: bytes | None, connect: Connect, user: str) -> _Found:
    """By the first address where it works."""
    why = []
    for address in addresses:
        with ExitStack() as stack:
            try:
                channel = connect(address, private)
                stack.callback(channel.close)
                info = channel.info()
            except GuestError as error:
                why.append(_words(error))
                continue
            if info.can_run and info.can_copy:
                stack.pop_all()
                return _Found(channel, f"ssh {user}@{address}", info.can_freeze)
            why.append(f"ssh {user}@{address} cannot run commands as root ({info.release or info.agent})")
    return _Found(why="; ".join(why))


@contextmanager
def _planted(agent: AgentChannel, user: str, job: str) -> Iterator[bytes]:
    """The private half of a key that opens the guest meanwhile. Raises GuestError."""
    mark = f"{MARK}-{re.sub(r'[^A-Za-z0-9]', '-', job)}"
    private, public = _new_key(mark)
    _remove_marked(agent, user, mark)
    try:
        agent.plant_key(user, public)
        yield private
    finally:
        with suppress(GuestError):  # a later job's visit removes what is marked
            agent.remove_key(user, public)


def _remove_marked(agent: AgentChannel, user: str, mine: str) -> None:
    """Keys of other jobs. Another visit of this one may be going on."""
    with suppress(GuestError):
        for key in agent.keys(user):
            mark = key.split()[-1] if key.strip() else ""
            if mark.startswith(f"{MARK}-") and mark != mine:
                agent.remove_key(user, key)


def _new_key(comment: str) -> tuple[bytes, str]:
    """(private key, public key)."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private, f"{public.decode()} {comment}"


def _words(error: GuestError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)
