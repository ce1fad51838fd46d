"""Sample pictures: python sample.py "a small red star" "two blue circles" --run runs/shapes
From published weights: python sample.py "a photo of a horse" --pretrained PATH --steps 30 --size 512

Writes one PNG a picture, with the settings it was made from inside, a labelled grid, and results.jsonl with a line for
each picture asked for, refused ones too. What the flags mean is in docs/sampling.md, docs/prompts.md, docs/editing.md
and docs/moderation.md; the parts are in sampling/.
"""
import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from files.images import png_bytes, save_bytes
from model.attention_maps import AttentionMaps
from pipeline.prompts import chunks_of
from pipeline.system import TextToImage
from sampling.draw import (
    Sources,
    check,
    drawn_latents,
    exact_arithmetic,
    pictures,
    reconstruction_error,
    texts_of,
    times_of,
)
from sampling.options import REFINEMENTS, load_system, moderation_of, parse, read_prompts, requests_of
from sampling.request import Request, settings_of
from sampling.results import Gate, grey, softened
from sampling.sheets import SHOWN, frames_of, save_attention, save_frames, save_overview
from sampling.verify import shared_settings, sources_of, verified

REFUSED = 5  # exit code, as that of `python moderate.py check`


def file_name(number: int, prompt: str, seed: int) -> str:
    """00012_a-small-red-star_seed7.png"""
    words = re.sub(r"[^\w]+", "-", prompt.lower(), flags=re.ASCII).strip("-")[:40].rstrip("-")
    return f"{number:05d}_{words or 'empty'}_seed{seed}.png"


def warn_of_long_prompts(system: TextToImage, requests: list[Request]) -> None:
    """Say which prompts are longer than one context, and what is lost of those that do not fit into all of them."""
    room = system.tokenizer.length - 2
    for text in texts_of(requests):
        chunks = chunks_of(requests[0].read(text), system.tokenizer)
        read = int(chunks.mask.sum()) - 2 * len(chunks.ids)
        if chunks.lost:
            print(f"warning: the prompt is cut after {read} tokens; not read: \"{chunks.lost}\"", file=sys.stderr)
        elif len(chunks.ids) > 1:
            print(f"note: a prompt of {read} tokens is read in {len(chunks.ids)} chunks of up to {room}",
                  file=sys.stderr)


def batches(requests: list[Request], size: int) -> list[list[int]]:
    """Numbers of the requests that are drawn together: of one kind, at most ``size``."""
    kinds: dict[tuple, list[int]] = {}
    for number, request in enumerate(requests):
        kinds.setdefault(request.kind, []).append(number)
    return [numbers[i:i + size] for numbers in kinds.values() for i in range(0, len(numbers), size)]


def draw_and_save(system: TextToImage, requests: list[Request], sources: Sources, shared: dict, out: Path,
                  options: argparse.Namespace, gate: Gate) -> torch.Tensor | None:
    """Draw every request that may be drawn and write its files; the first SHOWN pictures, uint8 (B, 3, H, W), grey ones
    in the place of those that were refused, or None when all were."""
    allowed = [number for number in range(len(requests)) if gate.asked[number].action != "block"]
    parts = [[allowed[k] for k in part] for part in batches([requests[k] for k in allowed],
                                                            1 if options.exact else options.batch)]
    alone = sources.refinements is not None  # inversion has no batches
    steps = [len(times_of(system, requests[part[0]], sources)) * (len(part) if alone else 1) for part in parts]
    kept: dict[int, torch.Tensor] = {}
    with tqdm(total=sum(steps), desc=f"{len(requests)} pictures", unit="step") as bar:
        def progress(times: list) -> Iterable:
            for time in times:
                yield time
                bar.update()

        for part in parts:
            trace: list[torch.Tensor] | None = [] if options.frames else None
            maps = AttentionMaps(len(part)) if options.attention else None
            latents = drawn_latents(system, [requests[k] for k in part], sources, progress, trace, maps)
            if sources.refinements is not None and sources.image is not None:
                for latent in latents.split(1):
                    bar.write(reconstruction_error(system, latent, sources.image), file=sys.stdout)
            images = pictures(system, latents, sources)
            decisions = gate.judged(images, latents, requests, part)
            for place, (number, image, (decision, stage)) in enumerate(zip(part, images, decisions)):
                request = requests[number]
                if decision.action == "block":
                    gate.refuse(number, request, decision, stage)
                    continue
                path = out / file_name(number, request.prompt, request.seed)
                made = {"moderation": decision.action} if decision.action != "allow" else {}
                settings = None if options.no_metadata else {**settings_of(request), **shared, **made}
                image = softened(image, decision)
                save_bytes(png_bytes(image, settings), path)
                gate.results.add(number, request, decision, stage, path)
                kept[number] = image
                if trace and decision.action != "blur":
                    frames, labels = frames_of(system, trace, place, options.frames, sources)
                    if gate.may_show(frames, number, request):
                        save_frames(frames, labels, path)
                if maps and decision.action != "blur":
                    save_attention(system, request, maps, place, image, path)
            for number in [k for k in kept if k >= SHOWN and not options.xy]:
                del kept[number]
    return overview_of(kept, len(requests) if options.xy else min(SHOWN, len(requests)))


def overview_of(kept: dict[int, torch.Tensor], count: int) -> torch.Tensor | None:
    """Pictures uint8 (B, 3, H, W) by number, grey ones for those that are not there; None when none is."""
    if not kept:
        return None
    blank = grey(next(iter(kept.values())))
    return torch.stack([kept.get(number, blank) for number in range(count)])


def sample(options: argparse.Namespace) -> int:
    """Draw what is asked for, as files; 5 when all of it was refused, else 0."""
    prompts = read_prompts(options)
    if options.invert and options.refinements is None:
        options.refinements = REFINEMENTS
    sources = sources_of(options)
    system, source = load_system(options)
    requests = requests_of(options, prompts, system.config.sampling)
    check(system, requests, sources)
    moderation = moderation_of(options, source)
    warn_of_long_prompts(system, requests)
    folder = Path("runs") / source.stem if options.pretrained else source
    out = Path(options.out) if options.out else folder / "samples" / "out"
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} cannot be written to")
    shared = shared_settings(system, source, options)
    with (exact_arithmetic(torch.get_num_threads()) if options.exact else contextlib.nullcontext(),
          Gate(moderation, system, requests, sources, out) as gate):
        images = draw_and_save(system, requests, sources, shared, out, options, gate)
    if images is None:
        print(f"nothing was drawn: all of {len(requests)} refused; see {gate.results.path}", file=sys.stderr)
        return REFUSED
    given = None if sources.image is None else softened(sources.image, gate.given)
    overview = save_overview(images, requests, options.xy, source.name, out, gate.refused, given)
    refused = f" ({gate.results.refused} refused, see {gate.results.path.name})" if gate.results.refused else ""
    print(f"{len(requests) - gate.results.refused} pictures and {overview.name} in {out}{refused}")
    return 0


def main(arguments: list[str]) -> int:
    """Sample, or verify; 1 when a verified picture is not equal, 5 when everything was refused."""
    options = parse(arguments)
    if not options.verify:
        return sample(options)
    failed = 0
    for path in options.verify:
        try:
            equal, line = verified(path, options)
        except (ValueError, OSError) as error:
            equal, line = False, f"error: {error}"
        print(line, file=sys.stdout if equal else sys.stderr)
        failed += not equal
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by the keyboard; the pictures written so far are whole") from None
