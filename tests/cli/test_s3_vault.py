"""`init` and `doctor` with a vault in a bucket."""

from __future__ import annotations

from tests.cli.conftest import UNREACHABLE, Cli
from tests.vault.buckets import Server


def configure(cli: Cli, server: Server, url: str) -> None:
    cli.configure(
        f"""
        [paths]
        state = "state"
        runtime = "run"
        [vaults.main]
        url = "{url}"
        key_file = "main.key"
        [vaults.main.s3]
        endpoint = "{server.access.endpoint}"
        path_style = true
        credentials_file = "{server.access.credentials_file}"
        [hypervisors.lab1]
        uri = "{UNREACHABLE}"
        """
    )


def test_init_makes_a_vault_in_a_bucket_and_doctor_likes_it(cli: Cli, moto: Server) -> None:
    url = moto.url("locked")
    configure(cli, moto, url)
    before = cli.run("doctor", "--json")
    [finding] = [line for line in before.lines if line["subject"] == "vault main"]
    assert finding["level"] == "FAIL"
    assert "init" in finding["mend"]
    made = cli.run("init", "--json")
    assert made.code == 0, made.err
    assert made.line("vault")["created"]
    assert not cli.run("init", "--json").line("vault")["created"]
    assert cli.run("vault", "key", "verify").code == 0
    after = cli.run("doctor", "--json").lines
    [vault] = [line for line in after if line["subject"] == "vault main"]
    [key] = [line for line in after if line["subject"] == "key of vault main"]
    assert (vault["level"], key["level"]) == ("OK", "OK")
    assert "with object lock" in vault["detail"]
    assert moto.store(url).get("vault.json")


def test_init_refuses_a_store_without_conditional_create(cli: Cli, nanio: Server) -> None:
    url = nanio.url()
    configure(cli, nanio, url)
    made = cli.run("init")
    assert made.code == 1
    assert "conditional create" in made.err
    assert "choose another place" in made.err
    assert not (cli.folder / "main.key").exists()
    assert list(nanio.store(url, create=True).list("")) == []


def test_init_where_there_is_no_bucket(cli: Cli, moto: Server) -> None:
    configure(cli, moto, "s3://no-such-bucket/x")
    made = cli.run("init")
    assert made.code == 10
    assert "makes no buckets" in made.err
