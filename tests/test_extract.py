import json
import re
import shutil

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_interop import merged_like_diffusers
from test_scripts import parts_of
from torch import Tensor, nn

from lora import merge_lora
from lora_files.decompose import delta_svd
from lora_files.deltas import Deltas, layer_shapes, mergeable_layers
from lora_files.read import read_lora, read_metadata
from lora_files.write import A1111_HEADER, serialise
from model.checkpoint import checkpoint_of
from model.load import load_sdxl
from options.training import TARGETS

FP32 = ("--save-dtype", "fp32")
Delta = tuple[Tensor, Tensor, float]


def dense(delta: Delta) -> Tensor:
    """ΔW [out, in·…] float64, by the formula."""
    A, B, alpha = delta
    return alpha / len(A) * B.flatten(1).double() @ A.flatten(1).double()


def truncated(W: Tensor, rank: int) -> Tensor:
    """The oracle: LAPACK's SVD in float64, truncated."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def distance(one: Tensor, other: Tensor) -> float:
    """The relative difference, in the Frobenius norm."""
    return ((one - other).norm() / other.norm()).item()


def model_of(folder) -> nn.ModuleDict:
    return parts_of(load_sdxl(str(folder), torch.float32, torch.device("cpu")))


def weights(folder) -> dict[str, Tensor]:
    """{layer: weight [out, in·…] float64}."""
    return {name: m.weight.detach().flatten(1).double() for name, m in mergeable_layers(model_of(folder)).items()}


def saved(tiny_model, folder, change) -> None:
    """Saves the tiny model to `folder` after change(model)."""
    pipe = load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))
    change(parts_of(pipe))
    pipe.save_pretrained(folder)


def random_deltas(shapes: dict[str, torch.Size], ranks: list[int], alphas: list[float]) -> Deltas:
    """A random ΔW for every layer; ranks and alphas in turn."""
    g, deltas = torch.Generator().manual_seed(0), {}
    for i, (name, (out, *inner)) in enumerate(shapes.items()):
        rank = ranks[i % len(ranks)]
        A, B = torch.randn(rank, *inner, generator=g), torch.randn(out, rank, *(1 for _ in inner[1:]), generator=g)
        deltas[name] = (A, B, alphas[i % len(alphas)])
    return deltas


@pytest.fixture(scope="module")
def base(tiny_model) -> dict[str, Tensor]:
    return weights(tiny_model)


@pytest.fixture(scope="module")
def shapes(tiny_model) -> dict[str, torch.Size]:
    return layer_shapes(model_of(tiny_model))


@pytest.fixture(scope="module")
def trained(tiny_model, base, tmp_path_factory):
    """A model of which every layer differs, in full rank: (folder, {layer: ΔW})."""
    folder, g = tmp_path_factory.mktemp("trained") / "model", torch.Generator().manual_seed(0)

    @torch.no_grad()
    def train(model: nn.ModuleDict) -> None:
        for layer in mergeable_layers(model).values():
            W = layer.weight
            W += 0.02 * torch.randn(W.shape, generator=g) + 0.02 * torch.randn(W[:1].shape, generator=g)

    saved(tiny_model, folder, train)
    return folder, {name: W - base[name] for name, W in weights(folder).items()}


@pytest.mark.parametrize(
    ("out", "inner", "rank"), [(20, (30,), 4), (30, (20,), 4), (6, (30,), 9), (30, (6,), 9), (16, (20, 3, 3), 4)]
)
@pytest.mark.parametrize("alpha", [2.0, -3.0])
def test_the_svd_of_a_lora_is_that_of_its_product(out, inner, rank, alpha):
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(rank, *inner, generator=g), torch.randn(out, rank, *(1 for _ in inner[1:]), generator=g)
    U, S, Vh = delta_svd((A, B, alpha))
    W, k = dense((A, B, alpha)), len(S)
    assert k == min(rank, *W.shape)
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[:k])
    torch.testing.assert_close(U * S @ Vh, W)
    for basis in (U.T @ U, Vh @ Vh.T):
        torch.testing.assert_close(basis, torch.eye(k, dtype=torch.float64))


def test_the_product_is_never_formed():
    A, B = torch.randn(2, 10**6).double(), torch.randn(10**6, 2).double()  # ΔW would have 8 TB
    _, S, _ = delta_svd((A, B, 2.0))
    assert S.square().sum().item() == pytest.approx(((B.T @ B) * (A @ A.T)).sum().item())


def test_a_planted_difference_is_found(script, tiny_model, shapes, tmp_path):
    """Rank 3 on U-Net and text encoder 2; text encoder 1 as it was."""
    planted = random_deltas({n: s for n, s in shapes.items() if not n.startswith("text_encoder.")}, [3], [0.6])
    saved(tiny_model, tmp_path / "tuned", lambda model: merge_lora(model, planted))
    file = tmp_path / "lora.safetensors"
    out, _ = script("scripts/extract_lora.py", tmp_path / "tuned", file, "--base", tiny_model, "--rank", 3, *FP32)
    found = read_lora(file, shapes)
    assert found.keys() == {name for name in planted if re.search(TARGETS["all"], name)}
    for name, delta in found.items():
        assert len(delta[0]) == delta[2] == 3
        assert distance(dense(delta), dense(planted[name])) < 1e-5, name
        norms = [half.norm().item() for half in delta[:2]]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # √σ in each half
    assert f"left out: {sum(n.startswith('text_encoder.') for n in shapes)} layers that do not differ\n" in out
    others = {name: dense(planted[name]).square().sum() for name in planted.keys() - found.keys()}
    share = sum(others.values()) / sum(dense(delta).square().sum() for delta in planted.values())
    assert f"left out: {len(others)} layers outside of --targets, {share:.2%} of all (--targets . extracts them, too)\n" in out
    assert out.splitlines()[-1].startswith(f"{file}: {len(found)} layers in the kohya layout, 100.00% retained, ")
    metadata = read_metadata(file)
    assert metadata.items() >= {**A1111_HEADER, "ss_network_dim": "3", "ss_network_alpha": "3.0"}.items()
    assert json.loads(metadata["sdxl_lora.extracted"]) == {"source": "tuned", "base": "model", "rank": 3}


def test_each_layer_is_the_truncated_svd(script, tiny_model, trained, shapes, tmp_path):
    """Convolutions too, against LAPACK; the report against the same."""
    folder, differences = trained
    file = tmp_path / "lora.safetensors"
    out, _ = script("scripts/extract_lora.py", folder, file, "--base", tiny_model, "--rank", 5, "--targets", ".", *FP32)
    found = read_lora(file, shapes)
    assert found.keys() == differences.keys()
    for name, delta in found.items():
        assert distance(dense(delta), truncated(differences[name], 5)) < 1e-5, name
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    blocks = {"conv_in", "mid_block", "down_blocks.1.attentions.0", "up_blocks.2.resnets.2", "text_encoder"}
    assert rows.keys() >= blocks
    assert sum(int(row[1]) for row in rows.values() if row[2] in ("4-4", "4-5", "5-5")) == len(shapes)  # conv_in reads 4
    squares = {name: torch.linalg.svdvals(W).square() for name, W in differences.items()}
    members = [name for name in shapes if name.startswith("unet.mid_block.")]
    shares = {name: (squares[name][:5].sum() / squares[name].sum()).item() for name in members}
    worst = min(members, key=shares.get)
    share = sum(squares[name][:5].sum() for name in members) / sum(squares[name].sum() for name in members)
    wanted = [f"{share:.2%}", f"{shares[worst]:.2%}", worst.removeprefix("unet.mid_block.")]
    assert rows["mid_block"][3:] == wanted


def test_a_folder_and_a_checkpoint_are_the_same(script, tiny_model, trained, shapes, tmp_path):
    folder, differences = trained
    for name, model in (("base", tiny_model), ("tuned", folder)):
        save_file(checkpoint_of(model_of(model)), tmp_path / f"{name}.safetensors")
    wanted = {name: truncated(W, 4) for name, W in differences.items()}
    out = tmp_path / "lora.safetensors"
    for tuned, base in ((tmp_path / "tuned.safetensors", tiny_model), (folder, tmp_path / "base.safetensors")):
        out.unlink(missing_ok=True)
        script("scripts/extract_lora.py", tuned, out, "--base", base, "--rank", 4, "--targets", ".", *FP32)
        found = read_lora(out, shapes)
        assert found.keys() == wanted.keys()
        assert all(distance(dense(delta), wanted[name]) < 1e-5 for name, delta in found.items())


def test_the_smallest_rank_within_an_error(script, tiny_model, trained, base, shapes, tmp_path):
    """And the file as others read it: merge_lora.py gives the tuned weights within that error, diffusers the same as ours."""
    folder, differences = trained
    file, error = tmp_path / "lora.safetensors", 0.3
    targets = "^(?!.*text_projection)"  # diffusers takes the rank of this one for that of the others
    script("scripts/extract_lora.py", folder, file, "--base", tiny_model, "--error", error, "--targets", targets, *FP32)
    ranks, found = set(), read_lora(file, shapes)
    for name, (A, *_) in found.items():
        S = torch.linalg.svdvals(differences[name])
        assert S[len(A) :].norm() <= error * S.norm() < S[len(A) - 1 :].norm(), name
        ranks.add(len(A))
    assert len(ranks) > 5
    metadata = read_metadata(file)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    assert json.loads(metadata["sdxl_lora.extracted"]) == {"source": "model", "base": "model", "error": error}
    script("scripts/merge_lora.py", tiny_model, tmp_path / "merged", "--lora", file)
    merged = weights(tmp_path / "merged")
    assert all(distance(merged[name] - base[name], differences[name]) <= error * 1.0001 for name in found)
    assert merged_like_diffusers(tiny_model, file, tolerance=2e-6) == len(found) == len(shapes) - 1


def test_a_layer_that_was_only_rounded_is_left_out(script, tiny_model, base, tmp_path):
    """A model saved in float16, with one layer changed, against its base in float32, and the other way round."""
    name = "unet.mid_block.attentions.0.proj_in"

    def change(model: nn.ModuleDict) -> None:
        merge_lora(model, {name: (torch.ones(1, 64), torch.ones(64, 1), 1.0)})
        model.half()

    saved(tiny_model, tmp_path / "half", change)
    for i, (tuned, other) in enumerate([(tmp_path / "half", tiny_model), (tiny_model, tmp_path / "half")]):
        out, _ = script("scripts/extract_lora.py", tuned, tmp_path / f"{i}.safetensors", "--base", other, "--error", 0.01)
        assert f"left out: {len(base) - 1} layers that do not differ" in out
        assert f"{tmp_path / f'{i}.safetensors'}: 1 layers" in out


@pytest.fixture
def big(shapes, tmp_path):
    """A LoRA of mixed ranks and alphas with every kind of layer, one of which is not trained: (file, deltas of the others)."""
    deltas = random_deltas(shapes, [4, 6, 3], [1.0, 5.0])
    idle = "unet.mid_block.attentions.0.proj_in"
    deltas[idle] = (deltas[idle][0], torch.zeros_like(deltas[idle][1]), 1.0)
    file = tmp_path / "big.safetensors"
    file.write_bytes(serialise(deltas, {"ss_steps": "450", "ss_network_dim": "6"}, "diffusers", torch.float32))
    deltas.pop(idle)
    return file, deltas


@pytest.mark.parametrize("rank", [6, 2])
def test_a_resized_lora_is_the_truncated_svd_of_its_product(script, tiny_model, shapes, big, tmp_path, rank):
    file, deltas = big
    small = tmp_path / "small.safetensors"
    out, _ = script("scripts/extract_lora.py", file, small, "--resize", "--rank", rank, "--model", tiny_model, *FP32)
    resized = read_lora(small, shapes)
    assert resized.keys() == deltas.keys()
    for name, delta in resized.items():
        assert len(delta[0]) == min(rank, len(deltas[name][0]), *dense(delta).shape)
        assert distance(dense(delta), truncated(dense(deltas[name]), rank)) < 1e-6, name
        assert rank < 6 or distance(dense(delta), dense(deltas[name])) < 1e-6
    assert "left out: 1 layers that do not differ" in out
    metadata = read_metadata(small)
    assert metadata["ss_network_dim"] == ("Dynamic" if rank == 6 else "2")
    assert metadata["ss_steps"] == "450"
    assert json.loads(metadata["sdxl_lora.extracted"]) == {"source": "big.safetensors", "rank": rank}
    assert metadata["sshs_model_hash"] != read_metadata(file)["sshs_model_hash"]
    assert "lora_adapter_metadata" not in metadata


def test_resizing_by_error_and_targets(script, tiny_model, shapes, big, tmp_path):
    file, deltas = big
    options = ("--resize", "--error", 0.5, "--targets", r"attn2\.to_[kv]", "--format", "diffusers", "--model", tiny_model)
    out, _ = script("scripts/extract_lora.py", file, tmp_path / "small.safetensors", *options)
    resized = read_lora(tmp_path / "small.safetensors", shapes)
    assert "lora_adapter_metadata" in read_metadata(tmp_path / "small.safetensors")
    assert resized.keys() == {name for name in deltas if "attn2.to_k" in name or "attn2.to_v" in name}
    for name, (A, *_) in resized.items():
        S = torch.linalg.svdvals(dense(deltas[name]))
        assert S[len(A) :].norm() <= 0.5 * S.norm() < S[len(A) - 1 :].norm(), name
    squares = {name: dense(delta).square().sum() for name, delta in deltas.items()}
    share = 1 - sum(squares[name] for name in resized) / sum(squares.values())
    assert f"left out: {len(deltas) - len(resized)} layers outside of --targets, {share:.2%} of all" in out


def test_mistakes(script, tiny_model, trained, big, tmp_path):
    tuned, out, lora = trained[0], tmp_path / "out.safetensors", big[0]
    demo = ROOT / "assets/demo/model"

    def refused(message: str, source, *options, target=out):
        _, err = script("scripts/extract_lora.py", source, target, *options, status=2)
        assert err.count("\n") == 1
        assert message in err
        assert not out.exists()

    base, rank = ("--base", tiny_model), ("--rank", 4)
    refused("give either --base, the model that the source was tuned from, or --resize", tuned, *rank)
    refused("give either --base, the model that the source was tuned from, or --resize", tuned, *base, *rank, "--resize")
    refused("give either --rank or --error", tuned, *base)
    refused("give either --rank or --error", tuned, *base, *rank, "--error", 0.1)
    refused("--rank must be at least 1, not 0", tuned, *base, "--rank", 0)
    for error in (0, 1, -0.1):
        refused("--error must be between 0 and 1", tuned, *base, "--error", error)
    refused("--error must be a finite number, not nan", tuned, *base, "--error", "nan")
    refused("--error 0.0001 is below the rounding of fp16: try --save-dtype fp32", tuned, *base, "--error", 1e-4)
    refused("--model belongs to --resize", tuned, *base, *rank, "--model", "sdxl")
    refused("--targets '(' is neither a preset nor a regular expression", tuned, *base, *rank, "--targets", "(")
    refused("--targets 'nowhere' matches none of", tuned, *base, *rank, "--targets", "nowhere")
    refused("--device nonsense cannot be used here", tuned, *base, *rank, "--device", "nonsense")
    refused(f"{lora} is there already", tuned, *base, *rank, target=lora)
    refused("nothing to extract", tiny_model, *base, *rank)
    refused("layers are not in both or have other shapes, first text_encoder", demo, *base, *rank)
    refused("is neither a file nor a diffusers folder", tuned, "--base", tmp_path / "nowhere", *rank)
    refused("holds no layer of SDXL", lora, *base, *rank)
    refused("is no LoRA", next((tuned / "unet").glob("*.safetensors")), "--resize", *rank, "--model", tiny_model)
    refused("does not fit the model", lora, "--resize", *rank)  # the real SDXL
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish")
    refused("bad.safetensors is not a readable", tmp_path / "bad.safetensors", *base, *rank)
    shutil.copytree(tuned, tmp_path / "broken")
    unet = next((tmp_path / "broken/unet").glob("*.safetensors"))
    tensors = load_file(unet)
    save_file({**tensors, "conv_in.weight": torch.full_like(tensors["conv_in.weight"], torch.nan)}, unet)
    refused(f"unet.conv_in is not finite in {tmp_path}/broken or {tiny_model}", tmp_path / "broken", *base, *rank)
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}, unet)
    refused("is F8_E4M3, which cannot be computed with: F16, BF16, F32, F64 can", tmp_path / "broken", *base, *rank)
    tensors.pop("mid_block.attentions.0.proj_in.weight")
    save_file(tensors, unet)
    refused("differ in architecture: 1 layers are not in both", tmp_path / "broken", *base, *rank)
