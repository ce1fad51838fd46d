"""The configuration of a text-to-image system: all that sampling needs, read from a run folder or a published
checkpoint."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.catalog import DataConfig
from diffusion.guidance_free import Scales
from diffusion.prediction import PredictionType
from diffusion.sampling import SamplingConfig
from diffusion.schedule import ScheduleConfig
from files.config import from_dict, read_yaml
from model.autoencoder import AutoencoderConfig
from model.text_encoder import TextEncoderConfig
from model.tiny_decoder import TinyDecoderConfig
from model.unet import UNetConfig

STUDENT = "student"  # the stage that trains the denoiser of few steps


def read_tiny_decoder_config(path: str | Path) -> TinyDecoderConfig:
    """The shape of the tiny decoder of a run. Raises ConfigError naming the key of an invalid value."""
    return from_dict(TinyDecoderConfig, _section(read_yaml(path), "tiny_decoder", "model"), "tiny_decoder.model")


@dataclass(frozen=True)
class Folded:
    """The key of a stage that says which guidance scales are folded into its denoiser."""

    guidance_scales: Scales | None = None


@dataclass(frozen=True)
class SystemConfig:
    """The networks, the diffusion process and the default sampling settings; nothing about training.

    ``latent_shape`` is (C, H, W) of the latent of one image of the default size. ``scales`` are the lowest and the
    highest guidance scale that are folded into the denoiser, which is then called once a step; None: guidance is made
    of two predictions.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction_type: PredictionType = "v_prediction"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    latent_shape: tuple[int, int, int] = (4, 64, 64)
    scales: Scales | None = None


def latent_shape_of(autoencoder: AutoencoderConfig, size: int) -> tuple[int, int, int]:
    """(C, H, W) of the latent of a square image with sides of ``size`` pixels."""
    side = size // autoencoder.factor
    return autoencoder.latent_channels, side, side


def read_system_config(path: str | Path) -> SystemConfig:
    """The system described by the config.yaml of a run; keys that concern only training are not read.

    Raises ConfigError naming the key of an invalid value.
    """
    data = read_yaml(path)
    stage = _section(data, "denoiser")
    autoencoder = from_dict(AutoencoderConfig, _section(data, "autoencoder", "model"), "autoencoder.model")
    parts: tuple[tuple[str, type], ...] = (
        ("unet", UNetConfig), ("text_encoder", TextEncoderConfig), ("schedule", ScheduleConfig))
    given: dict[str, Any] = {name: from_dict(cls, stage[name], f"denoiser.{name}") for name, cls in parts
                             if name in stage}
    name = STUDENT if STUDENT in (data.get("stages") or ()) else "denoiser"
    folded = {key: value for key, value in _section(data, name).items() if key == "guidance_scales"}
    given["scales"] = from_dict(Folded, folded, name).guidance_scales
    if "prediction_type" in stage:
        given["prediction_type"] = stage["prediction_type"]
    if "sampling" in data:
        given["sampling"] = from_dict(SamplingConfig, data["sampling"], "sampling")
    return SystemConfig(autoencoder=autoencoder, latent_shape=latent_shape_of(autoencoder, read_data_config(path).size),
                        **given)


def read_data_config(path: str | Path) -> DataConfig:
    """The data section of the config.yaml of a run. Raises ConfigError naming the key of an invalid value."""
    return from_dict(DataConfig, _section(read_yaml(path), "data"), "data")


def _section(data: dict[str, Any], *names: str) -> dict[str, Any]:
    """The mapping below these keys; empty if the file does not have it."""
    for name in names:
        data = data.get(name) or {}
    return data
