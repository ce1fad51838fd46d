"""Loads systems from run folders and published checkpoints, and weaker networks that serve as guides."""
import pickle
from pathlib import Path

import torch

from data.clip_tokenizer import ClipTokenizer
from data.tokenizer import Tokenizer
from diffusion.pretrained import process_of_scheduler
from files.config import ConfigError
from files.run_folder import RunFolder
from files.weights import load_weights
from files.whole import sha256_of
from model.autoencoder import Autoencoder
from model.device import freeze, place_on
from model.pretrained.folder import read_diffusers_folder
from model.pretrained.single_file import read_single_file
from model.pretrained.tensors import kind_of
from model.text_encoder import TextEncoder
from model.tiny_decoder import TinyDecoder
from model.unet import UNet
from pipeline.config import SystemConfig, read_system_config, read_tiny_decoder_config
from pipeline.moderation import Moderation
from pipeline.personal import cards_of_run, judge_cards
from pipeline.system import Networks, TextToImage
from safety.policy import Mode

FILES = ("tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors", "denoiser.safetensors")  # of a run


def load_run(path: str | Path, device: torch.device | str = "cpu",
             moderation: Mode | None = "block") -> TextToImage:
    """The system of a run folder. Under the mode ``moderation`` it refuses harmful prompts, and images of the concepts
    that the run folder forbids. None is for callers that ask the gate themselves or sample from captions of a data set.

    Raises ConfigError naming a stage that is not finished, and CheckpointError or ArtefactError naming a damaged
    file.
    """
    run = RunFolder.open(path)
    run.require(*FILES)
    config = read_system_config(run.path / "config.yaml")
    tokenizer = Tokenizer.load(run.path / "tokenizer.json")
    text_encoder = TextEncoder(config.text_encoder)
    unet = UNet(config.unet)
    autoencoder = Autoencoder(config.autoencoder)
    for name, module in (("text_encoder", text_encoder), ("denoiser", unet), ("autoencoder", autoencoder)):
        load_weights(module, run.weights(name))
        freeze(place_on(module, device))
    system = TextToImage(config, tokenizer, text_encoder, unet, autoencoder)
    system.files = {"tokenizer": run.path / "tokenizer.json",
                    **{name: run.weights(name) for name in ("autoencoder", "text_encoder", "denoiser")}}
    system.moderation = Moderation.of_run(run.path, moderation, device=device) if moderation else None
    if system.moderation is not None:
        judge_cards(system.moderation, cards_of_run(run.path))
    return system


def use_tiny_decoder(system: TextToImage, path: str | Path) -> None:
    """Let the system of a run folder decode by the run's tiny decoder. Raises ConfigError if none was trained, and
    CheckpointError naming a damaged file."""
    run = RunFolder.open(path)
    if not run.has("tiny_decoder.safetensors"):
        raise ConfigError(f"{run.path} has no tiny decoder; train one with: python train.py {run.path / 'config.yaml'} "
                          f"run={run.path} \"stages=[tiny_decoder]\"")
    decoder = TinyDecoder(read_tiny_decoder_config(run.path / "config.yaml"), system.config.autoencoder)
    load_weights(decoder, run.weights("tiny_decoder"))
    system.tiny_decoder = freeze(place_on(decoder, system.device))
    system.files = {**system.files, "tiny_decoder": run.weights("tiny_decoder")}


def load_pretrained(path: str | Path, device: torch.device | str = "cpu", tokenizer: str | Path | None = None,
                    prediction_type: str | None = None, moderation: Mode | None = "block",
                    sampler: str | None = None, variant: str | None = None) -> TextToImage:
    """A published Stable Diffusion 1.x or 2.x, from a folder of diffusers or from a single file.

    ``tokenizer`` names the folder of vocab.json and merges.txt; the default is the one inside the folder, or a
    folder "tokenizer" beside the file. ``prediction_type`` must be given for a single file of 2.x that does not record
    it. ``sampler`` takes the place of a scheduler that is none of ours or cannot be followed. ``variant`` names the
    weights that are read of a folder that holds them twice, "fp16" and the like; the plain ones are the default. Raises
    FileNotFoundError or ValueError naming what is missing, damaged or not supported.
    """
    kind = kind_of(path)
    if kind == "clip":
        raise ValueError(f"{path} is a CLIP model, it draws no images; valid: a Stable Diffusion checkpoint")
    if kind == "diffusers":
        parts = read_diffusers_folder(path, variant)
    elif variant is not None:
        raise ValueError(f"variant {variant!r} of the single file {path}; valid: of a diffusers folder")
    else:
        parts = read_single_file(path, prediction_type)
    schedule, prediction, sampling = process_of_scheduler(
        {**parts.scheduler, **({"prediction_type": prediction_type} if prediction_type else {})}, sampler)
    words = ClipTokenizer.load(tokenizer or parts.tokenizer or Path(path).parent / "tokenizer",
                               parts.text_encoder.config.length)
    if words.vocab_size > parts.text_encoder.config.vocab_size:
        raise ValueError(f"the tokenizer has {words.vocab_size} tokens; valid: up to "
                         f"{parts.text_encoder.config.vocab_size}, the vocabulary of the text encoder")
    config = SystemConfig(parts.unet.config, parts.text_encoder.config, parts.autoencoder.config, schedule, prediction,
                          sampling, (parts.autoencoder.latent_channels, *parts.latent_size))
    for module in (parts.text_encoder, parts.unet, parts.autoencoder):
        freeze(place_on(module, device))
    system = TextToImage(config, words, parts.text_encoder, parts.unet, parts.autoencoder, masked=False)
    system.files = {name if len(paths) == 1 else f"{name}/{path.name}": path
                    for name, paths in parts.files.items() for path in paths}
    system.moderation = Moderation.load(moderation) if moderation else None
    return system


def load_weaker(system: TextToImage, path: str | Path) -> TextToImage:
    """A weaker version of a system that can serve as its ``guide``. ``path`` is either a run folder with the same
    autoencoder, noise schedule and prediction type whose network is smaller or was trained for fewer steps, or an
    earlier state of the same run, ``state/denoiser/step_00000500.pt``, whose averaged weights are read.

    Raises FileNotFoundError or ValueError naming what is missing, damaged or different.
    """
    if system.config.scales is not None:
        raise ValueError(f"{path} cannot guide: guidance is folded into the denoiser of this run; valid: no weaker one")
    if Path(path).is_dir():
        guide = load_run(path, system.device, moderation=None)
        for name in ("schedule", "prediction_type"):
            ours, theirs = (getattr(one.config, name) for one in (system, guide))
            if ours != theirs:
                raise ValueError(f"{path}: denoiser.{name} is {theirs}; valid: {ours}, that of the stronger network")
        if sha256_of(guide.files["autoencoder"]) != sha256_of(system.files["autoencoder"]):
            raise ValueError(f"{path} has another autoencoder; valid: a run on the same latents (copy "
                             "autoencoder.safetensors into its folder before training)")
        guide.latent_shape = system.latent_shape
        return guide
    if not Path(path).is_file():
        raise FileNotFoundError(f"no run folder or checkpoint {path}")
    networks = Networks(UNet(system.config.unet), TextEncoder(system.config.text_encoder))
    try:
        average = torch.load(path, map_location="cpu", weights_only=True)["average"]
        networks.load_state_dict({name: tensor for name, tensor in average.items() if not name.startswith("words.")})
    except (RuntimeError, KeyError, TypeError, AttributeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged or no state of this run's denoiser: {reason}") from None
    freeze(place_on(networks, system.device))
    guide = TextToImage(system.config, system.tokenizer, networks.text_encoder, networks.unet, system.autoencoder,
                        system.masked)
    guide.latent_shape, guide.files = system.latent_shape, {"checkpoint": Path(path)}
    return guide
