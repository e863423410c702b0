"""linear_splade against its definition: values, gradients, masks, ties, odd shapes, frozen inputs, wrong arguments."""

import pytest
import torch

from liger_trainer.kernels import reference
from liger_trainer.kernels.linear_splade import linear_splade

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMS = [(pooling, activation) for pooling in ("max", "sum") for activation in ("relu", "log1p_relu")]


def inputs(batch=3, tokens=9, width=12, vocab=45, device="cpu", dtype=torch.float32, bias=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, width), (vocab, width), *([(vocab,)] if bias else [])]
    params = [torch.randn(shape, generator=random).to(device, dtype).requires_grad_() for shape in shapes]
    mask = (torch.rand(batch, tokens, generator=random) < 0.7).long().to(device)
    mask[1] = 0  # a sequence of which no token counts
    return params if bias else [*params, None], mask


def run(op, params, mask, **options):
    out = op(*params, mask, **options)
    random = torch.Generator().manual_seed(9)
    upstream = torch.randn(out.shape, generator=random).to(out.device)
    wanted = [p for p in params if p is not None and p.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("pooling", "activation"), FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("budget", [64.0, 0.002])
def test_values_and_gradients(pooling, activation, bias, budget, device):
    if device == "cuda":
        params, mask = inputs(5, 33, 72, 1531, device, bias=bias)
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        params, mask = inputs(bias=bias)
    options = {"pooling": pooling, "activation": activation}
    ours = run(linear_splade, params, mask, **options, logits_budget_mib=budget)
    for mine, expected in zip(ours, run(reference.linear_splade, params, mask, **options), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    assert not ours[0][1].any()
    assert ours[0].dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 8, 17])
def test_without_a_mask_and_with_strided_inputs(tokens):
    (hidden, weight, bias), _ = inputs(2, tokens, 7, 33)
    strided = [hidden.transpose(1, 2).contiguous().transpose(1, 2), weight.t().contiguous().t(), bias]
    strided = [p.detach().requires_grad_() for p in strided]
    ours, expected = run(linear_splade, strided, None), run(reference.linear_splade, strided, None)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs(frozen):
    params, mask = inputs()
    params[frozen].requires_grad_(False)
    for pooling in ("max", "sum"):
        expected = run(reference.linear_splade, params, mask, pooling=pooling)
        for mine, theirs in zip(run(linear_splade, params, mask, pooling=pooling), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_equal_logits_give_the_gradient_to_the_first_token():
    hidden = torch.ones(1, 4, 3, requires_grad=True)
    weight = torch.ones(2, 3)
    out = linear_splade(hidden, weight, mask=torch.tensor([[0, 1, 1, 1]]))
    out.sum().backward()
    assert (hidden.grad.abs().sum(-1) > 0).tolist() == [[False, True, False, False]]


def test_a_nan_does_not_pass_for_a_small_logit():
    hidden = torch.ones(1, 2, 3)
    hidden[0, 0] = float("nan")
    assert not torch.isfinite(linear_splade(hidden, torch.ones(2, 3))).any()


def test_two_runs_are_equal_and_the_second_derivative_is_that_of_the_definition():
    params, mask = inputs()
    first, second = (run(linear_splade, params, mask) for _ in range(2))
    assert all(map(torch.equal, first, second))
    doubles = [p.detach().double().requires_grad_() for p in params]
    small = [doubles[0][:1, :3], doubles[1][:4], doubles[2][:4]]
    leaves = [p.detach().requires_grad_() for p in small]
    assert torch.autograd.gradcheck(linear_splade, leaves)
    grads = []
    for op in (linear_splade, reference.linear_splade):
        (grad,) = torch.autograd.grad(op(*params, mask).square().sum(), params[1], create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), params[0])[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("pooling", "activation"), FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_near_as_the_definition(pooling, activation, dtype):
    params, mask = inputs(4, 64, 256, 3001, "cuda", torch.float32)
    with torch.no_grad():
        for p in params[1:]:
            p.mul_(0.1)
    exact = run(reference.linear_splade, [p.detach().double().requires_grad_() for p in params], mask,
                pooling=pooling, activation=activation)  # fmt: skip
    rounded = [p.detach().to(dtype).requires_grad_() for p in params]
    options = {"pooling": pooling, "activation": activation}
    ours, theirs = (run(op, rounded, mask, **options) for op in (linear_splade, reference.linear_splade))
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        errors = [((x.double() - true).norm() / true.norm()).item() for x in (mine, other)]
        assert errors[0] < 1.2 * errors[1] + 1e-3, errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "mean"}, "pooling: got 'mean'"),
        ({"activation": "gelu"}, "activation: got 'gelu'"),
        ({"logits_budget_mib": 0}, "logits_budget_mib: got 0"),
        ({"mask": torch.ones(3, 8)}, "mask: got shape"),
        ({"hidden": torch.ones(3, 12)}, "hidden: got shape"),
        ({"weight": torch.ones(45, 11)}, "hidden: got shape"),
        ({"bias": torch.ones(44)}, "bias: got shape"),
    ],
)
def test_wrong_arguments(change, message):
    (hidden, weight, bias), mask = inputs()
    with pytest.raises(ValueError, match=message):
        linear_splade(**{"hidden": hidden, "weight": weight, "bias": bias, "mask": mask} | change)
