"""Decisions on the requests of a job, on the image that it starts from and on the samples."""
from collections.abc import Sequence

import torch

from pipeline.moderation import Moderation, blur_image, decision_on_request
from pipeline.system import TextToImage
from safety.policy import Decision, most_severe, refusal
from sampling.draw import Sources
from sampling.request import Request


class Gate:
    """The decisions of one moderation on one job. It fails closed: what cannot be judged is refused.

    of_source: on the image that is given. of_prompts: for each request the worst of that and of its prompts.
    """

    def __init__(self, moderation: Moderation, system: TextToImage, requests: Sequence[Request], sources: Sources):
        self.moderation = moderation
        self.of_source = Decision("allow")
        if sources.image is not None:
            self.of_source = moderation.check_images(sources.image[None])[0]
        silent = sources.refinements is not None  # an inversion may do without a prompt
        self.of_prompts = [most_severe([decision_on_prompts(moderation, request, system, silent), self.of_source])
                           for request in requests]

    @property
    def allowed(self) -> list[int]:
        """Numbers of the requests that may be drawn."""
        return [number for number, decision in enumerate(self.of_prompts) if decision.action != "block"]

    def stage_of_refusal(self, number: int) -> str:
        """The stage at which a request was refused before it was drawn."""
        return "image given" if self.of_prompts[number] is self.of_source else "prompt"

    def check_images(self, images: torch.Tensor, latents: torch.Tensor, requests: Sequence[Request],
                     numbers: Sequence[int]) -> list[tuple[Decision, str]]:
        """(decision, the stage it was taken at) of each sample uint8 (B, 3, H, W) of the ``requests`` with these
        numbers. A latent (B, C, H, W) that is not finite has failed: it is not unsafe, and not an image."""
        found = []
        judged = self.moderation.check_images(images, [requests[number].prompt for number in numbers])
        for number, decision, latent in zip(numbers, judged, latents, strict=True):
            if not torch.isfinite(latent).all():
                decision = refusal("the image failed: it is not finite")
            most = most_severe([self.of_prompts[number], decision])
            found.append((most, "prompt" if most is self.of_prompts[number] else "image"))
        return found

    def check_frames(self, frames: torch.Tensor, request: Request) -> Decision:
        """The worst decision on images on the way to one, uint8 (B, 3, H, W)."""
        return most_severe(self.moderation.check_images(frames, [request.prompt] * len(frames)))


def decision_on_prompts(moderation: Moderation, request: Request, system: TextToImage,
                        silent: bool = False) -> Decision:
    """The decision on everything that a request conditions on: its prompt, those it goes towards or mixes in, and the
    negative prompt, which is pushed away from or, below a guidance of 1, toward; each with all that it changes to on
    the way. ``silent``: there may be no prompt."""
    negatives = [request.read(request.negative)] if request.negative else []
    if silent and not request.prompt and not negatives:
        return Decision("allow", reason="no prompt")
    parts = [request.read(text) for text in dict.fromkeys(request.conditions)]
    return decision_on_request(moderation, system, parts, negatives, request.config.guidance)


def blur_where_decided(image: torch.Tensor, decision: Decision) -> torch.Tensor:
    """An image uint8 (3, H, W), blurred if that was decided."""
    return blur_image(image) if decision.action == "blur" else image
