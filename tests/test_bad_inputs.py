"""Bad input of many kinds, and its outcome: an error of one line, a sample that is left out and named, or a picture that is
used as it should be.
"""

import gzip
import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded, photograph
from PIL import Image, ImageCms
from safetensors.torch import save
from transformers import CLIPTokenizer

from common.errors import UserError
from data import Stream
from dataset.buckets import resized
from dataset.images import Decoded, fit
from dataset.latents import pack_latents
from dataset.sources import open_mixture
from model.load import BASE
from model.text import tokenize
from options.training import CaptionConfig, DataConfig

PHOTO = photograph(3, 90, 70)
JPEG, PNG = encoded(PHOTO, "JPEG"), encoded(PHOTO)
LATENTS = pack_latents(Decoded(np.zeros((8, 8, 8)), (70, 90), (0, 9)))
GOOD = ("good.jpg", JPEG), ("good.txt", b"good")
BAD = ("bad.jpg", JPEG), ("bad.txt", b"bad")
CASES = {}


def case(name: str, outcome: str, make: Callable[[Path], object], *data: str, picture=PHOTO, caption: str = "bad") -> None:
    """Registers a test case: `make` fills an empty folder, and `outcome` is what training does with it.

    An outcome is 'error' and a part of its text, or with commas between them 'skipped NAME', 'uncaptioned NAME', 'refused NAME
    (REASON)', 'cut NAME' and 'used', which means that a sample has this `caption` and the pixels of `picture`.
    `data`: the values of --data, where {} means the folder. Without any it is the folder.
    """
    assert name not in CASES
    CASES[name] = make, data or ("{}",), outcome, picture, caption


def put(folder: Path, *files: tuple[str, bytes]) -> None:
    for name, content in files:
        (folder / name).write_bytes(content)


def pack(folder: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> None:
    """Writes folder/x.tar."""
    with tarfile.open(folder / "x.tar", "w") as out:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))


# Images in a folder.


def image(name: str, outcome: str, content: bytes, extension: str = "jpg", picture: Image.Image = PHOTO) -> None:
    case(f"image: {name}", outcome, lambda folder: put(folder, *GOOD, (f"bad.{extension}", content), BAD[1]), picture=picture)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """PNG with this size in its header and these chunks added."""
    return PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"".join(chunks) + PNG[33:]


def with_exif(exif: bytes) -> bytes:
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif + JPEG[2:]


def tagged(*entries: tuple[int, int, bytes]) -> bytes:
    """JPEG with EXIF entries (tag, type, value)."""
    packed = b"".join(struct.pack(">HHI4s", tag, kind, 1, value) for tag, kind, value in entries)
    return with_exif(b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + packed + bytes(4))


def with_bad_file(path: Path, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Fills a folder with a good image and a captioned bad one, which `make` creates: not an ordinary file."""
    return lambda folder: (put(folder, *GOOD, BAD[1]), make(folder / path))


def unreadable(path: Path) -> None:
    path.touch(mode=0)
    if os.access(path, os.R_OK):  # root ignores the mode, but cannot read this file either
        path.unlink()
        path.symlink_to("/proc/self/mem")


def enormous(path: Path) -> None:
    path.touch()
    os.truncate(path, 50 * 2**30)


def swapped_colours() -> tuple[bytes, Image.Image]:
    """A palette image whose colour profile swaps red and green, and what it looks like."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"...."), (b"gXYZ", b"rXYZ"), (b"....", b"gXYZ"), ("sRGB".encode("utf-16-be"), b"\0x" * 4)):
        profile = profile.replace(old, new)
    palette = PHOTO.convert("P", palette=Image.Palette.ADAPTIVE)
    red, green, blue = PHOTO.split()
    return encoded(palette, icc_profile=profile), Image.merge("RGB", (green, red, blue))


GREY, STRIP = PHOTO.convert("L"), Image.linear_gradient("L").resize((1, 10**6))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ZEROS = zlib.compress(bytes(10**8))
SECOND_FRAME = [photograph(4, 90, 70)]
for kind, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("AVIF", "avif")):
    content, outcome = encoded(PHOTO, kind), f"skipped bad.{extension}"
    image(f"{kind} truncated in its pixels", outcome, content[: len(content) * 2 // 3], extension)
    image(f"{kind} truncated in its header", outcome, content[:20], extension)
for name, content in (
    ("empty", b""),
    ("random bytes", np.random.default_rng(0).bytes(5000)),
    ("a server's error page", b"<!DOCTYPE html><html><title>404 Not Found</title></html>"),
    ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="70"><rect width="90" height="70"/></svg>'),
    ("PostScript, which Pillow would run", encoded(PHOTO, "EPS")),
    ("PCX, which is not supported", encoded(PHOTO, "PCX")),
    ("PNG of width 0", png(0, 70)),
    ("pixel bomb", encoded(Image.new("1", (20_000, 20_000)))),
    ("PNG with an enormous size in its header", png(2**31 - 1, 2**31 - 1)),
    ("PNG with a wrong checksum", PNG[:29] + b"0000" + PNG[33:]),
    ("PNG with a text of 100 MB in a few KB", png(90, 70, chunk(b"zTXt", b"x\0\0" + ZEROS))),
):
    image(name, "skipped bad.jpg", content)
for name, content, *picture in (
    ("PNG named .jpg", PNG),
    ("PNG with too large a height in its header: black below", png(90, 75), PHOTO.crop((0, 0, 90, 75))),
    ("JPEG followed by other bytes", JPEG + PNG),
    ("animated GIF named .jpg", encoded(PHOTO, "GIF", save_all=True, append_images=SECOND_FRAME)),
    ("animated WebP named .jpg", encoded(PHOTO, "WEBP", save_all=True, append_images=SECOND_FRAME)),
    ("one pixel", encoded(PHOTO.crop((0, 0, 1, 1))), PHOTO.crop((0, 0, 1, 1))),
    ("strip of 1 × 1,000,000 pixels", encoded(STRIP), STRIP.convert("RGB")),
    ("16 bits", encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)), GREY.convert("RGB")),
    ("CMYK", encoded(PHOTO.convert("CMYK"), "JPEG")),
    ("palette with a profile", *swapped_colours()),
    ("invalid profile", encoded(PHOTO, icc_profile=b"no profile")),
    ("truncated profile", encoded(PHOTO, icc_profile=SRGB[:300])),
    ("profile of another kind of image", encoded(PHOTO.convert("CMYK"), "JPEG", icc_profile=SRGB)),
    ("invalid EXIF", with_exif(b"no EXIF at all")),
    ("empty EXIF", with_exif(b"")),
    ("EXIF with an offset beyond its end", with_exif(b"II*\0\xff\xff\xff\xff")),
    ("EXIF orientation 99", tagged((0x112, 3, b"\0\x63"))),
    ("EXIF orientation that is text", tagged((0x112, 2, b"x"))),
    ("EXIF orientation 1/0", tagged((0x112, 5, b"\0\0\0\x1a"))),
    (
        "EXIF with a number where a text belongs",
        tagged((0x10E, 11, b"????"), (0x112, 3, b"\0\x06")),
        PHOTO.transpose(Image.Transpose.ROTATE_270),
    ),
):
    image(name, "used", content, picture=(picture or [PHOTO])[0])
case("image: unreadable", "skipped bad.jpg", with_bad_file("bad.jpg", unreadable))
case(
    "image: link to nowhere",
    "refused bad.jpg (a link to nothing)",
    with_bad_file("bad.jpg", lambda path: path.symlink_to("nowhere.jpg")),
)
case(
    "image: link to itself",
    "refused bad.jpg (a link to nothing)",
    with_bad_file("bad.jpg", lambda path: path.symlink_to("bad.jpg")),
)
case("image: file of 50 GB", "skipped bad.jpg", with_bad_file("bad.jpg", enormous))
case("image: a pipe", "refused bad.jpg (no plain file)", with_bad_file("bad.jpg", os.mkfifo))
case("image: a folder", "", with_bad_file("bad.jpg", Path.mkdir))
ESCAPE = ("b\x1b[2J.jpg", b""), ("b\x1b[2J.txt", b"bad")
case("image: name that would clear the terminal", r"skipped b\x1b[2J.jpg", lambda folder: put(folder, *GOOD, *ESCAPE))
case(
    "image: name that is not UTF-8",
    "skipped b\\xff.jpg",
    lambda folder: put(folder, *GOOD, ("b\udcff.jpg", b""), ("b\udcff.txt", b"bad")),
)


# Captions, in a folder and in a shard.


def caption(name: str, text: bytes, *, expected: str | None, extension: str = "txt", refused: str = "") -> None:
    """Cases for a caption file with this `text`. `expected`: the caption that it gives, or None; `refused`: why it is."""
    captioned = BAD[0], (f"bad.{extension}", text)
    if extension == "txt":
        outcome = "uncaptioned bad.jpg" if expected is None else "used"
        outcome = f"refused bad.jpg (its caption {refused})" if refused else outcome
        case(f"caption in a folder: {name}", outcome, lambda folder: put(folder, *GOOD, *captioned), caption=expected)
    outcome = "uncaptioned x.tar:bad" if expected is None else "used"
    outcome = f"refused x.tar:bad (its caption {refused})" if refused else outcome
    case(f"caption in a shard: {name}", outcome, lambda folder: pack(folder, *GOOD, *captioned), caption=expected)


caption("empty", b"", expected=None)
caption("only spaces", b" \n\t \n", expected=None)
caption("only a byte order mark", b"\xef\xbb\xbf\n", expected=None)
caption("byte order mark", b"\xef\xbb\xbfbad", expected="bad")
caption("UTF-16, as Windows writes it", "bad".encode("utf-16"), expected="bad")
NO_CHARACTERS = "is no text: it holds control characters: save it as UTF-8"
NO_TEXT = "is neither UTF-8 nor UTF-16: save it as UTF-8"
caption("UTF-16 without a byte order mark", "bad".encode("utf-16-le"), expected="bad")
caption("UTF-16 of the other byte order, without a mark", "bad".encode("utf-16-be"), expected="bad")
caption("not UTF-8", b"bad \xff caf\xe9", expected=None, refused=NO_TEXT)
caption("UTF-16 that ends within a character", "bad".encode("utf-16")[:-1], expected=None, refused=NO_TEXT)
caption("NUL bytes", b"bad\0\0", expected=None, refused=NO_CHARACTERS)
caption("UTF-32", "bad".encode("utf-32"), expected=None, refused=NO_CHARACTERS)
caption("of 10 MB", b"bad " * 2_500_000, expected=None, refused="is larger than 1 MiB")
NO_JSON = "is no JSON object with captions or text or caption or prompt"
NO_LIST = "is neither a text nor a list of texts"
caption("truncated JSON", b'{"captions": ["bad"', expected=None, refused=NO_JSON)
caption("JSON of a number", b'{"captions": 3, "prompt": "bad"}', expected=None, refused=NO_LIST)
caption("JSON whose first key is empty", b'{"captions": [], "prompt": "bad"}', expected="bad")
caption("JSON nested 10,000 deep", b'{"captions": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", expected=None, refused=NO_JSON)
caption("JSON with captions of other types", b'{"captions": [1, null, {"a": "b"}, ""]}', expected=None)
SURROGATE = "holds control characters, or half of a surrogate pair"
caption("JSON with a lone surrogate", b'{"captions": ["bad \\ud800"]}', expected=None, refused=SURROGATE)
caption("JSON with a NUL", b'{"captions": ["bad \\u0000"]}', expected=None, refused=SURROGATE)
caption("JSON with a byte order mark", b'\xef\xbb\xbf{"captions": "bad"}', expected="bad", extension="json")
caption("JSON that is a number", b"3", expected=None, extension="json", refused=NO_JSON)
caption("JSON that is a list", b'["bad"]', expected=None, extension="json", refused=NO_JSON)
case("caption in a folder: missing", "uncaptioned bad.jpg", lambda folder: put(folder, *GOOD, BAD[0]))
case(
    "caption in a folder: unreadable",
    "refused bad.jpg (its caption cannot be read: Input/output error)",
    lambda folder: (put(folder, *GOOD, BAD[0]), unreadable(folder / "bad.txt")),
)
case("caption in a shard: missing", "uncaptioned x.tar:bad", lambda folder: pack(folder, *GOOD, BAD[0]))


# Tar files.


def members(name: str, outcome: str, *files: tuple[str | tarfile.TarInfo, bytes]) -> None:
    case(f"tar: {name}", outcome, lambda folder: pack(folder, *files))


def changed(name: str, outcome: str, change: Callable[[bytes], bytes]) -> None:
    """A case whose tar of a bad and a good sample is replaced by what `change` makes of its bytes."""

    def make(folder: Path) -> None:
        pack(folder, *BAD, *GOOD)
        put(folder, ("x.tar", change((folder / "x.tar").read_bytes())))

    case(f"tar: {name}", outcome, make)


def special(kind: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    """A bad.jpg of another type than file."""
    info = tarfile.TarInfo("bad.jpg")
    info.type, info.linkname = kind, link
    return info, b""


def resize(tar: bytes, size: bytes) -> bytes:
    """Replaces the size field of the good image, and corrects the checksum of its header."""
    header = bytearray(tar[SAMPLE : SAMPLE + 512])
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:SAMPLE] + header + tar[SAMPLE + 512 :]


def sparse(folder: Path) -> None:
    enormous(folder / "bad.jpg")
    put(folder, BAD[1])
    subprocess.run(["tar", "--sparse", "-cf", "x.tar", "bad.jpg", "bad.txt"], cwd=folder, check=True)


class Attack:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("attacked"),)


SAMPLE = 512 * (3 + -(-len(JPEG) // 512))  # bytes of a sample in a tar
REFUSED = "error 'bad.jpg', which is no plain file or leads out of it"
changed("not a tar", "error x.tar is no tar file", lambda tar: b"x" * 5000)
changed("empty", "error x.tar is no tar file", lambda tar: b"")
changed("compressed", "error x.tar is no tar file", gzip.compress)
changed("truncated", "cut x.tar, used", lambda tar: tar[: SAMPLE + 700])
changed("without its end marker", "cut x.tar, used", lambda tar: tar[: 2 * SAMPLE])
changed("damaged in the middle", "cut x.tar, used", lambda tar: tar[:SAMPLE] + b"\xff" * 512 + tar[SAMPLE + 512 :])
changed("two tars in one file", "cut x.tar, used", lambda tar: tar + tar)
changed("size of 8 GB", "cut x.tar, used", lambda tar: resize(tar, b"77777777777\0"))
changed("size of 2^80", "cut x.tar, used", lambda tar: resize(tar, b"\x80\1" + bytes(10)))
changed("negative size", "error 'good.jpg' of a size below zero", lambda tar: resize(tar, b"\xff" * 10 + b"\xfe\0"))
members("without members", "error no image with a caption there")
members("names without an extension", "error no image with a caption there", ("jpg", JPEG), ("txt", b"bad"))
members("link", REFUSED, special(tarfile.SYMTYPE, "/etc/passwd"), *GOOD)
members("hard link", REFUSED, *GOOD, special(tarfile.LNKTYPE, "good.jpg"))
members("device", REFUSED, special(tarfile.CHRTYPE), *GOOD)
members("pipe", REFUSED, special(tarfile.FIFOTYPE), *GOOD)
members("absolute name", "error '/bad.jpg', which is no plain file or leads out", ("/bad.jpg", JPEG), ("/bad.txt", b"bad"))
members("name with ..", "error 'a/../../bad.jpg', which is no plain file or leads out", ("a/../../bad.jpg", JPEG), *GOOD)
members("name twice", "error two files of the same name, 'bad.jpg': rename or remove one", *BAD, *GOOD, *BAD)
members("name twice but for its case", "error two files of the same name", *BAD, ("bad.JPG", JPEG))
members("pickles", "used", *BAD, *((f"bad.{kind}", pickle.dumps(Attack())) for kind in ("pyd", "pickle", "pth", "npy")), *GOOD)
members("image not next to its caption", "used", BAD[0], *GOOD, BAD[1])
members("name with another dot", "used", ("bad.2.jpg", JPEG), ("bad.2.txt", b"bad"), *GOOD)
members("name of 300 characters", "used", ("bad" * 100 + ".jpg", JPEG), ("bad" * 100 + ".txt", b"bad"))
members("name beyond ASCII", "used", ("büße/猫.jpg", JPEG), ("büße/猫.txt", b"bad"))
members(
    "name with terminal escapes",
    r"skipped x.tar:b\x1b]0;x\x07\n",
    ("b\x1b]0;x\7\n.jpg", b""),
    ("b\x1b]0;x\7\n.txt", b"bad"),
    *GOOD,
)
members("name that is not UTF-8", "skipped x.tar:b\\xff", ("b\udcff.jpg", b""), ("b\udcff.txt", b"bad"), *GOOD)
case("tar: sparse file of 50 GB", REFUSED, sparse)


# Folders.


def metadata(name: str, outcome: str, *lines: str) -> None:
    files = ("bad.jpg", JPEG), ("metadata.jsonl", "\n".join(lines).encode())
    case(f"metadata.jsonl: {name}", outcome, lambda folder: put(folder, *GOOD, *files))


def row(file_name: object = "bad.jpg", text: object = "bad") -> str:
    return json.dumps({"file_name": file_name, "text": text})


LINE = "error metadata.jsonl line 2: needs file_name and text"
OUTSIDE = "(is not in the folder, or is hidden)"
metadata("line that is not JSON", LINE, row(), "{file_name")
metadata("truncated line", LINE, row(), row()[:20])
metadata("line nested 100,000 deep", LINE, row(), "[" * 100_000)
metadata("line without a text", LINE, row(), '{"file_name": "bad.jpg"}')
metadata("line that is a number", LINE, row(), "3")
metadata("name that is a number", LINE, row(), row(3))
metadata(
    "name outside the folder",
    f"used, refused metadata.jsonl line 2: ../../etc/passwd.jpg {OUTSIDE}",
    row(),
    row("../../etc/passwd.jpg"),
)
metadata("absolute name", f"used, refused metadata.jsonl line 2: /etc/passwd.jpg {OUTSIDE}", row(), row("/etc/passwd.jpg"))
metadata("name with a NUL byte", rf"used, refused metadata.jsonl line 2: bad\x00.jpg {OUTSIDE}", row(), row("bad\0.jpg"))
metadata(
    "name with a lone surrogate", rf"used, refused metadata.jsonl line 2: bad\ud800.jpg {OUTSIDE}", row(), row("bad\ud800.jpg")
)
metadata("missing image", f"used, refused metadata.jsonl line 2: nowhere.jpg {OUTSIDE}", row(), row("nowhere.jpg"))
NO_TEXT_LINE = f"metadata.jsonl line 1: bad.jpg (its caption {NO_LIST})"
metadata("text of another type", f"uncaptioned bad.jpg, refused {NO_TEXT_LINE}", row(text={"a": "bad"}))
metadata("some texts of other types", "used", row(text=[1, None, "bad", ""]))
metadata(
    "byte order mark and a separator of lines", "used", "\ufeff" + row(), '{"file_name": "good.jpg", "text": "good\u2028"}'
)
case("metadata.jsonl: a folder", "", lambda folder: (put(folder, *GOOD), (folder / "metadata.jsonl").mkdir()))
case(
    "metadata.jsonl: unreadable",
    "error /data: [Errno ",
    lambda folder: (put(folder, *GOOD), unreadable(folder / "metadata.jsonl")),
)
case("folder: missing", "error nowhere does not exist", lambda folder: None, "{}/nowhere")
case("folder: empty", "error no image with a caption there", lambda folder: None)
case(
    "folder: an image instead",
    "error good.jpg is no tar file: give the folder that it is in, or .tar or .parquet files",
    lambda folder: put(folder, *GOOD),
    "{}/good.jpg",
)


# The index of shards.

REST = SAMPLE - 512, 3, 70, 90  # the end of the bad sample's entry: caption offset and bytes, height, width


def index(name: str, outcome: str, /, **fields) -> None:
    """A case whose index has one line, in which `fields` replace the right ones."""

    def make(folder: Path) -> None:
        pack(folder, *BAD, *GOOD)
        size = (folder / "x.tar").stat().st_size
        samples = [["bad", 512, len(JPEG), *REST], ["good", SAMPLE + 512, len(JPEG), 2 * SAMPLE - 512, 4, 70, 90]]
        put(folder, ("index.jsonl", json.dumps({"name": "x.tar", "bytes": size, "samples": samples, **fields}).encode()))

    case(f"index.jsonl: {name}", outcome, make)


NO_INDEX = "error index.jsonl line 1 is no line of an index"
index("as it should be", "used")
index("of a tar that has changed since", "used", bytes=9999, samples=[["other", 1, 2, 3, 4, 5, 6]])
index(
    "wrong offsets",
    "skipped x.tar:bad",
    samples=[["bad", 700, 50, *REST], ["good", 512, len(JPEG), 2 * SAMPLE - 512, 4, 70, 90]],
)
index("missing tar", "error y.tar does not exist", name="y.tar")
index("name outside the folder", NO_INDEX, name="../x.tar")
index("name that is a number", NO_INDEX, name=3)
case(
    "index.jsonl: a tar in two lines",
    "error index.jsonl line 2 is no line of an index ('x.tar' is in two lines)",
    lambda folder: (pack(folder, *GOOD), put(folder, ("index.jsonl", b'{"name": "x.tar", "bytes": 1}\n' * 2))),
)
index("negative number", NO_INDEX, samples=[["bad", -512, 3, *REST]])
index("enormous number", NO_INDEX, samples=[["bad", 512, 10**30, *REST]])
index("infinite number", NO_INDEX, samples=[["bad", float("inf"), 3, *REST]])
index("enormous picture", NO_INDEX, samples=[["bad", 512, 3, 512, 3, 10**30, 90]])
index("image beyond the end", NO_INDEX, samples=[["bad", 512, 10**15, *REST]])
index("too few numbers", NO_INDEX, samples=[["bad", 1, 2]])
index("samples that are no list", NO_INDEX, samples=7)
index("repeats of other samples", NO_INDEX, repeats=[2])
index("no repeat", NO_INDEX, repeats=[0, 2])
index("enormous repeats", NO_INDEX, repeats=[2, 10**30])
index("repeats that are no list", NO_INDEX, repeats=3)
index("uncaptioned that is no list", NO_INDEX, uncaptioned=5)
index("latents that is no boolean", "used", latents=[])
index("VAE that is no signature", NO_INDEX, vae=["x"])
case("index.jsonl: not JSON", NO_INDEX, lambda folder: (pack(folder, *GOOD), put(folder, ("index.jsonl", b"\xff\xfe{"))))
case(
    "index.jsonl: interrupted",
    "error was interrupted",
    lambda folder: (pack(folder, *GOOD), put(folder, ("x.tar.json", b"{}"))),
)


# Latents.


def latents(name: str, outcome: str, content: bytes) -> None:
    files = ("bad.safetensors", content), BAD[1], ("good.safetensors", LATENTS), GOOD[1]
    case(f"latents: {name}", outcome, lambda folder: pack(folder, *files))


def shaped(shape: object) -> bytes:
    """Latents with this shape in their header, and no data."""
    text = json.dumps({"posterior": {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]}}).encode()
    return len(text).to_bytes(8, "little") + text


def tensors(**others: torch.Tensor) -> bytes:
    valid = {"posterior": torch.zeros(8, 8, 8).half(), "original_size": torch.tensor([70, 90]), "crop": torch.tensor([0, 9])}
    return save(valid | others)


def wrong_size_in_index(folder: Path) -> None:
    """Makes a shard whose index gives the bad latents another size than they have."""
    small = tensors(posterior=torch.zeros(8, 4, 16).half())
    pack(folder, ("bad.safetensors", small), BAD[1], ("good.safetensors", LATENTS), GOOD[1])
    with tarfile.open(folder / "x.tar") as tar:
        positions = {member.name: (member.offset_data, member.size) for member in tar}
    samples = [[name, *positions[f"{name}.safetensors"], *positions[f"{name}.txt"], 64, 64] for name in ("bad", "good")]
    line = {"name": "x.tar", "bytes": (folder / "x.tar").stat().st_size, "samples": samples, "latents": True}
    put(folder, ("index.jsonl", json.dumps(line).encode()))


ONE_NAN = torch.zeros(8, 8, 8).half()
ONE_NAN[3, 2, 1] = torch.nan
latents("as they should be", "used", tensors())
latents("of another resolution", "error bad holds latents of 96 × 96 pixels", tensors(posterior=torch.zeros(8, 12, 12).half()))
for name, content in (
    ("empty", b""),
    ("truncated in their header", LATENTS[:50]),
    ("truncated in their numbers", LATENTS[:-100]),
    ("header of 2^63 bytes", (2**63).to_bytes(8, "little") + LATENTS[8:]),
    ("header nested 50,000 deep", (50_000).to_bytes(8, "little") + b"[" * 50_000),
    ("shape of texts", shaped(["a", "b", "c"])),
    ("shape that is a text", shaped("abc")),
    ("negative shape", shaped([8, -8, -8])),
    ("enormous shape", shaped([8, 10**30, 8])),
    ("shape of fractions", shaped([8, 8.5, 8.5])),
    ("NaN", tensors(posterior=ONE_NAN)),
    ("infinite", tensors(posterior=torch.full((8, 8, 8), torch.inf).half())),
    ("four channels", tensors(posterior=torch.zeros(4, 8, 8).half())),
    ("float64", tensors(posterior=torch.zeros(8, 8, 8).double())),
    ("two dimensions", tensors(posterior=torch.zeros(8, 8).half())),
    ("without a crop", save({"posterior": torch.zeros(8, 8, 8).half(), "original_size": torch.tensor([70, 90])})),
    ("crop of three numbers", tensors(crop=torch.tensor([0, 9, 9]))),
    ("crop of fractions", tensors(crop=torch.tensor([0, 0.5]))),
    ("all of a bucket damaged", tensors(posterior=torch.full((8, 4, 16), torch.nan).half())),
):
    latents(name, "skipped x.tar:bad", content)
case("latents: of another size than in the index", "skipped x.tar:bad", wrong_size_in_index)
case(
    "latents: mixed with images",
    "error both images and latents",
    lambda folder: pack(folder, ("bad.safetensors", LATENTS), BAD[1], *GOOD),
)


# --data.


def images_and_latents(folder: Path) -> None:
    """Makes a folder a of images and a folder b with a shard of latents."""
    for name in "ab":
        (folder / name).mkdir()
    put(folder / "a", *GOOD)
    pack(folder / "b", ("good.safetensors", LATENTS), GOOD[1])


for name, outcome, *data in (
    ("a command", "error pipe: is refused", "pipe:touch attacked; cat {}/b/x.tar"),
    ("open brace", "error a brace is not closed", "{}/{{000..002.tar"),
    ("braces that match no file", "error 000.tar does not exist", "{}/{{000..002}}.tar"),
    ("name of 5,000 characters", "error name too long", "x" * 5000),
    ("name with a NUL byte", "error does not exist", "{}/a\0b"),
    ("empty", "error is empty", ""),
    ("weight of zero", "error a weight must be above 0", "{}/a:0"),
    ("negative weight", "error a weight must be above 0", "{}/a:-1"),
    ("weight that is no number", "error a weight must be above 0", "{}/a:nan"),
    ("infinite weight", "error a weight must be above 0", "{}/a:1e999"),
    ("a weight for one of two", "error give all of them a weight", "{}/a:1", "{}/a"),
    ("images and latents", "error both images and latents", "{}/a:1", "{}/b:1"),
):
    case(f"--data: {name}", outcome, images_and_latents, *data)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(BASE / "tokenizer")


@pytest.fixture
def bounded(tmp_path, monkeypatch):
    """Limits a case to one more GiB of address space and ten seconds."""
    monkeypatch.chdir(tmp_path)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("took more than ten seconds"))
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_has_the_expected_outcome(name, tmp_path, tokenizer, bounded):
    make, data, outcome, picture, caption = CASES[name]
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    error = ""
    try:
        source = open_mixture(tuple(value.format(folder) for value in data))
        stream = Stream(source, DataConfig(bs=2, bucket_step=16, workers=0), CaptionConfig(), 64, 0)
        batches = list(islice(stream, 12))
    except UserError as raised:
        error = str(raised).replace(f"{folder}/", "")
    if error or outcome.startswith("error"):
        assert outcome.removeprefix("error ") in error
        return
    names = {name for batch in batches for name in batch.skipped}
    found = {"skipped": names, "uncaptioned": source.uncaptioned, "cut": source.truncated}
    refused = [f"refused {line.removeprefix(f'{folder}/')}" for line in source.refused]
    seen = {text: image.numpy() for batch in batches for text, image in zip(batch.captions, batch.images, strict=True)}
    reports = [f"{kind} {name.removeprefix(f'{folder}/')}" for kind, names in found.items() for name in names]
    if caption in seen:
        reports.append("used")
    assert ", ".join(reports + refused) == outcome
    assert seen.keys() <= {caption, "good"}
    if caption in seen and not source.has_latents:
        bucket = seen[caption].shape[:2]
        expected, _ = fit(picture, resized(picture.size[::-1], bucket), bucket, flip=False)
        assert np.abs(seen[caption].astype(float) - expected).mean() < 9
    tokenize([tokenizer], list(seen))
    " ".join(reports + refused).encode()  # raises if they cannot be printed
    assert not Path("attacked").exists()
