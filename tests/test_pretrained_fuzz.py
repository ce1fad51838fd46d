"""Published checkpoints that somebody changed, cut or lost parts of: each is drawn, or refused in one line.

A case is a number: its seed decides what is done to the files. A case is no mistake of the program if it raises
ValueError or OSError with one line, which `sample.py` prints; anything else fails with the number of the case.
"""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_vocabulary import write_vocabulary
from safetensors.torch import load_file, save_file
from test_pretrained import published
from test_pretrained_single import networks, single_state

from pipeline.loading import load_pretrained

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CASES, PARTS = 1000, 20
VALUES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**9, -5, 0.5, -0.1, 1e300, float("nan"),
                           float("inf"), "", "x", "fp16", [], [1], [1, 2], [0, 0], ["a"], {}, {"a": 1}, [[1]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """A diffusers folder, whole and in shards; and a folder with a single file and its tokenizer."""
    parent = tmp_path_factory.mktemp("fuzz")
    pipeline = published(parent, "sd1")
    pipeline.save_pretrained(parent / "shards", max_shard_size="200KB")
    single = parent / "single"
    write_vocabulary(single / "tokenizer")
    save_file(single_state(networks("1.x"), "1.x"), single / "model.safetensors", {"modelspec.prediction_type": "v"})
    shutil.copytree(parent / "shards" / "unet", parent / "pipeline" / "sharded_unet")
    return parent / "pipeline", single


def change_json(path: Path, draw: random.Random) -> None:
    """One to three values of a JSON file are others, absent, or new."""
    data = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(draw.randint(1, 3)):
        node: Any = data
        while isinstance(node, dict) and node:
            key = draw.choice(sorted(node))
            if isinstance(node[key], dict) and draw.random() < 0.7:
                node = node[key]
                continue
            kind = draw.random()
            if kind < 0.15:
                del node[key]
            elif kind < 0.25:
                key = draw.choice(["new_key", "thresholding", "sigma_min", "rescale_betas_zero_snr"])
                node[key] = draw.choice(VALUES)
            else:
                node[key] = draw.choice(VALUES)
            break
    path.write_text(json.dumps(data), encoding="utf-8")


def change_bytes(path: Path, draw: random.Random) -> None:
    """The file is cut, emptied, or has other bytes in it, the first of them as often as any."""
    data = bytearray(path.read_bytes())
    kind = draw.randrange(5)
    if kind == 0:
        data = data[: draw.randrange(len(data) + 1)]
    elif kind == 1:
        pointer = b"version https://git-lfs.github.com/spec/v1\n"
        data = bytearray(draw.choice([b"", b"\xef\xbb\xbf" + bytes(data), pointer, b"null", b"[]", b"{}", b"\x00" * 9]))
    else:
        for _ in range(draw.randint(1, 8)):
            place = draw.randrange(min(len(data), draw.choice([16, 400, len(data)])) or 1)
            data[place:place + 1] = bytes([draw.randrange(256)])
    path.write_bytes(data)


def change_tensors(path: Path, draw: random.Random) -> None:
    """A tensor of a .safetensors file is absent, renamed, of another shape or type, or not finite."""
    state = load_file(path)
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(sorted(state))
        tensor = state.pop(name)
        kind = draw.randrange(7)
        if kind == 1:
            state[draw.choice(["extra", f"{name}.x", name.replace("weight", "bias"), name[3:] or "y"])] = tensor
        elif kind == 2:
            state[name] = tensor.flatten().clone() if tensor.ndim > 1 else tensor[None].clone()
        elif kind == 3:
            state[name] = tensor[: len(tensor) // 2].clone() if tensor.ndim else tensor
        elif kind == 4:
            state[name] = tensor.to(draw.choice([torch.float16, torch.int8, torch.float64, torch.bool]))
        elif kind == 5:
            state[name] = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor
        elif kind == 6:
            state[name] = torch.zeros(0)
    save_file(state, path, {"modelspec.prediction_type": draw.choice(["v", "epsilon", "", "x"])})


def lose(path: Path, draw: random.Random) -> None:
    """The file is gone, a folder, a link to nothing, or of another name."""
    kind = draw.randrange(5)
    other = path.with_name(draw.choice(["config.json.bak", f"{path.stem}.fp16{path.suffix}", "model.bin", "x"]))
    if kind == 1 and not other.exists():
        path.rename(other)
        return
    path.unlink()
    if kind == 2:
        path.mkdir()
    if kind == 3:
        path.symlink_to("nowhere")
    if kind == 4:
        shutil.rmtree(path.parent) if path.parent.name not in ("copy", "single") else None


def broken(source: Path, to: Path, draw: random.Random) -> Path:
    """A copy of a checkpoint with one to three things done to it."""
    shutil.copytree(source, to)
    if (to / "sharded_unet").is_dir():
        if draw.random() < 0.3:
            shutil.rmtree(to / "unet")
            (to / "sharded_unet").rename(to / "unet")
        else:
            shutil.rmtree(to / "sharded_unet")
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in to.rglob("*") if path.is_file())
        if not files:
            break
        path = draw.choice(files)
        changes: list[Callable] = [change_bytes, lose]
        changes += [change_json] * 4 if path.suffix == ".json" else []
        changes += [change_tensors] * 4 if path.suffix == ".safetensors" else []
        try:
            draw.choice(changes)(path, draw)
        except (ValueError, LookupError, OSError, AttributeError, RuntimeError):
            change_bytes(path, draw)  # what is broken already cannot be read to be changed
        except Exception as error:  # safetensors has an error of its own
            if "Safetensor" not in type(error).__name__:
                raise
    return to if (source / "unet").is_dir() else to / "model.safetensors"


def outcome(path: Path, draw: random.Random) -> str:
    """"drawn", or the line that says why not."""
    prediction = draw.choice([None, None, None, "epsilon", "v_prediction"])
    sampler = draw.choice([None, None, "ddim", "euler", "dpm_solver_multistep", "lcm"])
    try:
        system = load_pretrained(path, prediction_type=prediction, moderation=None, sampler=sampler)
        system.set_size(16, 16)
        config = replace(system.config.sampling, steps=2)
        assert system.images(["a small red star"], [0], config).shape == (1, 3, 16, 16)
        return "drawn"
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_broken_checkpoint_is_drawn_or_refused_in_one_line(sources, tmp_path, part):
    found, wrong = [], []
    for case in range(part * CASES // PARTS, (part + 1) * CASES // PARTS):
        draw = random.Random(case)
        path = broken(sources[case % 3 == 0], tmp_path / "copy", draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NaN turned to bytes
            try:
                found.append(outcome(path, draw))
                if "\n" in found[-1] or len(found[-1]) < 10 and found[-1] != "drawn":
                    wrong.append((case, found[-1]))
            except Exception as error:
                wrong.append((case, f"{type(error).__name__}: {error}"))
        shutil.rmtree(tmp_path / "copy")
    assert wrong == []
    assert 0 < found.count("drawn") < len(found)
