"""A LoRA from the difference of two models, or a smaller LoRA from a large one: the truncated SVD of ΔW, layer by layer.

    python scripts/extract_lora.py tuned/ lora.safetensors --base sdxl/ --rank 16          a LoRA that turns sdxl/ into tuned/
    python scripts/extract_lora.py tuned.safetensors lora.safetensors --base sdxl.safetensors --error 0.1
    python scripts/extract_lora.py big.safetensors small.safetensors --resize --rank 4     a smaller LoRA

No other matrix of rank r is nearer to ΔW than its first r singular triplets (Eckart and Young 1936). Two models are read
tensor by tensor; SDXL's 986 layers take ten minutes on one core.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.options import check_options, option
from options.command import parse_command
from options.training import TARGETS, LoRAConfig

ROUNDING = {"fp16": 2**-10, "bf16": 2**-7, "fp32": 2**-23}  # distance from 1 to the next number


@dataclass(frozen=True)
class ExtractConfig:
    source: Annotated[Path, tyro.conf.Positional]
    """The fine-tuned model, a diffusers folder or a .safetensors checkpoint; with --resize a LoRA file of any tool."""
    out: Annotated[Path, tyro.conf.Positional]
    """The LoRA file to write."""
    base: Path | None = None
    """The model that the source was tuned from, a folder or a checkpoint."""
    resize: bool = False
    """The source is a LoRA: write a smaller one."""
    rank: int | None = option(None, at_least=1)
    """Rank r of every layer."""
    error: float | None = None
    """Instead of --rank: each layer gets the smallest rank with |ΔW - B·A| / |ΔW| at most this (Frobenius norms)."""
    targets: str | None = None
    """Layers, as train_lora.py's --targets; '.' is every linear layer and convolution. None: 'all'; with --resize, '.'."""
    format: Literal["kohya", "diffusers"] = "kohya"
    """Layout to write."""
    save_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Dtype of the weights in the new file."""
    model: str | None = None
    """With --resize: the model that the LoRA is for, as convert_lora.py's --model. None: SDXL base's architecture."""
    device: str = "auto"
    """Where the decompositions are computed: auto, cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        if (self.base is None) != self.resize:
            raise UserError("give either --base, the model that the source was tuned from, or --resize if it is a LoRA")
        if (self.rank is None) == (self.error is None):
            raise UserError("give either --rank or --error")
        check_options(self)
        if self.device == "mps":
            raise UserError("--device mps has no float64, in which this computes: use --device cpu")
        if self.error is not None and not 0 < self.error < 1:
            raise UserError(f"--error must be between 0 and 1, not {self.error}")
        if self.error is not None and self.error < ROUNDING[self.save_dtype]:
            raise UserError(f"--error {self.error} is below the rounding of {self.save_dtype}: try --save-dtype fp32")
        if self.model is not None and not self.resize:
            raise UserError("--model belongs to --resize: the layers of two models are read from their files")

    @property
    def pattern(self) -> str:
        if self.targets is None:
            return "" if self.resize else TARGETS["all"]
        return LoRAConfig(targets=self.targets).pattern


if __name__ == "__main__":
    COMMAND = parse_command("extract_lora.py", ExtractConfig, __doc__)

import torch
from safetensors import safe_open
from torch import Tensor

from common.files import check_writable
from common.progress import tqdm
from lora_files.base_weights import Place, model_shapes, stored_weights
from lora_files.decompose import ChooseRank, Triplets, as_delta, delta_svd, smallest_rank, truncated_svd
from lora_files.deltas import Deltas, is_addition
from lora_files.names import diffusers_name
from lora_files.read import read_lora, read_metadata
from lora_files.write import rank_header, write_lora
from memory import DTYPES, resolve_device

# Where ΔW comes from. Both classes have the `shapes` of the weights by module path and the `metadata` for the new file, and
# read, measure and decompose one ΔW at a time, in a form of their own.


class Lora:
    """A LoRA file of any tool. A ΔW is (A, B, α)."""

    def __init__(self, file: Path, model: str | None, device: torch.device):
        self.shapes, self.device = model_shapes(model), device
        deltas = read_lora(file, self.shapes)
        self.deltas = {name: delta for name, delta in deltas.items() if not is_addition(name)}
        if added := len(deltas) - len(self.deltas):
            print(f"left out: {added} additions to norms, biases or whole weights (.diff, .diff_b)")
        self.metadata = read_metadata(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def read(self, name: str) -> tuple[Tensor, Tensor, float]:
        """(A, B, α)."""
        A, B, alpha = self.deltas[name]
        return A.to(self.device), B.to(self.device), alpha

    def square(self, delta: tuple[Tensor, Tensor, float]) -> float:
        """|ΔW|² = (α/r)² · tr(BᵀB · AAᵀ)."""
        A, B, alpha = delta
        A, B = A.flatten(1).double(), B.flatten(1).double()
        return (alpha / len(A)) ** 2 * ((B.T @ B) * (A @ A.T)).sum().item()

    def svd(self, delta: tuple[Tensor, Tensor, float], choose_rank: ChooseRank) -> Triplets:
        U, S, Vh = delta_svd(delta)
        return U[:, : choose_rank(S)], S, Vh[: choose_rank(S)]


@dataclass(frozen=True)
class Weight:
    """The weight of a layer: in which file and tensor it is, and its shape."""

    file: Path
    key: str
    place: Place
    shape: torch.Size

    def read(self) -> Tensor:
        with safe_open(self.file, "pt") as file:  # opened anew: what was read counts as memory until it is closed
            return self.place.weight_in(file.get_tensor(self.key))


def find_weights(model: Path) -> dict[str, Weight]:
    """{module path: weight} of every linear layer and convolution. A folder and a checkpoint give the same paths."""
    return {  # of two variants the last counts: x.safetensors after x.fp16.…
        diffusers_name(place.module): Weight(file, key, place, shape)
        for file, key, place, shape in stored_weights(model)
        if len(shape) > 1 and ".embeddings." not in place.module  # the embeddings of tokens and positions are no layers
    }


class Models:
    """Two models, each a folder or a checkpoint. A ΔW is a tensor. Raises UserError if they differ in architecture."""

    def __init__(self, tuned: Path, base: Path, device: torch.device):
        self.tuned, self.base, self.device = find_weights(tuned), find_weights(base), device
        self.shapes = {name: weight.shape for name, weight in self.tuned.items()}
        self.metadata: dict[str, str] = {}
        base_shapes = {name: weight.shape for name, weight in self.base.items()}
        if different := sorted(name for name, _ in self.shapes.items() ^ base_shapes.items()):
            reason = f"{len(set(different))} layers are not in both or have other shapes, first {different[0]}"
            raise UserError(f"{tuned} and {base} differ in architecture: {reason}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tuned)

    def read(self, name: str) -> Tensor:
        """ΔW [out, in·…] float32; 0 [1, 1] if one weight is the other after rounding: saved in another dtype, not trained."""
        tuned, base = self.tuned[name].read(), self.base[name].read()
        if torch.equal(tuned, base.to(tuned.dtype)) or torch.equal(base, tuned.to(base.dtype)):
            return torch.zeros(1, 1)
        return (tuned.to(self.device, torch.float32) - base.to(self.device, torch.float32)).flatten(1)

    def square(self, W: Tensor) -> float:
        """|ΔW|²."""
        return W.double().square().sum().item()

    def svd(self, W: Tensor, choose_rank: ChooseRank) -> Triplets:
        return truncated_svd(W, choose_rank)


# The report.


class Layer(NamedTuple):
    """A decomposed ΔW: its new rank, and Σσ² of the singular values that are kept and of all."""

    name: str
    rank: int
    kept: float
    total: float


def retained(layers: list[Layer]) -> float:
    """The share of the squared norm that is kept."""
    return sum(layer.kept for layer in layers) / sum(layer.total for layer in layers)


def block(name: str) -> str:
    """'unet.down_blocks.1.attentions.0.….to_q' -> 'down_blocks.1.attentions.0'. A text encoder is one block."""
    component, _, rest = name.partition(".")
    match = re.match(r"(down|up)_blocks\.\d+\.\w+\.\d+|\w+", rest) if component == "unet" else None
    return match[0] if match else component


def table(layers: list[Layer]) -> Iterator[str]:
    """A line for each block, with the layer that keeps the smallest share of its norm."""
    yield f"{'block':26} layers     ranks  retained  worst layer"
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        blocks.setdefault(block(layer.name), []).append(layer)
    for name, members in blocks.items():
        ranks = f"{min(layer.rank for layer in members)}-{max(layer.rank for layer in members)}"
        worst = min(members, key=lambda layer: retained([layer]))
        path = worst.name.partition(f"{name}.")[2]
        yield f"{name:26} {len(members):6} {ranks:>9} {retained(members):9.2%}  {retained([worst]):.2%} {path}"


def main(config: ExtractConfig) -> None:
    if config.out.exists():
        raise UserError(f"{config.out} is there already: remove it or choose another name")
    check_writable("the folder", config.out.parent)
    device, pattern = resolve_device(config.device), config.pattern
    choose_rank = partial(smallest_rank, rank=config.rank, error=config.error)
    source = Models(config.source, config.base, device) if config.base else Lora(config.source, config.model, device)
    names = sorted(source, key=lambda name: (not name.startswith("unet."), name))
    if not any(re.search(pattern, name) for name in names):
        raise UserError(f"--targets {config.targets!r} matches none of {len(names)} layers, e.g. {names[:3]}")

    # Layer by layer.
    deltas: Deltas = {}
    layers, equal, outside = [], 0, []
    for name in tqdm(names, unit="layer", leave=False):
        delta: Any = source.read(name)
        square = source.square(delta)
        if not math.isfinite(square):
            raise UserError(f"{name} is not finite in {config.source}{f' or {config.base}' if config.base else ''}")
        if square == 0:
            equal += 1
        elif not re.search(pattern, name):
            outside.append(square)
        else:
            U, S, Vh = source.svd(delta, choose_rank)
            deltas[name] = as_delta((U, S, Vh), source.shapes[name])
            layers.append(Layer(name, len(Vh), S[: len(Vh)].square().sum().item(), S.square().sum().item()))
    if not layers:
        raise UserError(f"{config.source}: nothing to extract, {equal} of {len(names)} layers have no difference")

    # The file.
    origin: dict[str, object] = {"source": config.source.name, "base": config.base and config.base.name}
    origin |= {"rank": config.rank, "error": config.error}
    metadata = source.metadata | {
        **rank_header(deltas),
        "sdxl_lora.extracted": json.dumps({key: value for key, value in origin.items() if value is not None}),
    }
    dtype = DTYPES[config.save_dtype]
    size, _ = write_lora(config.out, deltas, metadata, config.format, dtype, source.shapes)
    print(*table(layers), sep="\n")
    if equal:
        print(f"left out: {equal} layers that do not differ")
    if outside:
        share = sum(outside) / (sum(outside) + sum(layer.total for layer in layers))
        print(f"left out: {len(outside)} layers outside of --targets, {share:.2%} of all (--targets . extracts them, too)")
    kept = f"{len(layers)} layers in the {config.format} layout, {retained(layers):.2%} retained"
    print(f"{config.out}: {kept}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    with one_line_errors("extract_lora.py"):
        main(COMMAND)
