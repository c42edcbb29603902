import json
import multiprocessing
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
import pytest
import torch
from test_train import equal, weights

from common.errors import UserError
from data import Stream, make_loader, open_cache
from dataset import remote
from dataset.columns import PLACE
from dataset.disk_cache import Cache
from dataset.remote import RemoteFile, scheme_of
from dataset.shards import read_index, to_line
from dataset.sources import open_mixture, open_source, split_weight
from options.training import CaptionConfig, DataConfig

HALF = {"short", "reset", "stall", "closed"}  # faults for which the server sends half of what was requested


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`, with range requests. Each request takes the next of `server.faults`, then `server.always`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers=()) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((path, self.headers))
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        whole, wanted = self.server.files.get(path), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if isinstance(fault, int) or whole is None:
            self.answer(fault or 404, b"no")
        elif fault and ":" in fault:
            self.answer(302, headers={"Location": fault})
        elif wanted and fault != "whole":
            first, last = int(wanted[1]), min(int(wanted[2]), len(whole) - 1)
            part = whole[first : last + 1]
            headers = {"Content-Range": f"bytes {first}-{last}/{len(whole)}"}
            if fault in HALF:
                headers |= {} if fault == "short" else {"Content-Length": len(part)}
                self.answer(206, part[: len(part) // 2], headers)
                self.break_off(fault)
            else:
                self.answer(206, part, headers)
        else:
            self.answer(200, whole)

    def break_off(self, fault: str) -> None:
        if fault == "stall":
            time.sleep(1)
        if fault == "reset":  # a RST instead of a FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault != "short":
            self.close_connection = True


class Server(ThreadingHTTPServer):
    def handle_error(self, *_) -> None:
        """Prints nothing when a client closes its connection early."""


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.faults, server.always, server.requests = {}, [], None, []
        server.daemon_threads = server.block_on_close = True
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Short waits, and a new driver for each test."""
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    remote.connect.cache_clear()


def serve(server, folder, under: str = "/shards/", index: bool = True) -> str:
    """The shards of a folder on the server -> their URL."""
    files = [path for path in folder.iterdir() if index or path.suffix == ".tar"]
    server.files |= {under + path.name: path.read_bytes() for path in files}
    return server.url + under


@pytest.fixture(scope="session")
def moto():
    """The address of an S3 server; started once, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.fixture
def bucket(moto, shards, monkeypatch):
    """s3://bucket with the shards and their index in indexed/ and without it in bare/."""
    for name, value in {"AWS_ENDPOINT_URL": moto, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    if not s3.exists("bucket"):
        s3.mkdir("bucket")
        for path in shards.iterdir():
            s3.pipe_file(f"bucket/indexed/{path.name}", path.read_bytes())
            if path.suffix == ".tar":
                s3.pipe_file(f"bucket/bare/{path.name}", path.read_bytes())
    return "s3://bucket"


def batches(source, count: int = 8, **options) -> list:
    stream = Stream(source, DataConfig(bs=2, **{"workers": 0, "flip": True, **options}), CaptionConfig(), 64, 0)
    return list(islice(make_loader(stream, pin_memory=False), count))


def assert_same(ours, local, **options) -> None:
    assert ours.fingerprint == local.fingerprint
    assert (ours.names, ours.uncaptioned, ours.truncated) == (local.names, local.uncaptioned, local.truncated)
    assert all(np.array_equal(ours.column(field), local.column(field)) for field in PLACE.names[1:])
    for batch, wanted in zip(batches(ours, **options), batches(local), strict=True):
        assert batch.captions == wanted.captions
        assert torch.equal(batch.images, wanted.images)
        assert not batch.skipped


# The same as local shards.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "data", ["/shards/", "/shards", "/shards/photos-{000000..000002}.tar", "/bare/photos-{000000..000002}.tar"]
)
def test_http_gives_what_local_shards_give(server, shards, data, workers):
    serve(server, shards)
    serve(server, shards, "/bare/", index=False)
    assert_same(open_source(server.url + data), open_source(str(shards)), workers=workers)


@pytest.mark.parametrize("data", ["/indexed", "/bare/", "/bare/photos-{000000..000002}.tar"])
def test_s3_gives_what_local_shards_give(bucket, shards, data):
    assert_same(open_source(bucket + data), open_source(str(shards)), workers=2)


def test_names_that_must_be_quoted(server, shards, tmp_path):
    shutil.copy(shards / "photos-000000.tar", tmp_path / "a b%20#é.tar")
    (shard,) = (s for s in read_index(shards).values() if s.name == "photos-000000.tar")
    shard.name = "a b%20#é.tar"
    (tmp_path / "index.jsonl").write_text(to_line(shard))
    source = open_source(serve(server, tmp_path))
    assert_same(source, open_source(str(tmp_path)))
    assert source.names[0] == "a b%20#é.tar:0000000"


def test_a_sample_is_one_request_of_its_own_bytes(server, shards, monkeypatch):
    source = open_source(serve(server, shards))
    server.requests.clear()
    for n in range(source.samples):
        source.read_sample(n)
    assert len(server.requests) == source.samples
    for (_, headers), place in zip(server.requests, source.parts[0].columns.places, strict=True):
        first, last = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        spans = [(place[at], place[at] + place[size]) for at, size in (("at", "size"), ("text_at", "text_size"))]
        assert (first, last + 1) == (min(a for a, _ in spans), max(b for _, b in spans))
    file = source.parts[0].files[0]
    server.requests.clear()
    assert file.read((0, 5), (5, 0)) == [server.files["/shards/photos-000000.tar"][:5], b""]
    monkeypatch.setattr(remote, "MERGE_GAP", 10)
    whole = server.files["/shards/photos-000000.tar"]
    assert file.read((16, 2), (0, 5)) == [whole[16:18], whole[:5]]
    assert len(server.requests) == 3  # too far apart for one


def test_weights_ports_and_mixtures(server, shards, photos):
    url = serve(server, shards)
    assert split_weight("http://host:8000") == ("http://host:8000", None, 1)
    assert split_weight("http://host:8000/shards/") == ("http://host:8000/shards/", None, 1)
    assert split_weight("http://host:8000/shards/:2.5") == ("http://host:8000/shards/", 2.5, 1)
    assert split_weight("s3://b/shards/:3") == ("s3://b/shards/", 3, 1)
    assert split_weight("hf://datasets/o/n/{0..3}.tar:1") == ("hf://datasets/o/n/{0..3}.tar", 1, 1)
    assert split_weight("s3://b/shards/:x3") == ("s3://b/shards/", None, 3)
    mixed, local = (open_mixture((f"{data}:3", f"{photos}:1")) for data in (url, shards))
    assert_same(mixed, local)
    assert mixed.shares == (0.75, 0.25)


def test_an_index_is_used_only_for_a_file_of_its_size(server, shards):
    url = serve(server, shards)
    line = server.files["/shards/index.jsonl"].splitlines()
    entry = json.loads(line[0])
    other = entry | {"bytes": entry["bytes"] + 512, "samples": entry["samples"][:1]}
    server.files["/shards/index.jsonl"] = b"\n".join([json.dumps(other).encode(), *line[1:]])
    assert_same(open_source(url), open_source(str(shards)))
    entry["samples"][0][2] = entry["bytes"]
    server.files["/shards/index.jsonl"] = json.dumps(entry).encode()
    with pytest.raises(UserError, match=r"http://\S+/shards/index\.jsonl line 1 .* with impossible numbers"):
        open_source(url)


# What goes wrong.


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "reset", "closed", "stall", "short"])
def test_temporary_faults_are_tried_again(server, shards, fault):
    url, local = serve(server, shards), open_source(str(shards))
    source = open_source(url)
    server.faults = [fault] * 3
    assert source.read_sample(0) == local.read_sample(0)
    server.faults = [fault if fault in (500, 503, 429, 408) else 500] * 3  # the index and the first byte cannot be sent by half
    assert open_source(url).names == local.names


@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [
        (500, "HTTP status 500, 6 times over", 6),
        (429, "HTTP status 429, 6 times over", 6),
        ("stall", "no answer for 0.3 seconds, 6 times over", 6),
        ("short", "the answer ends too early, 6 times over", 6),
        ("reset", r"the connection failed \(\w+\), 6 times over", 6),
        (400, "HTTP status 400", 1),
        (403, r"no permission \(HTTP status 403\): credentials come from the environment", 1),
        (404, "is not there", 1),
        (416, "HTTP status 416", 1),
        ("file:///etc/passwd", r"the driver cannot ask for it \(\w*Redirect\w*\)", 1),
        ("whole", r"this server sends no parts of a file \(range requests\): use another, or copy the shards here", 1),
    ],
)
def test_lasting_faults_are_one_line_naming_the_url(server, shards, fault, reason, tries):
    source = open_source(serve(server, shards))
    server.requests.clear()
    server.always = fault
    with pytest.raises(UserError, match=rf"^{server.url}/shards/photos-000000\.tar: {reason}$"):
        source.read_sample(0)
    assert len(server.requests) == tries


def test_no_server_and_a_server_without_parts_are_found_at_once(server, shards, tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/a.tar"
        with pytest.raises(UserError, match=r"/index\.jsonl: the connection failed \(ClientConnectorError\), 6 times over$"):
            open_source(url)
    (tmp_path / "big.tar").write_bytes(b"\0" * 2**24)
    process = subprocess.Popen(
        [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        url = re.search(r"http://\S+?/", process.stdout.readline())[0]
        with pytest.raises(UserError, match=r"big\.tar: this server sends no parts of a file"):
            open_source(url + "big.tar")
    finally:
        process.terminate()
        process.wait()


def test_a_redirect_is_followed_without_credentials(server, shards, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password geheim\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    source = open_source(serve(server, shards))
    server.requests.clear()
    server.faults = [f"http://localhost:{server.server_port}/shards/photos-000000.tar"]
    assert source.read_sample(0).image
    assert [bool(headers["Authorization"]) for _, headers in server.requests] == [True, False]
    server.faults = [f"{server.url}/shards/photos-000000.tar?token=geheim", "whole"]  # a signed URL, to which servers redirect
    with pytest.raises(UserError, match="sends no parts of a file") as caught:
        source.read_sample(0)
    assert "geheim" not in str(caught.value)


def test_unusable_urls(server, shards):
    url = serve(server, shards)
    del server.files["/shards/index.jsonl"]
    server.files["/shards/text.tar"] = b"no tar" * 1000
    for data, match in (
        (url, r"no index\.jsonl there, and a web server cannot list a folder: name the \.tar files by a brace pattern"),
        (f"{url}photos-{{000000..000003}}.tar", r"photos-000003\.tar: is not there"),
        (f"{url}photos-{{000000..000003.tar", "a brace is not closed"),
        (f"{url}text.tar", rf"^{url}text\.tar is no tar file"),
    ):
        with pytest.raises(UserError, match=match):
            open_source(data)


def test_unusable_buckets(bucket, monkeypatch):
    for data, match in (
        (f"{bucket}/nowhere/", r"s3://bucket/nowhere/: is not there"),
        (f"{bucket}/bare/x.tar", r"s3://bucket/bare/x\.tar: is not there"),
        ("s3://no-such-bucket/a/", "is not there"),
    ):
        with pytest.raises(UserError, match=match):
            open_source(data)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    remote.connect.cache_clear()
    with pytest.raises(UserError, match="no credentials in the environment"):
        open_source(f"{bucket}/bare/")


def test_a_failing_bucket_is_tried_again(server, monkeypatch):
    """The number of requests shows that s3fs and botocore, which could also repeat them, do not."""
    for name, value in {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    server.files["/b/a.tar"] = bytes(range(100))
    file = RemoteFile("s3://b/a.tar", 100, "", None)
    for fault in (500, 503, "reset", "stall", "short"):
        server.faults = [fault] * 2
        server.requests.clear()
        assert file.read((10, 20)) == [bytes(range(10, 30))]
        assert len(server.requests) == 3, fault
    for server.always, reason in ((500, "HTTP status 500"), ("closed", "the connection failed")):
        server.requests.clear()
        with pytest.raises(UserError, match=rf"^s3://b/a\.tar: {reason}.*, 6 times over$"):
            file.read((10, 20))
        assert len(server.requests) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_user_unchanged(server, shards, workers):
    source = open_source(serve(server, shards))
    server.always = 404
    with pytest.raises(UserError, match=r"^http://\S+\.tar: is not there$"):
        batches(source, workers=workers)
    with pytest.raises(UserError, match="is not there"):
        Stream(source, DataConfig(workers=0), CaptionConfig(), 64, 0).first_decodable(0)


# What is refused.


@pytest.mark.parametrize("data", ["pipe:touch attacked", "file:/etc/x.tar", "file:///x.tar", "ftp://h/x.tar", "S3://b/x.tar",
                                  "memory://x.tar", "simplecache::s3://b/x.tar", "{https://me:geheim@h/x.tar,b}"])  # fmt: skip
def test_other_schemes_are_refused_by_name(data):
    with pytest.raises(UserError, match=rf"^{re.escape(data.partition(':')[0])}: is refused") as caught:
        open_mixture((data,))
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("data", ["https://me:geheim@host/a.tar", "s3://AKIA:geheim@b/", "https://h/a.tar?token=geheim",
                                  "http://h/a.tar#geheim", "https://geheim@h:80/a/:3", "https://h/a.tar?geheim:0"])  # fmt: skip
def test_urls_with_secrets_are_refused_without_repeating_them(data, script, tmp_path):
    with pytest.raises(UserError, match="credentials") as caught:
        open_source(data)
    assert "geheim" not in str(caught.value)
    with pytest.raises(UserError, match="credentials") as caught:
        open_mixture((data, "b:3"))
    assert "geheim" not in str(caught.value)
    _, err = script("scripts/show_data.py", data, "--out", tmp_path / "x.png", status=2)
    assert "geheim" not in err
    assert err.count("\n") == 1


def test_the_text_of_a_drivers_error_is_not_repeated(monkeypatch):
    def connect(*_):
        raise RuntimeError("https://me:geheim@host")

    monkeypatch.setattr(remote, "connect", connect)
    with pytest.raises(UserError, match=r"the connection failed \(RuntimeError\)") as caught:
        open_source("https://host/a.tar")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "s3", "gs"])
def test_a_missing_driver_is_one_line(scheme, monkeypatch):
    monkeypatch.setitem(sys.modules, {"http": "fsspec.implementations.http", "s3": "s3fs", "gs": "gcsfs"}[scheme], None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(UserError, match=rf"^{scheme}:// needs a driver: pip install -r requirements-cloud\.txt$"):
        open_source(f"{scheme}://b/a.tar")


def test_local_paths_have_no_scheme():
    assert [scheme_of(data) for data in ("demo", "shards/", "/a/{0..3}.tar", "a:3", "c:/x", "pipe.tar")] == [None] * 6


# Other stores: the test server answers as their drivers expect.


TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"  # of HF_ENDPOINT


def test_hugging_face(server, shards, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.url + TEMPLATE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    serve(server, shards, "/datasets/o/n/resolve/main/some/")
    tree = [{"type": "file", "path": f"some/{p.name}", "size": p.stat().st_size, "oid": p.name} for p in shards.iterdir()]
    server.files["/api/datasets/o/n"] = server.files["/api/datasets/o/n/revision/main"] = json.dumps({"id": "o/n"}).encode()
    server.files["/api/datasets/o/n/tree/main/some"] = json.dumps(tree).encode()
    local = open_source(str(shards))
    assert_same(open_source("hf://datasets/o/n/some/"), local, workers=2)
    assert_same(open_source("hf://datasets/o/n/some/photos-{000000..000002}.tar"), local)
    server.requests.clear()
    source = open_source("hf://datasets/o/n/some")
    server.requests.clear()
    source.parts[0].files[0].read((3, 10))
    assert [headers["Range"] for _, headers in server.requests] == ["bytes=3-12"]
    with pytest.raises(UserError, match=r"hf://datasets/o/n/some/none\.tar: is not there"):
        open_source("hf://datasets/o/n/some/none.tar")


def test_google(server, shards, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    items = []
    for path in shards.iterdir():
        item = {"name": f"some/{path.name}", "bucket": "b", "size": str(path.stat().st_size), "etag": path.name}
        server.files[f"/storage/v1/b/b/o/some/{path.name}"] = json.dumps(item).encode()
        server.files[f"/download/storage/v1/b/b/o/some/{path.name}"] = path.read_bytes()
        items.append(item)
    server.files["/storage/v1/b/b/o"] = json.dumps({"items": items}).encode()
    assert_same(open_source("gs://b/some/"), open_source(str(shards)), workers=2)


# The cache.


def test_parts_are_loaded_once_and_then_come_from_the_cache(server, shards, tmp_path):
    cache = Cache(tmp_path / "cache", 10**8)
    source, local = open_source(serve(server, shards), cache), open_source(str(shards))
    assert_same(source, local, workers=2)
    server.requests.clear()
    assert_same(source, local)
    assert not server.requests
    paths = [p for p in cache.folder.iterdir() if len(p.name) == 64]
    assert len(paths) == source.samples
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    paths[1].write_bytes(b"")
    assert_same(source, local)
    assert len(server.requests) == 2
    other = open_source(server.url + "/shards/photos-000000.tar", cache)
    server.files["/shards/photos-000000.tar"] = b"\0" * len(server.files["/shards/photos-000000.tar"])
    assert other.read_sample(0) == local.read_sample(0)  # this server sends no version, so the cache cannot notice the change


def test_a_shard_is_surveyed_once(server, shards, tmp_path, monkeypatch):
    serve(server, shards, index=False)
    cache = Cache(tmp_path / "cache", 10**8)
    url = server.url + "/shards/photos-{000000..000002}.tar"
    monkeypatch.setattr(remote, "CHUNK", 5000)
    first = open_source(url, cache)
    server.requests.clear()
    assert_same(open_source(url, cache), first)
    ranges = [headers["Range"] for path, headers in server.requests if path.endswith(".tar")]
    assert ranges[:3] == ["bytes=0-0"] * 3
    assert len(ranges) == 3 + first.samples
    for path in cache.folder.glob("*.json"):
        path.write_text("{}")
    server.requests.clear()
    ranks = [multiprocessing.get_context("fork").Process(target=open_source, args=(url, cache)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    chunks = sum(-(-len(tar) // remote.CHUNK) for path, tar in server.files.items() if path.endswith(".tar"))
    assert sum(headers["Range"] not in (None, "bytes=0-0") for _, headers in server.requests) == chunks  # the first rank's
    assert open_source(url, cache).names == first.names


def test_eight_ranks_load_every_sample_once(server, shards, tmp_path):
    """But for those that two of them want at the same moment."""
    url, cache, context = serve(server, shards), Cache(tmp_path / "cache", 10**8), multiprocessing.get_context("fork")
    samples, together = open_source(url, cache).samples, context.Barrier(9)

    def draw(rank: int) -> None:
        batches = iter(Stream(open_source(url, cache), DataConfig(bs=1), CaptionConfig(), 64, seed=0, rank=rank, world=8))
        for _ in range(3):
            together.wait(60)  # until all are ready
            together.wait(60)  # until the requests so far are counted
            next(batches)
        together.wait(60)

    ranks = [context.Process(target=draw, args=(rank,)) for rank in range(8)]
    for rank in ranks:
        rank.start()
    requests = []
    for _ in range(3):
        together.wait(60)
        requests.append(len(server.requests))
        together.wait(60)
    together.wait(60)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 8
    first, second, third = (after - before for before, after in pairwise([*requests, len(server.requests)]))
    assert samples == 7
    assert first in (7, 8)  # the first eight draws are of all seven
    assert (second, third) == (0, 0)


def fill(folder, limit: int, which: int) -> None:
    cache, rng = Cache(folder, limit), np.random.default_rng(which)
    for _ in range(150):
        n = int(rng.integers(0, 60))
        size = 100 + 17 * n
        assert cache.part(f"{n:064x}", size, lambda n=n, size=size: bytes([n]) * size) == bytes([n]) * size


def test_several_processes_keep_the_limit(tmp_path):
    limit, most = 10_000, 0
    (tmp_path / "foreign.txt").write_text("x" * 20_000)
    jobs = [multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path, limit, n)) for n in range(4)]
    for job in jobs:
        job.start()
    while any(job.is_alive() for job in jobs):
        sizes = []
        for path in tmp_path.iterdir():
            try:
                sizes.append(path.stat().st_size if path.name not in ("foreign.txt", ".bytes") else 0)
            except FileNotFoundError:  # removed since
                continue
        most = max(most, sum(sizes))
    assert [job.exitcode for job in jobs] == [0] * 4
    assert 0.7 * limit < most <= limit
    assert (tmp_path / "foreign.txt").exists()
    assert int((tmp_path / ".bytes").read_text()) >= sum(p.stat().st_size for p in tmp_path.glob("0*"))


def test_the_least_recently_used_file_goes_first(tmp_path):
    cache = Cache(tmp_path, 1000)
    names = [f"{n:064x}" for n in range(6)]
    for name in names[:5]:
        cache.part(name, 180, lambda: b"x" * 180)
    cache.part(names[0], 180, None)  # in the cache: not loaded
    cache.survey(names[5], lambda: remote.Shard("a.tar", 0))
    for n in range(6, 20):
        cache.part(f"{n:064x}", 180, lambda: b"x" * 180)
        cache.part(names[0], 180, None)
    left = {path.name for path in tmp_path.iterdir()}
    assert names[0] in left
    assert f"{names[5]}.json" in left
    assert not left & set(names[1:5])
    cache.part(names[1], 2000, lambda: b"x" * 2000)  # more than the whole cache may hold
    assert not (tmp_path / names[1]).exists()
    (tmp_path / ".bytes").write_text("")  # the total is lost: files are counted anew
    cache.part(names[2], 180, lambda: b"x" * 180)
    assert int((tmp_path / ".bytes").read_text()) == sum(p.stat().st_size for p in tmp_path.iterdir() if p.name[0] != ".")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--data-cache .*file cannot be written: "):
        open_cache(DataConfig(data_cache=str(tmp_path / "file")))
    with pytest.raises(UserError, match="--data-cache-gb must be above 0"):
        DataConfig(data_cache_gb=0)


# The scripts.


def test_training_from_a_server_equals_training_from_the_disk(train, server, bucket, shards, tmp_path):
    options = ["--steps", 2, "--workers", 2, "--flip", "--caption-dropout", 0.3]
    train(*options)
    wanted = weights(tmp_path / "out", 2)
    for name, url in (("http", serve(server, shards)), ("s3", f"{bucket}/indexed/")):
        out, _ = train(*options, "--data", url, "--data-cache", tmp_path / "cache", "--out", tmp_path / name)
        assert equal(weights(tmp_path / name, 2), wanted)
        assert "skipped" not in out


def test_the_data_sheet_from_a_server(server, shards, script, tmp_path):
    sheets = []
    for name, data in (("remote", serve(server, shards)), ("local", shards)):
        options = [data, "--resolution", 64, "--out", tmp_path / f"{name}.png"]
        out, _ = script("scripts/show_data.py", *options, "--data-cache", tmp_path / "cache", "--data-cache-gb", 0.1)
        sheets.append((out.replace(name, ""), (tmp_path / f"{name}.png").read_bytes()))
    assert sheets[0] == sheets[1]
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_a_server_that_goes_away_ends_training_with_one_line(train, server, shards, tmp_path):
    url = serve(server, shards)
    server.faults = [None] * 5  # the index, three sizes, the first image
    server.always = 500
    _, err = train("--steps", 4, "--workers", 2, "--data", url, status=2)
    assert re.search(rf"train_lora\.py: {url}photos-00000\d\.tar: HTTP status 500, 6 times over$", err, re.M)
    assert "Traceback" not in err
