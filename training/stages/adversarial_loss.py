"""The adversarial term of the autoencoder's loss: a patch discriminator and what both sides minimise.

Esser et al. 2021 (VQGAN), section 3.1; Rombach et al. 2022, appendix G. Axis letters: B batch, H W size, h w places.
"""
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F

from model.device import place_on
from model.discriminator import DiscriminatorConfig, PatchDiscriminator

DELTA = 1e-6  # beside the norm of the generator's gradient, as in the paper; the published code has 1e-4
LARGEST = 1e4  # adaptive weight, as in the published code


@dataclass(frozen=True)
class AdversarialConfig:
    """``weight`` 0 switches the term off. Before step ``start`` nothing is judged, because a discriminator learns
    nothing useful from grey images. ``loss`` is the objective of the discriminator, whose Adam has a constant learning
    rate."""

    weight: float = 0.0
    start: int = 1000
    loss: Literal["hinge", "vanilla"] = "hinge"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    model: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self):
        for name in ("weight", "start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from 0 up")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate: {self.learning_rate}; valid: above 0 and below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas}; valid: two numbers in [0, 1)")


def discriminator_loss(real: torch.Tensor, decoded: torch.Tensor, kind: str) -> torch.Tensor:
    """The loss of the discriminator, a scalar, from logits (B, 1, h, w) of real and of decoded images; least if real >
    0 > decoded."""
    if kind == "hinge":  # Lim and Ye 2017: content once the margin of 1 is kept
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + decoded).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(decoded).mean())  # Goodfellow et al. 2014: -log sigmoid


def adaptive_weight(reconstruction: torch.Tensor, generator: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """lambda, with which the gradient of the generator's loss at the decoder's last filters is as large as that of the
    reconstruction.

    ``reconstruction`` and ``generator`` are losses that depend on ``last``; a scalar in [0, 1e4] without gradient.
    """
    # Esser et al. 2021, equation 7: |grad L_rec| / (|grad L_GAN| + delta), both at the last layer of the decoder
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].float().norm()
             for loss in (reconstruction, generator)]
    return (norms[0] / (norms[1] + DELTA)).clamp(0, LARGEST).detach()


class Adversary:
    """A discriminator and its optimizer; their state belongs in the checkpoints of the stage."""

    def __init__(self, config: AdversarialConfig, device: torch.device):
        self.config = config
        self.discriminator = place_on(PatchDiscriminator(config.model), device).train()
        weights = self.discriminator.parameters()
        self.optimizer = torch.optim.Adam(weights, config.learning_rate, config.betas, fused=True)

    @property
    def name(self) -> str:
        """A line for the manifest."""
        c = self.config
        return f"{c.loss}, weight {c.weight:g} times the adaptive one, from step {c.start}, {c.model.layers} layers"

    def learn(self, images: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Take one step of the discriminator on images (B, 3, H, W) and their reconstructions; returns its loss, a
        scalar."""
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(images), self.discriminator(decoded.detach())  # (B, 1, h, w)
        loss = discriminator_loss(real.float(), fake.float(), self.config.loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # or the rest of this step would use bf16 copies of the former weights
        return loss.detach()

    def generator_loss(self, decoded: torch.Tensor) -> torch.Tensor:
        """-mean logit of the reconstructions (B, 3, H, W), a scalar; no gradient reaches the discriminator."""
        self.discriminator.requires_grad_(False)
        return -self.discriminator(decoded).float().mean()

    def terms(self, images: torch.Tensor, decoded: torch.Tensor, reconstruction: torch.Tensor, last: torch.Tensor,
              step: int) -> dict[str, torch.Tensor]:
        """The term that training step ``step`` adds to the loss, as ``adversarial``, and the scalars that are logged
        beside it.

        The discriminator first learns from the images of this step and then judges them (Goodfellow et al. 2014,
        algorithm 1). ``last`` holds the last filters of the decoder; ``reconstruction`` is the loss without KL.
        """
        if step < self.config.start:
            zero = torch.zeros((), device=images.device)
            return {"adversarial": zero, "discriminator": zero, "adaptive_weight": zero}
        learnt = self.learn(images, decoded)
        generator = self.generator_loss(decoded)
        weight = self.config.weight * adaptive_weight(reconstruction, generator, last)
        return {"adversarial": weight * generator, "discriminator": learnt, "adaptive_weight": weight}

    def state_dict(self) -> dict[str, Any]:
        """All state that `terms` depends on."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
