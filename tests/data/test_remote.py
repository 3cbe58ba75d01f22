"""A corpus read from a real HTTP server: the same slices, few requests, and one clear line where something is wrong."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from meddino_data_curation.cli import main

from meddino.core.errors import ConfigError, ShardError
from meddino.data import remote as remote_module
from meddino.data.content import slice_hash
from meddino.data.corpus import Corpus
from meddino.data.remote import corpus_location, is_url
from meddino.data.slice_cache import SliceCache, cache_limit_bytes
from tests.conftest import PROJECT
from tests.data.range_server import serve
from tests.data_curation.conftest import SALT, make_hu, write_volume

pytest.importorskip("aiohttp", reason="needs aiohttp (pip install 'meddino[remote]')")


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    for seed in range(3):
        write_volume(root / "in" / f"{seed}.nii.gz", make_hu(seed))
    (root / "salt").write_text(SALT)
    more = [f"privacy.salt_file={root / 'salt'}", "workers=1", "shards.size_mib=0.05"]
    assert main(["build", str(root / "in"), "--out", str(root / "web" / "corpus"), *more]) == 0
    return root / "web" / "corpus"


@pytest.fixture
def server(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDDINO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE_S", 0.01)
    shutil.copytree(corpus_folder, tmp_path / "web" / "corpus")
    with serve(tmp_path / "web") as running:
        yield running


def kept_slices(folder):
    return [path for path in folder.glob("cache/corpora/*/slices/*/*") if path.is_file()]


def test_corpus__over_http_gives_the_same_slices_by_one_range_request_each(corpus_folder, server, tmp_path):
    local, remote = Corpus(corpus_folder), Corpus(f"{server.url}/corpus")
    assert len(remote) == len(local) == 18
    assert remote.content_hash == local.content_hash
    assert remote.volumes.equals(local.volumes)
    server.requests.clear()
    for index in np.random.default_rng(0).permutation(18).tolist():
        assert np.array_equal(remote.read(index), local.read(index))
    assert len(server.requests) == 18
    sizes = sorted(stop - first for _, first, stop in server.requests)
    assert sizes == sorted(local.slices.column("length").to_pylist())  # not a byte more than the slices
    server.requests.clear()
    assert np.array_equal(remote.read(5), local.read(5))
    again = Corpus(f"{server.url}/corpus/")
    assert np.array_equal(again.read(5), local.read(5))
    # Opened again: corpus.json is looked at, manifests and slices come from the disk.
    assert {path for path, _, _ in server.requests} == {"/corpus/corpus.json"}
    assert len(kept_slices(tmp_path)) == 18


def test_corpus__of_a_url_crosses_processes(corpus_folder, server):
    corpus = Corpus(f"{server.url}/corpus")
    expected = Corpus(corpus_folder).read(3).tobytes()
    assert pickle.loads(pickle.dumps(corpus)).read(3).tobytes() == expected
    corpus.shards.cache = SliceCache(corpus.shards.cache.root, 0)
    assert corpus.read(3).tobytes() == expected  # the connection is open now
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(corpus.read(3).tobytes()))
    child.start()
    assert ours.poll(60)
    assert ours.recv() == expected
    child.join(60)


def test_corpus__cache_stays_below_its_limit_and_zero_keeps_nothing(server, tmp_path, monkeypatch):
    limit = 60_000
    monkeypatch.setenv("MEDDINO_CACHE_GIB", str(limit / 2**30))
    corpus = Corpus(f"{server.url}/corpus")
    for _ in range(2):
        for index in range(18):
            corpus.read(index)
            assert sum(path.stat().st_size for path in kept_slices(tmp_path)) <= limit
    assert len(kept_slices(tmp_path)) > 1
    monkeypatch.setenv("MEDDINO_CACHE_GIB", "0")
    shutil.rmtree(tmp_path / "cache")
    Corpus(f"{server.url}/corpus").read(0)
    assert kept_slices(tmp_path) == []


def test_slice_cache__what_was_used_last_stays(tmp_path):
    cache = SliceCache(tmp_path, 1000)
    for number in range(9):
        cache.put(f"a/{number}", bytes(100))
        os.utime(tmp_path / "a" / str(number), (number, number))
    assert cache.get("a/0") == bytes(100)
    cache.put("a/9", bytes(100))
    assert cache.get("a/0") is not None
    assert cache.get("a/1") is None


def test_corpus__damaged_cache_is_fetched_again_and_damaged_answers_are_refused(corpus_folder, server, tmp_path):
    corpus, expected = Corpus(f"{server.url}/corpus"), Corpus(corpus_folder).read(2)
    corpus.read(2)
    (kept,) = kept_slices(tmp_path)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    assert np.array_equal(corpus.read(2), expected)
    server.damage = 1
    with pytest.raises(ShardError, match="checksum mismatch"):
        corpus.read(4)
    assert np.array_equal(corpus.read(4), Corpus(corpus_folder).read(4))
    assert len(kept_slices(tmp_path)) == 2  # nothing damaged was kept


def test_corpus__a_server_that_stumbles_is_asked_again(corpus_folder, server):
    server.failures = 2
    corpus = Corpus(f"{server.url}/corpus")
    server.failures = 2
    assert np.array_equal(corpus.read(7), Corpus(corpus_folder).read(7))
    server.failures = 99
    with pytest.raises(ShardError, match="503"):
        corpus.read(8)


def test_corpus__no_server_no_corpus_no_ranges_are_one_clear_line(server, capsys, tmp_path):
    with pytest.raises(ShardError, match=r"nothing/corpus.json: no such file on the server \(404\)"):
        Corpus(f"{server.url}/nothing")
    server.ranges = False
    with pytest.raises(ShardError, match="does not answer range requests"):
        Corpus(f"{server.url}/corpus")
    server.ranges = True
    with pytest.raises(ShardError, match="cannot be reached"):
        Corpus("http://127.0.0.1:9/corpus")
    with pytest.raises(ShardError, match="gopher:// is not read"):
        Corpus("gopher://127.0.0.1/corpus")
    (tmp_path / "web" / "corpus" / "slices.parquet").write_bytes(b"changed")
    with pytest.raises(ShardError, match=r"slices.parquet: its checksum is not the one"):
        Corpus(f"{server.url}/corpus")
    (tmp_path / "web" / "corpus" / "corpus.json").write_text("{}" * 20)
    assert main(["show", f"{server.url}/corpus"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "corpus.json is damaged" in line


def test_corpus__half_a_corpus_is_noticed(server, tmp_path):
    corpus = Corpus(f"{server.url}/corpus")
    name = corpus.slices.column("shard")[0].as_py()
    (tmp_path / "web" / "corpus" / "shards" / name).unlink()
    with pytest.raises(ShardError, match="404"):
        corpus.read(0)
    with pytest.raises(ShardError, match=r"Errno|404"):
        Corpus(f"{server.url}/corpus").read(0)


def test_show_verify_sample__take_a_url(server, tmp_path, capsys):
    url = f"{server.url}/corpus"
    assert main(["show", url]) == 0
    shown = capsys.readouterr().out
    assert "18 slices of 3 volumes" in shown
    assert main(["sample", url, "--out", str(tmp_path / "sheet.png"), "--count", "4"]) == 0
    assert main(["verify", url]) == 0
    shard = next((tmp_path / "web" / "corpus" / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", url]) == 2
    assert f"shards/{shard.name}: checksum differs" in capsys.readouterr().out


def test_pretrain__trains_on_a_url(server, tmp_path):
    from meddino_pretrain.cli import main as pretrain

    url = f"{server.url}/corpus"
    short = ["--stage", "stage1_pretrain", "stages.stage1_pretrain.steps=3"]
    assert pretrain([str(PROJECT / "tests/pretrain/tiny.yaml"), "--corpus", url, "--out", str(tmp_path / "run"), *short]) == 0
    assert len(kept_slices(tmp_path)) > 0


def test_evaluation_and_export__look_into_a_corpus_behind_a_url(corpus_folder, server):
    from meddino_evaluation.data.leakage import LeakageCheck

    from meddino.checkpoints.export.comparison import check_slices

    url, local = f"{server.url}/corpus", Corpus(corpus_folder)
    check = LeakageCheck({"corpus_hash": local.content_hash}, url, slices=True)
    assert check.look("its volume", local.volumes.column("content_hash")[0].as_py())
    assert check.look("its slice", slice_hash(local.read(0)))
    assert not check.look("another", "0" * 32)
    assert check.overlap == ["its volume", "its slice"]
    assert all(map(torch.equal, check_slices(16, url), check_slices(16, corpus_folder)))


def test_corpus__over_s3_gives_the_same_slices(corpus_folder, tmp_path, monkeypatch, capsys):
    """Against a server that speaks S3: pip install 'moto[server]' s3fs."""
    pytest.importorskip("s3fs", reason="needs s3fs (pip install 'meddino[remote]')")
    server = pytest.importorskip("moto.server", reason="needs a server of S3 (pip install 'moto[server]')")
    boto3 = pytest.importorskip("boto3")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        given = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}
        for name, value in {**given, "ENDPOINT_URL": f"http://{host}:{port}"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("MEDDINO_CACHE_DIR", str(tmp_path / "cache"))
        client = boto3.client("s3")
        client.create_bucket(Bucket="scans")
        for path in corpus_folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "scans", f"deep/{path.relative_to(corpus_folder).as_posix()}")
        local, remote = Corpus(corpus_folder), Corpus("s3://scans/deep")
        assert all(np.array_equal(remote.read(index), local.read(index)) for index in range(len(local)))
        assert main(["verify", "s3://scans/deep"]) == 0
        assert main(["show", "s3://scans/none"]) == 2
        assert "no such file on the server" in capsys.readouterr().err
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert main(["show", "s3://scans/deep"]) == 2
        assert "no credentials were found" in capsys.readouterr().err
    finally:
        running.stop()


def test_location__urls_and_paths_are_told_apart():
    assert corpus_location("https://host/a//b") == "https://host/a//b"
    assert corpus_location("s3://bucket/corpus") == "s3://bucket/corpus"
    assert is_url("http://host/x")
    for path in ("corpus", "/data/corpus", "C:/corpus", "http:/one-slash"):
        assert not is_url(path)
        assert not isinstance(corpus_location(path), str)


def test_passwords_do_not_reach_messages():
    with pytest.raises(ShardError) as caught:
        Corpus("http://me:secret@127.0.0.1:9/corpus")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_cache_limit__wrong_values_are_refused(monkeypatch, text):
    monkeypatch.setenv("MEDDINO_CACHE_GIB", text)
    with pytest.raises(ConfigError, match="MEDDINO_CACHE_GIB"):
        cache_limit_bytes()


def test_import__network_libraries_only_where_a_url_is_opened():
    code = "import meddino.data.corpus, meddino_pretrain.cli, sys; print('aiohttp' in sys.modules)"
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False", f"after {time.monotonic() - start:.1f} s"
