"""A training step of the denoiser, of this code against another revision, in turns: images a second, and losses.

    python -m benchmarks.training --against ../before
    python -m benchmarks.training --config configs/emoji.yaml --rounds 20 denoiser.train.compile=true

Each side is the real command in a process of its own that takes one step at a time, with the same data, seeds and
weights; overrides are for this code only. Beside the table: where the milliseconds go, and the validation loss of both
after the same images.
"""
from benchmarks.stages import main

if __name__ == "__main__":
    main("denoiser", description=__doc__)
