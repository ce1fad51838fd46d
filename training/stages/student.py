"""The student stage: the denoiser of another run is tuned to need few calls, with its guidance folded in.

The mathematics of the two methods is in `diffusion/distillation.py` and `diffusion/shortcut.py`. The text encoder and
the latents are those of the teacher and do not change; only the UNet is trained, from the teacher's weights.

Axis letters: B batch, C latent channels, H W latent size, L tokens, D context width.
"""
from dataclasses import dataclass, field, replace
from math import log2
from operator import itemgetter
from typing import Literal

import torch

from data.tokenizer import Tokenizer
from diffusion.distillation import consistency_loss, earlier_times, levels, next_point
from diffusion.guidance_free import Scales, beta_of_uniform, check_scales
from diffusion.loss import TimestepSampling, sample_timesteps
from diffusion.prediction import target
from diffusion.schedule import Schedule, per_image
from diffusion.shortcut import Jumps, draw_jumps, jump_distance, length, two_jumps
from files.config import ConfigError
from files.run_folder import RunFolder
from files.weights import load_weights, save_weights
from files.whole import sha256_of
from model.autoencoder import Autoencoder, Posterior
from model.device import autocast_dtype, freeze, place_on
from model.text_encoder import TextEncoder, trim_padding
from model.unet import UNet
from pipeline.config import SystemConfig, read_system_config
from pipeline.system import TextToImage
from training.loop import Task, TrainConfig, fit
from training.seed import Part, generator, whole_batch
from training.stages.context import StageContext
from training.stages.denoiser import MULTIPLE, SHOWN, DenoiserStage, held_out_pairs, save_preview, training_pairs
from training.stages.pairs import PairBatch, latent_encoder


@dataclass(frozen=True)
class StudentStage:
    """Training of the student; its networks and its process are those of the section ``denoiser``, as the teacher has
    them, but for ``unet.guidance_input`` and ``unet.jump_input``.

    ``guidance_scales`` (lowest, highest) are folded in; a range needs ``unet.guidance_input``. ``gap`` (first, last) is
    the distance of the two points that are compared, as a share of the whole range of times; it falls geometrically
    from the first to the last during the run. With the ``method`` shortcut it is the length up to which a jump follows
    the teacher, and a share ``doubled`` of a batch learns longer ones from two of half their length. ``direction`` is
    what leads from one to the other: the prediction of the teacher, or the pair of image and noise
    (`diffusion/distillation.py`). ``offset`` is c of the distance. ``images``, ``cache`` and ``validation`` are as in
    ``denoiser``."""

    method: Literal["consistency", "shortcut"] = "consistency"
    guidance_scales: Scales = (3.0, 3.0)
    gap: tuple[float, float] = (0.1, 0.1)
    doubled: float = 0.5
    direction: Literal["teacher", "data"] = "teacher"
    offset: float = 0.03
    timesteps: TimestepSampling = "stratified"
    images: int | None = None
    cache: bool = True
    validation: int = 256
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        check_scales(self.guidance_scales)
        first, last = self.gap
        if not 0.0 < last <= first <= 1.0:
            raise ValueError(f"gap: {list(self.gap)}; valid: [first, last] with 0 < last <= first <= 1")
        if self.method == "shortcut" and (first != last or self.pieces < 2 or 2.0 ** -round(log2(self.pieces)) != last):
            raise ValueError(f"gap: {list(self.gap)}; valid for the method shortcut: twice 1/2, 1/4, 1/8 and so on, "
                             "such as [0.0625, 0.0625]")
        if not 0.0 < self.doubled < 1.0:
            raise ValueError(f"doubled: {self.doubled}; valid: a share of a batch above 0 and below 1")
        if not 0.0 <= self.offset:
            raise ValueError(f"offset: {self.offset}; valid: from 0 up")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images: {self.images}; valid: from 1 up, or null for all")
        if self.validation < 1:
            raise ValueError(f"validation: {self.validation}; valid: from 1 pair up")

    def gap_at(self, share: float) -> float:
        """The gap after this share of the run."""
        first, last = self.gap
        return first ** (1.0 - share) * last**share

    @property
    def pieces(self) -> int:
        """How many of the longest jumps that follow the teacher make a path."""
        return round(1.0 / self.gap[1])

    @property
    def reading(self) -> DenoiserStage:
        """How the pairs are read: as for a denoiser, no caption dropped."""
        return DenoiserStage(images=self.images, cache=self.cache, validation=self.validation, caption_dropout=0.0,
                             train=self.train)


class Teacher:
    """The denoiser of another run, frozen, and its guided prediction."""

    def __init__(self, run: RunFolder, system: SystemConfig, device: torch.device):
        """Raises ConfigError if the run is not finished or its networks, process or latents are not those of
        ``system``."""
        run.require("tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors", "denoiser.safetensors")
        self.config = read_system_config(run.path / "config.yaml")
        check_same(self.config, system, run)
        self.unet, self.text_encoder = UNet(self.config.unet), TextEncoder(self.config.text_encoder)
        for name, network in (("denoiser", self.unet), ("text_encoder", self.text_encoder)):
            load_weights(network, run.weights(name))
            freeze(place_on(network, device))
        self.schedule = Schedule(self.config.schedule)

    @torch.no_grad()
    def predictions(self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor, mask: torch.Tensor,
                    beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(guided, conditional) predictions (B, C, H, W) at guidance scale 1 / beta (B,).

        context (2B, L, D) and mask (2B, L): of B empty captions and B captions. A teacher with folded guidance is
        called with beta and with 1 instead of without and with the captions.
        """
        time = self.schedule.network_time(torch.cat([t, t]))
        count = len(x_t)
        if self.unet.guidance is not None:
            both = self.unet(torch.cat([x_t, x_t]), time, torch.cat([context[count:]] * 2),
                             torch.cat([mask[count:]] * 2), beta=torch.cat([beta, torch.ones_like(beta)]))
            guided, cond = both.float().chunk(2)
            return guided, cond
        uncond, cond = self.unet(torch.cat([x_t, x_t]), time, context, mask).float().chunk(2)
        return uncond + per_image(1.0 / beta, x_t) * (cond - uncond), cond


def check_same(teacher: SystemConfig, student: SystemConfig, run: RunFolder) -> None:
    """Raise ConfigError unless both have the same networks and the same process, up to the student's own inputs."""
    ours = replace(student.unet, guidance_input=teacher.unet.guidance_input, jump_input=teacher.unet.jump_input,
                   dropout=teacher.unet.dropout, gradient_checkpointing=teacher.unet.gradient_checkpointing)
    for name, one, other in (("unet", teacher.unet, ours), ("text_encoder", teacher.text_encoder, student.text_encoder),
                             ("schedule", teacher.schedule, student.schedule),
                             ("prediction_type", teacher.prediction_type, student.prediction_type)):
        if one != other:
            raise ConfigError(f"denoiser.{name}: {other}; valid: {one}, that of the teacher {run.path}")
    for name in ("guidance_input", "jump_input"):
        if getattr(teacher.unet, name) and not getattr(student.unet, name):
            raise ConfigError(f"denoiser.unet.{name}: false; valid: true, as the teacher {run.path}")


@dataclass(frozen=True)
class Noised:
    """Latents x_0 and noise eps (B, C, H, W) mixed at times t (B,) and their levels (B, 1, 1, 1); context (2B, L, D)
    and mask (2B, L) of B empty captions and of the captions; one over the guidance scale, beta (B,)."""

    x_0: torch.Tensor
    eps: torch.Tensor
    t: torch.Tensor
    levels: tuple[torch.Tensor, torch.Tensor]
    context: torch.Tensor
    mask: torch.Tensor
    beta: torch.Tensor

    @property
    def x_t(self) -> torch.Tensor:
        """The mixture (B, C, H, W)."""
        return self.levels[0] * self.x_0 + self.levels[1] * self.eps

    def only(self, rows: torch.Tensor) -> "Noised":
        """Some rows of the batch, bool (B,)."""
        both = torch.cat([rows, rows])
        return Noised(self.x_0[rows], self.eps[rows], self.t[rows], (self.levels[0][rows], self.levels[1][rows]),
                      self.context[both], self.mask[both], self.beta[rows])


class Distilling:
    """The loss of a training step, and the loss that is measured on held-out images."""

    def __init__(self, config: StudentStage, teacher: Teacher, tokenizer: Tokenizer, seed: int, device: torch.device):
        self.config, self.teacher, self.tokenizer, self.seed, self.device = config, teacher, tokenizer, seed, device
        self.schedule, self.prediction_type = teacher.schedule, teacher.config.prediction_type

    def losses(self, student: UNet, x_0: torch.Tensor, captions: list[str], jumps: Jumps, eps: torch.Tensor,
               beta: torch.Tensor, gap: float) -> torch.Tensor:
        """The loss of each image, (B,), of latents x_0 and noise eps (B, C, H, W), captions, one over the guidance
        scale, beta (B,), and jumps, of which the method consistency reads the times alone and takes points that are
        ``gap`` apart."""
        x_0, eps, beta = (tensor.to(self.device) for tensor in (x_0, eps, beta))
        jumps = jumps.each(lambda values: values.to(self.device))
        images = Noised(x_0, eps, jumps.t, levels(self.schedule, jumps.t), *self.contexts(captions), beta)
        return (self.by_shortcut(student, images, jumps) if self.config.method == "shortcut" else
                self.by_consistency(student, images, gap))

    def by_consistency(self, student: UNet, images: Noised, gap: float) -> torch.Tensor:
        """The loss of each image, (B,): two points of a path have the same end."""
        r = earlier_times(self.schedule, images.t, gap)
        x_r = next_point(self.direction(images), images.x_t, images.levels, levels(self.schedule, r),
                         self.prediction_type)
        return consistency_loss(lambda x, t: self.called(student, images, x, t), images.x_t, images.t, x_r, r,
                                self.schedule, self.prediction_type, self.config.offset)

    def by_shortcut(self, student: UNet, images: Noised, jumps: Jumps) -> torch.Tensor:
        """The loss of each image, (B,): a short jump follows the teacher, a long one is two of half its length."""
        wanted, long = torch.empty_like(images.x_t), jumps.doubled
        if not long.all():
            wanted[~long] = self.direction(images.only(~long))
        # without a long jump another one is made and left unused: all processes have to call a sharded network alike
        rows = long if long.any() else torch.arange(len(long), device=long.device) == 0
        some = images.only(rows)
        wanted[long] = two_jumps(lambda x, t, jump: self.called(student, some, x, t, jump), some.x_t,
                                 jumps.each(itemgetter(rows)), self.schedule, self.prediction_type)[:int(long.sum())]
        found = self.called(student, images, images.x_t, images.t, length(images.t, jumps.end, self.schedule))
        return jump_distance(found.to(wanted.dtype), wanted, images.x_t, images.levels, self.prediction_type,
                             self.config.offset)

    def called(self, student: UNet, images: Noised, x: torch.Tensor, t: torch.Tensor,
               jump: torch.Tensor | None = None) -> torch.Tensor:
        """The student's prediction (B, C, H, W) at points x at times t (B,), with the captions and the guidance of the
        images."""
        return student(x, self.schedule.network_time(t), images.context[len(x):], images.mask[len(x):], jump=jump,
                       beta=images.beta if student.guidance is not None else None)

    def direction(self, images: Noised) -> torch.Tensor:
        """The prediction (B, C, H, W) that leads along the paths through x_t."""
        guided, cond = self.teacher.predictions(images.x_t, images.t, images.context, images.mask, images.beta)
        if self.config.direction == "teacher":
            return guided
        return target(images.x_0, images.eps, *images.levels, self.prediction_type) + (guided - cond)

    def jumps(self, t: torch.Tensor, random: torch.Generator) -> Jumps:
        """Jumps for a batch of times t (B,); for the method consistency nothing more is drawn."""
        if self.config.method == "consistency":
            return Jumps(t, t, t, torch.zeros_like(t, dtype=torch.bool))
        return draw_jumps(t, self.config.doubled, self.config.pieces, self.schedule, random)

    @torch.no_grad()
    def contexts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Context (2B, L, D) and mask (2B, L) of B empty captions and of the captions."""
        ids, mask = (tensor.to(self.device) for tensor in
                     trim_padding(*self.tokenizer.encode([""] + captions), MULTIPLE))
        rows = torch.tensor([0] * len(captions) + list(range(1, len(captions) + 1)), device=self.device)
        return self.teacher.text_encoder(ids, mask)[rows], mask[rows]

    def loss_at(self, student: UNet, read: PairBatch, position: int, part: Part) -> dict[str, torch.Tensor]:
        """The mean loss of a part of a batch. What is drawn is drawn for the whole batch and then cut."""
        random = generator(self.seed, "student", position)
        mean = part.of_read(read.mean)
        x_0 = Posterior(mean, part.of_read(read.logvar)).sample(part.randn(mean.shape, random))
        t = sample_timesteps(part.batch, self.config.timesteps, self.schedule, random)
        eps = part.randn(mean.shape, random)
        beta = part.of_batch(beta_of_uniform(torch.rand(part.batch, generator=random), self.config.guidance_scales))
        jumps = self.jumps(t, random).each(part.of_batch)
        gap = self.config.gap_at(position / self.config.train.steps)
        return {"loss": self.losses(student, x_0, part.of_read(read.captions), jumps, eps, beta, gap).mean()}

    @torch.no_grad()
    def validate(self, student: UNet, read: PairBatch) -> dict[str, float]:
        """The mean loss on held-out images at the last gap, with the same noise, times and scales at every call."""
        random = generator(self.seed, "student/validation", 0)
        x_0 = Posterior(read.mean, read.logvar).sample(torch.randn(read.mean.shape, generator=random))
        t = sample_timesteps(len(x_0), "sobol", self.schedule, random)
        eps = torch.randn(x_0.shape, generator=random)
        beta = beta_of_uniform(torch.rand(len(x_0), generator=random), self.config.guidance_scales)
        batch = self.config.train.batch
        spans = [slice(i, i + batch) for i in range(0, len(x_0), batch)]
        jumps = self.jumps(t, random)
        found = [self.losses(student, x_0[span], read.captions[span], jumps.each(itemgetter(span)), eps[span],
                             beta[span], self.config.gap[1]).float().cpu() for span in spans]
        return {"loss": float(torch.cat(found).mean())}


def new_student(teacher: Teacher, system: SystemConfig, seed: int, device: torch.device) -> UNet:
    """The student with the teacher's weights; an input that the teacher lacks begins without effect."""
    torch.manual_seed(seed)
    student = UNet(system.unet)
    missing = student.load_state_dict(teacher.unet.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith(("guidance.", "jump.")) for name in missing.missing_keys)
    return place_on(student, device)


def train_student(config: StudentStage, context: StageContext) -> None:
    """Tune the denoiser of the run to start from; write denoiser.safetensors (averaged weights) beside the teacher's
    text_encoder.safetensors, and the teacher's hashes in the manifest. Raises ConfigError without a teacher that
    fits."""
    run, seed, device, processes, system = context.run, context.seed, context.device, context.processes, context.system
    if context.start is None:
        raise ConfigError("start_from: none; valid for the stage student: the run folder of its teacher")
    teacher = Teacher(context.start, system, device)
    for name in ("tokenizer.json", "autoencoder.safetensors"):
        if sha256_of(run.path / name) != sha256_of(context.start.path / name):
            raise ConfigError(f"{run.path / name} is not that of the teacher; valid: a copy of "
                              f"{context.start.path / name}")
    tokenizer = Tokenizer.load(run.path / "tokenizer.json")
    autoencoder = Autoencoder(system.autoencoder)
    load_weights(autoencoder, run.weights("autoencoder"))
    encode = latent_encoder(freeze(place_on(autoencoder, device)), device)
    student = new_student(teacher, system, seed, device)
    pairs, held_out = training_pairs(config.reading, context, encode), held_out_pairs(config.reading, context, encode)
    distilling = Distilling(config, teacher, tokenizer, seed, device)

    def preview(student: UNet, step: int) -> None:
        whole = TextToImage(system, tokenizer, teacher.text_encoder, student, autoencoder)
        items = range(min(SHOWN, len(context.validation)))
        prompts = list(context.preview_prompts) or [context.validation.captions(i)[0] for i in items]
        save_preview(whole, prompts, run.path / "samples" / f"student_{step:06d}.png", step)

    def item(student: UNet) -> torch.Tensor:
        read = PairBatch(held_out.mean[:1], held_out.logvar[:1], held_out.captions[:1])
        return distilling.loss_at(student, read, 0, whole_batch(1))["loss"]

    def validate(student: UNet) -> dict[str, float]:
        return distilling.validate(student, held_out)

    task = Task("student", pairs.at, distilling.loss_at, validate, preview, ("loss", "min"), item)
    try:
        average = fit(task, student, config.train, run, seed, processes)
    finally:
        pairs.close()
    run.take_over(context.start, "text_encoder.safetensors")
    run.record_start(context.start, "denoiser.safetensors")
    if processes.main:
        save_weights(average, run.weights("denoiser"))  # last: its presence marks the stage as finished
        run.record(student={"validation_loss": round(distilling.validate(average, held_out)["loss"], 5),
                            "parameters": sum(p.numel() for p in student.parameters()), "images": len(pairs),
                            "guidance_scales": list(config.guidance_scales),
                            "bf16": autocast_dtype(config.train.precision, device) is not None})
