"""Shards on a server or in a bucket, http(s)://, s3://, gs://, hf://: located once, then read with one request per sample.

fsspec's drivers do the transport. Credentials come from where each driver looks, above all the environment. A URL that could
hold credentials is refused, and error messages name only the kind of a driver's error, since its text could hold them too.
"""

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from urllib.parse import quote, unquote

import fsspec

from common.errors import UserError
from common.progress import tqdm
from dataset.disk_cache import Cache
from dataset.folder import UNREAD, suffix_of
from dataset.index import Index, index_from, index_of
from dataset.shards import INDEX, Shard, survey

HTTP = ("http", "https")  # they cannot list a folder
SCHEMES = (*HTTP, "s3", "gs", "hf")

TIMEOUT = 20.0  # seconds without a byte
TRIES, PAUSE = 6, 1.0  # PAUSE: seconds before the second try; then twice the last pause each time, half a minute in all
RETRYING_DRIVERS = ("gs", "hf")  # these drivers repeat a request themselves for half a minute
MERGE_GAP = 2**16  # parts up to so many bytes apart are loaded together: that is faster than a second request
CHUNK = 2**23  # bytes of a request for a whole shard
AT_ONCE = 16  # concurrent requests for sizes

Span = tuple[int, int]  # (offset, number) of bytes in a file
T = TypeVar("T")


def scheme_of(data: str) -> str | None:
    """'s3' for s3://bucket/shards/; None for a local path.

    Raises UserError for other schemes, and for a URL that could hold a password, which the message does not repeat.
    """
    scheme, found, rest = data.partition("://")
    if not found and not data.startswith(("pipe:", "file:")):
        return None
    if scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"{scheme.partition(':')[0]}: is refused: give a path, or a URL of {known}")
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise UserError(f"{scheme}://…: credentials and queries belong in no URL: give them in the environment")
    return scheme


# Requests.


@lru_cache
def connect(scheme: str, process: int) -> fsspec.AbstractFileSystem:
    """The driver for a scheme; its connections and its thread do not survive a fork, so each process (id) has its own."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the texts of errors
    try:
        driver = fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise UserError(f"{scheme}:// needs a driver: pip install -r requirements-cloud.txt") from None
    if scheme == "hf":
        return driver(skip_instance_cache=True)
    if scheme == "s3":
        options = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"total_max_attempts": 1}}
        bucket = driver(config_kwargs=options, skip_instance_cache=True)
        bucket.retries = 1  # request_with_retries repeats requests, not the driver
        return bucket
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    if scheme == "gs":
        return driver(requests_timeout=timeout, skip_instance_cache=True)
    session = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
    return driver(client_kwargs=session, skip_instance_cache=True)


class WholeFile(Exception):
    """A server sent a whole file where a part of it was requested."""


def request_with_retries(url: str, request: Callable[[fsspec.AbstractFileSystem], T]) -> T:
    """Calls `request` with the driver, again after a pause if the error may be temporary. Raises UserError naming the URL."""
    scheme = scheme_of(url)
    most_tries = 2 if scheme in RETRYING_DRIVERS else TRIES
    tries = 0
    while True:
        tries += 1
        try:
            return request(connect(scheme, os.getpid()))
        except UserError:
            raise
        except Exception as error:  # the drivers let through errors of many libraries
            reason, temporary = describe_failure(error)
            if not temporary:
                raise UserError(f"{url}: {reason}") from None
            if tries == most_tries:
                raise UserError(f"{url}: {reason}, {tries} times over") from None
        time.sleep(PAUSE * 2 ** (tries - 1) * random.uniform(0.75, 1.25))  # random, so that workers do not all return at once


def describe_failure(error: Exception) -> tuple[str, bool]:
    """(the reason in words, whether the request is worth another try)."""
    status, kind = status_of(error), type(error).__name__
    if status == 404:
        return "is not there", False
    if status in (401, 403):
        return f"no permission (HTTP status {status}): credentials come from the environment", False
    if "Credential" in kind:
        return "no credentials in the environment (for a public bucket of S3: FSSPEC_S3_ANON=true)", False
    if status:
        return f"HTTP status {status}", status >= 500 or status in (408, 429)
    if isinstance(error, WholeFile):
        return "this server sends no parts of a file (range requests): use another, or copy the shards here", False
    if isinstance(error, TimeoutError) or "Timeout" in kind:
        return f"no answer for {TIMEOUT:g} seconds", True
    if isinstance(error, EOFError):
        return "the answer ends too early", True
    if isinstance(error, (ValueError, TypeError)) or "Redirect" in kind:
        return f"the driver cannot ask for it ({kind})", False
    return f"the connection failed ({kind})", True


def status_of(error: Exception) -> int:
    """The HTTP status behind a driver's error, 0 if there is none. Each driver reports it in another attribute."""
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # gcsfs' OSError
        return 403
    response = getattr(error.__cause__ or error, "response", None)  # a dict in botocore, an object in huggingface_hub
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    candidates = [getattr(error, "status", 0), getattr(error, "code", 0), getattr(response, "status_code", 0)]
    return next((int(status) for status in candidates if str(status).isdigit() and int(status)), 0)


def size_and_version(driver: fsspec.AbstractFileSystem, url: str) -> tuple[int, str]:
    """(bytes of a file, a text that changes with its contents if the server sends one).

    A web server is asked for the first byte: some send the size only then, and a server that ignores ranges is noticed at once.
    """
    if not url.startswith(HTTP):
        info = driver.info(url)
        if info["type"] != "file":
            raise FileNotFoundError
        return info["size"], str(info.get("ETag") or info.get("etag") or info.get("blob_id"))

    async def first_byte() -> tuple[int, str]:
        session = await driver.set_session()
        async with session.get(driver.encode_url(url), headers={"Range": "bytes=0-0"}) as response:
            response.raise_for_status()
            size = response.headers.get("Content-Range", "").rpartition("/")[2]
            if not size.isdigit():
                raise WholeFile
            return int(size), response.headers.get("ETag") or response.headers.get("Last-Modified", "")

    return fsspec.asyn.sync(driver.loop, first_byte)


# Shards.


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, with the same `read` as `sources.File`."""

    url: str
    size: int
    version: str
    cache: Cache | None

    def key(self, *span: int) -> str:
        """Key in the cache: SHA-256 of URL, size, version and span (offset, bytes), if any."""
        return hashlib.sha256(" ".join(map(str, (self.url, self.size, self.version, *span))).encode()).hexdigest()

    def read(self, *spans: Span) -> list[bytes]:
        """The bytes of each span. Spans close together, as of an image and its caption, take one request. Raises UserError."""
        merged: list[list[int]] = []  # [begin, end]
        for at, size in sorted(spans):
            if not merged or at - merged[-1][1] > MERGE_GAP:
                merged.append([at, at])
            merged[-1][1] = max(merged[-1][1], at + size)
        loaded = {begin: self.part(begin, end - begin) for begin, end in merged}
        origin = [max(begin for begin in loaded if begin <= at) for at, _ in spans]
        return [loaded[begin][at - begin : at - begin + size] for begin, (at, size) in zip(origin, spans, strict=True)]

    def part(self, at: int, size: int) -> bytes:
        if self.cache is None:
            return self.load(at, size)
        return self.cache.part(self.key(at, size), size, lambda: self.load(at, size))

    def load(self, at: int, size: int) -> bytes:
        options = {"cache_type": "none"} if self.url.startswith("hf:") else {}  # else this driver reads ahead

        def request(driver: fsspec.AbstractFileSystem) -> bytes:
            data = driver.cat_file(self.url, start=at, end=at + size, **options)
            if len(data) > size:
                raise WholeFile
            if len(data) < size:
                raise EOFError
            return data

        return request_with_retries(self.url, request) if size else b""

    def survey(self) -> Shard:
        """Loads the whole shard once, to list its samples."""
        with TemporaryDirectory() as folder:
            path, starts = Path(folder) / name_of(self.url), range(0, self.size, CHUNK)
            with path.open("wb") as file, tqdm(desc=path.name, total=self.size, unit="B", unit_scale=True, leave=False) as bar:
                for part in (self.load(at, min(CHUNK, self.size - at)) for at in starts):
                    bar.update(file.write(part))
            try:
                return survey(path)
            except UserError as error:
                raise UserError(str(error).replace(str(path), self.url)) from None


def name_of(url: str) -> str:
    return (unquote(url) if url.startswith(HTTP) else url).rpartition("/")[2]


def remote_shards(urls: list[str], cache: Cache | None) -> list[tuple[RemoteFile, Index, str]]:
    """URLs of tar files and of folders of them -> the contents of each shard: from the index next to it if the size agrees,
    otherwise by loading it once.

    Raises UserError if one does not exist, cannot be read or trusted, or a folder can neither be listed nor has an index.
    """
    indexes: dict[str, Index] = {}
    tars: list[str] = []
    for url in urls:
        if suffix_of(url) in UNREAD:
            raise UserError(f"{url}: {UNREAD[suffix_of(url)]}")
        folder = url.rpartition("/")[0] + "/" if url.endswith(".tar") else url.rstrip("/") + "/"
        if folder not in indexes:
            indexes[folder] = remote_index(folder)
        tars += [url] if url.endswith(".tar") else shard_urls(folder, indexes[folder])

    def locate(url: str) -> RemoteFile:
        return RemoteFile(url, *request_with_retries(url, lambda driver: size_and_version(driver, url)), cache)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        bar = tqdm(pool.map(locate, tars), desc="looking for the shards", total=len(tars), unit="shard", delay=2, leave=False)
        files = list(bar)
    shards = []
    for file in files:
        index, name = indexes[file.url.rpartition("/")[0] + "/"], name_of(file.url)
        if name not in index.shards or index.shards[name][1].bytes != file.size:
            index = index_of(cache.survey(file.key(), file.survey) if cache else file.survey())
        shards.append((file, index, name))
    return shards


def remote_index(folder: str) -> Index:
    """The index of a folder, empty without one. Buckets that may not be listed answer 403 for a missing file."""
    url = folder + INDEX

    def request(driver: fsspec.AbstractFileSystem) -> bytes:
        try:
            return driver.cat_file(url)
        except Exception as error:
            if status_of(error) in (403, 404):
                return b""
            raise

    return index_from(request_with_retries(url, request), url)


def shard_urls(folder: str, index: Index) -> list[str]:
    """URLs of the shards in a folder: those in its index and, unless it is on a web server, those that a listing shows."""
    names = {name for name, (_, shard) in index.shards.items() if shard.bytes}
    if not folder.startswith(HTTP):
        paths = request_with_retries(folder, lambda driver: driver.ls(folder, detail=False))
        names |= {path.rpartition("/")[2] for path in paths if path.endswith(".tar")}
    elif not index.shards:
        advice = "name the .tar files by a brace pattern, or write the index with scripts/make_shards.py"
        raise UserError(f"{folder}: no {INDEX} there, and a web server cannot list a folder: {advice}")
    if not names:
        raise UserError(f"{folder}: no .tar files there")
    return [folder + (quote(name) if folder.startswith(HTTP) else name) for name in sorted(names)]
