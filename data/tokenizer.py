"""Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2), trained on the captions of the corpus.

Every string has a token sequence, because the alphabet is the 256 bytes; there is no unknown token. A sequence is
``<|start|> tokens <|end|> <|pad|> ...``, cut to ``length`` in front of the end token, as CLIP's text encoder expects.
Axis letters: B captions, L tokens.
"""
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Encoding
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"


@dataclass(frozen=True)
class TokenizerConfig:
    """``vocab_size`` counts the 256 bytes and 3 special tokens; captions are padded or cut to ``length`` tokens."""

    vocab_size: int = 1024
    length: int = 32

    def __post_init__(self):
        if not 260 <= self.vocab_size <= 200_000:
            raise ValueError(f"vocab_size: {self.vocab_size}; valid: 260 (256 bytes, 3 special tokens) to 200000")
        if not 4 <= self.length <= 4096:
            raise ValueError(f"length: {self.length}; valid: 4 to 4096 tokens")


class Tokenizer:
    """Turns captions into padded token ids and back; lower-cases and applies NFC, as CLIP's tokenizer does."""

    def __init__(self, bpe: BPE, length: int):
        self.bpe, self.length = bpe, length
        # a caption that spells out a special token gets the bytes of that text, not the token
        bpe.encode_special_tokens = True
        special = [number for number in map(bpe.token_to_id, (START, END, PAD)) if number is not None]
        if len(special) < 3:
            raise ValueError(f"the tokenizer lacks one of its special tokens {START} {END} {PAD}")
        self.start_id, self.end_id, self.pad_id = special

    @classmethod
    def train(cls, captions: Iterable[str], config: TokenizerConfig) -> "Tokenizer":
        """A tokenizer fitted to ``captions``."""
        bpe = BPE(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size, special_tokens=[START, END, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, config.length)

    @property
    def vocab_size(self) -> int:
        """Number of token ids; smaller than configured if the corpus has too few pairs to merge."""
        return self.bpe.get_vocab_size()

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, L) int64 and mask (B, L) bool, True at start, tokens and end. A long caption is cut."""
        ids = torch.full((len(captions), self.length), self.pad_id, dtype=torch.int64)  # (B, L)
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)  # (B, L)
        for row, encoding in enumerate(self.bpe.encode_batch(captions, add_special_tokens=False)):
            tokens = [self.start_id, *encoding.ids[: self.length - 2], self.end_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask

    def tokens(self, caption: str) -> Encoding:
        """The tokens of a caption without start, end and padding: `ids`, `word_ids` and `offsets`."""
        return self.bpe.encode(caption, add_special_tokens=False)

    def offsets(self, caption: str) -> list[tuple[int, int]]:
        """The characters (from, to) of each token of ``encode``'s row up to the end token, (0, 0) for start and end."""
        return [(0, 0), *self.bpe.encode(caption, add_special_tokens=False).offsets[: self.length - 2], (0, 0)]

    def overflow(self, caption: str) -> str:
        """The end of ``caption`` that does not fit into ``length`` tokens; empty if the whole caption fits."""
        ids = self.bpe.encode(caption, add_special_tokens=False).ids
        return self.bpe.decode(ids[self.length - 2:]).strip()

    def decode(self, ids: torch.Tensor) -> list[str]:
        """The captions of token ids (B, L) without special tokens."""
        return [text.strip() for text in self.bpe.decode_batch(ids.tolist(), skip_special_tokens=True)]

    def to_json(self) -> str:
        """The tokenizer as JSON: the layout of the `tokenizers` library, and the padded length."""
        return json.dumps({"length": self.length, "tokenizer": json.loads(self.bpe.to_str())}, ensure_ascii=False)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer in a file of ``to_json``; raises ValueError for a file that holds something else."""
        text = Path(path).read_bytes()
        try:
            data = json.loads(text)
            return cls(BPE.from_str(json.dumps(data["tokenizer"])), int(data["length"]))
        except Exception as error:  # the library raises bare Exception for what it cannot read
            raise ValueError(f"{path} is not a tokenizer written by this program: {error!r}") from None
