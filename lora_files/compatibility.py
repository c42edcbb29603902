"""What diffusers, ComfyUI, A1111 and Forge make of a LoRA file: rules about names, alphas and headers.

Those for diffusers (0.42 with PEFT 0.21 and transformers 5) are held against the library itself by the tests, ComfyUI's names
were compared with its own map of SDXL; what A1111 and Forge do is read in their sources. None of the three was started.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lora_files.names import diffusers_name, sgm_path
from lora_files.read import A_OR_B_KEY, Contents, foreign

sys.path.insert(0, str(Path(__file__).parents[1]))

COMPONENT_LABELS = {"unet": "U-Net", "text_encoder": "text encoder 1", "text_encoder_2": "text encoder 2"}


@dataclass(frozen=True)
class LoraFile(Contents):
    """A file beside the model that it is looked at for."""

    shapes: dict[str, torch.Size]

    @cached_property
    def modules(self) -> list[str]:
        """The stems that hold weights of a layer, in the order of the file."""
        return [stem for stem, mine in self.parts.items() if mine.keys() - {"alpha"} and not stem.startswith("bundle_emb")]

    @cached_property
    def kinds(self) -> dict[str, str]:
        """{stem: what it is} of the modules that are no plain LoRA."""
        return {stem: kind for stem in self.modules if (kind := foreign(self.parts[stem]))}

    @cached_property
    def plain(self) -> dict[str, str]:
        """{stem: module path} of plain A and B that fit the model."""
        return {stem: module for stem, module in self.places.items() if stem not in self.kinds}

    @cached_property
    def suffixes(self) -> dict[str, set[str]]:
        """{stem: what is behind it in the keys of its A and B}"""
        found: dict[str, set[str]] = {}
        for match in filter(None, map(A_OR_B_KEY.fullmatch, self.tensors)):
            found.setdefault(match[1], set()).add(match[0].removeprefix(match[1]))
        return found

    @cached_property
    def not_finite(self) -> list[str]:
        """The modules of `deltas` with a value that is not finite."""
        numbers = {module: (A, B, torch.tensor(alpha)) for module, (A, B, alpha) in self.deltas.items()}
        return [module for module, parts in numbers.items() if not all(part.float().isfinite().all() for part in parts)]

    @cached_property
    def dead(self) -> list[str]:
        """The modules of `deltas` whose ΔW is exactly 0: every column of B, or the row of A that it meets, or α is."""
        return [m for m, (A, B, alpha) in self.deltas.items() if not (alpha and (used(A) & used(B.transpose(0, 1))).any())]

    @cached_property
    def kohya(self) -> bool:
        """Whether diffusers takes the file for one of kohya's."""
        return all(key.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) for key in self.tensors)

    @cached_property
    def peft(self) -> dict:
        """The metadata of diffusers and PEFT."""
        return json.loads(self.metadata.get("lora_adapter_metadata", "{}"))

    @cached_property
    def silent(self) -> list[str]:
        """The stems of `plain` for which nothing says an α."""
        found = [stem for stem in self.plain if "alpha" not in self.parts[stem]]
        return [stem for stem in found if not self.peft and self.deltas[self.plain[stem]][2] == len(self.parts[stem]["down"])]

    def within(self, component: str) -> dict[str, str]:
        """{stem: module path} of `plain` in a component."""
        return {stem: module for stem, module in self.plain.items() if module.startswith(f"{component}.")}


def used(half: Tensor) -> Tensor:
    """Which rows hold anything but zeros: [r, …] -> [r] bool."""
    return (half.flatten(1) != 0).any(1)


# What the programs do: names that they know, and rules.

KNOWN_NAMES = [  # (component, how a module of it may be called, who knows it so); sources in the docstring of `names`
    ("unet", "lora_unet_{sgm_}", "ComfyUI A1111 Forge"),
    ("unet", "lora_unet_{path_}", "ComfyUI A1111 Forge"),
    ("unet", "diffusion_model.{sgm}", "ComfyUI Forge"),
    ("unet", "unet.{processor}", "ComfyUI Forge"),
    ("unet", "{processor}", "ComfyUI Forge"),
    ("unet", "lycoris_{path_}", "ComfyUI"),
    ("text_encoder", "lora_te1_{path_}", "ComfyUI A1111 Forge"),
    ("text_encoder", "lora_te_{path_}", "ComfyUI Forge"),
    ("text_encoder", "text_encoder.{path}", "ComfyUI Forge"),
    ("text_encoder", "text_encoders.clip_l.transformer.{path}", "ComfyUI"),
    ("text_encoder_2", "lora_te2_{path_}", "ComfyUI A1111 Forge"),
    ("text_encoder_2", "text_encoder_2.{path}", "ComfyUI Forge"),
    ("text_encoder_2", "text_encoders.clip_g.transformer.{path}", "ComfyUI"),
]
UNKNOWN = {  # what the table would give too many
    "ComfyUI": r"text_encoder_2\.text_projection",
    "A1111": r".*text_projection|lora_unet_add_embedding_linear_\d|lora_unet_up_blocks_0_upsamplers_0_conv",
    "Forge": r"text_encoder_2\.text_projection",
}
UIS = ("ComfyUI", "A1111", "Forge")
READ_BY = {  # kinds that are no plain LoRA -> who has code for them; DoRA has rules of its own
    "a LoCon with Tucker decomposition": UIS,
    "LoHa": UIS,
    "LoKr": UIS,
    "OFT": ("ComfyUI", "A1111"),
    "a difference of whole weights": UIS,
}


@cache
def names(program: str, module: str) -> set[str]:
    """The stems under which a program looks for a module of the model.

    After ComfyUI's comfy/lora.py, A1111's extensions-builtin/Lora/networks.py and Forge's comfyui_lora_collection/lora.py.
    """
    path = diffusers_name(module).partition(".")[2]
    sgm = sgm_path(path)
    processor = re.sub(r"\.to_out\.0$", ".to_out", path).replace(".to_", ".processor.to_")
    spelled = {"path": path, "sgm": sgm, "processor": processor, "path_": path.replace(".", "_"), "sgm_": sgm.replace(".", "_")}
    mine = [name for component, name, known in KNOWN_NAMES if module.startswith(f"{component}.") and program in known.split()]
    return {name for name in (name.format(**spelled) for name in mine) if not re.fullmatch(UNKNOWN[program], name)}


Hits = Callable[[LoraFile, str], bool | Iterable[str]]
H = TypeVar("H", bound=Hits)
Rules = dict[str, list[tuple[str, Hits]]]
RULES: Rules = {program: [] for program in ("diffusers", *UIS)}
REMARKS: Rules = {program: [] for program in RULES}


def rule(says: str, *programs: str, table: Rules = RULES) -> Callable[[H], H]:
    """Enters a function (file, program) -> the modules that the program leaves out or gets wrong; True: all of them.

    `says` is the reason, with {n} for their number.
    """

    def enter(hits: H) -> H:
        for program in programs:
            table[program].append((says, hits))
        return hits

    return enter


@rule("{n} not of this model", *RULES)
def unfit(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stems in file.wrong.values() for stem in stems)


@rule("raises: not every key has 'lora' in it", "diffusers")
def without_lora(file: LoraFile, program: str) -> bool:
    return any("lora" not in key for key in file.tensors if "dora_scale" not in key)


@rule("raises: a key is neither lora_down nor its lora_up nor the alpha of both", "diffusers")
def not_renamed(file: LoraFile, program: str) -> bool:
    pair = {".lora_down.weight", ".lora_up.weight"}
    whole = all(mine.keys() - {"alpha", "dora_scale"} == {"down", "up"} for mine in file.parts.values())
    return file.kohya and not (whole and all(suffixes == pair for suffixes in file.suffixes.values()))


@rule("raises: lora_adapter_metadata beside alphas", "diffusers")
def two_alphas(file: LoraFile, program: str) -> bool:
    return file.kohya and bool(file.peft) and any("alpha" in mine for mine in file.parts.values())


@rule("raises: A or B has not the shape of its layer", "diffusers")
def other_shape(file: LoraFile, program: str) -> bool:
    dims = (({half.ndim for half in file.deltas[module][:2]}, len(file.shapes[module])) for module in file.plain.values())
    return "have other shapes than their layer" in file.wrong or any(halves != {layer} for halves, layer in dims)


@rule("raises: text encoder 2 without text_model in its names", "diffusers")
def without_text_model(file: LoraFile, program: str) -> bool:
    return any(".text_model." in module and "text_model" not in stem for stem, module in file.plain.items())


@rule("raises: lora_adapter_metadata lacks the rank or the target_modules of a component", "diffusers")
def half_told(file: LoraFile, program: str) -> bool:
    def lacking(component: str) -> bool:
        rank, ranks, targets = (file.peft.get(f"{component}.{key}") for key in ("r", "rank_pattern", "target_modules"))
        return not targets or not (ranks or {len(file.deltas[m][0]) for m in file.within(component).values()} == {rank})

    return "lora_adapter_metadata" in file.metadata and any(lacking(c) for c in COMPONENT_LABELS if file.within(c))


SPELLINGS = {  # how the key of a down half goes on behind the module -> what the spelling is called here
    ".lora_A.weight": "PEFT",
    ".lora_A.default.weight": "named",
    ".lora.down.weight": "old",
    ".lora_linear_layer.down.weight": "linear",
    "_lora.down.weight": "processor",
}


def spelling(file: LoraFile, stem: str) -> str:
    """How diffusers meets a module: of kohya's it has turned the attention of a text encoder into the processors of 2023."""
    kind = SPELLINGS.get(min(file.suffixes[stem]), "unknown")
    if file.kohya:
        kind = "processor" if "self_attn" in stem else "linear" if "_te" in stem else "old"
    return "projection" if "text_projection" in stem and (file.kohya or kind == "old") else kind


def readable(file: LoraFile, component: str) -> set[str]:
    """The spellings that diffusers reads in a component, by what it meets there; none: it raises."""
    met = [(spelling(file, stem), stem) for stem in file.within(component)]
    if component == "unet":  # the first key decides
        kinds = {"PEFT"} if met and met[0][0] in ("PEFT", "named") else {"PEFT", "old", "processor"}
        return kinds if any(kind in kinds or kind == "named" for kind, _ in met) else set()
    if any(kind == "processor" and "_out" in stem for kind, stem in met):
        return {"linear", "PEFT", "projection", "processor"}
    told = any(kind == "linear" or (kind == "PEFT" and "self_attn" in stem) for kind, stem in met)
    return {"linear", "PEFT", "projection"} if told else set()


def unread(file: LoraFile) -> bool | list[str]:
    """The modules whose spelling diffusers drops; True: it raises."""
    kinds = {component: readable(file, component) for component in COMPONENT_LABELS if file.within(component)}
    lost = [stem for component in kinds for stem in file.within(component) if spelling(file, stem) not in kinds[component]]
    return lost if all(kinds.values()) else True


@rule("raises: a text encoder has neither out_proj nor mlp, from which it tells the spelling", "diffusers")
def no_attention(file: LoraFile, program: str) -> bool:
    return file.kohya and unread(file) is True


@rule("{n} of a text encoder without out_proj, for want of which it drops them", "diffusers")
def no_out_proj(file: LoraFile, program: str) -> bool | list[str]:
    return file.kohya and unread(file)


@rule("raises: it cannot tell how the keys of a component are spelled", "diffusers")
def untold(file: LoraFile, program: str) -> bool:
    return unread(file) is True


@rule("{n} in another spelling than the rest, which it drops", "diffusers")
def dropped(file: LoraFile, program: str) -> bool | list[str]:
    return unread(file)


@rule("{n} with another prefix than unet., text_encoder. or text_encoder_2.", "diffusers")
def other_prefix(file: LoraFile, program: str) -> Iterable[str]:
    known = ("unet.", "text_encoder.", "text_encoder_2.")
    return () if file.kohya else (stem for stem in file.modules if not stem.startswith(known))


@rule("{n} in SGM's names, which it drops beside diffusers'", "diffusers")
def two_namings(file: LoraFile, program: str) -> Iterable[str]:
    sgm = [stem for stem in file.modules if re.search("input_blocks|middle_block|output_blocks", stem)]
    return sgm if file.kohya and any(re.search("down_blocks|mid_block|up_blocks", stem) for stem in file.modules) else ()


@rule("{n} under a name that it takes for another", "diffusers")
def misread(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem in file.modules if stem.startswith("lora_unet_add_embedding_linear"))


@rule("{n} with another alpha than the most of their component, which it gives to all", "diffusers")
def unequal_alphas(file: LoraFile, program: str) -> Iterator[str]:
    for component in COMPONENT_LABELS if file.kohya else ():
        mine = file.within(component)
        told = Counter(float(file.parts[stem]["alpha"]) for stem in mine if "alpha" in file.parts[stem])
        for stem, module in mine.items() if told else ():
            attention = re.search(r"\.(self_)?attn\d?\.", module)  # its names in diffusers' table of alphas match nothing
            found = not attention and re.search(r"^unet\.|\.text_model\.|\.text_projection$", module)
            if file.deltas[module][2] != told.most_common(1)[0][0] and not (found and "alpha" in file.parts[stem]):
                yield stem


@rule("{n} not among the target_modules of lora_adapter_metadata", "diffusers")
def no_target(file: LoraFile, program: str) -> Iterator[str]:
    for component in ("text_encoder", "text_encoder_2") if file.peft else ():  # in the U-Net the keys decide
        ends = tuple(f".{target}" for target in file.peft.get(f"{component}.target_modules") or ())
        yield from (stem for stem, module in file.within(component).items() if not module.endswith(ends))


@rule("{n} of DoRA, of which it drops dora_scale and adds the rest as plain LoRA", "diffusers")
def dora_scale(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem in file.kinds if "dora_scale" in file.parts[stem])


@rule("{n} of DoRA in a text encoder, where it loads no magnitude", "diffusers")
def text_magnitude(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem in file.kinds if stem.startswith("text_encoder"))


@rule("raises: a module has neither lora_down and lora_up nor lora_A and lora_B", "A1111")
def no_pair(file: LoraFile, program: str) -> bool:
    pairs = ({".lora_down.weight", ".lora_up.weight"}, {".lora_A.weight", ".lora_B.weight"})
    met = {*file.plain, *file.wrong.get("lack A or B", ())} - set(unnamed(file, program))
    return any("." not in stem and file.suffixes.get(stem) not in pairs for stem in met)


@rule("{n} under a name that it does not know", *UIS)
def unnamed(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem, module in file.places.items() if stem not in names(program, module))


@rule("refuses a file of which more than 12 keys match nothing", "Forge")
def version_mismatch(file: LoraFile, program: str) -> bool:
    unmatched = {*unnamed(file, program), *file.wrong.get("match no layer", ())}
    return sum(len(file.parts[stem]) or 1 for stem in unmatched) > 12


@rule("{n} at another strength: their alpha is in the header, which it does not read", *UIS)
def alpha_in_header(file: LoraFile, program: str) -> Iterator[str]:
    for stem, module in file.plain.items():
        A, _, alpha = file.deltas[module]
        if "alpha" not in file.parts[stem] and alpha != len(A):
            yield stem


@rule("{n} of a kind that it does not read", *UIS)
def unread_kind(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem, kind in file.kinds.items() if kind != "DoRA" and program not in READ_BY.get(kind, ()))


@rule("{n} of DoRA without dora_scale, which it adds as plain LoRA", *UIS)
def peft_magnitude(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem, kind in file.kinds.items() if kind == "DoRA" and "dora_scale" not in file.parts[stem])


@rule("{n} of DoRA with a norm for each output, which it gets wrong", *UIS)
def norm_of_outputs(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem in file.kinds if len(file.parts[stem].get("dora_scale", ())) > 1)


@rule("not in its list under SDXL, since the header has no ss_base_model_version of sdxl_…", "A1111", table=REMARKS)
def hidden(file: LoraFile, program: str) -> bool:
    return bool(file.metadata) and not file.metadata.get("ss_base_model_version", "").startswith("sdxl_")


@rule("alpha taken for the rank, although the header has another ss_network_alpha", *RULES, table=REMARKS)
def hinted(file: LoraFile, program: str) -> bool:
    alpha, rank = (file.metadata.get(key, "").removesuffix(".0") for key in ("ss_network_alpha", "ss_network_dim"))
    return bool(file.silent) and bool(alpha) and alpha != rank


@rule("by its source alone for this kind", *UIS, table=REMARKS)
def unproven(file: LoraFile, program: str) -> bool:
    return any(program in READ_BY.get(kind, ()) for kind in file.kinds.values())


def verdict(file: LoraFile, program: str) -> str:
    """'loads', 'partly (426 of 986 modules): why' or 'not: why'; it loads if every ΔW is the one that is in the file."""
    lost: set[str] = set()
    reasons = []
    for says, hits in RULES[program]:
        found = hits(file, program)
        hit = set(file.modules).intersection(file.modules if found is True else found or ()) - lost
        if hit:
            first = f", first {next(stem for stem in file.modules if stem in hit)}" if "{n}" in says else ""
            reasons.append(says.format(n=len(hit)) + first)
            lost |= hit
    right = len(file.modules) - len(lost)
    partly = f"partly ({right} of {len(file.modules)} modules)"
    word = "not" if not right else partly if lost else "loads"
    reasons += [says for says, hits in REMARKS[program] if hits(file, program)]
    return f"{word}: {'; '.join(reasons)}" if reasons else word
