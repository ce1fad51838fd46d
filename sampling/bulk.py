"""Bulk sampling: a file of prompts of any length to shards of images, by one process or several, killed or not.

    python sample.py --prompts FILE --out DIR --bulk
    torchrun --nproc-per-node 2 -- sample.py --prompts FILE --out DIR --bulk

Nothing is sent between processes. Each reads the file from its beginning, counts the requests, and draws the windows of
``--shard-size`` requests that it can claim in the folder (`bulk_folder.py`). What is drawn together depends on the
window alone, so that the bytes are the same whoever draws it, and when.
"""
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from files.whole import sha256_of
from pipeline.moderation import OFF, Moderation
from pipeline.personal import cards_of_run, judge_cards
from pipeline.system import TextToImage
from sampling.bulk_folder import BulkFolder, Progress, Write
from sampling.bulk_rows import Numbered, Orders
from sampling.command import Command
from sampling.draw import Sources, check_requests
from sampling.engine import DrawSettings, Job, Sample, draw_samples, gate_of
from sampling.loading import load_moderation, load_system
from sampling.metadata import shared_settings
from sampling.notes import notes_on_prompts
from sampling.plan import read_prompts, requests_of_plan
from sampling.request import settings_of
from sampling.results import file_name, image_bytes, result_row
from sampling.styling import choose_styles, styled_plan

KINDS = 1000  # settings that the check of the file remembers
NOTES = 3  # lines about the prompts of a window


@dataclass(frozen=True)
class Drawer:
    """What draws the windows of a call. shared: metadata of all images, None to leave none in them."""

    system: TextToImage
    moderation: Moderation
    settings: DrawSettings
    folder: BulkFolder
    shared: dict[str, Any] | None

    def draw(self, window: int, requests: list[Numbered]) -> None:
        """Draw the requests of a window; afterwards it is done."""
        job = Job(self.system, [one.request for one in requests])
        gate = gate_of(job, self.moderation)
        notes = notes_on_prompts(job)
        for line in [*notes[:NOTES], *([f"and {len(notes) - NOTES} more of these"] if len(notes) > NOTES else [])]:
            tqdm.write(f"{self.folder.shard(window).name}: {line}", file=sys.stderr)
        rows = {}
        with self.folder.writing(window) as write:
            for sample in draw_samples(job, gate, self.settings):
                one = requests[sample.number]
                name = self.write(write, one.number, sample) if sample.image is not None else None
                file = f"{self.folder.shard(window).name}/{name}" if name else None
                rows[one.number] = {**result_row(one.number, sample, file, self.moderation.checks), "line": one.line}
        self.folder.finish(window, [rows[number] for number in sorted(rows)])

    def write(self, write: Write, number: int, sample: Sample) -> str:
        """Write an image into its shard, in a tar with its prompt and its settings beside it; returns its name."""
        data, settings = image_bytes(sample, self.shared)
        if self.folder.files:
            name = file_name(sample.request, number)
            write(name, data)
            return name
        write(f"{number:09d}.png", data)
        if settings is not None:
            write(f"{number:09d}.json", json.dumps(settings, ensure_ascii=False, sort_keys=True).encode())
            write(f"{number:09d}.txt", sample.request.prompt.encode())
        return f"{number:09d}.png"


def draw_bulk(command: Command) -> tuple[Progress, int]:
    """Draw what no other process draws, until nothing is left of that; what is done then, and how much was asked for.
    Raises ValueError or OSError for what is not valid or missing, naming the line of the file."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    file = command.plan.file or ""
    prompts = sha256_of(file)
    styles = choose_styles(command.styles, command.style_file)
    plan = replace(styled_plan(command.plan, styles), file=None, prompts=("",), count=1)
    system = load_system(command.system)
    [template] = requests_of_plan(plan, read_prompts(plan), system.config.sampling)
    orders = Orders(file, template, command.plan.count, styles)
    moderation = load_moderation(command.moderation, command.system)
    judge_cards(moderation, {**cards_of_run(command.system.path), **system.cards})
    folder = BulkFolder(Path(command.out or ""), command.files)
    asked = {"prompts_sha256": prompts, "images_a_prompt": command.plan.count, "settings": settings_of(template),
             "styles": asdict(styles)["chosen"],
             "system": shared_settings(system, command.system, command.sources, False),
             "batch": command.draw.batch, "exact": command.draw.exact, "metadata": command.metadata,
             "shard_size": command.shard_size, "files": command.files,
             "moderation": {"mode": moderation.mode, "checks": moderation.checks},
             "threads": torch.get_num_threads()}
    known = folder.begin(asked, lambda: check_orders(orders, system))
    torch.set_num_threads(known["threads"])  # it decides the last bits
    shared = shared_settings(system, command.system, command.sources, command.draw.exact) if command.metadata else None
    drawer = Drawer(system, moderation, replace(command.draw, by_length=True), folder, shared)
    if moderation.mode == "off":
        print(f"warning: {OFF}", file=sys.stderr)
    try:
        return draw_windows(drawer, orders, command.shard_size, known["requests"]), known["requests"]
    except OSError as error:
        done = folder.progress().requests
        raise OSError(f"{error}; {done} of {known['requests']} requests are done, the same command draws the others"
                      ) from None


def check_orders(orders: Orders, system: TextToImage) -> int:
    """The number of requests. Raises ValueError naming the line of a row that cannot be drawn."""
    known: set[tuple] = set()
    count = 0
    for first, row, prompts in orders.rows():
        for one in orders.requests_of(first, row, prompts):
            try:
                kind = one.request.config, bool(one.request.negative)
                if kind not in known:
                    check_requests(system, [one.request], Sources())
                    known = {*known, kind} if len(known) < KINDS else {kind}
                for text in one.request.texts:
                    one.request.read(text)
            except ValueError as error:
                raise ValueError(f"{orders.file} line {one.line}: {error}") from None
            count += 1
    if not count:
        raise ValueError(f"{orders.file} holds no prompt; valid: docs/bulk.md says how they are written")
    return count


def draw_windows(drawer: Drawer, orders: Orders, size: int, count: int) -> Progress:
    """Draw all windows that no other process draws. The file is read once more at the end, for windows whose process
    died meanwhile."""
    folder, main = drawer.folder, os.environ.get("RANK", "0") == "0"
    begun = folder.merge().requests
    with folder.claims() as wanted, tqdm(total=count, initial=begun, desc="requests", disable=not main) as bar:
        drawn = 1
        while drawn and folder.merge().requests < count:
            drawn = 0
            for window, requests in orders.windows(size, wanted):
                drawer.draw(window, requests)
                drawn += 1
                bar.update(folder.progress().requests - bar.n)
    return folder.merge()
