"""Noise schedules: how much of the signal (alpha) and of the noise (sigma) x_t holds, and which times a sampler visits.

    x_t = alpha_t x_0 + sigma_t eps

Every kind except "flow" is variance preserving (alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t) over integer
times 0 .. T-1, 0 almost clean. "flow" has alpha_t = 1 - t, sigma_t = t over real times 0 .. 1, 1 pure noise.

Axes: B batch, T number of discrete times.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from diffusion.spacing import Spacing, discrete_timesteps, flow_timesteps, shifted_time, sigma_grid

ScheduleKind = Literal["linear", "scaled_linear", "cosine", "sigmoid", "betas", "flow"]

# alpha_bar that stands in for 0 when a time *between* the last two integers is asked for under zero terminal SNR.
SMALLEST_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule of a model. Training and sampling must use the same one.

    kind: "linear" (Ho et al. 2020, with beta 1e-4 .. 0.02), "scaled_linear" (Stable Diffusion, with 8.5e-4 .. 0.012),
        "cosine" (Nichol & Dhariwal 2021), "sigmoid" (Xu et al. 2022, GeoDiff), "betas" (any, given as `betas`) or
        "flow" (straight paths).
    steps: T, the number of discrete times; for "flow" the unit of `network_time`.
    beta_start, beta_end: ends of the betas; "cosine", "betas" and "flow" do not read them.
    betas: the T variances of kind "betas", each above 0 and below 1.
    zero_terminal_snr: rescale so that the last time holds no signal (Lin et al. 2023, algorithm 1).
    shift: divides alpha_t / sigma_t by this number. An image with m^2 times the pixels needs m times more noise to
        hide the same content (Hoogeboom et al. 2023; Esser et al. 2024, eq. 23): from side s to side S it is S / s.
        Discrete kinds move the table; "flow" moves the visited times and leaves alpha_t = 1 - t.
    """

    kind: ScheduleKind = "scaled_linear"
    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise ValueError(f"kind: value {self.kind!r}; valid: {', '.join(get_args(ScheduleKind))}")
        if self.steps < 2:
            raise ValueError(f"steps: value {self.steps}; valid: 2 or more")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(f"beta_start: value {self.beta_start} with beta_end {self.beta_end}; "
                             "valid: 0 < beta_start <= beta_end < 1")
        if (self.betas is not None) != (self.kind == "betas"):
            raise ValueError(f"betas: {'none' if self.betas is None else len(self.betas)} with kind {self.kind!r}; "
                             "valid: a list of numbers with kind 'betas', none with another")
        if self.betas is not None and len(self.betas) != self.steps:
            raise ValueError(f"betas: {len(self.betas)} with steps {self.steps}; valid: one for each step")
        if wrong := [beta for beta in self.betas or () if not 0.0 < beta < 1.0]:
            raise ValueError(f"betas: value {wrong[0]}; valid: above 0 and below 1")
        if self.shift <= 0.0 or not math.isfinite(self.shift):
            raise ValueError(f"shift: value {self.shift}; valid: a positive number, 1 for no shift")
        if self.zero_terminal_snr and self.kind == "flow":
            raise ValueError("zero_terminal_snr: value True with kind 'flow'; valid: False, flow already ends at SNR 0")


class Schedule:
    """Alpha, sigma and their ratio at a time, and grids of times.

    A Python number gives Python floats computed in fp64 (samplers: coefficients never live on a device); a tensor
    t (B,) gives fp32 tensors (B,) on its device (training). Numbers may lie between integers: log SNR is interpolated.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.steps = config.steps
        self.is_flow = config.kind == "flow"
        # (T,) fp64; a flow needs no table
        self.alpha_bar = torch.empty(0, dtype=torch.float64) if self.is_flow else discrete_alpha_bar(config)
        self._alphas: list[float] = self.alpha_bar.sqrt().tolist()
        self._sigmas: list[float] = (1.0 - self.alpha_bar).sqrt().tolist()
        floor = self.alpha_bar.clamp(min=SMALLEST_ALPHA_BAR)
        self._log_snrs: list[float] = (floor.log() - (-floor).log1p()).tolist()
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def ends_in_noise(self) -> bool:
        """True when the last time holds no signal, where epsilon says nothing about x_0."""
        return self.is_flow or self._alphas[-1] == 0.0

    @property
    def last(self) -> int | float:
        """The noisiest time: T-1, or 1.0 for flow."""
        return 1.0 if self.is_flow else self.steps - 1

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """(alpha_t, sigma_t) at one time, in fp64. Raises ValueError outside the schedule."""
        self._check_range(t)
        if self.is_flow:
            return 1.0 - t, float(t)
        if t == int(t):
            return self._alphas[int(t)], self._sigmas[int(t)]
        log_snr = self.log_snr(t)
        return math.sqrt(sigmoid(log_snr)), math.sqrt(sigmoid(-log_snr))

    @overload
    def alpha(self, t: float) -> float: ...

    @overload
    def alpha(self, t: Tensor) -> Tensor: ...

    def alpha(self, t: float | Tensor) -> float | Tensor:
        """Share of the signal in x_t: a float for a number, (B,) fp32 for a tensor (B,)."""
        return self._tensors(t)[0] if isinstance(t, Tensor) else self.alpha_sigma(t)[0]

    @overload
    def sigma(self, t: float) -> float: ...

    @overload
    def sigma(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: float | Tensor) -> float | Tensor:
        """Share of the noise in x_t: a float for a number, (B,) fp32 for a tensor (B,)."""
        return self._tensors(t)[1] if isinstance(t, Tensor) else self.alpha_sigma(t)[1]

    @overload
    def snr(self, t: float) -> float: ...

    @overload
    def snr(self, t: Tensor) -> Tensor: ...

    def snr(self, t: float | Tensor) -> float | Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2; 0 at pure noise, infinite without noise."""
        if isinstance(t, Tensor):
            return (self.alpha(t) / self.sigma(t)) ** 2
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma) ** 2 if sigma > 0.0 else math.inf

    def log_snr(self, t: float) -> float:
        """log SNR at one time; -inf at pure noise, inf without noise."""
        self._check_range(t)
        if self.is_flow:
            return -math.inf if t == 1.0 else math.inf if t == 0.0 else 2.0 * math.log((1.0 - t) / t)
        low = int(t)
        if t == low:
            return -math.inf if self._alphas[low] == 0.0 else self._log_snrs[low]
        return self._log_snrs[low] + (t - low) * (self._log_snrs[low + 1] - self._log_snrs[low])

    def time_of_log_snr(self, log_snr: float) -> float:
        """The time whose log SNR is this one, the inverse of `log_snr`; clamped to the ends of the schedule."""
        if self.is_flow:
            return sigmoid(-0.5 * log_snr)
        values = self._log_snrs  # falls with t
        if log_snr >= values[0]:
            return 0.0
        if log_snr <= values[-1]:
            return float(self.steps - 1)
        low, high = 0, self.steps - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if values[middle] >= log_snr else (low, middle)
        return low + (values[low] - log_snr) / (values[low] - values[high])

    def timesteps(self, n: int, spacing: Spacing = "trailing", offset: int = 0, rho: float = 7.0) -> list:
        """`n` falling times for a sampler: integers for a discrete schedule, floats for flow and for sigma spacings.

        spacing: "leading", "linspace" or "trailing" (Lin et al. 2023, table 2; trailing alone starts at the last time
            and is the only choice that makes sense under zero terminal SNR), or "karras", "exponential", "beta", which
            space the noise level sigma / alpha instead of the time.
        offset: added to "leading" times; Stable Diffusion 1.x was published with 1.
        rho: bend of "karras".
        """
        if spacing in ("karras", "exponential", "beta"):
            return self._sigma_timesteps(n, spacing, rho)
        if self.is_flow:
            return flow_timesteps(n, spacing, self.steps, self.config.shift)
        return discrete_timesteps(n, spacing, self.steps, offset)

    def noised(self, x_0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps for x_0 and eps (B, C, H, W) and a time or times (B,)."""
        if isinstance(t, Tensor):
            return per_image(self.alpha(t), x_0) * x_0 + per_image(self.sigma(t), x_0) * eps
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_0 + sigma * eps

    def arrival(self, t: float, s: float | None, clean_end: bool = True) -> tuple[float, float]:
        """(alpha, sigma) where the step from t ends: at the next time s, or for s None where the run ends, at all
        signal and no noise, or at the level of time 0 without `clean_end`."""
        if s is None:
            return (1.0, 0.0) if clean_end else self.alpha_sigma(0)
        return self.alpha_sigma(s)

    def departure(self, t: float, s: float) -> tuple[float, float]:
        """(alpha, sigma) that a step from t to s counts from once the network has been called at s too: that of t."""
        return self.alpha_sigma(t)

    def network_time(self, t: Tensor) -> Tensor:
        """Times (B,) in the unit that timestep embeddings are made for, 0 .. T: t itself, or T t for flow."""
        return t * self.steps if self.is_flow else t

    def _sigma_timesteps(self, n: int, spacing: Spacing, rho: float) -> list[float]:
        if self.ends_in_noise:
            raise ValueError(f"spacing: value {spacing!r} spaces sigma / alpha, which is infinite at the last time of "
                             "this schedule; valid: trailing, linspace, leading")
        largest, smallest = math.exp(-0.5 * self.log_snr(self.steps - 1)), math.exp(-0.5 * self.log_snr(0))
        return [self.time_of_log_snr(-2.0 * math.log(s)) for s in sigma_grid(n, spacing, smallest, largest, rho)]

    def _check_range(self, t: float) -> None:
        if not 0.0 <= t <= self.last:
            raise ValueError(f"t: value {t}; valid: 0 .. {self.last}")

    def _tensors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_flow:
            t = t.to(torch.float32)
            return 1.0 - t, t
        if t.is_floating_point():
            raise ValueError(f"t: dtype {t.dtype}; valid: an integer tensor, this schedule is discrete")
        if t.device not in self._tables:
            pair = self.alpha_bar.sqrt(), (1.0 - self.alpha_bar).sqrt()
            self._tables[t.device] = (pair[0].to(t.device, torch.float32), pair[1].to(t.device, torch.float32))
        alphas, sigmas = self._tables[t.device]
        return alphas[t], sigmas[t]


def discrete_alpha_bar(config: ScheduleConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    """alpha_bar (T,) of a variance-preserving schedule, computed in `dtype`: the product of (1 - beta) up to each
    time."""
    alpha_bar = torch.cumprod(1.0 - betas(config, dtype), dim=0)
    if config.zero_terminal_snr:
        alpha_bar = zero_terminal_snr_alpha_bar(alpha_bar)
    if config.shift != 1.0:
        # SNR / shift^2, back to alpha_bar = SNR / (1 + SNR). Written so that alpha_bar = 0 stays 0.
        alpha_bar = alpha_bar / (alpha_bar + config.shift**2 * (1.0 - alpha_bar))
    return alpha_bar


def betas(config: ScheduleConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    """Variance added at each step, (T,)."""
    steps, start, end = config.steps, config.beta_start, config.beta_end
    if config.betas is not None:
        return torch.tensor(config.betas, dtype=dtype)
    if config.kind == "linear":
        # Ho et al. 2020, section 4
        return torch.linspace(start, end, steps, dtype=dtype)
    if config.kind == "scaled_linear":
        # Rombach et al. 2022: linear in sqrt(beta)
        return torch.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2
    if config.kind == "sigmoid":
        # Xu et al. 2022 (GeoDiff)
        return torch.sigmoid(torch.linspace(-6.0, 6.0, steps, dtype=dtype)) * (end - start) + start
    if config.kind == "cosine":
        # Nichol & Dhariwal 2021, eq. 17: f(t) = cos^2((t/T + s)/(1 + s) pi/2), s = 0.008, beta at most 0.999
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1.0 - f[1:] / f[:-1]).clamp(max=0.999).to(dtype)
    raise ValueError(f"kind: value {config.kind!r} has no betas; valid: linear, scaled_linear, sigmoid, cosine, betas")


def zero_terminal_snr_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """alpha_bar (T,) with its root moved to end at 0 and stretched to keep its start. Lin et al. 2023, algorithm 1."""
    root = alpha_bar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """values (B,) shaped (B, 1, 1, ...) to multiply x (B, ...)."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def sigmoid(z: float) -> float:
    """1 / (1 + e^-z) without overflow."""
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0.0 else math.exp(z) / (1.0 + math.exp(z))


__all__ = ["Schedule", "ScheduleConfig", "ScheduleKind", "Spacing", "per_image", "shifted_time"]
