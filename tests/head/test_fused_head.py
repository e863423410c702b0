"""The fused loss in lm_head: the same loss as transformers, for every way to pass labels."""

import copy
import functools
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model

from liger_trainer import apply_liger, revert_liger
from liger_trainer.patching import patch_state


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_loss_is_in_fp32_for_any_dtype_of_the_model(dtype):
    model, inputs = tiny_model("llama").to(dtype), batch()
    theirs = loss_and_gradients(model, inputs)
    apply_liger(model)
    ours = loss_and_gradients(model, inputs)
    assert ours[0].dtype == theirs[0].dtype == torch.float32
    assert {g.dtype for g in ours[1].values()} == {dtype}
    assert_same_training(theirs, ours, 1e-6 if dtype == torch.float64 else 3e-2)
    with torch.no_grad():
        assert model.eval()(**inputs).loss.dtype == torch.float32


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
        forward = model.forward
        model.forward = lambda input_ids, labels, **kwargs: forward(input_ids, labels=input_ids, **kwargs)
        with pytest.raises(ValueError, match="labels: got another value in loss_function than LlamaForCausalLM was"):
            loss_and_gradients(model, inputs)


def forward_in_place(head):
    head.forward = lambda hidden: type(head).forward(head, hidden) * 20


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [lambda head: head.register_forward_hook(lambda module, args, out: out * 20), forward_in_place],
    ids=["hook", "forward"],
)
def test_what_is_done_to_pefts_wrapper_of_the_head_counts(change, when):
    """``get_output_embeddings()`` is that wrapper, so users change it and not the head."""
    model, inputs = tiny_model("llama"), batch()
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, lora)
    if when == "after":
        apply_liger(model)
    change(model.get_output_embeddings())
    if when == "before":
        assert "fused_loss" not in apply_liger(model).counts
    ours = loss_and_gradients(model, inputs)
    revert_liger(model)
    assert_same_training(loss_and_gradients(model, inputs), ours)


def test_copying_the_head_alone_does_not_copy_the_model():
    model = tiny_model("llama")
    apply_liger(model)
    assert copy.deepcopy(model.lm_head).forward.function.__self__.model() is model


def test_an_error_in_forward_leaves_nothing_behind():
    model, inputs = tiny_model("llama").train(), batch()
    apply_liger(model)
    with pytest.raises(IndexError):
        model(**inputs | {"input_ids": inputs["input_ids"] + 1000})
    assert model.lm_head(torch.randn(2, 11, 64)).shape[-1] == model.config.vocab_size


def double(module, args, out):
    return out * 2


def observe(module, args, out):
    out.argmax(-1)


def hook_on_the_head(model):
    model.lm_head.register_forward_hook(double)


def observer_on_the_head(model):
    model.lm_head.register_forward_hook(observe)


def gradient_hook_on_the_head(model):
    model.lm_head.register_full_backward_pre_hook(lambda module, grads: tuple(g * 2 for g in grads))


def forward_wrapped(model):
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: inner(hidden) * 2


def softcap_changed(model):
    model.config.final_logit_softcapping = 0.5


def softcap_removed(model):
    model.config.final_logit_softcapping = None


def scale_changed(model):
    model.logit_scale = 3.0


def divisor_changed(model):
    model.config.logits_scaling = 3.0


def loss_function_replaced(model):
    model.loss_function = lambda logits, labels, **kwargs: logits.float().square().mean()


def weight_of_a_foreign_type(model):
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(IgnoresOut(weight), requires_grad=False)


CHANGES = [
    ("llama", hook_on_the_head), ("llama", observer_on_the_head), ("llama", gradient_hook_on_the_head),
    ("llama", forward_wrapped), ("llama", loss_function_replaced), ("llama", weight_of_a_foreign_type),
    ("gemma2", softcap_changed), ("gemma2", softcap_removed), ("cohere", scale_changed), ("granite", divisor_changed),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "change"), CHANGES)
def test_what_changes_after_patching_takes_the_ordinary_path(model_type, change, caplog):
    model, inputs = tiny_model(model_type), batch()
    patched = copy.deepcopy(model)
    apply_liger(patched)
    for each in (model, patched):
        change(each)
    assert_same_training(loss_and_gradients(model, inputs), loss_and_gradients(patched, inputs))
    assert ("the fused loss did not act" in caplog.text) == (change is not loss_function_replaced)
    with torch.no_grad():
        theirs, ours = model.eval()(**inputs), patched.eval()(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)


def test_changed_settings_are_probed_again_by_apply_liger():
    model, inputs = tiny_model("gemma2"), batch()
    apply_liger(model)
    softcap_changed(model)
    expected = loss_and_gradients(model, inputs)
    apply_liger(model)
    assert_same_training(expected, loss_and_gradients(model, inputs))
    assert patch_state(model).fused.calls_fused == 1


def test_settings_that_are_none_of_the_heads_business_may_change():
    model = tiny_model("gemma2")
    apply_liger(model)
    model.config.use_cache = False
    model.config.pad_token_id = 5
    loss_and_gradients(model, batch())
    assert patch_state(model).fused.calls_fused == 1


class IgnoresOut(torch.Tensor):
    """A tensor subclass that computes, but does not write where ``out=`` says, as torchao's do not."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "out"}
        return super().__torch_function__(function, types, args, kwargs)


def test_a_weight_of_a_foreign_type_is_skipped_with_the_reason():
    model, inputs = tiny_model("llama"), batch()
    weight_of_a_foreign_type(model)
    theirs = loss_and_gradients(model, inputs)
    (skipped,) = apply_liger(model).skipped
    assert skipped.kind == "fused_loss"
    assert "its weight is a IgnoresOut of tests, not a plain tensor" in skipped.reason
    assert_same_training(theirs, loss_and_gradients(model, inputs))


def test_hooks_of_engines_are_no_reason_to_stop():
    model = tiny_model("llama")
    apply_liger(model)
    hook = lambda module, args, out: None  # noqa: E731
    hook.__module__ = "torch.distributed.fsdp._runtime_utils"
    model.lm_head.register_forward_hook(functools.partial(hook))
    loss_and_gradients(model, batch())
    assert patch_state(model).fused.calls_fused == 1


def test_two_threads_evaluate_one_model():
    model = tiny_model("llama").eval()
    apply_liger(model)
    batches = [batch(seed=seed) for seed in range(3)]
    with torch.no_grad():
        expected = [model(**each).loss for each in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    @torch.no_grad()
    def evaluate(inputs):
        return [model(**inputs).loss for _ in range(20)]

    try:
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(evaluate, batches))
    finally:
        sys.setswitchinterval(interval)
    for losses, loss in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.stack(losses), loss.expand(20))


@pytest.mark.triton
def test_under_functorch_the_ordinary_path_runs():
    model, inputs = tiny_model("llama", num_hidden_layers=1).train(), batch()
    expected = loss_and_gradients(model, inputs)
    apply_liger(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(lambda weights: torch.func.functional_call(model, weights, kwargs=inputs).loss)(weights)
    assert_same_training(expected, (expected[0], gradients))


def test_forward_mode_takes_the_ordinary_path():
    model, inputs = tiny_model("llama", attn_implementation="eager").train(), batch()
    apply_liger(model)
    with torch.autograd.forward_ad.dual_level():
        weight = model.lm_head.weight
        tangent = torch.ones_like(weight)
        dual = torch.autograd.forward_ad.make_dual(weight.detach(), tangent)
        loss = torch.func.functional_call(model, {"lm_head.weight": dual}, kwargs=inputs).loss
        slope = torch.autograd.forward_ad.unpack_dual(loss).tangent
    model(**inputs).loss.backward()
    torch.testing.assert_close(slope, (weight.grad * tangent).sum(), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_notices_an_adapter_on_its_head():
    model, inputs = tiny_model("llama", num_hidden_layers=1, use_cache=False).train(), batch()
    apply_liger(model)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    wrapped = get_peft_model(model, lora)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(wrapped, backend="eager")(**inputs).loss, wrapped(**inputs).loss)
