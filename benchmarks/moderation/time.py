"""The time that the gate takes for a prompt, and for the slowest texts that an attacker could send.

    python -m benchmarks.moderation.time [FILE]               one prompt a line; default: built-in prompts
"""
import random
import sys
import time

import numpy as np

from benchmarks.moderation.metrics import table
from files.text import read_lines
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
    """Milliseconds for a prompt: the median and the 95th percentile over texts of the best of ``repeats``."""
    times = np.full(len(texts), np.inf)
    for _ in range(repeats):
        for place, text in enumerate(texts):
            began = time.perf_counter()
            gate.check(text)
            times[place] = min(times[place], time.perf_counter() - began)
    return {"p50": 1e3 * float(np.median(times)), "p95": 1e3 * float(np.quantile(times, 0.95))}


def hostile(size: int) -> dict[str, str]:
    """Texts of ``size`` characters that need the most work, by their description: one repeated piece, or different
    words, of which as many as the gate reads have signs and repeated letters."""
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
    """[characters, milliseconds, description] of the slowest text at several lengths."""
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
    given = read_lines(sys.argv[1]) if len(sys.argv) > 1 else list(USUAL)
    print(time_tables(PromptGate.load(), [line[:LONGEST] for line in given if line.strip()]))
