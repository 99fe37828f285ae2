"""`stillframe extension`, and what `init`, `doctor`, `vm` and policies have to do with it."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from orchestrator.catalog import owner
from orchestrator.catalog.jobs import add_job, load_job
from orchestrator.catalog.points import put_extension, see_machine
from orchestrator.catalog.store import Catalog
from orchestrator.config import load_config
from orchestrator.demo.host import URI
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.service import Service
from tests.cli.conftest import Cli, Ran
from workers.contract.errors import Busy, UsageError
from workers.contract.guests import ExtensionState, ExtensionUse, GuestOs
from workers.contract.machines import MachineRef

if TYPE_CHECKING:
    from tests.guests.machines import Guest, GuestFactory

WEB = MachineRef(hypervisor="lab1", uuid="11111111-2222-3333-4444-555555555555", name="web")
ENABLED = ExtensionState(
    use=ExtensionUse.ENABLED,
    version="0.1.0+1a2b3c4d",
    channel="guest agent",
    os=GuestOs.LINUX,
    release="Debian \x1b[31m12",
)


@pytest.fixture
def made(configured: Cli) -> Cli:
    """After `init`."""
    assert configured.run("init").code == 0
    return configured


def package(cli: Cli) -> Path:
    [path] = (cli.folder / "state/extensions").glob("*-linux.zip")
    return path


def finding(ran: Ran, subject: str) -> dict[str, str]:
    [line] = [line for line in ran.lines if line["subject"] == subject]
    return line


# --- init and build ------------------------------------------------------------------------------------------------


def test_init_makes_the_signing_key_and_the_packages_once(configured: Cli) -> None:
    first = configured.run("init", "--json").line("extension")
    key = configured.folder / "extension.key"
    assert first["created"]
    assert first["signing_key"] == str(key)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes(), package(configured).read_bytes()
    assert not configured.run("init", "--json").line("extension")["created"]
    assert (key.read_bytes(), package(configured).read_bytes()) == before


def test_init_makes_no_key_where_nothing_is_installed_or_packages_are_signed_elsewhere(configured: Cli) -> None:
    text = configured.file.read_text()
    for section in ("install = false", f'public_key = "{"ab" * 32}"'):
        configured.configure(f"{text}\n[extension]\n{section}\n")
        assert configured.run("init").code == 0
        assert not (configured.folder / "extension.key").exists()


def test_build_in_a_configuration_of_an_older_stillframe(made: Cli) -> None:
    for name in ("extension.key", "extension.key.pub"):
        (made.folder / name).unlink()
    shutil.rmtree(made.folder / "state/extensions")
    assert "No package is built" in made.run("extension", "list").out
    built = made.run("extension", "build", "--os", "linux", "--json").line("package")
    assert (built["os"], built["refused"]) == ("linux", "")
    assert built["path"] == str(package(made))
    again = made.run("extension", "build", "--os", "linux", "--json").line("package")
    assert again == built


def test_build_for_a_system_that_there_is_not(made: Cli) -> None:
    ran = made.run("extension", "build", "--os", "mac")
    assert ran.code == 2
    assert "it is linux or windows" in ran.err


def test_an_application_of_the_users_and_one_that_is_wrong(made: Cli) -> None:
    before = package(made).name
    app = made.folder / "apps/50-ours"
    app.mkdir(parents=True, mode=0o755)
    (app / "run").write_text("#!/bin/sh\nexit 3\n")
    made.configure(made.file.read_text() + '\n[extension]\napps = ["apps/50-ours"]\n')
    wrong = made.run("extension", "build")
    assert wrong.code == 2
    assert "holds no executable file named run" in wrong.err
    assert f"try: chmod +x {app}/run" in wrong.err
    assert finding(made.run("doctor", "--json"), "extension for linux")["level"] == "FAIL"
    (app / "run").chmod(0o755)
    assert finding(made.run("doctor", "--json"), "extension for linux")["level"] == "WARN"
    assert made.run("extension", "build").code == 0
    assert package(made).name != before
    assert finding(made.run("doctor", "--json"), "extension for linux")["level"] == "OK"


# --- verify and list -----------------------------------------------------------------------------------------------


def test_verify_says_which_is_good_and_why_another_is_not(made: Cli) -> None:
    assert made.run("extension", "verify", package(made)).code == 0
    bad = made.folder / "bad.zip"
    bad.write_bytes(package(made).read_bytes().replace(b"payload/ext", b"payload/eXt"))
    ran = made.run("extension", "verify", package(made), bad, made.folder / "none.zip", "--json")
    assert ran.code == 1
    good, changed, missing = (line["refused"] for line in ran.lines)
    assert good == ""
    assert "bad.zip lacks ext" in changed or "is not a readable package" in changed
    assert "no such package" in missing
    assert "FAIL" in made.run("extension", "verify", bad).out


def test_what_another_key_has_signed_is_refused_everywhere(made: Cli) -> None:
    made.configure(made.file.read_text() + f'\n[extension]\npublic_key = "{"ab" * 32}"\n')
    assert made.run("extension", "verify", package(made)).code == 1
    for listed in made.run("extension", "list", "--json").lines:
        assert "was not signed with the trusted key" in listed["refused"]
    found = [line for line in made.run("doctor", "--json").lines if line["subject"] == "extension package"]
    assert {line["level"] for line in found} == {"FAIL"}
    assert made.run("extension", "build").code == 2


def test_verify_without_any_key(configured: Cli) -> None:
    ran = configured.run("extension", "verify", "x.zip")
    assert ran.code == 1
    assert "no key is trusted" in ran.out


def test_machines_are_listed_as_the_catalog_knows_them(made: Cli) -> None:
    with Catalog.open(load_config(made.file).catalog_url) as catalog, catalog.write() as session:
        see_machine(session, WEB)
        see_machine(session, WEB.model_copy(update={"uuid": "other", "name": "never-looked-into"}))
        put_extension(session, WEB.uuid, ENABLED)
    line = made.run("extension", "list", "--json").line("installed")
    assert (line["machine"], line["state"]["use"], line["state"]["version"]) == ("web", "enabled", "0.1.0+1a2b3c4d")
    shown = made.run("extension", "list").out
    assert "guest agent" in shown
    assert "\x1b" not in shown
    assert "never-looked-into" not in shown


# --- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_looks_at_key_and_pins(made: Cli) -> None:
    key, pins = made.folder / "extension.key", made.folder / "state/guest_host_keys"
    assert finding(made.run("doctor", "--json"), "extension key")["level"] == "OK"
    key.chmod(0o644)
    open_to_all = finding(made.run("doctor", "--json"), "extension key")
    assert (open_to_all["level"], open_to_all["mend"]) == ("FAIL", f"chmod 600 {key}")
    key.chmod(0o600)
    pins.write_text("")
    pins.chmod(0o666)
    assert finding(made.run("doctor", "--json"), "pinned host keys")["level"] == "FAIL"
    pins.chmod(0o600)
    assert finding(made.run("doctor", "--json"), "pinned host keys")["level"] == "OK"
    key.write_text("00" * 32)
    other = finding(made.run("doctor", "--json"), "extension key")
    assert (other["level"], other["mend"]) == ("FAIL", "stillframe extension build")
    assert made.run("extension", "build").code == 0
    assert finding(made.run("doctor", "--json"), "extension key")["level"] == "OK"
    key.unlink()
    assert finding(made.run("doctor", "--json"), "extension key")["level"] == "WARN"
    key.with_name("extension.key.pub").unlink()
    none = finding(made.run("doctor", "--json"), "extension key")
    assert (none["level"], none["mend"]) == ("WARN", "stillframe extension build")


# --- before a backup -----------------------------------------------------------------------------------------------


def test_what_is_wrong_with_the_packages_is_a_warning_of_the_backup(made: Cli) -> None:
    path = package(made)
    with Service.open(load_config(made.file)) as service:
        assert service.guests.refresh_packages() == []
        path.unlink()
        assert service.guests.refresh_packages() == []
        assert package(made).name == path.name
    made.configure(made.file.read_text() + '\n[extension]\napps = ["apps/none"]\n')
    with Service.open(load_config(made.file)) as service:
        [warning] = service.guests.refresh_packages()
    assert "packages are not brought up to date" in warning
    assert "apps/none cannot be an application" in warning
    assert package(made).name == path.name


# --- in a guest ----------------------------------------------------------------------------------------------------


def test_uninstall_waits_for_no_job_and_starts_no_machine(tiny_guest: GuestFactory, tmp_path: Path) -> None:
    guest = tiny_guest({"vda": 64 << 20}, start=False)
    cli = Cli(tmp_path)
    cli.configure(text_for(guest))
    machine = MachineRef(hypervisor="here", uuid=guest.uuid, name=guest.name)
    config = load_config(cli.file)
    with Service.open(config) as service, Catalog.open(config.catalog_url) as catalog:
        with pytest.raises(UsageError, match="is off: its extension can be removed only from inside"):
            service.guests.uninstall(guest.name)
        with catalog.write() as session:
            job = BackupJob(id="0123456789ab", machine=machine, vault="main", point="0" * 32)
            lock = f"machine:{guest.uuid}"
            add_job(session, job, owner.this_process(), machine=(guest.uuid, guest.name), lock=lock)
        with pytest.raises(Busy, match="0123456789ab") as caught:
            service.guests.uninstall(guest.name)
        assert "stillframe job watch 0123456789ab" in caught.value.hint


def text_for(guest: Guest, more: str = "") -> str:
    return f"""
        [paths]
        state = "{guest.folder}/state"
        runtime = "{guest.folder}/run"
        [vaults.main]
        url = "file://{guest.folder}/vault"
        key_file = "main.key"
        [hypervisors.here]
        uri = "{URI}"
        {more}
        """


POLICY = """
        [policies.gold]
        consistency = "filesystem"
        [protect.all]
        machines = ["sf-test-*"]
        policy = "gold"
        [protect.one]
        machines = ["{name}"]
        policy = "gold"
"""


@pytest.fixture
def served(tiny_guest: GuestFactory, tmp_path: Path) -> Iterator[tuple[Cli, Guest]]:
    """A booted guest, and a configuration whose policy covers it."""
    guest = tiny_guest({"vda": 64 << 20})
    cli = Cli(tmp_path)
    cli.configure(text_for(guest, POLICY.format(name=guest.name)))
    assert cli.run("init").code == 0
    return cli, guest


@pytest.mark.guest
def test_installed_by_the_first_backup_and_taken_out_again(served: tuple[Cli, Guest]) -> None:
    cli, guest = served
    text = cli.file.read_text()
    assert "extension   not known" in cli.run("vm", "show", guest.name).out
    done = cli.run("backup", "run", guest.name, "--json")
    assert done.code == 0, done.err
    assert done.line("backup")["consistency"] == "filesystem"
    shown = cli.run("vm", "show", guest.name, "--json").line("machine")["extension"]
    assert (shown["use"], shown["channel"]) == ("enabled", "guest agent")
    assert f"enabled {shown['version']} over guest agent" in cli.run("vm", "show", guest.name).out
    assert guest.out("ls -d /opt/stillframe/current").strip() == "/opt/stillframe/current"

    told = cli.run("vm", "unprotect", guest.name, "--dry-run", "--json")
    assert told.line("protection")["sections"] == []
    assert f'+exclude = ["{guest.name}"]' in told.line("protection")["diff"].replace(" " * 8, "")
    assert (cli.run("vm", "unprotect", guest.name).code, cli.file.read_text()) == (2, text)
    asked = cli.run("extension", "uninstall", guest.name)
    assert asked.code == 2
    assert "add --yes" in asked.err
    assert guest.run("ls -d /opt/stillframe/current")[0] == 0

    gone = cli.run("vm", "unprotect", guest.name, "--yes")
    assert gone.code == 0, gone.err
    assert f"{guest.name} is no longer protected" in gone.out
    assert "[protect.one]" not in cli.file.read_text()
    assert "the extension is uninstalled" in gone.out
    assert guest.run("ls -d /opt/stillframe")[0] != 0
    assert cli.run("vm", "show", guest.name, "--json").line("machine")["extension"]["detail"] == "uninstalled"
    assert len(cli.run("point", "list", guest.name, "--json").lines) == 1
    again = cli.run("extension", "uninstall", guest.name, "--yes", "--json")
    assert (again.code, again.line("uninstalled")["removed"]) == (0, False)


@pytest.mark.guest
def test_what_the_policy_requires_and_the_command_line_overrules(served: tuple[Cli, Guest]) -> None:
    cli, guest = served
    text = cli.file.read_text()
    # Nothing in this guest is an application, and so nothing can be application-consistent.
    cli.configure(text.replace('"filesystem"', '"application"'))
    asked = cli.run("backup", "run", guest.name, "--json")
    assert (asked.code, asked.line("backup")["consistency"]) == (3, "filesystem"), "a policy's goal is asked for"
    cli.configure(text.replace('"filesystem"', '"application"\n        require = true'))
    required = cli.run("backup", "run", guest.name, "--json")
    assert required.code == 1
    assert "application consistency is required" in required.line("backup")["error"]["message"]
    assert cli.run("backup", "run", guest.name, "--no-require").code == 3
    assert cli.run("backup", "run", guest.name, "--consistency", "filesystem").code == 0
    cli.configure(text.replace('"filesystem"', '"application"'))
    assert cli.run("backup", "run", guest.name, "--require").code == 1
    assert len(cli.run("point", "list", guest.name, "--json").lines) == 3


@pytest.mark.guest
def test_options_of_all_machines_and_those_of_the_policy_go_with_the_backup(served: tuple[Cli, Guest]) -> None:
    cli, guest = served
    text = cli.file.read_text().replace(
        "[policies.gold]", '[policies.gold]\n        options = { postgresql = "backup", mysql = "own" }'
    )
    cli.configure(text + '\n[extension]\noptions = { postgresql = "none", vss = "primary" }\n')
    job = cli.run("backup", "run", guest.name, "--json").line("backup")["job"]
    with Catalog.open(load_config(cli.file).catalog_url) as catalog, catalog.read() as session:
        ran = load_job(session, job)[1]
    assert isinstance(ran, BackupJob)
    assert ran.options == {"postgresql": "backup", "mysql": "own", "vss": "primary"}
