"""GeGLU: ``gelu(gate) * up`` (arXiv 2002.05202; gelu: arXiv 1606.08415), by the kernels in ``shared/gated.py``.

``gelu(g) = g * Phi(g)`` with the exact normal distribution Phi ("none"), or ``Phi(g) ~ sigmoid(2 u)`` with
``u = sqrt(2 / pi) * (g + 0.044715 g^3)`` ("tanh"). Backward: ``dup = dout * gelu(gate)``,
``dgate = dout * up * gelu'(gate)``, where ``gelu'(g) = Phi(g) + g * Phi'(g)``.
"""

import torch
from torch import Tensor

from . import reference
from .runtime.launch import use_triton
from .shared.gated import GELU_ERF, GELU_TANH, Gating, apply_gated, check_gated

_GATINGS = {"tanh": Gating(GELU_TANH), "none": Gating(GELU_ERF)}


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """``gelu(gate) * up``, computed in fp32 and rounded once.

    Args:
        gate: ``[..., I]``, fp16, bf16, fp32 or fp64; any strides. Without ``up``, ``[..., 2 * I]``: gate, then up.
        up: of ``gate``'s shape, or None.
        approximate: ``"tanh"`` or ``"none"`` (exact), as in ``torch.nn.functional.gelu``.

    Returns:
        ``[..., I]`` in the dtype that the two promote to.

    Raises:
        TypeError: an argument is not floating-point.
        ValueError: ``up`` is not of ``gate``'s shape and device; ``gate``'s last dimension is empty, or odd without
            ``up``; ``approximate`` is unknown.
    """
    check_gated(gate, up)
    if approximate not in _GATINGS:
        raise ValueError(f"approximate: got {approximate!r}; must be 'tanh' or 'none'")
    if not use_triton(gate, up) or torch.float64 in (gate.dtype, None if up is None else up.dtype):
        return reference.geglu(gate, up, approximate=approximate)
    return apply_gated(gate, up, _GATINGS[approximate])
