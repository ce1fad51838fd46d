"""CUDA graphs of functions of tensors: one call launches all their kernels (Nguyen et al. 2021, PyTorch).

A denoiser launches about 650 kernels a step. At batch 1 a GPU finishes them faster than Python can launch them.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graphed:
    """`run`, recorded once for inputs of given shapes and replayed for other inputs of the same shapes.

    `run` must be a function of its inputs and of tensors that keep their addresses, must not wait for the device,
    and must take the same path for all values. Weights may change in place between replays.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: Sequence[Tensor]):
        self.inputs = [tensor.clone() for tensor in inputs]
        before, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(before)
        with torch.cuda.stream(aside):  # a first call sets up workspaces and the like, which must not be recorded
            run(*self.inputs)
        before.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = run(*self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The result for other inputs, as a new tensor."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output.clone()


class Runs:
    """Sampling runs by their settings. The first run of a kind is executed normally and counts how often it draws
    noise, the second one is recorded, and all later ones are replayed. Each of up to `most` kinds takes the memory of
    one recorded run."""

    def __init__(self, most: int = 4):
        self.most = most
        self.draws: dict[object, int] = {}
        self.graphs: dict[object, Graphed] = {}

    def __call__(self, kind: object, run: Callable[..., Tensor], tensors: Sequence[Tensor],
                 noise: Callable[[], Tensor]) -> Tensor:
        """run(draw, *tensors), where `draw` is `noise` or returns tensors that were drawn from `noise` before the
        replay."""
        if kind not in self.draws:
            count_drawn = [0]

            def draw_and_count() -> Tensor:
                count_drawn[0] += 1
                return noise()

            result = run(draw_and_count, *tensors)
            self.draws[kind] = count_drawn[0]
            return result
        count = self.draws[kind]
        inputs = [*tensors, *(noise() for _ in range(count))]
        if kind not in self.graphs:
            while len(self.graphs) >= self.most:
                self.graphs.pop(next(iter(self.graphs)))

            def run_on_draws(*given: Tensor) -> Tensor:
                draws = iter(given[len(given) - count:])
                return run(lambda: next(draws), *given[:len(given) - count])

            self.graphs[kind] = Graphed(run_on_draws, inputs)
        return self.graphs[kind](inputs)
