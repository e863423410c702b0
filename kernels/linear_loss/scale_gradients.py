"""Multiply gradients that forward computed by the upstream gradient, without reading it on the host.

The factor is nearly always 1, and one program that reads it and returns costs microseconds where a multiplication
of the gradient of a large weight costs a read and a write of it.
"""

import torch
from torch import Tensor

from ..runtime.launch import Launcher, cdiv, tl, triton

BLOCK = 8192
MAX_PROGRAMS = 2048  # each walks over several blocks, so that a factor of 1 starts few programs


@triton.jit
def _scale_kernel(x_ptr, out_ptr, scale_ptr, numel, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr).to(tl.float32)
    end = numel
    if IN_PLACE:
        end = tl.where(scale == 1.0, 0, numel)
    full = end // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, full, tl.num_programs(0) * BLOCK):
        x = tl.load(x_ptr + start + lanes).to(tl.float32)
        tl.store(out_ptr + start + lanes, (x * scale).to(out_ptr.dtype.element_ty))
    if tl.program_id(0) == 0:
        mask = full + lanes < end
        x = tl.load(x_ptr + full + lanes, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + full + lanes, (x * scale).to(out_ptr.dtype.element_ty), mask=mask)


def fp16_peak(dtype: torch.dtype, *row_grads: Tensor | None) -> Tensor | None:
    """The largest of per-token gradients: divided by it, fp16 dlogits use their range. ``None`` for other dtypes."""
    if dtype != torch.float16:
        return None
    grads = torch.stack([g.abs().amax() if g.numel() else g.new_ones(()) for g in row_grads if g is not None])
    return grads.amax().clamp(min=torch.finfo(torch.float32).tiny)


def graph_is_kept() -> bool:
    """Whether the running backward was asked to retain its graph, so that it may run again on the same tensors."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


_launch_scale = Launcher(_scale_kernel)


def scale_gradients(
    grads: list[Tensor | None], dtypes: list[torch.dtype | None], scale: Tensor, keep: bool
) -> list[Tensor | None]:
    """``grads`` (contiguous) times ``scale`` (one element on their device), rounded to ``dtypes``.

    In place where the dtype allows it, unless ``keep`` says that ``grads`` will be needed again.
    """
    out = []
    for grad, dtype in zip(grads, dtypes, strict=True):
        if grad is None:
            out.append(None)
            continue
        in_place = grad.dtype == dtype and not keep
        target = grad if in_place else torch.empty(grad.shape, dtype=dtype, device=grad.device)
        if grad.numel():
            _launch_scale(
                (min(cdiv(grad.numel(), BLOCK), MAX_PROGRAMS), 1, 1),
                (grad, target, scale),
                (grad.numel(),),
                (),
                (in_place, BLOCK),
                (("num_warps", 8),),
            )
        out.append(target)
    return out
