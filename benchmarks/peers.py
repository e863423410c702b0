"""The table of peers: for every arm its label and colour, what must be installed, and how it is applied.

For ops, a peer gives the call that a user of that library would make. For training, it changes the recipe, and the
Trainer that the recipe builds. A new peer is one entry of ``PEERS``. Imports are inside the functions, so that the
process of an arm loads its own library and no other, and a command line lists the arms without torch.
"""

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer

    from benchmarks.cases import Case

Call = Callable[..., Any]  # takes the op's arguments in their order; returns its output or a tuple of them
Evidence = Callable[[], dict[str, Any]]  # is called after training
EPS = 1e-6  # as in ops.py, which needs torch


class NotMeasured(Exception):
    """The arm has no such op (status "unsupported"), or its package is not installed ("absent")."""

    def __init__(self, status: str, note: str):
        super().__init__(note)
        self.status = status


# Ops


def ours(case: "Case", **options: Any) -> Call:
    """``liger_trainer.kernels``, default settings."""
    from benchmarks.cases import own_op
    from benchmarks.ops import OPS

    op = functools.partial(own_op(case.op), **OPS[case.op].options, **options)
    return (lambda *inputs: op(*inputs).log_probs) if case.op == "linear_logprobs" else op


def ours_low_memory(case: "Case") -> Call | None:
    """``linear_cross_entropy`` in its low-memory setting."""
    return ours(case, low_memory=True) if case.op == "linear_cross_entropy" else None


def hf(case: "Case") -> Call | None:
    """The transformers module or function, eager; ``linear_logprobs``: the formula of its users."""
    import torch.nn.functional as F
    from transformers.activations import ACT2FN
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    norm, silu, gelu = LlamaRMSNorm(case.spec.get("cols", 1), EPS), ACT2FN["silu"], ACT2FN["gelu_pytorch_tanh"]
    clamp = SimpleNamespace(limit=7.0, alpha=1.702)
    if case.op.endswith("rms_norm"):
        norm.weight = case["weight"]

    def add_norm(x: "Tensor", residual: "Tensor", weight: "Tensor") -> "tuple[Tensor, Tensor]":
        total = residual + x
        return norm(total), total

    def loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
        return ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=labels)

    def log_probs(hidden: "Tensor", weight: "Tensor", labels: "Tensor") -> "Tensor":
        valid = labels != -100
        logits = F.linear(hidden, weight).float()
        return logits.log_softmax(-1).gather(-1, labels.where(valid, 0)[:, None]).squeeze(-1).where(valid, 0.0)

    return {
        "rms_norm": lambda x, weight: norm(x),
        "add_rms_norm": add_norm,
        "swiglu": lambda gate, up: silu(gate) * up,
        "geglu": lambda gate, up: gelu(gate) * up,
        "clamped_swiglu": lambda gate_up: GptOssExperts._apply_gate(clamp, gate_up),
        "rope": apply_rotary_pos_emb,
        "cross_entropy": loss,
        "linear_cross_entropy": lambda hidden, weight, labels: loss(F.linear(hidden, weight), labels),
        "linear_logprobs": log_probs,
    }.get(case.op)


def torch_own(case: "Case") -> Call | None:
    """The fused op of PyTorch itself, where there is one."""
    import torch.nn.functional as F

    width = (case.spec.get("cols"),)
    calls: dict[str, Call] = {
        "rms_norm": lambda x, weight: F.rms_norm(x, width, weight, EPS),
        "layer_norm": lambda x, weight, bias: F.layer_norm(x, width, weight, bias, EPS),
        "cross_entropy": F.cross_entropy,
    }
    if hasattr(F, "linear_cross_entropy"):
        calls["linear_cross_entropy"] = functools.partial(F.linear_cross_entropy, ignore_index=-100)
    return calls.get(case.op)


def compiled(case: "Case") -> Call | None:
    """``torch.compile`` of the eager arm, static shapes."""
    import torch
    import torch._functorch.config as functorch_config

    torch._dynamo.reset()
    # With donated buffers backward cannot be timed on its own (retain_graph); heads are timed as a whole anyway.
    functorch_config.donated_buffer = case.op.startswith("linear")
    call = torch_own(case) if case.op == "layer_norm" else hf(case)
    return call and torch.compile(call, dynamic=False)


def liger(case: "Case", **head_options: Any) -> Call | None:
    """liger-kernel's functional ops, default settings."""
    from liger_kernel.transformers import functional as ops

    return {
        "rms_norm": lambda x, weight: ops.liger_rms_norm(x, weight, EPS),
        "add_rms_norm": lambda x, residual, weight: ops.liger_fused_add_rms_norm(x, residual, weight, EPS),
        "layer_norm": lambda x, weight, bias: ops.liger_layer_norm(x, weight, bias, EPS),
        "swiglu": ops.liger_swiglu,
        "geglu": ops.liger_geglu,
        "rope": ops.liger_rope,
        "cross_entropy": ops.liger_cross_entropy,
        "linear_cross_entropy": functools.partial(ops.liger_fused_linear_cross_entropy, **head_options),
    }.get(case.op)


def liger_fp32(case: "Case") -> Call | None:
    """liger-kernel's fused head with the weight gradient accumulated in fp32."""
    import torch

    return liger(case, accum_dtype=torch.float32) if case.op == "linear_cross_entropy" else None


def trl(case: "Case") -> Call | None:
    """TRL's head: valid positions only, per-token log-probabilities; their mean is the loss."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as tile

    def log_probs(hidden: "Tensor", weight: "Tensor", labels: "Tensor") -> "Tensor":
        mask = labels != -100
        kept = ChunkedLogProbFunction.apply(
            hidden[mask], weight, None, labels[mask], 1.0, tile, None, 1.0, ("log_probs",)
        )
        return kept[0].new_zeros(mask.shape).masked_scatter(mask, kept[0])

    def loss(hidden: "Tensor", weight: "Tensor", labels: "Tensor") -> "Tensor":
        return -log_probs(hidden, weight, labels).sum() / (labels != -100).sum()

    return {"linear_logprobs": log_probs, "linear_cross_entropy": loss}.get(case.op)


def cce(case: "Case") -> Call | None:
    """cut-cross-entropy, default settings: it leaves small probabilities out of the gradient."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy if case.op == "linear_cross_entropy" else None


# Training


def report_of_ours(trainer: "Trainer", *options: str) -> Evidence:
    """What ``use_liger`` has replaced, how often the fused loss was computed, and that ``options`` were on."""

    def evidence() -> dict[str, Any]:
        from liger_trainer.patching import patch_state

        state = patch_state(trainer.model)
        if state is None:
            return {"replaced": {}}
        heads = [head for head in (state.fused, state.trl_head) if head is not None]
        shown = {"replaced": state.report.counts, "fused_loss_calls": sum(head.calls_fused for head in heads)}
        return shown | {option: getattr(state.config, option) for option in options}

    return evidence


def unpad_alone(trainer: "Trainer") -> Evidence:
    """Run padded batches as one row, with the layers and the loss as another library has left them."""
    from liger_trainer import apply_liger
    from liger_trainer.config import KINDS
    from liger_trainer.patching import core_model
    from liger_trainer.rules.unpad import unpadded_stack

    off = dict.fromkeys(KINDS, False) | {"recompute": "all"}
    apply_liger(trainer.model, off | {"unpad": True, "padding_mask": True})
    stack = unpadded_stack(core_model(trainer.model))
    return lambda: {"padding_removed": stack.removed.share() if stack else 0.0}


def graphs(trainer: "Trainer") -> Evidence:
    """Whether ``torch_compile`` wrapped the model, and how many graphs were compiled."""

    def evidence() -> dict[str, Any]:
        from torch._dynamo.eval_frame import OptimizedModule
        from torch._dynamo.utils import counters

        wrapped = isinstance(trainer.model_wrapped, OptimizedModule)
        return {"compiled_model": wrapped, "compiled_graphs": counters["stats"]["unique_graphs"]}

    return evidence


def modules_of_liger_kernel(model: "nn.Module") -> dict[str, int]:
    """How many modules of each class run a forward of liger-kernel's."""
    found: Counter[str] = Counter()
    for module in model.modules():
        forward = getattr(module.forward, "__func__", module.forward)
        found[type(module).__name__] += str(getattr(forward, "__module__", "")).startswith("liger_kernel")
    return dict(+found)


def add_trl_head(trainer: "Trainer") -> Evidence:
    """Compute the loss in TRL's fused head, under the stock Trainer as well."""
    from trl.trainer.utils import add_fused_lm_head

    model, calls = trainer.model, Counter()
    add_fused_lm_head(model)
    headed = model.forward

    # TRL's own trainers pass the flag in compute_loss; the stock Trainer does not. The signature has to stay visible:
    # the Trainer drops the columns of the data that forward does not name.
    @functools.wraps(headed)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = headed(*args, fused_lm_head=True, **kwargs)
        calls["all"] += "log_probs" in output  # a field that the model's own output does not have
        return output

    model.forward = forward
    return lambda: {"trl_head_calls": calls["all"]}


def use_liger_kernel(trainer: "Trainer") -> Evidence:
    """For a model with Medusa heads, liger-kernel's layers in the LM and its fused loss for each head.

    The Trainer's own flag does not know this model and leaves it alone; any other model it has patched already.
    """
    model, calls = trainer.model, Counter()
    if not hasattr(model, "medusa_heads"):
        return lambda: {"liger_kernel_modules": modules_of_liger_kernel(model)}
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model.lm)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def head_loss(hidden: "Tensor", weight: "Tensor", labels: "Tensor") -> "Tensor":
        calls["all"] += 1
        return loss(weight, hidden, labels)

    model.head_loss = head_loss
    return lambda: {"liger_kernel_modules": modules_of_liger_kernel(model), "head_loss_calls": calls["all"]}


@dataclass(frozen=True)
class Peer:
    """One arm.

    Args:
        label: its name in tables and plots.
        color: in plots.
        packages: modules that must be importable; without them the arm's rows say that it is absent.
        ops: the call of an op on the inputs of a case, None for an op that it does not have. None: no arm for ops.
        overrides: recipe keys for training, which win against the recipe's and the suite's. None: no arm for training.
        prepare: functions that get the Trainer that the recipe built, before it trains. Each returns a function that is
            called after training for evidence that the arm was active: a zero or empty value says that it was not.
        arguments: fields of the Trainer's arguments that no command line can give, such as dicts.
    """

    label: str
    color: str
    packages: tuple[str, ...] = ()
    ops: Callable[["Case"], Call | None] | None = None
    overrides: dict[str, Any] | None = None
    prepare: tuple[Callable[["Trainer"], Evidence], ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


OFF, ON = {"use_liger": False}, {"use_liger": True}
PEERS = {
    "ours": Peer("liger_trainer", "#d1495b", (), ours, ON, (report_of_ours,)),
    "ours_low_memory": Peer(
        "liger_trainer, low_memory", "#edae49", (), ours_low_memory, ON | {"liger_config": '{"low_memory": true}'},
        (lambda trainer: report_of_ours(trainer, "low_memory"),),
    ),
    "ours_padded": Peer(
        "liger_trainer, padded", "#e07a85", (), None, ON | {"liger_config": '{"unpad": false}'}, (report_of_ours,)
    ),
    "hf": Peer("HF eager", "#8d99ae", (), hf, OFF),
    "hf_seed_1": Peer("HF eager, seed 1", "#c0c7d3", (), None, OFF | {"seed": 1}),
    "hf_seed_2": Peer("HF eager, seed 2", "#dfe3e8", (), None, OFF | {"seed": 2}),
    "torch": Peer("PyTorch op", "#c0c7d3", (), torch_own),
    "compile": Peer("torch.compile", "#5c677d", (), compiled, OFF | {"torch_compile": True}, (graphs,)),
    "ours_compile": Peer(
        "liger_trainer + torch.compile", "#8c1c2e", (), None, ON | {"torch_compile": True},
        (report_of_ours, graphs),
    ),
    "liger": Peer(
        "liger-kernel", "#00798c", ("liger_kernel",), liger, OFF | {"use_liger_kernel": True}, (use_liger_kernel,)
    ),
    "liger_unpadded": Peer(  # our un-padding around its layers and its loss: the best pairing of existing parts
        "liger-kernel, un-padded", "#0b5563", ("liger_kernel",), None, OFF | {"use_liger_kernel": True},
        (use_liger_kernel, unpad_alone),
    ),
    "liger_fp32": Peer("liger-kernel, fp32 dW", "#66b3bf", ("liger_kernel",), liger_fp32),
    "trl": Peer("TRL", "#6a994e", ("trl",), trl),
    "cce": Peer("CCE", "#9b72aa", ("cut_cross_entropy",), cce),
    "trl_head": Peer("TRL head", "#6a994e", ("trl",), None, OFF, (add_trl_head,)),
    "liger_trl_head": Peer(  # liger-kernel's layers alone
        "liger-kernel + TRL head", "#30638e", ("trl", "liger_kernel"), None, OFF | {"use_liger_kernel": True},
        (use_liger_kernel, add_trl_head),
        {"liger_kernel_config": {"fused_linear_cross_entropy": False, "cross_entropy": False}},
    ),
}  # fmt: skip
# A device budget cuts what comes last: torch.compile, which is slow to start. HF is what others are compared with.
OP_ARMS = tuple(sorted((n for n, peer in PEERS.items() if peer.ops), key=lambda name: name == "compile"))
TRAIN_ARMS = tuple(
    sorted((n for n, p in PEERS.items() if p.overrides is not None), key=lambda name: (name != "hf", "compile" in name))
)


def op_call(arm: str, case: "Case") -> Callable[[], Any]:
    """The call of ``arm`` on the inputs of ``case``, without arguments.

    Raises:
        NotMeasured: there is none.
    """
    peer, inputs = PEERS[arm], tuple(case.tensors.values())
    if peer.missing():
        raise NotMeasured("absent", f"{', '.join(peer.missing())} not installed")
    call = peer.ops and peer.ops(case)
    if call is None:
        raise NotMeasured("unsupported", f"{peer.label} has no {case.op}")
    return lambda: call(*inputs)
