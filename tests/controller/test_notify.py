"""Somebody is told: over real SMTP and HTTP, with servers that refuse, hang, and lie."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestrator.alarms import Severity
from orchestrator.catalog.alerts import raise_alert, resolve_alert, standing_alerts
from orchestrator.catalog.schema import AlertRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config, parse_config
from orchestrator.config_notify import EmailSection, WebhookSection
from orchestrator.notices import Message, Notice, backoff, plain, unsaid
from orchestrator.notify_desk import NotifyDesk
from orchestrator.notify_targets import Email, NotSent, Target, Webhook
from tests.controller.mail_server import Hook, Mailbox, bad_server, http_server, smtp_server
from tests.vault.authority import certificate
from workers.contract.errors import ConfigError, NotFound, UsageError

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
KEY = "backup-failed machine:u"
NOTICE = Notice(7, KEY, Severity.WARNING, "web", "no space left", "stillframe job show 1", NOW, NOW, 2, None, "")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("tls"))


def message(*notices: Notice) -> Message:
    return Message.of("ctl1", NOW, notices or [NOTICE])


def email(port: int, **fields: object) -> Email:
    base = {
        "host": "127.0.0.1",
        "port": port,
        "security": "none",
        "sender": "sf@example.org",
        "to": ["anna@example.org"],
    }
    return Email(EmailSection.model_validate({**base, **fields}), step=1.0, total=2.0)


def webhook(url: str, **fields: object) -> Webhook:
    return Webhook("ops", WebhookSection.model_validate({"url": url, **fields}), step=1.0, total=2.0)


def secret(folder: Path, text: str = "s3cret\n", mode: int = 0o600) -> str:
    file = folder / "secret"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


# --- what is said --------------------------------------------------------------------------------------------------

W, C = Severity.WARNING, Severity.CRITICAL


@pytest.mark.parametrize(
    ("changes", "said", "threshold", "told"),
    [
        ({}, None, W, True),
        ({}, "warning", W, False),
        ({"severity": C}, "warning", W, True),
        ({"severity": W}, "critical", W, False),
        ({}, None, C, False),
        ({"resolved": NOW}, "warning", W, True),
        ({"resolved": NOW}, None, W, True),
        ({"resolved": NOW}, None, C, False),
        ({"resolved": NOW}, "resolved", W, False),
        ({"acknowledged": True}, None, W, False),
        ({"acknowledged": True, "resolved": NOW}, None, W, False),
        ({"acknowledged": True, "resolved": NOW}, "warning", W, True),
        ({"key": "notify-failed target:email"}, None, W, False),
        ({"key": "notify-failed target:webhook:ops"}, None, W, True),
    ],
)
def test_what_a_target_is_told(changes: dict[str, object], said: str | None, threshold: Severity, told: bool) -> None:
    assert unsaid(replace(NOTICE, **changes), said, threshold, "email") is told  # type: ignore[arg-type]


def test_the_wait_grows_and_ends_at_an_hour() -> None:
    assert [backoff(failures) for failures in (1, 2, 3, 6, 7, 8, 1000)] == [60, 120, 240, 1920, 3600, 3600, 3600]


def test_a_message_has_the_worst_first_and_counts_the_rest() -> None:
    many = [replace(NOTICE, id=number, subject=f"web-{number}") for number in range(200)]
    passed = replace(NOTICE, id=900, subject="db", resolved=NOW, ending="point 1a was made")
    worst = replace(NOTICE, id=901, subject="mail", severity=C)
    made = message(passed, *many, worst)
    assert made.summary == "1 critical, 200 warning, 1 recovered: mail, web-0, web-1 and 199 more"
    body = made.body()
    assert body.startswith("CRITICAL  mail: no space left\n")
    assert "And 152 more." in body
    assert len(body.splitlines()) < 220
    payload = made.payload()
    assert (len(payload["alerts"]), payload["more"]) == (50, 152)  # type: ignore[arg-type]
    assert "RECOVERED  db: point 1a was made" in message(passed).body()


def test_a_line_is_one_line() -> None:
    assert plain("a\r\nBcc: x\x1b[31m\u2028y\u202e") == "a Bcc: x [31m y"
    assert len(plain("x" * 10_000_000)) == 500


# --- e-mail --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("security", ["none", "starttls", "tls"])
def test_a_mail_arrives(security: str, tls: tuple[Path, Path], tmp_path: Path) -> None:
    with smtp_server(security=security, tls=None if security == "none" else tls, auth=security == "starttls") as box:
        login = {"user": "sf", "password_file": secret(tmp_path)} if security == "starttls" else {}
        sent = email(box.port, security=security, ca_file=str(tls[0]), **login).send(message())
    [mail] = box.mails
    assert sent == ""
    assert mail["Subject"] == "[stillframe] 1 warning: web"
    assert (mail["From"], mail["To"]) == ("sf@example.org", "anna@example.org")
    assert (mail["Auto-Submitted"], mail["Date"] is not None) == ("auto-generated", True)
    assert "WARNING  web: no space left" in mail.get_content()
    assert "try: stillframe job show 1" in mail.get_content()
    assert box.logins == ([(b"sf", b"s3cret")] if security == "starttls" else [])


def test_hostile_names_make_no_headers_and_no_second_mail() -> None:
    name = "web\r\nBcc: eve@example.org\r\n\r\n.\r\nMAIL FROM:<eve@example.org>\r\n" + "é" * 400
    with smtp_server() as box:
        email(box.port).send(message(replace(NOTICE, subject=name, text="x\n.\n.\r\n" + name)))
    [mail] = box.mails
    assert mail["Bcc"] is None
    assert box.recipients == [["anna@example.org"]]
    assert len(mail["Subject"]) <= 150
    assert "\n" not in mail["Subject"]


def test_a_certificate_of_somebody_else_is_refused(tls: tuple[Path, Path]) -> None:
    for security in ("starttls", "tls"):
        with smtp_server(security=security, tls=tls) as box, pytest.raises(NotSent, match="no secure connection"):
            email(box.port, security=security).send(message())
        assert box.mails == []


def test_a_server_without_tls_gets_no_password(tmp_path: Path) -> None:
    with smtp_server() as box, pytest.raises(NotSent, match="STARTTLS"):
        email(box.port, security="starttls", user="sf", password_file=secret(tmp_path)).send(message())
    assert (box.mails, box.logins) == ([], [])


def test_a_wrong_password_is_not_quoted(tls: tuple[Path, Path], tmp_path: Path) -> None:
    with smtp_server(security="starttls", tls=tls, auth=True) as box:
        wrong = {"user": "sf", "password_file": secret(tmp_path, "wr0ng")}
        target = Email(email(box.port, security="starttls", ca_file=str(tls[0]), **wrong)._section)
        with pytest.raises(NotSent, match="535") as caught:
            target.send(message())
    assert "wr0ng" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [("s3cret", 0o644, "can be read by everybody"), ("", 0o600, "does not hold"), ("a\nb", 0o600, "does not hold")],
)
def test_a_file_that_is_no_secret(tmp_path: Path, text: str, mode: int, why: str) -> None:
    with pytest.raises(NotSent, match=why):
        email(1, user="sf", password_file=secret(tmp_path, text, mode)).send(message())
    with pytest.raises(NotSent, match="cannot be read"):
        email(1, user="sf", password_file=str(tmp_path / "none")).send(message())


def test_recipients_that_are_refused() -> None:
    with smtp_server() as box:
        box.refuses = {"bob@example.org"}
        both = email(box.port, to=["anna@example.org", "bob@example.org"])
        assert both.send(message()).endswith("refuses bob@example.org")
        assert box.recipients == [["anna@example.org"]]
        box.refuses.add("anna@example.org")
        with pytest.raises(NotSent, match="refuses all recipients"):
            both.send(message())
        box.refuses, box.answer = set(), "554 looks like spam"
        with pytest.raises(NotSent, match="answers 554: looks like spam"):
            both.send(message())


@pytest.mark.parametrize(
    ("greeting", "trickle"),
    [
        (b"", b""),
        (b"220 hello\r\n", b""),
        (b"", b"220-still here\r\n"),
        (b"\x00\xff garbage\r\n", b""),
        (b"421 busy\r\n", b""),
    ],
)
def test_a_mail_server_that_misbehaves_costs_a_bounded_time(greeting: bytes, trickle: bytes) -> None:
    with bad_server(greeting, trickle=trickle) as port:
        began = time.monotonic()
        target = Email(email(port)._section, step=0.2, total=0.4)
        with pytest.raises(NotSent):
            target.send(message())
        assert time.monotonic() - began < 5


def test_nobody_there() -> None:
    with bad_server() as port:
        pass
    for target in (email(port), webhook(f"http://127.0.0.1:{port}/")):
        with pytest.raises(NotSent, match="cannot be talked to"):
            target.send(message())


# --- webhooks ------------------------------------------------------------------------------------------------------


def test_a_post_arrives_with_its_secret(tls: tuple[Path, Path], tmp_path: Path) -> None:
    with http_server(tls=tls) as hook:
        url = f"https://127.0.0.1:{hook.port}/hook?x=1"
        webhook(url, ca_file=str(tls[0]), secret_file=secret(tmp_path)).send(message())
        with pytest.raises(NotSent, match="no secure connection"):
            webhook(url, secret_file=secret(tmp_path)).send(message())
    [(path, headers, body)] = hook.posts
    assert (path, headers["Authorization"], headers["Content-Type"]) == (
        "/hook?x=1",
        "Bearer s3cret",
        "application/json",
    )
    assert (body["type"], body["version"], body["more"]) == ("stillframe.alerts", 1, 0)
    [alert] = body["alerts"]
    assert (alert["id"], alert["state"], alert["subject"], alert["count"]) == (7, "warning", "web", 2)


@pytest.mark.parametrize("status", [301, 307, 308, 400, 401, 500, 503])
def test_an_answer_that_is_not_yes(status: int, tmp_path: Path) -> None:
    with http_server() as hook, http_server() as elsewhere:
        hook.status, hook.location = status, elsewhere.url
        with pytest.raises(NotSent, match=f"127.0.0.1 answers {status}") as caught:
            webhook(hook.url, secret_file=secret(tmp_path)).send(message())
    assert elsewhere.posts == [], "the secret is for one host"
    assert "s3cret" not in str(caught.value)
    assert "x=1" not in str(caught.value), "an address may be a secret as well"


@pytest.mark.parametrize(
    ("greeting", "trickle"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b""),
        (b"no\r\n\r\n", b""),
    ],
)
def test_a_web_server_that_misbehaves_costs_a_bounded_time(greeting: bytes, trickle: bytes) -> None:
    with bad_server(greeting, trickle=trickle) as port:
        began = time.monotonic()
        section = WebhookSection(url=f"http://127.0.0.1:{port}/")
        with pytest.raises(NotSent):
            Webhook("ops", section, step=0.2, total=0.4).send(message())
        assert time.monotonic() - began < 5


def test_addresses_that_cannot_be_meant(tmp_path: Path) -> None:
    for url in ("ftp://x/", "https:///path", "https://[::1", "https://me:pw@host/", "https://ho st/", "https://h/\x00"):
        with pytest.raises(ConfigError, match="is no address of a webhook"):
            configured(tmp_path, f"[notify.webhooks.ops]\nurl = {json.dumps(url)}\n")
    with pytest.raises(ConfigError, match="in the clear"):
        configured(tmp_path, '[notify.webhooks.ops]\nurl = "http://hooks.example.org/"\nsecret_file = "s"\n')


# --- the chore -----------------------------------------------------------------------------------------------------


def configured(folder: Path, text: str) -> Config:
    return parse_config(text, folder / "stillframe.toml")


class Ear:
    """A target that keeps what it is told, or is away."""

    threshold = Severity.WARNING

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard: list[list[tuple[str, str]]] = []
        self.away = False
        self.meanwhile: Callable[[], object] = lambda: None
        self.tries = 0

    def send(self, message: Message) -> str:
        self.tries += 1
        if self.away:
            raise NotSent("nobody answers")
        self.meanwhile()
        self.heard.append([(one.subject, one.state) for one in message.notices])
        return ""


class Office:
    """Two targets and a clock."""

    def __init__(self, catalog: Catalog, config: Config) -> None:
        self.catalog = catalog
        self.mail, self.hook = Ear("email"), Ear("webhook:ops")
        self.ways: Sequence[Target] = [self.mail, self.hook]
        self.desk = NotifyDesk(lambda: config, catalog, lambda _: self.ways)
        self.now = NOW

    def raises(self, subject: str, severity: Severity = W) -> None:
        with self.catalog.write() as session:
            raise_alert(session, f"backup-failed machine:{subject}", severity, subject, "bad")

    def recovers(self, subject: str) -> None:
        with self.catalog.write() as session:
            resolve_alert(session, f"backup-failed machine:{subject}", "well")

    def turn(self, seconds: float = 60) -> None:
        self.now += timedelta(seconds=seconds)
        self.desk.tell(self.now)

    def alerts(self) -> dict[str, AlertRow]:
        with self.catalog.read() as session:
            return {row.key: row for row in standing_alerts(session)}


@pytest.fixture
def office(catalog: Catalog, tmp_path: Path) -> Office:
    return Office(catalog, configured(tmp_path, ""))


def test_once_together_and_when_it_has_passed(office: Office) -> None:
    office.turn()
    office.raises("web")
    office.raises("db", C)
    office.raises("quiet", Severity.INFO)
    office.turn()
    office.turn()
    office.raises("web")
    office.turn()
    office.recovers("web")
    office.recovers("quiet")
    office.turn()
    office.turn()
    for ear in (office.mail, office.hook):
        assert ear.heard == [[("db", "critical"), ("web", "warning")], [("web", "resolved")]]


def test_what_changes_while_it_is_told_is_told_as_well(office: Office) -> None:
    office.raises("web")
    office.mail.meanwhile = lambda: office.recovers("web")
    office.turn()
    office.mail.meanwhile = lambda: None
    office.turn()
    assert office.mail.heard == [[("web", "warning")], [("web", "resolved")]]


def test_two_messages_do_not_follow_each_other_at_once(office: Office) -> None:
    for number in range(10):
        office.raises(f"web-{number}")
        office.turn(seconds=7)
    assert [len(heard) for heard in office.mail.heard] == [1, 9]


def test_what_becomes_worse_is_told_again(office: Office) -> None:
    office.raises("web")
    office.turn()
    office.raises("web", C)
    office.turn()
    assert office.mail.heard == [[("web", "warning")], [("web", "critical")]]


def test_ten_thousand_at_once_are_one_message(office: Office) -> None:
    with office.catalog.write() as session:
        for number in range(2000):
            common = {"severity": "warning", "text": "bad", "first": NOW, "last": NOW, "count": 1}
            session.add(AlertRow(key=f"k{number}", subject=f"web-{number}", **common))
    office.turn()
    office.turn()
    assert [len(heard) for heard in office.mail.heard] == [2000]


def test_a_target_that_is_away_misses_nothing_and_holds_up_nobody(office: Office) -> None:
    office.mail.away = True
    office.raises("web")
    office.turn()
    assert office.hook.heard == [[("web", "warning")]]
    alert = office.alerts()["notify-failed target:email"]
    assert (alert.severity, alert.text) == ("critical", "nobody answers")
    office.turn()
    assert office.hook.heard[1:] == [[("notify email", "critical")]], "the others say so"
    for _ in range(10):
        office.turn()
    assert office.mail.tries == 4, "at once, then after 1, 2 and 4 minutes, not at each turn"
    office.recovers("web")
    office.mail.away = False
    office.turn(3600)
    assert office.mail.heard == [[("web", "resolved")]]
    assert office.alerts() == {}
    office.turn()
    assert office.hook.heard[-1] == [("notify email", "resolved")]
    assert len(office.mail.heard) == 1


def test_a_controller_that_was_away_tells_what_it_missed(office: Office) -> None:
    office.mail.away = office.hook.away = True
    office.raises("web")
    office.turn()
    fresh = Office(office.catalog, configured(Path("/nowhere"), ""))
    fresh.turn()
    assert ("web", "warning") in fresh.mail.heard[0]


def test_a_new_target_is_not_told_old_stories(office: Office) -> None:
    office.ways = [office.mail]
    office.raises("web")
    office.turn()
    office.recovers("web")
    office.turn()
    office.ways = [office.mail, office.hook]
    office.turn()
    assert office.hook.heard == []


def test_a_target_that_is_configured_no_more_is_no_trouble(office: Office) -> None:
    office.mail.away = True
    office.raises("web")
    office.turn()
    office.ways = [office.hook]
    office.turn()
    assert "notify-failed target:email" not in office.alerts()


def test_an_acknowledged_alert_is_not_sent(office: Office) -> None:
    office.raises("web")
    with office.catalog.write() as session:
        session.get_one(AlertRow, 1).acknowledged = "anna@host"
    office.turn()
    office.recovers("web")
    office.turn()
    assert office.mail.heard == []


# --- by hand -------------------------------------------------------------------------------------------------------


@pytest.fixture
def servers() -> Iterator[tuple[Mailbox, Hook]]:
    with smtp_server() as box, http_server() as hook:
        yield box, hook


def test_by_hand_with_real_servers(catalog: Catalog, tmp_path: Path, servers: tuple[Mailbox, Hook]) -> None:
    box, hook = servers
    config = configured(
        tmp_path,
        f"""
        [notify.email]
        host = "127.0.0.1"
        port = {box.port}
        security = "none"
        sender = "sf@example.org"
        to = ["anna@example.org"]
        severity = "critical"
        [notify.webhooks.ops]
        url = "{hook.url}"
        secret_file = "secret"
        """,
    )
    secret(tmp_path)
    desk = NotifyDesk(lambda: config, catalog)
    assert desk.test(None, NOW) == [("email", "", ""), ("webhook:ops", "", "")]
    assert "somebody would be told" in box.mails[0].get_content()
    hook.status = 500
    assert desk.test("webhook:ops", NOW) == [("webhook:ops", "127.0.0.1 answers 500", "")]
    assert len(box.mails) == 1
    with pytest.raises(NotFound):
        desk.test("webhook:opps", NOW)
    with pytest.raises(UsageError, match="names nobody"):
        NotifyDesk(lambda: configured(tmp_path, ""), catalog).test(None, NOW)
