"""The tokenizer stage: byte-pair encoding fitted to the captions of the training split."""
from data.source import Source
from data.tokenizer import Tokenizer, TokenizerConfig
from files.whole import write_text
from training.stages.context import StageContext

CORPUS = 50_000  # items whose captions a tokenizer is fitted to


def fit_tokenizer(source: Source, config: TokenizerConfig) -> Tokenizer:
    """A byte-pair encoding fitted to the captions of the first items of a source."""
    return Tokenizer.train((caption for i in range(min(len(source), CORPUS)) for caption in source.captions(i)), config)


def train_tokenizer(config: TokenizerConfig, context: StageContext) -> None:
    """Fit the encoding and write tokenizer.json; warns about captions that it cuts."""
    if not context.processes.main:
        return
    tokenizer = fit_tokenizer(context.source, config)
    items = range(min(len(context.source), 2000))
    cut = sum(bool(tokenizer.overflow(caption)) for i in items for caption in context.source.captions(i))
    write_text(context.run.path / "tokenizer.json", tokenizer.to_json())
    context.run.record(tokenizer={"vocab_size": tokenizer.vocab_size, "length": tokenizer.length,
                                  "cut_of_first_2000": cut})
    if cut:
        print(f"warning: {cut} captions of the first 2000 items are longer than tokenizer.length = {tokenizer.length}")
