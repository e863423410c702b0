"""Padding masks that change neither loss nor gradients are left out, and all others stay."""

import copy

import pytest
import torch
from tiny_models import assert_same_training, loss_and_gradients, padded_batch, sdpa_model, tiny_config, tiny_model
from training import Rows, assert_same_run, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from liger_trainer import apply_liger, padding, revert_liger

ON = {"padding_mask": True}
CAUSAL = ("llama", "mistral", "qwen3", "gemma3_text", "phi3", "olmo2", "cohere", "gpt_neox", "deepseek_v3")


@pytest.fixture
def masks(monkeypatch):
    """Whether each call of SDPA had a mask."""
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask is not None)
        return sdpa(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


def padded(pad=lambda mask: mask[1, -3:].zero_()):
    """A batch with padding, by default on the right of its second row."""
    return padded_batch(pad)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_same_loss_and_gradients_without_the_mask(model_type, masks):
    model = sdpa_model(model_type)
    inputs = padded()
    theirs = loss_and_gradients(model, inputs)
    assert all(masks)
    with_mask = len(masks)
    assert apply_liger(model, {**ON, "strict": True}).counts["padding_mask"] == 1
    masks.clear()
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert masks == [False] * with_mask
    twin = copy.deepcopy(model)
    masks.clear()
    loss_and_gradients(twin, inputs)
    assert not any(masks)
    revert_liger(model)
    masks.clear()
    loss_and_gradients(model, inputs)
    assert all(masks)


def test_eager_attention_has_no_mask_either():
    model = tiny_model("gemma2", attn_implementation="eager")
    inputs, seen = padded(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    theirs = loss_and_gradients(model, inputs)
    apply_liger(model, ON)
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert seen[0] is inputs["attention_mask"]
    assert seen[1] is None


def label_padding(inputs):
    inputs["labels"][1, -1] = 5


@pytest.mark.parametrize(
    ("held", "change"),
    [
        (lambda mask: mask[1, :3].zero_(), None),
        (lambda mask: mask[1, 4:6].zero_(), None),
        (lambda mask: mask[1, -3:].zero_(), label_padding),
        (lambda mask: mask[1, -3:].zero_(), lambda inputs: inputs.update(position_ids=torch.arange(11)[None])),
        (lambda mask: mask[1, -3:].zero_(), lambda inputs: inputs.update(output_hidden_states=True)),
    ],
    ids=["left", "gap", "labelled", "positions", "hidden states"],
)
def test_masks_that_matter_stay(held, change, masks):
    model = sdpa_model()
    inputs = padded(held)
    if change is not None:
        change(inputs)
    theirs = loss_and_gradients(model, inputs)
    apply_liger(model, ON)
    masks.clear()
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert all(masks)


@pytest.mark.parametrize(
    "call",
    [
        lambda ids, mask, labels: ((ids, mask), {"labels": labels}),
        lambda ids, mask, labels: ((), {"input_ids": ids, "attention_mask": mask, "labels": labels[:, 1:]}),
        lambda ids, mask, labels: ((), {"input_ids": ids, "attention_mask": mask[:, None, None], "labels": labels}),
        lambda ids, mask, labels: ((), {"input_ids": ids, "attention_mask": mask}),
    ],
    ids=["positional", "labels of another shape", "4-D mask", "no labels"],
)
def test_calls_of_another_form_are_not_touched(call):
    inputs = padded()
    args, kwargs = call(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    model = sdpa_model().train()
    assert padding.leave_out_mask(model, args, kwargs) is None
    assert padding.leave_out_mask(model.eval(), (), inputs) is None
    others = {"use_cache": None, "return_dict": True, "output_attentions": False}
    _, changed = padding.leave_out_mask(model.train(), (), {**inputs, **others})
    assert changed == {**inputs, **others, "attention_mask": None}


def test_masks_stay_in_evaluation_and_without_labels(masks):
    model = sdpa_model()
    apply_liger(model, ON)
    inputs = padded()
    model.eval()(**inputs)
    inputs.pop("labels")
    model.train()(**inputs)
    assert len(masks) == 4
    assert all(masks)


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("llama", {"attention_dropout": 0.1}, "its attention has dropout"),
        ("mixtral", {}, "its router's loss leaves padding out by the mask"),
        ("llama", {"attn_implementation": "flex_attention"}, "flex_attention attention leaves padding out by the mask"),
        ("gptj", {"attn_pdrop": 0.1, "attn_implementation": "eager"}, "its attention has dropout"),
    ],
)
def test_models_that_need_masks_keep_them(model_type, overrides, reason):
    model = tiny_model(model_type, **overrides)
    report = apply_liger(model, {**ON, "strict": True})  # which asks for kernels, and masks are none
    assert "padding_mask" not in report.counts
    assert [s.reason[: len(reason)] for s in report.skipped] == [reason]


def test_what_is_not_known_to_be_causal_keeps_its_masks():
    config = sdpa_model().config
    config.is_encoder_decoder = True
    report = apply_liger(AutoModelForCausalLM.from_config(config), ON)
    assert [s.reason for s in report.skipped] == ["not all of its attention says that it is causal"]
    skipped = {s.kind: s.reason for s in apply_liger(torch.nn.Linear(2, 2), ON).skipped}
    assert skipped["padding_mask"].startswith("it is no model of transformers")
    stranger = sdpa_model()
    stranger.__class__ = type("Stranger", (type(stranger),), {"__module__": "elsewhere"})
    reasons = [s.reason for s in apply_liger(stranger, ON).skipped if s.kind == "padding_mask"]
    assert reasons == [skipped["padding_mask"]]
    everywhere = sdpa_model(is_causal=False)  # transformers then lets every token see all others
    assert "padding_mask" not in apply_liger(everywhere, ON).counts
    partly = sdpa_model()
    partly.model.layers[1].self_attn.is_causal = False
    assert "padding_mask" not in apply_liger(partly, ON).counts
    off = apply_liger(sdpa_model(is_causal=False), {"padding_mask": False})
    assert not off.skipped, "what is not asked for is not skipped"


def test_what_changes_after_applying_is_seen():
    model = sdpa_model("mixtral", output_router_logits=False).train()
    apply_liger(model, {**ON, "strict": True})
    inputs = padded()
    assert padding.leave_out_mask(model, (), inputs) is not None
    model.config.output_router_logits = True  # TRL does so after it has made the Trainer
    assert padding.leave_out_mask(model, (), inputs) is None
    model.config.output_router_logits = False
    model.loss_function = lambda logits, labels, **kwargs: logits.float().square().mean()  # of padding, too
    assert padding.leave_out_mask(model, (), inputs) is None
    report = apply_liger(AutoModelForSequenceClassification.from_config(tiny_config("llama")), ON)
    assert [s.reason[:27] for s in report.skipped if s.kind == "padding_mask"] == ["it has no output embeddings"]


def test_rows_padded_beyond_the_table_of_positions_keep_their_mask():
    model = tiny_model(
        "opt", max_position_embeddings=8, ffn_dim=96, word_embed_proj_dim=64, attention_dropout=0.0, dropout=0.0
    )
    inputs = padded(lambda mask: mask[:, 8:].zero_())
    loss = loss_and_gradients(model, inputs)[0]
    assert apply_liger(model, ON).counts["padding_mask"] == 1
    torch.testing.assert_close(loss_and_gradients(model, inputs)[0], loss)


class PaddedRows(Rows):
    """Rows whose labels end where their mask does."""

    def __getitem__(self, index):
        row = dict(self.rows[index])
        row["attention_mask"] = (row["labels"] != -100).long()
        return row


@pytest.mark.parametrize("config", [ON, {**ON, "attention": True, "fused_loss": False}], ids=["alone", "and attention"])
def test_training_is_the_same(config, tmp_path, masks):
    rows = PaddedRows(valid=lambda i: (12, 3, 7, 1)[i % 4])
    options = {"dataset": rows, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "optim": "sgd"}
    theirs = train(tmp_path, False, model=sdpa_model(), **options)
    assert all(masks)
    masks.clear()
    ours = train(tmp_path, True, model=sdpa_model(), liger_config=config, **options)
    assert masks
    assert not any(masks)
    assert_same_run(theirs, ours)
