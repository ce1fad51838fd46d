"""Moderation weights with a made-up lexicon: zorbic is blocked, mildo flagged, signo only a signal."""
import json

import numpy as np
from safetensors.numpy import save_file

from safety.keywords import BLOCK, FLAG, SIGNAL, Lexicon, Term, WordFilter
from safety.policy import HEADS, MINORS
from safety.prompt import HeadConfig, PromptHead, content_hash, tensors_of

CONFIG = HeadConfig(char_bits=8, word_bits=8, width=4, hidden=6)
COLUMNS = CONFIG.width + len(HEADS)


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
    minors = Lexicon.build([Term("smallperson", MINORS, SIGNAL, False)], words, 2**10)
    tensors = tensors_of(PromptHead(CONFIG, head_weights(out_bias=out_bias)), lexicon, minors)
    settings = json.dumps({"head": {"char_bits": 8, "word_bits": 8, "width": 4, "hidden": 6}, "minors": 0.9,
                           "limits": {name: {"flag": 0.95, "block": 0.99} for name in HEADS}})
    save_file(tensors, path, {"format": "1", "settings": settings, "sha256": content_hash(tensors, settings)})
    return path
