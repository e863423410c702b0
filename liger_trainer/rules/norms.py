"""Rules for RMS norms and layer norms: a 1-D weight (or none), an epsilon, a forward of one tensor."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..config import LigerConfig
from ..kernels import reference
from ..kernels.layer_norm import layer_norm
from ..kernels.rms_norm import rms_norm
from ..probing.probe import (
    TOLERANCE,
    difference,
    forward_parameters,
    full_shape,
    generator,
    probe_copy,
    takes_one_tensor,
)
from ..probing.rule import Acted, Match, Rule, Skip

# Forms of rms_norm. Cast-then-scale (llama) and scaling in fp32 (gemma, olmo2) differ by one rounding only. The probe
# takes the form with the smaller error, and the first of equals.
RMS_VARIANTS: dict[str, dict[str, Any]] = {
    "rms_norm": {},
    "rms_norm, scaled in fp32": {"scale_in_fp32": True},
    "rms_norm, 1 + weight in fp32": {"weight_offset": 1.0, "scale_in_fp32": True},
    "rms_norm, 1 + weight": {"weight_offset": 1.0},
}
# Tried if the module has its epsilon in its code instead of an attribute.
COMMON_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
# (dtype of x, dtype of the parameters): plain training in either, and bf16 activations with fp32 parameters.
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
# T5's norm, whose weight transformers keeps in half precision below fp32 activations, then gives half precision.
NARROW = ((torch.float32, torch.bfloat16),)
WEIGHTLESS_WIDTH = 64


def _autocast_dtype(x: Tensor) -> torch.dtype:
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if autocast else x.dtype


# Output dtype under CUDA autocast: for fp32 and for bf16 input, and the ``out_dtype`` for which ``layer_norm`` agrees.
# A norm written out in Python keeps its input's dtype. Nemotron's casts and disables autocast, so it has autocast's.
AUTOCAST_DTYPES: dict[str, tuple[tuple[torch.dtype, torch.dtype], Callable[[Tensor], torch.dtype | None]]] = {
    "torch's": ((torch.float32, torch.float32), lambda x: None),
    "the input's": ((torch.float32, torch.bfloat16), lambda x: x.dtype),
    "autocast's": ((torch.bfloat16, torch.bfloat16), _autocast_dtype),
}


class _Sample(NamedTuple):
    x: Tensor
    parameters: Sequence[Tensor]
    out: Tensor  # of the module
    tolerance: float


def matches(module: nn.Module) -> bool:
    """No children, no parameters but a 1-D weight and bias, an epsilon or ``normalized_shape``, one input."""
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    if module._modules or module._buffers or not parameters.keys() <= {"weight", "bias"}:
        return False
    if hasattr(module, "num_groups") or hasattr(module, "num_features"):  # does not normalise each row
        return False
    if any(len(full_shape(p)) != 1 for p in parameters.values()) or not takes_one_tensor(module):
        return False
    return bool(_eps_attributes(module)) or hasattr(module, "normalized_shape")


def _has(module: nn.Module, name: str) -> bool:
    return module._parameters.get(name) is not None


def probe(module: nn.Module, config: LigerConfig) -> Match:
    """The form of ``rms_norm`` or ``layer_norm`` that agrees with ``module`` in every dtype it accepts."""
    original = type(module).forward
    has_weight, has_bias = _has(module, "weight"), _has(module, "bias")
    samples = list(_samples(module, original, DTYPES))
    best = None
    for eps in _eps_attributes(module) or COMMON_EPS:
        for kind, variant, options in _forms(has_weight, has_bias):
            op = functools.partial(getattr(reference, kind), eps=_reader(eps)(module), **options)
            errors = [difference(op(s.x, *s.parameters), s.out) / s.tolerance for s in samples]
            if max(errors) <= 1 and (best is None or sum(errors) < best[0]):
                best = sum(errors), kind, variant, eps, options
    if best is None:
        raise Skip("its forward is not an RMS norm or layer norm of a known form")
    _, kind, variant, eps, options = best
    acted = Acted()
    op = functools.partial(getattr(reference, kind), eps=_reader(eps)(module), **options)
    # Whether fp32 rows with weights in half precision stay fp32, as in our op.
    widens = all(difference(op(s.x, *s.parameters), s.out) <= s.tolerance for s in _samples(module, original, NARROW))
    if kind == "rms_norm":
        forward = _rms_norm_forward(original, has_weight, eps, options, acted, widens)
    else:
        _, dtype_of = AUTOCAST_DTYPES[_autocast_behaviour(module, original)]
        forward = _layer_norm_forward(original, has_weight, has_bias, eps, options, dtype_of, acted, widens)
    return Match(kind, variant, methods={"forward": forward}, acted=acted)


def _rows(module: nn.Module) -> Tensor:
    """Random rows of the module's width and of very different magnitudes. Small rows tell epsilons apart."""
    weight = module._parameters.get("weight")
    shape: Any = getattr(module, "normalized_shape", WEIGHTLESS_WIDTH)
    width = full_shape(weight)[0] if weight is not None else shape if isinstance(shape, int) else shape[-1]
    rows = torch.randn(2, 2, 4, width, generator=generator()) + 0.1
    return rows * torch.tensor([1.0, 1e-1, 1e-2, 1e-3])[:, None]


def _samples(
    module: nn.Module, original: Callable, dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]
) -> Iterator[_Sample]:
    """One sample for each combination of dtypes that the module accepts."""
    rows = _rows(module)
    for x_dtype, dtype in dtypes:
        copied, x = probe_copy(module, dtype), rows.to(x_dtype)
        try:
            with torch.no_grad():
                out = original(copied, x)
        except RuntimeError:
            if x_dtype != dtype:  # torch's own layer_norm rejects mixed dtypes
                continue
            raise
        parameters = [p for p in map(copied._parameters.get, ("weight", "bias")) if p is not None]
        yield _Sample(x, parameters, out, TOLERANCE[x_dtype])


@contextlib.contextmanager
def _cuda_autocast() -> Iterator[None]:
    """CUDA autocast to bf16 even without CUDA, where ``torch.autocast`` would disable itself."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


def _autocast_behaviour(module: nn.Module, original: Callable) -> str:
    """The key of ``AUTOCAST_DTYPES`` that describes the module, found with fake CUDA tensors.

    Raises:
        Skip: None of them does.
    """
    if original is nn.LayerNorm.forward:
        return "torch's"
    rows, outs = _rows(module), []
    copied = probe_copy(module, torch.float32)
    with FakeTensorMode() as mode, torch.no_grad(), _cuda_autocast():

        def on_cuda(t: Tensor, dtype: torch.dtype) -> Any:
            return FakeTensor(mode, torch.empty(t.shape, dtype=dtype, device="meta"), torch.device("cuda:0"))

        copied._parameters = {n: None if p is None else on_cuda(p, p.dtype) for n, p in copied._parameters.items()}
        for x_dtype in (torch.float32, torch.bfloat16):
            outs.append(original(copied, on_cuda(rows, x_dtype)).dtype)
    for name, (expected, _) in AUTOCAST_DTYPES.items():
        if tuple(outs) == expected:
            return name
    raise Skip(f"under autocast it gives {outs[0]} for fp32 and {outs[1]} for bf16")


def _eps_attributes(module: nn.Module) -> list[str]:
    return [k for k, v in vars(module).items() if "eps" in k.lower() and isinstance(v, float | None)]


def _forms(has_weight: bool, has_bias: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """``(kind, variant, options)`` of each form to try."""
    if not has_bias:
        forms = RMS_VARIANTS if has_weight else {"rms_norm, no weight": {}}
        for variant, options in forms.items():
            yield "rms_norm", variant, options
    missing = "" if has_bias else ", no bias" if has_weight else ", no weight"
    yield "layer_norm", f"layer_norm{missing}", {}
    if has_weight:
        yield "layer_norm", f"layer_norm, 1 + weight{missing}", {"weight_offset": 1.0}


def _input_name(original: Callable) -> str:
    parameters = forward_parameters(original)
    assert parameters is not None  # ``matches`` has seen them
    return parameters[0].name


def _rms_norm_forward(
    original: Callable, has_weight: bool, eps: str | float, options: dict[str, Any], acted: Acted, widens: bool
) -> Callable:
    read_eps, name = _reader(eps), _input_name(original)
    under_autocast = original is nn.RMSNorm.forward  # autocast runs torch's own rms_norm in fp32

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs[name]
        if not widens and x.dtype == torch.float32 != self.weight.dtype:
            return original(self, x)
        acted.note()
        if under_autocast and torch.is_autocast_enabled(x.device.type):
            x = x.float()
        return rms_norm(x, self.weight if has_weight else None, read_eps(self), **options)

    return forward


def _layer_norm_forward(
    original: Callable,
    has_weight: bool,
    has_bias: bool,
    eps: str | float,
    options: dict[str, Any],
    dtype_of: Callable[[Tensor], torch.dtype | None],
    acted: Acted,
    widens: bool,
) -> Callable:
    read_eps, name = _reader(eps), _input_name(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs[name]
        if not widens and x.dtype == torch.float32 != self.weight.dtype:
            return original(self, x)
        acted.note()
        weight, bias = self.weight if has_weight else None, self.bias if has_bias else None
        return layer_norm(x, weight, bias, read_eps(self), out_dtype=dtype_of(x), **options)

    return forward


def _reader(eps: str | float) -> Callable[[nn.Module], Any]:
    """A function of the module: the current value of the attribute of that name, or the constant.

    torch's norms take ``None`` for the epsilon of fp32.
    """

    def read(module: nn.Module) -> float:
        value = getattr(module, eps) if isinstance(eps, str) else eps
        return torch.finfo(torch.float32).eps if value is None else value

    return read


RULES = (
    Rule(("rms_norm", "layer_norm"), lambda module: not _has(module, "bias") and matches(module), probe),
    Rule(("layer_norm",), lambda module: _has(module, "bias") and matches(module), probe),
)
