"""The content of one YAML file in configs/: data, stages and sampling settings; and the table of stages."""
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.catalog import DataConfig
from data.tokenizer import TokenizerConfig
from diffusion.guidance_free import Scales, check_folded
from diffusion.noise import check_seed
from diffusion.prediction import check_prediction_type
from diffusion.sampling import SamplingConfig, check_sampling
from diffusion.schedule import Schedule
from files.config import ConfigError, apply_overrides, from_dict, read_yaml
from files.run_folder import RunFolder
from pipeline.config import SystemConfig, latent_shape_of
from training.moderation.config import ModeratorStage
from training.moderation.stage import train_moderator
from training.stages.autoencoder import AutoencoderStage, train_autoencoder
from training.stages.clip import ClipStage, train_clip
from training.stages.context import StageContext
from training.stages.decoder import DecoderStage, train_decoder
from training.stages.denoiser import DenoiserStage, train_denoiser
from training.stages.dreambooth import DreamboothStage, train_dreambooth
from training.stages.lora import LoraStage, train_lora
from training.stages.student import StudentStage, train_student
from training.stages.textual_inversion import TextualInversionStage, train_textual_inversion
from training.stages.tiny_decoder import TinyDecoderStage, train_tiny_decoder
from training.stages.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages. ``needs`` names stages whose files must be in the run folder. ``leaves`` are the
    files of the stage itself; when all of them exist, the stage is finished. ``train`` receives the part of the
    experiment that has the name of the stage. ``inherits`` are files that a run which starts from another one copies,
    so that the numbers of tokens keep their meaning. A stage that ``teaches`` changes or extends a trained system, its
    base, with a few images, none of which is held out. One that ``tunes`` changes a part of its base, on any data."""

    name: str
    needs: tuple[str, ...]
    leaves: tuple[str, ...]
    train: Callable[[Any, StageContext], None]
    reads_images: bool = True
    inherits: tuple[str, ...] = ()
    teaches: bool = False
    tunes: bool = False


# in the order in which they run; adding a stage is a row here, its part of Experiment below, and a file of its own
STAGES = {stage.name: stage for stage in (
    Stage("tokenizer", (), ("tokenizer.json",), train_tokenizer, inherits=("tokenizer.json",)),
    Stage("autoencoder", (), ("autoencoder.safetensors",), train_autoencoder),
    Stage("decoder", (), ("autoencoder.safetensors",), train_decoder, tunes=True,
          inherits=("tokenizer.json", "text_encoder.safetensors", "denoiser.safetensors", "clip_tokenizer.json",
                    "clip.safetensors", "concepts.yaml")),
    Stage("clip", (), ("clip_tokenizer.json", "clip.safetensors"), train_clip, inherits=("clip_tokenizer.json",)),
    Stage("denoiser", ("tokenizer", "autoencoder"), ("text_encoder.safetensors", "denoiser.safetensors"),
          train_denoiser),
    Stage("student", ("tokenizer", "autoencoder"), ("text_encoder.safetensors", "denoiser.safetensors"), train_student,
          inherits=("tokenizer.json",)),
    Stage("tiny_decoder", ("autoencoder",), ("tiny_decoder.safetensors",), train_tiny_decoder),
    Stage("lora", (), ("adapter.safetensors",), train_lora, teaches=True),
    Stage("textual_inversion", (), ("embedding.safetensors",), train_textual_inversion, teaches=True),
    Stage("dreambooth", (), ("dreambooth.json",), train_dreambooth, teaches=True),
    Stage("moderator", (), ("moderation.json", "moderation.safetensors"), train_moderator, reads_images=False),
)}
PLACED = ("shapes", "emoji")  # data sources that say where in their images things are: what grounding needs
# sections that a run which teaches has from its base, and the parts of them that decide what the base is
OF_BASE = {"tokenizer": ("vocab_size", "length"), "autoencoder": ("model",),
           "denoiser": ("unet", "text_encoder", "schedule", "prediction_type", "guidance_scales")}
USUAL = ("tokenizer", "autoencoder", "denoiser")  # what sampling needs; clip is the evaluator's own
# stages whose settings nothing else reads: what they would be does not matter to a run without them
ALONE = tuple(name for name in STAGES if name not in USUAL)


@dataclass(frozen=True)
class Experiment:
    """The whole configuration of a run. ``preview_prompts`` are the prompts of the sample grids during training.
    ``start_from`` is another run folder: its tokenizer and the files of stages that are not trained here are copied,
    and the networks that are trained here begin with its weights, with a new optimizer."""

    name: str
    seed: int = 0
    stages: tuple[str, ...] = USUAL
    preview_prompts: tuple[str, ...] = ()
    start_from: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    decoder: DecoderStage = field(default_factory=DecoderStage)
    clip: ClipStage = field(default_factory=ClipStage)
    denoiser: DenoiserStage = field(default_factory=DenoiserStage)
    student: StudentStage = field(default_factory=StudentStage)
    tiny_decoder: TinyDecoderStage = field(default_factory=TinyDecoderStage)
    lora: LoraStage = field(default_factory=LoraStage)
    textual_inversion: TextualInversionStage = field(default_factory=TextualInversionStage)
    dreambooth: DreamboothStage = field(default_factory=DreamboothStage)
    moderator: ModeratorStage = field(default_factory=ModeratorStage)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name: '{self.name}'; valid: letters, digits, '_', '-' and '.', it names the run folder")
        check_seed(self.seed)
        if not self.stages or list(self.stages) != [stage for stage in STAGES if stage in self.stages]:
            raise ValueError(f"stages: {list(self.stages)}; valid: some of {', '.join(STAGES)}, in this order")
        self._check_teaching()
        factor = self.autoencoder.model.factor
        self._check_sizes(factor, "the autoencoder's factor")
        for name, adversarial in (("autoencoder", self.autoencoder.adversarial), ("decoder", self.decoder.adversarial)):
            if adversarial.weight and self.data.size < adversarial.model.smallest:
                raise ValueError(f"{name}.adversarial.model.layers: {adversarial.model.layers}; valid: fewer, the "
                                 f"images of {self.data.size} pixels are smaller than {adversarial.model.smallest}")
        if "denoiser" in self.stages and "student" in self.stages:
            raise ValueError(f"stages: {list(self.stages)}; valid: denoiser or student, both leave a denoiser; a "
                             "student has a run of its own, with start_from=TEACHER")
        if "denoiser" in self.stages or "student" in self.stages:
            self._check_denoiser()
            self._check_student()
            self._check_process()

    def _check_teaching(self) -> None:
        """Raise ValueError if stages that teach or tune have no base, two of them, or others beside them."""
        if "decoder" in self.stages and (len(self.stages) > 1 or not self.start_from):
            raise ValueError(f"stages: {list(self.stages)}, start_from: {self.start_from or 'none'}; valid with "
                             "decoder: in a run of its own, with start_from: the run whose decoder is tuned")
        teaching = [name for name in self.stages if STAGES[name].teaches]
        if teaching and len(teaching) < len(self.stages):
            raise ValueError(f"stages: {list(self.stages)}; valid with {teaching[0]}: in a run of its own, with "
                             "start_from: the run that is taught")
        for name in teaching:
            if bool(self.start_from) == bool(getattr(self, name).pretrained):
                given = f"both start_from: {self.start_from} and" if self.start_from else "neither start_from nor"
                raise ValueError(f"{name}: {given} {name}.pretrained; valid: one of them, the run or the published "
                                 "checkpoint that is taught")

    @property
    def teaches(self) -> bool:
        """Whether this run teaches a trained system with a few images."""
        return any(STAGES[name].teaches for name in self.stages)

    def _check_denoiser(self) -> None:
        """Raise ValueError if the networks of the denoiser do not fit the tokenizer, the autoencoder or the images."""
        text, tokens, unet = self.denoiser.text_encoder, self.tokenizer, self.denoiser.unet
        if text.vocab_size < tokens.vocab_size:
            raise ValueError(f"denoiser.text_encoder.vocab_size: {text.vocab_size}; valid: from tokenizer.vocab_size = "
                             f"{tokens.vocab_size} up")
        if text.length != tokens.length:
            raise ValueError(f"denoiser.text_encoder.length: {text.length}; valid: tokenizer.length = {tokens.length}")
        channels = self.autoencoder.model.latent_channels
        if unet.in_channels != channels or unet.out_channels != channels:
            raise ValueError(f"denoiser.unet.in_channels, out_channels: {unet.in_channels}, {unet.out_channels}; "
                             f"valid: autoencoder.model.latent_channels = {channels}")
        factor = self.autoencoder.model.factor * 2 ** (len(unet.channels) - 1)
        self._check_sizes(factor, f"the autoencoder's factor {self.autoencoder.model.factor} times 2^(levels of the "
                                  "UNet - 1)")
        side, latents = unet.positions, self.latent_shape[1:]
        if side and (latents != (side, side) or len(self.data.image_shapes) > 1):
            raise ValueError(f"denoiser.unet.positions: {side}; valid: {latents[0]}, the side of the latents of images "
                             "of one size, or 0")
        if self.denoiser.grounding.on and self.data.source not in PLACED:
            raise ValueError(f"denoiser.grounding: on; valid with data.source = {self.data.source}: attention 0 and "
                             f"words 0, only {' and '.join(PLACED)} say where in their images things are")
        if len(self.data.image_shapes) > 1 and self.denoiser.cache:
            raise ValueError("denoiser.cache: true; valid with aspect buckets: false, a cache has images of one size")

    def _check_student(self) -> None:
        """Raise ValueError if the stage student lacks a teacher, or the UNet the inputs that it needs."""
        jumps = "student" in self.stages and self.student.method == "shortcut"
        if self.denoiser.unet.jump_input != jumps and {"denoiser", "student"} & {*self.stages}:
            raise ValueError(f"denoiser.unet.jump_input: {str(not jumps).lower()}; valid: "
                             + ("true with student.method: shortcut" if jumps else
                                "false but for the stage student with the method shortcut"))
        if "student" not in self.stages:
            return
        low, high = self.student.guidance_scales
        if not self.start_from:
            raise ValueError("start_from: none; valid for the stage student: the run folder of its teacher")
        if low != high and not self.denoiser.unet.guidance_input:
            raise ValueError(f"student.guidance_scales: {[low, high]}; valid without denoiser.unet.guidance_input: one "
                             "scale, [3.0, 3.0]")
        if len(self.data.image_shapes) > 1 and self.student.cache:
            raise ValueError("student.cache: true; valid with aspect buckets: false, a cache has images of one size")

    def _check_sizes(self, factor: int, why: str) -> None:
        """Raise ValueError if a side of the images is not a multiple of ``factor``."""
        if self.data.size % factor:
            raise ValueError(f"data.{self.data.source}.size: {self.data.size}; valid: a multiple of {factor}, {why}")
        odd = [shape for shape in self.data.image_shapes if shape[0] % factor or shape[1] % factor]
        if odd:
            raise ValueError(f"data.{self.data.source}.step: aspect buckets of {odd[0][0]} x {odd[0][1]} pixels; "
                             f"valid: a multiple of {factor}, {why}")

    def _check_process(self) -> None:
        """Raise now the errors that sampling would raise after training: a target, grid or sampler that the schedule
        does not support."""
        schedule = Schedule(self.denoiser.schedule)
        try:
            check_prediction_type(schedule, self.denoiser.prediction_type)
        except ValueError as error:
            raise ValueError(f"denoiser.{error}") from None
        try:
            if self.scales is not None:
                check_folded(self.sampling.guidance, self.scales)
            check_sampling(schedule, self.denoiser.prediction_type, self.sampling)
        except ValueError as error:
            raise ValueError(f"sampling (sampler {self.sampling.sampler}, steps {self.sampling.steps}, spacing "
                             f"{self.sampling.spacing}): {error}") from None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latent of one image."""
        return latent_shape_of(self.autoencoder.model, self.data.size)

    @property
    def scales(self) -> Scales | None:
        """The guidance scales that are folded into the denoiser, None for guidance by two predictions."""
        return self.student.guidance_scales if "student" in self.stages else self.denoiser.guidance_scales

    @property
    def system(self) -> SystemConfig:
        """The part of this configuration that sampling needs."""
        stage = self.denoiser
        return SystemConfig(stage.unet, stage.text_encoder, self.autoencoder.model, stage.schedule,
                            stage.prediction_type, self.sampling, self.latent_shape, self.scales)


def load_experiment(path: str | Path, overrides: list[str] = ()) -> Experiment:  # type: ignore[assignment]
    """The experiment of a YAML file with ``key.path=value`` overrides; raises ConfigError naming what is wrong."""
    return from_dict(Experiment, with_base(apply_overrides(read_yaml(path), list(overrides))))


def with_base(data: dict[str, Any]) -> dict[str, Any]:
    """The content of a configuration; if it teaches or tunes the run of ``start_from``, with the networks, the process
    and the sampling of that run, where it exists. Raises ConfigError for a setting of them that it does not have."""
    stages, start = data.get("stages"), data.get("start_from")
    named = [name for name in stages if isinstance(name, str)] if isinstance(stages, list) else []
    bound = any(name in STAGES and (STAGES[name].teaches or STAGES[name].tunes) for name in named)
    if not isinstance(start, str) or not start or not bound:
        return data
    if not (path := RunFolder(start).path / "config.yaml").is_file():
        return data  # training says that there is no such run
    base = read_yaml(path)
    for name, parts in OF_BASE.items():
        given = {part: data[name].get(part) for part in parts} if isinstance(data.get(name), dict) else None
        if wrong := _conflict(given, base.get(name), name):
            raise ConfigError(f"{wrong}; valid: that of {start}, which is the base, or nothing")
    return {"sampling": base.get("sampling", {}), **data, **{name: base[name] for name in OF_BASE if name in base}}


def _conflict(given: Any, base: Any, path: str) -> str:
    """The first value that both mappings have and that differs, as "path: given"; else an empty string."""
    if isinstance(given, dict) and isinstance(base, dict):
        return next((found for key in given if key in base
                     if (found := _conflict(given[key], base[key], f"{path}.{key}"))), "")
    return "" if given is None or base is None or given == base else f"{path}: {given}"
