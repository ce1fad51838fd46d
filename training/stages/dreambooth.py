"""The dreambooth stage: all weights learn a subject from a few images (Ruiz et al. 2023).

A rare word in the captions ("a sks star") becomes the name of the subject, and prior preservation keeps what the base
draws for the general word ("a star"). Leaves a whole system: the run folder can be sampled as any other, or, for a
published base, the folder ``pretrained`` in it, which diffusers reads.
"""
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from files.weights import save_weights
from files.whole import write_text
from model.device import freeze
from model.pretrained.card import Card
from pipeline.personal import CARD
from pipeline.system import Networks, TextToImage
from pipeline.text_head import FILE as ENCODER
from training.loop import TrainConfig
from training.stages.context import StageContext
from training.stages.denoiser import Predicts
from training.stages.personal import (
    Applied,
    Base,
    Few,
    Method,
    PersonalStage,
    check_captions,
    few_steps,
    judge_captions,
    load_base,
    teach,
)

TAKEN = ("tokenizer.json", "autoencoder.safetensors", "moderation.json", "moderation.safetensors", "concepts.yaml",
         "clip_tokenizer.json", "clip.safetensors")  # what the new system needs of the base, where it has it


@dataclass(frozen=True)
class DreamboothStage(PersonalStage):
    """``trigger`` is the word of the captions that names the subject. ``text_encoder`` trains that network, too."""

    trigger: str = ""
    text_encoder: bool = True
    train: TrainConfig = field(default_factory=lambda: few_steps(400, 5e-5))


class ByWeights(Method[Networks]):
    """The networks of the base themselves are trained."""

    def __init__(self, base: Base, text_encoder: bool):
        self.base, self.model = base, Networks(base.system.unet, base.system.text_encoder)
        self.model.unet.requires_grad_(True)
        self.model.text_encoder.requires_grad_(text_encoder)

    def networks(self, model: Networks) -> Predicts:
        """The networks."""
        return model

    @contextmanager
    def applied(self, model: Networks) -> Applied:
        """A system of these networks."""
        yield system_of(self.base, model)


def system_of(base: Base, networks: Networks) -> TextToImage:
    """The system of the base with other networks."""
    system = base.system
    return TextToImage(system.config, system.tokenizer, networks.text_encoder, networks.unet, system.autoencoder,
                       system.masked)


def train_dreambooth(config: DreamboothStage, context: StageContext) -> None:
    """Train all weights and write the system, then dreambooth.json, whose presence marks the stage as finished."""
    if not config.prior.prompts:
        print("note: dreambooth.prior.prompts: none, nothing keeps what the base draws for the general word")
    base = load_base(config, context)
    few = Few(config, base, context)
    if config.trigger:
        check_captions(few.captions, config.trigger, "dreambooth.trigger")
    card = Card(base.hash, {config.trigger: ""} if config.trigger else {}, tuple(few.captions), {
        "method": "dreambooth", "base": base.name, "images": len(few), "steps": config.train.steps})
    judge_captions("dreambooth", config, card, context)
    average = teach("dreambooth", config, base, few, ByWeights(base, config.text_encoder), context)
    if context.start is not None and not config.pretrained:
        with context.processes.main_first():
            context.run.take_over(context.start, *TAKEN)
    if context.processes.main:
        if config.pretrained:
            system_of(base, freeze(average)).save_pretrained(context.run.path / "pretrained")
        else:
            save_weights(average.text_encoder, context.run.weights("text_encoder"))
            save_weights(average.unet, context.run.weights("denoiser"))
            if context.start is not None and context.start.has(ENCODER):
                print(f"note: {ENCODER} of {context.start.path} belongs to its text encoder and is not taken over")
        text = json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n"
        if config.pretrained:  # beside the weights: prompts for them are judged by it
            write_text(context.run.path / "pretrained" / CARD, text)
        write_text(context.run.path / CARD, text)
        where = f"--pretrained {context.run.path / 'pretrained'}" if config.pretrained else f"--run {context.run.path}"
        print(f"dreambooth: sample with: python sample.py {where} \"{few.captions[0]}\"")
