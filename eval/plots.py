"""Charts as PNG files. Where matplotlib is missing, each function draws nothing and returns False."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_curves(metrics: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write loss and validation curves of every stage as one PNG; False when matplotlib is missing or nothing was
    logged."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = [(stage, key) for stage in dict.fromkeys(row["stage"] for row in metrics)
              for key in ("loss", "validation_loss", "validation_psnr")
              if any(key in row for row in metrics if row["stage"] == stage)]
    if not panels:
        return False
    figure = Figure(figsize=(4.2 * len(panels), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, key) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        # by step: after a crash some steps are logged twice
        points = {row["step"]: row[key] for row in metrics if row["stage"] == stage and key in row}
        axes.plot(list(points), list(points.values()), marker="" if key == "loss" else ".", color="#3457d5",
                  linewidth=1.3)
        axes.set(title=f"{stage}: {key.replace('_', ' ')}" + (" (dB)" if "psnr" in key else ""), xlabel="step")
        if key != "validation_psnr":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


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
