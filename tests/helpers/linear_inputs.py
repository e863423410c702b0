"""Inputs for tests of the vocabulary losses, and one forward and backward pass through them."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PADDED_VOCAB = 112  # of 101


def budget(tokens, dtype):
    """The budget that holds the logits of ``tokens`` tokens of the vocabulary below."""
    return tokens * PADDED_VOCAB * dtype.itemsize / 2**20


def make_inputs(tokens=37, hidden_size=12, vocab_size=101, ignored=0.3):
    """Parameters and labels.

    The hidden size is so small that with a budget of 10 to 20 tokens even 16-bit logits are computed in several chunks.
    """
    gen = torch.Generator().manual_seed(tokens)
    hidden, weight, bias = (
        torch.randn(*s, generator=gen) for s in ((tokens, hidden_size), (vocab_size, hidden_size), (vocab_size,))
    )
    labels = torch.randint(0, vocab_size, (tokens,), generator=gen)
    labels[torch.rand(tokens, generator=gen) < ignored] = -100
    params = [t.to(DEVICE).requires_grad_() for t in (hidden, weight * 0.5, bias)]
    return params, labels.to(DEVICE)


def run(op, params, labels, upstream=None, **options):
    hidden, weight, bias = params
    loss = op(hidden, weight, labels, bias, **options)
    stats = ()
    if options.get("return_stats"):
        loss, stats = loss
    upstream = torch.full_like(loss, 2.5) if upstream is None else upstream.to(loss.dtype)
    return loss, torch.autograd.grad(loss, [p for p in params if p is not None and p.requires_grad], upstream), stats
