"""The loop on a small regression: it is what a reader would write, resumes bit for bit, and guards itself."""
import math
import os
import shutil
import signal
import time

import pytest
import torch
from small_runs import metrics, small_fit, terminate
from torch import nn

import train
from training.logger import board_class, flatten_numbers, open_board, round_number
from training.loop import Interrupted
from training.optim import OptimConfig
from training.seed import generator, parts_of


@pytest.mark.parametrize("optimizer, rate", [("adamw", 0.05), ("muon", 0.2)])
def test_every_optimizer_learns_and_resumes_bit_for_bit(tmp_path, optimizer, rate):
    optim = OptimConfig(optimizer=optimizer, learning_rate=rate, warmup=2)
    whole, _ = small_fit(tmp_path / "whole", steps=40, optim=optim)
    with pytest.raises(Interrupted):
        small_fit(tmp_path / "parts", steps=40, optim=optim, at={17: terminate})
    parts, _ = small_fit(tmp_path / "parts", steps=40, optim=optim)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    logged = [line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line]
    assert len(logged) == 40 and logged[-1] < 0.1 * logged[0]


def test_the_loop_is_what_a_reader_would_write(tmp_path):
    """Against plain AdamW with gradients cleared, clipped at norm 0.5 and the rate set by hand. fp32: 1e-5."""
    settings = {"learning_rate": 0.02, "warmup": 2, "weight_decay": 0.1, "clip": 0.5}
    _, history = small_fit(tmp_path, steps=10, optim=OptimConfig(**settings))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    wanted = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}],
                                  betas=(0.9, 0.99), foreach=False)
    for step in range(10):
        rate = 0.02 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 8)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = torch.randn(32, 4, generator=generator(0, "test", step))
        optimizer.zero_grad()
        (model(x) - x @ wanted).square().mean().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.5 / float(norm))
        optimizer.step()
        for found, expected in zip(history[step], model.parameters()):
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pieces", [2, 3, 32])
def test_small_batches_one_after_the_other_are_the_large_one(tmp_path, pieces):
    """Also where the pieces have unequal sizes: 32 = 10 + 11 + 11. fp32, sums in another order: 1e-5."""
    optim = OptimConfig(learning_rate=0.02, warmup=2, clip=0.5)
    _, at_once = small_fit(tmp_path / "one", optim=optim)
    _, pieced = small_fit(tmp_path / "many", optim=optim, accumulate=pieces)
    for one, many in zip(at_once, pieced):
        for a, b in zip(one, many):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    logged = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("one", "many")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4) and len(logged[0]) == 12


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"accumulate: 33; valid: up to batch = 32"):
        small_fit(tmp_path, accumulate=33)
    with pytest.raises(ValueError, match=r"batch: 32 for 3 processes with accumulate: 1; valid: a multiple of 3"):
        parts_of(32, 0, 3)
    with pytest.raises(ValueError, match=r"batch: 4 for 2 processes with accumulate: 3; valid: a multiple of 2 from 6"):
        parts_of(4, 1, 2, 3)


@pytest.mark.parametrize("batch, world, pieces", [(12, 1, 1), (12, 2, 1), (12, 3, 3), (12, 2, 4), (10, 2, 5)])
def test_parts_are_the_batch_and_see_its_noise(batch, world, pieces):
    parts = [part for rank in range(world) for part in parts_of(batch, rank, world, pieces)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(batch))
    assert sum(part.share for part in parts) == pytest.approx(1) and all(len(part) > 0 for part in parts)
    noise = torch.cat([part.randn((len(part), 3), generator(0, "x", 1)) for part in parts])
    assert torch.equal(noise, torch.randn(batch, 3, generator=generator(0, "x", 1)))
    read = [list(range(rank * batch // world, (rank + 1) * batch // world)) for rank in range(world)]
    found = [i for rank in range(world) for part in parts_of(batch, rank, world, pieces)
             for i in part.of_read(read[rank])]
    assert found == list(range(batch))


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_the_program_at_once(tmp_path, interruptible):
    before = signal.getsignal(signal.SIGINT)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not before:  # two that wait together would count as one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10.0)  # it may be another thread that gets it

    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path, at={6: twice})
    assert signal.getsignal(signal.SIGINT) is before  # handlers are put back
    small_fit(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_random_numbers_are_a_function_of_seed_purpose_and_step():
    def draw(*key):
        return tuple(torch.randn(4, generator=generator(*key)).tolist())

    keys = [(seed, purpose, step) for seed in (0, 1) for purpose in ("a", "b") for step in (0, 1, 10, 11)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, "a", 10) == draw(1, "a", 10)
    state = torch.get_rng_state()
    draw(0, "a", 0)
    assert torch.equal(state, torch.get_rng_state())


# ---- what can be switched on

def test_gradient_checkpointing_changes_no_bit_of_the_losses(tiny_config, tiny_run, tmp_path):
    """It computes activations again instead of keeping them: the same numbers."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("tokenizer.json", "autoencoder.safetensors"):
        shutil.copy(tiny_run / name, run / name)
    train.main([str(tiny_config), f"run={run}", "denoiser.unet.gradient_checkpointing=true"])
    found, expected = ([line["loss"] for line in metrics(path) if line["stage"] == "denoiser" and "loss" in line]
                       for path in (run, tiny_run))
    assert found == pytest.approx(expected, rel=1e-6) and len(found) == 12


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_it_learns_the_same(tmp_path):
    """fp32, fused sums: 1e-5."""
    plain, _ = small_fit(tmp_path / "plain", steps=5)
    compiled, _ = small_fit(tmp_path / "compiled", steps=5, compile=True)
    for one, two in zip(plain.parameters(), compiled.parameters()):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_tensorboard_gets_the_same_numbers_or_is_said_to_be_missing(tmp_path, capsys):
    board_class.cache_clear()
    board = open_board(tmp_path / "board", 0)
    if board is None:
        assert "tensorboard is not installed (pip install tensorboard)" in capsys.readouterr().out
    else:
        board.add_scalar("a", 1.0, 1)
        board.close()
        assert list((tmp_path / "board").iterdir())
    assert flatten_numbers({"step": 3, "loss": 0.5, "split": {"data": 0.1}, "event": "skip"}) == {
        "loss": 0.5, "split/data": 0.1}
    assert [round_number(value) for value in (1 / 3, float("nan"), 3, "a")] == [0.333333333, None, 3, "a"]
