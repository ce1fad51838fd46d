"""From prompts to images: the system of a run folder or of a published checkpoint, put together.

    from pipeline import load_run
    images = load_run("runs/shapes").images(["a small red star"], seeds=[0])      # uint8 (1, 3, H, W)
"""
from pipeline.config import SystemConfig
from pipeline.loading import load_pretrained, load_run, load_weaker
from pipeline.system import TextToImage, with_options

__all__ = ["SystemConfig", "TextToImage", "load_pretrained", "load_run", "load_weaker", "with_options"]
