"""sample.py beyond plain prompts: editing, interpolation, inversion, frames and attention; mistakes are one line."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_calls import PROMPT, draw, given_images, parameters, pixels

import sample
from diffusion.editing import slerp
from diffusion.noise import PerImageNoise
from files.images import read_image, read_mask
from files.sheets import heat_overlay
from model.attention_maps import AttentionMaps, record_attention
from pipeline.loading import load_run
from pipeline.prompts import chunks_of, parse_prompt
from pipeline.system import TextToImage
from sampling.draw import Sources, edit_of, latents_of_requests
from sampling.request import Request, Toward


@pytest.fixture(scope="module")
def system(tiny_run) -> TextToImage:
    return load_run(tiny_run)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    return given_images(tmp_path_factory.mktemp("given"))


# ---- prompts on the command line

def test_alternatives_and_weights_on_the_command_line(tiny_run, tmp_path):
    files = draw(tiny_run, tmp_path / "a", "a {red|blue} (star:1.5)", "--negative", "(moon:1.2)", "--n", "2")
    assert list(files) == [f"0000{k}_a-{c}-star-1-5_seed{k}.png" for k, c in enumerate(["red", "red", "blue", "blue"])
                           ] + ["grid.png"]
    assert parameters(files["00002_a-blue-star-1-5_seed2.png"])["prompt"] == "a blue (star:1.5)"
    plain, literal = (draw(tiny_run, tmp_path / name, "a (star:1)", *flags)["00000_a-star-1_seed0.png"]
                      for name, flags in (("b", []), ("c", ["--literal"])))
    bare = draw(tiny_run, tmp_path / "d", "a star")["00000_a-star_seed0.png"]
    assert (pixels(plain) == pixels(bare)).all()
    assert parameters(literal)["literal"] and (pixels(literal) != pixels(bare)).any()


def test_a_long_prompt_is_read_in_chunks_and_that_is_said(tiny_run, tmp_path, capsys):
    long = "a small red star above " * 4 + "a moon"
    whole = draw(tiny_run, tmp_path / "a", long)["00000_a-small-red-star-above-a-small-red-star_seed0.png"]
    assert "note: a prompt of " in (said := capsys.readouterr().err) and "chunks of up to 22" in said
    cut = draw(tiny_run, tmp_path / "b", long, "--chunks", "1")[whole.name]
    assert "the prompt is cut after 22 tokens; not read: \"" in (said := capsys.readouterr().err) and "a moon\"" in said
    assert (pixels(whole) != pixels(cut)).any() and parameters(cut)["chunks"] == 1


# ---- image to image, inpainting

def test_strength_is_distance(system, tiny_run, tmp_path, given):
    """Of the steps that are asked for, and of the latents from the image's."""
    image = read_image(given["INIT"])
    x_0 = system.encode_images(image[None])
    config = system.config.sampling
    away = []
    for strength in (0.34, 0.67, 1.0):
        trace: list = []
        request = Request(PROMPT, 0, config, strength=strength)
        latents = latents_of_requests(system, [request], Sources(image), trace=trace)
        away.append((latents - x_0).norm().item())
        assert len(trace) == int(3 * strength)
    assert away[0] < away[1] < away[2]
    files = draw(tiny_run, tmp_path, PROMPT, "--init", given["INIT"], "--strength", "0.67", "--n", "2")
    data = parameters(files["00001_a-small-red-star_seed1.png"])
    assert data["strength"] == 0.67 and data["init"]["file"] == "INIT.png" and len(data["init"]["sha256"]) == 64


@pytest.mark.parametrize("flags", [[], ["--strength", "0.7"], ["--sampler", "ddpm", "--guidance", "1"]])
def test_kept_pixels_come_back_byte_for_byte(tiny_run, tmp_path, given, flags):
    files = draw(tiny_run, tmp_path, PROMPT, "--init", given["INIT"], "--mask", given["MASK"], "--n", "2", *flags)
    original, paint = pixels(Path(given["INIT"])), pixels(Path(given["MASK"])) > 127
    made = [pixels(files[name]) for name in list(files)[:2]]
    for image in made:
        assert (image[~paint] == original[~paint]).all()
        assert (image[paint] != original[paint]).mean() > 0.9
    assert (made[0][paint] != made[1][paint]).any()  # another seed, another painting


def test_the_network_sees_what_is_kept(system, given):
    """Latents that lie wholly under kept pixels are those of the image."""
    image, paint = read_image(given["INIT"]), read_mask(given["MASK"])[0]
    latents = latents_of_requests(system, [Request(PROMPT, 0, system.config.sampling, strength=1.0)],
                                  Sources(image, paint))
    away = (latents - system.encode_images(image[None]))[0].abs().amax(dim=0)  # (8, 8), four pixels each
    painted = paint.unflatten(0, (8, 4)).unflatten(2, (8, 4)).permute(0, 2, 1, 3).flatten(2).any(dim=2)
    assert torch.equal(edit_of(system, 1.0, Sources(image, paint), 1).keep[0, 0], 1.0 - painted.float())
    assert painted.sum() == 4 * 4 and away[~painted].max() < 1e-4 < away[painted].min()


def test_images_are_read_as_they_look(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0, 255], [0, 0, 0, 0]]], dtype=np.uint8)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").permute(1, 2, 0).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 4, 2)
    Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8)).save(tmp_path / "grey.png")
    assert read_mask(tmp_path / "grey.png")[0].tolist() == [[False, False, True, True]]


# ---- interpolation, inversion

@pytest.mark.parametrize("prompts, flags, ends", [
    ([PROMPT, "two blue circles and a green moon"], [], ((0, 0), (1, 0))),
    ([PROMPT, "a moon"], ["--seed", "4", "--to-seed", "9"], ((0, 4), (1, 9))),
    ([PROMPT], ["--seed", "4", "--sampler", "ddpm", "--guidance", "1"], ((0, 4), (0, 5)))])
def test_interpolation_ends_at_both_ends(tiny_run, tmp_path, prompts, flags, ends):
    files = draw(tiny_run, tmp_path / "way", *prompts, "--interpolate", "3", *flags)
    made = [pixels(path) for name, path in files.items() if name != "grid.png"]
    assert len(made) == 3 and (made[1] != made[0]).any() and (made[1] != made[2]).any()
    flags = [flag for flag in flags if flag not in ("--to-seed", "9")]
    for image, (prompt, seed) in zip((made[0], made[2]), ends):
        out = draw(tiny_run, tmp_path / str(seed + prompt), prompts[prompt], *flags, "--seed", str(seed))
        assert np.abs(pixels(out[list(out)[0]]) - image).max() <= 1


def test_noise_is_spherical_and_text_linear(system, monkeypatch):
    seen = {}
    monkeypatch.setattr(system, "latents_from_context", lambda context, mask, count, noise, *rest: seen.update(
        context=context, mask=mask, noise=noise()) or noise())
    request = Request("a red star", 1, system.config.sampling, toward=Toward("a blue star", 2, 0.25))
    latents_of_requests(system, [request], Sources())
    a, b = (PerImageNoise([seed], system.latent_shape)() for seed in (1, 2))
    torch.testing.assert_close(seen["noise"], slerp(a, b, 0.25))
    context, mask = system.encode([parse_prompt(text) for text in ("a red star", "a blue star")])
    first, second = context[0][mask[0]], context[1][mask[1]]
    if len(first) == len(second):
        torch.testing.assert_close(seen["context"][1][: len(first)], torch.lerp(first, second, 0.25))


def test_inversion_leads_back_and_says_how_far(tiny_run, tmp_path, given, capsys):
    """Where the image is one of the network's own; more refinements, less error."""
    first = draw(tiny_run, tmp_path / "a", PROMPT, "--guidance", "1")["00000_a-small-red-star_seed0.png"]
    errors = []
    for refinements in ("0", "6"):
        files = draw(tiny_run, tmp_path / refinements, PROMPT, "--invert", str(first), "--steps", "6",
                     "--refinements", refinements)
        [line] = [line for line in capsys.readouterr().out.splitlines() if "reconstruction error" in line]
        errors.append(float(line.split("latent ")[1].split(" %")[0]))
        data = parameters(files["00000_a-small-red-star_seed0.png"])
        assert data["guidance"]["scale"] == 1.0 and data["invert"]["file"] == first.name
    assert errors[1] <= errors[0] and errors[1] < 0.5


# ---- frames, attention, grids

def test_frames_end_in_the_image(tiny_run, tmp_path):
    files = draw(tiny_run, tmp_path, PROMPT, "a moon", "--steps", "6", "--frames", "3")
    assert sum(name.endswith("_frames.png") for name in files) == 2
    strip = pixels(files["00001_a-moon_seed1_frames.png"])
    last = pixels(files["00001_a-moon_seed1.png"]).repeat(4, 0).repeat(4, 1)
    assert strip.shape[1] == 8 + 3 * 136
    assert np.abs(strip[8:136, 8 + 2 * 136:][:, :128] - last).max() <= 1
    assert (strip[8:136, 8:136] != strip[8:136, 144:272]).any()
    with Image.open(files["00001_a-moon_seed1_frames.gif"]) as gif:
        assert gif.n_frames == 3 and gif.size == (128, 128)


def test_attention_maps_are_those_of_the_layers(system, tiny_run, tmp_path):
    maps = AttentionMaps(2)
    config = system.config.sampling
    with record_attention(system.unet, maps):
        watched_latents = system.latents([PROMPT, "a moon"], [0, 1], config, "a star")
    assert torch.equal(watched_latents, system.latents([PROMPT, "a moon"], [0, 1], config, "a star"))
    layers = system.unet.cross_attentions()
    assert sum(maps.calls.values()) == len(layers) * config.steps and all(layer.watch is None for layer in layers)
    shares = maps.maps(*system.latent_shape[1:])
    assert shares.shape == (2, 24, 8, 8)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, 8, 8))
    _, mask = system.encode([PROMPT, "a moon"])
    assert (shares[~mask] == 0).all() and (shares[mask] > 0).all()  # the conditional half: the masks of the prompts
    with pytest.raises(ValueError, match="no layer"):
        AttentionMaps(1).maps(8, 8)
    files = draw(tiny_run, tmp_path, PROMPT, "--attention")
    sheet = pixels(files["00000_a-small-red-star_seed0_attention.png"])
    cells = 1 + len(chunks_of(parse_prompt(PROMPT), system.tokenizer).words)  # the image and its tokens
    assert cells == 1 + mask[0].sum() - 2 and sheet.shape[1] == 8 + min(8, cells) * 136


def test_heat_goes_from_black_to_white():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    hot = heat_overlay(image, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert hot[:, 0, 0].tolist() == [0, 0, 0] and hot[:, 0, -1].tolist() == [178, 178, 178]
    red, green, blue = hot[:, 0, 3].tolist()
    assert red > green > blue == 0


# ---- mistakes

@pytest.mark.parametrize("arguments, message", [
    (["a", "--init", "NOWHERE.png"], "no image NOWHERE.png"),
    (["a", "--init", "TEXT"], "TEXT.png is damaged or no image"),
    (["a", "--init", "CUT"], "CUT.png is damaged or no image"),
    (["a", "--init", "DEEP"], "floating pixels; valid: 8 or 16 bits"),
    (["a", "--init", "SMALL"], "16x32 pixels (HxW); valid: 32x32"),
    (["a", "--init", "INIT", "--mask", "SMALL"], "the mask has 16x32 pixels (HxW); valid: 32x32"),
    (["a", "--init", "INIT", "--mask", "TEXT"], "is damaged or no image"),
    (["a", "--init", "INIT", "--strength", "0"], "strength: value 0.0; valid: above 0, at most 1"),
    (["a", "--init", "INIT", "--strength", "1.5"], "strength: value 1.5; valid: above 0, at most 1"),
    (["a", "--init", "INIT", "--strength", "nan"], "strength: value nan; valid"),
    (["a", "--init", "INIT", "--strength", "0.1"], "strength: value 0.1 of 3 steps leaves none; valid: at least 0.333"),
    (["a", "--init", "INIT", "--xy", "strength=0.5,2"], "strength: value 2.0; valid"),
    (["a", "--mask", "MASK"], "--mask without --init; valid: both"),
    (["a", "--strength", "0.5"], "--strength without --init; valid: both"),
    (["a", "--init", "INIT", "--invert", "INIT"], "--init with --invert; valid: one of them"),
    (["a", "--init", "INIT", "--interpolate", "3"], "--init with --interpolate"),
    (["a", "--invert", "INIT", "--sampler", "euler"], "--invert with sampler euler; valid: --sampler ddim"),
    (["a", "--invert", "INIT", "--n", "2"], "--n with --invert"),
    (["a", "--to-seed", "3"], "--to-seed without --interpolate"),
    (["a", "--interpolate", "1"], "--interpolate 1; valid: 2 to"),
    (["a", "b", "c", "--interpolate", "3"], "3 prompts with --interpolate; valid: one, or two"),
    (["a", "--xy", "steps=1,x"], "valid: a whole number between the commas"),
    (["a", "--xy", "colour=1"], "valid: PARAMETER=VALUE,VALUE with one of steps, guidance"),
    (["a", "--xy", "steps=1", "steps=2"], "valid: one or two parameters, each once"),
    (["a", "--xy", "steps=0,1"], "steps: value 0; valid"),
    (["a", "--xy", "sampler=ddim,magic"], "sampler: value 'magic'; valid"),
    (["a", "--xy", "seed=-1"], "seed: value -1; valid: 0 to"),
    (["a", "--xy", "strength=0.5"], "--xy strength without --init"),
    (["a", "--xy", "prompt=b|c"], "a prompt with --xy prompt; valid: one of them"),
    (["a", "--n", "2", "--xy", "steps=1,2"], "2 images with --xy; valid: one prompt"),
    (["a (b"], "'(' is not closed"), (["{a|b"], "'{' is not closed"), (["a", "--negative", "b]"], "closes nothing"),
    (["a", "--negative", "{b|c}"], "has alternatives; valid: one negative prompt"),
    (["a", "b (", "--interpolate", "2"], "'(' is not closed"),
    (["{a|b}" * 30], "more than 100000 prompts"),
    (["a", "--chunks", "0"], "--chunks 0; valid: 1 to 64"), (["a", "--frames", "0"], "--frames 0; valid: 1 to"),
    (["a", "--verify", "INIT"], "a prompt with --verify"), (["--steps", "2", "--verify", "INIT"], "--steps with"),
    (["a", "--pretrained", "x"], "--run with --pretrained"),
])
def test_mistakes_are_one_line_and_write_nothing(tiny_run, tmp_path, given, arguments, message):
    arguments = [given.get(word, word) for word in arguments]
    with pytest.raises((ValueError, OSError)) as caught:
        sample.main(["--run", str(tiny_run), "--out", str(tmp_path / "out"), *arguments] if "--verify" not in arguments
                    else ["--run", str(tiny_run), *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
