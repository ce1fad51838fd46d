"""What a run says: a progress bar with speed, loss and time left, and a line of JSON for every logged step."""
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Logger:
    """Progress bar of one stage and metrics.jsonl of the run; use as a context manager."""

    def __init__(self, path: Path, stage: str, first: int, steps: int, batch: int):
        self.path, self.stage, self.batch = path, stage, batch
        # a log file gets a line every 30 seconds, a terminal a live bar
        self.bar = tqdm(total=steps, initial=first, desc=stage, unit="step", dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 30.0)
        self.began, self.first, self.sums, self.count = time.perf_counter(), first, {}, 0  # type: ignore[var-annotated]

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def add(self, values: dict[str, float]) -> None:
        """Take in the losses of one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        self.bar.update()

    def flush(self, step: int, **extra: float) -> None:
        """Write the means since the last flush, the speed since the start, and ``extra``; shows the loss on the bar."""
        means = {name: value / self.count for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.began
        speed = (step - self.first) * self.batch / max(seconds, 1e-9)
        self.write({"step": step, **means, **extra, "images_per_second": speed, "seconds": seconds})
        self.bar.set_postfix(loss=f"{means.get('loss', float('nan')):.4f}", images_s=f"{speed:.0f}", refresh=False)
        self.sums, self.count = {}, 0

    def write(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        line = {"stage": self.stage, **{k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(text)
