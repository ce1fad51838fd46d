"""The training objective: zero at the truth, weights equal to their formulas, times drawn as promised."""

import pytest
import torch
from scipy import stats

from diffusion.loss import diffusion_loss, loss_weight, sample_timesteps
from diffusion.noise import nearest_noise
from diffusion.prediction import prediction_from_x_0, target
from diffusion.schedule import Schedule, ScheduleConfig, per_image

VP = Schedule(ScheduleConfig())
ZERO = Schedule(ScheduleConfig(zero_terminal_snr=True))
FLOW = Schedule(ScheduleConfig(kind="flow"))
CASES = [(VP, k) for k in ("epsilon", "sample", "v_prediction", "flow")]
CASES += [(s, k) for s in (ZERO, FLOW) for k in ("sample", "v_prediction", "flow")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pair():
    return torch.randn(2, 5, 3, 4, 4, generator=generator())


def times(schedule):
    return torch.tensor([0.02, 0.3, 0.5, 0.7, 1.0]) if schedule.is_flow else torch.tensor([0, 10, 500, 900, 999])


@pytest.mark.parametrize("schedule,kind", CASES)
@pytest.mark.parametrize("weighting", ["none", "min_snr", "soft_min_snr", "p2"])
def test_loss_is_zero_at_the_target_and_finite_elsewhere(pair, schedule, kind, weighting):
    (x_0, eps), t = pair, times(schedule)
    alpha, sigma = per_image(schedule.alpha(t), x_0), per_image(schedule.sigma(t), x_0)
    truth = target(x_0, eps, alpha, sigma, kind)

    def perfect(x_t, times_seen):
        assert torch.equal(x_t, schedule.noised(x_0, eps, t)) and torch.equal(times_seen, t)
        return truth

    zero = diffusion_loss(perfect, x_0, t, eps, schedule, kind, weighting)
    assert zero.shape == (5,) and torch.equal(zero, torch.zeros(5))
    off_by_one = diffusion_loss(lambda x, t: truth + 1.0, x_0, t, eps, schedule, kind, weighting)
    expected = loss_weight(schedule.alpha(t), schedule.sigma(t), kind, weighting)
    torch.testing.assert_close(off_by_one, expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(off_by_one).all()


def test_min_snr_formulas():
    t = torch.arange(1000)
    snr = VP.snr(t)
    capped = snr.clamp(max=5.0)
    for kind, expected in (("epsilon", capped / snr), ("v_prediction", capped / (snr + 1)), ("sample", capped)):
        torch.testing.assert_close(loss_weight(VP.alpha(t), VP.sigma(t), kind, "min_snr", 5.0), expected, rtol=1e-5,
                                   atol=0.0)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "p2"])
@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_a_weighting_means_the_same_for_every_target(pair, weighting, schedule):
    """One wrong x_0, expressed as each kind of prediction, costs the same weighted loss."""
    (x_0, eps), t = pair, times(schedule)
    t = t[:-1] if schedule.is_flow else t
    x_0, eps = x_0[:len(t)].double(), eps[:len(t)].double()
    alpha, sigma = per_image(schedule.alpha(t), x_0).double(), per_image(schedule.sigma(t), x_0).double()
    wrong = x_0 + 0.5
    losses = []
    for kind in ("sample", "v_prediction", "flow") + (() if schedule.is_flow else ("epsilon",)):
        def denoise(x_t, t, kind=kind):
            return prediction_from_x_0(wrong, alpha * x_0 + sigma * eps, alpha, sigma, kind)

        losses.append(diffusion_loss(denoise, x_0, t, eps, schedule, kind, weighting))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=2e-3, atol=0.0)


def test_p2_and_soft_min_snr_formulas():
    t = torch.arange(0, 1000, 37)
    snr = VP.snr(t)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    soft = 4 * snr / (4 + snr)
    for kind, p2, soft_min_snr in (
            ("epsilon", 1 / (1 + snr), soft / snr), ("sample", snr / (1 + snr), soft),
            ("v_prediction", snr / (1 + snr) ** 2, soft / (1 + snr)),
            ("flow", snr / (1 + snr) / ((alpha + sigma) / sigma) ** 2, soft / ((alpha + sigma) / sigma) ** 2)):
        torch.testing.assert_close(loss_weight(alpha, sigma, kind, "p2"), p2, rtol=2e-5, atol=0.0)
        torch.testing.assert_close(loss_weight(alpha, sigma, kind, "soft_min_snr", 4.0), soft_min_snr, rtol=2e-5,
                                   atol=0.0)


@pytest.mark.parametrize("kind", ["uniform", "stratified", "sobol"])
@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_times_are_uniform(kind, schedule):
    t = sample_timesteps(4096, kind, schedule, generator(3))
    assert t.shape == (4096,) and t.dtype == (torch.float32 if schedule.is_flow else torch.int64)
    unit = (t if schedule.is_flow else (t + 0.5) / 1000).double()
    assert 0.0 < unit.min() and unit.max() <= 1.0
    assert stats.kstest(unit.numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(t, sample_timesteps(4096, kind, schedule, generator(3)))
    assert not torch.equal(t, sample_timesteps(4096, kind, schedule, generator(4)))


def test_a_flow_never_draws_a_time_without_noise(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, **options: torch.full((n,), 1.0 - 2.0**-24))  # the largest it draws
    monkeypatch.setattr(torch, "randn", lambda n, **options: torch.linspace(-9.0, 9.0, n))
    for kind in ("uniform", "stratified", "logit_normal"):
        t = sample_timesteps(1000, kind, FLOW, generator(), std=4.0)
        assert 0.0 < t.min() and t.max() <= 1.0
        assert sample_timesteps(1000, kind, VP, generator(), std=4.0).max() == 999


@pytest.mark.parametrize("kind", ["stratified", "sobol"])
def test_every_stratum_is_visited_once(kind):
    t = sample_timesteps(64, kind, FLOW, generator(1))
    assert torch.equal((t.double() * 64).ceil().sort().values, torch.arange(1, 65).double())
    assert not torch.equal(t.sort().values, t)  # in random order


def test_logit_normal_times():
    for mean, std in ((0.0, 1.0), (-0.8, 0.5)):
        t = sample_timesteps(4096, "logit_normal", FLOW, generator(2), mean=mean, std=std).double()
        assert stats.kstest(torch.logit(t).numpy(), "norm", args=(mean, std)).pvalue > 1e-3
        strata = sample_timesteps(64, "stratified_logit_normal", FLOW, generator(2), mean=mean, std=std).double()
        places = torch.special.ndtr((torch.logit(strata) - mean) / std) * 64
        assert places.floor().sort().values.tolist() == list(range(64)) and not places.equal(places.sort().values)
    shifted = sample_timesteps(4096, "logit_normal", Schedule(ScheduleConfig(kind="flow", shift=3.0)), generator(2))
    plain = sample_timesteps(4096, "logit_normal", FLOW, generator(2))
    torch.testing.assert_close(shifted / (1 - shifted), 3.0 * plain / (1 - plain), rtol=1e-3, atol=1e-4)


def test_the_nearest_noise_is_taken_for_each_image_and_stays_nearly_normal():
    x_0 = torch.randn(64, 4, 6, 6, generator=generator(3))
    candidates = torch.randn(5, 64, 4, 6, 6, generator=generator(4))
    chosen = nearest_noise(candidates, x_0)
    distances = (candidates - x_0).square().sum(dim=(2, 3, 4))
    torch.testing.assert_close((chosen - x_0).square().sum(dim=(1, 2, 3)), distances.min(dim=0).values)
    assert torch.equal(nearest_noise(candidates[:, 3:4], x_0[3:4]), chosen[3:4])  # whatever stands beside it
    assert abs(float(chosen.std()) - 1) < 0.05 and torch.equal(nearest_noise(candidates[:1], x_0), candidates[0])


def test_bad_values_are_refused(pair):
    x_0, eps = pair
    t = torch.tensor([1, 2, 3, 4, 5])
    for call in (
        lambda: diffusion_loss(lambda x, t: x, x_0, t[:4], eps, VP, "epsilon"),
        lambda: diffusion_loss(lambda x, t: x, x_0, t, eps[:, :2], VP, "epsilon"),
        lambda: diffusion_loss(lambda x, t: x[:, :1], x_0, t, eps, VP, "epsilon"),
        lambda: diffusion_loss(lambda x, t: x, x_0, t, eps, ZERO, "epsilon"),
        lambda: diffusion_loss(lambda x, t: x, x_0, t, eps, VP, "noise"),
        lambda: diffusion_loss(lambda x, t: x, x_0, t, eps, VP, "epsilon", "snr"),
        lambda: sample_timesteps(4, "gauss", VP, generator()),
    ):
        with pytest.raises(ValueError, match="valid"):
            call()
