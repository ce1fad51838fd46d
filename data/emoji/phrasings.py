"""English for emoji: noun phrases from Unicode labels, and the captions of single emoji and of scenes.

All captions of a list are true of the same image; the first one is the most complete and serves as the prompt.
"""

import re
from collections.abc import Sequence

STYLE_WORDS = {  # style: (its name, another word for it)
    "noto": ("noto", "noto"), "twemoji": ("twemoji", "twemoji"), "openmoji": ("openmoji", "outlined"),
    "fluent": ("fluent", "3d"), "flat": ("flat", "flat"),
}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
COUNT_WORDS = {1: "one", 2: "two", 3: "three"}

_UNCOUNTED = frozenset("""
bacon badminton bamboo baseball bread broccoli butter cinema coral cricket curry dango dna fire fog garlic hockey ice
lacrosse lightning luggage mate oden popcorn rice sake salt soap softball spaghetti sushi tennis thread voltage water
wireless wood yarn zzz fuji customs dizzy foggy locked unlocked camping cooking bowling skiing construction infinity
control away claim laughing prohibited radioactive warning corn biohazard cheese cyclone registered copyright minus
plus multiply divide information money racing breast-feeding pong liquid departure arrival way
""".split())
_SINGULAR_S = re.compile(r"(ss|us|rhinoceros|tennis|christmas)$", re.IGNORECASE)  # singular nouns that end in s
_BARE = ("no", "people", "men", "women", "rolling", "mount", "Santa", "Mrs.", "Mx")  # first words without article
_AN = re.compile(r"^(?!uni|use|ut|eu|one\b|once)([aeiou]|hour|x-ray|ng\b|ok\b|sos\b)", re.IGNORECASE)
_IRREGULAR = {
    "mouse": "mice", "goose": "geese", "ox": "oxen", "knife": "knives", "leaf": "leaves", "loaf": "loaves",
    "wolf": "wolves", "tooth": "teeth", "foot": "feet", "deer": "deer", "fish": "fish", "blowfish": "blowfish",
    "jellyfish": "jellyfish", "sheep": "sheep", "moose": "moose", "squid": "squid", "shrimp": "shrimp",
    "bison": "bison", "scarf": "scarves", "potato": "potatoes", "tomato": "tomatoes", "man": "men",
    "woman": "women", "person": "people", "volcano": "volcanoes", "mosquito": "mosquitoes",
    "die": "dice", "snowman": "snowmen", "buffalo": "buffaloes",
}
_COUNTED_GROUPS = frozenset(("animals & nature", "food & drink", "activities", "objects", "travel & places"))


def noun(label: str) -> str:
    """A Unicode label as a noun phrase: "flag: Chad" -> "flag of Chad", "woman: red hair" -> "woman with red hair"."""
    text = label.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "")
    head, _, rest = text.partition(": ")
    if not rest:
        return text
    if head == "flag":
        return f"flag of {rest}"
    if head == "keycap":
        return f"keycap {rest}"
    parts = rest.split(", ")
    if "bald" in parts:
        parts.remove("bald")
        head = f"bald {head}"
    facing = [part for part in parts if part.startswith("facing")]
    others = [part for part in parts if part not in facing]
    words = " ".join([head, *facing])
    if not others:
        return words
    listed = " and ".join(part for part in (", ".join(others[:-1]), others[-1]) if part)
    return f"{words} {'of' if head in ('family', 'kiss') else 'with'} {listed}"


def _head(words: str) -> str:
    return re.split(r" (?:of|with|in|without|on|over|at|and|behind|showing|from|to) ", words)[0].split(" ")[-1]


def _takes_no_article(words: str) -> bool:
    head, first = _head(words), words.split(" ")[0]
    if first in ("man", "woman", "person", "face"):  # a man lifting weights
        return False
    plural = head.endswith("s") and not _SINGULAR_S.search(head) and not head.endswith("'s")
    return (plural or head.lower() in _UNCOUNTED or first in _BARE
            or "o'clock" in words or words.endswith("-thirty")
            or (words[0].isupper() and words.isalpha() and words[1:].islower()))  # Leo, Taurus: names


def article(words: str) -> str:
    """The words with their indefinite article, if they take one: "an apple", "a cat", "grapes"."""
    if _takes_no_article(words):
        return words
    return f"{'an' if _AN.match(words) else 'a'} {words}"


def plural(item: dict) -> str:
    """The plural of an emoji's name, or "" if it is not a plain countable noun ("salt", "sun behind cloud")."""
    words = noun(item["label"])
    if (item["group"] not in _COUNTED_GROUPS or item["subgroup"] in ("time", "sound")
            or not re.fullmatch(r"[a-z]+( [a-z]+)?", words) or _takes_no_article(words)
            or words.endswith(("ing", "ed", "ware"))):
        return ""
    *rest, last = words.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    else:
        last += "s"
    return " ".join([*rest, last])


def single_captions(item: dict, background: str) -> tuple[str, ...]:
    """Captions of one emoji on a background of one colour; a white background is not mentioned."""
    name, other = STYLE_WORDS[item["style"]]
    words = noun(item["label"])
    thing = article(words)
    on = "" if background == "white" else f" on {article(background)} background"
    captions = [f"{thing}{on}, {name} style", f"an emoji of {thing}{on}, {name} style",
                f"{article(name + ' emoji')} of {thing}{on}", f"{words}{on}, {other} style"]
    tags = [tag for tag in item["tags"] if tag.isascii() and tag not in words.split(" ")]
    if tags:
        # The list is alphabetical: every k-th tag covers it.
        tags = tags[::max(1, len(tags) // 3)][:3]
        kind = item["subgroup"].split(" ")[0].strip(",") if item["subgroup"] in ("fruit", "vegetables") else ""
        extra = [] if background == "white" else [f"{background} background"]
        captions.append(", ".join([*([kind] if kind else []), *[t for t in tags if t != kind], *extra,
                                   f"{other} style"]))
    return tuple(captions)


def named_spans(caption: str, nouns: Sequence[str]) -> list[tuple[int, int] | None]:
    """The characters (from, to) where a caption first says each noun, None where it does not. Equal nouns share their
    place, and a noun is not found within a longer one: the cat of "a cat face above a cat" is the second."""
    found: dict[str, tuple[int, int] | None] = {}
    rest = caption
    for words in sorted(set(nouns), key=len, reverse=True):
        match = re.search(rf"(?<!\w){re.escape(words)}(?!\w)", rest)
        found[words] = match.span() if match else None
        rest = re.sub(rf"(?<!\w){re.escape(words)}(?!\w)", lambda said: "\0" * len(said[0]), rest)
    return [found[words] for words in nouns]


def _where(background: dict) -> str:
    colours = background["colours"]
    if background["kind"] == "plain":
        return f"on {article(colours[0])} background"
    side = ("left", "right") if background["kind"] == "columns" else ("top", "bottom")
    return f"on a background with {article(colours[0])} {side[0]} and {article(colours[1])} {side[1]}"


def scene_captions(scene: dict, nouns: Sequence[str], plural_noun: str) -> tuple[str, ...]:
    """Captions of a scene: its objects with their relations or their count, then background, mood and style.

    nouns: the name of each object without article; plural_noun: the plural for a scene of equal objects.
    """
    style = STYLE_WORDS[scene["objects"][0]["style"]][0]
    things = [article(words) for words in nouns]
    if scene["kind"] == "count":
        cores = [f"{COUNT_WORDS[len(nouns)]} {plural_noun}", f"{len(nouns)} {plural_noun}"]
    elif scene["kind"] == "one":
        cores = [things[0], nouns[0]]
    else:
        cores = [_chain(things, scene["relations"], ("", "and ")), _inverse(things, scene["relations"])]
    where, mood = _where(scene["background"]), scene["mood"]
    if not mood:
        return (f"{cores[0]} {where}, {style} style", f"{cores[1]} {where}, {style} style",
                f"{cores[0]}, {style} style", f"a scene of {cores[0]} {where}, {style} style")
    return (f"a {mood} scene of {cores[0]} {where}, {style} style", f"{cores[1]} {where}, {mood}, {style} style",
            f"a {mood} scene of {cores[0]}, {style} style", f"{cores[0]} {where}, {mood} mood, {style} style")


def _say(things: Sequence[str], relation: Sequence) -> str:
    subject, kind, target = relation
    return f"{things[subject]} {kind if kind in ('above', 'below') else 'to the ' + kind} {things[target]}"


def _chain(things: Sequence[str], relations: Sequence[Sequence], joints: tuple[str, str]) -> str:
    """ "A above B" or "A above B and C to the left of B"."""
    return " ".join(joint + _say(things, relation) for joint, relation in zip(joints, relations))


def _inverse(things: Sequence[str], relations: Sequence[Sequence]) -> str:
    """The same arrangement with every relation reversed: A above B becomes B below A."""
    turned = [(target, OPPOSITE[kind], subject) for subject, kind, target in relations]
    return _chain(things, turned, ("", "and "))
