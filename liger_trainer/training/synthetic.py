"""Rows of random token ids in place of a dataset: speed and memory depend on the rows' lengths, not on their words.

The table of Alpaca's lengths comes from 122 rows of `data/alpaca_5000.json` in the repository
`tatsu-lab/stanford_alpaca`: all whole rows within 16,000 characters from each of the offsets 0, 700,000 and 1,500,000.
35 % of them have an input. Instruction, input and output take 59 + 22 + 254 = 335 bytes on average, with a standard
error of 25. Two figures for all rows serve as a check. First, the published size is 47,764,738 bytes for 52,002 rows of
these three columns and `text`, which repeats them in a template of 140 bytes (205 with an input). That is 369 bytes per
row (without 16 bytes of Arrow's offsets). Second, the file of 5,000 rows has 361 characters per row. The sample's
lengths were therefore scaled by 370 / 335. A token is assumed to have 4.4 bytes, as with a BPE vocabulary of about
100,000 on English. One token is added for the begin (prompt) or the end (answer). The prompt is `text` up to the
answer, including the template.

A table of quantiles is used because a log-normal does not fit: fitted to the answers it has a mean of 364 bytes, and
the sample's mean is 254. The rows drawn have 58 prompt and 65 answer tokens on average. Above the 99 % quantile the
table depends on a single row, and so does the padding of a batch, which its longest row decides. Prompt and answer are
drawn independently, although the logarithms of their lengths have a correlation of -0.18.
"""

from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from ..kernels.reference import IGNORE_INDEX
from .recipe_arguments import SYNTHETIC, SYNTHETIC_LENGTHS, RecipeError, require_one_of

# Cumulative shares, and the numbers of tokens of Alpaca's prompts and answers at these quantiles.
SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
PROMPT_TOKENS = (39, 42, 43, 45, 50, 66, 78, 83, 99, 377)
ANSWER_TOKENS = (2, 4, 7, 13, 41, 106, 143, 186, 241, 355)


def rows(lengths: str, examples: int, max_length: int | None, config: PreTrainedConfig, seed: int) -> Dataset:
    """A dataset of random token ids, ready for a collator.

    Args:
        lengths: ``full``: every row has ``max_length`` tokens, and each is a label. ``ragged``: every second row has
            one token less, so that two consecutive rows make a batch with padding. ``alpaca``: lengths are drawn by
            ``alpaca_lengths``, and the labels of the prompt are -100.
        examples: number of rows.
        max_length: maximum number of tokens per row.
        config: the model's config. Ids are uniform over its vocabulary without its special tokens.
        seed: the same seed gives the same rows on every process.

    Returns:
        A dataset in memory with ``input_ids`` and ``labels``.

    Raises:
        RecipeError: ``lengths`` is unknown, ``max_length`` is ``None`` or below 2 (the first token of a row has no
            loss), or there are more tokens than an Arrow column can address.
    """
    require_one_of(lengths, "synthetic_lengths", SYNTHETIC_LENGTHS)
    if max_length is None or max_length < 2:
        raise RecipeError(f"max_length: got {max_length}; must be at least 2 with dataset: {SYNTHETIC}")
    generator = np.random.default_rng(seed)
    prompt, total = np.zeros(examples, np.int64), np.full(examples, max_length)
    if lengths == "ragged":
        total[1::2] = max(max_length - 1, 2)  # a row of one token has no loss
    elif lengths == "alpaca":
        prompt, total = alpaca_lengths(examples, max_length, generator)
    ends = np.cumsum(total)
    if ends[-1] >= 2**31:
        raise RecipeError(
            f"synthetic_examples: got {examples}, which are {ends[-1]:,} tokens with {lengths} lengths and max_length "
            f"{max_length}; must be at most {2**31 - 1:,} tokens"
        )
    ids = random_ids(int(ends[-1]), config, generator)
    offsets = pyarrow.array(np.concatenate([[0], ends]), pyarrow.int32())
    columns = {"input_ids": pyarrow.ListArray.from_arrays(offsets, ids)}
    if prompt.any():
        labels = ids.copy()
        labels[np.arange(ends[-1]) < np.repeat(ends - total + prompt, total)] = IGNORE_INDEX
        columns["labels"] = pyarrow.ListArray.from_arrays(offsets, labels)
    else:
        columns["labels"] = columns["input_ids"]  # one buffer for both
    # Made from what determines the rows, because the default fingerprint hashes all the data.
    fingerprint = f"synthetic-{lengths}-{examples}-{max_length}-{config.get_text_config().vocab_size}-{seed}"
    return Dataset(pyarrow.table(columns), fingerprint=fingerprint)


def alpaca_lengths(examples: int, max_length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of tokens in the prompt and in the whole row, two int64 arrays, distributed like Alpaca's.

    They are drawn by linear interpolation in the tables above. Rows are cut to ``max_length`` and prompts to one token
    less, so that every row has a label.
    """
    prompt, answer = (
        np.rint(np.interp(generator.random(examples), SHARES, tokens)).astype(np.int64)
        for tokens in (PROMPT_TOKENS, ANSWER_TOKENS)
    )
    prompt = np.minimum(prompt, max_length - 1)
    return prompt, np.minimum(prompt + answer, max_length)


def special_ids(config: PreTrainedConfig) -> dict[str, int]:
    """The ``bos``, ``eos`` and ``pad`` ids that the config has; of a list, the first."""
    text_config: Any = config.get_text_config()
    found = {}
    for name in ("bos", "eos", "pad"):
        token = getattr(text_config, f"{name}_token_id", None)
        token = token[0] if isinstance(token, list | tuple) else token
        if token is not None and 0 <= token < text_config.vocab_size:
            found[name] = token
    return found


def random_ids(count: int, config: Any, generator: np.random.Generator) -> np.ndarray:
    """``count`` int32 ids, uniform over the vocabulary without ``special_ids``."""
    special = sorted(set(special_ids(config).values()))
    ids = generator.integers(0, config.get_text_config().vocab_size - len(special), count, dtype=np.int32)
    for token in special:  # in ascending order, each makes room for itself
        ids += ids >= token
    return ids


def padding_tokenizer(config: PreTrainedConfig, with_mask: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer that knows only the config's special tokens, with which collators and TRL's trainers pad.

    Args:
        config: the model's config.
        with_mask: give an ``attention_mask``. Batches without padding need none, and models are faster without it:
            transformers reads the values of a mask on the host, which then waits for the device.
    """
    special = special_ids(config)
    special.setdefault("eos", 0)
    special.setdefault("pad", special["eos"])
    word = {token: f"<|{token}|>" for token in special.values()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({text: token for token, text in word.items()})),
        model_input_names=["input_ids", "attention_mask"] if with_mask else ["input_ids"],
        **{f"{name}_token": word[token] for name, token in special.items()},
    )
