"""The base class of the ops' autograd functions."""

import torch


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with a cheaper ``apply``: a fifth of an op's time on the host.

    What is left out binds default arguments and unwraps tensors that leaked out of a functorch transform; our functions
    have no defaults and no ``setup_context``. Inside a transform torch's own ``apply`` answers, with its error.
    """

    @classmethod
    def apply(cls, *args):
        """Run ``forward`` and record ``backward``; positional arguments only."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)
