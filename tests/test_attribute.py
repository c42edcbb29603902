"""Which training pictures spoil a LoRA: the gradients, and whether planted pictures are found."""

import csv
import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_main
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import shake

from common.errors import UserError
from dataset.sources import DEMO, HELD_OUT, open_source
from evaluation.influence import Helped, as_csv, directions, helped, in_common, sentences_about, similarity_to
from evaluation.intervals import Interval
from evaluation.subject import Subject
from evaluation.validation import BANDS, losses_at, text_of
from lora import add_lora
from lora_files.deltas import Deltas
from options.training import LoRAConfig
from performance.checkpointing import block_names, checkpoint_blocks


@pytest.fixture(scope="module")
def tiny(tiny_model, photos):
    """(subject with a LoRA whose B is not 0, adapter, probes of three photos: the first at 20 timesteps, the others at 10)."""
    subject = Subject(str(tiny_model), "cpu", fast=False)
    adapter = add_lora(subject.denoiser, LoRAConfig(rank=2), subject.denoiser.unused)
    shake(adapter)
    stream = subject.stream(open_source(str(photos)), {"trigger": "nrt style"})
    return subject, adapter, subject.probes(stream, [0], 2 * BANDS) + subject.probes(stream, [1, 2], BANDS)


def by_autograd(probes, plain: Subject, deltas: Deltas) -> torch.Tensor:
    """The directions of the gradients in each band, [pictures, BANDS, P], through W + (α/r)·B·A as a plain weight, one timestep
    after the other. `plain`: a model without LoRA, which has one afterwards.
    """
    leaves = [factor.clone().requires_grad_() for A, B, _ in deltas.values() for factor in (A, B)]
    for (name, (_, _, alpha)), A, B in zip(deltas.items(), leaves[::2], leaves[1::2], strict=True):
        layer = plain.denoiser.get_submodule(name)
        weight = layer._parameters.pop("weight").detach()
        layer.weight = weight + alpha / len(A) * B @ A
    plain.denoiser.text_encoder.requires_grad_()  # or text is encoded without a graph
    found = []
    for probe in probes:
        rows = []
        for n in range(len(probe.timesteps)):
            text = text_of(probe, plain.denoiser, plain.device)
            loss = losses_at(probe, slice(n, n + 1), text, plain.denoiser, plain.diffusion, plain.device)[0]
            gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        bands = torch.stack(rows).unflatten(0, (BANDS, -1)).mean(dim=1)
        found.append(bands / bands.norm(dim=1, keepdim=True))
    return torch.stack(found)


def test_what_is_compared_are_the_gradients_that_autograd_finds(tiny, tiny_model):
    subject, adapter, probes = tiny
    units = by_autograd(probes, Subject(str(tiny_model), "cpu", fast=False), adapter.deltas)
    own = torch.stack(list(directions(probes[0], subject, adapter)))[:, adapter.filled()]
    torch.testing.assert_close(own, units[0], atol=2e-5, rtol=1e-3)

    common = in_common(probes[1:], subject, adapter)
    cosines = torch.einsum("nbp,mbp->nmb", units, units)  # of every two pictures
    pairs, to_held_out = cosines[1, 2], cosines[0, 1:].mean(dim=0)
    np.testing.assert_allclose(common.similarity, pairs, atol=1e-4)
    found, own = (helped(p, similarity_to(common, p, subject, adapter), common.similarity) for p in probes[:2])
    np.testing.assert_allclose(found.bands, to_held_out / pairs.mean(), atol=1e-3)
    assert found.help.mean == pytest.approx(float(to_held_out.mean() / pairs.mean()), abs=1e-3)
    assert found.help.mean == pytest.approx(np.mean(found.bands))
    assert own.help.mean > max(1.0, found.help.mean)  # it is one of the held-out ones


def test_half_precision_and_checkpointing_as_on_cuda_change_little(tiny, tiny_model):
    _, adapter, probes = tiny
    half = Subject(str(tiny_model), "cpu", fast=False)
    half.denoiser.half()
    own = add_lora(half.denoiser, LoRAConfig(rank=2), half.denoiser.unused, dtype=torch.float16)
    own.flat.copy_(adapter.flat)
    own.update_layers()
    checkpoint_blocks(half.denoiser, block_names(half.denoiser))
    pairs = zip(directions(probes[1], half, own), directions(probes[1], tiny[0], adapter), strict=True)
    assert min(float(found @ exact) for found, exact in pairs) > 0.99


def pictures(shards, count: int) -> list[tuple[Image.Image, str]]:
    source = open_source(str(shards))
    raw = [source.read_sample(n) for n in range(count)]
    return [(Image.open(io.BytesIO(one.image)).convert("RGB"), one.captions[0]) for one in raw]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """({picture: its line of the CSV}, folder) of a LoRA trained on 8 ninja pictures, 2 of another style and 2 of noise with
    captions of the ninja style, and one of the held-out ninja pictures.
    """
    folder = tmp_path_factory.mktemp("planted")
    spec = importlib.util.spec_from_file_location("demo_world", ROOT / "scripts/demo_model/demo_world.py")
    world = importlib.util.module_from_spec(spec)
    sys.modules["demo_world"] = world  # its dataclasses look there
    spec.loader.exec_module(world)
    right, held_out, rng = pictures(DEMO, 10), pictures(HELD_OUT, 3), np.random.default_rng(0)
    named = {f"right{n}": one for n, one in enumerate(right[:8])} | {"twin": held_out[0]}
    for n, (pen, (_, caption)) in enumerate(zip(("", "neon"), right[8:], strict=True)):
        scene = world.sample_scene(n)
        named[f"style{n}"] = world.draw(scene, world.BASE_PENS[pen]), world.caption(scene, "ninja", n)
        noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)
        named[f"noise{n}"] = noise, caption
    for part, content in (("data", named), ("held", {f"held{n}": one for n, one in enumerate(held_out)})):
        (folder / part).mkdir()
        for name, (image, caption) in content.items():
            image.save(folder / part / f"{name}.png")
            (folder / part / f"{name}.txt").write_text(caption)
    options = ["--bs", 2, "--steps", 32, "--workers", 0, "--no-pictures", "--validate", "none", "--device", "cpu"]
    logs = ["--out", folder / "out", "--log-dir", folder / "runs"]
    assert run_main("train_lora.py", "--data", folder / "data", *options, *logs) == 0
    command = [folder / "data", "--lora", folder / "out", "--held-out", folder / "held", "--out", folder / "influence.png"]
    assert run_main("scripts/attribute.py", *command, "--device", "cpu") == 0
    with open(folder / "influence.csv", newline="", encoding="utf-8") as file:
        return {Path(line["picture"]).stem: line for line in csv.DictReader(file)}, folder


def auroc(wrong: list[float], right: list[float]) -> float:
    """The share of the pairs in which the wrong picture helps less."""
    return float(np.mean(np.array(wrong)[:, None] < np.array(right)))


def test_planted_pictures_are_found(planted):
    helps = {name: float(line["help"]) for name, line in planted[0].items()}
    right = [x for name, x in helps.items() if name.startswith("right")]
    for kind in ("style", "noise"):
        wrong = [x for name, x in helps.items() if name.startswith(kind)]
        assert auroc(wrong, right) >= 0.8, f"{kind}: {helps}"
        assert max(wrong) < helps["twin"]
    assert list(helps.values()) == sorted(helps.values())


def test_the_sheet_and_the_table_show_every_picture(planted):
    lines, folder = planted
    assert len(lines) == 13
    first = next(iter(lines.values()))
    bands = [float(first[f"band {n}"]) for n in range(1, BANDS + 1)]
    assert np.mean(bands) == pytest.approx(float(first["help"]), abs=1e-3)
    assert float(first["low"]) < float(first["help"]) < float(first["high"])
    assert first["caption"] == (Path(first["picture"]).with_suffix(".txt")).read_text()
    with Image.open(folder / "influence.png") as sheet:
        assert sheet.size == (6 * 268, 3 * 358)


def test_what_is_advised():
    def ranked(*helps: float) -> list[Helped]:
        return [Helped(Interval(x, x - 0.1, x + 0.1), f"picture{n}", "", [x] * BANDS) for n, x in enumerate(helps)]

    lines = list(sentences_about(ranked(-0.5, *[1.0] * 30)))
    assert lines[1].split() == ["-50", "%", "(-60", "to", "-40)", "picture0"]
    assert [line.split()[-1] for line in lines[10:13]] == ["picture9", "…", "picture28"]  # ten, and the best three
    assert lines[-2].startswith("1 of 31 help less than half")
    assert lines[-1].startswith("Leave out")
    assert "by heart" in list(sentences_about(ranked(*[0.4] * 4, 1.0)))[-2]
    assert list(sentences_about(ranked(0.6, 1.0)))[-1].startswith("All help")
    assert as_csv([]).decode().startswith("picture,help,low,high,band 1,")


def test_one_held_out_picture_is_no_measure_and_neither_are_opposites(tiny):
    subject, adapter, probes = tiny
    with pytest.raises(UserError, match="two held-out pictures"):
        in_common(probes[1:2], subject, adapter)
    with pytest.raises(UserError, match="nothing in common"):
        helped(probes[1], np.ones(BANDS), np.full(BANDS, -0.1))


def table(path: Path) -> dict[str, float]:
    with open(path, newline="", encoding="utf-8") as file:
        return {line["picture"]: float(line["help"]) for line in csv.DictReader(file)}


def test_what_the_run_kept_out_is_the_measure_and_cached_latents_will_do(train, script, photos, tiny_model, tmp_path):
    folders = {part: tmp_path / part for part in ("four", "two", "others")}
    for folder, numbers in zip(folders.values(), ((0, 1, 2, 3), (0, 1), (4, 5)), strict=True):
        folder.mkdir()
        for path in (path for n in numbers for path in photos.glob(f"photo{n}.*")):
            shutil.copy(path, folder)
    train("--data", folders["four"], "--steps", 2, "--save-every", 1, "--validate", 0.5, "--validate-every", 2)
    kept_out = {probe["name"] for probe in json.loads((tmp_path / "out/record.json").read_text())["probes"]["kept_out"]}
    options = ["--lora", tmp_path / "out", "--model", tiny_model, "--device", "cpu"]
    out, _ = script("scripts/attribute.py", folders["four"], *options, "--out", tmp_path / "own.png")
    assert "2 files to" in out
    assert "2 pictures against 2 of 4 pictures, never trained on" in out
    assert set(table(tmp_path / "own.csv")) == set(open_source(str(folders["four"])).names) - kept_out

    script("scripts/cache_latents.py", folders["two"], "--out", tmp_path / "latents", "--model", tiny_model, "--device", "cpu")
    options[1] = tmp_path / "out/pytorch_lora_weights_2.safetensors"
    options += ["--held-out", folders["others"], "--out", tmp_path / "cached.png"]
    out, _ = script("scripts/attribute.py", tmp_path / "latents", *options)
    assert "careful" in out  # they are not what it was trained on
    assert "2 pictures against 2 pictures of" in out
    assert np.isfinite(list(table(tmp_path / "cached.csv").values())).all()
    with Image.open(tmp_path / "cached.png") as sheet:
        assert np.ptp(np.asarray(sheet)[20:240, 20:240]) > 20  # latents were decoded for it


def test_mistakes(train, script, shards, photos, tmp_path):
    train("--steps", 1, "--validate", "none")
    (file,) = (tmp_path / "out").glob("*.safetensors")

    def refused(*arguments) -> str:
        return script("scripts/attribute.py", *arguments, "--lora", file, "--device", "cpu", status=2)[1]

    assert "kept no pictures out" in refused(shards)
    assert "by --held-out" in refused(photos)
    assert "--held-out 0.1" in refused(shards, "--held-out", "0.1")
    assert f"--held-out {shards} holds pictures that are trained on" in refused(shards, "--held-out", shards)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    config = json.loads(metadata["sdxl_lora.config"]) | {"base_lora": ["first.safetensors 12345678:1"]}
    save_file(load_file(file), file, metadata | {"sdxl_lora.config": json.dumps(config)})
    assert "needs first.safetensors" in refused(shards)
