"""Encoded images of any kind -> upright RGB in sRGB -> the pixels of a bucket."""

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

Size = tuple[int, int]  # (height, width)

FILES = ("jpg", "jpeg", "png", "webp", "avif")  # what is taken for an image, by its extension
MOST_PIXELS = 200_000_000  # of an image before it is decoded: a file of some kilobytes can ask for all of the memory
ORIENTATION = 0x0112  # of EXIF: 1 is upright, from 5 on height and width change places
SRGB = ImageCms.createProfile("sRGB")

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns first, and once


def open_image(encoded: bytes) -> Image.Image:
    """Header only. Raises ValueError, or what Pillow raises, if it is broken or larger than MOST_PIXELS."""
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:  # Pillow's text has an address in it, another every time
        raise ValueError("no image of a known kind") from None
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels are more than the limit of {MOST_PIXELS:,}")
    return image


def upright_size(image: Image.Image) -> Size:
    """(height, width) once it is turned upright by its EXIF tag."""
    known = image.format != "PNG" or "exif" in image.info  # for a PNG Pillow would decode it all to look behind the pixels
    turned = known and image.getexif().get(ORIENTATION, 1) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """Its first frame, decoded and turned by its EXIF tag."""
    image.load()
    if image.getexif().get(ORIENTATION, 1) == 1:  # each step that changes nothing would copy the image
        return image
    return ImageOps.exif_transpose(image)


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
        return ImageCms.profileToProfile(image, given, SRGB, outputMode="RGB")
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
    if image.size != covering[::-1]:
        image = image.resize(covering[::-1], Image.Resampling.LANCZOS)
    if flip:
        image = ImageOps.mirror(image)
    top, left = ((covering[i] - bucket[i]) // 2 for i in (0, 1))
    return np.asarray(image)[top : top + bucket[0], left : left + bucket[1]], (top, left)
