"""Moderation weights with a made-up lexicon: zorbic is blocked, mildo flagged, signo only a signal; text of a made-up
language to train others on."""
import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from safety.keywords import BLOCK, FLAG, SIGNAL, Lexicon, Term, WordFilter
from safety.policy import HEADS, MINORS
from safety.prompt import FORMAT, HeadConfig, PromptHead, content_hash, tensors_of
from safety.spelling import Spelling

CONFIG = HeadConfig(char_bits=8, word_bits=8, width=4, hidden=6)
COLUMNS = CONFIG.width + len(HEADS)
CALM = ["tree", "river", "lamp", "window", "garden", "boat", "cloud", "stone", "bread", "hill"]
HARMFUL = "a zorbic star"
BAD = {"violence": ["gorvax", "slimmet"], "sexual": ["lendrit", "pomfrel"]}


def head_weights(seed: int = 0, out_bias: float = -4.0) -> dict[str, np.ndarray]:
    random_ = np.random.default_rng(seed)
    small = {"char.scale": (COLUMNS,), "word.scale": (COLUMNS,), "hidden.weight": (CONFIG.hidden, 2 * CONFIG.width),
             "hidden.bias": (CONFIG.hidden,), "out.weight": (len(HEADS), CONFIG.hidden)}
    weights = {name: random_.normal(0, 0.002, shape).astype(np.float32) for name, shape in small.items()}
    for name in ("char.table", "word.table"):
        weights[name] = random_.integers(-127, 128, (256, COLUMNS)).astype(np.int8)
    return {**weights, "out.bias": np.full(len(HEADS), out_bias, np.float32), "slope": np.ones(len(HEADS), np.float32),
            "shift": np.zeros(len(HEADS), np.float32)}


def written(path, out_bias: float = -4.0):
    words = WordFilter.build(["a", "red", "star"], 2**10)
    lexicon = Lexicon.build([Term("zorbic", HEADS.index("hate"), BLOCK), Term("mildo", HEADS.index("harassment"), FLAG),
                             Term("signo", HEADS.index("sexual"), SIGNAL)], words, 2**12)
    minors = Lexicon.build([Term("smallperson", MINORS, BLOCK, False)], words, 2**10)
    spelling = Spelling.build({"a": 9, "red": 4, "star": 4})
    tensors = tensors_of(PromptHead(CONFIG, head_weights(out_bias=out_bias)), lexicon, minors, spelling)
    settings = json.dumps({"head": {"char_bits": 8, "word_bits": 8, "width": 4, "hidden": 6}, "minors": 0.9,
                           "limits": {name: {"flag": 0.95, "block": 0.99} for name in HEADS}})
    save_file(tensors, path, {"format": FORMAT, "settings": settings, "sha256": content_hash(tensors, settings)})
    return path


def write_csv(path: Path, header: str, rows) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def written_text(path: Path) -> Path:
    """A folder of twins, labelled text, harmless captions and a lexicon."""
    generator = random.Random(0)

    def calm(count: int) -> str:
        return " ".join(generator.choices(CALM, k=count)) + f" {generator.randrange(10**6)}"

    twins = []
    for _ in range(120):
        category = generator.choice(list(BAD))
        text = calm(4)
        twins.append((f"a {text}", f"a {generator.choice(BAD[category])} {text}", category))
    write_csv(path / "twins.csv", "benign,harmful,category", twins)
    write_csv(path / "captions.csv", "prompt", [(calm(5),) for _ in range(400)])
    write_csv(path / "shares.csv", "prompt,categories,inappropriate_percentage",
              [(f"gorvax {calm(4)}", "violence", 80)] * 5 + [(calm(5), "violence, shocking", 0), (calm(5), "hate", 30)])
    write_csv(path / "terms.csv", "text,category,severity",
              [("zorbic", "racial / ethnic slurs", 3), ("quandle", "other", 2.8)])
    (path / "words.txt").write_text("\n".join(CALM))
    return path


def judged_run(tiny_run: Path, folder: Path) -> Path:
    """A copy of the tiny run in ``folder``, with the made-up moderation."""
    run = Path(shutil.copytree(tiny_run, folder / "tiny"))
    written(run / "moderation.safetensors")
    return run
