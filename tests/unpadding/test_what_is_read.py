"""Models that read more than the hidden states of real tokens keep their padding, or get what they read."""

import copy

import pytest
import torch
import transformers
from tiny_models import SIDES, VOCAB, assert_same_training, loss_and_gradients, padded_batch, sdpa_model, tiny_config
from transformers.integrations.neftune import activate_neftune

from liger_trainer import apply_liger
from liger_trainer.rules.unpad import unpadded_stack
from liger_trainer.unpadding import check as check_file


def encoder(kind, model_type="distilbert", **overrides):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {"bert": {"intermediate_size": 48}, "distilbert": {"hidden_dim": 48}}[model_type]
    config = transformers.AutoConfig.for_model(model_type, pad_token_id=0, **sizes, **names, **overrides)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def inputs_for(side, **labels):
    inputs = padded_batch(SIDES[side])
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    del inputs["labels"]
    return inputs | {name: torch.tensor(value) for name, value in labels.items()}


def decoder(kind):
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{kind}").from_config(tiny_config("qwen3"))


def with_embeddings():
    inputs = inputs_for("right", labels=[0, 1])
    ids = inputs.pop("input_ids")
    return inputs | {"inputs_embeds": torch.nn.functional.one_hot(ids, 64 + VOCAB)[..., :64].float()}


def choices():
    inputs = {name: value[None] for name, value in inputs_for("left").items()}
    return inputs | {"labels": torch.tensor([1])}


@pytest.mark.parametrize(
    ("make", "inputs", "times"),
    [
        (lambda: encoder("SequenceClassification", "bert"), inputs_for("right", labels=[0, 1]), 0),
        (lambda: encoder("SequenceClassification"), inputs_for("right", labels=[0, 1]), 1),
        (lambda: encoder("SequenceClassification"), inputs_for("left", labels=[0, 1]), 0),
        (lambda: encoder("MultipleChoice"), choices(), 0),
        (lambda: encoder("TokenClassification"), inputs_for("right", labels=[[1, 0] + [-100] * 9] * 2), 1),
        (lambda: encoder("MaskedLM"), inputs_for("left", labels=[[-100] * 8 + [3, 4, 5]] * 2), 1),
        (lambda: decoder("QuestionAnswering"), inputs_for("left", start_positions=[3, 7], end_positions=[5, 9]), 0),
        (lambda: decoder("SequenceClassification"), with_embeddings(), 0),
    ],
    ids=["pooler", "first token", "padding first", "choices", "tokens", "masked LM", "answers", "last column"],
)
def test_other_heads(make, inputs, times, totals):
    model = make()
    theirs = loss_and_gradients(model, inputs)
    apply_liger(model)
    ours = loss_and_gradients(model, inputs)
    largest = max(gradient.norm() for gradient in theirs[1].values())
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    for name, gradient in theirs[1].items():  # biases of keys have no gradient but noise
        assert (ours[1][name] - gradient).norm() < 1e-5 * max(gradient.norm(), 0.01 * largest), name
    assert len(totals) == times


def test_noise_that_depends_on_the_number_of_columns(totals, caplog):
    inputs = padded_batch(SIDES["right"])
    results = []
    for patched in (False, True):
        model = sdpa_model()
        activate_neftune(model, 5.0)
        if patched:
            apply_liger(model)
        torch.manual_seed(0)
        results.append(loss_and_gradients(model, inputs))
    assert_same_training(*results)
    assert not totals
    assert "neftune" in caplog.text


def test_hooks_on_gradients_see_the_batch(totals):
    model = sdpa_model()
    apply_liger(model)
    shapes = []
    model.model.layers[0].register_full_backward_hook(lambda module, inputs, outputs: shapes.append(outputs[0].shape))
    loss_and_gradients(model, padded_batch(SIDES["right"]))
    assert shapes == [(2, 11, 64)]
    assert not totals


def test_a_first_batch_of_padding_decides_nothing(totals):
    model = sdpa_model()
    report = apply_liger(model)
    inputs = padded_batch(SIDES["right"])
    loss_and_gradients(model, inputs | {"attention_mask": torch.zeros_like(inputs["attention_mask"])})
    loss_and_gradients(model, inputs)
    assert report.counts["unpad"] == 1
    assert len(totals) == 1


def test_an_implementation_that_is_set_later(totals):
    """Flex attention would take the row boundaries for a mask of its own, and writes beyond its memory."""
    model = sdpa_model()
    apply_liger(model)
    model.set_attn_implementation("flex_attention")
    unpadded, inputs = unpadded_stack(model), padded_batch(SIDES["right"])
    assert not unpadded._fits(type(model.model).forward, model.model, inputs)
    model.set_attn_implementation("eager")
    loss_and_gradients(model, inputs)
    assert len(totals) == 1


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (None, 4)], ids=["autocast", "fp32"])
def test_tolerance_is_that_of_the_dtype_that_is_computed_with(dtype, size):
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        assert check_file._precision(torch.zeros(1)) == size


def test_texts_of_a_model_whose_masks_are_made_around_its_stack(totals):
    """Gemma 3 with images: the config around the text's has no id of padding."""
    text = tiny_config("gemma3_text", sliding_window=4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4, vision_use_head=False)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_id=1)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    inputs = padded_batch(SIDES["left"])
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    theirs = loss_and_gradients(model, inputs)
    apply_liger(model)
    for _ in range(2):  # that masks are made outside shows in the first batch
        assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert len(totals) == 1


def test_a_hook_on_the_model_sees_logits_at_padding(totals):
    """As one that adds a term of all logits to the loss does."""

    def z_loss(module, args, output):
        output.loss = output.loss + 0.1 * output.logits.float().logsumexp(-1).square().mean()

    plain, inputs = sdpa_model(), padded_batch(SIDES["right"])
    model = copy.deepcopy(plain)
    apply_liger(model, {"fused_loss": False})
    for each in (plain, model):
        each.register_forward_hook(z_loss)
    assert_same_training(loss_and_gradients(plain, inputs), loss_and_gradients(model, inputs))
    assert not totals


def test_hooks_on_all_modules_see_the_batch(totals):
    model = sdpa_model()
    apply_liger(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        loss_and_gradients(model, padded_batch(SIDES["right"]))
    finally:
        handle.remove()
    assert not totals
