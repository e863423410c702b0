"""A tensor that is not torch's own, as quantised ones are."""

import torch
from torch.utils._pytree import tree_map

KEEP_THE_TYPE = {"detach", "alias", "view", "clone"}


class Quantised(torch.Tensor):
    """Like torchao's tensors: it has no memory of its own dtype, and no operation writes where ``out=`` says."""

    @staticmethod
    def __new__(cls, values):
        options = {"dtype": values.dtype, "device": values.device, "strides": values.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, **options)

    def __init__(self, values):
        self.values = values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def values(x):
            return x.values if isinstance(x, Quantised) else x

        given = {k: v for k, v in tree_map(values, kwargs or {}).items() if k != "out"}
        overload = function.overloadpacket.default if "out" in (kwargs or {}) else function
        out = overload(*tree_map(values, args), **given)
        return cls(out) if function.overloadpacket.__name__ in KEEP_THE_TYPE else out
