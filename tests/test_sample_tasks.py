"""sample.py beyond plain prompts: editing, interpolation, inversion, sheets, grids, exact bytes and verification."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import sample
from diffusion.noise import PerImageNoise
from diffusion.tasks import slerp
from eval.grid import PAPER, axes_grid, heated
from model.attention_maps import AttentionMaps, watched
from pipeline import TextToImage
from prompts import chunks_of, parse_prompt
from sampling.draw import Sources, drawn_latents, edit_of
from sampling.files import read_mask, read_picture
from sampling.request import AXES, Request, Toward, crossed, parse_axis, request_of, settings_of

PROMPT = "a small red star"


@pytest.fixture(scope="module")
def system(tiny_run) -> TextToImage:
    return TextToImage.load(tiny_run)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """Pictures to start from, good and bad, by name."""
    folder = tmp_path_factory.mktemp("given")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "INIT.png")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[5:20, 9:23] = 255  # on no boundary of the latent
    Image.fromarray(mask).save(folder / "MASK.png")
    Image.fromarray(mask[:16]).save(folder / "SMALL.png")
    (folder / "TEXT.png").write_text("no picture")
    (folder / "CUT.png").write_bytes((folder / "INIT.png").read_bytes()[:900])
    Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(folder / "DEEP.png")
    return {path.stem: str(path) for path in folder.iterdir()}


def draw(tiny_run, out: Path, *arguments: str) -> dict[str, Path]:
    """Call sample.py; the files it wrote by name."""
    assert sample.main(["--run", str(tiny_run), "--out", str(out), "--steps", "3", *arguments]) == 0
    return {path.name: path for path in sorted(Path(out).iterdir())}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def parameters(path: Path) -> dict:
    with Image.open(path) as picture:
        return json.loads(picture.text["parameters"])


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
    """Of the steps that are asked for, and of the latents from the picture's."""
    image = read_picture(given["INIT"])
    x_0 = system.encoded_images(image[None])
    config = system.experiment.sampling
    away = []
    for strength in (0.34, 0.67, 1.0):
        trace: list = []
        request = Request(PROMPT, 0, config, strength=strength)
        latents = drawn_latents(system, [request], Sources(image), trace=trace)
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
    for picture in made:
        assert (picture[~paint] == original[~paint]).all()
        assert (picture[paint] != original[paint]).mean() > 0.9
    assert (made[0][paint] != made[1][paint]).any()  # another seed, another painting


def test_the_network_sees_what_is_kept(system, given):
    """Latents that lie wholly under kept pixels are those of the picture."""
    image, paint = read_picture(given["INIT"]), read_mask(given["MASK"])
    latents = drawn_latents(system, [Request(PROMPT, 0, system.experiment.sampling, strength=1.0)],
                            Sources(image, paint))
    away = (latents - system.encoded_images(image[None]))[0].abs().amax(dim=0)  # (8, 8), four pixels each
    painted = paint.unflatten(0, (8, 4)).unflatten(2, (8, 4)).permute(0, 2, 1, 3).flatten(2).any(dim=2)
    assert torch.equal(edit_of(system, 1.0, Sources(image, paint), 1).keep[0, 0], 1.0 - painted.float())
    assert painted.sum() == 4 * 4 and away[~painted].max() < 1e-4 < away[painted].min()


def test_pictures_are_read_as_they_look(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0, 255], [0, 0, 0, 0]]], dtype=np.uint8)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").permute(1, 2, 0).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (3, 4, 2)
    Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8)).save(tmp_path / "grey.png")
    assert read_mask(tmp_path / "grey.png").tolist() == [[False, False, True, True]]


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
    for picture, (prompt, seed) in zip((made[0], made[2]), ends):
        out = draw(tiny_run, tmp_path / str(seed + prompt), prompts[prompt], *flags, "--seed", str(seed))
        assert np.abs(pixels(out[list(out)[0]]) - picture).max() <= 1


def test_noise_is_spherical_and_text_linear(system, monkeypatch):
    seen = {}
    monkeypatch.setattr(system, "sampled", lambda context, mask, count, noise, *rest: seen.update(
        context=context, mask=mask, noise=noise()) or noise())
    request = Request("a red star", 1, system.experiment.sampling, toward=Toward("a blue star", 2, 0.25))
    drawn_latents(system, [request], Sources())
    a, b = (PerImageNoise([seed], system.latent_shape)() for seed in (1, 2))
    torch.testing.assert_close(seen["noise"], slerp(a, b, 0.25))
    context, mask = system.encode([parse_prompt(text) for text in ("a red star", "a blue star")])
    first, second = context[0][mask[0]], context[1][mask[1]]
    if len(first) == len(second):
        torch.testing.assert_close(seen["context"][1][: len(first)], torch.lerp(first, second, 0.25))


def test_inversion_leads_back_and_says_how_far(tiny_run, tmp_path, given, capsys):
    """Where the picture is one of the network's own; more refinements, less error."""
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

def test_frames_end_in_the_picture(tiny_run, tmp_path):
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
    config = system.experiment.sampling
    with watched(system.unet, maps):
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
    cells = 1 + len(chunks_of(parse_prompt(PROMPT), system.tokenizer).words)  # the picture and its tokens
    assert cells == 1 + mask[0].sum() - 2 and sheet.shape[1] == 8 + min(8, cells) * 136


def test_heat_goes_from_black_to_white():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    hot = heated(image, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert hot[:, 0, 0].tolist() == [0, 0, 0] and hot[:, 0, -1].tolist() == [178, 178, 178]
    red, green, blue = hot[:, 0, 3].tolist()
    assert red > green > blue == 0


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


def test_every_axis_changes_its_parameter(system):
    base = Request(PROMPT, 0, system.experiment.sampling, strength=0.5)
    values = {"steps": "7", "guidance": "2.5", "sampler": "euler", "seed": "9", "strength": "0.25", "prompt": "b",
              "negative": "c", "spacing": "leading", "eta": "0.5", "order": "1"}
    assert values.keys() == AXES.keys()
    for name, value in values.items():
        [request] = crossed(base, [parse_axis(f"{name}={value}")])
        given = {**settings_of(request), "guidance": request.config.guidance.scale}
        assert request != base and str(given[name]) == value


def test_labels_stand_on_top_and_at_the_left():
    images = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    sheet = np.asarray(axes_grid(images, ["steps 5", "steps 10", "steps 20"], ["guidance 1", "guidance 3"], cell=32))
    dark = (sheet == 0).all(axis=2)
    left, top = np.argmax(dark.any(axis=0)), np.argmax(dark.any(axis=1))
    assert dark.sum() == 6 * 32 * 32
    for part in (sheet[:top, left:left + 40], sheet[:top, left + 40:left + 80], sheet[top:top + 32, :left],
                 sheet[top + 40:top + 72, :left]):
        assert (part != PAPER).any()
    with pytest.raises(ValueError, match="6 pictures for 2 rows of 2"):
        axes_grid(images, ["a", "b"], ["c", "d"])


# ---- exact, metadata, verify

def test_exact_bytes_do_not_depend_on_the_batch(tiny_run, tmp_path, system, monkeypatch):
    """64 pictures at batch 1, 7 and 64. The network is called with one picture and its unconditional twin."""
    prompts = [f"{count} {colour} {kind}" for count in ("a", "two") for colour in ("red", "blue", "green", "pink")
               for kind in ("star", "moon", "circle", "square")]
    sizes, forward = set(), type(system.unet).forward
    monkeypatch.setattr(type(system.unet), "forward", lambda self, x, *rest, **named: sizes.add(len(x)) or forward(
        self, x, *rest, **named))
    made = []
    for batch in ("1", "7", "64"):
        files = draw(tiny_run, tmp_path / batch, *prompts, "--n", "2", "--steps", "2", "--batch", batch, "--exact")
        made.append({name: path.read_bytes() for name, path in files.items()})
    assert len(made[0]) == 65 and made[0] == made[1] == made[2] and sizes == {2}
    name = "00041_two-blue-star_seed41.png"
    alone = draw(tiny_run, tmp_path / "alone", "two blue star", "--seed", "41", "--steps", "2", "--exact")
    assert alone["00000_two-blue-star_seed41.png"].read_bytes() == made[0][name]  # nor on the place
    assert parameters(tmp_path / "7" / name)["exact"] == {"threads": torch.get_num_threads()}


def test_no_metadata_leaves_nothing(tiny_run, tmp_path):
    files = draw(tiny_run, tmp_path, PROMPT, "--no-metadata", "--frames", "2", "--attention")
    for name, path in files.items():
        if name.endswith(".png"):
            data, kinds = path.read_bytes()[8:], []
            while data:
                length, kind = int.from_bytes(data[:4], "big"), data[4:8]
                kinds.append(kind)
                data = data[12 + length:]
            assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}, name
        assert b"red star" not in path.read_bytes()
    assert sample.main(["--run", str(tiny_run), "--verify", str(files["00000_a-small-red-star_seed0.png"])]) == 1


KINDS = {
    "plain": [PROMPT, "--negative", "[blue]", "--sampler", "ddpm"],
    "exact": [PROMPT, "a moon", "--exact", "--seed", "3"],
    "image to image": [PROMPT, "--init", "INIT", "--strength", "0.7"],
    "inpainting": [PROMPT, "--init", "INIT", "--mask", "MASK"],
    "inversion": [PROMPT, "--invert", "INIT"],
    "interpolation": [PROMPT, "a moon", "--interpolate", "2", "--batch", "1"],
    "large": ["(a star:1.2) (" + "a moon, " * 12 + ")", "--size", "48x32", "--chunks", "3", "--tiled"],
    "literal": ["a (star", "--literal"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_verified(tiny_run, tmp_path, given, kind, capsys):
    flags = [given.get(flag, flag) for flag in KINDS[kind]]
    if kind == "large":
        flags = [flag for flag in flags if flag != "--init"]
    files = draw(tiny_run, tmp_path, *flags)
    paths = [str(path) for name, path in files.items() if name != "grid.png"]
    named = [part for flag in ("--init", "--mask", "--invert") if flag in flags
             for part in (flag, flags[flags.index(flag) + 1])]
    capsys.readouterr()
    assert sample.main(["--run", str(tiny_run), *named, "--verify", *paths]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: equal, {Path(path).stat().st_size} bytes" for path in paths]
    settings = parameters(Path(paths[-1]))
    request = request_of(settings)
    assert settings_of(request).items() <= settings.items()
    if named:
        assert sample.main(["--run", str(tiny_run), "--verify", paths[0]]) == 1
        assert "was made from the picture 'INIT.png'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def picture(tiny_run, tmp_path_factory) -> Path:
    return draw(tiny_run, tmp_path_factory.mktemp("one"), PROMPT)["00000_a-small-red-star_seed0.png"]


def verify(tiny_run, path: Path, capsys, *flags: str) -> tuple[int, str]:
    """(exit code, what was said)."""
    capsys.readouterr()
    code = sample.main(["--run", str(tiny_run), *flags, "--verify", str(path)])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) + len(said.err.splitlines()) == 1
    return code, said.out + said.err


def rewritten(picture: Path, path: Path, settings: dict | None = None, change=lambda pixels: None) -> Path:
    """The picture with other settings or pixels, as a sound PNG."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", json.dumps(settings or parameters(picture), ensure_ascii=False, sort_keys=True))
    values = pixels(picture).astype(np.uint8)
    change(values)
    Image.fromarray(values).save(path, pnginfo=info)
    return path


def test_a_changed_byte_is_found(tiny_run, tmp_path, picture, capsys):
    data = picture.read_bytes()
    for place in (*range(0, len(data), 97), len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / "changed.png").write_bytes(changed)
        code, said = verify(tiny_run, tmp_path / "changed.png", capsys)
        assert code == 1 and "changed.png" in said, place
    (tmp_path / "longer.png").write_bytes(data + b"\0")
    assert verify(tiny_run, tmp_path / "longer.png", capsys)[0] == 1
    assert verify(tiny_run, picture, capsys)[0] == 0


def test_a_changed_pixel_or_setting_is_found(tiny_run, tmp_path, picture, capsys):
    def one_level(values):
        values[3, 4, 1] ^= 1

    assert verify(tiny_run, rewritten(picture, tmp_path / "same.png"), capsys)[0] == 0
    code, said = verify(tiny_run, rewritten(picture, tmp_path / "a.png", change=one_level), capsys)
    assert code == 1 and "not equal, 1 of 3072 values differ, by up to 1 of 255" in said
    settings = parameters(picture)
    code, said = verify(tiny_run, rewritten(picture, tmp_path / "b.png", {**settings, "seed": 1}), capsys)
    assert code == 1 and "values differ" in said
    code, said = verify(tiny_run, rewritten(picture, tmp_path / "c.png", {**settings, "eta": 0}), capsys)
    assert code == 1 and "the pixels are but not the file" in said  # 0 in place of 0.0


@pytest.mark.parametrize("change, message", [
    ({"weights": {"denoiser": "0" * 16}}, "was made with other weights than those in"),
    ({"steps": "many"}, "steps: got 'many'; valid: a whole number"), ({"steps": None}, "steps"),
    ({"seed": -1}, "seed: value -1"),
    ({"size": 3}, "size"), ({"size": "33"}, "33x33; valid: multiples of"), ({"exact": {"threads": 0}}, "threads"),
    ({"chunks": 10**9}, "chunks: value 1000000000"), ({"refinements": 10**9}, "refinements"), ({"colour": 1}, "colour"),
    ({"init": "a"}, "init"), ({"prompt": "a (b"}, "is not closed"), ({"toward": {"prompt": "a"}}, "toward"),
    ({"pretrained": "sd"}, None)])
def test_settings_that_cannot_be_drawn_are_one_line(tiny_run, tmp_path, picture, capsys, change, message):
    path = rewritten(picture, tmp_path / "a.png", {**parameters(picture), **change})
    code, said = verify(tiny_run, path, capsys)
    assert code == 1 and (message is None or "error: " in said and message in said)


def test_what_cannot_be_verified_says_why(tiny_run, tmp_path, picture, capsys, given):
    run = tmp_path / "other"
    shutil.copytree(tiny_run, run)
    weights = bytearray((run / "denoiser.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "denoiser.safetensors").write_bytes(weights)
    code, said = verify(run, picture, capsys)
    assert code == 1 and "was made with other weights" in said and "denoiser has the hash" in said
    for path, message in ((given["INIT"], "holds no settings"), (given["TEXT"], "is damaged or no picture"),
                          (tmp_path / "none.png", "no picture")):
        code, said = verify(tiny_run, Path(path), capsys)
        assert code == 1 and said.startswith("error: ") and message in said
    code, said = verify(tiny_run, picture, capsys, "--init", given["INIT"])
    assert code == 1 and "was not made with --init" in said
    edited = draw(tiny_run, tmp_path / "out", PROMPT, "--init", given["INIT"])["00000_a-small-red-star_seed0.png"]
    code, said = verify(tiny_run, edited, capsys, "--init", given["MASK"])
    assert code == 1 and "was made from another picture" in said
    assert sample.main(["--run", str(tiny_run), "--verify", given["TEXT"], str(picture)]) == 1  # the good one too
    assert "equal" in capsys.readouterr().out


# ---- mistakes

@pytest.mark.parametrize("arguments, message", [
    (["a", "--init", "NOWHERE.png"], "no picture NOWHERE.png"),
    (["a", "--init", "TEXT"], "TEXT.png is damaged or no picture"),
    (["a", "--init", "CUT"], "CUT.png is damaged or no picture"),
    (["a", "--init", "DEEP"], "has pixels of kind I;16; valid: 8 bits"),
    (["a", "--init", "SMALL"], "16x32 pixels (HxW); valid: 32x32"),
    (["a", "--init", "INIT", "--mask", "SMALL"], "the mask has 16x32 pixels (HxW); valid: 32x32"),
    (["a", "--init", "INIT", "--mask", "TEXT"], "is damaged or no picture"),
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
    (["a", "--n", "2", "--xy", "steps=1,2"], "2 pictures with --xy; valid: one prompt"),
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
