"""The GPU against the CPU: every network, sampler and mode gives what it gives there. Skipped without CUDA."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_weights import randomize
from small_runs import assert_same_run

from benchmarks.sampling import TINY, TOKENS, system_of
from diffusion.guidance import GuidanceConfig
from diffusion.samplers import SAMPLERS
from diffusion.sampling import SamplingConfig
from diffusion.schedule import Schedule, ScheduleConfig
from eval.features.inception import InceptionV3
from model.autoencoder import Autoencoder, AutoencoderConfig
from model.clip import Clip, ClipConfig, ImageEncoderConfig
from model.decode import decode_sliced, decode_tiled
from model.device import freeze, place_on
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
ROOT = Path(__file__).parents[1]
TEXT = TextEncoderConfig(vocab_size=60, length=9, width=32, layers=2, heads=2, mlp_width=64)
IMAGE = ImageEncoderConfig(size=32, patch=8, width=32, layers=2, heads=2, mlp_width=64)
AUTOENCODER = AutoencoderConfig(latent_channels=4, channels=(32, 64), blocks=1, norm_groups=8)


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32, and kernels that add up in one order."""
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
              torch.backends.cudnn.deterministic)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
     torch.backends.cudnn.deterministic) = before


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(batch: int, seed: int = 1, device: str = "cuda"):
    """Noise of a CPU generator, so that a seed means the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(batch, 4, 8, 8, generator=generator).to(device)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    found = found.float().cpu()
    assert found.isfinite().all() and (found - expected).abs().max() <= tolerance * expected.std()


def on_both(network: torch.nn.Module):
    """(on the CPU, on the GPU) with the same weights."""
    other = type(network)(network.config)
    other.load_state_dict(network.state_dict())
    return freeze(place_on(network, "cpu")), freeze(place_on(other, "cuda"))


# ---- networks

@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.15)])
def test_networks_equal_those_of_the_cpu(dtype, tolerance):
    ids, mask = torch.arange(18).view(2, 9), torch.arange(9)[None] < torch.tensor([[9], [4]])
    cases = [
        (randomize(UNet(TINY)), lambda n, to: n(to(noise(2, 4, 8, 8)), to(torch.tensor([3, 700])),
                                                to(noise(2, 9, 32)), to(mask))),
        (randomize(TextEncoder(TEXT)), lambda n, to: n(to(ids), to(mask))),
        (randomize(Autoencoder(AUTOENCODER)), lambda n, to: n.decode(to(noise(2, 4, 8, 8)))),
        (randomize(Autoencoder(AUTOENCODER)), lambda n, to: n.encode(to(noise(2, 3, 16, 16))).mean),
        (randomize(Clip(ClipConfig(IMAGE, TEXT, 32))), lambda n, to: n.image_vectors(to(noise(2, 3, 32, 32)))),
    ]
    for network, call in cases:
        one, other = on_both(network)
        expected = call(one, lambda tensor: tensor)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            assert_close(call(other, lambda tensor: tensor.cuda()), expected, tolerance)


@torch.no_grad()
def test_decoding_in_slices_and_tiles():
    one, other = on_both(randomize(Autoencoder(AUTOENCODER)))
    latents = noise(2, 4, 12, 20)
    for decode, more in ((decode_sliced, {}), (decode_tiled, {"tile": 8, "overlap": 2})):
        assert_close(decode(other, latents.cuda(), **more), decode(one, latents, **more), 1e-3)


@torch.no_grad()
def test_features_equal_those_of_the_cpu():
    torch.manual_seed(0)
    network, x = freeze(InceptionV3()), noise(1, 3, 299, 299)
    expected = network.pooled(x)
    assert_close(network.cuda().pooled(x.cuda()), expected, 1e-2)


# ---- sampling

@pytest.fixture(scope="module")
def systems():
    cpu = system_of(TINY, 5, 8, "cpu")
    gpu = system_of(TINY, 5, 8, "cuda")
    return cpu, gpu


def run_of(system, config, batch: int = 2, seed: int = 1, **more):
    context = noise(2 * batch, TOKENS, 32, seed=5).to(system.device)
    with torch.inference_mode():
        return system.latents_from_context(context, None, batch, draws(batch, seed, system.device), config, **more)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith("flow")])
@pytest.mark.parametrize("method", ["cfg", "apg", "cfg_zero_star"])
def test_samplers_equal_those_of_the_cpu(systems, sampler, method):
    config = SamplingConfig(sampler, 5, guidance=GuidanceConfig(scale=3.0, method=method, rescale=0.5))
    expected, found = (run_of(system, config) for system in systems)
    assert_close(found, expected, 5e-3)


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_heun"])
def test_flow_equals_that_of_the_cpu(sampler):
    results = []
    for device in ("cpu", "cuda"):
        system = system_of(TINY, 4, 8, device)
        system.schedule = Schedule(ScheduleConfig(kind="flow"))
        system.config = replace(system.config, prediction_type="flow")
        results.append(run_of(system, SamplingConfig(sampler, 4, guidance=GuidanceConfig(scale=2.0))))
    assert_close(results[1], results[0], 5e-3)


def test_the_loop_never_waits_for_the_device(systems):
    gpu = systems[1]
    config = SamplingConfig("dpm_solver_multistep", 4, guidance=GuidanceConfig(scale=3.0))
    context = noise(2, TOKENS, 32).cuda()
    first = noise(1, 4, 8, 8).cuda()
    with torch.inference_mode():
        gpu.latents_from_context(context, None, 1, lambda: first, config)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            gpu.latents_from_context(context, None, 1, lambda: first, config)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc", "dpm_solver_sde"])
def test_graphs_replay_what_was_run(systems, sampler):
    """Run, recorded, replayed with other noise: the graph gives the bits of the run."""
    fast = systems[1].at_speed("fast")
    assert fast.runs is not None
    plain = systems[1].at_speed("fast")
    plain.runs = None
    config = SamplingConfig(sampler, 4, guidance=GuidanceConfig(scale=3.0, interval=(0.3, 20.0)))
    for seed in (1, 2, 3, 2):
        assert torch.equal(run_of(fast, config, seed=seed), run_of(plain, config, seed=seed))
    assert len(fast.runs.graphs) == 1


def test_fast_is_close_to_exact(systems):
    config = SamplingConfig("ddim", 5, guidance=GuidanceConfig(scale=3.0))
    exact, fast = run_of(systems[1], config).cpu(), run_of(systems[1].at_speed("fast"), config).cpu()
    assert (fast - exact).square().mean().sqrt() <= 0.1 * exact.std()


@pytest.mark.slow
def test_compiled_step_equals_that_of_the_cpu(systems):
    compiled = systems[1].at_speed("exact")
    expected = run_of(systems[0], systems[0].config.sampling)
    compiled.unet.compile(dynamic=False, fullgraph=True)
    try:
        assert_close(run_of(compiled, compiled.config.sampling), expected, 5e-3)
    finally:
        compiled.unet._compiled_call_impl = None


# ---- training

def trained(config: Path, path: Path, *more: str, code: int = 0, command: tuple[str, ...] = ("train.py",)) -> None:
    """A run of the command in a process of its own, with kernels that add up in one order."""
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, str(config), f"run={path}", *more], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]


DETERMINISTIC = ("-c", "import sys, torch\ntorch.use_deterministic_algorithms(True, warn_only=True)\n"
                 "torch.backends.cudnn.benchmark = False\nimport train\ntrain.main(sys.argv[1:])")


@pytest.mark.slow
def test_a_run_that_was_cut_is_the_run_that_was_not(tiny_config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(tiny_config, whole, command=DETERMINISTIC)
    trained(tiny_config, parts, "stages=[tokenizer, autoencoder]", command=DETERMINISTIC)
    trained(tiny_config, parts, command=DETERMINISTIC)
    assert_same_run(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_of_many(tiny_config, tmp_path, parallel):
    trained(tiny_config, tmp_path / "run", f"autoencoder.train.parallel={parallel}",
            f"denoiser.train.parallel={parallel}",
            command=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "train.py"))
    assert (tmp_path / "run" / "denoiser.safetensors").exists()
