"""From prompts to images with the tokenizer, text encoder, denoiser and autoencoder of a run folder or published
checkpoint.

Axis letters: B batch, C latent channels, H W latent size, L tokens, D context width.
"""
import itertools
from collections.abc import Callable, Iterable, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from data.clip_tokenizer import ClipTokenizer
from data.tokenizer import Tokenizer
from diffusion.denoise import Denoise, time_tensor
from diffusion.guidance import GuidanceConfig
from diffusion.guidance_free import check_folded, without_pair
from diffusion.noise import PerImageNoise
from diffusion.pretrained import scheduler_of_process
from diffusion.sampling import (
    Edit,
    RunSettings,
    SamplingConfig,
    network_times,
    sample_latents,
    times_of_run,
    with_sampler,
)
from diffusion.schedule import Schedule
from diffusion.shortcut import jump_lengths
from diffusion.steering import Steer
from files.images import to_uint8, to_unit
from model.attention import ContextCache
from model.autoencoder import Autoencoder
from model.decode import decode_sliced, decode_tiled
from model.device import autocast_dtype, freeze, place_on
from model.graphed import Runs
from model.pretrained.card import Card
from model.pretrained.folder import write_diffusers_folder
from model.text_encoder import TextEncoder
from model.tiny_decoder import TinyDecoder
from model.unet import DeepFeatures, UNet
from pipeline.config import SystemConfig
from pipeline.moderation import Moderation, Refused, blur_or_refuse, decision_on_request
from pipeline.prompt_schedule import AnyPrompt, StepContexts, as_prompt, text_of
from pipeline.prompts import Prompt, chunks_of, join_chunks, parse_prompt, weighted_context
from pipeline.time_table import TimeTable
from safety.policy import Decision, most_severe

Progress = Callable[[list], Iterable]
Speed = Literal["exact", "fast"]  # fast rounds: see docs/performance.md
Decoder = Literal["full", "tiny"]  # tiny is approximate: see docs/student.md
WHOLE = 256 * 256  # pixels of an image up to which a batch is decoded at once; one at a time is as fast above


class Networks(nn.Module):
    """The networks that are trained together and saved together in the state of an unfinished stage. ``words`` predicts
    words from features during training (training/stages/grounding.py) and is not used in sampling."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder, words: nn.Linear | None = None):
        super().__init__()
        self.unet, self.text_encoder, self.words = unet, text_encoder, words


class TextToImage:
    """A trained system. ``images(prompts, seeds)`` is all that sampling needs; `load_run` and `load_pretrained` in
    pipeline/loading.py build one.

    ``masked`` says whether the denoiser was trained with padding masked; published denoisers see the padding.
    ``files`` maps names to the files that the system was read from. ``tiled`` may be set to decode with less memory,
    approximately, and ``tiny_decoder`` to decode by it. ``guide`` may be set to a weaker system of the same latents
    (`load_weaker`): guidance then pushes away from its prediction for the prompt instead of from the negative prompt
    (autoguidance). ``images`` asks ``moderation`` if there is one, and both loaders set it; ``latents`` and ``decode``
    are the steps below and do not ask.
    """

    def __init__(self, config: SystemConfig, tokenizer: Tokenizer | ClipTokenizer,
                 text_encoder: TextEncoder, unet: UNet, autoencoder: Autoencoder, masked: bool = True):
        self.config = config
        self.tokenizer, self.masked = tokenizer, masked
        self.text_encoder, self.unet, self.autoencoder = text_encoder, unet, autoencoder
        self.schedule = Schedule(config.schedule)
        self.latent_shape = config.latent_shape
        self.device = next(unet.parameters()).device
        self.files: dict[str, Path] = {}
        self.tiled = False
        self.tiny_decoder: TinyDecoder | None = None
        self.guide: TextToImage | None = None
        self.speed: Speed = "exact"
        self.runs: Runs | None = None  # on a GPU, where "fast" replays whole runs as CUDA graphs
        self.moderation: Moderation | None = None
        self.cards: dict[str, Card] = {}  # of the adapters and learned tokens on it (pipeline/personal.py)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that diffusers reads. Raises FileExistsError if the path exists, and ValueError for a system
        that diffusers cannot represent, such as one trained here with its own tokenizer and a mask."""
        tokenizer = self.tokenizer
        if self.masked or not isinstance(tokenizer, ClipTokenizer):
            raise ValueError("the system has its own tokenizer and masks padding; valid for diffusers: one with CLIP's "
                             "tokenizer, that sees padding")
        scheduler = scheduler_of_process(self.config.schedule, self.config.prediction_type,
                                         self.config.sampling)

        def write_tokenizer(folder: Path) -> tuple[int, int, int]:
            tokenizer.save(folder)
            return tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id

        write_diffusers_folder(path, self.unet, self.autoencoder, self.text_encoder, scheduler, write_tokenizer,
                               self.config.latent_shape[1:])

    def at_speed(self, speed: Speed) -> "TextToImage":
        """This system, or for "fast" a copy whose denoiser computes in bf16 if the machine has bf16 arithmetic. On a
        GPU the decoder computes in bf16 as well, and from its second run on a sampling run of the same kind is replayed
        as a CUDA graph. Solver, guidance and noise stay in fp32."""
        dtype = autocast_dtype("auto", self.device)
        if speed == "exact" or dtype is None:
            return self
        fast = copy(self)
        fast.speed = speed
        fast.unet = freeze(place_on(deepcopy(self.unet).to(dtype), self.device))
        fast.runs = Runs() if self.device.type == "cuda" else None
        fast.guide = self.guide.at_speed(speed) if self.guide else None
        return fast

    def set_size(self, height: int, width: int) -> None:
        """Set the size of samples in pixels; raises ValueError for a size that the networks cannot produce."""
        f = self.autoencoder.factor
        multiple = f * 2 ** (len(self.unet.config.channels) - 1)
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise ValueError(f"size: {height}x{width}; valid: multiples of {multiple}")
        self.latent_shape = (self.autoencoder.latent_channels, height // f, width // f)

    @torch.inference_mode()
    def latents(self, prompts: Sequence[AnyPrompt], seeds: Sequence[int], config: SamplingConfig | None = None,
                negative: AnyPrompt = "", progress: Progress = iter, edit: Edit | None = None,
                trace: list | None = None, steer: Steer | None = None,
                mix: Sequence[tuple[Sequence[AnyPrompt], Sequence[float]]] = ()) -> torch.Tensor:
        """Unit-scale latents (B, C, H, W), one for each prompt and its seed.

        A plain string is read literally and cut at the end of the context; weights and chunks need a ``Prompt``, and
        what changes on the way a ``PromptSchedule``, made for the steps of ``config``.
        ``negative`` replaces the empty prompt in guidance; ``steer`` moves every predicted x_0; ``mix`` holds further
        prompts and their weights, one of each for every image, whose predictions are mixed in (diffusion/mixing.py).
        Raises ValueError if the numbers of prompts and seeds differ.
        """
        if not prompts or any(len(texts) != len(prompts) for texts in (seeds, *(one for pair in mix for one in pair))):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; valid: as many of each, at least one")
        config = config or self.config.sampling
        guided = self.has_pair(config, negative)
        opposite = [negative] * len(prompts) if guided and self.guide is None else []
        asked = [*(prompt for texts, _ in mix for prompt in texts), *prompts]  # (K + 1) B
        contexts = StepContexts.of([*opposite, *asked], self.encode)  # (2B, L, D) or (B, L, D) each, without a mixture
        noise = PerImageNoise(seeds, self.latent_shape, self.device)
        weights = torch.tensor([list(weights) for _, weights in mix], device=self.device) if mix else None  # (K, B)
        run = RunSettings(progress, edit, trace, steer=steer, mix=weights)
        if guided and self.guide is not None:
            times = times_of_run(self.schedule, config, run)
            weak, _ = self.guide.denoisers_of_steps(StepContexts.of(asked, self.guide.encode), len(asked), times)
            run = replace(run, weak=weak)
        return self.latents_from_contexts(contexts, len(prompts), noise, config, run)

    def latents_from_contexts(self, contexts: StepContexts, count: int, noise: Callable[[], torch.Tensor],
                              config: SamplingConfig, run: RunSettings = RunSettings()) -> torch.Tensor:
        """As ``latents_from_context``, from the contexts of all steps."""
        if len(contexts.contexts) == 1:
            return self.latents_from_context(*contexts.contexts[0], count, noise, config, run)
        times = times_of_run(self.schedule, config, run)
        denoisers = self.denoisers_of_steps(contexts, run.rows(count), times, times, config)
        return sample_latents(denoisers, noise, times, self.schedule, self.config.prediction_type,
                              self.solver_config(config), run)

    def latents_from_context(self, context: torch.Tensor, mask: torch.Tensor | None, count: int,
                             noise: Callable[[], torch.Tensor], config: SamplingConfig,
                             run: RunSettings = RunSettings()) -> torch.Tensor:
        """As ``latents``, but from a context and any source of noise (B, C, H, W), where B is ``count``. The context is
        (2B, L, D) of B negative prompts and B prompts, or (B, L, D) without guidance or if a weaker network takes the
        place of the negative prompts; the B prompts have the further ones of a mixture before them."""
        times = times_of_run(self.schedule, config, run)
        watched = any(layer.watch is not None for layer in self.unet.cross_attentions())
        if self.runs is not None and not (watched or run.edit or run.trace is not None or run.weak or run.steer
                                          or run.mix is not None):
            latents = self.replay(context, mask, count, noise, config, times)
            for _ in run.progress(times):
                pass
            return latents
        denoisers = self.denoisers(context, mask, run.rows(count), network_times(self.schedule, config, times), config)
        return sample_latents(denoisers, noise, times, self.schedule, self.config.prediction_type,
                              self.solver_config(config), run)

    def replay(self, context: torch.Tensor, mask: torch.Tensor | None, count: int, noise: Callable[[], torch.Tensor],
               config: SamplingConfig, times: list) -> torch.Tensor:
        """As ``latents_from_context`` at these times, by the CUDA graph of runs of this kind once there is one."""
        assert self.runs is not None

        def sample(draw: Callable[[], torch.Tensor], context: torch.Tensor,
                   mask: torch.Tensor | None = None) -> torch.Tensor:
            denoisers = self.denoisers(context, mask, count, network_times(self.schedule, config, times), config)
            return sample_latents(denoisers, draw, times, self.schedule, self.config.prediction_type,
                                  self.solver_config(config))

        kind = (repr(config), context.shape, mask is None, count, self.latent_shape)
        return self.runs(kind, sample, [context] if mask is None else [context, mask], noise)

    def has_pair(self, config: SamplingConfig, negative: AnyPrompt = "") -> bool:
        """Whether a run with these settings makes two predictions, also for the negative prompt: it is guided, and the
        guidance is not folded into the denoiser. Raises ValueError for settings that a denoiser with folded guidance
        does not follow."""
        if self.config.scales is None:
            return config.guidance.scale != 1.0
        try:
            check_folded(config.guidance, self.config.scales)
        except ValueError as error:
            raise ValueError(f"guidance.{error}") from None
        if text_of(negative):
            raise ValueError("a negative prompt; valid for a run whose guidance is folded into its denoiser: none")
        return False

    def solver_config(self, config: SamplingConfig) -> SamplingConfig:
        """The settings as the solver takes them: guidance that is folded into the denoiser is none to it."""
        return config if self.config.scales is None else replace(config, guidance=without_pair(config.guidance))

    def denoisers(self, context: torch.Tensor, mask: torch.Tensor | None, count: int, times: Sequence[float] = (),
                  config: SamplingConfig | None = None) -> tuple[Denoise, Denoise]:
        """The network bound to the prompts alone, and to the whole context, whose keys and values are computed here.
        A network with folded guidance is bound to the guidance of ``config``, and to none without it, and one that
        reads how far a step goes to the steps of its sampler between ``times``; ``config.reuse`` counts the calls of
        each of the two. With "fast", whatever depends only on the time is computed once, too: for
        all ``times`` together, or when a time is first used. That product has fewer rows, and so other last bits."""
        dtype = next(self.unet.parameters()).dtype
        doubled_cache = self.unet.context_cache(context.to(dtype), mask)
        cond_cache = doubled_cache.last(count)
        guidance = config.guidance if config else GuidanceConfig(scale=1.0)

        def beta_at(t: float) -> float:
            return 1.0 / guidance.scale_at(*self.schedule.alpha_sigma(t))

        folded = beta_at if self.unet.guidance is not None else None
        jumps = jump_lengths(self.schedule, config.sampler, times) if config else {}

        def length_at(t: float) -> float:
            return jumps.get(t, 0.0)

        jump_at = length_at if self.unet.jump is not None else None
        table = TimeTable(self.unet, self.schedule, times, folded, jump_at) if self.speed == "fast" else None

        reuse = config.reuse if config else 1

        def bind(cache: ContextCache) -> Denoise:
            deep = DeepFeatures()
            calls = itertools.count()

            def denoise(x_t: torch.Tensor, t: float) -> torch.Tensor:
                network_time = self.schedule.network_time(time_tensor(t, x_t))  # (B,), or (2B,) when guided
                beta = time_tensor(folded(t), x_t) if folded else None
                jump = time_tensor(jump_at(t), x_t) if jump_at else None
                if next(calls) % reuse == 0:
                    deep.features = None
                return self.unet(x_t.to(dtype), network_time, cache=cache, time_biases=table and table[t], beta=beta,
                                 deep=deep if reuse > 1 else None, jump=jump)
            return denoise

        return bind(cond_cache), bind(doubled_cache)

    def denoisers_of_steps(self, contexts: StepContexts, count: int, times: Sequence[float],
                           known: Sequence[float] = (),
                           config: SamplingConfig | None = None) -> tuple[Denoise, Denoise]:
        """As ``denoisers``, for a run along ``times`` whose steps have contexts of their own. The keys and values of a
        context are computed when it is first read, and its deep features are those of its own calls. ``known``: what
        ``denoisers`` calls times."""
        @cache
        def pair(place: int) -> tuple[Denoise, Denoise]:
            return self.denoisers(*contexts.contexts[place], count, known, config)

        return (lambda x_t, t: pair(contexts.place(times, t))[0](x_t, t),
                lambda x_t, t: pair(contexts.place(times, t))[1](x_t, t))

    def encode(self, prompts: Sequence[str | Prompt]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context (B, L, D) of prompts and their padding mask (B, L), which is None if the denoiser sees padding.

        L is the length of the text encoder times the largest number of chunks of any ``Prompt`` among them.
        """
        plain = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(plain) == len(prompts):
            ids, mask = (tensor.to(self.device) for tensor in self.tokenizer.encode(plain))
            seen = mask if self.masked else None
            return self.text_encoder(ids, seen), seen
        rows = [chunks_of(parse_prompt(prompt, literal=True) if isinstance(prompt, str) else prompt, self.tokenizer)
                for prompt in prompts]
        ids, mask, weights = (torch.cat([getattr(row, name) for row in rows]).to(self.device)
                              for name in ("ids", "mask", "weights"))  # (sum of K, L) each
        seen = mask if self.masked else None
        context = weighted_context(self.text_encoder(ids, seen), weights, seen)  # (sum of K, L, D)
        return join_chunks(context, seen, [len(row.ids) for row in rows])

    @torch.inference_mode()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Unit-scale latents (B, C, H, W) of images (B, 3, H, W) uint8, without noise; raises ValueError for a size
        other than that of the samples."""
        size = tuple(side * self.autoencoder.factor for side in self.latent_shape[1:])
        if images.shape[2:] != size:
            raise ValueError(f"{images.shape[2]}x{images.shape[3]} pixels (HxW); valid: {size[0]}x{size[1]}, the size "
                             "that is drawn")
        return self.autoencoder.encode(to_unit(images).to(self.device)).mean

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) of unit-scale latents: by the tiny decoder if set, in tiles if ``tiled``, and one
        at a time if they are large."""
        if self.tiny_decoder is not None:
            return self.tiny_decoder(latents).float()
        pixels = latents.shape[2] * latents.shape[3] * self.autoencoder.factor**2
        decode = self.autoencoder.decode if pixels <= WHOLE else partial(decode_sliced, self.autoencoder)
        with torch.autocast(self.device.type, torch.bfloat16, self.speed == "fast" and self.device.type == "cuda"):
            return (decode_tiled(self.autoencoder, latents) if self.tiled else decode(latents)).float()

    @torch.inference_mode()
    def images(self, prompts: Sequence[AnyPrompt], seeds: Sequence[int], config: SamplingConfig | None = None,
               negative: AnyPrompt = "", progress: Progress = iter) -> torch.Tensor:
        """Samples (B, 3, H, W) uint8, one for each prompt and its seed; arguments as in ``latents``.

        Raises Refused with a decision for each sample: before sampling if a prompt is refused, and before anything
        is returned if an image is.
        """
        decisions = [Decision("allow")] * len(prompts)
        if self.moderation is not None:
            opposite = [as_prompt(negative)] if negative else []
            guidance = (config or self.config.sampling).guidance
            decisions = [decision_on_request(self.moderation, self, [as_prompt(prompt)], opposite, guidance)
                         for prompt in prompts]
            if any(decision.action == "block" for decision in decisions):
                raise Refused(decisions)
        images = to_uint8(self.decode(self.latents(prompts, seeds, config, negative, progress))).cpu()
        if self.moderation is None:
            return images
        judged = self.moderation.check_images(images, [text_of(prompt) for prompt in prompts])
        return blur_or_refuse(images, [most_severe(pair) for pair in zip(decisions, judged)])

    def images_in_batches(self, prompts: Sequence[AnyPrompt], seeds: Sequence[int],
                          config: SamplingConfig | None = None, negative: AnyPrompt = "", batch: int = 64,
                          progress: Progress = iter) -> torch.Tensor:
        """As ``images``, ``batch`` at a time; ``progress`` wraps the list of batch starts."""
        starts = list(range(0, len(prompts), batch))
        return torch.cat([self.images(prompts[i:i + batch], seeds[i:i + batch], config, negative)
                          for i in progress(starts)])


def with_options(config: SamplingConfig, sampler: str | None = None, steps: int | None = None,
                 scale: float | None = None) -> SamplingConfig:
    """``config`` with the given settings in place of its own; raises ValueError for settings that do not fit
    together."""
    guidance = config.guidance if scale is None else replace(config.guidance, scale=scale)
    config = with_sampler(config, sampler or config.sampler)
    return replace(config, steps=config.steps if steps is None else steps, guidance=guidance)
