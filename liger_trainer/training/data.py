"""Training data: an instruction corpus built from docstrings, dataset loading, a BPE tokenizer, prompt masking."""

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from .errors import RecipeError

EMBEDDED = "embedded"
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# The standard library is always there; the others add pairs where they are installed.
PACKAGES = ("numpy", "pandas", "torch", "datasets", "accelerate", "trl", "transformers")
FILES_PER_PACKAGE = 200  # bounds the scan to a few seconds
ANSWER_LENGTH = range(30, 401)  # characters; the rest is stubs ("See base class.") or essays
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '<|assistant|>' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def embedded_pairs(show_progress: bool = False) -> list[dict[str, str]]:
    """Instruction pairs from the docstrings of the standard library and of installed packages.

    Source files are parsed, not imported, in sorted order: the same installation gives the same list. An answer is the
    first paragraph of a docstring, on one line; an answer seen before is left out.

    Args:
        show_progress: show a bar over the files.

    Returns:
        ``{"prompt": "What does `json.dumps` do?", "completion": "Serialize ..."}``, thousands of them.
    """
    pairs, seen = [], set()
    for path, module in tqdm(list(_sources()), desc="Reading docstrings", unit="file", disable=not show_progress):
        for name, docstring in _docstrings(path, module):
            answer = " ".join(docstring.split("\n\n")[0].split())
            if len(answer) in ANSWER_LENGTH and answer.isascii() and answer not in seen:
                seen.add(answer)
                pairs.append({"prompt": f"What does `{name}` do?", "completion": answer})
    return pairs


def _sources() -> Iterator[tuple[Path, str]]:
    """Source files and the modules they define, leaving out private modules and tests."""
    site = Path(sysconfig.get_path("purelib"))
    stdlib = Path(sysconfig.get_path("stdlib"))
    roots = [stdlib / name for name in sorted(sys.stdlib_module_names)] + [site / name for name in PACKAGES]
    for root in roots:
        if root.is_dir():
            files = sorted(root.rglob("*.py"))
        else:
            files = [file for file in [root.with_suffix(".py")] if file.is_file()]
        public = []
        for file in files:
            parts = file.relative_to(root.parent).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") or "test" in part for part in parts):
                public.append((file, ".".join(parts)))
        yield from public[:FILES_PER_PACKAGE]


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings of the public functions, classes and methods of a source file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples of other Python versions
            return
    todo = [(module, node) for node in tree.body]
    while todo:
        prefix, node = todo.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            if docstring := ast.get_docstring(node):
                yield name, docstring
            if isinstance(node, ast.ClassDef):
                todo += [(name, child) for child in node.body]


def load(source: str, config: str | None = None, split: str = "train"):
    """A ``datasets.Dataset`` from a hub name or a local file.

    Args:
        source: a dataset's name on the hub, or the path of a ``.json``, ``.jsonl`` or ``.parquet`` file.
        config: name of the dataset's configuration.
        split: split or slice, such as ``train[:1%]``.

    Raises:
        RecipeError: the file does not exist, or its format is not one of those above.
    """
    from datasets import load_dataset

    path = Path(source)
    if path.suffix in READERS:
        if not path.is_file():
            raise RecipeError(f"dataset: no such file: {source!r}")
        return load_dataset(READERS[path.suffix], data_files=str(path), split=split)
    if path.exists():
        raise RecipeError(f"dataset: {source!r} is not one of the formats read: {', '.join(READERS)}")
    return load_dataset(source, config, split=split)


def in_memory(pairs: list[dict[str, str]], split: str):
    """``pairs`` as a ``datasets.Dataset``, or a slice of it, such as ``train[:1000]`` or ``train[50%:]``.

    Raises:
        RecipeError: a split that is no slice of ``train``.
    """
    from datasets import Dataset, ReadInstruction

    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({"train": len(pairs)})
    except (ValueError, AssertionError) as error:
        raise RecipeError(f"dataset_split: {split!r} is not `train` or one slice of it: {error}") from error
    return Dataset.from_list(pairs[part.from_ : part.to])


def select_columns(dataset, text_column: str | None, prompt_column: str | None, completion_column: str | None):
    """``dataset`` with ``prompt`` and ``completion``, or ``text``, or ``messages`` as its only columns.

    Columns not named are looked for under their standard names, in this order.

    Raises:
        RecipeError: a named column that is not there, half a pair, both forms, or no form to be found.
    """
    if (prompt_column is None) != (completion_column is None):
        raise RecipeError(
            f"prompt_column and completion_column go together, got {prompt_column!r} and {completion_column!r}"
        )
    if text_column is not None and prompt_column is not None:
        raise RecipeError(
            f"give text_column or prompt_column and completion_column, not both: got {text_column!r}, {prompt_column!r}"
        )
    columns = dataset.column_names
    if text_column is not None:
        names = {text_column: "text"}
    elif prompt_column is not None:
        names = {prompt_column: "prompt", completion_column: "completion"}
    elif {"prompt", "completion"} <= set(columns):
        names = {"prompt": "prompt", "completion": "completion"}
    elif standard := [name for name in ("text", "messages") if name in columns]:
        names = {standard[0]: standard[0]}
    else:
        raise RecipeError(
            f"dataset has the columns {columns}, but not prompt and completion, text, or messages: "
            "name them with prompt_column and completion_column, or text_column"
        )
    if missing := [name for name in names if name not in columns]:
        raise RecipeError(f"dataset has no column {missing[0]!r}: its columns are {columns}")
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def texts(dataset) -> Iterator[str]:
    """All text of a dataset of strings and messages."""
    for example in dataset:
        for value in example.values():
            yield from [value] if isinstance(value, str) else [message["content"] for message in value]


def train_tokenizer(corpus: Iterator[str], vocab_size: int):
    """A byte-level BPE tokenizer with begin, end, padding and chat tokens and a chat template.

    Args:
        corpus: texts to learn the merges from.
        vocab_size: size of the vocabulary, special tokens included; a small corpus gives fewer.

    Returns:
        A ``PreTrainedTokenizerFast``.

    Raises:
        RecipeError: ``vocab_size`` below the 256 bytes and 5 special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    if vocab_size < 256 + len(special):
        raise RecipeError(f"vocab_size must be at least {256 + len(special)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    begin, end, pad, *chat = special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        additional_special_tokens=chat,
        chat_template=TEMPLATE,
    )


def split_at(example: dict, marker: str) -> dict[str, str]:
    """``text`` as a prompt, up to and with the first ``marker``, and the answer after it.

    Raises:
        RecipeError: a text without ``marker``.
    """
    before, found, after = example["text"].partition(marker)
    if not found:
        raise RecipeError(f"response_marker: {marker!r} is not in every text, such as {example['text'][:200]!r}")
    return {"prompt": before + found, "completion": after}


def as_messages(example: dict) -> dict:
    """A string pair as the conversational one that chat templates and TRL take."""
    return {
        "prompt": [{"role": "user", "content": example["prompt"]}],
        "completion": [{"role": "assistant", "content": example["completion"]}],
    }


def encode(example: dict, tokenizer, max_length: int) -> dict[str, list[int]]:
    """Token ids and labels of one example, cut to ``max_length``.

    Args:
        example: ``prompt`` and ``completion``, both strings or both lists of messages, or ``text``.
        tokenizer: one with a chat template if the pair is of messages.
        max_length: tokens kept.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``; the prompt's labels are -100, so the loss is the answer's.

    Raises:
        RecipeError: the example is one of ``messages``; the chat template gives the prompt alone other tokens than the
            prompt before its answer.
    """
    if "messages" in example:
        raise RecipeError("a dataset of messages needs trainer: sft, or prompt_column and completion_column")
    if "text" in example:
        ids, start = [*tokenizer(example["text"])["input_ids"], tokenizer.eos_token_id], 0
    elif isinstance(example["prompt"], str):
        prompt = tokenizer(example["prompt"])["input_ids"]
        ids = prompt + tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
        ids, start = [*ids, tokenizer.eos_token_id], len(prompt)
    else:
        prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(example["prompt"] + example["completion"])["input_ids"]
        start = len(prompt)
        if ids[:start] != prompt:
            raise RecipeError(
                "the tokenizer's chat template renders a prompt differently before an answer than alone, so the "
                "prompt cannot be masked: use trainer: sft, or a text_column"
            )
    ids = ids[:max_length]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [-100] * min(start, len(ids)) + ids[start:],
    }
