"""The parts of a text that the network judges apart, because in one bag of n-grams a sentence is hidden by many others.

A part is a range of words, (first, end). The highest score over all parts of a text counts.
"""
from collections.abc import Callable
from itertools import accumulate

from safety.normalize import Normalized
from safety.spelling import Spelling

WINDOW = 120  # letters; a smaller window finds more hidden harm and blocks more harmless text
CLAUSE = 4  # least words of a clause that is judged apart
# Log odds by which a part must exceed what is asked of a whole text: a harmless text has many parts, each of which is
# one more chance for a false alarm, and a few words without the rest say less.
PART_MARGIN = 1.5
Span = tuple[int, int]


def parts_of(read: Normalized) -> tuple[str, list[Span]]:
    """(plain text, the ranges of words that are judged): all of its words, its ``windows``, and its clauses of CLAUSE
    words or more. Words longer than WINDOW are cut into several; then the clauses are left out."""
    words = read.plain.split()
    cut = [word[at:at + WINDOW] for word in words for at in range(0, len(word), WINDOW)]
    spans = windows(cut)
    if len(read.clauses) > 1 and len(cut) == len(words):
        spans += [clause for clause in read.clauses if clause[1] - clause[0] >= CLAUSE]
    return " ".join(cut), list(dict.fromkeys(spans))


def judged_texts(read: Normalized, spelling: Spelling, is_word: Callable[[str], bool]) -> list[tuple[str, list[Span]]]:
    """(plain text, its parts) of all that the network reads of a text: the text, and the text with its unknown words as
    the known ones that were probably meant, if there are any."""
    words = read.plain.split()
    meant = spelling.respelled(words, is_word)
    if not meant:
        return [parts_of(read)]
    said = [meant.get(word, (word,)) for word in words]
    ends = [0, *accumulate(map(len, said))]
    clauses = tuple((ends[first], ends[end]) for first, end in read.clauses)
    other = Normalized(" ".join(word for some in said for word in some), clauses=clauses)
    return [parts_of(read), parts_of(other)]


def number_of_words(texts: list[tuple[str, list[Span]]]) -> int:
    """The number of words of a text by what ``judged_texts`` gives for it: that of the reading with the most words,
    because two words that are glued together are two."""
    return max(spans[0][1] for _, spans in texts)


def windows(words: list[str]) -> list[Span]:
    """All words and, if they have more than WINDOW letters, ranges of at most WINDOW letters that overlap by half."""
    sizes = [len(word) + 1 for word in words]
    found: list[Span] = [(0, len(words))]
    if sum(sizes) - 1 <= WINDOW:
        return found
    start = 0
    while start < len(words):
        end, size = start, 0
        while end < len(words) and (end == start or size + sizes[end] <= WINDOW):
            size += sizes[end]
            end += 1
        found.append((start, end))
        start = len(words) if end == len(words) else max(start + 1, (start + end) // 2)
    return found
