"""What a person should know before and after a run: where it usually goes wrong, how long it takes, what to do next."""

import shlex
from pathlib import Path

from data import Stream

MANY_LOOKS = 100  # at each picture: then they are learned by heart more often than not
MUCH_ENLARGED = 1.5
SLOW_ON_A_CPU = 10**9  # parameters; SDXL has 3.4 × 10⁹, and takes minutes a step


def concerns(stream: Stream, looks: float, on_cpu: bool, parameters: int) -> list[str]:
    """One line for each thing in which beginners go wrong. `looks`: at each picture; `parameters`: of the base."""
    lines = []
    if looks > MANY_LOOKS:
        lines.append(f"{looks:.0f} looks at each picture are many: it may learn them by heart; try the earlier files, too")
    factors, counts = stream.enlargements()
    if much := counts[factors > MUCH_ENLARGED].sum():
        advice = "they teach blur: take larger ones, or a smaller --resolution"
        lines.append(f"{much} of {counts.sum()} pictures are enlarged more than {MUCH_ENLARGED} times: {advice}")
    if on_cpu and parameters > SLOW_ON_A_CPU:
        lines.append("this model on a CPU takes minutes a step: a GPU of 8 GB is enough")
    return lines


def next_steps(file: Path, log_dir: str | None, model: str) -> list[str]:
    """Commands to copy after a run that wrote `file`; `log_dir`: of TensorBoard."""
    samples, quoted = file.parent / "samples", shlex.quote(str(file))
    lines = [f"pictures   {samples}/"] if samples.exists() else []
    lines.append(f"look       python infer.py --lora {quoted} --compare")
    if log_dir:
        lines.append(f"curves     tensorboard --logdir {shlex.quote(str(Path(log_dir).parent))}")
    if model != "demo":  # no other program knows the bundled model
        lines.append(f"use it     cp {quoted} ComfyUI/models/loras/    (strength 0.7 to 1)")
    return lines
