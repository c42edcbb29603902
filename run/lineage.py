"""The LoRA files that a run builds on: those merged into its frozen base, and the one that its own A and B go on from."""

from pathlib import Path

import torch

from common.errors import UserError
from common.files import sha256_of
from lora import Adapter, merge_loras
from lora_files.decompose import delta_svd
from lora_files.deltas import Deltas, parameter_shapes
from lora_files.read import newest_lora, read_changes, read_lora, with_strength
from model.load import Pipeline
from model.sdxl import Denoiser
from options.training import LineageConfig


class Lineage:
    """Reads the files, before the model is put on the device. Raises UserError for those that do not fit it."""

    def __init__(self, config: LineageConfig, pipe: Pipeline):
        self.denoiser = Denoiser(pipe)
        shapes = parameter_shapes(self.denoiser)
        named = [with_strength(name, "--base-lora") for name in config.base_lora]
        files = [(newest_lora(path, "--base-lora"), strength) for path, strength in named]
        self.base = [(read_changes(file, shapes), strength) for file, strength in files]
        start = newest_lora(config.init_lora, "--init-lora") if config.init_lora else None
        self.start = read_lora(start, shapes) if start else {}
        merged = [f"{identity(file)}:{strength:g}" for file, strength in files]
        # What the run records of the options, as of --data: what they hold, not where it is.
        self.flags: dict[str, object] = {"base_lora": merged, "init_lora": identity(start) if start else None}
        self.options = {"base_lora": config.base_lora, "init_lora": config.init_lora and str(config.init_lora)}  # as given
        self.merged, self.begun = ", ".join(merged), ""  # lines for the report

    def merge(self, has_text: bool) -> None:
        """W += strength · ΔW in the frozen base, which is still on the host. Raises UserError if cached text is in use, which
        `has_text` says, and a file changes the text encoders: their signature is too coarse to show that.
        """
        if has_text and any(name.startswith("text_encoder") for deltas, _ in self.base for name in deltas):
            advice = "merge_lora.py makes a --model of it, for caching and training"
            raise UserError(f"--base-lora changes the text encoders, and the data hold text encoded without it: {advice}")
        merge_loras(self.denoiser, self.base)

    def begin(self, adapter: Adapter) -> None:
        """Gives the adapter ΔW of --init-lora, if there is one. Raises UserError if none of its layers is trained."""
        if not self.start:
            return
        fitting = {name: delta for name, delta in self.start.items() if name in adapter.deltas}
        if not fitting:
            raise UserError(f"--init-lora: none of its {len(self.start)} layers is trained here, e.g. {next(iter(self.start))}")
        lost = begin_from(adapter, fitting)
        without = sorted(self.start.keys() - fitting.keys())
        line = f"{self.flags['init_lora']}, {len(fitting)} of {len(adapter.deltas)} layers"
        if lost > 0:
            line += f"; of higher rank: {lost:.2%} of its norm is lost"
        self.begun = line + (f"; no place for {len(without)}, first {without[0]}: see --targets" if without else "")


def identity(file: Path) -> str:
    """Base name and the beginning of the file's SHA-256."""
    return f"{file.name} {sha256_of(file.read_bytes())[:8]}"


@torch.no_grad()
def begin_from(adapter: Adapter, deltas: Deltas) -> float:
    """Gives the layers of `adapter` the ΔW of `deltas`, and returns the share of the norm that is lost.

    A file of lower rank fills the first rows of A and columns of B, and the others stay as new: B is 0 there. Of a higher
    rank the first singular triplets are kept (Eckart and Young 1936).
    """
    lost = total = 0.0
    for name, (A, B, alpha) in deltas.items():
        own_A, own_B, own_alpha = adapter.deltas[name]
        rank = len(own_A)
        if len(A) > rank:
            U, S, Vh = delta_svd((A, B, alpha))
            root = S[:rank].sqrt()
            lost, total = lost + S[rank:].square().sum().item(), total + S.square().sum().item()
            A, B, alpha = root[:, None] * Vh[:rank], U[:, :rank] * root, len(root)
        scale = (alpha / len(A)) / (own_alpha / rank)
        own_A[: len(A)] = A.view(-1, *own_A.shape[1:])
        own_B[:, : len(A)] = scale * B.view(*B.shape[:2], *own_B.shape[2:]).float()
    adapter.update_layers()
    adapter.keep_lengths()
    return (lost / total) ** 0.5 if total else 0.0
