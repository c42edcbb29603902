"""One LoRA from several: the weighted mean of their ΔW, not of A and B apart, brought back to a rank by its exact SVD.

    python scripts/average_lora.py checkpoints/*.safetensors --out average.safetensors
    python scripts/average_lora.py a.safetensors b.safetensors --weights 1 2 --out average.safetensors
    python scripts/average_lora.py checkpoints/*.safetensors --ema-sigma 0.1 --out average.safetensors

--ema-sigma makes of the files of one run what an average of its weights during training, with the power function of Karras et
al. 2024 as its profile, would have made. They fit it to stored averages afterwards; here the files are single steps, between
which the run is taken as straight, so that it is the better the more files there are.
"""

import json
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors, printable
from common.options import check_options, option
from options.command import parse_command


@dataclass(frozen=True)
class AverageConfig:
    loras: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The files to average, two or more, in any layout. A layer that one of them lacks counts as ΔW = 0."""
    out: Path
    """The file to write."""
    weights: tuple[float, ...] = option((), at_least=0)
    """A weight for each file, in their order; divided by their sum. Without it all are equal."""
    ema_sigma: float | None = option(None, at_least=0.001, at_most=0.288)
    """Instead of --weights, for files of one run: its average up to the last of them with the profile t^γ, whose standard
    deviation is this share of the run. Less is nearer to the last file."""
    rank: int | None = option(None, at_least=1)
    """Rank of every layer, at most. None: the largest that the layer has in a file."""
    format: Literal["kohya", "diffusers"] = "kohya"
    """Layout to write."""
    save_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Dtype of the weights in the new file."""
    model: str | None = None
    """The model that the LoRA are for, as convert_lora.py's --model. None: SDXL base's architecture."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.weights and self.ema_sigma is not None:
            raise UserError("give either --weights or --ema-sigma, which computes them")
        if self.weights and len(self.weights) != len(self.loras):
            raise UserError(f"--weights are {len(self.weights)}, and the files {len(self.loras)}: give one for each")
        if self.weights and not 0 < sum(self.weights) < math.inf:
            raise UserError("--weights are all 0, or too large for a sum: one must be above 0")


if __name__ == "__main__":
    COMMAND = parse_command("average_lora.py", AverageConfig, __doc__)


from common.files import check_writable
from evaluation.subject import options_of
from lora_files.average import average_changes, power_exponent, power_weights
from lora_files.base_weights import model_parts
from lora_files.deltas import Deltas, parameter_shapes
from lora_files.read import read_changes, read_metadata, training_steps
from lora_files.write import rank_header, write_lora
from memory import DTYPES


def weigh(config: AverageConfig) -> list[tuple[Path, float]]:
    """The files with their weights, of sum 1; for --ema-sigma in the order of their steps, which must be known and differ."""
    if config.ema_sigma is None:
        given = config.weights or (1.0,) * len(config.loras)
        return [(path, weight / sum(given)) for path, weight in zip(config.loras, given, strict=True)]
    steps = sorted((training_steps(path)[0], path) for path in config.loras)
    if steps[0][0] < 0:
        raise UserError(
            f"{steps[0][1]}: neither header nor name says its step, which --ema-sigma needs: call it x-000450.safetensors"
        )
    for (step, one), (next_step, other) in pairwise(steps):
        if step == next_step:
            raise UserError(f"{one} and {other} are both of step {step}: name one of them")
    gamma = power_exponent(config.ema_sigma)
    first, last = steps[0][0], steps[-1][0]
    share = (first / last) ** (gamma + 1)
    print(f"profile t^{gamma:.2f} up to step {last}; {share:.1%} of it lies before step {first}, the first that is here")
    return list(zip((path for _, path in steps), power_weights([step for step, _ in steps], gamma), strict=True))


def alike(tables: list[dict]) -> dict:
    """The entries that are the same in all."""
    return {key: value for key, value in tables[0].items() if all(table.get(key) == value for table in tables)}


def header(files: list[tuple[Path, float]], deltas: Deltas, out: Path) -> dict[str, str]:
    """What the headers of all files say alike, with the options of training one by one; and the files."""
    metadata = alike([read_metadata(path) for path, _ in files])
    sources = [{"file": p.name, "weight": w, "hash": read_metadata(p).get("sshs_model_hash")} for p, w in files]
    if options := alike([options_of(path) for path, _ in files]):
        metadata["sdxl_lora.config"] = json.dumps(options)
    metadata |= {"ss_output_name": out.stem, "ss_network_module": "networks.lora", "ss_network_args": "{}"}
    return metadata | rank_header(deltas) | {"sdxl_lora.averaged": json.dumps(sources)}


def main(config: AverageConfig) -> None:
    if len(config.loras) < 2:
        raise UserError(f"name two LoRA files or more: {len(config.loras)} makes no average")
    if config.out.exists():
        raise UserError(f"{config.out} is there already: remove it or choose another name")
    check_writable("the folder", config.out.parent)
    files, model = weigh(config), model_parts(config.model)
    shapes = parameter_shapes(model)
    read = [(read_changes(path, shapes), weight) for path, weight in files]
    for path, weight in files:
        print(f"{weight:8.4f}  {printable(path.name)}", flush=True)
    deltas, losses = average_changes(read, model, config.rank)
    if not deltas:
        raise UserError("the files hold only additions to norms and biases, which no layout of LoRA can hold")
    size, _ = write_lora(
        config.out, deltas, header(files, deltas, config.out), config.format, DTYPES[config.save_dtype], shapes
    )
    names = [{name.removesuffix(".weight") for name in changes} for changes, _ in read]
    if missing := sum(not all(layer in own for own in names) for layer in deltas):
        print(f"{missing} of {len(deltas)} layers are not in every file: where one is missing, ΔW = 0 counts")
    if added := len(set().union(*names) - deltas.keys()):
        print(f"left out: {added} additions to norms or biases (.diff, .diff_b, .w_norm, .b_norm)")
    error = {layer: (lost / (total or 1)) ** 0.5 for layer, (lost, total) in losses.items()}
    lost, total = map(sum, zip(*losses.values(), strict=True))
    worst = max(error, key=error.__getitem__)
    print(f"relative error of the rank: {(lost / (total or 1)) ** 0.5:.2%} of all, at most {error[worst]:.2%} in {worst}")
    print(f"{config.out}: {len(deltas)} layers in the {config.format} layout, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    with one_line_errors("average_lora.py"):
        main(COMMAND)
