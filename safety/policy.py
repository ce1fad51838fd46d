"""From scores to decisions: the one place that defines categories, actions and thresholds.

Scores are probabilities that a text is harmful in a category. Rules come first, then the heads of the networks, joined
by noisy-or. A score that is not a finite number leads to a refusal.
"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

VERSION = "3"
SHORT = 8  # most words of a short text, which has thresholds of its own
Action = Literal["allow", "flag", "blur", "block"]
ACTIONS: tuple[Action, ...] = ("allow", "flag", "blur", "block")  # from mild to severe
Mode = Literal["block", "blur", "flag", "off"]
MODES: tuple[Mode, ...] = ("block", "blur", "flag", "off")
# learned, in this order; the last from shares of images that were judged unsafe, which the words may not show
HEADS = ("sexual", "violence", "hate", "self_harm", "harassment", "illegal", "privacy", "unsafe_images")
CATEGORIES = (*HEADS, "sexual_minors")  # the last is a rule, never learned
MINORS = len(HEADS)

HELP = ("If you are thinking about harming yourself, you are not alone: please talk to somebody now. In many countries "
        "the emergency number or a free help line answers day and night (988 in the USA and Canada, 116 123 in the UK "
        "and Ireland); findahelpline.com lists others.")
_NEUTRAL = {
    "sexual": "sexual content", "sexual_minors": "content that is never made", "violence": "violence",
    "hate": "hate", "self_harm": "self-harm", "harassment": "harassment", "illegal": "illegal activity",
    "privacy": "private data of a person", "unsafe_images": "a prompt whose images are often unsafe",
    "": "content that could not be checked",
}


@dataclass(frozen=True)
class Decision:
    """The action taken on a text or an image, and its reason. ``reason`` may be logged and shown: it names no word.
    ``score`` and ``threshold`` are those that decided; ``category`` is the kind of harm that fits best."""

    action: Action
    category: str = ""
    score: float = 0.0
    threshold: float = 1.0
    reason: str = ""
    policy_version: str = VERSION
    model_hash: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """The sentence shown to the user; it names the category and nothing else."""
        if self.action == "allow":
            return "allowed"
        verb = {"flag": "flagged", "blur": "blurred", "block": "refused"}[self.action]
        listed = not self.category and self.reason.startswith("concept ")  # a stand-in of a file of concepts
        text = f"{verb}: {'content that is not wanted here' if listed else _NEUTRAL[self.category]}"
        return f"{text}. {HELP}" if self.category == "self_harm" else text


@dataclass(frozen=True)
class Limits:
    """The least scores of a category that are flagged and blocked; a limit above 1 is never reached."""

    flag: float
    block: float

    def __post_init__(self):
        for name in ("flag", "block"):
            value = getattr(self, name)
            if not value > 0:  # also NaN
                raise ValueError(f"{name}: {value}; valid: a number above 0")
        if self.block < self.flag:
            raise ValueError(f"block: {self.block}; valid: from flag = {self.flag} up")


def noisy_or(scores: Sequence[float]) -> float:
    """1 - prod(1 - p): the probability of at least one of several independent causes. NaN stays NaN."""
    return 1 - math.prod(1 - score for score in scores)


def log_odds(probability: float) -> float:
    """ln(p / (1 - p)) of a probability; that of 0, of 1 and of a limit above 1 is finite."""
    kept = min(max(probability, 1e-9), 1 - 1e-9)
    return math.log(kept / (1 - kept))


def refusal(reason: str, category: str = "", score: float = 1.0, threshold: float = 0.0,
            scores: Mapping[str, float] | None = None) -> Decision:
    """A decision to block, with its reason."""
    return Decision("block", category, score, threshold, reason, scores=scores or {})


def most_severe(decisions: Sequence[Decision]) -> Decision:
    """The most severe decision, the first one among equals."""
    return max(decisions, key=lambda decision: ACTIONS.index(decision.action))


class Policy:
    """The limits of every category. ``minors`` is the least sexual score for which a text with a minor is refused.

    ``rates`` are the shares of harmful texts by category for which the scores are calibrated, and ``prior`` is the
    share that is expected instead. It moves scores and thresholds alike (``at_prior``): the meaning of a score changes,
    and no decision does, because thresholds are set by what harmless text they block.

    ``short`` are the limits of texts of up to SHORT words, by default the same. The scores of harmless short texts are
    far below those of long ones, which have many parts of which the highest counts: thresholds for long texts let
    nearly every short request pass.

    ``naming`` (K, K + 1) turns the log odds of the K scores and a 1 into a rank of the categories: the first names the
    harm. Without it, the category that is farthest above its threshold does.
    """

    def __init__(self, limits: Mapping[str, Limits], minors: float, rates: Mapping[str, float] | None = None,
                 prior: float | None = None, naming: Sequence[Sequence[float]] | None = None,
                 short: Mapping[str, Limits] | None = None):
        for of_name, some in (("limits", limits), ("short", limits if short is None else short)):
            missing = [name for name in HEADS if name not in some]
            unknown = [name for name in some if name not in HEADS]
            if missing or unknown:
                raise ValueError(f"{of_name}: missing {missing}, unknown {unknown}; valid: {', '.join(HEADS)}")
        if not 0 < minors <= 1:
            raise ValueError(f"minors: {minors}; valid: above 0 and up to 1")
        if prior is not None and not 0 < prior < 1:
            raise ValueError(f"prior: {prior}; valid: the share of harmful texts, between 0 and 1")
        if naming is not None and [len(row) for row in naming] != [len(HEADS) + 1] * len(HEADS):
            raise ValueError(f"naming: rows of {[len(row) for row in naming]}; valid: {len(HEADS)} of {len(HEADS) + 1}")
        self.limits, self.minors, self.rates, self.prior = dict(limits), minors, dict(rates or {}), prior
        self.naming, self.short = naming, dict(limits if short is None else short)

    def with_prior(self, prior: float | None) -> "Policy":
        """The same policy whose scores are probabilities where the share ``prior`` of the texts is harmful."""
        return Policy(self.limits, self.minors, self.rates, prior, self.naming, self.short)

    def at_prior(self, probability: float, category: str) -> float:
        """A probability under ``prior`` instead of the rate of the category: the odds are multiplied by the ratio of
        the prior odds (Saerens et al. 2002, equation 2.4)."""
        rate = self.rates.get(category)
        if self.prior is None or rate is None or not 0 < probability < 1:
            return probability
        shifted = log_odds(probability) + log_odds(self.prior) - log_odds(rate)
        return 1 / (1 + math.exp(-min(max(shifted, -60), 60)))

    def decide(self, heads: Sequence[Mapping[str, float]], rules: Sequence[tuple[str, str]] = (),
               minor: bool = False, sexual_term: bool = False, words: int = SHORT + 1) -> Decision:
        """The decision on a text, with its scores under ``prior``.

        heads: the probabilities by category of each head; rules: the (category, action) of listed terms;
        minor: the text has a term for a minor; sexual_term: it has a listed sexual term of any level; words: how many
        it has.
        """
        found = self._decide(heads, rules, minor, sexual_term, self.limits_for(words))
        if self.prior is None:
            return found
        decided = next((name for name, value in found.scores.items() if value == found.score), found.category)
        score, threshold = ((self.at_prior(value, decided) for value in (found.score, found.threshold))
                            if found.reason == "score" else (found.score, found.threshold))
        return replace(found, score=score, threshold=threshold,
                       scores={name: self.at_prior(value, name) for name, value in found.scores.items()})

    def _decide(self, heads: Sequence[Mapping[str, float]], rules: Sequence[tuple[str, str]], minor: bool,
                sexual_term: bool, limits: Mapping[str, Limits]) -> Decision:
        """As ``decide``, with the scores as they are."""
        scores = {name: noisy_or([head[name] for head in heads if name in head]) for name in HEADS}
        if not all(math.isfinite(score) and 0 <= score <= 1 for score in scores.values()):
            return refusal("the score is not a number between 0 and 1")
        if minor and (sexual_term or scores["sexual"] >= self.minors):
            return refusal("rule", "sexual_minors", 1.0, self.minors, scores)
        for action in ("block", "flag"):
            hits = [category for category, listed in rules if listed == action]
            if action == "block" and hits:
                return Decision("block", hits[0], 1.0, 0.0, "rule", scores=scores)
            # the category that is farthest above its threshold, in log odds, names the decision: a ratio would favour
            # those with low thresholds, because no score exceeds 1
            over = [(log_odds(score) - log_odds(getattr(limits[name], action)), name) for name, score in scores.items()
                    if score >= getattr(limits[name], action)]
            if over:
                name = max(over)[1]
                return Decision(action, self.name_of(scores, name), scores[name],  # type: ignore[arg-type]
                                getattr(limits[name], action), "score", scores=scores)
            if hits:
                return Decision("flag", hits[0], 1.0, 0.0, "rule", scores=scores)
        name = max(scores, key=lambda name: log_odds(scores[name]) - log_odds(limits[name].flag))
        return Decision("allow", name, scores[name], limits[name].flag, "score", scores=scores)

    def name_of(self, scores: Mapping[str, float], decided: str) -> str:
        """The kind of harm of a text that a category has ``decided`` on: whether there is harm and which are different
        questions, because violence, for example, is in most texts about self-harm."""
        if self.naming is None or decided == HEADS[-1]:
            return decided
        inputs = [*(log_odds(scores[name]) for name in HEADS), 1.0]
        ranks = [sum(weight * value for weight, value in zip(row, inputs)) for row in self.naming]
        return max(zip(ranks[:-1], HEADS))[1]  # the last one is no kind of harm

    def limits_for(self, words: int) -> dict[str, Limits]:
        """The limits by category of a text of so many words."""
        return self.short if words <= SHORT else self.limits


def action_in_mode(action: Action, mode: Mode, category: str = "") -> Action:
    """The action under the mode that the user has chosen: ``block`` changes nothing, ``blur`` and ``flag`` are upper
    bounds, ``off`` allows everything. Sexual content with minors stays blocked in all modes but ``off``."""
    if mode not in MODES:
        raise ValueError(f"moderation: '{mode}'; valid: {', '.join(MODES)}")
    if category == CATEGORIES[MINORS] and mode != "off":
        return action
    most = {"block": "block", "blur": "blur", "flag": "flag", "off": "allow"}[mode]
    return ACTIONS[min(ACTIONS.index(action), ACTIONS.index(most))]  # type: ignore[arg-type]
