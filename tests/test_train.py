import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_ranks import gradient_and_step

import data
import formats
import pictures
from captions import CaptionConfig
from data import DataConfig
from lora import LoRAConfig, layer_shapes
from memory import MemoryConfig
from sdxl import Denoiser, read_sdxl
from shards import pack_latents
from sources import open_source
from train_lora import Meter, TrainConfig, lr_factor, plan_memory


@pytest.fixture
def train(script, tiny_model, shards, tmp_path, monkeypatch):
    """train("--steps", 4) runs the training script on the tiny model; files go to a fresh folder."""
    draw = pictures.render  # three pictures of 20 steps would take most of a test's time
    monkeypatch.setattr("pictures.NARUTO_PROMPTS", ["one picture a save is enough"])
    monkeypatch.setattr("pictures.render", lambda *given, **how: draw(*given, **{**how, "steps": 2}))
    base = ["--model", tiny_model, "--rank", 2, "--bs", 2, "--workers", 0, "--device", "cpu"]
    base += ["--out", tmp_path / "out", "--log-dir", tmp_path / "runs"]

    def call(*options, **how):
        data = [] if "--data" in options else ["--data", shards]
        return script("train_lora.py", *base, *data, *options, **how)

    return call


def weights(folder, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"pytorch_lora_weights_{step}.safetensors")


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def last(folder, scalar: str) -> float:
    """The newest value of a scalar in the TensorBoard log below `folder`."""
    (events,) = folder.iterdir()
    return EventAccumulator(str(events)).Reload().Scalars(scalar)[-1].value


def test_a_run_writes_what_it_says(train, tiny_model, shards, tmp_path):
    out, err = train("--steps", 7, "--save-every", 3, "--keep", 2)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == ["pytorch_lora_weights_6.safetensors", "pytorch_lora_weights_7.safetensors"]
    predicted = float(re.search(r"weights_7\.safetensors, ([\d.]+) MB", out)[1])
    assert abs(os.path.getsize(tmp_path / "out" / files[1]) / 1e6 - predicted) < 0.02
    tensors = weights(tmp_path / "out", 7)
    trained = sum(t.numel() for key, t in tensors.items() if key.endswith("weight"))
    assert f"rank 2 on {len(tensors) // 3} layers, {trained:,} parameters trained" in out
    assert "7 images with a caption" in out
    assert "device     cpu, fp32, sdpa attention, every kernel launched" in out
    assert re.search(
        r"memory     [\d.]+ GiB for tensors: 0 of \d\d blocks checkpointed, fp32 base, batch in one piece; predicted", out
    )
    assert re.search(r"memory     measured peak [\d.]+ GiB", out + err)
    assert "7/7" in err
    assert "loss=" in err

    told = formats.read_metadata(tmp_path / "out" / files[1])
    assert told["sdxl_lora.dataset"] == open_source(str(shards)).fingerprint
    config = json.loads(told["sdxl_lora.config"])
    resolved = {"rank": 2, "alpha": 2, "resolution": 64, "lr": 1e-4, "text_encoder_lr": 1e-4, "precision": "fp32"}
    assert config.items() >= {**resolved, "attention": "sdpa", "steps": 7, "model": str(tiny_model)}.items()
    (events,) = (tmp_path / "runs").iterdir()
    log = EventAccumulator(str(events)).Reload()
    wanted = {
        "loss",
        "grad_norm",
        "images_per_second",
        "waiting_for_data",
        "peak_memory_GiB",
        "peak_reserved_GiB",
        "lr/unet",
        "lr/text_encoder",
        "loss_scale",
    }
    assert wanted <= set(log.Tags()["scalars"])
    assert [event.step for event in log.Images("compare")] == [3, 6, 7]
    assert "config/text_summary" in log.Tags()["tensors"]


def test_training_on_shards_lowers_the_held_out_loss(train, script, tmp_path):
    """The bundled model and data: 48 pictures in shards for training, 16 others for the loss."""
    train("--model", "demo", "--data", "demo", "--steps", 25, "--bs", 3, "--rank", 8)
    out, _ = script("scripts/evaluate.py", "--lora", tmp_path / "out", "--timesteps", 4, "--pictures", 2, "--device", "cpu")
    base, tuned = map(float, re.search(r"base ([\d.]+)   LoRA ([\d.]+)", out).groups())
    assert tuned < 0.9 * base
    assert re.search(r"colours  base 0\.\d+   LoRA 0\.\d+", out)


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw8bit", "fp32"), ("adamw", "bf16")])
def test_a_resumed_run_ends_as_one_that_never_stopped(train, tmp_path, optimizer, precision):
    """Bit for bit: weights, optimiser state, data position, flips, dropout, noise."""
    how = ["--grad-accum", 2, "--flip", "--caption-dropout", 0.3, "--warmup", 2, "--optimizer", optimizer, "--workers", 2]
    how += ["--precision", precision]
    train("--steps", 6, *how)
    train("--steps", 3, *how, "--out", tmp_path / "halves")
    out, err = train("--steps", 6, *how, "--out", tmp_path / "halves")
    assert "3/6" in err  # it went on from there
    assert equal(weights(tmp_path / "halves", 6), weights(tmp_path / "out", 6))
    assert not equal(weights(tmp_path / "halves", 3), weights(tmp_path / "out", 6))
    out, _ = train("--steps", 6, *how, "--out", tmp_path / "halves")
    assert "is at step 6 already" in out


def test_both_layouts_hold_the_same_weights(train, tiny_model, tmp_path):
    train("--steps", 5, "--save-every", 2, "--keep", 2, "--format", "both", "--save-dtype", "fp32", "--lr", 1e-2)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    wanted = [f"pytorch_lora_weights_{step}{suffix}.safetensors" for step in (4, 5) for suffix in ("", "_diffusers")]
    assert names == sorted(wanted)
    shapes = layer_shapes(Denoiser(read_sdxl(str(tiny_model), torch.float32)))
    kohya, diffusers = (formats.read(tmp_path / "out" / name, shapes) for name in wanted[2:])
    assert formats.largest_difference(kohya, diffusers) == 0
    assert any(B.any() for _, B, _ in kohya.values())
    assert last(tmp_path / "runs", "largest_error_of_the_file") == 0  # in float32


def test_a_file_that_reads_back_wrong_is_not_kept(train, tmp_path, monkeypatch):
    train("--steps", 1)
    before = (tmp_path / "out/pytorch_lora_weights_1.safetensors").read_bytes()
    honest = formats.serialise
    wrong = lambda deltas, *rest: honest({p: (A, B + 0.01, alpha) for p, (A, B, alpha) in deltas.items()}, *rest)  # noqa: E731
    monkeypatch.setattr(formats, "serialise", wrong)
    _, err = train("--steps", 1, "--resume", "none", status=2)
    assert "the LoRA file read back differs from the weights by 0.01, so the last one was kept" in err
    assert (tmp_path / "out/pytorch_lora_weights_1.safetensors").read_bytes() == before


def test_a_state_of_another_adapter_is_refused(train, tmp_path):
    train("--steps", 1)
    _, err = train("--steps", 2, "--rank", 4, status=2)
    assert "the saved state was made with --rank 2, --alpha 2.0: use that, or --resume none" in err
    _, err = train("--steps", 2, "--optimizer", "adamw", "--alpha", 1, status=2)
    assert "made with --alpha 2.0, --optimizer adamw8bit" in err
    train("--steps", 2, "--rank", 4, "--resume", "none")
    train("--steps", 3, "--rank", 4, "--precision", "fp16")  # precision may change: the scaler starts anew


def test_going_on_elsewhere_leaves_the_first_run_alone(train, tmp_path):
    train("--steps", 2, "--save-every", 1)
    train("--steps", 4, "--save-every", 1, "--keep", 1, "--resume", tmp_path / "out", "--out", tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").glob("*.safetensors")) == ["pytorch_lora_weights_4.safetensors"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    torch.save({"a": 1}, tmp_path / "foreign.pt")
    _, err = train("--resume", tmp_path / "foreign.pt", status=2)
    assert "no state of train_lora.py" in err


def test_weights_that_are_not_finite_are_never_written(train, tmp_path):
    _, err = train("--steps", 3, "--lr", 1e30, status=2)
    assert "is not finite in float16, so no file was written" in err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_learning_rates(train, tmp_path):
    factor = {name: [lr_factor(s, TrainConfig(lr_schedule=name, warmup=4, steps=24)) for s in range(24)] for name in
              ("constant", "cosine", "linear")}  # fmt: skip
    assert all(f[:4] == [0.2, 0.4, 0.6, 0.8] and f[4] == 1 for f in factor.values())
    assert set(factor["constant"][4:]) == {1.0}
    assert factor["linear"][14] == factor["cosine"][14] == pytest.approx(0.5)
    assert factor["linear"][23] == pytest.approx(0.05)
    train("--steps", 2, "--text-encoder-lr", 0, "--lr", 1e-2)
    ups = {key: t.any() for key, t in weights(tmp_path / "out", 2).items() if "lora_up" in key}
    assert {key for key, moved in ups.items() if not moved} == {key for key in ups if "lora_te" in key}


def test_other_choices_train(train, tmp_path):
    train("--steps", 2, "--no-train-text-encoder", "--targets", "all", "--checkpointing", "all", "--snr-gamma", 5)
    keys = weights(tmp_path / "out", 2).keys()
    assert any("ff_net" in key for key in keys)
    assert not any("lora_te" in key for key in keys)
    train("--steps", 2, "--precision", "bf16", "--resolution", 96, "--targets", r"attn2\.to_[kv]", "--out", tmp_path / "b")
    assert {re.search(r"attn2_to_[kv]", key) is None for key in weights(tmp_path / "b", 2)} == {False}


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_packed_base_trains_and_merges_into_the_unpacked_one(train, script, tiny_model, tmp_path, base):
    out, _ = train("--steps", 2, "--base-precision", base, "--targets", "all")
    assert f", {base} base, " in out
    config = json.loads(formats.read_metadata(tmp_path / "out/pytorch_lora_weights_2.safetensors")["sdxl_lora.config"])
    assert (config["precision"], config["base_precision"]) == ("fp32", base)
    out, _ = script("infer.py", "--lora", tmp_path / "out", "--steps", 2, "--out", tmp_path / "images", "--prompts", "x")
    assert "layers, strength 1" in out


@pytest.fixture
def latents(tmp_path):
    """A shard of three ready-made latents."""
    with wds.TarWriter(str(tmp_path / "latents.tar")) as tar:
        for i in range(3):
            posterior = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(i)).abs()
            tar.write({"__key__": f"{i}", "safetensors": pack_latents(posterior, (64, 64), (0, 0)), "txt": "a picture"})
    return tmp_path / "latents.tar"


def test_ready_made_latents_train_without_the_vae(train, latents, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.AutoencoderKL.encode", None)
    train("--data", latents, "--steps", 2)
    assert weights(tmp_path / "out", 2)
    _, err = train("--data", latents, "--flip", "--out", tmp_path / "b", status=2)
    assert err.startswith("train_lora.py: --flip: these latents are not there of the mirrored images")
    assert not (tmp_path / "b").exists()


def test_the_masked_loss_from_images_and_from_latents(train, script, tiny_model, cutouts, latents, tmp_path):
    how, ran = ["--steps", 2, "--bs", 2, "--bucket-step", 16, "--flip", "--lr", 1e-2], {}

    def run(name: str, data, *options):
        train("--data", data, *how, "--out", tmp_path / name, "--log-dir", tmp_path / name / "runs", *options)
        ran[name] = weights(tmp_path / name, 2)

    run("images", cutouts, "--masked-loss")
    cached = ["--model", tiny_model, "--device", "cpu", "--bucket-step", 16, "--flip", "--out", tmp_path / "cached"]
    script("scripts/cache.py", cutouts, *cached, "--masked-loss")
    run("cached", tmp_path / "cached", "--masked-loss")
    assert last(tmp_path / "cached/runs", "loss") == pytest.approx(last(tmp_path / "images/runs", "loss"), rel=1e-3)
    run("ignored", tmp_path / "cached")
    assert not equal(ran["cached"], ran["ignored"])
    _, err = train("--data", latents, "--masked-loss", "--out", tmp_path / "b", status=2)
    assert err == (
        "train_lora.py: --masked-loss: these latents were made without masks: make them anew with cache.py --masked-loss\n"
    )
    assert not (tmp_path / "b").exists()


def test_latents_give_the_loss_curve_of_their_images(train, script, tiny_model, photos, tmp_path, monkeypatch):
    """But for what float16 takes: 2e-6 of the loss. One pixel aside would be 3e-4, deviations of 0.9 times 6e-4, none 1e-2."""
    bucketed = "--bucket-step", 16, "--flip"
    script("scripts/cache.py", photos, "--model", tiny_model, "--device", "cpu", *bucketed, "--out", tmp_path / "latents")

    def curve(name: str, pictures) -> np.ndarray:
        where = "--out", tmp_path / name, "--log-dir", tmp_path / name / "runs"
        train("--data", pictures, "--steps", 20, "--lr", 1e-3, *bucketed, *where)
        (events,) = (tmp_path / name / "runs").iterdir()
        return np.array([scalar.value for scalar in EventAccumulator(str(events)).Reload().Scalars("loss")])

    images, cached = curve("images", photos), curve("cached", tmp_path / "latents")
    assert len(images) == 2
    np.testing.assert_allclose(cached, images, rtol=2e-5)
    fit = data.fit
    monkeypatch.setattr("data.fit", lambda *how: (np.roll(fit(*how)[0], 1, axis=1), fit(*how)[1]))
    assert np.abs(curve("aside", photos) / images - 1).max() > 1e-4  # this would be seen


def test_all_masked_and_nothing_masked(train, photos, tmp_path):
    """Opaque images train bit for bit as without masks; of transparent ones nothing is learned, and nothing breaks."""
    train("--data", photos, "--steps", 2)
    train("--data", photos, "--steps", 2, "--masked-loss", "--out", tmp_path / "b")
    assert equal(weights(tmp_path / "out", 2), weights(tmp_path / "b", 2))
    Image.new("RGBA", (64, 64), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    (tmp_path / "clear.txt").write_text("nothing to be seen")
    train("--data", tmp_path, "--steps", 2, "--masked-loss", "--lr", 1e-2, "--out", tmp_path / "c")
    ups = [t for key, t in weights(tmp_path / "c", 2).items() if "lora_up" in key]
    assert ups
    assert not any(t.any() for t in ups)


def test_latents_of_another_vae_are_refused(train, script, tiny_model, shards, tmp_path):
    how = ["--device", "cpu", "--model"]
    script("scripts/cache.py", shards, "--out", tmp_path / "ours", *how, tiny_model)
    for precision in ("fp32", "fp16"):  # what the files lose in it does not count
        train("--data", tmp_path / "ours", "--steps", 1, "--precision", precision, "--out", tmp_path / precision)
    other = shutil.copytree(tiny_model, tmp_path / "model")
    file = next((other / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    save_file({key: 1.1 * t if key.startswith("quant_conv") else t for key, t in tensors.items()}, file)
    script("scripts/cache.py", shards, "--out", tmp_path / "theirs", *how, other)
    _, err = train("--data", tmp_path / "theirs", "--steps", 1, "--out", tmp_path / "b", status=2)
    assert err == f"train_lora.py: --data: these latents were made by another VAE than that of --model {tiny_model}\n"
    assert not (tmp_path / "b").exists()
    _, err = train("--data", tmp_path / "theirs", "--data", tmp_path / "ours", "--out", tmp_path / "b", status=2)
    assert err.endswith("these latents were made by several VAEs\n")
    tensors["quant_conv.weight"] *= float("inf")
    save_file(tensors, file)
    out, _ = script("scripts/cache.py", shards, "--out", tmp_path / "none", *how, other)
    assert "encoded 0 images into 0 shards" in out
    assert out.count("(its latents are not finite in float16)") == 7


def test_buckets_of_several_shapes_train_and_go_on_bit_for_bit(train, tmp_path):
    how = ["--bucket-step", 16, "--flip", "--caption-dropout", 0.2, "--workers", 2]
    out, _ = train(*how, "--steps", 6)
    assert re.search(r"^buckets    [2-5] of 5 buckets, [\d.]+% of the images cropped away, none enlarged$", out, re.M)
    train(*how, "--steps", 3, "--out", tmp_path / "b")
    train(*how, "--steps", 6, "--out", tmp_path / "b")
    assert equal(weights(tmp_path / "out", 6), weights(tmp_path / "b", 6))


def test_long_captions_are_cut_and_counted_or_told_in_chunks(train, photos, tiny_model, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo0.txt").write_text("a " * 100)
    (folder / "photo1.txt").write_text("a " * 80)
    how = ["--data", folder, "--bs", 1, "--steps", 7, "--no-buckets"]
    out, _ = train(*how)
    assert "28.6% of the captions have more than --max-tokens 75 and were cut, by up to 25 tokens" in out
    out, _ = train(*how, "--max-tokens", 150, "--out", tmp_path / "b")
    assert "of the captions" not in out
    assert not equal(weights(tmp_path / "out", 7), weights(tmp_path / "b", 7))
    train("--steps", 1, "--out", tmp_path / "c")
    train("--steps", 1, "--out", tmp_path / "d", "--max-tokens", 225)
    assert equal(weights(tmp_path / "c", 1), weights(tmp_path / "d", 1))  # every caption fits into one chunk
    config = TrainConfig(captions=CaptionConfig(max_tokens=225))
    pipe = read_sdxl(str(tiny_model), torch.float32)
    plan, shapes = plan_memory(config, pipe, 64, True, "fp32", torch.device("cpu"), 2**34)
    assert {k[1] for q, k in shapes if k[1] != q[1]} == {3 * 77}  # the memory for the longest
    assert plan.predicted > plan_memory(TrainConfig(), pipe, 64, True, "fp32", torch.device("cpu"), 2**34)[0].predicted


def test_waiting_for_data_is_told_with_what_to_do(train, tmp_path, monkeypatch):
    meter = Meter(torch.device("cpu"))
    for shares, told in (([], False), ([0.9], False), ([0.9, 0.04, 0.05], False), ([0.0, 0.05, 0.06], True)):
        meter.shares = shares
        assert bool(meter.advice()) == told  # the first reading holds the start of the workers
    choose = data.choose_caption
    monkeypatch.setattr("data.choose_caption", lambda *given: time.sleep(0.05) or choose(*given))
    out, _ = train("--steps", 12, "--save-every", 12)
    assert re.search(r"^waiting for data took [1-9]\d% of the time: more --workers, or latents", out, re.M)
    assert last(tmp_path / "runs", "waiting_for_data") > 0.1


def test_a_batch_in_pieces_is_the_same_run(train, latents, tiny_model, tmp_path):
    """A budget just too small for the whole batch: one image at a time, and the same weights but for rounding."""
    memory = MemoryConfig(checkpointing="none", optimizer="adamw")
    config = TrainConfig(lora=LoRAConfig(rank=2), dataset=DataConfig(bs=2), memory=memory)
    pipe = read_sdxl(str(tiny_model), torch.float32)
    whole, _ = plan_memory(config, pipe, 64, True, "fp32", torch.device("cpu"), 2**34)
    how = ["--data", latents, "--steps", 2, "--checkpointing", "none", "--optimizer", "adamw"]
    short = f"{(whole.predicted - 1) / 2**30:.12f}"
    out, _ = train(*how, "--log-dir", tmp_path / "whole")
    assert "batch in one piece" in out
    out, _ = train(*how, "--vram-gb", short, "--out", tmp_path / "b", "--log-dir", tmp_path / "pieces")
    assert "batch in 2 pieces" in out
    train(*how, "--bs", 1, "--grad-accum", 2, "--out", tmp_path / "c", "--log-dir", tmp_path / "accumulated")
    for scalar in ("loss", "grad_norm"):
        wanted = last(tmp_path / "whole", scalar)
        assert last(tmp_path / "pieces", scalar) == pytest.approx(wanted, rel=1e-4)
        assert last(tmp_path / "accumulated", scalar) == pytest.approx(wanted, rel=0.7)  # of other noise
    one, other = weights(tmp_path / "out", 2), weights(tmp_path / "b", 2)
    assert any(t.any() for key, t in one.items() if "lora_up" in key)
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, atol=1e-4, rtol=1e-2)


def test_fp16_with_a_grad_scaler(train, tmp_path):
    """The recipe's precision, on the CPU: the scaler's first steps may overflow, LoRA weights stay float32 and finite."""
    train("--steps", 3, "--precision", "fp16")
    state = torch.load(tmp_path / "out/state/state.pt", weights_only=True)
    assert state["lora"].dtype == torch.float32
    assert state["lora"].isfinite().all()
    assert state["scaler"]["scale"] > 0


def test_broken_images_are_reported_at_the_end(train, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo0.jpg").write_bytes(b"no picture")
    (folder / "photo1.txt").unlink()
    out, _ = train("--data", folder, "--steps", 4)
    assert re.search(r"skipped 2 images, .*photo0\.jpg, .*photo1\.jpg$", out.strip())


def test_ctrl_c_saves_and_the_same_command_goes_on(tiny_model, shards, tmp_path):
    command = [sys.executable, "train_lora.py", "--model", tiny_model, "--data", shards, "--steps", "5000", "--bs", "1"]
    command += ["--rank", "2", "--out", tmp_path / "out", "--log-dir", tmp_path / "runs"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "loss=" not in process.stderr.readline(2000):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    step = int(re.search(r"weights_(\d+)\.safetensors: the same command goes on", out)[1])
    assert 10 <= step < 5000
    assert weights(tmp_path / "out", step)
    done = run(*map(str, command[1:]), "--steps", str(step + 2))
    assert f"weights_{step + 2}.safetensors" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["fp16", "nf4"])
def test_a_run_on_a_gpu_is_the_same_with_and_without_a_graph(train, latents, tmp_path, base):
    """Saves and pictures in between give the graph's memory back and take the VAE to the GPU and away."""
    how = ["--device", "cuda", "--data", latents, "--steps", 7, "--save-every", 3, "--base-precision", base, "--workers", 2]
    out, _ = train(*how, "--cuda-graph", "on", "--log-dir", tmp_path / "graph")
    assert "CUDA graph" in out
    train(*how, "--cuda-graph", "off", "--out", tmp_path / "eager", "--log-dir", tmp_path / "launched")
    assert last(tmp_path / "graph", "loss") == pytest.approx(last(tmp_path / "launched", "loss"), rel=1e-2)
    ups = [[t.float().flatten() for key, t in weights(tmp_path / f, 7).items() if "lora_up" in key] for f in ("out", "eager")]
    # All of up is what was learnt: it begins at zero. Atomic sums differ from run to run; of another seed the cosine is 0.
    assert torch.cosine_similarity(torch.cat(ups[0]), torch.cat(ups[1]), 0) > 0.95


# Several processes.


def torchrun(processes: int, *command: object) -> subprocess.CompletedProcess:
    return run("torchrun", "--standalone", "--nproc-per-node", str(processes), *map(str, command))


def test_two_ranks_have_the_gradient_of_one_with_the_double_batch(tiny_model, tmp_path):
    alone = gradient_and_step(str(tiny_model), 0, 1, lambda gradient: None)
    torchrun(2, "tests/two_ranks.py", tiny_model, tmp_path / "result.pt")
    both = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(both["grad"], alone["grad"], atol=1e-6, rtol=1e-4)
    assert alone["grad"].abs().max() > 1e-3
    assert not both["ranks differ"].any()
    assert both["union"].tolist() == [0, 1, 7]
    assert both["any"].tolist() == [True, False]


def test_torchrun_with_two_ranks(tiny_model, shards, tmp_path):
    how = ["--model", tiny_model, "--data", shards, "--rank", 2, "--bs", 1, "--workers", 1, "--steps", 3]
    done = torchrun(2, "train_lora.py", *how, "--out", tmp_path / "out", "--log-dir", tmp_path / "runs")
    assert "batch      1 × 1 accumulated × 2 processes = 2" in done.stdout
    assert done.stdout.count("wrote") == 1  # rank 0 alone writes
    assert weights(tmp_path / "out", 3)
    assert torch.load(tmp_path / "out/state/state.pt", weights_only=True)["run"]["samples"] == 6
    how[how.index("--steps") + 1] = 5
    torchrun(2, "train_lora.py", *how, "--out", tmp_path / "out", "--log-dir", tmp_path / "runs")
    torchrun(2, "train_lora.py", *how, "--out", tmp_path / "whole", "--log-dir", tmp_path / "runs")
    assert equal(weights(tmp_path / "out", 5), weights(tmp_path / "whole", 5))


# A user's mistakes: one line, status 2, nothing written.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nowhere"], "--model /nowhere: no such file or folder"),
        (["--model", "tests"], "--model tests is no diffusers folder"),
        (["--model", "sdxl"], "hf download stabilityai/stable-diffusion-xl-base-1.0"),
        (["--data", "/nowhere"], "--data /nowhere: /nowhere does not exist"),
        (["--data", "scripts"], "no image with a caption"),
        (["--rank", 0], "--rank must be at least 1"),
        (["--bs", 0], "--bs must be at least 1"),
        (["--steps", 0], "--steps must be at least 1"),
        (["--targets", "no_such_layer"], "--targets 'no_such_layer' matches none"),
        (["--out", "README.md/x"], "--out README.md/x cannot be written"),
        (["--log-dir", "README.md/x"], "--log-dir README.md/x cannot be written"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--resume", "/nowhere"], "--resume /nowhere: no state there"),
        (["--vram-gb", 0.001], "--vram-gb, or what is free, leaves 0.0 GiB for tensors: the smallest plan ("),
        (["--cuda-graph", "on"], "--cuda-graph on needs a CUDA device, not cpu"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes(train, tmp_path, options, message):
    _, err = train(*options, status=2)
    assert err.startswith("train_lora.py: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_xformers_asked_for_and_not_usable(train):
    if torch.cuda.is_available():
        pytest.skip("xFormers runs on this machine")
    _, err = train("--attention", "xformers", status=2)
    assert re.fullmatch(r"train_lora.py: --attention xformers is not usable: .*\n", err)


def test_a_truncated_shard(train, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    tar = folder / "photos-000001.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    out, _ = train("--data", folder, "--steps", 1)
    assert "cut short  photos-000001.tar: the samples before the cut are used" in out
