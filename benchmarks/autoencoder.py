"""A training step of the autoencoder, of this code against another revision, in turns: images a second, and losses.

    python -m benchmarks.autoencoder --against ../before

As `python -m benchmarks.training`, for the stage before.
"""
from benchmarks.stages import main

if __name__ == "__main__":
    main("autoencoder", description=__doc__)
