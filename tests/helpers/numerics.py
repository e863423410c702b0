"""How the tests judge numbers: against fp64, and never much worse than PyTorch in the same dtype."""

import torch

# A tiny term for errors PyTorch happens not to make: a few roundings of the result's dtype, relative to the largest
# value, which counts as at least 0.1: a result that is exactly 0 may come out as a rounding of its intermediate steps.
TINY = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_no_worse_than_torch(ours, same_dtype, exact, name="output", factor=2.0):
    """``ours`` errs at most ``factor`` times as much as ``same_dtype`` does against ``exact``, plus a tiny term.

    The three are the result of our op, of PyTorch's definition in the same dtype, and of that definition in fp64.
    Both the largest and the root-mean-square error are held to it.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == same_dtype.dtype, f"{name}: dtype {ours.dtype}, expected {same_dtype.dtype}"
    if exact.numel() == 0:
        return
    exact = exact.double()
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    scale = exact.abs().max().clamp(min=0.1)
    for measure in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
        error, baseline = measure(ours.double() - exact), measure(same_dtype.double() - exact)
        limit = factor * baseline + TINY[ours.dtype] * scale
        assert error <= limit, f"{name}: error {error:.3e}, PyTorch's {baseline:.3e}, limit {limit:.3e}"


def random_rows(shape, layout, device):
    """Random numbers of ``shape`` on ``device``: "contiguous", "sliced" out of wider rows, or "transposed" rows."""
    x = torch.randn(*shape[:-1], 3 * shape[-1], device=device)[..., shape[-1] : 2 * shape[-1]]
    if layout == "contiguous":
        return x.contiguous()
    return x.transpose(0, -2).contiguous().transpose(0, -2) if layout == "transposed" else x


def as_dtype(tensors, dtype):
    """Fresh leaf copies of ``tensors`` in ``dtype`` that keep strides and ``requires_grad``; other values pass."""
    out = []
    for t in tensors:
        if torch.is_tensor(t) and t.is_floating_point():
            copy = torch.empty_strided(t.size(), t.stride(), dtype=dtype, device=t.device)
            copy.copy_(t.detach())
            t = copy.requires_grad_(t.requires_grad)
        out.append(t)
    return out
