"""The configuration of the stage that trains the classifier of prompts."""
from dataclasses import dataclass, field
from typing import Any

from safety.policy import HEADS
from safety.prompt import HeadConfig


@dataclass(frozen=True)
class TextData:
    """``root``: a folder of text in the format of training/moderation/corpus.py; ``extra``: further folders.
    ``left_out``: names, without endings, of files that are excluded from training in order to test on them."""

    root: str = ""
    extra: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @staticmethod
    def upgrade(data: dict[str, Any]) -> dict[str, Any]:
        """``extra`` was one folder, or "" for none, in run folders of before."""
        extra = data.get("extra")
        return {**data, "extra": [extra] if extra else []} if isinstance(extra, str) else dict(data)


@dataclass(frozen=True)
class ModeratorStage:
    """``data`` is the labelled text. Every text is trained on with ``variations`` variations; every batch has ``twins``
    pairs of twins, whose logits are pushed apart by ``margin``.

    ``wide`` and ``deep`` are the categories that have linear logits and logits of the hidden layer; with ``deep=[]``
    the classifier is a linear one. ``kept`` is the share of a file that is used, for files with more text than is
    useful; 2 stands for all of it twice, each time with another variation. ``forget`` is the share of n-grams that is
    dropped from every text in every step, so that no single n-gram decides. ``ordinary`` is the number of harmless
    counter-examples that are made (training/moderation/ordinary.py), ``requests`` that of plain requests, each with a
    harmless twin (training/moderation/requests.py).

    ``budget`` is the share of harmless development text of each kind that may be blocked, and ``flag_budget`` times as
    much may be flagged; ``reserve`` raises the log odds of what blocks a text of more than a few words, because limits
    that just keep a budget on development text exceed it on other text; ``short_budget`` and ``short_flag_budget`` are
    the shares of texts of a few words of all kinds. ``minors_budget`` is the share of harmless text about minors that
    the rule on minors may refuse. Words that training text has at least ``known_from`` times are known: unknown ones
    are also read as the known ones that were probably meant.
    """

    data: TextData = field(default_factory=TextData)
    head: HeadConfig = field(default_factory=HeadConfig)
    wide: tuple[str, ...] = HEADS
    deep: tuple[str, ...] = HEADS
    epochs: int = 4
    batch: int = 256
    learning_rate: float = 5e-3
    dropout: float = 0.3
    forget: float = 0.65
    kept: dict[str, float] = field(default_factory=lambda: {
        "captions": 0.4, "long_captions": 0.3, "scenes": 0.3, "nibbler": 3.0})
    ordinary: int = 2000
    requests: int = 5000
    variations: int = 1
    twins: int = 32
    margin: float = 1.5
    twin_weight: float = 0.5
    budget: dict[str, float] = field(default_factory=lambda: {
        "real_prompts": 0.006, "captions": 0.0008, "overt_benign_edge": 0.004, "subjects": 0.005,
        "long_harmless": 0.02, "copro_masked": 0.012, "ordinary": 0.005, "long_captions": 0.005, "scenes": 0.002})
    reserve: float = 0.0
    short_budget: float = 0.0006
    short_flag_budget: float = 0.018
    flag_budget: float = 3.0
    known_from: int = 6
    minors_budget: float = 0.01

    def __post_init__(self):
        for name, low in (("epochs", 1), ("batch", 2), ("variations", 0), ("twins", 0), ("ordinary", 0),
                          ("requests", 0), ("known_from", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: from {low} up")
        if set(HEADS) != {*self.wide, *self.deep}:
            raise ValueError(f"wide: {self.wide}, deep: {self.deep}; valid: each of {', '.join(HEADS)} in at least one")
        if not 0 < self.learning_rate < 1 or not 0 <= self.dropout < 1 or self.margin < 0 or self.twin_weight < 0:
            raise ValueError(f"learning_rate {self.learning_rate}, dropout {self.dropout}, margin {self.margin}, "
                             f"twin_weight {self.twin_weight}; valid: (0, 1), [0, 1), from 0 up, from 0 up")
        if not 0 <= self.forget < 1 or not all(0 < share <= 100 for share in self.kept.values()):
            raise ValueError(f"forget: {self.forget}, kept: {self.kept}; valid: [0, 1), above 0 up to 100")
        if not self.budget or not all(0 < share < 1 for share in self.budget.values()):
            raise ValueError(f"budget: {self.budget}; valid: a share between 0 and 1 for at least one file")
        if self.reserve < 0:
            raise ValueError(f"reserve: {self.reserve}; valid: from 0 up")
        if self.flag_budget < 1 or not 0 < self.minors_budget < 1:
            raise ValueError(f"flag_budget {self.flag_budget}, minors_budget {self.minors_budget}; valid: from 1 up, "
                             "between 0 and 1")
        if not 0 < self.short_budget <= self.short_flag_budget < 1:
            raise ValueError(f"short_budget {self.short_budget}, short_flag_budget {self.short_flag_budget}; valid: "
                             "the first above 0 and up to the second, which is below 1")
