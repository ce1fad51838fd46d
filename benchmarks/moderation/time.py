"""How long a prompt takes, and the worst of what somebody could send.

    python -m benchmarks.moderation.time [FILE]               one prompt a line; without, made-up ones
"""
import random
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.moderation.metrics import table
from safety.gate import PromptGate
from safety.normalize import LONGEST, MOST_DISGUISED

USUAL = ("a red star above a blue circle", "a photo of a dog on a beach",
         "a castle at night, oil painting, highly detailed",
         "a cinematic portrait of an old fisherman in a yellow raincoat, dramatic light, 35mm, highly detailed",
         "isometric view of a tiny workshop full of clocks, warm light, soft shadows, 4k, (masterpiece:1.2)")
REPEATED = ("a*b ", "z.", "e\u0301", "aab ", "a b ", "\ufdfa", "(a:1.2)", "1!", "\u0591\u05b0", "x", "qu-ik ",
            "\u0430b ", "(1:1", "abot1@e5")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def latency(gate: PromptGate, texts: list[str], repeats: int = 3) -> dict[str, float]:
    """Milliseconds a prompt: the best of ``repeats`` for each text, at its median and 95th percentile."""
    times = np.full(len(texts), np.inf)
    for _ in range(repeats):
        for place, text in enumerate(texts):
            began = time.perf_counter()
            gate.check(text)
            times[place] = min(times[place], time.perf_counter() - began)
    return {"p50": 1e3 * float(np.median(times)), "p95": 1e3 * float(np.quantile(times, 0.95))}


def hostile(size: int) -> dict[str, str]:
    """Texts of ``size`` characters that need the most work, by what they are made of: the same piece again and again,
    and words of which no two are alike, as many with signs and repeats as are read."""
    def word(letters: str, length: int) -> str:
        return "".join(draw.choice(letters) for _ in range(length))

    draw = random.Random(0)
    texts = {repr(piece): (piece * size)[:size] for piece in REPEATED}
    for length in (2, 3, 5, 8):
        texts[f"words of {length} letters"] = " ".join(word(LETTERS, length) for _ in range(size))[:size]
    texts["words of two scripts"] = " ".join(word("abcdef\u0430\u0435\u043e", 3) for _ in range(size))[:size]
    for kind, letters in (("signs", "abcdefgiost1!@$*"), ("signs and repeats", "aabeeot1")):
        some = [word(letters, 3) + "1ee" + word(LETTERS, 2) for _ in range(min(MOST_DISGUISED, size // 13))]
        rest = " ".join("".join(draw.sample(LETTERS, 3)) for _ in range(size))
        texts[f"{len(some)} words with {kind}"] = " ".join([*some, rest])[:size]
    return texts


def hostile_rows(gate: PromptGate) -> list[list[str]]:
    """Milliseconds for the worst of them at several lengths: linear if they grow as the length does."""
    rows = []
    for size in (250, 500, 1000, LONGEST):
        worst = {name: latency(gate, [text], 5)["p50"] for name, text in hostile(size).items()}
        name = max(worst, key=lambda name: worst[name])
        rows.append([str(size), f"{worst[name]:.2f}", name])
    return rows


def time_tables(gate: PromptGate, texts: list[str]) -> str:
    """Both measurements as Markdown."""
    times = latency(gate, texts)
    return (f"p50 {times['p50']:.2f} ms, p95 {times['p95']:.2f} ms of {len(texts)} prompts\n\n"
            + table(("characters", "worst ms", "made of"), hostile_rows(gate)))


if __name__ == "__main__":
    given = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if len(sys.argv) > 1 else list(USUAL)
    print(time_tables(PromptGate.load(), [line[:LONGEST] for line in given if line.strip()]))
