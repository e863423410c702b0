"""Running out of memory in a micro-batch all the same: it runs again, or the run ends with the cause."""

import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from fake_card import FakeCard, put_card  # noqa: F401  a fixture
from peft import PromptTuningConfig, get_peft_model
from tiny_models import tiny_model
from training import Rows, arguments, assert_same_run
from transformers import Trainer, TrainerCallback

from liger_trainer.memory.recompute import recompute_of
from liger_trainer.patching import patch_state
from liger_trainer.training.failures import out_of_memory_lines


class Fails:
    """Runs out of memory once, in the micro-batch of this number, in the forward or the backward of a layer."""

    where = "layers.2.mlp"

    def __init__(self, model, number, backward):
        self.calls, self.number, self.backward, self.fired = 0, number, backward, 0
        self.before = lambda: None
        next(m for n, m in model.named_modules() if n.endswith(self.where)).register_forward_hook(self.forward)

    def forward(self, module, args, output):
        self.calls += torch._C._current_graph_task_id() == -1
        if self.calls == self.number and not self.fired:
            if self.backward:
                output.register_hook(self.fail)
            else:
                self.fail(None)

    def fail(self, gradient):
        self.fired += 1
        self.before()
        raise torch.OutOfMemoryError("CUDA out of memory")


def plain_model():
    return tiny_model("llama", num_hidden_layers=4, attention_dropout=0.1)


def run(directory, put, number=0, backward=False, accumulation=1, engine=None, cls=Trainer, make=plain_model, **config):
    model = make()
    put(FakeCard(10**9))
    args = arguments(
        directory, use_liger=True, liger_config={"logits_budget_mib": 1, **config}, optim="sgd", learning_rate=0.1,
        gradient_accumulation_steps=accumulation, activation_checkpointing=True, max_steps=3,
    )  # fmt: skip
    trainer = cls(model, args, train_dataset=Rows())
    trainer.failing = Fails(model, number, backward)
    if engine is not None:  # seen from the failure on
        trainer.failing.before = lambda: setattr(trainer, engine, True)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("backward", "number", "accumulation"),
    [
        (False, 4, 2),
        (True, 3, 2),
        pytest.param(False, 2, 1, marks=pytest.mark.long),
        pytest.param(True, 2, 1, marks=pytest.mark.long),
    ],
)
def test_the_micro_batch_runs_again_and_nothing_is_lost(backward, number, accumulation, tmp_path, put_card, caplog):  # noqa: F811
    """Dropout drops the same, too."""
    expected = run(tmp_path, put_card, accumulation=accumulation)
    actual = run(tmp_path, put_card, number, backward, accumulation)
    assert actual.failing.fired == 1
    assert caplog.text.count("runs again with all layers recomputed") == 1
    assert_same_run(expected, actual, tolerance=1e-30)
    assert recompute_of(actual.model).lost == pytest.approx(0.1 * 10**9)
    assert recompute_of(expected.model).lost == 0
    assert actual.state.log_history[0]["recomputed_layers"] >= 0
    assert actual.state.log_history[0]["memory_headroom_gib"] > 0
    assert patch_state(actual.model).report.ran["recompute"] >= 1


def test_backward_of_a_later_micro_batch_ends_the_run_with_the_cause(tmp_path, put_card):  # noqa: F811
    """Its gradients have been added to those of the first one."""
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(tmp_path, put_card, number=4, backward=True, accumulation=2)
    assert "gradients of earlier micro-batches" in out_of_memory_lines(caught.value, None)[2]
    notes = " ".join(caught.value.__notes__)
    assert "gradients of earlier micro-batches" in notes
    assert "per_device_train_batch_size" in notes
    assert "memory_margin" in notes


def test_nothing_more_to_give_up(tmp_path, put_card, monkeypatch):  # noqa: F811
    """The second failure of a micro-batch is the last: all its layers were recomputed."""
    monkeypatch.setattr(Fails, "forward", lambda self, module, args, output: self.fail(None))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(tmp_path, put_card, number=1)
    assert "even with all layers recomputed" in caught.value.__notes__[0]
    assert "per_device_train_batch_size" in caught.value.__notes__[1]


def notes_of(*args, **kwargs):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(*args, **kwargs)
    return " ".join(caught.value.__notes__)


def test_a_failure_before_the_layers_ends_the_run(tmp_path, put_card, monkeypatch):  # noqa: F811
    """Nothing of this micro-batch could recompute, and the gradients of the one before must stay."""
    monkeypatch.setattr(Fails, "where", "embed_tokens")
    assert "outside of the layers" in notes_of(tmp_path, put_card, number=2, accumulation=2)


def prompt_tuning():
    return get_peft_model(plain_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_gradients_outside_of_the_model_are_kept(tmp_path, put_card):  # noqa: F811
    """All that prompt tuning trains is outside of the transformers model."""
    expected = run(tmp_path, put_card, accumulation=2, make=prompt_tuning)
    actual = run(tmp_path, put_card, 4, False, 2, make=prompt_tuning)
    assert actual.failing.fired == 1
    assert_same_run(expected, actual, tolerance=1e-30)


class OwnLoss(Trainer):
    """Runs the decoder alone, and counts as TRL's trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._total_train_tokens, self._metrics = 0, {"train": defaultdict(list)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        self._total_train_tokens += inputs["input_ids"].numel()
        self._metrics["train"]["noise"].append(random.random() + np.random.random())
        return hidden.pow(2).mean()


def test_a_loss_on_the_decoder_alone_counts_once(tmp_path, put_card):  # noqa: F811
    expected = run(tmp_path, put_card, cls=OwnLoss)
    actual = run(tmp_path, put_card, 2, True, cls=OwnLoss)
    assert actual.failing.fired == 1
    assert_same_run(expected, actual, tolerance=1e-30)
    assert actual._total_train_tokens == expected._total_train_tokens
    assert actual._metrics == expected._metrics
    assert len(actual._metrics["train"]["noise"]) == 3
    assert "gradients of earlier micro-batches" in notes_of(tmp_path, put_card, 4, True, 2, cls=OwnLoss)


def test_layers_that_are_left_to_the_user_are_the_reason(tmp_path, put_card):  # noqa: F811
    def every_second():
        model = plain_model()
        model.activation_checkpointing_enable = lambda *args, **kwargs: type(model).activation_checkpointing_enable(
            model, every_n_layers=2
        )
        return model

    assert "left as they are: not all of them" in notes_of(tmp_path, put_card, number=2, make=every_second)


@pytest.mark.parametrize("engine", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_engines_do_not_run_it_again(engine, tmp_path, put_card):  # noqa: F811
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(tmp_path, put_card, number=2, engine=engine)
    assert "the engine is in the middle" in caught.value.__notes__[0]


def test_arguments_that_say_themselves_what_is_kept(tmp_path, put_card):  # noqa: F811
    class Counts(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            assert "recomputed_layers" not in logs

    for settings, reason in (
        ({"activation_checkpointing_kwargs": {"every_n_layers": 2}}, "set every_n_layers"),
        ({"activation_checkpointing_kwargs": {"offload": True}}, "set offload"),
    ):
        put_card(FakeCard(10**9))
        args = arguments(tmp_path, use_liger=True, activation_checkpointing=True, **settings)
        trainer = Trainer(tiny_model("llama"), args, train_dataset=Rows(), callbacks=[Counts()])
        [skipped] = [s for s in patch_state(trainer.model).report.skipped if s.kind == "recompute"]
        assert reason in skipped.reason
        assert recompute_of(trainer.model) is None
