from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageFont
from test_lora import shake

from common.errors import UserError
from common.sheets import NO_CHARACTER, Lettering, drawn, grid, lettering, shorten, side_by_side, stack
from lora import add_lora
from memory import speed_up
from model.load import load_sdxl
from model.prompts import Prompt, read_prompts
from model.render import WORTH_RECORDING, Renderer
from model.sdxl import SAMPLERS, Denoiser
from model.vae import decode_latents
from options.training import CaptionConfig, CheckpointConfig, GalleryConfig, LoRAConfig
from performance.attention import KERNELS
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


@pytest.fixture
def renderer(pipe, denoiser):
    return Renderer(pipe, denoiser, partial(decode_latents, pipe.vae))


def of_diffusers(pipe, denoiser, prompt: Prompt) -> torch.Tensor:
    """The latents that diffusers' own pipeline makes of a prompt."""
    options = {"num_inference_steps": prompt.steps, "guidance_scale": prompt.guidance, "output_type": "latent"}
    options["guidance_rescale"] = prompt.guidance_rescale or 0.0
    generator = torch.Generator().manual_seed(prompt.seed)
    texts = denoiser.describe(prompt.text, prompt.negative)
    return pipe(**texts, **options, height=prompt.height, width=prompt.width, generator=generator).images


def test_a_picture_depends_on_its_own_seed_only(renderer):
    draw = renderer.draw
    three = draw(filled("a", "b", "c"))
    two = draw(filled("x", "b"))
    assert three[1] == two[1]
    assert three[0] != two[0]
    assert draw(filled("b", seed=4))[0] == three[1]
    assert three[0].size == (64, 64)


@pytest.mark.parametrize("name", ["default", *SAMPLERS])
def test_denoising_is_that_of_diffusers_bit_for_bit(pipe, denoiser, renderer, name):
    """With and without guidance, its rescale and a negative prompt, ε and v, zero terminal SNR, sizes that are not square."""
    speed_up(denoiser, KERNELS["sdpa"])
    kind = type(pipe.scheduler) if name == "default" else SAMPLERS[name]
    for prediction, zero_snr in (("epsilon", False), ("v_prediction", False), ("v_prediction", True)):
        changes = {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
        if zero_snr:
            changes["timestep_spacing"] = "trailing"
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
        for guidance, negative, rescale in ((5.0, "bad", None), (7.3, None, 0.7), (1.0, None, 1.0), (5.0, "bad", 1.0)):
            prompt = Prompt("a cat", negative, 7, 72, 104, steps=4, guidance=guidance, guidance_rescale=rescale)
            ours = renderer.denoise([prompt], [denoiser.describe(prompt.text, prompt.negative)])
            assert torch.equal(ours, of_diffusers(pipe, denoiser, prompt)), (prediction, zero_snr, guidance, rescale)
            assert ours.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_prompts_at_once_equal_one_by_one_to_rounding(pipe, denoiser, renderer, name):
    pipe.scheduler = SAMPLERS[name].from_config(pipe.scheduler.config)
    for guidance in (1.0, 5.0):
        prompts = filled("a", "b", "c", steps=4, guidance=guidance, guidance_rescale=0.7)
        texts = [denoiser.describe(prompt.text, prompt.negative) for prompt in prompts]
        alone = torch.cat([renderer.denoise([prompt], [text]) for prompt, text in zip(prompts, texts, strict=True)])
        assert (alone[0] - alone[1]).abs().max() > 0.1
        torch.testing.assert_close(renderer.denoise(prompts, texts), alone, atol=1e-3, rtol=1e-3)


def test_prompts_that_differ_are_not_drawn_together(denoiser, renderer, monkeypatch):
    """Every picture is in its own place, whatever is drawn with what; and what is alike is drawn together, in even parts."""
    settings = [{"width": 96}, {}, {"steps": 3}, {"guidance": 1.0}, {"negative": "x"}, {"guidance_rescale": 0.7}]
    prompts = [*filled(*"abc"), *(Prompt(f"d{i}", **own).filled(i, DEFAULTS) for i, own in enumerate(settings))]
    prompts.append(filled("long " * 80)[0])
    alone = renderer.draw(prompts)
    batches, denoise = [], renderer.denoise
    monkeypatch.setattr(
        renderer, "denoise", lambda some, texts: batches.append([p.text[:2] for p in some]) or denoise(some, texts)
    )
    monkeypatch.setattr(renderer, "most", dict.fromkeys(product((64 * 64, 2 * 64 * 64, 2 * 96 * 64), (64 * 64, 96 * 64)), 4))
    together = renderer.draw(prompts)
    assert batches == [["a", "b", "c"], ["d1", "d4"], ["d0"], ["d2"], ["d3"], ["d5"], ["lo"]]
    for one, other in zip(alone, together, strict=True):
        assert one.size == other.size
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize("room", [1, 2, 8])
def test_where_memory_runs_out_fewer_are_drawn_at_once(renderer, monkeypatch, room):
    prompts, sizes, denoise = filled(*"abcdefg"), [], renderer.denoise
    wanted = renderer.draw(prompts)

    def in_little_memory(some, texts):
        sizes.append(len(some))
        if len(some) > room:
            raise torch.OutOfMemoryError
        return denoise(some, texts)

    monkeypatch.setattr(renderer, "denoise", in_little_memory)
    monkeypatch.setattr(renderer, "at_once", lambda prompt: 8)
    renderer.most.clear()
    images = renderer.draw(prompts)
    assert sizes == {1: [7, 3, *[1] * 7], 2: [7, 3, 1, *[1] * 6], 8: [7]}[room]
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(images, wanted, strict=True))
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        renderer.draw(prompts)


def test_a_graph_is_recorded_where_the_unet_is_called_often(renderer, monkeypatch):
    graphed = []
    monkeypatch.setattr(renderer, "graphed", lambda inputs: graphed.append(inputs) or renderer.predict(inputs))
    steps = WORTH_RECORDING - 1
    renderer.draw(filled("a", steps=steps))
    renderer.draw(filled("a", width=96, steps=2))
    assert not graphed
    renderer.draw(filled("b", steps=3))
    assert len(graphed) == 3


def test_a_picture_that_is_not_finite_leaves_the_others(renderer, monkeypatch):
    denoise, (bad, good) = renderer.denoise, filled("a", "b")
    monkeypatch.setattr(renderer, "denoise", lambda some, texts: denoise(some, texts) * (np.nan if some == [bad] else 1))
    (_, error), (number, image) = renderer.each([bad, good])
    assert "picture 1, 'a', has values that are not finite" in str(error)
    assert (number, image.size) == (1, (64, 64))
    with pytest.raises(UserError, match="picture 2, 'a', has values"):
        renderer.draw([good, bad])


def test_render_equals_the_pipeline(pipe, renderer):
    """The same picture as diffusers' pipeline."""
    ours = renderer.draw(filled("a cat"))[0]
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(3)}
    theirs = pipe("a cat", **options).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("name", ["default", *SAMPLERS])
def test_a_model_of_zero_terminal_snr_is_sampled_from_its_last_timestep(pipe, renderer, name):
    """diffusers' own pipeline with trailing timesteps gives the same picture; a model of another schedule keeps its spacing."""
    if name != "default":
        pipe.scheduler = SAMPLERS[name].from_config(pipe.scheduler.config)
    ordinary = pipe.scheduler
    draw = partial(renderer.draw, filled("a"))
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
    plan = SimpleNamespace(oom_advice="", weights=0, predicted=2**40 - 2**26, budget=2**40)
    facts = {"pipe": pipe, "vae": pipe.vae, "device": torch.device("cpu"), "kept_on_host": [], "full_denoiser": denoiser}
    prompts = [Prompt("a", steps=2), Prompt("b", steps=2, width=96, strength=0.5)]
    model = SimpleNamespace(name="/private/model", **facts)
    forgotten, seen = [], []
    judge = SimpleNamespace(forget=lambda: forgotten.append(True))
    examiner = SimpleNamespace(record={}, judge=judge, opinion=lambda image, prompt, strength: {"strength": strength})
    examiner.prepare = lambda: None
    examiner.look = lambda image, file, opinion: seen.append(file) or opinion
    files_of = CheckpointConfig(out=tmp_path)
    gallery = Gallery(GalleryConfig(), model, adapter, prompts, 64, files_of, Ranks(0, 1), stop, plan, examiner)
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
    assert gallery.fits
    plan.predicted = plan.budget
    assert not Gallery(GalleryConfig(), model, adapter, prompts, 64, files_of, Ranks(0, 1), stop, plan, examiner).fits
    gallery.ranks = SimpleNamespace(rank=1, world=2)
    assert gallery.draw_own(8).keys() == {1}
    half = np.asarray(Image.open(tmp_path / "samples/step-000008-p2-lora.png"), int)
    with adapter.scaled(0.5):
        wanted = gallery.renderer.draw([gallery.prompts[1]])
    assert np.array_equal(half, np.asarray(wanted[0], int))


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_signal_ends_drawing_between_pictures(pipe, denoiser, tmp_path, after):
    """Of pictures before it, base and LoRA are kept together; the base, once drawn, is not drawn again."""
    adapter = add_lora(denoiser, LoRAConfig(), denoiser.unused)
    shake(adapter)
    stop, asked = SimpleNamespace(requested=False), []
    examiner = SimpleNamespace(prepare=lambda: None, opinion=lambda *_: asked.append(1) or {})
    facts = {"pipe": pipe, "vae": pipe.vae, "device": torch.device("cpu"), "kept_on_host": [], "full_denoiser": denoiser}
    model, plan = SimpleNamespace(name="m", **facts), SimpleNamespace(oom_advice="", weights=0, predicted=0, budget=2**40)
    prompts = [Prompt("a", steps=1), Prompt("b", steps=1, strength=0.5)]
    gallery = Gallery(
        GalleryConfig(), model, adapter, prompts, 64, CheckpointConfig(out=tmp_path), Ranks(0, 1), stop, plan, examiner
    )
    rendered, picture = [], gallery.renderer.picture

    def counted(latents):
        rendered.append(picture(latents))
        stop.requested = len(rendered) > after
        return rendered[-1]

    gallery.renderer.picture = counted
    drawn = gallery.draw_own(3)
    assert len(rendered) == min(after + 1, 4)
    assert drawn.keys() == {3: {0}, 4: {0, 1}}.get(after, set())
    assert all(pictures.keys() == {"base", "lora"} for pictures in drawn.values())
    stop.requested, gallery.renderer.picture = False, lambda latents: rendered.append(picture(latents)) or rendered[-1]
    before = len(rendered)
    assert gallery.draw_own(3).keys() == {0, 1}
    assert len(rendered) - before == (4 if after < 2 else 2)


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


# On a GPU.


@pytest.mark.gpu
def test_a_graph_draws_with_the_weights_as_they_are(tiny_model, monkeypatch):
    """Strengths of a LoRA that trains, a weight that is changed in place: what the graph draws is what it draws without."""
    pipe = load_sdxl(str(tiny_model), torch.float16, torch.device("cuda"))
    denoiser = Denoiser(pipe)
    adapter = add_lora(denoiser, LoRAConfig(rank=4), denoiser.unused, dtype=torch.float16)
    shake(adapter)
    speed_up(denoiser, KERNELS["sdpa"])
    graphed, eager = (Renderer(pipe, denoiser, partial(decode_latents, pipe.vae)) for _ in range(2))
    monkeypatch.setattr("model.render.WORTH_RECORDING", 1)
    eager.graphed.eager = True
    prompts, seen = filled("a", "b", "c"), []
    for strength in (1.0, 0.0, 0.5):
        with adapter.scaled(strength):
            seen.append(graphed.draw(prompts)[0])
            for one, other in zip(graphed.draw(prompts), eager.draw(prompts), strict=True):
                assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert len(graphed.graphed.graphs) == 1
    assert len({image.tobytes() for image in seen}) == 3
    pipe.unet.conv_in.weight.mul_(1.5)
    changed = graphed.draw(prompts)[0]
    assert changed.tobytes() != seen[-1].tobytes()
    assert np.abs(np.asarray(changed, int) - np.asarray(eager.draw(prompts)[0], int)).max() <= 1
    graphed.release()
    assert not graphed.graphed.graphs


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_graph_denoises_like_diffusers(tiny_model, monkeypatch, name):
    pipe = load_sdxl(str(tiny_model), torch.float16, torch.device("cuda"))
    pipe.scheduler = SAMPLERS[name].from_config(pipe.scheduler.config)
    denoiser = Denoiser(pipe)
    monkeypatch.setattr("model.render.WORTH_RECORDING", 1)
    renderer = Renderer(pipe, denoiser, partial(decode_latents, pipe.vae))
    for guidance in (1.0, 5.0):
        (prompt,) = filled("a", steps=4, guidance=guidance)
        ours = renderer.denoise([prompt], [denoiser.describe(prompt.text, prompt.negative)])
        assert renderer.graphed.graphs
        torch.testing.assert_close(ours, of_diffusers(pipe, denoiser, prompt), atol=0.02, rtol=0.02)
