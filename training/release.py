"""A run folder to share, from one to train in: python -m training.release RUN --out weights/NAME [--clip RUN]

The networks are written in bf16 where they have two axes or more, and nothing is kept that only training needs: no
state, no cache, no samples. ``--clip`` adds the evaluator of another run folder, ``--decoder`` takes the autoencoder of
a run whose stage decoder tuned that of RUN, which may be a released folder itself. ``--unfinished`` takes the averaged
weights of the newest state of a denoiser that is still being trained. ``prompts.txt`` has the prompts of the previews,
one a line, for `sample.py --prompts`. The result is a run folder for sample.py and evaluate.py, and a new training can
begin with its weights (``start_from``).
"""
import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from files.config import read_yaml
from files.run_folder import RunFolder
from files.weights import CheckpointError
from files.whole import sha256_of, whole_file, write_text
from pipeline.config import STUDENT
from training.checkpoints.checkpoint import Checkpoints
from training.experiment import STAGES

DENOISER = {"text_encoder": "text_encoder.", "denoiser": "unet."}  # file of weights: prefix in the state of training
COPIED = ("tokenizer.json", "concepts.yaml")


def in_bf16(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, with matrices, filters and embeddings in bf16. Gains, biases and the scale of the latents keep
    fp32: they are few, and a rounding of theirs acts on whole channels."""
    return {name: tensor.to(torch.bfloat16) if tensor.ndim > 1 and tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()}


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a file of weights."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def denoiser_weights(run: RunFolder, unfinished: bool) -> tuple[dict[str, dict[str, torch.Tensor]], int | None]:
    """The tensors of text encoder and UNet, and the number of steps of an unfinished training, None for a finished
    one. Raises CheckpointError or ConfigError if there are none."""
    if not unfinished:
        run.require(*STAGES["denoiser"].leaves)
        return {name: load_file(run.weights(name)) for name in DENOISER}, None
    state = Checkpoints(run.state("denoiser")).latest()
    if state is None:
        raise CheckpointError(f"{run.state('denoiser')} holds no state; valid: a run whose denoiser is being trained")
    return {name: {key.removeprefix(prefix): tensor.contiguous() for key, tensor in state["average"].items()
                   if key.startswith(prefix)} for name, prefix in DENOISER.items()}, state["step"]


def tuned_autoencoder(run: RunFolder, decoder: RunFolder) -> dict[str, torch.Tensor]:
    """The tensors of the autoencoder of ``decoder``. Raises ValueError unless they are those of ``run``, as they are
    released, but for the weights of the decoder: the denoiser would not fit other latents."""
    own, tuned = (in_bf16(load_file(folder.weights("autoencoder"))) for folder in (run, decoder))
    for name in sorted({*own, *tuned}):
        if not name.startswith("decoder.") and not (
                name in own and name in tuned and torch.equal(own[name], tuned[name])):
            raise ValueError(f"--decoder {decoder.path}: {name} is not that of {run.path}; valid: a run of the stage "
                             "decoder that started from it")
    return tuned


def release(path: Path, out: Path, clip: Path | None = None, unfinished: bool = False,
            decoder: Path | None = None) -> dict[str, Any]:
    """Write the folder ``out``; the number of parameters and of bytes. Raises ValueError if ``out`` exists, ConfigError
    or CheckpointError if something is missing or damaged."""
    if out.exists():
        raise ValueError(f"--out {out} exists; valid: a new folder, nothing is overwritten")
    run = RunFolder.open(path)
    run.require(*STAGES["tokenizer"].leaves, *STAGES["autoencoder"].leaves)
    networks, step = denoiser_weights(run, unfinished)
    said: dict[str, dict[str, str]] = {}  # the metadata of files that have any: the shape of an evaluator
    for name in ("autoencoder", *(["tiny_decoder"] if run.has(*STAGES["tiny_decoder"].leaves) else [])):
        networks[name] = load_file(run.weights(name))
    if decoder:
        networks["autoencoder"] = tuned_autoencoder(run, RunFolder.open(decoder))
    copied = {name: run.path / name for name in COPIED if run.has(name)}
    evaluator = RunFolder.open(clip) if clip else run
    if clip or run.has(*STAGES["clip"].leaves):
        evaluator.require(*STAGES["clip"].leaves)
        networks["clip"], said["clip"] = load_file(evaluator.weights("clip")), metadata_of(evaluator.weights("clip"))
        copied["clip_tokenizer.json"] = evaluator.path / "clip_tokenizer.json"
    out.mkdir(parents=True)
    for name, tensors in networks.items():
        with whole_file(out / f"{name}.safetensors") as temporary:
            save_file(in_bf16(tensors), temporary, metadata=said.get(name))
            temporary.chmod(0o644)  # the library writes 0600
    for name, source in copied.items():
        shutil.copyfile(source, out / name)
    if prompts := read_yaml(run.path / "config.yaml").get("preview_prompts"):
        write_text(out / "prompts.txt", "\n".join(prompts) + "\n")
    record(run, evaluator, RunFolder.open(decoder) if decoder else None, out, step)
    return {"parameters": sum(tensor.numel() for tensors in networks.values() for tensor in tensors.values()),
            "bytes": sum(file.stat().st_size for file in out.iterdir())}


def record(run: RunFolder, evaluator: RunFolder, decoder: RunFolder | None, out: Path, step: int | None) -> None:
    """Write config.yaml and manifest.json of the released folder. The configuration is that of the run without the
    folder it started from, which is recorded in the manifest; command, versions and time are those of the training."""
    config, about = read_yaml(run.path / "config.yaml"), run.read_manifest()
    config.pop("start_from", None)
    if evaluator is not run:
        config["clip"] = read_yaml(evaluator.path / "config.yaml")["clip"]
        about["clip"] = evaluator.read_manifest().get("clip")
    if decoder:
        config["decoder"] = read_yaml(decoder.path / "config.yaml")["decoder"]
        about["decoder"] = decoder.read_manifest().get("decoder")
    own, other = (STUDENT, "denoiser") if STUDENT in config["stages"] else ("denoiser", STUDENT)  # they leave the same
    config["stages"] = [name for name, stage in STAGES.items()
                        if name != other and not stage.tunes and all((out / file).exists() for file in stage.leaves)]
    train = config[own]["train"]
    steps = train["steps"] if step is None else step
    training = {"from": run.path.name, "denoiser_steps": steps, "images_seen": steps * train["batch"],
                "images_seen_before": images_seen_before(about), "finished": step is None}
    about["released"] = {**about.get("released", training),  # of a folder that was released before, what is known
                         "files": {file.name: sha256_of(file) for file in sorted(out.iterdir())}}
    write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    RunFolder(out).record(**about)


def images_seen_before(about: Mapping[str, Any]) -> int | None:
    """How many images the released denoiser had seen that a run with the manifest ``about`` began with: 0 if it began
    with none, None if the folder it started from is gone, changed or says nothing."""
    start = about.get("start_from", {})
    known = start.get("files", {}).get("denoiser.safetensors")
    if known is None:
        return 0
    file = Path(start["run"]) / "denoiser.safetensors"
    if not file.is_file() or sha256_of(file) != known:
        return None
    released = RunFolder.open(start["run"]).read_manifest().get("released", {})
    seen, before = released.get("images_seen"), released.get("images_seen_before", 0)
    return None if seen is None or before is None else seen + before


def main(arguments: list[str]) -> None:
    """Parse the command line, write the folder and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder of a trained denoiser")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument("--clip", type=Path, metavar="RUN", help="a run folder with a stage clip, the evaluator")
    parser.add_argument("--decoder", type=Path, metavar="RUN", help="a run whose stage decoder tuned that of RUN")
    parser.add_argument("--unfinished", action="store_true", help="the newest state of a denoiser still in training")
    options = parser.parse_args(arguments)
    found = release(options.run, options.out, options.clip, options.unfinished, options.decoder)
    print(f"wrote {options.out}: {found['parameters']:,} parameters, {found['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from None
