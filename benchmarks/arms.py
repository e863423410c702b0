"""Who is measured: for every arm and op, the call a user of that library would make.

Each function takes a ``Case`` and returns ``(function, arguments)``; the function returns the op's outputs as a tuple.
``Unsupported`` says that a library has no such op, ``Absent`` that it is not installed. Imports are inside the
functions: an arm's process loads its own library and no other.
"""

import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.cases import EPS, Case

ARMS = ("ours", "ours_low_memory", "hf", "compile", "torch", "liger", "liger_fp32", "trl", "cce")
PACKAGE_OF = {"liger": "liger_kernel", "liger_fp32": "liger_kernel", "trl": "trl", "cce": "cut_cross_entropy"}
IMPORTS = {  # the modules that take long to import, by arm
    "ours": ("liger_trainer.kernels.linear_logprobs",),
    "ours_low_memory": ("liger_trainer.kernels.linear_logprobs",),
    "hf": ("transformers.models.llama.modeling_llama",),
    "compile": ("transformers.models.llama.modeling_llama", "torch._inductor.compile_fx"),
    "liger": ("liger_kernel.transformers.functional",),
    "liger_fp32": ("liger_kernel.transformers.functional",),
    "trl": ("trl.trainer.utils",),
    "cce": ("cut_cross_entropy",),
}
Call = tuple[Callable, tuple]


class Unsupported(Exception):
    """This arm has no such op."""


class Absent(Exception):
    """This arm's package is not installed."""


def _inputs(case: Case) -> tuple:
    """The op's inputs in the order of our own functions."""
    order = {
        "rms_norm": ("x", "weight"),
        "add_rms_norm": ("x", "residual", "weight"),
        "layer_norm": ("x", "weight", "bias"),
        "swiglu": ("gate", "up"),
        "geglu": ("gate", "up"),
        "clamped_swiglu": ("gate_up",),
        "rope": ("q", "k", "cos", "sin"),
        "cross_entropy": ("logits", "labels"),
    }
    return tuple(case[name] for name in order.get(case.op, ("hidden", "weight", "labels")))


def _one(fn: Callable, *extra) -> Callable:
    """``fn`` with ``extra`` arguments after the tensors, its one output as a tuple."""
    return lambda *tensors: (fn(*tensors, *extra),)


def ours(case: Case, **options) -> Call:
    """``liger_trainer.kernels``, default settings."""
    op = getattr(importlib.import_module(f"liger_trainer.kernels.{case.op}"), case.op)
    extra = (EPS,) if case.op.endswith("norm") else ()
    if case.op in ("rope", "add_rms_norm"):
        return lambda *tensors: op(*tensors, *extra), _inputs(case)
    if case.op == "clamped_swiglu":
        options["interleaved"] = True
    if case.op == "linear_logprobs":
        return lambda *tensors: (op(*tensors, **options).log_probs,), _inputs(case)
    return lambda *tensors: (op(*tensors, *extra, **options),), _inputs(case)


def ours_low_memory(case: Case) -> Call:
    """``linear_cross_entropy`` in its low-memory setting."""
    if case.op != "linear_cross_entropy":
        raise Unsupported("the setting exists for linear_cross_entropy only")
    return ours(case, low_memory=True)


def _log_prob_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    valid = labels != -100
    picked = logits.float().log_softmax(-1).gather(-1, labels.where(valid, 0)[:, None]).squeeze(-1)
    return picked.where(valid, 0.0)


def hf(case: Case) -> Call:
    """The transformers module or function, eager; ``linear_logprobs``: the formula of its users."""
    from transformers.activations import ACT2FN
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple:
        return (ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=labels),)

    match case.op:
        case "rms_norm" | "add_rms_norm":
            norm = LlamaRMSNorm(case.spec["cols"], EPS)
            norm.weight = case["weight"]
            if case.op == "rms_norm":
                return lambda x: (norm(x),), (case["x"],)

            def add_norm(x: torch.Tensor, residual: torch.Tensor) -> tuple:
                total = residual + x
                return norm(total), total

            return add_norm, (case["x"], case["residual"])
        case "swiglu" | "geglu":
            activation = ACT2FN["silu" if case.op == "swiglu" else "gelu_pytorch_tanh"]
            return lambda gate, up: (activation(gate) * up,), _inputs(case)
        case "clamped_swiglu":
            from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

            settings = SimpleNamespace(limit=7.0, alpha=1.702)
            return lambda gate_up: (GptOssExperts._apply_gate(settings, gate_up),), _inputs(case)
        case "rope":
            return apply_rotary_pos_emb, _inputs(case)
        case "cross_entropy":
            return loss, _inputs(case)
        case "linear_cross_entropy":
            return lambda hidden, weight, labels: loss(F.linear(hidden, weight), labels), _inputs(case)
        case "linear_logprobs":
            return lambda h, w, labels: (_log_prob_of_label(F.linear(h, w), labels),), _inputs(case)
        case _:
            raise Unsupported("transformers uses torch's own layer_norm: see the torch arm")


def torch_own(case: Case) -> Call:
    """The fused op of PyTorch itself, where there is one."""
    width = case.spec.get("cols")
    match case.op:
        case "rms_norm":
            return lambda x, weight: (F.rms_norm(x, (width,), weight, EPS),), _inputs(case)
        case "layer_norm":
            return lambda x, weight, bias: (F.layer_norm(x, (width,), weight, bias, EPS),), _inputs(case)
        case "cross_entropy":
            return _one(F.cross_entropy), _inputs(case)
        case "linear_cross_entropy" if hasattr(F, "linear_cross_entropy"):
            return lambda h, w, labels: (F.linear_cross_entropy(h, w, labels, ignore_index=-100),), _inputs(case)
        case _:
            raise Unsupported("this PyTorch has no fused op for it")


def compiled(case: Case) -> Call:
    """``torch.compile`` of the eager arm, static shapes."""
    import torch._functorch.config as functorch_config

    fn, inputs = torch_own(case) if case.op == "layer_norm" else hf(case)
    torch._dynamo.reset()
    # With donated buffers backward cannot be timed on its own (retain_graph); heads are timed as a whole anyway.
    functorch_config.donated_buffer = case.op.startswith("linear")
    return torch.compile(fn, dynamic=False), inputs


def liger(case: Case, accum_dtype: torch.dtype | None = None) -> Call:
    """liger-kernel's functional ops, default settings."""
    from liger_kernel.transformers import functional as ops

    match case.op:
        case "rms_norm":
            return _one(ops.liger_rms_norm, EPS), _inputs(case)
        case "add_rms_norm":
            return lambda *tensors: ops.liger_fused_add_rms_norm(*tensors, EPS), _inputs(case)
        case "layer_norm":
            return _one(ops.liger_layer_norm, EPS), _inputs(case)
        case "swiglu":
            return _one(ops.liger_swiglu), _inputs(case)
        case "geglu":
            return _one(ops.liger_geglu), _inputs(case)
        case "rope":
            return ops.liger_rope, _inputs(case)
        case "cross_entropy":
            return _one(ops.liger_cross_entropy), _inputs(case)
        case "linear_cross_entropy":
            fused = ops.liger_fused_linear_cross_entropy
            return lambda h, w, labels: (fused(h, w, labels, accum_dtype=accum_dtype),), _inputs(case)
        case _:
            raise Unsupported("liger-kernel has no such op: per-token log-probabilities of its head, a clamped SwiGLU")


def liger_fp32(case: Case) -> Call:
    """liger-kernel's fused head with the weight gradient accumulated in fp32."""
    if case.op != "linear_cross_entropy":
        raise Unsupported("the setting exists for linear_cross_entropy only")
    return liger(case, torch.float32)


def trl(case: Case) -> Call:
    """TRL's head: valid positions only, per-token log-probabilities; their mean is the loss."""
    if not case.op.startswith("linear"):
        raise Unsupported("TRL has a kernel for the head only")
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as tile

    def log_probs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        mask = labels != -100
        kept = ChunkedLogProbFunction.apply(
            hidden[mask], weight, None, labels[mask], 1.0, tile, None, 1.0, ("log_probs",)
        )
        return kept[0].new_zeros(mask.shape).masked_scatter(mask, kept[0])

    if case.op == "linear_logprobs":
        return _one(log_probs), _inputs(case)
    return lambda h, w, labels: (-log_probs(h, w, labels).sum() / (labels != -100).sum(),), _inputs(case)


def cce(case: Case) -> Call:
    """cut-cross-entropy, default settings: it leaves small probabilities out of the gradient."""
    if case.op != "linear_cross_entropy":
        raise Unsupported("cut-cross-entropy has linear_cross_entropy only")
    from cut_cross_entropy import linear_cross_entropy

    return _one(linear_cross_entropy), _inputs(case)


_BUILDERS = {
    "ours": ours,
    "ours_low_memory": ours_low_memory,
    "hf": hf,
    "compile": compiled,
    "torch": torch_own,
    "liger": liger,
    "liger_fp32": liger_fp32,
    "trl": trl,
    "cce": cce,
}


def make(arm: str, case: Case) -> Callable[[], tuple]:
    """The call of ``arm`` on the inputs of ``case``, without arguments.

    Raises ``Absent`` when the arm's package is not installed and ``Unsupported`` when it has no such op.
    """
    package = PACKAGE_OF.get(arm)
    if package is not None and importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    fn, inputs = _BUILDERS[arm](case)
    return lambda: fn(*inputs)
