"""A small vocabulary in the files of CLIP's tokenizer, made without any network."""

import json
from pathlib import Path

from tokenizers import Regex
from tokenizers import Tokenizer as BPE
from tokenizers import models, pre_tokenizers, trainers

from data.clip_tokenizer import END, START, WORDS

CORPUS = ["a photo of a small red star above two blue circles", "the astronaut's horse, isn't it? they'll say we've 12",
          "café naïve Ærø ångström", "日本語の漢字 と かな", "🟥⭐ emoji 👩‍👩‍👧", "oil painting, highly detailed, 4k!!"]


def write_vocabulary(folder: Path, pad: str = END, last: bool = True) -> Path:
    """vocab.json and merges.txt trained on the corpus, special tokens last as in CLIP or first."""
    bpe = BPE(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([text.lower() for text in CORPUS * 3], trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    words = [*sorted(alphabet), *(f"{letter}</w>" for letter in sorted(alphabet))]  # as in CLIP: nothing is unknown
    words += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in set(words)]
    words = [*words, START, END] if last else [START, END, *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(words)}), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    config = {"pad_token": pad, "bos_token": START, "eos_token": END, "model_max_length": 77, "unk_token": END,
              "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
