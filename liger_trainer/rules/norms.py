"""Rule for RMS norms and layer norms: a 1-D weight (or none), an epsilon, a forward of one tensor."""

import contextlib
import functools

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..kernels import reference
from ..kernels.layer_norm import layer_norm
from ..kernels.rms_norm import rms_norm
from ..probing.probe import TOLERANCE, difference, forward_parameters, generator, stand_in, takes_one_tensor
from ..probing.rule import Refusal, Replacement, Verdict
from ..probing.sharding import full_shape

# Forms of rms_norm. Cast-then-scale (llama) and scaling in fp32 (gemma, olmo2) differ by one rounding only; the probe
# takes the form with the smaller error, and the first of equals.
RMS_VARIANTS = {
    "rms_norm": {},
    "rms_norm, scaled in fp32": {"scale_in_fp32": True},
    "rms_norm, 1 + weight in fp32": {"weight_offset": 1.0, "scale_in_fp32": True},
    "rms_norm, 1 + weight": {"weight_offset": 1.0},
}
# Tried where the module has its epsilon in its code instead of an attribute.
COMMON_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
# (dtype of x, dtype of the parameters): plain training in either, and bf16 activations with fp32 parameters.
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
WEIGHTLESS_WIDTH = 64


def _autocast_dtype(x):
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if autocast else x.dtype


# By whose dtype the output has under CUDA autocast: that for fp32 and for bf16 input, and what ``layer_norm`` is told.
# One written out has its input's, and Nemotron's, which casts and turns autocast off, that of autocast.
AUTOCAST_DTYPES = {
    "torch's": ((torch.float32, torch.float32), lambda x: None),
    "the input's": ((torch.float32, torch.bfloat16), lambda x: x.dtype),
    "autocast's": ((torch.bfloat16, torch.bfloat16), _autocast_dtype),
}


def matches(module: nn.Module) -> bool:
    """No children, no parameters but a 1-D weight and bias, an epsilon or ``normalized_shape``, one input."""
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    if module._modules or module._buffers or not parameters.keys() <= {"weight", "bias"}:
        return False
    if hasattr(module, "num_groups") or hasattr(module, "num_features"):  # statistics over something else than a row
        return False
    if any(len(full_shape(p)) != 1 for p in parameters.values()) or not takes_one_tensor(module):
        return False
    return bool(_eps_attributes(module)) or hasattr(module, "normalized_shape")


def probe(module: nn.Module) -> Verdict:
    """The form of ``rms_norm`` or ``layer_norm`` that agrees with ``module`` in every dtype it accepts."""
    original = type(module).forward
    has_weight = module._parameters.get("weight") is not None
    has_bias = module._parameters.get("bias") is not None
    samples = list(_samples(module, original))
    best = None
    for eps in _eps_attributes(module) or COMMON_EPS:
        for kind, variant, options in _forms(has_weight, has_bias):
            op = functools.partial(getattr(reference, kind), eps=_reader(eps)(module), **options)
            errors = [difference(op(x, *parameters), out) / limit for x, parameters, out, limit in samples]
            if max(errors) <= 1 and (best is None or sum(errors) < best[0]):
                best = sum(errors), kind, variant, eps, options
    if best is None:
        kind = "layer_norm" if has_bias else "rms_norm"
        return Refusal(kind, "its forward is no RMS norm or layer norm of the forms known")
    _, kind, variant, eps, options = best
    if kind == "rms_norm":
        forward = _rms_norm_forward(original, has_weight, has_bias, eps, options)
    else:
        _, dtype_of = AUTOCAST_DTYPES[_autocast_behaviour(module, original)]
        forward = _layer_norm_forward(original, has_weight, has_bias, eps, options, dtype_of)
    return Replacement(kind, variant, "forward", lambda config: forward)


def _rows(module) -> torch.Tensor:
    """Random rows of the module's width, of very different sizes: the small ones tell one epsilon from another."""
    weight = module._parameters.get("weight")
    shape = getattr(module, "normalized_shape", WEIGHTLESS_WIDTH)
    width = full_shape(weight)[0] if weight is not None else shape if isinstance(shape, int) else shape[-1]
    rows = torch.randn(2, 2, 4, width, generator=generator()) + 0.1
    return rows * torch.tensor([1.0, 1e-1, 1e-2, 1e-3])[:, None]


def _samples(module, original):
    """(x, parameters, the module's output, tolerance) for each combination of dtypes the module accepts."""
    rows = _rows(module)
    for x_dtype, dtype in DTYPES:
        twin, x = stand_in(module, dtype), rows.to(x_dtype)
        try:
            with torch.no_grad():
                out = original(twin, x)
        except RuntimeError:
            if x_dtype != dtype:  # torch's own layer_norm refuses mixed dtypes: nothing to agree with
                continue
            raise
        yield (
            x,
            [p for p in (twin._parameters.get("weight"), twin._parameters.get("bias")) if p is not None],
            out,
            (TOLERANCE[x_dtype]),
        )


@contextlib.contextmanager
def _cuda_autocast():
    """CUDA autocast to bf16 where there may be no CUDA: ``torch.autocast`` would turn itself off."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


def _autocast_behaviour(module, original) -> str:
    """Which of ``AUTOCAST_DTYPES`` the module's output has under CUDA autocast, seen on tensors that look like CUDA's.

    Raises:
        ValueError: none of them.
    """
    if original is nn.LayerNorm.forward:
        return "torch's"
    rows, outs = _rows(module), []
    twin = stand_in(module, torch.float32)
    with FakeTensorMode() as mode, torch.no_grad(), _cuda_autocast():

        def on_cuda(t, dtype):
            return FakeTensor(mode, torch.empty(t.shape, dtype=dtype, device="meta"), torch.device("cuda:0"))

        twin._parameters = {n: None if p is None else on_cuda(p, p.dtype) for n, p in twin._parameters.items()}
        for x_dtype in (torch.float32, torch.bfloat16):
            outs.append(original(twin, on_cuda(rows, x_dtype)).dtype)
    for name, (expected, _) in AUTOCAST_DTYPES.items():
        if tuple(outs) == expected:
            return name
    raise ValueError(f"under autocast it gives {outs[0]} for fp32 and {outs[1]} for bf16")


def _eps_attributes(module: nn.Module) -> list[str]:
    return [k for k, v in vars(module).items() if "eps" in k.lower() and isinstance(v, float)]


def _forms(has_weight: bool, has_bias: bool):
    if not has_bias:
        forms = RMS_VARIANTS if has_weight else {"rms_norm, no weight": {}}
        for variant, options in forms.items():
            yield "rms_norm", variant, options
    missing = "" if has_bias else ", no bias" if has_weight else ", no weight"
    yield "layer_norm", f"layer_norm{missing}", {}
    if has_weight:
        yield "layer_norm", f"layer_norm, 1 + weight{missing}", {"weight_offset": 1.0}


def _rms_norm_forward(original, has_weight, has_bias, eps, options):
    read_eps, name = _reader(eps), forward_parameters(original)[0].name
    under_autocast = original is nn.RMSNorm.forward  # autocast runs torch's own rms_norm in fp32

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs[name]
        if under_autocast and torch.is_autocast_enabled(x.device.type):
            x = x.float()
        return rms_norm(x, self.weight if has_weight else None, read_eps(self), **options)

    return forward


def _layer_norm_forward(original, has_weight, has_bias, eps, options, dtype_of):
    read_eps, name = _reader(eps), forward_parameters(original)[0].name

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs[name]
        weight, bias = self.weight if has_weight else None, self.bias if has_bias else None
        return layer_norm(x, weight, bias, read_eps(self), out_dtype=dtype_of(x), **options)

    return forward


def _reader(eps: str | float):
    """A function of the module: the attribute of that name as it is then, or the constant."""
    return (lambda module: getattr(module, eps)) if isinstance(eps, str) else (lambda module: eps)
