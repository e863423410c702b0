"""The fused loss in lm_head: the same loss as transformers, for every way to pass labels."""

import copy

import pytest
import torch
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model

from liger_trainer import apply_liger


@pytest.mark.parametrize(
    ("labels", "num_items"),
    [("ragged", None), ("ragged", 7), ("ragged", torch.tensor(5)), ("none valid", None), ("none valid", 9)],
)
def test_loss_is_normalised_as_transformers_does(labels, num_items):
    model, inputs = tiny_model("qwen2"), batch()
    if labels == "none valid":
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    theirs = loss_and_gradients(model, inputs | extra)
    apply_liger(model)
    ours = loss_and_gradients(model, inputs | extra)
    if labels == "none valid" and num_items is None:
        assert torch.isnan(theirs[0])  # 0 / 0; ours is a differentiable zero
        assert ours[0] == 0
        assert all(torch.isfinite(g).all() for g in ours[1].values())
    else:
        assert_same_training(theirs, ours)


def test_shift_labels_are_used_as_given():
    model, inputs = tiny_model("llama"), batch()
    shifted = torch.roll(inputs["labels"], 3, dims=1)
    theirs = loss_and_gradients(model, inputs | {"shift_labels": shifted})
    apply_liger(model)
    assert_same_training(theirs, loss_and_gradients(model, inputs | {"shift_labels": shifted}))


def test_a_loss_function_set_later_is_respected():
    model, inputs = tiny_model("llama"), batch()
    apply_liger(model)
    model.loss_function = lambda logits, labels, **kwargs: logits.float().square().mean()
    loss, _ = loss_and_gradients(model, inputs)
    assert loss > 0


@pytest.mark.parametrize("labels_from", ["ignore_index", "changed labels", "hook on the head"])
def test_what_the_fused_loss_would_get_wrong(labels_from):
    model, inputs = tiny_model("llama"), batch()
    if labels_from == "hook on the head":
        model.lm_head.register_forward_hook(lambda module, args, out: out * 20)
        theirs = loss_and_gradients(model, inputs)
        assert "hooks on its output" in apply_liger(model).skipped[0].reason
        assert_same_training(theirs, loss_and_gradients(model, inputs))
    elif labels_from == "ignore_index":
        inputs = batch(ignored=0.0)
        inputs["ignore_index"] = int(inputs["labels"][0, 3])
        theirs = loss_and_gradients(model, inputs)
        apply_liger(model)
        assert_same_training(theirs, loss_and_gradients(model, inputs))
    else:
        apply_liger(model)
        replace = lambda module, args, kwargs: (args, kwargs | {"labels": kwargs["input_ids"]})  # noqa: E731
        model.register_forward_pre_hook(replace, with_kwargs=True)
        with pytest.raises(ValueError, match="got other labels than those LlamaForCausalLM was called with"):
            loss_and_gradients(model, inputs)


def test_copying_the_head_alone_does_not_copy_the_model():
    model = tiny_model("llama")
    apply_liger(model)
    assert copy.deepcopy(model.lm_head).forward.__self__.fused.model is model


def test_an_error_in_forward_leaves_nothing_behind():
    model, inputs = tiny_model("llama").train(), batch()
    apply_liger(model)
    with pytest.raises(IndexError):
        model(**inputs | {"input_ids": inputs["input_ids"] + 1000})
    assert model.lm_head(torch.randn(2, 11, 64)).shape[-1] == model.config.vocab_size
