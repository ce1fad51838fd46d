"""The stage of the decoder: the decoder of a trained system learns to decode latents that are not quite right.

A denoiser makes latents that no image has exactly, and a decoder that saw only latents of images turns what is off into
texture. Here it is tuned on latents with noise on them, with a deviation that differs from image to image,

    z + n,  n ~ N(0, sigma^2),  sigma ~ |N(0, noise^2)|        Zheng et al. 2025, arXiv 2510.11690, section 4.3

while the encoder and the scale of the latents stay as they are, bit for bit, so that the denoiser, its students and
adapters still fit. Axis letters: B batch, C latent channels, H W image size.
"""
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch

from data.loader import Batch, Loader
from data.order import Order, Slice
from data.source import image_batch
from eval.fidelity import psnr
from files.config import read_yaml
from files.images import to_unit
from files.run_folder import RunFolder
from files.sheets import save_grid
from files.weights import load_weights, save_weights
from model.autoencoder import Autoencoder, Decoder, Posterior
from model.device import autocast_dtype, freeze, place_on
from training.loop import Task, TrainConfig, fit
from training.seed import Part, generator
from training.stages.adversarial_loss import Adversary
from training.stages.autoencoder import COLUMNS, DecodedLoss, ReconstructionConfig, check_adversary
from training.stages.context import StageContext
from training.stages.perceptual_loss import perceptual_distance


@dataclass(frozen=True)
class DecoderStage(ReconstructionConfig):
    """``noise`` is the deviation of the deviations, in units of the latents, whose variance is 1; at 0 the decoder is
    tuned as it was trained. ``validation`` is the number of held-out images."""

    noise: float = 0.5
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: int = 256

    def __post_init__(self):
        super().__post_init__()
        if not self.noise >= 0.0:
            raise ValueError(f"noise: {self.noise}; valid: from 0 up")
        if self.validation < 1:
            raise ValueError(f"validation: {self.validation}; valid: from 1 image up")


@dataclass(frozen=True)
class Decoding:
    """What the decoder is bound to: the frozen ``autoencoder`` around it, and the objective."""

    config: DecoderStage
    autoencoder: Autoencoder
    objective: DecodedLoss

    def images(self, decoder: Decoder, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) of unit-scale latents (B, C, h, w)."""
        std, mean = (x[:, None, None] for x in (self.autoencoder.latent_std, self.autoencoder.latent_mean))
        return decoder(self.autoencoder.post_quant(latents * std + mean)).float()

    def terms(self, decoder: Decoder, images: torch.Tensor, random: torch.Generator, step: int,
              part: Part) -> dict[str, torch.Tensor]:
        """``loss`` for images (B, 3, H, W) in [-1, 1], and its terms, scalars. Draws come from ``random``, each for the
        whole batch that ``part`` is a part of."""
        with torch.no_grad():
            seen = self.autoencoder.encode(images)
        posterior = Posterior(seen.mean.float(), seen.logvar.float())
        shape = posterior.mean.shape
        latents = posterior.sample(part.randn(shape, random).to(images.device))
        deviation = self.config.noise * part.of_batch(torch.randn(part.batch, 1, 1, 1, generator=random)).abs()
        noise = (deviation * part.randn(shape, random)).to(images.device)
        decoded = self.images(decoder, latents + noise)
        terms, reconstruction, adversarial = self.objective(decoded, images, decoder.conv_out.weight, step)
        loss = reconstruction if adversarial is None else reconstruction + adversarial
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


def base_of(context: StageContext) -> RunFolder:
    """The run whose decoder is tuned. Raises ValueError for a student, whose guidance is not in its networks alone."""
    assert context.start is not None  # `Experiment` asks for it
    if "student" in (read_yaml(context.start.path / "config.yaml").get("stages") or ()):
        raise ValueError(f"start_from: {context.start.path} is a student; valid for the stage decoder: its teacher, "
                         "whose autoencoder.safetensors then serves the student, too")
    return context.start


def train_decoder(config: DecoderStage, context: StageContext) -> None:
    """Tune the decoder of the run to start from; write autoencoder.safetensors, whose encoder is that run's."""
    run, seed, device, processes = context.run, context.seed, context.device, context.processes
    start = base_of(context)
    model = Autoencoder(context.system.autoencoder)
    load_weights(model, start.weights("autoencoder"))
    run.record_start(start, start.weights("autoencoder").name)
    torch.manual_seed(seed)  # of the discriminator
    decoder, model = place_on(deepcopy(model.decoder), device), freeze(place_on(model, device))
    adversary = Adversary(config.adversarial, device) if config.adversarial.weight else None
    check_adversary(config.adversarial, config.train, processes)
    perceptual, perceptual_name = perceptual_distance(config.perceptual, device)
    bound = Decoding(config, model, DecodedLoss(config, perceptual, adversary))
    source, validation, batch = context.source, context.validation, config.train.batch
    held_out = image_batch(validation, np.arange(min(config.validation, len(validation))))  # (N, 3, H, W)
    with torch.no_grad():
        latents = torch.cat([model.encode(part.to(device)).mean for part in held_out.split(batch)])  # (N, C, h, w)
    noisy = latents + config.noise * torch.randn(latents.shape, generator=generator(seed, "decoder", -1)).to(device)

    def loss_at(decoder: Decoder, read: Batch, position: int, part: Part) -> dict[str, torch.Tensor]:
        images = to_unit(part.of_read(read.images)).to(device)  # (B, 3, H, W)
        return bound.terms(decoder, images, generator(seed, "decoder", position), position, part)

    @torch.no_grad()
    def decoded(decoder: Decoder, which: torch.Tensor) -> torch.Tensor:
        return torch.cat([bound.images(decoder, part).cpu() for part in which.split(batch)])

    def validate(decoder: Decoder) -> dict[str, float]:
        return {name: float(psnr(decoded(decoder, which), held_out).mean())
                for name, which in (("psnr", latents), ("psnr_noisy", noisy))}

    def preview(decoder: Decoder, step: int) -> None:
        rows = [held_out[:COLUMNS], decoded(decoder, latents[:COLUMNS]), decoded(decoder, noisy[:COLUMNS])]
        labels = [""] * len(rows[0]) + ["decoded"] * len(rows[0]) + [f"noise {config.noise:g}"] * len(rows[0])
        save_grid(torch.cat(rows), run.path / "samples" / f"decoder_{step:06d}.png", labels, len(rows[0]),
                  title=f"step {step}: held-out images, their latents decoded, and decoded with noise on them")

    before = validate(decoder)
    part = Slice(processes.rank, processes.world)
    with Loader(source, Order(len(source), seed, getattr(source, "buckets", None)), batch, seed, config.train.workers,
                part) as loader:
        task = Task("decoder", loader.batch_at, loss_at, validate, preview, ("psnr_noisy", "max"),
                    lambda decoder: decoded(decoder, latents[:1]), {"adversary": adversary} if adversary else {})
        average = fit(task, decoder, config.train, run, seed, processes)
    if processes.main:
        model.decoder.load_state_dict(average.state_dict())
        save_weights(model, run.weights("autoencoder"))
        after = validate(average)
        run.record(decoder={"noise": config.noise, "images": len(held_out), "perceptual": perceptual_name,
                            "adversarial": adversary.name if adversary else "off",
                            "bf16": autocast_dtype(config.train.precision, device) is not None,
                            **{f"{name}_before": round(value, 3) for name, value in before.items()},
                            **{name: round(value, 3) for name, value in after.items()}})
