"""The loop from requests to samples, as a library: the command writes what it yields, a server may send it.

    job = Job(system, [Request("a small red star", 0, system.config.sampling)])
    for sample in draw_samples(job, gate_of(job, moderation)):
        sample.image                                                                 # uint8 (3, H, W), or None
"""
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from model.attention_maps import AttentionMaps
from pipeline.moderation import Moderation
from pipeline.prompt_schedule import PromptSchedule, prompts_of
from pipeline.prompts import chunks_of
from pipeline.system import TextToImage
from safety.policy import Decision
from sampling.draw import (
    Sources,
    check_requests,
    decode_images,
    exact_arithmetic,
    latents_of_requests,
    reconstruction_error,
    times_of,
)
from sampling.gate import Gate, blur_where_decided
from sampling.request import Request

Preview = Callable[[Sequence[int], torch.Tensor], object]  # numbers of a batch, x_0 (B, C, h, w) of a step


@dataclass(frozen=True)
class Job:
    """What is drawn: the requests, by which system, and what they start from. Raises ValueError for requests that the
    system cannot draw."""

    system: TextToImage
    requests: Sequence[Request]
    sources: Sources = Sources()

    def __post_init__(self) -> None:
        check_requests(self.system, self.requests, self.sources)


@dataclass(frozen=True)
class DrawSettings:
    """How a job is drawn.

    batch: requests at a time, which changes the last bits. exact: one at a time, with ``exact_arithmetic``. frames:
    how many predictions of x_0 on the way come with each sample. attention: maps of the cross-attention come with it.
    by_length: a batch has prompts that fill equally many contexts, so that none is padded to the length of another.
    """

    batch: int = 64
    exact: bool = False
    frames: int = 0
    attention: bool = False
    by_length: bool = False


@dataclass(frozen=True)
class Frames:
    """Predictions of x_0 on the way to a sample, uint8 (N, 3, H, W), their labels, and the worst decision on them."""

    images: torch.Tensor
    labels: list[str]
    decision: Decision


@dataclass(frozen=True)
class Sample:
    """What became of one request, and the stage of the decision: "prompt", "image given" or "image".

    image: uint8 (3, H, W), blurred if that was decided, None if it was refused. frames; attention (L, h, w), the share
    of each token at each place: where they were asked for and nothing is blurred. error: of an inversion, one line.
    """

    number: int
    request: Request
    decision: Decision
    stage: str
    image: torch.Tensor | None = None
    frames: Frames | None = None
    attention: torch.Tensor | None = None
    error: str | None = None


@dataclass(frozen=True)
class Drawing:
    """What came of one batch: images uint8 (B, 3, H, W), their latents (B, C, h, w), x_0 of every step and maps."""

    images: torch.Tensor
    latents: torch.Tensor
    trace: list[torch.Tensor] | None
    maps: AttentionMaps | None


def gate_of(job: Job, moderation: Moderation) -> Gate:
    """The decisions of a moderation on a job; its prompts are judged now."""
    return Gate(moderation, job.system, job.requests, job.sources)


def check_settings(job: Job, settings: DrawSettings) -> None:
    """Raise ValueError for maps of attention to a prompt that changes: its tokens are others at every step."""
    if settings.attention:
        for request in job.requests:
            if isinstance(request.read(request.prompt), PromptSchedule):
                raise ValueError(f"--attention with the prompt {request.prompt!r}, which changes on the way; valid: a "
                                 "prompt without [a|b] and [a:b:0.5]")


def draw_samples(job: Job, gate: Gate, settings: DrawSettings = DrawSettings(),
                 after_step: Callable[[], object] = lambda: None, preview: Preview | None = None) -> Iterator[Sample]:
    """Every request of the job as a sample: the refused ones first, then the others in the order of their batches.
    ``after_step`` is called after every step of a batch, before it ``preview`` with the newest prediction of x_0,
    which nobody has judged; the last one is the image itself."""
    check_settings(job, settings)
    for number in sorted(set(range(len(job.requests))) - set(gate.allowed)):
        yield Sample(number, job.requests[number], gate.of_prompts[number], gate.stage_of_refusal(number))
    for numbers in batches_of(job, gate, settings):
        with arithmetic_of(settings):
            drawing = draw_batch(job, [job.requests[number] for number in numbers], settings, after_step,
                                 preview and partial(preview, numbers))
            decisions = gate.check_images(drawing.images, drawing.latents, job.requests, numbers)
        for place, (number, decision) in enumerate(zip(numbers, decisions)):
            with arithmetic_of(settings):
                sample = sample_of(job, gate, drawing, place, settings, Sample(number, job.requests[number], *decision))
            yield sample


def arithmetic_of(settings: DrawSettings) -> contextlib.AbstractContextManager:
    """The block in which to compute; left before a sample is handed over, so that the caller's threads are its own."""
    return exact_arithmetic(torch.get_num_threads()) if settings.exact else contextlib.nullcontext()


def draw_batch(job: Job, requests: Sequence[Request], settings: DrawSettings,
               after_step: Callable[[], object], preview: Callable[[torch.Tensor], object] | None = None) -> Drawing:
    """Requests of one kind, drawn together."""
    def progress(times: list) -> Iterable:
        for time in times:
            yield time
            if preview is not None and trace:
                preview(trace[-1])
            after_step()

    trace: list[torch.Tensor] | None = [] if settings.frames or preview is not None else None
    maps = AttentionMaps(len(requests)) if settings.attention else None
    latents = latents_of_requests(job.system, requests, job.sources, progress, trace, maps)
    return Drawing(decode_images(job.system, latents, job.sources, requests[0]), latents,
                   trace if settings.frames else None, maps)


def sample_of(job: Job, gate: Gate, drawing: Drawing, place: int, settings: DrawSettings, refused: Sample) -> Sample:
    """The sample at one place of a batch: ``refused``, which holds the decision on it, with the image if it may have
    one."""
    error = None
    if job.sources.refinements is not None and job.sources.image is not None:
        error = reconstruction_error(job.system, drawing.latents[place:place + 1], job.sources.image)
    if refused.decision.action == "block":
        return replace(refused, error=error)
    image = blur_where_decided(drawing.images[place], refused.decision)
    frames = attention = None
    if refused.decision.action != "blur":
        if drawing.trace:
            images, labels = frames_of(job, drawing.trace, place, settings.frames)
            frames = Frames(images, labels, gate.check_frames(images, refused.request))
        if drawing.maps:
            attention = drawing.maps.maps(*job.system.latent_shape[1:])[place].cpu()
    return replace(refused, image=image, frames=frames, attention=attention, error=error)


def frames_of(job: Job, trace: list[torch.Tensor], place: int, count: int) -> tuple[torch.Tensor, list[str]]:
    """``count`` of the predictions x_0 (B, C, h, w) at one place of a batch as images uint8 (N, 3, H, W), evenly chosen
    and the last one among them, and their labels."""
    count = min(count, len(trace))
    chosen = [round((k + 1) * len(trace) / count) - 1 for k in range(count)]
    with torch.inference_mode():
        images = torch.cat([decode_images(job.system, trace[step][place:place + 1], job.sources) for step in chosen])
    return images, [f"{step + 1} of {len(trace)}" for step in chosen]


def batches_of(job: Job, gate: Gate, settings: DrawSettings) -> list[list[int]]:
    """Numbers of the requests that are drawn together: allowed ones of one kind, at most ``settings.batch``."""
    size = 1 if settings.exact else settings.batch
    kinds: dict[tuple, list[int]] = {}
    for number in gate.allowed:
        request = job.requests[number]
        length = length_of(job.system, request) if settings.by_length else ()
        kinds.setdefault((request.kind, length), []).append(number)
    return [numbers[i:i + size] for numbers in kinds.values() for i in range(0, len(numbers), size)]


def length_of(system: TextToImage, request: Request) -> tuple:
    """How many contexts the prompts of a request fill, and for those that change on the way, at which steps."""
    read = [request.read(text) for text in request.conditions]
    filled = max(len(chunks_of(prompt, system.tokenizer).ids) for one in read for prompt in prompts_of(one))
    return filled, *(one.of_step for one in read if isinstance(one, PromptSchedule))


def step_count(job: Job, gate: Gate, settings: DrawSettings) -> int:
    """How often ``draw_samples`` will call ``after_step``."""
    alone = job.sources.refinements is not None  # inversion has no batches
    return sum(len(times_of(job.system, job.requests[numbers[0]], job.sources)) * (len(numbers) if alone else 1)
               for numbers in batches_of(job, gate, settings))
