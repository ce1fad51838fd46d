"""What the stages of personalization share: the base, a few images, what the base is to keep, and the loss of a step.

    L = E |prediction - target|^2 on the given images  +  w E |prediction - target|^2 on images of the base itself

The second term, prior preservation (Ruiz et al. 2023, "DreamBooth", equation 2), shows the base what it drew for a
general prompt ("a star") before it learned the particular one ("a sks star"), so that it keeps drawing that. It is on
in every method if ``prior.prompts`` are given.

Axis letters: B images, C latent channels, H W latent size.
"""
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from data.catalog import DataConfig
from data.images.folder import FolderConfig
from data.order import Order, Slice
from data.source import Source, caption_batch, image_batch
from files.config import from_dict, read_yaml, to_dict
from files.whole import whole_file
from model.pretrained.adapters import networks_of
from model.pretrained.card import Card, hash_of_networks
from pipeline.config import STUDENT
from pipeline.loading import load_pretrained, load_run
from pipeline.moderation import Moderation
from pipeline.personal import judge_cards
from pipeline.system import Networks, TextToImage
from training.loop import Task, TrainConfig, fit
from training.optim import OptimConfig
from training.seed import Part, whole_batch
from training.stages.context import StageContext
from training.stages.denoiser import SHOWN, DenoiserStage, Denoising, Predicts, save_preview
from training.stages.grounding import GroundingConfig
from training.stages.pairs import PairBatch, latent_encoder

M = TypeVar("M", bound=nn.Module)
LEAST = 3  # images; one alone also teaches its pose and its background
MEASURED = 64  # pairs of noise and time for the validation loss, over which the images are repeated
CERTAIN = -30.0  # log-variance of latents that are samples already
BATCH = 16  # images of the base that are drawn at a time


def few_steps(steps: int, rate: float, decay: float = 0.01) -> TrainConfig:
    """The training of a few images: small batches, a constant rate, measured often."""
    return TrainConfig(steps=steps, batch=4, validate_every=100, preview_every=200, checkpoint_every=100,
                       optim=OptimConfig(learning_rate=rate, weight_decay=decay, warmup=10, schedule="constant"))


def completed(given: Any, own: Any) -> Any:
    """Nested settings, with ``own`` for those that are not given."""
    if not isinstance(given, dict) or not isinstance(own, dict):
        return given
    return {**own, **{key: completed(value, own.get(key)) for key, value in given.items()}}


@dataclass(frozen=True)
class PriorConfig:
    """What the base is to keep: ``images`` samples of it for the ``prompts`` in turn, drawn before training, whose loss
    counts ``weight``. Without prompts there is no such term."""

    prompts: tuple[str, ...] = ()
    images: int = 64
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images: {self.images}; valid: from 1 up")
        if not self.weight > 0:
            raise ValueError(f"weight: {self.weight}; valid: above 0, or no prompts")


@dataclass(frozen=True)
class PersonalStage:
    """The base is the run of ``start_from``, or a published checkpoint at the path ``pretrained``. ``captions`` replace
    those of the images, each drawn equally often. ``caption_dropout`` is the share of captions replaced by the empty
    one."""

    pretrained: str = ""
    captions: tuple[str, ...] = ()
    caption_dropout: float = 0.0
    prior: PriorConfig = field(default_factory=PriorConfig)
    train: TrainConfig = field(default_factory=lambda: few_steps(400, 1e-3))

    @classmethod
    def upgrade(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Settings of a configuration, with this stage's own ``train`` where it is given in part: without this, one
        key of it would bring the batch and the rate of a long training."""
        own = next(to_dict(part.default_factory()) for part in fields(cls)  # type: ignore[operator, misc]
                   if part.name == "train")
        return {**data, "train": completed(data["train"], own)} if "train" in data else dict(data)

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout: {self.caption_dropout}; valid: a share in [0, 1)")
        if self.train.compile or self.train.parallel != "ddp":
            raise ValueError(f"train.compile: {self.train.compile}, train.parallel: {self.train.parallel}; valid for "
                             "this stage: false and ddp")


@dataclass(frozen=True)
class Base:
    """The system that is taught: ``stage`` says how its loss is computed, ``hash`` identifies its networks, ``flags``
    names it on the command line of sample.py."""

    system: TextToImage
    stage: DenoiserStage
    hash: str
    name: str

    flags: str

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that can be taught, by the names that adapters use."""
        return networks_of(self.system.unet, self.system.text_encoder)


def load_base(config: PersonalStage, context: StageContext) -> Base:
    """The base of a stage. Raises ValueError or OSError naming what is missing or does not fit."""
    path = Path(config.pretrained) if config.pretrained else None if context.start is None else context.start.path
    if path is None:
        raise ValueError("no base to teach; valid: start_from: RUN, or pretrained: PATH of this stage")
    if config.pretrained:
        system = load_pretrained(path, context.device, moderation=None)
        stage = DenoiserStage(system.config.unet, system.config.text_encoder, system.config.schedule,
                              system.config.prediction_type)
    else:
        data = read_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else {}
        if STUDENT in (data.get("stages") or ()):
            raise ValueError(f"{path} is a student of few steps, whose loss this stage does not have; valid: its "
                             "teacher, whose adapters and words the student reads with --any-base")
        system = load_run(path, context.device, moderation=None)
        stage = from_dict(DenoiserStage, data.get("denoiser") or {}, "denoiser")
    if system.config.unet.gradient_checkpointing or system.config.text_encoder.gradient_checkpointing:
        raise ValueError(f"{path}: gradient_checkpointing: true; valid for this stage: false, it would compute "
                         "activations again with the weights of the base")
    stage = replace(stage, grounding=GroundingConfig(), train=config.train)
    return Base(system, stage, hash_of_networks(networks_of(system.unet, system.text_encoder)), path.name,
                f"--{'pretrained' if config.pretrained else 'run'} {path}")


# ---- images

def few_images(data: DataConfig, captions: Sequence[str] = ()) -> DataConfig:
    """The data of a stage that teaches: every image of a folder, none held out; one without a caption is accepted if
    there are ``captions`` for all. Raises ValueError for settings that have no effect on images that are encoded once.
    """
    settings = getattr(data, data.source)
    for name, still in (("flip", 0.0), ("crop", "center"), ("buckets", False)):
        if getattr(settings, name, still) != still:
            raise ValueError(f"data.{data.source}.{name}: {getattr(settings, name)}; valid here: {still}, the images "
                             "are encoded once")
    if not isinstance(settings, FolderConfig):
        return data
    if settings.split == "hash":
        settings = replace(settings, validation=0.0, test=0.0)
    return replace(data, folder=replace(settings, fallback=settings.fallback or (captions[0] if captions else "")))


class Captioned:
    """A source with other captions, the same for every image."""

    def __init__(self, source: Source, captions: Sequence[str]):
        self.source, self.texts = source, tuple(captions)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.source[index], "captions": self.texts}

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of item ``index``."""
        return self.texts


class Lesson(NamedTuple):
    """The data of a step: pairs of the given images, and of images of the base if there are any."""

    given: PairBatch
    prior: PairBatch | None


class Few:
    """A few images, encoded once, with their captions, and what the base drew before training. Raises ValueError for
    fewer than `LEAST` images, and for images of another size than the networks take."""

    def __init__(self, config: PersonalStage, base: Base, context: StageContext):
        found = context.source
        if len(found) < LEAST:
            count = f"{len(found)} image{'s' * (len(found) != 1)}"
            raise ValueError(f"data: {count} to learn from; valid: from {LEAST} up, one alone also teaches its pose "
                             "and its background")
        self.source: Source = Captioned(found, config.captions) if config.captions else found
        self.config, self.seed = config, context.seed
        encode, places = latent_encoder(base.system.autoencoder, context.device), np.arange(len(found))
        parts = [encode(image_batch(found, places[i:i + BATCH])) for i in range(0, len(found), BATCH)]
        self.mean, self.logvar = (torch.cat(tensors) for tensors in zip(*parts))  # (N, C, H, W) each
        self.order = Order(len(found), context.seed)
        self.part = Slice(context.processes.rank, context.processes.world)
        with context.processes.main_first():
            self.prior = prior_latents(config.prior, base, context, self.mean.shape[1:])

    def __len__(self) -> int:
        return len(self.source)

    @property
    def captions(self) -> list[str]:
        """All captions that are trained on, each once."""
        return list(dict.fromkeys(text for i in range(len(self)) for text in self.source.captions(i)))

    def at(self, step: int) -> Lesson:
        """The slice of this process of the batch of ``step``."""
        places = self.order.places(step, self.config.train.batch, self.part)
        captions = caption_batch(self.source, places, self.seed, self.config.caption_dropout)
        given = PairBatch(self.mean[places.indices], self.logvar[places.indices], captions)
        if self.prior is None:
            return Lesson(given, None)
        order = Order(len(self.prior), self.seed + 1)
        return Lesson(given, self.prior_pairs(order.places(step, self.config.train.batch, self.part).indices))

    def prior_pairs(self, indices: np.ndarray) -> PairBatch:
        """Latents of the base by number, with the prompts that they were drawn for."""
        assert self.prior is not None
        latents, prompts = self.prior[indices], self.config.prior.prompts
        return PairBatch(latents, torch.full_like(latents, CERTAIN), [prompts[i % len(prompts)] for i in indices])

    def measured(self) -> Lesson:
        """`MEASURED` pairs of each kind, over which the images are repeated, for the validation loss."""
        indices = np.arange(MEASURED) % len(self)
        captions = [self.source.captions(int(i))[0] for i in indices]
        return Lesson(PairBatch(self.mean[indices], self.logvar[indices], captions),
                      None if self.prior is None else self.prior_pairs(np.arange(MEASURED) % len(self.prior)))


def prior_latents(config: PriorConfig, base: Base, context: StageContext, shape: Sequence[int]) -> torch.Tensor | None:
    """Samples (N, C, H, W) of the base, kept in the cache of the run, where a run that continues finds them."""
    if not config.prompts:
        return None
    system, path = base.system, context.run.path / "cache" / "prior.safetensors"
    key = hashlib.sha256(json.dumps([base.hash, to_dict(config), list(shape), context.seed,
                                     to_dict(system.config.sampling)]).encode()).hexdigest()
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("latents")
    before, system.latent_shape = system.latent_shape, (shape[0], shape[1], shape[2])
    numbers, parts = range(config.images), []
    for start in tqdm(range(0, config.images, BATCH), desc="images of the base", unit="batch"):
        seeds = numbers[start:start + BATCH]
        parts.append(system.latents([config.prompts[i % len(config.prompts)] for i in seeds], seeds).cpu())
    system.latent_shape = before
    latents = torch.cat(parts).clone()
    with whole_file(path) as temporary:
        save_file({"latents": latents}, temporary, metadata={"key": key})
    return prior_latents(config, base, context, shape)  # from the file: what inference made has no gradients


def check_captions(captions: Sequence[str], word: str, what: str) -> None:
    """Raise ValueError if no caption contains ``word``; say so if some do not."""
    with_it = [text for text in captions if word.lower() in text.lower()]
    if not with_it:
        raise ValueError(f"{what}: {word}, which is in no caption; valid: a word of the captions, as in "
                         f"captions=[\"a drawing of {word}\"]")
    if len(with_it) < len(captions):
        print(f"note: {len(captions) - len(with_it)} of {len(captions)} captions are without {word}")


def judge_captions(name: str, config: PersonalStage, card: Card, context: StageContext) -> None:
    """Let the gate judge what is trained on. Raises ValueError if it refuses a word or a caption."""
    gate = Moderation.load() if config.pretrained or context.start is None else Moderation.of_run(context.start.path)
    judge_cards(gate, {name: replace(card, captions=(*card.captions, *config.prior.prompts))})


# ---- training

class Method(Generic[M]):
    """What differs between the methods. ``model`` holds what is trained and nothing else."""

    model: M

    def networks(self, model: M) -> Predicts:
        """The networks of a training step, with gradients of the model."""
        raise NotImplementedError

    def applied(self, model: M) -> AbstractContextManager[TextToImage]:
        """The system with what was learned, inside a block."""
        raise NotImplementedError


class Objective(Generic[M]):
    """The loss of a step, and the losses that are measured with fixed noise: ``loss`` on the given images, and
    ``prior_loss`` on those of the base, which rises when it forgets."""

    def __init__(self, config: PersonalStage, base: Base, method: Method[M], seed: int, device: torch.device):
        self.weight, self.method = config.prior.weight, method
        self.given, self.prior = (Denoising(base.stage, base.system.tokenizer, number, device, base.system.masked)
                                  for number in (seed, seed + 1))

    def loss_at(self, model: M, lesson: Lesson, position: int, part: Part) -> dict[str, torch.Tensor]:
        """The loss of a part of a batch."""
        networks = self.method.networks(model)

        def mean(of: Denoising, read: PairBatch) -> torch.Tensor:
            x_0, t, eps = of.draw(read, position, part)
            captions = part.of_read(read.captions)
            return of.losses(networks, x_0, captions, t, eps, of.draw_beta(captions, position, part)).mean()

        loss = mean(self.given, lesson.given)
        if lesson.prior is None:
            return {"loss": loss}
        prior = mean(self.prior, lesson.prior)
        return {"loss": loss + self.weight * prior, "given": loss.detach(), "prior": prior.detach()}

    def validate(self, model: M, lesson: Lesson) -> dict[str, float]:
        """The mean losses with fixed noise and times."""
        with self.method.applied(model) as system:
            networks = Networks(system.unet, system.text_encoder)
            found = self.given.validate(networks, lesson.given)
            if lesson.prior is not None:
                found["prior_loss"] = self.prior.validate(networks, lesson.prior)["loss"]
        return found


def teach(name: str, config: PersonalStage, base: Base, few: Few, method: Method[M], context: StageContext) -> M:
    """Train the model of a method on a few images; returns the averaged model. The manifest receives the losses before
    and after."""
    objective = Objective(config, base, method, context.seed, context.device)
    measured = few.measured()
    before = objective.validate(method.model, measured)
    prompts = list(context.preview_prompts) or few.captions[:SHOWN]

    def preview(model: M, step: int) -> None:
        with method.applied(model) as system:
            save_preview(system, prompts, context.run.path / "samples" / f"{name}_{step:06d}.png", step)

    def item(model: M) -> torch.Tensor:
        one = PairBatch(few.mean[:1], few.logvar[:1], few.captions[:1])
        networks = Networks(base.system.unet, base.system.text_encoder)
        return objective.given.loss_at(networks, one, 0, whole_batch(1))["loss"]

    task = Task(name, few.at, objective.loss_at, lambda model: objective.validate(model, measured), preview,
                ("loss", "min"), item, network=Networks(base.system.unet, base.system.text_encoder))
    average = fit(task, method.model, config.train, context.run, context.seed, context.processes)
    after = objective.validate(average, measured)
    context.run.record(**{name: {
        "base": base.hash, "images": len(few), "parameters": sum(p.numel() for p in average.parameters()),
        **{f"{key}_{when}": round(losses[key], 5) for when, losses in (("before", before), ("after", after))
           for key in ("loss", "prior_loss") if key in losses}}})
    return average


class Functions(NamedTuple):
    """Functions that call networks with other weights."""

    unet: Callable[..., torch.Tensor]
    text_encoder: Callable[..., torch.Tensor]


Applied = Iterator[TextToImage]  # what ``applied`` yields under contextlib.contextmanager
