"""Which modules of a LoRA file diffusers, ComfyUI, A1111 and Forge load correctly: rules about names, alphas and headers.

The tests compare the rules for diffusers (0.42 with PEFT 0.21 and transformers 5) with the library itself. ComfyUI's names were
compared with its own map of SDXL's keys. The rules for A1111 and Forge were read in their sources. None of these three was
started.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeVar

import torch
from torch import Tensor

from lora_files.names import diffusers_name
from lora_files.read import A_OR_B_KEY, ADDITIONS, Contents, adapter_kind
from model.checkpoint import sgm_path

ADDED = "an addition to norms, biases or whole weights"
COMPONENT_LABELS = {"unet": "U-Net", "text_encoder": "text encoder 1", "text_encoder_2": "text encoder 2"}


@dataclass(frozen=True)
class LoraFile(Contents):
    """A LoRA file, and the layers of the model that it is meant for."""

    shapes: dict[str, torch.Size]
    """{module path: shape of the weight} of the model."""

    @cached_property
    def modules(self) -> list[str]:
        """The stems that hold weights of a layer, in the order of the file."""
        return [stem for stem, own in self.parts.items() if own.keys() - {"alpha"} and not stem.startswith("bundle_emb")]

    @cached_property
    def kinds(self) -> dict[str, str]:
        """{stem: kind of adapter} of the modules that are no plain LoRA."""
        added = {stem: ADDED for stem in self.modules if self.parts[stem].keys() - {"alpha"} <= ADDITIONS.keys()}
        return added | {stem: kind for stem in self.modules if (kind := adapter_kind(self.parts[stem]))}

    @cached_property
    def plain(self) -> dict[str, str]:
        """{stem: module path} of plain A and B that fit the model."""
        return {stem: module for stem, module in self.places.items() if stem not in self.kinds}

    @cached_property
    def suffixes(self) -> dict[str, set[str]]:
        """{stem: the endings of its keys of A and B, such as '.lora_A.weight'}"""
        found: dict[str, set[str]] = {}
        for match in filter(None, map(A_OR_B_KEY.fullmatch, self.tensors)):
            found.setdefault(match[1], set()).add(match[0].removeprefix(match[1]))
        return found

    @cached_property
    def not_finite(self) -> list[str]:
        """The module paths in `places` with a value that is not finite."""
        tensors = {module: self.parts[stem].values() for stem, module in self.places.items()}
        return [module for module, own in tensors.items() if not all(tensor.float().isfinite().all() for tensor in own)]

    @cached_property
    def dead(self) -> list[str]:
        """The module paths in `deltas` whose ΔW is exactly 0: α is 0, or for every k row k of A or column k of B is zero."""
        deltas = self.deltas.items()
        return [m for m, (A, B, alpha) in deltas if not (alpha and (nonzero_rows(A) & nonzero_rows(B.transpose(0, 1))).any())]

    @cached_property
    def kohya(self) -> bool:
        """Whether diffusers reads the file as one of kohya's."""
        return all(key.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) for key in self.tensors)

    @cached_property
    def peft(self) -> dict:
        """PEFT's configuration in the metadata; {} without one."""
        return json.loads(self.metadata.get("lora_adapter_metadata", "{}"))

    @cached_property
    def without_alpha(self) -> list[str]:
        """The stems in `plain` for which the file gives no α, so that it is the rank."""
        found = [stem for stem in self.plain if "alpha" not in self.parts[stem]]
        return [stem for stem in found if not self.peft and self.deltas[self.plain[stem]][2] == len(self.parts[stem]["down"])]

    def within(self, component: str) -> dict[str, str]:
        """`plain` of one component."""
        return {stem: module for stem, module in self.plain.items() if module.startswith(f"{component}.")}


def nonzero_rows(factor: Tensor) -> Tensor:
    """Which rows hold anything but zeros: [r, …] -> [r] bool."""
    return (factor.flatten(1) != 0).any(1)


# The programs: names that they know, and rules of what they do.

KNOWN_NAMES = [  # (component, stem of a module in it, programs that know it); `known_stems` says where that was read
    ("unet", "lora_unet_{sgm_}", "ComfyUI A1111 Forge"),
    ("unet", "lora_unet_{path_}", "ComfyUI A1111 Forge"),
    ("unet", "diffusion_model.{sgm}", "ComfyUI Forge"),
    ("unet", "unet.{processor}", "ComfyUI Forge"),
    ("unet", "{processor}", "ComfyUI Forge"),
    ("unet", "lycoris_{path_}", "ComfyUI Forge"),
    ("text_encoder", "lora_te1_{path_}", "ComfyUI A1111 Forge"),
    ("text_encoder", "lora_te_{path_}", "ComfyUI Forge"),
    ("text_encoder", "text_encoder.{path}", "ComfyUI Forge"),
    ("text_encoder", "text_encoders.clip_l.transformer.{path}", "ComfyUI"),
    ("text_encoder_2", "lora_te2_{path_}", "ComfyUI A1111 Forge"),
    ("text_encoder_2", "text_encoder_2.{path}", "ComfyUI Forge"),
    ("text_encoder_2", "text_encoders.clip_g.transformer.{path}", "ComfyUI"),
]
UNKNOWN = {  # stems that the table gives, but the program does not know
    "ComfyUI": r"text_encoder_2\.text_projection",
    "A1111": r".*text_projection|lora_unet_add_embedding_linear_\d|lora_unet_up_blocks_0_upsamplers_0_conv",
    "Forge": r"text_encoder_2\.text_projection",
}
UIS = ("ComfyUI", "A1111", "Forge")
READ_BY = {  # kinds that are no plain LoRA -> programs with code for them; DoRA has rules of its own
    "a LoCon with Tucker decomposition": UIS,
    "LoHa": UIS,
    "LoKr": UIS,
    "OFT": ("ComfyUI", "A1111"),
    ADDED: UIS,
}


@cache
def known_stems(program: str, module: str) -> set[str]:
    """The stems under which a program looks for a module of the model.

    After ComfyUI's comfy/lora.py, A1111's extensions-builtin/Lora/networks.py and Forge's comfyui_lora_collection/lora.py.
    """
    path = diffusers_name(module).partition(".")[2]
    sgm = sgm_path(path)
    processor = re.sub(r"\.to_out\.0$", ".to_out", path).replace(".to_", ".processor.to_")
    fields = {"path": path, "sgm": sgm, "processor": processor, "path_": path.replace(".", "_"), "sgm_": sgm.replace(".", "_")}
    stems = [stem for component, stem, known in KNOWN_NAMES if module.startswith(f"{component}.") and program in known.split()]
    return {stem for stem in (stem.format(**fields) for stem in stems) if not re.fullmatch(UNKNOWN[program], stem)}


Check = Callable[[LoraFile, str], bool | Iterable[str]]
C = TypeVar("C", bound=Check)
Rules = dict[str, list[tuple[str, Check]]]
RULES: Rules = {program: [] for program in ("diffusers", *UIS)}
REMARKS: Rules = {program: [] for program in RULES}


def rule(reason: str, *programs: str, table: Rules = RULES) -> Callable[[C], C]:
    """Registers a function (file, program) -> stems of the modules that the program omits or gets wrong; True: all modules.

    `reason` goes into the verdict, with {n} for the number of these modules. Rules in the table REMARKS add a reason only.
    """

    def register(check: C) -> C:
        for program in programs:
            table[program].append((reason, check))
        return check

    return register


@rule("{n} do not fit this model", *RULES)
def not_of_this_model(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stems in file.wrong.values() for stem in stems)


@rule("raises: not every key has 'lora' in it", "diffusers")
def key_without_lora(file: LoraFile, program: str) -> bool:
    return any("lora" not in key for key in file.tensors if "dora_scale" not in key)


@rule("raises: a module has not exactly lora_down and lora_up, with or without alpha", "diffusers")
def not_a_kohya_pair(file: LoraFile, program: str) -> bool:
    pair = {".lora_down.weight", ".lora_up.weight"}
    complete = all(own.keys() - {"alpha", "dora_scale"} == {"down", "up"} for own in file.parts.values())
    return file.kohya and not (complete and all(suffixes == pair for suffixes in file.suffixes.values()))


@rule("raises: the file has both lora_adapter_metadata and alphas", "diffusers")
def two_alphas(file: LoraFile, program: str) -> bool:
    return file.kohya and bool(file.peft) and any("alpha" in own for own in file.parts.values())


@rule("raises: A or B does not have the shape that its layer needs", "diffusers")
def wrong_shape(file: LoraFile, program: str) -> bool:
    dims = (({factor.ndim for factor in file.deltas[module][:2]}, len(file.shapes[module])) for module in file.plain.values())
    return "have other shapes than their layer" in file.wrong or any(factors != {layer} for factors, layer in dims)


@rule("raises: the names in text encoder 2 lack text_model", "diffusers")
def without_text_model(file: LoraFile, program: str) -> bool:
    return any(".text_model." in module and "text_model" not in stem for stem, module in file.plain.items())


@rule("raises: lora_adapter_metadata lacks the rank or the target_modules of a component", "diffusers")
def incomplete_metadata(file: LoraFile, program: str) -> bool:
    def lacking(component: str) -> bool:
        rank, ranks, targets = (file.peft.get(f"{component}.{key}") for key in ("r", "rank_pattern", "target_modules"))
        return not targets or not (ranks or {len(file.deltas[m][0]) for m in file.within(component).values()} == {rank})

    return "lora_adapter_metadata" in file.metadata and any(lacking(c) for c in COMPONENT_LABELS if file.within(c))


SPELLINGS = {  # ending of the key of A, which comes before that of B in the alphabet -> name of the spelling
    ".lora_A.weight": "PEFT",
    ".lora_A.default.weight": "named",
    ".lora.down.weight": "old",
    ".lora_linear_layer.down.weight": "linear",
    "_lora.down.weight": "processor",
}


def spelling(file: LoraFile, stem: str) -> str:
    """How a module is spelled when diffusers looks at it.

    It has renamed the keys of a kohya file by then: the attention of text encoders to the attention processors of 2023, their
    other layers to lora_linear_layer, and the U-Net's to lora.down.
    """
    kind = SPELLINGS.get(min(file.suffixes[stem]), "unknown")
    if file.kohya:
        kind = "processor" if "self_attn" in stem else "linear" if "_te" in stem else "old"
    return "projection" if "text_projection" in stem and (file.kohya or kind == "old") else kind


def readable(file: LoraFile, component: str) -> set[str]:
    """The spellings that diffusers reads in a component, which depend on those that it finds there. Empty: it raises."""
    found = [(spelling(file, stem), stem) for stem in file.within(component)]
    if component == "unet":  # the first key decides
        kinds = {"PEFT"} if found and found[0][0] in ("PEFT", "named") else {"PEFT", "old", "processor"}
        return kinds if any(kind in kinds or kind == "named" for kind, _ in found) else set()
    if any(kind == "processor" and "_out" in stem for kind, stem in found):
        return {"linear", "PEFT", "projection", "processor"}
    recognised = any(kind == "linear" or (kind == "PEFT" and "self_attn" in stem) for kind, stem in found)
    return {"linear", "PEFT", "projection"} if recognised else set()


def dropped(file: LoraFile) -> bool | list[str]:
    """The stems that diffusers drops because of their spelling; True: it raises."""
    kinds = {component: readable(file, component) for component in COMPONENT_LABELS if file.within(component)}
    stems = [stem for component in kinds for stem in file.within(component) if spelling(file, stem) not in kinds[component]]
    return stems if all(kinds.values()) else True


@rule("raises: a text encoder has neither out_proj nor mlp, by which it recognises the spelling", "diffusers")
def no_out_proj_and_no_mlp(file: LoraFile, program: str) -> bool:
    return file.kohya and dropped(file) is True


@rule("{n} of a text encoder without out_proj, by which it recognises their spelling: it drops them", "diffusers")
def no_out_proj(file: LoraFile, program: str) -> bool | list[str]:
    return file.kohya and dropped(file)


@rule("raises: it does not recognise the spelling of a component", "diffusers")
def unknown_spelling(file: LoraFile, program: str) -> bool:
    return dropped(file) is True


@rule("{n} spelled differently from the rest: it drops them", "diffusers")
def two_spellings(file: LoraFile, program: str) -> bool | list[str]:
    return dropped(file)


@rule("{n} with another prefix than unet., text_encoder. or text_encoder_2.", "diffusers")
def other_prefix(file: LoraFile, program: str) -> Iterable[str]:
    known = ("unet.", "text_encoder.", "text_encoder_2.")
    return () if file.kohya else (stem for stem in file.modules if not stem.startswith(known))


@rule("{n} with SGM's names: it drops them, because others have diffusers' names", "diffusers")
def two_namings(file: LoraFile, program: str) -> Iterable[str]:
    sgm = [stem for stem in file.modules if re.search("input_blocks|middle_block|output_blocks", stem)]
    return sgm if file.kohya and any(re.search("down_blocks|mid_block|up_blocks", stem) for stem in file.modules) else ()


@rule("{n} under a name that it mistakes for another", "diffusers")
def mistaken_name(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem in file.modules if stem.startswith("lora_unet_add_embedding_linear"))


@rule("{n} whose alpha is not the most frequent one of their component, which it gives to all", "diffusers")
def unequal_alphas(file: LoraFile, program: str) -> Iterator[str]:
    for component in COMPONENT_LABELS if file.kohya else ():
        plain = file.within(component)
        alphas = Counter(float(file.parts[stem]["alpha"]) for stem in plain if "alpha" in file.parts[stem])
        for stem, module in plain.items() if alphas else ():
            attention = re.search(r"\.(self_)?attn\d?\.", module)  # in diffusers' table of alphas its names match no module
            in_table = not attention and re.search(r"^unet\.|\.text_model\.|\.text_projection$", module)
            if file.deltas[module][2] != alphas.most_common(1)[0][0] and not (in_table and "alpha" in file.parts[stem]):
                yield stem


@rule("{n} not among the target_modules of lora_adapter_metadata", "diffusers")
def no_target(file: LoraFile, program: str) -> Iterator[str]:
    for component in ("text_encoder", "text_encoder_2") if file.peft else ():  # in the U-Net the keys decide
        ends = tuple(f".{target}" for target in file.peft.get(f"{component}.target_modules") or ())
        yield from (stem for stem, module in file.within(component).items() if not module.endswith(ends))


@rule("{n} of DoRA: it drops dora_scale and adds the rest as plain LoRA", "diffusers")
def dora_scale(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem in file.kinds if "dora_scale" in file.parts[stem])


@rule("{n} of DoRA in a text encoder, where it loads no magnitude", "diffusers")
def text_magnitude(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem in file.kinds if stem.startswith("text_encoder"))


@rule("raises: a module has neither lora_down and lora_up nor lora_A and lora_B", "A1111")
def no_pair(file: LoraFile, program: str) -> bool:
    pairs = ({".lora_down.weight", ".lora_up.weight"}, {".lora_A.weight", ".lora_B.weight"})
    known = {*file.plain, *file.wrong.get("lack A or B", ())} - set(unknown_name(file, program))
    return any("." not in stem and file.suffixes.get(stem) not in pairs for stem in known)


@rule("{n} under a name that it does not know", *UIS)
def unknown_name(file: LoraFile, program: str) -> Iterable[str]:
    return (stem for stem, module in file.places.items() if stem not in known_stems(program, module))


@rule("{n} of attention in text encoder 2 that lacks one of q, k, v and out: it drops them", "A1111")
def incomplete_attention(file: LoraFile, program: str) -> Iterator[str]:
    projections = {s: m.rpartition(".")[0] for s, m in file.within("text_encoder_2").items() if ".self_attn." in m}
    complete = Counter(projections.values())
    yield from (stem for stem, layer in projections.items() if complete[layer] < 4)


@rule("refuses a file in which more than 12 keys match nothing", "Forge")
def too_many_unknown(file: LoraFile, program: str) -> bool:
    unmatched = {*unknown_name(file, program), *file.wrong.get("match no layer", ())}
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
    scales = {stem: file.parts[stem]["dora_scale"] for stem in file.kinds if "dora_scale" in file.parts[stem]}
    return (stem for stem, scale in scales.items() if scale.shape[:1].numel() > 1)


@rule("not listed under SDXL: no ss_base_model_version in the header begins with sdxl_", "A1111", table=REMARKS)
def not_listed(file: LoraFile, program: str) -> bool:
    return bool(file.metadata) and not file.metadata.get("ss_base_model_version", "").startswith("sdxl_")


@rule("takes the rank as alpha, although ss_network_alpha in the header is another number", *RULES, table=REMARKS)
def alpha_in_kohya_header(file: LoraFile, program: str) -> bool:
    alpha, rank = (file.metadata.get(key, "").removesuffix(".0") for key in ("ss_network_alpha", "ss_network_dim"))
    return bool(file.without_alpha) and bool(alpha) and alpha != rank


@rule("according to its source: this kind of adapter was not tried", *UIS, table=REMARKS)
def untested_kind(file: LoraFile, program: str) -> bool:
    return any(program in READ_BY.get(kind, ()) for kind in file.kinds.values())


def verdict(file: LoraFile, program: str) -> str:
    """'loads', 'partly (426 of 986 modules): why' or 'not: why'. A module counts if the program applies the file's ΔW to it."""
    wrong: set[str] = set()
    reasons = []
    for reason, check in RULES[program]:
        stems = check(file, program)
        more = set(file.modules).intersection(file.modules if stems is True else stems or ()) - wrong
        if more:
            first = f", first {next(stem for stem in file.modules if stem in more)}" if "{n}" in reason else ""
            reasons.append(reason.format(n=len(more)) + first)
            wrong |= more
    right = len(file.modules) - len(wrong)
    partly = f"partly ({right} of {len(file.modules)} modules)"
    result = "not" if not right else partly if wrong else "loads"
    reasons += [reason for reason, check in REMARKS[program] if check(file, program)]
    return f"{result}: {'; '.join(reasons)}" if reasons else result
