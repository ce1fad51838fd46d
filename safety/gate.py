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
from safety.normalize import LONGEST, Normalized, TextError, foreign, normalize
from safety.policy import CATEGORIES, HEADS, MODES, Decision, Mode, in_mode, refusal
from safety.prompt import DEFAULT, Artefact, load_artefact

Encoder = Callable[[str], Mapping[str, float]]  # text -> probability by category
_AGE = re.compile(r"(?<!\d )\b(\d{1,2}) ?(?:years? old|yo|y o|yrs? old)\b")
_SEXUAL = HEADS.index("sexual")
_log = logging.getLogger(__name__)


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
        if self.audit is not None and (decision.action != "allow" or self.mode == "off"):
            try:
                self.audit.write(text, "negative" if negative else "prompt", decision)
            except (AuditError, ValueError, OSError, TypeError) as error:
                return replace(refusal(f"the audit log failed ({type(error).__name__})"),
                               model_hash=self.artefact.hash)
        if decision.reason in ("rule", "score"):  # what could not be checked is refused in every mode but "off"
            return replace(decision, action=in_mode(decision.action, self.mode))
        return decision if self.mode != "off" else replace(decision, action="allow")

    def check_all(self, texts: Sequence[str], negative: bool = False) -> Decision:
        """The most severe decision on everything made of one prompt: its alternatives, chunks, parts of a blend, their
        concatenation, and what is left after cutting. Refuses when there is nothing to check."""
        if not texts and not negative:
            return replace(refusal("prompt: empty"), model_hash=self.artefact.hash)
        decisions = [self.check(text, negative) for text in texts] or [Decision("allow")]
        order = ("allow", "flag", "blur", "block")
        return max(decisions, key=lambda decision: order.index(decision.action))

    def explain(self, text: str) -> Explanation:
        """How a text is read; raises TextError for one that is not."""
        return self._read(text, negative=False)

    def _read(self, text: str, negative: bool) -> Explanation:
        normalized = normalize(text, self.artefact.lexicon.is_word, LONGEST)
        matches = tuple(self.artefact.lexicon.matches(normalized))
        minor = self.artefact.minors.words_in(normalized.plain) or any(
            int(age) < 18 for age in _AGE.findall(normalized.plain))
        heads: list[Mapping[str, float]] = []
        if not negative:
            heads.append(self.artefact.head.scores(normalized.plain))
            if self.encoder is not None:
                heads.append(self._encoded(normalized.plain))
        return Explanation(normalized, matches, minor, tuple(heads))

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
        if not read.normalized.plain and not negative and not any(c.isalnum() for c in text):
            raise TextError("prompt: nothing in it can be read; valid: some words")
        rules = [(CATEGORIES[match.category], {BLOCK: "block", FLAG: "flag"}.get(match.level, ""))
                 for match in read.matches]
        if negative:
            hits = [category for category, action in rules if action == "block"]
            return refusal("rule", hits[0]) if hits else Decision("allow")
        if not rules and foreign(text):
            return Decision("flag", "", reason="most of it is not in English: not checked")
        sexual = any(match.category == _SEXUAL for match in read.matches)
        return self.artefact.policy.decide(read.heads, rules, read.minor, sexual)
