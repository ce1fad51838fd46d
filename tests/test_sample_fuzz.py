"""Whatever is written on the command line of sample.py, and whatever the files in it hold, ends in an exit code and one
line; no input is changed. The cases are drawn from a seed, so that a failure can be drawn again by its number."""
import contextlib
import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_calls import draw, given_images

import sample

CODES = {0, 1, 5}  # drawn, not verified, refused; 2 is that of argparse
TEXTS = ["a red star", "two blue circles", "", " ", "\udcff", "\0", "🟥 日本", "a" * 3000, "é\u202e\u2028x", "\n"]
SIGNS = list("()[]{}|:\\<> .") + ["0.5", "10", "1e99", "-1", "a", "star", "BREAK", "AND", "<lora:x:1>", "zorbic"]
NUMBERS = ["0", "1", "2", "-1", "1.5", "x", "", "nan", "inf", "1e999", "4294967296", "99999999999999999999", "0x1", "１"]
SETTINGS = ["eta=0.5", "eta=2", "eta=", "=", "x", "method=apg", "method=x", "interval=0.5:8", "interval=off",
            "interval=1", "interval=a:b", "rescale=0.7", "order=2", "spacing=x", "spacing=leading", "offset=-1",
            "offset=1", "threshold=2", "clean_end=maybe", "apg_momentum=-2", "zero_init=0.1"]
AXES = ["steps=1,2", "steps=", "steps=a", "guidance=1,2", "seed=1,-1", "prompt=a|b", "prompt=[a|b]|c", "x=1", "=",
        "strength=0.5,1", "negative=|a", "chunks=1,2", "sampler=ddim,x", "eta=0,1"]


def files_of(folder: Path, run: Path) -> dict[str, list[str]]:
    """Good and bad files of each kind, by kind."""
    given = given_images(folder)
    rng = np.random.default_rng(0)
    png = Path(given["INIT"]).read_bytes()
    for number in range(12):
        broken = bytearray(png)
        for place in rng.integers(0, len(png), number + 1):
            broken[place] ^= int(rng.integers(1, 256))
        end = int(rng.integers(1, len(png) + 1)) if number % 3 else len(png)
        (folder / f"broken{number}.png").write_bytes(broken[:end])
    Image.new("LA", (32, 32), (0, 0)).save(folder / "clear.png")
    Image.new("L", (32, 32), 1).save(folder / "one.png")
    Image.new("CMYK", (32, 32)).save(folder / "cmyk.jpg")
    Image.new("RGB", (1, 1)).save(folder / "tiny.gif")
    (folder / "noise").write_bytes(rng.bytes(500))
    (folder / "prompts.txt").write_text("a red star\n[a|b]\n\n{a|b} moon\n", encoding="utf-8")
    (folder / "folder").mkdir()
    drawn = draw(run, folder / "drawn", "a red star", "[a star|a moon]")
    images = [str(path) for path in folder.iterdir() if path.suffix in (".png", ".jpg", ".gif", ".tif")]
    bad = [str(folder / name) for name in ("noise", "folder", "missing.png", "prompts.txt")]
    return {"image": [*images, *images, *bad, *map(str, drawn.values())], "text": [str(folder / "prompts.txt"), *bad]}


def prompt(rng: random.Random) -> str:
    """A usual prompt, an odd one, or signs in any order."""
    if rng.random() < 0.6:
        return rng.choice(TEXTS) if rng.random() < 0.3 else rng.choice(TEXTS[:2])
    return "".join(rng.choice(SIGNS) for _ in range(rng.randint(1, 12)))


def arguments(rng: random.Random, run: Path, files: dict[str, list[str]]) -> list[str]:
    """A command line."""
    def number(usual: list[str]) -> str:
        return rng.choice(usual) if rng.random() < 0.8 else rng.choice(NUMBERS)

    given = [prompt(rng) for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    flags = {
        "--n": lambda: [number(["1", "2"])], "--seed": lambda: [number(["0", "7"])],
        "--steps": lambda: [number(["1", "2", "3"])], "--guidance": lambda: [number(["1", "3"])],
        "--batch": lambda: [number(["1", "2"])], "--chunks": lambda: [number(["1", "2"])],
        "--sampler": lambda: [rng.choice(["ddim", "heun", "ddpm", "pndm", "unipc", "lcm", "flow_euler", "x"])],
        "--set": lambda: rng.sample(SETTINGS, rng.randint(1, 2)), "--xy": lambda: rng.sample(AXES, rng.randint(1, 2)),
        "--negative": lambda: [prompt(rng)], "--literal": lambda: [],
        "--prompts": lambda: [rng.choice(files["text"])], "--init": lambda: [rng.choice(files["image"])],
        "--mask": lambda: [rng.choice(files["image"])], "--invert": lambda: [rng.choice(files["image"])],
        "--strength": lambda: [number(["0.5", "1"])], "--interpolate": lambda: [number(["2", "3"])],
        "--to-seed": lambda: [number(["5"])], "--refinements": lambda: [number(["0", "1"])],
        "--frames": lambda: [number(["1", "2"])], "--attention": lambda: [], "--exact": lambda: [],
        "--no-metadata": lambda: [], "--tiled": lambda: [], "--speed": lambda: [rng.choice(["exact", "fast"])],
        "--size": lambda: [rng.choice(["32", "16x32", "31", "0", "x", ""])],
        "--moderation": lambda: [rng.choice(["block", "flag", "off"])],
        "--verify": lambda: [rng.choice(files["image"])], "--weak": lambda: [rng.choice(files["image"])],
        "--concepts": lambda: [rng.choice(files["text"])], "--pretrained": lambda: [rng.choice(files["text"])],
        "--unknown": lambda: [], "--audit": lambda: rng.sample(files["text"], 2)}
    for name in rng.sample(sorted(flags), rng.choice([0, 1, 1, 2, 2, 3, 4])):
        given += [name, *flags[name]()]
        if name == "--mask" and "--init" not in given and rng.random() < 0.8:
            given += ["--init", rng.choice(files["image"])]
    steps = [] if {"--steps", "--verify", "--xy"} & {*given} else ["--steps", "2"]
    return [*given, *steps, *([] if "--pretrained" in given else ["--run", str(run)])]


def outcome(given: list[str]) -> str:
    """How a call ends, as the command's last lines treat it. Anything but an exit code or an error of the kinds that
    they catch is raised."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = sample.main(given)
    except (ValueError, OSError) as error:
        assert str(error).strip() and "\n" not in str(error).strip(), repr(str(error))
        return "one line"
    except SystemExit as end:
        assert end.code == 2 and said.getvalue().splitlines()[-1].startswith("sample.py: error: ")
        return "argparse"
    assert code in CODES
    return f"exit {code}"


@pytest.mark.parametrize("first, count", [(0, 40), pytest.param(40, 1000, marks=pytest.mark.slow)])
def test_every_command_line_ends_in_an_exit_code_and_one_line(tiny_run, tmp_path, monkeypatch, first, count):
    monkeypatch.chdir(tmp_path)
    files = files_of(tmp_path, tiny_run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ends: Counter[str] = Counter()
    for number in range(first, first + count):
        given = arguments(random.Random(number), tiny_run, files)
        try:
            ends[outcome([*given, *([] if "--verify" in given else ["--out", str(tmp_path / "out")])])] += 1
        except BaseException as error:
            raise AssertionError(f"case {number}: {given}") from error
        changed = [path for path, data in before.items() if path.read_bytes() != data]
        assert not changed, f"case {number}: {given} changed {changed}"
    assert ends["exit 0"] > count / 8 and ends["one line"] > count / 8, ends
