"""Teaching a published checkpoint: the same stages on a folder that diffusers wrote."""
import json
from pathlib import Path

import pytest
from test_personal import TRAIN, run_of, write_images
from test_pretrained import KINDS, published

import sample
from pipeline.loading import load_pretrained

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage, left, settings", [
    ("lora", "adapter.safetensors", {"adapter": {"rank": 2, "text_encoder": True}, "prior": {"prompts": ["a star"],
                                                                                             "images": 2}}),
    ("textual_inversion", "embedding.safetensors", {"tokens": [{"token": "<cat>", "vectors": 2, "init": "star"}],
                                                    "captions": ["a <cat>"]}),
    ("dreambooth", "dreambooth.json", {})])
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage(kind, stage, left, settings, tmp_path):
    published(tmp_path, kind)
    pipeline, images = tmp_path / "pipeline", write_images(tmp_path / "images", 3)
    data = {"source": "folder", "folder": {"root": str(images), "size": 16}}
    config = {"name": "few", "stages": [stage], "data": data,
              stage: {"pretrained": str(pipeline), "train": TRAIN, **settings}}
    run = run_of(tmp_path / "few", config)
    assert (run / left).is_file() and json.loads((run / "manifest.json").read_text())[stage]["images"] == 3
    flags = {"lora": ["--pretrained", str(pipeline), "--adapter", f"{run}:0.5"],
             "textual_inversion": ["--pretrained", str(pipeline), "--embedding", str(run)],
             "dreambooth": ["--pretrained", str(run / "pretrained")]}[stage]
    assert sample.main(["a <cat> star", "--steps", "2", "--out", str(tmp_path / "out"), *flags]) == 0
    (image,) = Path(tmp_path / "out").glob("0*.png")
    assert sample.main(["--verify", str(image), *flags]) == 0
    if stage == "dreambooth":
        system = load_pretrained(run / "pretrained")
        assert list(system.moderation.learned) == [] and (run / "pretrained" / "dreambooth.json").is_file()
