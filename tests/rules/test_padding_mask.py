"""Padding masks that change neither loss nor gradients are left out, and all others stay."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import assert_same_training, loss_and_gradients, padded_batch, sdpa_model, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from training import Rows, assert_same_run, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from liger_trainer import apply_liger, revert_liger
from liger_trainer.rules import padding_mask

ON = {"padding_mask": True, "attention": False, "unpad": False}
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
    copied = copy.deepcopy(model)
    masks.clear()
    loss_and_gradients(copied, inputs)
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
        (lambda mask: mask[1, -3:].zero_(), lambda inputs: inputs.update(is_causal=False)),
    ],
    ids=["left", "gap", "labelled", "positions", "hidden states", "not causal"],
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
    assert padding_mask.drop_mask(model, args, kwargs) is None
    assert padding_mask.drop_mask(model.eval(), (), inputs) is None
    others = {"use_cache": None, "return_dict": True, "output_attentions": False}
    _, changed = padding_mask.drop_mask(model.train(), (), {**inputs, **others})
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
        ("mixtral", {}, "its router's loss uses the mask to skip padding"),
        ("llama", {"attn_implementation": "flex_attention"}, "flex_attention attention uses the mask to skip padding"),
        ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "it warns of padding that has no mask"),
        ("gptj", {"attn_pdrop": 0.1, "attn_implementation": "eager"}, "its attention has dropout"),
    ],
)
def test_models_that_need_masks_keep_them(model_type, overrides, reason):
    model = tiny_model(model_type, **overrides)
    report = apply_liger(model, {**ON, "strict": True})  # which asks for kernels, and masks are none
    assert "padding_mask" not in report.counts
    assert [s.reason[: len(reason)] for s in report.skipped] == [reason]


def masks_stay(model, config=ON):
    """Why, as the report says it; None where they do not."""
    reasons = [s.reason for s in apply_liger(model, config).skipped if s.kind == "padding_mask"]
    return reasons[0] if reasons else None


def test_what_is_not_known_to_be_causal_keeps_its_masks():
    config = sdpa_model().config
    config.is_encoder_decoder = True
    not_causal = "not all of its attention says that it is causal"
    assert masks_stay(AutoModelForCausalLM.from_config(config)) == not_causal
    assert masks_stay(sdpa_model(is_causal=False)) == not_causal  # transformers then lets every token see all others
    partly = sdpa_model()
    partly.model.layers[1].self_attn.is_causal = False
    assert masks_stay(partly) == not_causal
    assert masks_stay(torch.nn.Linear(2, 2)).startswith("it is not a transformers model")
    reward = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    assert masks_stay(reward).startswith("it has no output embeddings")
    assert masks_stay(sdpa_model(is_causal=False), {"padding_mask": False}) is None, "it is not asked for"


def elsewhere(module):
    """The module as one of a class that a user wrote."""
    module.__class__ = type("Stranger", (type(module),), {"__module__": "elsewhere"})


@pytest.mark.parametrize("choose", [lambda m: m, lambda m: m.model.layers[0].self_attn, lambda m: m.model.norm])
def test_with_classes_of_others_masks_stay(choose):
    model = sdpa_model()
    elsewhere(choose(model))
    choose(model).__class__ = type("Sharded", (type(choose(model)),), {"__module__": "torch.distributed"})
    assert masks_stay(model) == "it is not known what Sharded does with a mask"


def test_sharded_and_quantised_classes_and_adapters_are_no_strangers():
    model = sdpa_model()
    model.__class__ = type("FSDPLlama", (type(model),), {"__module__": "torch.distributed.fsdp"})  # as fully_shard does
    elsewhere(model.model.layers[0].mlp.up_proj)  # a Linear: one token after the other
    targets = ["q_proj", "v_proj"]
    assert masks_stay(get_peft_model(model, LoraConfig(target_modules=targets, lora_dropout=0.1))) is None


@pytest.mark.parametrize(
    ("model_type", "overrides", "change"),
    [
        ("mixtral", {"output_router_logits": False}, {"output_router_logits": True}),  # TRL does so, after applying
        ("llama", {}, {"is_causal": False}),
        ("llama", {}, {"output_hidden_states": True}),
    ],
)
def test_what_changes_after_applying_is_seen(model_type, overrides, change):
    model = sdpa_model(model_type, **overrides).train()
    assert masks_stay(model) is None
    inputs = padded()
    assert padding_mask.drop_mask(model, (), inputs) is not None
    loss_function = model.loss_function
    model.loss_function = lambda logits, labels, **kwargs: logits.float().square().mean()  # of padding, too
    assert padding_mask.drop_mask(model, (), inputs) is None
    model.loss_function = loss_function
    assert padding_mask.drop_mask(model, (), inputs) is not None
    handle = model.register_forward_hook(lambda module, args, output: None)  # may read logits at padding
    assert padding_mask.drop_mask(model, (), inputs) is None
    handle.remove()
    for name, value in change.items():
        setattr(model.config, name, value)
    assert padding_mask.drop_mask(model, (), inputs) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda attention: setattr(attention, "is_causal", False),
        lambda attention: setattr(attention, "attention_dropout", 0.1),
        lambda attention: setattr(attention, "drop", torch.nn.Dropout(0.1)),
    ],
    ids=["not causal", "dropout", "dropout module"],
)
def test_attention_that_changes_after_applying_is_seen(change):
    model, inputs = sdpa_model().train(), padded()
    assert masks_stay(model) is None
    assert padding_mask.drop_mask(model, (), inputs) is not None
    change(model.model.layers[1].self_attn)
    assert padding_mask.drop_mask(model, (), inputs) is None


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("life", [lambda model: model, copy.deepcopy, unpickled], ids=["itself", "copied", "unpickled"])
def test_what_a_later_hook_makes_of_the_batch_counts(fused, life, masks):
    """Our hooks judge the batch last, also after hooks that users register later; then come labels at padding."""

    def own_labels(module, args, kwargs):
        return args, kwargs | {"labels": kwargs["input_ids"]}

    def left_padding(module, args, kwargs):
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].flip(1)}

    model, inputs = sdpa_model(), padded()
    plain = copy.deepcopy(model)
    apply_liger(model, {**ON, "fused_loss": fused})
    model = life(model)
    assert len(model._forward_pre_hooks) == 1 + fused
    for hook in (own_labels, left_padding):
        handles = [each.register_forward_pre_hook(hook, with_kwargs=True) for each in (plain, model)]
        assert_same_training(loss_and_gradients(plain, inputs), loss_and_gradients(model, inputs))
        assert masks
        assert all(masks)
        for handle in handles:
            handle.remove()
    masks.clear()
    loss_and_gradients(model, inputs)
    assert not any(masks)
    revert_liger(model)
    assert "register_forward_pre_hook" not in vars(model)
    assert not model._forward_pre_hooks


def test_where_nothing_can_be_read_masks_stay(monkeypatch):
    model = sdpa_model().train()
    inputs = padded()
    seen = []

    def left_out(tensors):
        seen.append(padding_mask.drop_mask(model, (), tensors) is not None)
        return tensors["labels"].sum()

    left_out(inputs)
    torch.func.vmap(lambda mask: left_out({**inputs, "attention_mask": mask}))(inputs["attention_mask"][None])
    left_out({name: tensor.to("meta") for name, tensor in inputs.items()})
    with FakeTensorMode() as mode:
        left_out({name: mode.from_tensor(tensor) for name, tensor in inputs.items()})
    mask = inputs["attention_mask"]
    torch.jit.trace(lambda mask: left_out({**inputs, "attention_mask": mask}), mask, check_trace=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    left_out(inputs)
    assert seen == [True] + [False] * 5


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
