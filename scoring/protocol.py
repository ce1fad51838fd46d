"""The protocol of a measurement: everything that its figures depend on, and what must agree for two to be compared."""
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from data.catalog import build_source, data_key
from files.run_folder import environment
from scoring.held_out import Prompts
from scoring.judges import Comparison
from scoring.samples import Samples, SampleStore
from scoring.settings import EvaluationSettings
from training.experiment import Experiment

MOST_SEARCHED = 20_000  # training images among which copies are searched, at most


def hash_of_text(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_of_data(experiment: Experiment) -> str:
    """A hash of all settings that the images of the source depend on."""
    return hash_of_text(json.dumps(data_key(experiment.data), sort_keys=True))


def hash_of_images(images: Sequence[torch.Tensor]) -> str:
    """A hash of the pixels of images, uint8 (3, H, W) each. It also changes with the code that renders them."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.numpy().tobytes())
    return digest.hexdigest()[:16]


def num_searched(experiment: Experiment) -> int:
    """The number of training images among which copies are searched: all that the denoiser has seen, up to 20,000."""
    count = len(build_source(experiment.data, "train"))
    return min(experiment.denoiser.images or count, count, MOST_SEARCHED)


def comparable_protocol(settings: EvaluationSettings, experiment: Experiment, test: Prompts,
                        comparison: Comparison | None) -> dict[str, Any]:
    """The entries that are known before anything is sampled; figures are compared only where they agree.

    ``comparison`` is what the full suite compares samples with, None for the quick suite.
    """
    protocol: dict[str, Any] = {
        "suite": settings.suite, "data": hash_of_data(experiment), "prompts": len(test),
        "prompts_sha256": hash_of_text("\n".join(test.captions)), "images_sha256": hash_of_images(test.images),
        "seeds": "the number of the item in its split"}
    if comparison is not None:
        clip, reference = comparison.judges.clip, comparison.reference
        protocol |= {"reference": f"{reference.about} (of {reference.data})",
                     "features": comparison.judges.features.stamp, "clip": clip.stamp if clip else None,
                     "copies_searched": comparison.num_training,
                     "neighbours": "3 for precision, recall, density, coverage"}
    return protocol


def sampling_protocol(settings: EvaluationSettings, samples: Samples, store: SampleStore) -> dict[str, Any]:
    """The other entries: how the samples were drawn, and by what."""
    config, here = samples.config, environment()
    return {"sampler": config.sampler, "steps": config.steps, "guidance": config.guidance.scale,
            "validation": len(samples.validation), "precision": settings.precision,
            "image": "x".join(map(str, samples.images.shape[2:])), "weights": store.weights,
            "samples_drawn_by": "; ".join(store.makers) or "not recorded", "revision": here["revision"],
            "device": here["device"], "torch": here["versions"]["torch"], "command": here["command"]}
