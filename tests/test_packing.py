import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pytest
from conftest import Forked, encoded, photograph, run_main, until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from tqdm import tqdm

from common.errors import UserError
from dataset import packing, workers
from dataset.folder import Folder
from dataset.packing import pack, pack_all
from dataset.rows import ParquetRows, read_rows
from dataset.shards import already_there, finish, read_index, read_lines, sidecar, to_line, unfinished, write_shard
from dataset.sources import open_folder, open_mixture, open_source
from dataset.workers import in_parallel
from scripts.make_shards import open_inputs

PACK = "scripts/make_shards.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """60 pictures, of which three cannot be used."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(60):
        photograph(i, 200, 220 + i).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture {i}")
    (folder / "07.png").write_bytes(b"no picture")
    (folder / "31.png").write_bytes((folder / "31.png").read_bytes()[:5000])
    (folder / "50.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory) -> Path:
    """The shards of `many`, made without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_main(PACK, many, "--out", folder, "--per-shard", 4) == 0
    return folder


def test_killed_at_any_time_it_continues_and_the_bytes_are_the_same(script, many, whole, tmp_path, monkeypatch):
    """Each image takes 20 ms more, so that the kill comes before the end also on a busy machine."""
    quick = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *row: time.sleep(0.02) or quick(*row))
    command, output = [PACK, many, "--out", tmp_path, "--per-shard", 4, "--workers", 2], tmp_path.with_suffix(".txt")
    for least in (1, 3, 6):  # number of shards that have been begun when it is killed
        process = Forked(*command, output=output)
        while len(unfinished(tmp_path)) < least and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        existing = already_there(tmp_path)
        assert least - 2 <= len(existing) < 15
        with pytest.raises(UserError, match="was interrupted"):
            open_source(str(tmp_path))
    monkeypatch.setattr(packing, "pack", quick)
    kept = {name: (tmp_path / name).stat().st_ino for name in existing}
    out, _ = script(PACK, many, "--out", tmp_path, "--per-shard", 4, "--workers", 1)
    assert {name: (tmp_path / name).stat().st_ino for name in existing} == kept
    assert contents(tmp_path) == contents(whole)
    assert "57 images in 15 shards" in out
    for refused in (
        "07.png (cannot be decoded: no image of a known kind)",
        "31.png (cannot be decoded: ",
        "50.png (no caption)",
    ):
        assert out.count(refused) == 1


def test_a_finished_folder_is_left_as_it_is(script, many, whole):
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in whole.glob("[!.]*")}
    out, err = script(PACK, many, "--out", whole, "--per-shard", 4)
    assert out.startswith(f"57 images in 15 shards in {whole}/: 0 packed, 57 from before, refused 3")
    assert "07.png" in out
    assert "img" not in err
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in whole.glob("[!.]*")} == before


def test_changed_shards_are_made_anew_and_the_others_stay(script, many, tmp_path):
    folder, out = shutil.copytree(many, tmp_path / "many"), tmp_path / "out"
    script(PACK, folder, "--out", out, "--per-shard", 4)
    first = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    (folder / "20.txt").write_text("another caption")
    for i in range(54, 60):
        (folder / f"{i:02}.png").unlink()
    stdout, _ = script(PACK, folder, "--out", out, "--per-shard", 4)
    assert "51 images in 14 shards" in stdout
    assert ": 5 packed, 46 from before, refused 3" in stdout
    script(PACK, folder, "--out", tmp_path / "anew", "--per-shard", 4)
    assert contents(out) == contents(tmp_path / "anew")
    assert sum((out / name).exists() and (out / name).stat().st_ino == inode for name, inode in first.items()) == 12
    (folder / "53.png").unlink()
    stdout, _ = script(PACK, folder, "--out", out, "--per-shard", 4)
    assert "50 images in 13 shards" in stdout
    assert ": 0 packed, 50 from before" in stdout
    assert len(open_source(str(out)).parts[0].files) == len(list(out.glob("*.tar"))) == 13
    script(PACK, folder, "--out", out, "--per-shard", 5, "--name", "other")
    assert sorted(path.name for path in out.glob("*.tar")) == [f"other-{i:06d}.tar" for i in range(11)]


def test_a_folder_holds_the_shards_of_one_source(script, many, whole, photos, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    for name in ("shard", "other"):
        _, err = script(PACK, photos, "--out", out, "--name", name, status=2)
        assert err == f"make_shards.py: {out} holds shards of {many}: --replace puts those of {photos} in their place\n"
    assert contents(out) == contents(whole)
    (tmp_path / "theirs").mkdir()
    shutil.copy(whole / "shard-000003.tar", tmp_path / "theirs")
    for replace in ([], ["--replace"]):
        _, err = script(PACK, many, "--out", tmp_path / "theirs", *replace, status=2)
        assert err.endswith("holds shard-000003.tar, which is not in its index: move it to another folder\n")
    (out / ".source").unlink()  # as from an older version of the suite, or as fetched from elsewhere
    _, err = script(PACK, many, "--out", out, "--per-shard", 4, status=2)
    assert f"holds shards of an unknown source: --replace puts those of {many} in their place" in err
    stdout, _ = script(PACK, many, "--out", out, "--per-shard", 4, "--replace")
    assert ": 0 packed, 57 from before" in stdout
    assert contents(out) == contents(whole)
    script(PACK, photos, "--out", out, "--replace")
    script(PACK, photos, "--out", tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")
    (tmp_path / "empty").mkdir()  # as where a disk is not mounted
    stdout, err = script(PACK, tmp_path / "empty", "--out", out, "--replace", status=2)
    assert stdout == f"{out}/ is left as it is\n"
    assert err == f"make_shards.py: {tmp_path}/empty: no usable image with a caption\n"
    assert contents(out) == contents(tmp_path / "anew")


def test_killed_before_the_index_was_written(script, many, whole, photos, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    for shard in read_index(whole).values():
        sidecar(out, shard.name).write_text(to_line(shard))
    (out / "index.jsonl").unlink()
    _, err = script(PACK, photos, "--out", out, status=2)
    assert "--replace puts those of" in err
    renamed = shutil.copytree(out, tmp_path / "renamed")
    script(PACK, many, "--out", renamed, "--name", "another")
    assert [path.name for path in renamed.glob("*.tar*")] == ["another-000000.tar"]
    script(PACK, many, "--out", out, "--per-shard", 4)
    assert contents(out) == contents(whole)


# After a change of the pictures the same command makes what it would make anew, killed in between or not.


PHOTOS = [encoded(photograph(i, 40 + i, 50), "JPEG") for i in range(4)]
CHANGES = st.sampled_from(["picture", "caption", "remove", "rename", "spoil"])
EDITS = st.tuples(CHANGES, st.sampled_from([0, 1, 2, 3, 4, 6, 7, 8, 9]), st.integers(0, 3))  # 5 stays as it is


def edit(folder: Path, change: str, at: int, value: int) -> None:
    """Changes picture `at`, or adds it."""
    picture = folder / f"{at}.jpg"
    if change == "picture" or not picture.exists():
        picture.write_bytes(PHOTOS[value])
        picture.with_suffix(".txt").write_text(f"caption {at}")
    elif change == "rename":
        for path in (picture, picture.with_suffix(".txt")):
            path.replace(path.with_stem(str(value)))
    elif change == "remove":
        for path in (picture, picture.with_suffix(".txt")):
            path.unlink()
    elif change == "caption":
        picture.with_suffix(".txt").write_text(f"caption {value}" if value else "")
    else:
        picture.write_bytes(b"no picture")


def packed(folder: Path, out: Path) -> tuple[dict[str, bytes], list[str]]:
    """Packs the folder -> (what is in `out`, names of the shards that were made)."""
    inputs, *_ = open_inputs(str(folder))
    _, made = pack_all(inputs, out, "shard", 3, 1, str(folder))
    return contents(out), [shard.name for shard in made]


def every_step_of_a_removal(test):
    """Pictures 5, 6, 7 are a shard and 8 is another, of which nothing remains."""
    for fatal in range(20):
        test = example(before=[("picture", n, 0) for n in (6, 7, 8)], after=[("remove", 8, 0)], fatal=fatal)(test)
    return test


@every_step_of_a_removal
@settings(max_examples=40, deadline=None)
@given(before=st.lists(EDITS, min_size=4, max_size=12), after=st.lists(EDITS, max_size=3), fatal=st.integers(0, 25))
def test_after_any_change_the_folder_is_that_of_a_first_run(before, after, fatal):
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "CAN_FORK", False)  # in this process it can be stopped at any step
        folder, out = Path(root, "pictures"), Path(root, "out")
        folder.mkdir()
        edit(folder, "picture", 5, 0)
        for change in before:
            edit(folder, *change)
        old, _ = packed(folder, out)
        for change in after:
            edit(folder, *change)
        new, _ = packed(folder, Path(root, "new"))
        with pytest.MonkeyPatch.context() as dying:
            steps = iter(range(fatal))
            for step in ("unlink", "rename", "replace", "write_text", "open", "touch"):
                dying.setattr(Path, step, until(steps, getattr(Path, step)))
            with contextlib.suppress(KeyboardInterrupt):
                packed(folder, out)
        left = {name: data for name, data in contents(out).items() if not name.endswith(".part")}
        if left not in (old, new):
            with pytest.raises(UserError, match="interrupted: the same command goes on with it"):
                open_folder(Folder(out))
        again = {name: (out / name).stat().st_ino for name in left}
        final, made = packed(folder, out)
        assert final == new
        kept = {path.name for path in out.glob("*.tar") if path.stat().st_ino == again.get(path.name)}
        assert kept >= {name for name in new if name.endswith(".tar")} - {*made}
        if left == old:  # exactly the shards whose inputs are others are made
            index = [{s.name: s.made_of for s in read_lines(d["index.jsonl"], "").values()} for d in (old, new)]
            assert {*made} == {name for name, made_of in index[1].items() if index[0].get(name) != made_of}


def test_killed_at_any_step_no_partial_shard_is_taken_for_complete(monkeypatch, tmp_path):
    """The writing is killed before each change of the folder in turn."""

    def write(folder: Path, texts: list[str]) -> None:
        """Does as pack_all does: a shard for each text, but no file for an empty text."""
        jobs = {f"x-{i:06d}.tar": text for i, text in enumerate(texts)}
        existing = already_there(folder)
        for name, text in jobs.items():
            if name not in existing or existing[name].made_of != text:
                samples = [("0", {"txt": "a", "jpg": text * 600}, text)] if text else []
                existing[name] = write_shard(folder, name, samples, made_of=text)
        finish(folder, [existing[name] for name in jobs])

    versions = (["a", "b", "c"], ["a", "d"], ["", "e", "f"])
    wanted = []
    for i, texts in enumerate(versions):
        folder = tmp_path / f"wanted{i}"
        folder.mkdir()
        write(folder, texts)
        wanted.append(contents(folder))
    tars = {
        texts[i]: w[f"x-{i:06d}.tar"] for texts, w in zip(versions, wanted, strict=True) for i in range(len(texts)) if texts[i]
    }
    for fatal in range(60):
        folder = tmp_path / f"{fatal}"
        folder.mkdir()
        for old, new in zip([None, 0, 1], versions, strict=True):
            with monkeypatch.context() as patch:
                steps = iter(range(fatal))
                for change in ("unlink", "rename", "write_text", "open", "touch"):
                    patch.setattr(Path, change, until(steps, getattr(Path, change)))
                try:
                    write(folder, new)
                    ended = True
                except KeyboardInterrupt:
                    ended = False
            for name, shard in already_there(folder).items():
                assert (folder / name).read_bytes() == tars[shard.made_of] if shard.samples else not (folder / name).exists()
            known = {*read_index(folder), *(path.stem for path in unfinished(folder))}
            assert {path.name for path in folder.glob("*.tar")} <= known
            write(folder, new)
            assert contents(folder) == wanted[versions.index(new)], (fatal, old)
        if ended:
            return
    pytest.fail("it took more steps than were tried")


def test_names_and_captions_that_are_no_text(script, photos, tmp_path):
    folder = tmp_path / "my\u00a0photos"
    folder.mkdir()
    for name in (b"a\xff.jpg", b"b\xff.jpg", b"c\xff.jpg"):
        shutil.copy(photos / "photo1.jpg", os.fsencode(folder) + b"/" + name)
    (folder / os.fsdecode(b"b\xff.jpg")).write_bytes(b"no picture")
    texts = {b"a\xff.jpg": "a cat", b"b\xff.jpg": "a cat", b"c\xff.jpg": "half \ud83d of it"}
    rows = [{"file_name": os.fsdecode(name), "text": text} for name, text in texts.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, _ = script(PACK, folder, "--out", tmp_path / "out")
    assert "1 images in 1 shards" in out
    assert r"refused b\xff.jpg (cannot be decoded" in out
    assert r"c\xff.jpg (no caption)" in out
    assert r"metadata.jsonl line 3: c\xff.jpg (its caption holds control characters, or half of a surrogate pair)" in out
    assert open_source(str(tmp_path / "out")).read_sample(0).captions == ["a cat"]


def test_shards_are_packed_anew(script, photos, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with tarfile.open(theirs / "a.tar", "w") as tar:
        for path in sorted(photos.iterdir()):
            tar.add(path, path.name)
    out, _ = script(PACK, theirs, "--out", tmp_path / "ours", "--per-shard", 3)
    assert "7 images in 3 shards" in out
    script(PACK, photos, "--out", tmp_path / "straight", "--per-shard", 3)
    ours, straight = open_source(str(tmp_path / "ours")), open_source(str(tmp_path / "straight"))
    for n in range(7):
        assert ours.read_sample(n) == straight.read_sample(n)
    assert read_index(tmp_path / "ours")["shard-000002.tar"].hashes == [hashlib.sha256(ours.read_sample(6).image).hexdigest()]
    script(PACK, f"{tmp_path}/ours/shard-{{000000..000001}}.tar", "--out", tmp_path / "two")
    assert open_source(str(tmp_path / "two")).samples == 6
    before = contents(tmp_path / "two")
    for data in ("two", "two/shard-{000000..000000}.tar", "two/shard-000000.tar"):
        _, err = script(PACK, tmp_path / data, "--out", tmp_path / "two", "--replace", status=2)
        assert err == f"make_shards.py: --out {tmp_path}/two must be another folder than that of the data\n"
    assert contents(tmp_path / "two") == before


# --verify.


@pytest.mark.parametrize(
    ("damage", "number", "lines"),
    [
        ("flip", 2, ["shard-000002.tar: its SHA-256 is another", "shard-000002.tar:0000009: its image is another"]),
        ("missing", 3, ["shard-000003.tar: [Errno 2] No such file"]),
        ("swap", 4, ["shard-000004.tar: its members are others", "shard-000004.tar:0000016: its image is another"]),
        ("truncated", 5, ["shard-000005.tar: its members are others", "shard-000005.tar:0000023: its image is another"]),
        ("index", 6, ["shard-000006.tar:0000024: its image is decoded to another"]),
        ("strange", 15, ["shard-000015.tar is not in the index"]),
    ],
)
def test_verify_names_what_is_damaged(script, whole, tmp_path, damage, number, lines):
    folder = shutil.copytree(whole, tmp_path / "shards")
    path = folder / f"shard-{number:06d}.tar"
    if damage == "flip":
        data = bytearray(path.read_bytes())
        _, at, size, *_ = read_index(folder)[path.name].samples[1]
        data[at + size // 2] ^= 1
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    elif damage == "swap":
        with tarfile.open(whole / path.name) as old, tarfile.open(path, "w") as new:
            for member in sorted(old, key=lambda member: (int(member.name[:7]) ^ 1, member.name)):
                new.addfile(member, old.extractfile(member))
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "index":
        index = folder / "index.jsonl"
        index.write_text(index.read_text().replace(read_index(folder)[path.name].dhashes[0], "0" * 16))
    else:
        shutil.copy(folder / "shard-000000.tar", path)
    out, err = script(PACK, folder, "--verify", status=2)
    assert all(f"  {line}" in out for line in lines)
    assert all(path.name in line for line in out.splitlines())
    assert f"make_shards.py: {folder}: {len(out.splitlines())} faults: " in err


def test_verify(script, whole, photos, tmp_path):
    out, _ = script(PACK, whole, "--verify", "--workers", 2)
    assert out == f"57 samples in 15 shards in {whole}/ agree with the index and can be decoded\n"
    for arguments, match in (
        ([photos, "--verify"], "has no index.jsonl"),
        ([whole, "--verify", "--out", tmp_path], "leave out --out"),
        ([photos], "--out is missing"),
    ):
        _, err = script(PACK, *arguments, status=2)
        assert match in err


# Duplicates.


def test_duplicates_are_named_and_kept(script, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    image = Image.open(photos / "photo1.jpg")
    image.save(folder / "small.webp", quality=60)
    image.resize((55, 90)).save(folder / "smaller.jpg", quality=70)
    for name in ("photo4.jpg", "photo4.txt"):
        shutil.copy(photos / name, folder / f"copy{name[6:]}")
    for name in ("small", "smaller"):
        (folder / f"{name}.txt").write_text("again")
    out = [script(PACK, folder, "--out", tmp_path / "out", "--per-shard", 4)[0] for _ in range(2)]
    for stdout in out:
        lines = stdout.splitlines()[-4:]
        assert "10 images" in stdout.splitlines()[0]
        assert lines[0] == "equal: 2 images in 1 groups, all kept"
        assert lines[1] == "  copy.jpg (shard-000000.tar:0000000), photo4.jpg (shard-000001.tar:0000005)"
        assert lines[2].startswith("nearly equal (at most 6 of 64 bits differ): 3 images in 1 groups")
        assert [name.split(" ")[0] for name in lines[3].strip().split(", ")] == ["photo1.jpg", "small.webp", "smaller.jpg"]


# Parquet.


@pytest.fixture
def table(tmp_path) -> Path:
    """20 rows in row groups of 6, of which two cannot be used."""
    rows = []
    for i in range(20):
        image = encoded(photograph(i, 40 + i, 50), ("PNG", "JPEG", "BMP")[i % 3])
        rows.append({"image": {"bytes": image, "path": None}, "text": f"row {i}"})
    rows[8]["image"]["bytes"] = b"rubbish"
    rows[13]["text"] = None
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set/train.parquet", row_group_size=6)
    return tmp_path / "set/train.parquet"


def test_rows_of_any_range_are_those_of_the_table(table):
    wanted = parquet.read_table(table).to_pylist()
    inputs = ParquetRows([table, table])
    assert len(inputs) == 40
    for first, last in ((0, 40), (3, 5), (5, 7), (17, 23), (39, 40), (7, 7)):
        rows = [(image, captions) for _, image, captions in inputs.rows(first, last)]
        assert rows == [(r["image"]["bytes"], [r["text"]] if r["text"] else []) for r in (wanted * 2)[first:last]]


def test_columns_of_other_kinds(tmp_path):
    image = encoded(photograph(0, 40, 40), "JPEG")
    columns = {"image": [image, None, b""], "text": pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.binary())}
    text = pyarrow.StringArray.from_buffers(3, *columns["text"].buffers()[1:])
    parquet.write_table(pyarrow.table({"image": columns["image"], "text": text}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet", 0, 3)) == [
        ("a.parquet:0", image, ["a"]),
        ("a.parquet:1", b"", []),
        ("a.parquet:2", b"", ["c"]),
    ]
    parquet.write_table(pyarrow.table({"image": [image] * 3, "text": [["a", None], None, []]}), tmp_path / "b.parquet")
    assert [captions for *_, captions in read_rows(tmp_path / "b.parquet", 0, 3)] == [["a"], [], []]
    parquet.write_table(pyarrow.table({"image": ["x.jpg"], "text": [3]}), tmp_path / "c.parquet")
    ((name, nothing, captions),) = read_rows(tmp_path / "c.parquet", 0, 1)
    assert captions == []
    with pytest.raises(ValueError, match="the column image holds a path, and no such file is in"):
        pack(name, nothing, ["a"])


def test_a_damaged_row_group_costs_its_rows_alone(table):
    about = parquet.ParquetFile(table).metadata.row_group(1).column(0)
    data = bytearray(table.read_bytes())
    begin = about.dictionary_page_offset or about.data_page_offset
    data[begin : begin + 40] = b"\xff" * 40
    table.write_bytes(data)
    rows = list(read_rows(table, 0, 20))
    assert [bool(image) for _, image, _ in rows] == [True] * 6 + [False] * 6 + [True] * 8
    assert rows[6][0] == "train.parquet:6"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_parquet_as_data_equals_the_shards_of_make_shards(script, table, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = table if kind == "file" else table.parent
    first = open_mixture((str(data),))
    script(PACK, data, "--out", tmp_path / "out")
    wanted = open_mixture((str(tmp_path / "out"),))
    assert (first.samples, first.fingerprint) == (18, wanted.fingerprint)
    for n in range(18):
        ours, theirs = first.read_sample(n), wanted.read_sample(n)
        assert (ours.image, ours.captions) == (theirs.image, theirs.captions)
    assert first.refused == ["train.parquet:8 (cannot be decoded: no image of a known kind)"]
    assert first.uncaptioned == ["train.parquet:13"]
    monkeypatch.setattr(packing, "pack_job", None)  # the second time nothing is packed
    again = open_mixture((f"{data}:2", f"{data}:1"))
    assert (again.samples, again.uncaptioned) == (36, 2 * first.uncaptioned)


def test_processes_that_start_at_once_pack_once(table, tmp_path, monkeypatch):
    """The lock lets one of them pack, and the other waits for it."""

    def read(number: int) -> None:
        sys.stdout = sys.stderr = open(tmp_path / str(number), "w")  # noqa: SIM115
        print(open_source(str(table)).samples)
        sys.stdout.flush()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    running = [multiprocessing.get_context("fork").Process(target=read, args=(n,)) for n in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    outputs = [(tmp_path / str(n)).read_text() for n in range(2)]
    assert [text.splitlines()[-1] for text in outputs] == ["18"] * 2
    assert sum("packing" in text for text in outputs) == 1


def test_mistaken_data(table, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(table))
    with pytest.raises(UserError, match="cannot be written"):
        open_source(str(table))
    with pytest.raises(UserError, match=r"a data set of the hub: scripts/make_shards\.py owner/name"):
        open_source("owner/name")
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has columns \['a'\], not image and text"):
        open_source(str(tmp_path / "a.parquet"))


# Several processes.


def test_work_is_done_by_all_and_the_first_error_ends_it():
    def square(n: int, tick) -> tuple[int, int]:
        tick()
        time.sleep(0.01)
        return n * n, os.getpid()

    bar = tqdm(total=30, initial=10)
    squares, processes = zip(*in_parallel(square, range(20), 2, bar), strict=True)
    assert squares == tuple(n * n for n in range(20))
    assert len({*processes, os.getpid()}) == 3
    assert bar.n == 30

    def fail(n: int, tick) -> None:
        if n:
            time.sleep(60)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        in_parallel(fail, range(9), 2, tqdm(total=9))


def test_a_full_disk_and_a_killed_process_are_reported(photos, tmp_path, monkeypatch):
    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    inputs, *_ = open_inputs(str(photos))
    monkeypatch.setattr(packing, "pack_job", full)
    with pytest.raises(UserError, match="out cannot be written: No space left on device"):
        pack_all(inputs, tmp_path / "out", "shard", 2, 2, "photos")
    monkeypatch.setattr(packing, "pack_job", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="was killed, perhaps for its memory: try fewer --workers"):
        pack_all(inputs, tmp_path / "out", "shard", 2, 2, "photos")
