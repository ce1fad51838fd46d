"""The gate between prompts and files. Everything that conditions a sample is checked first, then the sample itself.

    moderation = Moderation.load("block", concepts="concepts.yaml", clip="runs/shapes")
    decision_on_request(moderation, system, parts, negatives, guidance) -> Decision   # before anything is sampled
    moderation.check_images(images) -> [Decision]                      # before anything is written

The gate fails closed: in every mode but "off", an input that cannot be checked is refused. Training previews and
evaluation sample from the captions of a data set and do not ask the gate. A program that writes images for prompts of
people must ask it.
"""
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.catalog import build_source
from data.source import image_batch
from diffusion.guidance import GuidanceConfig
from files.images import to_uint8, to_unit
from files.run_folder import RunFolder
from pipeline.clip_vectors import ClipVectors
from pipeline.config import read_data_config
from pipeline.prompt_schedule import AnyPrompt, PromptSchedule, text_of
from pipeline.prompts import chunks_of
from pipeline.text_head import FILE as ENCODER
from pipeline.text_head import EncoderHead, read_head
from safety.audit import AuditError, AuditLog
from safety.gate import PromptGate
from safety.image import Concept, ImageModerator, blur, read_concepts
from safety.policy import MODES, Decision, Mode, most_severe, refusal
from safety.prompt import DEFAULT

CONCEPTS = "concepts.yaml"  # of a run folder
KNOWN = 1024  # decisions on prompts that are kept, because a grid asks for the same prompts repeatedly
OFF = "moderation is off: neither prompts nor images are checked"
_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # the caller prints the messages for people


class Refused(ValueError):
    """Prompts or images were refused; ``decisions`` has one decision for each requested image."""

    def __init__(self, decisions: Sequence[Decision]):
        self.decisions = list(decisions)
        first = next(i for i, decision in enumerate(self.decisions) if decision.action == "block")
        super().__init__(f"image {first + 1} of {len(self.decisions)}: {self.decisions[first].message}"
                         + reason_text(self.decisions[first]))


class Moderation:
    """Checks the prompts, negative prompts and images of one call, with one mode and one audit log.

    ``learned`` maps tokens that were learned from images to texts that describe them. A prompt that contains such a
    token is also checked with the text in place of the token.
    """

    def __init__(self, gate: PromptGate | None, images: ImageModerator | None = None, mode: Mode = "block",
                 audit: AuditLog | None = None, learned: Mapping[str, str] | None = None):
        if mode not in MODES:
            raise ValueError(f"moderation: '{mode}'; valid: {', '.join(MODES)}")
        if gate is None and mode != "off":
            raise ValueError(f"moderation: no gate for prompts in the mode {mode}; valid: off")
        self.gate, self.images, self.mode, self.audit, self.learned = gate, images, mode, audit, dict(learned or {})
        self._known: dict[tuple, Decision] = {}

    @property
    def checks(self) -> tuple[str, ...]:
        """The inputs that are checked: "prompt", "image", both or neither."""
        return () if self.mode == "off" else ("prompt", "image") if self.images else ("prompt",)

    @classmethod
    def load(cls, mode: Mode = "block", weights: str | Path = DEFAULT, concepts: str | Path | None = None,
             clip: str | Path | None = None, audit: AuditLog | None = None, device: torch.device | str = "cpu",
             run: str | Path | None = None) -> "Moderation":
        """Build the moderation from files; the CLIP in the run folder ``clip`` judges the ``concepts``. A ``run``
        folder may hold a second head for prompts, on its own text encoder (training/moderation/encoder_head.py).

        Raises ValueError or OSError for a file that is missing, damaged or does not fit. The mode "off" reads the
        weights only if there is a log to write.
        """
        if mode == "off" and audit is None:
            _log.warning(OFF)
            return cls(None, None, mode)
        images = None
        if concepts is not None and mode != "off":
            if clip is None:
                raise ValueError(f"concepts {concepts}: no CLIP to judge by; valid: a run folder with the stage clip")
            images = image_moderator(concepts, clip, mode, device)
        encoder = read_encoder_head(run) if run is not None else None
        gate = PromptGate.load(weights, mode=mode, audit=audit, encoder=encoder)
        return cls(gate, images, mode, audit)

    @classmethod
    def of_run(cls, run: str | Path, mode: Mode = "block", concepts: str | Path | None = None,
               clip: str | Path | None = None, audit: AuditLog | None = None,
               device: torch.device | str = "cpu") -> "Moderation":
        """Build the moderation of a run folder, with its own weights, head and concepts where it has them, and with its
        own CLIP unless another one is named. Raises the same errors as ``load``."""
        own = Path(run) / CONCEPTS
        concepts = concepts or (own if own.is_file() else None)
        return cls.load(mode, moderation_weights(Path(run)), concepts, clip or run, audit, device, run=run)

    def check_prompt(self, parts: Sequence[AnyPrompt], negatives: Sequence[AnyPrompt] = (),
                     tokenizer: Any = None, toward: bool = False) -> Decision:
        """The most severe decision on the parts of one prompt (several in a blend) and on its negative prompts, with
        all that they change to on the way; never raises for a text. ``tokenizer`` determines where the text is cut and
        where its chunks end. ``toward``: the image is pushed toward the negative prompts (``pushes_toward_negative``),
        so they are parts of the prompt."""
        if self.gate is None:
            return Decision("allow", reason="off")
        if toward:
            parts, negatives = [*parts, *(one for one in negatives if text_of(one).strip())], ()
        key = tuple(parts), tuple(negatives)
        if key in self._known:
            return self._known[key]
        try:
            texts = conditioned_texts(parts, tokenizer, self.learned)
            opposite = [text for text in conditioned_texts(negatives, tokenizer, self.learned) if text.strip()]
        except Exception as error:  # no failure may let a prompt through
            _log.error("moderation failed: %s", type(error).__name__)
            return refusal(f"moderation failed ({type(error).__name__})")
        found = most_severe([self.gate.check_all(texts),
                             *([self.gate.check_all(opposite, negative=True)] if opposite else [])])
        if self.audit is None and found.reason in ("rule", "score"):  # a log needs every line; failures may pass
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[key] = found
        return found

    def check_images(self, images: torch.Tensor, prompts: Sequence[str] | None = None) -> list[Decision]:
        """A decision for each image uint8 (B, 3, H, W); all are "allow" if no concepts are given. The audit log
        receives ``prompts`` as a keyed hash."""
        if self.images is None:
            return [Decision("allow", reason="not checked: no concepts")] * len(images)
        decisions = self.images.check(to_unit(images))
        if self.audit is None:
            return decisions
        return [self._log_decision(decision, text) for decision, text in zip(decisions, prompts or [""] * len(images))]

    def _log_decision(self, decision: Decision, text: str) -> Decision:
        """The decision after it was written to the audit log; a refusal if that failed."""
        if decision.action == "allow" or self.audit is None:
            return decision
        try:
            self.audit.write(text, "image", decision)
        except (AuditError, ValueError, OSError, TypeError) as error:
            return refusal(f"the audit log failed ({type(error).__name__})")
        return decision


def moderation_weights(folder: Path) -> Path:
    """Path of the moderation weights of a run folder, or of the shipped weights if it has none."""
    own = folder / DEFAULT.name
    return own if own.is_file() else DEFAULT


def read_encoder_head(run: str | Path) -> EncoderHead | None:
    """The prompt head on the text encoder of a run folder; None if the folder has none."""
    return read_head(run) if (Path(run) / ENCODER).is_file() else None


def image_moderator(concepts: str | Path, clip: str | Path, mode: Mode = "block",
                    device: torch.device | str = "cpu") -> ImageModerator:
    """A moderator for the concepts of a file that judges by the CLIP which the stage clip left in a run folder: by
    regions if it was trained with regions."""
    vectors, known = ClipVectors.of_run(clip, device), read_concepts(concepts)
    if vectors.regions:
        return ImageModerator(known, vectors.patches, vectors.parts, mode, regions=True)
    return ImageModerator(known, vectors, vectors.texts, mode)


def pushes_toward_negative(guidance: GuidanceConfig) -> bool:
    """Whether guidance may move an image toward the negative prompt instead of away from it: the prediction for the
    negative prompt has the weight 1 - scale. The push of "apg" changes its sign as well if its parallel part is
    negative, or if a strong negative momentum makes the push of the last step outweigh that of this one."""
    turned = guidance.method == "apg" and (guidance.apg_parallel < 0 or guidance.apg_momentum < -0.5)
    return guidance.scale < 1 or turned


def decision_on_request(moderation: Moderation, system: Any, parts: Sequence[AnyPrompt],
                        negatives: Sequence[AnyPrompt], guidance: GuidanceConfig) -> Decision:
    """The decision on all texts that the images of one request are pushed toward or away from. ``system`` is the
    ``TextToImage`` that samples: a weaker network that guides it reads the prompt as its own tokenizer cuts it."""
    tokenizers = [system.tokenizer, *([system.guide.tokenizer] if system.guide is not None else [])]
    return most_severe([moderation.check_prompt(parts, negatives, tokenizer, pushes_toward_negative(guidance))
                        for tokenizer in tokenizers])


def conditioned_texts(parts: Sequence[AnyPrompt], tokenizer: Any = None,
                      learned: Mapping[str, str] | None = None) -> list[str]:
    """All texts that one prompt conditions on, each once: every part without its weights (a word of weight 0 still
    counts, because the words around it have read it in the text encoder), each of its chunks, the text that remains
    after cutting, all parts joined, and each of these with learned tokens replaced by their source text. Of a part that
    changes: all that it changes to, and all its options one after the other, since an image shows what several steps
    have read. A step may read nothing, a whole part may not."""
    whole = [part.whole if isinstance(part, PromptSchedule) else part for part in parts]
    texts = [text_of(part) for part in whole]
    if len(texts) > 1:
        texts.append(" ".join(texts))
    steps = [prompt for part in parts if isinstance(part, PromptSchedule) for prompt in part.prompts]
    texts += [prompt.text for prompt in steps if prompt.text.strip()]
    for prompt in (*whole, *steps):
        if tokenizer is not None and not isinstance(prompt, str) and prompt.text.strip():
            chunks = chunks_of(prompt, tokenizer)
            texts += [prompt.text[: len(prompt.text) - len(chunks.overflow)], *chunks.texts]
    for text in list(texts):
        described = text
        for token, meaning in (learned or {}).items():
            described = described.replace(token, meaning)
        if described != text:
            texts.append(described)
    return list(dict.fromkeys(texts))


def blur_or_refuse(images: torch.Tensor, decisions: Sequence[Decision]) -> torch.Tensor:
    """Images uint8 (B, 3, H, W), blurred where the decision says so; raises Refused if any image is blocked."""
    if any(decision.action == "block" for decision in decisions):
        raise Refused(decisions)
    return torch.stack([blur_image(image) if decision.action == "blur" else image
                        for image, decision in zip(images, decisions, strict=True)])


def blur_image(image: torch.Tensor) -> torch.Tensor:
    """An image uint8 (3, H, W) blurred so strongly that only patches of colour remain."""
    return to_uint8(blur(to_unit(image[None])))[0]


def reason_text(decision: Decision) -> str:
    """The reason of a refusal that does not concern the content of the prompt, as " (prompt: empty; valid: some text)";
    else an empty string."""
    usual = ("rule", "score", "")
    return "" if decision.reason in usual or decision.reason.startswith("concept ") else f" ({decision.reason})"


def decision_row(decision: Decision, stage: str) -> dict[str, Any]:
    """The fields of a decision for a list of results: category and neutral text, but no word of the prompt."""
    return {"action": decision.action, "category": decision.category, "stage": stage,
            "message": decision.message + reason_text(decision), "score": round(decision.score, 3),
            "policy": decision.policy_version, "model": decision.model_hash[:16]}


def calibrate_concepts(concepts: str | Path, run: str | Path, rate: float, count: int = 2000,
                       clip: str | Path | None = None) -> list[Concept]:
    """The concepts of a file with thresholds calibrated for a CLIP, by default that of the run. At these thresholds all
    concepts together flag at most the share ``rate`` of harmless images, which are up to ``count`` held-out images of
    the data of the run.

    Raises ValueError or OSError for files that do not fit and for too few images.
    """
    moderator = image_moderator(concepts, clip or run)
    source = build_source(read_data_config(RunFolder.open(run).path / "config.yaml").squares, "validation")
    names = [concept.name for concept in moderator.concepts]
    harmless = [i for i in range(len(source)) if not any(mentions(source.captions(i), name) for name in names)][:count]
    if not harmless:
        raise ValueError(f"{run}: every held-out image shows a concept; valid: data with images that do not")
    margins = torch.cat([moderator.margins(image_batch(source, np.array(harmless[start:start + 64])))
                         for start in range(0, len(harmless), 64)])
    return moderator.calibrate(margins, rate)


def mentions(captions: Sequence[str], name: str) -> bool:
    """Whether one of the captions contains ``name`` as a whole word, in singular or plural."""
    return any(re.search(rf"\b{re.escape(name)}(s|es)?\b", caption, re.IGNORECASE) for caption in captions)
