"""The image of docs/pretrained.md: a small random pipeline, drawn here and by diffusers, and what differs.

    python -m benchmarks.figures.pretrained VOCABULARY [--out docs/images/pretrained.png]

VOCABULARY is a folder with vocab.json and merges.txt of CLIP's tokenizer, in any size. Needs diffusers and
transformers; half a minute on one core.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion.noise import PerImageNoise
from pipeline.loading import load_pretrained
from pipeline.system import with_options

PROMPTS = ["a small red star", "two blue circles", "the astronaut's horse", "an oil painting, 4k"]
SIZE, STEPS, SCALE, ZOOM, GAP = 48, 10, 5.0, 3, 6


def small_pipeline(vocabulary: str) -> Any:
    """A pipeline of diffusers in the manner of SD-1.x, with random weights."""
    import diffusers  # here: importing it changes the filters of warnings
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=(32, 64), cross_attention_dim=64, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 3)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    with torch.no_grad():
        for network in (text, unet, vae):
            for parameter in network.parameters():
                if parameter.ndim > 1:  # of a size that keeps activations at theirs
                    parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    return diffusers.StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                                             requires_safety_checker=False)


def images_of_both(vocabulary: str) -> tuple[np.ndarray, np.ndarray]:
    """The images (B, H, W, 3) of here and of diffusers in 0 .. 255 before rounding, from the same first noise."""
    pipeline = small_pipeline(vocabulary)
    pipeline.set_progress_bar_config(disable=True)
    seeds = list(range(len(PROMPTS)))
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        system = load_pretrained(folder)
        config = with_options(system.config.sampling, steps=STEPS, scale=SCALE)
        with torch.inference_mode():
            ours = (system.decode(system.latents(PROMPTS, seeds, config)).clamp(-1, 1) + 1) * 127.5  # (B, 3, H, W)
    noise = PerImageNoise(seeds, (4, SIZE // 4, SIZE // 4))()
    theirs = pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=SCALE, latents=noise, height=SIZE, width=SIZE,
                      output_type="np").images
    return ours.permute(0, 2, 3, 1).numpy(), 255 * theirs


def main() -> None:
    """Write the image: a row each of ours, theirs and 255 times the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", help="folder of vocab.json and merges.txt")
    parser.add_argument("--out", default="docs/images/pretrained.png")
    options = parser.parse_args()
    ours, theirs = images_of_both(options.vocabulary)
    difference = np.abs(ours - theirs)
    print(f"largest difference {difference.max():.5f} of 255; standard deviation of the images {theirs.std():.1f}")
    step = SIZE * ZOOM + GAP
    sheet = Image.new("RGB", (len(PROMPTS) * step - GAP, 3 * step - GAP), "white")
    for row, images in enumerate((ours, theirs, (255 * difference).clip(0, 255))):
        for column, image in enumerate(images):
            tile = Image.fromarray(image.round().astype(np.uint8)).resize((SIZE * ZOOM, SIZE * ZOOM), Image.NEAREST)
            sheet.paste(tile, (column * step, row * step))
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
