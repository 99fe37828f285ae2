"""A real `stillframe serve` does its chores: looks, tells, and writes down what it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from orchestrator.alarms import Severity
from orchestrator.catalog.alerts import raise_alert
from orchestrator.catalog.store import Catalog
from tests.cli.conftest import Cli
from tests.controller.mail_server import http_server


def test_serve_tells_what_stands_and_what_it_finds(ready: Cli, tmp_path: Path) -> None:
    with http_server() as hook:
        config = tmp_path / "serve.toml"
        text = (ready.folder / "stillframe.toml").read_text().replace('"state"', f'"{ready.folder}/state"')
        text = text.replace('"run"', f'"{ready.folder}/run"').replace("file://./vault", f"file://{ready.folder}/vault")
        text = text.replace('"main.key"', f'"{ready.folder}/main.key"')
        away = f'[vaults.away]\nurl = "file://{tmp_path}/nowhere"\nkey_file = "{tmp_path}/none.key"\n'
        config.write_text(f'{text}\n{away}[backup]\nvault = "main"\n[notify.webhooks.ops]\nurl = "{hook.url}"\n')
        with Catalog.open(f"sqlite:///{ready.folder}/state/catalog.sqlite") as catalog, catalog.write() as session:
            raise_alert(session, "backup-failed machine:u", Severity.WARNING, "web", "no space")
        arguments = [sys.executable, "-m", "orchestrator.cli.main", "serve", "--config", str(config)]
        place = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)}
        with subprocess.Popen(arguments, env=place, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            hook.posted.wait(60)
            process.send_signal(signal.SIGTERM)
            _, written = process.communicate(timeout=60)
    assert process.returncode == 0, written
    assert hook.posts, written
    told = {alert["key"]: alert["state"] for _, _, body in hook.posts for alert in body["alerts"]}
    assert told["backup-failed machine:u"] == "warning"
    lines = [json.loads(line) for line in written.splitlines()]
    assert "serve" in lines[0]["event"]
    assert {"timestamp", "level", "event"} <= lines[0].keys()
