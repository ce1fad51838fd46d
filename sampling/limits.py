"""The limits of a call of `sample.py`, and its defaults."""

from pathlib import Path

RUN = "runs/shapes"  # the demo's, which samples where no run is named
SHIPPED = Path(__file__).parents[1] / "weights" / "emoji-64"  # samples where there is no demo either
LARGEST = 100_000  # images of one call, unless it is a bulk call
SHARD = 1000  # requests of a bulk call that are drawn, written and continued together
STRENGTH = 0.6  # of image to image; inpainting begins from noise
CHUNKS, MOST_CHUNKS = 4, 64  # contexts that a prompt may fill by default, and at most
REFINEMENTS, MOST_REFINEMENTS = 3, 100  # repeats of each step of an inversion, by default and at most
MOST_MIXED = 4  # further prompts of an image, as styles with a strength are
PALETTE_WEIGHT, HEAVIEST_PALETTE = 0.3, 10.0  # of steering samples to a palette: the default, and the most
LAST_SEED = 2**32 - 1  # that of diffusion/noise.py
