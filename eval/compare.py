"""Runs beside each other: only figures that were measured the same way, and differences with intervals of their own."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.interval import Estimate
from eval.suite import rows_table

SAME = ("data", "prompts", "prompts_sha256", "reference", "features", "clip")  # entries of the protocol that must agree


def read_figures(folder: str | Path) -> dict[str, Any]:
    """The contents of metrics.json of a run folder. Raises ValueError with the command that writes it."""
    path = Path(folder) / "report" / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("protocol"), dict):
            raise ValueError("it has no protocol")
        return found
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used ({type(error).__name__}: {str(error).splitlines()[0]}); make it with: "
                         f"python evaluate.py {folder}") from None


def check_protocols(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where the run ``name`` was measured differently; the message has each entry that differs."""
    wrong = [f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in SAME
             if ours.get(key) != theirs.get(key)]
    if wrong:
        raise ValueError(f"{name} was measured otherwise ({'; '.join(wrong)}); valid: the same --suite, --count and "
                         f"data; measure it again with: python evaluate.py {name}")


def paired_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int = 0,
                      resamples: int = 1000) -> Estimate:
    """The share of promises kept in ``ours`` less that in ``theirs``, of [kept, made] for each prompt, both (N, 2).

    The prompts of both are resampled together, so that what makes a prompt hard for both does not widen the interval.
    Raises ValueError unless the prompts are the same.
    """
    x, y = np.asarray(ours, float), np.asarray(theirs, float)
    if x.shape != y.shape or x.ndim != 2 or (x[:, 1] != y[:, 1]).any():
        raise ValueError(f"promises of {len(x)} and {len(y)} prompts; valid: the same prompts in both")
    times = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=resamples)
    draws = (times @ (x[:, 0] - y[:, 0])) / (times @ x[:, 1])
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float((x[:, 0] - y[:, 0]).sum() / x[:, 1].sum()), float(low), float(high),
                    "paired bootstrap over prompts")


def comparison_table(ours: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown with a row for each figure and a column for each run; scores have their difference to the first run.

    Raises ValueError for a run that was measured differently.
    """
    for name, theirs in others.items():
        check_protocols(ours["protocol"], theirs["protocol"], name)
    rows = []
    for measure, own in ours.get("per_prompt", {}).items():
        cells = [_percent(own)]
        for theirs in others.values():
            if measure not in theirs.get("per_prompt", {}):
                cells.append("")
                continue
            gap = paired_difference(theirs["per_prompt"][measure], own).scaled(100)
            apart = "" if gap.low <= 0 <= gap.high else ", apart"
            cells.append(f"{_percent(theirs['per_prompt'][measure])} ({gap.value:+.1f}: {gap.low:+.1f} to "
                         f"{gap.high:+.1f}{apart})")
        rows.append([f"{measure}, %", *cells])
    for name, figure in ours.get("figures", {}).items():
        found = [figure, *(theirs.get("figures", {}).get(name) for theirs in others.values())]
        rows.append([name, *("" if cell is None else str(Estimate(**cell["value"])) for cell in found)])
    return rows_table(["figure", "this run", *others], rows)


def _percent(promises: Sequence[Sequence[float]]) -> str:
    kept, made = np.asarray(promises, float).sum(axis=0)
    return f"{100 * kept / made:.1f}"
