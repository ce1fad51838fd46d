"""Sampling from a run folder: the same settings give the same file, neighbours do not matter, mistakes are one line."""
import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from diffusion.denoise import time_tensor
from diffusion.noise import PerImageNoise
from diffusion.samplers import SAMPLERS, get_sampler
from files.config import ConfigError, to_dict
from files.weights import CheckpointError
from files.whole import sha256_of
from pipeline.loading import load_run
from pipeline.system import TextToImage, with_options
from sampling.request import OMITTED
from training.experiment import load_experiment

ROOT = Path(__file__).parents[1]
DISCRETE = [name for name in SAMPLERS if not name.startswith("flow")]  # the others need another schedule
PROMPTS = ["a small red star", "two blue circles", "a green square"]


@pytest.fixture(scope="module")
def system(tiny_run) -> TextToImage:
    return load_run(tiny_run)


def run_sample(tiny_run, out, *arguments: str) -> dict[str, Path]:
    """Call sample.py's main; the files it wrote by name."""
    sample.main(["--run", str(tiny_run), "--out", str(out), *arguments])
    return {path.name: path for path in sorted(Path(out).iterdir()) if path.name != "results.jsonl"}


def parameters(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["parameters"])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# ---- what is written

@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_same_settings_give_the_same_bytes(tiny_run, tmp_path, sampler):
    options = [*PROMPTS, "--seed", "7", "--sampler", sampler, "--steps", "4"]
    one, two = (run_sample(tiny_run, tmp_path / name, *options) for name in "ab")
    assert list(one) == list(two) == ["00000_a-small-red-star_seed7.png", "00001_two-blue-circles_seed8.png",
                                      "00002_a-green-square_seed9.png", "grid.png"]
    assert all(one[name].read_bytes() == two[name].read_bytes() for name in one)
    other = run_sample(tiny_run, tmp_path / "c", *PROMPTS, "--seed", "8", "--sampler", sampler, "--steps", "4")
    difference = pixels(other["00000_a-small-red-star_seed8.png"]) - pixels(one["00000_a-small-red-star_seed7.png"])
    assert np.abs(difference).max() > 3


def test_metadata_is_complete_and_makes_the_image_again(tiny_run, tmp_path):
    options = ["a red star · é 🟥", "--seed", "5", "--n", "2", "--guidance", "2.5", "--steps", "4", "--negative", "blue"]
    files = run_sample(tiny_run, tmp_path / "a", *options)
    path = files["00001_a-red-star_seed6.png"]
    given = parameters(path)
    names = ("tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors", "denoiser.safetensors")
    weights = {name.partition(".")[0]: sha256_of(tiny_run / name)[:16] for name in names}
    config = with_options(load_experiment(tiny_run / "config.yaml").sampling, steps=4, scale=2.5)
    settings = {name: value for name, value in to_dict(config).items() if name not in OMITTED}
    assert given == {"prompt": "a red star · é 🟥", "seed": 6, "negative": "blue", "run": "tiny", "weights": weights,
                     **settings, "options": {"eta": 0.0, "clean_end": True}}
    assert (given["steps"], given["sampler"], given["guidance"]["scale"]) == (4, "ddim", 2.5)
    again = run_sample(tiny_run, tmp_path / "b", given["prompt"], "--seed", str(given["seed"]), "--sampler",
                       given["sampler"], "--steps", str(given["steps"]), "--guidance",
                       str(given["guidance"]["scale"]), "--negative", given["negative"])
    made = again["00000_a-red-star_seed6.png"]
    assert parameters(made) == given
    assert np.abs(pixels(made) - pixels(path)).max() <= 1  # the batch was another one


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_neighbours(tiny_run, tmp_path, sampler):
    """Rounding of the same sums in another order: one level of 255 at most."""
    options = [*PROMPTS, "--n", "2", "--sampler", sampler, "--steps", "4"]
    together, alone = (run_sample(tiny_run, tmp_path / batch, *options, "--batch", batch) for batch in ("64", "1"))
    pairs = run_sample(tiny_run, tmp_path / "4", *options, "--batch", "4")
    assert list(together) == list(alone) == list(pairs) and len(together) == 7
    for name in [name for name in together if name != "grid.png"]:
        assert parameters(together[name]) == parameters(alone[name])
        for other in (alone, pairs):
            assert np.abs(pixels(together[name]) - pixels(other[name])).max() <= 1, name


def test_grid_shows_every_image(tiny_run, tmp_path):
    files = run_sample(tiny_run, tmp_path, *PROMPTS, "--n", "4")
    grid = pixels(files["grid.png"])
    first = next(pixels(path) for name, path in files.items() if name != "grid.png")
    enlarged = first.repeat(4, 0).repeat(4, 1)  # 32 pixels at 128
    assert (grid[26:26 + 128, 8:8 + 128] == enlarged).all()
    assert grid.shape[1] == 8 + 8 * 136 and grid.shape[0] > 2 * 128  # twelve images, eight in a row


def test_images_go_beside_the_run_when_nothing_is_said(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    sample.main(["--run", str(run), "a star"])
    assert sorted(path.name for path in (run / "samples" / "out").iterdir()) == [
        "00000_a-star_seed0.png", "grid.png", "results.jsonl"]


@pytest.mark.parametrize("prompt, name", [
    ("日本語の漢字", "00000_empty_seed0.png"), ("🟥⭐👩‍👩‍👧", "00000_empty_seed0.png"), ("", "00000_empty_seed0.png"),
    ("../../etc/passwd", "00000_etc-passwd_seed0.png"), ("tab\tand\nline", "00000_tab-and-line_seed0.png"),
    ("<|end|> a star", "00000_end-a-star_seed0.png"), ("x" * 300, f"00000_{'x' * 40}_seed0.png")])
def test_any_prompt_makes_one_image_and_stays_in_its_folder(tiny_run, tmp_path, prompt, name):
    files = run_sample(tiny_run, tmp_path / "out", prompt, "--steps", "1", "--moderation", "off")
    assert list(files) == [name, "grid.png"] and parameters(files[name])["prompt"] == prompt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_prompts_of_a_file(tiny_run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red star\n\n  two blue circles  \n", encoding="utf-8")
    files = run_sample(tiny_run, tmp_path / "out", "first", "--prompts", str(path), "--steps", "1")
    assert [parameters(file)["prompt"] for name, file in files.items() if name != "grid.png"] == [
        "first", "a red star", "two blue circles"]


def test_a_long_prompt_is_cut_and_that_is_said(tiny_run, tmp_path, capsys, system):
    long = "a small red star above " * 10 + "a dragon"
    run_sample(tiny_run, tmp_path, long, "a red star", "--steps", "1", "--chunks", "1")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "the prompt is cut after 22 tokens; not read: " in warnings[0]
    lost = system.tokenizer.overflow(long)
    assert lost.endswith("a dragon") and lost in warnings[0]


# ---- the system

def latents(system, prompts=PROMPTS, seeds=(0, 1, 2), negative="", **options):
    config = with_options(system.config.sampling, **options)
    return system.latents(prompts, list(seeds), config, negative)


@pytest.mark.parametrize("sampler", DISCRETE)
def test_guidance_one_is_the_conditional_network_bit_for_bit(system, sampler):
    """Against the plain network, with the prompt given at every call instead of its cache."""
    given = latents(system, sampler=sampler, steps=5, scale=1.0)
    with torch.inference_mode():
        context, mask = system.encode(PROMPTS)
        noise = PerImageNoise([0, 1, 2], (4, 8, 8))
        schedule = system.schedule
        expected = get_sampler(sampler)(
            lambda x_t, t: system.unet(x_t, schedule.network_time(time_tensor(t, x_t)), context, mask), noise(),
            schedule.timesteps(5, "trailing"), schedule, system.config.prediction_type, noise)
    assert torch.equal(given, expected) and given.shape == (3, 4, 8, 8)
    assert torch.equal(given, latents(system, sampler=sampler, steps=5, scale=1.0, negative="blue"))  # nothing to guide


@pytest.mark.parametrize("sampler", DISCRETE)
def test_a_latent_does_not_depend_on_its_neighbours(system, sampler):
    together = latents(system, sampler=sampler, steps=5)
    for k in range(3):
        alone = latents(system, prompts=PROMPTS[k:k + 1], seeds=[k], sampler=sampler, steps=5)
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=2e-4)


def test_guidance_is_the_published_formula(system):
    """One step from pure noise: the network is called once, and x_0 of v-prediction at SNR 0 is -v."""
    seeds, scale = [0, 1, 2], 2.0
    given = latents(system, steps=1, scale=scale, negative="a blue circle")
    with torch.inference_mode():
        x_T = PerImageNoise(seeds, (4, 8, 8))()
        t = system.schedule.network_time(torch.full((3,), 999))
        cond = system.unet(x_T, t, *system.encode(PROMPTS))
        uncond = system.unet(x_T, t, *system.encode(["a blue circle"] * 3))
    assert (cond - uncond).abs().max() > 1e-4  # the prompt matters
    torch.testing.assert_close(given, -(uncond + scale * (cond - uncond)), rtol=0, atol=1e-5)


def test_prompt_negative_scale_and_seed_all_matter(system):
    plain = latents(system)
    for other in (latents(system, prompts=PROMPTS[::-1]), latents(system, negative="a blue circle"),
                  latents(system, scale=6.0), latents(system, seeds=(3, 4, 5))):
        assert (other - plain).abs().amax(dim=(1, 2, 3))[0] > 1e-4
    assert torch.equal(plain, latents(system))


def test_batches_are_joined_in_order(system):
    together = system.images(PROMPTS, [4, 5, 6])
    parts = system.images_in_batches(PROMPTS, [4, 5, 6], batch=2)
    assert together.shape == parts.shape == (3, 3, 32, 32) and parts.dtype == torch.uint8
    assert (together.int() - parts.int()).abs().max() <= 1


def test_progress_sees_every_step(system):
    seen: list[int] = []

    def progress(times):
        for time in times:
            seen.append(time)
            yield time

    system.latents(["a"], [0], replace(system.config.sampling, steps=7), progress=progress)
    assert seen == system.schedule.timesteps(7, "trailing")


def test_counts_that_differ_are_refused(system):
    for prompts, seeds in ((["a", "b"], [1]), ([], []), (["a"], [1, 2])):
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts and {len(seeds)} seeds"):
            system.latents(prompts, seeds)


def test_a_seed_of_which_the_generator_ignores_bits_is_refused(system):
    """The generator reads 32 bits; a larger seed would draw what a smaller one draws."""
    one, other = (torch.randn(9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2**32 + 1))
    assert torch.equal(one, other)
    assert not torch.equal(latents(system, ["a"], [2**32 - 1]), latents(system, ["a"], [2**31 - 1]))
    for seed in (2**32, 2**62 - 1, -1):
        with pytest.raises(ValueError, match=f"seed: value {seed}; valid: 0 to 2\\^32 - 1"):
            system.latents(["a"], [seed])


def test_networks_are_frozen_and_in_evaluation_mode(system):
    for network in (system.unet, system.text_encoder, system.autoencoder):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_damaged_run_folders_are_refused_by_name(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    path = run / "denoiser.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="denoiser.safetensors is damaged"):
        load_run(run)
    shutil.copy(run / "text_encoder.safetensors", path)
    with pytest.raises(CheckpointError, match="denoiser.safetensors does not fit the model"):
        load_run(run)
    path.unlink()
    with pytest.raises(ConfigError, match="there is no denoiser.safetensors yet; continue it with: python train.py"):
        load_run(run)
    (run / "tokenizer.json").write_text("{}")
    shutil.copy(tiny_run / "denoiser.safetensors", path)
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        load_run(run)


# ---- mistakes on the command line

@pytest.mark.parametrize("arguments, message", [
    (["a", "--n", "0"], "--n 0; valid: 1 to"),
    (["a", "--n", "1000000000"], "--n 1000000000; valid: 1 to"),
    (["a", "b", "--n", "100000"], "200000 images asked for; valid: up to"),
    (["a", "--batch", "0"], "--batch 0; valid: 1 to"),
    (["a", "--steps", "0"], "steps: value 0; valid: 1"),
    (["a", "--steps", "1000000000"], "steps: value 1000000000; valid: 1"),
    (["a", "--steps", "1001"], "1001; valid: 1 .. 1000"),
    (["a", "--seed", "-1"], "--seed -1; valid: 0 to"),
    (["a", "--seed", "99999999999999999999"], "--seed 99999999999999999999; valid: 0 to"),
    (["a", "--seed", "4294967296"], "--seed 4294967296; valid: 0 to 2^32 - 1"),
    (["a", "--seed", "4294967295", "--n", "2"], "seed: value 4294967296; valid: 0 to 2^32 - 1"),
    (["a", "--seed", "4294967295", "--interpolate", "3"], "seed: value 4294967296; valid: 0 to 2^32 - 1"),
    (["a", "--xy", "seed=1,4294967297"], "seed: value 4294967297; valid: 0 to 2^32 - 1"),
    (["a", "--guidance", "nan"], "scale: value nan; valid:"),
    (["a", "--guidance", "inf"], "scale: value inf; valid:"),
    (["a", "--guidance", "-1"], "scale: value -1.0; valid:"),
    (["a", "--sampler", "magic"], "sampler: value 'magic'; valid: ddpm, ddim"),
    (["a", "--run", "NOWHERE"], "no run folder"),
    (["a", "--run", "UNFINISHED"], "there is no denoiser.safetensors yet"),
    ([], "no prompt; valid:"),
    (["--prompts", "EMPTY"], "holds no prompt"),
    (["--prompts", "BINARY"], "is not a text file in UTF-8"),
    (["--prompts", "NOWHERE"], "No such file"),
    (["a", "--out", "EMPTY"], "exists"),
    (["a", "\udcff"], "prompt '\\udcff' is not text in UTF-8"),
    (["a", "--negative", "\udcff"], "prompt '\\udcff' is not text in UTF-8"),
    (["a", "--sampler", "flow_euler"], "kind 'cosine' has no straight paths"),
])
def test_mistakes_end_in_one_line_and_write_nothing(tiny_run, tmp_path, monkeypatch, arguments, message):
    names = {name: str(tmp_path / name.lower()) for name in ("NOWHERE", "UNFINISHED", "EMPTY", "BINARY")}
    (tmp_path / "unfinished").mkdir()
    for name in ("config.yaml", "tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors"):
        shutil.copy(tiny_run / name, tmp_path / "unfinished")
    (tmp_path / "empty").write_text("\n  \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.rglob("*"))
    arguments = [names.get(text, text) for text in arguments]
    if "--run" not in arguments:
        arguments += ["--run", str(tiny_run)]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    assert caught.value.code.startswith("error: ") and message in caught.value.code
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["a", "--n", "two"], ["a", "--seed", "1.5"], ["a", "--colour", "red"]])
def test_what_argparse_refuses(tiny_run, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(arguments)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]
