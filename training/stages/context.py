"""The inputs that every stage of training receives beside its own part of the configuration."""
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from data.source import Source
from files.run_folder import RunFolder
from files.weights import load_weights
from pipeline.config import SystemConfig
from training.distributed import ALONE, Processes


class NoImages:
    """The source of a stage that reads no images."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise IndexError(f"image {index} of none")

    def captions(self, index: int) -> tuple[str, ...]:
        """Raises IndexError: there are none."""
        raise IndexError(f"captions of image {index} of none")


@dataclass(frozen=True)
class StageContext:
    """``source`` is the training split as a run sees it, and ``validation`` the held-out split with images of one size.
    ``data_key`` holds everything that the images depend on, for the names of caches. ``system`` is the system that the
    run produces. ``preview_prompts`` are the prompts of its sample grids; if there are none, held-out captions are
    used. ``start`` is the run folder whose weights the networks begin with, None for new ones."""

    run: RunFolder
    source: Source = field(default_factory=NoImages)
    validation: Source = field(default_factory=NoImages)
    seed: int = 0
    device: torch.device = torch.device("cpu")
    processes: Processes = ALONE
    data_key: dict[str, Any] = field(default_factory=dict)
    system: SystemConfig = field(default_factory=SystemConfig)
    preview_prompts: tuple[str, ...] = ()
    start: RunFolder | None = None

    def begin(self, **networks: nn.Module) -> None:
        """Fill the networks, each under the name of its file of weights, from the run to start from, if there is one;
        says so if it does not have them. The input for guidance of a UNet, if that run has none, begins without effect,
        and the regions of a CLIP begin anew. Raises CheckpointError if the weights do not fit."""
        if self.start is None:
            return
        if not all(self.start.weights(name).is_file() for name in networks):
            print(f"{self.start.path}: no weights of {' and '.join(networks)}, which begin anew")
            return
        for name, network in networks.items():
            load_weights(network, self.start.weights(name), new=("guidance.", "region_"))
        self.run.record_start(self.start, *(self.start.weights(name).name for name in networks))
