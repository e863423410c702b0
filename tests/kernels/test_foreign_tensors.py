"""Tensors that are not torch's own: quantised ones, whose memory holds other numbers, and distributed ones."""

import pytest
import torch
import torch.distributed as dist
from foreign import Quantised
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from variants import Variant, calls

from benchmarks.cases import definition, own_op
from benchmarks.ops import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["quantised", "distributed"])
def foreign(request):
    """Makes a tensor of a foreign type."""
    if request.param == "quantised":
        yield Quantised
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(DEVICE, (1,))
    yield lambda values: distribute_tensor(values, mesh, [Replicate()])
    dist.destroy_process_group()


def plain(tensor):
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor.values if isinstance(tensor, Quantised) else tensor


@pytest.mark.parametrize("op", OPS)
def test_ops_compute_with_the_values_of_foreign_tensors(op, foreign, backend):
    """Quantised are the weights, distributed are all tensors."""
    case, _, _ = calls(op, Variant(), 5, 48, DEVICE)
    names = ["weight"] if foreign is Quantised else list(case.tensors)
    if not set(names) & set(case.tensors):
        pytest.skip("the op has no weight")

    def run(function, convert):
        tensors = {}
        for name, t in case.tensors.items():
            t = t.detach().float() if t.is_floating_point() else t
            tensors[name] = (convert(t) if name in names else t.clone()).requires_grad_(name in case.leaves)
        out = function(*tensors.values())
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        leaves = [tensors[name] for name in case.leaves]
        grads = torch.autograd.grad(sum(o.square().sum() for o in out), leaves)
        return [*map(plain, out), *map(plain, grads)]

    torch.testing.assert_close(run(own_op(op), foreign), run(definition(op), torch.clone))
