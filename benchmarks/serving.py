"""Requests a second, seconds a request and memory of the service: python -m benchmarks.serving [--run DIR]

Starts `serve.py` for every number of replicas and size of batch, keeps so many requests on their way that no replica
waits, and prints a row for each. --soak SECONDS sends twice of what one of them can do instead: what is accepted must
be answered, memory must not grow. --cost says what a million images a day need.
"""
import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost_model import DOLLARS, MLPERF, fit_machines
from model.summary import summaries
from pipeline.config import read_data_config, read_system_config
from sampling.limits import SHIPPED

CORE_DOLLARS = 0.04  # a processor core and hour, a usual price of rented machines
DAY = 1_000_000  # images
MOST = 60  # requests on their way, fewer than one client may have
ROOT = Path(__file__).parents[1]


@dataclass
class Answers:
    """Seconds of the requests that were drawn, and how often each status was answered."""

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    def row(self, duration: float) -> str:
        """Requests a second and quantiles, as cells of a table."""
        p50, p95, p99 = np.quantile(self.seconds or [float("nan")], [0.5, 0.95, 0.99])
        return f"{len(self.seconds) / duration:.2f} | {p50:.2f} | {p95:.2f} | {p99:.2f}"


class Running:
    """`serve.py` in a process of its own, as a context."""

    def __init__(self, run: str, replicas: int, batch: int, queue: int):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.command = [sys.executable, "serve.py", "--run", run, "--port", str(port), "--batch", str(batch), "--queue",
                        str(queue), "--threads", "1", *(["--replicas", str(replicas)] if replicas else [])]

    def __enter__(self) -> "Running":
        import httpx
        self.process = subprocess.Popen(self.command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                        start_new_session=True, stdout=subprocess.DEVNULL)
        for _ in range(240):
            try:
                if httpx.get(self.url + "/health").status_code == 200:
                    return self
            except httpx.TransportError:
                if self.process.poll() is not None:
                    break
            time.sleep(0.5)
        self.__exit__()
        raise OSError("the service does not answer")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def memory(self) -> float:
        """MB that its processes hold and share with nobody, those of Ray included."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
        waiting, total = [self.process.pid], 0
        while waiting:
            pid = waiting.pop()
            waiting += children.get(pid, [])
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))
        return total / 1024


async def send(client: Any, url: str, steps: int, seed: int, answers: Answers) -> None:
    """One request for one image."""
    start = time.monotonic()
    body = {"prompt": "a red apple, noto style", "seed": seed, "num_inference_steps": steps}
    answer = await client.post(url + "/v1/images/generations", json=body)
    answers.statuses[answer.status_code] = answers.statuses.get(answer.status_code, 0) + 1
    if answer.status_code == 200:
        answers.seconds.append(time.monotonic() - start)


async def keep_busy(url: str, steps: int, at_once: int, seconds: float) -> tuple[Answers, float]:
    """(answers, seconds) of so many clients, each of which sends its next request when it has its answer."""
    import httpx
    answers = Answers()
    async with httpx.AsyncClient(timeout=600) as client:
        await send(client, url, steps, 0, Answers())  # whatever happens only once
        start = time.monotonic()

        async def one(number: int) -> None:
            seed = number
            while time.monotonic() - start < seconds:
                await send(client, url, steps, seed, answers)
                seed += at_once
        await asyncio.gather(*(one(number) for number in range(at_once)))
        return answers, time.monotonic() - start


async def overload(service: Running, steps: int, rate: float, seconds: float) -> tuple[Answers, list[float]]:
    """(answers, MB at ten moments) of requests that arrive at random, ``rate`` a second, whatever is answered."""
    import httpx
    answers, memory, tasks, draw = Answers(), [service.memory()], set(), random.Random(0)
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=100)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        start, seed = time.monotonic(), 0
        while (passed := time.monotonic() - start) < seconds:
            task = asyncio.create_task(send(client, service.url, steps, seed, answers))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            seed += 1
            if passed > len(memory) * seconds / 10:
                memory.append(service.memory())
            await asyncio.sleep(draw.expovariate(rate))
        await asyncio.gather(*tasks)
    return answers, [*memory, service.memory()]


def print_cost(run: str, steps: int, rate: float | None) -> None:
    """What a million images a day need: cores at the measured rate of one, and GPUs by the cost model."""
    config = read_system_config(Path(run) / "config.yaml")
    parts = summaries(config.autoencoder, config.text_encoder, config.unet,
                      read_data_config(Path(run) / "config.yaml").size)
    calls = steps * (1 if config.sampling.guidance.scale == 1 else 2)
    work = calls * sum(stage.flops for stage in parts["denoiser"]) / 1e9
    print(f"\n{DAY:,} images a day are {DAY / 86_400:.1f} a second; one is {work:.0f} GFLOP of the denoiser, {steps} "
          "steps")
    if rate:
        cores = DAY / 86_400 / rate
        print(f"processors, measured {rate:.2f} images a second and core: {cores:.1f} cores, "
              f"{cores * 24 * CORE_DOLLARS:.2f} $ a day at {CORE_DOLLARS} $ a core and hour")
    machine = fit_machines()[MLPERF, 512]
    seconds = work * 1e9 / machine.rate
    print(f"GPUs like the H100s of the cost model, simulated: {seconds * DAY / 3600:.2f} GPU hours, "
          f"{seconds * DAY / 3600 * DOLLARS:.2f} $ a day; a small network does not reach that rate")


def measure(options: argparse.Namespace) -> float:
    """Print the table; the most images a second and replica."""
    best = 0.0
    print("| replicas | batch | at once | images/s | p50 s | p95 s | p99 s | MB |\n|---|---|---|---|---|---|---|---|")
    for replicas in options.replicas:
        for batch in options.batch:
            at_once = min(MOST, max(2, 2 * batch * max(1, replicas)))
            with Running(options.run, replicas, batch, 10_000) as service:
                answers, seconds = asyncio.run(keep_busy(service.url, options.steps, at_once, options.seconds))
                print(f"| {replicas or 'none, one process'} | {batch} | {at_once} | {answers.row(seconds)} | "
                      f"{service.memory():.0f} |", flush=True)
                assert set(answers.statuses) == {200}, answers.statuses
                best = max(best, len(answers.seconds) / seconds / max(1, replicas))
    return best


def soak(options: argparse.Namespace) -> None:
    """Twice the capacity for a while; how many were accepted, and what they and the memory were like."""
    replicas, batch = options.replicas[0], options.batch[0]
    with Running(options.run, replicas, batch, options.queue) as service:
        answers, seconds = asyncio.run(keep_busy(service.url, options.steps, 2 * batch * max(1, replicas), 20))
        capacity = len(answers.seconds) / seconds
        answers, memory = asyncio.run(overload(service, options.steps, 2 * capacity, options.soak))
    print(f"{replicas} replicas, batch {batch}, queue {options.queue}: capacity {capacity:.2f} images/s, "
          f"{2 * capacity:.2f} a second sent for {options.soak:.0f} s")
    print(f"answers by status: {dict(sorted(answers.statuses.items()))}")
    print(f"images/s | p50 | p95 | p99: {answers.row(options.soak)}; the queue alone takes "
          f"{options.queue / capacity:.1f} s")
    print(f"MB: {', '.join(f'{value:.0f}' for value in memory)}")


def main(arguments: list[str]) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=str(SHIPPED), metavar="DIR", help="run folder (the shipped weights)")
    parser.add_argument("--replicas", type=int, nargs="+", default=[0, 1, 2], help="0: one process without Ray")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30, help="of each row")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="overload instead")
    parser.add_argument("--queue", type=int, default=32, help="of --soak")
    parser.add_argument("--cost", type=float, nargs="?", const=0, metavar="RATE", help="what a million images a day "
                        "cost, at this many images a second and core (measured)")
    options = parser.parse_args(arguments)
    if options.soak:
        soak(options)
        return
    print_cost(options.run, options.steps, options.cost or measure(options)) if options.cost is not None \
        else measure(options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
