"""The denoiser stage: UNet and text encoder, trained together on latents and captions.

Axis letters: B batch, C latent channels, H W latent size, L tokens.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from data.clip_tokenizer import ClipTokenizer
from data.tokenizer import Tokenizer
from diffusion.denoise import DenoiseAtTimes
from diffusion.guidance_free import Scales, beta_of_uniform, check_scales, guidance_free
from diffusion.loss import TimestepSampling, Weighting, diffusion_loss, sample_timesteps
from diffusion.noise import nearest_noise
from diffusion.prediction import PredictionType
from diffusion.schedule import Schedule, ScheduleConfig
from files.sheets import save_grid
from files.weights import load_weights, save_weights
from model.autoencoder import Autoencoder, Posterior
from model.device import autocast_dtype, freeze, place_on
from model.text_encoder import TextEncoder, TextEncoderConfig, trim_padding
from model.unet import UNet, UNetConfig
from pipeline.system import Networks, TextToImage
from training.loop import Task, TrainConfig, fit
from training.seed import Part, generator, whole_batch
from training.stages.context import StageContext
from training.stages.contexts import ContextWatch
from training.stages.grounding import (
    GroundingConfig,
    Place,
    attention_loss,
    keep_attention,
    keep_output,
    unwatched,
    words_loss,
)
from training.stages.pairs import CachedPairs, Encode, PairBatch, Pairs, ReadPairs, latent_encoder

MULTIPLE = 16  # caption lengths of a batch are rounded up to it: fp32 values in the widest vector of a CPU
BINS = 5  # ranges of the noise level, for each of which the validation loss is given
SHOWN = 16  # samples of a preview


@dataclass(frozen=True)
class DenoiserStage:
    """Networks, diffusion process and training of the denoiser. ``caption_dropout`` is the share of captions replaced
    by the empty one, for classifier-free guidance (Ho and Salimans 2022). ``images`` is the number of images of the
    source that are used, null for all. ``cache`` encodes them once before the first step, without random crops or
    mirroring; false encodes them in every step. ``validation`` is the number of held-out pairs for the validation loss.
    ``timestep_mean`` and ``timestep_std`` are those of the normal behind ``logit_normal`` (Esser et al. 2024).
    ``noise_candidates`` noises are drawn for every image, and the nearest is taken (`nearest_noise`). ``grounding``
    supervises the UNet with the scene, for sources that know the positions of objects. ``guidance_scales`` (lowest,
    highest) folds guidance into the UNet by guidance-free training (`diffusion/guidance_free.py`), null leaves it to
    two predictions."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction_type: PredictionType = "v_prediction"
    weighting: Weighting = "none"
    timesteps: TimestepSampling = "stratified"
    noise_candidates: int = 1
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    caption_dropout: float = 0.1
    images: int | None = None
    cache: bool = True
    validation: int = 256
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    guidance_scales: Scales | None = None
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout: {self.caption_dropout}; valid: a share in [0, 1)")
        if self.unet.context_width != self.text_encoder.width:
            raise ValueError(f"unet.context_width: {self.unet.context_width} differs from text_encoder.width: "
                             f"{self.text_encoder.width}; the UNet reads what the text encoder writes")
        if self.guidance_scales is not None:
            check_scales(self.guidance_scales)
            if not self.unet.guidance_input or not self.caption_dropout:
                raise ValueError(f"guidance_scales: {list(self.guidance_scales)}; valid with unet.guidance_input: true "
                                 "and a caption_dropout above 0, or null")
        if self.noise_candidates < 1:
            raise ValueError(f"noise_candidates: {self.noise_candidates}; valid: from 1 up")
        if not self.timestep_std > 0:
            raise ValueError(f"timestep_std: {self.timestep_std}; valid: above 0")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images: {self.images}; valid: from 1 up, or null for all")
        if self.grounding.on and (not self.cache or self.unet.gradient_checkpointing or self.train.compile):
            raise ValueError(f"grounding: {self.grounding}; valid with cache: false, with gradient_checkpointing and "
                             "with compile: attention 0 and words 0")
        if self.validation < 1:
            raise ValueError(f"validation: {self.validation}; valid: from 1 pair up")


def new_networks(config: DenoiserStage, seed: int, device: torch.device) -> Networks:
    """The networks of the stage with their initial weights."""
    torch.manual_seed(seed)
    unet, text_encoder = UNet(config.unet), TextEncoder(config.text_encoder)
    words = nn.Linear(config.unet.channels[-1], config.text_encoder.vocab_size) if config.grounding.words else None
    return place_on(Networks(unet, text_encoder, words), device)


class Predicts(Protocol):
    """What a loss is computed with: `Networks`, or functions that call networks with other weights."""

    @property
    def unet(self) -> Callable[..., torch.Tensor]: ...

    @property
    def text_encoder(self) -> Callable[..., torch.Tensor]: ...


class Denoising:
    """The loss of a training step, and the loss that is measured on held-out images. ``masked`` says whether padding is
    hidden from the networks, which published ones see."""

    def __init__(self, config: DenoiserStage, tokenizer: Tokenizer | ClipTokenizer, seed: int, device: torch.device,
                 masked: bool = True):
        self.config, self.tokenizer, self.seed, self.device, self.masked = config, tokenizer, seed, device, masked
        self.schedule, self.batch = Schedule(config.schedule), config.train.batch

    def losses(self, networks: Predicts, x_0: torch.Tensor, captions: list[str], t: torch.Tensor,
               eps: torch.Tensor, beta: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of each image, (B,), of latents x_0 and noise eps (B, C, H, W), captions and times t (B,). beta (B,)
        is one over the guidance scale in guidance-free training."""
        ids, mask = self.encode(captions)  # (B, L)
        context = networks.text_encoder(ids, mask)  # (B, L, D)

        beta = None if beta is None else beta.to(self.device)

        def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return networks.unet(x_t, self.schedule.network_time(t), context, mask, beta=beta)

        if beta is not None:
            unconditional = self.unconditional(networks, len(captions))
            return self.loss_of(guidance_free(denoise, unconditional, beta), x_0, t, eps)
        return self.loss_of(denoise, x_0, t, eps)

    def loss_of(self, denoise: DenoiseAtTimes, x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """The loss of each image, (B,), of a network bound to its captions."""
        return diffusion_loss(denoise, x_0.to(self.device), t.to(self.device), eps.to(self.device), self.schedule,
                              self.config.prediction_type, self.config.weighting)  # (B,)

    def unconditional(self, networks: Predicts, count: int) -> DenoiseAtTimes:
        """The prediction for ``count`` empty captions, without a gradient and unseen by whoever watches attention."""
        ids, mask = self.encode([""])
        rows = None if mask is None else mask.expand(count, -1)
        watched = networks.unet.cross_attentions() if isinstance(networks.unet, UNet) else ()

        def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), unwatched(watched):
                context = networks.text_encoder(ids, mask)  # (1, L, D)
                return networks.unet(x_t, self.schedule.network_time(t), context.expand(count, -1, -1), rows)

        return denoise

    def draw_beta(self, captions: list[str], position: int, part: Part) -> torch.Tensor | None:
        """One over the guidance scale of each image of a part of a batch, (B,), and 1 where the caption was dropped;
        None if guidance is not folded in."""
        if self.config.guidance_scales is None:
            return None
        random = generator(self.seed, "denoiser/beta", position)
        beta = part.of_batch(beta_of_uniform(torch.rand(part.batch, generator=random), self.config.guidance_scales))
        return torch.where(torch.tensor([caption == "" for caption in captions]), torch.ones_like(beta), beta)

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids (B, L) of captions and their mask, both cut to the longest of them; None if padding is seen."""
        ids, mask = self.tokenizer.encode(captions)  # (B, L)
        if not self.masked:
            return ids.to(self.device), None
        ids, mask = trim_padding(ids, mask, MULTIPLE)
        return ids.to(self.device), mask.to(self.device)

    def loss_at(self, networks: Networks, read: PairBatch, position: int, part: Part) -> dict[str, torch.Tensor]:
        """The mean loss of a part of a batch, with grounding where the places of things are known."""
        x_0, t, eps = self.draw(read, position, part)
        captions, places = part.of_read(read.captions), part.of_read(read.places) if read.places else None
        grounding_scale = self.config.grounding.left_at(position / self.config.train.steps)
        beta = self.draw_beta(captions, position, part)
        if places is not None and grounding_scale:
            return self.grounded_loss(networks, x_0, captions, places, t, eps, grounding_scale, beta)
        loss = self.losses(networks, x_0, captions, t, eps, beta).mean()
        if networks.words is not None:  # DDP needs a gradient of every parameter in every step
            loss = loss + 0.0 * sum(parameter.sum() for parameter in networks.words.parameters())
        return {"loss": loss}

    def draw(self, read: PairBatch, position: int, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents x_0 (B, C, H, W), times t (B,) and noise eps (B, C, H, W) of a part of a batch. They are drawn for
        the whole batch and then cut, so that they do not depend on how it is divided."""
        random = generator(self.seed, "denoiser", position)
        mean = part.of_read(read.mean)
        x_0 = Posterior(mean, part.of_read(read.logvar)).sample(part.randn(mean.shape, random))
        t = part.of_batch(sample_timesteps(part.batch, self.config.timesteps, self.schedule, random,
                                           self.config.timestep_mean, self.config.timestep_std))
        candidates = [part.randn(mean.shape, random) for _ in range(self.config.noise_candidates)]
        eps = nearest_noise(torch.stack(candidates), x_0) if len(candidates) > 1 else candidates[0]
        return x_0, t, eps

    def grounded_loss(self, networks: Networks, x_0: torch.Tensor, captions: list[str], places: list[list[Place]],
                      t: torch.Tensor, eps: torch.Tensor, grounding_scale: float,
                      beta: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The mean loss of the denoiser plus the losses that compare its attention and features with where things are.
        Their weights are multiplied by ``grounding_scale``, which falls from 1 to 0 during the run."""
        config, terms = self.config.grounding, {}
        assert isinstance(self.tokenizer, Tokenizer)  # published systems are not grounded
        with keep_attention(networks.unet.cross_attentions()) as maps, keep_output(networks.unet.mid) as features:
            loss = self.losses(networks, x_0, captions, t, eps, beta).mean()
        if config.attention:
            terms["attention"] = attention_loss(maps, self.tokenizer, captions, places, (x_0.shape[2], x_0.shape[3]),
                                                config.heads)
            loss = loss + grounding_scale * config.attention * terms["attention"]
        if networks.words is not None:
            terms["words"] = words_loss(features[0], networks.words, self.tokenizer, captions, places)
            loss = loss + grounding_scale * config.words * terms["words"]
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def validate(self, networks: Predicts, read: PairBatch) -> dict[str, float]:
        """The mean loss on held-out images, and the mean in each fifth of the noise levels, least noise first. Noise
        and times are the same at every call; the times are a Sobol sequence, which covers all levels evenly."""
        random = generator(self.seed, "validation", 0)
        x_0 = Posterior(read.mean, read.logvar).sample(torch.randn(read.mean.shape, generator=random))
        t = sample_timesteps(len(x_0), "sobol", self.schedule, random)
        eps = torch.randn(x_0.shape, generator=random)
        batch = self.batch
        found = torch.cat([self.losses(networks, x_0[i:i + batch], read.captions[i:i + batch], t[i:i + batch],
                                       eps[i:i + batch]).float().cpu() for i in range(0, len(x_0), batch)])
        level = t.double() if self.schedule.is_flow else t.double() / self.schedule.steps  # in [0, 1]
        bins = (level * BINS).long().clamp(max=BINS - 1)
        return {"loss": float(found.mean()), **{f"loss_{number + 1}_of_{BINS}": float(found[bins == number].mean())
                                                for number in bins.unique().tolist()}}


def train_denoiser(config: DenoiserStage, context: StageContext) -> None:
    """Train UNet and text encoder on the latents of the run's autoencoder; write text_encoder.safetensors and
    denoiser.safetensors (averaged weights)."""
    run, seed, device, processes = context.run, context.seed, context.device, context.processes
    tokenizer = Tokenizer.load(run.path / "tokenizer.json")
    autoencoder = Autoencoder(context.system.autoencoder)
    load_weights(autoencoder, run.weights("autoencoder"))
    encode = latent_encoder(freeze(place_on(autoencoder, device)), device)
    networks = new_networks(config, seed, device)
    context.begin(text_encoder=networks.text_encoder, denoiser=networks.unet)
    pairs = training_pairs(config, context, encode)
    held_out = held_out_pairs(config, context, encode)
    denoising = Denoising(config, tokenizer, seed, device)
    watch = ContextWatch(tokenizer, context.validation)
    watch.measure(networks.text_encoder)  # the first drift is that since the start
    # sharded checkpoints hold nothing beside the model: there, the first drift after a resume is that since the start
    beside = {"contexts": watch} if watch.pairs and config.train.parallel == "ddp" else {}

    def validate(networks: Networks) -> dict[str, float]:
        return {**denoising.validate(networks, held_out), **watch.measure(networks.text_encoder)}

    def preview(networks: Networks, step: int) -> None:
        system = TextToImage(context.system, tokenizer, networks.text_encoder, networks.unet, autoencoder)
        items = range(min(SHOWN, len(context.validation)))
        prompts = list(context.preview_prompts) or [context.validation.captions(i)[0] for i in items]
        save_preview(system, prompts, run.path / "samples" / f"denoiser_{step:06d}.png", step)

    def item(networks: Networks) -> torch.Tensor:
        read = PairBatch(held_out.mean[:1], held_out.logvar[:1], held_out.captions[:1])
        return denoising.loss_at(networks, read, 0, whole_batch(1))["loss"]

    task = Task("denoiser", pairs.at, denoising.loss_at, validate, preview, ("loss", "min"), item, beside)
    try:
        average = fit(task, networks, config.train, run, seed, processes)
    finally:
        pairs.close()
    if processes.main:
        save_weights(average.text_encoder, run.weights("text_encoder"))
        save_weights(average.unet, run.weights("denoiser"))  # last: its presence marks the stage as finished
        run.record(denoiser={"validation_loss": round(denoising.validate(average, held_out)["loss"], 5),
                             "parameters": sum(p.numel() for p in networks.unet.parameters()),
                             "text_parameters": sum(p.numel() for p in networks.text_encoder.parameters()),
                             "images": len(pairs), "bf16": autocast_dtype(config.train.precision, device) is not None})


def save_preview(system: TextToImage, prompts: list[str], path: Path, step: int) -> None:
    """Save a labelled grid of samples of the averaged weights after ``step`` steps."""
    sampling = system.config.sampling
    save_grid(system.images(prompts, range(len(prompts))), path, prompts,
              title=f"step {step}, guidance {sampling.guidance.scale:g}, {sampling.steps} {sampling.sampler} steps, "
                    "averaged weights")


def training_pairs(config: DenoiserStage, context: StageContext, encode: Encode) -> Pairs:
    """The training pairs: from a cache of latents, or read and encoded in every step."""
    source, train = context.source, config.train
    count = min(config.images or len(source), len(source))
    if config.cache:
        return CachedPairs(context, "train", count, encode, train.batch, config.caption_dropout,
                           config.grounding.on)
    return ReadPairs(context, count, encode, train.batch, config.caption_dropout, train.workers)


def held_out_pairs(config: DenoiserStage, context: StageContext, encode: Encode) -> PairBatch:
    """The pairs for the validation loss: the first of the split, without dropped captions."""
    count = min(config.validation, len(context.validation))
    return CachedPairs(context, "validation", count, encode, config.train.batch).first(count)
