"""Recipes: all of them parse, mistakes are named, and the quickstart runs through the real commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from liger_trainer.cli import main
from liger_trainer.training.recipe import parse_recipe, peek
from liger_trainer.training.recipe_arguments import RecipeError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
TINY = "--max_steps 3 --save_strategy steps --save_steps 3 --logging_steps 1 --per_device_train_batch_size 2"
TINY = [*TINY.split(), "--dataset_split", "train[:40]", "--eval_examples", "4"]
# As a user has it: one process to a core, and no interpreter, which the kernels' own tests use.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}


def write(tmp_path, **content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_config": {"model_type": "llama"}, "bf16": "auto", **content}))
    return str(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path, tmp_path):
    recipe = parse_recipe([str(path), "--output_dir", str(tmp_path)])
    assert recipe.training.use_liger
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert str(path.relative_to(ROOT)) in header
    for word in ("# Hardware:", "# Launch:", "# Measured:"):
        assert word in header, f"the header lacks {word!r}"


def test_the_package_lists_and_copies_its_recipes(tmp_path, monkeypatch, capsys):
    def command(*argv):
        with pytest.raises(SystemExit) as exit_:
            main(list(argv))
        return exit_.value.code, capsys.readouterr()

    code, said = command("recipes")
    lines = said.out.splitlines()
    assert code == 0
    assert {line.split()[0] for line in lines} == {
        path.relative_to(ROOT / "recipes").as_posix().removesuffix(".yaml") for path in RECIPES
    }
    assert lines[-1].split("  ")[0].startswith("shapes/")
    [quickstart] = [line for line in lines if line.startswith("quickstart ")]
    assert quickstart.endswith("  Learn to answer questions about Python packages")
    assert max(map(len, lines)) <= 120
    code, said = command("recipes", "--copy", str(tmp_path))
    assert code == 0
    for name in ("recipes", "configs"):
        copied, own = ({p.relative_to(d / name): p.read_text() for p in (d / name).rglob("*.yaml")}
                       for d in (tmp_path, ROOT))  # fmt: skip
        assert copied == own
    code, said = command("recipes", "--copy", str(tmp_path))
    assert code == 2
    assert said.err == f"liger-trainer: error: --copy: got {str(tmp_path)!r}; must not contain 'recipes'\n"
    monkeypatch.chdir(tmp_path)
    assert parse_recipe(["quickstart"]).max_length == 64
    assert parse_recipe(["paper/qwen2_7b"]).model.model_name_or_path == "Qwen/Qwen2-7B"
    (tmp_path / "quickstart").write_text("{model_config: {model_type: llama}, max_length: 7}")
    assert parse_recipe(["quickstart"]).max_length == 7  # a file comes first


@pytest.mark.parametrize("trainer", ["trainer", "sft"])
def test_command_line_overrides_yaml_overrides_defaults(tmp_path, trainer):
    content = {"trainer": trainer, "learning_rate": "1e-3", "max_length": 77, "use_liger": True, "seed": 5}
    content |= {"liger_config": {"rope": False}, "lora_target_modules": ["q_proj", "v_proj"], "tokenizer": None}
    path = write(tmp_path, **content)
    recipe = parse_recipe(
        [path, "--seed", "6", "--max_steps=9", "--use_liger", "true", "--lora_target_modules", "k", "o"]
    )
    assert (recipe.training.seed, recipe.training.max_steps, recipe.training.learning_rate) == (6, 9, 1e-3)
    assert (recipe.max_length, recipe.run.tokenizer, recipe.model.lora_target_modules) == (77, None, ["k", "o"])
    assert recipe.training.liger_config["rope"] is False
    assert recipe.training.bf16 is torch.cuda.is_available()
    assert parse_recipe([path]).model.lora_target_modules == ["q_proj", "v_proj"]
    changed = parse_recipe([path, "--model_config", '{"model_type": "qwen3"}', "--liger_config", '{"glu": false}'])
    assert changed.run.model_config == {"model_type": "qwen3"}
    assert changed.training.liger_config["glu"] is False
    named = parse_recipe([path, "--model_config", "null", "--model_name_or_path", "some/model"])
    assert (named.run.model_config, named.model.model_name_or_path) == (None, "some/model")
    assert parse_recipe([path, "--max_length", "null", "--seed=null"]).training.seed == 42


def test_keys_may_be_spelled_with_dashes(tmp_path):
    """As the parser allows it; what is read without it, and what is unset, does not differ."""
    path = write(tmp_path, **{"max-steps": 7, "seed": 5, "learning_rate": 1.0, "run_name": "a"})
    argv = [path, "--use-liger", "--auto-batch-size=true", "--per-device-train-batch-size", "3"]
    argv += ["--learning-rate", "null", "--max-steps=9", "--run-name", "x-y", '--liger-config={"low_memory": true}']
    recipe = parse_recipe(argv)
    args = recipe.training
    assert (recipe.run.auto_batch_size, args.use_liger, args.per_device_train_batch_size) == (True, True, 3)
    assert (args.max_steps, args.learning_rate, args.run_name) == (9, 5e-5, "x-y")
    assert args.liger_config["low_memory"] is True
    assert [peek(argv, key) for key in ("use_liger", "auto_batch_size", "learning_rate")] == ["true", "true", None]
    assert (peek(argv, "per_device_train_batch_size"), peek(argv, "max_steps")) == ("3", "9")
    assert peek([path], "max_steps") == "7"


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ({"learning_rat": 1}, [], r"recipe\.yaml: unknown key 'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ({}, ["--max_step", "3"], r"command line: unknown key 'max_step' \(did you mean 'max_steps'\?\)"),
        ({}, ["--use_lger=true"], r"unknown key 'use_lger' \(did you mean 'use_liger'\?\)"),
        ({}, ["--packing", "true"], "command line: unknown key 'packing': it needs trainer: sft, got trainer"),
        ({}, ["max_steps", "3"], "'max_steps' belongs to no key"),
        ({"max_steps": "many"}, [], "max_steps.*many"),
        ({"max_steps": [1, 2]}, [], "'2' belongs to no key"),
        (
            {"trainer": "stf"},
            [],
            r"trainer: got 'stf'; must be one of .*splade \(did you mean 'sft'\?\)",
        ),
        ({"model_config": None}, [], "give model_name_or_path, or model_config for random weights; got neither"),
        ({"model_config": {"hidden_size": 8}}, [], "model_config: model_type: got 'None'; must be a model type"),
        ({}, ["--model_config", '{"model_type": "lama"}'], "got 'lama'.*did you mean 'llama'"),
        ({}, ["--model_config", "5"], "model_config: got 5; must be a JSON object"),
        ({"model_config": "{"}, [], "model_config: got '{'; must be a JSON object"),
        ({"use_liger": True, "liger_config": {"rop": False}}, [], "unknown key 'rop'"),
        ({"use_liger": True, "use_liger_kernel": True}, [], "use_liger_kernel"),
        ({"max_length": 0}, [], "max_length: got 0; must be at least 1"),
        ({"pad_to_multiple_of": 0}, [], "pad_to_multiple_of: got 0; must be at least 1"),
        ({"eval_examples": -1}, [], "eval_examples: got -1; must be at least 0"),
        ({"sample_tokens": 0}, [], "sample_tokens: got 0; must be at least 1"),
        ({"load_in_4bit": True}, [], "load_in_4bit"),
    ],
)
def test_mistakes_are_named(tmp_path, content, overrides, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe([write(tmp_path, **content), *overrides])


def test_precision_is_the_launchers_where_the_recipe_leaves_it_open(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"

    def bf16(**content):
        path.write_text(yaml.safe_dump({"model_config": {"model_type": "llama"}, "use_cpu": True, **content}))
        return parse_recipe([str(path)]).training.bf16

    assert bf16() is False
    for launched in (False, True):  # accelerate's launcher passes its config on in the environment
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if launched else "no")
        assert bf16() is launched
        assert bf16(bf16="auto") is (launched or torch.cuda.is_available())
        assert bf16(bf16=False) is False


def test_processes_without_a_group(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"launched as 2 processes.*--use_cpu true"):
        parse_recipe([write(tmp_path)])


def test_files_that_are_no_recipes(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match="YAML mapping"):
        parse_recipe([str(tmp_path / "list.yaml")])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(RecipeError, match=r"recipe: '.*broken\.yaml' is not valid YAML: .*\n.*line 1"):
        parse_recipe([str(tmp_path / "broken.yaml")])
    with pytest.raises(SystemExit) as exit_:
        main(["train", "recipes/quickstar.yaml", "--seed", "1"])
    assert exit_.value.code == 2
    message = "recipe: no such file: 'recipes/quickstar.yaml', nor a name that `liger-trainer recipes` lists"
    assert f"{message} (did you mean 'quickstart'?)" in capsys.readouterr().err


def run(*command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check_run(output, directory, processes):
    """One summary, of a saved model that answered."""
    (question,) = re.findall("^question +(.*)$", output, re.MULTILINE)
    assert question == "What does `json.dumps` do?"
    assert len(re.findall("^answer ", output, re.MULTILINE)) == 1
    assert (directory / "model.safetensors").is_file()
    state = json.loads((directory / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    third = state["log_history"][2]
    assert third["tokens_per_second"] > 0
    assert third["step_seconds"] > 0
    assert [key for key in third if key.startswith("peak_memory_")]
    assert third["epoch"] == pytest.approx(3 * 2 * processes / 36)


def test_quickstart_by_the_command(tmp_path):
    output = run("liger_trainer.cli", "train", QUICKSTART, *TINY, "--output_dir", str(tmp_path))
    check_run(output, tmp_path, 1)
    assert "rms_norm" in output  # the report of what was patched


@pytest.mark.long
def test_quickstart_with_sft_on_two_processes(tmp_path):
    args = [QUICKSTART, *TINY, "--output_dir", str(tmp_path), "--trainer", "sft", "--use_cpu", "true"]
    output = run("torch.distributed.run", "--nproc_per_node", "2", "-m", "liger_trainer.train", *args)
    check_run(output, tmp_path, 2)


def test_report_of_a_recipe_needs_no_hub_where_it_names_the_shape(tmp_path, monkeypatch, capsys):
    shape = yaml.safe_load(Path(QUICKSTART).read_text())["model_config"]
    both = write(tmp_path, model_name_or_path="some/model", model_config=shape, use_liger=True)

    def fail(*args, **kwargs):
        raise OSError("asked the hub")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    for recipe in (QUICKSTART, "quickstart", both):
        with pytest.raises(SystemExit) as exit_:
            main(["report", recipe])
        assert not exit_.value.code
        assert "rms_norm" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main(["report", "some/model"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "liger-trainer: error: asked the hub\n"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
