"""Reads tensors and JSON from files of others. Nothing in them is executed: pickles are read with `weights_only`."""

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)
Kind = Literal["diffusers", "clip", "single file"]

SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")  # in this order
LAYOUTS = ("a diffusers folder (unet/, vae/, text_encoder/, tokenizer/, scheduler/), a transformers CLIP folder, or a "
           "single file of Stable Diffusion 1.x or 2.x (.safetensors, .ckpt)")


def kind_of(path: str | Path) -> Kind:
    """The kind of checkpoint at `path`; raises FileNotFoundError or ValueError if there is none."""
    path = Path(path)
    if path.is_file():
        if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
            return "single file"
        raise ValueError(f"{path} is no checkpoint; valid: {LAYOUTS}")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; valid: {LAYOUTS}")
    if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
        return "diffusers"
    if (path / "config.json").is_file() and read_json(path / "config.json").get("model_type") == "clip":
        return "clip"
    raise ValueError(f"{path} is no checkpoint; valid: {LAYOUTS}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises FileNotFoundError or ValueError naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def weight_files(folder: Path, *stems: str) -> list[Path]:
    """The files that hold the weights of a network: STEM.safetensors, its shards by STEM.safetensors.index.json, or the
    same as .bin. Raises FileNotFoundError if there is none, and ValueError for shards outside the folder."""
    for suffix in SUFFIXES:
        for stem in stems:
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                return [path]
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return shards(index)
    raise FileNotFoundError(f"{folder} holds no weights; valid: {', '.join(f'{stem}.safetensors' for stem in stems)}, "
                            "its shards, or .bin")


def shards(index: Path) -> list[Path]:
    """The files that an index names, each once."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}; valid: files beside it")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} is missing, {index.name} names it")
    return [index.parent / name for name in names]


def read_tensors(*paths: Path) -> dict[str, Tensor]:
    """The tensors of all files together; raises ValueError naming a file that is damaged or holds anything else."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        part = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        if twice := tensors.keys() & part.keys():
            raise ValueError(f"{path} repeats tensors of another file: {', '.join(sorted(twice))}")
        tensors.update(part)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a .bin or .ckpt, below its `state_dict` if it has one; other values beside them are ignored."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what it will not or cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors, which is not executed: {reason}") from None
    data = data.get("state_dict", data) if isinstance(data, dict) else None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no table of tensors")
    return {str(name): value for name, value in data.items() if isinstance(value, Tensor)}


def network_from_state(network: type[N], config: object, state: dict[str, Tensor]) -> N:
    """`network(config)` with the weights of `state` in fp32, in evaluation mode; nothing is allocated twice."""
    with torch.device("meta"):
        module = network(config)  # type: ignore[call-arg]
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return module.eval()
