"""LoHa, LoKr, DoRA, LoCon with a core, and whole differences, as LyCORIS and PEFT write them: their own sums are the oracle."""

import json
import math
import re
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import nn

from common.errors import UserError
from common.safetensors_files import encode_header
from lora import merge_lora, merge_loras
from lora_files.deltas import add_delta, parameter_shapes
from lora_files.names import kohya_name
from lora_files.read import read_changes, read_lora
from model.checkpoint import checkpoint_of
from model.load import load_sdxl
from model.sdxl import Denoiser
from options.training import LineageConfig
from run.lineage import Lineage

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.mid_block.resnets.0.conv1"
TEXT = "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj"
ALGORITHMS = {"LoCon": LoConModule, "LoHa": LohaModule, "LoKr": LokrModule}
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def nested(layers: dict[str, nn.Module]) -> nn.Module:
    """A model with layers at these paths."""
    root = nn.Module()
    for path, layer in layers.items():
        *parents, name = path.split(".")
        parent = reduce(lambda m, p: getattr(m, p, None) or m.register_module(p, nn.Module()) or getattr(m, p), parents, root)
        parent.register_module(name, layer)
    return root


def shake(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def apply(weight: torch.Tensor, delta, strength: float = 1.0) -> torch.Tensor:
    """W + strength · ΔW in the dtype of W."""
    if isinstance(delta, tuple):
        A, B, alpha = (factor.to(weight).flatten(1) if isinstance(factor, torch.Tensor) else factor for factor in delta)
        return weight + strength * alpha / len(A) * (B @ A).view_as(weight)
    return weight + strength * delta.of(weight)


# LyCORIS.


@st.composite
def lycoris(draw):
    """(path, layer, module of LyCORIS with random weights) of any algorithm, shape, rank and options."""
    name = draw(st.sampled_from(sorted(ALGORITHMS)))
    out, inner = draw(st.sampled_from([4, 6, 8, 12, 15])), draw(st.sampled_from([4, 6, 9, 10, 16]))
    kernel = draw(st.sampled_from([None, 1, 3]))
    layer = (nn.Conv2d(inner, out, kernel, padding=kernel // 2) if kernel else nn.Linear(inner, out)).double()
    flags = ["use_tucker", "weight_decompose", "wd_on_out", "rs_lora"]
    flags += ["decompose_both", "full_matrix", "unbalanced_factorization"] if name == "LoKr" else []
    options = {flag: draw(st.booleans()) for flag in flags}
    if name == "LoKr":
        options["factor"] = draw(st.sampled_from([-1, 1, 2, 3, 4]))
    rank, alpha = draw(st.integers(1, 5)), draw(st.sampled_from([0.5, 1.0, 3.0]))
    module = ALGORITHMS[name]("x", layer, 1.0, rank, alpha, **options).double()
    assume(not (options["rs_lora"] and getattr(module, "use_w1", False) and module.use_w2))  # a factor √r is in no file
    torch.manual_seed(draw(st.integers(0, 99)))
    shake(module)
    return CONV if kernel else LINEAR, layer, module


def written(module: nn.Module, path: str) -> dict[str, torch.Tensor]:
    return {f"{kohya_name(path)}.{key}": t.detach().clone().contiguous() for key, t in module.custom_state_dict().items()}


@many
@given(case=lycoris(), strength=st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0]))
def test_what_lycoris_trains_is_what_it_computes(tmp_path, case, strength):
    """Their forward, not `get_merged_weight`, which in LyCORIS 4.1 multiplies LoHa and LoKr by α/r twice."""
    path, layer, module = case
    save_file(written(module, path), tmp_path / "x.safetensors")
    (delta,) = read_changes(tmp_path / "x.safetensors", {path: layer.weight.shape}).values()
    weight = layer.weight.detach()
    x = torch.randn(3, weight.shape[1], *[5] * (weight.ndim - 2), dtype=torch.float64)
    op, options = (F.conv2d, {"padding": weight.shape[-1] // 2}) if weight.ndim > 2 else (F.linear, {})
    with torch.no_grad():
        if not module.wd:  # at another strength DoRA has no common definition
            module.multiplier = strength
            torch.testing.assert_close(
                op(x, apply(weight, delta, strength), layer.bias, **options), module(x), rtol=1e-5, atol=1e-5
            )
        module.multiplier = 1.0
        torch.testing.assert_close(op(x, apply(weight, delta), layer.bias, **options), module(x), rtol=1e-5, atol=1e-5)
    float32 = add_delta(weight.float(), delta, strength, weight.float())
    torch.testing.assert_close(float32.double(), apply(weight, delta, strength), rtol=1e-4, atol=1e-4)


@many
@given(case=lycoris(), data=st.data())
def test_a_damaged_file_is_one_line(tmp_path, case, data):
    """A part that is missing, empty, cut, too long, of integers or unknown."""
    path, layer, module = case
    tensors = written(module, path)
    key = data.draw(st.sampled_from(sorted(key for key in tensors if not key.endswith(".alpha"))))
    damage = data.draw(st.sampled_from(["missing", "empty", "first", "longer", "integers", "unknown", "renamed"]))
    tensor = tensors.pop(key)
    assume(damage != "first" or len(tensor) > 1)
    if damage != "missing":
        tensors |= {
            "empty": {key: tensor[:0]},
            "first": {key: tensor[:1].clone()},
            "longer": {key: torch.cat([tensor, tensor, tensor]).contiguous()},
            "integers": {key: tensor.int()},
            "unknown": {key: tensor, f"{kohya_name(path)}.hada_w3_a": tensor.clone()},
            "renamed": {f"{key}_x": tensor},
        }[damage]
    save_file(tensors, tmp_path / "x.safetensors")
    optional = ("dora_scale", "lokr_t2", "lora_mid.weight")
    if damage in ("missing", "longer") and key.endswith((*optional, "lokr_w1", "lokr_w2")):
        return
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/x\.safetensors[^\n]*{kohya_name(path)}[^\n]*$"):
        read_changes(tmp_path / "x.safetensors", {path: layer.weight.shape})


@pytest.mark.parametrize("second", ["lora_A.weight", "lora_A.default.weight", "lora.up.weight", "lora_magnitude_vector.weight"])
def test_a_part_under_two_names_is_not_dropped(tmp_path, second):
    stem, A, B = LINEAR, torch.ones(2, 6), torch.ones(8, 2)
    tensors = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.lora_magnitude_vector": torch.ones(8)}
    save_file(
        tensors | {f"{stem}.{second}": 2 * (A if "A" in second else B if "up" in second else A[0])}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UserError, match=f"1 of 2 modules match no layer, first {re.escape(LINEAR)}\\.lora"):
        read_changes(tmp_path / "x.safetensors", {LINEAR: torch.Size((8, 6))})


def test_metadata_that_are_null(tmp_path):
    data = save({f"{LINEAR}.diff": torch.ones(8, 6)})
    length = int.from_bytes(data[:8], "little")
    header = {"__metadata__": None} | json.loads(data[8 : 8 + length])
    (tmp_path / "x.safetensors").write_bytes(encode_header(header) + data[8 + length :])
    assert read_changes(tmp_path / "x.safetensors", {f"{LINEAR}.weight": torch.Size((8, 6))})


@pytest.mark.parametrize("part", ["hada_w1_a", "hada_w2_a"])
def test_a_single_row_is_not_repeated(tmp_path, part):
    tensors = written(LohaModule("x", nn.Linear(6, 8), 1.0, 2, 1.0), LINEAR)
    tensors[f"{kohya_name(LINEAR)}.{part}"] = torch.ones(1, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="have other shapes than their layer"):
        read_changes(tmp_path / "x.safetensors", {LINEAR: torch.Size((8, 6))})


def test_differences_and_norms_of_lycoris(tmp_path):
    shapes, tensors, wanted = {}, {}, {}
    layers = {LINEAR: nn.Linear(6, 4), CONV: nn.Conv2d(3, 4, 3), "unet.mid_block.resnets.0.norm1": nn.GroupNorm(2, 4)}
    for path, layer in layers.items():
        module = (NormModule if "norm" in path else FullModule)("x", layer)
        shake(module)
        keys = {"w_norm": "weight", "b_norm": "bias", "diff": "weight", "diff_b": "bias"}
        state = module.state_dict() if "norm" in path else {"diff": module.weight.data, "diff_b": module.bias.data}
        tensors |= {f"{kohya_name(path)}.{key}": tensor for key, tensor in state.items()}
        weight, bias = module.get_merged_weight(0.5)
        wanted |= {f"{path}.weight": weight, f"{path}.bias": bias}
        shapes |= {f"{path}.{keys[key]}": tensor.shape for key, tensor in state.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    model = nested(layers)
    merge_lora(model, read_changes(tmp_path / "x.safetensors", shapes), 0.5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name])


# PEFT.


@many
@given(
    config=st.sampled_from([LoHaConfig, LoKrConfig, LoraConfig]),
    rank=st.integers(1, 6),
    alpha=st.sampled_from([1, 2, 8]),
    effective=st.booleans(),
    both=st.booleans(),
    factor=st.sampled_from([-1, 2, 4]),
)
def test_what_peft_saves_is_what_it_merges(tmp_path, config, rank, alpha, effective, both, factor):
    layers = {LINEAR: nn.Linear(10, 12), CONV: nn.Conv2d(6, 8, 3)}
    layers = {path.removeprefix("unet."): layer for path, layer in layers.items()}
    options = {"use_effective_conv2d": effective} if config is not LoraConfig else {"use_dora": True, "lora_alpha": alpha}
    options |= {"decompose_both": both, "decompose_factor": factor} if config is LoKrConfig else {}
    options |= {"alpha": alpha, "alpha_pattern": {"conv1": 3}} if config is not LoraConfig else {}
    theirs = get_peft_model(
        nested(layers), config(r=rank, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 3}, **options)
    )
    base = {f"unet.{path}": layer.weight.detach().clone() for path, layer in layers.items()}
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    changes = read_changes(tmp_path / "adapter_model.safetensors", {path: weight.shape for path, weight in base.items()})
    merged = theirs.merge_and_unload()
    assert changes.keys() == base.keys()
    for path, weight in base.items():
        wanted = merged.get_submodule(path.removeprefix("unet.")).weight
        torch.testing.assert_close(add_delta(weight, changes[path], 1.0, weight), wanted, rtol=1e-4, atol=1e-5)


# Merged and converted.


@pytest.fixture
def plain(tiny_model):
    return Denoiser(load_sdxl(str(tiny_model), torch.float32, torch.device("cpu")))


def trained(model: nn.Module, algorithm: str, paths=(LINEAR, CONV, TEXT), **options) -> dict[str, torch.Tensor]:
    """The tensors of a file of LyCORIS for some layers of a model."""
    tensors = {}
    for path in paths:
        module = ALGORITHMS[algorithm]("x", model.get_submodule(path), 1.0, 2, 1.0, **options)
        torch.manual_seed(0)
        shake(module)
        tensors |= written(module, path)
    return tensors


KINDS = [("LoHa", {}), ("LoHa", {"use_tucker": True, "weight_decompose": True}), ("LoKr", {"factor": 4}),
         ("LoCon", {"weight_decompose": True, "wd_on_out": False}), ("LoCon", {"use_tucker": True})]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "options"), KINDS)
def test_merged_on_disk_as_in_memory(script, plain, tiny_model, tmp_path, algorithm, options):
    """A folder, and a checkpoint, where q, k and v of text encoder 2 are one tensor."""
    path = tmp_path / "x.safetensors"
    save_file(trained(plain, algorithm, **options), path)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    merge_lora(plain, read_changes(path, parameter_shapes(plain)), 0.5)
    after = plain.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        f"{p}.weight" for p in (LINEAR, CONV, TEXT)
    }
    script("scripts/merge_lora.py", tiny_model, tmp_path / "merged", "--lora", f"{path}:0.5")
    found = load_sdxl(str(tmp_path / "merged"), torch.float32, torch.device("cpu"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in Denoiser(found).state_dict().items())
    save_file(checkpoint_of(load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))), tmp_path / "base.safetensors")
    script("scripts/merge_lora.py", tmp_path / "base.safetensors", tmp_path / "out.safetensors", "--lora", f"{path}:0.5")
    written_out = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written_out[key], tensor) for key, tensor in checkpoint_of(found).items())


def test_a_difference_and_dora_of_one_layer(script, plain, tiny_model, tmp_path):
    """Whatever their order, DoRA turns the weights of the base."""
    save_file(trained(plain, "LoCon", weight_decompose=True), tmp_path / "dora.safetensors")
    save_file({f"{kohya_name(LINEAR)}.diff": torch.ones(plain.get_submodule(LINEAR).weight.shape)}, tmp_path / "d.safetensors")
    weight = plain.get_submodule(LINEAR).weight.detach().clone()
    files = [read_changes(tmp_path / name, parameter_shapes(plain)) for name in ("d.safetensors", "dora.safetensors")]
    merge_loras(plain, [(files[0], 2.0), (files[1], 0.5)])
    wanted = apply(weight, files[1][LINEAR], 0.5) + 2
    torch.testing.assert_close(plain.get_submodule(LINEAR).weight, wanted, rtol=1e-5, atol=1e-5)
    flags = ["--lora", f"{tmp_path / 'd.safetensors'}:2", "--lora", f"{tmp_path / 'dora.safetensors'}:0.5"]
    script("scripts/merge_lora.py", tiny_model, tmp_path / "merged", *flags)
    found = load_sdxl(str(tmp_path / "merged"), torch.float32, torch.device("cpu"))
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in Denoiser(found).state_dict().items())


def test_merging_on_disk_refuses_what_is_refused_in_memory(script, plain, tiny_model, tmp_path):
    """A and B of an embedding, which is no linear layer."""
    name = "lora_te1_text_model_embeddings_token_embedding"
    rows, columns = next(w.shape for n, w in plain.named_parameters() if n.startswith("text_encoder.") and "token_emb" in n)
    tensors = {f"{name}.lora_down.weight": torch.ones(2, columns), f"{name}.lora_up.weight": torch.ones(rows, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="have other shapes than their layer") as error:
        read_changes(tmp_path / "x.safetensors", parameter_shapes(plain))
    _, err = script("scripts/merge_lora.py", tiny_model, tmp_path / "m", "--lora", tmp_path / "x.safetensors", status=2)
    assert err == f"merge_lora.py: {error.value}\n"


def test_inspecting_tells_what_makes_others_refuse(script, plain, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = trained(plain, "LoHa", (LINEAR, CONV))
    tensors[f"{kohya_name(CONV)}.hada_w1_a"][0] = math.nan
    save_file(tensors, "x.safetensors")
    printed, _ = script("scripts/inspect_lora.py", "x.safetensors", "--model", tiny_model)
    assert f"not finite     1 of 2 modules: {CONV}\n" in printed
    save_file(trained(plain, "LoCon", (LINEAR,)) | {f"{kohya_name(LINEAR)}.dora_scale": torch.tensor(1.0)}, "x.safetensors")
    printed, _ = script("scripts/inspect_lora.py", "x.safetensors", "--model", tiny_model)
    assert f"1 have other shapes than their layer, first {kohya_name(LINEAR)}\n" in printed
    _, err = script("scripts/inspect_lora.py", "x.safetensors", "--model", tiny_model, "--picture", tmp_path, status=2)
    assert err == f"inspect_lora.py: --picture {tmp_path} is a folder: name a .png file in it\n"


def test_a_complex_alpha_is_refused_in_one_line(plain, tmp_path):
    save_file(
        trained(plain, "LoCon", (LINEAR,)) | {f"{kohya_name(LINEAR)}.alpha": torch.tensor(1 + 1j)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UserError, match=r"to_q\.alpha is C64, which holds no weights"):
        read_changes(tmp_path / "x.safetensors", parameter_shapes(plain))


def test_the_order_of_several_does_not_count(plain, tmp_path):
    """DoRA turns the weights of the base, not those that another file has changed."""
    for n, options in enumerate([{"weight_decompose": True}, {}, {"weight_decompose": True, "wd_on_out": False}]):
        save_file(trained(plain, ["LoCon", "LoHa", "LoKr"][n], **options), tmp_path / f"{n}.safetensors")
    files = [(read_changes(tmp_path / f"{n}.safetensors", parameter_shapes(plain)), 0.3 + n) for n in range(3)]
    base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    results = []
    for order in (files, files[::-1]):
        plain.load_state_dict(base)
        merge_loras(plain, order)
        results.append({path: plain.get_submodule(path).weight.clone() for path in (LINEAR, CONV, TEXT)})
    for path, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("algorithm", "options"), KINDS)
@pytest.mark.parametrize("rank", [3, 64])
def test_converted_to_the_nearest_lora_of_a_rank(script, plain, tiny_model, tmp_path, algorithm, options, rank):
    """The best approximation of every ΔW, and its error is told; at full rank it is exact. LoCon's core costs nothing."""
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    save_file(trained(plain, algorithm, **options), path)
    flags = ["--rank", rank, "--save-dtype", "fp32"]
    needs_weights = "weight_decompose" in options
    if needs_weights:
        script("scripts/convert_lora.py", path, out, *flags, status=2)
    printed, _ = script("scripts/convert_lora.py", path, out, "--model", tiny_model, *flags)
    wanted, found = read_changes(path, parameter_shapes(plain)), read_lora(out, parameter_shapes(plain))
    lost = total = 0.0
    for name, delta in wanted.items():
        weight = plain.get_submodule(name).weight.detach().double()
        change, ours = ((apply(weight, d) - weight).flatten(1) for d in (delta, found[name]))
        S = torch.linalg.svdvals(change)
        kept = len(S) if isinstance(delta, tuple) else rank
        torch.testing.assert_close((ours - change).norm(), S[kept:].square().sum().sqrt(), rtol=1e-3, atol=1e-4)
        lost, total = lost + S[kept:].square().sum().item(), total + S.square().sum().item()
    if algorithm == "LoCon" and not needs_weights:
        assert "relative error" not in printed
    else:
        told = re.search(r"^3 layers were no plain A and B: .* relative error of ([\d.]+)%$", printed, re.M)
        assert float(told[1]) == pytest.approx(100 * math.sqrt(lost / total), abs=0.006)


def test_differences_of_layers_are_converted_and_the_rest_is_told(script, plain, tiny_model, tmp_path):
    """A layer with a difference and a LoRA gets the sum of both."""
    tensors = {f"{kohya_name(path)}.diff": torch.randn(plain.get_submodule(path).weight.shape) for path in (LINEAR, CONV)}
    both = trained(plain, "LoCon", (LINEAR,))
    norm = {f"{kohya_name('unet.mid_block.resnets.0.norm1')}.w_norm": torch.randn(64)}
    save_file(tensors | both | norm, tmp_path / "x.safetensors")
    flags = ["--rank", 1000, "--save-dtype", "fp32", "--model", tiny_model]
    printed, _ = script("scripts/convert_lora.py", tmp_path / "x.safetensors", tmp_path / "out.safetensors", *flags)
    assert "left out: 1 additions to norms or biases" in printed
    assert "2 layers were no plain A and B: of rank 1000 or less now, with a relative error of 0.00%" in printed
    wanted, found = dict(tensors), read_lora(tmp_path / "out.safetensors", parameter_shapes(plain))
    (lora,) = read_lora_of(both, tmp_path, plain).values()
    wanted[f"{kohya_name(LINEAR)}.diff"] = apply(wanted[f"{kohya_name(LINEAR)}.diff"], lora)
    assert found.keys() == {LINEAR, CONV}
    for path, delta in found.items():
        change = wanted[f"{kohya_name(path)}.diff"]
        torch.testing.assert_close(apply(torch.zeros_like(change), delta), change, rtol=1e-4, atol=1e-4)


def read_lora_of(tensors: dict[str, torch.Tensor], folder, model: nn.Module):
    save_file(tensors, folder / "part.safetensors")
    return read_lora(folder / "part.safetensors", parameter_shapes(model))


def test_infer_draws_with_it_and_a_base_lora_is_merged(script, plain, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(trained(plain, "LoHa", weight_decompose=True), tmp_path / "x.safetensors")
    drawing = ["--prompts", "a", "--steps", 1, "--scale", 0.5, "--model", tiny_model, "--device", "cpu"]
    script("infer.py", "--lora", "x.safetensors", *drawing, "--save-merged", "merged")
    found = Denoiser(load_sdxl("merged", torch.float32, torch.device("cpu"))).state_dict()
    pipe = load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))
    Lineage(LineageConfig(base_lora=("x.safetensors:0.5",)), pipe).merge(has_text=False)
    merge_lora(plain, read_changes(tmp_path / "x.safetensors", parameter_shapes(plain)), 0.5)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(Denoiser(pipe).state_dict()[name], tensor), name


def test_training_wants_a_plain_lora(plain, tiny_model, tmp_path):
    path, plain_pipe = tmp_path / "x.safetensors", load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))
    for algorithm, options, name in [("LoHa", {}, "LoHa"), ("LoKr", {}, "LoKr"), ("LoCon", {"weight_decompose": True}, "DoRA")]:
        save_file(trained(plain, algorithm, **options), path)
        with pytest.raises(UserError, match=rf"x\.safetensors is {name}, and .*: scripts/convert_lora\.py makes one of it$"):
            Lineage(LineageConfig(init_lora=path), plain_pipe)
