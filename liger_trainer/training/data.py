"""Training data: a corpus from docstrings, datasets in the forms that people have, a BPE tokenizer, prompt masking."""

import ast
import json
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast
from trl.data_utils import get_dataset_column_names

from ..kernels.reference import IGNORE_INDEX
from .recipe_arguments import READERS, RecipeError, require

# Beside the standard library, packages that add pairs if they are installed.
PACKAGES = ("numpy", "pandas", "torch", "datasets", "accelerate", "trl", "transformers")
FILES_PER_PACKAGE = 200  # bounds the scan to a few seconds
ANSWER_LENGTH = range(30, 401)  # characters; anything else is a stub ("See base class.") or an essay
# The columns of each form, and those of them whose values may be null. The first form that a dataset has is taken.
FORMS = (("prompt", "completion"), ("text",), ("messages",), ("conversations",), ("instruction", "input", "output"))
OPTIONAL = ("input",)
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names, and those of chat templates
SHUFFLE_BUFFER = 1000  # rows
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def embedded_pairs(show_progress: bool = False) -> list[dict[str, str]]:
    """Instruction pairs from the docstrings of the standard library and of installed packages.

    Source files are parsed, not imported, in sorted order, so the same installation gives the same list. An answer is
    the first paragraph of a docstring on one line. Duplicate answers are dropped.

    Args:
        show_progress: show a progress bar.

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
    """Source files and the names of their modules, without private modules and tests."""
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
        warnings.simplefilter("ignore")  # about invalid escapes in other people's code
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates, and samples for other Python versions
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


def load(
    source: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """A dataset from the hub, or a local file or folder.

    Args:
        source: name of a dataset on the hub, path of a ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file,
            or a folder of such files.
        config: name of the dataset's configuration.
        split: split or slice, such as ``train[:1%]``. A stream has no slices.
        streaming: read rows when they are used.

    Raises:
        RecipeError: the file does not exist, is empty, broken or has another format, or there is no such split.
    """
    path = Path(source)
    if path.suffix in READERS:
        if not path.is_file():
            raise RecipeError(f"dataset: no such file: {source!r}")
        if path.stat().st_size == 0:
            raise RecipeError(f"dataset: {source!r} is empty")
        arguments: dict[str, Any] = {"path": READERS[path.suffix], "data_files": source}
    else:
        allowed = f"a name on the hub, a folder, or a file of the formats {', '.join(READERS)}"
        require(not path.is_file(), "dataset", source, allowed)
        arguments = {"path": source, "name": config}
    try:
        dataset = load_dataset(**arguments, split=split, streaming=streaming)
    except ValueError as error:
        raise RecipeError(f"dataset: {source!r} with dataset_split {split!r}: {error}") from error
    except DatasetGenerationError as error:
        if not isinstance(error.__cause__, ValueError | TypeError):  # such as a full disk
            raise
        raise RecipeError(f"dataset: {source!r} cannot be read: {_broken_line(path) or error.__cause__}") from error
    if next(iter(dataset), None) is None:
        raise RecipeError(f"dataset: {source!r} with dataset_split {split!r} has no rows")
    return dataset


def _broken_line(path: Path) -> str | None:
    """The first line of a ``.jsonl`` file that is not JSON."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip():
                        json.loads(line)
                except json.JSONDecodeError as error:
                    return f"line {number}: {error.msg} at column {error.colno}"
    return None


def in_memory(pairs: list[dict[str, str]], split: str) -> Dataset:
    """``pairs`` as a dataset, or a slice of them, such as ``train[:1000]`` or ``train[50%:]``.

    Raises:
        RecipeError: ``split`` is not a slice of ``train``.
    """
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({"train": len(pairs)})
    except (ValueError, AssertionError) as error:
        raise RecipeError(f"dataset_split: got {split!r}; must be 'train' or a slice of it: {error}") from error
    return Dataset.from_list(pairs[part.from_ : part.to])


def select_columns(
    dataset: Dataset | IterableDataset,
    text_column: str | None,
    prompt_column: str | None,
    completion_column: str | None,
) -> Dataset | IterableDataset:
    """``dataset`` with only the columns ``prompt`` and ``completion``, or ``text``, or ``messages``.

    If no column is named, the forms of ``FORMS`` are tried in their order. ShareGPT's ``conversations`` become
    ``messages``. Alpaca's ``instruction`` and ``input`` become ``prompt``, and its ``output`` ``completion``.

    Raises:
        RecipeError: a named column is missing, only one of a pair is named, both forms are, no form is found, or a
            value is null. The values of a stream are not checked.
    """
    if (prompt_column is None) != (completion_column is None):
        raise RecipeError(
            f"prompt_column and completion_column go together; got {prompt_column!r} and {completion_column!r}"
        )
    if text_column is not None and prompt_column is not None:
        raise RecipeError(
            f"give text_column or prompt_column and completion_column, not both: got {text_column!r}, {prompt_column!r}"
        )
    columns = get_dataset_column_names(dataset)
    if text_column is not None:
        names = {text_column: "text"}
    elif prompt_column is not None:
        names = {prompt_column: "prompt", completion_column: "completion"}
    elif forms := [form for form in FORMS if set(form) - set(OPTIONAL) <= set(columns)]:
        names = {name: name for name in forms[0] if name in columns}
    else:
        raise RecipeError(
            f"dataset has the columns {columns}, but not prompt and completion, text, messages, conversations, or "
            "instruction and output: name them with prompt_column and completion_column, or text_column"
        )
    if missing := [name for name in names if name not in columns]:
        raise RecipeError(f"dataset has no column {missing[0]!r}: its columns are {columns}")
    for name in set(names) - set(OPTIONAL):
        values = dataset.data.column(name) if isinstance(dataset, Dataset) else None
        if values is not None and values.null_count:
            row = values.is_null().index(True).as_py() + 1
            raise RecipeError(f"dataset: row {row} has null in column {name!r}; must be text or messages")
    dataset = dataset.select_columns(list(names))
    if "conversations" in names:
        return mapped(dataset, from_sharegpt, "Reading conversations", remove_columns=list(names))
    if "instruction" in names:
        return mapped(dataset, from_alpaca, "Joining instruction and input", remove_columns=list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def mapped(
    dataset: Dataset | IterableDataset, function: Callable[..., Any], about: str, **options: Any
) -> Dataset | IterableDataset:
    """``dataset.map(function)``, with a progress bar named ``about`` unless ``dataset`` is a stream."""
    if isinstance(dataset, Dataset):
        options["desc"] = about
    return dataset.map(function, **options)


def filtered(dataset: Dataset | IterableDataset, function: Callable[..., bool], about: str) -> Any:
    """``dataset.filter(function)``, with a progress bar as in ``mapped``."""
    return dataset.filter(function, desc=about) if isinstance(dataset, Dataset) else dataset.filter(function)


def from_sharegpt(example: dict[str, Any]) -> dict[str, Any]:
    """``conversations`` as ``messages``. Each turn has ``from`` and ``value``, or already ``role`` and ``content``."""
    turns = [
        (turn.get("from") or turn["role"], turn["content"] if turn.get("value") is None else turn["value"])
        for turn in example["conversations"]
    ]
    return {"messages": [{"role": ROLES.get(role, role), "content": content} for role, content in turns]}


def from_alpaca(example: dict[str, Any]) -> dict[str, str]:
    """An instruction and its input, if there is one, as ``prompt``, and the output as ``completion``."""
    parts = [example["instruction"], example.get("input")]
    return {"prompt": "\n\n".join(part for part in parts if part), "completion": example["output"]}


def texts(dataset: Dataset | IterableDataset) -> Iterator[str]:
    """All text of a dataset of strings and messages."""
    for example in dataset:
        for value in dict(example).values():
            yield from [value] if isinstance(value, str) else [message["content"] for message in value]


def train_tokenizer(corpus: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with begin, end, padding and chat tokens and a chat template.

    Args:
        corpus: texts to learn the merges from.
        vocab_size: maximum size of the vocabulary, special tokens included.

    Raises:
        RecipeError: ``vocab_size`` is less than the 256 bytes and 5 special tokens.
    """
    special = ["<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    require(vocab_size >= 256 + len(special), "vocab_size", vocab_size, f"at least {256 + len(special)}")
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


def split_at(example: dict[str, str], marker: str) -> dict[str, str]:
    """Split ``text`` after the first ``marker`` into a prompt and an answer.

    Raises:
        RecipeError: the text lacks ``marker``.
    """
    before, found, after = example["text"].partition(marker)
    if not found:
        raise RecipeError(f"response_marker: {marker!r} is not in every text, such as {example['text'][:200]!r}")
    return {"prompt": before + found, "completion": after}


def as_messages(example: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """A pair of strings in the conversational form that chat templates and TRL take."""
    return {
        "prompt": [{"role": "user", "content": example["prompt"]}],
        "completion": [{"role": "assistant", "content": example["completion"]}],
    }


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """``ids`` with one end token, which some tokenizers and some texts have already."""
    end = tokenizer.eos_token_id
    return ids if ids[-1:] == [end] else [*ids, end]


def encode(example: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Token ids and labels of one example, cut to ``max_length``.

    Args:
        example: ``prompt`` and ``completion``, both strings or both lists of messages, or ``messages``, or ``text``.
        tokenizer: must have a chat template for messages.
        max_length: maximum number of tokens.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``. The prompt's labels are -100, so only the answer has loss.

    Raises:
        RecipeError: the chat template renders the prompt alone differently from the prompt before its answer.
    """
    if "messages" in example:
        ids, start = tokenizer.apply_chat_template(example["messages"])["input_ids"], 0
    elif "text" in example:
        ids, start = _ended(tokenizer(example["text"])["input_ids"], tokenizer), 0
    elif isinstance(example["prompt"], str):
        prompt = tokenizer(example["prompt"])["input_ids"]
        if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:  # it ends every text
            prompt = prompt[:-1]
        completion = tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
        ids, start = prompt + _ended(completion, tokenizer), len(prompt)
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
        "labels": [IGNORE_INDEX] * min(start, len(ids)) + ids[start:],
    }
