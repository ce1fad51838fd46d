"""Requests past the gate, and the list of what became of each: results.jsonl beside the pictures."""
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from pipeline.moderation import OFF, Moderation, hidden, reason_of, row_of
from pipeline.system import TextToImage
from safety.policy import Decision, most_severe, refusal
from sampling.draw import Sources
from sampling.request import Request

RESULTS = "results.jsonl"
GREY = 128  # of the cell that stands for a picture that is not there


class Gate:
    """Decisions on the requests of one call. ``asked`` are those on their prompts; refusals are said on stderr."""

    def __init__(self, moderation: Moderation, system: TextToImage, requests: Sequence[Request], sources: Sources,
                 out: Path):
        self.moderation = moderation
        self.results = Results(out / RESULTS, moderation.checks)
        if moderation.mode == "off":
            print(f"warning: {OFF}", file=sys.stderr)
        self.refused: set[int] = set()
        self.given = given = Decision("allow")
        if sources.image is not None:
            self.given = given = moderation.of_images(sources.image[None])[0]
        silent = sources.refinements is not None  # an inversion may do without a prompt
        self.asked = [most_severe([asked(moderation, request, system, silent), given]) for request in requests]
        for number, (request, decision) in enumerate(zip(requests, self.asked)):
            if decision.action == "block":
                self.refuse(number, request, decision, "image given" if decision is given else "prompt")

    def judged(self, images: torch.Tensor, latents: torch.Tensor, requests: Sequence[Request],
               part: Sequence[int]) -> list[tuple[Decision, str]]:
        """(decision, the stage it was taken at) of each picture uint8 (B, 3, H, W) of the requests with these numbers.
        A latent (B, C, H, W) that is not finite has failed: it is not unsafe, and not a picture."""
        found = []
        seen = self.moderation.of_images(images, [requests[number].prompt for number in part])
        for number, decision, latent in zip(part, seen, latents, strict=True):
            if not torch.isfinite(latent).all():
                decision = refusal("the picture failed: it is not finite")
            most = most_severe([self.asked[number], decision])
            found.append((most, "prompt" if most is self.asked[number] else "image"))
        return found

    def refuse(self, number: int, request: Request, decision: Decision, stage: str) -> None:
        """Say and write down that a request has no picture."""
        print(f"picture {number}: {decision.message}{reason_of(decision)}", file=sys.stderr)
        self.refused.add(number)
        self.results.add(number, request, decision, stage, None)

    def may_show(self, frames: torch.Tensor, number: int, request: Request) -> bool:
        """Whether pictures on the way to one, uint8 (B, 3, H, W), may be written as they are; says so when not."""
        found = most_severe(self.moderation.of_images(frames, [request.prompt] * len(frames)))
        if found.action in ("blur", "block"):
            print(f"frames of picture {number}: {found.message}{reason_of(found)}", file=sys.stderr)
        return found.action not in ("blur", "block")

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: Any) -> None:
        self.results.close()


def asked(moderation: Moderation, request: Request, system: TextToImage, silent: bool = False) -> Decision:
    """The decision on everything that a request conditions on: its prompt, the one it goes towards, and what it pushes
    away from. ``silent``: there may be no prompt."""
    written = [request.prompt, *([request.toward.prompt] if request.toward else [])]
    negatives = [request.read(request.negative)] if request.negative else []
    if silent and not request.prompt and not negatives:
        return Decision("allow", reason="no prompt")
    return moderation.of_prompt([request.read(text) for text in dict.fromkeys(written)], negatives, system.tokenizer)


def grey(like: torch.Tensor) -> torch.Tensor:
    """What stands in a grid for a picture uint8 (3, H, W) that is not there."""
    return torch.full_like(like, GREY)


def softened(image: torch.Tensor, decision: Decision) -> torch.Tensor:
    """A picture uint8 (3, H, W), blurred where that was decided."""
    return hidden(image) if decision.action == "blur" else image


class Results:
    """A line of JSON for each request, written when it is known: number, seed, file or null, action, category, message.
    No word of a prompt is in it but in the name of a file that was written. ``checks`` says what was looked at."""

    def __init__(self, path: Path, checks: Sequence[str] = ()):
        self.path, self.checks, self.refused = path, list(checks), 0
        self._file: IO[str] = open(path, "w", encoding="utf-8")

    def add(self, number: int, request: Request, decision: Decision, stage: str, file: Path | None) -> None:
        """Append what became of a request; ``file`` None when nothing was written."""
        row: dict[str, Any] = {"number": number, "seed": request.seed, "file": file.name if file else None,
                               "checked": self.checks, **row_of(decision, stage)}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.refused += file is None

    def close(self) -> None:
        """No lines after this."""
        self._file.close()
