"""README and docs: their Python runs, their commands exist, and their recipes, flags, files and extras are right.

A page's Python blocks run one after the other, in a folder where the names of models and datasets are tiny local ones.
``<!-- not run: REASON -->`` above a block leaves it out.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tiny_models import tiny_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from liger_trainer.cli import main
from liger_trainer.training import data, train
from liger_trainer.training.recipe import parse_recipe
from liger_trainer.training.shipped import recipe_file

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {"paper.md", "models.md", "architecture.md", "layout_questions.md"}  # of the project, not for users
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in NOTEBOOKS)]
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OWN_FILES = {"my_recipe.yaml": "quickstart"}  # of a reader's, in examples
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]}
    for word in ("one", "two", "three", "four")
]
DATASETS = {
    "trl-lib/Capybara": CHATS,
    "trl-lib/ultrafeedback_binarized": [
        {
            "chosen": chat["messages"],
            "rejected": [chat["messages"][0], {"role": "assistant", "content": "No."}],
        }
        for chat in CHATS
    ],
    "trl-lib/ultrafeedback-prompt": [{"prompt": chat["messages"][:1]} for chat in CHATS],
}


def blocks(page, language):
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for skipped, kind, code in found if kind == language and not skipped]


def pages_with(language):
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, language)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working directory with folders that have the names of models and datasets on the hub."""
    monkeypatch.chdir(tmp_path)
    # TRL trains in bf16 by default, which transformers refuses without a GPU although CPUs can do it.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    tokenizer = data.train_tokenizer((message["content"] for chat in CHATS for message in chat["messages"]), 300)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained("Qwen/Qwen3-0.6B")
    tokenizer.save_pretrained("Qwen/Qwen3-0.6B")
    for name, rows in DATASETS.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = torch.arange(3, 15).reshape(2, 6).tolist()
    return {
        "model": tiny_model("llama"),
        "dataset": Dataset.from_dict({"input_ids": ids, "labels": ids}),
        "pairs": Dataset.from_list(DATASETS["trl-lib/ultrafeedback_binarized"]),
    }


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page, hub):
    for code in blocks(page, "python"):
        exec(code, hub)


def commands(page):
    """The commands of a page's bash blocks, as lists of words."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def check_recipe(words, tmp_path):
    """Words from the recipe on: they parse as those of a run."""
    path, *flags = words
    content = yaml.safe_load(recipe_file(OWN_FILES.get(path, path)).read_text(encoding="utf-8"))
    copied = tmp_path / "recipe.yaml"
    quantised = "--load_in_4bit" in flags  # transformers looks for a GPU
    flags = [word for word in flags if not (quantised and word in ("--load_in_4bit", "true"))]
    copied.write_text(yaml.safe_dump(content))
    parse_recipe([str(copied), *flags, "--output_dir", str(tmp_path / "out")])


def check_launch(words, tmp_path):
    """``accelerate launch --config_file FILE ... -m liger_trainer.train RECIPE ...``."""
    at = words.index("-m")
    options, (module, *run) = words[:at], words[at + 1 :]
    assert module == "liger_trainer.train"
    assert (ROOT / options[options.index("--config_file") + 1]).is_file()
    check_recipe(run, tmp_path)


def check_own_command(words, tmp_path, capsys):
    """``liger-trainer SUBCOMMAND ...``: those that are quick run, and of others the arguments are read."""
    command, *rest = words[1:]
    if command == "train" and rest != ["--help"]:
        check_recipe(rest, tmp_path)
    elif command == "fit":
        own = ("--config_file", "--num_processes", "--json", "--max_batch", "--resolution")
        flags = rest[1:]
        kept = [word for i, word in enumerate(flags) if word not in own and (i == 0 or flags[i - 1] not in own)]
        check_recipe([rest[0], *kept], tmp_path)
    elif command == "bench":
        if rest[0] == "train":
            assert (ROOT / "benchmarks" / "suites" / f"{rest[1]}.yaml").is_file()
        assert (ROOT / "benchmarks" / f"{rest[0]}.py").is_file()
    elif command == "plot":
        assert all((ROOT / path).parent.is_dir() for path in rest if path != "--update")
    else:
        with pytest.raises(SystemExit) as ended:
            main([command, *rest])
        assert not ended.value.code, capsys.readouterr().err
        assert capsys.readouterr().out


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_are_right(page, hub, tmp_path, capsys):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for words in commands(page):
        match words:
            case ["accelerate", "launch", *_]:
                check_launch(words, tmp_path)
            case ["liger-trainer", *_]:
                check_own_command(words, tmp_path, capsys)
            case ["make", target, *_]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            case ["pip", "install", *rest]:
                target = rest[-1]
                assert target.startswith(".")
                assert target == "." or set(target[2:-1].split(",")) <= set(extras)
            case ["python", file, *_]:
                assert (ROOT / file).is_file()
            case ["git", "clone", *_] | ["cd", _] | ["source", ".venv/bin/activate"]:
                pass
            case _:
                pytest.fail(f"{page.name}: no test knows the command {shlex.join(words)}")


SMALL = ["--max_steps", "1", "--use_cpu", "true", "--bf16", "false", "--sample_prompt", "null", "--max_length", "64"]
RUNS = [words for page in PAGES for words in commands(page) if words[:3] == ["liger-trainer", "train", "sft_lora"]]


@pytest.mark.parametrize("words", [words for words in RUNS if "--load_in_4bit" not in words], ids=shlex.join)
def test_commands_train(words, hub, tmp_path):
    """One step of the commands whose model is among the tiny local ones."""
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    (tmp_path / "Qwen" / "Qwen3-1.7B").symlink_to("Qwen3-0.6B")
    train.main([*words[2:], *SMALL])
    assert list((tmp_path / "out").rglob("*.safetensors"))


def test_losses_improve(hub):
    """The loop of docs/losses.md trains."""
    for code in blocks(ROOT / "docs" / "losses.md", "python"):
        exec(code, hub)
    assert hub["losses"][-1] < hub["losses"][0]
    assert hub["loss"].item() > 0
