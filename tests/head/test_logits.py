"""Logits of a patched model: those of the forward that made them, or an error that says what to do."""

import copy
import pickle

import accelerate
import numpy as np
import pytest
import torch
from tiny_models import batch, tiny_model

from liger_trainer import apply_liger
from liger_trainer.head.per_thread import loss_only
from liger_trainer.head.unbuilt_logits import LossOnlyLogits, UnbuiltLogits


def both(model_type="llama", **overrides):
    """The same model unpatched and patched, in evaluation mode."""
    plain = tiny_model(model_type, **overrides).eval()
    patched = copy.deepcopy(plain)
    apply_liger(patched, {"strict": True, "attention": patched.config._attn_implementation == "sdpa"})
    return plain, patched


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
def test_evaluation_has_the_logits_of_an_unpatched_model(model_type):
    plain, patched = both(model_type)
    with torch.no_grad():
        theirs, ours = plain(**batch()), patched(**batch())
    assert type(ours.logits) is torch.Tensor
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)


def test_evaluation_mode_with_gradients_has_real_logits():
    _, patched = both()
    patched(**batch()).logits.sum().backward()
    assert patched.lm_head.weight.grad is not None


def ema_swap(model):
    raw = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.copy_(p * 1.5)
    out = model(**batch())
    for p, old in zip(model.parameters(), raw, strict=True):
        p.data.copy_(old)
    return out


def hidden_states_changed_in_place(model):
    out = model(**batch(), output_hidden_states=True)
    out.hidden_states[-1].zero_()
    return out


def exchanged_parameters(model):
    scaled = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    return torch.func.functional_call(model, scaled, kwargs=batch())


def inference_tensors(model):
    with torch.inference_mode():
        return model(**batch())


def offloaded(model):
    return accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))(**batch())


def weights_replaced(model):
    out = model(**batch())
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    return out


@pytest.mark.parametrize(
    "forward",
    [ema_swap, hidden_states_changed_in_place, exchanged_parameters, inference_tensors, offloaded, weights_replaced],
)
@torch.no_grad()
def test_logits_are_those_of_their_forward(forward):
    theirs, ours = map(forward, both())
    torch.testing.assert_close(ours.loss, theirs.loss)
    for read in (lambda logits: logits, torch.from_dlpack, lambda logits: torch.as_tensor(np.from_dlpack(logits))):
        torch.testing.assert_close(read(ours.logits), theirs.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_evaluation_forward_compiles_without_a_break():
    torch._dynamo.reset()
    plain, patched = both(use_cache=False)
    theirs, ours = plain(**batch()), torch.compile(patched, fullgraph=True, backend="eager")(**batch())
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)


READS = {
    "argmax": lambda x: x.argmax(-1), "index": lambda x: x[:, -1], "shift": lambda x: x[:, :-1],
    "loop": list, "item": lambda x: x.item(),
    "numpy": np.asarray, "array": lambda x: x.detach().numpy(), "tolist": lambda x: x.tolist(),
    "softmax": lambda x: x.float().softmax(-1), "log_softmax": lambda x: torch.log_softmax(x, -1),
    "sum": lambda x: x.sum(), "mean of all": lambda x: (x * 2).detach().mean(), "compare": lambda x: x == 0,
    "square": lambda x: x * x, "power": lambda x: x**2, "reciprocal": lambda x: 1 / x, "add": lambda x: x + 1,
    "tensor": lambda x: x * torch.ones(()), "loss": lambda x: torch.nn.functional.cross_entropy(x[0], x[0]),
    "dlpack": torch.from_dlpack, "numpy dlpack": np.from_dlpack, "bool": bool, "copy": copy.deepcopy,
    "pickle": pickle.dumps, "cat": lambda x: torch.cat([x, x]), "top": lambda x: torch.topk(x, 1),
    "max": lambda x: max(x), "matmul": lambda x: x @ torch.ones(0, 3), "zeros_like": torch.zeros_like,
    "where": lambda x: torch.where(x > 0, x, x),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["training", "loss only"])
def test_reading_logits_that_were_not_built_is_an_error(mode):
    _, patched = both("gemma2")
    if mode == "training":
        logits, message = patched.train()(**batch()).logits, "training logits are not built; set fused_loss: false"
        assert type(logits) is UnbuiltLogits
    else:
        with torch.no_grad(), loss_only():
            logits, message = patched(**batch()).logits, "set prediction_loss_only: false"
        assert type(logits) is LossOnlyLogits
    for name, read in READS.items():
        with pytest.raises(RuntimeError, match=message):
            pytest.fail(f"{name} gave {read(logits)}")
    assert message in repr(logits)
    scaled = (logits / 2, logits.tanh() * 3, logits[..., :9])
    for passed in (logits.detach(), logits.float(), logits.to("cpu"), logits.bfloat16(), *scaled):
        assert isinstance(passed, UnbuiltLogits)
        assert passed.shape == (*batch()["labels"].shape, 0)
