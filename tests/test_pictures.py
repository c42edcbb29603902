from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageFont
from test_lora import shake

from common.sheets import NO_CHARACTER, Lettering, drawn, grid, lettering, shorten, side_by_side, stack
from lora import add_lora
from model.prompts import Prompt, read_prompts
from model.render import render
from model.sdxl import SAMPLERS
from model.vae import decode_latents
from options.training import CaptionConfig, CheckpointConfig, GalleryConfig, LoRAConfig
from run.gallery import Gallery, prompts_to_draw
from run.ranks import Ranks

NO_LETTER = "日本語"  # not in the bundled font
DEFAULTS = Prompt("", seed=3, steps=2, guidance=5.0, width=64, height=64, strength=1.0)


def filled(*texts: str, **settings) -> list[Prompt]:
    return [Prompt(text, **settings).filled(i, DEFAULTS) for i, text in enumerate(texts)]


class Lacking:
    """A font without some letters."""

    def __init__(self, font, letters: str):
        self.font, self.letters = font, letters

    def getmask(self, text: str):
        return self.font.getmask(NO_CHARACTER if text in self.letters else text)

    def getlength(self, text: str) -> float:
        return self.font.getlength(text)


def test_a_picture_depends_on_its_own_seed_only(pipe, denoiser):
    draw = partial(render, pipe, denoiser.describe, partial(decode_latents, pipe.vae))
    three = draw(filled("a", "b", "c"))
    two = draw(filled("x", "b"))
    assert three[1] == two[1]
    assert three[0] != two[0]
    assert draw(filled("b", seed=4))[0] == three[1]
    assert three[0].size == (64, 64)


def test_render_equals_the_pipeline(pipe, denoiser):
    """`render` gives the same picture as diffusers' pipeline."""
    ours = render(pipe, denoiser.describe, partial(decode_latents, pipe.vae), filled("a cat"))[0]
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(3)}
    theirs = pipe("a cat", **options).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("name", ["default", *SAMPLERS])
def test_a_model_of_zero_terminal_snr_is_sampled_from_its_last_timestep(pipe, denoiser, name):
    """diffusers' own pipeline with trailing timesteps gives the same picture; a model of another schedule keeps its spacing."""
    if name != "default":
        pipe.scheduler = SAMPLERS[name].from_config(pipe.scheduler.config)
    ordinary = pipe.scheduler
    draw = partial(render, pipe, denoiser.describe, partial(decode_latents, pipe.vae), filled("a"))
    draw()
    assert pipe.scheduler is ordinary
    pipe.scheduler = type(ordinary).from_config(ordinary.config, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    (ours,) = draw()
    assert pipe.scheduler.timesteps[0] == 999
    pipe.scheduler = type(ordinary).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(3)}
    assert np.abs(np.asarray(ours, int) - np.asarray(pipe("a", **options).images[0], int)).max() <= 1


def test_gallery_shows_base_and_adapter(pipe, denoiser, tmp_path):
    adapter = add_lora(denoiser, LoRAConfig(), denoiser.unused)
    stop = SimpleNamespace(requested=True)
    plan = SimpleNamespace(oom_advice="", weights=0, budget=2**40)
    facts = {"pipe": pipe, "vae": pipe.vae, "device": torch.device("cpu"), "kept_on_host": [], "full_denoiser": denoiser}
    prompts = [Prompt("a", steps=2), Prompt("b", steps=2, width=96, strength=0.5)]
    model = SimpleNamespace(name="/private/model", **facts)
    forgotten, seen = [], []
    judge = SimpleNamespace(forget=lambda: forgotten.append(True))
    examiner = SimpleNamespace(record={}, judge=judge, opinion=lambda image, prompt, strength: {"strength": strength})
    examiner.prepare = lambda: None
    examiner.look = lambda image, file, opinion: seen.append(file) or opinion
    files = CheckpointConfig(out=tmp_path)
    gallery = Gallery(GalleryConfig(), model, adapter, prompts, 64, files, Ranks(0, 1), stop, plan, examiner)
    assert gallery.draw(7) == {}
    stop.requested = False
    (first, second), start = gallery.draw(7).values(), gallery.begin(0)
    assert list(start) == ["samples/p1", "samples/p2"]
    assert gallery.begin(7) == {}
    shake(adapter)
    changed = gallery.draw(8)
    middle = first.shape[1] // 2
    assert np.array_equal(first[:, : middle - 8], changed["samples/p1"][:, : middle - 8])
    assert not np.array_equal(first[:, middle + 8 :], changed["samples/p1"][:, middle + 8 :])
    assert changed["samples/p2"].shape[1] == second.shape[1] > changed["samples/p2"].shape[0]
    files = {path.name for path in (tmp_path / "samples").iterdir()}
    names = {f"step-00000{step}-p{i}-{name}.png" for step in (7, 8) for i in (1, 2) for name in ("base", "lora")}
    assert {f"samples/{name}" for name in names} <= {*seen}  # the examiner looks at each, with what it thought of it
    assert examiner.record["pictures"].keys() == {"base", "7", "8"}
    assert examiner.record["pictures"]["8"] == [{"strength": 1.0}, {"strength": 0.5}]
    assert len(forgotten) == 4  # every time the LoRA has changed
    begun = {"step-000000.png", "step-000000-p1-base.png", "step-000000-p2-base.png"}
    assert files == names | begun | {"step-000007.png", "step-000008.png"}
    parameters = Image.open(tmp_path / "samples/step-000008-p2-lora.png").info["parameters"]
    assert parameters == (
        "b <lora:pytorch_lora_weights_8:0.5>\nSteps: 2, Sampler: Euler, CFG scale: 5, Seed: 1, Size: 96x64, Model: model"
    )
    gallery.ranks = SimpleNamespace(rank=1, world=2)
    assert gallery.draw_own(8).keys() == {1}
    half = np.asarray(Image.open(tmp_path / "samples/step-000008-p2-lora.png"), int)
    with adapter.scaled(0.5):
        wanted = render(pipe, denoiser.describe, partial(decode_latents, pipe.vae), [gallery.prompts[1]])
    assert np.array_equal(half, np.asarray(wanted[0], int))


def test_sheets_hold_the_pictures(tmp_path):
    red, blue = Image.new("RGB", (128, 128), "red"), Image.new("RGB", (128, 128), "blue")
    sheet = side_by_side({"base": red, "LoRA": blue}, "a prompt " * 40)
    assert sheet.getpixel((sheet.width // 4, sheet.height // 2)) == (255, 0, 0)
    assert sheet.getpixel((3 * sheet.width // 4, sheet.height // 2)) == (0, 0, 255)
    assert np.asarray(sheet)[: sheet.height // 12].min() < 100  # there is text
    assert stack([sheet, sheet]).size == (sheet.width, 2 * sheet.height)


def test_long_prompts_are_shortened_to_the_width():
    font = ImageFont.load_default(size=16)
    assert shorten("short", 500, font) == "short"
    shortened = shorten("a very long prompt " * 20, 200, font)
    assert shortened.endswith("…")
    assert font.getlength(shortened) <= 200


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec="cp1252", categories=["Lu", "Ll", "Sm"]) | st.sampled_from("×éЖиПЩ Ωλ‘“–…€№"), min_size=1))
def test_sheets_have_the_letters_of_europe(text):
    """No letter is drawn as what stands for a missing one, whose picture all missing letters share."""
    font = lettering(16)
    for character in text.replace(" ", ""):
        assert drawn(font.font_of(character), character) != drawn(font.fonts[0], NO_CHARACTER)
    assert font.getlength(text) > 0


def test_a_letter_that_the_bundled_font_lacks_is_from_the_system(monkeypatch, capfd):
    """The other font is in the place of a CJK font, which a machine for tests need not have."""
    monkeypatch.setattr(Lettering, "warned", False)
    monkeypatch.setattr("common.sheets.SYSTEM_FONTS", ())
    alone = Lettering(16)
    assert [alone.font_of(character) for character in NO_LETTER] == [alone.fonts[0]] * len(NO_LETTER)
    assert capfd.readouterr().err.count("no font here has 日") == 1
    system = ImageFont.load_default(16)
    alone.fonts, alone.font_of = [Lacking(alone.fonts[0], "bc"), system], alone.find_font
    assert [(font is system, part) for font, part in alone.parts("abcd")] == [(False, "a"), (True, "bc"), (False, "d")]
    assert alone.getlength("abcd") == sum(font.getlength(part) for font, part in alone.parts("abcd"))


@settings(max_examples=15, deadline=None)
@given(st.text(st.sampled_from("ab ,日本\n😀") | st.characters(codec="utf-8")), st.integers(8, 400))
def test_wrapped_text_is_whole_and_fits(text, width):
    font = lettering(16)
    lines = font.wrap(text, width)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(font.getlength(line) <= width + 1 or len(line) == 1 for line in lines)


@pytest.mark.parametrize("columns", [1, 8])
def test_no_text_of_a_grid_is_cut_or_covered(columns, monkeypatch):
    """Every letter lies on white when it is written, and inside of the sheet."""
    pictures = [[Image.new("RGB", (64, 96), "red")] * columns, [Image.new("RGB", (96, 64), "red")] * columns]
    text, write, boxes = "a very long prompt, 日本語の長い文章で空白がない " * 12, Lettering.write, []

    def record(font, draw, xy, line, fill):
        before = draw._image.copy()
        write(font, draw, xy, line, fill)
        _, _, right, bottom = ImageChops.difference(before, draw._image).getbbox()
        assert right < before.width
        assert bottom < before.height
        box = (*map(int, xy), int(xy[0] + font.getlength(line)), int(xy[1] + font.fonts[0].size * 1.3))
        assert before.crop(box).getextrema() == ((255, 255),) * 3, line
        boxes.append(line)

    monkeypatch.setattr(Lettering, "write", record)
    grid(pictures, [f"column {i} {text[:90]}" for i in range(columns)], [text, "short"], text)
    assert "".join(boxes).replace(" ", "").count("".join(text.split())) == 2  # title, and label of a row


def test_sdxl_is_judged_by_the_naruto_prompts():
    assert read_prompts((), "sdxl")[0] == Prompt("Naruto Uzumaki eating ramen")
    assert len(read_prompts((), "some/folder")) == 3
    assert read_prompts(("long " * 100,), "sdxl") == [Prompt(" ".join(["long"] * 100))]


@pytest.mark.parametrize(
    ("trigger", "text", "drawn"),
    [
        ("ink", "a cat drinking", "ink a cat drinking"),
        ("ink", "Ink, a cat", "Ink, a cat"),
        ("nrt style, ", "a cat, NRT style", "a cat, NRT style"),
        ("(x", "a cat", "(x a cat"),
        ("", "a cat", "a cat"),
    ],
)
def test_a_trigger_stands_once_in_a_prompt(trigger, text, drawn):
    (prompt,) = prompts_to_draw(GalleryConfig(prompts=(text,)), CaptionConfig(trigger=trigger), "sdxl")
    assert prompt.text == drawn
