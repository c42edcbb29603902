import numpy as np
import pytest
from conftest import encoded, photograph
from PIL import Image, ImageCms

from dataset.images import alpha_of, fit, open_image, to_rgb, upright_size


def opened(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    return to_rgb(open_image(encoded(image, kind, **options)))


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean difference of two pictures, in grey levels."""
    assert first.size == second.size
    return np.abs(np.asarray(first.convert("RGB"), float) - np.asarray(second.convert("RGB"), float)).mean()


PHOTO = photograph(2, 90, 60)


@pytest.mark.parametrize("turn", range(1, 9))
def test_upright_by_its_exif_tag(turn):
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose with which a camera that sets this tag stores the scene
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = PHOTO.transpose(Image.Transpose(back[turn])) if turn > 1 else PHOTO
    data = encoded(stored, "JPEG", exif=exif, quality=98)
    assert upright_size(open_image(data)) == (60, 90)
    assert difference(to_rgb(open_image(data)), PHOTO) < 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_size_is_read_without_the_pixels(kind, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = encoded(PHOTO, kind), encoded(PHOTO, kind, exif=exif)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert [upright_size(open_image(data[: 2**16])) for data in files] == [(60, 90), (90, 60)]


def test_transparency_is_put_on_white():
    clear = PHOTO.copy()
    clear.putalpha(Image.new("L", PHOTO.size, 0))
    assert (np.asarray(opened(clear)) == 255).all()
    clear.putalpha(Image.new("L", PHOTO.size, 128))
    half = Image.blend(Image.new("RGB", PHOTO.size, "white"), PHOTO, 128 / 255)
    assert difference(opened(clear), half) < 1
    palette = PHOTO.convert("P")
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    assert opened(palette).getpixel((0, 0)) == (255, 255, 255)


def test_alpha_is_read_apart_from_the_colours_under_it():
    ramp = Image.linear_gradient("L").resize(PHOTO.size)
    clear = PHOTO.copy()
    clear.putalpha(ramp)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = clear.transpose(Image.Transpose.ROTATE_90)
    grey = clear.convert("LA")
    for data in (encoded(clear), encoded(stored, exif=exif), encoded(clear, "WEBP", lossless=True, exact=True), encoded(grey)):
        image = open_image(data)
        assert difference(to_rgb(image, on_white=False), PHOTO.convert("L") if data == encoded(grey) else PHOTO) == 0
        assert difference(alpha_of(image), ramp) == 0
    palette = PHOTO.convert("P")
    palette.info["transparency"] = first = int(np.asarray(palette)[0, 0])
    image = open_image(encoded(palette))
    assert np.array_equal(np.asarray(alpha_of(image)), np.where(np.asarray(palette) == first, 0, 255))
    assert difference(to_rgb(image, on_white=False), palette) == 0
    assert (np.asarray(alpha_of(open_image(encoded(PHOTO, "JPEG")))) == 255).all()


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("LA", "PNG")])
def test_other_modes(mode, kind):
    image = PHOTO.convert(mode)
    assert difference(opened(image, kind, **({"quality": 98} if kind == "JPEG" else {})), image) < 3


def test_sixteen_bits_become_eight():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    image = opened(Image.fromarray(np.tile(ramp, (4, 1))))
    assert np.abs(np.asarray(image)[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_colours_of_another_profile_become_srgb():
    lab = ImageCms.createProfile("LAB")
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
    image = ImageCms.applyTransform(PHOTO, to_lab)
    profile = ImageCms.ImageCmsProfile(lab).tobytes()
    assert difference(opened(image, "TIFF", icc_profile=profile), PHOTO) < 2
    assert difference(opened(PHOTO, icc_profile=b"no profile"), PHOTO) == 0
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert difference(opened(PHOTO, icc_profile=srgb), PHOTO) == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    others = [photograph(i, 90, 60) for i in (3, 4)]
    options = {"lossless": True} if kind == "WEBP" else {}
    frame = opened(PHOTO, kind, save_all=True, append_images=others, **options)
    assert difference(frame, PHOTO) < (20 if kind == "GIF" else 1)


def test_a_pixel_bomb_is_refused_before_it_is_decoded():
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="20000 × 20000 pixels are more than the limit of 200,000,000"):
        open_image(bomb)


def test_an_image_of_the_right_size_is_not_resampled():
    pixels, crop = fit(PHOTO, (60, 90), (60, 80), flip=False)
    assert crop == (0, 5)
    assert np.array_equal(pixels, np.asarray(PHOTO)[:, 5:85])
    mirrored, _ = fit(PHOTO, (60, 90), (60, 90), flip=True)
    assert np.array_equal(mirrored, np.asarray(PHOTO)[:, ::-1])
