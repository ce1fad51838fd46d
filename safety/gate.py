"""The one gate for prompts. It fails closed: whatever goes wrong ends in a refusal with a clear line, never in a pass.

``check`` never raises for a text; only ``PromptGate.load`` may, before anything is drawn.
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
from safety.normalize import LONGEST, Normalized, TextError, apart, foreign, latin, normalize
from safety.policy import CATEGORIES, HEADS, MODES, Decision, Mode, in_mode, most_severe, refusal
from safety.prompt import DEFAULT, Artefact, load_artefact

Encoder = Callable[[str], Mapping[str, float]]  # text -> probability by category
_NUMBERS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    .split())}
_TENS = "(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety) "
_AGE = re.compile(rf"\b(?:{_TENS}\w+|(\d{{1,2}}|{'|'.join(_NUMBERS)})) ?(?:(?:years?|yrs?) ?olds?|yo|y o)\b"
                  rf"|\bage[ds]? (\d{{1,2}}|{'|'.join(_NUMBERS)})\b")
WINDOW = 250  # letters; a smaller one finds more of what is drowned, and takes more harmless text for harmful
_SEXUAL = HEADS.index("sexual")
_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Explanation:
    """For researchers only: how a text was read and what was found. It holds words of the text."""

    normalized: Normalized
    matches: tuple[Match, ...]
    minor: bool
    heads: tuple[Mapping[str, float], ...]


class PromptGate:
    """Checks prompts. ``encoder`` is an optional second head on the state of a text encoder; one that fails, answers
    no number, or takes longer than ``timeout`` seconds, refuses the prompt."""

    def __init__(self, artefact: Artefact, mode: Mode = "block", audit: AuditLog | None = None,
                 encoder: Encoder | None = None, timeout: float = 10.0):
        if mode not in MODES:
            raise ValueError(f"moderation: '{mode}'; valid: {', '.join(MODES)}")
        if not timeout > 0:
            raise ValueError(f"timeout: {timeout}; valid: above 0 seconds")
        self.artefact, self.mode, self.audit, self.encoder, self.timeout = artefact, mode, audit, encoder, timeout
        if mode == "off":
            _log.warning("moderation is off: prompts are not checked")

    @classmethod
    def load(cls, path: str | Path = DEFAULT, **options) -> "PromptGate":
        """The gate of a file; raises ArtefactError when it is missing or damaged."""
        return cls(load_artefact(path), **options)

    def check(self, text: str, negative: bool = False) -> Decision:
        """The decision on one text that will be conditioned on, as the mode has it; never raises.

        negative: it says what must not be in the picture, so only listed terms count, and it may be empty.
        """
        try:
            decision = self._decision(text, negative)
        except TextError as error:
            decision = refusal(str(error))
        except Exception as error:  # whatever breaks must not let a prompt through
            _log.error("moderation failed: %s", type(error).__name__)
            decision = refusal(f"moderation failed ({type(error).__name__})")
        decision = replace(decision, model_hash=self.artefact.hash)
        found = decision.action
        if decision.reason in ("rule", "score"):  # what could not be checked is refused in every mode but "off"
            decision = replace(decision, action=in_mode(decision.action, self.mode, decision.category))
        elif self.mode == "off":
            decision = replace(decision, action="allow")
        if self.audit is not None and (found != "allow" or self.mode == "off"):
            try:  # the line says what is done
                self.audit.write(text, "negative" if negative else "prompt", decision)
            except (AuditError, ValueError, OSError, TypeError) as error:
                return replace(refusal(f"the audit log failed ({type(error).__name__})"),
                               model_hash=self.artefact.hash)
        return decision

    def check_all(self, texts: Sequence[str], negative: bool = False) -> Decision:
        """The most severe decision on everything made of one prompt: its alternatives, chunks, parts of a blend, their
        concatenation, and what is left after cutting. Refuses when there is nothing to check."""
        if not texts and not negative:
            return replace(refusal("prompt: empty"), model_hash=self.artefact.hash)
        decisions = [self.check(text, negative) for text in texts] or [Decision("allow")]
        return most_severe(decisions)

    def explain(self, text: str) -> Explanation:
        """How a text is read; raises TextError for one that is not."""
        return self._read(text, negative=False)

    def _read(self, text: str, negative: bool) -> Explanation:
        lexicon, minors = self.artefact.lexicon, self.artefact.minors
        read = [normalize(text, lexicon.is_word, LONGEST)]
        other = apart(text)
        if other is not None:  # the words as a tokenizer parts them
            read += [one for one in [normalize(other, lexicon.is_word, 2 * LONGEST)] if one.plain != read[0].plain]
        minor = any(minors.matches(one) or _ages(one.plain) for one in read)
        matches = [match for one in read for match in lexicon.matches(one)]
        if minor:  # then a disguised hint is enough
            matches += [match for one in read for match in lexicon.matches(one, bold=True)
                        if match.category == _SEXUAL and match not in matches]
        heads: list[Mapping[str, float]] = []
        if not negative:
            plains = [part for one in read for part in windows(one.plain)]
            if not text.isascii():  # what looks like Latin letters may be the words of another language
                plains.append(normalize(latin(text), lexicon.is_word, LONGEST).plain)
            heads.append(_highest([self.artefact.head.scores(plain) for plain in dict.fromkeys(plains)]))
            if self.encoder is not None:
                heads.append(_highest([self._encoded(one.plain) for one in read]))
        return Explanation(read[0], tuple(dict.fromkeys(matches)), minor, tuple(heads))

    def _encoded(self, plain: str) -> Mapping[str, float]:
        """The scores of the encoder, or NaN when it hangs; a thread that hangs is left behind."""
        answer: queue.SimpleQueue[Mapping[str, float]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                said = self.encoder(plain)  # type: ignore[misc]
                scores = {name: float(said[name]) for name in HEADS}
            except Exception:  # a head that fails is a head that did not say "harmless"
                scores = dict.fromkeys(HEADS, math.nan)
            answer.put(scores)

        threading.Thread(target=ask, daemon=True).start()  # a pool would wait for it at the end of the program
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
        strange = foreign(text)
        if not read.normalized.plain and not negative and not strange:
            raise TextError("prompt: nothing in it can be read; valid: some words")
        rules = [(CATEGORIES[match.category], {BLOCK: "block", FLAG: "flag"}.get(match.level, ""))
                 for match in read.matches]
        if negative:
            hits = [category for category, action in rules if action == "block"]
            return refusal("rule", hits[0]) if hits else Decision("allow")
        sexual = any(match.category == _SEXUAL for match in read.matches)
        decision = self.artefact.policy.decide(read.heads, rules, read.minor, sexual)
        if decision.action == "allow" and strange:
            return Decision("flag", "", reason="most of it is not in English: not checked")
        letters = [len(word) == 1 for word in read.normalized.plain.split()]
        if decision.action == "allow" and sum(letters) > max(20, 0.7 * len(letters)):
            return Decision("flag", "", reason="most of it is single letters: not checked")
        return decision


def windows(plain: str) -> list[str]:
    """A text of words, and, where it is long, parts of at most WINDOW letters that overlap by half: a bag of n-grams
    forgets a sentence among many others, and so could be made to."""
    if len(plain) <= WINDOW:
        return [plain]
    found, start = [plain], 0
    words = [word[at:at + WINDOW] for word in plain.split() for at in range(0, len(word), WINDOW)]
    while start < len(words):
        end, size = start, 0
        while end < len(words) and (end == start or size + len(words[end]) < WINDOW):
            size += len(words[end]) + 1
            end += 1
        found.append(" ".join(words[start:end]))
        start = len(words) if end == len(words) else max(start + 1, (start + end) // 2)
    return found


def _ages(plain: str) -> bool:
    """Whether an age under 18 is named."""
    return any(int(_NUMBERS.get(age, age)) < 18 for pair in _AGE.findall(plain) for age in pair if age)


def _highest(heads: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The highest score of each category over several readings of one text; NaN where one is."""
    return {name: max((head[name] for head in heads), key=lambda score: (math.isnan(score), score))
            for name in heads[0]}
