"""What the times of a sampling run add in the UNet, computed before the run."""
from collections.abc import Callable, Sequence

import torch

from diffusion.schedule import Schedule
from model.unet import UNet


class TimeTable:
    """The biases that a time adds in the residual blocks, for every time of a run: ``table[t]`` is what the UNet takes
    as ``time_biases``, and None for a UNet whose time embedding reads the prompt (``pooled_context``).

    The biases of ``times`` are computed together, and those of any other time when it is first asked for.
    """

    def __init__(self, unet: UNet, schedule: Schedule, times: Sequence[float] = (),
                 beta: Callable[[float], float] | None = None, jump: Callable[[float], float] | None = None):
        """``beta`` is one over the guidance scale at a time, for a UNet with guidance folded in, and ``jump`` the
        length of the step from a time, for one that reads it."""
        self.unet, self.schedule, self.beta, self.jump = unet, schedule, beta, jump
        self.biases: dict[float, list[torch.Tensor]] = {}  # of a time: (1, c_out) for each block
        if times and unet.pool is None:
            self.add(times)

    def __getitem__(self, t: float) -> list[torch.Tensor] | None:
        if self.unet.pool is not None:
            return None
        if t not in self.biases:
            self.add([t])
        return self.biases[t]

    def add(self, times: Sequence[float]) -> None:
        """Compute the biases of these times."""
        device = next(self.unet.parameters()).device

        def at_times(read: Callable[[float], float]) -> torch.Tensor:
            # filled on the device: a copy from the host cannot be recorded in a CUDA graph
            return torch.cat([torch.full((1,), float(read(time)), device=device) for time in times])  # (S,)

        beta, jump = (read and at_times(read) for read in (self.beta, self.jump))
        t = self.schedule.network_time(at_times(float))
        columns = self.unet.time_biases(t, beta, jump)  # (S, c_out) for each block
        self.biases.update((time, [column[k:k + 1] for column in columns]) for k, time in enumerate(times))
