"""Sample pictures: python sample.py "a small red star" "two blue circles" --run runs/shapes
From published weights: python sample.py "a photo of a horse" --pretrained PATH --steps 30 --size 512

Writes one PNG a picture, with the settings it was made from inside, and a labelled grid.
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch
from PIL import PngImagePlugin
from tqdm import tqdm

from diffusion.samplers import SAMPLERS
from diffusion.sampling import SamplingConfig, check_sampling
from eval.grid import save_grid, to_picture
from pipeline import TextToImage, with_options
from training.checkpoint import file_hash, whole_file
from training.config import to_dict
from training.device import default_device

LARGEST = 100_000  # pictures of one call


def read_prompts(given: list[str], path: str | None) -> list[str]:
    """Prompts of the command line, then those of a text file, one a line; raises ValueError when there are none."""
    prompts = list(given)
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not a text file in UTF-8") from None
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{path} holds no prompt; valid: a text file with one prompt a line")
    if not prompts:
        raise ValueError("no prompt; valid: python sample.py \"a small red star\", or --prompts FILE")
    return prompts


def check_text(prompts: list[str]) -> None:
    """Raise ValueError for a prompt that is not text: Python hands over stray bytes as surrogates."""
    for prompt in prompts:
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in prompt):
            raise ValueError(f"prompt {prompt!a} is not text in UTF-8")


def file_name(number: int, prompt: str, seed: int) -> str:
    """00012_a-small-red-star_seed7.png"""
    words = re.sub(r"[^\w]+", "-", prompt.lower(), flags=re.ASCII).strip("-")[:40].rstrip("-")
    return f"{number:05d}_{words or 'empty'}_seed{seed}.png"


def save_png(image, path: Path, settings: dict) -> None:
    """Write uint8 (3, H, W) as a PNG, ``settings`` as JSON in its text field "parameters". Same input, same bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", json.dumps(settings, ensure_ascii=False, sort_keys=True))
    with whole_file(path) as temporary:
        to_picture(image).save(temporary, format="PNG", pnginfo=info)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the program with one line for a bad number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="*", help="one or more prompts")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    parser.add_argument("--run", default="runs/shapes", metavar="DIR", help="run folder (%(default)s)")
    parser.add_argument("--pretrained", metavar="PATH", help="a published Stable Diffusion 1.x or 2.x instead of a "
                        "run: a diffusers folder, or a single .safetensors or .ckpt file")
    parser.add_argument("--tokenizer", metavar="DIR", help="vocab.json and merges.txt for a single file (tokenizer/ "
                        "beside it)")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), help="what a single file of 2.x predicts, "
                        "which it does not say")
    parser.add_argument("--size", metavar="N or HxW", help="pixels of a picture (what the model was trained at)")
    parser.add_argument("--tiled", action="store_true", help="decode in tiles: less memory, approximate")
    parser.add_argument("--out", metavar="DIR", help="where the pictures go (samples/out in the run folder)")
    parser.add_argument("--n", type=int, default=1, help="pictures a prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture, the next has the next (0)")
    parser.add_argument("--steps", type=int, help="sampler steps")
    parser.add_argument("--sampler", help=", ".join(SAMPLERS))
    parser.add_argument("--guidance", type=float, metavar="W", help="guidance scale; 1 is off")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what guidance pushes away from")
    parser.add_argument("--batch", type=int, help="pictures computed at a time (64, with --pretrained 1)")
    options = parser.parse_args(arguments)
    if options.batch is None:
        options.batch = 1 if options.pretrained else 64
    for name in ("n", "batch"):
        if not 1 <= getattr(options, name) <= LARGEST:
            raise ValueError(f"--{name} {getattr(options, name)}; valid: 1 to {LARGEST}")
    if not 0 <= options.seed < 2**62:
        raise ValueError(f"--seed {options.seed}; valid: 0 to 2^62 - 1")
    return options


def load_system(options: argparse.Namespace) -> tuple[TextToImage, Path]:
    """The system that is asked for, drawing at the size asked for, and the folder or file that it is in."""
    if options.pretrained:
        source = Path(options.pretrained)
        system = TextToImage.from_pretrained(source, default_device(), options.tokenizer, options.prediction)
    else:
        source = Path(options.run)
        system = TextToImage.load(source, default_device())
    if options.size is not None:
        if not (size := re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", options.size)):
            raise ValueError(f"--size {options.size}; valid: N, or HxW, in pixels")
        system.set_size(int(size[1]), int(size[2] or size[1]))
    system.tiled = options.tiled
    return system, source


def warn_of_cut(system: TextToImage, prompts: list[str]) -> None:
    """Say which prompts are longer than the text encoder reads, and what is lost of them."""
    for prompt in prompts:
        if lost := system.tokenizer.lost(prompt):
            print(f"warning: the prompt is cut after {system.tokenizer.length - 2} tokens; not read: \"{lost}\"",
                  file=sys.stderr)


def settings_of(config: SamplingConfig, system: TextToImage, source: Path, options: argparse.Namespace) -> dict:
    """What every picture of this call shares: all that is needed to make it again."""
    weights = {name: file_hash(path)[:16] for name, path in system.files.items()}
    asked = {"size": options.size} if options.size else {}
    asked |= {"tiled": True} if options.tiled else {}
    return {"pretrained" if options.pretrained else "run": source.name, "negative": options.negative, **asked,
            **to_dict(config), "weights": weights}


def main(arguments: list[str]) -> None:
    """Sample every prompt ``--n`` times."""
    options = parse(arguments)
    prompts = [prompt for prompt in read_prompts(options.prompt, options.prompts) for _ in range(options.n)]
    if len(prompts) > LARGEST:
        raise ValueError(f"{len(prompts)} pictures asked for; valid: up to {LARGEST} a call")
    seeds = list(range(options.seed, options.seed + len(prompts)))
    check_text([*prompts, options.negative])
    system, source = load_system(options)
    config = with_options(system.experiment.sampling, options.sampler, options.steps, options.guidance)
    check_sampling(system.schedule, system.experiment.denoiser.prediction_type, config)
    warn_of_cut(system, [*dict.fromkeys(prompts), options.negative])
    shared = settings_of(config, system, source, options)
    folder = Path("runs") / source.stem if options.pretrained else source
    out = Path(options.out) if options.out else folder / "samples" / "out"
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} cannot be written to")

    kept: list[torch.Tensor] = []
    steps_a_batch = len(system.schedule.timesteps(config.steps, config.spacing, config.offset))
    starts = range(0, len(prompts), options.batch)
    with tqdm(total=len(starts) * steps_a_batch, desc=f"{len(prompts)} pictures", unit="step") as bar:
        def progress(times: list):
            for time in times:
                yield time
                bar.update()

        for start in starts:
            part = slice(start, start + options.batch)
            images = system.images(prompts[part], seeds[part], config, options.negative, progress)
            for number, (image, prompt, seed) in enumerate(zip(images, prompts[part], seeds[part]), start):
                save_png(image, out / file_name(number, prompt, seed), {"prompt": prompt, "seed": seed, **shared})
            kept += list(images[: max(0, 256 - len(kept))])  # a grid of thousands is no picture to look at
    labels = [f"{prompt} · {seed}" for prompt, seed in zip(prompts, seeds)][: len(kept)]
    save_grid(torch.stack(kept), out / "grid.png", labels, columns=min(8, len(kept)),
              title=f"{source.name}: {config.sampler}, {config.steps} steps, guidance {config.guidance.scale:g}")
    print(f"{len(prompts)} pictures and grid.png in {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by the keyboard; the pictures written so far are whole") from None
