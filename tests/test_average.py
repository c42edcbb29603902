"""average_lora.py: sums and singular values of whole matrices in float64 are the oracle, and for power functions the recurrence
that a run would compute.
"""

import json
import math
import sys

import pytest
import torch
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import write
from safetensors.torch import load_file, save_file
from test_extract import FP32, dense, distance, model_of, random_deltas, truncated
from torch import Tensor, nn

from common.errors import UserError
from lora_files.average import average_changes, power_exponent, power_weights
from lora_files.deltas import layer_shapes, parameter_shapes
from lora_files.kinds import DoRA, Factors, Joined, LoHa
from lora_files.names import kohya_name
from lora_files.read import read_changes, read_lora, read_metadata
from lora_files.write import A1111_HEADER, serialise

many = settings(max_examples=60, deadline=None)
NAMES = st.sampled_from(["linear", "conv"])
SIGMAS = st.floats(0.001, 0.288)
STEPS = st.lists(st.integers(0, 5000), min_size=2, max_size=12, unique=True).map(sorted)


# The mean.


def change(g: torch.Generator, kind: str, weight: Tensor, rank: int, alpha: float):
    """A random change of a weight: LoRA, LoHa or a whole matrix."""
    out, inner, kernel = len(weight), weight[0].numel(), weight.shape[2:]
    factors = [torch.randn(shape, generator=g) for shape in [(out, rank), (rank, inner)] * 2]
    if kind == "whole":
        return Joined((Factors(torch.randn(out, inner, generator=g)),), alpha)
    if kind == "LoHa":
        return LoHa((Factors(*factors[:2]), Factors(*factors[2:])), alpha / rank)
    return factors[1].view(rank, *weight.shape[1:]), factors[0].view(out, rank, *(1 for _ in kernel)), alpha


def whole(change, weight: Tensor) -> Tensor:
    """ΔW [out, in·…] float64, by the formula."""
    return dense(change) if isinstance(change, tuple) else change.of(weight.detach().double()).flatten(1)


@st.composite
def files(draw, kinds=("LoRA",)):
    """(model, [(changes, weight)]) of two to four files, in each of which a layer may be missing."""
    model = nn.ModuleDict({
        "linear": nn.Linear(draw(st.integers(1, 12)), draw(st.integers(2, 12))),
        "conv": nn.Conv2d(draw(st.integers(1, 5)), draw(st.integers(2, 12)), draw(st.sampled_from([1, 3]))),
    })  # fmt: skip
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    found = []
    for _ in range(draw(st.integers(2, 4))):
        changes = {}
        for name in draw(st.sets(NAMES, min_size=1)):
            rank, alpha = draw(st.integers(1, 6)), draw(st.sampled_from([-3.0, 0.5, 1.0, 4.0]))
            changes[name] = change(g, draw(st.sampled_from(kinds)), model[name].weight, rank, alpha)
        found.append((changes, draw(st.sampled_from([0.1, 0.5, 2.0]))))
    return model, found


def check_mean(model: nn.Module, files, rank: int | None, tolerance: float) -> None:
    """Of every layer the best approximation of the mean, whose error is the tail of its singular values."""
    deltas, losses = average_changes(files, model, rank)
    assert deltas.keys() == losses.keys() == set().union(*(changes for changes, _ in files))
    for name, delta in deltas.items():
        weight = model[name].weight
        parts = [(changes[name], strength) for changes, strength in files if name in changes]
        mean = sum(strength * whole(part, weight) for part, strength in parts)
        S = torch.linalg.svdvals(mean)
        most = rank or max(len(part[0]) for part, _ in parts)
        assert delta[0].shape == (len(delta[0]), *weight.shape[1:])
        assert delta[1].shape == (len(weight), len(delta[0]), *(1 for _ in weight.shape[2:]))
        assert len(delta[0]) <= min(most, len(S))
        tail, size = S[most:].norm(), S.norm()
        assert abs((dense(delta) - mean).norm() - tail) <= tolerance * size
        lost, total = (math.sqrt(square) for square in losses[name])
        assert abs(lost - tail) <= tolerance * size
        assert abs(total - size) <= tolerance * size


@many
@given(case=files(), rank=st.one_of(st.none(), st.integers(1, 8)))
def test_the_mean_of_lora_is_that_of_their_products(case, rank):
    check_mean(*case, rank, tolerance=1e-6)


@many
@given(case=files(kinds=("LoRA", "LoHa", "whole")), rank=st.integers(1, 8))
def test_the_mean_with_other_kinds(case, rank):
    check_mean(*case, rank, tolerance=1e-5)  # summed in float32, of Gram matrices


def test_the_mean_is_never_formed():
    side = 10**6  # ΔW would have 4 TB
    model = nn.ModuleDict({"x": nn.Linear(side, side, bias=False, device="meta")})
    one, other = ((torch.randn(2, side), torch.randn(side, 2), 2.0) for _ in range(2))
    deltas, losses = average_changes([({"x": one}, 0.5), ({"x": other}, 0.5)], model, None)
    assert len(deltas["x"][0]) == 2
    A, B = torch.cat([one[0], other[0]]).double(), torch.cat([one[1], other[1]], 1).double() / 2
    assert losses["x"][1] == pytest.approx(((B.T @ B) * (A @ A.T)).sum().item())


def test_what_has_no_mean_without_more():
    """DoRA without weights; what has no rank, without one. With them both have."""
    plain = (torch.randn(2, 6), torch.randn(5, 2), 1.0)
    dora = DoRA(Joined((Factors(plain[1], plain[0]),), 0.5), torch.rand(5) + 1, 0)
    cases = [({"x": plain}, 0.5), ({"x": dora}, 0.5)]
    for device, rank, message in (("meta", 3, "x is DoRA, .* name the model by --model"), ("cpu", None, "x .* add --rank")):
        with pytest.raises(UserError, match=message):
            average_changes(cases, nn.ModuleDict({"x": nn.Linear(6, 5, device=device)}), rank)
    check_mean(nn.ModuleDict({"x": nn.Linear(6, 5)}), cases, 3, tolerance=1e-5)


def test_a_mean_of_nothing_is_nothing():
    """Files of step 0."""
    start = (torch.randn(2, 6), torch.zeros(5, 2), 1.0)
    deltas, losses = average_changes([({"x": start}, 0.5)] * 2, nn.ModuleDict({"x": nn.Linear(6, 5)}), None)
    assert not dense(deltas["x"]).any()
    assert losses == {"x": (0.0, 0.0)}


# Power functions.


def deviation(gamma: float) -> float:
    """Of t^γ on 0…1, relative to its length: of the beta distribution with the parameters γ + 1 and 1."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@many
@given(sigma=SIGMAS)
def test_the_exponent_is_the_root_of_the_deviation(sigma):
    low, high = 0.0, 1e4  # where it falls
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if deviation(middle) > sigma else (low, middle)
    assert power_exponent(sigma) == pytest.approx(low, rel=1e-9, abs=1e-9)


def test_the_exponents_of_the_paper():
    assert [round(power_exponent(sigma), 2) for sigma in (0.05, 0.1)] == [16.97, 6.94]


@many
@given(steps=STEPS, sigma=SIGMAS)
def test_weights_are_of_a_mean(steps, sigma):
    """And a straight run costs what lies before the first file."""
    gamma = power_exponent(sigma)
    weights = power_weights(steps, gamma)
    assert len(weights) == len(steps)
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    first, last = steps[0], steps[-1]
    before = (first / last) ** (gamma + 2) / (gamma + 2) * last  # ∫ p(t)·(first - t) dt up to `first`
    mean = sum(weight * step for weight, step in zip(weights, steps, strict=True))
    assert mean == pytest.approx((gamma + 1) / (gamma + 2) * last + before, rel=1e-9)


@many
@given(steps=STEPS)
def test_a_narrow_profile_is_the_last_file(steps):
    last = [power_weights(steps, gamma)[-1] for gamma in (0.0, 10.0, 1e3, 1e5, 1e8)]
    assert last == sorted(last)
    assert last[-1] > 0.999


TRAJECTORIES = {  # θ(t) for t in 0…1, and the largest |θ″|
    "straight": (lambda t: t, 0.0),
    "parabola": (lambda t: t * t, 2.0),
    "levels off": (lambda t: 1 - math.exp(-4 * t), 16.0),
    "swings": (lambda t: math.sin(12 * t), 144.0),
}


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.25])
def test_files_of_a_run_give_what_its_average_would_have_been(trajectory, sigma):
    """The paper's recurrence over 100,000 steps, against forty files: within the error that `power_weights` states."""
    theta, bend = TRAJECTORIES[trajectory]
    gamma, run_steps, average = power_exponent(sigma), 100_000, 0.0
    for step in range(1, run_steps + 1):
        kept = (1 - 1 / step) ** (gamma + 1)
        average = kept * average + (1 - kept) * theta(step / run_steps)
    steps = list(range(2500, run_steps + 1, 2500))
    files = [theta(step / run_steps) for step in steps]
    weights = power_weights(steps, gamma)
    before = max(abs(theta(n / 40_000) - files[0]) for n in range(1000)) * (1 / 40) ** (gamma + 1)
    bound = (1 / 40) ** 2 / 8 * bend + before + 20 * (gamma + 1) / run_steps  # the last: of steps instead of an integral
    error = abs(sum(weight * file for weight, file in zip(weights, files, strict=True)) - average)
    assert error <= bound
    if bend:  # and the bound is not so wide that anything keeps it
        assert abs(sum(files) / len(files) - average) > bound


# The script.


@pytest.fixture(scope="module")
def shapes(tiny_model) -> dict[str, torch.Size]:
    return layer_shapes(model_of(tiny_model))


@pytest.fixture
def three(shapes, tmp_path):
    """Three LoRA of other ranks, alphas and layouts; the second lacks a layer: (files, deltas of each)."""
    ends = ("mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1", "layers.0.mlp.fc1")
    some = {name: shape for name, shape in shapes.items() if name.endswith(ends)}
    found = [random_deltas(some, ranks, alphas) for ranks, alphas in (([4], [2.0]), ([2, 3], [1.0, 5.0]), ([6], [6.0]))]
    del found[1][next(iter(some))]
    g = torch.Generator().manual_seed(1)
    for deltas in found:  # random_deltas has one seed
        for name, (A, B, alpha) in deltas.items():
            deltas[name] = (A * torch.randn(A.shape, generator=g), B, alpha)
    paths = [tmp_path / f"lora_{100 * n:06}.safetensors" for n in (1, 2, 3)]
    for path, deltas, layout in zip(paths, found, ["kohya SGM", "kohya diffusers", "kohya SGM"], strict=True):
        write(path, deltas, layout, "kohya", alpha=True)
    return paths, found


def mean_of(found: list[dict], weights: list[float]) -> dict[str, Tensor]:
    return {
        name: sum(weight * dense(deltas[name]) for deltas, weight in zip(found, weights, strict=True) if name in deltas)
        for name in found[0]
    }


def test_equal_files_return_themselves(tiny_model, shapes, tmp_path):
    """The program itself, as a user starts it."""
    deltas = random_deltas(shapes, [4, 2, 3], [2.0, 1.0])
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for file, layout in zip(files, ["kohya", "diffusers", "kohya"], strict=True):
        file.write_bytes(serialise(deltas, {"ss_steps": "7"}, layout, torch.float32))
    out = tmp_path / "out.safetensors"
    done = run(sys.executable, "scripts/average_lora.py", *files, "--out", out, "--model", tiny_model, *FP32)
    assert done.stderr == ""
    assert "relative error of the rank: 0.00% of all, at most 0.00% in " in done.stdout
    assert "not in every file" not in done.stdout
    found = read_lora(out, shapes)
    assert found.keys() == deltas.keys()
    for name, delta in found.items():
        assert len(delta[0]) == min(len(deltas[name][0]), *dense(delta).shape)
        assert distance(dense(delta), dense(deltas[name])) < 1e-6, name
    metadata = read_metadata(out)
    assert metadata.items() >= {**A1111_HEADER, "ss_steps": "7", "ss_network_dim": "Dynamic", "ss_output_name": "out"}.items()
    hashes = [read_metadata(file)["sshs_model_hash"] for file in files]
    sources = [{"file": file.name, "weight": 1 / 3, "hash": digest} for file, digest in zip(files, hashes, strict=True)]
    assert json.loads(metadata["sdxl_lora.averaged"]) == sources


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("weights", [[], [1, 1, 2], [0, 3, 1]])
def test_weights_and_missing_layers(script, tiny_model, shapes, three, tmp_path, layout, weights):
    files, found = three
    out, given = tmp_path / "out.safetensors", ["--weights", *weights] if weights else []
    options = ["--rank", 20, "--model", tiny_model, "--format", layout, *FP32]
    printed, _ = script("scripts/average_lora.py", *files, *given, "--out", out, *options)
    share = [weight / sum(weights or [3]) for weight in weights or [1, 1, 1]]
    mean, averaged = mean_of(found, share), read_lora(out, shapes)
    assert averaged.keys() == mean.keys()
    assert all(distance(dense(delta), mean[name]) < 1e-6 for name, delta in averaged.items())
    assert [float(line.split()[0]) for line in printed.splitlines()[:3]] == [round(weight, 4) for weight in share]
    assert f"\n1 of {len(mean)} layers are not in every file: where one is missing, ΔW = 0 counts\n" in printed
    assert ("lora_adapter_metadata" in read_metadata(out)) == (layout == "diffusers")


def test_the_error_of_the_rank_is_told(script, tiny_model, shapes, three, tmp_path):
    files, found = three
    out = tmp_path / "out.safetensors"
    printed, _ = script("scripts/average_lora.py", *files, "--out", out, "--rank", 2, "--model", tiny_model, *FP32)
    mean, averaged = mean_of(found, [1 / 3] * 3), read_lora(out, shapes)
    lost, error = 0.0, {}
    for name, W in mean.items():
        tail = torch.linalg.svdvals(W)[2:].square().sum().item()
        lost, error[name] = lost + tail, math.sqrt(tail) / W.norm().item()
        assert distance(dense(averaged[name]), truncated(W, 2)) < 1e-5
    whole = math.sqrt(lost / sum(W.square().sum().item() for W in mean.values()))
    worst = max(error, key=error.get)
    assert f"relative error of the rank: {whole:.2%} of all, at most {error[worst]:.2%} in {worst}\n" in printed
    assert read_metadata(out)["ss_network_dim"] == "2"
    assert printed.splitlines()[-1].startswith(f"{out}: {len(mean)} layers in the kohya layout, ")


def test_a_power_average_of_a_run(script, tiny_model, shapes, three, tmp_path):
    """Steps from the names, or from headers that say something else; the order of the files does not count."""
    files, found = three
    out, options = tmp_path / "out.safetensors", ["--rank", 20, "--model", tiny_model, *FP32]
    ema = ["--ema-sigma", 0.2]
    for steps in ([100, 200, 300], [10, 20, 60]):
        weights = power_weights(steps, power_exponent(0.2))
        printed, _ = script("scripts/average_lora.py", *files[::-1], *ema, "--out", out, *options)
        share = (steps[0] / steps[2]) ** (power_exponent(0.2) + 1)
        told = f"profile t^{power_exponent(0.2):.2f} up to step {steps[2]}; {share:.1%} of it lies before step {steps[0]}, "
        assert printed.startswith(told)
        assert [line.split() for line in printed.splitlines()[1:4]] == [
            [f"{weight:.4f}", file.name] for weight, file in zip(weights, files, strict=True)
        ]
        averaged = read_lora(out, shapes)
        assert all(distance(dense(averaged[name]), W) < 1e-6 for name, W in mean_of(found, weights).items())
        out.unlink()
        for file, step in zip(files, [10, 20, 60], strict=True):
            save_file(load_file(file), file, {"ss_steps": str(step)})


def test_the_header_keeps_what_all_files_say(script, tiny_model, three, tmp_path):
    files, _ = three
    for n, file in enumerate(files):
        config = {"model": "sdxl", "rank": 4, "steps": 100 * n}
        header = {
            "sdxl_lora.config": json.dumps(config),
            "sdxl_lora.step": str(n),
            "modelspec.author": "me",
            "ss_steps": str(n),
        }
        save_file(load_file(file), file, header | {"sshs_model_hash": "old", "modelspec.title": f"{n}"})
    script("scripts/average_lora.py", *files, "--out", tmp_path / "mean.safetensors", "--model", tiny_model)
    metadata = read_metadata(tmp_path / "mean.safetensors")
    assert json.loads(metadata["sdxl_lora.config"]) == {"model": "sdxl", "rank": 4}
    assert (
        metadata.items() >= {"modelspec.author": "me", "modelspec.title": "mean", "ss_network_module": "networks.lora"}.items()
    )
    assert not metadata.keys() & {"ss_steps", "sdxl_lora.step"}
    assert metadata["sshs_model_hash"] != "old"


def test_other_kinds_and_norms(script, tiny_model, three, tmp_path):
    """A whole difference is averaged with LoRA, that of a norm is left out; DoRA needs the weights of its model."""
    files, found = three
    model, name, norm = model_of(tiny_model), "unet.mid_block.attentions.0.proj_in", "unet.mid_block.resnets.0.norm1"
    weight = model.get_submodule(name).weight.detach()
    difference = torch.randn(weight.shape)
    kinds = {
        "diff": {f"{kohya_name(name)}.diff": difference, f"{kohya_name(norm)}.w_norm": torch.randn(64)},
        "dora": {**load_file(files[0]), f"{kohya_name(name)}.dora_scale": torch.rand(len(weight), 1) + 1},
    }
    for kind, tensors in kinds.items():
        other, out = tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}-mean.safetensors"
        save_file(tensors, other)
        command = ["scripts/average_lora.py", files[0], other, "--out", out, "--model", tiny_model, *FP32]
        _, err = script(*command, status=2)
        assert err == f"average_lora.py: {name} is not plain A and B in every file, so it has no rank: add --rank\n"
        printed, _ = script(*command, "--rank", 64)
        assert ("left out: 1 additions to norms or biases" in printed) == (kind == "diff")
        theirs = read_changes(other, parameter_shapes(model))
        change = difference.double() if kind == "diff" else theirs[name].of(weight.double())
        averaged = dense(read_lora(out, layer_shapes(model))[name])
        assert distance(averaged, (dense(found[0][name]) + change) / 2) < 1e-5


def test_mistakes(script, tiny_model, three, tmp_path):
    files, _ = three
    out = tmp_path / "out.safetensors"
    before = sorted(tmp_path.iterdir())

    def refused(message: str, *arguments, target=out):
        options = ["--out", target, "--model", tiny_model]
        _, err = script("scripts/average_lora.py", *arguments, *options, status=2)
        assert err.count("\n") == 1
        assert message in err
        assert sorted(tmp_path.iterdir()) == before

    refused("name two LoRA files or more: 1 makes no average", files[0])
    refused("name two LoRA files or more: 0 makes no average")
    refused("give either --weights or --ema-sigma", *files, "--weights", 1, 1, 1, "--ema-sigma", 0.1)
    refused("--weights are 2, and the files 3: give one for each", *files, "--weights", 1, 1)
    refused("--weights are all 0", *files, "--weights", 0, 0, 0)
    refused("--weights are all 0, or too large for a sum", *files, "--weights", 1e308, 1e308, 1e308)
    refused("--weights must be at least 0, not -1.0", *files, "--weights", 1, 1, -1)
    refused("--weights must be at least 0, not inf", *files, "--weights", 1, 1, "inf")
    for sigma in (0, 0.3, -0.1):
        refused("--ema-sigma must lie in 0.001…0.288", *files, "--ema-sigma", sigma)
    refused("--rank must be at least 1, not 0", *files, "--rank", 0)
    refused(f"{files[0]} is there already", *files, target=files[0])
    refused("x.safetensors is not a readable .safetensors file", files[0], tmp_path / "x.safetensors")
    refused(f"{files[1]} and {files[1]} are both of step 200: name one of them", *files, files[1], "--ema-sigma", 0.1)
    unknown = tmp_path / "x.safetensors"
    save_file(load_file(files[0]), unknown)
    before = sorted(tmp_path.iterdir())
    refused(f"{unknown}: neither header nor name says its step", *files, unknown, "--ema-sigma", 0.1)
    large = {key: t * 1e12 if key.endswith("up.weight") else t for key, t in load_file(files[0]).items()}
    save_file(large, unknown)
    refused("is not finite in float16, so no file was written", unknown, unknown)
    model = model_of(tiny_model)
    norm = next(name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm))
    save_file({f"{kohya_name(norm)}.w_norm": torch.zeros_like(model.get_submodule(norm).weight)}, unknown)
    refused("the files hold only additions to norms and biases", unknown, unknown)
