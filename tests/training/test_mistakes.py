"""Plain mistakes end with exit status 2 and one line that names the file, row, key or value."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from launching import CPU_ENVIRONMENT, TESTS
from tiny_recipes import write_recipe

from liger_trainer.cli import main
from liger_trainer.training import data, train
from liger_trainer.training.failures import STOPPED, WRONG_RECIPE

PAIR = '{"prompt": "What is it?", "completion": "It is a box."}\n'
FILES = {
    "pairs.jsonl": PAIR * 4,
    "empty.jsonl": "",
    "blank.json": "[]",
    "broken.jsonl": PAIR + '{"prompt": "What is',
    "null.jsonl": PAIR * 2 + '{"prompt": "Why?", "completion": null}\n',
    "chat.jsonl": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n' * 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data files, and a tokenizer with a chat template and one without."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    tokenizer = data.train_tokenizer(iter(["What is it? It is a box."] * 9), 300)
    tokenizer.save_pretrained(folder / "chat")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "plain")
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_length 3", "max_length: got 3; must be larger: every example is cut before its answer"),
        ("--max_length 2 --trainer sft", "max_length: got 2; must be larger: every example is cut before its answer"),
        ("--dataset {}/empty.jsonl", "dataset: '{}/empty.jsonl' is empty"),
        ("--dataset {}/blank.json", "dataset: '{}/blank.json' with dataset_split 'train'"),
        ("--dataset {}/broken.jsonl", "dataset: '{}/broken.jsonl' cannot be read: line 2: Unterminated string"),
        ("--dataset {}/null.jsonl", "dataset: row 3 has null in column 'completion'"),
        ("--dataset_split test", "dataset: '{}/pairs.jsonl' with dataset_split 'test': Unknown split \"test\""),
        ("--dataset embedded --dataset_split test", "dataset_split: got 'test'; must be 'train' or a slice of it"),
        ("--dataset {}/chat.jsonl --trainer sft --tokenizer {}/plain", "tokenizer: got '{}/plain'; must be one with a"),
        ("--model_name_or_path {}/none --model_config null", "model_name_or_path: got '{}/none'; must be a name on"),
        ("--model_name_or_path none --model_config null", "model_name_or_path: got 'none'"),
        ("--lr 1", "command line: unknown key 'lr' (did you mean 'learning_rate'?)"),
        ("--bf16 maybe", "bf16: got 'maybe'; must be true, false or auto"),
        ('--liger_config {"swiglu":true}', "liger_config: got unknown key 'swiglu' (here it is 'glu')"),
        (
            '--liger_config {"cross_entropy":true}',
            "liger_config: got unknown key 'cross_entropy' (here it is 'fused_loss')",
        ),
        ("--max_steps many", "max_steps: invalid int value: 'many'"),
    ],
)
def test_one_line_and_status_2(folder, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = write_recipe(tmp_path, 300, tokenizer=str(folder / "chat"), dataset=str(folder / "pairs.jsonl"))
    with pytest.raises(SystemExit) as ended:
        train.main([recipe, "--disable_tqdm", "true", *flags.replace("{}", str(folder)).split()])
    said = capsys.readouterr().err
    assert ended.value.code == WRONG_RECIPE
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("liger-trainer: ")]
    assert line.startswith(f"liger-trainer: error: {message.replace('{}', str(folder))}")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"model_type": "llama", "hiden_size": 64},
            "model_config: unknown key 'hiden_size' (did you mean 'hidden_size'?)",
        ),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama", "num_layers": 2}},
            "model_config: text_config: unknown key 'num_layers' (did you mean 'num_hidden_layers'?)",
        ),
    ],
)
def test_unknown_fields_of_the_model(shape, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_config": shape, "use_cpu": True}))
    with pytest.raises(SystemExit, match="2"):
        train.main([str(path)])
    assert message in capsys.readouterr().err


def test_fields_that_only_some_configs_have_are_known():
    from liger_trainer.training.recipe_arguments import RecipeArguments

    for fields in (
        {"model_type": "gpt2", "hidden_size": 32, "n_head": 2},
        {"model_type": "llama", "rope_theta": 1e4, "torch_dtype": "float32", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "mixtral", "num_experts": 4},
        {"model_type": "qwen2", "head_dim": 64},
    ):
        assert RecipeArguments(model_config=json.dumps(fields)).model_config == fields


def test_help_shows_the_keys(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for key in ("--learning_rate (default: 5e-05)", "--max_length (default: 1024)", "--sample_prompt", "--lora_r"):
        assert f"  {key}" in said


def test_sigterm_in_one_process_ends_with_the_way_to_resume(tmp_path):
    recipe = write_recipe(
        tmp_path, dataset="synthetic", max_length=16, max_steps=100000, save_steps=1, save_total_limit=1
    )  # fmt: skip
    environment = {**CPU_ENVIRONMENT, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "liger_trainer.train", recipe, "--dataloader_num_workers", "1"]
    process = subprocess.Popen(command, env=environment, cwd=TESTS, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert said.count("liger-trainer: stopped, step ") == 1
    assert "SIGTERM ended this process" in said
