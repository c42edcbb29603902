"""Every option of training, in groups. Its docstring is its help; docs/training.md and docs/data.md describe them."""

import math
import os
import re
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from common.errors import UserError
from common.options import MAX_SEED, Options, option
from options.forms import Form, lines_in, read_form, read_timesteps, weights_in
from options.optimiser import OptimiserConfig, check_optimizer

if TYPE_CHECKING:
    import torch


ATTENTION = r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$|\.self_attn\.(q|k|v|out)_proj$"
EVERYTHING = ATTENTION + r"|\.ff\.net\.(0\.proj|2)$|\.proj_(in|out)$|\.mlp\.fc[12]$"
# B-LoRA (Frenkel et al. 2024, arXiv:2403.14572): one picture's style and content are learned apart, by attention alone.
ATTENTION_IN = r"^unet\.up_blocks\.0\.attentions\.{}\..*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$"
UNET_ONLY = {"style": ATTENTION_IN.format(1), "content": ATTENTION_IN.format(0)}
TARGETS = {"attention": ATTENTION, "all": EVERYTHING, **UNET_ONLY}
UNPACKED = ("fp16", "bf16", "fp32")


def is_name(text: str) -> bool:
    """Whether it can begin the name of a file on every system: those hold 255 bytes."""
    return bool(re.fullmatch(r"\w[\w .+-]*", text)) and len(text.encode()) <= 150


def read_pattern(flag: str, text: str) -> tuple[str, float]:
    """'REGEX=NUMBER' -> (regex, number). Raises UserError if it is none, or the number is not above 0."""
    regex, _, number = text.rpartition("=")
    try:
        re.compile(regex)
        value = float(number)
    except (re.error, ValueError) as error:
        raise UserError(f"{flag} {text!r} is not of the form REGEX=NUMBER: {error}") from None
    if not regex or not 0 < value < math.inf:
        raise UserError(f"{flag} {text!r}: a regular expression stands before the =, and a number above 0 after it")
    return regex, value


def first_match(flag: str, patterns: tuple[str, ...], name: str, otherwise: float) -> float:
    """The number of the first pattern that is found in `name`."""
    return next((n for regex, n in (read_pattern(flag, text) for text in patterns) if re.search(regex, name)), otherwise)


@dataclass(frozen=True)
class LoRAConfig(Options):
    rank: int = option(8, at_least=1, resume="fixed")
    """Rank r of every ΔW."""
    rank_pattern: tuple[str, ...] = option((), resume="fixed")
    """Another rank for the layers whose path a regular expression finds, as attn2=32 or 'up_blocks.*attn1=4'. Of several the
    first that finds a layer counts; --alpha is the same everywhere."""
    alpha: float | None = option(None, above=0, resume="fixed")
    """Scale α: ΔW = (α/r)·B·A. None: equal to --rank."""
    rank_stabilised: bool = option(False, resume="fixed")
    """ΔW = (α/√r)·B·A, so that a higher rank needs no other learning rate (rsLoRA, arXiv:2312.03732). Needs --alpha."""
    conv_rank: int | None = option(None, at_least=1, resume="fixed")
    """LoRA of this rank on the convolutions of the U-Net's residual blocks, down- and upsamplers, too (LoCon,
    arXiv:2309.14859). None: on linear layers only."""
    conv_alpha: float | None = option(None, above=0, resume="fixed")
    """α of the convolutions. None: equal to --conv-rank."""
    dora: bool = option(False, resume="fixed")
    """Train the length of every row of W + ΔW apart from its direction (DoRA, arXiv:2402.09353): slower, and read by fewer
    programs."""
    targets: str = option("attention", resume="fixed")
    """Linear layers to train: 'attention', 'all' (attention, feed-forward, projections), 'style' or 'content' (attention in the
    block of the U-Net that holds it, as B-LoRA; none in the text encoders), or a regular expression."""
    train_text_encoder: bool = option(True, resume="fixed")
    """Add LoRA to both text encoders, too."""
    lora_plus: float | None = option(None, above=0)
    """Learning rate of B as a multiple of A's, which is --lr: e.g. 16 (LoRA+, arXiv:2402.12354). None: the same."""
    lr_pattern: tuple[str, ...] = option(())
    """Another learning rate for the layers whose path a regular expression finds, as a multiple: attn2=0.5. Of several the
    first that finds a layer counts."""
    max_norm: float | None = option(None, above=0)
    """Largest Frobenius norm of any ΔW; after a step that exceeds it, A and B of the layer shrink, e.g. 1. None: no limit."""
    rank_dropout: float = option(0.0, at_least=0, at_most=0.9)
    """Share of ranks that are left out in each image of a step, e.g. 0.1; the others count for more. Against overfitting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"--targets {self.targets!r} is neither a preset nor a regular expression: {error}") from None
        if self.conv_alpha is not None and self.conv_rank is None:
            raise UserError("--conv-alpha does nothing without --conv-rank")
        if self.dora and (self.conv_rank or self.max_norm):
            raise UserError(f"--dora is for linear layers: without {'--conv-rank' if self.conv_rank else '--max-norm'}")
        if self.rank_stabilised and self.alpha is None:
            raise UserError("--rank-stabilised needs --alpha: one that followed the rank would undo it")
        for text in self.rank_pattern:
            if not read_pattern("--rank-pattern", text)[1].is_integer():
                raise UserError(f"--rank-pattern {text!r}: a rank is a whole number")
        for text in self.lr_pattern:
            read_pattern("--lr-pattern", text)

    @property
    def resolved_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    def rank_of(self, name: str, convolution: bool = False) -> int:
        """Of the layer with this path."""
        rank = self.conv_rank if convolution else self.rank
        return int(first_match("--rank-pattern", self.rank_pattern, name, rank or 1))

    def stored_alpha(self, rank: int, convolution: bool = False) -> float:
        """What a layer of this rank and its file have as α, whose ΔW is (α/r)·B·A for every reader."""
        alpha = (self.conv_alpha or self.conv_rank or 1) if convolution else self.resolved_alpha
        return alpha * (math.sqrt(rank) if self.rank_stabilised else 1)

    @property
    def pattern(self) -> str:
        return TARGETS.get(self.targets, self.targets)


@dataclass(frozen=True)
class LineageConfig(Options):
    base_lora: tyro.conf.UseAppendAction[tuple[str, ...]] = option((), resume="fixed")
    """A LoRA file, or a folder of them, that is merged into the frozen base before training; `:0.8` after it is its strength.
    May be repeated. What is trained does not contain it: pictures need both."""
    init_lora: Path | None = option(None, resume="fixed")
    """A LoRA file of any layout and rank, or a folder of them, that training goes on from, instead of from zero."""


@dataclass(frozen=True)
class DataOptions(Options):
    """How data are read."""

    data_cache: str | None = option(None, resume="free")
    """Folder on a local disk that keeps what was loaded from elsewhere; all processes of the host may share it. None: each
    epoch loads everything again."""
    data_cache_gb: float = option(10.0, above=0, resume="free")
    """Gigabytes that --data-cache may take; what was not used for the longest time is removed first."""
    bs: int = option(3, at_least=1)
    """Images per batch and process."""
    resolution: int | None = option(None, at_least=64, multiple_of=8)
    """Side in pixels of the square whose area the images get. None: the model's own (1024 for SDXL)."""
    buckets: bool = option(True)
    """Aspect-ratio buckets of that area: an image goes to the bucket that crops it least. Off: the square in its middle."""
    bucket_step: int = option(64, at_least=8, multiple_of=8)
    """Pixels: the sides of the buckets are multiples of this."""
    flip: bool = option(False)
    """Mirror each image with probability 1/2."""
    masked_loss: bool = option(False)
    """Take alpha as a loss mask: transparent areas are not learned, and keep their colours instead of becoming white."""
    workers: int = option(2, at_least=0, resume="free")
    """Processes per rank that read and decode."""


@dataclass(frozen=True)
class DataConfig(DataOptions):
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = option(())
    """'demo', a folder of tar shards (of images or of latents), a brace pattern (shards/{000000..000012}.tar), a folder of
    captioned images, or parquet files (columns image and text: packed into ~/.cache once); the shards also at http(s)://,
    s3://, gs:// or hf:// (a dataset's: hf://datasets/name/of/…). `:3` after it is its weight in a mixture, `:x3` how often an
    epoch repeats each of its pictures, and so is kohya's name of a folder, 10_name. May be repeated. None given: demo."""


@dataclass(frozen=True)
class CaptionFilesConfig(Options):
    """Where the captions of a folder of pictures are. Shards hold theirs."""

    caption: str | None = option(None, text=True)
    """The caption of pictures in a folder that have none of their own, for example 'nrt style'."""
    caption_from_name: bool = option(False)
    """Pictures in a folder without a caption are captioned by their file name, without the number at its end."""
    caption_extension: str | None = option(None)
    """Extension of the files with captions in a folder. None: txt, caption and json."""

    @property
    def extensions(self) -> tuple[str, ...]:
        """Those of files with captions, in the order in which they are looked for."""
        return (self.caption_extension.lower().lstrip("."),) if self.caption_extension else ("txt", "caption", "json")


@dataclass(frozen=True)
class CaptionConfig(Options):
    caption_dropout: float = option(0.0, at_least=0, at_most=1)
    """Share of captions replaced by the empty one."""
    shuffle_tags: bool = option(False)
    """Shuffle the parts of a caption that commas separate, each time anew."""
    keep_tags: int = option(0, at_least=0)
    """With --shuffle-tags: number of first parts that keep their places."""
    trigger: str = option("", text=True)
    """A word or two that call the style: put before every caption and every prompt of the run's pictures, and into the header
    of the LoRA; with a space between, or a comma with --shuffle-tags, unless it ends in one or in punctuation."""
    max_tokens: int = option(75, at_least=75, multiple_of=75)
    """Longer captions are truncated. Above 75 (150, 225, …) a caption is split into chunks of 75 tokens that are encoded one by
    one, as A1111 does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_tags and not self.shuffle_tags:
            raise UserError("--keep-tags does nothing without --shuffle-tags")


@dataclass(frozen=True)
class DiffusionConfig(Options):
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = option("auto", resume="fixed")
    """What the base predicts. auto: as its files say, if its own predictions do not contradict that."""
    zero_snr: Literal["auto", "yes", "no"] = option("auto", resume="fixed")
    """Was the base, which predicts v, trained to zero terminal SNR (Lin et al. 2023, arXiv:2305.08891)? auto: as above."""
    timesteps: str = option("uniform")
    """Which are drawn: uniform, LOW-HIGH (HIGH is not), logit-normal:µ,σ (Esser et al. 2024, arXiv:2403.03206), or a text file
    of weights, each for an equal share of the schedule."""
    loss: str = option("mse")
    """mse, l1, huber:δ (pseudo-Huber: Song and Dhariwal 2023, arXiv:2310.14189), or huber-snr:δ, whose δ is 1 without noise."""
    weighting: str = option("none")
    """Of timesteps: none, min-snr:5 (Hang et al. 2023, arXiv:2303.09556), soft-min-snr:5 (Crowson et al. 2024,
    arXiv:2401.11605) or debiased (Yu et al. 2023, arXiv:2310.08442)."""
    noise: str = option("plain")
    """plain, offset:0.05 (Guttenberg 2023: for very dark and bright pictures), or pyramid:LEVELS,DECAY (Whitaker 2023)."""
    input_perturbation: float = option(0.0, at_least=0, at_most=1)
    """More noise in the input than the model is to predict, e.g. 0.1 (Ning et al. 2023, arXiv:2301.11706)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps != "uniform" and os.path.isfile(self.timesteps):  # it refuses no name, however long
            object.__setattr__(self, "timesteps", weights_in(Path(self.timesteps)))
        _ = self.forms

    @property
    def forms(self) -> dict[str, Form]:
        """{option: what it says}. Raises UserError."""
        forms = {name: read_form(name, getattr(self, name)) for name in ("loss", "weighting", "noise")}
        return forms | {"timesteps": read_timesteps(self.timesteps)}


@dataclass(frozen=True)
class PriorConfig(Options):
    """Prior preservation: what is not to be learned stays as the base has it. With pictures of it, or without."""

    prior_data: tyro.conf.UseAppendAction[tuple[str, ...]] = option((), resume="free")  # what they hold is compared with --data
    """Captioned pictures of the class in general (regularisation images), given as --data: they are mixed into the batches with
    captions that get no trigger, are never measured on, and count in no epoch. May be repeated."""
    prior_share: float = option(0.0, at_least=0, at_most=0.9)
    """Share of the images of the run that come from --prior-data; 0: half, as in DreamBooth. Without --prior-data: share of a
    batch that learns the base's own prediction, for captions without the trigger, e.g. 0.25; 0: none."""
    prior_weight: float = option(1.0, above=0)
    """What the loss of these images is multiplied by."""
    prior_prompts: tuple[str, ...] = option((), text=True)
    """Without --prior-data: their captions: texts, or one .txt file with one on each line. None given: their own without the
    --trigger."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_data and self.prior_prompts:
            raise UserError("--prior-prompts does nothing with --prior-data, whose pictures have captions: leave one away")
        if self.prior_data and not self.prior_share:
            object.__setattr__(self, "prior_share", 0.5)
        if not self.prior_share and (self.prior_prompts or self.prior_weight != 1):
            raise UserError("--prior-weight and --prior-prompts do nothing without --prior-share or --prior-data")
        if len(self.prior_prompts) == 1 and self.prior_prompts[0].endswith(".txt"):
            object.__setattr__(self, "prior_prompts", lines_in("--prior-prompts", Path(self.prior_prompts[0])))

    @property
    def share_of_base(self) -> float:
        """Share of a batch that learns the base's own prediction."""
        return 0.0 if self.prior_data else self.prior_share


@dataclass(frozen=True)
class MemoryConfig(Options):
    vram_gb: float | None = option(None, above=0, at_most=10_000, resume="free")
    """GiB of the GPU that this process may take, CUDA's own included: planned for and enforced. None, or more than is free:
    what is free."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = option("auto")
    """Dtype of the activations; LoRA weights stay float32. auto: fp16 on CUDA, fp32 on CPU."""
    base_precision: Literal["auto", "fp16", "bf16", "fp32", "int8", "nf4"] = option("auto")
    """What the frozen linear layers are stored in. auto: --precision, or fewer bits if the budget asks for it."""
    checkpointing: Literal["auto", "all", "none"] = option("auto", resume="free")
    """Blocks that recompute their activations in the backward pass instead of keeping them. auto: as few as fit."""
    optimizer: str = option("adamw8bit", resume="fixed")
    """adamw8bit (AdamW with 8-bit states), adamw, lion8bit, adafactor, prodigy, schedulefree, or the class of another one, as
    torch.optim.Muon. On MPS adamw takes the place of adamw8bit."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "xformers", "sdpa"] = option("auto", resume="free")
    """Attention kernel of the U-Net. auto: the fastest here. sdpa: PyTorch's choice."""
    cuda_graph: Literal["auto", "on", "off"] = option("auto", resume="free")
    """Replay the step as one CUDA graph. auto: on CUDA, where it can be captured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_precision in UNPACKED and self.precision not in ("auto", self.base_precision):
            raise UserError(f"--base-precision {self.base_precision} contradicts --precision {self.precision}: leave one away")
        check_optimizer(self.optimizer)

    def resolved(self, device: "torch.device") -> "MemoryConfig":
        """With the precision that it means on `device`, that of an unpacked base if one is named, and the optimiser there."""
        precision = self.base_precision if self.base_precision in UNPACKED else self.precision
        no_8bit = device.type == "mps" and self.optimizer == "adamw8bit"  # bitsandbytes has none there
        optimizer = "adamw" if no_8bit else self.optimizer
        return replace(self, precision=resolve_precision(precision, device), optimizer=optimizer)  # type: ignore[arg-type]


def resolve_precision(precision: str, device: "torch.device") -> str:
    """'auto' -> 'fp16' on CUDA, as in the recipe, 'fp32' elsewhere."""
    return precision if precision != "auto" else "fp16" if device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class CheckpointConfig(Options):
    save_every: int | str = option(150, resume="free")
    """Steps between checkpoints, or looks at every picture: 1epoch. The last step is always saved."""
    format: Literal["kohya", "diffusers", "both"] = option("kohya", resume="free")
    """Layout of the LoRA files. kohya is read by diffusers, ComfyUI and A1111; diffusers' own by few others."""
    save_dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", resume="free")
    """Dtype of the weights in the files."""
    keep: int | None = option(None, at_least=1, resume="free")
    """Newest LoRA files of this run to keep. None: all, as the best is often not the last."""
    out: Path = option(Path("checkpoints"), resume="free")
    """Folder for LoRA files and the state of the run."""
    resume: str = option("auto", resume="free")
    """'auto' (from the newest whole state in --out, if there is one), 'none' (what is in --out is moved aside), or a state,
    or the folder of a run."""
    name: str | None = option(None, resume="free")
    """Name of the LoRA: its files are NAME-000450.safetensors, its log's folder NAME-… too. None:
    pytorch_lora_weights_450.safetensors."""
    author: str | None = option(None, text=True, resume="free")
    """Your name, for the header of the LoRA files."""
    description: str | None = option(None, text=True, resume="free")
    """What the LoRA shows, for the header of its files."""
    license: str | None = option(None, text=True, resume="free")
    """Under which licence others may use the LoRA, for the header of its files."""
    tags: bool = option(True, resume="free")
    """Put the commonest tags of the captions into the header, where other programs show them as hints for prompts."""
    resume_override: bool = option(False, resume="free")
    """Resume although options differ from those of the state, with the new ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps_between_saves(1)
        if self.name is not None and not is_name(self.name):
            raise UserError(f"--name {self.name!r} must be a name of letters, digits, spaces and - _ . +, up to 150 bytes")

    @property
    def pattern(self) -> str:
        """For glob: the names of the LoRA files."""
        return f"{self.name}-[0-9]*" if self.name else "pytorch_lora_weights_*"

    def steps_between_saves(self, per_epoch: float) -> int:
        """--save-every in steps. `per_epoch`: steps until each picture was looked at once, on average."""
        number = re.fullmatch(r"(\d*\.?\d+) ?(epochs?)?", str(self.save_every))
        if not number or float(number[1]) <= 0 or not (number[2] or number[1].isdecimal()):
            raise UserError(f"--save-every {self.save_every}: a number of steps from 1 up, or of epochs: 0.5epoch, 2epochs")
        return math.ceil(float(number[1]) * per_epoch) if number[2] else int(number[1])


@dataclass(frozen=True)
class GalleryConfig(Options):
    pictures: bool = option(True, resume="free")
    """Draw base and LoRA, into the folder `samples` in --out and for TensorBoard."""
    prompts: tuple[str, ...] = option((), resume="free")
    """What to draw: texts, or one file: a prompt on each line, with kohya's options such as --w 832, or TOML. None given: the
    evaluation prompts of the model."""
    sample_every: int = option(0, at_least=0, resume="free")
    """Steps between pictures; 0: at every save."""


@dataclass(frozen=True)
class ReportConfig(Options):
    log_to: Literal["tensorboard", "wandb", "both"] = option("tensorboard", resume="free")
    """Where the run can be watched. wandb: Weights & Biases, project sdxl-lora or that of WANDB_PROJECT."""
    log_dir: Path = option(Path("runs"), resume="free")
    """Folder for logs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = None if self.log_to == "tensorboard" else find_spec("wandb")
        if self.log_to != "tensorboard" and not (found and found.origin):  # a folder `wandb` of logs would be found, too
            raise UserError(f"--log-to {self.log_to} needs a package that is not here: pip install 'wandb>=0.31'")

    def new_log(self, name: str | None) -> str:
        """A folder named after the LoRA and the time."""
        return str(self.log_dir / time.strftime(f"{name}-%Y%m%d-%H%M%S" if name else "%Y%m%d-%H%M%S"))


@dataclass(frozen=True)
class ValidationConfig(Options):
    """Pictures that are not trained on, and what is measured on them."""

    validate: str | None = option(None)
    """Pictures to measure on that are never trained on: a folder (or what else --data takes), a share of the data such as 0.1,
    or 'none'. None: 8 % of the data, of 20 pictures or more; the demo has its own."""
    validate_every: int = option(0, at_least=0, resume="free")
    """Steps between measurements; 0: at every save."""
    patience: int | None = option(None, at_least=1, resume="free")
    """The run ends early after so many measurements that are not better than the best. None: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (share := self.share) is not None and not 0 < share < 1:
            raise UserError(f"--validate {self.validate}: a share lies between 0 and 1, as 0.1; 'none' is without")
        if self.patience and self.validate == "none":
            raise UserError("--patience needs pictures to measure on, but --validate is none")

    @property
    def share(self) -> float | None:
        """The share of the data that --validate asks for; None if it says something else."""
        try:
            return float(self.validate or "")
        except ValueError:
            return None


@dataclass(frozen=True)
class BadStepsConfig(Options):
    max_bad_steps: int = option(20, at_least=1, resume="free")
    """The run ends after so many bad steps in a row, which have no finite loss."""


@dataclass(frozen=True)
class RanksConfig(Options):
    rank_timeout: float = option(300.0, at_least=1, resume="free")
    """Seconds a collective may wait, which is every step; if a process has not arrived by then, all processes exit."""
    check_ranks_every: int = option(100, at_least=1, resume="free")
    """Steps after which the processes compare their LoRA weights, bit by bit; also before each save."""


@dataclass(frozen=True)
class TrainConfig(Options):
    """All flags of train_lora.py. Those declared here belong to the whole run."""

    lora: LoRAConfig = LoRAConfig()
    lineage: LineageConfig = LineageConfig()
    dataset: DataConfig = DataConfig()
    captions: CaptionConfig = CaptionConfig()
    caption_files: CaptionFilesConfig = CaptionFilesConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    prior: PriorConfig = PriorConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    gallery: GalleryConfig = GalleryConfig()
    validation: ValidationConfig = ValidationConfig()
    report: ReportConfig = ReportConfig()
    bad_steps: BadStepsConfig = BadStepsConfig()
    ranks: RanksConfig = RanksConfig()
    model: str = option("demo", resume="fixed")
    """'demo' (bundled), 'sdxl' (from the hub), a hub id, a diffusers folder or a .safetensors SDXL checkpoint."""
    steps: int = option(450, at_least=1, resume="free")
    """Optimiser steps."""
    epochs: float | None = option(None, above=0, at_most=1e9, resume="free")
    """The length of the run in looks at every picture; it goes before --steps."""
    grad_accum: int = option(1, at_least=1)
    """Batches per optimiser step and process."""
    seed: int = option(0, at_least=0, at_most=MAX_SEED)
    """What is random is a function of it, and of the number of the step, the process or the sample."""
    device: str = option("auto", resume="free")
    """'auto' (CUDA if there is one, else the CPU), 'cuda', 'cpu', 'mps'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is None:
            self.optimiser.check_length(self.steps, f"--steps {self.steps}")
        trigger = self.captions.trigger.strip().lower()
        if self.prior.share_of_base and not (self.prior.prior_prompts or trigger):
            needed = "a --trigger, so that captions without it keep their pictures; or --prior-prompts, or --prior-data"
            raise UserError(f"--prior-share needs {needed}")
        if called := [text for text in self.prior.prior_prompts if trigger and trigger in text.lower()]:
            raise UserError(f"--prior-prompts {called[0]!r} holds the --trigger, whose pictures are to change: leave it away")

    @property
    def changes_steps(self) -> bool:
        """Whether what the optimiser has done in a step is changed afterwards, for which the weights are copied: see
        run/optimiser.py. Of a config that is resolved.
        """
        lora = self.lora
        return bool(lora.lora_plus or lora.lr_pattern or lora.max_norm) or len(self.optimiser.text_encoder_lr) > 1

    def resolved(self, device: "torch.device") -> "TrainConfig":
        """With values for alpha, learning rates and precision, which are saved with the run. Raises UserError."""
        lora = replace(self.lora, alpha=self.lora.resolved_alpha)
        optimiser = self.optimiser.resolved(self.model, self.memory.optimizer)
        cause = f"--targets {self.lora.targets}" if self.lora.targets in UNET_ONLY else "--no-train-text-encoder"
        lora = replace(lora, train_text_encoder=lora.train_text_encoder and lora.targets not in UNET_ONLY)
        if any(self.optimiser.text_encoder_lr) and not lora.train_text_encoder:
            raise UserError(f"--text-encoder-lr does nothing with {cause}")
        optimiser = optimiser if lora.train_text_encoder else replace(optimiser, text_encoder_lr=(0.0,))
        return replace(self, lora=lora, optimiser=optimiser, memory=self.memory.resolved(device))

    def in_steps(self, epoch: float, processes: int) -> "TrainConfig":
        """With --steps and --save-every in optimiser steps; an epoch has `epoch` draws. Raises UserError."""
        per_epoch = epoch / (self.dataset.bs * self.grad_accum * processes)
        steps = math.ceil(self.epochs * per_epoch) if self.epochs else self.steps
        self.optimiser.check_length(steps, f"the run of {steps} steps")
        between = self.checkpoints.steps_between_saves(per_epoch)
        return replace(self, steps=steps, checkpoints=replace(self.checkpoints, save_every=between))


@dataclass(frozen=True)
class TrainCommand:
    """The command line of train_lora.py: the options of a run, and files that give some of them."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A TOML file of flags by name, as `rank = 8`. May be repeated: the later file wins, and flags win over files."""
