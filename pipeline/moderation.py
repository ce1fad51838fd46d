"""The one gate on the way from prompts to files: what is conditioned on is checked first, then what was drawn.

    moderation = Moderation.load("block", concepts="concepts.yaml", clip="runs/shapes")
    moderation.of_prompt(parts, negatives, tokenizer) -> Decision      # before anything is drawn
    moderation.of_images(images) -> [Decision]                         # before anything is written

It fails closed: what cannot be checked is refused in every mode but "off". Training previews and evaluation draw the
captions of a data set, so they do not ask; whoever writes pictures from prompts of people does.
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
from files.images import to_uint8, to_unit
from files.run_folder import RunFolder
from pipeline.clip_vectors import ClipVectors
from pipeline.config import read_data_config
from pipeline.prompts import Prompt, chunks_of
from pipeline.text_head import FILE as ENCODER
from pipeline.text_head import EncoderHead, read_head
from safety.audit import AuditError, AuditLog
from safety.gate import PromptGate
from safety.image import Concept, ImageModerator, blur, read_concepts
from safety.policy import MODES, Decision, Mode, most_severe, refusal
from safety.prompt import DEFAULT

CONCEPTS = "concepts.yaml"  # of a run folder
KNOWN = 1024  # decisions on prompts that are kept: a grid asks the same again and again
OFF = "moderation is off: neither prompts nor pictures are checked"
_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # who calls this prints what a person must see


class Refused(ValueError):
    """Prompts or pictures were refused; ``decisions`` has one for each that was asked for."""

    def __init__(self, decisions: Sequence[Decision]):
        self.decisions = list(decisions)
        first = next(i for i, decision in enumerate(self.decisions) if decision.action == "block")
        super().__init__(f"picture {first + 1} of {len(self.decisions)}: {self.decisions[first].message}"
                         + reason_of(self.decisions[first]))


class Moderation:
    """Prompts, negative prompts and pictures of one call, with one mode and one log.

    ``learned``: tokens that were learned from pictures and the text that describes them; a prompt with such a token is
    checked with its text in its place, too.
    """

    def __init__(self, gate: PromptGate | None, pictures: ImageModerator | None = None, mode: Mode = "block",
                 audit: AuditLog | None = None, learned: Mapping[str, str] | None = None):
        if mode not in MODES:
            raise ValueError(f"moderation: '{mode}'; valid: {', '.join(MODES)}")
        if gate is None and mode != "off":
            raise ValueError(f"moderation: no gate for prompts in the mode {mode}; valid: off")
        self.gate, self.pictures, self.mode, self.audit, self.learned = gate, pictures, mode, audit, dict(learned or {})
        self._known: dict[tuple, Decision] = {}

    @property
    def checks(self) -> tuple[str, ...]:
        """What is looked at: "prompt", "image", both or neither."""
        return () if self.mode == "off" else ("prompt", "image") if self.pictures else ("prompt",)

    @classmethod
    def load(cls, mode: Mode = "block", weights: str | Path = DEFAULT, concepts: str | Path | None = None,
             clip: str | Path | None = None, audit: AuditLog | None = None, device: torch.device | str = "cpu",
             run: str | Path | None = None) -> "Moderation":
        """The moderation of files; ``concepts`` are judged by the CLIP in the run folder ``clip``. A ``run`` folder may
        hold a second head for prompts, on its own text encoder (training/moderation/encoder_head.py).

        Raises ValueError or OSError for a file that is missing, damaged or does not fit, in every mode but "off", which
        reads the weights only to write a log.
        """
        if mode == "off" and audit is None:
            _log.warning(OFF)
            return cls(None, None, mode)
        pictures = None
        if concepts is not None and mode != "off":
            if clip is None:
                raise ValueError(f"concepts {concepts}: no CLIP to judge by; valid: a run folder with the stage clip")
            pictures = image_moderator(concepts, clip, mode, device)
        gate = PromptGate.load(weights, mode=mode, audit=audit, encoder=encoder_of(run) if run is not None else None)
        return cls(gate, pictures, mode, audit)

    @classmethod
    def of_run(cls, run: str | Path, mode: Mode = "block", concepts: str | Path | None = None,
               clip: str | Path | None = None, audit: AuditLog | None = None,
               device: torch.device | str = "cpu") -> "Moderation":
        """The moderation of a run folder: its own weights, head and concepts where it has them, judged by its own CLIP
        where no other is named. Raises as ``load`` does."""
        own = Path(run) / CONCEPTS
        concepts = concepts or (own if own.is_file() else None)
        return cls.load(mode, weights_of(Path(run)), concepts, clip or run, audit, device, run=run)

    def of_prompt(self, parts: Sequence[Prompt | str], negatives: Sequence[Prompt | str] = (),
                  tokenizer: Any = None) -> Decision:
        """The most severe decision on the parts of one prompt (several in a blend) and its negative prompts; never
        raises for a text. ``tokenizer`` says what is left after cutting, and where chunks end."""
        if self.gate is None:
            return Decision("allow", reason="off")
        key = tuple(parts), tuple(negatives)
        if key in self._known:
            return self._known[key]
        try:
            texts = conditioned_texts(parts, tokenizer, self.learned)
            opposite = [text for text in conditioned_texts(negatives, tokenizer, self.learned) if text.strip()]
        except Exception as error:  # whatever breaks must not let a prompt through
            _log.error("moderation failed: %s", type(error).__name__)
            return refusal(f"moderation failed ({type(error).__name__})")
        found = most_severe([self.gate.check_all(texts),
                             *([self.gate.check_all(opposite, negative=True)] if opposite else [])])
        if self.audit is None and found.reason in ("rule", "score"):  # a log has a line each time, a failure may pass
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[key] = found
        return found

    def of_images(self, images: torch.Tensor, prompts: Sequence[str] | None = None) -> list[Decision]:
        """A decision for each picture uint8 (B, 3, H, W), all "allow" where no concepts are given. ``prompts`` are what
        the log is told of, as a keyed hash."""
        if self.pictures is None:
            return [Decision("allow", reason="not checked: no concepts")] * len(images)
        decisions = self.pictures.check(to_unit(images))
        if self.audit is None:
            return decisions
        return [self._logged(decision, text) for decision, text in zip(decisions, prompts or [""] * len(images))]

    def _logged(self, decision: Decision, text: str) -> Decision:
        if decision.action == "allow" or self.audit is None:
            return decision
        try:
            self.audit.write(text, "image", decision)
        except (AuditError, ValueError, OSError, TypeError) as error:
            return refusal(f"the audit log failed ({type(error).__name__})")
        return decision


def weights_of(folder: Path) -> Path:
    """The moderation weights of a run folder, or those that are shipped where it has none of its own."""
    own = folder / DEFAULT.name
    return own if own.is_file() else DEFAULT


def encoder_of(run: str | Path) -> EncoderHead | None:
    """The head on the text encoder of a run folder, None where it has none."""
    return read_head(run) if (Path(run) / ENCODER).is_file() else None


def image_moderator(concepts: str | Path, clip: str | Path, mode: Mode = "block",
                    device: torch.device | str = "cpu") -> ImageModerator:
    """The concepts of a file, judged by the CLIP that the stage clip has left in a run folder."""
    vectors = ClipVectors.of_run(clip, device)
    return ImageModerator(read_concepts(concepts), vectors, vectors.texts, mode)


def conditioned_texts(parts: Sequence[Prompt | str], tokenizer: Any = None,
                      learned: Mapping[str, str] | None = None) -> list[str]:
    """Everything that one prompt conditions on, each text once: every part without its weights, each chunk of it, what
    is left after cutting, all parts in one, and all of it with the source text of learned tokens."""
    texts = [part if isinstance(part, str) else part.text for part in parts]
    if len(texts) > 1:
        texts.append(" ".join(texts))
    for part in parts:
        if tokenizer is not None and isinstance(part, Prompt):
            chunks = chunks_of(part, tokenizer)
            texts += [part.text[: len(part.text) - len(chunks.lost)], *chunks.texts]
    for text in list(texts):
        told = text
        for token, meaning in (learned or {}).items():
            told = told.replace(token, meaning)
        if told != text:
            texts.append(told)
    return list(dict.fromkeys(texts))


def shown(images: torch.Tensor, decisions: Sequence[Decision]) -> torch.Tensor:
    """Pictures uint8 (B, 3, H, W), blurred where that was decided; raises Refused when one is not to be shown."""
    if any(decision.action == "block" for decision in decisions):
        raise Refused(decisions)
    return torch.stack([hidden(image) if decision.action == "blur" else image
                        for image, decision in zip(images, decisions, strict=True)])


def hidden(image: torch.Tensor) -> torch.Tensor:
    """A picture uint8 (3, H, W) of which blots of colour are left."""
    return to_uint8(blur(to_unit(image[None])))[0]


def reason_of(decision: Decision) -> str:
    """Why, for a refusal that is not about what was asked: " (prompt: empty; valid: some text)", or nothing."""
    usual = ("rule", "score", "")
    return "" if decision.reason in usual or decision.reason.startswith("concept ") else f" ({decision.reason})"


def row_of(decision: Decision, stage: str) -> dict[str, Any]:
    """What a list of results says of a decision: category and neutral text, no word of a prompt."""
    return {"action": decision.action, "category": decision.category, "stage": stage,
            "message": decision.message + reason_of(decision), "score": round(decision.score, 3),
            "policy": decision.policy_version, "model": decision.model_hash[:16]}


def calibrated_concepts(concepts: str | Path, run: str | Path, rate: float, count: int = 2000,
                        clip: str | Path | None = None) -> list[Concept]:
    """The concepts of a file with thresholds for a CLIP, that of the run if no other is named: together they pass the
    share ``rate`` of the harmless pictures at most, which are held-out ones of the run's data, up to ``count``.

    Raises ValueError or OSError for files that do not fit and for too few pictures.
    """
    moderator = image_moderator(concepts, clip or run)
    source = build_source(read_data_config(RunFolder.open(run).path / "config.yaml").squares, "validation")
    names = [concept.name for concept in moderator.concepts]
    harmless = [i for i in range(len(source)) if not any(shows(source.captions(i), name) for name in names)][:count]
    if not harmless:
        raise ValueError(f"{run}: every held-out picture shows a concept; valid: data with pictures that do not")
    margins = torch.cat([moderator.margins(image_batch(source, np.array(harmless[start:start + 64])))
                         for start in range(0, len(harmless), 64)])
    return moderator.calibrate(margins, rate)


def shows(captions: Sequence[str], name: str) -> bool:
    """Whether one of the captions has ``name`` in it, word for word, in one number or the other."""
    return any(re.search(rf"\b{re.escape(name)}(s|es)?\b", caption, re.IGNORECASE) for caption in captions)
