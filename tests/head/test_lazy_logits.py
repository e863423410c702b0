"""Logits in evaluation: computed only when they are read, and never from changed weights."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import batch, tiny_model

from liger_trainer import apply_liger


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
def test_evaluation_builds_logits_only_when_they_are_read(model_type):
    model, inputs = tiny_model(model_type).eval(), batch()
    with torch.no_grad():
        theirs = model(**inputs)
        apply_liger(model)
        ours = model(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert "not computed" in repr(ours.logits)
    assert ours.logits.shape == theirs.logits.shape
    assert ours.logits.dtype == theirs.logits.dtype
    assert "not computed" in repr(ours.logits.float())  # what accelerate does to bf16 outputs
    read = ours.logits.argmax(-1)
    assert type(read) is torch.Tensor
    assert torch.equal(read, theirs.logits.argmax(-1))
    torch.testing.assert_close(torch.as_tensor(ours.logits.cpu().numpy()), theirs.logits, rtol=1e-5, atol=1e-5)


def test_evaluation_mode_with_gradients_has_real_logits():
    model, inputs = tiny_model("llama").eval(), batch()
    apply_liger(model)
    out = model(**inputs)
    out.logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_lazy_logits_are_not_read_from_changed_weights():
    model, inputs = tiny_model("llama").eval(), batch()
    apply_liger(model)
    with torch.no_grad():
        early, late = model(**inputs).logits, model(**inputs).logits
        values = np.asarray(early)
        assert values.shape == (2, 11, model.config.vocab_size)
        assert torch.equal(copy.deepcopy(early), torch.as_tensor(values))
        model.lm_head.weight.zero_()
        with pytest.raises(RuntimeError, match="has changed"):
            late.sum()
