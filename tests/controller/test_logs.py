"""What processes that stay write down: with the job on every line of it, without secrets, and harmless to look at."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.controller.scripted import Bench, run_backup
from tests.jobs.world import failed
from workers.contract.messages import Command, Event
from workers.logs import OURS, about, setup
from workers.parallel import share_out

log = logging.getLogger("workers.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in ("", *OURS)}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_backup_leaves_lines_that_name_it(bench: Bench) -> None:
    stream = io.StringIO()
    setup(stream=stream)
    run_backup(bench, "one")
    found = lines(stream)
    assert len(found) > 5
    assert {line["job"] for line in found} == {"one"}
    assert {line["machine"] for line in found} == {"web"}
    assert [line["state"] for line in found][-1] == "succeeded"
    assert all(line["timestamp"].endswith("Z") and line["level"] == "info" for line in found)
    assert list(found[0])[:3] == ["timestamp", "level", "event"]


def test_a_job_that_fails_is_a_warning_with_the_reason(bench: Bench) -> None:
    stream = io.StringIO()
    setup(stream=stream)

    def perform(command: Command) -> Event:
        return failed(command) if command.kind == "prepare" else bench.world.perform(command)

    from tests.controller.scripted import add_backup

    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    bench.run(perform)
    alert, warning = [line for line in lines(stream) if line["level"] == "warning"]
    assert (warning["event"], warning["job"]) == ("failed: it did not work", "one")
    assert (alert["event"], alert["job"], alert["severity"]) == (
        "web: its backup failed: it did not work",
        "one",
        "warning",
    )
    assert {line["job"] for line in lines(stream)} == {"one"}


def test_what_is_said_of_a_context_is_on_its_lines_and_on_those_of_its_threads() -> None:
    stream = io.StringIO()
    setup(stream=stream)

    def work(items: Iterator[int]) -> None:
        for item in items:
            log.info("item %d", item)

    with about(job="1a2b", command="transfer_disk", target=""):
        share_out(iter(range(20)), work, 3)
        with about(target="vda"):
            log.info("inside")
    log.info("outside")
    *inside, last = lines(stream)
    assert len(inside) == 21
    assert {(line["job"], line["command"]) for line in inside} == {("1a2b", "transfer_disk")}
    assert [line.get("target") for line in inside].count("vda") == 1
    assert "job" not in last


def test_secrets_are_struck_out_wherever_they_are() -> None:
    stream = io.StringIO()
    setup(stream=stream)
    log.info(
        "cannot reach redis://user:hunter2@host/0: %s",
        "Authorization: Bearer abcdef123456",
        extra={"password": "hunter2", "catalog": "postgresql://sf:hunter2@db/sf", "more": {"secret_file": "hunter2"}},
    )
    try:
        raise ValueError("amqp://me:hunter2@host")
    except ValueError:
        log.exception("broken")
    text = stream.getvalue()
    assert "hunter2" not in text
    assert "abcdef123456" not in text
    first, second = lines(stream)
    assert first["catalog"] == "postgresql://sf:***@db/sf"
    assert (first["password"], first["more"]) == ("***", {"secret_file": "***"})
    assert "amqp://me:***@host" in second["exception"]


def test_names_from_machines_do_not_steer_a_terminal() -> None:
    stream = Terminal()
    setup(stream=stream)
    log.warning("backup of %s", "web\x1b[2J\nlevel=info", extra={"machine": "x\r\ny"})
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "warning" in text
    assert "machine=x" in text


def test_a_line_per_thing_and_those_for_fault_finding_only_if_asked() -> None:
    for verbose, count in ((False, 1), (True, 2)):
        stream = io.StringIO()
        setup(stream=stream, verbose=verbose)
        log.debug("detail")
        log.info("thing")
        logging.getLogger("celery").info("not ours")
        assert len(lines(stream)) == count


def test_nobody_asked_for_lines(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    root.handlers[:] = []
    log.warning("for nobody")
    assert capfd.readouterr().err == ""
