"""Styles and palettes of sample.py: what they change, that they are kept in the image, and mistakes in one line."""
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sample_calls import PROMPT, draw, parameters, pixels

import sample
from eval.colour import palette_error
from pipeline.loading import load_run
from pipeline.palette import THEMES, parse_palette
from pipeline.styles import DEFAULT, read_styles
from sampling import flags
from sampling.request import Request, Toward, request_of, settings_of
from sampling.styling import list_of_styles

FILE = f"00000_{PROMPT.replace(' ', '-')}_seed0.png"
COLOURS = "#c02020,#2040c0:0.75"


@pytest.fixture(scope="module")
def vivid_run(tiny_run, tmp_path_factory):
    """The tiny run with a text encoder and a decoder whose output depends more on their input than after 12 steps."""
    run = tmp_path_factory.mktemp("vivid") / "run"
    shutil.copytree(tiny_run, run)
    for name, key, factor in (("autoencoder", "decoder.conv_out.weight", 60.0), ("denoiser", "conv_out.weight", 20.0)):
        tensors = load_file(run / f"{name}.safetensors")
        save_file({**tensors, key: tensors[key] * factor}, run / f"{name}.safetensors")
    return run


def error_of(path, colours: str = COLOURS) -> float:
    image = torch.from_numpy(pixels(path).astype(np.uint8)).permute(2, 0, 1)[None]
    return float(palette_error(image, parse_palette(colours).srgb))


def test_samples_are_drawn_to_a_palette_by_its_weight(vivid_run, tmp_path):
    errors = [error_of(draw(vivid_run, tmp_path / str(weight), PROMPT, "--palette", COLOURS, "--palette-weight",
                            str(weight))[FILE]) for weight in (0, 0.3, 3)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.97 * errors[0]
    plain = draw(vivid_run, tmp_path / "plain", PROMPT)[FILE]
    assert np.array_equal(pixels(plain), pixels(tmp_path / "0" / FILE))


def test_no_colours_but_those_of_the_palette(tiny_run, tmp_path):
    path = draw(tiny_run, tmp_path, PROMPT, "--palette", COLOURS, "--palette-only")[FILE]
    assert {tuple(colour) for colour in pixels(path).reshape(-1, 3).tolist()} <= {(192, 32, 32), (32, 64, 192)}
    assert error_of(path) < 1e-3
    assert parameters(path)["palette_weight"] == 0 and parameters(path)["palette_only"] is True


@pytest.mark.parametrize("arguments", [["--palette-weight", "1"], ["--palette-only"]])
def test_an_image_is_verified_with_its_palette_whose_image_is_not_needed_again(tiny_run, tmp_path, arguments, capsys):
    source = tmp_path / "colours.png"
    Image.fromarray(np.repeat(np.uint8([[[200, 30, 30]]] * 3 + [[[30, 30, 200]]]), 8, axis=1)).save(source)
    path = draw(tiny_run, tmp_path / "out", PROMPT, "--exact", "--palette", str(source), *arguments)[FILE]
    source.unlink()
    assert parameters(path)["palette"].startswith("#c81e1e:0.7500,#1e1ec8:0.2500")
    assert sample.main(["--verify", str(path), "--run", str(tiny_run)]) == 0
    assert "equal" in capsys.readouterr().out


def test_a_style_is_its_words_and_its_strength_an_amount_of_it(vivid_run, tmp_path):
    full = draw(vivid_run, tmp_path / "full", PROMPT, "--style", "noto")
    assert [parameters(path)["prompt"] for name, path in full.items() if name != "grid.png"] == [
        f"{PROMPT}, noto style"]
    words = draw(vivid_run, tmp_path / "words", f"{PROMPT}, noto style")
    plain = draw(vivid_run, tmp_path / "plain", PROMPT)[FILE]
    [first], [second] = ([pixels(path) for name, path in made.items() if name != "grid.png"] for made in (full, words))
    assert np.array_equal(first, second)
    away = []
    for strength in ("0", "0.25", "0.75", "1", "1.75"):
        made = draw(vivid_run, tmp_path / strength, PROMPT, "--style", f"noto:{strength}")
        [path] = [path for name, path in made.items() if name.startswith("00000")]
        away.append(np.abs(pixels(path) - pixels(plain)).mean())
        if strength in ("0", "1"):
            assert "mixed" not in parameters(path)
        else:
            assert parameters(path)["mixed"] == [{"prompt": f"{PROMPT}, noto style", "weight": float(strength)}]
    assert away[0] == 0 and away == sorted(away) and away[4] > away[3] > away[1]


@pytest.mark.parametrize("arguments", [
    ["--style", "noto:0.5", "flat:1.5"], ["--style", "noto:0.5", "--bulk", "--files"]])
def test_an_image_with_strengths_is_verified(tiny_run, tmp_path, arguments, capsys):
    if "--bulk" in arguments:
        (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")
        arguments = [*arguments, "--prompts", str(tmp_path / "prompts.txt")]
    else:
        arguments = [PROMPT, *arguments]
    assert sample.main([*arguments, "--run", str(tiny_run), "--out", str(tmp_path / "out"), "--exact"]) == 0
    [path] = [path for path in (tmp_path / "out").rglob("*.png") if path.name != "grid.png"]
    assert len(parameters(path)["mixed"]) == arguments.count("flat:1.5") + 1
    assert sample.main(["--verify", str(path), "--run", str(tiny_run)]) == 0
    assert "equal" in capsys.readouterr().out


def test_metadata_whose_strength_was_a_way_between_contexts_means_what_it_meant(vivid_run):
    """Older versions wrote a strength as half an interpolation from the same seed, and that is how it is read."""
    config = load_run(vivid_run, moderation=None).config.sampling
    older = Request(PROMPT, 0, config, toward=Toward(f"{PROMPT}, noto style", 0, 0.5))
    assert request_of(settings_of(older)) == older


def test_styles_of_a_file_bring_negative_prompt_guidance_and_palette(tiny_run, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"styles": [
        {"name": "bare", "guidance": 0.0},
        {"name": "mine", "prompt": "my {prompt}", "negative": "dull", "guidance": 2.0, "palette": "#fff,#000"}]}))
    arguments = [PROMPT, "--style", "mine", "--style-file", str(file)]
    [path] = [path for name, path in draw(tiny_run, tmp_path / "a", *arguments).items() if name != "grid.png"]
    found = parameters(path)
    assert (found["prompt"], found["negative"], found["guidance"]["scale"]) == (f"my {PROMPT}", "dull", 2.0)
    assert found["palette"] == "#ffffff:0.5000,#000000:0.5000"
    bare = draw(tiny_run, tmp_path / "bare", PROMPT, "--style", "bare", "--style-file", str(file))[FILE]
    assert parameters(bare)["guidance"]["scale"] == 0.0
    made = draw(tiny_run, tmp_path / "b", *arguments, "--guidance", "4", "--palette", "ocean")
    [path] = [path for name, path in made.items() if name != "grid.png"]
    assert parameters(path)["guidance"]["scale"] == 4.0 and parameters(path)["palette"] != found["palette"]


def test_what_is_judged_is_what_is_drawn(tiny_run, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(sample, "Job", lambda system, requests, sources: seen.extend(
        text for request in requests for text in request.texts) or (_ for _ in ()).throw(ValueError("seen")))
    with pytest.raises(ValueError, match="seen"):
        sample.main([PROMPT, "--run", str(tiny_run), "--style", "impressionist", "noto:0.5"])
    painted = read_styles(DEFAULT)["impressionist"]
    assert {painted.of_prompt(PROMPT), f"{painted.of_prompt(PROMPT)}, noto style", painted.negative} <= set(seen)


@pytest.mark.parametrize("arguments, message", [
    (["--style", "notto"], "--style notto; valid: noto"),
    (["--style", "noto:2.5"], "--style noto:2.5; valid: NAME:STRENGTH with a strength from 0 to 2"),
    (["--style", *(f"{name}:0.5" for name in ("noto", "flat", "fluent", "twemoji", "openmoji"))],
     "mixed: 5 prompts; valid: up to 4"),
    (["--style", "line-art", "neon"], "styles with palette monochrome and neon; valid"),
    (["--style", "noto", "--style-file", "nowhere.yaml"], "nowhere.yaml"),
    (["--style", "noto:0.5", "--interpolate", "3"], "--style with a strength that is not 1 and --interpolate"),
    (["--palette", "greenish"], "palette: 'greenish'; valid: colours such as"),
    (["--palette-weight", "1"], "--palette-weight without --palette; valid: both"),
    (["--palette", "ocean", "--palette-weight", "11"], "--palette-weight 11.0; valid: 0 to 10"),
    (["--xy", "palette_weight=0,1"], "--xy palette_weight without --palette"),
])
def test_mistakes_are_one_line(tiny_run, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError)) as caught:
        sample.main([PROMPT, "--run", str(tiny_run), "--out", str(tmp_path), *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_styles_are_listed(capsys):
    assert sample.main(["--styles"]) == 0
    assert capsys.readouterr().out.strip() == list_of_styles(None)
    assert all(name in list_of_styles(None) for name in read_styles(DEFAULT))
    assert flags.THEMES == tuple(THEMES)


def test_a_prompt_is_drawn_in_every_style(tiny_run, tmp_path):
    """Without a style first, the same seed in all of them; each with its own guidance and palette."""
    file = tmp_path / "styles.yaml"
    file.write_text("styles:\n- {name: bright, prompt: \"bright {prompt}\", guidance: 2}\n"
                    "- {name: grey, prompt: grey, palette: monochrome}\n")
    assert sample.main([PROMPT, "--run", str(tiny_run), "--styles", "--style-file", str(file), "--exact",
                        "--out", str(tmp_path / "all")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "all" / "results.jsonl").read_text().splitlines()]
    drawn = [parameters(tmp_path / "all" / row["file"]) for row in rows]
    assert [settings["prompt"] for settings in drawn] == [PROMPT, f"bright {PROMPT}", f"{PROMPT}, grey"]
    assert len({settings["seed"] for settings in drawn}) == 1 and (tmp_path / "all" / "grid.png").exists()
    for row, arguments in zip(rows, ([], ["--style", "bright"], ["--style", "grey"])):
        out = tmp_path / row["file"].removesuffix(".png")
        assert sample.main([PROMPT, "--run", str(tiny_run), *arguments, "--style-file", str(file), "--exact", "--out",
                            str(out)]) == 0
        [alone] = out.glob("0*.png")
        assert alone.read_bytes() == (tmp_path / "all" / row["file"]).read_bytes()
    with pytest.raises(ValueError, match="--styles"):
        sample.main([PROMPT, "--run", str(tiny_run), "--styles", "--style", "noto"])
