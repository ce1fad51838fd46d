"""CLIP's own tokenizer, read from the vocabulary files of a checkpoint, so that the ids fit its text encoder.

It is a byte-pair encoding as in `tokenizer.py` with three differences. Words end in `</w>`, and spaces are not tokens.
The padding is an ordinary token (the end token in SD-1.x, "!" in SD-2.x). The networks read the padding: published
UNets attend to all 77 states, so they are used with mask None. The mask returned here marks the tokens up to the first
end token and serves to find the state that stands for the text.

A checkpoint may bring learned tokens (textual inversion, Gal et al. 2023), which are matched in a caption before it is
split into words. One that was learned as several vectors is a token `<toy>` followed by `<toy>_1`, `<toy>_2`, ...;
`<toy>` in a caption stands for all of them, as in diffusers. Axis letters: B captions, L tokens.
"""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Encoding, Regex
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, normalizers, pre_tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
# The pattern that splits a text into words, from the code of CLIP (simple_tokenizer.py).
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text: their ids, the word that each belongs to, and the characters (from, to) of each."""

    ids: list[int]
    word_ids: list[int | None]
    offsets: list[tuple[int, int]]


class ClipTokenizer:
    """Turns captions into padded token ids and back, with the interface of `data.tokenizer.Tokenizer`.

    A caption that spells out a special token gets that token, as in the published pipelines. learned: tokens beside the
    vocabulary, with the ids that follow it. Raises ValueError for tokens that do not fit the vocabulary.
    """

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], length: int = LENGTH,
                 pad: str | AddedToken = END, start: str | AddedToken = START, end: str | AddedToken = END,
                 learned: Sequence[AddedToken] = ()):
        if length < 3:
            raise ValueError(f"length: {length}; valid: 3 tokens or more")
        special = {token_text(token): added_token(token) for token in (start, end, pad)}
        if absent := [name for name in special if name not in vocabulary]:
            raise ValueError(f"the vocabulary lacks its special tokens: {' '.join(absent)}")
        self.length, self.vocabulary, self.merges = length, vocabulary, merges
        self.start, self.end, self.pad = token_text(start), token_text(end), token_text(pad)
        self.start_id, self.end_id, self.pad_id = (vocabulary[name] for name in (self.start, self.end, self.pad))
        bpe = BPE(models.BPE(vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
                             fuse_unk=False, unk_token=self.end))
        bpe.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens(list(special.values()))
        bpe.add_tokens(list(learned))
        self.bpe = bpe
        self.learned = {token.content: token for token in learned}
        ids = {content: number for content in self.learned if (number := bpe.token_to_id(content)) is not None}
        # a token that was learned as several vectors: its id, and the ids of the others
        self.vectors = {number: further for content, number in ids.items() if (further := further_ids(content, ids))}
        self._contents = {number: content for content, number in ids.items()}

    @classmethod
    def load(cls, folder: str | Path, length: int = LENGTH) -> "ClipTokenizer":
        """The tokenizer of a checkpoint folder: vocab.json and merges.txt, or tokenizer.json, with the special tokens
        of tokenizer_config.json and special_tokens_map.json and the learned tokens of tokenizer.json,
        tokenizer_config.json and added_tokens.json. Raises FileNotFoundError or ValueError naming a file."""
        folder = Path(folder)
        vocabulary, merges = read_vocabulary(folder)
        tokens = {**special_tokens(folder / "special_tokens_map.json"),
                  **special_tokens(folder / "tokenizer_config.json")}
        special = (tokens.get("pad_token", END), tokens.get("bos_token", START), tokens.get("eos_token", END))
        learned = learned_tokens(folder, vocabulary, {token_text(token) for token in special})
        try:
            return cls(vocabulary, merges, length, *special, learned)
        except ValueError:
            raise
        except Exception as error:  # the library raises bare Exception for merges that are not in the vocabulary
            raise ValueError(f"{folder} is no CLIP tokenizer: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json and, for learned tokens,
        added_tokens.json, which transformers reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": self.start, "eos_token": self.end, "pad_token": self.pad, "unk_token": self.end}
        config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": self.length,
                  "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
        ids = {content: self.bpe.token_to_id(content) for content in self.learned}
        if ids:
            config["added_tokens_decoder"] = {
                str(ids[content]): {"content": content, **{flag: getattr(token, flag) for flag in FLAGS}}
                for content, token in self.learned.items()}
        for name, data in (("vocab.json", self.vocabulary), ("tokenizer_config.json", config),
                           ("special_tokens_map.json", special), *([("added_tokens.json", ids)] if ids else [])):
            (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.bpe.get_vocab_size()

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, L) int64 and mask (B, L) bool, True up to the first end token. A long caption is cut."""
        ids = torch.full((len(captions), self.length), self.pad_id, dtype=torch.int64)  # (B, L)
        for row, encoding in enumerate(self.bpe.encode_batch(captions, add_special_tokens=False)):
            tokens = [self.start_id, *self.with_vectors(encoding).ids[: self.length - 2], self.end_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        ends = (ids == self.end_id).int()
        return ids, ends.cumsum(dim=1) - ends == 0  # (B, L) each

    def overflow(self, caption: str) -> str:
        """The end of ``caption`` that does not fit into ``length`` tokens; empty if the whole caption fits."""
        return self.text(self.tokens(caption).ids[self.length - 2:])

    def tokens(self, caption: str) -> Tokens:
        """The tokens of a caption without start, end and padding."""
        return self.with_vectors(self.bpe.encode(caption, add_special_tokens=False))

    def with_vectors(self, encoding: Encoding) -> Tokens:
        """The tokens of an encoding, with the further vectors of a learned token behind it."""
        found = Tokens(encoding.ids, encoding.word_ids, encoding.offsets)
        if self.vectors.keys().isdisjoint(found.ids):
            return found
        counts = [1 + len(self.vectors.get(number, ())) for number in found.ids]
        return Tokens([one for number in found.ids for one in (number, *self.vectors.get(number, ()))],
                      [word for word, count in zip(found.word_ids, counts) for _ in range(count)],
                      [place for place, count in zip(found.offsets, counts) for _ in range(count)])

    def decode(self, ids: torch.Tensor) -> list[str]:
        """The captions of token ids (B, L) without special tokens, with a space after every word and sign."""
        return [self.text(row) for row in ids.tolist()]

    def text(self, ids: list[int]) -> str:
        """The text of a list of token ids without special tokens."""
        pieces: list[str] = []  # learned tokens, and the texts between them
        rest: list[int] = []  # what is not yet decoded
        for number in (*ids, None):
            if number is None or number in self._contents:
                pieces.append(self.bpe.decode(rest, skip_special_tokens=True).replace("</w>", " "))
                pieces.append("" if number is None else f"{self._contents[number]} ")
                rest = []
            else:
                rest.append(number)
        return "".join(pieces).strip()


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The id of each token, and the ordered merges, from vocab.json and merges.txt or from tokenizer.json."""
    vocab, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if not (vocab.is_file() and merges.is_file()) and not whole.is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer; valid: vocab.json and merges.txt, or tokenizer.json")
    try:
        if vocab.is_file() and merges.is_file():
            return models.BPE.read_file(str(vocab), str(merges))
        model = json.loads(whole.read_text(encoding="utf-8"))["model"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return model["vocab"], [(first, second) for first, second in pairs]
    except Exception as error:  # the library raises bare Exception for what it cannot read
        raise ValueError(f"{folder} is no CLIP tokenizer: {type(error).__name__}: {error}") from None


def special_tokens(path: Path) -> dict[str, str | AddedToken]:
    """The special tokens that a configuration file names; none if the file is missing."""
    if not path.is_file():
        return {}
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: token_from_json(value) for key, value in data.items()
                if key in ("bos_token", "eos_token", "pad_token") and value is not None}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration of a tokenizer: {type(error).__name__}: {error}") from None


def further_ids(content: str, ids: dict[str, int]) -> list[int]:
    """The ids of the further vectors of a learned token: CONTENT_1, CONTENT_2, ..."""
    further: list[int] = []
    while (name := f"{content}_{len(further) + 1}") in ids:
        further.append(ids[name])
    return further


def learned_tokens(folder: Path, vocabulary: dict[str, int], special: set[str]) -> list[AddedToken]:
    """The added tokens of a checkpoint folder but its special ones, in the order of their ids. Raises ValueError naming
    a file that holds something else, and for ids that do not follow those of the vocabulary."""
    found: dict[str, tuple[int, AddedToken]] = {}
    for name, entries in (("added_tokens.json", added_of_table), ("tokenizer_config.json", added_of_config),
                          ("tokenizer.json", added_of_whole)):  # the later ones hold the flags
        if (folder / name).is_file():
            try:
                data = json.loads((folder / name).read_text(encoding="utf-8"))
                found |= {token.content: (number, token) for number, token in entries(data)}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"{folder / name} has no table of added tokens: {reason}") from None
    tokens = sorted(((number, token) for content, (number, token) in found.items() if content not in special),
                    key=lambda pair: pair[0])
    following = len(vocabulary)
    for number, token in tokens:
        expected = vocabulary.get(token.content, following)
        if number != expected:
            raise ValueError(f"{folder}: the added token {token.content!r} has the id {number}; valid: {expected}")
        following += token.content not in vocabulary
    return [token for _, token in tokens]


def added_of_table(data: dict[str, int]) -> list[tuple[int, AddedToken]]:
    """(id, token) of the entries of added_tokens.json."""
    return [(int(number), AddedToken(content, normalized=True, special=False)) for content, number in data.items()]


def added_of_config(data: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """(id, token) of the entries of a tokenizer_config.json."""
    return [(int(number), added_from_json(token)) for number, token in data.get("added_tokens_decoder", {}).items()]


def added_of_whole(data: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """(id, token) of the entries of a tokenizer.json."""
    return [(int(token["id"]), added_from_json(token)) for token in data.get("added_tokens") or []]


def added_from_json(value: dict[str, Any]) -> AddedToken:
    """An added token as a file stores it, with its options for matching."""
    return AddedToken(value["content"], **{flag: bool(value.get(flag, False)) for flag in FLAGS})


def token_from_json(value: str | dict[str, Any]) -> str | AddedToken:
    """A special token as a configuration stores it: a text, or a text with options for matching it."""
    if isinstance(value, str):
        return value
    flags = {key: bool(value.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(value["content"], special=True, **flags)


def token_text(token: str | AddedToken) -> str:
    """The text of a special token."""
    return token if isinstance(token, str) else token.content


def added_token(token: str | AddedToken) -> AddedToken:
    """A special token that is matched before the text is normalised, unless its own options say otherwise."""
    return AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
