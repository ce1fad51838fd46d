"""The lora stage: a small change of the weights of a run or a published checkpoint, from a few images with captions.

It trains LoRA, DoRA, LoHa or LoKr (model/lora.py), with or without prior preservation, and leaves
adapter.safetensors. The base is not changed.
"""
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.device import place_on
from model.lora import Adapter, AdapterConfig, Stack, new_adapter
from model.pretrained.adapters import Layout, write_adapter
from model.pretrained.card import Card
from training.loop import TrainConfig
from training.stages.context import StageContext
from training.stages.denoiser import Predicts
from training.stages.personal import (
    Applied,
    Base,
    Few,
    Functions,
    Method,
    PersonalStage,
    check_captions,
    few_steps,
    judge_captions,
    load_base,
    teach,
)


@dataclass(frozen=True)
class LoraStage(PersonalStage):
    """``trigger`` is a word of the captions that calls up what was learned, for those who use the file; "" if the
    captions have none. ``layout`` is that of the file: kohya's holds every kind, PEFT's is for diffusers."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    trigger: str = ""
    layout: Layout = "kohya"
    train: TrainConfig = field(default_factory=lambda: few_steps(400, 1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout == "peft" and self.adapter.kind != "lora":
            raise ValueError(f"layout: peft with adapter.kind: {self.adapter.kind}; valid: kohya")


class ByAdapter(Method[Adapter]):
    """An adapter is trained, and the base stays as it is: a step calls the networks with other weights."""

    def __init__(self, base: Base, adapter: Adapter):
        self.base, self.model = base, adapter

    def networks(self, model: Adapter) -> Predicts:
        """The networks called with their changed weights."""
        def changed(name: str) -> Callable[..., Tensor]:
            network: nn.Module = self.base.networks[name]
            weights: dict[str, Any] = model.weights(name, network)
            return partial(call, network, weights)

        return Functions(changed("unet"), changed("text_encoder"))

    @contextmanager
    def applied(self, model: Adapter) -> Applied:
        """The base with the adapter merged."""
        with Stack(self.base.networks) as stack:
            stack.set([(model, 1.0)])
            yield self.base.system


def call(network: nn.Module, weights: dict[str, Any], *arguments: Any, **named: Any) -> Tensor:
    """``network(*arguments, **named)`` with these weights in place of its own."""
    return functional_call(network, weights, arguments, named)


def train_lora(config: LoraStage, context: StageContext) -> None:
    """Train an adapter and write adapter.safetensors."""
    base = load_base(config, context)
    few = Few(config, base, context)
    if config.trigger:
        check_captions(few.captions, config.trigger, "lora.trigger")
    card = Card(base.hash, {config.trigger: ""} if config.trigger else {}, tuple(few.captions), {
        "method": config.adapter.kind + " with magnitudes" * config.adapter.decompose, "rank": config.adapter.rank,
        "base": base.name, "images": len(few), "steps": config.train.steps})
    judge_captions("lora", config, card, context)
    torch.manual_seed(context.seed)
    adapter = place_on(new_adapter(base.networks, config.adapter), context.device)
    average = teach("lora", config, base, few, ByAdapter(base, adapter), context)
    if context.processes.main:
        path = context.run.path / "adapter.safetensors"
        write_adapter(path, average, card, config.layout)
        print(f"lora: {path.stat().st_size / 1e6:.2f} MB; sample with: python sample.py {base.flags} "
              f"--adapter {path}:1 \"a prompt\"")
