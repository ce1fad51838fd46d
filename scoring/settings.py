"""What an evaluation is asked to do: the suite, and everything that the command line can change about it."""
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Suite:
    """The defaults of a suite: numbers of prompts, the guidance scales that are tried, and the numbers of steps."""

    count: int
    validation: int
    scales: tuple[float, ...]
    num_steps: tuple[int, ...] = ()


SUITES = {"quick": Suite(256, 64, (1.5, 2.0, 3.0, 5.0)),
          "full": Suite(1000, 128, (1.0, 1.5, 3.0, 5.0, 7.5), (5, 10, 25, 50))}
LEAST = {"quick": 2, "full": 20}  # prompts: the search for copies compares with at least 20 held-out images


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of one evaluation. None stands for the default of the suite, of the run, or for "without".

    ``count`` and ``validation`` are numbers of test and of validation prompts, ``guidance`` the scales to choose from,
    ``inception``, ``clip`` and ``reference`` paths that only the full suite reads. Raises ValueError for settings that
    contradict each other, naming the options of the command line.
    """

    run: Path
    suite: str = "quick"
    count: int | None = None
    validation: int | None = None
    guidance: tuple[float, ...] | None = None
    sampler: str | None = None
    num_steps: int | None = None
    precision: str = "fp32"
    inception: str | None = None
    clip: str | None = None
    reference: str | None = None
    compare: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("count", self.num_test), ("validation", self.num_validation)):
            if value < LEAST[self.suite]:
                raise ValueError(f"--{name} {value}; valid: from {LEAST[self.suite]} up")
        for name in ("inception", "clip", "reference"):
            if getattr(self, name) and not self.full:
                raise ValueError(f"--{name} is for --suite full; valid: both together")

    @property
    def full(self) -> bool:
        """Whether samples are also compared by their features."""
        return self.suite == "full"

    @property
    def num_test(self) -> int:
        """The number of test prompts."""
        return SUITES[self.suite].count if self.count is None else self.count

    @property
    def num_validation(self) -> int:
        """The number of validation prompts that are sampled at each setting."""
        return SUITES[self.suite].validation if self.validation is None else self.validation

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scales that are tried on validation prompts."""
        return SUITES[self.suite].scales if self.guidance is None else self.guidance

    def scales_for(self, folded: tuple[float, float] | None, own: float) -> tuple[float, ...]:
        """The scales that are tried with a run: of the defaults only those between the lowest and the highest that are
        ``folded`` into its denoiser, or its ``own`` if there are none."""
        if folded is None or self.guidance is not None:
            return self.scales
        return tuple(scale for scale in self.scales if folded[0] <= scale <= folded[1]) or (own,)

    @property
    def sweep_num_steps(self) -> tuple[int, ...]:
        """The numbers of sampler steps that are tried on validation prompts."""
        return SUITES[self.suite].num_steps

    def check_scales(self, can_choose: bool) -> None:
        """Raise ValueError for several scales on the command line where nothing chooses among them or shows them all;
        ``can_choose``: the samples of validation prompts can be scored."""
        if self.guidance is not None and len(self.guidance) > 1 and not (can_choose or self.full):
            raise ValueError(f"--guidance with {len(self.guidance)} scales: nothing here chooses among them; valid: "
                             "one scale, or --suite full, which shows them all")
