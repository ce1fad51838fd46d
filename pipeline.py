"""Prompts to pictures: tokenizer, text encoder, denoiser and autoencoder of a run folder, put together.

Axis letters: B batch, C latent channels, H W latent size, L tokens, D context width.
"""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.source import to_uint8
from data.tokenizer import Tokenizer
from diffusion.noise import PerImageNoise
from diffusion.sampling import SamplingConfig, sample_latents
from diffusion.schedule import Schedule
from model.autoencoder import Autoencoder
from model.text_encoder import TextEncoder
from model.unet import UNet
from training.checkpoint import load_weights
from training.device import frozen, placed
from training.experiment import Experiment, load_experiment
from training.run import RunFolder

Progress = Callable[[list], Iterable]


class TextToImage:
    """A trained system. ``images(prompts, seeds)`` is all that sampling needs."""

    def __init__(self, experiment: Experiment, tokenizer: Tokenizer, text_encoder: TextEncoder, unet: UNet,
                 autoencoder: Autoencoder):
        self.experiment, self.tokenizer = experiment, tokenizer
        self.text_encoder, self.unet, self.autoencoder = text_encoder, unet, autoencoder
        self.schedule = Schedule(experiment.denoiser.schedule)
        self.device = next(unet.parameters()).device

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "TextToImage":
        """The system of a run folder; raises ConfigError naming a stage that is not finished, and CheckpointError
        naming a file that is damaged."""
        run = RunFolder.open(path)
        run.require("tokenizer", "autoencoder", "denoiser")
        experiment = load_experiment(run.path / "config.yaml")
        tokenizer = Tokenizer.load(run.path / "tokenizer.json")
        text_encoder = TextEncoder(experiment.denoiser.text_encoder)
        unet = UNet(experiment.denoiser.unet)
        autoencoder = Autoencoder(experiment.autoencoder.model)
        for name, module in (("text_encoder", text_encoder), ("denoiser", unet), ("autoencoder", autoencoder)):
            load_weights(module, run.weights(name))
            frozen(placed(module, device))
        return cls(experiment, tokenizer, text_encoder, unet, autoencoder)

    @torch.inference_mode()
    def latents(self, prompts: Sequence[str], seeds: Sequence[int], config: SamplingConfig | None = None,
                negative: str = "", progress: Progress = iter) -> torch.Tensor:
        """Unit-scale latents (B, C, H, W), one for each prompt and its seed.

        ``negative`` takes the place of the empty prompt in guidance. Raises ValueError for counts that differ.
        """
        if not prompts or len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; valid: as many of each, at least one")
        config = config or self.experiment.sampling
        guided = config.guidance.scale != 1.0
        context, mask = self.encode([negative] * len(prompts) * guided + list(prompts))  # (2B, L, D) or (B, L, D)
        both = self.unet.context_cache(context, mask)
        alone = self.unet.context_cache(context[-len(prompts):], mask[-len(prompts):])
        noise = PerImageNoise(seeds, self.experiment.latent_shape, self.device)

        def conditional(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.unet(x_t, self.schedule.network_time(t), cache=alone)

        def doubled(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.unet(x_t, self.schedule.network_time(t), cache=both)

        return sample_latents(conditional, doubled, noise, self.schedule, self.experiment.denoiser.prediction_type,
                              config, progress)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Context (B, L, D) and padding mask (B, L) of prompts."""
        ids, mask = (tensor.to(self.device) for tensor in self.tokenizer.encode(prompts))
        return self.text_encoder(ids, mask), mask

    @torch.inference_mode()
    def images(self, prompts: Sequence[str], seeds: Sequence[int], config: SamplingConfig | None = None,
               negative: str = "", progress: Progress = iter) -> torch.Tensor:
        """Pictures (B, 3, H, W) uint8, one for each prompt and its seed; arguments as in ``latents``."""
        return to_uint8(self.autoencoder.decode(self.latents(prompts, seeds, config, negative, progress))).cpu()

    def images_in_batches(self, prompts: Sequence[str], seeds: Sequence[int], config: SamplingConfig | None = None,
                          negative: str = "", batch: int = 64, progress: Progress = iter) -> torch.Tensor:
        """As ``images``, ``batch`` at a time; ``progress`` wraps the list of batches."""
        starts = list(range(0, len(prompts), batch))
        return torch.cat([self.images(prompts[i:i + batch], seeds[i:i + batch], config, negative)
                          for i in progress(starts)])


def with_options(config: SamplingConfig, sampler: str | None = None, steps: int | None = None,
                 scale: float | None = None) -> SamplingConfig:
    """``config`` with the settings that are given in place of its own; raises ValueError for ones that cannot be."""
    guidance = config.guidance if scale is None else replace(config.guidance, scale=scale)
    return replace(config, sampler=sampler or config.sampler, steps=config.steps if steps is None else steps,
                   guidance=guidance)
