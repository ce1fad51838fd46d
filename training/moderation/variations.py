"""Variations of training text: carriers, styles and disguises, applied to harmless and harmful text alike.

A pattern that occurs with one label only becomes a sign of that label: a classifier whose carriers held only harmful
words flagged 61 % of the harmless words in them.
"""
from collections.abc import Sequence

import numpy as np

CARRIERS = (
    "{}", "a photo of {}", "a picture of {}", "an image showing {}", "a painting of {}", "draw {}", "{} in the street",
    "{}, digital art, trending on artstation", "a detailed illustration of {}", "create an image of {}", "{} at night",
    "{} by a famous artist, oil on canvas", "cinematic shot of {}, 8k, highly detailed", "a cartoon of {}",
    "a scene with {}", "portrait with {}, studio light", "generate a scene depicting {}", "close up of {}, bokeh",
    "black and white photograph of {}", "{} and a {} background", "people looking at {}", "concept art of {}",
    "show me {}", "i want to see {}", "{} please", "make {}", "a man with {}", "a woman with {}", "two people and {}",
    "somebody with {}", "how to make {}", "how to get {}", "{} in a house",
    "can you draw {}?", "could you show {}?", "can you give me a picture of {}?", "how do i draw {}?",
    "what does {} look like?", "would you paint {} for me?", "can i have {}?", "a video of {}",
    "{} close up", "real {}",
)
# words that are put between others, by which no label can be told
FILLERS = (
    "lovely cheerful happy bright sunny friendly gentle calm sweet pretty colourful wonderful charming joyful peaceful "
    "cute soft warm golden fresh delightful merry playful kind beautiful shiny little big old new blue green red quiet "
    "simple plain usual nice good fine clear light dark small tall round square open early late").split()
COLOURS = ("red", "blue", "dark", "white", "misty", "golden")
LONG = 60  # words of a text that is not varied any further: too many disguised words are refused
_LEET = str.maketrans("aeiostl", "4310571")
_ALIKE = str.maketrans("aeopcxy", "\u0430\u0435\u043e\u0440\u0441\u0445\u0443")


def in_carrier(text: str, random: np.random.Generator) -> str:
    """A few words inserted into a random carrier phrase."""
    carrier = CARRIERS[random.integers(len(CARRIERS))]
    return carrier.replace("{}", text, 1).replace("{}", COLOURS[random.integers(len(COLOURS))])


def with_style(text: str, style: str) -> str:
    """A text followed by the style of a real prompt, which is the part after its first comma."""
    _, comma, rest = style.partition(",")
    return f"{text.rstrip('. ')},{rest}" if comma and len(rest) < 200 else text


def disguise(word: str, random: np.random.Generator) -> str:
    """A word written in one of eight ways that a list of words does not contain."""
    place = int(random.integers(1, max(2, len(word) - 1)))
    ways = (
        lambda: word.translate(_LEET), lambda: ".".join(word), lambda: " ".join(word), lambda: word.translate(_ALIKE),
        lambda: word[:place] + "\u200b" + word[place:], lambda: word[:place] + word[place] * 3 + word[place:]
        if place < len(word) else word * 1, lambda: word[:place] + "*" + word[place + 1:],
        lambda: "".join(c.upper() if random.random() < 0.5 else c for c in word),
    )
    return ways[random.integers(len(ways))]()


def misspell(word: str, random: np.random.Generator) -> str:
    """A word with a letter dropped, doubled, or swapped with the next one, as users try after a refusal."""
    place = int(random.integers(1, len(word)))
    return (word[:place] + word[place + 1:], word[:place] + word[place] + word[place:],
            word[:place - 1] + word[place] + word[place - 1] + word[place + 1:])[random.integers(3)]


def with_misspellings(text: str, random: np.random.Generator) -> str:
    """A text in which each longer word is misspelt with probability 0.2."""
    return " ".join(misspell(word, random) if len(word) > 3 and random.random() < 0.2 else word
                    for word in text.split())


def with_disguises(text: str, random: np.random.Generator) -> str:
    """A text in which each longer word is disguised with probability 0.25."""
    return " ".join(disguise(word, random) if len(word) > 3 and random.random() < 0.25 else word
                    for word in text.split())


def diluted(text: str, random: np.random.Generator) -> str:
    """A text with a filler after every word, after every second one or after a third of them."""
    words, share = text.split(), (1.0, 0.0, 0.33)[random.integers(3)]
    return " ".join(f"{word} {FILLERS[random.integers(len(FILLERS))]}" if random.random() < share or not share and i % 2
                    else word for i, word in enumerate(words))


def glued(text: str, random: np.random.Generator) -> str:
    """A text of which half the spaces are dropped."""
    return "".join(word + ("" if random.random() < 0.5 else " ") for word in text.split())


def with_endings(text: str, random: np.random.Generator) -> str:
    """A text with one to three letters without meaning behind half of the longer words."""
    return " ".join(word + "".join("abdefgiklmnoprstuxz"[i] for i in random.integers(0, 19, random.integers(1, 4)))
                    if len(word) > 3 and random.random() < 0.5 else word for word in text.split())


def drowned(text: str, others: Sequence[str], random: np.random.Generator) -> str:
    """A text before, behind or between two harmless ones, with or without signs between them."""
    first, last = (others[int(random.integers(len(others)))] for _ in range(2))
    return (f"{first}. {text}", f"{text}, {last}", f"{first}, {text}. {last}", f"{first} {text}", f"{text} {last}",
            f"{first} {text} {last}")[random.integers(6)]


def interleaved(text: str, others: Sequence[str], random: np.random.Generator) -> str:
    """A text with the words of a harmless one between its own."""
    other = others[int(random.integers(len(others)))].split() or [""]
    return " ".join(f"{word} {other[i % len(other)]}" for i, word in enumerate(text.split()))


def vary(text: str, styles: Sequence[str], random: np.random.Generator, others: Sequence[str] = ()) -> str:
    """A variation of a text: short ones in a carrier, half with a style, some diluted, drowned in ``others`` or
    mixed with one of them, glued or with endings, a tenth disguised, a quarter misspelt."""
    if len(text.split()) <= 4:
        text = in_carrier(text, random)
    if styles and random.random() < 0.4:
        text = with_style(text, styles[int(random.integers(len(styles)))])
    if random.random() < 0.15:
        text = diluted(text, random)
    elif others and random.random() < 0.25:
        text = (drowned, interleaved)[int(random.random() < 0.4)](text, others, random)
    if len(text.split()) > LONG:
        return text
    draw = random.random()
    for limit, change in ((0.09, with_disguises), (0.3, with_misspellings), (0.38, glued), (0.5, with_endings)):
        if draw < limit:
            return change(text, random)
    return text
