"""A tiny random SDXL (same classes, same structure) and a few pictures, made once for all tests."""

import gc
import io
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # for models this small a second thread only costs time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

if not torch.cuda.is_available():  # test_fused.py runs Triton's kernels on the CPU, whose own functions it defines at import
    os.environ["TRITON_INTERPRET"] = "1"
    with suppress(ImportError):
        import triton.language  # noqa: F401
    del os.environ["TRITON_INTERPRET"]

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}


def make_tokenizer(folder: Path, pad: str):
    """A CLIP tokenizer whose words are single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=77), len(words)


def pytest_collection_modifyitems(items):
    """Skips the tests marked `gpu` on a machine without CUDA."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA here"))


def pytest_collection_finish():
    """Saves time: the garbage collector no longer visits the imported modules, which live until the end anyway."""
    gc.collect()
    gc.freeze()


def source_in_memory(places: np.ndarray, names: list[str]):
    """A data set with these samples, whose images are nowhere. The caption of each is its name."""
    from dataset.columns import columns_of
    from dataset.sources import File, Part, Source

    captions = [[name] for name in names]
    return Source([Part(columns_of(names, places), range(len(names)), [File(Path("nowhere"))], captions=captions)], [], "")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A diffusers folder: SDXL's three levels, two text encoders, 64 px, random weights."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 64),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=32 + 48,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8,
        norm_num_groups=8,
        **SDXL_UNET,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.5,
    )
    tokenizer, vocabulary = make_tokenizer(folder / "t1", "<|endoftext|>")
    tokenizer_2, _ = make_tokenizer(folder / "t2", "!")
    text = {"vocab_size": vocabulary, "num_attention_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 77}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    encoder = CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=64, projection_dim=32, **text))
    encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=48, intermediate_size=96, projection_dim=48, **text))
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, timestep_spacing="leading"
    )
    pipe = StableDiffusionXLPipeline(vae, encoder, encoder_2, tokenizer, tokenizer_2, unet, scheduler, add_watermarker=False)
    pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def pipe(tiny_model):
    """A fresh float32 pipeline of the tiny model on the CPU."""
    from model.load import load_sdxl

    return load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))


@pytest.fixture
def denoiser(pipe):
    from model.sdxl import Denoiser

    return Denoiser(pipe)


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Seven captioned JPEGs of several sizes in a plain folder."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(7):
        photograph(i, 80 + 30 * i, 200 - 20 * i).save(folder / f"photo{i}.jpg", quality=95)
        (folder / f"photo{i}.txt").write_text(f"picture number {i}")
    return folder


@pytest.fixture(scope="session")
def cutouts(tmp_path_factory) -> Path:
    """Four captioned PNGs of several shapes, transparent outside a circle."""
    folder = tmp_path_factory.mktemp("cutouts")
    for i, size in enumerate([(130, 130), (150, 140), (200, 100), (100, 180)]):
        image = photograph(i, *size)
        circle = Image.new("L", size)
        ImageDraw.Draw(circle).ellipse((10 * i, 10, size[0] - 20, size[1] - 10), fill=255)
        image.putalpha(circle)
        image.save(folder / f"cutout{i}.png")
        (folder / f"cutout{i}.txt").write_text(f"cutout number {i}")
    return folder


@pytest.fixture(scope="session")
def shards(photos, tmp_path_factory) -> Path:
    """The same pictures as three tar shards, made by scripts/make_shards.py."""
    folder = tmp_path_factory.mktemp("shards")
    assert run_main("scripts/make_shards.py", photos, "--out", folder, "--name", "photos", "--per-shard", 3) == 0
    return folder


def until(steps: Iterator, change: Callable) -> Callable:
    """`change`, or Ctrl-C when there are no steps left."""

    def instead(*arguments, **options):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return change(*arguments, **options)

    return instead


def run(*command: object) -> subprocess.CompletedProcess:
    """Runs a program as a user would, and checks that its exit status is 0."""
    completed = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, f"{command} exited with {completed.returncode}\n{completed.stdout}\n{completed.stderr}"
    return completed


def run_main(name: str, *arguments: object) -> int:
    """Runs a script in this process, which saves the seconds that importing torch takes. Returns its exit status."""
    argv, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
        return 0
    except SystemExit as error:
        return error.code or 0
    finally:
        sys.argv = argv


class Forked(get_context("fork").Process):
    """Runs a script in a fork of this process, which has imported everything already. Its output goes to the file `output`.

    It has a session of its own, as under torchrun: a signal to its process group reaches its workers, too.
    """

    def __init__(self, name: str, *arguments: object, output: Path):
        super().__init__(target=self.run_script, args=(name, arguments, output))
        self.start()

    def run_script(self, name: str, arguments: tuple, output: Path) -> None:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)  # also what threads and libraries print
        sys.exit(run_main(name, *arguments))

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        return self.exitcode


def fork_torchrun(name: str, arguments: list, options: list, output: Path, enter=lambda: None) -> get_context("fork").Process:
    """Starts torchrun's own agent in a fork of this process, and its ranks in forks of that. The agent first calls `enter`."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    config, *_ = config_from_args(parse_args([*map(str, options), name]))
    config.start_method = "fork"

    def run_rank() -> None:
        if status := run_main(name, *arguments):
            sys.exit(status)

    def run_agent() -> None:
        sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # PyTorch 2.15 logs failed forks
        enter()
        try:
            elastic_launch(config, run_rank)()
        except ChildFailedError:
            sys.exit(1)

    process = get_context("fork").Process(target=run_agent)
    process.start()
    return process


ONE_HOST = ["--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


@pytest.fixture
def script(capfd):
    """script("train_lora.py", "--rank", 8, status=0) runs a script, checks its exit status and returns (stdout, stderr)."""
    from common.signals import SIGNALS

    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def call(name: str, *arguments: object, status: int = 0) -> tuple[str, str]:
        streams = sys.stdout, sys.stderr
        capfd.readouterr()
        try:
            exit_status = run_main(name, *arguments)
        finally:
            sys.stdout, sys.stderr = streams
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        assert exit_status == status, f"{name} {arguments} exited with {exit_status}\n{out}\n{err}"
        return out, err

    return call


DRY_RUNS: dict = {}


@pytest.fixture
def train(script, tiny_model, shards, tmp_path, monkeypatch):
    """train("--steps", 4) runs train_lora.py on the tiny model, writing to a fresh folder. Returns (stdout, stderr).

    Draws no pictures by default. With --pictures it draws one a save, in two steps: three in 20 would take most of the time.
    """
    from performance.memory_plan import dry_run  # takes more than half of a short run; its result depends on the key alone

    def cached_dry_run(denoiser, block_names, text, latent_side):
        key = repr(denoiser), tuple(block_names), [(t.shape, t.dtype) for t in text], latent_side
        key = str((*key, [(p.dtype, p.requires_grad) for p in denoiser.parameters()]))
        if key not in DRY_RUNS:
            DRY_RUNS[key] = dry_run(denoiser, block_names, text, latent_side)
        return DRY_RUNS[key]

    monkeypatch.setattr("memory.dry_run", cached_dry_run)
    monkeypatch.setattr("model.prompts.NARUTO_PROMPTS", ["one picture a save is enough"])
    monkeypatch.setattr("run.gallery.SAMPLE_STEPS", 2)
    base = ["--model", tiny_model, "--rank", 2, "--bs", 2, "--workers", 0, "--device", "cpu", "--no-pictures"]
    base += ["--out", tmp_path / "out", "--log-dir", tmp_path / "runs"]

    def call(*options, status: int = 0):
        data = [] if "--data" in options else ["--data", shards]
        return script("train_lora.py", *base, *data, *options, status=status)

    return call


@pytest.fixture(scope="session")
def sdxl_meta() -> torch.nn.Module:
    """The Denoiser of the real SDXL base architecture on the meta device: shapes without weights."""
    from model.load import base_architecture
    from model.sdxl import Denoiser

    with torch.device("meta"):
        parts = base_architecture()
    model = Denoiser.__new__(Denoiser)  # __init__ would need tokenizers
    torch.nn.Module.__init__(model)
    model.unet, model.text_encoder, model.text_encoder_2 = (parts[n] for n in ("unet", "text_encoder", "text_encoder_2"))
    return model
