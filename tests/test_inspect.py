import copy
import json
import math
import re
import sys

import numpy as np
import pytest
import test_interop
import torch
from conftest import ROOT
from layouts import make_header, named
from PIL import Image
from safetensors.torch import load_file, save_file
from test_interop import fused, random_deltas, turns, weights
from test_lora import shake

sys.path.append(str(ROOT / "scripts"))
import inspect_lora

from lora import add_lora, merge_lora
from lora_files.base_weights import model_shapes
from lora_files.compatibility import COMPONENT_LABELS, RULES, LoraFile, verdict
from lora_files.deltas import Deltas, add_delta, layer_shapes, parameter_shapes
from lora_files.kinds import Factors, Joined, LoHa
from lora_files.names import kohya_name
from lora_files.read import layouts, read_changes, scan
from lora_files.write import adapter_metadata, serialise
from model.sdxl import Denoiser
from options.training import EVERYTHING, LoRAConfig

KOHYA, OTHER = ("kohya SGM", "kohya"), ("kohya diffusers", "kohya")
PEFT, OLD = ("diffusers", "peft"), ("diffusers", "diffusers scripts")


def verdicts(file, shapes) -> dict[str, str]:
    lora = LoraFile(**vars(scan(file, shapes)), shapes=shapes)
    return {program: verdict(lora, program) for program in RULES}


def count(verdict: str, modules: int) -> int:
    """How many of the modules a program loads correctly, according to a verdict."""
    if match := re.match(r"partly \((\d+) of (\d+) modules\): \w", verdict):
        assert int(match[2]) == modules
        assert 0 < int(match[1]) < modules
        return int(match[1])
    assert re.match(r"loads|not: \w", verdict), verdict
    return modules if verdict.startswith("loads") else 0


# The names: the numbers come from ComfyUI's own map and A1111's rules, applied to the real SDXL.

ATTENTION = r"^unet\..*\.attn[12]\."


@pytest.fixture(scope="module")
def real_shapes(sdxl_meta):
    return layer_shapes(sdxl_meta)


@pytest.fixture(scope="module")
def zeros(real_shapes) -> Deltas:
    """Rank 1 on all layers of the real SDXL."""
    half = {"dtype": torch.float16}
    return {
        path: (torch.zeros(1, *inner, **half), torch.zeros(out, 1, *[1] * (len(inner) - 1), **half), 1.0)
        for path, (out, *inner) in real_shapes.items()
    }


@pytest.mark.parametrize(
    ("layout", "layers", "modules", "comfyui", "a1111", "forge"),
    [
        (KOHYA, EVERYTHING, 986, 986, 986, 986),
        (OTHER, EVERYTHING, 986, 986, 986, 986),
        (PEFT, EVERYTHING, 986, 426, 0, 0),
        (("diffusers", "diffusers text"), EVERYTHING, 986, 426, 0, 0),
        (("processors", "processors"), ATTENTION, 560, 560, 0, 560),
        (("comfy", "peft"), rf"^unet\..*({EVERYTHING})", 722, 722, 0, 722),
        ("without text_model", EVERYTHING, 986, 722, 722, 0),
        (KOHYA, r"^unet\.", 794, 794, 794, 794),
        (OTHER, r"^unet\.", 794, 794, 791, 794),
        (("raw peft", "peft"), EVERYTHING, 986, 0, 0, 0),
        (("lycoris", "kohya"), rf"^unet\..*({EVERYTHING})", 722, 722, 0, 722),
        (KOHYA, r"^text_encoder_2.*_proj$", 128, 128, 128, 128),
        (KOHYA, r"^text_encoder_2.*(q|k|v)_proj$", 96, 96, 0, 96),  # A1111 drops attention without all four
        (KOHYA, r"^text_encoder_2.*(out_proj|fc1)$", 64, 64, 32, 64),
        (KOHYA, r"^text_encoder\..*q_proj$", 12, 12, 12, 12),
    ],
)
def test_names_that_the_programs_know(real_shapes, zeros, tmp_path, layout, layers, modules, comfyui, a1111, forge):
    chosen = {path: delta for path, delta in zeros.items() if re.search(layers, path)}
    assert len(chosen) == modules
    tensors = named(chosen, *(KOHYA if layout == "without text_model" else layout), alpha=False)
    if layout == "without text_model":
        tensors = {key.replace("text_model_", ""): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = verdicts(tmp_path / "x.safetensors", real_shapes)
    assert [count(found[program], modules) for program in ("ComfyUI", "A1111", "Forge")] == [comfyui, a1111, forge], found


def test_forge_lets_twelve_keys_pass(real_shapes, zeros, tmp_path):
    some = {path: delta for path, delta in zeros.items() if ".mid_block.attentions.0.transformer_blocks.0" in path}
    for keys in (12, 13):
        foreign = {f"nonsense_{i}": torch.zeros(1) for i in range(keys)}
        save_file({**named(some, *KOHYA, alpha=True), **foreign}, tmp_path / "x.safetensors")
        found = verdicts(tmp_path / "x.safetensors", real_shapes)
        assert [found[program].partition(":")[0] for program in ("ComfyUI", "A1111")] == ["loads", "loads"]
        assert found["Forge"].startswith("loads" if keys == 12 else "not: refuses a file"), found["Forge"]


def test_a1111_hides_what_it_takes_for_another_generation(real_shapes, zeros, tmp_path):
    some = named(dict(list(zeros.items())[5:9]), *KOHYA, alpha=True)
    versions = {"sdxl_base_v1-0": False, "sd_v1": True}
    headers = [({}, False), ({"format": "pt"}, True), *(({"ss_base_model_version": v}, h) for v, h in versions.items())]
    for header, hidden in headers:
        save_file(some, tmp_path / "x.safetensors", header)
        found = verdicts(tmp_path / "x.safetensors", real_shapes)
        remark = ": not listed under SDXL: no ss_base_model_version in the header begins with sdxl_"
        assert found["A1111"] == ("loads" + remark if hidden else "loads")
        assert found["ComfyUI"] == found["Forge"] == "loads"


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (KOHYA, ["kohya with SGM block names"]),
        (OTHER, ["kohya with diffusers block names"]),
        (PEFT, ["diffusers/PEFT"]),
        (OLD, ["diffusers old (.lora.down)"]),
        (("diffusers", "diffusers text"), ["diffusers old (.lora.down)"]),
        (("processors", "processors"), ["diffusers of 2023 (attention processors)"]),
        (("raw peft", "peft"), ["raw PEFT"]),
        (("comfy", "kohya"), ["ComfyUI"]),
        (("lycoris", "kohya"), ["LyCORIS", "kohya"]),
    ],
)
def test_layouts_are_recognised(zeros, layout, names):
    some = {path: delta for path, delta in zeros.items() if re.search(ATTENTION + r"|self_attn", path)}
    assert layouts(named(some, *layout, alpha=True)) == names


# diffusers' column against diffusers itself.


plain = test_interop.plain


@pytest.fixture(scope="module")
def tiny_shapes(plain):
    return layer_shapes(Denoiser(plain))


def right_in_diffusers(plain, file, shapes) -> int:
    """How many modules have our ΔW in them after diffusers and PEFT have loaded the file; 0 if they raise an error."""
    try:
        after = fused(plain, file)
    except (ValueError, KeyError, IndexError, RuntimeError):
        return 0
    before, equal = weights(plain), 0
    for module, delta in scan(file, shapes).deltas.items():
        old, new = before[f"{module}.weight"], after[f"{module}.weight"]
        ours = add_delta(old, delta, 1.0, old)
        assert (ours - old).abs().max() > 1e-3
        equal += (ours - new).abs().max().item() < 1e-5
    return equal


def only(tensors, keep: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if re.search(keep, key)}


def other_alphas(deltas: Deltas) -> Deltas:
    return {path: (A, B, (1.0, 2.0, 2.0, 4.0)[i % 4]) for i, (path, (A, B, _)) in enumerate(deltas.items())}


def with_four_dimensions(tensors) -> dict:
    """Gives A and B of one linear layer the four dimensions of a convolution."""
    return {key: t[..., None, None] if "1_proj_in.lora" in key else t for key, t in tensors.items()}


def header_without(deltas: Deltas, key: str, keep: int = 0) -> dict[str, str]:
    """PEFT's metadata with only the first `keep` entries of the list `key`."""
    config = json.loads(adapter_metadata(deltas)["lora_adapter_metadata"])
    return {"lora_adapter_metadata": json.dumps({**config, key: config[key][:keep]})}


HALF = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]})}
FILES = {  # name -> (the tensors of a file, its header, how many of its modules diffusers gets right)
    "kohya": lambda d: (named(d, *KOHYA, True), {}, "all"),
    "PEFT without alpha": lambda d: (named(d, *PEFT, False), {}, "all"),  # which is the rank then
    "PEFT with its header": lambda d: (named(d, *PEFT, False), adapter_metadata(other_alphas(d)), "all"),
    "PEFT without targets": lambda d: (named(d, *PEFT, False), header_without(d, "text_encoder.target_modules"), "none"),
    "PEFT with few targets": lambda d: (named(d, *PEFT, False), header_without(d, "text_encoder_2.target_modules", 3), "some"),
    "PEFT with half of its header": lambda d: (named(d, *PEFT, False), HALF, "none"),
    "PEFT with alphas": lambda d: (named(d, *PEFT, True), {}, "none"),
    "kohya with PEFT's header": lambda d: (named(d, *KOHYA, True), adapter_metadata(d), "none"),
    "kohya with diffusers' names": lambda d: (named(d, *OTHER, True), {}, "some"),  # its add_embedding
    "kohya with unequal alphas": lambda d: (named(other_alphas(d), *KOHYA, True), {}, "some"),
    "kohya with an alpha here and there": lambda d: (only(named(d, *KOHYA, True), r"weight$|(to_q|fc1)\.alpha$"), {}, "some"),
    "kohya with a foreign key": lambda d: (named(d, *KOHYA, True) | {"bundle_emb.x": torch.ones(2)}, {}, "none"),
    "two spellings": lambda d: (
        only(named(d, *OLD, False), "^unet.*attn") | only(named(d, *PEFT, False), "ff|proj_"),
        {},
        "some",
    ),
    "two namings": lambda d: (
        only(named(d, *KOHYA, True), "attn|_te") | only(named(d, *OTHER, True), "_ff|_proj_"),
        {},
        "some",
    ),
    "no text_model": lambda d: ({k.replace("text_model_", ""): t for k, t in named(d, *KOHYA, True).items()}, {}, "none"),
    "no out_proj": lambda d: (only(named(d, *KOHYA, True), "unet|[qkv]_proj|fc"), {}, "some"),
    "no out_proj and no mlp": lambda d: (only(named(d, *KOHYA, True), "unet|[qkv]_proj"), {}, "none"),
    "another shape": lambda d: (with_four_dimensions(named(d, *KOHYA, True)), {}, "none"),
    "ComfyUI": lambda d: (named({p: x for p, x in d.items() if "unet.mid" in p}, "comfy", "peft", False), {}, "none"),
}


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters", "ignore:The following alpha_pattern keys")
@pytest.mark.parametrize("name", FILES)
def test_the_verdict_on_diffusers_is_what_diffusers_does(plain, tiny_shapes, tmp_path, name):
    file = tmp_path / "x.safetensors"
    few = r"^unet\.(down_blocks\.1\.attentions\.0|mid_block\.attentions)|^text.*layers\.[01]"
    tensors, header, wanted = FILES[name](random_deltas(tiny_shapes, rf"({few}).*({EVERYTHING})|add_embedding", alpha=turns(2)))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, header)
    modules = len(scan(file, tiny_shapes).deltas)
    ours = verdicts(file, tiny_shapes)["diffusers"]
    equal = right_in_diffusers(plain, file, tiny_shapes)
    assert count(ours, modules) == equal, ours
    assert {modules: "all", 0: "none"}.get(equal, "some") == wanted


def test_alpha_that_is_only_in_the_header(tiny_shapes, tmp_path):
    """ComfyUI does not read diffusers' metadata, and no program reads alpha in kohya's."""
    deltas, file = random_deltas(tiny_shapes, alpha=turns(2)), tmp_path / "x.safetensors"
    mlp = {path: delta for path, delta in deltas.items() if ".mlp." in path}
    save_file(named(mlp, *PEFT, False), file, adapter_metadata(mlp))
    found = verdicts(file, tiny_shapes)
    assert found["ComfyUI"].startswith(f"not: {len(mlp)} at another strength: their alpha is in the header")
    hint = {"ss_network_alpha": "1.0", "ss_network_dim": "4"}
    same = {path: (A, B, 4.0) for path, (A, B, _) in deltas.items()}
    save_file(named(same, *PEFT, False), file, hint | adapter_metadata(same))
    assert verdicts(file, tiny_shapes)["diffusers"] == "loads"
    save_file(named(deltas, *KOHYA, False), file, hint)
    found = verdicts(file, tiny_shapes)
    assert set(found.values()) >= {"loads: takes the rank as alpha, although ss_network_alpha in the header is another number"}
    save_file(named(deltas, *KOHYA, False), file, {"ss_network_alpha": "4.0", "ss_network_dim": "4"})
    assert verdicts(file, tiny_shapes)["diffusers"] == "loads"


def other_kinds(out: int, inner: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """{what a module of another kind is: {its keys: their shapes}} for a layer of this width."""
    lora = {"lora_down.weight": (4, inner), "lora_up.weight": (out, 4)}
    tucker = {"lora_down.weight": (4, out, 1, 1), "lora_up.weight": (out, 4, 1, 1), "lora_mid.weight": (4, 4, 3, 3)}
    return {
        "DoRA of inputs": lora | {"dora_scale": (1, inner)},
        "DoRA of outputs": lora | {"dora_scale": (out, 1)},
        "LoCon": tucker,
        "LoHa": {f"hada_w{n}_{part}": (out, 4) if part == "a" else (4, inner) for n in "12" for part in "ab"},
        "LoKr": {"lokr_w1": (2, 2), "lokr_w2": (out // 2, inner // 2)},
        "OFT": {"oft_blocks": (8, 8, 8)},
        "norm": {"w_norm": (out,), "b_norm": (out,)},
    }


def of_kind(shapes, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a file of this kind, in the U-Net's middle block."""
    pattern = {"LoCon": "conv1", "norm": "norm1"}.get(kind, r"attn1\.to_[qkv]")
    layers = [match[1] for match in (re.fullmatch(rf"(unet\.mid_block.*{pattern})\.weight", name) for name in shapes) if match]
    return {
        f"{kohya_name(layer)}.{key}": torch.rand(size) + 0.5
        for layer in layers
        for key, size in other_kinds(shapes[f"{layer}.weight"][0], shapes[f"{layer}.weight"][-1])[kind].items()
    }


@pytest.mark.parametrize(
    ("name", "kind", "loads"),
    [
        ("DoRA of inputs", "DoRA", "ComfyUI A1111 Forge"),
        ("DoRA of outputs", "DoRA", ""),
        ("LoCon", "a LoCon with Tucker decomposition", "ComfyUI A1111 Forge"),
        ("LoHa", "LoHa", "ComfyUI A1111 Forge"),
        ("LoKr", "LoKr", "ComfyUI A1111 Forge"),
        ("OFT", "OFT", "ComfyUI A1111"),
        ("norm", "norm", "ComfyUI A1111 Forge"),
    ],
)
def test_other_kinds_of_adapters(plain, tmp_path, name, kind, loads):
    shapes = parameter_shapes(Denoiser(plain))
    save_file(of_kind(shapes, name), tmp_path / "x.safetensors")
    for program, text in verdicts(tmp_path / "x.safetensors", shapes).items():
        assert text.startswith("loads") == (program in loads), text
        assert text.startswith("loads") or re.search(rf"raises|of a kind|{kind}", text), text
        assert ("according to its source" in text) == (program in loads and kind != "DoRA"), text


def test_dora_of_peft(tiny_shapes, tmp_path):
    deltas = random_deltas(tiny_shapes)
    extra = {f"{key.removesuffix('.lora_B.weight')}.lora_magnitude_vector": torch.ones(len(B))
             for key, B in named(deltas, *PEFT, False).items() if "lora_B" in key}  # fmt: skip
    save_file(named(deltas, *PEFT, False) | extra, tmp_path / "x.safetensors")
    found = verdicts(tmp_path / "x.safetensors", tiny_shapes)
    assert count(found["diffusers"], len(deltas)) == sum(path.startswith("unet.") for path in deltas)
    assert "DoRA in a text encoder" in found["diffusers"]
    assert found["ComfyUI"].startswith("not: ")
    assert "of DoRA without dora_scale, which it adds as plain LoRA" in found["ComfyUI"]


def test_another_kind_is_reported_with_norms(script, options, plain, tmp_path):
    tensors = of_kind(parameter_shapes(Denoiser(plain)), "LoHa")
    save_file(tensors, tmp_path / "x.safetensors")
    out, _ = script("scripts/inspect_lora.py", tmp_path / "x.safetensors", *options)
    assert f"\nkind         LoHa ({len(tensors) // 4} modules)\n" in out
    assert "\nblock  " in out
    assert re.search(r"^ComfyUI +loads: according to its source: this kind of adapter was not tried$", out, re.M)
    assert not re.search("^lost", out, re.M)
    assert (tmp_path / "x.png").exists()


@pytest.fixture
def options(tiny_model, tmp_path) -> tuple:
    return "--model", tiny_model, "--picture", tmp_path / "x.png"


# The figures.


def table(out: str) -> dict[str, tuple[int, float, float]]:
    """{block: modules, Frobenius, spectral norm} of a report."""
    lines = re.findall(r"^((?:unet|text_encoder)\S+) +(\d+) +([\d.e+-]+) +([\d.e+-]+)$", out, re.M)
    return {name: (int(n), float(frobenius), float(spectral)) for name, n, frobenius, spectral in lines}


def test_norms_are_those_of_the_formed_matrix_and_the_bars_follow_them(script, options, tiny_shapes, tmp_path):
    deltas = random_deltas(tiny_shapes, EVERYTHING + r"|resnets\.0\.conv1$|^unet\.conv_in", alpha=lambda path, i: 0.5 + i % 7)
    save_file(named(deltas, *KOHYA, True), tmp_path / "x.safetensors")
    out, _ = script("scripts/inspect_lora.py", tmp_path / "x.safetensors", *options)
    blocks = table(out)
    assert sum(modules for modules, *_ in blocks.values()) == len(deltas)
    for name, (modules, frobenius, spectral) in blocks.items():
        inside = re.sub(r"^(text_encoder(_2)?)\.layers", r"\1.(text_model.)?encoder.layers", name)
        members = [delta for path, delta in deltas.items() if re.match(rf"{inside}(\.|$)", path)]
        dense = [alpha / len(A) * B.flatten(1).double() @ A.flatten(1).double() for A, B, alpha in members]
        assert len(members) == modules, name
        assert frobenius == pytest.approx(sum(torch.linalg.norm(W) ** 2 for W in dense).sqrt().item(), rel=1e-3)
        assert spectral == pytest.approx(max(torch.linalg.norm(W, 2).item() for W in dense), rel=1e-3)

    # The picture: the number of coloured pixels in a row of a panel is proportional to the norm.
    image = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    colours = {part: tuple(bytes.fromhex(colour[1:])) for part, colour in inspect_lora.COLOURS.items()}
    for panel in (1, 2):
        largest = max(norms[panel] for norms in blocks.values())
        left = inspect_lora.LABEL + (panel - 1) * (inspect_lora.BAR + inspect_lora.NUMBER)
        for row, (name, norms) in enumerate(blocks.items()):
            line = image[inspect_lora.TOP + row * inspect_lora.ROW + inspect_lora.ROW // 2, left : left + inspect_lora.BAR]
            length = int((line == colours[name.partition(".")[0]]).all(1).sum())
            assert length == pytest.approx(inspect_lora.BAR * norms[panel] / largest, abs=1), name
        assert inspect_lora.BAR in [
            int((line == colours["unet"]).all(1).sum()) for line in image[:, left : left + inspect_lora.BAR]
        ]


def test_planted_faults_are_counted(script, options, tiny_shapes, tmp_path):
    deltas = random_deltas(tiny_shapes, r"^unet\..*attn1\.to_[qkv]$")
    paths = list(deltas)
    for i, path in enumerate(paths):
        A, B, alpha = deltas[path]
        if i < 2:  # dead by B, dead by α
            deltas[path] = (A, torch.zeros_like(B), alpha) if i else (A, B, 0.0)
        elif i == 2:  # dead by halves that never meet
            A[:2], B[:, 2:] = 0, 0
        elif i == 3:
            B[0, 0] = float("nan")
        elif i == 4:
            A[0, 0] = float("inf")
        else:
            deltas[path] = (A.sign(), B.sign(), alpha)
    alive = [deltas[path][:2] for path in paths[5:]]
    weights = sum(half.numel() for halves in alive for half in halves)
    for value, (A, _) in zip((1e-9, 1e-7, 1.8e-6, 1.95e-6, 7e4, 0.0), alive[:6], strict=True):
        A[0, :10] = value  # the first three and 7e4 are lost; 1.95e-6 is above 2^-19 and 0 is 0 in float16 too
    save_file(named(deltas, *KOHYA, True), tmp_path / "x.safetensors")
    out, _ = script("scripts/inspect_lora.py", tmp_path / "x.safetensors", *options)
    for what, planted in (("dead .*", paths[:3]), ("not finite", paths[3:5])):
        (found,) = re.findall(rf"^{what} +{len(planted)} of {len(paths)} modules: (.+)$", out, re.M)
        assert sorted(found.split(", ")) == sorted(planted)
    assert sum(modules for modules, *_ in table(out).values()) == len(paths) - 2
    assert f"\nlost to fp16   {100 * 40 / weights:.3g} % of the live weights" in out
    half = {key: t.half() if "lora" in key else t for key, t in named(deltas, *KOHYA, True).items()}
    save_file({key: t.nan_to_num(posinf=6e4) if "lora" in key else t for key, t in half.items()}, tmp_path / "x.safetensors")
    out, _ = script("scripts/inspect_lora.py", tmp_path / "x.safetensors", *options)
    share = float(re.search(r"lost to fp16 +(\S+) %", out)[1]) / 100  # the zeros of this file are lost weights
    total = weights + sum(half.numel() for path in paths[3:5] for half in deltas[path][:2])
    assert share == pytest.approx((40 + 1) / total, rel=1e-2)


def test_the_report(script, denoiser, tiny_model, tmp_path, monkeypatch):
    adapter = add_lora(denoiser, LoRAConfig(rank=4, alpha=2, targets="all"), denoiser.unused)
    shake(adapter)
    config = {"model": "demo", "rank": 4, "alpha": 2.0, "targets": "all", "resolution": 64}
    file = tmp_path / "x.safetensors"
    file.write_bytes(serialise(adapter.deltas, make_header(config, images=7, step=5)))
    monkeypatch.chdir(tmp_path)
    out, _ = script("scripts/inspect_lora.py", file, "--model", tiny_model)
    layers = layer_shapes(denoiser)
    for line in (
        "layout       kohya with SGM block names",
        "base model   sdxl_base_v1-0",
        "trained by   this suite: model demo, rank 4, alpha 2.0, targets all, resolution 64",
        "step         5",
        *(f"{program:10} loads" for program in RULES),
    ):
        assert f"\n{line}\n" in out, line
    for part, label in COMPONENT_LABELS.items():
        trained, total = (sum(path.startswith(f"{part}.") for path in paths) for paths in (adapter.deltas, layers))
        assert re.search(rf"^{label} +{trained} of {total} +4 +2 +0\.5$", out, re.M)
    assert re.search(r"^dead .* 0 of", out, re.M)
    with Image.open(tmp_path / "x.norms.png") as image:
        assert image.format == "PNG"

    # The metadata of a foreign file may contain anything.
    save_file(load_file(file), file, {"ss_network_module": "networks.lora\x1b[31m\nverdict", "sdxl_lora.config": "[1]"})
    out, _ = script("scripts/inspect_lora.py", file, "--model", tiny_model)
    assert "\ntrained by   networks.lora\\x1b[31m\\nverdict\n" in out


def test_a_lora_for_another_model_is_still_reported(script, options, tiny_shapes, tmp_path):
    wide = {path: torch.Size((shape[0], 768)) if path.endswith("attn2.to_k") else shape for path, shape in tiny_shapes.items()}
    deltas = random_deltas(wide, r"attn2\.to_[kv]$|mlp")
    save_file(named(deltas, *KOHYA, True), tmp_path / "x.safetensors")
    out, _ = script("scripts/inspect_lora.py", tmp_path / "x.safetensors", *options)
    wrong = sum(path.endswith("attn2.to_k") for path in deltas)
    assert "\nfor          Stable Diffusion 1.5, whose text has 768 channels, not 80\n" in out
    assert f"\n{wrong} have other shapes than their layer, first lora_unet_input_blocks_4_1" in out
    assert re.search(rf"^ComfyUI +partly \({len(deltas) - wrong} of {len(deltas)} modules\)", out, re.M)
    assert re.search(r"^diffusers +not: ", out, re.M)
    save_file({}, tmp_path / "x.safetensors")
    (tmp_path / "x.png").unlink()
    out, _ = script("scripts/inspect_lora.py", tmp_path / "x.safetensors", *options)
    assert re.search(r"^layout +none\nheader +says nothing.*^Forge +not$", out, re.M | re.S)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("folder", [False, True])
def test_a_lora_of_the_demo_says_so_and_a_folder_means_its_newest(script, tmp_path, folder):
    shapes = {path: shape for path, shape in model_shapes("demo").items() if path.endswith("attn2.to_q")}
    header = {"sdxl_lora.config": json.dumps({"model": "demo"})}
    for step in ("3", "12"):
        tensors = named(random_deltas(shapes, "."), *KOHYA, True)
        save_file(tensors, tmp_path / f"x-{step}.safetensors", {**header, "ss_steps": step})
    file = tmp_path / "x-12.safetensors"
    out, _ = script("scripts/inspect_lora.py", tmp_path if folder else file, "--picture", tmp_path / "x.png")
    assert out.startswith("for          the bundled demo model, which no other program has\n")
    assert f"\nfile         {file}, " in out
    assert f"\nU-Net            {len(shapes)} of " in out


def test_mistakes(script, options, tmp_path):
    _, err = script("scripts/inspect_lora.py", tmp_path, status=2)
    assert err == f"inspect_lora.py: {tmp_path}: no .safetensors file there (train one with train_lora.py)\n"
    file = tmp_path / "x.safetensors"
    _, err = script("scripts/inspect_lora.py", file, *options, status=2)
    assert err == f"inspect_lora.py: {file}: no such file or folder\n"
    file.write_bytes(b"rubbish")
    _, err = script("scripts/inspect_lora.py", file, *options, status=2)
    assert err.startswith(f"inspect_lora.py: {file} is not a readable .safetensors file: ")
    assert err.count("\n") == 1
    _, err = script("scripts/inspect_lora.py", file, "--picture", file / "x.png", status=2)
    assert err == f"inspect_lora.py: --picture {file} cannot be written: File exists\n"
    assert not (tmp_path / "x.png").exists()


LAYER = ".attentions.0.transformer_blocks.0.attn1.to_q"


def test_norms_of_other_kinds_are_those_of_what_merging_changes(script, options, plain, tmp_path):
    """From a file with LoHa, LoKr, whole differences of layers and biases, and norms."""
    shapes, parts = parameter_shapes(Denoiser(plain)), {}
    layers = {
        "LoHa": f"unet.mid_block{LAYER}",
        "LoKr": f"unet.up_blocks.0{LAYER}",
        "norm": "unet.down_blocks.2.attentions.0.norm",
    }
    for kind, layer in layers.items():
        width = shapes[f"{layer}.weight"][0]
        parts |= {f"{kohya_name(layer)}.{key}": torch.randn(size) for key, size in other_kinds(width, width)[kind].items()}
    whole, biased = f"unet.up_blocks.1{LAYER}", "unet.down_blocks.1.attentions.0.proj_in"
    parts[f"{kohya_name(whole)}.diff"] = torch.randn(shapes[f"{whole}.weight"])
    parts[f"{kohya_name(biased)}.diff_b"] = torch.randn(shapes[f"{biased}.bias"])
    save_file(parts, tmp_path / "x.safetensors")
    base, merged = Denoiser(plain), copy.deepcopy(Denoiser(plain))
    merge_lora(merged, read_changes(tmp_path / "x.safetensors", shapes))
    wanted: dict[str, list[float]] = {}
    for (name, now), before in zip(merged.named_parameters(), base.parameters(), strict=True):
        if (now != before).any():
            change = (now - before).double().reshape(len(now) if now.ndim > 1 else 1, -1)
            block = wanted.setdefault(inspect_lora.BLOCK.match(name)[0], [0.0, 0.0])
            block[:] = math.hypot(block[0], change.norm()), max(block[1], torch.linalg.matrix_norm(change, 2).item())
    assert len(wanted) == 5
    out, _ = script("scripts/inspect_lora.py", tmp_path / "x.safetensors", *options)
    found = {name: list(norms) for name, (_, *norms) in table(out).items()}
    assert found.keys() == wanted.keys()
    for name, norms in wanted.items():
        assert found[name] == pytest.approx(norms, rel=1e-3), name


@pytest.mark.parametrize("shape", [(640, 640), (64, 320, 3, 3), (96, 12)])
@pytest.mark.parametrize("kind", ["LoHa", "whole"])
def test_norms_are_exact_where_singular_values_fall_slowly(shape, kind):
    g = torch.Generator().manual_seed(0)
    shape = torch.Size(shape)
    if kind == "LoHa":
        pairs = [(torch.randn(shape[0], 16, generator=g), torch.randn(16, shape[1:].numel(), generator=g)) for _ in "12"]
        change = LoHa(tuple(Factors(*pair) for pair in pairs), 0.5)
    else:
        change = Joined((Factors(torch.randn(shape, generator=g)),), 1.0)
    matrix = change.of(torch.zeros(shape)).flatten(1).double()
    measured = inspect_lora.measure_change(change, shape)
    assert measured == pytest.approx((matrix.norm().item(), torch.linalg.matrix_norm(matrix, 2).item()), rel=1e-5)
    assert measured == inspect_lora.measure_change(change, shape)


def test_what_is_not_finite_has_no_norm():
    assert inspect_lora.measure_change(Joined((Factors(torch.full((3, 4), torch.inf)),), 1.0), torch.Size((3, 4))) is None
