"""The files of one call: an image for each sample, what came with it, and results.jsonl, a line for each request."""
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from files.images import png_bytes, save_bytes
from files.run_folder import read_metrics
from files.whole import try_lock
from pipeline.moderation import decision_row, reason_text
from pipeline.prompts import Prompt, chunks_of
from sampling.engine import Job, Sample
from sampling.request import Request, settings_of
from sampling.sheets import save_attention, save_frames

RESULTS = "results.jsonl"
NUMBERED = re.compile(r"(\d{5,})_")  # how the name of an image begins
GREY = 128  # of the cell that stands for an image that is not there


def file_name(request: Request, number: int) -> str:
    """00012_a-small-red-star_seed7.png"""
    words = re.sub(r"[^\w]+", "-", request.prompt.lower(), flags=re.ASCII).strip("-")[:40].rstrip("-")
    return f"{number:05d}_{words or 'empty'}_seed{request.seed}.png"


def next_number(results: Path) -> int:
    """The number of the next image in the folder of ``results``: one more than any in its lines or in names of files
    beside it."""
    rows = [row.get("number") for row in read_metrics(results) if isinstance(row, dict)]
    names = [int(match[1]) for path in results.parent.iterdir() if (match := NUMBERED.match(path.name))]
    return max([-1, *names, *(number for number in rows if isinstance(number, int))]) + 1


def result_row(number: int, sample: Sample, file: str | None, checks: Sequence[str]) -> dict[str, Any]:
    """The line of a request: what became of it, and no word of its prompt but in the name of a file."""
    return {"number": number, "seed": sample.request.seed, "file": file, "checked": list(checks),
            **decision_row(sample.decision, sample.stage)}


def image_bytes(sample: Sample, shared: dict[str, Any] | None) -> tuple[bytes, dict[str, Any] | None]:
    """The PNG of a sample that has an image, and the settings in it; None for none. ``shared``: metadata of all images
    of a call, None to leave none in them."""
    assert sample.image is not None
    marked = {"moderation": sample.decision.action} if sample.decision.action != "allow" else {}
    settings = None if shared is None else {**settings_of(sample.request), **shared, **marked}
    return png_bytes(sample.image, settings), settings


class Results:
    """A line of JSON for each request, written when it is known: number, seed, file or null, action, category, message.
    No word of a prompt is in it but in the name of a file that was written. ``checks`` says what was looked at.

    The lines of earlier calls stay, and the numbers of this call begin with ``first``, after theirs. The file is locked
    until it is closed; raises ValueError while another call writes to it.
    """

    def __init__(self, path: Path, checks: Sequence[str] = ()):
        self.path, self.checks = path, list(checks)
        self._file: IO[str] = open(path, "a", encoding="utf-8")
        if not try_lock(self._file):
            self._file.close()
            raise ValueError(f"another call writes its images to {path.parent}; valid: --out with another folder, or "
                             "wait for it")
        self.first = next_number(path)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # the end of a call that was killed

    def add(self, sample: Sample, file: Path | None) -> None:
        """Append what became of a request; ``file`` None when nothing was written."""
        row = result_row(self.first + sample.number, sample, file.name if file else None, self.checks)
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No lines after this."""
        self._file.close()


class SampleFolder:
    """The folder ``out`` of a call, as a context. No file in it is written over: its numbers go on where those of
    earlier calls end. Refusals are said on stderr.

    shared: metadata of all its images, None to leave none in them. kept: of how many images the pixels are kept, for
    an overview.
    """

    def __init__(self, out: Path, job: Job, shared: dict[str, Any] | None, checks: Sequence[str], kept: int):
        self.out, self.job, self.shared, self.kept = out, job, shared, kept
        self.results = Results(out / RESULTS, checks)
        self.refused: set[int] = set()
        self._images: dict[int, torch.Tensor] = {}
        self._grey: torch.Tensor | None = None

    def add(self, sample: Sample) -> None:
        """Write the files of a sample and its line."""
        number = self.results.first + sample.number
        if sample.error is not None:
            tqdm.write(sample.error, file=sys.stdout)
        if sample.image is None:
            print(f"image {number}: {sample.decision.message}{reason_text(sample.decision)}", file=sys.stderr)
            self.refused.add(sample.number)
            self.results.add(sample, None)
            return
        path = self.out / file_name(sample.request, number)
        save_bytes(image_bytes(sample, self.shared)[0], path, new=True)
        self.results.add(sample, path)
        self._grey = torch.full_like(sample.image, GREY)
        if sample.number < self.kept:
            self._images[sample.number] = sample.image
        self._add_extras(sample, sample.image, path)

    def _add_extras(self, sample: Sample, image: torch.Tensor, path: Path) -> None:
        """Frames, unless a decision forbids them, and attention maps."""
        if sample.frames is not None:
            decision = sample.frames.decision
            if decision.action in ("blur", "block"):
                print(f"frames of image {self.results.first + sample.number}: {decision.message}"
                      f"{reason_text(decision)}", file=sys.stderr)
            else:
                save_frames(sample.frames.images, sample.frames.labels, path)
        if sample.attention is not None:
            prompt = sample.request.read(sample.request.prompt)
            assert isinstance(prompt, Prompt)  # check_settings has refused others
            words = chunks_of(prompt, self.job.system.tokenizer).words
            save_attention(words, sample.attention, image, path)

    def overview(self) -> torch.Tensor | None:
        """The kept images in order, uint8 (B, 3, H, W), grey ones for those that were refused; None if all were."""
        if self._grey is None:
            return None
        return torch.stack([self._images.get(number, self._grey)
                            for number in range(min(self.kept, len(self.job.requests)))])

    def __enter__(self) -> "SampleFolder":
        return self

    def __exit__(self, *_: Any) -> None:
        self.results.close()
