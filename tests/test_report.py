"""The report tells the truth: what a run does is what the command says before, and every kind has a row."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import AdaptionPromptConfig, get_peft_model
from tiny_models import batch, loss_and_gradients, tiny_config, tiny_model
from tiny_recipes import write_recipe
from torch import nn
from training import train

import liger_trainer
from liger_trainer import LigerReport, apply_liger
from liger_trainer.cli import main
from liger_trainer.config import KINDS
from liger_trainer.patching import patch_state
from liger_trainer.report import Skipped
from liger_trainer.training.build import build_trainer
from liger_trainer.training.recipe import OF_TEXTS, parse_recipe

ROOT = Path(__file__).parents[1]
# Those that train on synthetic rows, too; test_post_training.py has the others.
RECIPES = [
    path for path in sorted((ROOT / "recipes").glob("**/*.yaml"))
    if yaml.safe_load(path.read_text()).get("trainer", "trainer") in OF_TEXTS
]  # fmt: skip
SMALL = {"vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
HERE = [f"--{key}" for key in ("use_cpu=true", "bf16=false", "report_to=none", "dataset=synthetic")]
HERE += ["--synthetic_examples=4", "--load_in_4bit=false"]  # random weights have nothing to quantise
LORA = {"use_peft": True, "lora_r": 2}


def command(capsys, *argv):
    """Exit status and output of ``liger-trainer``."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([*argv])
    captured = capsys.readouterr()
    return exit_.value.code or 0, captured.out.strip(), captured.err


def small_recipe(folder, **content):
    path = write_recipe(folder, **{"dataset": "synthetic", "max_length": 16, **content})
    recipe = {**yaml.safe_load(Path(path).read_text()), "model_config": {"model_type": "llama", **SMALL}}
    Path(path).write_text(yaml.safe_dump(recipe))
    return path


def assert_run_equals_report(capsys, argv):
    status, said, _ = command(capsys, "report", *argv)
    trainer = build_trainer(parse_recipe(argv))
    report = patch_state(trainer.model).report
    assert status == 0
    for text in (said, capsys.readouterr().out.strip()):  # DeepSpeed logs to stdout when it is imported
        assert text.endswith(str(report))
    return report


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_run_of_a_recipe_does_what_the_report_says(path, tmp_path, capsys):
    content = yaml.safe_load(path.read_text())
    shape = {**content.get("model_config", {"model_type": "qwen3"}), **SMALL}
    argv = [str(path), *HERE, "--offline", "true", "--output_dir", str(tmp_path), "--sample_prompt", "null"]
    assert_run_equals_report(capsys, [*argv, "--model_config", json.dumps(shape), "--max_length", "16"])


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ({"trainer": "sft"}, {"fused_loss": "linear_logprobs, behind TRL's fused head"}),
        ({"trainer": "sft", **LORA, "lora_target_modules": ["q_proj", "up_proj"]}, {"fused_loss": "linear_logprobs"}),
        ({**LORA, "lora_target_modules": ["q_proj", "lm_head"]}, {"fused_loss": "it carries an adapter"}),
        ({"attn_implementation": "eager"}, {"attention": "its attn_implementation is eager"}),
        ({"label_smoothing_factor": 0.1}, {"fused_loss": "label_smoothing_factor is set"}),
        ({"medusa_heads": 2}, {"fused_loss": "linear_cross_entropy"}),
        ({"liger_config": {"rope": False, "strict": True}}, {"glu": "swiglu"}),
    ],
    ids=["sft", "sft lora", "lora on lm_head", "eager", "smoothing", "medusa", "strict"],
)  # fmt: skip
def test_the_run_of_any_option_does_what_the_report_says(content, rows, tmp_path, capsys):
    report = assert_run_equals_report(capsys, [small_recipe(tmp_path, **content), "--synthetic_examples", "4"])
    for kind, start in rows.items():
        found = {getattr(r, "variant", None) or r.reason for r in report.applied + report.skipped if r.kind == kind}
        assert len(found) == 1
        assert found.pop().startswith(start)


def test_overrides_and_exit_statuses(tmp_path, capsys):
    recipe = small_recipe(tmp_path)
    assert "rope" in command(capsys, "report", recipe)[1]
    without = command(capsys, "report", recipe, "--liger_config", '{"rope": false}')
    assert without[0] == 0
    assert "rope" not in without[1]
    assert command(capsys, "report", recipe, "--use_liger", "false")[:2] == (
        0, "use_liger is false: nothing is patched"
    )  # fmt: skip
    strict = ["--attn_implementation", "eager", "--liger_config", '{"strict": true}']
    for argv, word in (
        ([recipe, *strict], "not sdpa"), ([recipe, "--lr", "1"], "lr"), ([str(tmp_path / "none.yaml")], "none.yaml"),
        ([str(tmp_path), "--seed", "1"], "--seed"), ([str(tmp_path)], str(tmp_path)),
    ):  # fmt: skip
        status, out, error = command(capsys, "report", *argv)
        assert (status, out) == (2, "")
        assert error.startswith("liger-trainer: error: ")
        assert word in error
    assert command(capsys, "--version")[:2] == (0, f"liger-trainer {liger_trainer.__version__}")


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "max_position_embeddings": 64}
OTHERS = {
    "LlavaForConditionalGeneration": lambda: transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **VISION},
        text_config={"model_type": "llama", **TEXT},
    ),
    "Qwen2_5_VLForConditionalGeneration": lambda: transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
    ),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    ),
    "ModernBertForMaskedLM": lambda: transformers.ModernBertConfig(
        vocab_size=131, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **VISION
    ),
    "LlamaForSequenceClassification": lambda: tiny_config("llama", num_labels=3),
    "GemmaForCausalLM": lambda: tiny_config("gemma"),
}  # fmt: skip


@pytest.mark.parametrize("named", [True, False], ids=["named", "by config"])
@pytest.mark.parametrize("name", OTHERS)
def test_report_of_any_model(name, named, tmp_path, capsys):
    config = OTHERS[name]()
    if not named and name == "LlamaForSequenceClassification":
        pytest.skip("its config is a causal LM's")
    config.architectures = [name] if named else None
    config.save_pretrained(tmp_path)
    status, said, error = command(capsys, "report", str(tmp_path))
    assert (status, error) == (0, "")
    report = apply_liger(getattr(transformers, name)(config))
    assert said == str(report)
    assert name in said
    assert {*report.kinds(), *report.none_here} == set(KINDS)
    assert not re.search("probe|_Recorder|_Backbone|_Head|_Stub|object has no attribute", said)


def test_a_class_that_transformers_lacks_is_named(tmp_path, capsys):
    config = tiny_config("llama", architectures=["MyLlama"])
    config.save_pretrained(tmp_path)
    status, _, error = command(capsys, "report", str(tmp_path))
    assert status == 2
    assert "MyLlama" in error


def test_none_here_is_no_error():
    report = apply_liger(tiny_model("nemotron", attn_implementation="sdpa"), {"strict": True})
    assert set(report.none_here) == {"rms_norm", "glu", "lora", "recompute"}
    assert report.to_dict()["none_here"] == report.none_here
    assert str(report).count("none here") == 4


def test_adaption_prompt_is_not_called_fused():
    model = get_peft_model(
        tiny_model("llama"), AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    )
    report = apply_liger(model)
    reasons = {s.kind: s.reason for s in report.skipped}
    assert reasons == dict.fromkeys(
        ("fused_loss", "unpad", "padding_mask"), "AdaptionPromptModel calls its forward without its hooks"
    )
    assert model.train()(**batch()).logits.shape[-1] == 131


class Odd(nn.Module):
    """A gated MLP that asks its projection for what a stub lacks."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x).to(self.down.weight.dtype))


def test_reasons_speak_of_the_model():
    [skipped] = [s for s in apply_liger(Odd()).skipped if s.kind == "glu"]
    assert skipped.reason.startswith("its forward does more than the known forms, in test_report.py, line ")
    assert "`return self.down(" in skipped.reason
    assert "_Recorder" not in skipped.reason


def test_tables_cut_no_word():
    name = "base_model.model.model." + "a_very_long_module_name." * 8
    word = "supercalifragilistic" * 8
    report = LigerReport(skipped=[Skipped("glu", name, "C" * 60, f"because <of> a {word} it is")], none_here=["rope"])
    for part in (name, word, "C" * 60):
        assert part in str(report)
    html = report._repr_html_()
    assert html.startswith("<table>")
    assert "because &lt;of&gt; a" in html
    assert json.loads(json.dumps(report.to_dict()))["skipped"][0]["module"] == name


def test_what_ran_is_counted(tmp_path, caplog):
    def stop(model):
        """One kernel no longer acts, and one never did: there is no padding."""
        for layer in model.model.layers:
            del layer.mlp.forward

    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                stop(model)

    trainer = train(tmp_path, True, trainer_kwargs={"callbacks": [Stops()]}, gradient_accumulation_steps=2)
    ran = patch_state(trainer.model).report.ran
    expected = {"rms_norm": 5, "rope": 5, "glu": 2, "attention": 5, "fused_loss": 5, "padding_mask": 5}
    assert {kind: ran[kind] for kind in ("rms_norm", "rope", "glu", "fused_loss")} == {
        kind: expected[kind] for kind in ("rms_norm", "rope", "glu", "fused_loss")
    }
    lines = [r.getMessage() for r in caplog.records if "of 5 steps, these acted" in r.getMessage()]
    assert len(lines) == 1
    assert "glu in 2" in lines[0]


def test_evaluation_does_not_count(tmp_path):
    trainer = train(tmp_path, True, max_steps=2)
    report = patch_state(trainer.model).report
    before = dict(report.ran)
    with torch.no_grad():
        trainer.model.eval()(**batch())
    patch_state(trainer.model).forget_acted()
    assert report.ran == before == report.to_dict()["ran"]
    loss_and_gradients(trainer.model, batch())
    patch_state(trainer.model).count_step()
    assert report.ran["rms_norm"] == before["rms_norm"] + 1
