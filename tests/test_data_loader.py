"""The loader gives the same bytes with any number of workers and processes, from any step, and ends cleanly."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.catalog import DataConfig, build_source
from data.images.folder import FolderConfig
from data.loader import Loader, read_batch
from data.order import Order, Slice
from data.shapes.shapes import Shapes, ShapesConfig
from data.source import caption_batch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source():
    return Shapes(ShapesConfig(size=16, train=30), "train")


@pytest.fixture
def folder(tmp_path):
    """Forty images of two shapes, two captions each."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        shape = (20, 30, 3) if number % 3 else (30, 20, 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"one {number}, a, b, c\ntwo {number}")
    return DataConfig(source="folder", bad_share=0.1, folder=FolderConfig(
        str(root), 16, crop="random", flip=0.5, buckets=True, step=4, shuffle_tags=True, test=0.0, validation=0.0))


def equal(one, two) -> bool:
    same = torch.equal(one.images, two.images) and one.captions == two.captions and one.ids == two.ids
    frames = one.frames is two.frames if one.frames is None else torch.equal(one.frames, two.frames)
    return same and frames and (one.indices == two.indices).all() and one.step == two.step


def test_workers_change_nothing(folder):
    """Crops, flips, captions, dropped captions and buckets over two epochs."""
    source = build_source(folder, "train")
    order = Order(len(source), 1, source.buckets)
    loaders = [Loader(source, order, 6, 1, workers, caption_dropout=0.2) for workers in (0, 1, 2)]
    captions = set()
    for step in range(14):
        batches = [loader.batch_at(step) for loader in loaders]
        assert equal(batches[0], batches[1]) and equal(batches[0], batches[2])
        assert batches[0].captions == caption_batch(source, order.places(step, 6), 1, 0.2)
        captions |= set(batches[0].captions)
    assert "" in captions and len(captions) > 30
    for loader in loaders:
        loader.close()


def test_a_run_continues_at_any_step_and_may_go_back(source):
    order = Order(len(source), 3)
    before = torch.get_rng_state()
    with Loader(source, order, 7, 3) as one, Loader(source, order, 7, 3, workers=2) as two:
        for step in (5, 6, 7, 8, 2, 3, 100, 101):
            assert equal(one.batch_at(step), two.batch_at(step))
    assert torch.equal(torch.get_rng_state(), before)  # a network's dropout is the same with and without workers


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_together_read_the_global_batch(folder, world):
    source = build_source(folder, "train")
    order = Order(len(source), 1, source.buckets)
    for step in range(6):
        whole = read_batch(source, order.places(step, 8), 1, step)
        parts = [Loader(source, order, 8, 1, part=Slice(rank, world)).batch_at(step) for rank in range(world)]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert [caption for part in parts for caption in part.captions] == whole.captions


class Broken:
    """Item 3 cannot be drawn."""

    def __len__(self):
        return 8

    def captions(self, index):
        return ("x",)

    def __getitem__(self, index):
        if index == 3:
            raise OSError("images/3.png: the disk is gone")
        return {"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "caption": "x", "captions": ("x",), "id": str(index)}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_file_in_one_line(workers):
    with Loader(Broken(), Order(8, 0), 4, 0, workers) as loader:
        with pytest.raises(OSError) as caught:
            for step in range(2):
                loader.batch_at(step)
    assert str(caught.value) == "images/3.png: the disk is gone"


def test_corrupt_images_are_skipped_by_all_workers_alike_and_stop_the_run_in_the_end(folder, tmp_path, capfd):
    root = Path(folder.folder.root)
    for number in (5, 17):
        data = (root / f"{number:02d}.png").read_bytes()
        (root / f"{number:02d}.png").write_bytes(data[:200])
    lists = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    sources = [build_source(folder, "train", path) for path in lists]
    order = Order(40, 1, sources[0].buckets)
    with Loader(sources[0], order, 5, 1) as one, Loader(sources[1], order, 5, 1, workers=2) as two:
        for step in range(24):
            assert equal(one.batch_at(step), two.batch_at(step))
    for path in lists:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted(row["name"] for row in rows) == ["05.png", "17.png"]  # once, though both are met every epoch
    assert capfd.readouterr().err.count("unreadable: 17.png") == 2  # once a run
    for number in (20, 21, 22):
        (root / f"{number:02d}.png").write_bytes((root / f"{number:02d}.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"5 of 40 images cannot be read, more than data.bad_share = 0.1"):
        with Loader(build_source(folder, "train", lists[1]), order, 5, 1, workers=2) as loader:
            for step in range(16):
                loader.batch_at(step)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_of_one_line(source):
    with Loader(source, Order(30, 0), 4, 0, workers=1) as loader:
        loader.batch_at(0)
        os.kill(loader._ahead._workers[0].pid, signal.SIGKILL)
        with pytest.raises(OSError, match="a worker of the loader has died .*fewer workers"):
            for step in range(1, 30):
                time.sleep(0.01)  # it may die while the networks are at work: nothing is raised there
                loader.batch_at(step)


@pytest.mark.parametrize("workers, batch, rank, world, message", [
    (-1, 4, 0, 1, "workers: -1"), (0, 5, 0, 2, "batch: 5 for process 0 of 2"), (0, 4, 2, 2, "process 2 of 2"),
    (0, 0, 0, 1, "batch: 0"),
])
def test_settings_that_make_no_sense(source, workers, batch, rank, world, message):
    with pytest.raises(ValueError, match=message):
        Loader(source, Order(30, 0), batch, 0, workers, Slice(rank, world))


# ---- processes

READER = """
import multiprocessing, os, signal, sys, time
from data.loader import Loader
from data.order import Order
from data.shapes.shapes import Shapes, ShapesConfig

multiprocessing.set_start_method(sys.argv[1])
source = Shapes(ShapesConfig(size=16, train=30), "train")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
loader = Loader(source, Order(30, 0), 4, 0, workers=2)
step = 0
while not stop:
    loader.batch_at(step)
    step += 1
    if step == 3:
        print(*[worker.pid for worker in loader._ahead._workers], flush=True)
for _ in range(8):  # a signal to the whole group leaves the workers at work
    loader.batch_at(step)
    step += 1
loader.close()
print("ended", flush=True)
"""


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("number, start", [(signal.SIGTERM, "fork"), *(pytest.param(
    signal.SIGKILL, start, marks=pytest.mark.slow) for start in ("fork", "forkserver"))])
def test_no_worker_outlives_its_run(number, start):
    run = subprocess.Popen([sys.executable, "-c", READER, start], stdout=subprocess.PIPE, text=True,
                           start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    workers = list(map(int, run.stdout.readline().split()))
    assert len(workers) == 2 and all(map(alive, workers))
    if number == signal.SIGTERM:
        os.killpg(run.pid, number)  # as a job scheduler does
        assert run.communicate(timeout=60)[0] == "ended\n" and run.returncode == 0
    else:
        run.kill()
        run.wait()
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks at memory in /proc")
def test_memory_does_not_grow(folder):
    """4000 items of 40 files; an item that stayed would be 12 kB of pixels, so 37 MB between the two looks."""
    folder = dataclasses.replace(folder, folder=dataclasses.replace(folder.folder, size=64))
    source = build_source(folder, "train")
    loader = Loader(source, Order(len(source), 1, source.buckets), 20, 1)
    for step in range(50):
        loader.batch_at(step)
    before = resident()
    for step in range(50, 200):
        loader.batch_at(step)
    assert resident() - before < 10_000_000
