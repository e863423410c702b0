"""Use single kernels in a model of your own, without transformers: as functions, and as modules.

    python examples/single_kernels.py

Each block compares with the same formula in plain PyTorch. Without a GPU the kernels' own definitions run.
"""

import torch
from torch import nn
from torch.nn import functional as F

from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from liger_trainer.kernels.rms_norm import rms_norm
from liger_trainer.kernels.swiglu import swiglu
from liger_trainer.nn import LigerLinearCrossEntropyLoss, LigerRMSNorm

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"


def compare(name: str, ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Print the largest difference, relative to the largest value, and stop if it is more than rounding."""
    error = ((ours - plain).abs().max() / plain.abs().max()).item()
    print(f"{name:<28} differs by {error:.1e}")
    assert error < 1e-4


# Functions take and return ordinary tensors, and backward works as with any other.
x = torch.randn(4, 16, 64, device=device, requires_grad=True)
weight = torch.ones(64, device=device, requires_grad=True)
compare("rms_norm", rms_norm(x, weight, eps=1e-6), F.rms_norm(x, (64,), weight, eps=1e-6))

gate, up = torch.randn(2, 4, 16, 128, device=device).unbind()
compare("swiglu", swiglu(gate, up), F.silu(gate) * up)

# The loss of a language model from its hidden states: the logits [tokens, vocabulary] never exist as a whole.
head = torch.randn(1000, 64, device=device, requires_grad=True)
labels = torch.randint(0, 1000, (4, 16), device=device)
labels[:, :4] = -100  # positions without a label cost nothing
loss = linear_cross_entropy(x, head, labels)
compare("linear_cross_entropy", loss, F.cross_entropy((x @ head.T).flatten(0, 1), labels.flatten()))
loss.backward()


# Modules have the arguments and the state dicts of torch's.
class Block(nn.Module):
    """A gated MLP between a norm and a residual."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = LigerRMSNorm(size)
        self.gate_up = nn.Linear(size, 4 * size, bias=False)
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` to the same."""
        return x + self.down(swiglu(*self.gate_up(self.norm(x)).chunk(2, dim=-1)))


blocks = nn.Sequential(nn.Embedding(1000, 64), Block(64), Block(64)).to(device)
criterion = LigerLinearCrossEntropyLoss(64, 1000, device=device)  # holds the head's weight
optimizer = torch.optim.AdamW([*blocks.parameters(), *criterion.parameters()], lr=1e-2)
ids = torch.randint(0, 1000, (8, 33), device=device)
losses = []
for _ in range(10):
    loss = criterion(blocks(ids[:, :-1]), ids[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"{'own model':<28} loss {losses[0]:.3f} to {losses[-1]:.3f}")
