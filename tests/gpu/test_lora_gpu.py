"""LoRA on a GPU: adapters' gradients are as good as those of PEFT's own layers, and the same in each run."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import batch, tiny_model

from liger_trainer import apply_liger, revert_liger
from liger_trainer.patching import patch_state

pytestmark = pytest.mark.gpu
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}


def step(model, inputs, autocast=None):
    """Loss and gradients of the adapters."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def error(found, exact):
    """Error of all gradients together, relative to their norm."""
    square = lambda tensors: sum(t.square().sum().item() for t in tensors)  # noqa: E731
    return (square(found[n] - exact[n] for n in exact) / square(exact.values())) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("base", "autocast"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, None), (torch.float32, torch.bfloat16),
     (torch.float16, torch.float16)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("options", [{"r": 16}, {"r": 5, "use_rslora": True}, {"r": 8, "lora_dropout": 0.05}], ids=str)
def test_gradients_are_as_good_as_pefts(options, base, autocast, checkpointing):
    model = tiny_model("llama", attn_implementation="sdpa", **WIDE).cuda()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(base).float()  # the same numbers in each dtype
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **options)
    model = get_peft_model(model, lora)
    inputs = {k: v.cuda() for k, v in batch(rows=8, tokens=60).items()}
    _, exact = step(copy.deepcopy(model), inputs)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(base)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    loss, theirs = step(model, inputs, autocast)
    apply_liger(model, {"unpad": False})
    our_loss, ours = step(model, inputs, autocast)
    assert any(acted.on for acted in patch_state(model).acted["lora"])
    again_loss, again = step(model, inputs, autocast)
    assert our_loss == pytest.approx(loss, rel=2e-2)
    # Without autocast the rest of the model errs by 5 % and more, one rounding of which decides about the ratio.
    assert error(ours, exact) <= (1.2 if autocast else 1.5) * error(theirs, exact)
    assert (our_loss, ours.keys()) == (again_loss, again.keys())
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    revert_liger(model)
    assert step(model, inputs, autocast)[0] == loss
