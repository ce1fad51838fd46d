"""The gate for all prompts. It fails closed: every error ends in a refusal with a clear reason, never in a pass.

``check`` never raises for a text; only ``PromptGate.load`` may, before any image is generated.
"""
import logging
import math
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safety.audit import AuditError, AuditLog
from safety.keywords import BLOCK, FLAG, Match
from safety.normalize import LONGEST, Normalized, TextError, is_foreign, latin_words, normalize, with_spaces_for_signs
from safety.parts import judged_texts, number_of_words
from safety.policy import CATEGORIES, HEADS, MODES, Decision, Mode, Policy, action_in_mode, most_severe, refusal
from safety.prompt import DEFAULT, Artefact, load_artefact

Encoder = Callable[[str], Mapping[str, float]]  # text -> probability by category
_NUMBERS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    .split())}
_TENS = "(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety) "
_AGE = re.compile(rf"\b(?:{_TENS}\w+|(\d{{1,2}}|{'|'.join(_NUMBERS)})) ?(?:(?:years?|yrs?) ?olds?|yo|y o)\b"
                  rf"|\bage[ds]? (\d{{1,2}}|{'|'.join(_NUMBERS)})\b")
_APART = re.compile(r"\b([1-9]) (\d)(?= ?(?:years?|yrs?) ?old\b(?! \w+s\b))")
_SEXUAL = HEADS.index("sexual")
_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Explanation:
    """How a text was read and what was found, for researchers only: it holds words of the text."""

    normalized: Normalized
    matches: tuple[Match, ...]
    minor: bool
    heads: tuple[Mapping[str, float], ...]
    words: int = 0  # of the text as it was probably meant


class PromptGate:
    """Checks prompts. ``encoder`` is an optional second head on the states of a text encoder; if it fails, returns no
    number, or takes longer than ``timeout`` seconds, the prompt is refused. ``prior`` is the share of harmful prompts
    that is expected: scores are probabilities under it, and no decision depends on it."""

    def __init__(self, artefact: Artefact, mode: Mode = "block", audit: AuditLog | None = None,
                 encoder: Encoder | None = None, timeout: float = 10.0, prior: float | None = None):
        if mode not in MODES:
            raise ValueError(f"moderation: '{mode}'; valid: {', '.join(MODES)}")
        if not timeout > 0:
            raise ValueError(f"timeout: {timeout}; valid: above 0 seconds")
        self.artefact, self.mode, self.audit, self.encoder, self.timeout = artefact, mode, audit, encoder, timeout
        self.prior = prior
        artefact.policy.with_prior(prior)  # raises ValueError for a prior that is no share
        if mode == "off":
            _log.warning("moderation is off: prompts are not checked")

    @classmethod
    def load(cls, path: str | Path = DEFAULT, **options) -> "PromptGate":
        """The gate of a file; raises ArtefactError if it is missing or damaged."""
        return cls(load_artefact(path), **options)

    def check(self, text: str, negative: bool = False) -> Decision:
        """The decision on one text that conditions an image, under the mode of the gate; never raises.

        negative: a negative prompt, for which only listed terms count and which may be empty.
        """
        try:
            decision = self._decision(text, negative)
        except TextError as error:
            decision = refusal(str(error))
        except Exception as error:  # no error may let a prompt through
            _log.error("moderation failed: %s", type(error).__name__)
            decision = refusal(f"moderation failed ({type(error).__name__})")
        decision = replace(decision, model_hash=self.artefact.hash)
        found = decision.action
        if decision.reason in ("rule", "score"):  # a failed check is refused in all modes but "off"
            decision = replace(decision, action=action_in_mode(decision.action, self.mode, decision.category))
        elif self.mode == "off":
            decision = replace(decision, action="allow")
        if self.audit is not None and (found != "allow" or self.mode == "off"):
            try:  # the log records the action after the mode
                self.audit.write(text, "negative" if negative else "prompt", decision)
            except (AuditError, ValueError, OSError, TypeError) as error:
                return replace(refusal(f"the audit log failed ({type(error).__name__})"),
                               model_hash=self.artefact.hash)
        return decision

    def check_all(self, texts: Sequence[str], negative: bool = False) -> Decision:
        """The most severe decision on all texts of one prompt: its alternatives, its chunks, the parts of a blend,
        their concatenation, and the text that is left after cutting. Refuses if there is nothing to check."""
        if not texts and not negative:
            return replace(refusal("prompt: empty"), model_hash=self.artefact.hash)
        decisions = [self.check(text, negative) for text in texts] or [Decision("allow")]
        return most_severe(decisions)

    def explain(self, text: str) -> Explanation:
        """The readings and the scores of a text; raises TextError for a text that is not read."""
        return self._read(text, negative=False)

    def _read(self, text: str, negative: bool) -> Explanation:
        lexicon, minors = self.artefact.lexicon, self.artefact.minors
        read = [normalize(text, lexicon.is_word, LONGEST)]
        other = with_spaces_for_signs(text)
        if other is not None:  # the words as a tokenizer splits them
            plain = normalize(other, lexicon.is_word, 2 * LONGEST, with_readings=False).plain
            read += [normalize(other, lexicon.is_word, 2 * LONGEST)] if plain != read[0].plain else []
        minor = any(minors.matches(one) or _names_minor_age(one.plain) for one in read)
        matches = [match for one in read for match in lexicon.matches(one)]
        if minor:  # then a speculative reading is enough
            matches += [match for one in read for match in lexicon.matches(one, bold=True)
                        if match.category == _SEXUAL and match not in matches]
        heads: list[Mapping[str, float]] = []
        words = 0
        if not negative:
            judged = list(read)
            if not text.isascii():  # lookalikes may be the words of another language
                judged.append(normalize(latin_words(text), lexicon.is_word, LONGEST, with_readings=False))
            texts = [judged_texts(one, self.artefact.spelling, lexicon.is_word) for one in judged]
            heads.append(_highest_scores([self.artefact.head.highest_scores(*text) for some in texts for text in some]))
            words = number_of_words(texts[0])
            if self.encoder is not None:
                heads.append(_highest_scores([self._encoder_scores(one.plain) for one in read]))
        return Explanation(read[0], tuple(dict.fromkeys(matches)), minor, tuple(heads), words)

    def _policy(self) -> Policy:
        """The policy of the file, under the prior of the gate."""
        return self.artefact.policy if self.prior is None else self.artefact.policy.with_prior(self.prior)

    def _encoder_scores(self, plain: str) -> Mapping[str, float]:
        """The scores of the encoder, or NaN if it takes too long; its thread is then abandoned."""
        answer: queue.SimpleQueue[Mapping[str, float]] = queue.SimpleQueue()

        def score() -> None:
            try:
                found = self.encoder(plain)  # type: ignore[misc]
                scores = {name: float(found[name]) for name in HEADS}
            except Exception:  # a head that fails has not said "harmless"
                scores = dict.fromkeys(HEADS, math.nan)
            answer.put(scores)

        threading.Thread(target=score, daemon=True).start()  # a pool would wait for it when the program ends
        try:
            return answer.get(timeout=self.timeout)
        except queue.Empty:
            return dict.fromkeys(HEADS, math.nan)

    def _decision(self, text: str, negative: bool) -> Decision:
        if isinstance(text, str) and not text.strip():
            if negative:
                return Decision("allow")
            raise TextError("prompt: empty; valid: some text")
        read = self._read(text, negative)
        strange = is_foreign(text)
        if not read.normalized.plain and not negative and not strange:
            raise TextError("prompt: nothing in it can be read; valid: some words")
        rules = [(CATEGORIES[match.category], {BLOCK: "block", FLAG: "flag"}.get(match.level, ""))
                 for match in read.matches]
        if negative:
            hits = [category for category, action in rules if action == "block"]
            return refusal("rule", hits[0]) if hits else Decision("allow")
        sexual = any(match.category == _SEXUAL for match in read.matches)
        decision = self._policy().decide(read.heads, rules, read.minor, sexual, read.words)
        if decision.action == "allow" and strange:
            return Decision("flag", "", reason="most of it is not in English: not checked")
        letters = [len(word) == 1 for word in read.normalized.plain.split()]
        if decision.action == "allow" and sum(letters) > max(20, 0.7 * len(letters)):
            return Decision("flag", "", reason="most of it is single letters: not checked")
        return decision


def _names_minor_age(plain: str) -> bool:
    """Whether the text names an age under 18. Digits that stand apart are one number, 2 0 years old, unless several are
    meant: in 2 5 year old dogs the first one counts the dogs."""
    plain = _APART.sub(r"\1\2", plain)
    return any(int(_NUMBERS.get(age, age)) < 18 for pair in _AGE.findall(plain) for age in pair if age)


def _highest_scores(heads: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The highest score of each category over several readings of a text; NaN if any score is NaN."""
    return {name: max((head[name] for head in heads), key=lambda score: (math.isnan(score), score))
            for name in heads[0]}
