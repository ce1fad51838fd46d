"""A CUDA graph of a function of tensors: every kernel of many small calls started by one (Nguyen et al. 2021, PyTorch).

A denoiser starts some 650 kernels a step. At batch 1 a GPU finishes them faster than Python can start them.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graphed:
    """`run` recorded once for inputs of these shapes, and replayed for others of the same shapes.

    `run` must be a function of its inputs and of tensors that stay where they are, must not wait for the device, and
    must take the same path whatever the values. Weights may change in place between replays.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: Sequence[Tensor]):
        self.inputs = [tensor.clone() for tensor in inputs]
        before, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(before)
        with torch.cuda.stream(aside):  # what a first call sets up, such as workspaces, must not be recorded
            run(*self.inputs)
        before.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = run(*self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The result for other inputs, in a tensor of its own."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output.clone()


class Runs:
    """Sampling runs by their settings: the first of a kind as it is, which finds out how often it draws noise, the
    second recorded, all later ones replayed. Memory is that of a recorded run for each kind, up to `most`."""

    def __init__(self, most: int = 4):
        self.most = most
        self.draws: dict[object, int] = {}
        self.graphs: dict[object, Graphed] = {}

    def __call__(self, kind: object, run: Callable[..., Tensor], tensors: Sequence[Tensor],
                 noise: Callable[[], Tensor]) -> Tensor:
        """run(draw, *tensors), where `draw` is `noise`, or what was drawn from it before the replay began."""
        if kind not in self.draws:
            drawn = [0]

            def counted() -> Tensor:
                drawn[0] += 1
                return noise()

            result = run(counted, *tensors)
            self.draws[kind] = drawn[0]
            return result
        count = self.draws[kind]
        inputs = [*tensors, *(noise() for _ in range(count))]
        if kind not in self.graphs:
            while len(self.graphs) >= self.most:
                self.graphs.pop(next(iter(self.graphs)))

            def recorded(*given: Tensor) -> Tensor:
                draws = iter(given[len(given) - count:])
                return run(lambda: next(draws), *given[:len(given) - count])

            self.graphs[kind] = Graphed(recorded, inputs)
        return self.graphs[kind](inputs)
