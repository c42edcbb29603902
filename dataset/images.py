"""Encoded images of any kind -> upright RGB in sRGB -> the pixels of a bucket."""

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

Size = tuple[int, int]  # (height, width)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "avif")  # what is taken for an image, by its extension
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")  # what it may be by its content: PostScript would be run
MOST_PIXELS = 200_000_000  # of an image before it is decoded: a file of some kilobytes can ask for all of the memory
MOST_BYTES = 2**30  # of a file
ORIENTATION = 0x0112  # of EXIF: 1 is upright, from 5 on height and width change places
TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
TURNS |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
SRGB = ImageCms.createProfile("sRGB")

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns first, and once
Image.init()
KNOWN = [name for name in FORMATS if name in Image.OPEN]  # Pillow may have been built without AVIF


def open_image(encoded: bytes) -> Image.Image:
    """Header only. Raises ValueError, or what Pillow raises, if it is broken, none of FORMATS or larger than MOST_PIXELS."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=KNOWN)
    except UnidentifiedImageError:  # Pillow's text has an address in it, another every time
        raise ValueError("no image of a known kind") from None
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels are more than the limit of {MOST_PIXELS:,}")
    return image


def turn_of(image: Image.Image) -> int:
    """2 … 8 by its EXIF tag, else 1: also if that is damaged."""
    try:
        turn = image.getexif().get(ORIENTATION)
    except Exception:  # whatever damaged EXIF makes Pillow raise
        return 1
    return turn if turn in TURNS else 1


def upright_size(image: Image.Image) -> Size:
    """(height, width) once it is turned upright by its EXIF tag."""
    known = image.format != "PNG" or "exif" in image.info  # for a PNG Pillow would decode it all to look behind the pixels
    turned = known and turn_of(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """Its first frame, decoded and turned by its EXIF tag."""
    image.load()
    turn = turn_of(image)
    return image.transpose(TURNS[turn]) if turn > 1 else image  # each step that changes nothing would copy the image


def to_rgb(image: Image.Image, on_white: bool = True) -> Image.Image:
    """Its first frame, upright, in sRGB; 16 bits to 8. Transparency on white, or left away: the colours that lie under it."""
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
        image = image.convert("RGB") if image.mode == "P" else image  # profiles are of colours, not of their numbers
        image = to_srgb(image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def alpha_of(image: Image.Image) -> Image.Image:
    """Upright, of one channel: 0 transparent, 255 opaque, as all of an image is that has no transparency."""
    image = upright(image)
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else Image.new("L", image.size, 255)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """By its ICC profile; as it is if that is damaged or for another kind of image."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(given).lower():
            return image
        return ImageCms.profileToProfile(image, given, SRGB, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        return image


def dhash(image: Image.Image) -> str:
    """RGB -> 64 bits in hexadecimal: of 8 × 9 fields of mean brightness, which are brighter than the one to their left.

    Copies of another size, quality or brightness differ in few of them (difference hash, N. Krawetz 2013,
    hackerfactor.com/blog/?/archives/529-Kind-of-Like-That.html).
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()


def fit(image: Image.Image, covering: Size, bucket: Size, flip: bool) -> tuple[np.ndarray, Size]:
    """RGB -> pixels [h, w, 3] uint8 of the bucket, crop (top, left): resized to `covering`, cropped about the centre.

    Of one channel it is [h, w]. Mirrored, it is the crop of the mirrored image.
    """
    top, left = ((covering[i] - bucket[i]) // 2 for i in (0, 1))
    begins = (top, covering[1] - bucket[1] - left if flip else left)
    scale = (image.height / covering[0], image.width / covering[1])
    upper, first = (begins[i] * scale[i] for i in (0, 1))
    lower, last = (min((begins[i] + bucket[i]) * scale[i], (image.height, image.width)[i]) for i in (0, 1))
    if (image.height, image.width) != bucket or covering != bucket:  # else Pillow would copy it
        # Only what is kept: all of a strip, enlarged until it covers the bucket, would be gigabytes.
        image = image.resize(bucket[::-1], Image.Resampling.LANCZOS, box=(first, upper, last, lower))
    return np.asarray(ImageOps.mirror(image) if flip else image), (top, left)
