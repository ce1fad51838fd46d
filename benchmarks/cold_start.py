"""Where each millisecond of one image goes: python -m benchmarks.cold_start [RUN] [--steps 20] [--speed exact|fast]

cold    `sample.py` in a new process, from the start of the interpreter to the file, by parts
warm    the same parts in a process that has drawn one before
help    `sample.py --help`

Without RUN a system that draws 64 x 64 pixels is trained for one step first, from configs/shapes.yaml: what an image
costs does not depend on what the weights are. Files are read from the cache of the operating system, not the disk.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("interpreter", "torch", "other imports", "load", "moderation: load", "moderation: prompt", "text and denoiser",
         "decoder", "moderation: image", "write")
TINY_RUN = ("data.shapes.size=64", "data.shapes.train=64", "data.shapes.validation=8", "data.shapes.test=8",
            "autoencoder.model.stem=8", "autoencoder.train.steps=1", "autoencoder.validation=8", "denoiser.images=32",
            "denoiser.validation=8", "denoiser.train.steps=1", "autoencoder.train.optim.warmup=0",
            "denoiser.train.optim.warmup=0")
PROMPT = "a small red circle above a large blue square"


def image_of(run: str, steps: int, speed: str, out: Path, marks: list[tuple[str, float]]) -> None:
    """Sample one image by the parts of `sample.py`; append (part, its end time) to ``marks``."""
    def mark(part: str) -> None:
        marks.append((part, time.time()))

    import torch
    mark("torch")
    from files.images import png_bytes, save_bytes
    from pipeline.loading import load_run
    from pipeline.moderation import Moderation
    from pipeline.prompts import parse_prompt
    from pipeline.system import with_options
    from sampling.draw import Sources, decode_images
    mark("other imports")
    system = load_run(run, "cpu", None).at_speed(speed)  # type: ignore[arg-type]
    config = with_options(system.config.sampling, steps=steps)
    mark("load")
    moderation = Moderation.of_run(Path(run), "block")
    mark("moderation: load")
    for number in range(2):  # the second is the warm one
        moderation.check_prompt([parse_prompt(PROMPT, literal=True)], [], system.tokenizer)
        mark("moderation: prompt")
        with torch.inference_mode():
            latents = system.latents([PROMPT], [number], config)
            mark("text and denoiser")
            images = decode_images(system, latents, Sources())
        mark("decoder")
        moderation.check_images(images, [PROMPT])
        mark("moderation: image")
        save_bytes(png_bytes(images[0], {"prompt": PROMPT}), out / f"{number}.png")
        mark("write")


def here(run: str, steps: int, speed: str, began: float) -> None:
    """Print as JSON the milliseconds of every part in this process, cold and warm."""
    marks = [("interpreter", time.time())]
    with tempfile.TemporaryDirectory() as folder:
        image_of(run, steps, speed, Path(folder), marks)
    ends = [began, *(when for _, when in marks)]
    spent = [(part, 1000 * (end - start)) for (part, end), start in zip(marks, ends)]
    print(json.dumps({"cold": dict(spent[:len(PARTS)]), "warm": dict(spent[len(PARTS):])}))


def environment() -> dict[str, str]:
    """The environment of this process, with this checkout on the import path."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def seconds_of(command: list[str]) -> float:
    """Wall-clock seconds of a command that must succeed."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise ValueError(f"{' '.join(command[:4])} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return time.perf_counter() - began


def imports(top: int = 12) -> list[tuple[str, float]]:
    """The modules of other projects that importing the sampler spends most time in, with what they import, in ms."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", "import sample"], cwd=ROOT, capture_output=True,
                          text=True, env=environment())
    found = {}
    for line in done.stderr.splitlines():
        if match := re.match(r"import time:\s*\d+ \|\s*(\d+) \|\s*(\S+)$", line):
            found[match[2]] = int(match[1]) / 1000
    whole = {name: ms for name, ms in found.items() if "." not in name}
    return sorted(whole.items(), key=lambda item: -item[1])[:top]


def main(arguments: list[str]) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run folder")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps (%(default)s)")
    parser.add_argument("--speed", choices=("exact", "fast"), default="exact", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (%(default)s)")
    parser.add_argument("--out", default="build/benchmarks", help="folder of the JSON and the table (%(default)s)")
    parser.add_argument("--here", type=float, metavar="BEGAN", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        here(options.run, options.steps, options.speed, options.here)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or str(Path(folder, "run"))
        if not options.run:
            seconds_of([sys.executable, "train.py", "configs/shapes.yaml", f"run={run}", *TINY_RUN])
        sample = [sys.executable, "sample.py"]
        drawing = [*sample, PROMPT, "--run", run, "--steps", str(options.steps), "--speed", options.speed, "--out",
                   str(Path(folder, "out"))]
        whole, helped, parts = [], [], []
        for _ in range(options.rounds):
            whole.append(seconds_of(drawing))
            helped.append(seconds_of([*sample, "--help"]))
            command = [sys.executable, "-m", "benchmarks.cold_start", run, "--steps", str(options.steps), "--speed",
                       options.speed, "--here", repr(time.time())]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                                  env=environment(), check=True)
            parts.append(json.loads(done.stdout.splitlines()[-1]))
    return report(options, statistics.median(whole), statistics.median(helped), parts)


def report(options: argparse.Namespace, whole: float, helped: float,
           parts: list[dict[str, dict[str, float]]]) -> int:
    """Print and write the table of medians."""
    from benchmarks.timing import describe_machine, machine
    middle = {kind: {part: statistics.median(one[kind][part] for one in parts) for part in parts[0][kind]}
              for kind in ("cold", "warm")}
    lines = [f"{describe_machine(machine())}.", "",
             f"`sample.py`, one image of {options.steps} steps, {options.speed}: "
             f"{whole:.2f} s; warm {sum(middle['warm'].values()) / 1000:.2f} s; `sample.py --help`: {helped:.2f} s.",
             "", "| part | cold, ms | warm, ms |", "|---|---|---|"]
    lines += [f"| {part} | {middle['cold'][part]:.0f} | {middle['warm'].get(part, 0):.0f} |" for part in PARTS]
    lines += [f"| all | {sum(middle['cold'].values()):.0f} | {sum(middle['warm'].values()):.0f} |", "",
              "Imports, with what they import in turn: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in imports())]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "cold_start.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {"machine": machine(), "seconds": whole, "help": helped, "parts": middle}
    (out / "cold_start.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
