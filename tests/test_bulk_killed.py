"""A bulk call of two processes that is killed at random: every request once, and the bytes of an undisturbed call."""
import random

import pytest

from benchmarks.bulk import Call, disturb, files_of, finish, memory_line, numbers_of, write_prompts
from sampling.bulk_folder import BulkFolder

COUNT = 400


@pytest.mark.slow
def test_two_processes_killed_at_random(tiny_run, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", COUNT)
    whole, killed = BulkFolder(tmp_path / "whole"), BulkFolder(tmp_path / "killed")
    calls = [Call(["--run", str(tiny_run), "--prompts", str(prompts), "--out", str(folder.out), "--bulk", "--steps",
                   "2", "--shard-size", "20"]) for folder in (whole, killed)]
    finish(calls[0], whole)
    assert disturb(calls[1], killed, [20, 100, 180, 260], random.Random(0), longest=0.5) >= 2
    finish(calls[1], killed)
    assert numbers_of(killed.out) == [*range(COUNT)]
    assert files_of(killed.out) == files_of(whole.out)
    assert memory_line(calls[0].memory, COUNT)
