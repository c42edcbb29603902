"""The columns of an index: the same samples as its lines, whatever is wrong with the file that holds them."""

import hashlib
import json
import os
import pickle
import signal
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import UserError, printable
from common.progress import SHOW_PROGRESS, tqdm
from data import Stream
from dataset import columns as columns_module
from dataset import index as index_module
from dataset import shards as shards_module
from dataset.buckets import bucket_sizes, choose_bucket, choose_buckets
from dataset.columns import PLACE
from dataset.images import MOST_BYTES
from dataset.shards import MOST_TEXT, Shard, lines_of, read_lines, split_line, to_line
from dataset.sources import Source, open_mixture, open_source
from evaluation.validation import quiet_stream
from options.training import CaptionConfig, DataConfig

SIZE = 2000  # bytes of a shard


@contextmanager
def folders():
    """(a folder for shards, a folder for the cache, in which columns of indexes of any size are kept)."""
    with TemporaryDirectory() as name:
        data, cache = Path(name) / "data", Path(name) / "cache"
        data.mkdir()
        with patch.dict(os.environ, XDG_CACHE_HOME=str(cache)), patch.object(index_module, "WORTH", 0):
            yield data, cache


def put_index(folder: Path, entries: list[dict]) -> None:
    """The index of these shards; their files have the right size, and bytes that are all different for 256 bytes."""
    (folder / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for entry in entries:
        if entry["bytes"]:
            (folder / entry["name"]).write_bytes((bytes(range(256)) * 8)[: entry["bytes"]])


def by_lines(entries: list[dict]) -> dict:
    """What a source has of these shards, read sample by sample."""
    full = sorted((entry for entry in entries if entry["bytes"]), key=lambda entry: entry["name"])
    digest = hashlib.sha256()
    for entry in full:
        if entry["samples"]:
            digest.update(json.dumps([(sample[0], sample[2], sample[4]) for sample in entry["samples"]]).encode())
    repeats = [n for entry in full for n in entry.get("repeats") or [1] * len(entry["samples"])]
    return {
        "names": [printable(f"{entry['name']}:{key}") for entry in full for key, *_ in entry["samples"]],
        "places": [tuple(numbers) for entry in full for _, *numbers in entry["samples"]],
        "files": [entry["name"] for entry in full for _ in entry["samples"]],
        "uncaptioned": [printable(f"{entry['name']}:{key}") for entry in full for key in entry.get("uncaptioned", [])],
        "fingerprint": digest.hexdigest(),
        "repeats": repeats,
        "has_latents": any(entry.get("latents") for entry in full if entry["samples"]),
    }


def by_columns(source: Source) -> dict:
    found = [source.find(n) for n in range(source.samples)]
    places = [part.columns.places[row].item() for part, row in found]
    return {
        "names": source.names,
        "places": [tuple(numbers) for _, *numbers in places],
        "files": [part.files[number].path.name for (part, _), (number, *_) in zip(found, places, strict=True)],
        "uncaptioned": source.uncaptioned,
        "fingerprint": source.fingerprint,
        "repeats": [1] * source.samples if source.repeats is None else source.repeats.tolist(),
        "has_latents": source.has_latents,
    }


KEYS = st.text(st.characters(exclude_categories=[]), max_size=6)  # also control characters and halves of surrogate pairs
PIXELS = st.one_of(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), st.just((0, 0)))
SAMPLES = st.tuples(KEYS, st.integers(0, 900), st.integers(0, 900), st.integers(0, 900), st.integers(0, 900), PIXELS)


@st.composite
def indexes(draw):
    """Lines in any order; at least one has a sample."""
    entries, latents = [], draw(st.booleans())
    for name in draw(st.permutations(["a.tar", "b 1.tar", "é-000000.tar", "z.tar"]))[: draw(st.integers(1, 4))]:
        samples = [[*sample[:-1], *sample[-1]] for sample in draw(st.lists(SAMPLES, max_size=4))]
        entry = {"name": name, "bytes": SIZE if samples else draw(st.sampled_from([0, SIZE])), "samples": samples}
        entry |= {"uncaptioned": draw(st.lists(KEYS, max_size=2)), "latents": latents, "hashes": ["f" * 64] * len(samples)}
        if draw(st.booleans()):
            entry["repeats"] = draw(st.lists(st.integers(1, 3), min_size=len(samples), max_size=len(samples)))
        entries.append(entry)
    assume(any(entry["samples"] for entry in entries))
    return entries


@settings(deadline=None)
@given(indexes())
def test_columns_hold_what_the_lines_say(entries):
    with folders() as (data, cache):
        put_index(data, entries)
        made, mapped = open_source(str(data)), open_source(str(data))
        assert by_columns(made) == by_columns(mapped) == by_lines(entries)
        assert {part.columns.path.parent for part in mapped.parts} == {cache / "sdxl_lora/columns"}
        again = pickle.loads(pickle.dumps(mapped))
        assert by_columns(again) == by_lines(entries)
        with patch.object(index_module, "WORTH", 2**20):
            in_memory = open_source(str(data))
        assert in_memory.parts[0].columns.path is None
        assert by_columns(in_memory) == by_columns(pickle.loads(pickle.dumps(in_memory))) == by_lines(entries)


@settings(deadline=None)
@given(indexes(), st.data())
def test_a_part_of_the_shards_a_changed_shard_and_a_mixture(entries, data_of_test):
    with folders() as (data, _):
        put_index(data, entries)
        full = [entry["name"] for entry in entries if entry["samples"]]
        chosen = data_of_test.draw(st.lists(st.sampled_from(full), min_size=1, unique=True).map(sorted))
        pattern = f"{data}/{{{','.join(chosen)}}}" if len(chosen) > 1 else f"{data}/{chosen[0]}"
        of_chosen = open_source(pattern)
        assert by_columns(of_chosen) == by_lines([entry for entry in entries if entry["name"] in chosen])
        whole, mixture = open_source(str(data)), open_mixture((pattern, str(data)))
        assert mixture.names == of_chosen.names + whole.names
        removed = data_of_test.draw(st.sets(st.integers(0, mixture.samples - 1)))
        left = mixture.without(removed)
        expected = [n for n in range(mixture.samples) if n not in removed]
        assert left.names == [mixture.name(n) for n in expected] == [left.name(n) for n in range(left.samples)]
        assert [left.read_sample(n) for n in range(left.samples)] == [mixture.read_sample(n) for n in expected]
        for field in PLACE.names:
            assert left.column(field).tolist() == mixture.column(field)[expected].tolist()


LIMITS = [MOST_BYTES, MOST_BYTES + 1, MOST_TEXT, MOST_TEXT + 1, 2**31 - 1, 2**31, 2**64, 10**30]
ODD = st.one_of(st.floats(), st.booleans(), st.integers(0, 900).map(str), st.sampled_from(["x", None, [], [1], {}]))
NUMBER = st.one_of(st.integers(-2, 1100), st.sampled_from(LIMITS), ODD)
GOOD = st.tuples(st.one_of(KEYS, st.integers()), *[st.integers(0, 500)] * 6)
ROWS = st.one_of(
    st.lists(st.one_of(GOOD, st.lists(NUMBER)), max_size=3), st.lists(st.tuples(KEYS, *[NUMBER] * 6), max_size=2), NUMBER
)


def read_one_by_one(entry: dict) -> list[tuple]:
    samples = [(str(key), *map(int, numbers)) for key, *numbers in entry["samples"]]
    for _, at, size, text_at, text_size, *pixels in samples:
        beyond = max(at + size, text_at + text_size) > entry["bytes"] or size > MOST_BYTES or text_size > MOST_TEXT
        if beyond or min(at, size, text_at, text_size, *pixels) < 0 or max(pixels) >= 2**31 or len(pixels) != 2:
            raise ValueError("impossible numbers")
    return samples


@settings(deadline=None, max_examples=500)
@given(ROWS, st.sampled_from([1000, 2**33]))
def test_numbers_are_checked_all_at_once_as_one_by_one(samples, size):
    entry = json.loads(json.dumps({"name": "x.tar", "bytes": size, "samples": samples}))
    try:
        wanted = read_one_by_one(entry)
    except (ValueError, TypeError, OverflowError):
        with pytest.raises(UserError, match=r"^index\.jsonl line 1 is no line of an index \(.+\): delete the index"):
            read_lines(json.dumps(entry).encode(), "index.jsonl")
    else:
        assert read_lines(json.dumps(entry).encode(), "index.jsonl")["x.tar"].samples == wanted


def assert_split_as_json(line: bytes) -> None:
    def outcome() -> tuple:
        try:
            ((shard, keys, numbers),) = lines_of([line], "index.jsonl")
        except UserError as error:
            return (str(error).split("(")[0],)  # the column of an error in JSON may differ
        return shard, keys, numbers.dtype, numbers.tolist()

    found = outcome()
    with patch.object(shards_module, "split_line", lambda line: (line, None)):
        assert found == outcome()


PLAIN = st.lists(st.tuples(KEYS, *[st.sampled_from([0, 7, 80, 2**31 - 1, 2**62, 2**63, 10**20])] * 6), max_size=3)
DAMAGE = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 1), st.sampled_from('[],"0919\\ -.e{}:é\t')), max_size=2)


@settings(deadline=None, max_examples=200)
@given(st.lists(GOOD) | PLAIN, st.sampled_from([1000, 2**63]), DAMAGE)
def test_a_line_is_split_into_what_json_says_and_so_is_a_damaged_one(samples, size, damage):
    line = to_line(Shard("x.tar", size, [(str(key), *numbers) for key, *numbers in samples])).encode()
    odd = any('"' in key or "]]" in key for key, *_ in json.loads(line)["samples"])
    assert (split_line(line)[1] is None) == (odd or not samples)  # every other one is split
    for at, removed, put in damage:
        at %= len(line)
        line = line[:at] + put.encode() + line[at + removed :]
    assert_split_as_json(line)


@pytest.mark.parametrize(
    "samples",
    [
        '["a",1,2,3,4,5,6]', '["a",01,2,3,4,5,6]', '["a"1,1,2,3,4,5,6]', '["a",1,2,3,4,5,6],["b\\",1,2,3,4,5,6]',
        '["a",1,2,3,4,5,],["b"1,1,2,3,4,5,6]', '["a",,2,3,4,5,6],["b"1,1,2,3,4,5,6]', '["a",1,2,3,4,5,6],1["b",1,2,3,4,5,6]',
        '["a\\",1,2,3,4,5,6],["b",1,2,3,4,5,6]', '["a\t",1,2,3,4,5,6]', '["a",1,2,3,4,5,6],["b",1,2,3,4,5,6],',
        ",".join(['["a"1,1,2,3,4,5,6]'] * 6), '["a",1,2,3,4,5,-6]', '["a",1,2,3,4,5,6e0]',
        '["a",1,2,3,4,5]', '["a",1,2,3,4,5,6,7]', '["a\xff",1,2,3,4,5,6]',
    ],
)  # fmt: skip
def test_a_line_that_almost_looks_as_written(samples):
    assert_split_as_json(b'{"name":"x.tar","bytes":1000,"samples":[%b]}' % samples.encode("latin-1"))


@settings(deadline=None, max_examples=25)
@given(indexes(), st.booleans(), st.integers(20, 400), st.data())
def test_several_processes_make_the_same_columns_and_report_the_same_line(entries, compact, group, data_of_test):
    separators = (",", ":") if compact else None
    lines = [json.dumps(entry, separators=separators) for entry in entries]
    text = "\n".join(lines).encode()
    alone = index_module.to_columns(text, "x")
    wrong = data_of_test.draw(st.sampled_from([lines[0], "{}", "[1"]))  # the first is a name twice
    damaged = "\n".join([*lines, wrong, *data_of_test.draw(st.lists(st.just("{}"), max_size=1))]).encode()
    with patch.object(index_module, "GROUP", group):
        together = index_module.to_columns(text, "x")
        with pytest.raises(UserError) as reported:
            index_module.to_columns(damaged, "x")
    for name, value in vars(alone).items():
        assert np.array_equal(getattr(together, name), value), name
        assert getattr(getattr(together, name), "dtype", None) == getattr(value, "dtype", None)
    assert f"x line {len(lines) + 1} " in str(reported.value) or f"x line {len(lines) + 2} " in str(reported.value)


# The file.


def entry(name: str = "x.tar", samples: int = 5, **fields) -> dict:
    rows = [[f"{n:04d}", n, 10, 20 + n, 10, 300 + n, 400] for n in range(samples)]
    return {"name": name, "bytes": SIZE, "samples": rows, **fields}


def test_an_index_that_changes_within_a_tick_and_keeps_its_length():
    with folders() as (data, _):
        put_index(data, [entry()])
        before, index = open_source(str(data)), data / "index.jsonl"
        times = index.stat()
        index.write_text(index.read_text().replace('"0003"', '"new!"'))
        os.utime(index, ns=(times.st_atime_ns, times.st_mtime_ns))
        after = open_source(str(data))
        assert after.names == [name.replace("0003", "new!") for name in before.names]
        assert after.fingerprint != before.fingerprint
        assert before.names[3] == "x.tar:0003"  # the old file is still mapped
        with pytest.raises(UserError, match="the data has changed, start again"):
            pickle.loads(pickle.dumps(before))


@settings(deadline=None)
@given(st.data())
def test_a_damaged_file_is_made_anew(data_of_test):
    with folders() as (data, cache):
        put_index(data, [entry(repeats=[1, 2, 1, 1, 3])])
        wanted = by_columns(open_source(str(data)))
        (path,) = (path for path in (cache / "sdxl_lora/columns").iterdir() if path.suffix != ".lock")
        whole = path.read_bytes()
        at = data_of_test.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(data_of_test.draw(st.sampled_from([whole[:at], whole[:at] + b"\xaa" + whole[at + 1 :], whole + b"x"])))
        assert by_columns(open_source(str(data))) == wanted
        assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written():
    with folders() as (data, cache):
        put_index(data, [entry()])
        cache.write_text("a file where the folder should be")
        source = open_source(str(data))
        assert by_columns(source) == by_lines([entry()])
        assert source.parts[0].columns.path is None
        assert sorted(path.name for path in data.iterdir()) == ["index.jsonl", "x.tar"]  # data are only read


@pytest.mark.parametrize("group", [100, 2**20])
def test_a_process_that_is_killed_is_one_line(group):
    with folders() as (data, _), patch.object(index_module, "GROUP", group):
        put_index(data, [entry("1.tar"), entry("2.tar")])
        killed = patch.object(index_module, "of_line", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with killed, pytest.raises(UserError, match="was killed, perhaps for its memory"):
            open_source(str(data))
        assert by_columns(open_source(str(data))) == by_lines([entry("1.tar"), entry("2.tar")])


def test_an_index_that_is_changed_while_it_is_read():
    with folders() as (data, cache):
        put_index(data, [entry()])
        index, make = data / "index.jsonl", index_module.of_line

        def change(*line):
            index.write_text(index.read_text().replace("0003", "new!"))
            return make(*line)

        with patch.object(index_module, "of_line", change), pytest.raises(UserError, match="changed while it was read"):
            open_source(str(data))
        assert {path.suffix for path in (cache / "sdxl_lora/columns").iterdir()} == {".lock"}


def test_the_bar_moves_in_the_process_that_opens(monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            bars.append(self)

    monkeypatch.setenv(SHOW_PROGRESS, "1")
    monkeypatch.setattr(columns_module, "tqdm", Bar)
    monkeypatch.setattr(index_module, "GROUP", 100)
    with folders() as (data, _):
        put_index(data, [entry(f"{n}.tar", 20) for n in range(3)])
        open_source(str(data))
        open_source(str(data))  # from the cache
        (bar,) = bars
        assert bar.n == bar.total == -(-(data / "index.jsonl").stat().st_size // 100)


def opened(name: str, start, results) -> None:
    start.wait()
    results.put(by_columns(open_source(name)))


def test_processes_that_open_at_once_make_the_columns_once():
    with folders() as (data, cache):
        put_index(data, [entry(f"{n}.tar", 200) for n in range(3)])
        make, context = index_module.to_columns, get_context("fork")

        def make_and_count(*arguments):
            with (cache / "count").open("a") as file:
                file.write("x")
            return make(*arguments)

        start, results = context.Barrier(6), context.Queue()
        with patch.object(index_module, "to_columns", make_and_count):
            processes = [context.Process(target=opened, args=(str(data), start, results)) for _ in range(6)]
            for process in processes:
                process.start()
            found = [results.get(timeout=60) for _ in processes]
            for process in processes:
                process.join()
        assert found == [by_lines([entry(f"{n}.tar", 200) for n in range(3)])] * 6
        assert (cache / "count").read_text() == "x"


def described(source: Source, results) -> None:
    stream = Stream(source, DataConfig(bs=2), CaptionConfig(), 1024, 0)
    results.put((by_columns(source), stream.bucket.tolist(), [part.columns.path for part in source.parts]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_maps_the_same_file(method):
    with folders() as (data, _):
        put_index(data, [entry(f"{n:02d}.tar", 500) for n in range(20)])
        source = open_source(str(data)).without([7, 4000])
        assert len(pickle.dumps(source)) < 10_000  # of 10,000 samples: none is in it
        context = get_context(method)
        results = context.Queue()
        process = context.Process(target=described, args=(source, results))
        process.start()
        found, bucket, paths = results.get(timeout=120)
        process.join()
        assert found == by_columns(source)
        assert bucket == Stream(source, DataConfig(bs=2), CaptionConfig(), 1024, 0).bucket.tolist()
        assert paths == [part.columns.path for part in source.parts] != [None] * 3


# Buckets of many images.


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 6000)] * 2), min_size=1, max_size=30), st.sampled_from([64, 128, 256]))
def test_buckets_are_chosen_all_at_once_as_one_by_one(originals, step):
    sizes = bucket_sizes(1024, step)
    height, width = np.array(originals).T
    assert choose_buckets((height, width), sizes).tolist() == [choose_bucket(original, sizes) for original in originals]


def test_a_quiet_stream_has_the_buckets_of_its_stream():
    with folders() as (data, _):
        put_index(data, [entry(samples=100)])
        source = open_source(str(data))
        stream = Stream(source, DataConfig(bs=4), CaptionConfig(), 1024, 0)
        for of in (source, source.without([3, 9])):
            bucket = np.delete(stream.bucket, [] if of is source else [3, 9])
            quiet = quiet_stream(of, stream)
            assert (quiet.sizes, quiet.bucket.tolist(), quiet.config.bs) == (stream.sizes, bucket.tolist(), 1)
