"""The denoiser stage: UNet and text encoder, trained together on cached latents and captions.

Axis letters: B batch, C latent channels, H W latent size, L tokens.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from data.cache import LatentCache
from data.order import Order
from data.source import Source, image_batch
from data.tokenizer import Tokenizer
from diffusion.loss import TimestepSampling, Weighting, diffusion_loss, sample_timesteps
from diffusion.prediction import PredictionType
from diffusion.schedule import Schedule, ScheduleConfig
from model.autoencoder import Autoencoder, Posterior
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig
from training.checkpoint import file_hash, save_weights
from training.device import autocast_dtype, placed
from training.loop import TrainConfig, fit
from training.run import RunFolder
from training.seed import generator


@dataclass(frozen=True)
class DenoiserStage:
    """Networks, diffusion process and training of the denoiser. ``caption_dropout`` is the share of captions replaced
    by the empty one, for classifier-free guidance (Ho and Salimans 2022); ``images`` is how many pictures of the
    source are encoded and cached, null for all; ``validation`` how many held-out pairs the validation loss takes."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction_type: PredictionType = "v_prediction"
    weighting: Weighting = "none"
    timesteps: TimestepSampling = "stratified"
    caption_dropout: float = 0.1
    images: int | None = None
    validation: int = 256
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout: {self.caption_dropout}; valid: a share in [0, 1)")
        if self.unet.context_width != self.text_encoder.width:
            raise ValueError(f"unet.context_width: {self.unet.context_width} differs from text_encoder.width: "
                             f"{self.text_encoder.width}; the UNet reads what the text encoder writes")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images: {self.images}; valid: from 1 up, or null for all")
        if self.validation < 1:
            raise ValueError(f"validation: {self.validation}; valid: from 1 pair up")


class Networks(nn.Module):
    """What this stage trains together."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


class Pairs:
    """Cached latents of a source with their captions."""

    def __init__(self, source: Source, count: int, autoencoder: Autoencoder, folder: RunFolder, data_key: dict,
                 device: torch.device, batch: int):
        @torch.no_grad()
        def encode(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            posterior = autoencoder.encode(image_batch(source, indices).to(device))
            return posterior.mean.cpu(), posterior.logvar.cpu()

        key = {**data_key, "autoencoder": file_hash(folder.weights("autoencoder"))}
        self.latents = LatentCache(folder.path / "cache", key, count, encode, batch)
        self.captions = [source.captions(index) for index in range(count)]

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, indices: np.ndarray, dropout: float, random: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """Latents (B, C, H, W) sampled from their posteriors, and one caption each, empty with chance ``dropout``."""
        mean, logvar = self.latents.moments(indices)
        x_0 = Posterior(mean, logvar).sample(torch.randn(mean.shape, generator=random))
        draws = torch.rand(2, len(indices), generator=random, dtype=torch.float64)
        captions = ["" if drop < dropout else self.captions[i][int(pick * len(self.captions[i]))]
                    for i, (drop, pick) in zip(indices, draws.T.tolist())]
        return x_0, captions


def train_denoiser(config: DenoiserStage, source: Source, validation: Source, data_key: dict, tokenizer: Tokenizer,
                   autoencoder: Autoencoder, run: RunFolder, seed: int, device: torch.device,
                   preview: Callable[[Networks, int], None]) -> None:
    """Train UNet and text encoder, write text_encoder.safetensors and denoiser.safetensors (averaged weights).

    ``preview(networks, step)`` draws the sample grid; networks.unet and networks.text_encoder are the averages.
    """
    torch.manual_seed(seed)  # initial weights
    networks = Networks(UNet(config.unet), TextEncoder(config.text_encoder))
    networks = placed(networks, device)
    schedule, batch = Schedule(config.schedule), config.train.batch
    count = min(config.images or len(source), len(source))
    pairs = Pairs(source, count, autoencoder, run, {**data_key, "split": "train"}, device, batch)
    held_out = Pairs(validation, min(config.validation, len(validation)), autoencoder, run,
                     {**data_key, "split": "validation"}, device, batch)
    order = Order(count, seed)

    def losses(networks: Networks, x_0: torch.Tensor, captions: list[str], t: torch.Tensor,
               eps: torch.Tensor) -> torch.Tensor:
        ids, mask = tokenizer.encode(captions)  # (B, L)
        longest = int(mask.sum(dim=1).max())  # columns of nothing but padding change no result and cost time
        ids, mask = ids[:, :longest].to(device), mask[:, :longest].to(device)
        context = networks.text_encoder(ids, mask)  # (B, L, D)

        def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return networks.unet(x_t, schedule.network_time(t), context, mask)

        return diffusion_loss(denoise, x_0.to(device), t.to(device), eps.to(device), schedule, config.prediction_type,
                              config.weighting)  # (B,)

    def loss_at(networks: Networks, step: int) -> dict[str, torch.Tensor]:
        random = generator(seed, "denoiser", step)
        x_0, captions = pairs.draw(order.indices(step, batch), config.caption_dropout, random)
        t = sample_timesteps(batch, config.timesteps, schedule, random)
        return {"loss": losses(networks, x_0, captions, t, torch.randn(x_0.shape, generator=random)).mean()}

    @torch.no_grad()
    def validate(networks: Networks) -> dict[str, float]:
        random = generator(seed, "validation", 0)  # the same noise and timesteps every time
        x_0, captions = held_out.draw(np.arange(len(held_out)), 0.0, random)
        t = sample_timesteps(len(x_0), "stratified", schedule, random)
        eps = torch.randn(x_0.shape, generator=random)
        parts = [losses(networks, x_0[i:i + batch], captions[i:i + batch], t[i:i + batch], eps[i:i + batch])
                 for i in range(0, len(x_0), batch)]
        return {"loss": float(torch.cat(parts).mean())}

    average = fit("denoiser", networks, loss_at, config.train, run, seed, validate, preview)
    save_weights(average.text_encoder, run.weights("text_encoder"))
    save_weights(average.unet, run.weights("denoiser"))  # last: its presence says that the stage is finished
    run.record(denoiser={"validation_loss": round(validate(average)["loss"], 5),
                         "parameters": sum(p.numel() for p in networks.unet.parameters()),
                         "text_parameters": sum(p.numel() for p in networks.text_encoder.parameters()),
                         "pictures": count, "bf16": autocast_dtype(config.train.precision, device) is not None})
