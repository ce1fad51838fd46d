"""Networks away from their initial weights, the same in every run."""

import torch


def randomize(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter away from its initial value, norms and zeroed layers too, at a sane size; returns the network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return network
