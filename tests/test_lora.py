import copy
import re

import pytest
import torch
from torch import nn

from common.errors import UserError
from lora import Adapter, LoRALinear, add_lora, linear_layers, merge_lora, merge_loras
from lora_files.names import kohya_name
from model.sdxl import Denoiser
from options.training import LoRAConfig


def inputs(batch: int = 2, seed: int = 0) -> dict:
    """Arguments of the tiny Denoiser."""
    g = torch.Generator().manual_seed(seed)
    return {
        "noisy_latents": torch.randn(batch, 4, 8, 8, generator=g),
        "timesteps": torch.randint(0, 1000, (batch,), generator=g),
        "text": (torch.randint(1, 180, (batch, 2, 77), generator=g),),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(batch, 1),
    }


def shake(adapter: Adapter) -> None:
    """Makes every ΔW differ from zero."""
    adapter.flat.copy_(0.05 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)))
    adapter.update_layers()


def test_identity_at_start_bit_for_bit(denoiser):
    with torch.no_grad():
        before = denoiser(**inputs())
        add_lora(denoiser, LoRAConfig(rank=4), denoiser.unused)
        assert torch.equal(denoiser(**inputs()), before)


def test_one_step_changes_the_adapter_and_not_the_base(denoiser):
    base = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    adapter = add_lora(denoiser, LoRAConfig(rank=4), denoiser.unused)
    start = adapter.flat.clone()
    optimizer = torch.optim.AdamW(adapter.groups.values(), lr=1e-2)
    for _ in range(2):  # in the first step B is zero, so A gets no gradient
        denoiser(**inputs()).square().mean().backward()
        optimizer.step()
        adapter.update_layers()
    for name, module in adapter.modules.items():
        for part in (module.lora_A, module.lora_B):
            offset = (part.data_ptr() - adapter.low.data_ptr()) // 4
            assert not torch.equal(part.flatten(), start[offset : offset + part.numel()]), f"{name} did not move"
    now = dict(denoiser.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())
    assert set(now) - set(base) == {f"{name}.lora_{part}" for name in adapter.modules for part in "AB"}


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_merged_equals_patched(denoiser, targets):
    adapter = add_lora(denoiser, LoRAConfig(rank=4, alpha=2, targets=targets), denoiser.unused)
    shake(adapter)
    with torch.no_grad():
        patched = denoiser(**inputs())
        with adapter.scaled(0):
            base = denoiser(**inputs())
            merge_lora(denoiser, adapter.deltas)
            merged = denoiser(**inputs())
    assert (patched - base).abs().max() > 1e-2
    torch.testing.assert_close(merged, patched, atol=1e-5, rtol=0)


def test_merge_is_the_formula_in_float32_cast_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=False)).half()
    A, B, alpha, strength = torch.randn(4, 24), torch.randn(16, 4), 3.0, 0.7
    exact = model[0].weight.double() + strength * alpha / 4 * B.double() @ A.double()
    merge_lora(model, {"0": (A, B, alpha)}, strength)
    error = (model[0].weight.double() - exact).abs() / exact.abs()
    assert error.max() <= 2**-11 * 1.001  # half a unit in the last place of float16: rounded once


def test_several_are_summed_in_float32_and_cast_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Linear(16, 8, bias=False)).half()
    loras = [({"0": (torch.randn(4, 24), torch.randn(16, 4), 3.0)}, 0.7) for _ in range(5)]
    loras.append(({"1": (torch.randn(2, 16), torch.randn(8, 2), 2.0)}, -1.0))
    for i, layer in enumerate(model):
        exact = layer.weight.double()
        exact += sum(
            s * alpha / len(A) * B.double() @ A.double() for d, s in loras for n, (A, B, alpha) in d.items() if n == str(i)
        )
        copied = copy.deepcopy(model)
        merge_loras(copied, loras)
        assert ((copied[i].weight.double() - exact).abs() / exact.abs()).max() <= 2**-11 * 1.001


@pytest.mark.parametrize(("name", "width"), [("2", 24), ("0", 9)])
def test_nothing_is_merged_if_one_of_several_does_not_fit(name, width):
    model = nn.Sequential(nn.Linear(24, 16))
    before, wrong = model[0].weight.clone(), {name: (torch.ones(1, width), torch.ones(16, 1), 1.0)}
    with pytest.raises(UserError, match="does not fit the model"):
        merge_loras(model, [({"0": (torch.ones(1, 24), torch.ones(16, 1), 1.0)}, 1.0), (wrong, 1.0)])
    assert torch.equal(model[0].weight, before)


def test_layer_equals_the_formula_of_the_paper():
    torch.manual_seed(0)
    base = nn.Linear(12, 20)
    layer = LoRALinear(base, rank=3, alpha=6, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 12)
    wanted = x @ (base.weight + 2 * layer.lora_B @ layer.lora_A).T + base.bias
    torch.testing.assert_close(layer(x), wanted)
    assert layer.weight is base.weight


def test_layer_stays_float32_on_a_half_precision_base():
    layer = LoRALinear(nn.Linear(8, 8).bfloat16(), rank=2, alpha=2, generator=torch.Generator())
    y = layer(torch.randn(3, 8, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.grad.dtype == torch.float32


def test_flat_buffers_are_the_parameters_and_their_gradients(denoiser):
    adapter = add_lora(denoiser, LoRAConfig(rank=2), denoiser.unused)
    denoiser(**inputs()).sum().backward()
    parameters = [p for m in adapter.modules.values() for p in (m.lora_A, m.lora_B)]
    assert adapter.parameter_count == sum(p.numel() for p in parameters)
    by_position, filled = sorted(parameters, key=lambda p: p.data_ptr()), adapter.filled()
    assert torch.equal(adapter.flat[filled], torch.cat([p.detach().flatten() for p in by_position]))
    assert torch.equal(adapter.grad[filled], torch.cat([p.grad.flatten() for p in by_position]))
    assert all(a is b for m in adapter.modules.values() for a, b in zip(m.grads, (m.lora_A.grad, m.lora_B.grad), strict=True))
    assert torch.equal(torch.cat([p.detach() for p in adapter.groups.values()]), adapter.flat)
    assert adapter.grad.abs().sum() > 0


def test_every_adapter_gets_a_gradient(denoiser):
    """In particular none sits on the last layer of text encoder 1, which SDXL does not read."""
    adapter = add_lora(denoiser, LoRAConfig(rank=2, targets="all"), denoiser.unused)
    shake(adapter)
    denoiser(**inputs()).square().sum().backward()
    assert [name for name, m in adapter.modules.items() if not m.lora_B.grad.any()] == []
    assert not any("text_encoder." in name and "layers.2." in name for name in adapter.modules)
    assert any("text_encoder_2." in name and "layers.2." in name for name in adapter.modules)


def test_targets(denoiser):
    names = list(linear_layers(denoiser))
    unet_only = add_lora(denoiser, LoRAConfig(targets="all", train_text_encoder=False), denoiser.unused)
    assert list(unet_only.groups) == ["unet"]
    untrained = [n for n in names if n.startswith("unet.") and n not in unet_only.modules]
    assert all("time_emb" in n or "embedding" in n for n in untrained), untrained
    with pytest.raises(UserError, match="matches none"):
        add_lora(denoiser, LoRAConfig(targets="no_such_layer"))


def test_disabled_is_the_base(denoiser):
    with torch.no_grad():
        base = denoiser(**inputs())
        adapter = add_lora(denoiser, LoRAConfig(), denoiser.unused)
        shake(adapter)
        with adapter.scaled(0):
            assert torch.equal(denoiser(**inputs()), base)
        assert not torch.equal(denoiser(**inputs()), base)


def test_merge_refuses_what_does_not_fit(denoiser):
    weight = denoiser.unet.mid_block.attentions[0].proj_in.weight
    before = weight.clone()
    fits = {"unet.mid_block.attentions.0.proj_in": (torch.ones(2, 64), torch.ones(64, 2), 2.0)}
    with pytest.raises(UserError, match=r"1 of 2 modules differ, first unet\.nowhere"):
        merge_lora(denoiser, {**fits, "unet.nowhere": (torch.ones(2, 64), torch.ones(64, 2), 2.0)})
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("options", "flag"), [({"rank": 0}, "--rank"), ({"alpha": -1.0}, "--alpha"), ({"targets": "("}, "--targets")]
)
def test_bad_options_name_their_flag(options, flag):
    with pytest.raises(UserError, match=flag):
        LoRAConfig(**options)


@pytest.mark.parametrize(
    ("options", "layers", "parameters"),
    [
        ({"train_text_encoder": False}, 560, 11_612_160),
        ({}, 732, 14_774_272),
        ({"train_text_encoder": False, "targets": "all"}, 722, 21_278_720),
        ({"targets": "all"}, 980, 28_393_472),
        ({"targets": "style"}, 80, 1_761_280),
        ({"targets": "content"}, 80, 1_761_280),
    ],
)
def test_counts_on_the_real_architecture(sdxl_meta, options, layers, parameters):
    """The figures of docs/training.md, at rank 8. Text encoder 1 trains 11 of its 12 layers: SDXL does not read the last."""
    model = copy.deepcopy(sdxl_meta)
    assert sum(p.numel() for p in model.unet.parameters()) == 2_567_463_684
    adapter = add_lora(model, LoRAConfig(rank=8, **options), model.unused)
    assert len(adapter.modules) == layers
    assert adapter.parameter_count == parameters


def test_names_on_the_real_architecture(sdxl_meta):
    paths = list(linear_layers(sdxl_meta))
    names = {kohya_name(path) for path in paths}
    assert len(names) == len(paths) == 743 + 265
    assert not any(re.search("down_blocks|up_blocks|mid_block", name) for name in names)


def test_half_precision_layers_beside_float32_masters(pipe):
    """Gradients of several backward passes add up in float32; the layers see the masters after a refresh, rounded once."""
    pipe.to(torch.bfloat16)
    denoiser = Denoiser(pipe)
    adapter = add_lora(denoiser, LoRAConfig(rank=2), denoiser.unused, dtype=torch.bfloat16)
    shake(adapter)
    assert adapter.flat.dtype == adapter.grad.dtype == torch.float32
    for name, module in adapter.modules.items():
        A, B, _ = adapter.deltas[name]
        assert torch.equal(module.lora_A, A.bfloat16())
        assert torch.equal(module.lora_B, B.bfloat16())
    gradients = []
    for seed in range(2):
        adapter.grad.zero_()
        denoiser(**inputs(seed=seed)).float().square().mean().backward()
        gradients.append(adapter.grad.clone())
    adapter.grad.copy_(gradients[0])
    denoiser(**inputs(seed=1)).float().square().mean().backward()
    torch.testing.assert_close(adapter.grad, gradients[0] + gradients[1], rtol=1e-5, atol=1e-6)
    adapter.update_layers()
    assert not adapter.grad.any()


@pytest.mark.parametrize("loss", [1e30, float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_spoils_the_norm_of_the_gradient(denoiser, loss):
    adapter = add_lora(denoiser, LoRAConfig(rank=2), denoiser.unused)
    adapter.grad.fill_(0.5)
    adapter.spoil_unless_finite(torch.tensor(loss))
    if loss == 1e30:
        assert (adapter.grad == 0.5).all()
    else:
        assert adapter.clip(1.0).norm().isnan()


def test_autograd_keeps_the_input_and_not_the_weight():
    layer = LoRALinear(nn.Linear(64, 512).requires_grad_(False), 2, 2.0, torch.Generator())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        layer(torch.randn(8, 64, requires_grad=True))
    assert sum(kept) == 4 * (8 * 64 + 8 * 2)  # x and x·Aᵀ; A and B live anyway
