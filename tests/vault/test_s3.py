"""What is S3's own: who made an object when the answer was lost, short answers, large objects, locks and versions, ways
to reach a bucket, and bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.vault.authority import certificate
from tests.vault.buckets import QUICK, Server, free_port, serving, write_credentials
from tests.vault.s3_proxy import Fault, Proxy, always, first, proxy_to
from workers.config import S3Access, VaultConfig
from workers.contract.errors import (
    ConfigError,
    Corrupt,
    Locked,
    ObjectMissing,
    StillframeError,
    StoreUnreachable,
    VaultError,
    VaultMissing,
)
from workers.contract.seams import ObjectInfo
from workers.vault.places import open_place
from workers.vault.s3 import S3Store
from workers.vault.s3_client import Denied, Taken

AMBIGUOUS = [Fault.CUT_AFTER, Fault.ERROR_AFTER, Fault.REPEATED, Fault.SILENT]
HASTY = replace(QUICK, attempts=2)
MIB = 1 << 20


@contextmanager
def spoiled(server: Server) -> Iterator[tuple[Proxy, S3Store]]:
    """A store with a proxy in front, and large objects in parts from 1 MiB on."""
    with proxy_to(server.port) as proxy:
        seen = server.through(proxy.server_port)
        patience = replace(QUICK, read_timeout=1.5)
        yield proxy, seen.store(server.url(), create=True, patience=patience, whole=MIB, part=5 * MIB)
        seen.close()


@pytest.fixture(params=["moto", "localbucket"])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Proxy, S3Store]]:
    """With metadata, and without."""
    with spoiled(request.getfixturevalue(request.param)) as made:
        yield made


# --- who made it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", AMBIGUOUS)
def test_own_object_whose_answer_was_lost_is_ours(place: tuple[Proxy, S3Store], fault: Fault) -> None:
    proxy, store = place
    proxy.plan = first("PUT", fault)
    assert store.put("points/p", b"ours")
    assert sum(method == "PUT" for method, _, _ in proxy.log) == (1 if fault is Fault.REPEATED else 2)
    assert not store.put("points/p", b"other")
    assert store.get("points/p") == b"ours"


@pytest.mark.parametrize("fault", AMBIGUOUS)
def test_object_of_another_is_not_ours_however_answers_are_lost(place: tuple[Proxy, S3Store], fault: Fault) -> None:
    proxy, store = place
    assert store.put("points/p", b"them")
    proxy.plan = first("PUT", fault)
    assert not store.put("points/p", b"ours")
    assert store.get("points/p") == b"them"


def test_equal_content_of_another_is_told_apart_by_the_number_of_the_put(moto: Server) -> None:
    url = moto.url()
    assert moto.store(url, create=True).put("points/p", b"the same")
    assert not moto.store(url, create=True).put("points/p", b"the same")


def test_of_many_that_create_a_name_one_succeeds(localbucket: Server) -> None:
    url = localbucket.url()
    stores = [localbucket.store(url, create=True) for _ in range(4)]

    def put(number: int) -> bool:
        return stores[number % 4].put("points/p", b"%04d" % number)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(put, range(32)))
    assert sum(results) == 1
    assert stores[0].get("points/p") == b"%04d" % results.index(True)


def test_name_that_is_free_again_is_taken(moto: Server) -> None:
    """Refused, since it was there; and gone when we look whose it is."""
    with spoiled(moto) as (proxy, store):
        store.put("sessions/s", b"1")
        real = proxy.decide

        def removed_meanwhile(_number: int, method: str, path: str) -> None:
            if method == "HEAD":
                proxy.plan = lambda _number, _method, _path: None
                moto.client().delete_object(Bucket="plain", Key=path.removeprefix("/plain/"))

        proxy.plan = removed_meanwhile
        assert real == proxy.decide
        assert store.put("sessions/s", b"2")
        assert store.get("sessions/s") == b"2"


# --- large objects -----------------------------------------------------------------------------------------------


def large(store: S3Store, byte: bytes) -> Path:
    path = store.staging() / "large"
    path.write_bytes(byte * (6 * MIB))
    return path


def uploads(server: Server, store: S3Store) -> list[str]:
    """Keys of uploads under the store's prefix that are not completed."""
    prefix = store.features.place.removeprefix("s3://plain/")
    found = server.client().list_multipart_uploads(Bucket="plain", Prefix=prefix)
    return [upload["Key"] for upload in found.get("Uploads", [])]


@pytest.mark.parametrize("fault", [None, *AMBIGUOUS, Fault.CUT_BEFORE])
@pytest.mark.parametrize("step", ["uploads", "partNumber=2", "uploadId="])
def test_large_object(place: tuple[Proxy, S3Store], fault: Fault | None, step: str) -> None:
    proxy, store = place
    if fault is not None:
        proxy.plan = first("PUT" if "part" in step else "POST", fault, path=step)
    assert store.put_file("packs/l", large(store, b"a"))
    assert any(step in path for _, path, _ in proxy.log)
    assert store.get("packs/l", 5 * MIB - 3, 6) == b"a" * 6
    assert list(store.list("packs/")) == [ObjectInfo("packs/l", 6 * MIB)]


def test_large_object_is_exclusive_and_leaves_no_parts(moto: Server) -> None:
    with spoiled(moto) as (_, store):
        assert store.put_file("packs/l", large(store, b"a"))
        assert not store.put_file("packs/l", large(store, b"b"))
        assert store.get("packs/l", 0, 1) == b"a"
        assert uploads(moto, store) == []


def test_upload_that_was_removed_begins_again(localbucket: Server) -> None:
    with spoiled(localbucket) as (proxy, store):

        def remove(_number: int, method: str, path: str) -> None:
            if method == "POST" and "uploadId=" in path:
                proxy.plan = lambda _number, _method, _path: None
                key, _, upload = path.removeprefix("/plain/").partition("?uploadId=")
                localbucket.client().abort_multipart_upload(Bucket="plain", Key=key, UploadId=upload)

        proxy.plan = remove
        assert store.put_file("packs/l", large(store, b"a"))
        assert store.get("packs/l", 0, 1) == b"a"


def test_failed_upload_leaves_its_file_and_no_parts(moto: Server) -> None:
    with spoiled(moto) as (proxy, store):
        proxy.plan = first("PUT", Fault.ERROR, times=99, path="partNumber=2")
        path = large(store, b"a")
        with pytest.raises(StoreUnreachable):
            store.put_file("packs/l", path)
        assert path.exists()
        assert uploads(moto, store) == []


# --- reading and listing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault.SHORT, Fault.LESS, Fault.ERROR, Fault.SLOW_DOWN, Fault.CUT_BEFORE])
def test_never_a_wrong_byte(proxied: Server, proxy: Proxy, fault: Fault) -> None:
    store = proxied.store(proxied.url(), create=True, patience=HASTY)
    store.put("packs/a", b"0123456789")
    proxy.plan = first("GET", fault)
    assert store.get("packs/a", 2, 6) == b"234567"
    proxy.plan = always(fault)
    with pytest.raises(StoreUnreachable) as caught:
        store.get("packs/a", 2, 6)
    assert caught.value.retryable
    assert caught.value.hint


def test_many_objects_are_listed_in_pages(localbucket: Server) -> None:
    assert localbucket.data is not None
    url = localbucket.url()
    folder = localbucket.data / url.removeprefix("s3://") / "packs"
    folder.mkdir(parents=True)
    for number in range(2100):
        (folder / f"{number:04d}").write_bytes(b"x")
    (folder / "NotOurs").write_bytes(b"x")
    found = list(localbucket.store(url, create=True).list("packs/"))
    assert found == [ObjectInfo(f"packs/{number:04d}", 1) for number in range(2100)]


# --- the vault that was opened -----------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [None, b"another"])
def test_nothing_is_written_where_the_vault_is_another(moto: Server, now: bytes | None) -> None:
    store = moto.store(moto.url(), create=True, guard_seconds=0)
    store.put("vault.json", b"marker")
    key = store.features.place.removeprefix("s3://plain/") + "/vault.json"
    moto.client().delete_object(Bucket="plain", Key=key)
    if now is not None:
        moto.client().put_object(Bucket="plain", Key=key, Body=now)
    patient = [lambda: store.put("packs/a", b"x"), lambda: store.delete("packs/a"), lambda: store.get("packs/a")]
    for act in patient:
        with pytest.raises(VaultMissing):
            act()
    with pytest.raises(VaultMissing):
        list(store.list("packs/"))


def test_point_is_never_written_where_the_vault_is_gone(moto: Server) -> None:
    store = moto.store(moto.url(), create=True)
    store.put("vault.json", b"marker")
    store.delete("vault.json")
    with pytest.raises(VaultMissing):
        store.put("points/p", b"x")


# --- locks -------------------------------------------------------------------------------------------------------


def test_lock_is_the_bucket_s(moto: Server) -> None:
    store = moto.store(moto.url("locked"), create=True)
    assert store.features.locks
    assert not moto.store(moto.url(), create=True).features.locks
    store.put("packs/a", b"x")
    store.retain("packs/a", datetime.now(UTC) + timedelta(days=3))
    client, key = moto.client(), store.features.place.removeprefix("s3://locked/") + "/packs/a"
    found = client.head_object(Bucket="locked", Key=key)
    assert found["ObjectLockMode"] == "COMPLIANCE"
    with pytest.raises(ClientError):
        client.delete_object(Bucket="locked", Key=key, VersionId=found["VersionId"])
    with pytest.raises(Locked):
        store.delete("packs/a")


def test_a_store_that_fails_is_not_one_without_locks(proxied: Server, proxy: Proxy) -> None:
    """It would delete what others have locked there: a plain delete only hides it, and nobody refuses that."""
    proxy.plan = lambda _number, _method, path: Fault.ERROR if "object-lock" in path else None
    with pytest.raises(StoreUnreachable):
        proxied.store(proxied.url("locked"), create=True)


def test_what_is_deleted_in_a_bucket_with_versions_is_gone(moto: Server) -> None:
    store = moto.store(moto.url("locked"), create=True)
    for _ in range(2):
        assert store.put("packs/a", b"x")
        store.delete("packs/a")
    prefix = store.features.place.removeprefix("s3://locked/")
    found = moto.client().list_object_versions(Bucket="locked", Prefix=prefix)
    assert not found.get("Versions")
    assert not found.get("DeleteMarkers")


# --- ways to a bucket, and bad input -----------------------------------------------------------------------------


def test_credentials_are_checked_by_the_server(nanio: Server, tmp_path: Path) -> None:
    wrong = write_credentials(tmp_path / "wrong", secret="not-the-secret")
    with pytest.raises(Denied) as caught:
        S3Store("s3://plain/x", nanio.access.model_copy(update={"credentials_file": wrong}), create=True)
    assert "credentials" in caught.value.hint
    unknown = write_credentials(tmp_path / "unknown", key_id="nobody-that-is-known")
    with pytest.raises(Denied):
        S3Store("s3://plain/x", nanio.access.model_copy(update={"credentials_file": unknown}), create=True)


def test_files_of_credentials_that_do_not_do(moto: Server, tmp_path: Path) -> None:
    loose = write_credentials(tmp_path / "loose")
    loose.chmod(0o644)
    (tmp_path / "empty").write_text("[other]\naws_access_key_id = a\n")
    (tmp_path / "garbage").write_text("no section\n")
    for name in ("empty", "garbage"):
        (tmp_path / name).chmod(0o600)
    for name, word in (("loose", "others"), ("empty", "no key"), ("garbage", "cannot read"), ("none", "cannot read")):
        with pytest.raises(ConfigError, match=word) as caught:
            S3Store("s3://plain/x", moto.access.model_copy(update={"credentials_file": tmp_path / name}), create=True)
        assert caught.value.hint


def test_no_such_bucket(moto: Server, localbucket: Server) -> None:
    for server in (moto, localbucket):
        for create in (False, True):
            with pytest.raises(VaultMissing, match="NoSuchBucket") as caught:
                server.store("s3://no-such-bucket/x", create=create)
            assert "makes no buckets" in caught.value.hint


def test_no_vault_in_the_bucket(moto: Server) -> None:
    with pytest.raises(VaultMissing):
        moto.store(moto.url())


@pytest.mark.parametrize("url", ["s3:///x", "http://plain/x", "s3://plain/x?y=1"])
def test_urls_that_are_no_bucket(moto: Server, url: str) -> None:
    with pytest.raises(ConfigError):
        moto.store(url, create=True)


def test_nobody_answers(moto: Server) -> None:
    access = moto.access.model_copy(update={"endpoint": f"http://127.0.0.1:{free_port()}"})
    with pytest.raises(StoreUnreachable, match="failed 2 times"):
        S3Store("s3://plain/x", access, create=True, patience=HASTY)


def test_own_certificate_authority(tmp_path: Path) -> None:
    pem, key = certificate(tmp_path)
    with serving(tmp_path / "moto", "moto", tls=(pem, key)) as server:
        assert server.store(server.url(), create=True).put("packs/a", b"x")
        with pytest.raises(StoreUnreachable, match="not trusted") as caught:
            S3Store("s3://plain/x", server.access.model_copy(update={"ca_file": None}), create=True)
        assert "ca_file" in caught.value.hint
    with pytest.raises(ConfigError, match="no file"):
        S3Store("s3://plain/x", server.access.model_copy(update={"ca_file": tmp_path / "none.pem"}), create=True)


BY_HOST = """
from pathlib import Path; import sys
from workers.config import S3Access
from workers.vault.s3 import S3Store
access = S3Access(endpoint="http://s3.test", path_style=sys.argv[2] == "path", credentials_file=Path(sys.argv[1]))
store = S3Store(f"s3://plain/{sys.argv[3]}", access, create=True)
assert store.put("packs/a", b"x") and store.get("packs/a") == b"x"
assert [info.name for info in store.list("")] == ["packs/a"]
store.close()
"""


def test_bucket_in_the_host_name(moto: Server, tmp_path: Path) -> None:
    """`plain.s3.test` leads nowhere but to the proxy of the environment, which sees how the bucket is asked for."""
    with proxy_to(moto.port) as proxy:
        env = {**os.environ, "HTTP_PROXY": f"http://127.0.0.1:{proxy.server_port}", "TMPDIR": str(tmp_path)}
        argv = [sys.executable, "-c", BY_HOST, str(moto.access.credentials_file), "virtual", "by-host"]
        subprocess.run(argv, env=env, check=True, timeout=120)
        assert {path.partition("/by-host")[0] for _, path, _ in proxy.log if "by-host/" in path} == {
            "http://plain.s3.test"
        }
    found = moto.client().get_object(Bucket="plain", Key="by-host/packs/a")
    assert found["Body"].read() == b"x"


def test_place_is_chosen_by_the_scheme(moto: Server, tmp_path: Path) -> None:
    store = open_place(VaultConfig(url=moto.url(), s3=moto.access), create=True)
    assert isinstance(store, S3Store)
    store.close()
    open_place(VaultConfig(url=f"file://{tmp_path}/v"), create=True).put("vault.json", b"m")
    for url in ("ftp://host/x", "/plain/path", "s4://x"):
        with pytest.raises(ConfigError, match="known kind"):
            open_place(VaultConfig(url=url, s3=S3Access()))


@pytest.mark.parametrize("act", [lambda store: store.put("packs/a", b"x"), lambda store: store.get("packs/a")])
def test_errors_are_ours(proxied: Server, proxy: Proxy, act: Callable[[S3Store], object]) -> None:
    """Internal kinds of errors do not get out as something that no caller knows."""
    store = proxied.store(proxied.url(), create=True, patience=HASTY)
    for fault in (Fault.ERROR, Fault.CUT_BEFORE):
        proxy.plan = always(fault)
        with pytest.raises(StillframeError) as caught:
            act(store)
        assert not isinstance(caught.value, (Taken, ObjectMissing, Corrupt))
        assert isinstance(caught.value, VaultError)
