"""Every file of a data source is accounted for, whatever it is called and wherever it is; text has one reader."""

import csv
import io
import json
import re
import shutil
import tarfile
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow
import pytest
from conftest import encoded, photograph, source_in_memory
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from common.errors import UserError
from common.text import read_text
from data import Stream
from dataset.buckets import Order
from dataset.folder import SYSTEM_FILES, UNREAD, Folder
from dataset.images import IMAGE_SUFFIXES, ORIENTATION, alpha_of, late_chunks_first, open_image, survey_size, to_rgb
from dataset.packing import pack
from dataset.shards import split_captions
from dataset.sources import PLACE, Source, open_folder, open_mixture, open_source
from model.prompts import Prompt, read_prompts
from options.training import CaptionConfig, CaptionFilesConfig, DataConfig

JPEG = encoded(photograph(3, 48, 32), "JPEG")
SUFFIXES = [*IMAGE_SUFFIXES, *UNREAD, "txt", "json", "npz", "caption", "TXT", "JPG", "Tif", ""]
NAMES = st.sampled_from(["a", "a.b", "b", "é", "e\u0301", ".c", "Thumbs", "猫"])
PATHS = st.builds(
    lambda folder, name, suffix: f"{folder}{name}.{suffix}" if suffix else f"{folder}{name}",
    st.sampled_from(["", "sub/", ".hidden/", "__MACOSX/", "10_sks/", "@eaDir/"]),
    NAMES,
    st.sampled_from(SUFFIXES),
)
CONTENTS = st.sampled_from([JPEG, b"", b"a house", "ein Haus, größer".encode("cp1252"), b'{"caption": "a house"}', b"\0"])
FAMILY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def total(source) -> int:
    """The number of files that a source accounts for; lines of metadata are no files."""
    files = [line for line in source.refused if "metadata.jsonl line" not in line]
    return source.samples + len(source.uncaptioned) + len(files) + source.others.total()


def opened(folder: Path):
    """The source of a folder, and without any usable image what its error is made of."""
    return open_folder(Folder(folder))


@FAMILY
@given(st.dictionaries(PATHS, CONTENTS, max_size=12), st.booleans())
def test_the_counts_add_up_to_the_files_of_a_folder(tmp_path_factory, files, with_metadata):
    folder = tmp_path_factory.mktemp("any")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    if with_metadata:
        rows = [{"file_name": name, "text": "a row"} for name in [*files, "nowhere.jpg"]]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(folder)
    assert total(source) == sum(path.is_file() for path in folder.rglob("*"))
    visible = [name for name in files if not any(p[0] == "." or p.lower() in SYSTEM_FILES for p in Path(name).parts)]
    missing = sum("(is not in the folder, or is hidden)" in line for line in source.refused)
    assert missing == (len(files) - len(visible) + 1) * with_metadata
    for name in visible:
        suffix = Path(name).suffix.lower().removeprefix(".")
        named = [*source.names, *source.uncaptioned, *(line.rpartition(" (")[0] for line in source.refused)]
        assert named.count(str(folder / name)) == (suffix in (*IMAGE_SUFFIXES, *UNREAD) or with_metadata)


MEMBERS = st.lists(
    st.tuples(NAMES, st.sampled_from([s.lower() for s in SUFFIXES])),
    unique_by=lambda m: (unicodedata.normalize("NFC", m[0]), m[1]),
)


@FAMILY
@given(MEMBERS, st.randoms())
def test_the_counts_add_up_to_the_members_of_a_shard_in_any_order(tmp_path_factory, members, random):
    folder = tmp_path_factory.mktemp("shard")

    def pack(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for name, suffix in members:
                content = b"a house" if suffix == "txt" else b'{"prompt": "a tree"}' if suffix == "json" else JPEG
                info = tarfile.TarInfo(f"{name}.{suffix}" if suffix else name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    reports = []
    for _ in range(2):
        pack(folder / "x.tar")
        source = opened(folder)
        assert total(source) == len(members)
        names = sorted(unicodedata.normalize("NFC", name) for name in source.names + source.uncaptioned + source.refused)
        reports.append((names, sorted(source.read_sample(n).captions for n in range(source.samples)), source.others))
        random.shuffle(members)
    assert reports[0] == reports[1]


JSON = ['{"caption": "a"}', '["a"]', '{"text": 3}', '{"captions": [], "prompt": "b"}', "{", '{"caption": "\\u0000"}', "{}"]
TEXTS = st.sampled_from([text.encode() for text in ("a house", "one\ntwo", "", "\x1b[31m", *JSON)] + ["ö".encode("cp1252")])
TEXT_FILES = st.tuples(NAMES, st.sampled_from(["txt", "json", "caption"]))


@FAMILY
@given(st.dictionaries(TEXT_FILES, TEXTS), st.sets(NAMES, min_size=1))
def test_a_folder_and_a_tar_of_it_have_the_same_captions(tmp_path_factory, texts, images):
    folder = tmp_path_factory.mktemp("same")
    files = {f"{name}.{suffix}": text for (name, suffix), text in texts.items()} | {f"{name}.jpg": JPEG for name in images}
    forms = {unicodedata.normalize("NFC", name): name for name in files}  # a tar with both forms of a name is refused
    (folder / "tar").mkdir()
    with tarfile.open(folder / "tar/x.tar", "w") as tar:
        for name in forms.values():
            path = folder / "files" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(files[name])
            tar.add(path, name)
    one, other = opened(folder / "files"), opened(folder / "tar")
    captions = [sorted(source.read_sample(n).captions for n in range(source.samples)) for source in (one, other)]
    assert captions[0] == captions[1]
    assert len(one.uncaptioned) == len(other.uncaptioned)
    reasons = [sorted(line.partition(" (")[2] for line in source.refused) for source in (one, other)]
    assert reasons[0] == reasons[1]


def read_back(encoded: bytes) -> list[str]:
    try:
        return split_captions(encoded)
    except ValueError:
        return []


@given(st.one_of(st.text(), st.sampled_from(JSON)))
def test_a_row_that_is_packed_can_be_read_again(text):
    with suppress(ValueError):
        sample, *_ = pack("x", JPEG, [text])
        assert read_back(sample["txt"])


def test_what_a_file_is_instead_of_an_image_or_a_tar(tmp_path):
    wrong = {b"\0\0\0\x18ftypheic": "HEIF", b"\xff\x0a": "JPEG XL", b"8BPS": "drawing program", b"PK\3\4": "compressed"}
    wrong |= {b"version https://git-lfs.github.com/spec/v1": "git lfs pull", b"\n<!DOCTYPE html>": "web page"}
    for first, reason in wrong.items():
        with pytest.raises(ValueError, match=reason):
            pack("x", first + bytes(99), ["a house"])
        (tmp_path / "x.tar").write_bytes(first + bytes(999))
        with pytest.raises(UserError, match=rf"x\.tar is no tar file: .*{reason}"):
            open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused_and_not_black(tmp_path, dtype):
    captioned(tmp_path, "a.tif", "b.jpg")
    Image.fromarray(np.ones((64, 64), dtype)).save(tmp_path / "a.tif")
    source = open_source(str(tmp_path))
    assert (
        source.account()
        == "2 images with a caption (1 cannot be read: training skips them), 0 without, 0 refused; beside them 2 captions"
    )
    with pytest.raises(ValueError, match="more than 16 bits"):
        open_image((tmp_path / "a.tif").read_bytes())


def test_a_row_names_its_file_absolute_or_through_any_link(tmp_path):
    captioned(tmp_path / "elsewhere", "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    data = tmp_path / "data"
    data.mkdir()
    for link in ("one", "two"):
        (data / link).symlink_to(tmp_path / "elsewhere")
    names = ["one/a.jpg", "two/b.jpg", "none/../two/c.jpg", str(data / "two/d.jpg"), "../elsewhere/../x.jpg", "/etc/passwd"]
    (data / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": name}) for name in names))
    source = open_source(str(data))
    assert sorted(source.read_sample(n).captions[0] for n in range(source.samples)) == sorted(names[:4])
    assert [line.partition(": ")[2].partition(" ")[0] for line in source.refused] == names[4:]


def captioned(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(JPEG)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_extension_is_read_and_packed(script, tmp_path, suffix):
    kind = {"jpg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "dib": "DIB", "tif": "TIFF", "apng": "PNG"}.get(
        suffix, suffix.upper()
    )
    folder = tmp_path / "images"
    captioned(folder, f"a.{suffix}")
    (folder / f"a.{suffix}").write_bytes(encoded(photograph(1, 90, 60), kind))
    batch = next(iter(Stream(open_source(str(folder)), DataConfig(bs=1, workers=0), CaptionConfig(), 64, 0)))
    assert (batch.original_size.tolist(), batch.captions) == ([[60, 90]], [f"caption of a.{suffix}"])
    out, _ = script("scripts/make_shards.py", folder, "--out", tmp_path / "shards", "--workers", 1)
    assert out.startswith("1 images in 1 shards")
    assert out.endswith("beside them 1 captions\n")


@pytest.mark.parametrize("suffix", ["tif", "gif", "bmp", "jpg", "png"])
def test_shards_of_any_format_agree_with_their_index_and_keep_what_is_transparent(script, tmp_path, suffix):
    folder = tmp_path / "images"
    captioned(folder, *(f"{n}.{suffix}" for n in range(4)))
    for n in range(4):
        image = photograph(n, 90, 60)
        if suffix in ("tif", "gif"):
            image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda grey: 255 * (grey > 99)))
        image.save(folder / f"{n}.{suffix}")
    script("scripts/make_shards.py", folder, "--out", tmp_path / "shards")
    script("scripts/make_shards.py", tmp_path / "shards", "--verify")
    before, after = (open_source(str(data)).read_sample(0).image for data in (folder, tmp_path / "shards"))
    assert alpha_of(open_image(before)).tobytes() == alpha_of(open_image(after)).tobytes()


def test_linked_folders_are_read_once_and_without_end(tmp_path):
    captioned(tmp_path / "data", "a.jpg")
    captioned(tmp_path / "elsewhere", "b.jpg")
    (tmp_path / "data/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data/more")
    source = open_source(str(tmp_path / "data"))
    assert sorted(Path(name).name for name in source.names) == ["a.jpg", "b.jpg"]


def test_what_lies_beside_shards_or_parquet_files_is_named(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(shards, tmp_path / "shards")
    captioned(folder, "a.jpg")
    shutil.copytree(shards, folder / "sub")
    source = open_source(str(folder))
    assert source.samples == 7
    assert f"{folder}/a.jpg (an image beside shards or a .parquet: put images into a folder of their own)" in source.refused
    assert sum(f"shards are read from one folder: give {folder}/sub" in line for line in source.refused) == 3
    captioned(tmp_path / "tables", "a.jpg")
    rows = [{"image": {"bytes": JPEG, "path": None}, "text": "a house"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tables/0000.parquet")
    source = open_source(str(tmp_path / "tables"))
    assert (source.samples, len(source.refused)) == (1, 1)


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("train-00000-of-00001.parquet", True), ("train.parquet", True), ("0000.parquet", True),
        ("default/train/0000.parquet", True), ("latest.parquet", True), ("test_images/train-0.parquet", True),
        ("test-00000-of-00001.parquet", False), ("validation.parquet", False), ("val/0000.PARQUET", False),
        ("data/dev-0.parquet", False), ("evaluation_2.parquet", False),
    ],
)  # fmt: skip
def test_only_train_of_parquet_files_named_by_split(tmp_path, name, used):
    for path in (tmp_path / "plain.parquet", tmp_path / name):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = Folder(tmp_path)
    assert len(folder.tables) == 1 + used
    assert folder.others.total() == 1 - used
    assert Folder(tmp_path / name).tables == [tmp_path / name]  # a file that is named is taken


def test_rows_and_texts_of_any_spelling_find_their_image(tmp_path):
    (tmp_path / "Café").mkdir()
    decomposed = unicodedata.normalize("NFD", "Größe.JPG")
    for name in ("a.jpg", decomposed, "b.JPG"):
        (tmp_path / "Café" / name).write_bytes(JPEG)
    (tmp_path / "Café/b.TXT").write_text("text")
    rows = [{"file_name": "Cafe\u0301\\a.jpg", "text": "one"}, {"file_name": "Café/a.jpg", "text": ["two", "three"]}]
    rows += [{"file_name": "Café\\Größe.jpg", "text": "four"}, {"file_name": "..\\a.jpg", "text": "out"}]
    (tmp_path / "METADATA.jsonl").write_text("\n".join(map(json.dumps, rows[:3])))
    source = open_source(str(tmp_path))
    assert {tuple(source.read_sample(n).captions) for n in range(3)} == {("one", "two", "three"), ("four",), ("text",)}
    (tmp_path / "METADATA.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_source(str(tmp_path)).refused == [
        rf"{tmp_path}/METADATA.jsonl line 4: ..\a.jpg (is not in the folder, or is hidden)"
    ]


@pytest.mark.parametrize(("key", "text"), [("caption", "x"), ("prompt", "x"), ("text", ["x"]), ("captions", ["x"])])
def test_json_beside_an_image(tmp_path, key, text):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "a.json").write_text(json.dumps({"width": 3, key: text}))
    assert open_source(str(tmp_path)).read_sample(0).captions == ["x"]


def test_a_caption_file_of_kohya(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "a.caption").write_text("a house")
    assert open_source(str(tmp_path)).read_sample(0).captions == ["a house"]


@pytest.mark.parametrize("layout", ["path", "struct", "list of path", "list of struct"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_parquet_column_of_paths(tmp_path, monkeypatch, layout, missing):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    if not missing:
        (folder / "images").mkdir()
        (folder / "images/ö.jpg").write_bytes(JPEG)
    cell = "images\\o\u0308.jpg" if "path" in layout else {"bytes": None, "path": "images/ö.jpg"}
    rows = [{"image": [cell] if "list" in layout else cell, "text": "a house"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    data = str(folder / "a.parquet")
    if missing:
        with pytest.raises(UserError, match=r"the column image holds a path, and no such file is in .*/data/"):
            open_source(data)
    else:
        assert open_source(data).read_sample(0).image == JPEG


# Text.


CONTROL = "".join(chr(n) for n in range(32) if not chr(n).isspace())


@given(st.text(st.characters(exclude_characters=CONTROL, exclude_categories=["Cs"])))
@example("a")
def test_text_is_the_same_in_every_encoding_that_is_read(text):
    text = text.removeprefix("\ufeff")
    for data in (text.encode(), text.encode("utf-8-sig"), *(mark + text.encode(name) for mark, name in UTF16)):
        assert read_text(data) == text


UTF16 = [(b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")]


@given(st.text(st.characters(max_codepoint=0xFF, exclude_categories=["Cc"])), st.sampled_from(["utf-16-le", "utf-16-be"]))
def test_utf16_without_a_mark_is_read_or_refused_but_never_read_wrong(text, encoding):
    try:
        assert read_text(text.encode(encoding)) == text
    except ValueError:
        assert not text.isascii()


@given(st.binary())
@example(b"abc\0")
@example("a house".encode("utf-32"))
def test_any_bytes_are_text_or_refused(data):
    try:
        text = read_text(data)
    except ValueError:
        return
    assert not set(text) & set(CONTROL)
    assert any(text.encode(name) in (data, data[2:], data[3:]) for name in ("utf-8", "utf-16-le", "utf-16-be"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_prompts_and_metadata_have_the_same_reader(tmp_path, encoding):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a house"}\n', encoding=encoding)
    assert open_source(str(tmp_path)).read_sample(0).captions == ["a house"]
    (tmp_path / "p.txt").write_text("# mine\n\na house\n  a tree \n", encoding=encoding)
    assert read_prompts((str(tmp_path / "p.txt"),), "demo") == [Prompt("a house"), Prompt("a tree")]


def test_text_of_another_encoding_is_refused_by_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for name in ("metadata.jsonl", "p.txt"):
        (tmp_path / name).write_bytes("größer".encode("cp1252"))
    with pytest.raises(UserError, match=r"metadata.jsonl is neither UTF-8 nor UTF-16: save it as UTF-8$"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match=r"^--prompts .*p.txt is neither UTF-8 nor UTF-16: save it as UTF-8$"):
        read_prompts((str(tmp_path / "p.txt"),), "demo")


# What turns an image.

PHOTO = photograph(2, 90, 60)
BIG = photograph(2, 300, 200).effect_spread(100)


def stored(kind: str, by: str, turn: int, place: str = "front", photo: Image.Image = PHOTO) -> bytes:
    """An image that EXIF or XMP turns; of a PNG it may be behind the pixels."""
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r d:Orientation="1" tiff:Orientation="{turn}"/></x:xmpmeta>'
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    if kind != "PNG":
        by_xmp = {"tiffinfo": {700: xmp.encode()}} if kind == "TIFF" else {"xmp": xmp.encode()}
        return encoded(photo, kind, **({"exif": exif} if by == "exif" else by_xmp))
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=by == "zipped xmp")
    data = encoded(photo, kind, **({"exif": exif} if by == "exif" else {"pnginfo": info}))
    plain = encoded(photo, kind)
    if place == "front":
        return data
    begin = plain.index(b"IDAT") - 4
    chunks = data[begin : data.index(b"IDAT") - 4]
    return plain[:-12] + chunks + plain[-12:]


LAYOUTS = [("JPEG", "front"), ("WEBP", "front"), ("AVIF", "front"), ("TIFF", "front"), ("PNG", "front"), ("PNG", "behind")]


@pytest.mark.parametrize("photo", [PHOTO, BIG], ids=["small", "larger than what is read of it"])
@pytest.mark.parametrize("by", ["exif", "xmp", "zipped xmp"])
@pytest.mark.parametrize(("kind", "place"), LAYOUTS)
def test_the_size_that_is_surveyed_is_that_which_is_decoded(kind, place, by, photo):
    if by == "zipped xmp" and kind != "PNG":
        pytest.skip("only PNG compresses it")
    for turn in range(1, 9):
        data = stored(kind, by, turn, place, photo)
        read = []

        def part(at: int, size: int, data=data, read=read) -> bytes:
            read.append(size)
            return data[at : at + size]

        decoded = to_rgb(open_image(data))
        assert survey_size(part, len(data)) == (decoded.height, decoded.width)
        assert decoded.size == (photo.size if turn < 5 else photo.size[::-1]), (turn, kind)
        assert kind != "PNG" or sum(read) <= 2 * 2**16


def test_a_png_without_late_chunks_is_not_copied():
    data = encoded(PHOTO)
    assert late_chunks_first(data) is data
    assert late_chunks_first(JPEG) is JPEG


# Prompts and folders of other tools.


@pytest.mark.parametrize(
    "option",
    [
        "--ar 16:9",
        "--negative_prompt=x",
        "--W 256",
        "<lora:a:0.8>",
        "(red:1.2)",
        "(red:2)",
        "(score_9:.5)",
        "[cat:dog:0.5]",
        "(a:-1)",
        "embedding:bad",
        "__colour__",
        "{red|blue}",
    ],
)
def test_options_of_other_programs_are_refused(tmp_path, option):
    (tmp_path / "p.txt").write_text(f"# prompts\na -- house (at 10:30), well-made -x\nhouse {option}\n")
    named = re.escape(option.split()[0].partition("=")[0])
    with pytest.raises(UserError, match=rf"^--prompts .*p\.txt line 3: {named} is (no option of a prompt|not read)"):
        read_prompts((str(tmp_path / "p.txt"),), "demo")
    with pytest.raises(UserError, match=r"^--prompts text 2: "):
        read_prompts(("a house", f"house {option}"), "demo")


def source_of(images: int) -> Source:
    return source_in_memory(np.zeros(images, PLACE), [str(n) for n in range(images)])


def draws_of_epochs(source: Source, epochs: int) -> Counter:
    order = Order(np.zeros(source.samples, int), 1, 5, source.part, source.shares, source.epoch)
    return Counter(source.names[n].rpartition("/")[2] for number in range(epochs) for n in order.epoch(number))


@pytest.mark.parametrize("times", [1, 3])
def test_kohyas_names_of_folders_are_repeats_and_captions(tmp_path, times):
    captioned(tmp_path / "10_sks cat", "a.jpg")
    captioned(tmp_path / "2_dog", "b.jpg", "c.jpg", "d.jpg")
    captioned(tmp_path / "01_plain", "e.jpg")
    captioned(tmp_path / "2026_summer", "f.jpg")
    (tmp_path / "10_sks cat/a.txt").unlink()
    (tmp_path / "2026_summer/f.txt").unlink()
    source = open_mixture((f"{tmp_path}:x{times}",))
    assert source.epoch == times * (10 + 2 * 3 + 1)
    wanted = {"a.jpg": 10, "b.jpg": 2, "c.jpg": 2, "d.jpg": 2, "e.jpg": 1}
    assert draws_of_epochs(source, 7) == Counter({name: 7 * times * number for name, number in wanted.items()})
    captions = {name.rpartition("/")[2]: source.read_sample(n).captions for n, name in enumerate(source.names)}
    assert captions["a.jpg"] == ["sks cat"]
    assert captions["b.jpg"] == ["caption of b.jpg"]
    assert [name.rpartition("/")[2] for name in source.uncaptioned] == ["f.jpg"]
    assert "10_sks cat/ is drawn 10 times an epoch; 2_dog/ is drawn 2 times an epoch" in source.note
    assert "1 pictures without a text get a caption, such as 'sks cat'" in source.note


@given(repeats=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=4), epochs=st.integers(1, 9))
def test_repeats_are_exact_in_every_epoch(repeats, epochs):
    """(repeats, images) of each data set: each epoch draws each image that often, whatever the rounding of the shares."""
    sources = [source_of(images) for _, images in repeats]
    with patch("dataset.sources.open_source", lambda name, *_: sources[int(name)]):
        source = open_mixture(tuple(f"{i}:x{times}" for i, (times, _) in enumerate(repeats)))
    order = Order(np.zeros(source.samples, int), 1, 3, source.part, source.shares, source.epoch)
    for number in range(epochs):
        assert np.bincount(order.epoch(number)).tolist() == [times for times, images in repeats for _ in range(images)]


def test_repeats_inside_a_weighted_mixture(tmp_path):
    (tmp_path / "a").mkdir()
    captioned(tmp_path / "a/3_x", "a.jpg")
    captioned(tmp_path / "a/1_y", "b.jpg", "c.jpg")
    captioned(tmp_path / "b", "d.jpg", "e.jpg")
    source = open_mixture((f"{tmp_path}/a:1", f"{tmp_path}/b:3"))
    drawn = draws_of_epochs(source, 400)  # of 5 draws
    assert [round(drawn[f"{name}.jpg"] / 2000, 2) for name in "abcde"] == [0.15, 0.05, 0.05, 0.38, 0.38]


@pytest.mark.parametrize("data", ["a:x0", "a:x1.5", "a:0", "a:-1", "a:nan", "a:x-2"])
def test_repeats_that_are_none(data):
    with pytest.raises(UserError, match=f"^{data}: "):
        open_mixture((data,))


STANDINGS = [  # options, {image: caption}
    ({}, {"old_town-hall (3).png": None, "girl_01.jpg": None, "own.jpg": "its own"}),
    ({"caption": "nrt style"}, {"old_town-hall (3).png": "nrt style", "girl_01.jpg": "nrt style", "own.jpg": "its own"}),
    ({"caption_from_name": True, "caption": "x"},
     {"old_town-hall (3).png": "old town hall", "girl_01.jpg": "girl", "007.png": "x", "own.jpg": "its own"}),
    ({"caption_extension": ".cap"}, {"own.jpg": None, "other.jpg": "from .cap"}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "captions"), STANDINGS)
def test_captions_of_pictures_without_a_text(tmp_path, options, captions):
    for name in captions:
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "own.txt").write_text("its own")
    (tmp_path / "other.cap").write_text("from .cap")
    source = open_folder(Folder(tmp_path, CaptionFilesConfig(**options)))
    found = {Path(name).name: source.read_sample(n).captions for n, name in enumerate(source.names)}
    assert found == {name: [caption] for name, caption in captions.items() if caption}
    assert {Path(name).name for name in source.uncaptioned} == {name for name, caption in captions.items() if not caption}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_metadata_csv(tmp_path, separator, encoding):
    captioned(tmp_path, "a.jpg", "b.jpg")
    rows = [
        ["file_name", "text"],
        ["a.jpg", 'a "small", red; house\nof café'],
        ["b.jpg", "two"],
        ["b.jpg", "more"],
        ["c.jpg", "no"],
    ]
    with (tmp_path / "metadata.csv").open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    source = open_source(str(tmp_path))
    assert [source.read_sample(n).captions for n in range(2)] == [['a "small", red; house', "of café"], ["two", "more"]]
    assert len(source.refused) == 1
    assert "c.jpg (is not in the folder" in source.refused[0]
    assert source.others["metadata.csv"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,words\na.jpg,x\n", " line 2: needs file_name and text"),
        ('file_name,text\n"a.jpg,x\n', ", line . or before: .*: is a quotation mark left open"),
        (f"file_name,text\na.jpg,{'x' * 200_000}\n", ", line . or before: field larger than"),
        ("file_name,text\na.jpg,a house, red\n", " line 2: more fields .* put a text with ',' into quotation marks"),
        ("file_name;text\na.jpg;a house; red\n", " line 2: more fields .* put a text with ';' into quotation marks"),
    ],
)
def test_metadata_csv_that_cannot_be_read(tmp_path, text, message):
    captioned(tmp_path, "a.jpg")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=rf"metadata\.csv{message}"):
        open_source(str(tmp_path))


def test_what_is_said_of_folders_in_the_wrong_place_is_not_lost(shards, tmp_path):
    captioned(tmp_path / "10_cat", "a.jpg")
    note = "the number of 10_cat/ is not read: give the folder that it is in, or :x10"
    assert open_source(str(tmp_path / "10_cat")).note == note
    assert "is drawn 10 times" in open_source(str(tmp_path)).note
    options = CaptionFilesConfig(caption="x")
    with pytest.raises(UserError, match=r"^--caption, .* do nothing here"):
        open_mixture((str(shards),), captions=options)
    open_mixture((str(shards), str(tmp_path)), captions=options)


def test_a_run_shows_what_it_uses_and_a_caption(train, tmp_path):
    captioned(tmp_path / "data", "a.jpg", "b.tif")
    (tmp_path / "data/c.heif").touch()
    (tmp_path / "data/d.psd").touch()
    out, _ = train("--data", tmp_path / "data", "--steps", 1, "--trigger", "nrt")
    assert "data       2 images with a caption, 0 without, 2 refused; beside them 2 captions\n" in out
    assert f"data       refused {tmp_path}/data/d.psd (a document of a drawing program: export it as PNG)\n" in out
    assert "caption    nrt caption of a.jpg\n" in out
