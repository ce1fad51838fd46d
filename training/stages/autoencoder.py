"""The autoencoder stage: images -> latents -> images (Rombach et al. 2022, section 3.1 and appendix G).

The loss has pixel, perceptual and adversarial terms beside the KL. After training, the mean and scale of the latents
are measured on training images and stored with the weights, so that all later stages use latents of zero mean and unit
variance. Axis letters: B batch, C latent channels, H W image size.
"""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.loader import Batch, Loader
from data.order import Order, Slice
from data.source import image_batch
from eval.features.efficientnet import Features
from eval.fidelity import psnr, ssim
from eval.frechet import Moments, frechet_distance
from files.images import to_unit
from files.sheets import save_grid
from files.weights import save_weights
from model.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from model.device import autocast_dtype, place_on
from training.distributed import Processes
from training.loop import Task, TrainConfig, fit
from training.seed import Part, generator, whole_batch
from training.stages.adversarial_loss import AdversarialConfig, Adversary
from training.stages.context import StageContext
from training.stages.perceptual_loss import Distance, PerceptualConfig, perceptual_distance

MEASURED = 2048  # training images for the latent mean and scale
COLUMNS = 8  # images in a row of a comparison


@dataclass(frozen=True)
class ReconstructionConfig:
    """How decoded images are compared with their originals. ``l1``, ``l2`` and ``edge`` are the weights of terms of the
    loss; ``edge`` compares finite differences of the images, which keeps outlines sharp that L2 alone blurs.
    ``perceptual`` and ``adversarial`` have weights of their own."""

    l1: float = 1.0
    l2: float = 1.0
    edge: float = 0.0
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)

    def __post_init__(self):
        for name in ("l1", "l2", "edge"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from 0 up")
        if self.l1 + self.l2 == 0:
            raise ValueError("l1: 0.0 together with l2: 0.0; valid: at least one above 0")


@dataclass(frozen=True)
class AutoencoderStage(ReconstructionConfig):
    """``kl`` is the weight of that term. ``validation`` is the number of held-out images; ``features`` are those of the
    reconstruction distance."""

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kl: float = 1e-6
    validation: int = 256
    features: Literal["efficientnet_lite0", "none"] = "efficientnet_lite0"

    def __post_init__(self):
        super().__post_init__()
        if self.kl < 0:
            raise ValueError(f"kl: {self.kl}; valid: from 0 up")
        if self.validation < 1:
            raise ValueError(f"validation: {self.validation}; valid: from 1 image up")


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor, config: ReconstructionConfig) -> torch.Tensor:
    """Weighted L1, L2 and edge terms of images (B, 3, H, W) in [-1, 1], each a mean over values; a scalar."""
    difference = decoded.float() - images
    loss = config.l1 * difference.abs().mean() + config.l2 * difference.square().mean()
    if config.edge:
        # the derivative of a difference is the difference of the derivatives
        loss = loss + config.edge * (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean())
    return loss


@dataclass(frozen=True)
class DecodedLoss:
    """What decoded images are judged by. If there is an adversary, a call also takes a training step of it."""

    config: ReconstructionConfig
    perceptual: Distance | None = None
    adversary: Adversary | None = None

    def __call__(self, decoded: torch.Tensor, images: torch.Tensor, last: torch.Tensor,
                 step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """(the terms without their weights, the weighted sum of those that compare, the weighted adversarial term or
        None), scalars, for images (B, 3, H, W) in [-1, 1]. ``last`` holds the last filters of the decoder."""
        reconstruction = reconstruction_loss(decoded, images, self.config)
        terms = {"reconstruction": reconstruction}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(decoded, images).mean()
            reconstruction = reconstruction + self.config.perceptual.weight * terms["perceptual"]
        if self.adversary is None:
            return terms, reconstruction, None
        terms |= self.adversary.terms(images, decoded, reconstruction, last, step)
        return terms, reconstruction, terms["adversarial"]


@dataclass(frozen=True)
class AutoencoderLoss:
    """The objective of the stage. If there is an adversary, calling the objective also takes a training step of the
    adversary."""

    config: AutoencoderStage
    perceptual: Distance | None = None
    adversary: Adversary | None = None

    def __call__(self, model: Autoencoder, images: torch.Tensor, random: torch.Generator, step: int,
                 part: Part | None = None) -> dict[str, torch.Tensor]:
        """``loss``, the weighted sum for images (B, 3, H, W), and its terms without their weights, scalars.

        Only ``loss`` has a gradient. ``part`` is the part of a batch that the images are; None stands for the whole
        batch.
        """
        raw = model.moments(images)
        posterior = Posterior(raw.mean.float(), raw.logvar.float())  # bf16 would round the KL term away
        noise = (part or whole_batch(len(images))).randn(posterior.mean.shape, random).to(images.device)
        decoded = model.decode_raw(posterior.sample(noise)).float()  # (B, 3, H, W)
        judged = DecodedLoss(self.config, self.perceptual, self.adversary)
        terms, reconstruction, adversarial = judged(decoded, images, model.decoder.conv_out.weight, step)
        kl = posterior.kl().mean()
        loss = reconstruction + self.config.kl * kl
        if adversarial is not None:
            loss = loss + adversarial
        return {"loss": loss, **{name: term.detach() for name, term in {**terms, "kl": kl}.items()}}


def check_adversary(config: AdversarialConfig, train: TrainConfig, processes: Processes) -> None:
    """Raise ValueError for an adversary that would not see the whole batch."""
    if config.weight and (processes.world > 1 or train.accumulate > 1):
        raise ValueError(f"adversarial.weight: {config.weight} with {processes.world} processes and accumulate: "
                         f"{train.accumulate}; valid: one process and accumulate: 1, the discriminator learns from the "
                         "whole batch at once")


@torch.no_grad()
def reconstructions(model: Autoencoder, images: torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """Images (B, 3, H, W) decoded from the means of their posteriors, with the same shape, on the CPU."""
    return torch.cat([model.decode_raw(model.moments(part.to(device)).mean).float().cpu()
                      for part in images.split(batch)])


def reconstruction_quality(decoded: torch.Tensor, images: torch.Tensor) -> dict[str, float]:
    """Mean PSNR in dB and SSIM of decoded images, both (B, 3, H, W) in [-1, 1]."""
    return {"psnr": float(psnr(decoded, images).mean()), "ssim": float(ssim(decoded, images).mean())}


def reconstruction_distance(decoded: torch.Tensor, images: torch.Tensor, features: Features, batch: int) -> float:
    """Frechet distance between the features of decoded images and of their originals, both (B, 3, H, W) in [-1, 1]."""
    one, two = Moments(features.width), Moments(features.width)
    for moments, images in ((one, decoded), (two, images)):
        for part in images.split(batch):
            moments.update(features(part))
    return frechet_distance(one, two)


def save_comparison(images: torch.Tensor, decoded: torch.Tensor, path: Path,
                    others: Literal["first", "middle"]) -> None:
    """Save a grid of originals above their reconstructions with the PSNR: the worst of all, and below them either the
    first ones, which are the same at every step, or the middle of the ranking."""
    each = psnr(decoded, images)  # (B,)
    ranking, columns = each.argsort(), min(COLUMNS, len(images))
    start = (len(images) - columns) // 2
    second = torch.arange(columns) if others == "first" else ranking[start:start + columns]
    rows, labels = [], []
    for picked in (ranking[:columns], second):
        rows += [images[picked], decoded[picked]]
        labels += [""] * columns + [f"{value:.1f} dB" for value in each[picked].tolist()]
    save_grid(torch.cat(rows), path, labels, columns,
              title=f"original above reconstruction; the worst of {len(images)}, then the {others}; mean "
                    f"{float(each.mean()):.1f} dB")


def train_autoencoder(config: AutoencoderStage, context: StageContext) -> None:
    """Train, measure the latent scale, and write autoencoder.safetensors and its quality on held-out images."""
    source, validation, run, seed = context.source, context.validation, context.run, context.seed
    device, processes = context.device, context.processes
    torch.manual_seed(seed)  # initial weights
    model = place_on(Autoencoder(config.model), device)
    context.begin(autoencoder=model)
    adversary = Adversary(config.adversarial, device) if config.adversarial.weight else None
    perceptual, perceptual_name = perceptual_distance(config.perceptual, device)
    objective = AutoencoderLoss(config, perceptual, adversary)
    features = Features(device) if config.features == "efficientnet_lite0" else None
    check_adversary(config.adversarial, config.train, processes)
    order, batch = Order(len(source), seed, getattr(source, "buckets", None)), config.train.batch
    held_out = image_batch(validation, np.arange(min(config.validation, len(validation))))
    if features and len(held_out) < 2:
        raise ValueError("validation: 1 image has no covariance; valid: from 2 up, or features: none")

    def loss_at(model: Autoencoder, read: Batch, position: int, part: Part) -> dict[str, torch.Tensor]:
        images = to_unit(part.of_read(read.images)).to(device)  # (B, 3, H, W)
        return objective(model, images, generator(seed, "autoencoder", position), position, part)

    def validate(model: Autoencoder) -> dict[str, float]:
        return reconstruction_quality(reconstructions(model, held_out, batch, device), held_out)

    def preview(model: Autoencoder, step: int) -> None:
        save_comparison(held_out, reconstructions(model, held_out, batch, device),
                        run.path / "samples" / f"autoencoder_{step:06d}.png", "first")

    def item(model: Autoencoder) -> torch.Tensor:
        return model.decode_raw(model.moments(held_out[:1].to(device)).mean)

    beside = {"adversary": adversary} if adversary else {}
    part = Slice(processes.rank, processes.world)
    with Loader(source, order, batch, seed, config.train.workers, part) as loader:
        task = Task("autoencoder", loader.batch_at, loss_at, validate, preview, ("psnr", "max"), item, beside)
        average = fit(task, model, config.train, run, seed, processes)
    if not processes.main:
        return
    steps = max(1, min(MEASURED, len(source)) // batch)
    average.measure(image_batch(source, order.indices(step, batch)).to(device) for step in range(steps))
    decoded = reconstructions(average, held_out, batch, device)
    measured = reconstruction_quality(decoded, held_out)
    distance = reconstruction_distance(decoded, held_out, features, batch) if features else None
    save_comparison(held_out, decoded, run.path / "samples" / "autoencoder_worst.png", "middle")
    save_weights(average, run.weights("autoencoder"))
    run.record(autoencoder={"psnr": round(measured["psnr"], 3), "ssim": round(measured["ssim"], 4),
                            "frechet": None if distance is None else round(distance, 3),
                            "features": features.stamp if features else "none", "images": len(held_out),
                            "perceptual": perceptual_name,
                            "adversarial": adversary.name if adversary else "off",
                            "bf16": autocast_dtype(config.train.precision, device) is not None,
                            "latent_mean": [round(v, 4) for v in average.latent_mean.tolist()],
                            "latent_std": [round(v, 4) for v in average.latent_std.tolist()]})
