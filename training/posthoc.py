"""Averages of any width, computed after the run: python -m training.posthoc RUN --std 0.08 0.12 [--plot FILE.png]

The best length of an average is known only afterwards, and trying lengths by training again costs one run each. A
weighted sum of kept averages is again an average, whose profile over the steps is the weighted sum of their profiles.
The weights that bring it closest to a given profile solve a least-squares problem with a closed form (Karras et al.
2023, EDM2, section 3.2 and appendix C). Each result is a run folder, RUN/posthoc/std_0.08, for sample.py and
evaluate.py.
"""
import argparse
import filecmp
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from data.catalog import build_source, data_key
from data.tokenizer import Tokenizer
from files.run_folder import RunFolder
from files.weights import load_weights, save_weights
from files.whole import free_path, set_aside
from model.autoencoder import Autoencoder
from model.device import default_device, freeze, place_on
from training.ema import gamma_from_std
from training.experiment import load_experiment
from training.snapshots import Snapshot, snapshots_in
from training.stages.context import StageContext
from training.stages.denoiser import Denoising, Networks, held_out_pairs, new_networks
from training.stages.pairs import latent_encoder

PLOTTED = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25)
COPIED = ("config.yaml", "manifest.json", "tokenizer.json", "autoencoder.safetensors")


def profile_products(step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integrals of the product of two profiles p(s) = (gamma + 1) s^gamma / step^(gamma + 1), 0 <= s <= step, for every
    a (A,) and b (B,): (A, B)."""
    ta, ga, tb, gb = step_a[:, None], gamma_a[:, None], step_b[None], gamma_b[None]
    # EDM2 appendix C: the integral runs up to the smaller step; written so that nothing overflows
    exponent = np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * (ta / tb) ** exponent / ((ga + gb + 1) * np.maximum(ta, tb))


def snapshot_weights(snapshots: Sequence[Snapshot], std: float, step: int) -> tuple[np.ndarray, float]:
    """Weights (N,) of the snapshots whose sum comes closest to the average of width ``std`` after ``step`` steps, and
    the error of its profile: the norm of the difference over the norm, 0 to 1."""
    steps = np.array([s.step for s in snapshots], dtype=np.float64)
    gammas = np.array([gamma_from_std(s.std) for s in snapshots])
    wanted = np.array([step], dtype=np.float64), np.array([gamma_from_std(std)])
    right = profile_products(steps, gammas, *wanted)[:, 0]  # (N,)
    products = profile_products(steps, gammas, steps, gammas)  # (N, N)
    # Minimal |p - sum x_i p_i|^2 (EDM2, appendix C) with sum x_i = 1 by a Lagrange multiplier. EDM2 leaves the sum
    # free, its networks do not depend on the size of their weights; these do. Close profiles are nearly equal: lstsq.
    ones = np.ones((len(steps), 1))
    system = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])
    weights = np.linalg.lstsq(system, np.append(right, 1.0), rcond=1e-13)[0][:-1]
    norm = profile_products(*wanted, *wanted)[0, 0]
    left = norm - 2 * weights @ right + weights @ products @ weights
    return weights, float(max(0.0, left / norm)) ** 0.5


def weighted_sum(snapshots: Sequence[Snapshot], weights: np.ndarray) -> dict[str, torch.Tensor]:
    """The tensors of the average, summed in fp64, one snapshot after the other."""
    found: dict[str, torch.Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for snapshot, weight in zip(snapshots, weights):
        for name, tensor in load_file(snapshot.path).items():
            if not tensor.is_floating_point():
                found[name] = tensor  # the last one counts
                continue
            types[name] = tensor.dtype
            found[name] = found.get(name, 0.0) + float(weight) * tensor.double()
    return {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in found.items()}


def load_average(run: RunFolder, networks: Networks, std: float) -> float:
    """Load the average of width ``std`` at the end of the run into ``networks``; returns the error of its profile.

    Raises ValueError if there are no snapshots.
    """
    snapshots = snapshots_in(run.snapshots("denoiser"))
    if not snapshots:
        raise ValueError(f"no snapshots in {run.snapshots('denoiser')}; train with denoiser.train.snapshots.every "
                         "above 0")
    weights, left = snapshot_weights(snapshots, std, max(s.step for s in snapshots))
    networks.load_state_dict(weighted_sum(snapshots, weights))
    return left


def write_run(run: RunFolder, networks: Networks, std: float) -> Path:
    """Write a run folder with these networks in place of the final ones of the run, and return its path. A folder of
    this name with the same files stays as it is, one with other files is renamed."""
    folder = run.path / "posthoc" / f"std_{std}"
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    partial.mkdir(parents=True)
    try:
        for name in COPIED:
            shutil.copy(run.path / name, partial / name)
        save_weights(networks.text_encoder, partial / "text_encoder.safetensors")
        save_weights(networks.unet, partial / "denoiser.safetensors")
        names = [path.name for path in partial.iterdir()]
        if filecmp.cmpfiles(partial, folder, names, shallow=False)[0] != names:
            if (kept := set_aside(folder)) is not None:
                print(f"kept an earlier average of this width as {kept}")
            os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def plot_losses(losses: dict[float, float], trained: float, path: Path) -> None:
    """Plot the validation loss over the width of the average, into a new file."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot(list(losses), list(losses.values()), marker="o")
    axes.axvline(trained, linestyle=":", color="gray", label="of the run")
    axes.set(xlabel="width of the average, as a share of the run", ylabel="validation loss", xscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    """Parse the command line, write the averages and print their validation losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder with snapshots of its denoiser")
    parser.add_argument("--std", type=float, nargs="*", default=[], help="widths to write, as shares of the run")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the validation loss over the width")
    options = parser.parse_args(arguments)
    if not options.std and not options.plot:
        raise ValueError("nothing to do; valid: --std WIDTH ... or --plot FILE")
    for std in options.std:
        gamma_from_std(std)
    run = RunFolder.open(options.run)
    run.require("tokenizer.json", "autoencoder.safetensors", "denoiser.safetensors")
    experiment, device = load_experiment(run.path / "config.yaml"), default_device()
    stage = experiment.denoiser
    autoencoder = Autoencoder(experiment.autoencoder.model)
    load_weights(autoencoder, run.weights("autoencoder"))
    context = StageContext(run, validation=build_source(experiment.data.squares, "validation"), seed=experiment.seed,
                           device=device, data_key=data_key(experiment.data))
    read = held_out_pairs(stage, context, latent_encoder(freeze(place_on(autoencoder, device)), device))
    denoising = Denoising(stage, Tokenizer.load(run.path / "tokenizer.json"), experiment.seed, device)
    networks = freeze(new_networks(stage, experiment.seed, device))
    losses = {}
    for std in sorted({*options.std, *(PLOTTED if options.plot else ())}):
        left = load_average(run, networks, std)
        losses[std] = denoising.validate(networks, read)["loss"]
        where = f", {write_run(run, networks, std)}" if std in options.std else ""
        print(f"std {std:g}: validation loss {losses[std]:.5f}, profile met up to {100 * left:.2g} %{where}")
    if options.plot:
        plot = free_path(options.plot)
        plot_losses(losses, stage.train.ema_std, plot)
        print(f"wrote {plot}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
