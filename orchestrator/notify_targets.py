"""The ways out: e-mail by SMTP, webhooks by HTTP POST.

A server that hangs, trickles or talks nonsense costs a bounded time and becomes a `NotSent` with a reason; nothing that
it says is believed beyond yes and no. Secrets go to the host that is configured, by the connection that is configured,
and nowhere else: no redirect is followed, no certificate is waived, and no error quotes one.
"""

from __future__ import annotations

import json
import smtplib
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from threading import Event, Timer
from typing import Protocol
from urllib.parse import urlsplit

from orchestrator.alarms import Severity
from orchestrator.config_file import NotifySection
from orchestrator.config_notify import EmailSection, WebhookSection
from orchestrator.notices import Message, plain
from workers.contract.errors import StillframeError

STEP_SECONDS = 10.0
"""For each step: to connect, to answer."""
TOTAL_SECONDS = 30.0
"""For all of it, against servers that trickle."""
_SUBJECT = 150


class NotSent(StillframeError):
    """A message did not go out, and why."""


class Target(Protocol):
    @property
    def name(self) -> str:
        """`email`, or `webhook:<name>`."""

    @property
    def threshold(self) -> Severity:
        """This and what is worse is for it."""

    def send(self, message: Message) -> str:
        """What is to be remarked though it was sent; empty: nothing. Raises NotSent."""


def targets(section: NotifySection) -> list[Target]:
    """As configured."""
    found: list[Target] = [Email(section.email)] if section.email else []
    return found + [Webhook(name, hook) for name, hook in section.webhooks.items()]


def _secret(path: str) -> str:
    """What is in a file of one line. Raises NotSent."""
    file = Path(path)
    try:
        if file.stat().st_mode & 0o007:
            raise NotSent(f"{path} can be read by everybody", hint=f"chmod 640 {path}")
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotSent(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    if not secret or not secret.isprintable():
        raise NotSent(f"{path} does not hold one line with a secret")
    return secret


@contextmanager
def _bounded(seconds: float, end: Callable[[], object]) -> Iterator[None]:
    """`end` is called if it takes longer, so that whatever is waited for comes to an end; whatever came of it then, it
    is a TimeoutError: a half answer is none."""
    late = Event()

    def over() -> None:
        late.set()
        end()

    timer = Timer(seconds, over)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if late.is_set():
            raise TimeoutError(f"it took more than {seconds:g} seconds")


def _context(ca_file: str | None) -> ssl.SSLContext:
    """Certificates are checked, by the system's authorities or by those of the file. Raises NotSent."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise NotSent(f"{ca_file} is no file of certificates: {error}") from None


def _end(sock: socket.socket | None) -> None:
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


# --- e-mail ----------------------------------------------------------------------------------------------------------


class Email:
    name = "email"

    def __init__(self, section: EmailSection, *, step: float = STEP_SECONDS, total: float = TOTAL_SECONDS) -> None:
        self._section = section
        self._step = step
        self._total = total

    @property
    def threshold(self) -> Severity:
        return Severity(self._section.severity)

    def send(self, message: Message) -> str:
        where = f"{self._section.host}:{self._section.port}"
        try:
            refused = self._deliver(_mail(self._section, message))
        except smtplib.SMTPRecipientsRefused as error:
            who = ", ".join(plain(one) for one in error.recipients)
            raise NotSent(f"{where} refuses all recipients: {who}") from None
        except smtplib.SMTPResponseException as error:
            said = error.smtp_error
            text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
            raise NotSent(f"{where} answers {error.smtp_code}: {plain(text, 200)}") from None
        except ssl.SSLError as error:
            raise NotSent(f"{where}: no secure connection: {plain(str(error), 200)}") from None
        except smtplib.SMTPException as error:
            raise NotSent(f"{where}: {plain(str(error), 200)}") from None
        except (OSError, ValueError, UnicodeError) as error:
            raise NotSent(f"{where} cannot be talked to: {plain(str(error), 200) or type(error).__name__}") from None
        return f"{where} refuses {', '.join(plain(one) for one in refused)}" if refused else ""

    def _deliver(self, mail: EmailMessage) -> dict[str, tuple[int, bytes]]:
        section = self._section
        context = _context(section.ca_file) if section.security != "none" else None
        password = _secret(section.password_file) if section.user and section.password_file else None
        if context is not None and section.security == "tls":
            smtp: smtplib.SMTP = smtplib.SMTP_SSL(timeout=self._step, context=context)
        else:
            smtp = smtplib.SMTP(timeout=self._step)
        smtp._host = section.host  # type: ignore[attr-defined]  # what TLS compares the certificate with
        with _bounded(self._total, lambda: _end(smtp.sock)):
            try:
                smtp.connect(section.host, section.port)
                if context is not None and section.security == "starttls":
                    smtp.starttls(context=context)
                if section.user and password is not None:
                    smtp.login(section.user, password)
                return smtp.send_message(mail)
            finally:
                with suppress(OSError, smtplib.SMTPException):
                    smtp.quit()
                smtp.close()


def _mail(section: EmailSection, message: Message) -> EmailMessage:
    mail = EmailMessage()
    mail["Subject"] = plain(f"[stillframe] {message.summary}", _SUBJECT)
    mail["From"] = section.sender
    mail["To"] = ", ".join(section.to)
    mail["Date"] = format_datetime(message.time)
    mail["Message-ID"] = make_msgid(domain=section.sender.rpartition("@")[2])
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(message.body(), charset="utf-8", cte="quoted-printable")
    return mail


# --- webhooks --------------------------------------------------------------------------------------------------------


class Webhook:
    def __init__(
        self, name: str, section: WebhookSection, *, step: float = STEP_SECONDS, total: float = TOTAL_SECONDS
    ) -> None:
        self.name = f"webhook:{name}"
        self._section = section
        self._step = step
        self._total = total

    @property
    def threshold(self) -> Severity:
        return Severity(self._section.severity)

    def send(self, message: Message) -> str:
        url = urlsplit(self._section.url)
        where = url.hostname or "?"  # the rest of a URL may be a secret
        headers = {"Content-Type": "application/json", "User-Agent": "stillframe"}
        if self._section.secret_file:
            headers["Authorization"] = f"Bearer {_secret(self._section.secret_file)}"
        try:
            status = self._post(where, json.dumps(message.payload()).encode(), headers)
        except ssl.SSLError as error:
            raise NotSent(f"{where}: no secure connection: {plain(str(error), 200)}") from None
        except (OSError, HTTPException, ValueError) as error:
            raise NotSent(f"{where} cannot be talked to: {plain(str(error), 200) or type(error).__name__}") from None
        if 300 <= status < 400:
            raise NotSent(
                f"{where} answers {status}: a redirect, and none is followed", hint="configure where it leads"
            )
        if not 200 <= status < 300:
            raise NotSent(f"{where} answers {status}")
        return ""

    def _post(self, host: str, body: bytes, headers: dict[str, str]) -> int:
        url = urlsplit(self._section.url)
        if url.scheme == "https":
            context = _context(self._section.ca_file)
            http: HTTPConnection = HTTPSConnection(host, url.port, timeout=self._step, context=context)
        else:
            http = HTTPConnection(host, url.port, timeout=self._step)
        with _bounded(self._total, lambda: _end(http.sock)):
            try:
                http.request("POST", (url.path or "/") + (f"?{url.query}" if url.query else ""), body, headers)
                return http.getresponse().status
            finally:
                http.close()
