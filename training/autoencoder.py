"""The autoencoder stage: pictures -> latents -> pictures, with reconstruction and KL terms (Rombach et al. 2022, 3.1).

When the weights are trained, the mean and scale of the latents are measured on training pictures and kept with them,
so that everything behind this stage sees latents of zero mean and unit variance.
Axis letters: B batch, C latent channels, H W picture size.
"""
from dataclasses import dataclass, field

import numpy as np
import torch

from data.order import Order
from data.source import Source, image_batch
from eval.grid import save_grid
from model.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from training.checkpoint import save_weights
from training.device import autocast_dtype, placed
from training.loop import TrainConfig, fit
from training.run import RunFolder
from training.seed import generator

MEASURED = 2048  # training pictures from which the latent mean and scale are taken


@dataclass(frozen=True)
class AutoencoderStage:
    """``l1``, ``l2``, ``edge`` and ``kl`` weigh the terms of the loss; ``edge`` compares finite differences of the
    pictures, which keeps outlines sharp where L2 alone blurs them. ``validation`` pictures are measured."""

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    l1: float = 1.0
    l2: float = 1.0
    edge: float = 0.0
    kl: float = 1e-6
    validation: int = 256

    def __post_init__(self):
        for name in ("l1", "l2", "edge", "kl"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from 0 up")
        if self.l1 + self.l2 == 0:
            raise ValueError("l1: 0.0 together with l2: 0.0; valid: at least one above 0")
        if self.validation < 1:
            raise ValueError(f"validation: {self.validation}; valid: from 1 picture up")


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor, config: AutoencoderStage) -> torch.Tensor:
    """Weighted L1, L2 and edge terms of pictures (B, 3, H, W) in [-1, 1], each a mean over values; a scalar."""
    difference = decoded.float() - images
    loss = config.l1 * difference.abs().mean() + config.l2 * difference.square().mean()
    if config.edge:
        # the derivative of a difference is the difference of the derivatives
        loss = loss + config.edge * (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean())
    return loss


def psnr(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture (B,), both (B, 3, H, W) in [-1, 1] (peak to peak 2)."""
    error = (decoded.float().clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def train_autoencoder(config: AutoencoderStage, source: Source, validation: Source, run: RunFolder, seed: int,
                      device: torch.device) -> None:
    """Train, measure the latent scale, write autoencoder.safetensors and the held-out PSNR."""
    torch.manual_seed(seed)  # initial weights
    model = placed(Autoencoder(config.model), device)
    order = Order(len(source), seed)
    held_out = image_batch(validation, np.arange(min(config.validation, len(validation))))

    def loss_at(model: Autoencoder, step: int) -> dict[str, torch.Tensor]:
        images = image_batch(source, order.indices(step, config.train.batch)).to(device)  # (B, 3, H, W)
        raw = model.moments(images)
        posterior = Posterior(raw.mean.float(), raw.logvar.float())  # bf16 would round the KL term away
        noise = torch.randn(posterior.mean.shape, generator=generator(seed, "autoencoder", step)).to(device)
        decoded = model.decode_raw(posterior.sample(noise))  # (B, 3, H, W)
        reconstruction = reconstruction_loss(decoded, images, config)
        kl = posterior.kl().mean()
        return {"loss": reconstruction + config.kl * kl, "reconstruction": reconstruction.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def reconstructions(model: Autoencoder) -> torch.Tensor:
        return torch.cat([model.decode_raw(model.moments(part.to(device)).mean).float().cpu()
                          for part in held_out.split(config.train.batch)])

    def validate(model: Autoencoder) -> dict[str, float]:
        return {"psnr": float(psnr(reconstructions(model), held_out).mean())}

    def preview(model: Autoencoder, step: int) -> None:
        decoded = reconstructions(model)
        worst = psnr(decoded, held_out).argsort()[:8]
        rows = [held_out[worst], decoded[worst], held_out[:8], decoded[:8]]
        save_grid(torch.cat(rows), run.path / "samples" / f"autoencoder_{step:06d}.png", columns=len(worst),
                  title=f"original above reconstruction; the worst of {len(held_out)}, then the first")

    average = fit("autoencoder", model, loss_at, config.train, run, seed, validate, preview)
    steps = max(1, min(MEASURED, len(source)) // config.train.batch)
    average.measure(image_batch(source, order.indices(step, config.train.batch)).to(device) for step in range(steps))
    quality = validate(average)["psnr"]
    save_weights(average, run.weights("autoencoder"))
    run.record(autoencoder={"psnr": round(quality, 3), "pictures": len(held_out),
                            "bf16": autocast_dtype(config.train.precision, device) is not None,
                            "latent_mean": [round(v, 4) for v in average.latent_mean.tolist()],
                            "latent_std": [round(v, 4) for v in average.latent_std.tolist()]})
