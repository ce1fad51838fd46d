"""The stage of the tiny decoder: a small network learns what the autoencoder's decoder makes of latents.

It is an option of drawing (`sample.py --decoder tiny`) and changes nothing else. Axis letters: B batch, C latent
channels, H W latent size.
"""
from dataclasses import dataclass, field

import torch

from eval.fidelity import psnr
from files.images import to_uint8
from files.sheets import save_grid
from files.weights import load_weights, save_weights
from model.autoencoder import Autoencoder, Posterior
from model.device import autocast_dtype, freeze, place_on
from model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from training.loop import Task, TrainConfig, fit
from training.seed import Part, generator, whole_batch
from training.stages.context import StageContext
from training.stages.denoiser import SHOWN, DenoiserStage, held_out_pairs, training_pairs
from training.stages.pairs import PairBatch, latent_encoder


@dataclass(frozen=True)
class TinyDecoderStage:
    """``model`` is the shape of the decoder. ``noise`` is added to a latent for the small decoder alone, with a random
    deviation up to this one, because the latents that a denoiser makes are not as clean as those of images. ``images``,
    ``cache`` and ``validation`` are as in ``denoiser``."""

    model: TinyDecoderConfig = field(default_factory=TinyDecoderConfig)
    noise: float = 0.1
    images: int | None = None
    cache: bool = True
    validation: int = 256
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        if not self.noise >= 0.0:
            raise ValueError(f"noise: {self.noise}; valid: from 0 up")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images: {self.images}; valid: from 1 up, or null for all")
        if self.validation < 1:
            raise ValueError(f"validation: {self.validation}; valid: from 1 image up")

    @property
    def reading(self) -> DenoiserStage:
        """How the latents are read: as for a denoiser. The captions are not used."""
        return DenoiserStage(images=self.images, cache=self.cache, validation=self.validation, caption_dropout=0.0,
                             train=self.train)


def train_tiny_decoder(config: TinyDecoderStage, context: StageContext) -> None:
    """Train on the latents of the run's autoencoder; write tiny_decoder.safetensors (averaged weights)."""
    run, seed, device, processes = context.run, context.seed, context.device, context.processes
    autoencoder = Autoencoder(context.system.autoencoder)
    load_weights(autoencoder, run.weights("autoencoder"))
    encode = latent_encoder(freeze(place_on(autoencoder, device)), device)
    torch.manual_seed(seed)
    decoder = place_on(TinyDecoder(config.model, context.system.autoencoder), device)
    context.begin(tiny_decoder=decoder)
    pairs, held_out = training_pairs(config.reading, context, encode), held_out_pairs(config.reading, context, encode)

    def loss_at(decoder: TinyDecoder, read: PairBatch, position: int, part: Part) -> dict[str, torch.Tensor]:
        random = generator(seed, "tiny_decoder", position)
        mean = part.of_read(read.mean)
        latents = Posterior(mean, part.of_read(read.logvar)).sample(part.randn(mean.shape, random)).to(device)
        deviation = config.noise * part.of_batch(torch.rand(part.batch, 1, 1, 1, generator=random))
        noise = (deviation * part.randn(mean.shape, random)).to(device)
        with torch.no_grad():
            wanted = autoencoder.decode(latents).float()
        away = decoder(latents + noise).float() - wanted
        return {"loss": away.square().mean() + 0.1 * away.abs().mean()}

    @torch.no_grad()
    def validate(decoder: TinyDecoder) -> dict[str, float]:
        latents, batch = held_out.mean.to(device), config.train.batch
        values = torch.cat([psnr(decoder(part).float().clamp(-1, 1), autoencoder.decode(part).float().clamp(-1, 1))
                            for part in latents.split(batch)])
        return {"psnr": float(values.mean())}

    def preview(decoder: TinyDecoder, step: int) -> None:
        latents = held_out.mean[:SHOWN // 2].to(device)
        with torch.no_grad():
            images = torch.cat([to_uint8(network(latents)).cpu() for network in (autoencoder.decode, decoder)])
        captions = [f"{name}: {text}" for name in ("full", "tiny") for text in held_out.captions[:len(latents)]]
        save_grid(images, run.path / "samples" / f"tiny_decoder_{step:06d}.png", captions,
                  title=f"step {step}: the autoencoder's decoder, then the tiny one")

    def item(decoder: TinyDecoder) -> torch.Tensor:
        read = PairBatch(held_out.mean[:1], held_out.logvar[:1], held_out.captions[:1])
        return loss_at(decoder, read, 0, whole_batch(1))["loss"]

    task = Task("tiny_decoder", pairs.at, loss_at, validate, preview, ("psnr", "max"), item)
    try:
        average = fit(task, decoder, config.train, run, seed, processes)
    finally:
        pairs.close()
    if processes.main:
        save_weights(average, run.weights("tiny_decoder"))
        run.record(tiny_decoder={"psnr": round(validate(average)["psnr"], 3), "images": len(pairs),
                                 "parameters": sum(p.numel() for p in decoder.parameters()),
                                 "bf16": autocast_dtype(config.train.precision, device) is not None})
