"""A bulk call that is killed again and again against one that is left alone, and against a loop over sample.py.

    python -m benchmarks.bulk RUN OUT [--requests 20000] [--kills 10] [--processes 2] [--full]

Each kill strikes at a random moment, one process or all of them. ``--full`` also fills the disk of OUT once, which
should be a small one (mount -t tmpfs -o size=600m tmpfs OUT). Prints whether every request is there once, whether the
bytes are those of the undisturbed call, resident memory over the call, and images a second.
"""
import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sampling.bulk_folder import STATE, BulkFolder

ROOT = Path(__file__).parents[1]
WORDS = ("red", "blue", "green", "pink", "yellow", "small", "large", "star", "moon", "circle", "square", "triangle",
         "above", "below", "beside", "a", "two", "three")
Memory = list[tuple[int, int, float]]  # requests done, process, megabytes


def write_prompts(path: Path, count: int, seed: int = 0) -> Path:
    """JSON lines of prompts of 2 to 60 words, most of them short, a tenth of them with settings of their own."""
    chance = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            words = chance.choices(WORDS, k=min(60, 2 + int(chance.expovariate(1 / 8))))
            row: dict = {"prompt": " ".join(words)}
            if chance.random() < 0.1:
                row |= {"seed": chance.randrange(1000), "settings": {"guidance": 2.0}}
            file.write(json.dumps(row) + "\n")
    return path


def children(pid: int) -> list[int]:
    """The processes that a process has begun and that are alive."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def resident(pid: int) -> float:
    """Megabytes of memory that a process occupies; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):
        return 0.0


@dataclass
class Call:
    """A bulk call in processes of its own, by torchrun if there are several."""

    arguments: Sequence[str]
    processes: int = 2
    launches: int = 0
    memory: Memory = field(default_factory=list)

    def start(self) -> subprocess.Popen:
        """Start it in a session of its own."""
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.processes), "--master-port",
                    str(20_000 + (os.getpid() + self.launches) % 20_000), "--"] if self.processes > 1 else []
        self.launches += 1
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8")
        return subprocess.Popen([sys.executable, *launcher, "sample.py", *self.arguments], cwd=ROOT,
                                stdout=subprocess.DEVNULL, stderr=self.said, start_new_session=True)

    def workers(self, process: subprocess.Popen) -> list[int]:
        """The processes that draw."""
        return children(process.pid) if self.processes > 1 else [process.pid]

    def run(self, folder: BulkFolder, until: Callable[[], bool] = lambda: False) -> str:
        """Run it to its end, or to the moment ``until``, at which it is left running; what it said on stderr."""
        self.process = self.start()
        last = 0.0
        while self.process.poll() is None and not (self.workers(self.process) and until()):
            time.sleep(0.05)
            if time.monotonic() - last > 1.0:
                last = time.monotonic()
                done = folder.progress().requests
                self.memory += [(done, pid, resident(pid)) for pid in self.workers(self.process) if resident(pid)]
        self.said.seek(0)
        return "" if self.process.poll() is None else self.said.read()

    def kill(self, all_of_them: bool, chance: random.Random) -> bool:
        """Kill one worker, or all processes, as by a power cut; False if the call had ended."""
        workers = self.workers(self.process)
        if self.process.poll() is not None or not workers:
            return False
        if all_of_them:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            os.kill(chance.choice(workers), signal.SIGKILL)
        self.process.wait()  # torchrun ends the others
        return True


def disturb(call: Call, folder: BulkFolder, targets: Sequence[float], chance: random.Random,
            longest: float = 2.0) -> int:
    """Run a call and kill it in turn one process and all, up to ``longest`` seconds after each of these numbers of
    requests is done; how often it was killed."""
    killed = 0
    for place, target in enumerate(targets):
        moment, delay = [0.0], chance.uniform(0.0, longest)  # in the middle of a window

        def due(target: float = target, moment: list[float] = moment, delay: float = delay) -> bool:
            if not moment[0] and folder.progress().requests >= target:
                moment[0] = time.monotonic()
            return bool(moment[0]) and time.monotonic() - moment[0] >= delay

        call.run(folder, due)
        killed += call.kill(place % 2 == 1, chance)
    return killed


def finish(call: Call, folder: BulkFolder) -> None:
    """Run a call to its end. Raises RuntimeError if it fails."""
    said = call.run(folder)
    if call.process.returncode:
        raise RuntimeError(said)


def fill_disk(call: Call, folder: BulkFolder) -> str:
    """Fill the disk of the folder until the call stops by itself, and give the room back; the line it stopped with."""
    filler = folder.out / STATE / "filler"
    free = os.statvfs(folder.out)
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - 2_000_000))
    said = call.run(folder)
    filler.unlink()
    return next((line for line in said.splitlines() if "No space left" in line), f"not full: {said[-300:]}")


def files_of(out: Path) -> dict[str, bytes]:
    """Shards and lines of a folder, by path."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.parent.name != STATE}


def numbers_of(out: Path) -> list[int]:
    """The numbers of the requests in results.jsonl, in its order."""
    with open(out / "results.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["number"] for line in file]


def memory_line(memory: Memory, count: int) -> str:
    """Largest resident memory of a process in each quarter of the requests."""
    quarters = [[size for done, _, size in memory if part <= 4 * done / count < part + 1] for part in range(4)]
    return " ".join(f"{max(sizes):.0f}" if sizes else "-" for sizes in quarters) + " MB"


def main(arguments: list[str]) -> None:
    """Parse the command line, run the three and print what is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=500)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = write_prompts(options.out / "prompts.jsonl", options.requests)
    folders = {name: BulkFolder(options.out / name) for name in ("undisturbed", "disturbed")}
    calls = {name: Call(["--run", options.run, "--prompts", str(prompts), "--out", str(folder.out), "--bulk", "--steps",
                         str(options.steps), "--shard-size", str(options.shard_size)], options.processes)
             for name, folder in folders.items()}
    began = time.perf_counter()
    finish(calls["undisturbed"], folders["undisturbed"])
    seconds = time.perf_counter() - began

    def used(name: str) -> str:
        return f"largest resident memory by quarter {memory_line(calls[name].memory, options.requests)}"

    print(f"undisturbed: {options.requests} requests in {seconds:.0f} s, {options.requests / seconds:.1f} a second; "
          f"{used('undisturbed')}", flush=True)
    chance = random.Random(0)
    targets = [options.requests * (place + chance.random()) / (options.kills + 1) for place in range(options.kills)]
    half = options.kills // 2
    killed = disturb(calls["disturbed"], folders["disturbed"], targets[:half], chance)
    if options.full:
        print(f"disk full: {fill_disk(calls['disturbed'], folders['disturbed'])}", flush=True)
    killed += disturb(calls["disturbed"], folders["disturbed"], targets[half:], chance)
    finish(calls["disturbed"], folders["disturbed"])
    found, expected = files_of(folders["disturbed"].out), files_of(folders["undisturbed"].out)
    numbers = numbers_of(folders["disturbed"].out)
    print(f"killed {killed} times: {len(numbers)} lines, each request once: {numbers == [*range(options.requests)]}, "
          f"bytes equal: {found == expected}; {used('disturbed')}", flush=True)
    times = []
    for number in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "sample.py", "a red star", "--run", options.run, "--steps", str(options.steps),
                        "--out", str(options.out / "loop")], cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    usual = statistics.median(times)
    print(f"a loop over sample.py: {usual:.1f} s an image, {1 / usual:.2f} a second")


if __name__ == "__main__":
    main(sys.argv[1:])
