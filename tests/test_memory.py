"""Freed memory stays with the process: counted in page faults, not in time."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import resource, sys
import torch
from training.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept" and not keep_freed_memory():
    print("unknown")
    raise SystemExit
def work():
    for _ in range(4):
        torch.ones(10 * 2**20)  # 40 MiB: 10,240 pages of 4 KiB
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, check=True)
    return done.stdout.strip()


def test_a_second_round_of_the_same_work_asks_the_system_for_nothing():
    kept = faults("kept")
    if kept == "unknown":
        pytest.skip("not glibc")
    assert int(kept) < 100 < int(faults("given back"))
