"""What a picture is drawn from: a prompt with its seed, size and strength, from a line, a TOML file or the header of a LoRA."""

import json
import os
import re
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.errors import UserError
from common.files import ROOT
from common.options import MAX_SEED, describe_bounds, option, within
from common.text import NO_TEXT, read_text

DEMO_PROMPTS = ROOT / "assets/demo/prompts.txt"
NARUTO_PROMPTS = ["Naruto Uzumaki eating ramen", "Bill Gates in Naruto style", "A boy with blue eyes in Naruto style"]
NEUTRAL_PROMPTS = ["a cat on a roof", "a woman with red hair in a garden", "a house by a lake"]  # for a style of one's own
LINE_OPTIONS = {  # as kohya's scripts read them, but for --rescale, which they do not have
    "n": "negative", "w": "width", "h": "height", "d": "seed", "s": "steps", "l": "guidance", "rescale": "guidance_rescale",
    "am": "strength",
}  # fmt: skip
OTHER_SYNTAX = re.compile(  # of A1111's prompts and what it writes below a picture, of ComfyUI and of wildcards
    r"<(?:lora|lyco|hypernet):[^>]*>|[(\[][^()\[\]]*(?::\s*-?\d*\.\d+|[^\d\s]\s*:\s*-?\d+)\s*[)\]]"
    r"|^Negative prompt:|^Steps: \d+,|(?<!\S)embedding:\S+|(?<!\S)__\w+__|\{[^{}]*\|[^{}]*\}"
)
PROMPT_FILES = (".txt", ".toml", ".json", ".jsonl", ".csv", ".yaml", ".yml")  # the first two are read
MAX_LENGTH = 10_000  # characters: one may come from a file of unknown origin
SAMPLER_NAMES = {  # class of diffusers -> A1111's name
    "DDIMScheduler": "DDIM", "DPMSolverMultistepScheduler": "DPM++ 2M", "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a", "UniPCMultistepScheduler": "UniPC",
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A picture to draw. None: the default of whoever draws it, which `filled` puts in."""

    text: str
    negative: str | None = None
    seed: int | None = option(None, at_least=0, at_most=MAX_SEED)
    width: int | None = option(None, multiple_of=8, at_least=64, at_most=4096)
    height: int | None = option(None, multiple_of=8, at_least=64, at_most=4096)
    steps: int | None = option(None, at_least=1, at_most=1000)
    guidance: float | None = option(None, at_least=0)
    guidance_rescale: float | None = option(None, at_least=0, at_most=1)
    strength: float | None = option(None, at_least=-100, at_most=100)
    """Of the LoRA: W + strength·ΔW."""

    def given(self) -> dict[str, str | int | float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def filled(self, number: int, defaults: "Prompt") -> "Prompt":
        """With `defaults` for what it does not say; the seed is then that of `defaults` + `number`."""
        seed = None if defaults.seed is None else (defaults.seed + number) % (MAX_SEED + 1)
        return Prompt(**{**asdict(defaults), "seed": seed, **self.given()})


TYPES = {"text": str, "negative": str, "guidance": float, "guidance_rescale": float, "strength": float}  # int for the others
WORDS = {str: "a text", int: "a whole number", float: "a number"}


def make_prompt(where: str, given: dict[str, object], convert: bool = False) -> Prompt:
    """`given`: {field: value}; with `convert` numbers are texts. Raises UserError, which begins with `where`."""
    values: dict[str, object] = {}
    for spec in (spec for spec in fields(Prompt) if spec.name in given):
        kind, value = TYPES.get(spec.name, int), given[spec.name]
        bounds = {name: bound for name, bound in spec.metadata.get("bounds", {}).items() if bound is not None}
        try:
            if not convert and type(value) not in ((int, float) if kind is float else (kind,)):
                raise ValueError
            value = kind(value)
            inside = not bounds or within(value, **bounds)
        except (ValueError, OverflowError):
            raise UserError(f"{where}: {spec.name} is {WORDS[kind]}, not {str(value)[:40]!r}") from None
        if not inside:
            raise UserError(f"{where}: {spec.name} must {describe_bounds(**bounds)}, not {value}")
        values[spec.name] = " ".join(value.split()) if kind is str else value
    if unknown := given.keys() - values.keys():
        raise UserError(f"{where}: {min(unknown)} is not known: {', '.join(spec.name for spec in fields(Prompt))} are")
    if "text" not in values:
        raise UserError(f"{where} has no text")
    for text in (str(values[name]) for name in ("text", "negative") if name in values):
        if found := OTHER_SYNTAX.search(text):
            raise UserError(f"{where}: {found[0][:40]} is not read, but would be drawn: remove it")
        if len(text) > MAX_LENGTH or NO_TEXT.search(text):
            raise UserError(f"{where} holds control characters, what is no UTF-8, or more than {MAX_LENGTH} characters")
    return Prompt(**values)  # type: ignore[arg-type]


def parse_line(where: str, line: str) -> Prompt:
    """'a cat --n blurry --w 832 --h 1216 --d 7 --s 25 --l 5 --am 0.8' -> the prompt. Raises UserError."""
    text, *parts = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line)
    given: dict[str, object] = {"text": text}
    for part in parts:
        name, value = re.fullmatch(r"([\w-]+)[\s=]*(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        if name not in LINE_OPTIONS:
            raise UserError(f"{where}: --{name} is no option of a prompt: {', '.join(f'--{n}' for n in LINE_OPTIONS)} are")
        if LINE_OPTIONS[name] in given:
            raise UserError(f"{where}: --{name} is given twice")
        given[LINE_OPTIONS[name]] = value
    return make_prompt(where, given, convert=True)


def parse_tables(where: str, tables: object) -> list[Prompt]:
    """A list of {field: value} -> the prompts. Raises UserError."""
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f'{where}: the prompts are no list of tables, each [[prompt]] with text = "…"')
    return [make_prompt(f"{where} prompt {n}", table) for n, table in enumerate(tables, 1)]


def parse_file(where: str, text: str, toml: bool) -> list[Prompt]:
    """Tables [[prompt]], or lines but for empty ones and those that begin with #. Raises UserError."""
    if toml:
        try:
            tables = tomllib.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        if other := tables.keys() - {"prompt"}:
            raise UserError(f"{where}: {min(other)} is not known: only tables [[prompt]] are")
        return parse_tables(where, tables.get("prompt"))
    lines = {n: line for n, line in enumerate(map(str.strip, text.splitlines()), 1) if line and not line.startswith("#")}
    if not lines:
        raise UserError(f"{where} is empty")
    return [parse_line(f"{where} line {n}", line) for n, line in lines.items()]


def read_prompts(prompts: tuple[str, ...], model: str, trigger: str = "") -> list[Prompt]:
    """The value of --prompts: one file, or texts, each read as a line. If it is empty, the default ones for `model`: for SDXL
    those of the Naruto data set, or, with a `trigger`, of no style.

    Raises UserError if the file is missing, empty or no text, or for what is not known in it.
    """
    if not prompts:
        usual = NEUTRAL_PROMPTS if trigger else NARUTO_PROMPTS
        return list(map(Prompt, DEMO_PROMPTS.read_text("utf-8").splitlines() if model == "demo" else usual))
    first, where = prompts[0], f"--prompts {prompts[0]}"
    if len(prompts) == 1 and first.endswith(PROMPT_FILES[2:]):
        raise UserError(f"{where}: only lines of text and TOML are read: write a .txt with a prompt on each line")
    if len(prompts) == 1 and os.path.isfile(first):  # Path.is_file() would raise for a long prompt
        try:
            text = read_text(Path(first).read_bytes())
        except (ValueError, OSError) as error:
            raise UserError(f"{where} is {error}") from None
        return parse_file(where, text, first.endswith(".toml"))
    if len(prompts) == 1 and (first.endswith(PROMPT_FILES) or os.path.isdir(first)):
        raise UserError(f"{where}: no such file")
    return [parse_line(f"--prompts text {n}", prompt) for n, prompt in enumerate(prompts, 1)]


def to_header(prompts: list[Prompt]) -> dict[str, str]:
    """What the header of a LoRA file says about the prompts of its run."""
    return {"sdxl_lora.prompts": json.dumps([prompt.given() for prompt in prompts])} if prompts else {}


def from_header(path: Path, metadata: dict[str, str]) -> list[Prompt]:
    """The prompts of the run that a LoRA file comes from; none if its header does not say. Raises UserError."""
    try:
        tables = json.loads(metadata.get("sdxl_lora.prompts", "null"))
    except (ValueError, RecursionError):
        tables = ()
    return [] if tables is None else parse_tables(f"{path}: in its header (other --prompts help)", tables)


def parse_size(size: str | None) -> dict[str, int]:
    """'832x1216' -> {"width": 832, "height": 1216}, as for --size; '1024' is a square. Raises UserError."""
    if size is None:
        return {}
    width, x, height = size.lower().partition("x")
    prompt = make_prompt(f"--size {size}", {"text": "", "width": width, "height": height if x else width}, convert=True)
    return {name: value for name, value in prompt.given().items() if isinstance(value, int)}


def times(strength: float | None) -> str:
    """' × 0.8', to be read after the name of a LoRA; nothing for 1."""
    return "" if strength in (None, 1) else f" × {strength:g}"


def generation_parameters(prompt: Prompt, scheduler: object, model: str, loras: dict[str, tuple[float, str]]) -> str:
    """What A1111 writes into a picture as "parameters". `prompt`: filled; `loras`: {name: (strength, hash or "")}."""
    sampler = SAMPLER_NAMES.get(type(scheduler).__name__, type(scheduler).__name__)
    settings = {"Steps": prompt.steps, "Sampler": sampler, "CFG scale": f"{prompt.guidance:g}", "Seed": prompt.seed}
    settings |= {"Size": f"{prompt.width}x{prompt.height}", "Model": re.split(r"[/\\]", model.rstrip("/\\"))[-1]}
    if prompt.guidance_rescale:
        settings["CFG Rescale"] = f"{prompt.guidance_rescale:g}"
    if hashes := ", ".join(f"{name}: {digest}" for name, (_, digest) in loras.items() if digest):
        settings["Lora hashes"] = hashes
    texts = {name: str(value) for name, value in settings.items()}
    quoted = {name: json.dumps(t, ensure_ascii=False) if re.search("[,:]", t) else t for name, t in texts.items()}
    tags = "".join(f" <lora:{name}:{strength:g}>" for name, (strength, _) in loras.items())
    negative = [f"Negative prompt: {prompt.negative}"] if prompt.negative else []
    return "\n".join([prompt.text + tags, *negative, ", ".join(f"{name}: {value}" for name, value in quoted.items())])
