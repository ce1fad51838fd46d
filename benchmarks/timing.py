"""Timing shared by all benchmarks: calls in turns, an A/A row, equality before speed, a description of the machine.

    rows = compare("batch 1", {"ours": ours, "diffusers": theirs}, against="diffusers", rounds=9)
    save("sampling", rows, "build/benchmarks", command="python -m benchmarks.sampling")

Each round times one call of each, in an order that changes from round to round, so that a machine that becomes
slower or busier affects all of them. The first call is timed twice a round. The difference between its two rows is what
the machine alone does to the same code, and ratios within it mean nothing.
"""
import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.speed import peak_flops

AGAIN = " (again)"
UNITS = {"AMX": ("amx_tile", "amx_bf16"), "AVX512-BF16": ("avx512_bf16",), "AVX512-VNNI": ("avx512_vnni",),
         "AVX512": ("avx512f",), "AVX2": ("avx2",)}  # by the flags of /proc/cpuinfo
LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Row:
    """Seconds of one call. ``ratio`` is the speed relative to the call it is compared with, paired by round, with an
    interval that contains the true median in at least 95 of 100 cases (fewer below six rounds)."""

    case: str
    call: str
    median: float
    low: float  # quartiles
    high: float
    rounds: int
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    images: float | None = None  # a second
    share: float | None = None  # of the operations a second that a large matrix product reaches here
    first: float | None = None  # seconds of the first call, with compilation


def time_in_turns(calls: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1, least: float = 0.0,
                  device: torch.device | str = "cpu") -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of every call by name, one for each round; seconds of its first call).

    ``least``: a call that takes fewer seconds than this is repeated within a round until it takes about as long.
    """
    device = torch.device(device)
    firsts = {name: seconds_of_call(call, device) for name, call in calls.items()}
    warm = {name: min([seconds_of_call(call, device) for _ in range(max(1, warmup))]) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(least / max(seconds, 1e-9))) for name, seconds in warm.items()}
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # it comes when it likes, and would be charged to whoever is running
    try:
        for number in range(rounds):
            turn = number % len(names)
            order = names[turn:] + names[:turn]
            for name in order if number % 2 == 0 else reversed(order):
                seconds[name].append(seconds_of_call(calls[name], device, repeats[name]))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds, firsts


def seconds_of_call(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one of ``repeats`` calls, measured until the device has finished."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Work:
    """The work of one call: images and operations (0 if not known), and the types of matrix products by the name of the
    call (fp32 for a call that is not named), for images a second and the share of the peak."""

    images: float = 0.0
    flops: float = 0.0
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def compare(case: str, calls: dict[str, Callable[[], Any]], against: str, rounds: int = 7, work: Work = Work(),
            device: torch.device | str = "cpu", least: float = 0.0) -> list[Row]:
    """A row for each call, and a second one for the first call; ratios are against the call named ``against``."""
    first = next(iter(calls))
    seconds, firsts = time_in_turns({**calls, first + AGAIN: calls[first]}, rounds, least=least, device=device)
    rows = []
    for name, values in seconds.items():
        other = first if name == first + AGAIN else against
        ratio = (None, None, None) if name == other else ratio_of(seconds[other], values)
        median = statistics.median(values)
        dtype = work.dtypes.get(name.removesuffix(AGAIN), torch.float32)
        peak = peak_flops(torch.device(device), dtype) if work.flops else 1.0
        low, high = quartiles(values)
        rows.append(Row(case, name, median, low, high, rounds, *ratio,
                        images=work.images / median if work.images else None,
                        share=work.flops / median / peak if work.flops else None,
                        first=None if name.endswith(AGAIN) else firsts[name]))
    return rows


def ratio_of(base: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of base / value over the rounds: above 1 is faster than the base.

    The interval is between two order statistics of the ratios, whatever their distribution (David & Nagaraja 2003,
    section 7.1).
    """
    ratios = sorted(b / v for b, v in zip(base, values, strict=True))
    n, below, cut = len(ratios), 0.0, 0
    while cut < (n - 1) // 2 and below + math.comb(n, cut) / 2**n <= 0.025:
        below += math.comb(n, cut) / 2**n
        cut += 1
    cut = max(0, cut - 1)
    return statistics.median(ratios), ratios[cut], ratios[n - 1 - cut]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference, in standard deviations of ``theirs``."""
    theirs = theirs.double().cpu()
    return float((ours.double().cpu() - theirs).abs().max() / theirs.std().clamp(min=1e-12))


def rms(ours: Tensor, reference: Tensor) -> float:
    """The root mean square of the difference, in standard deviations of the reference."""
    reference = reference.double().cpu()
    return float((ours.double().cpu() - reference).square().mean().sqrt() / reference.std().clamp(min=1e-12))


def require_equal(case: str, ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """The difference of two results; raises ValueError above the tolerance, because speeds of different results do not
    compare."""
    found = difference(ours, theirs)
    if not found <= tolerance:
        raise ValueError(f"{case}: the results differ by {found:.2g} standard deviations; valid: up to {tolerance:g}, "
                         "the speed of something else is not compared")
    return found


# ---- the machine

def processor() -> tuple[str, list[str]]:
    """(name, matrix and vector units) of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines) if ":" in line}
    flags = set(found.get("flags", "").split())
    return found.get("model name", platform.machine()), [name for name, needed in UNITS.items() if {*needed} <= flags]


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The properties of the machine on which speeds depend, and the speed of a large matrix product."""
    device = torch.device(device)
    name, units = processor()
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    found = {"processor": name, "units": units, "threads": torch.get_num_threads(), "device": device.type,
             "python": platform.python_version(), "versions": versions}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version()}
    for dtype in (torch.float32, torch.bfloat16):
        found[f"gflops_{str(dtype).removeprefix('torch.')}"] = round(peak_flops(device, dtype) / 1e9)
    return found


def describe_machine(found: dict[str, Any]) -> str:
    """The machine in one line."""
    where = found.get("gpu") or f"{found['processor']} ({', '.join(found['units']) or 'no matrix units known'})"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (f"{where}, {found['threads']} threads; {versions}; a large matrix product reaches "
            f"{found['gflops_float32']:,} GFLOP/s in fp32, {found['gflops_bfloat16']:,} in bf16")


# ---- tables

def format_table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| case | call | ms, median (quartiles) | times as fast (95 %) | images/s | of peak | first call |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
        images = "" if row.images is None else f"{row.images:.3g}"
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        first = "" if row.first is None else f"{row.first:.2f} s"
        lines.append(f"| {row.case} | {row.call} | {1000 * row.median:.4g} ({1000 * row.low:.4g} to "
                     f"{1000 * row.high:.4g}) | {ratio} | {images} | {share} | {first} |")
    return "\n".join(lines)


def save(name: str, rows: Sequence[Row], out: str | Path, command: str, device: torch.device | str = "cpu",
         **notes: Any) -> str:
    """Write NAME.json and NAME.md and return the text of the latter; ``notes`` are further entries by name."""
    found = machine(device)
    text = f"{describe_machine(found)}.\n\n    {command}\n\n{format_table(rows)}\n"
    text += "".join(f"\n{key}: {value}\n" for key, value in notes.items())
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    data = {"command": command, "machine": found, "rows": [asdict(row) for row in rows], **notes}
    (out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def add_flags(parser: argparse.ArgumentParser, rounds: int = 7) -> None:
    """Add the flags that all benchmarks share."""
    parser.add_argument("--rounds", type=int, default=rounds, help="timed calls of each (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small and few: whether it works, not how fast it is")
    parser.add_argument("--out", default="build/benchmarks", help="folder of the JSON and the table (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
