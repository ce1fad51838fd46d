"""Charts as PNG files. Where matplotlib is missing, each function draws nothing and returns False."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTEXTS = "validation_context_"  # distances and drift of contexts, which share a panel
TITLES = {"validation_psnr": "validation psnr (dB)", CONTEXTS: "contexts of words"}
COLOURS = ("#3457d5", "#c2410c", "#15803d", "#6b7280")


def draw_curves(metrics: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write loss and validation curves of every stage as one PNG; False when matplotlib is missing or nothing was
    logged."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = [(stage, prefix, lines) for stage in dict.fromkeys(row["stage"] for row in metrics)
              for prefix in ("loss", "validation_loss", "validation_psnr", CONTEXTS)
              if (lines := _lines([row for row in metrics if row["stage"] == stage], prefix))]
    if not panels:
        return False
    figure = Figure(figsize=(4.2 * len(panels), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, prefix, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for (name, points), colour in zip(lines.items(), COLOURS):
            axes.plot(list(points), list(points.values()), marker="" if name == "loss" else ".", color=colour,
                      linewidth=1.3, label=name.removeprefix(prefix).replace("_", " "))
        axes.set(title=f"{stage}: {TITLES.get(prefix, prefix.replace('_', ' '))}", xlabel="step")
        if prefix == CONTEXTS:
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=8)
        elif prefix != "validation_psnr":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _lines(rows: Sequence[dict[str, Any]], prefix: str) -> dict[str, dict[int, float]]:
    """Name -> step -> value of what a panel shows: the entries that begin with CONTEXTS, or the one of that name."""
    names = dict.fromkeys(name for row in rows for name in row
                          if name == prefix or prefix == CONTEXTS and name.startswith(prefix))
    # by step: after a crash some steps are logged twice
    return {name: {row["step"]: row[name] for row in rows if name in row} for name in names}


def draw_tradeoff(rows: Sequence[dict[str, Any]], path: Path, score: str, distance: str) -> bool:
    """Write a chart of distance against score, a line through the rows, each labelled by its guidance, with intervals.

    A row is {"guidance", "score", "distance"}, the last two as {"value", "low", "high"}; ``score`` and ``distance`` are
    the names on the axes. False without matplotlib.
    """
    return _draw(path, [(rows, "score", "distance", "guidance", score, distance)])


def draw_steps(rows: Sequence[dict[str, Any]], path: Path, score: str, distance: str) -> bool:
    """Write charts of score and distance against the number of sampler steps; rows have "steps" in place of
    "guidance". False without matplotlib."""
    return _draw(path, [(rows, "steps", key, "", "sampler steps", name)
                        for key, name in (("score", score), ("distance", distance))])


def _draw(path: Path, panels: Sequence[tuple]) -> bool:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        rows, across, up, label, x_name, y_name = panel
        points = [[row[key] if isinstance(row[key], dict) else {"value": row[key], "low": row[key], "high": row[key]}
                   for key in (across, up)] for row in rows]
        x, y = ([point[axis]["value"] for point in points] for axis in (0, 1))
        reach_x, reach_y = ([[max(0.0, point[axis]["value"] - point[axis]["low"]) for point in points],
                             [max(0.0, point[axis]["high"] - point[axis]["value"]) for point in points]]
                            for axis in (0, 1))
        axes.errorbar(x, y, yerr=reach_y, xerr=reach_x, marker="o", color="#3457d5", ecolor="#b9c4ee", linewidth=1.3)
        for row, a, b in zip(rows, x, y):
            if label:
                axes.annotate(f"w = {row[label]:g}", (a, b), textcoords="offset points", xytext=(6, 6), fontsize=9)
        axes.set(xlabel=x_name, ylabel=y_name)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True
