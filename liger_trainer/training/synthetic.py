"""Rows of random token ids in place of a dataset: speed and memory depend on the rows' lengths, not on their words.

How the table of Alpaca's lengths was made. Its source are 122 rows of `data/alpaca_5000.json` in the repository
`tatsu-lab/stanford_alpaca`: the whole rows in the 16,000 characters from each of the offsets 0, 700,000 and 1,500,000.
35 % of these have an input; instruction, input and output take 59 + 22 + 254 = 335 bytes in the mean, with a standard
error of 25. Two figures for all rows check that. The published size, 47,764,738 bytes for 52,002 rows of these three
columns and `text`, which repeats them in a template of 140 bytes (205 with an input), means 369 bytes a row (without 16
bytes of Arrow's offsets). The file of 5,000 rows has 361 characters a row. So the sample's lengths were scaled by
370 / 335. Tokens are bytes / 4.4, an assumption (that of a BPE vocabulary of about 100,000 on English), plus one for
the begin (prompt) or the end (answer). The prompt is `text` up to the answer, template included.

The quantiles stand in a table because a log-normal does not fit: the answers' one has a mean of 364 bytes where the
sample's is 254. The rows drawn have 58 prompt and 65 answer tokens in the mean. Above the 99 % quantile the table rests
on one row, and so does the padding of a batch, which its longest row decides. Prompt and answer are drawn one without
the other, though the logarithms of their lengths have a correlation of -0.18.
"""

import numpy as np

from .errors import RecipeError

SYNTHETIC = "synthetic"
LENGTHS = ("full", "ragged", "alpaca")
IGNORED = -100
# Cumulative shares, and the tokens of Alpaca's prompts and answers there.
SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
PROMPT_TOKENS = (39, 42, 43, 45, 50, 66, 78, 83, 99, 377)
ANSWER_TOKENS = (2, 4, 7, 13, 41, 106, 143, 186, 241, 355)


def rows(lengths: str, examples: int, max_length: int, config, seed: int):
    """A dataset of random token ids, ready for a collator.

    Args:
        lengths: ``full``: every row has ``max_length`` tokens and each is a label. ``ragged``: every second row has
            one token less, so that two rows that follow each other make a batch with padding. ``alpaca``: lengths are
            drawn as ``alpaca_lengths`` says, and the labels of the prompt are -100.
        examples: number of rows.
        max_length: tokens of a row at most.
        config: the model's transformers config; ids are uniform over its vocabulary without its special tokens.
        seed: the same one gives the same rows, on every process.

    Returns:
        A ``datasets.Dataset`` in memory, with ``input_ids`` and ``labels``.

    Raises:
        RecipeError: ``lengths`` not one of those, ``max_length`` below 2 (the first token of a row bears no loss) or
            ``None``, or more tokens than an Arrow column can address.
    """
    import pyarrow
    from datasets import Dataset

    if lengths not in LENGTHS:
        raise RecipeError(f"synthetic_lengths must be one of {', '.join(LENGTHS)}, got {lengths!r}")
    if max_length is None or max_length < 2:
        raise RecipeError(f"max_length must be at least 2 with dataset: {SYNTHETIC}, got {max_length}")
    generator = np.random.default_rng(seed)
    prompt, total = np.zeros(examples, np.int64), np.full(examples, max_length)
    if lengths == "ragged":
        total[1::2] = max(max_length - 1, 2)  # a row of one token bears no loss
    elif lengths == "alpaca":
        prompt, total = alpaca_lengths(examples, max_length, generator)
    ends = np.cumsum(total)
    if ends[-1] >= 2**31:
        raise RecipeError(
            f"synthetic_examples: {examples} rows of {lengths} lengths with max_length {max_length} are {ends[-1]:,} "
            f"tokens, the limit is {2**31 - 1:,}"
        )
    ids = random_ids(int(ends[-1]), config, generator)
    offsets = pyarrow.array(np.concatenate([[0], ends]), pyarrow.int32())
    columns = {"input_ids": pyarrow.ListArray.from_arrays(offsets, ids)}
    if prompt.any():
        labels = ids.copy()
        labels[np.arange(ends[-1]) < np.repeat(ends - total + prompt, total)] = IGNORED
        columns["labels"] = pyarrow.ListArray.from_arrays(offsets, labels)
    else:
        columns["labels"] = columns["input_ids"]  # one buffer for both
    # Named by what determines it: the default fingerprint is a hash of all the data.
    fingerprint = f"synthetic-{lengths}-{examples}-{max_length}-{config.get_text_config().vocab_size}-{seed}"
    return Dataset(pyarrow.table(columns), fingerprint=fingerprint)


def alpaca_lengths(examples: int, max_length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompt and of the whole row, two int64 arrays, distributed as those of Alpaca.

    Drawn by linear interpolation in the tables above. Rows are cut to ``max_length``, and prompts to one token less, so
    that no row is without a label.
    """
    prompt, answer = (
        np.rint(np.interp(generator.random(examples), SHARES, tokens)).astype(np.int64)
        for tokens in (PROMPT_TOKENS, ANSWER_TOKENS)
    )
    prompt = np.minimum(prompt, max_length - 1)
    return prompt, np.minimum(prompt + answer, max_length)


def special_ids(config) -> dict[str, int]:
    """The config's ``bos``, ``eos`` and ``pad`` ids, those it has; the first one of a list."""
    config = config.get_text_config()
    found = {}
    for name in ("bos", "eos", "pad"):
        token = getattr(config, f"{name}_token_id", None)
        token = token[0] if isinstance(token, list | tuple) else token
        if token is not None and 0 <= token < config.vocab_size:
            found[name] = token
    return found


def random_ids(count: int, config, generator: np.random.Generator) -> np.ndarray:
    """``count`` int32 ids, uniform over the vocabulary without ``special_ids``."""
    special = sorted(set(special_ids(config).values()))
    ids = generator.integers(0, config.get_text_config().vocab_size - len(special), count, dtype=np.int32)
    for token in special:  # ascending: each makes room for itself
        ids += ids >= token
    return ids


def stand_in_tokenizer(config, with_mask: bool = True):
    """A tokenizer that knows the config's special tokens only: collators and TRL's trainers pad by it.

    Args:
        config: the model's transformers config.
        with_mask: give an ``attention_mask``. Batches without padding need none, and every model is faster without:
            transformers reads a mask's values on the host, which then waits for the device.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = special_ids(config)
    special.setdefault("eos", 0)
    special.setdefault("pad", special["eos"])
    word = {token: f"<|{token}|>" for token in special.values()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({text: token for token, text in word.items()})),
        model_input_names=["input_ids", "attention_mask"] if with_mask else ["input_ids"],
        **{f"{name}_token": word[token] for name, token in special.items()},
    )
