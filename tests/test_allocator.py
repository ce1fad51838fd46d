"""Freed memory is kept: the same tensors again cost no page faults. In a process of its own, which it changes."""
import platform
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, torch
from model.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.ones(n, 2**20) for n in (1, 2, 3)]  # 4, 8 and 12 MiB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
faults()
assert faults() < 500, faults()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_same_tensors_again_cost_no_page_faults():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
