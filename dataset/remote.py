"""Shards on a server or in a bucket, http(s)://, s3://, gs://, hf://: looked up once, then each sample is a request of its own.

fsspec's drivers do the transport. Credentials come from where each of them looks, the environment above all: a URL that could
hold some is refused, and of a driver's error only the kind is told, since its text could hold them too.
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
from tqdm import tqdm

from common.errors import UserError
from dataset.disk_cache import Cache, NoCache
from dataset.shards import INDEX, Shard, read_lines, survey

HTTP = ("http", "https")  # they cannot list a folder
SCHEMES = (*HTTP, "s3", "gs", "hf")

TIMEOUT = 20.0  # seconds without a byte
TRIES, PAUSE = 6, 1.0  # seconds of the first pause; each is twice the one before, half a minute in all
RETRYING_DRIVERS = ("gs", "hf")  # their drivers try for half a minute by themselves
MERGE_GAP = 2**16  # bytes between two parts that are loaded together: less than what a second request costs
CHUNK = 2**23  # bytes of a request for a whole shard
AT_ONCE = 16  # requests for sizes

Span = tuple[int, int]  # where it begins, how many bytes
T = TypeVar("T")


def scheme_of(data: str) -> str | None:
    """'s3' of s3://bucket/shards/; None for what is on disk.

    Raises UserError for other schemes, and without repeating it for a URL that could hold a password.
    """
    scheme, found, rest = data.partition("://")
    if not found and not data.startswith(("pipe:", "file:")):
        return None
    if scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"--data: {scheme.partition(':')[0]}: is refused: give a path, or a URL of {known}")
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise UserError(f"--data {scheme}://…: credentials and queries belong in no URL: give them in the environment")
    return scheme


# Asking a server.


@lru_cache
def connect(scheme: str, process: int) -> fsspec.AbstractFileSystem:
    """The driver for a scheme; its connections and its thread do not survive a fork, so each process (id) has its own."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the texts of errors
    try:
        driver = fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise UserError(f"--data: {scheme}:// needs a driver: pip install -r requirements-cloud.txt") from None
    if scheme == "hf":
        return driver(skip_instance_cache=True)
    if scheme == "s3":
        once = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"total_max_attempts": 1}}
        bucket = driver(config_kwargs=once, skip_instance_cache=True)
        bucket.retries = 1
        return bucket
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    if scheme == "gs":
        return driver(requests_timeout=timeout, skip_instance_cache=True)
    session = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
    return driver(client_kwargs=session, skip_instance_cache=True)


class WholeFile(Exception):
    """All of a file is sent where a part of it was asked for."""


def request_with_retries(url: str, request: Callable[[fsspec.AbstractFileSystem], T]) -> T:
    """`request` of the driver, again after a pause while it fails for reasons that pass. Raises UserError naming the URL."""
    scheme = scheme_of(url)
    most = 2 if scheme in RETRYING_DRIVERS else TRIES
    tries = 0
    while True:
        tries += 1
        try:
            return request(connect(scheme, os.getpid()))
        except UserError:
            raise
        except Exception as error:  # drivers let through whatever theirs below them raise
            told, passes = what_failed(error)
            if not passes:
                raise UserError(f"--data {url}: {told}") from None
            if tries == most:
                raise UserError(f"--data {url}: {told}, {most} times over") from None
        time.sleep(PAUSE * 2 ** (tries - 1) * random.uniform(0.75, 1.25))  # the workers that failed together come back apart


def what_failed(error: Exception) -> tuple[str, bool]:
    """(what to tell of it, whether it is worth another try)."""
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
    """The HTTP status behind a driver's error; 0 if there is none. Each tells it in its own way."""
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # gcsfs' OSError
        return 403
    response = getattr(error.__cause__ or error, "response", None)  # of botocore a dict, of huggingface_hub an object
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    told = [getattr(error, "status", 0), getattr(error, "code", 0), getattr(response, "status_code", 0)]
    return next((int(status) for status in told if str(status).isdigit() and int(status)), 0)


def size_and_version(driver: fsspec.AbstractFileSystem, url: str) -> tuple[int, str]:
    """Bytes of a file, and what changes when it does, as far as it is told.

    Of a web server by asking for the first byte: not all tell the size otherwise, and who sends all of it is found at once.
    """
    if not url.startswith(HTTP):
        told = driver.info(url)
        if told["type"] != "file":
            raise FileNotFoundError
        return told["size"], str(told.get("ETag") or told.get("etag") or told.get("blob_id"))

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
    """As sources.File, in the place of a local one."""

    url: str
    size: int
    version: str
    cache: Cache | NoCache

    def key(self, *span: int) -> str:
        """SHA-256 of which bytes of which file."""
        return hashlib.sha256(" ".join(map(str, (self.url, self.size, self.version, *span))).encode()).hexdigest()

    def read(self, *spans: Span) -> list[bytes]:
        """These parts of it; neighbours, as an image and its caption are, with one request. Raises UserError."""
        together: list[list[int]] = []
        for at, size in sorted(spans):
            if not together or at - together[-1][1] > MERGE_GAP:
                together.append([at, at])
            together[-1][1] = max(together[-1][1], at + size)
        loaded = {begin: self.part(begin, end - begin) for begin, end in together}
        origin = [max(begin for begin in loaded if begin <= at) for at, _ in spans]
        return [loaded[begin][at - begin : at - begin + size] for begin, (at, size) in zip(origin, spans, strict=True)]

    def part(self, at: int, size: int) -> bytes:
        return self.cache.part(self.key(at, size), size, lambda: self.load(at, size))

    def load(self, at: int, size: int) -> bytes:
        how = {"cache_type": "none"} if self.url.startswith("hf:") else {}  # which would read ahead

        def request(driver: fsspec.AbstractFileSystem) -> bytes:
            data = driver.cat_file(self.url, start=at, end=at + size, **how)
            if len(data) > size:
                raise WholeFile
            if len(data) < size:
                raise EOFError
            return data

        return request_with_retries(self.url, request) if size else b""

    def survey(self) -> Shard:
        """Loads all of it once, to see what lies where."""
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


def remote_shards(urls: list[str], cache: Cache | NoCache) -> list[tuple[RemoteFile, Shard]]:
    """Tar files and folders of them -> what is in each: what an index beside them tells, where the size agrees; others are
    loaded once.

    Raises UserError if one is not there, cannot be read or trusted, or a folder can neither be listed nor has an index.
    """
    index, tars = {}, []
    for url in urls:
        folder = url.rpartition("/")[0] + "/" if url.endswith(".tar") else url.rstrip("/") + "/"
        if folder not in index:
            index[folder] = remote_index(folder)
        tars += [url] if url.endswith(".tar") else in_folder(folder, index[folder])

    def look(url: str) -> RemoteFile:
        return RemoteFile(url, *request_with_retries(url, lambda driver: size_and_version(driver, url)), cache)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        looked = tqdm(pool.map(look, tars), desc="looking for the shards", total=len(tars), unit="shard", delay=2, leave=False)
        files = list(looked)
    shards = []
    for file in files:
        known = index[file.url.rpartition("/")[0] + "/"].get(name_of(file.url))
        shards.append((file, known if known and known.bytes == file.size else cache.survey(file.key(), file.survey)))
    return shards


def remote_index(folder: str) -> dict[str, Shard]:
    """{name: shard}; empty without one. A bucket that may not be listed calls forbidden what is not there."""
    url = folder + INDEX

    def request(driver: fsspec.AbstractFileSystem) -> bytes:
        try:
            return driver.cat_file(url)
        except Exception as error:
            if status_of(error) in (403, 404):
                return b""
            raise

    return read_lines(request_with_retries(url, request), f"--data {url}")


def in_folder(folder: str, index: dict[str, Shard]) -> list[str]:
    """URLs of its shards, by its index and, where the server can, by what lies there."""
    names = {name for name, shard in index.items() if shard.bytes}
    if not folder.startswith(HTTP):
        paths = request_with_retries(folder, lambda driver: driver.ls(folder, detail=False))
        names |= {path.rpartition("/")[2] for path in paths if path.endswith(".tar")}
    elif not index:
        how = "name the .tar files by a brace pattern, or write the index with scripts/make_shards.py"
        raise UserError(f"--data {folder}: no {INDEX} there, and a web server cannot list a folder: {how}")
    if not names:
        raise UserError(f"--data {folder}: no .tar files there")
    return [folder + (quote(name) if folder.startswith(HTTP) else name) for name in sorted(names)]
