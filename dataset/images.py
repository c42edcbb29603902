"""Encoded images of any kind -> upright RGB in sRGB -> the pixels of a bucket."""

import io
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

Size = tuple[int, int]  # (height, width)


class Decoded(NamedTuple):
    """What training needs of one image."""

    values: np.ndarray  # pixels [h, w, 3] uint8, or of cached latents the posterior [8, h/8, w/8] float16
    original: Size  # of the upright image
    crop: tuple[int, int]  # (top, left) in the resized image
    mask: np.ndarray | None = None  # loss mask [h/8, w/8] uint8


# Extensions of files that are read as images; in a shard, the first of them that a sample has.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "avif", "jfif", "jpe", "bmp", "dib", "tif", "tiff", "gif", "apng")
UNREAD = {  # other extensions that are named, with the reason why they are not read
    suffix: reason
    for suffixes, reason in (
        ("heic heif hif", "HEIF: pip install -r requirements-heif.txt reads it"),
        ("jxl", "JPEG XL: make a PNG of it, for example with djxl"),
        ("jp2 j2k jpf jpx jpm", "JPEG 2000: save it as PNG"),
        ("psd psb xcf kra ai svg eps pdf", "a document of a drawing program: export it as PNG"),
        ("cr2 cr3 nef arw dng orf rw2 raf", "a camera's raw data: develop it as JPEG, PNG or TIFF"),
        ("tga pcx ppm pgm pbm pnm exr hdr ico dds qoi jxr wdp", "not read: save it as PNG"),
        ("mp4 mov mkv webm avi", "a film: save its frames as images"),
        ("gz tgz bz2 xz zst zip 7z rar", "compressed: unpack it"),
        ("csv", "not read: write its rows into a metadata.jsonl with file_name and text"),
    )
    for suffix in suffixes.split()
}
FIRST_BYTES = {  # of a file whose extension is none of these -> what it is
    rb"....ftyp(hei|hev|mif|msf)": UNREAD["heic"],
    rb"\xff\x0a|\0\0\0\x0cJXL ": UNREAD["jxl"],
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": UNREAD["jp2"],
    rb"8BPS|%PDF|%!PS": UNREAD["psd"],
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|PK\x03\x04|Rar!|7z\xbc\xaf": UNREAD["zip"],
    rb"version https://git-lfs": "a pointer of Git LFS, not the file itself: run git lfs pull",
    rb"\s*<": "a web page or SVG, no file of pixels",
}
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "HEIF")  # no others: Pillow would run PostScript
HEAD = 2**16  # bytes from the start of an image that usually include its size, and from its end that may turn a PNG
MOST_PIXELS = 200_000_000  # an image may have: a file of some kilobytes can decode to more than the memory holds
MOST_BYTES = 2**30  # a file may have
ORIENTATION = 0x0112  # EXIF tag: 1 is upright, from 5 on height and width are swapped
TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
TURNS |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
TURN_KEY = "turn"  # in `info` of an opened image: the EXIF orientation by which it has to be turned once it is loaded
SIZE_KEY = "upright size"
LATE = re.compile(rb"eXIf|iTXt|zTXt|tEXt")  # chunks of a PNG that may turn it, and may be behind its pixels
SRGB = ImageCms.createProfile("sRGB")

Image.MAX_IMAGE_PIXELS = None  # checked by `open_image`: Pillow would only warn, up to twice its limit
Image.init()
with suppress(ImportError):  # requirements-heif.txt
    from pillow_heif import register_heif_opener

    register_heif_opener()
    IMAGE_SUFFIXES = (*IMAGE_SUFFIXES, "heic", "heif", "hif")  # type: ignore[assignment]
KNOWN = [name for name in FORMATS if name in Image.OPEN]  # Pillow may have been built without AVIF


def open_image(encoded: bytes) -> Image.Image:
    """Reads the header only. Raises ValueError, or what Pillow raises, if it is broken, not in FORMATS or too large."""
    try:
        image = Image.open(io.BytesIO(late_chunks_first(encoded)), formats=KNOWN)
    except UnidentifiedImageError:  # Pillow's text has a memory address in it, which differs every time
        raise ValueError(kind_of(encoded) or "no image of a known kind") from None
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("pixels of more than 16 bits, whose white is unknown: save it with 8 or 16")
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels are more than the limit of {MOST_PIXELS:,}")
    note_turn(image)
    return image


def kind_of(encoded: bytes) -> str | None:
    """What a file is by its first bytes, and what to do, if it is of a known kind that is not read."""
    return next((kind for first, kind in FIRST_BYTES.items() if re.match(first, encoded, re.DOTALL)), None)


def late_chunks_first(encoded: bytes) -> bytes:
    """A PNG whose EXIF and XMP come before its pixels, if they are in its last HEAD bytes: Pillow then finds them undecoded."""
    if not encoded.startswith(b"\x89PNG"):  # first: to search a large JPEG takes time
        return encoded
    pixels, begin = encoded.find(b"IDAT") - 4, max(0, len(encoded) - HEAD)
    if pixels < 0:
        return encoded
    late = []
    for found in LATE.finditer(encoded, max(begin, pixels) + 4):
        at, end = found.start() - 4, found.end() + int.from_bytes(encoded[found.start() - 4 : found.start()])
        if zlib.crc32(encoded[at + 4 : end]) == int.from_bytes(encoded[end : end + 4]) and end + 4 <= len(encoded):
            late.append(encoded[at : end + 4])
    return encoded[:pixels] + b"".join(late) + encoded[pixels:] if late else encoded


def note_turn(image: Image.Image) -> None:
    """Finds once, before the pixels are loaded, what turns an image upright: the survey and the decoder both go by it."""
    turn = 1
    with suppress(Exception):  # whatever damaged EXIF makes Pillow raise
        found = Image.Image.getexif(image).get(ORIENTATION)  # of EXIF or XMP; PngImageFile's own would decode the image
        turn = found if found in TURNS else 1
    tag = getattr(image, "tag_v2", {}).get(ORIENTATION)  # of a TIFF, whose size Pillow has turned already if this says so
    swapped = turn >= 5 and tag not in TURNS
    image.info[SIZE_KEY] = (image.width, image.height) if swapped else (image.height, image.width)
    image.info[TURN_KEY] = 1 if image.format == "TIFF" else turn  # Pillow turns a TIFF while it loads it


def upright_size(image: Image.Image) -> Size:
    """(height, width) of an image from `open_image`, once it is turned upright by its EXIF or XMP."""
    return image.info[SIZE_KEY]


def upright(image: Image.Image) -> Image.Image:
    """The first frame of an image from `open_image`, decoded and turned upright by its EXIF or XMP."""
    turn = image.info[TURN_KEY]
    image.load()
    return image.transpose(TURNS[turn]) if turn > 1 else image  # transpose would copy an upright image too


def survey_size(read: Callable[[int, int], bytes], size: int) -> Size:
    """Upright (height, width) of an image of `size` bytes, whose parts `read(offset, bytes)` gives: of as few as will do.
    (0, 0) if it cannot be read.
    """
    head = read(0, min(size, HEAD))
    if head.startswith(b"\x89PNG") and size > HEAD:
        head += read(max(HEAD, size - HEAD), HEAD)
    if size <= HEAD or not head.startswith((b"II", b"MM")):  # the tags of a TIFF may be anywhere
        with suppress(Exception):  # whatever a broken file makes Pillow raise
            return upright_size(open_image(head))
    whole = read(0, size) if size > HEAD else b""
    with suppress(Exception):
        return upright_size(open_image(whole))
    return 0, 0


def to_rgb(image: Image.Image, on_white: bool = True) -> Image.Image:
    """The first frame, upright, in 8-bit sRGB. Transparency is put on white or, without `on_white`, dropped: colours stay."""
    image = upright(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if on_white:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if profile:
        image = image.convert("RGB") if image.mode == "P" else image  # a profile applies to colours, not to palette indices
        image = to_srgb(image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def alpha_of(image: Image.Image) -> Image.Image:
    """The alpha channel of the first frame, upright: 0 transparent, 255 opaque. An image without transparency is opaque."""
    image = upright(image)
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else Image.new("L", image.size, 255)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts the image by its ICC profile; returns it as it is if the profile is damaged or for another kind of image."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        return ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        return image


def dhash(image: Image.Image) -> str:
    """RGB -> 64 bits in hexadecimal: whether each of 8 × 8 fields is brighter than the field to its left, by mean brightness.

    Copies of another size, quality or brightness differ in few bits (difference hash, N. Krawetz 2013,
    hackerfactor.com/blog/?/archives/529-Kind-of-Like-That.html).
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()


def fit(image: Image.Image, covering: Size, bucket: Size, flip: bool) -> tuple[np.ndarray, Size]:
    """Resizes to `covering` and crops the centre -> (pixels [h, w, 3] uint8 of the bucket, crop (top, left)).

    An image of one channel gives [h, w]. With `flip` it is the crop of the mirrored image.
    """
    top, left = ((covering[i] - bucket[i]) // 2 for i in (0, 1))
    begins = (top, covering[1] - bucket[1] - left if flip else left)
    scale = (image.height / covering[0], image.width / covering[1])
    upper, first = (begins[i] * scale[i] for i in (0, 1))
    lower, last = (min((begins[i] + bucket[i]) * scale[i], (image.height, image.width)[i]) for i in (0, 1))
    if (image.height, image.width) != bucket or covering != bucket:  # an image of that size would only be copied
        # Only the crop is resized: a long strip, enlarged as a whole until it covers the bucket, would take gigabytes.
        image = image.resize(bucket[::-1], Image.Resampling.LANCZOS, box=(first, upper, last, lower))
    return np.asarray(ImageOps.mirror(image) if flip else image), (top, left)
