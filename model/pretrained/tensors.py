"""Reads tensors and JSON from files of others. Nothing in them is executed: pickles are read with `weights_only`."""

import json
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)
Kind = Literal["diffusers", "clip", "single file"]

ROUNDED = ("fp16", "bf16")  # variants that hold the same weights with fewer digits; the first is taken
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


def weight_files(folder: Path, *stems: str, variant: str | None = None) -> list[Path]:
    """The files that hold the weights of a network: STEM.safetensors, its shards by STEM.safetensors.index.json, or the
    same as .bin; of a variant STEM.VARIANT.safetensors or STEM.safetensors.index.VARIANT.json.

    Without the variant that is asked for the plain weights are read, as in diffusers, and without plain ones "fp16",
    "bf16" or the only variant that there is. Raises FileNotFoundError that lists what lies there if nothing fits, and
    ValueError for shards outside the folder.
    """
    found = weights_in(folder, stems)
    order = [variant or "", "", *ROUNDED, *(found if len(found) == 1 else ())]
    chosen = next((found[name] for name in order if name in found), None)
    if chosen is not None:
        return shards(chosen) if chosen.suffix == ".json" else [chosen]
    if found:
        raise FileNotFoundError(f"{folder} holds only variants of the weights: {', '.join(sorted(found))}; valid: one "
                                "of them as --variant")
    names = sorted(map(described, folder.iterdir())) if folder.is_dir() else []
    raise FileNotFoundError(f"{folder} holds no weights; valid: {', '.join(f'{stem}.safetensors' for stem in stems)}, "
                            f"its shards, or .bin; found there: {', '.join(names) or 'nothing'}")


def described(path: Path) -> str:
    """The name of a path, and what it is if it is no file."""
    return path.name if path.is_file() else f"{path.name}/" if path.is_dir() else f"{path.name} (a link to nothing)"


def weights_in(folder: Path, stems: tuple[str, ...]) -> dict[str, Path]:
    """The file, or the index of shards, of each variant in a folder; "" is the plain one. Of both the index counts for
    diffusers and the file for transformers, and .safetensors before .bin."""
    name = rf"(?P<stem>{'|'.join(map(re.escape, stems))})"
    kinds = (rf"{name}(\.(?P<variant>[\w-]+))?\.(?P<kind>safetensors|bin)",
             rf"{name}\.(?P<kind>safetensors|bin)\.index(\.(?P<variant>[\w-]+))?\.json",
             rf"{name}\.(?P<kind>safetensors|bin)\.(?P<variant>[\w-]+)\.index\.json")  # as older versions wrote it
    ranked = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_file() or re.search(r"-\d{5}-of-\d{5}\b", path.name):  # a shard is found through its index
            continue
        for match in filter(None, (re.fullmatch(kind, path.name) for kind in kinds)):
            sharded = path.suffix == ".json"
            rank = (match["kind"] == "bin", sharded != (match["stem"] == "diffusion_pytorch_model"),
                    stems.index(match["stem"]), path.name)
            ranked.append((rank, match["variant"] or "", path))
    return {variant: path for _, variant, path in sorted(ranked, reverse=True)}  # the first of each is set last


def metadata_of(path: Path) -> dict[str, str]:
    """What a .safetensors file says about itself; nothing for other files and where it says nothing."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


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
    except (SafetensorError, OSError) as error:
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
