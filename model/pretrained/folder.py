"""Reads networks from folders in the layouts of diffusers and transformers, and writes diffusers folders.

A diffusers folder has one folder for each part: unet/, vae/ and text_encoder/ hold a config.json and weights,
scheduler/ holds one JSON file, and tokenizer/ the vocabulary. Networks are read and written here. The contents of
scheduler/ and tokenizer/ are passed on, because neither is a network.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from files.config import from_dict, to_dict
from model.autoencoder import Autoencoder, AutoencoderConfig
from model.clip import Clip
from model.pretrained.config import (
    autoencoder_config,
    autoencoder_json,
    clip_config,
    latent_scale_of,
    text_encoder_config,
    text_encoder_json,
    unet_config,
    unet_json,
)
from model.pretrained.names import (
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    clip_from_transformers,
    text_encoder_from_transformers,
    text_encoder_to_transformers,
    unet_from_diffusers,
    unet_to_diffusers,
    with_one_scale,
)
from model.pretrained.tensors import network_from_state, read_json, read_tensors, weight_files, weights_in
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig

T = TypeVar("T")
PIPELINES = ("StableDiffusionPipeline",)
STEMS = {"unet": ("diffusion_pytorch_model",), "vae": ("diffusion_pytorch_model",),
         "text_encoder": ("model", "pytorch_model")}


@dataclass(frozen=True)
class Published:
    """A published text-to-image system.

    scheduler: its scheduler_config.json. tokenizer: the folder of its vocabulary, None if the file has none.
    latent_size: (h, w) it was trained at. files: the weight files of each part.
    """

    unet: UNet
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    scheduler: Mapping[str, Any]
    tokenizer: Path | None
    latent_size: tuple[int, int]
    files: Mapping[str, tuple[Path, ...]]


def check_parts(unet: UNetConfig, autoencoder: AutoencoderConfig, text_encoder: TextEncoderConfig) -> None:
    """Raises ValueError unless the UNet fits the latents of the autoencoder and the states of the text encoder."""
    for key in ("in_channels", "out_channels"):
        if getattr(unet, key) != autoencoder.latent_channels:  # 9 in: for inpainting, sees a mask and an image as well
            raise ValueError(f"unet: {key} {getattr(unet, key)} is not supported; valid: {autoencoder.latent_channels},"
                             " the channels of the latents")
    if unet.context_width != text_encoder.width:
        raise ValueError(f"unet: cross_attention_dim {unet.context_width} is not supported; valid: "
                         f"{text_encoder.width}, the width of the text encoder")


def read_diffusers_folder(path: str | Path, variant: str | None = None) -> Published:
    """The system in a folder that diffusers wrote. variant: "fp16" and the like, of the weights that there are twice;
    parts that have no such variant are read in full.

    Raises FileNotFoundError for a missing file, and ValueError naming what is damaged, which setting these networks
    do not support, and every tensor that is missing, unexpected or of another shape.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        name = read_json(path / "model_index.json").get("_class_name")
        if name not in PIPELINES:
            raise ValueError(f"{path / 'model_index.json'}: _class_name {name!r} is not supported; valid: "
                             f"{' or '.join(PIPELINES)}")
    if variant is not None:
        check_variant(path, variant)
    files = {part: weight_files(path / part, *stems, variant=variant) for part, stems in STEMS.items()}
    unet_data, unet_shape = read_config(path / "unet", unet_config)
    vae_data, vae_shape = read_config(path / "vae", autoencoder_config)
    _, text_shape = read_config(path / "text_encoder", text_encoder_config)
    check_parts(unet_shape, vae_shape, text_shape)
    mean, std = latent_scale_of(vae_data, str(path / "vae"))
    unet = read_weights(files["unet"], lambda state: unet_from_diffusers(state, unet_shape))
    vae = read_weights(files["vae"], lambda state: autoencoder_from_diffusers(state, vae_shape, std, mean))
    text = read_weights(files["text_encoder"], lambda state: text_encoder_from_transformers(state, text_shape))
    size = unet_data.get("sample_size") or 64
    return Published(
        unet=network_from_state(UNet, unet_shape, unet),
        autoencoder=network_from_state(Autoencoder, vae_shape, vae),
        text_encoder=network_from_state(TextEncoder, text_shape, text),
        scheduler=read_json(path / "scheduler" / "scheduler_config.json"),
        tokenizer=path / "tokenizer",
        latent_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        files={name: tuple(paths) for name, paths in files.items()},
    )


def check_variant(path: Path, variant: str) -> None:
    """Raises ValueError that lists the variants if no part has this one."""
    found = {name for part, stems in STEMS.items() for name in weights_in(path / part, stems)}
    if variant not in found:
        raise ValueError(f"{path} has no variant {variant!r}; valid: {', '.join(sorted(found - {''})) or 'none'}")


def read_clip_folder(path: str | Path) -> Clip:
    """The `CLIPModel` in a folder that transformers wrote; raises the errors of `read_diffusers_folder`."""
    path = Path(path)
    processor = path / "preprocessor_config.json"
    pixels = read_json(processor) if processor.is_file() else {}
    _, config = read_config(path, lambda data, where: clip_config(data, pixels, where))
    files = weight_files(path, "model", "pytorch_model")
    return network_from_state(Clip, config, read_weights(files, lambda state: clip_from_transformers(state, config)))


def read_config(folder: Path, convert: Callable[[dict[str, Any], str], T]) -> tuple[dict[str, Any], T]:
    """The config.json of a folder, and the result of `convert(data, where)` for it; errors name the file."""
    data = read_json(folder / "config.json")
    try:
        config = convert(data, str(folder / "config.json"))
        from_dict(type(config), to_dict(config), "its network")  # every value has its type
        return data, config
    except (TypeError, AttributeError) as error:  # a number where a list belongs, and the like
        raise ValueError(f"{folder / 'config.json'} has a value of a wrong type: {error}") from None
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(folder)) else f"{folder / 'config.json'}: {text}") from None


def read_weights(files: list[Path], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The result of `convert` for the tensors of `files`; errors name the first file."""
    try:
        return convert(read_tensors(*files))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(files[0].parent)) else f"{files[0]}: {text}") from None


def write_diffusers_folder(
    path: str | Path, unet: UNet, autoencoder: Autoencoder, text_encoder: TextEncoder, scheduler: Mapping[str, Any],
    write_tokenizer: Callable[[Path], tuple[int, int, int]], latent_size: tuple[int, int],
) -> None:
    """Write a folder that `diffusers.StableDiffusionPipeline.from_pretrained` reads; it appears whole or not at all.

    scheduler: the content of scheduler_config.json. write_tokenizer(folder): writes the files of tokenizer/ and
    returns the ids of its start, end and padding tokens. Raises FileExistsError if `path` exists, and ValueError for a
    network that has no counterpart in diffusers.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; valid: a new folder")
    vae = with_one_scale(autoencoder.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        (temporary / "tokenizer").mkdir()
        start, end, pad = write_tokenizer(temporary / "tokenizer")
        write_part(temporary / "unet", "diffusion_pytorch_model", unet_json(unet.config, latent_size),
                   unet_to_diffusers(unet.state_dict(), unet.config))
        write_part(temporary / "vae", "diffusion_pytorch_model",
                   autoencoder_json(autoencoder.config, vae["latent_std"][0].item(),
                                    latent_size[0] * autoencoder.factor),
                   autoencoder_to_diffusers(vae, autoencoder.config))
        write_part(temporary / "text_encoder", "model", text_encoder_json(text_encoder.config, start, end, pad),
                   text_encoder_to_transformers(text_encoder.state_dict(), text_encoder.config))
        (temporary / "scheduler").mkdir()
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        write_json(temporary / "model_index.json", model_index(str(scheduler["_class_name"])))
        temporary.chmod(0o755)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_part(folder: Path, stem: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write config.json and STEM.safetensors of one network."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
              folder / f"{stem}.safetensors", metadata={"format": "pt"})


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_index(scheduler: str) -> dict[str, Any]:
    """The content of model_index.json, which names the class that reads each folder."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
        "safety_checker": [None, None], "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }
