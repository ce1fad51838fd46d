"""All that a lent GPU is good for, in one go: python -m benchmarks.gpu --minutes N --out DIR [--config CONFIG] [--dry]

    tests      the tests marked `cuda`                                       -> tests.log
    sampling   the table of 512 px (benchmarks/gpu_tables.py)                -> gpu_sampling.md, .json
    training   the table of 256 and 512 px                                   -> gpu_training.md, .json
    train      CONFIG for the minutes that are left, until its next state    -> run/, train.log

Each part is a process with a time limit of its own, so that one that fails or hangs, or breaks the device, costs no
other; report.md says what became of each. Files of more than 16 MB are cut; `--join DIR` puts them together again.
Without --config nothing is trained. --dry goes through all of it with tiny networks on whatever there is.
"""
import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PIECE = 16 * 2**20  # bytes
ROOT = Path(__file__).resolve().parents[1]
SHARES = {"tests": 0.25, "sampling": 0.45, "training": 0.5}  # of the time that is left when the part begins, at most
GRACE = 60.0  # seconds that a stopped training has to write its state
RESERVE = 20.0  # seconds for cutting files
KEPT = (".yaml", ".json", ".jsonl", ".safetensors", ".md", ".html", ".png", ".pt")  # of a run folder


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part: its exit status (None: stopped at its limit) and its duration."""

    part: str
    status: int | None
    seconds: float
    last: str  # line that it printed

    @property
    def line(self) -> str:
        how = "stopped at its limit" if self.status is None else "done" if self.status == 0 else \
            f"failed with {self.status}"
        return f"| {self.part} | {how} | {self.seconds:.0f} s | {self.last.replace('|', ' ')} |"


def run_part(part: str, command: list[str], limit: float, log: Path, grace: float = 5.0) -> Outcome:
    """Run a command for at most ``limit`` seconds, then ask it to end, and end it and its children after ``grace``."""
    began, status = time.monotonic(), None
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        except OSError as error:
            return Outcome(part, 127, 0.0, str(error))
        try:
            status = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its group, whose leader it is: also what it has left behind
        except ProcessLookupError:
            pass
        process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return Outcome(part, status, time.monotonic() - began, lines[-1][:200] if lines else "")


def commands(options: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    """The command of each part, in their order."""
    python, dry = sys.executable, ["--dry"] if options.dry else []
    tests = [python, "-m", "pytest", "-m", "cuda", "-v", "tests/test_cuda.py" if options.dry else "tests"]
    found = {"tests": tests}
    for name in ("sampling", "training"):
        found[name] = [python, "-m", "benchmarks.gpu_tables", name, "--out", str(out), *dry]
    if options.config:
        found["train"] = [python, "train.py", options.config, f"run={out / 'run'}", *options.overrides]
    return {part: command for part, command in found.items() if part in options.parts}


def all_parts(options: argparse.Namespace, out: Path) -> list[Outcome]:
    """Run them within the minutes; report.md is written after each."""
    end = time.monotonic() + 60 * options.minutes - RESERVE
    outcomes = []
    for part, command in commands(options, out).items():
        left = end - time.monotonic()
        if left < (5 if options.dry else 30):
            outcomes.append(Outcome(part, None, 0.0, "no time was left to begin it"))
            continue
        grace = GRACE if part == "train" else 5.0
        limit = left * SHARES.get(part, 1.0) - grace
        if part in ("sampling", "training"):
            command = [*command, "--seconds", f"{0.7 * limit:.0f}"]  # begin no row that will be cut short
        print(f"{part}: at most {limit:.0f} s", flush=True)
        outcomes.append(run_part(part, command, limit, out / f"{part}.log", grace))
        write_report(outcomes, out, options)
        print(outcomes[-1].line, flush=True)
    write_report(outcomes, out, options)
    return outcomes


def write_report(outcomes: list[Outcome], out: Path, options: argparse.Namespace) -> None:
    """Write report.md: the outcome of each part, and the tables."""
    text = (f"# {options.minutes:g} minutes{' (dry run)' if options.dry else ''}\n\n"
            "| part | outcome | time | last line |\n|---|---|---|---|\n"
            + "".join(f"{outcome.line}\n" for outcome in outcomes))
    for name in ("gpu_sampling", "gpu_training"):
        if (path := out / f"{name}.md").exists():
            text += f"\n## {name.removeprefix('gpu_').capitalize()}\n\n{path.read_text(encoding='utf-8')}"
    (out / "report.md").write_text(text, encoding="utf-8")


# ---- files of at most PIECE bytes

def cut(folder: Path, piece: int = PIECE) -> list[Path]:
    """Cut every larger file of a folder into NAME.000, NAME.001 ... beside NAME.pieces.json; returns the files that
    were cut."""
    done = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > piece):
        digest, count = hashlib.sha256(), 0
        with path.open("rb") as file:
            while data := file.read(piece):
                digest.update(data)
                path.with_name(f"{path.name}.{count:03d}").write_bytes(data)
                count += 1
        about = {"pieces": count, "sha256": digest.hexdigest()}
        path.with_name(f"{path.name}.pieces.json").write_text(json.dumps(about), encoding="utf-8")
        path.unlink()
        done.append(path)
    return done


def join(folder: Path) -> list[Path]:
    """Join the files that `cut` has cut. Raises ValueError for a piece that is missing or damaged."""
    done = []
    for about in sorted(folder.rglob("*.pieces.json")):
        found = json.loads(about.read_text(encoding="utf-8"))
        path = about.with_name(about.name.removesuffix(".pieces.json"))
        pieces = [path.with_name(f"{path.name}.{k:03d}") for k in range(found["pieces"])]
        if missing := [piece for piece in pieces if not piece.exists()]:
            raise ValueError(f"{missing[0]} is missing; valid: all {len(pieces)} pieces of {path.name}")
        data = b"".join(piece.read_bytes() for piece in pieces)
        if hashlib.sha256(data).hexdigest() != found["sha256"]:
            raise ValueError(f"the pieces of {path} are damaged; valid: those whose SHA-256 is {found['sha256']}")
        path.write_bytes(data)
        for piece in (*pieces, about):
            piece.unlink()
        done.append(path)
    return done


def remove_caches(run: Path) -> None:
    """Remove from a run folder everything that neither sampling nor a resume needs: caches, and all states but the
    newest."""
    for path in sorted(run.rglob("*")):
        if path.is_file() and ("cache" in path.relative_to(run).parts or path.suffix not in KEPT):
            path.unlink()
    for stage in (run / "state").glob("*"):
        for old in sorted(stage.glob("step_*.pt"))[:-1]:
            old.unlink()


def main(arguments: list[str]) -> int:
    """0 when every part was done, or stopped at its limit; 1 when one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="for all of it (%(default)s)")
    parser.add_argument("--out", default="build/gpu", help="folder of the results (%(default)s)")
    parser.add_argument("--config", help="a file of configs/ to train in the time that is left")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--parts", nargs="+", default=["tests", *SHARES, "train"], help="only these parts")
    parser.add_argument("--dry", action="store_true", help="tiny networks, on whatever there is")
    parser.add_argument("--join", metavar="DIR", help="only put the pieces in a folder together again")
    options = parser.parse_args(arguments)
    if options.join:
        print("\n".join(f"{path}" for path in join(Path(options.join))))
        return 0
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = all_parts(options, out)
    if (out / "run").exists():
        remove_caches(out / "run")
    for path in cut(out):
        print(f"{path} was cut into pieces of at most {PIECE / 2**20:.0f} MB")
    print((out / "report.md").read_text(encoding="utf-8"))
    return int(any(outcome.status not in (0, None) for outcome in outcomes))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
