"""X/Y grids over any two parameters, and settings by name."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_calls import PROMPT, draw, parameters, pixels

import sample
from diffusion.samplers import SAMPLERS
from files.config import to_dict
from files.sheets import PAPER, axes_grid
from pipeline.loading import load_run
from pipeline.system import TextToImage, with_options
from sampling.request import (
    AXES,
    SETTINGS,
    Request,
    cross,
    describe,
    parse_axis,
    request_of,
    settings_of,
    value_text,
    with_settings,
)


@pytest.fixture(scope="module")
def system(tiny_run) -> TextToImage:
    return load_run(tiny_run)


def test_xy_grid_is_every_combination(tiny_run, tmp_path):
    files = draw(tiny_run, tmp_path / "a", PROMPT, "--xy", "steps=1,2,3", "guidance=1,4")
    data = [parameters(path) for name, path in files.items() if name != "xy.png"]
    assert [(d["steps"], d["guidance"]["scale"]) for d in data] == [(s, g) for g in (1, 4) for s in (1, 2, 3)]
    sheet = pixels(files["xy.png"])
    names = [name for name in files if name != "xy.png"]
    left, top = sheet.shape[1] - 3 * 136, sheet.shape[0] - 2 * 136
    for k, name in enumerate(names):
        y, x = top + k // 3 * 136, left + k % 3 * 136
        assert (sheet[y:y + 128, x:x + 128] == pixels(files[name]).repeat(4, 0).repeat(4, 1)).all()
    alone = draw(tiny_run, tmp_path / "b", PROMPT, "--steps", "2", "--guidance", "4")
    assert np.abs(pixels(files[names[4]]) - pixels(alone["00000_a-small-red-star_seed0.png"])).max() <= 1


@pytest.mark.parametrize("axes, cells", [
    (["sampler=ddim,ddpm", "seed=1,2"], [("ddim", 1), ("ddpm", 1), ("ddim", 2), ("ddpm", 2)]),
    (["prompt=a star|a moon, at night", "spacing=trailing,leading"],
     [("a star", "trailing"), ("a moon, at night", "trailing"),
      ("a star", "leading"), ("a moon, at night", "leading")]),
    (["negative=red|blue"], [("red",), ("blue",)])])
def test_xy_over_other_parameters(tiny_run, tmp_path, axes, cells):
    prompt = [] if axes[0].startswith("prompt") else [PROMPT]
    files = draw(tiny_run, tmp_path, *prompt, "--xy", *axes)
    names = [axis.partition("=")[0] for axis in axes]
    assert [tuple(parameters(path)[name] for name in names)
            for file, path in files.items() if file != "xy.png"] == cells


# another value of every option, and a sampler that has it
OPTIONS = {"eta": ("ddim", "0.5"), "clean_end": ("pndm", "false"), "variance": ("ddpm", "large"),
           "repeats": ("ddpm", "2"), "order": ("unipc", "1"), "sigma_data": ("lcm", "100"),
           "timestep_scaling": ("lcm", "0.001"), "noisy_end": ("ddpm", "true"), "extrapolate": ("pndm", "prediction"),
           "solver_type": ("dpm_solver_multistep", "heun"), "lower_order_final": ("unipc", "false"),
           "euler_at_final": ("dpm_solver_multistep", "true"), "third_order": ("dpm_solver_sde", "published"),
           "form": ("unipc", "bh1"), "uncorrected": ("unipc", "2")}
BESIDE = {"noisy_end": ["variance=large"], "third_order": ["order=3", "lower_order_final=false"],
          "lower_order_final": ["order=3"]}  # what an option needs beside it to act
OF_OTHER_ENDS = [("dpm_solver_singlestep", "lower_order_final"), ("dpm_solver_multistep", "euler_at_final"),
                 ("dpm_solver_sde", "euler_at_final")]  # they act where a run does not end at x_0


def test_every_axis_changes_its_parameter(system):
    values = {"steps": "7", "guidance": "2.5", "sampler": "euler", "seed": "9", "strength": "0.25", "prompt": "b",
              "negative": "c", "chunks": "2", "palette_weight": "0.5", "spacing": "leading", "offset": "1",
              "reuse": "2", "method": "apg", "interval": "0.5:4", "rescale": "0.7", "apg_parallel": "0.25",
              "apg_norm": "5", "apg_momentum": "-0.25", "zero_init": "0.1", "threshold": "0.9", "threshold_limit": "3",
              **{name: value for name, (_, value) in OPTIONS.items()}}
    assert values.keys() == AXES.keys()
    base = Request(PROMPT, 0, system.config.sampling, strength=0.5, palette="#ff0000:1.0000")
    fields_of_settings = {*to_dict(base.config), *to_dict(base.config.guidance), *OPTIONS, "prompt", "negative", "seed",
                          "strength", "chunks", "guidance", "palette_weight"}
    fields_of_settings -= {"scale", "options", "grid"}  # a grid is the checkpoint's
    assert values.keys() == fields_of_settings  # nothing that decides an image of one call is left out
    for name, value in values.items():
        start = replace(base, config=with_options(base.config, OPTIONS.get(name, ("ddim", ""))[0]))
        axis = parse_axis(f"{name}={value}")
        [request] = cross(start, [axis])
        assert request != start and value_text(value_of(request, name)) == value
        assert axis.labels == [value if name == "prompt" else f"{name} {value}"]
        assert request_of(settings_of(request)) == request
        if name in SETTINGS:
            assert with_settings(start.config, [f"{name}={value}"]) == request.config
            assert describe(request.config)[name] == f"{name} {value}"
    assert parse_axis("interval=off,0.2:inf").values == (None, (0.2, math.inf))


def value_of(request: Request, name: str):
    """What a request has for one parameter."""
    if name == "guidance":
        return request.config.guidance.scale
    if name in OPTIONS:
        return request.config.complete_options[name]
    return getattr(next(part for part in (request, request.config, request.config.guidance) if hasattr(part, name)),
                   name)


@pytest.mark.parametrize("sampler, name", [
    (sampler, name) for sampler in SAMPLERS for name in SAMPLERS[sampler].options])
def test_every_option_reaches_the_image_its_metadata_and_verify(tiny_run, tmp_path, sampler, name):
    """From --set another image, and the same one from --xy."""
    value = OPTIONS[name][1]
    # those of lcm matter near time 0 alone, those of order 3 after three steps from a time with signal
    steps = "20" if sampler == "lcm" else "8" if name in BESIDE else "4"
    flags = [PROMPT, "--sampler", sampler, "--steps", steps, "--exact"]
    file = "00000_a-small-red-star_seed0.png"
    beside = ["--set", *BESIDE[name]] if name in BESIDE else []
    plain = draw(tiny_run, tmp_path / "plain", *flags, *beside)[file]
    made = draw(tiny_run, tmp_path / "set", *flags, *(beside or ["--set"]), f"{name}={value}")[file]
    assert (pixels(plain) != pixels(made)).any() != ((sampler, name) in OF_OTHER_ENDS)
    stored = parameters(made)["options"]
    assert stored == {**parameters(plain)["options"], name: SETTINGS[name](value)}
    assert stored.keys() == SAMPLERS[sampler].options.keys()
    again = draw(tiny_run, tmp_path / "xy", *flags, *beside, "--xy", f"{name}={value}")[file]
    assert again.read_bytes() == made.read_bytes()
    assert sample.main(["--run", str(tiny_run), "--verify", str(made)]) == 0


def test_the_sampler_of_a_cell_is_set_before_its_options(system):
    """In either order of the axes, and for --set; an option that is not the new sampler's stays behind."""
    base = Request(PROMPT, 0, system.config.sampling)
    axes = [parse_axis("sampler=unipc,dpm_solver_multistep"), parse_axis("order=1,3")]
    for pair in (axes, axes[::-1]):
        assert {(r.config.sampler, r.config.complete_options["order"]) for r in cross(base, pair)} == {
            (sampler, order) for sampler in ("unipc", "dpm_solver_multistep") for order in (1, 3)}
    assert [r.config.options for r in cross(base, axes[:1], ["order=3"])] == [{"order": 3}] * 2
    with pytest.raises(ValueError, match="options.order: the sampler ddim has no such option; valid: eta, clean_end"):
        cross(base, [parse_axis("sampler=unipc,ddim")], ["order=3"])
    noisy = replace(base, config=with_settings(base.config, ["eta=0.5", "clean_end=false"]))
    assert [r.config.options for r in cross(noisy, [parse_axis("sampler=ddim,pndm,heun")])] == [
        {"eta": 0.5, "clean_end": False}, {"clean_end": False}, {}]


def test_variants_of_guidance_are_choices_like_others(tiny_run, tmp_path):
    """A grid over them; and set for a whole call they are the same images, said in the title and the metadata."""
    grid = draw(tiny_run, tmp_path / "grid", PROMPT, "--guidance", "4", "--xy", "method=cfg,apg,cfg_zero_star",
                "interval=off,0.5:4")
    files = [path for name, path in grid.items() if name != "xy.png"]
    assert [(d["guidance"]["method"], d["guidance"]["interval"]) for d in map(parameters, files)] == [
        (method, interval) for interval in (None, [0.5, 4.0]) for method in ("cfg", "apg", "cfg_zero_star")]
    assert len({path.read_bytes() for path in files}) == 6
    alone = draw(tiny_run, tmp_path / "alone", PROMPT, "--guidance", "4", "--set", "method=apg", "interval=0.5:4")
    image = alone["00000_a-small-red-star_seed0.png"]
    assert np.abs(pixels(image) - pixels(files[4])).max() <= 1
    assert parameters(image)["guidance"] == parameters(files[4])["guidance"]


@pytest.mark.parametrize("arguments, message", [
    (["--set", "steps=5"], "--set steps=5; valid: NAME=VALUE with one of spacing, offset"),
    (["--set", "rescale"], "--set rescale; valid: NAME=VALUE"),
    (["--set", "rescale=much"], "--set rescale=much; valid: a number"),
    (["--set", "interval=1"], "--set interval=1; valid: LOW:HIGH or off"),
    (["--set", "clean_end=no"], "--set clean_end=no; valid: true or false"),
    (["--set", "method=best"], "method: value 'best'; valid: cfg, apg, cfg_zero_star"),
    (["--set", "spacing=wide"], "spacing: value 'wide'; valid: leading, linspace, trailing"),
    (["--set", "interval=4:1"], "interval: value (4.0, 1.0); valid"),
    (["--set", "zero_init=0.1"], "zero_init: value 0.1 with prediction_type 'v_prediction'"),
    (["--set", "eta=0.5", "--sampler", "heun"], "options.eta: the sampler heun has no such option; valid: none"),
    (["--set", "order=3"], "options.order: the sampler ddim has no such option; valid: eta, clean_end"),
    (["--set", "eta=1.5"], "options.eta: value 1.5; valid: 0 .. 1"),
    (["--set", "eta=nan"], "options.eta: value nan; valid: 0 .. 1"),
    (["--sampler", "ddpm", "--set", "variance=medium"], "options.variance: value 'medium'; valid: small, large"),
    (["--sampler", "ddpm", "--set", "repeats=0"], "options.repeats: value 0; valid: a whole number, 1 .. 100"),
    (["--xy", "sampler=ddim,heun", "eta=0,1"], "options.eta: the sampler heun has no such option; valid: none"),
    (["--xy", "interval=1,2"], "--xy interval=1,2; valid: LOW:HIGH or off between the commas"),
    (["--xy", "spacing=karras"], "spacing: value 'karras' spaces sigma / alpha"),
])
def test_settings_that_cannot_be_are_one_line(tiny_run, tmp_path, arguments, message):
    with pytest.raises(ValueError) as caught:
        sample.main(["--run", str(tiny_run), "--out", str(tmp_path / "out"), PROMPT, *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_labels_stand_on_top_and_at_the_left():
    images = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    sheet = np.asarray(axes_grid(images, ["steps 5", "steps 10", "steps 20"], ["guidance 1", "guidance 3"], cell=32))
    dark = (sheet == 0).all(axis=2)
    left, top = np.argmax(dark.any(axis=0)), np.argmax(dark.any(axis=1))
    assert dark.sum() == 6 * 32 * 32
    for part in (sheet[:top, left:left + 40], sheet[:top, left + 40:left + 80], sheet[top:top + 32, :left],
                 sheet[top + 40:top + 72, :left]):
        assert (part != PAPER).any()
    with pytest.raises(ValueError, match="6 images for 2 rows of 2"):
        axes_grid(images, ["a", "b"], ["c", "d"])
