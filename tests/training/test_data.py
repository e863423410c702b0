"""The embedded corpus, dataset loading, the tokenizer and prompt masking."""

import copy
import json
import sys

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from liger_trainer.training import data


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"What does `f{i}` do? Return the value of item number {i}." for i in range(50)]
    return data.train_tokenizer(iter(texts), 300)


@pytest.mark.parametrize(
    ("modules", "at_least"),
    [({"json", "email", "shutil"}, 50), pytest.param(sys.stdlib_module_names, 2000, marks=pytest.mark.long)],
    ids=["three modules", "all"],
)
def test_standard_library_alone_gives_a_corpus(modules, at_least, monkeypatch):
    monkeypatch.setattr(data, "PACKAGES", ())
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset(modules))
    pairs = data.embedded_pairs()
    assert len(pairs) > at_least
    (dumps,) = (pair["completion"] for pair in pairs if pair["prompt"] == "What does `json.dumps` do?")
    assert dumps.startswith("Serialize")
    answers = [pair["completion"] for pair in pairs]
    assert len(set(answers)) == len(answers)
    assert all(len(answer) in data.ANSWER_LENGTH and "\n" not in answer for answer in answers)
    names = [pair["prompt"].split("`")[1] for pair in pairs]
    assert not any(part.startswith("_") for name in names for part in name.split("."))
    monkeypatch.setattr(data, "FILES_PER_PACKAGE", 1)
    assert data.embedded_pairs() == data.embedded_pairs() != pairs


def test_broken_source_files_are_passed_over(tmp_path, monkeypatch):
    package = tmp_path / "pack"
    package.mkdir()
    (package / "broken.py").write_text("def f(:")
    (package / "fine.py").write_text(
        'class Box:\n    """A box that holds a number of things."""\n'
        '    def put(self):\n        """Put one more thing in the box,\n        at its top.\n\n        More."""\n'
        '    def _hidden(self):\n        """Never shown to anyone at all, ever."""\n'
    )
    monkeypatch.setattr(data, "PACKAGES", ("pack",))
    monkeypatch.setattr(data.sys, "stdlib_module_names", frozenset())
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    assert data.embedded_pairs() == [
        {"prompt": "What does `pack.fine.Box` do?", "completion": "A box that holds a number of things."},
        {"prompt": "What does `pack.fine.Box.put` do?", "completion": "Put one more thing in the box, at its top."},
    ]


@pytest.mark.parametrize(("split", "numbers"), [("train", range(10)), ("train[2:4]", [2, 3]), ("train[80%:]", [8, 9])])
def test_in_memory_slices(split, numbers):
    pairs = [{"prompt": str(i), "completion": "x"} for i in range(10)]
    assert data.in_memory(pairs, split)["prompt"] == [str(i) for i in numbers]


@pytest.mark.parametrize("split", ["test", "train[", "train+train"])
def test_in_memory_rejects_other_splits(split):
    with pytest.raises(ValueError, match="dataset_split"):
        data.in_memory([{"prompt": "a", "completion": "b"}], split)


def write_rows(path, rows):
    """``rows`` as a file of the format that the suffix of ``path`` says; its path as text."""
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(str(path))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_files(tmp_path, suffix, streaming):
    path = write_rows(tmp_path / f"data{suffix}", [{"question": f"q{i}", "answer": f"a{i}", "id": i} for i in range(4)])
    split = "train" if streaming else "train[:3]"
    dataset = data.select_columns(data.load(path, None, split, streaming), None, "question", "answer")
    assert list(dataset)[:3] == [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]
    assert len(list(dataset)) == (4 if streaming else 3)
    assert len(list(data.load(str(tmp_path), None, "train", streaming))) == 4


TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
PAIR = {"prompt": "Why?", "completion": "So."}
FORMS = {
    "messages": ({"messages": TURNS, "id": 1}, {"messages": TURNS}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "source": "web"},
        {"messages": TURNS},
    ),
    "sharegpt with roles": ({"conversations": TURNS}, {"messages": TURNS}),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, {"prompt": "Add.\n\n1 2", "completion": "3"}),
    "alpaca without input": ({"instruction": "Why?", "input": None, "output": "So."}, PAIR),
    "alpaca of two columns": ({"instruction": "Why?", "output": "So."}, PAIR),
    "pair": ({**PAIR, "text": "other"}, PAIR),
    "text": ({"text": "Why? So.", "id": 1}, {"text": "Why? So."}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streaming", [False, True])
def test_forms_of_rows(tmp_path, form, streaming):
    row, expected = FORMS[form]
    path = write_rows(tmp_path / "rows.jsonl", [row, row])
    assert list(data.select_columns(data.load(path, streaming=streaming), None, None, None)) == [expected] * 2


def test_empty_cells_of_alpaca_in_csv(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [{"instruction": "Why?", "input": "", "output": "So."}])
    assert list(data.select_columns(data.load(path), None, None, None)) == [PAIR]


def test_streams_have_no_slices_and_no_empty_files(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [PAIR])
    with pytest.raises(ValueError, match=r"dataset_split 'train\[:1\]'"):
        data.load(path, split="train[:1]", streaming=True)
    (tmp_path / "empty.csv").write_text("prompt,completion\n")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"has no rows|corresponds to no data"):
            data.load(str(tmp_path / "empty.csv"), streaming=streaming)


def test_load_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no such file.*missing\.jsonl"):
        data.load(str(tmp_path / "missing.jsonl"))
    (tmp_path / "data.xls").write_text("a,b")
    with pytest.raises(ValueError, match=r"data\.xls.*\.jsonl"):
        data.load(str(tmp_path / "data.xls"))


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ("ab", (None, "a", None), "go together"),
        ("ab", ("a", "a", "b"), "not both"),
        ("ab", (None, "a", "c"), "no column 'c'"),
        ("ab", (None, None, None), "prompt_column"),
    ],
)
def test_column_errors(columns, arguments, message):
    dataset = Dataset.from_dict({name: ["x"] for name in columns})
    with pytest.raises(ValueError, match=message):
        data.select_columns(dataset, *arguments)


def test_columns_are_found_by_their_standard_names():
    pair = Dataset.from_dict({"text": ["t"], "completion": ["c"], "prompt": ["p"]})
    assert data.select_columns(pair, None, None, None).to_list() == [{"prompt": "p", "completion": "c"}]
    assert data.select_columns(pair, "prompt", None, None).to_list() == [{"text": "p"}]
    assert data.select_columns(pair.select_columns("text"), None, None, None).to_list() == [{"text": "t"}]
    message = {"role": "user", "content": "hello"}
    chat = data.select_columns(Dataset.from_dict({"id": [1], "messages": [[message]]}), None, None, None)
    assert chat.to_list() == [{"messages": [message]}]
    assert list(data.texts(chat)) == ["hello"]
    assert list(data.texts(pair)) == ["t", "c", "p"]


def test_tokenizer_round_trip(tokenizer):
    text = "def f(x):\n    return x  # 2 \u00b5s, \u6587\u5b57"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    with pytest.raises(ValueError, match="vocab_size: got 100; must be at least 261"):
        data.train_tokenizer(iter(["a"]), 100)


def test_every_token_of_a_chat_has_loss(tokenizer):
    encoded = data.encode({"messages": TURNS}, tokenizer, 1000)
    assert tokenizer.decode(encoded["input_ids"]) == "<|begin|><|user|>Why?<|assistant|>So.<|end|>"
    assert encoded["labels"] == encoded["input_ids"]


@pytest.mark.parametrize("form", ["strings", "messages", "text"])
def test_encode(tokenizer, form):
    example = {"prompt": "What does `f` do?", "completion": "Return the value."}
    if form == "messages":
        example = data.as_messages(example)
    elif form == "text":
        example = {"text": "Return the value."}
    encoded = data.encode(example, tokenizer, 1000)
    trained = [label for label in encoded["labels"] if label != -100]
    assert encoded["input_ids"][-len(trained) :] == trained
    assert tokenizer.decode(trained) == "Return the value.<|end|>"
    assert encoded["labels"][: -len(trained)] == [-100] * (len(encoded["labels"]) - len(trained))
    if form == "messages":
        whole = "<|begin|><|user|>What does `f` do?<|assistant|>Return the value.<|end|>"
        assert tokenizer.decode(encoded["input_ids"]) == whole
    for length in (3, len(encoded["labels"]) - 2):
        cut = data.encode(example, tokenizer, length)
        assert cut == {key: values[:length] for key, values in encoded.items()}


def test_encode_has_one_end_if_the_tokenizer_adds_its_own(tokenizer):
    ending = copy.deepcopy(tokenizer)
    end = ("<|end|>", tokenizer.eos_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[end])
    assert ending("a")["input_ids"][-1] == tokenizer.eos_token_id
    for example in ({"prompt": "Why?", "completion": "So."}, {"text": "So."}):
        assert data.encode(example, ending, 100) == data.encode(example, tokenizer, 100)
    ended = {"text": "So.<|end|>"}
    assert data.encode(ended, tokenizer, 100) == data.encode({"text": "So."}, tokenizer, 100)


def test_encode_rejects_what_it_cannot_mask(tokenizer):
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="chat template"):
        data.encode(data.as_messages({"prompt": "p", "completion": "c"}), odd, 10)
