"""What makes sampling fast, kept without a clock: operators, projections, waits, graph breaks, memory."""
import copy
import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from random_weights import randomize
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.sampling import TINY, TOKENS, system_of
from diffusion.guidance import GuidanceConfig
from diffusion.samplers import SAMPLERS, get_sampler
from diffusion.sampling import SamplingConfig
from diffusion.schedule import ScheduleConfig
from model.device import cpu_has_bf16

WAITS = {"aten._local_scalar_dense", "aten.item", "aten.equal", "aten.nonzero", "aten.is_nonzero"}  # for the device
VIEWS = {"aten.view", "aten._unsafe_view", "aten.t", "aten.transpose", "aten.permute", "aten.expand", "aten.unsqueeze",
         "aten.slice", "aten.select", "aten.split", "aten.unbind", "aten.detach", "aten.alias", "aten.as_strided"}


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.found[str(operator).rsplit(".", 1)[0]] += 1
        return operator(*arguments, **(options or {}))


@pytest.fixture(scope="module")
def system():
    return system_of(TINY, 4, 8, "cpu")


def context_of(system, batch: int) -> torch.Tensor:
    width = system.unet.config.context_width
    return torch.randn(batch, TOKENS, width, generator=torch.Generator().manual_seed(0))


def draw(batch: int = 1):
    generator = torch.Generator().manual_seed(1)
    return lambda: torch.randn(batch, 4, 8, 8, generator=generator)


@torch.no_grad()
def test_operators_of_a_forward_pass(system):
    """An upper bound on what a step starts, views apart. Raise it only for a reason that is worth a kernel a step."""
    unet, x, t = system.unet, torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    cache, time_biases = unet.context_cache(context_of(system, 2)), unet.time_biases(t[:1])
    with Operators() as operators:
        unet(x, t, cache=cache, time_biases=time_biases)
    kernels = sum(count for name, count in operators.found.items() if name not in VIEWS)
    layers = len(unet.cross_attentions())
    assert 0 < kernels <= 30 * layers + 16 * sum(len(level.resblocks) for level in (*unet.down, unet.mid, *unet.up)), \
        operators.found
    with Operators() as plain:
        unet(x, t, context_of(system, 2))
    fewer = sum(plain.found.values()) - sum(operators.found.values())
    assert fewer >= 2 * layers + 10  # projections of the context, and all of the time


@torch.no_grad()
def test_biases_of_the_time_are_those_of_the_network(system):
    unet, x, context = system.unet, torch.randn(3, 4, 8, 8), context_of(system, 3)
    tables = unet.time_biases(torch.tensor([999.0, 250.5, 0.0]))
    for row, t in enumerate((999, 250.5, 0)):
        expected = unet(x, torch.full((3,), t), context)
        found = unet(x, torch.zeros(3), context, time_biases=[table[row:row + 1] for table in tables])
        assert (found - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("speed, times", [("exact", 7), pytest.param("fast", 1, marks=pytest.mark.skipif(
    not cpu_has_bf16(), reason="needs a processor that computes in bf16"))])
def test_text_is_projected_once_a_run_and_with_fast_the_time_too(system, speed, times):
    system, calls = system.at_speed(speed), Counter()
    layers = [*((layer.kv, "text") for layer in system.unet.cross_attentions()), (system.unet.time.linear1, "time")]
    hooks = [layer.register_forward_hook(lambda *_, name=name: calls.update([name])) for layer, name in layers]
    config = replace(system.config.sampling, steps=7)
    try:
        with torch.inference_mode():
            system.latents_from_context(context_of(system, 2), None, 1, draw(), config)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == {"text": len(system.unet.cross_attentions()), "time": times}


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith("flow")])
@pytest.mark.parametrize("guidance", [{}, {"method": "apg"}, {"rescale": 0.7, "interval": (0.5, 5.0)},
                                      {"method": "cfg_zero_star", "threshold": 0.99}])
@pytest.mark.parametrize("speed", ["exact", "fast"])
def test_the_loop_never_waits_for_the_device(system, sampler, guidance, speed):
    system = system.at_speed(speed)
    options = {"order": 3} if "order" in get_sampler(sampler).options else {}
    config = SamplingConfig(sampler, 5, options=options, guidance=GuidanceConfig(scale=4.0, **guidance))
    context = context_of(system, 2)
    with torch.inference_mode(), Operators() as operators:
        system.latents_from_context(context, None, 1, draw(), config)
    assert not WAITS & operators.found.keys(), operators.found


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_without_breaks_and_none_anew_on_the_second_call(system):
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    unet = copy.deepcopy(system.unet)
    compiled = torch.compile(unet, backend=counter, fullgraph=True, dynamic=False)
    tables = unet.time_biases(torch.tensor([900.0, 500.0, 3.0]))
    for row, t in enumerate((900, 500, 3)):
        cache = unet.context_cache(context_of(system, 2) + t)
        time_biases = [table[row:row + 1] for table in tables]
        x = torch.randn(2, 4, 8, 8)
        found = compiled(x, torch.full((2,), t), cache=cache, time_biases=time_biases)
        assert torch.allclose(found, unet(x, torch.full((2,), t), cache=cache, time_biases=time_biases), atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_no_tensor_outlives_its_run(system):
    def alive() -> int:
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    def run(count: int) -> None:
        for _ in range(count):
            with torch.inference_mode():
                system.latents_from_context(context_of(system, 2), None, 1, draw(),
                                            replace(system.config.sampling, steps=2))

    run(2)
    before = alive()
    run(20)
    assert alive() <= before


# ---- speed

def test_exact_is_the_system_itself(system):
    assert system.at_speed("exact") is system and system.speed == "exact"
    assert {p.dtype for p in system.unet.parameters()} == {torch.float32}


@pytest.mark.skipif(not cpu_has_bf16(), reason="needs a processor that computes in bf16")
def test_fast_is_close_and_leaves_the_exact_system_as_it_is(system):
    fast = system.at_speed("fast")
    assert fast.speed == "fast" and {p.dtype for p in fast.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in system.unet.parameters()} == {torch.float32} and system.speed == "exact"
    context = context_of(system, 2)
    with torch.inference_mode():
        exact, rounded, again = (one.latents_from_context(context, None, 1, draw(), system.config.sampling)
                                 for one in (system, fast, fast))
    assert rounded.dtype == torch.float32 and torch.equal(rounded, again)
    assert 0 < (rounded - exact).square().mean().sqrt() <= 0.1 * exact.std()


def test_frozen_convolutions_are_packed_and_equal(system):
    from model.packed import Conv2d
    unet = randomize(copy.deepcopy(system.unet))
    x, context, t = torch.randn(2, 4, 8, 8), context_of(system, 2), torch.tensor([500, 3])
    with torch.no_grad():
        found = unet(x, t, context)
        packed = [m for m in unet.modules() if isinstance(m, Conv2d) and m.packed is not None]
        assert packed
        unet.requires_grad_(True)  # weights that may change are never packed
        expected = unet(x, t, context)
        assert (found - expected).abs().max() <= 1e-5 * expected.std()
        unet.requires_grad_(False)
        packed[0].weight.mul_(2.0)  # seen
        assert not torch.allclose(unet(x, t, context), found)
    assert all(m.packed is None for m in copy.deepcopy(unet).modules() if isinstance(m, Conv2d))


def test_schedules_with_real_times_have_a_table_too():
    flow = system_of(TINY, 3, 8, "cpu").at_speed("fast")
    flow.schedule = type(flow.schedule)(ScheduleConfig(kind="flow"))
    flow.config = replace(flow.config, prediction_type="flow")
    for sampler in ("flow_euler", "flow_heun"):
        config = SamplingConfig(sampler, 3, guidance=GuidanceConfig(scale=2.0))
        with torch.inference_mode():
            assert flow.latents_from_context(context_of(flow, 2), None, 1, draw(), config).isfinite().all()
