"""Latents and images of requests: sampling, image to image, inpainting, interpolation and inversion.

Axis letters: B images, C latent channels, H W latent size, f pixels to a latent pixel.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffusion.editing import MixedNoise, ddim_inversion, invertible_times
from diffusion.guidance import classifier_free_guidance
from diffusion.noise import PerImageNoise
from diffusion.samplers import get_sampler
from diffusion.sampling import Edit, RunSettings, check_sampling, visited_times
from files.images import to_uint8
from model.attention_maps import AttentionMaps, record_attention
from pipeline.palette import PaletteSteer, map_to_palette, parse_palette
from pipeline.prompt_schedule import StepContexts
from pipeline.prompts import Prompt, mix_contexts, pad_contexts
from pipeline.system import TextToImage
from sampling.request import Request

Progress = Callable[[list], Iterable]


@dataclass(frozen=True)
class Sources:
    """What a call starts from: image uint8 (3, f H, f W), paint bool (f H, f W), True where it is painted.

    refinements: not None inverts the image instead, with so many repeats a step.
    """

    image: torch.Tensor | None = None
    paint: torch.Tensor | None = None
    refinements: int | None = None


def check_requests(system: TextToImage, requests: Sequence[Request], sources: Sources) -> None:
    """Raise ValueError now for what would stop the sampling later."""
    for config, strength in dict.fromkeys((request.config, request.strength) for request in requests):
        check_sampling(system.schedule, system.config.prediction_type, config, strength)
    for kind in {request.kind: request for request in requests}.values():
        system.has_pair(kind.config, kind.read(kind.negative))
        sampler, eta = kind.config.sampler, kind.config.options.get("eta", 0.0)
        if sources.refinements is not None and (sampler != "ddim" or eta):
            raise ValueError(f"{sampler} with eta {eta} cannot be inverted; valid: ddim with eta 0, whose steps can be "
                             "undone")
    for text in texts_of(requests):
        requests[0].read(text)
    if sources.image is not None:
        system.encode_images(sources.image[None])
    if sources.paint is not None and sources.image is not None and sources.paint.shape != sources.image.shape[1:]:
        height, width = sources.paint.shape
        raise ValueError(f"the mask has {height}x{width} pixels (HxW); valid: {sources.image.shape[1]}x"
                         f"{sources.image.shape[2]}, those of the image")


def texts_of(requests: Sequence[Request]) -> list[str]:
    """Every prompt that these requests read, each once."""
    return list(dict.fromkeys(text for request in requests for text in request.texts))


def times_of(system: TextToImage, request: Request, sources: Sources) -> list[float]:
    """The times at which a request calls the sampler."""
    times = visited_times(system.schedule, request.config, 1.0 if request.strength is None else request.strength)
    return times if sources.refinements is None else invertible_times(times, system.schedule)


@torch.inference_mode()
def latents_of_requests(system: TextToImage, requests: Sequence[Request], sources: Sources, progress: Progress = iter,
                        trace: list | None = None, maps: AttentionMaps | None = None) -> torch.Tensor:
    """Unit-scale latents (B, C, H, W) of requests of one kind. ``trace`` receives x_0 of every step, ``maps`` the
    cross-attention to each token."""
    first = requests[0]
    with record_attention(system.unet, maps):
        if sources.refinements is not None:
            return torch.cat([reconstruct(system, request, sources, progress, trace) for request in requests])
        if first.toward is not None:
            return interpolated_latents(system, requests, progress, trace)
        return system.latents([request.read(request.prompt) for request in requests],
                              [request.seed for request in requests], first.config, first.read(first.negative),
                              progress, edit_of(system, first.strength, sources, len(requests)), trace,
                              steer_of(system, first), mix_of(requests))


def mix_of(requests: Sequence[Request]) -> list[tuple[list, list[float]]]:
    """The prompts that requests of one kind mix in: for each place those of all requests, and their weights."""
    return [([request.read(request.mixed[k].prompt) for request in requests],
             [request.mixed[k].weight for request in requests]) for k in range(len(requests[0].mixed))]


def steer_of(system: TextToImage, request: Request) -> PaletteSteer | None:
    """What moves the samples of a request towards its palette, None without one."""
    if not request.palette or not request.palette_weight:
        return None
    return PaletteSteer(parse_palette(request.palette), system.decode, request.palette_weight)


def edit_of(system: TextToImage, strength: float | None, sources: Sources, count: int) -> Edit | None:
    """What ``count`` images start from; a latent pixel is kept where every pixel under it is."""
    if sources.image is None or strength is None:
        return None
    x_0 = system.encode_images(sources.image[None]).expand(count, -1, -1, -1)  # (B, C, H, W)
    if sources.paint is None:
        return Edit(x_0, strength)
    painted = F.max_pool2d(sources.paint[None, None].float(), system.autoencoder.factor)  # (1, 1, H, W)
    return Edit(x_0, strength, (1.0 - painted).to(x_0.device))


def decode_images(system: TextToImage, latents: torch.Tensor, sources: Sources,
                  request: Request | None = None) -> torch.Tensor:
    """uint8 (B, 3, f H, f W) of latents; where nothing was painted the pixels of the source, untouched. If the request
    has no colours but those of its palette, every painted pixel has the nearest of them."""
    images = to_uint8(system.decode(latents)).cpu()
    if request is not None and request.palette_only:
        images = map_to_palette(images, parse_palette(request.palette))
    if sources.paint is None or sources.image is None:
        return images
    return torch.where(sources.paint, images, sources.image)


def interpolated_latents(system: TextToImage, requests: Sequence[Request], progress: Progress = iter,
                         trace: list | None = None) -> torch.Tensor:
    """Latents (B, C, H, W) on the way between two prompts and seeds: linear in the context, spherical in every draw of
    noise."""
    ends = [request.toward for request in requests if request.toward is not None]
    first = requests[0]
    config, count = first.config, len(requests)
    guided = system.has_pair(config, first.read(first.negative))

    def mixed(prompts: list[str | Prompt]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The context (B, L, D), or (2B, L, D) under guidance, of B prompts, the B they go towards, and a negative."""
        states = [states_of(system, prompt) for prompt in prompts]
        way = [mix_contexts(states[k], states[count + k], end.weight) for k, end in enumerate(ends)]  # (n, D) each
        return pad_contexts([*states[2 * count:] * count, *way])

    contexts = StepContexts.of([*(request.read(request.prompt) for request in requests),
                                *(first.read(end.prompt) for end in ends),
                                *([first.read(first.negative)] if guided else [])], mixed)
    noises = [PerImageNoise(seeds, system.latent_shape, system.device) for seeds in
              ([request.seed for request in requests], [end.seed for end in ends])]
    noise = MixedNoise(noises[0], noises[1], [end.weight for end in ends])
    run = RunSettings(progress, trace=trace, steer=steer_of(system, first))
    return system.latents_from_contexts(contexts, count, noise, config, run)


def states_of(system: TextToImage, prompt: str | Prompt) -> torch.Tensor:
    """The context (n, D) of one prompt, without what the network does not see."""
    context, mask = system.encode([prompt])
    return context[0] if mask is None else context[0][mask[0]]


def reconstruct(system: TextToImage, request: Request, sources: Sources, progress: Progress = iter,
                trace: list | None = None) -> torch.Tensor:
    """Latents (1, C, H, W) of the source, inverted to noise by ``ddim_inversion`` and sampled from there by ``ddim``,
    the sampler of the request. Raises ValueError where there is no source."""
    config = request.config
    guided = system.has_pair(config, request.read(request.negative))
    contexts = StepContexts.of([request.read(request.negative)] * guided + [request.read(request.prompt)],
                               system.encode)
    times = times_of(system, request, sources)
    conditional, doubled = system.denoisers_of_steps(contexts, 1, times, config=config)
    kind = system.config.prediction_type
    if sources.image is None:
        raise ValueError("image: value None; valid: an image to invert")
    denoise = classifier_free_guidance(conditional, doubled, system.solver_config(config).guidance, system.schedule,
                                       kind)
    x_T = ddim_inversion(denoise, system.encode_images(sources.image[None]), times, system.schedule, kind,
                         sources.refinements or 0)
    return get_sampler("ddim")(denoise, x_T, progress(times), system.schedule, kind, None, trace=trace,
                               **config.options)


def reconstruction_error(system: TextToImage, latents: torch.Tensor, image: torch.Tensor) -> str:
    """One line: how far an inverted and sampled latent (1, C, H, W) is from its image, and the autoencoder's share
    of it."""
    x_0 = system.encode_images(image[None])
    direct, back = (to_uint8(system.decode(x)).cpu().float() for x in (x_0, latents))
    original = image.float()

    def rms(a: torch.Tensor) -> float:
        return a.square().mean().sqrt().item()

    return (f"reconstruction error: latent {100 * rms(latents - x_0) / rms(x_0):.2f} % (root mean square); image "
            f"{rms(back - original):.2f} levels of 255, of which the autoencoder alone makes "
            f"{rms(direct - original):.2f}")


@contextmanager
def exact_arithmetic(threads: int) -> Iterator[None]:
    """Within this block sums are always split in the same way: a fixed number of threads, full fp32 on CUDA."""
    before = (torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32,
              torch.backends.cuda.matmul.allow_tf32)
    try:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before[1:3]
        torch.backends.cuda.matmul.allow_tf32 = before[3]
