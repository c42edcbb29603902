"""How it is learned: the optimiser, learning rates, their schedule, and averages of the weights."""

from dataclasses import dataclass, replace
from importlib.util import find_spec

from common.errors import UserError
from common.options import Options, option
from options.forms import read_form

PACKAGES = {  # {--optimizer: the package that has it}, where that is not in requirements.txt
    "prodigy": "prodigyopt",
    "schedulefree": "schedulefree",
}
NAMES = ("adamw8bit", "adamw", "lion8bit", "adafactor", *PACKAGES)
USUAL_LR = {"lion8bit": 2e-5, "prodigy": 1.0}  # {--optimizer: learning rate}, of others 1e-4; prodigy finds the scale by itself
OF_TEXT = 0.2  # of --lr: guides recommend a fifth to a tenth


def check_optimizer(name: str) -> None:
    """Raises UserError if --optimizer names none, or one of a package that is not here."""
    if name not in NAMES and "." not in name:
        raise UserError(f"--optimizer {name}: choose from {', '.join(NAMES)}, or name a class as torch.optim.Muon")
    package = PACKAGES.get(name, name.partition(".")[0] if "." in name else "torch")
    if not package.isidentifier() or not find_spec(package):
        installing = f"pip install {package}" if name in PACKAGES else f"install the package of {package!r}"
        raise UserError(f"--optimizer {name} needs a package that is not here: {installing}")


@dataclass(frozen=True)
class OptimiserConfig(Options):
    lr: float | None = option(None, at_least=0)
    """Learning rate. None: 1e-4, a fifth of it for lion8bit, 1 for prodigy; for the bundled model, which is 16 times narrower
    than SDXL, 20 times as much, but for prodigy."""
    text_encoder_lr: tuple[float, ...] = option((), at_least=0)
    """Learning rate of both text encoders, or one for each. None given: a fifth of --lr; that of --lr for prodigy. 0: it
    keeps its bits."""
    text_encoder_until: float = option(1.0, above=0, at_most=1)
    """Share of the run after which the text encoders are trained no further, as 0.6; steps are faster then."""
    lr_schedule: str = option("constant")
    """After the warm-up: constant; linear, cosine or rex, which fall towards --min-lr, where they would be one step after the
    last; cosine-restarts:N, N times; or wsd:SHARE, which falls in the last share of the steps, as 0.2."""
    min_lr: float = option(0.0, at_least=0, at_most=1)
    """What the schedule falls to, as a share of the learning rate."""
    warmup: float = option(0.0, at_least=0)
    """Steps over which the learning rate rises, or a share of all, as 0.05: it begins at 1/(WARMUP + 1) of its value."""
    optimizer_args: tuple[str, ...] = option((), text=True)
    """Further settings of the optimiser, as its class names them: d_coef=0.8 use_bias_correction=True."""
    betas: tuple[float, ...] = option((), at_least=0, at_most=1)
    """Of the optimiser's averages, as 0.9 0.999. None given: its own."""
    eps: float | None = option(None, at_least=0)
    """What the optimiser adds to a denominator. None: its own."""
    weight_decay: float | None = option(None, at_least=0)
    """None: 0.01 with AdamW, else the optimiser's own."""
    clip: float = option(1.0, at_least=0)
    """Largest norm of the gradient; it is scaled down to that. 0: never."""
    ema: float | None = option(None, above=0, at_most=0.999999)
    """Average the weights over the steps, too, with this decay, as 0.999: files NAME_ema.safetensors beside the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        read_form("lr_schedule", self.lr_schedule)
        if len(self.text_encoder_lr) > 2:
            raise UserError("--text-encoder-lr takes one rate, or one for each of two text encoders")
        if self.warmup > 1 and not float(self.warmup).is_integer():
            raise UserError(f"--warmup {self.warmup:g}: a whole number of steps, or a share of them below 1")
        for pair in self.optimizer_args:
            name, equals, _ = pair.partition("=")
            if not equals or not name.isidentifier():
                raise UserError(f"--optimizer-args {pair!r}: settings are name=value, as d_coef=0.8")
            if name in ("lr", "betas", "eps", "weight_decay"):
                raise UserError(f"--optimizer-args {pair!r}: that is --{name.replace('_', '-')}")
            if sum(other.startswith(f"{name}=") for other in self.optimizer_args) > 1:
                raise UserError(f"--optimizer-args gives {name} twice: remove one")

    def resolved(self, model: str, optimizer: str) -> "OptimiserConfig":
        """With the learning rates that it means for --model and --optimizer; that of the text encoders once, or twice if they
        differ. Raises UserError.
        """
        usual = USUAL_LR.get(optimizer, 1e-4) * (20 if model == "demo" and optimizer != "prodigy" else 1)
        lr = usual if self.lr is None else self.lr
        of_text = self.text_encoder_lr or ((lr if optimizer == "prodigy" else OF_TEXT * lr),)
        if optimizer == "prodigy" and not set(of_text) <= {lr, 0}:
            raise UserError("--optimizer prodigy has one learning rate for all: --text-encoder-lr is that of --lr, or 0")
        return replace(self, lr=lr, text_encoder_lr=of_text[:1] if len(set(of_text)) == 1 else of_text)

    def check_length(self, steps: int, what: str) -> None:
        """Raises UserError if a run of `steps` is shorter than its warm-up."""
        if self.warmup > steps:
            raise UserError(f"--warmup {self.warmup:g} is longer than {what}")
