import pytest
import torch
from test_lora import shake

from common.errors import UserError
from lora import add_lora
from memory import speed_up
from model.load import load_sdxl
from model.sdxl import Denoiser
from options.training import LoRAConfig
from performance.attention import KERNELS
from performance.checkpointing import block_names, checkpoint_blocks
from performance.cuda_graph import GraphedStep
from performance.optimizers import make_optimizer

CPU = torch.device("cpu")


def test_on_the_cpu_it_is_the_step_itself():
    calls = []
    step = GraphedStep(lambda x: calls.append(x) or 2 * x, [], "auto", CPU)
    assert step.eager
    assert torch.equal(step(torch.ones(2)), torch.full((2,), 2.0))
    assert len(calls) == 1  # no warm-up
    step.release()


def test_cuda_graph_on_is_refused_on_the_cpu():
    with pytest.raises(UserError, match="--cuda-graph on needs a CUDA device, not cpu"):
        GraphedStep(lambda x: x, [], "on", CPU)


def test_work_between_steps_frees_the_graphs_only_if_memory_runs_out():
    step, tries = GraphedStep(lambda x: x, [], "auto", CPU), []

    def work(room: int) -> str:
        tries.append(len(step.graphs))
        if len(step.graphs) > room:
            raise torch.OutOfMemoryError
        return "pictures"

    step.graphs = {"a shape": ()}
    assert step.retry_without_graphs(lambda: work(1)) == "pictures"
    assert step.retry_without_graphs(lambda: work(0)) == "pictures"
    assert tries == [1, 1, 0]
    with pytest.raises(torch.OutOfMemoryError):
        step.retry_without_graphs(lambda: work(-1))
    assert tries == [1, 1, 0, 0]


@pytest.mark.parametrize(("fits", "left"), [(True, 1), (False, 0)])
def test_work_that_does_not_fit_beside_the_graphs_begins_without_them(fits, left):
    step = GraphedStep(lambda x: x, [], "auto", CPU)
    step.graphs = {"a shape": ()}
    assert step.retry_without_graphs(lambda: len(step.graphs), fits) == left


# On a GPU.


@pytest.fixture
def training(tiny_model):
    """(adapter, scaler, step, batch): a training step of the tiny model in float16, checkpointed, as train_lora.py has it."""
    device = torch.device("cuda")
    pipe = load_sdxl(str(tiny_model), torch.float16, device)
    denoiser = Denoiser(pipe)
    adapter = add_lora(denoiser, LoRAConfig(rank=4), denoiser.unused, dtype=torch.float16)
    shake(adapter)
    speed_up(denoiser, KERNELS["sdpa"])
    checkpoint_blocks(denoiser, block_names(denoiser))
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)

    def step(inputs):
        latents, timesteps, tokens, ids, target = inputs
        loss = (denoiser(latents, timesteps, (tokens,), ids).float() - target).square().mean()
        scaler.scale(loss).backward()
        return loss.detach()

    def batch(seed: int, size: int = 2, side: int = 8) -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        latents, target = (torch.randn(size, 4, side, side, generator=g) for _ in range(2))
        timesteps, tokens = torch.randint(1000, (size,), generator=g), torch.randint(1, 180, (size, 2, 77), generator=g)
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(size, 1)
        return tuple(t.to(device) for t in (latents, timesteps, tokens, ids, target))

    return adapter, scaler, step, batch


def run(step, batches, adapter) -> tuple[list[float], torch.Tensor]:
    adapter.grad.zero_()
    losses = [step(batch).item() for batch in batches]
    return losses, adapter.grad.clone()


@pytest.mark.gpu
def test_graph_and_eager_step_have_the_same_gradient(training):
    """Accumulated over batches of several shapes, first calls and replays; and once more after `release`."""
    adapter, _, step, batch = training
    batches = [batch(0), batch(1), batch(2, size=1), batch(3), batch(4, size=1, side=16), batch(5)]
    graphed = GraphedStep(step, [adapter.grad], "on", torch.device("cuda"))
    losses, gradient = run(step, batches, adapter)
    assert gradient.norm() > 1
    for _ in range(2):
        graphed_losses, graphed_gradient = run(graphed, batches, adapter)
        assert graphed_losses == pytest.approx(losses, rel=1e-3)
        assert (graphed_gradient - gradient).norm() < 5e-3 * gradient.norm()
        assert len(graphed.graphs) == 3
        graphed.release()
        assert not graphed.graphs


@pytest.mark.gpu
def test_an_overflow_in_a_graph(training):
    """An overflow changes nothing but the scale, and the next replay uses the new scale."""
    adapter, scaler, step, batch = training
    graphed = GraphedStep(step, [adapter.grad], "on", torch.device("cuda"))
    groups = [{"params": [p], "lr": 1e-3} for p in adapter.groups.values()]
    optimizer = make_optimizer("adamw8bit", groups)
    _, reference = run(step, [batch(0)], adapter)
    reference /= 256
    adapter.grad.zero_()

    def update(scale_grows_to: float | None = None) -> torch.Tensor:
        if scale_grows_to:
            scaler._scale.fill_(scale_grows_to)
        graphed(batch(0))
        scaler.unscale_(optimizer)
        gradient = adapter.grad.clone()
        scaler.step(optimizer)
        scaler.update()
        adapter.update_layers()
        return gradient

    before = adapter.flat.clone()
    assert not update(scale_grows_to=2.0**40).isfinite().all()
    assert torch.equal(adapter.flat, before)
    assert scaler.get_scale() == 2.0**39
    gradient = update(scale_grows_to=256.0)
    assert (gradient - reference).norm() < 5e-3 * reference.norm()
    assert not torch.equal(adapter.flat, before)


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_eagerly_with_one_warning(capsys):
    total = torch.zeros(1, device="cuda")

    def step(x: torch.Tensor) -> torch.Tensor:
        total.add_(x.sum().item())  # .item() makes the host wait: no graph can hold that
        return total.clone()

    x = torch.ones(3, device="cuda")
    graphed = GraphedStep(step, [total], "auto", torch.device("cuda"))
    assert [graphed(x).item() for _ in range(3)] == [3, 6, 9]
    assert capsys.readouterr().err.count("no CUDA graph, every kernel is launched by itself: ") == 1
    with pytest.raises(UserError, match="--cuda-graph on: the step cannot be captured"):
        GraphedStep(step, [total], "on", torch.device("cuda"))(x)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(1, device="cuda")  # the generator works again
