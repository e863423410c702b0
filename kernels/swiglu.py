"""SwiGLU: ``silu(gate) * up`` (arXiv 2002.05202), by the kernels in ``shared/gated.py``.

Backward, with ``s = sigmoid(gate)``: ``dup = dout * gate * s`` and ``dgate = dout * up * s * (1 + gate * (1 - s))``.
"""

import torch
from torch import Tensor

from . import reference
from .runtime.launch import use_triton
from .shared.gated import SILU, Gating, apply_gated, check_gated


def swiglu(
    gate: Tensor, up: Tensor | None = None, *, gate_multiplier: float = 1.0, down_multiplier: float = 1.0
) -> Tensor:
    """``down_multiplier * silu(gate_multiplier * gate) * up``, computed in fp32 and rounded once.

    Args:
        gate: ``[..., I]``, fp16, bf16, fp32 or fp64; any strides. Without ``up``, ``[..., 2 * I]``: gate, then up.
        up: of ``gate``'s shape, or None.
        gate_multiplier, down_multiplier: constants, as in Falcon-H1, whose second one follows the down projection.

    Returns:
        ``[..., I]`` in the dtype that the two promote to.

    Raises:
        TypeError: an argument is not floating-point.
        ValueError: ``up`` is not of ``gate``'s shape and device; ``gate``'s last dimension is empty, or odd without
            ``up``.
    """
    check_gated(gate, up)
    if not use_triton(gate, up) or torch.float64 in (gate.dtype, None if up is None else up.dtype):
        return reference.swiglu(gate, up, gate_multiplier=gate_multiplier, down_multiplier=down_multiplier)
    return apply_gated(gate, up, Gating(SILU, gate_multiplier, down_multiplier))
