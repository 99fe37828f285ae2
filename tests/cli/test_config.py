"""Every mistake in a configuration file is told with its line, and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import Config, load_config, parse_config
from orchestrator.config_place import find_config
from workers.config import ExtensionConfig, GuestAccess
from workers.contract.errors import ConfigError, NotFound, UsageError
from workers.contract.points import Consistency

FILE = Path("/srv/lab/stillframe.toml")

DESIGN = """
[catalog]
url = "sqlite:////var/lib/stillframe/catalog.sqlite"
[broker]
url = "memory://"                    # or redis://…
[vaults.main]
url = "file:///var/lib/stillframe/vault"
key_file = "/etc/stillframe/main.key"
[hypervisors.lab1]
uri = "qemu+ssh://root@lab1/system"
max_jobs = 2
[policies.gold]
schedule = "daily at 02:00"          # or cron = "0 2 * * *"
timezone = "Europe/Berlin"
consistency = "application"
retention = { daily = 7, weekly = 4, monthly = 12, yearly = 3 }
[protect.web]
machines = ["web-*"]
policy = "gold"
vault = "main"
"""

MAIN = '[vaults.main]\nurl = "file:///v"\nkey_file = "k"\n'


def parsed(text: str) -> Config:
    return parse_config(text, FILE)


def test_the_example_of_the_design_is_understood() -> None:
    config = parsed(DESIGN)
    assert config.catalog_url == "sqlite:////var/lib/stillframe/catalog.sqlite"
    assert config.broker_url == "memory://"
    assert config.worker.vaults["main"].url == "file:///var/lib/stillframe/vault"
    assert config.worker.hypervisors["lab1"].uri == "qemu+ssh://root@lab1/system"
    assert config.policies["gold"].retention is not None
    assert config.protected_by("lab1", "web-7", ()) == "web"
    assert config.protected_by("lab1", "db-7", ()) is None
    assert config.vault_name() == "main"
    assert config.consistency is Consistency.APPLICATION
    assert not config.consistency_explicit


def test_paths_are_relative_to_the_file_and_know_home(home: Path) -> None:
    config = parsed(
        '[catalog]\nurl = "sqlite:///c/catalog.db"\n[vaults.a]\nurl = "file://./vault"\nkey_file = "~/a.key"\n'
        '[paths]\nstate = "../state"\n'
    )
    assert config.catalog_url == "sqlite:////srv/lab/c/catalog.db"
    assert config.worker.vaults["a"].url == "file:///srv/lab/vault"
    assert config.worker.vaults["a"].key_file == home / "a.key"
    assert config.state_dir == Path("/srv/state")
    assert config.worker.scratch_dir == Path("/srv/state/scratch")
    assert config.worker.cache_dir == Path("/srv/state/cache")


@pytest.fixture
def home() -> Path:
    return Path.home()


def test_without_a_catalog_url_it_lies_in_the_state_folder() -> None:
    assert parsed('[paths]\nstate = "/s"\n').catalog_url == "sqlite:////s/catalog.sqlite"


def test_block_sizes_keep_the_order_of_the_file() -> None:
    config = parsed('[backup]\nblock_size = "256KiB"\n[backup.block_sizes]\n"db-1/vdb" = 131072\n"db-*/vd?" = "4MiB"\n')
    assert list(config.block_sizes.items()) == [("db-1/vdb", 128 << 10), ("db-*/vd?", 4 << 20)]
    assert config.worker.block_size == 256 << 10


def test_choice_of_the_vault() -> None:
    two = parsed(MAIN + '[vaults.far]\nurl = "file:///f"\nkey_file = "k"\n')
    with pytest.raises(UsageError, match="several vaults") as several:
        two.vault_name()
    assert "--vault main" in several.value.hint
    assert two.vault_name("far") == "far"
    with pytest.raises(NotFound, match="'mian'") as unknown:
        two.vault_name("mian")
    assert unknown.value.hint == "did you mean main?"
    with pytest.raises(UsageError, match="no vault"):
        parsed("").vault_name()


# (what is written, line of the mistake, words of the message)
MISTAKES = [
    (
        '[vaults.main]\nurl = "file:///v"\nkey_fle = "k"\n',
        3,
        "unknown key 'key_fle' in [vaults.main]; did you mean key_file",
    ),
    ('[vault.main]\nurl = "file:///v"\n', 1, "unknown section 'vault'; did you mean vaults"),
    ('\n[vaults.main]\nkey_file = "k"\n', 2, "[vaults.main] needs url"),
    ('[vaults.main]\nurl = "file:///v"\n', 1, "a vault needs its key"),
    (MAIN + 'passphrase_file = "p"\n', 1, "exclude each other"),
    ('[vaults.main]\nkey_file = "k"\nurl = "/v"\n', 3, 'did you mean "file:///v"'),
    ('[vaults.main]\nkey_file = "k"\nurl = "ftp://b/p"\n', 3, "no vault that this version knows"),
    ('[vaults.main]\nkey_file = "k"\nurl = "s3://B"\n', 3, "is no bucket"),
    (MAIN + "[vaults.main.s3]\npath_style = true\n", 1, "s3 is for a vault whose url"),
    (MAIN + 'replica_of = "main"\n', 4, "no other vault is named 'main'"),
    (MAIN + 'key_command = ["pass"]\n', 1, "exclude each other"),
    ('[vaults.main]\nkey_file = "k"\nurl = "file://v"\n', 3, 'did you mean "file:///v"'),
    ('[vaults.main]\nkey_file = "k"\nurl = 7\n', 3, "url must be text in quotes, not 7"),
    ('[vaults."a b"]\nkey_file = "k"\nurl = "file:///v"\n', 1, "'a b' cannot be a name"),
    ("vaults = 3\n", 1, "vaults must be a table, not 3"),
    ('[hypervisors.a]\nuri = "qemu:///system"\nmax_jobs = "2"\n', 3, "max_jobs must be a whole number, not '2'"),
    ('[hypervisors.a]\nuri = "qemu:///system"\nmax_jobs = 0\n', 3, "greater than or equal to 1, not 0"),
    ('[hypervisors.a]\nuri = "esx://a"\n', 2, "is of no kind known here"),
    ('[hypervisors.a]\nuri = "qemu+tls://a/system"\n', 2, "no way to the disks"),
    ('[hypervisors.a]\nuri = "qemu+ssh://root:x@a/system"\n', 2, "holds a password"),
    ('[hypervisors.a]\nuri = "qemu+ssh://-oProxyCommand=x/system"\n', 2, "names no host"),
    ('[hypervisors.a]\nuri = "qemu+ssh://a/system?no_verify=1"\n', 2, "no_verify is not used here"),
    ('[hypervisors.a]\nuri = "qemu+ssh://a/system"\nscratch_dir = "scratch"\n', 1, "a folder of that host"),
    ('[hypervisors.a]\nuri = "qemu:///system"\nkey_file = "k"\n', 1, "key_file is for qemu+ssh://"),
    ('[catalog]\nurl = "mysql://a"\n', 2, "no catalog that this version knows"),
    ('[broker]\nurl = "amqp://a"\n', 2, "no broker that this version knows"),
    ('[backup]\nconsistency = "aplication"\n', 2, "did you mean application"),
    ('[backup]\nblock_size = "3MB"\n', 2, 'did you mean "3MiB"'),
    ('[backup]\nblock_size = "big"\n', 2, "is not a size"),
    ('[backup]\nblock_size = "96KiB"\n', 2, "power of two from 64KiB to 4MiB"),
    ('[backup]\nblock_size = "8MiB"\n', 2, "power of two from 64KiB to 4MiB"),
    ('[backup]\nblock_sizes = { "vdb" = "1MiB" }\n', 2, 'write "machine/target"'),
    ('[backup.block_sizes]\n\n"a/vdb" = true\n', 3, "is not a size"),
    ('[backup]\nvault = "mian"\n' + MAIN, 2, "no vault is named 'mian'; did you mean main"),
    ('[policies.gold]\nschedule = "dayly at 2"\n', 2, "is no schedule"),
    ('[policies.gold]\ncron = "0 2 * *"\n', 2, "is no cron expression"),
    ('[policies.gold]\n\ncron = "99 2 * * *"\n', 3, "is no cron expression: bad minute"),
    ('[policies.gold]\ncron = "0 0 30 2 *"\n', 2, "is no cron expression: bad day"),
    ('[policies.gold]\ncron = "@daily"\n', 2, "cron expression of five fields"),
    ('[policies.gold]\nschedule = "dayly at 2:00"\n', 2, 'did you mean "daily at 02:00"?'),
    ('[policies.gold]\nschedule = "daily at 02:00\\n"\n', 2, "is no schedule"),
    ('[policies.gold]\nschedule = "daily at 24:00"\n', 2, "is no schedule"),
    ('[policies.gold]\nschedule = "every 4 hour form 8 to 20"\n', 2, '"every 4 hours from 08:00 to 20:00"?'),
    ('[policies.gold]\nschedule = "every 0 minutes"\n', 2, "between one minute and 24 hours"),
    ('[policies.gold]\nschedule = "every 36 hours"\n', 2, "between one minute and 24 hours"),
    ('[policies.gold]\nspread = "2 days"\n', 2, "less than or equal to 86400"),
    ('[policies.gold]\nspread = "2 fortnights"\n', 2, "is no length of time"),
    ("[policies.gold]\ndeadline = 5\n", 2, "greater than or equal to 60"),
    ('[policies.gold]\ndeadline = "999999999 days"\n', 2, "less than or equal to"),
    ("[policies.gold]\npriority = 9\n", 2, "less than or equal to 4"),
    ('[policies.gold]\nblackout = ["8:00 to 18:00"]\n', 2, "is no window"),
    ('[policies.gold]\nblackout = ["weekday 08:00 to 18:00"]\n', 2, 'did you mean "weekdays 08:00 to 18:00"?'),
    ('[policies.gold]\nblackout = ["weekly 08:00 to 18:00"]\n', 2, "is no window"),
    ('[policies.gold]\n\nblackout = ["weekdays 00:00 to 00:00", "weekends 00:00 to 00:00"]\n', 3, "the whole week"),
    ("[policies.gold]\nblakout = []\n", 2, "did you mean blackout"),
    ('[protect.web]\npolicy = "gold"\n[policies.gold]\n', 1, "this protects nothing"),
    ('[protect.web]\npolicy = "gold"\ntags = []\n[policies.gold]\n', 3, "at least 1 item"),
    ('[protect.web]\npolicy = "gold"\ntag = ["a"]\n[policies.gold]\n', 3, "did you mean tags"),
    ('[policies.gold]\ncron = "0 2 * * *"\nschedule = "hourly"\n', 1, "exclude each other"),
    ('[policies.gold]\ntimezone = "Europe/Berln"\n', 2, "is no time zone"),
    ('[policies.gold]\ntimezone = "../../etc/passwd"\n', 2, "is no time zone"),
    ("[policies.gold]\nretention = { daliy = 7 }\n", 2, "unknown key 'daliy'"),
    ("[policies.gold]\nretention = { daily = 0 }\n", 2, "keeps nothing"),
    ("[policies.gold]\nrequire = 1\n", 2, "require must be true or false"),
    ('[protect.web]\nmachines = "web"\npolicy = "gold"\n[policies.gold]\n', 2, "machines must be a list"),
    ('[protect.web]\nmachines = ["web"]\npolicy = "gld"\n[policies.gold]\n', 3, "did you mean gold"),
    ("[extension]\ninstal = false\n", 2, "unknown key 'instal' in [extension]; did you mean install"),
    ('[extension]\ninstall = "no"\n', 2, "install must be true or false"),
    ('[extension]\npublic_key = "abc"\n', 2, "a public key has 64 hex digits"),
    ('[extension]\napps = "./apps/50-ours"\n', 2, "apps must be a list"),
    ('[extension]\noptions = { "50-postgresql" = "backup" }\n', 2, "did you mean postgresql?"),
    ('[extension.options]\n\npostgresql = "two words"\n', 3, "is not one word"),
    ('[extension]\noptions = { postgresql = "-x" }\n', 2, "is not one word"),
    (MAIN + '[extension]\nsigning_key = "./k"\n', 5, "signing_key is the key of vault main"),
    ('[policies.gold]\noptions = { "my app" = "x" }\n', 2, '"my app" is no application'),
    ('[guest."web-*"]\nport = 22\n', 1, "unknown section 'guest'; did you mean guests"),
    ('[guests."web-*"]\nadress = "10.0.0.1"\n', 2, "unknown key 'adress' in [guests.web-*]; did you mean address"),
    (
        '[guests."web-*"]\nchannel = "sssh"\n',
        2,
        "channel must be 'auto', 'agent' or 'ssh', not 'sssh'; did you mean ssh",
    ),
    ('[guests.a]\nchannel = "agent"\n[guests.b]\nchannel = "agent"\nuser = "eve"\n', 3, "that is for SSH"),
    ("[guests.a]\nport = 0\n", 2, "greater than or equal to 1, not 0"),
    ('[guests.a]\nport = "22"\n', 2, "port must be a whole number"),
    ('[guests.a]\nuser = "root; reboot"\n', 2, "'root; reboot' cannot be the user of a guest"),
    ('[guests.a]\naddress = "-oProxyCommand=x"\n', 2, "cannot be the address of a guest"),
    ('[guests.a]\nhost_key = "AAAA"\n', 2, 'written like "ssh-ed25519 AAAA…"'),
    ("\n\na = \n", 3, "not valid TOML"),
    ("[a]\n[a]\n", 2, "not valid TOML"),
    ('[backup]\nvault = "open\n', 2, "not valid TOML"),
]


@pytest.mark.parametrize(("text", "line", "words"), MISTAKES, ids=[words for _, _, words in MISTAKES])
def test_a_mistake_has_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"{FILE}:{line}: ")


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed('[backup]\nthreads = 0\n[catalog]\nurl = 1\n[broker]\nulr = "memory://"\n')
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "4", "6"]


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(b"[backup]\n# \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"c\.toml:2: is not UTF-8"):
        load_config(file)


def test_a_named_file_that_is_missing_is_not_replaced_by_another(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file") as caught:
        find_config(tmp_path / "none.toml")
    assert "init --config" in caught.value.hint


# --- extensions and guests -------------------------------------------------------------------------------------

GUESTS = """
[extension]
signing_key = "keys/ext.key"
apps = ["./apps/50-ours", "/srv/apps/60-theirs"]
options = { postgresql = "backup", vss = "primary" }
[guests."lab1/web-1"]
extension = false
[guests."web-*"]
channel = "ssh"
address = "fe80::1%eth0"
port = 2222
user = "backup"
key_file = "web.key"
host_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIK"
[paths]
state = "/s"
"""


def test_how_to_get_into_guests_in_the_order_of_the_file() -> None:
    worker = parsed(GUESTS).worker
    assert worker.guests == [
        GuestAccess(machines="lab1/web-1", extension=False),
        GuestAccess(
            machines="web-*",
            channel="ssh",
            address="fe80::1%eth0",
            port=2222,
            user="backup",
            key_file=Path("/srv/lab/web.key"),
            host_key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIK",
        ),
    ]


def test_what_is_put_into_guests() -> None:
    config = parsed(GUESTS)
    assert config.extension.signing_key == Path("/srv/lab/keys/ext.key")
    assert config.extension.apps == [Path("/srv/lab/apps/50-ours"), Path("/srv/apps/60-theirs")]
    assert config.extension.options == {"postgresql": "backup", "vss": "primary"}
    assert config.worker.extension == ExtensionConfig(
        packages=Path("/s/extensions"), public_key=None, host_keys=Path("/s/guest_host_keys")
    )


def test_without_a_section_the_extension_is_installed_and_its_key_lies_beside_the_file() -> None:
    config = parsed("")
    assert config.extension.signing_key == Path("/srv/lab/extension.key")
    assert config.worker.extension is not None
    assert config.worker.guests == []
    assert parsed("[extension]\ninstall = false\n").worker.extension is None


def test_the_public_key_is_the_written_one_else_the_one_that_was_made(tmp_path: Path) -> None:
    file = tmp_path / "stillframe.toml"

    def trusted(text: str) -> str | None:
        worker = parse_config(text, file).worker
        assert worker.extension is not None
        return worker.extension.public_key

    assert trusted("") is None
    (tmp_path / "extension.key.pub").write_text("ab" * 32 + "\n")
    assert trusted("") == "ab" * 32
    assert trusted(f'[extension]\npublic_key = "{"cd" * 32}"\n') == "cd" * 32
    (tmp_path / "extension.key.pub").write_text("ab\n")
    with pytest.raises(ConfigError, match="is no public key") as caught:
        trusted("")
    assert "stillframe extension build" in caught.value.hint


POLICIES = """
[backup]
consistency = "crash"
[policies.gold]
consistency = "application"
require = true
options = { postgresql = "backup" }
[policies.plain]
[protect.web]
machines = ["web-*"]
exclude = ["web-9"]
policy = "gold"
[protect.all]
machines = ["lab1/*"]
policy = "plain"
"""


def test_the_policy_of_a_machine_is_that_of_the_first_section_which_covers_it() -> None:
    config = parsed(POLICIES)
    gold = config.policy_for("lab1", "web-1", ())
    assert gold is not None
    assert (gold.require, gold.options) == (True, {"postgresql": "backup"})
    assert config.policy_for("lab1", "web-9", ()) == config.policies["plain"]
    assert config.policy_for("lab2", "web-9", ()) is None
    assert config.protections("lab1", "web-1", ()) == ["web", "all"]


def test_a_mistake_in_a_list_is_told_by_the_name_of_the_list(tmp_path: Path) -> None:
    text = '[policies.gold]\nblackout = ["08:00 to 09:00", "weekdays 25:00 to 26:00"]\n'
    with pytest.raises(ConfigError, match=r':2: blackout: "weekdays 25:00 to 26:00" is no window'):
        parse_config(text, tmp_path / "stillframe.toml")
