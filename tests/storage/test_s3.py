"""S3 only: lost answers, refusals and counts, over real sockets."""

import hashlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import S3Server
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.storage.conftest import DATA, MIB, name_of
from vlal_dist.errors import ConfigError, ConflictError, DataError, StorageError
from vlal_dist.storage import s3, s3_client
from vlal_dist.storage.s3 import S3Store
from vlal_dist.storage.s3_client import TRIES
from vlal_dist.storage.s3_counts import S3Counts, process_counts


class TestRetries:
    def test_a_store_that_stays_busy_is_an_error(
        self, root: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proxy.faults = [Fault("busy", match="^HEAD ", times=99)]
        monkeypatch.setattr("vlal_dist.storage.s3_client.OUTAGE_S", 0.0)
        with pytest.raises(StorageError, match=f"the store is busy.*given up after {TRIES} tries"):
            root.size("shard.tar")
        assert len(proxy.log) == TRIES

    @pytest.mark.parametrize("as_file", [False, True])
    def test_a_commit_whose_answer_was_lost_finds_its_own_object(
        self, root: S3Store, proxy: FaultProxy, tmp_path: Path, as_file: bool
    ) -> None:
        proxy.faults = [Fault("lost", match="^PUT ")]
        body: bytes | Path = b"x" * 300_000
        if as_file:
            (tmp_path / "source").write_bytes(b"x" * 300_000)
            body = tmp_path / "source"
        assert root.create("commit", body) is False
        assert root.read("commit") == b"x" * 300_000
        assert [seen.fault for seen in proxy.log if seen.line.startswith("PUT")] == ["lost", None]
        with pytest.raises(ConflictError):
            root.create("commit", b"other")

    def test_a_commit_is_repeated_when_busy(self, root: S3Store, proxy: FaultProxy) -> None:
        proxy.faults = [Fault("busy", match="^PUT ", times=2)]
        assert root.create("commit", b"x") is True
        puts = [seen for seen in proxy.log if seen.line.startswith("PUT")]
        assert [seen.headers["if-none-match"] for seen in puts] == ["*"] * 3
        assert all("content-md5" in seen.headers for seen in puts)

    @pytest.mark.slow
    def test_writes_and_listings_outlast_an_outage(self, root: S3Store, proxy: FaultProxy) -> None:
        """boto3's five tries would end within about two seconds."""
        for use, kept in (
            (lambda: root.create("commit", b"x"), ["commit", "shard.tar"]),
            (lambda: root.replace("commit", b"y"), ["commit", "shard.tar"]),
            (lambda: root.list_keys(), ["commit", "shard.tar"]),
            (lambda: root.delete("commit"), ["shard.tar"]),
        ):
            proxy.faults = [Fault("away", match="", seconds=4.0)]
            started = time.monotonic()
            use()
            assert time.monotonic() - started >= 3.0
            assert root.list_keys() == kept


class TestCommits:
    def test_objects_of_other_tools_are_compared_by_content(
        self, root: S3Store, behind: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3, "_COMPARE_BYTES", 1000)
        behind.put_object(**name_of(root, "foreign"), Body=DATA[:3500])
        assert root.create("foreign", DATA[:3500]) is False
        with pytest.raises(ConflictError, match=hashlib.sha256(DATA[:3500]).hexdigest()):
            root.create("foreign", DATA[:3499])

    def test_the_digest_is_recorded(self, root: S3Store, behind: Any) -> None:
        head = behind.head_object(**name_of(root, "shard.tar"))
        assert head["Metadata"] == {"sha256": hashlib.sha256(DATA).hexdigest()}

    def test_an_object_too_large_for_one_put_is_refused(
        self, root: S3Store, tmp_path: Path
    ) -> None:
        huge = tmp_path / "huge"
        with huge.open("wb") as file:
            file.truncate(s3.MAX_OBJECT_BYTES + 1)
        with pytest.raises(StorageError, match=r"5368709121 bytes; .*pack\.shard_bytes"):
            root.create("huge", huge)

    def test_folder_marks_are_not_listed(self, root: S3Store, behind: Any) -> None:
        behind.put_object(**name_of(root, "folder/"), Body=b"")
        assert root.list_keys() == ["shard.tar"]

    def test_counts(self, moto_s3: S3Server) -> None:
        store, before = S3Store(moto_s3.url()), process_counts()
        assert store.counts == S3Counts()
        store.create("k", b"12345")
        store.create("k", b"12345")  # PUT refused, HEAD compared
        assert store.read("k", offset=1) == b"2345"
        assert store.counts == S3Counts(requests=4, bytes_in=4, bytes_out=5)
        other = S3Store(moto_s3.url())
        other.create("k", b"1")
        assert process_counts() == before + store.counts + other.counts
        child = os.fork()
        if child == 0:
            os._exit(0 if store.counts == process_counts() == S3Counts() else 1)
        assert os.waitpid(child, 0)[1] == 0


class TestRefusals:
    """One clear line that names the remedy and never a secret."""

    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3_client, "_LONGEST_PAUSE_S", 0.01)

    def test_no_credentials(self, moto_s3: S3Server) -> None:
        nothing = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
        with moto_s3.environment(**nothing), pytest.raises(StorageError) as caught:
            S3Store(moto_s3.url()).exists("k")
        assert "no AWS credentials" in str(caught.value)
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        [
            "[default]\ns3 = foo\n",
            "garbage\n[default\n",
            "[default]\ns3 =\n  addressing_style = sideways\n",
            "\udcff\udcfe[default]\n",
        ],
    )
    def test_a_configuration_file_that_cannot_be_used_is_named(
        self, moto_s3: S3Server, tmp_path: Path, text: str
    ) -> None:
        file = tmp_path / "aws-config"
        file.write_text(text, errors="surrogateescape")
        expected = pytest.raises(ConfigError, match=str(file))
        with moto_s3.environment(AWS_CONFIG_FILE=str(file)), expected:
            S3Store(moto_s3.url()).exists("k")

    def test_a_credentials_file_that_cannot_be_used_is_named(
        self, moto_s3: S3Server, tmp_path: Path
    ) -> None:
        file = tmp_path / "credentials"
        file.write_text("[default\naws_secret_access_key = leaked-if-printed\n")
        with (
            moto_s3.environment(AWS_SHARED_CREDENTIALS_FILE=str(file), AWS_ACCESS_KEY_ID=None),
            pytest.raises(ConfigError, match=str(file)) as caught,
        ):
            S3Store(moto_s3.url()).exists("k")
        assert "leaked" not in str(caught.value)

    @pytest.mark.parametrize(
        "url", ["s3://key7:sec7/ret7@bucket/x", "s3://key7@bucket/x", "s3://key7:sec7"]
    )
    def test_credentials_in_a_root_are_refused_and_not_shown(self, url: str) -> None:
        with pytest.raises(ConfigError, match="holds no credentials") as caught:
            S3Store(url)
        assert "7" not in str(caught.value)

    def test_a_name_that_no_bucket_can_have(self) -> None:
        with pytest.raises(ConfigError, match="'my bucket' cannot be the name of a bucket"):
            S3Store("s3://my bucket/x")

    def test_a_public_bucket_is_read_without_credentials(
        self, ceph_s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        private, public = S3Store(ceph_s3.url()), S3Store(ceph_s3.url())
        private.create("k", b"0123456789")
        public.create("k", b"0123456789")
        place = name_of(public, "k")
        ceph_s3.client().put_object_acl(**place, ACL="public-read")
        nothing = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
        with ceph_s3.environment(**nothing):
            with pytest.raises(StorageError, match="a public bucket AWS_NO_SIGN_REQUEST=yes"):
                S3Store(public.url).read("k")
            monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
            store = S3Store(public.url)
            assert store.read("k") == b"0123456789"
            assert [store.read("k", offset=n, length=2) for n in (0, 4)] == [b"01", b"45"]
            with pytest.raises(StorageError, match="does not allow this to everyone"):
                S3Store(private.url).read("k")
            monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "perhaps")
            with pytest.raises(ConfigError, match="AWS_NO_SIGN_REQUEST=perhaps: give yes, or no"):
                S3Store(public.url).read("k")

    def test_an_absent_profile(self, moto_s3: S3Server) -> None:
        expected = pytest.raises(ConfigError, match=r"ProfileNotFound.*AWS_PROFILE")
        with moto_s3.environment(AWS_PROFILE="absent"), expected:
            S3Store(moto_s3.url()).exists("k")

    def test_no_bucket(self, moto_s3: S3Server) -> None:
        store = S3Store("s3://vlal-no-such-bucket/x")
        uses = (store.exists, store.read, store.list_keys, lambda key: store.create(key, b"x"))
        for use in uses:
            with pytest.raises(StorageError, match="no bucket 'vlal-no-such-bucket' at http"):
                use("k")

    @pytest.mark.parametrize("endpoint", ["not a url", "ftp://"])
    def test_an_endpoint_that_is_no_url(self, moto_s3: S3Server, endpoint: str) -> None:
        expected = pytest.raises(ConfigError, match="AWS_ENDPOINT_URL")
        with moto_s3.environment(AWS_ENDPOINT_URL=endpoint), expected:
            S3Store(moto_s3.url()).exists("k")

    def test_an_endpoint_without_a_server(self, moto_s3: S3Server) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            endpoint = f"http://user:password@127.0.0.1:{closed.getsockname()[1]}"
            expected = pytest.raises(StorageError, match=r"no answer from the store.*after 5 tries")
            with moto_s3.environment(AWS_ENDPOINT_URL=endpoint), expected as caught:
                S3Store(moto_s3.url()).exists("k")
        assert "password" not in str(caught.value)

    @pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    def test_wrong_keys_are_refused_by_a_real_gateway(self, ceph_s3: S3Server, wrong: str) -> None:
        with ceph_s3.environment(**{wrong: "leaked-if-printed"}):
            store = S3Store(ceph_s3.url())
            for use in (store.exists, store.read, lambda key: store.create(key, b"x")):
                with pytest.raises(
                    StorageError, match=r"\(403 .*AWS_SECRET_ACCESS_KEY|know AWS_ACCESS_KEY_ID"
                ) as caught:
                    use("k")
                assert type(caught.value) is StorageError
                assert "leaked" not in str(caught.value)

    def test_damage_on_the_way_up_is_refused_by_a_real_gateway(
        self, ceph_s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = s3.digests_of

        def another(data: bytes | Path) -> Any:
            return real(b"what was meant to be sent")

        monkeypatch.setattr(s3, "digests_of", another)
        store = S3Store(ceph_s3.url())
        with pytest.raises(StorageError, match="the bytes changed on the way"):
            store.create("k", b"what arrives")
        assert not store.exists("k")

    def test_resume_against_a_real_gateway(
        self, ceph_s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = S3Store(ceph_s3.url())
        store.create("shard.tar", DATA)
        with FaultProxy(ceph_s3.endpoint) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            through = S3Store(store.url)
            proxy.faults = [Fault("reset", at=3 * MIB + 1), Fault("truncate", at=MIB + 1)]
            assert through.read("shard.tar") == DATA
            proxy.faults = [
                Fault("reset", at=3 * MIB, then=lambda: store.replace("shard.tar", DATA[::-1]))
            ]
            with pytest.raises(DataError, match="was replaced while being read"):
                through.read("shard.tar")


def test_custom_stores_are_addressed_by_path(moto_s3: S3Server, proxy: FaultProxy) -> None:
    """Few of them answer to bucket.host, and fewer have a DNS name for it."""
    by_name = proxy.endpoint.replace("127.0.0.1", "localhost")
    with moto_s3.environment(AWS_ENDPOINT_URL=by_name):
        assert S3Store(moto_s3.url("p")).create("k", b"x") is True
    assert proxy.log[0].line == f"PUT /{moto_s3.bucket}/p/k"
