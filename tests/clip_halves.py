"""A small configuration of the clip stage, and pairs that it learns in seconds: images of two colours and their
captions."""
import torch

from data.tokenizer import TokenizerConfig
from model.clip import ClipConfig, ImageEncoderConfig
from model.text_encoder import TextEncoderConfig
from training.loop import TrainConfig
from training.optim import OptimConfig
from training.stages.clip import ClipStage


def config(steps: int = 60) -> ClipStage:
    model = ClipConfig(ImageEncoderConfig(24, 6, width=32, layers=2, heads=2, mlp_width=64),
                       TextEncoderConfig(300, 24, width=32, layers=1, heads=2, mlp_width=64, causal=False), width=32)
    train = TrainConfig(steps=steps, batch=32, log_every=20, validate_every=30, preview_every=60, checkpoint_every=30,
                        optim=OptimConfig(learning_rate=3e-3, warmup=5))
    return ClipStage(model, TokenizerConfig(300, 24), train, validation=9)


COLOURS = {"red": (220, 40, 50), "green": (40, 160, 70), "blue": (40, 80, 210), "yellow": (250, 210, 40),
           "black": (20, 20, 20), "white": (250, 250, 250), "grey": (150, 150, 150), "pink": (250, 130, 190)}


class Halves:
    """Images of two colours side by side; a seventh of the pairs is held out."""

    def __init__(self, held_out: bool):
        pairs = [(a, b) for a in COLOURS for b in COLOURS]
        self.pairs = [pair for i, pair in enumerate(pairs) if (i % 7 == 3) == held_out]

    def __len__(self) -> int:
        return len(self.pairs)

    def captions(self, index: int) -> tuple[str, ...]:
        left, right = self.pairs[index]
        return f"{left} on the left and {right} on the right", f"{right} to the right of {left}"

    def __getitem__(self, index: int) -> dict:
        image = torch.zeros(3, 24, 24, dtype=torch.uint8)
        for part, name in zip((image[:, :, :12], image[:, :, 12:]), self.pairs[index]):
            part[:] = torch.tensor(COLOURS[name], dtype=torch.uint8)[:, None, None]
        captions = self.captions(index)
        return {"image": image, "caption": captions[0], "captions": captions, "id": str(index)}
