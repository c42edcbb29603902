"""The training step as a CUDA graph: recorded once per shape of its inputs, then replayed with one launch.

A step of SDXL launches some 20,000 kernels, most of them shorter than the time the host needs to launch the next; replaying
them is three to five times as fast. PyTorch's own text: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from common.errors import UserError, warn
from performance.memory_plan import tensors

T = TypeVar("T")


class GraphedStep:
    """`step(inputs) -> tensor`, replayed. `inputs` is a tensor, or a (nested, named) tuple of tensors and None. What it
    returns is overwritten by the next call.

    `accumulators` are the tensors that a step adds to and that outlive it: the run that warms it up must not count.
    The graphs of several shapes share one memory pool: they run one after the other and hand nothing on in it.
    With --cuda-graph off, and for auto on the CPU or where capture fails, it is the step as it is.

    Raises UserError for --cuda-graph on where that is not possible.
    """

    def __init__(self, step: Callable[[Any], Tensor], accumulators: list[Tensor], cuda_graph: str, device: torch.device):
        self.step, self.accumulators, self.required = step, accumulators, cuda_graph == "on"
        self.graphs: dict = {}
        self.known: set = set()  # shapes that were recorded
        self.recorded_again = 0  # shapes whose graph was given up and recorded once more
        self.pool: Any = None  # of memory
        self.stream: torch.cuda.Stream | None = None
        self.eager = cuda_graph == "off" or device.type != "cuda"
        if self.required and self.eager:
            raise UserError(f"--cuda-graph on needs a CUDA device, not {device.type}: use --cuda-graph auto")

    def __call__(self, inputs: Any) -> Tensor:
        if self.eager:
            return self.step(inputs)
        shapes = tuple((t.shape, t.dtype) for t in tensors(inputs))
        if shapes not in self.graphs:
            try:
                self.graphs[shapes] = self.capture(inputs)
                self.recorded_again += shapes in self.known
                self.known.add(shapes)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                cause = error.__context__ or error  # not that the capture then ended badly
                reason = (str(cause).splitlines() or [type(cause).__name__])[0]
                if self.required:
                    raise UserError(f"--cuda-graph on: the step cannot be captured: {reason}") from None
                warn(f"no CUDA graph, every kernel is launched by itself: {reason}")
                self.eager = True
        if self.eager:  # out of the except block, which would keep what the capture has allocated
            self.release()
            return self.step(inputs)
        graph, static, output = self.graphs[shapes]
        for recorded, new in zip(tensors(static), tensors(inputs), strict=True):
            recorded.copy_(new)
        graph.replay()
        return output

    def capture(self, inputs: Any) -> tuple[torch.cuda.CUDAGraph, Any, Tensor]:
        """`record`, keeping the graphs of other shapes if that succeeds. It fails where something has to be compiled, or where
        memory is too little: then those graphs are given up first.

        A shape that is not the first needs no warm-up, which would take the memory of a step outside of the pool.
        """
        if self.graphs:
            with suppress(RuntimeError):
                return self.record(inputs, warm_up=False)
            self.release()
        return self.record(inputs, warm_up=True)

    def warm_up(self, inputs: Any) -> None:
        """A step that does not count: libraries choose their kernels, and compilers compile, on the first call."""
        before = [t.clone() for t in self.accumulators]
        self.stream = self.stream or torch.cuda.Stream()  # one for good: cuBLAS keeps a workspace for every stream it has seen
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                self.step(inputs)
        finally:  # where memory runs out, too: what was launched until then still adds to the accumulators
            torch.cuda.current_stream().wait_stream(self.stream)
        for accumulator, value in zip(self.accumulators, before, strict=True):
            accumulator.copy_(value)

    def record(self, inputs: Any, warm_up: bool) -> tuple[torch.cuda.CUDAGraph, Any, Tensor]:
        """(graph, its inputs, its output). torch.cuda.graph frees what the warm-up took before the pool takes it again."""
        static = tree_map_only(Tensor, Tensor.clone, inputs)
        if warm_up:
            self.warm_up(static)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before, current = generator.clone_state(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = self.step(static)  # the loader's and NCCL's threads may call CUDA meanwhile: thread_local
        except RuntimeError:
            generator.graphsafe_set_state(before)  # a capture that failed leaves it refusing to draw
            torch.cuda.set_stream(current)  # ... and leaves its own stream, for which bitsandbytes' optimizer would not wait
            raise
        return graph, static, output

    def retry_without_graphs(self, work: Callable[[], T], fits: bool = True) -> T:
        """What `work` returns, done between steps. The graphs are given up before it if it does not fit beside them, or else if
        memory runs out, and `work` is then done again.
        """
        if not fits and self.graphs:
            self.release()
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self.graphs:
                raise
        self.release()  # out of the except block, which would keep what `work` has allocated
        return work()

    def release(self) -> None:
        """Gives the memory of the graphs back; the next call records again."""
        self.graphs.clear()
        self.pool = None
        gc.collect()
        torch.cuda.empty_cache()
