"""The optimizer and its learning-rate schedule: AdamW (Loshchilov and Hutter 2019) or Muon, warm-up, then a decay."""
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from training.muon import Muon, matrices_and_others
from training.polar import Iteration


@dataclass(frozen=True)
class OptimConfig:
    """``learning_rate`` is the peak. ``warmup`` is in steps. ``decay`` is the share of the run that the final decay of
    ``wsd`` takes (warm-up, stable, decay; Hu et al. 2024). ``clip`` bounds the norm of the whole gradient.
    ``iteration`` is the method by which Muon orthogonalizes a matrix: ``newton_schulz`` as published, or ``short`` in
    half the time (`training/polar.py`). ``slow`` names children of the model whose matrices learn at ``slow_share`` of
    the rate, because the states of a text encoder must not change faster than a denoiser learns their meaning.
    ``fast`` names children whose embeddings, biases and gains learn at ``fast_share`` times the rate, such as the
    inputs ``guidance`` and ``jump`` of a student, which begin at zero beside weights that are finished."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    decay: float = 0.3
    clip: float = 1.0
    iteration: Iteration = "short"
    slow: tuple[str, ...] = ()
    slow_share: float = 0.25
    fast: tuple[str, ...] = ()
    fast_share: float = 10.0

    def __post_init__(self):
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate: {self.learning_rate}; valid: above 0 and below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas}; valid: two numbers in [0, 1)")
        for name in ("warmup", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from 0 up")
        if not 0 < self.slow_share <= 1:
            raise ValueError(f"slow_share: {self.slow_share}; valid: a share of the rate in (0, 1]")
        if self.fast_share < 1:
            raise ValueError(f"fast_share: {self.fast_share}; valid: from 1 up")
        if self.clip <= 0:
            raise ValueError(f"clip: {self.clip}; valid: above 0")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay: {self.decay}; valid: a share of the run in [0, 1]")


def build_optimizer(model: nn.Module, config: OptimConfig, dtype: torch.dtype | None = None) -> torch.optim.Optimizer:
    """Muon or fused AdamW; weight decay acts on matrices and filters, but not on embeddings, biases and gains.

    ``share`` of a group is the factor of its learning rate; ``dtype`` is that of Muon's iteration, None for bf16 where
    the machine has it. Raises ValueError if ``slow`` or ``fast`` names no child of the model.
    """
    matrices, others = matrices_and_others(model)
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": config.weight_decay, "share": 1.0},
                                    {"params": others, "weight_decay": 0.0, "share": 1.0}]
    children = dict(model.named_children())
    for key, whole, names, share in (("slow", groups[0], config.slow, config.slow_share),
                                     ("fast", groups[1], config.fast, config.fast_share)):
        for name in names:
            if name not in children:
                raise ValueError(f"optim.{key}: {name}; valid: {', '.join(children)}")
            own = {id(p) for p in children[name].parameters()}
            theirs = [p for p in whole["params"] if id(p) in own]
            whole["params"] = [p for p in whole["params"] if id(p) not in own]
            groups.append({**whole, "params": theirs, "share": share})
    if config.optimizer == "muon":
        decayed = {id(p) for p in matrices}
        for group in groups:
            group["muon"] = any(id(p) in decayed for p in group["params"])
        return Muon(groups, config.learning_rate, config.betas, iteration=config.iteration, dtype=dtype)
    # fused=True must be asked for: on a CPU the default is a Python loop over tensors
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """The rate of step ``step`` (0 .. num_steps - 1): linear warm-up, then constant, cosine to 0 or a linear decay."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, num_steps - config.warmup)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "wsd" and config.decay > 0:
        return config.learning_rate * min(1.0, (num_steps - step) / (config.decay * num_steps))
    return config.learning_rate
